"""The callers keep time, speak Twilio's and the browser's protocol, and know when they heard what.

The bots here are as small as they get, but real: Pipecat's own transports on real sockets.
"""

import asyncio
import base64
import json
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import uvicorn
from aiohttp import WSMsgType, web
from aiortc import RTCPeerConnection
from fastapi import FastAPI, WebSocket
from pipecat.frames.frames import Frame, InputAudioRawFrame, OutputAudioRawFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.runner.utils import parse_telephony_websocket
from pipecat.serializers.twilio import TwilioFrameSerializer
from pipecat.transports.base_transport import BaseTransport, TransportParams
from pipecat.transports.smallwebrtc.connection import SmallWebRTCConnection
from pipecat.transports.smallwebrtc.request_handler import (
    SmallWebRTCRequest,
    SmallWebRTCRequestHandler,
)
from pipecat.transports.smallwebrtc.transport import SmallWebRTCTransport
from pipecat.transports.websocket.fastapi import (
    FastAPIWebsocketParams,
    FastAPIWebsocketTransport,
)
from pipecat.workers.runner import WorkerRunner

from rehearsal.callers.caller import Caller, Track, Utterance
from rehearsal.callers.twilio import TwilioCaller, from_mulaw, to_mulaw
from rehearsal.callers.webrtc import WebRTCCaller

pytestmark = pytest.mark.anyio

SECONDS = 30.0
"""What anything may take on a busy machine before its test gives up."""


def tone(seconds: float, sample_rate: int) -> bytes:
    """A loud 440 Hz tone, PCM16."""
    times = np.arange(round(seconds * sample_rate)) / sample_rate
    return (8000 * np.sin(2 * np.pi * 440 * times)).astype("<i2").tobytes()


def silence(seconds: float, sample_rate: int) -> bytes:
    return bytes(2 * round(seconds * sample_rate))


class Parrot(FrameProcessor):
    """Sends every frame of audio back."""

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, InputAudioRawFrame):
            frame = OutputAudioRawFrame(frame.audio, frame.sample_rate, frame.num_channels)
        await self.push_frame(frame, direction)


class ParrotBot:
    """A Pipecat bot that repeats what it hears, on Twilio's and the browser's transport.

    Attributes:
        url: Where it answers, `127.0.0.1:PORT`.
        left: Set when Pipecat noticed that the caller is gone.
        messages: RTVI and other messages of a browser.
        call: What the handshake of a phone call said.
        offers: The SDP of every offer.
    """

    def __init__(self) -> None:
        self.url = ""
        self.left = asyncio.Event()
        self.messages: list[dict[str, Any]] = []
        self.call: Any = None
        self.offers: list[str] = []
        self.peers: list[SmallWebRTCConnection] = []

    async def repeat(self, transport: BaseTransport, sample_rate: int) -> None:
        worker = PipelineWorker(
            Pipeline([transport.input(), Parrot(), transport.output()]),
            params=PipelineParams(
                audio_in_sample_rate=sample_rate, audio_out_sample_rate=sample_rate
            ),
            enable_rtvi=False,
        )
        runner = WorkerRunner(handle_sigint=False)

        @transport.event_handler("on_client_disconnected")
        async def gone(transport: BaseTransport, client: object) -> None:
            self.left.set()
            await runner.cancel()

        await runner.add_workers(worker)
        await runner.run()

    def application(self) -> FastAPI:
        app = FastAPI()
        webrtc = SmallWebRTCRequestHandler()
        tasks: set[asyncio.Task[None]] = set()

        @app.websocket("/ws")
        async def phone(socket: WebSocket) -> None:
            await socket.accept()
            _, self.call = await parse_telephony_websocket(socket)
            params = FastAPIWebsocketParams(
                audio_in_enabled=True,
                audio_out_enabled=True,
                add_wav_header=False,
                serializer=TwilioFrameSerializer(
                    self.call.stream_id,
                    params=TwilioFrameSerializer.InputParams(auto_hang_up=False),
                ),
            )
            await self.repeat(FastAPIWebsocketTransport(socket, params), 8000)

        @app.post("/api/offer")
        async def browser(request: SmallWebRTCRequest) -> dict[str, str] | None:
            self.offers.append(request.sdp)

            async def answer(peer: SmallWebRTCConnection) -> None:
                self.peers.append(peer)
                transport = SmallWebRTCTransport(
                    peer, TransportParams(audio_in_enabled=True, audio_out_enabled=True)
                )

                @transport.event_handler("on_app_message")
                async def received(transport: object, message: Any, sender: str) -> None:
                    self.messages.append(message)

                task = asyncio.create_task(self.repeat(transport, 16000))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

            return await webrtc.handle_web_request(request, answer)

        return app


