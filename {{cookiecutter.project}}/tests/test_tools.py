"""A tool that hangs or breaks does not hang the call."""

import asyncio
from pathlib import Path

import pytest
from harness import SECONDS, Harness, run_harness
from pipecat.adapters.llm.schemas.tools_schema import ToolsSchema
from pipecat.services.llm_service import FunctionCallParams

import bot
import services
from rehearsal.engines.engine import ToolCall
from rehearsal.engines.scripted import Answer, Script

pytestmark = pytest.mark.anyio


@pytest.fixture
async def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The bot and its world; whatever the caller says, the LLM calls look_up."""
    async with run_harness(monkeypatch, tmp_path) as harness:
        harness.engine.script = Script(
            greeting="Hello.",
            answers=(
                Answer(result="look_up", says="I could not find it."),
                Answer(calls=(ToolCall("look_up"),)),
            ),
        )
        yield harness


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["hangs", "raises"])
async def test_the_llm_speaks_after_a_tool_that_fails(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    async def look_up(params: FunctionCallParams) -> None:
        """Look something up."""
        if fault == "raises":
            raise LookupError("not there")
        await asyncio.Event().wait()

    monkeypatch.setattr(services, "TOOL_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(bot.tools, "offered", lambda: ToolsSchema([look_up]))
    async with harness.caller("twilio") as caller:
        await caller.hear(within=SECONDS)
        await caller.hear_out(quiet=0.4, within=SECONDS)
        said = await harness.say(caller)
        await caller.hear(since=said.end, within=SECONDS)
        await caller.hear_out(quiet=0.5, within=SECONDS)
    assert (await harness.over()).error is None
    assert harness.received.ended
    said = " ".join(turn["content"] for turn in harness.received.ended["transcript"])
    assert said.endswith("I could not find it.")
