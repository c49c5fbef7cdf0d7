"""A phone call handed over to a person, and taken back where nobody answers."""

import asyncio
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from xml.etree import ElementTree

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from harness import SECONDS, Harness, run_harness

from conversation import phrases
from rehearsal.callers.twilio import TwilioCaller
from rehearsal.engines.engine import ToolCall
from rehearsal.engines.scripted import Answer, Script, ScriptedEngine
from rehearsal.host.bot_process import BotFailed, run_bot
from rehearsal.providers.all import serve as serve_providers
from rehearsal.providers.server import HOST, free_port
from rehearsal.providers.twilio_rest import Colleague, sign
from telephony import transfer, twilio_auth

pytestmark = pytest.mark.anyio

ACCOUNT = "AC" + "0123456789abcdef" * 2
CALL = "CA" + "0123456789abcdef" * 2
COLLEAGUE = "+493012345678"
KEY = "an-auth-token"
ABOUT = "Frau Özdemir möchte ihren Termin verlegen."
SCRIPT = Script(
    greeting="Good morning.",
    hears=("I want a person.", "A message, please."),
    answers=(
        Answer(
            heard="person", calls=(ToolCall("transfer_call", {"name": "ann", "summary": ABOUT}),)
        ),
        Answer(told="the line of ann is busy", says="Ann is busy, a message?"),
        Answer(result="transfer_call", says="That did not work, a message?"),
        Answer(heard="message", says="Go ahead."),
    ),
)


