"""A full house and slow strangers: who waits, who is told, and who takes no harm."""

import asyncio
import signal
from contextlib import ExitStack, suppress
from pathlib import Path

import aiohttp
import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from host import calls, front_door
from host.calls import Busy, Calls
from host.tests.development_server import development_server
from rehearsal.callers.twilio import TwilioCaller
from rehearsal.callers.webrtc import WebRTCCaller
from rehearsal.host.bot_process import BotProcess
from telephony.twilio_auth import Gate

SECONDS = 30.0
AUTH_TOKEN = "an-auth-token-of-twilio"


class Clock:
    """A clock that the test turns."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("port", ["99999", "65536"])
def test_a_port_that_is_none_is_refused_and_not_taken_for_another(port: str) -> None:
    with pytest.raises(SystemExit, match=f"up to 65535, not {port}"):
        front_door.guard(FastAPI(), ["--port", port])


@pytest.fixture
def three_lines(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Room for three calls at once, two of a caller."""
    monkeypatch.setenv("MAX_CALLS", "3")
    monkeypatch.setenv("MAX_CALLS_PER_CALLER", "2")
    return Calls(clock=Clock())


@pytest.mark.anyio
async def test_the_next_call_is_told_that_all_lines_are_busy_until_one_ends(
    three_lines: Calls,
) -> None:
    with three_lines.begin(""), three_lines.begin(""):
        with three_lines.begin(""):
            with pytest.raises(Busy, match="busy"):
                three_lines.begin("")
            assert three_lines.refused == 1
        with three_lines.begin(""):
            assert len(three_lines) == 3


@pytest.mark.anyio
async def test_a_call_that_waits_for_its_delivery_keeps_no_line_and_the_process_waits_for_it(
    three_lines: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENV", "local")
    before = signal.getsignal(signal.SIGTERM)
    with three_lines.begin("") as over, three_lines.begin("") as also_over, three_lines.begin(""):
        over.give_back()
        also_over.give_back()
        with three_lines.begin("+15550100"):
            assert len(three_lines) == 2
    assert len(three_lines) == 0
    with three_lines.begin("") as over:
        over.give_back()
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.anyio
async def test_a_caller_may_not_take_every_line(three_lines: Calls) -> None:
    with three_lines.begin("+15550100"), three_lines.begin("+15550100"):
        with pytest.raises(Busy, match="other calls"):
            three_lines.begin("+15550100")
        assert not three_lines.refusal("+15550199")


@pytest.mark.anyio
async def test_a_line_is_kept_for_a_call_between_its_twiml_and_its_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MAX_CALLS", "1")
    clock = Clock()
    lines = Calls(clock=clock)
    assert not lines.reserve("CA1", "+15550100")
    assert not lines.reserve("CA1", "+15550100"), "Twilio asked again"
    assert lines.reserve("CA2", "+15550199")
    with lines.begin("+15550100", "CA1"):
        assert lines.reserve("CA2", "+15550199")
    assert not lines.reserve("CA2", "+15550199")
    clock.now += calls.RESERVED_SECONDS
    assert not lines.reserve("CA3", "+15550111"), "a call that never came keeps no line"


@pytest.mark.anyio
async def test_a_call_that_the_proxy_sends_to_another_process_keeps_no_line_here_and_gets_one_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MAX_CALLS", "1")
    here, there = Calls(clock=Clock()), Calls(clock=Clock())
    gate, its_gate = (Gate(AUTH_TOKEN, used=tmp_path) for _ in range(2))
    token = gate.issue("CA1")
    assert not here.reserve("CA1", "+15550100", lambda: gate.is_used(token))
    assert here.reserve("CA2", "+15550199", lambda: False)
    with there.begin("+15550111"):
        assert its_gate.lets_in("CA1", token)
        with pytest.raises(Busy):
            there.begin("+15550100", "CA1")
        with there.begin("+15550100", "CA1", is_promised=True):
            assert len(there) == 2
    assert not here.reserve("CA2", "+15550199"), "the line of a call that went elsewhere is free"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("transport", "limit"), [("twilio", calls.MAX_PHONE_CALLS), ("webrtc", 2), ("daily", 2)]
)
async def test_phones_may_be_more_than_browsers_and_who_asks_for_a_line_is_told_of_none(
    monkeypatch: pytest.MonkeyPatch, transport: str, limit: int
) -> None:
    monkeypatch.setenv("MAX_CALLS", "")
    monkeypatch.setattr(calls, "of_process", lines := Calls())
    app = FastAPI()
    front_door.guard(app, ["-t", transport])
    client = TestClient(app)
    assert client.get("/status").json()["max_calls"] == lines.limit == limit
    with ExitStack() as stack:
        for _ in range(limit):
            assert client.get("/status?line").status_code == 200
            stack.enter_context(lines.begin(""))
        assert client.get("/status?line").status_code == 503
        assert client.get("/status").status_code == 200
        assert lines.refusal()


