"""A caller in a browser: one WebRTC peer (aiortc) that posts its offer to a bot's `/api/offer`.

It does what Pipecat's browser client does on the wire: a microphone track, a data channel with a
`ping` every second, and, if asked to, RTVI's `client-ready`. ICE stays on 127.0.0.1.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from fractions import Fraction
from typing import Any

import aiohttp
import av
from aiortc import (
    MediaStreamTrack,
    RTCConfiguration,
    RTCDataChannel,
    RTCPeerConnection,
    RTCSessionDescription,
)
from aiortc.mediastreams import MediaStreamError

from rehearsal.callers.caller import FRAME_SECONDS, LOUD_RMS, Caller
from rehearsal.callers.loopback_ice import keep_ice_on_loopback
from rehearsal.engines.loudness import rms

SAMPLE_RATE = 48000
"""Opus audio, Hz, in both directions."""

CONNECT_SECONDS = 20.0
PING_SECONDS = 1.0
"""Pipecat takes a peer that pinged once for lost when 3 s pass without another."""


class WebRTCCaller(Caller):
    """A browser's call to the bot at `url`, such as `http://127.0.0.1:7860`.

    Attributes:
        messages: What the bot sent on the data channel, oldest first.
    """

    def __init__(self, url: str, *, rtvi: bool = True, lose_packets: bool = False) -> None:
        """Prepare a call.

        Args:
            url: The bot's address, without a path.
            rtvi: Send RTVI's `client-ready` once the data channel is open.
            lose_packets: Leave out 100 ms of every second of what the caller sends.
        """
        super().__init__(sample_rate=SAMPLE_RATE, lose_packets=lose_packets)
        self.messages: list[dict[str, Any]] = []
        self._url = url.rstrip("/")
        self._rtvi = rtvi
        keep_ice_on_loopback()
        # No ICE servers: aiortc's default would ask one on the internet.
        self._peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self._tasks: list[asyncio.Task[None]] = []

    async def dial(self) -> None:
        """Connect. Raises aiohttp.ClientError or TimeoutError if the bot does not take the call."""
        connected = asyncio.Event()

        @self._peer.on("connectionstatechange")
        def state_changed() -> None:
            if self._peer.connectionState == "connected":
                connected.set()
            elif self._peer.connectionState in ("closed", "failed"):
                self._line_is_gone()

        @self._peer.on("track")
        def bot_speaks(track: MediaStreamTrack) -> None:
            if track.kind == "audio":
                self._tasks.append(asyncio.create_task(self._listen(track)))

        self._peer.addTrack(_Microphone(self._microphone()))
        self._open(self._peer.createDataChannel("pipecat"))
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._offer()
                await connected.wait()
        except BaseException:
            await self.hang_up()
            raise

    async def hang_up(self) -> None:
        """Close the peer connection; the bot is told by DTLS at once."""
        await self._put_down()

    async def vanish(self) -> None:
        """Close the UDP socket under the call; the bot finds out by ICE consent, in about 30 s."""
        for transceiver in self._peer.getTransceivers():
            await transceiver.sender.transport.transport.stop()
        await self._put_down()

    def send(self, message: dict[str, Any]) -> None:
        """Send a message on the data channel, which must be open."""
        self._channel.send(json.dumps(message))

    async def _offer(self) -> None:
        await self._peer.setLocalDescription(await self._peer.createOffer())
        offer = {"sdp": self._peer.localDescription.sdp, "type": self._peer.localDescription.type}
        async with (
            aiohttp.ClientSession(raise_for_status=True) as http,
            http.post(f"{self._url}/api/offer", json=offer) as response,
        ):
            answer = await response.json()
        await self._peer.setRemoteDescription(RTCSessionDescription(answer["sdp"], answer["type"]))

    def _open(self, channel: RTCDataChannel) -> None:
        self._channel = channel

        @channel.on("open")
        def ready() -> None:
            self._tasks.append(asyncio.create_task(self._ping()))
            if self._rtvi:
                about = {"library": "rehearsal", "library_version": "1"}
                self.send(
                    {
                        "label": "rtvi-ai",
                        "type": "client-ready",
                        "id": uuid.uuid4().hex[:8],
                        "data": {"version": "1.0.0", "about": about},
                    }
                )

        @channel.on("message")
        def received(message: str) -> None:
            event = json.loads(message)
            self.messages.append(event)
            if event.get("type") == "signalling" and event["message"]["type"] == "peerLeft":
                self._line_is_gone()

    async def _ping(self) -> None:
        while self._channel.readyState == "open":
            self._channel.send(f"ping: {round(time.time() * 1000)}")
            await asyncio.sleep(PING_SECONDS)

    async def _listen(self, track: MediaStreamTrack) -> None:
        while True:
            try:
                frame = await track.recv()
            except MediaStreamError:
                return
            assert isinstance(frame, av.AudioFrame)
            # The decoder's stereo is one voice twice.
            pcm = frame.to_ndarray().reshape(-1, len(frame.layout.channels))[:, 0].tobytes()
            at = self._heard_at(frame)
            # The bot's track never pauses. Silence that comes late is dropped, as a jitter
            # buffer does it: else one hiccup would delay all that is heard after it.
            if at >= self.heard.end or rms(pcm) > LOUD_RMS:
                self._hears(pcm, at)

    def _heard_at(self, _frame: av.AudioFrame) -> float:
        """Return when a piece of the bot's sound is heard: once the jitter buffer gives it out."""
        return time.monotonic()

    async def _put_down(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._peer.close()
        self._line_is_gone()


class _Microphone(MediaStreamTrack):
    """The caller's voice as a track: paced by the caller, stamped with what was left out."""

    kind = "audio"

    def __init__(self, frames: AsyncIterator[bytes | None]) -> None:
        super().__init__()
        self._frames = frames
        self._pts = 0

    async def recv(self) -> av.AudioFrame:
        """Return the next 20 ms; lost ones only move the time stamp on."""
        while True:
            pcm = await anext(self._frames)
            pts, self._pts = self._pts, self._pts + round(SAMPLE_RATE * FRAME_SECONDS)
            if pcm is None:
                continue
            frame = av.AudioFrame(format="s16", layout="mono", samples=len(pcm) // 2)
            frame.planes[0].update(pcm)
            frame.sample_rate = SAMPLE_RATE
            frame.pts = pts
            frame.time_base = Fraction(1, SAMPLE_RATE)
            return frame
