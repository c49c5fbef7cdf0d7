"""A tool that hangs or breaks does not hang the call."""

import asyncio
from pathlib import Path

import pytest
from aiohttp import web
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
        await harness.hear_greeting(caller)
        await harness.ask(caller)
    assert (await harness.over()).error is None
    assert harness.received.ended
    said = " ".join(turn["content"] for turn in harness.received.ended["transcript"])
    assert said.endswith("I could not find it.")


@pytest.mark.slow
async def test_a_message_is_sent_once_whatever_the_caller_says_meanwhile(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled by speech, it would be served all the same, and sent again."""
    arguments = {"message": "Please call Ada back.", "callback_number": "5550100"}
    harness.engine.script = Script(
        greeting="Hello.",
        hears=("I have a message.", "Yes, that is right.", "Hello, still there?"),
        answers=(
            Answer(heard="still there", says="I am on it."),
            Answer(result="take_message", says="All right."),
            Answer(calls=(ToolCall("take_message", arguments),)),
        ),
    )
    posted, may_answer = asyncio.Event(), asyncio.Event()
    posts: list[str] = []

    async def take(request: web.Request) -> web.Response:
        posts.append(await request.text())
        posted.set()
        await may_answer.wait()
        return web.Response(status=204)

    app = web.Application()
    app.router.add_post("/messages", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    monkeypatch.setenv("MESSAGE_URL", f"http://127.0.0.1:{port}/messages")
    monkeypatch.setattr(bot.tools, "MESSAGE_SECONDS", SECONDS)
    monkeypatch.setattr(services, "TOOL_TIMEOUT_SECONDS", SECONDS)
    try:
        async with harness.caller("twilio") as caller:
            await harness.hear_greeting(caller)
            await harness.ask(caller)
            await harness.say(caller)
            await asyncio.wait_for(posted.wait(), SECONDS)
            said = await harness.say(caller)
            await caller.hear(since=said.end, within=SECONDS)
            may_answer.set()
            await caller.hear_out(quiet=1.0, within=SECONDS)
        await harness.over()
    finally:
        may_answer.set()
        await runner.cleanup()
    assert len(posts) == 1
    told = str(harness.engine.asked[-1])
    assert "CANCELLED" not in told
    assert '"status": "sent"' in told.replace("\\", "")