@pytest.fixture
async def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A bot that may hand over to Ann, and a telephone network where she is busy."""
    async with run_harness(monkeypatch, tmp_path) as harness:
        monkeypatch.setenv("TWILIO_ACCOUNT_SID", ACCOUNT)
        monkeypatch.setenv("TWILIO_AUTH_TOKEN", KEY)
        monkeypatch.setenv("TRANSFER_TO", f"ann={COLLEAGUE}")
        harness.engine.script = SCRIPT
        yield harness


async def ask_for_a_person(harness: Harness, caller: Any) -> None:
    await caller.hear(within=SECONDS)
    await caller.hear_out(quiet=0.5, within=SECONDS)
    await harness.say(caller)


@pytest.mark.slow
async def test_a_caller_is_handed_over_and_nobody_hangs_up_on_them(harness: Harness) -> None:
    harness.providers.twilio.colleagues[COLLEAGUE] = Colleague("completed", talks_s=1.0)
    async with harness.caller("twilio") as caller:
        await ask_for_a_person(harness, caller)
        await harness.over()
        assert not caller.ended.is_set()
        # Then the colleague hangs up; nobody wants the bot again.
        await asyncio.wait_for(caller.ended.wait(), SECONDS)

    assert [number for _, number in harness.providers.twilio.dialled] == [COLLEAGUE]
    assert harness.spoken[-1].strip() == phrases.spoken().transferring
    assert not harness.providers.twilio.hung_up
    assert harness.record["ending"] == {"reason": "transferred", "detail": "handed over to ann"}
    assert harness.received.ended
    assert harness.received.ended["callEndedReason"] == "transferred"


@pytest.mark.slow
async def test_where_it_is_busy_the_caller_comes_back_and_need_not_say_it_all_again(
    harness: Harness,
) -> None:
    async with harness.caller("twilio") as caller:
        await ask_for_a_person(harness, caller)
        await harness.hear_said(caller, "Ann is busy, a message?")
    await harness.over(1)

    first, second = harness.roark.calls.values()
    assert first.ended and second.ended
    assert first.ended["callEndedReason"] == "transferred"
    assert ABOUT in harness.engine.asked[-1][-1]["content"]
    assert second.ended["transcript"][0]["content"] == "Ann is busy, a message?"
    records = [json.loads(one.read_bytes()) for one in harness.calls_dir.glob("*/call.json")]
    (back,) = [one["metadata"] for one in records if "transfer_to" in one["metadata"]]
    assert (back["transfer_to"], back["transfer_outcome"]) == ("ann", "busy")


@pytest.mark.slow
async def test_a_transfer_that_the_network_refuses_leaves_the_caller_with_the_bot(
    harness: Harness,
) -> None:
    harness.providers.twilio.faults.server_errors = 1
    async with harness.caller("twilio") as caller:
        await ask_for_a_person(harness, caller)
        await harness.hear_said(caller, "That did not work, a message?")
    await harness.over()
    assert not harness.providers.twilio.dialled
    assert harness.record["ending"]["reason"] == "client-disconnected"
    # It hangs up again where the pipeline ends.
    assert len(harness.roark.calls) == 1


@pytest.mark.slow
async def test_a_browser_is_told_that_it_cannot_be_handed_over(harness: Harness) -> None:
    async with harness.caller("webrtc") as caller:
        await ask_for_a_person(harness, caller)
        await harness.hear_said(caller, "That did not work, a message?")
    await harness.over()
    (result,) = [m for m in harness.engine.asked[-1] if m["role"] == "tool"]
    assert "not on a phone line" in result["content"]


@pytest.mark.slow
async def test_a_call_that_cannot_go_on_is_left_to_the_instructions_that_dial_a_person(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSFER_ON_FAILURE", "ann")
    harness.server("llm").faults.wrong_key = True
    async with harness.caller("twilio"):
        await harness.over()
    assert harness.spoken[-1].strip() in phrases.spoken().transferring
    assert not harness.providers.twilio.hung_up
    ending = harness.record["ending"]
    assert ending["reason"] == "error"
    assert ending["detail"].endswith("handed over to ann")
    assert transfer.failover_twiml().strip() == f'<Dial timeout="20">{COLLEAGUE}</Dial>'


def test_a_failover_to_nobody_known_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRANSFER_TO", f"ann={COLLEAGUE}")
    monkeypatch.setenv("TRANSFER_ON_FAILURE", "bob")
    with pytest.raises(RuntimeError, match="'bob' is not"):
        transfer.failover()


@pytest.mark.parametrize(
    ("value", "named"),
    [("+493012345678", "'+493012345678'"), ("ann=030123", "'ann'"), ("a=+4930123456;b=1", "'a'")],
)
def test_what_is_no_list_of_numbers_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, value: str, named: str
) -> None:
    monkeypatch.setenv("TRANSFER_TO", value)
    with pytest.raises(RuntimeError, match=r"in E\.164 form") as refusal:
        transfer.people()
    assert f"the entry for {named} is not" in str(refusal.value)


@pytest.mark.parametrize("summary", ["", ABOUT, "ö" * 2000])
def test_a_note_fits_into_a_parameter_and_is_read_by_the_bot_that_sealed_it(summary: str) -> None:
    sealed = transfer.Note("ann", summary, "busy").seal(CALL, KEY)
    assert len(transfer.NOTE) + len(sealed) <= 500
    parameters: dict[str, object] = {transfer.NOTE: sealed, "from_number": "+15550100"}
    note = transfer.Note.take(parameters, CALL, KEY)
    assert note and (note.name, note.outcome) == ("ann", "busy")
    assert summary.startswith(note.summary) and bool(note.summary) == bool(summary)
    assert parameters == {"from_number": "+15550100"}


@pytest.mark.parametrize(("call", "key"), [(CALL[:-1] + "0", KEY), (CALL, "another"), (CALL, "")])
def test_a_note_of_another_call_or_hand_is_none(call: str, key: str) -> None:
    parameters: dict[str, object] = {transfer.NOTE: transfer.Note("ann", ABOUT).seal(CALL, KEY)}
    assert transfer.Note.take(parameters, call, key) is None


@pytest.mark.parametrize("forged", ["", "x", "=", "ö", "A" * 400])
def test_what_is_no_note_is_none(forged: str) -> None:
    assert transfer.Note.take({transfer.NOTE: forged}, CALL, KEY) is None


PUBLIC = "voice.example.org"


@pytest.fixture
def twilio(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, ElementTree.Element | str]]:
    """What Twilio gets of the server at PUBLIC for a path, a note and the fields of a call."""
    monkeypatch.setenv("TWILIO_AUTH_TOKEN", KEY)
    monkeypatch.setenv("LANGUAGE", "de-AT")
    app = FastAPI()
    twilio_auth.guard(app, ["-t", "twilio", "-x", PUBLIC])
    client = TestClient(app, follow_redirects=False)

    def post(
        path: str, note: transfer.Note, key: str = KEY, **fields: str
    ) -> tuple[int, ElementTree.Element | str]:
        address = f"{path}?{urlencode({'call': CALL, 'note': note.seal(CALL, KEY)})}"
        headers = {"X-Twilio-Signature": sign(key, f"https://{PUBLIC}{address}", fields)}
        answer = client.post(address, data=fields, headers=headers)
        is_twiml = "xml" in answer.headers.get("Content-Type", "")
        return answer.status_code, ElementTree.fromstring(answer.text) if is_twiml else answer.text

    return post


@pytest.mark.parametrize(
    ("fields", "outcome", "told"),
    [
        ({"DialCallStatus": "busy"}, "busy", "the line of ann is busy"),
        ({"DialCallStatus": "no-answer"}, "no-answer", "ann did not answer"),
        ({"DialCallStatus": "failed"}, "failed", "could not be put through"),
        ({"DialCallStatus": "canceled"}, "canceled", "could not be reached"),
        # Who hung up during the whisper.
        ({"DialCallStatus": "completed", "DialBridged": "false"}, "no-answer", "did not answer"),
    ],
)
def test_what_twilio_says_of_a_dial_comes_back_with_the_caller(
    twilio: Callable[..., Any], fields: dict[str, str], outcome: str, told: str
) -> None:
    note = transfer.Note("ann", ABOUT, parameters={"from_number": "+15550100"})
    status, twiml = twilio(transfer.OUTCOME_PATH, note, **fields)
    assert status == 200
    brought = {one.get("name"): one.get("value") for one in twiml.iter("Parameter")}
    assert brought["from_number"] == "+15550100"
    assert twilio_auth.Gate(KEY).lets_in(CALL, brought[twilio_auth.TOKEN_PARAMETER])
    back = transfer.Note.take(brought, CALL, KEY)
    assert back and (back.outcome, back.summary) == (outcome, ABOUT)
    assert told in back.instruction and ABOUT in back.instruction


def test_once_they_have_talked_the_line_closes(twilio: Callable[..., Any]) -> None:
    status, twiml = twilio(
        transfer.OUTCOME_PATH, transfer.Note("ann", ABOUT), DialCallStatus="completed"
    )
    assert (status, [verb.tag for verb in twiml]) == (200, ["Hangup"])


def test_the_person_is_told_what_it_is_about_in_the_language_of_the_call(
    twilio: Callable[..., Any],
) -> None:
    status, twiml = twilio(transfer.WHISPER_PATH, transfer.Note("ann", "Müller & Söhne"))
    (say,) = twiml
    assert (status, say.tag, say.get("language"), say.text) == (
        *(200, "Say", "de-DE", "Müller & Söhne"),
    )


def test_where_a_key_is_asked_for_a_mailbox_is_hung_up_on_and_a_person_is_connected(
    twilio: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSFER_ASK", "1")
    note = transfer.Note("ann", "Müller & Söhne")
    _, (gather, hang_up) = twilio(transfer.WHISPER_PATH, note)
    assert (gather.tag, gather.get("numDigits"), hang_up.tag) == ("Gather", "1", "Hangup")
    (say,) = gather
    assert (say.get("language"), say.text) == ("de-DE", f"Müller & Söhne {transfer.PRESS['de']}")
    status, connected = twilio(transfer.WHISPER_PATH, note, Digits="5")
    assert (status, list(connected)) == (200, [])
    assert set(transfer.PRESS) == set(transfer.VOICES)


@pytest.mark.slow
@pytest.mark.parametrize(("presses", "is_connected"), [("", False), ("1", True)])
async def test_twilio_as_it_is_rehearsed_connects_who_has_pressed_a_key_and_nobody_else(
    monkeypatch: pytest.MonkeyPatch, presses: str, is_connected: bool
) -> None:
    port = free_port()
    for name, value in {"TWILIO_AUTH_TOKEN": KEY, "TRANSFER_ASK": "1"}.items():
        monkeypatch.setenv(name, value)
    app = FastAPI()
    twilio_auth.guard(app, ["-t", "twilio", "-x", f"{HOST}:{port}"])
    handing: Any = transfer.TwilioTransfer(
        call_sid=CALL,
        stream_url="",
        parameters={},
        line=None,  # type: ignore[arg-type]
        has_failover=False,
        host=f"{HOST}:{port}",
    )
    server = uvicorn.Server(uvicorn.Config(app, HOST, port, log_level="warning"))
    serving = asyncio.create_task(server.serve())
    try:
        async with serve_providers(ScriptedEngine()) as providers:
            twilio, phone = providers.twilio, TwilioCaller("")
            twilio.auth_token, phone.call_sid = KEY, CALL
            twilio.colleagues[COLLEAGUE] = Colleague("completed", talks_s=0.0, presses=presses)
            async with asyncio.timeout(SECONDS):
                while not server.started:
                    await asyncio.sleep(0.02)
            (dial,) = ElementTree.fromstring(handing._twiml(COLLEAGUE, transfer.Note("ann", ABOUT)))
            posted = await twilio._dial(phone, dial)
    finally:
        server.should_exit = True
        await serving
    assert twilio.whispered == [f"{ABOUT} {transfer.PRESS['en']}"]
    assert transfer.outcome_of_dial(posted) == ("completed" if is_connected else "no-answer")


@pytest.mark.parametrize("path", [transfer.OUTCOME_PATH, transfer.WHISPER_PATH])
def test_nobody_but_twilio_learns_or_changes_anything(
    twilio: Callable[..., Any], path: str
) -> None:
    status, text = twilio(path, transfer.Note("ann", ABOUT), key="another")
    assert status == 403
    assert ABOUT not in text


@pytest.mark.parametrize("host", ["", PUBLIC])
@pytest.mark.parametrize("summary", [ABOUT, "ö" * 5000])
def test_the_instructions_for_twilio_fit_and_show_nobody_what_was_said(
    monkeypatch: pytest.MonkeyPatch, host: str, summary: str
) -> None:
    """Twilio takes 4000 characters. Addresses end up in the logs of proxies."""
    monkeypatch.setenv("TWILIO_AUTH_TOKEN", KEY)
    handing: Any = transfer.TwilioTransfer(
        call_sid=CALL,
        stream_url=f"wss://{PUBLIC}/ws",
        parameters={"from_number": "+15550100"},
        line=None,  # type: ignore[arg-type]
        has_failover=False,
        host=host,
    )
    twiml = handing._twiml(COLLEAGUE, transfer.Note("ann", summary, parameters={"a": "+15550100"}))
    assert len(twiml) < 4000
    assert summary not in twiml
    dial, *then = ElementTree.fromstring(twiml)
    assert bool(dial.get("action")) == bool(host) == (not then)
    assert "+15550100" not in dial.get("action", "")


@pytest.mark.slow
async def test_a_killed_bot_leaves_its_caller_to_a_person(tmp_path: Path) -> None:
    engine = ScriptedEngine(SCRIPT)
    async with serve_providers(engine) as providers:
        twilio = providers.twilio
        twilio.auth_token = KEY
        twilio.colleagues[COLLEAGUE] = Colleague("no-answer")
        port = free_port()
        world = {
            **providers.environment,
            "CALLS_DIR": str(tmp_path / "calls"),
            "TWILIO_ACCOUNT_SID": ACCOUNT,
            "TWILIO_AUTH_TOKEN": KEY,
            "TRANSFER_TO": f"ann={COLLEAGUE}",
            "TRANSFER_ON_FAILURE": "ann",
        }
        async with run_bot("twilio", port, world, options=["-x", f"{HOST}:{port}"]) as bot:
            caller = TwilioCaller(f"ws://{HOST}:{port}/ws")
            await twilio.ring(caller, f"https://{HOST}:{port}/")
            try:
                await caller.hear(within=SECONDS)
                bot.send_signal(signal.SIGKILL)
                with pytest.raises(BotFailed):
                    await asyncio.wait_for(bot.wait_until_gone(), SECONDS)
                await providers.log.until(lambda: twilio.dialled, within_s=SECONDS)
                await asyncio.wait_for(caller.ended.wait(), SECONDS)
            finally:
                await caller.hang_up()
    assert twilio.dialled == [(caller.call_sid, COLLEAGUE)]
    assert not twilio.hung_up
