"""What goes to and from Twilio when a caller is handed over, and who may read it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit
from xml.etree import ElementTree

import pytest
from aiohttp import web
from fastapi import FastAPI, WebSocket
from fastapi.testclient import TestClient
from harness import serve_app
from pipecat.runner.types import WebSocketRunnerArguments

import transports
from conversation import phrases
from rehearsal.call import words_file
from rehearsal.callers.twilio import TwilioCaller
from rehearsal.engines.engine import ToolCall
from rehearsal.engines.scripted import ScriptedEngine
from rehearsal.providers.all import serve as serve_providers
from rehearsal.providers.server import HOST, free_port
from rehearsal.providers.twilio_rest import Colleague, sign
from rehearsal.transfer import script
from telephony import transfer, twilio_auth

pytestmark = pytest.mark.anyio

CALL = "CA" + "0123456789abcdef" * 2
COLLEAGUE = "+493012345678"
KEY = "an-auth-token"
ABOUT = "Frau Özdemir möchte ihren Termin verlegen."


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


@pytest.mark.parametrize("file", sorted(phrases.FOLDER.glob("*.toml")), ids=lambda file: file.stem)
async def test_in_each_language_a_rehearsed_caller_is_handed_over_and_answered_when_back(
    file: Path,
) -> None:
    assert words_file("transfer", f"{file.stem}-XX").name == f"transfer.{file.stem}.toml"
    engine = ScriptedEngine(script(file.stem))
    asks, answers = engine.script.hears

    async def says(*messages: tuple[str, str]) -> list[Any]:
        given = [{"role": role, "content": content} for role, content in messages]
        return [one async for one in engine.think(given, [])]

    (call,) = await says(("user", asks))
    assert isinstance(call, ToolCall) and call.name == "transfer_call"
    for outcome in ("busy", "no-answer"):
        note = transfer.Note("anna", call.arguments["summary"], outcome)
        back = ("system", note.instruction)
        told = await says(back)
        assert told and not isinstance(told[0], ToolCall)
        assert not isinstance((await says(back, ("user", answers)))[0], ToolCall)


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
        sealed = note.seal(CALL, KEY, place="address")
        address = f"{path}?{urlencode({'call': CALL, 'note': sealed})}"
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
    async with serve_providers(ScriptedEngine()) as providers, serve_app(app, port):
        twilio, phone = providers.twilio, TwilioCaller("")
        twilio.auth_token, phone.call_sid = KEY, CALL
        twilio.colleagues[COLLEAGUE] = Colleague("completed", talks_s=0.0, presses=presses)
        (dial,) = ElementTree.fromstring(handing._twiml(COLLEAGUE, transfer.Note("ann", ABOUT)))
        posted = await twilio._dial(phone, dial)
    assert twilio.whispered == [f"{ABOUT} {transfer.PRESS['en']}"]
    assert transfer.outcome_of_dial(posted) == ("completed" if is_connected else "no-answer")


@pytest.mark.parametrize("path", [transfer.OUTCOME_PATH, transfer.WHISPER_PATH])
def test_nobody_but_twilio_learns_or_changes_anything(
    twilio: Callable[..., Any], path: str
) -> None:
    status, text = twilio(path, transfer.Note("ann", ABOUT), key="another")
    assert status == 403
    assert ABOUT not in text


# How a bot is run.
PUBLIC_SERVER, UNNAMED_SERVER = ("-t", "twilio", "-x", PUBLIC), ("-t", "twilio")
PIPECAT_CLOUD = None
STREAM = "MZ" + "0123456789abcdef" * 2

Comes = Callable[[Mapping[str, str]], transports.Connection | str]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Comes]:
    """A server, run as it is told; what becomes of streams of CALL that come to it."""
    environment = {
        "TWILIO_AUTH_TOKEN": KEY,
        "TWILIO_ACCOUNT_SID": "AC" + "0" * 32,
        "TRANSFER_TO": f"ann={COLLEAGUE}",
        "CALLS_DIR": str(tmp_path),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    async def is_busy(_call_sid: str) -> str:
        return "busy"

    monkeypatch.setattr(transports, "outcome_at_twilio", is_busy)

    def run(options: Sequence[str] | None) -> Comes:
        app = FastAPI()
        if options is not None:
            twilio_auth.guard(app, options)
        came: list[transports.Connection | str] = []

        @app.websocket("/ws")
        async def ws(websocket: WebSocket) -> None:
            await websocket.accept()
            try:
                came.append(await transports.answer(WebSocketRunnerArguments(websocket)))
            except transports.Refused as refusal:
                came.append(str(refusal))

        def comes(parameters: Mapping[str, str]) -> transports.Connection | str:
            start = {"streamSid": STREAM, "callSid": CALL, "customParameters": dict(parameters)}
            with TestClient(app).websocket_connect("/ws") as socket:
                socket.send_json({"event": "connected"})
                socket.send_json({"event": "start", "streamSid": STREAM, "start": start})
            return came.pop()

        return comes

    return run


def instructions(connection: transports.Connection | str) -> ElementTree.Element:
    """What Twilio is told by the bot that has this call, to hand it over to Ann."""
    assert isinstance(connection, transports.Connection), connection
    handing: Any = connection.transfer
    note = transfer.Note("ann", ABOUT, parameters=handing._parameters)
    return ElementTree.fromstring(handing._twiml(COLLEAGUE, note))


def brought_by(twiml: ElementTree.Element) -> dict[str, str]:
    return {one.attrib["name"]: one.attrib["value"] for one in twiml.iter("Parameter")}


def first_stream() -> dict[str, str]:
    return {twilio_auth.TOKEN_PARAMETER: twilio_auth.Gate(KEY).issue(CALL)}


def test_who_reads_the_addresses_of_a_transfer_is_not_let_in_by_them(
    server: Callable[..., Comes],
) -> None:
    comes = server(PUBLIC_SERVER)
    twiml = instructions(comes(first_stream()))
    (dial,) = twiml
    for address in (dial.attrib["action"], dial[0].attrib["url"]):
        (sealed,) = parse_qs(urlsplit(address).query)["note"]
        assert transfer.Note.take({transfer.NOTE: sealed}, CALL, KEY) is None
        assert isinstance(comes({transfer.NOTE: sealed}), str)
        # A valid token does not make it one: it is of a request.
        assert isinstance(comes({transfer.NOTE: sealed, **first_stream()}), str)


@pytest.mark.parametrize("outcome", ["", "busy"])
@pytest.mark.parametrize("options", [PUBLIC_SERVER, UNNAMED_SERVER])
def test_a_note_lets_nobody_in_where_there_is_a_gate(
    server: Callable[..., Comes], options: Sequence[str], outcome: str
) -> None:
    comes = server(options)
    brought = {transfer.NOTE: transfer.Note("ann", ABOUT, outcome).seal(CALL, KEY)}
    assert "did not bring the token" in str(comes(brought))
    back = comes({**brought, **first_stream()})
    assert isinstance(back, transports.Connection) and back.note
    assert back.note.outcome == "busy"


@pytest.mark.parametrize("options", [UNNAMED_SERVER, PIPECAT_CLOUD])
def test_where_twilio_has_no_address_of_ours_a_caller_comes_back_by_the_instructions_themselves(
    server: Callable[..., Comes], options: Sequence[str] | None
) -> None:
    comes = server(options)
    brought = brought_by(instructions(comes(first_stream() | {"from_number": "+15550100"})))
    assert brought["from_number"] == "+15550100"
    back = comes(brought)
    assert isinstance(back, transports.Connection) and back.note
    assert (back.note.summary, back.note.outcome) == (ABOUT, "busy")
    if options is not PIPECAT_CLOUD:
        assert "did not bring the token" in str(comes(brought)), "twice"


@pytest.mark.parametrize("options", [UNNAMED_SERVER, PIPECAT_CLOUD])
def test_after_a_long_talk_with_the_person_the_line_closes_and_no_note_is_heard(
    server: Callable[..., Comes], options: Sequence[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    comes = server(options)
    brought = brought_by(instructions(comes(first_stream())))
    monkeypatch.setattr(transfer, "NOTE_SECONDS", -1)
    assert "too old" in str(comes(brought))


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


class Network:
    """Twilio, asked for a transfer: what it answers, and when."""

    def __init__(self) -> None:
        self.asked, self.may_answer = asyncio.Event(), asyncio.Event()
        self.line = SimpleNamespace(can_hang_up=True)
        self.status, self.posts, self.state = 200, 0, "in-progress"

    def transfer(self) -> transfer.TwilioTransfer:
        return transfer.TwilioTransfer(
            call_sid=CALL,
            stream_url=f"wss://{PUBLIC}/ws",
            parameters={},
            line=self.line,  # type: ignore[arg-type]
            has_failover=True,
        )

    async def update(self, _request: web.Request) -> web.Response:
        self.posts += 1
        self.asked.set()
        await self.may_answer.wait()
        return web.json_response({"sid": CALL}, status=self.status)

    async def show(self, _request: web.Request) -> web.Response:
        return web.json_response({"sid": CALL, "status": self.state})


@pytest.fixture
async def network(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Network]:
    network = Network()
    app = web.Application()
    call = f"/2010-04-01/Accounts/{{account}}/Calls/{CALL}.json"
    app.add_routes([web.post(call, network.update), web.get(call, network.show)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, HOST, 0).start()
    environment = {
        "TWILIO_BASE_URL": f"http://{HOST}:{runner.addresses[0][1]}",
        "TWILIO_AUTH_TOKEN": KEY,
        "TWILIO_ACCOUNT_SID": "AC" + "0" * 32,
        "TRANSFER_TO": f"ann={COLLEAGUE}",
        "TRANSFER_ON_FAILURE": "ann",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield network
    network.may_answer.set()
    await runner.cleanup()


@pytest.mark.parametrize(
    ("state", "given_to"), [("in-progress", "ann"), ("completed", None)], ids=["late", "hung up"]
)
@pytest.mark.parametrize("status", [200, 502])
async def test_after_a_transfer_in_doubt_the_bot_may_end_the_call_but_not_once_its_line_has_closed(
    network: Network,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    state: str,
    given_to: str | None,
) -> None:
    if status == 200:
        monkeypatch.setattr(transfer, "REQUEST_SECONDS", 0.3)
    else:
        network.may_answer.set()
    network.status, network.state = status, state
    handing = network.transfer()
    with pytest.raises(transfer.NotTransferred, match="did not answer"):
        await handing.to("ann", ABOUT)
    assert network.line.can_hang_up, "the caller is with the bot"
    monkeypatch.setattr(transfer, "REQUEST_SECONDS", 30.0)
    assert await handing.done_to() == given_to
    assert not network.line.can_hang_up


async def test_a_second_transfer_that_is_refused_leaves_the_first_in_doubt(
    network: Network,
) -> None:
    network.may_answer.set()
    handing = network.transfer()
    for network.status in (502, 400):
        with pytest.raises(transfer.NotTransferred):
            await handing.to("ann", ABOUT)
    assert network.posts == 2
    assert await handing.done_to() == "ann"
    assert not network.line.can_hang_up


@pytest.mark.parametrize(("status", "given_to"), [(200, "ann"), (404, None)])
async def test_a_caller_who_speaks_while_twilio_is_asked_is_hung_up_on_only_if_it_refused(
    network: Network, status: int, given_to: str | None
) -> None:
    network.status = status
    handing = network.transfer()
    tool = asyncio.create_task(handing.to("ann", ABOUT))
    await network.asked.wait()
    # As Pipecat does with a tool when the caller speaks.
    tool.cancel()
    with pytest.raises(asyncio.CancelledError):
        await tool
    assert not network.line.can_hang_up
    network.may_answer.set()
    assert await handing.done_to() == given_to
    assert network.line.can_hang_up == (given_to is None)


async def test_a_tool_that_is_called_again_waits_for_what_twilio_was_asked_before(
    network: Network,
) -> None:
    handing = network.transfer()
    first = asyncio.create_task(handing.to("ann", ABOUT))
    await network.asked.wait()
    first.cancel()
    again = asyncio.create_task(handing.to("ann", ABOUT))
    network.may_answer.set()
    await again
    assert (network.posts, await handing.done_to()) == (1, "ann")


async def test_a_call_that_is_left_to_its_own_instructions_is_not_hung_up_on_by_a_late_refusal(
    network: Network,
) -> None:
    network.status = 404
    handing = network.transfer()
    tool = asyncio.create_task(handing.to("ann", ABOUT))
    await network.asked.wait()
    assert handing.fail_over() == "ann"
    network.may_answer.set()
    with pytest.raises(transfer.NotTransferred):
        await tool
    assert not network.line.can_hang_up


async def test_an_address_of_twilio_that_is_none_leaves_the_caller_with_the_bot(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWILIO_BASE_URL", "http://[::")
    handing = network.transfer()
    with pytest.raises(transfer.NotTransferred, match="cannot be reached"):
        await handing.to("ann", ABOUT)
    assert network.line.can_hang_up
    assert await handing.done_to() is None


@pytest.mark.parametrize("host", ["", PUBLIC])
def test_what_a_sip_trunk_brought_makes_room_for_what_the_caller_has_said(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setenv("TWILIO_AUTH_TOKEN", KEY)
    brought = {
        **{"from_number": "+15550100", "SipCallId": "a" * 60},
        **{f"SipHeader_X-Thing-{number}": "v" * 300 for number in range(12)},
    }
    handing: Any = transfer.TwilioTransfer(
        call_sid=CALL,
        stream_url=f"wss://{PUBLIC}/ws",
        parameters=brought,
        line=None,  # type: ignore[arg-type]
        has_failover=False,
        host=host,
    )
    text = handing._twiml(COLLEAGUE, transfer.Note("ann", ABOUT, parameters=brought))
    assert len(text) <= 4000
    twiml = ElementTree.fromstring(text)
    if host:
        for address in (twiml[0].attrib["action"], twiml[0][0].attrib["url"]):
            (sealed,) = parse_qs(urlsplit(address).query)["note"]
            note = transfer.Note.open(sealed, CALL, KEY, place="address")
            assert note and note.summary == ABOUT
        (sealed,) = parse_qs(urlsplit(twiml[0].attrib["action"]).query)["note"]
        note = transfer.Note.open(sealed, CALL, KEY, place="address")
        assert note
        kept = note.parameters
    else:
        kept = brought_by(twiml)
    assert set(kept) >= {"from_number", "SipCallId", "SipHeader_X-Thing-0"}
