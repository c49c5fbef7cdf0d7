"""Calls that the bot places: who may be called, who picks up, and what is left of it."""

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from harness import SECONDS, Harness, run_harness

from conversation import opening
from conversation.opening import Listener, Tones, Who
from rehearsal.call import spoken_voice
from rehearsal.dial import ENVIRONMENT, beep, who_is_called
from rehearsal.engines.scripted import Answer, Script, ScriptedEngine
from rehearsal.providers.all import serve
from telephony import __main__ as command
from telephony import call_api
from telephony.errand import Errand, NotPlaced, check
from telephony.outbound import Outbound
from telephony.twilio_auth import Gate

pytestmark = pytest.mark.anyio

KEY = "an-auth-token"
NUMBER = "+4930123456"
ERRAND = Errand(callee_number=NUMBER, callee_name="Ann", call_reason="your appointment")
NOON = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)
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
    assert called.said == said
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


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def listen(*events: tuple[float, str, str]) -> tuple[Listener, list[tuple[float, Who]]]:
    """Play (seconds, what, words) to a listener; return it and its verdicts with their times."""
    clock = Clock()
    listener = Listener(clock=clock)
    verdicts: list[tuple[float, Who]] = []
    waiting = list(events)
    for tick in range(400):
        clock.now = tick / 10
        while waiting and waiting[0][0] <= clock.now:
            _, what, words = waiting.pop(0)
            match what:
                case "begins":
                    listener.speech_began()
                case "ends":
                    listener.speech_ended()
                case "beep":
                    listener.tone_ended(1000.0, 0.4)
                case _:
                    listener.words(words, is_final=True)
        who = listener.look()
        if who and (not verdicts or verdicts[-1][1] is not who):
            verdicts.append((clock.now, who))
    return listener, verdicts


def spoken(begin: float, end: float, words: str) -> list[tuple[float, str, str]]:
    return [(begin, "begins", ""), (end, "ends", ""), (end + 0.3, "words", words)]


@pytest.mark.parametrize(
    ("words", "seconds", "who"),
    [
        ("Hello?", 0.5, Who.PERSON),
        ("Good morning, Miller and Sons, this is Petra speaking, how may I help?", 4.0, Who.PERSON),
        ("May I ask who's calling?", 1.5, Who.SCREENING),
        ("If you record your name and reason for calling, I'll see.", 4.0, Who.SCREENING),
        ("For sales, press one.", 2.0, Who.MENU),
        ("Leave your name and the reason for your call after the tone.", 4.0, Who.VOICEMAIL),
        ("Bitte hinterlassen Sie eine Nachricht nach dem Signalton.", 4.0, Who.VOICEMAIL),
        ("もしもし", 0.5, Who.PERSON),
    ],
)
def test_people_and_machines_are_told_apart_by_what_they_say(
    words: str, seconds: float, who: Who
) -> None:
    _, verdicts = listen(*spoken(0.5, 0.5 + seconds, words))
    assert [one for _, one in verdicts] == [who]
    assert verdicts[0][0] <= 0.5 + seconds + 1.3


def test_a_person_is_answered_soon_and_a_greeting_with_a_pause_is_still_a_voicemails() -> None:
    _, verdicts = listen(*spoken(0.5, 1.0, "Hello?"))
    assert verdicts == [(pytest.approx(1.45, abs=0.06), Who.PERSON)]
    # A word that is recognised before there is a voice is not the end of it.
    _, verdicts = listen((0.7, "words", "Hello?"), (1.2, "begins", ""), (1.6, "ends", ""))
    assert verdicts == [(pytest.approx(2.05, abs=0.06), Who.PERSON)]
    first = spoken(0.5, 1.5, "Hi, this is Bob.")
    _, verdicts = listen(*first, *spoken(3.0, 5.0, "Leave me a message."))
    assert [who for _, who in verdicts] == [Who.PERSON, Who.VOICEMAIL]


