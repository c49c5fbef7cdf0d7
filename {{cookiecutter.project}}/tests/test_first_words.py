"""What the bot says first: the words of GREETING, and the LLM knows that they were said.

A caller may speak at pick-up: a "hello?" is answered by the greeting, and a sentence with it.
"""

import asyncio
from pathlib import Path

import pytest
from harness import SECONDS, Harness, run_harness

import bot
from rehearsal.callers.caller import Caller
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
@pytest.mark.parametrize(
    ("transport", "options"),
    [
        pytest.param("twilio", {}, id="by phone"),
        pytest.param("webrtc", {"rtvi": False}, id="a client that never says it is ready"),
    ],
)
async def test_the_given_greeting_is_spoken_before_the_llm_is_asked_and_remembered(
    harness: Harness, transport: str, options: dict[str, bool]
) -> None:
    async with harness.caller(transport, **options) as caller:
        await harness.hear_greeting(caller)
        assert not harness.engine.asked
        await harness.ask(caller)
    await harness.over()

    *_, greeted, heard = harness.engine.asked[0]
    assert (greeted["role"], greeted["content"]) == ("assistant", GREETING)
    assert heard["role"] == "user"
    transcript = harness.received.ended["transcript"] if harness.received.ended else []
    assert " ".join(turn["content"] for turn in transcript[:-2]) == GREETING
    assert "The LLM greets." not in harness.spoken


async def test_without_a_greeting_the_llm_is_told_to_say_that_the_call_is_recorded_where_it_is(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GREETING")
    async with harness.caller("twilio") as caller:
        await caller.hear(within=SECONDS)
    await harness.over()
    told = harness.engine.asked[0][-1]["content"]
    assert ((bot.RECORDED or "recorded") in told) == bool(bot.RECORDED)


async def test_a_voice_that_hangs_at_the_given_greeting_is_named_and_the_call_ends(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANSWER_SECONDS", "0.3")
    harness.server("tts").faults.hang = True
    async with harness.caller("twilio"):
        await harness.over()
    assert harness.record["ending"]["reason"] == "error"
    assert "TTS" in harness.record["ending"]["detail"]


# 0.39 s of voice, as long as the word is.
HELLO = "mh" + "m" * 11
SENTENCE = "Please, an appointment for Tuesday afternoon."
LONG_GREETING = "Good morning, this is the clinic. This call is recorded. What can I do for you?"


@pytest.mark.slow
@pytest.mark.timed
async def test_a_hello_at_pick_up_does_not_cost_the_greeting_and_a_sentence_is_answered_with_it(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LANGUAGE", "en")
    monkeypatch.setenv("GREETING", LONG_GREETING)
    harness.engine.script = Script(hears=("Hello?",))
    async with harness.caller("twilio") as caller:
        await asyncio.sleep(0.1)
        hello = await harness.say(caller, HELLO)
        await asyncio.sleep(1.5 - (hello.end - hello.start))
        await harness.say(caller, HELLO)
        await caller.hear(since=0.0, within=SECONDS)
        await caller.hear_out(quiet=1.0, within=SECONDS)
        assert both_at_once(caller) < 0.5
    await harness.over()
    assert " ".join(text.strip() for text in harness.spoken) == LONG_GREETING
    assert not harness.engine.asked

    harness.engine.script = Script(
        greeting=LONG_GREETING, hears=(SENTENCE,), answers=(Answer(says="Good morning. Yes."),)
    )
    for number, greeting in enumerate((LONG_GREETING, ""), start=1):
        monkeypatch.setenv("GREETING", greeting)
        async with harness.caller("twilio") as caller:
            await asyncio.sleep(0.1)
            await harness.ask(caller, SENTENCE)
            assert both_at_once(caller) < 0.5
        await harness.over(number)
        messages = harness.engine.asked[-1]
        assert (messages[-1]["role"], messages[-1]["content"]) == ("user", SENTENCE)
        about_greeting = greeting or "Greet them"
        assert any(
            message["content"].startswith("[") and about_greeting in message["content"]
            for message in messages
        )


def both_at_once(caller: Caller) -> float:
    """The longest time for which caller and bot were heard together, seconds."""
    overlaps = [
        min(said.end, heard.end) - max(said.start, heard.start)
        for said in caller.sent
        for heard in caller.heard.utterances
    ]
    return max(overlaps, default=0.0)
