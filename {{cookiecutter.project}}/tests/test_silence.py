"""A caller who says nothing is asked twice and then wished goodbye; one who speaks is not."""

import asyncio
from pathlib import Path

import pytest

from rehearsal.script import Script
from tests.stage import SECONDS, Stage, classes, set_stage

pytestmark = pytest.mark.anyio

BOTH_TRANSPORTS = pytest.mark.parametrize("transport", ["twilio", "webrtc"])
SCRIPT = Script.parse(
    {
        "greeting": "Hello.",
        "hears": ["I am here."],
        "answers": [
            {"told": "still there", "says": "Still there?"},
            {"told": "say it again", "says": "Once more, please."},
            {"told": "does not answer", "says": "Goodbye."},
            {"says": "Good."},
        ],
    }
)


@pytest.fixture
async def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The bot and its world; the bot soon asks whether anybody is there."""
    async with set_stage(monkeypatch, tmp_path) as stage:
        stage.engine.script = SCRIPT
        monkeypatch.setenv("SILENCE_SECONDS", "0.5")
        yield stage


def said_by_bot(stage: Stage) -> str:
    ended = stage.received.ended
    assert ended
    said = [turn["content"] for turn in ended["transcript"] if turn["role"] == "assistant"]
    return " ".join(said)


@pytest.mark.slow
@BOTH_TRANSPORTS
async def test_silence_is_asked_about_twice_and_then_ends_the_call(
    stage: Stage, transport: str
) -> None:
    async with stage.caller(transport) as caller:
        await asyncio.wait_for(caller.ended.wait(), SECONDS)
    await stage.over()
    assert said_by_bot(stage) == "Hello. Still there? Still there? Goodbye."
    assert stage.record["ending"]["reason"] == "idle-timeout"
    assert stage.received.ended and stage.received.ended["callEndedReason"] == "idle-timeout"


@pytest.mark.slow
async def test_a_caller_who_speaks_again_has_all_their_chances_again(stage: Stage) -> None:
    async with stage.caller("twilio") as caller:
        greeting = await caller.hear(within=SECONDS)
        await caller.hear(since=greeting.start + 0.5, within=SECONDS)
        await stage.say(caller)
        await asyncio.wait_for(caller.ended.wait(), SECONDS)
    await stage.over()
    assert said_by_bot(stage).endswith("Good. Still there? Still there? Goodbye.")


async def test_silence_may_be_allowed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SILENCE_SECONDS", "0")
    async with stage.caller("twilio") as caller:
        await caller.hear(within=SECONDS)
        await caller.hear_out(quiet=1.5, within=SECONDS)
    await stage.over()
    assert said_by_bot(stage) == "Hello."


@pytest.mark.slow
async def test_a_recogniser_that_hangs_is_told_from_a_silent_caller(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SILENCE_SECONDS", "1.5")
    stage.server("stt").faults.hang = True
    async with stage.caller("twilio") as caller:
        await caller.hear(within=SECONDS)
        for _ in range(3):
            await caller.hear_out(quiet=0.3, within=SECONDS)
            said = await stage.say(caller)
            await caller.hear(since=said.end, within=SECONDS)
        await asyncio.wait_for(caller.ended.wait(), SECONDS)
    await stage.over()
    assert "Once more, please." in said_by_bot(stage)
    assert stage.record["ending"]["reason"] == "error"
    assert classes()["stt"] in stage.record["ending"]["detail"]
