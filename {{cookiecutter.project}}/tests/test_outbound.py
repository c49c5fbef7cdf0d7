"""Calls that the bot places: who picks up, and what is left of it."""

import asyncio
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from harness import SECONDS, Harness, run_harness, serve_app
from pipecat.frames.frames import Frame, TTSSpeakFrame
from pipecat.processors.frame_processor import FrameDirection
from pipecat.services.tts_service import TTSService

from conversation import opening
from rehearsal.call import spoken_voice
from rehearsal.callers.twilio import TwilioCaller
from rehearsal.dial import ENVIRONMENT, who_is_called
from rehearsal.dial import FROM_NUMBER as FROM
from rehearsal.engines.scripted import Answer, Script, ScriptedEngine
from rehearsal.providers.faults import ALWAYS
from rehearsal.providers.server import HOST, free_port
from rehearsal.providers.twilio_rest import Callee, sign
from telephony import call_api
from telephony.errand import Errand
from telephony.outbound import Outbound
from telephony.twilio_auth import guard

pytestmark = pytest.mark.anyio

KEY = "an-auth-token"
NUMBER = "+4930123456"
ERRAND = Errand(callee_number=NUMBER, callee_name="Ann", call_reason="your appointment")
MESSAGE = "A message for Ann about your appointment."
ENGAGED, BUSY = "+4930123450", "all lines are busy"


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
        phone: The telephone that was called, with what was heard there.
    """

    outcome: str
    record: dict[str, Any]
    phone: TwilioCaller | None

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
    # Where a busy machine makes two of one sound, the second has no words.
    hears = (*words, "")
    harness.engine.script = Script(hears=hears, answers=(Answer(says="Good. Goodbye."),))
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
    phone = callee.phone if isinstance(callee.phone, TwilioCaller) else None
    return Called(outcome, record, phone)


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
    # On a busy machine it may be asked with a part of their answer, and then anew with all of it.
    assert asked[-1][-1]["content"] == "That suits me."
    contents = [a[-1]["content"] for a in asked]
    assert all(content and "That suits me.".startswith(content) for content in contents)


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
    # On a busy machine a greeting has pauses, and who hears one has heard all.
    assert called.said and " ".join(said).startswith(" ".join(called.said))
    assert not harness.engine.asked
    # What was held back, until it was known who is there, does not count as asked.
    assert "llm_requests" not in called.record["usage"]


def fails_at_the_message(
    monkeypatch: pytest.MonkeyPatch, harness: Harness, fault: str, value: int
) -> None:
    """Have the voice, healthy so far, fail when it is first given a text of ours to say."""
    faults, process, is_set = harness.server("tts").faults, TTSService.process_frame, False

    async def fail(self: TTSService, frame: Frame, direction: FrameDirection) -> None:
        nonlocal is_set
        if isinstance(frame, TTSSpeakFrame) and not is_set:
            is_set = True
            setattr(faults, fault, value)
        await process(self, frame, direction)

    monkeypatch.setattr(TTSService, "process_frame", fail)


async def heard_messages(called: Called) -> float:
    """How much was heard, the whole message being one."""
    once = await spoken_voice(ScriptedEngine(), MESSAGE)
    assert called.phone
    heard = called.phone.heard
    return loud_seconds(heard.pcm(), heard.sample_rate) / loud_seconds(once.pcm, once.sample_rate)


def loud_seconds(pcm: bytes, sample_rate: int) -> float:
    """How much of PCM16 is loud, sample by sample: the holes of a busy process add nothing."""
    return np.count_nonzero(np.abs(np.frombuffer(pcm, "<i2").astype(int)) > 500) / sample_rate


ON_VOICEMAIL = "Leave a message after the tone."


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["server_errors", "cuts"])
async def test_a_message_that_the_voice_did_not_say_to_its_end_is_said_again(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    fails_at_the_message(monkeypatch, harness, fault, 1)
    called = await call(harness, "voicemail", ON_VOICEMAIL)
    assert called.ending == ("voicemail", "the message of voicemail.md was left")
    assert called.said[-1] == MESSAGE
    heard = await heard_messages(called)
    # Nothing besides: an apology or "one moment" is not for a machine.
    assert 0.8 < heard < (1.2 if fault == "server_errors" else 2)
    assert {text.strip() for text in harness.spoken} == {MESSAGE}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["server_errors", "hang", "wrong_key"])
async def test_a_message_that_cannot_be_said_was_not_left(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    fails_at_the_message(monkeypatch, harness, fault, ALWAYS)
    called = await call(harness, "voicemail", ON_VOICEMAIL)
    assert called.ending == ("error", "the voicemail's message could not be said")
    assert await heard_messages(called) == 0
    assert MESSAGE not in called.said


NOT_TAKEN = (
    # What comes of it, what the network answers, and what the record says then.
    ("busy", "", "busy"),
    ("busy", "603", "declined"),
    ("failed", "404", "failed"),
    ("no-answer", "", "no-answer"),
    ("taken back", "", "cancelled"),
)


@pytest.mark.parametrize("is_told", [True, False], ids=["told by Twilio", "asking Twilio"])
async def test_a_call_that_nobody_takes_has_its_ending_in_a_record_though_no_pipeline_ran(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    """Told, the bot's server writes it; else whoever asks how the call stands, and no SIP code."""
    twilio, port = harness.providers.twilio, free_port()
    twilio.auth_token = KEY
    monkeypatch.setenv("TWILIO_STREAM_URL", "wss://voice.example.org/ws")
    async with serve_app(bots_server(f"{HOST}:{port}"), port):
        for does, sip_code, reason in NOT_TAKEN:
            rings_s = 0.3 if does == "taken back" else 0.0
            twilio.callees[NUMBER] = Callee(does=does, sip_code=sip_code, rings_s=rings_s)
            calls = Outbound(
                agent="bot",
                host=f"{HOST}:{port}" if is_told else "",
                tell=lambda _text: None,
                ask_every_seconds=0.02,
            )
            sid = await calls.place(ERRAND)
            following = asyncio.create_task(calls.follow(sid, ERRAND))
            if does == "taken back":
                asked = len(twilio.requests)
                await harness.providers.log.until(
                    lambda n=asked + 2: len(twilio.requests) > n, within_s=SECONDS
                )
                following.cancel()
            else:
                assert await following == does
            await harness.roark.until(
                lambda sid=sid: sid in harness.roark.calls and harness.roark.calls[sid].whole,
                timeout=SECONDS,
            )
            if reason == "declined" and not is_told:
                reason = "busy"
            record = harness.record
            assert record["ending"]["reason"] == reason
            assert record["phone"] == {"from_number": FROM, "to_number": NUMBER, "call_id": sid}
            assert record["metadata"]["direction"] == "outbound"
            assert record["metadata"].get("sip_response_code") == (
                (sip_code or {"busy": "486"}.get(does, "487")) if is_told else None
            )
            (harness.folder / "call.json").unlink()
    assert len(harness.roark.calls) == len(NOT_TAKEN), "one record of each"
    assert not harness.image.sessions