def test_a_screening_that_beeps_for_the_name_is_answered_and_may_end_at_a_voicemail() -> None:
    asks = [*spoken(0.5, 3.0, "Say your name after the tone."), (3.1, "beep", "")]
    _, verdicts = listen(*asks)
    assert [who for _, who in verdicts] == [Who.SCREENING]
    _, verdicts = listen(*asks, *spoken(9.0, 11.0, "Leave a message."))
    assert [who for _, who in verdicts] == [Who.SCREENING, Who.VOICEMAIL]


def test_the_message_waits_for_the_beep_or_for_a_silence_where_none_comes() -> None:
    greeting = spoken(0.5, 5.0, "Leave a message.")
    listener, _ = listen(*greeting)
    assert listener.wants_message
    clock = Clock()
    listener = Listener(clock=clock)
    listener.words("Leave a message.", is_final=True)
    listener.look()
    clock.now = 1.0
    assert not listener.wants_message
    listener.tone_ended(1000.0, 0.4)
    assert listener.wants_message


def test_silence_is_nobody_and_the_bot_begins_after_two_seconds() -> None:
    clock = Clock()
    listener = Listener(clock=clock)
    clock.now = 1.9
    assert not listener.is_quiet_from_the_start
    clock.now = 2.0
    assert listener.is_quiet_from_the_start
    _, verdicts = listen()
    assert verdicts == [(10.0, Who.NOBODY)]
    listener.is_spoken_to, clock.now = True, 11.0
    assert listener.look() is None
    listener.is_spoken_to = False
    assert listener.look() is Who.NOBODY


async def test_a_beep_and_a_fax_are_heard_and_no_voice_is_taken_for_one() -> None:
    def who(pcm: bytes) -> Who | None:
        listener = Listener(clock=Clock())
        Tones(listener).feed(pcm + bytes(3200), 8000)
        return listener.look()

    pieces = [piece.pcm async for piece in ScriptedEngine().speak("Ohm " * 9, 8000)]
    noise = np.random.default_rng(1).normal(0, 3000, 16000).astype("<i2").tobytes()
    assert who(beep()) is Who.VOICEMAIL
    assert who(beep(2100, 1.2)) is Who.FAX
    assert who(b"".join(pieces)) is who(noise) is who(beep(seconds=0.06)) is None


@pytest.mark.parametrize(
    ("setting", "value", "errand", "sentence"),
    [
        ("", "", {"callee_number": "030123456"}, "not in E.164 form"),
        ("", "", {"callee_number": "+99912345678"}, "no country's code"),
        ("", "", {"callee_number": "+4912"}, "not in E.164 form"),
        ("CALL_PREFIXES", "", {}, "CALL_PREFIXES is empty"),
        ("CALL_PREFIXES", "+44,+31", {}, "begins with none of CALL_PREFIXES"),
        ("CALL_HOURS", "always", {}, "CALL_HOURS is like 08-20"),
        ("CALL_HOURS", "14-20", {}, "it is 13:00 in Europe/Berlin"),
        ("", "", {"call_reason": " "}, "name and reason are needed"),
        ("CALL_FROM", "", {}, "CALL_FROM is the number"),
        ("TWILIO_AUTH_TOKEN", "", {}, "TWILIO_ACCOUNT_SID"),
        ("TWILIO_ACCOUNT_SID", "AC1", {}, "TWILIO_ACCOUNT_SID"),
    ],
)
@pytest.mark.usefixtures("may_call")
def test_what_may_not_be_called_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, setting: str, value: str, errand: dict[str, str], sentence: str
) -> None:
    if setting:
        monkeypatch.setenv(setting, value)
    if errand.get("callee_number", "").startswith("+999"):
        monkeypatch.setenv("CALL_PREFIXES", "+999")
    whom = {"callee_number": NUMBER, "callee_name": "Ann", "call_reason": "it", **errand}
    with pytest.raises(NotPlaced, match="(?i)" + sentence.replace("+", r"\+")) as refusal:
        Outbound(agent="bot", host="voice.example.org", tell=print)
        check(Errand(**whom), now=lambda: NOON)
    assert "\n" not in str(refusal.value)