@pytest.fixture
async def parrot() -> AsyncIterator[ParrotBot]:
    """A running parrot."""
    bot = ParrotBot()
    config = uvicorn.Config(bot.application(), host="127.0.0.1", port=0, log_level="warning")
    server = uvicorn.Server(config)
    server.config.load()
    socket = config.bind_socket()
    bot.url = f"127.0.0.1:{socket.getsockname()[1]}"
    serving = asyncio.create_task(server.serve([socket]))
    yield bot
    for peer in bot.peers:
        await peer.disconnect()
    server.should_exit = True
    await serving


@asynccontextmanager
async def line(
    answer: Callable[[web.WebSocketResponse], Awaitable[None]],
) -> AsyncIterator[str]:
    """A bare websocket server for what only the bytes on the wire can show."""

    async def serve(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await answer(socket)
        return socket

    app = web.Application()
    app.router.add_get("/ws", serve)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    yield f"ws://127.0.0.1:{port}/ws"
    await runner.cleanup()


class Recorded:
    """Everything a bare line received, with the time."""

    def __init__(self) -> None:
        self.events: list[tuple[float, dict[str, Any]]] = []
        self.closed = asyncio.Event()
        self.close_code: int | None = None

    async def __call__(self, socket: web.WebSocketResponse) -> None:
        async for message in socket:
            if message.type is WSMsgType.TEXT:
                self.events.append((time.monotonic(), json.loads(message.data)))
        self.close_code = socket.close_code
        self.closed.set()

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for _, event in self.events if event["event"] == kind]


def test_mulaw_is_the_telephone_networks_for_every_sample() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import audioop
    every = np.arange(-32768, 32768).astype("<i2").tobytes()
    codes = bytes(range(256))
    assert from_mulaw(codes) == audioop.ulaw2lin(codes, 2)
    # The two differ in rounding negative samples by one; what counts is what is heard.
    theirs = np.frombuffer(audioop.ulaw2lin(audioop.lin2ulaw(every, 2), 2), "<i2").astype(int)
    ours = np.frombuffer(from_mulaw(to_mulaw(every)), "<i2").astype(int)
    original = np.frombuffer(every, "<i2").astype(int)
    assert np.all(np.abs(ours - original) <= np.abs(theirs - original))


def test_a_track_plays_pieces_one_after_the_other() -> None:
    track = Track(8000)
    track.add(tone(0.5, 8000), at=10.0)
    track.add(tone(0.5, 8000), at=10.1)
    assert track.end == pytest.approx(11.0)
    assert len(track.utterances) == 1
    assert track.utterances[0].end == pytest.approx(11.0, abs=0.011)


def test_a_track_takes_back_what_the_bot_cleared() -> None:
    track = Track(8000)
    track.add(tone(1.0, 8000), at=10.0)
    track.add(tone(1.0, 8000), at=12.0)
    track.cut(10.4)
    assert track.end == pytest.approx(10.4)
    assert track.utterances == [Utterance(10.0, 10.4)]
    assert len(track.pcm()) == pytest.approx(2 * 8000 * 0.4, abs=4)


def test_a_track_tells_a_pause_from_a_hesitation() -> None:
    track = Track(8000)
    quiet, sound = silence(0.2, 8000), tone(0.2, 8000)
    track.add(sound + quiet + sound + quiet + quiet + sound, at=0.0)
    assert [round(spoken.start, 2) for spoken in track.utterances] == [0.0, 1.0]


