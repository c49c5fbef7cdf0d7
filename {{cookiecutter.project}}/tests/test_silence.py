"""A caller who says nothing is asked twice and then wished goodbye; one who speaks is not."""

import asyncio
from pathlib import Path

import pytest
from harness import SECONDS, Harness, classes, run_harness

from rehearsal.engines.scripted import Script

pytestmark = pytest.mark.anyio

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
async def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The bot and its world; the bot soon asks whether anybody is there."""
    async with run_harness(monkeypatch, tmp_path) as harness:
        harness.engine.script = SCRIPT
        monkeypatch.setenv("SILENCE_SECONDS", "0.5")
        yield harness


def said_by_bot(harness: Harness) -> str:
    ended = harness.received.ended
    assert ended
    said = [turn["content"] for turn in ended["transcript"] if turn["role"] == "assistant"]
    return " ".join(said)


@pytest.mark.slow
async def test_silence_is_asked_about_twice_and_who_speaks_has_all_their_chances_again(
    harness: Harness,
) -> None:
    async with harness.caller("twilio") as caller:
        greeting = await caller.hear(within=SECONDS)
        await caller.hear(since=greeting.start + 0.5, within=SECONDS)
        await harness.say(caller)
        await asyncio.wait_for(caller.ended.wait(), SECONDS)
    await harness.over()
    assert said_by_bot(harness) == "Hello. Still there? Good. Still there? Still there? Goodbye."
    assert harness.record["ending"]["reason"] == "idle-timeout"
    assert harness.received.ended and harness.received.ended["callEndedReason"] == "idle-timeout"


async def test_silence_may_be_allowed(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SILENCE_SECONDS", "0")
    async with harness.caller("twilio") as caller:
        await caller.hear(within=SECONDS)
        await caller.hear_out(quiet=1.5, within=SECONDS)
    await harness.over()
    assert said_by_bot(harness) == "Hello."


@pytest.mark.slow
async def test_a_recogniser_that_hangs_is_told_from_a_silent_caller(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SILENCE_SECONDS", "1.5")
    harness.server("stt").faults.hang = True
    async with harness.caller("twilio") as caller:
        await caller.hear(within=SECONDS)
        for _ in range(3):
            await caller.hear_out(quiet=0.3, within=SECONDS)
            said = await harness.say(caller)
            await caller.hear(since=said.end, within=SECONDS)
        await asyncio.wait_for(caller.ended.wait(), SECONDS)
    await harness.over()
    assert "Once more, please." in said_by_bot(harness)
    assert harness.record["ending"]["reason"] == "error"
    assert classes()["stt"] in harness.record["ending"]["detail"]