@pytest.mark.usefixtures("may_call")
def test_the_command_says_what_is_missing_and_calls_nobody(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "load_dotenv", lambda **_: False)
    assert command.main(["call", NUMBER, "--name", "Ann", "--reason", "it"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Not called: the bot's public host is missing: --webhook-host")
    assert len(said.splitlines()) == 1


@pytest.mark.usefixtures("may_call")
async def test_a_bot_at_pipecat_cloud_is_named_in_the_streams_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serve(ScriptedEngine()) as providers:
        monkeypatch.setenv("TWILIO_BASE_URL", providers.environment["TWILIO_BASE_URL"])
        calls = Outbound(agent="bot", cloud_agent="bot.acme", tell=print)
        sid = await calls.place(ERRAND, digits="1w2")
        assert providers.twilio.placed[sid]["to"] == NUMBER
        (request,) = providers.twilio.requests
        monkeypatch.setenv("CALL_FROM", "+1")
        with pytest.raises(NotPlaced, match="CALL_FROM"):
            Outbound(agent="bot", cloud_agent="bot.acme", tell=print)
        providers.twilio.faults.wrong_key = True
        with pytest.raises(NotPlaced, match="Twilio refused the call with 401: Authenticate"):
            await calls.place(ERRAND)
    play, connect = ElementTree.fromstring(request.body["Twiml"])
    assert play.attrib == {"digits": "1w2"}
    assert connect[0].attrib["url"] == "wss://api.pipecat.daily.co/ws/twilio"
    brought = {one.attrib["name"]: one.attrib["value"] for one in connect[0]}
    assert brought["_pipecatCloudServiceHost"] == "bot.acme"
    assert Errand.of(brought) == ERRAND
    assert ERRAND.is_ours(dict(brought), Gate(KEY))


def test_an_errand_is_taken_once_and_as_it_was_signed() -> None:
    gate = Gate(KEY)
    brought: dict[str, object] = dict(ERRAND.parameters(KEY))
    other = Errand.of({**brought, "call_reason": "your money"})
    assert Errand.of(brought) == ERRAND
    assert not other.is_ours(dict(brought), gate)
    assert not ERRAND.is_ours(dict(brought), Gate("another"))
    assert ERRAND.is_ours(dict(brought), gate)
    assert not ERRAND.is_ours(dict(brought), gate)
    assert not ERRAND.is_ours(dict(brought), None), "no auth token, no errand"


@pytest.mark.usefixtures("may_call")
async def test_a_call_is_placed_over_http_by_who_has_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CALL_API_KEY", "a key")
    placed: list[tuple[Errand, str]] = []

    async def place(_self: Outbound, errand: Errand, *, digits: str = "") -> str:
        placed.append((errand, digits))
        return "CA" + "0" * 32

    async def follow(_self: Outbound, _sid: str, _errand: Errand) -> str:
        return "completed"

    monkeypatch.setattr(Outbound, "place", place)
    monkeypatch.setattr(Outbound, "follow", follow)
    app = FastAPI()
    app.state.twilio_host = "voice.example.org"
    refusals: list[str] = []
    call_api.serve(app, agent="bot", busy=lambda _number: "".join(refusals))
    http = TestClient(app)
    body = {"to": NUMBER, "name": "Ann", "reason": "your appointment", "digits": "1"}
    assert http.post("/calls", json=body).status_code == 401
    right = {"Authorization": "Bearer a key"}
    assert http.post("/calls", content="no", headers=right).status_code == 400
    answer = http.post("/calls", json=body, headers=right)
    assert (answer.status_code, answer.json()) == (201, {"sid": "CA" + "0" * 32})
    assert placed == [(ERRAND, "1")]
    refusals.append("all lines are busy")
    assert http.post("/calls", json=body, headers=right).status_code == 503
    app.state.twilio_host = ""
    refusals.clear()
    answer = http.post("/calls", json=body, headers=right)
    assert answer.status_code == 422
    assert "public host is missing" in answer.json()["detail"]
