"""Who may call a Twilio bot on your own server: signed requests, and tokens good for one call."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl
from xml.etree import ElementTree

import aiohttp
import pytest
from fastapi import FastAPI, WebSocket
from fastapi.testclient import TestClient
from loguru import logger

from rehearsal.callers.twilio import TwilioCaller
from rehearsal.engines.scripted import Script, ScriptedEngine
from rehearsal.host.bot_process import BotFailed, BotProcess, run_bot
from rehearsal.providers.all import serve as serve_providers
from rehearsal.providers.roark import RoarkReceiver
from rehearsal.providers.server import free_port
from telephony import twilio_auth
from telephony.twilio_auth import Gate

AUTH_TOKEN = "an-auth-token-of-twilio"
HOST = "voice.example.org"
CALL = "CA" + "0" * 32
OTHER_CALL = "CA" + "1" * 32
SECONDS = 30.0

# The two worked examples of Twilio's documentation, auth token 12345.
DOCUMENTED_ADDRESS = "https://mycompany.com/myapp.php?foo=1&bar=2"
DOCUMENTED = {
    "+14158675309": "RSOYDt4T1cUTdK1PDd93/VVr8B8=",
    "+12349013030": "0/KCTR6DLpKmkAf8muzZqo1nDgQ=",
}


class Clock:
    """A clock that the test turns."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def form_of(caller: TwilioCaller, number: str = "+15550100") -> dict[str, str]:
    """What Twilio posts when this caller has dialled."""
    return {"CallSid": caller.call_sid, "From": number, "To": "+15550199", "ApiVersion": ""}


def signed(address: str, form: dict[str, str], auth_token: str = AUTH_TOKEN) -> dict[str, str]:
    """Twilio's signature as a header."""
    signature = Gate(auth_token).signature(address, list(form.items()))
    return {"X-Twilio-Signature": signature.decode()}


@pytest.mark.parametrize("number", DOCUMENTED)
def test_it_signs_as_twilio_documents(number: str) -> None:
    digits = f"Digits=1234&CallSid=CA1234567890ABCDE&To=%2B18005551212&From={number[1:]}"
    form = [(name, number if name == "From" else value) for name, value in parse_qsl(digits)] + [
        ("Caller", number)
    ]
    assert Gate("12345").signature(DOCUMENTED_ADDRESS, form).decode() == DOCUMENTED[number]


@pytest.mark.parametrize("entered", ["/", "", ":443/", ":443"])
def test_the_same_address_may_be_entered_in_several_ways(entered: str) -> None:
    form = {"CallSid": CALL}
    for host in (HOST, f"{HOST}:443"):
        signature = signed(f"https://{HOST}{entered}", form)["X-Twilio-Signature"]
        assert Gate(AUTH_TOKEN).signed_by_twilio(host, "", list(form.items()), signature)


@pytest.mark.parametrize(
    "address, auth_token, posted",
    [
        (f"https://{HOST}/", "another-token", {"CallSid": CALL}),
        (f"http://{HOST}/", AUTH_TOKEN, {"CallSid": CALL}),
        ("https://elsewhere.example.org/", AUTH_TOKEN, {"CallSid": CALL}),
        (f"https://{HOST}/?a=1", AUTH_TOKEN, {"CallSid": CALL}),
        (f"https://{HOST}/", AUTH_TOKEN, {"CallSid": OTHER_CALL}),
        (f"https://{HOST}/", AUTH_TOKEN, {"CallSid": CALL, "From": "+15550100"}),
    ],
)
def test_a_signature_is_for_one_account_one_address_and_one_form(
    address: str, auth_token: str, posted: dict[str, str]
) -> None:
    signature = signed(address, {"CallSid": CALL}, auth_token)["X-Twilio-Signature"]
    assert not Gate(AUTH_TOKEN).signed_by_twilio(HOST, "", list(posted.items()), signature)


@pytest.mark.parametrize("signature", ["", "=", "\u00e9", "A" * 28])
def test_a_signature_that_is_none_is_refused(signature: str) -> None:
    assert not Gate(AUTH_TOKEN).signed_by_twilio(HOST, "", [("CallSid", CALL)], signature)


