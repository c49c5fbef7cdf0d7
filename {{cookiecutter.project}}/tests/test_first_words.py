"""What the bot says first: the words of GREETING, and the LLM knows that they were said."""

from pathlib import Path

import pytest
from harness import SECONDS, Harness, run_harness

from rehearsal.engines.scripted import Answer, Script

pytestmark = pytest.mark.anyio

GREETING = "Good morning. This call is recorded."


@pytest.fixture
async def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A bot whose first words are given, and a script whose own would be others."""
    async with run_harness(monkeypatch, tmp_path) as harness:
        monkeypatch.setenv("GREETING", GREETING)
        harness.engine.script = Script(
            greeting="The LLM greets.", answers=(Answer(says="I hear you."),)
        )
        yield harness


@pytest.mark.slow
async def test_the_given_greeting_is_spoken_before_the_llm_is_asked_and_remembered(
    harness: Harness,
) -> None:
    async with harness.caller("twilio") as caller:
        await caller.hear(within=SECONDS)
        await caller.hear_out(quiet=0.5, within=SECONDS)
        assert not harness.engine.asked
        said = await harness.say(caller)
        await caller.hear(since=said.end, within=SECONDS)
        await caller.hear_out(quiet=0.5, within=SECONDS)
    await harness.over()

    *_, greeted, heard = harness.engine.asked[0]
    assert (greeted["role"], greeted["content"]) == ("assistant", GREETING)
    assert heard["role"] == "user"
    transcript = harness.received.ended["transcript"] if harness.received.ended else []
    assert " ".join(turn["content"] for turn in transcript[:-2]) == GREETING
    assert "The LLM greets." not in harness.spoken


async def test_a_voice_that_hangs_at_the_given_greeting_is_named_and_the_call_ends(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANSWER_SECONDS", "0.3")
    harness.server("tts").faults.hang = True
    async with harness.caller("twilio"):
        await harness.over()
    assert harness.record["ending"]["reason"] == "error"
    assert "TTS" in harness.record["ending"]["detail"]
