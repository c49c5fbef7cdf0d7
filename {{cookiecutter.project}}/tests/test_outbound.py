"""Calls that the bot places: who picks up, and what is left of it."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness import SECONDS, Harness, run_harness

from conversation import opening
from rehearsal.call import spoken_voice
from rehearsal.dial import ENVIRONMENT, who_is_called
from rehearsal.engines.scripted import Answer, Script, ScriptedEngine
from telephony.errand import Errand
from telephony.outbound import Outbound

pytestmark = pytest.mark.anyio

KEY = "an-auth-token"
NUMBER = "+4930123456"
ERRAND = Errand(callee_number=NUMBER, callee_name="Ann", call_reason="your appointment")
MESSAGE = "A message for Ann about your appointment."


@pytest.fixture
def may_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that calling out needs."""
    for name, value in {**ENVIRONMENT, "TWILIO_AUTH_TOKEN": KEY, "TWILIO_STREAM_URL": ""}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
async def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, may_call: None):
    """A bot that calls out, and a telephone network."""
    async with run_harness(monkeypatch, tmp_path) as harness:
        for name, value in {**ENVIRONMENT, "TWILIO_AUTH_TOKEN": KEY, "MAX_CALLS": "0"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("CALL_GREETING", "Hello {name}, about {reason}.")
        message = tmp_path / "voicemail.md"
        message.write_text("A message for {name} about {reason}.\n")
        monkeypatch.setattr(opening, "VOICEMAIL_FILE", message)
        monkeypatch.setattr(opening, "NOBODY_SECONDS", 4.0)
        yield harness


@dataclass
class Called:
    """A call that is over.

    Attributes:
        outcome: What whoever placed it was told in the end.
        record: Its call record.
    """

    outcome: str
    record: dict[str, Any]

    @property
    def ending(self) -> tuple[str, str]:
        """Reason and detail."""
        return self.record["ending"]["reason"], self.record["ending"]["detail"]

    @property
    def said(self) -> list[str]:
        """What the bot said."""
        return [turn["text"] for turn in self.record["turns"] if turn["role"] == "assistant"]


async def call(harness: Harness, kind: str, *words: str, digits: str = "") -> Called:
    """Have the bot call somebody who says `words`, until it is over."""
    voices = [await spoken_voice(ScriptedEngine(), text) for text in words]
    harness.engine.script = Script(hears=words, answers=(Answer(says="Good. Goodbye."),))
    callee = who_is_called(kind, voices, lambda _text: None, rings_s=0.1)
    harness.providers.twilio.callees[NUMBER] = callee
    host = harness.url.partition("://")[2]
    calls = Outbound(agent="bot", host=host, tell=lambda _text: None, ask_every_seconds=0.1)
    sid = await calls.place(ERRAND, digits=digits)
    async with asyncio.timeout(2 * SECONDS):
        outcome = await calls.follow(sid, ERRAND)
        if callee.phone:
            await harness.over()
    record = harness.record
    assert record["metadata"]["direction"] == "outbound"
    assert record["phone"]["to_number"] == NUMBER
    assert harness.received.ended
    assert harness.received.ended["callEndedReason"] == record["ending"]["reason"]
    return Called(outcome, record)


GREETING = "Hello Ann, about your appointment."


@pytest.mark.slow
async def test_a_person_is_greeted_when_they_have_said_hello_and_talks_with_the_llm(
    harness: Harness,
) -> None:
    called = await call(harness, "person", "Hello?", "That suits me.", digits="ww1")
    assert called.outcome == "completed"
    assert called.ending == ("client-disconnected", "the callee hung up")
    # On a busy machine the greeting has holes, and who hears one speaks into it.
    assert GREETING.startswith(called.said[0])
    assert called.said[-1] == "Good. Goodbye."
    assert [digits for _, digits in harness.providers.twilio.pressed] == ["ww1"]
    asked = harness.engine.asked
    assert asked
    # What the LLM was asked knows whom it has on the line, and the first words were not its own.
    assert all("you have called Ann, about your appointment" in a[0]["content"] for a in asked)
    assert {a[-1]["content"] for a in asked} == {"That suits me."}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "words", "reason", "said"),
    [
        ("voicemail", ["Leave a message after the tone."], "voicemail", [MESSAGE]),
        ("screening", ["Please say your name."], "declined", [GREETING]),
        ("silent", [], "no-answer", [GREETING]),
    ],
)
async def test_whatever_else_picks_up_has_its_ending_and_the_llm_is_not_asked(
    harness: Harness, kind: str, words: list[str], reason: str, said: list[str]
) -> None:
    called = await call(harness, kind, *words)
    assert (called.outcome, called.ending[0]) == ("completed", reason)
    # On a busy machine a greeting has pauses, and is two turns.
    assert " ".join(called.said) == " ".join(said)
    assert not harness.engine.asked


@pytest.mark.parametrize("kind", ["busy", "no-answer"])
async def test_a_call_that_nobody_takes_has_its_ending_in_a_record_though_no_pipeline_ran(
    harness: Harness, kind: str
) -> None:
    called = await call(harness, kind)
    assert called.outcome == called.ending[0] == kind
    assert not harness.image.sessions


async def test_who_only_says_that_the_bot_has_called_them_is_nobodys_errand(
    harness: Harness,
) -> None:
    forged = {**ERRAND.parameters("another"), "call_reason": "whatever they like"}
    async with harness.caller("twilio", parameters=forged) as stranger:
        await asyncio.wait_for(stranger.ended.wait(), SECONDS)
    await harness.over()
    assert not harness.roark.calls