async def test_a_phone_call_sounds_as_twilio_sends_it() -> None:
    received = Recorded()
    async with line(received) as url:
        async with TwilioCaller(url, from_number="+15551234", parameters={"shop": "7"}) as caller:
            said = await caller.say(silence(0.1, 16000) + tone(0.5, 16000), 16000)
            await caller.press("5")
        await asyncio.wait_for(received.closed.wait(), SECONDS)
    assert [event["event"] for _, event in received.events[:2]] == ["connected", "start"]
    start = received.of("start")[0]
    assert start["streamSid"] == start["start"]["streamSid"] == caller.stream_sid
    assert start["start"]["callSid"] == caller.call_sid
    assert start["start"]["customParameters"]["from_number"] == "+15551234"
    assert start["start"]["customParameters"]["shop"] == "7"
    assert received.of("dtmf")[0]["dtmf"]["digit"] == "5"
    assert received.events[-1][1]["event"] == "stop"
    assert received.close_code == 1000
    media = [event["media"] for event in received.of("media")]
    assert {len(base64.b64decode(piece["payload"])) for piece in media} == {160}
    assert [int(piece["timestamp"]) for piece in media[:3]] == [20, 40, 60]
    assert said.end - said.start == pytest.approx(0.5, abs=0.02)


async def test_a_recorded_voice_ends_before_the_breath_after_it() -> None:
    breath = (np.frombuffer(tone(0.4, 8000), "<i2") // 20).astype("<i2").tobytes()
    async with line(Recorded()) as url, TwilioCaller(url) as caller:
        said = await caller.say(tone(0.3, 8000) + breath, 8000)
    assert said.end - said.start == pytest.approx(0.3, abs=0.02)


async def test_a_phone_is_never_silent_and_never_early() -> None:
    received = Recorded()
    dialled = time.monotonic()
    async with line(received) as url, TwilioCaller(url) as caller:
        with pytest.raises(TimeoutError, match=r"the bot said nothing within 0\.5 s"):
            await caller.hear(within=0.5)
        async with asyncio.timeout(SECONDS):
            while len(received.of("media")) < 20:
                await asyncio.sleep(0.02)
    times = [at for at, event in received.events if event["event"] == "media"]
    # A frame may come late on a busy machine, but none before its 20 ms have passed.
    assert all(at - dialled >= 0.02 * number for number, at in enumerate(times, start=1))


async def test_packet_loss_leaves_out_a_tenth_of_a_second() -> None:
    received = Recorded()
    async with line(received) as url, TwilioCaller(url, lose_packets=True) as caller:
        await caller.say(tone(0.3, 8000), 8000)
    timestamps = [int(event["media"]["timestamp"]) for event in received.of("media")]
    assert timestamps[:3] == [120, 140, 160]


async def test_a_phone_that_vanishes_says_nothing() -> None:
    received = Recorded()
    async with line(received) as url, TwilioCaller(url) as caller:
        await caller.say(tone(0.1, 8000), 8000)
        await caller.vanish()
        await asyncio.wait_for(received.closed.wait(), SECONDS)
    assert received.of("stop") == []
    assert received.close_code == 1006


async def test_a_phone_stops_playing_what_the_bot_clears() -> None:
    async def talk(socket: web.WebSocketResponse) -> None:
        stream = await stream_of(socket)
        payload = base64.b64encode(to_mulaw(tone(20.0, 8000))).decode()
        await socket.send_json(
            {"event": "media", "streamSid": stream, "media": {"payload": payload}}
        )
        await socket.send_json({"event": "clear", "streamSid": stream})
        async for _ in socket:
            pass

    async with line(talk) as url, TwilioCaller(url) as caller:
        await caller.hear(within=SECONDS)
        silent_since = await caller.hear_out(quiet=0.1, within=SECONDS)
    assert silent_since - caller.heard.utterances[0].start < 10.0
    assert [event["event"] for _, event in caller.received] == ["clear"]


async def test_a_process_that_stands_still_is_not_taken_for_a_silent_bot() -> None:
    goes_on = asyncio.Event()

    async def talk(socket: web.WebSocketResponse) -> None:
        stream = await stream_of(socket)
        media = {"payload": base64.b64encode(to_mulaw(tone(0.2, 8000))).decode()}
        await socket.send_json({"event": "media", "streamSid": stream, "media": media})
        await goes_on.wait()
        await socket.send_json({"event": "media", "streamSid": stream, "media": media})
        async for _ in socket:
            pass

    async with line(talk) as url, TwilioCaller(url) as caller:
        await caller.hear(within=SECONDS)
        hearing_out = asyncio.create_task(caller.hear_out(quiet=0.3, within=SECONDS))
        await asyncio.sleep(0)
        goes_on.set()
        time.sleep(0.6)
        silent_since = await hearing_out
    assert len(caller.heard.utterances) == 2
    assert silent_since == caller.heard.utterances[-1].end


async def test_a_phone_does_not_play_what_is_meant_for_another_call() -> None:
    async def talk(socket: web.WebSocketResponse) -> None:
        stream = await stream_of(socket)
        for sid, seconds in (("MZ-of-another-call", 5.0), (stream, 1.0)):
            payload = base64.b64encode(to_mulaw(tone(seconds, 8000))).decode()
            await socket.send_json(
                {"event": "media", "streamSid": sid, "media": {"payload": payload}}
            )
        async for _ in socket:
            pass

    async with line(talk) as url, TwilioCaller(url) as caller:
        await caller.hear(within=SECONDS)
    assert len(caller.heard.pcm()) // 2 == pytest.approx(8000, abs=1)


async def stream_of(socket: web.WebSocketResponse) -> str:
    """Take the two messages a media stream begins with; return its id."""
    assert (await socket.receive_json())["event"] == "connected"
    return (await socket.receive_json())["streamSid"]


async def test_a_bot_that_hangs_up_is_not_waited_for() -> None:
    async def refuse(socket: web.WebSocketResponse) -> None:
        await socket.receive()

    async with line(refuse) as url, TwilioCaller(url) as caller:
        with pytest.raises(ConnectionError, match="without a word"):
            await caller.hear(within=30)
        with pytest.raises(ConnectionError, match="while the caller was speaking"):
            await caller.say(tone(30, 8000), 8000)


async def hears_itself(caller: Caller) -> None:
    """Say something to a parrot; it must come back as long as it was, and later."""
    said = await caller.say(silence(0.3, 16000) + tone(0.8, 16000), 16000)
    heard = await caller.hear(since=said.start, within=SECONDS)
    await caller.hear_out(quiet=0.5, within=SECONDS)
    assert heard.start - said.start > 0.02
    # Counted in samples: on a busy machine the pieces come late and with gaps.
    samples = np.frombuffer(caller.heard.pcm(), "<i2")
    loud_seconds = np.count_nonzero(np.abs(samples) > 500) / caller.heard.sample_rate
    tone_is_loud = np.mean(np.abs(np.frombuffer(tone(0.8, 16000), "<i2")) > 500)
    assert loud_seconds / tone_is_loud == pytest.approx(said.end - said.start, abs=0.1)


async def test_pipecats_twilio_transport_takes_the_phone_for_real(parrot: ParrotBot) -> None:
    async with TwilioCaller(f"ws://{parrot.url}/ws", from_number="+15551234") as caller:
        await hears_itself(caller)
    await asyncio.wait_for(parrot.left.wait(), SECONDS)
    assert parrot.call.call_id == caller.call_sid
    assert parrot.call.from_number == "+15551234"


async def test_pipecats_webrtc_transport_takes_the_browser_for_real(parrot: ParrotBot) -> None:
    async with WebRTCCaller(f"http://{parrot.url}") as caller:
        await hears_itself(caller)
    await asyncio.wait_for(parrot.left.wait(), SECONDS)
    assert [message["type"] for message in parrot.messages] == ["client-ready"]


async def test_a_browser_without_rtvi_says_nothing_on_the_data_channel(parrot: ParrotBot) -> None:
    async with WebRTCCaller(f"http://{parrot.url}", rtvi=False, lose_packets=True) as caller:
        said = await caller.say(tone(1.0, 48000), 48000)
        await caller.hear(since=said.start, within=SECONDS)
    assert parrot.messages == []


async def test_a_browsers_media_stays_on_loopback(parrot: ParrotBot) -> None:
    async with WebRTCCaller(f"http://{parrot.url}"):
        pass
    candidates = [row for row in parrot.offers[0].splitlines() if row.startswith("a=candidate")]
    assert candidates and all(" 127.0.0.1 " in row for row in candidates)


async def test_a_browser_that_vanishes_is_not_missed_at_once(parrot: ParrotBot) -> None:
    async with WebRTCCaller(f"http://{parrot.url}") as caller:
        await caller.say(tone(0.1, 48000), 48000)
        await caller.vanish()
        peer: RTCPeerConnection = parrot.peers[0].pc
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(parrot.left.wait(), 0.5)
        assert peer.connectionState == "connected"