def test_a_token_lets_its_call_in_once() -> None:
    gate = Gate(AUTH_TOKEN)
    token = gate.issue(CALL)
    assert gate.lets_in(CALL, token)
    assert not gate.lets_in(CALL, token), "replayed"


@pytest.mark.parametrize("wrong", ["", "guess", "\u00e9", "\ud800", "9" * 5000 + ".x", "\0"])
def test_a_wrong_token_neither_enters_nor_uses_up_the_right_one(wrong: str) -> None:
    gate = Gate(AUTH_TOKEN)
    token = gate.issue(CALL)
    assert not gate.lets_in(CALL, wrong)
    assert not gate.lets_in(OTHER_CALL, token), "a token of another call"
    assert gate.lets_in(CALL, token)


def test_a_call_that_never_asked_does_not_enter_with_nothing() -> None:
    assert not Gate(AUTH_TOKEN).lets_in(CALL, "")


def test_a_token_expires() -> None:
    clock = Clock()
    gate = Gate(AUTH_TOKEN, clock=clock)
    token = gate.issue(CALL)
    clock.now += twilio_auth.TOKEN_SECONDS
    assert not gate.lets_in(CALL, token)


def test_any_process_with_the_auth_token_knows_a_token_of_any_other_and_whether_it_was_used(
    tmp_path: Path,
) -> None:
    clock = Clock()
    used = tmp_path / "calls" / ".tokens"
    one, other = (Gate(AUTH_TOKEN, used=used, clock=clock) for _ in range(2))
    for _ in range(2):
        token = Gate(AUTH_TOKEN, clock=clock).issue(CALL)
        assert not Gate("another-token", used=used, clock=clock).lets_in(CALL, token)
        assert one.lets_in(CALL, token)
        assert not other.lets_in(CALL, token), "replayed at another process"
        assert [file.name for file in used.iterdir()] == [token], "and no older one"
        clock.now += twilio_auth.TOKEN_SECONDS
    (tmp_path / "file").touch()
    full = Gate(AUTH_TOKEN, used=tmp_path / "file", clock=clock)
    assert full.lets_in(CALL, full.issue(CALL)), "a disk that takes no file keeps no call out"


@pytest.mark.parametrize("expires", ["9" * 30, "-1", "1e9", "\u0663", "", " 60"])
def test_nobody_prolongs_a_token(expires: str) -> None:
    gate = Gate(AUTH_TOKEN, clock=Clock())
    signature = gate.issue(CALL).partition(".")[2]
    assert not gate.lets_in(CALL, f"{expires}.{signature}")


def test_used_tokens_do_not_pile_up() -> None:
    clock = Clock()
    gate = Gate(AUTH_TOKEN, clock=clock)
    for _ in range(5):
        assert gate.lets_in(CALL, gate.issue(CALL))
        clock.now += twilio_auth.TOKEN_SECONDS
    assert len(gate._used) == 1


@pytest.mark.parametrize(
    "forged",
    [
        "../Messages.json?To=%2B15550100&Body=hello&x=",
        "CA" + "0" * 31,
        "CA" + "0" * 33,
        "CA" + "0" * 31 + "g",
        "MZ" + "0" * 32,
        CALL + "\n",
        "\u0661" * 34,
        "",
        None,
        0,
        [CALL],
    ],
)
def test_only_ids_of_twilios_form_are_ids(forged: object) -> None:
    assert twilio_auth.is_sid(CALL, "CA")
    assert not twilio_auth.is_sid(forged, "CA")


@contextmanager
def warnings() -> Iterator[list[str]]:
    """The lines that are logged meanwhile, from WARNING on."""
    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    try:
        yield lines
    finally:
        logger.remove(sink)


def webhook(
    monkeypatch: pytest.MonkeyPatch, auth_token: str, *arguments: str, busy: str = ""
) -> TestClient:
    """The server of `-t twilio`, as Twilio's webhook meets it."""
    monkeypatch.setenv("TWILIO_AUTH_TOKEN", auth_token)
    app = FastAPI()
    twilio_auth.guard(app, ["-t", "twilio", *arguments], reserve=lambda *_: busy)
    return TestClient(app, follow_redirects=False)