def bots_server(host: str) -> FastAPI:
    """What `python bot.py -t twilio -x HOST` adds to Pipecat's server."""
    app = FastAPI()
    guard(app, ["-t", "twilio", "-x", host] if host else [])
    call_api.serve(app, agent="bot", busy=lambda number: BUSY if number == ENGAGED else "")
    return app


async def test_nobody_but_twilio_says_how_a_call_ended(harness: Harness) -> None:
    http = TestClient(bots_server("voice.example.org"))
    end = {"CallSid": "CA" + "0" * 32, "CallStatus": "busy", "From": FROM, "To": NUMBER}
    address = "https://voice.example.org/calls/status"
    for key, sid, status in ((KEY, "CA1", 204), ("another", end["CallSid"], 403)):
        form = {**end, "CallSid": sid}
        signed = {"X-Twilio-Signature": sign(key, address, form)}
        assert http.post("/calls/status", data=form, headers=signed).status_code == status
    assert http.post("/calls/status", data=end).status_code == 403
    assert not harness.roark.calls


async def test_who_only_says_that_the_bot_has_called_them_is_nobodys_errand(
    harness: Harness,
) -> None:
    forged = {**ERRAND.parameters("another"), "call_reason": "whatever they like"}
    async with harness.caller("twilio", parameters=forged) as stranger:
        await asyncio.wait_for(stranger.ended.wait(), SECONDS)
    await harness.over()
    assert not harness.roark.calls


async def test_a_call_is_placed_over_http_by_who_has_the_key_and_nobody_asks_how_it_stands(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALL_API_KEY", "a-key")
    monkeypatch.setenv("CALL_PREFIXES", "+49")
    twilio, port = harness.providers.twilio, free_port()
    twilio.auth_token = KEY
    twilio.callees[NUMBER] = Callee(does="busy")
    body = {"to": NUMBER, "name": "Ann", "reason": "your appointment", "digits": "1"}
    right = {"Authorization": "Bearer a-key"}
    async with (
        serve_app(bots_server(f"{HOST}:{port}"), port),
        httpx.AsyncClient(base_url=f"http://{HOST}:{port}") as http,
    ):
        for asked, headers, status, sentence in (
            (body, {}, 401, "needs Authorization: Bearer CALL_API_KEY"),
            ([], right, 400, "is a JSON object with to, name and reason"),
            ({**body, "transport": "pigeon"}, right, 400, "is twilio or daily"),
            ({**body, "to": ENGAGED}, right, 503, BUSY),
            ({**body, "to": "030123456"}, right, 422, r"not in E\.164 form"),
        ):
            answer = await http.post("/calls", json=asked, headers=headers)
            assert answer.status_code == status
            assert re.search(sentence, answer.json()["detail"])
        answer = await http.post("/calls", json=body, headers=right)
        assert answer.status_code == 201
        sid = answer.json()["sid"]
        await harness.roark.until(
            lambda: sid in harness.roark.calls and harness.roark.calls[sid].whole, timeout=SECONDS
        )
    assert harness.record["ending"]["reason"] == "busy"
    (request,) = twilio.requests
    assert request.method == "POST"
    assert 'digits="1"' in request.body["Twiml"]
    answer = TestClient(bots_server("")).post("/calls", json=body, headers=right)
    assert answer.status_code == 422
    assert "public host is missing" in answer.json()["detail"]