@pytest.mark.anyio
async def test_of_many_who_ask_at_once_so_many_are_let_in_as_there_are_lines(
    three_lines: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the offer of a browser and its call are seconds, in which others ask."""
    monkeypatch.setattr(calls, "of_process", three_lines)
    app, all_have_asked = FastAPI(), asyncio.Event()

    @app.post("/api/offer")
    async def offer() -> None:
        await all_have_asked.wait()
        stack.enter_context(calls.of_process.begin(""))

    app.add_middleware(front_door.FrontDoor)
    here = httpx.ASGITransport(app, client=("127.0.0.1", 1))
    with ExitStack() as stack:
        async with httpx.AsyncClient(transport=here, base_url="http://x") as client:
            asked = [asyncio.create_task(client.post("/api/offer", json={})) for _ in range(30)]
            await asyncio.wait(asked, timeout=5, return_when=asyncio.FIRST_COMPLETED)
            all_have_asked.set()
            statuses = sorted([(await answer).status_code for answer in asked])
        assert statuses == [200] * 3 + [503] * 27
        assert len(three_lines) == 3
    assert not three_lines.refusal(), "no promise is left"
    three_lines = Calls(clock=(clock := Clock()))
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(three_lines.promised(""))
        assert three_lines.refusal()
        clock.now += calls.PROMISED_SECONDS
        assert not three_lines.refusal(), "whoever draws an offer out keeps no line"


@pytest.mark.parametrize(
    ("client", "caller"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8::2%eth0", "2001:db8::/64"),
        ("127.0.0.1", ""),
        ("::1", ""),
        ("::ffff:127.0.0.1", ""),
        ("/run/bot.sock", ""),
    ],
)
def test_a_caller_has_one_address_however_many_the_network_gives(client: str, caller: str) -> None:
    assert front_door._address({"client": (client, 1)}) == caller


@pytest.mark.parametrize("number", ["", "anonymous", "Restricted", "client:bob", None])
def test_those_who_withhold_their_number_are_not_one_caller(number: str | None) -> None:
    assert calls.identity(number) == ""


@pytest.mark.parametrize("value", ["many", "-1", "2.5"])
def test_a_limit_that_is_no_number_is_said(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_CALLS", value)
    with pytest.raises(RuntimeError, match="MAX_CALLS is a whole number"):
        Calls().refusal()


class Wire(asyncio.Transport):
    """A connection that only knows whether it was broken off."""

    is_broken = False

    def abort(self) -> None:
        self.is_broken = True


def test_whoever_only_waits_makes_room_and_a_proven_call_stays() -> None:
    clock = Clock()
    connections = front_door.Connections(limit=3, limit_with_a_burst=5, clock=clock)
    call, *strangers = [Wire() for _ in range(6)]
    connections.opened(call)
    connections.forget(call)
    for stranger in strangers:
        connections.opened(stranger)
        clock.now += front_door.MOMENT_SECONDS
    assert [stranger.is_broken for stranger in strangers] == [True, True, False, False, False]
    connections.renew(call)
    connections.renew(strangers[2])
    connections.opened(Wire())
    assert strangers[3].is_broken and not strangers[2].is_broken, "answered a moment ago"
    connections.expire(call)
    connections.expire(strangers[-1])
    assert strangers[-1].is_broken and not call.is_broken
    assert len(connections) == 2


def test_who_comes_in_a_burst_of_strangers_has_a_moment_to_prove_it() -> None:
    clock = Clock()
    connections = front_door.Connections(limit=3, limit_with_a_burst=5, clock=clock)
    caller, *strangers = [Wire() for _ in range(5)]
    for one in (caller, *strangers):
        connections.opened(one)
    assert not caller.is_broken
    connections.opened(Wire())
    assert caller.is_broken, "no more than there are files to open"
    clock.now += front_door.MOMENT_SECONDS
    connections.opened(Wire())
    assert [one.is_broken for one in strangers] == [True, True, True, False]


async def connect(bot: BotProcess, sent: bytes) -> asyncio.StreamReader:
    """Open a connection, send `sent` and no more; what comes back can be read."""
    host, port = bot.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent)
    # The writer lives as long as the reader: dropping it would close the connection.
    reader.writer = writer  # type: ignore[attr-defined]
    return reader


FLOODS = [
    # Pings whose answers nobody reads, pieces of one message, and messages to one who has hung up.
    (b"", b"\x89\xfd\0\0\0\0" + b"x" * 125),
    (b"\x01\x80\0\0\0\0", b"\0\x80\0\0\0\0"),
    (2 * b"\x81\x83\0\0\0\0NaN", b"\x81\x82\0\0\0\0[]"),
]


async def send(connection: asyncio.StreamReader, sent: bytes) -> None:
    """Send on a connection of connect(), from which nothing is read meanwhile."""
    writer: asyncio.StreamWriter = connection.writer  # type: ignore[attr-defined]
    for begin in range(0, len(sent), 2**16):
        writer.write(sent[begin : begin + 2**16])
        await writer.drain()


SLOW_BODY = (
    b"POST / HTTP/1.1\r\nHost: x\r\nX-Twilio-Signature: {}\r\nContent-Length: 500\r\n\r\nabc"
)


CHUNKED = b"GET /status HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"

HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_thousand_who_wait_harm_neither_the_call_nor_the_next_caller(
    tmp_path: Path,
) -> None:
    """Slow bodies, signed or not, headers that never end, and sockets that say nothing.

    Without an auth token, as Pipecat's own server, this one takes every call.
    """
    options = ("-x", "voice.example.org")
    async with development_server("twilio", tmp_path, *options) as (bot, roark):
        socket = bot.url.replace("http", "ws", 1) + "/ws"
        async with TwilioCaller(socket) as caller:
            await caller.hear(within=SECONDS)
            kinds = (b"", b"POST / HTTP/1.1\r\nHost: x\r\n", SLOW_BODY)
            strangers = [await connect(bot, kinds[number % 3]) for number in range(1020)]
            async with aiohttp.ClientSession() as client:
                async with client.get(f"{bot.url}/status") as answer:
                    status = await answer.json()
                async with client.post(bot.url + "/") as answer:
                    assert answer.content_type == "application/xml"
                    assert '<Stream url="wss://voice.example.org/ws">' in await answer.text()
            assert (status["status"], status["calls"]) == ("ready", 1)
            async with TwilioCaller(socket) as next_caller:
                await next_caller.hear(within=SECONDS)
            assert not caller.ended.is_set()
            await caller.send_raw("x" * (front_door.MAX_MESSAGE_BYTES + 1))
            await asyncio.wait_for(caller.ended.wait(), SECONDS)
        del strangers
        await roark.until(lambda: len(roark.calls) == 2, timeout=SECONDS)
        await roark.until(lambda: all(call.whole for call in roark.calls.values()), timeout=SECONDS)
        reasons = {(call.ended or {})["callEndedReason"] for call in roark.calls.values()}
        log = bot.log.read_text()
    assert reasons == {"client-disconnected", "error"}, "what no caller's line sends is no hang-up"
    assert "Traceback" not in log


@pytest.mark.slow
@pytest.mark.anyio
async def test_what_is_too_slow_or_too_large_is_refused_without_a_traceback(tmp_path: Path) -> None:
    settings = {"TWILIO_AUTH_TOKEN": AUTH_TOKEN}
    async with development_server("twilio", tmp_path, "-x", "voice.example.org", **settings) as (
        bot,
        _,
    ):
        unsigned = await connect(bot, SLOW_BODY.replace(b"X-Twilio-Signature", b"X-None"))
        async with asyncio.timeout(front_door.BODY_SECONDS / 2):
            assert (await unsigned.readline()).split()[1] == b"403", "header first"
            assert await unsigned.read(), "and the connection closes"
        nowhere = await connect(bot, SLOW_BODY.replace(b"POST /", b"POST /start"))
        async with asyncio.timeout(front_door.BODY_SECONDS / 2):
            assert (await nowhere.readline()).split()[1] == b"404"
        slow = await connect(bot, SLOW_BODY)
        async with asyncio.timeout(2 * front_door.BODY_SECONDS):
            assert (await slow.readline()).split()[1] == b"408"
        async with aiohttp.ClientSession() as client:
            body = b"a" * (front_door.MAX_BODY_BYTES + 1)
            headers = {"X-Twilio-Signature": "guess"}
            async with client.post(bot.url, data=body, headers=headers) as answer:
                assert answer.status == 413
            endless = await connect(bot, b"GET / HTTP/1.1\r\nX: " + b"x" * 2_000_000)
            with suppress(ConnectionError):
                assert not await asyncio.wait_for(endless.read(), front_door.BODY_SECONDS)
            long = b"y" * 1_000_000
            for no_body in (b"0\r\n" + b"X: y\r\n" * 200_000, b"0\r\nX: " + long, b"1;" + long):
                endless = await connect(bot, CHUNKED + no_body)
                with suppress(ConnectionError):
                    answered = await asyncio.wait_for(endless.read(), front_door.BODY_SECONDS / 2)
                    assert len(answered) < 1000, "and then it closes"
            for begin, flood in FLOODS:
                unread = await connect(bot, HANDSHAKE)
                assert (await unread.readline()).split()[1] == b"101"
                # uvicorn reads on for ten seconds after its goodbye.
                with pytest.raises(ConnectionError):
                    async with asyncio.timeout(8.0):
                        await send(unread, begin + flood * (40_000_000 // len(flood)))
            no_text = await connect(bot, HANDSHAKE)
            assert (await no_text.readline()).split()[1] == b"101"
            no_text.writer.write(b"\x81\x82\0\0\0\0\xff\xfe")  # type: ignore[attr-defined]
            await asyncio.wait_for(no_text.read(), SECONDS)
            async with client.ws_connect(bot.url.replace("http", "ws", 1) + "/ws") as socket:
                await socket.send_str("NaN")
                await socket.send_str("NaN")
                await asyncio.wait_for(socket.receive(), SECONDS)
            async with client.ws_connect(bot.url.replace("http", "ws", 1) + "/ws") as socket:
                await socket.send_str("x" * (front_door.MAX_MESSAGE_BYTES + 1))
                message = await asyncio.wait_for(socket.receive(), SECONDS)
                assert message.data == aiohttp.WSCloseCode.MESSAGE_TOO_BIG
        log = bot.log.read_text()
    assert "Traceback" not in log and " ERROR " not in log


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_full_house_says_so_on_the_web_on_the_phone_and_at_status(tmp_path: Path) -> None:
    async with development_server("webrtc", tmp_path, MAX_CALLS="1") as (bot, _roark):
        async with aiohttp.ClientSession() as client, WebRTCCaller(bot.url) as caller:
            await caller.hear(within=SECONDS)
            async with client.post(f"{bot.url}/start", json={"transport": "webrtc"}) as answer:
                assert answer.status == 503
                assert "busy" in (await answer.json())["detail"]
            offer = {"sdp": "v=0\nm=audio\nm=video\nm=video\nm=video\nm=video", "type": "offer"}
            async with client.post(f"{bot.url}/api/offer", json=offer) as answer:
                assert answer.status == 400, "a fourth track would be decoded for nobody"
            offer = {"sdp": "v=0", "type": "offer"}
            async with client.post(f"{bot.url}/api/offer", json=offer) as answer:
                assert answer.status == 503
            async with client.get(f"{bot.url}/status") as answer:
                status = await answer.json()
            assert (status["status"], status["max_calls"], status["refused"]) == ("busy", 1, 2)
            async with TwilioCaller(bot.url.replace("http", "ws", 1) + "/ws") as phone:
                await asyncio.wait_for(phone.ended.wait(), SECONDS)
            # Tones of half a second.
            assert [round(tone.end - tone.start, 1) for tone in phone.heard.utterances] == [0.5] * 4
            assert not caller.ended.is_set()
        log = bot.log.read_text()
    assert log.count("all lines are busy") == 3
    assert "Traceback" not in log