@pytest.mark.parametrize("host", ["https://voice.example.org/hook", "voice example", "a:b", "''"])
def test_a_public_name_that_is_none_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    with pytest.raises(SystemExit, match=r"^-x is the public name of this server"):
        webhook(monkeypatch, AUTH_TOKEN, "-x", host)


@pytest.mark.parametrize("arguments", [[], ["--port", "8765"], ["-x", ""]])
@pytest.mark.parametrize("auth_token", ["", AUTH_TOKEN])
def test_without_a_public_name_twilio_is_told_in_one_sentence_and_the_log_once(
    arguments: list[str], auth_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings() as lines:
        client = webhook(monkeypatch, auth_token, *arguments)
        form = {"CallSid": CALL}
        for headers in ({}, signed("https:///", form)):
            answer = client.post("/", data=form, headers=headers)
            assert (answer.status_code, answer.text) == (503, twilio_auth.NO_HOST)
    assert [line for line in lines if "-x HOST" in line] == lines[:1]
    assert len(lines) == 1


def test_without_the_auth_token_every_request_gets_the_twiml_and_the_log_warns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with warnings() as lines:
        client = webhook(monkeypatch, " ", "-x", HOST)
        assert f'<Stream url="wss://{HOST}/ws">' in client.post("/").text
        form = {"CallSid": CALL, "From": "+15550100"}
        trunk = {"SipCallId": "a84b@10.0.0.1", "SipHeader_X-Id": "7", "SipHeader_X-Long": "x" * 500}
        for answer in (client.post("/", data=form | trunk), client.get("/", params=form | trunk)):
            assert 'name="from_number" value="+15550100"' in answer.text
            assert 'name="SipCallId" value="a84b@10.0.0.1"' in answer.text
            assert 'name="SipHeader_X-Id" value="7"' in answer.text
            assert "X-Long" not in answer.text
        answer = client.post("/", data={"CallSid": CALL, "From": '\0"><Hangup/>\x1b'})
        (number, _) = ElementTree.fromstring(answer.text).iter("Parameter")
        assert number.get("value") == '"><Hangup/>'
        assert client.get("/").headers["Location"] == "/client/"
    assert len(lines) == 1
    assert "TWILIO_AUTH_TOKEN" in lines[0]


def test_a_webhook_set_to_get_is_answered_like_a_posted_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = webhook(monkeypatch, AUTH_TOKEN, "-x", HOST)
    query = f"CallSid={CALL}&From=%2B15550100"
    headers = signed(f"https://{HOST}/?{query}", {})
    answer = client.get(f"/?{query}", headers=headers)
    assert answer.status_code == 200
    assert twilio_auth.TOKEN_PARAMETER in answer.text
    assert client.get(f"/?{query}&To=1", headers=headers).status_code == 403
    assert client.get(f"/?{query}").status_code == 403


def test_a_signed_request_about_something_else_than_a_call_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = webhook(monkeypatch, AUTH_TOKEN, "-x", HOST)
    form = {"CallSid": "../../x"}
    assert client.post("/", data=form, headers=signed(f"https://{HOST}/", form)).status_code == 400


def test_a_stranger_does_not_hold_up_the_calls_with_a_form_of_thousands_of_fields(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = webhook(monkeypatch, AUTH_TOKEN, "-x", HOST)
    looked_through: list[int] = []

    def signed_by_twilio(_gate: Gate, _host: str, _query: str, form: list[Any], *_: Any, **__: Any):
        looked_through.append(len(form))

    monkeypatch.setattr(Gate, "signed_by_twilio", signed_by_twilio)
    for fields in (30, 30_000):
        answer = client.post("/", content="a&" * fields, headers={"X-Twilio-Signature": "x"})
        assert answer.status_code == 403
    assert looked_through == [30]


def test_when_every_line_is_busy_twilio_is_told_to_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    client = webhook(monkeypatch, AUTH_TOKEN, "-x", HOST, busy="all lines are busy")
    form = {"CallSid": CALL}
    answer = client.post("/", data=form, headers=signed(f"https://{HOST}/", form))
    (reject,) = ElementTree.fromstring(answer.text)
    assert (reject.tag, reject.get("reason")) == ("Reject", "busy")


def test_behind_the_stream_the_twiml_dials_the_person_for_failures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twilio comes there when the bot's process is gone."""
    monkeypatch.setenv("TWILIO_ACCOUNT_SID", "AC" + "0" * 32)
    monkeypatch.setenv("TRANSFER_TO", "ann=+493012345678")
    monkeypatch.setenv("TRANSFER_ON_FAILURE", "ann")
    client = webhook(monkeypatch, AUTH_TOKEN, "-x", HOST)
    form = {"CallSid": CALL}
    answer = client.post("/", data=form, headers=signed(f"https://{HOST}/", form))
    connect, dial = ElementTree.fromstring(answer.text)
    assert (connect.tag, dial.tag, dial.text) == ("Connect", "Dial", "+493012345678")


def test_the_token_is_taken_out_of_what_is_kept_with_the_call() -> None:
    app = FastAPI()
    app.state.twilio_gate = gate = Gate(AUTH_TOKEN)
    parameters: dict[str, object] = {twilio_auth.TOKEN_PARAMETER: gate.issue(CALL), "note": "x"}

    async def nothing(*_: object) -> Any: ...

    assert twilio_auth.lets_in(
        WebSocket({"type": "websocket", "app": app}, nothing, nothing), CALL, parameters
    )
    assert parameters == {"note": "x"}


@asynccontextmanager
async def guarded_bot(
    transport: str, tmp_path: Path, **settings: str
) -> AsyncIterator[tuple[BotProcess, RoarkReceiver]]:
    """`python bot.py -t TRANSPORT -x HOST` with an auth token, in a process of its own."""
    engine = ScriptedEngine(Script(greeting="Hello there."))
    async with serve_providers(engine) as providers, RoarkReceiver() as roark:
        world = {
            **providers.environment,
            "TWILIO_AUTH_TOKEN": AUTH_TOKEN,
            "ROARK_BASE_URL": roark.url,
            "ROARK_API_KEY": "rehearsal",
            "CALLS_DIR": str(tmp_path / "calls"),
            **settings,
        }
        options = ["-x", f"https://{HOST}/"] if transport == "twilio" else []
        async with run_bot(transport, free_port(), world, options=options) as bot:
            yield bot, roark


async def twiml_for(
    bot: BotProcess, caller: TwilioCaller, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str]]:
    """Ask for the TwiML of a call; return the status and the parameters of the stream."""
    form = form_of(caller, '+1555"<&>')
    headers = signed(f"https://{HOST}/", form) if headers is None else headers
    async with (
        aiohttp.ClientSession() as twilio,
        twilio.post(bot.url, data=form, headers=headers) as answer,
    ):
        if answer.status != 200:
            return answer.status, {}
        (stream,) = ElementTree.fromstring(await answer.text()).iter("Stream")
        assert stream.get("url") == f"wss://{HOST}/ws"
        parameters = {parameter.get("name", ""): parameter.get("value", "") for parameter in stream}
        return answer.status, parameters


async def is_turned_away(caller: TwilioCaller) -> bool:
    """Whether the bot hangs up on this caller without a word."""
    async with caller:
        try:
            await caller.hear(within=SECONDS)
        except ConnectionError:
            return True
    return False


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_call_enters_with_its_token_and_nobody_else(tmp_path: Path) -> None:
    """Right, missing, wrong, replayed and stolen, in one process: starting one takes seconds."""
    async with guarded_bot("twilio", tmp_path) as (bot, roark):
        socket = bot.url.replace("http", "ws", 1) + "/ws"
        welcome = TwilioCaller(socket)
        status, parameters = await twiml_for(bot, welcome)
        assert status == 200
        assert parameters["from_number"] == '+1555"<&>'

        assert await is_turned_away(TwilioCaller(socket)), "no token"
        wrong = {twilio_auth.TOKEN_PARAMETER: "guess"}
        assert await is_turned_away(TwilioCaller(socket, parameters=wrong))
        assert await is_turned_away(TwilioCaller(socket, parameters=parameters)), "stolen"

        first = TwilioCaller(socket, parameters=parameters)
        first.call_sid = welcome.call_sid
        assert not await is_turned_away(first)
        again = TwilioCaller(socket, parameters=parameters)
        again.call_sid = welcome.call_sid
        assert await is_turned_away(again), "replayed"

        await roark.until(lambda: any(call.whole for call in roark.calls.values()), timeout=SECONDS)
        assert len(roark.calls) == 1, "a stranger's call became a call"

        stranger = TwilioCaller(socket)
        assert (await twiml_for(bot, stranger, {}))[0] == 403
        assert (await twiml_for(bot, stranger, {"X-Twilio-Signature": "guess"}))[0] == 403
        async with aiohttp.ClientSession() as browser:
            for path in ("/start", "/api/offer", "/daily-dialin-webhook", "/docs"):
                async with browser.post(bot.url + path, json={}) as answer:
                    assert answer.status == 404, path
            for path in ("/ws-client", "/ws/guess"):
                with pytest.raises(aiohttp.WSServerHandshakeError):
                    await browser.ws_connect(bot.url + path)
            async with browser.get(f"{bot.url}/status") as answer:
                assert answer.status == 200
        forged = signed(f"https://{HOST}/", form_of(stranger, '+1555"<&>'), "another-token")
        assert (await twiml_for(bot, stranger, forged))[0] == 403
        log = bot.log.read_text()
    assert parameters[twilio_auth.TOKEN_PARAMETER] not in log
    assert "Traceback" not in log


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_webrtc_server_with_the_auth_token_takes_no_phone_calls(tmp_path: Path) -> None:
    """-t alone would not keep a stranger off /ws: nobody can get a token there, so nobody calls."""
    async with guarded_bot("webrtc", tmp_path) as (bot, _):
        socket = bot.url.replace("http", "ws", 1) + "/ws"
        assert await is_turned_away(TwilioCaller(socket))


@pytest.mark.slow
@pytest.mark.anyio
async def test_one_process_is_replaced_and_no_call_is_cut(tmp_path: Path) -> None:
    """Two processes of one server, as behind a proxy: a call that one announced the other holds."""
    async with (
        guarded_bot("twilio", tmp_path, DRAIN_SECONDS="60") as (one, roark),
        guarded_bot("twilio", tmp_path, DRAIN_SECONDS="60") as (other, _),
        aiohttp.ClientSession() as proxy,
    ):
        caller = TwilioCaller(one.url.replace("http", "ws", 1) + "/ws")
        _, parameters = await twiml_for(other, caller)
        asking = TwilioCaller(one.url.replace("http", "ws", 1) + "/ws", parameters=parameters)
        asking.call_sid = caller.call_sid
        async with asking as call:
            await call.hear(within=SECONDS)
            one.send_signal(signal.SIGTERM)
            async with asyncio.timeout(SECONDS):
                while (await status_of(proxy, one)) != (503, "draining"):
                    await asyncio.sleep(0.05)
                assert await status_of(proxy, other) == (200, "ready")
                while "Reject" not in await twiml_text(proxy, one):
                    await asyncio.sleep(0.1)
            assert "<Stream" in await twiml_text(proxy, other)
            assert not call.ended.is_set()
        with pytest.raises(BotFailed):
            await asyncio.wait_for(one.wait_until_gone(), SECONDS)
        await roark.until(lambda: any(call.whole for call in roark.calls.values()), timeout=SECONDS)
        (received,) = roark.calls.values()
    assert received.ended
    assert received.ended["callEndedReason"] == "client-disconnected"


async def status_of(proxy: aiohttp.ClientSession, bot: BotProcess) -> tuple[int, str]:
    """What a proxy learns from /status."""
    async with proxy.get(f"{bot.url}/status") as answer:
        return answer.status, (await answer.json())["status"]


async def twiml_text(proxy: aiohttp.ClientSession, bot: BotProcess) -> str:
    """The TwiML for another caller."""
    form = form_of(TwilioCaller(bot.url))
    headers = signed(f"https://{HOST}/", form)
    async with proxy.post(bot.url, data=form, headers=headers) as answer:
        return await answer.text()
