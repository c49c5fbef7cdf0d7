"""A caller on the phone: one Twilio media stream, spoken to a bot's `/ws`.

Messages and their order are Twilio's (Media Streams, bidirectional): `connected`, `start`, a
`media` message of 160 bytes mu-law every 20 ms, silence included, `dtmf`, `stop`. What the bot
sends is played the way Twilio plays it: one piece after the other, until a `clear`.
"""

import asyncio
import base64
import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

import aiohttp
import numpy as np

from rehearsal.callers.caller import FRAME_SECONDS, Caller

SAMPLE_RATE = 8000
"""Telephone audio, Hz."""

_BIAS, _CLIP = 132, 32635


class TwilioCaller(Caller):
    """A phone call to `url`, such as `ws://127.0.0.1:7860/ws`.

    Attributes:
        call_sid: The call's id, as Twilio would make one up.
        stream_sid: The media stream's id.
        from_number: The caller's number.
        to_number: The number called.
        is_held: Whether the line stays open when a media stream is over, as it does while Twilio
            has further instructions.
        stream_over: Set once a media stream is over, whoever ended it.
        received: Every message of the bot that is not audio (`clear`, `mark`), with its time.
    """

    def __init__(
        self,
        url: str,
        *,
        from_number: str = "+15550100",
        to_number: str = "+15550199",
        parameters: Mapping[str, str] | None = None,
        lose_packets: bool = False,
    ) -> None:
        """Prepare a call.

        Args:
            url: The bot's websocket.
            from_number: The caller's number, sent as the TwiML of a careful bot would send it.
            to_number: The number called.
            parameters: Further `customParameters` of the stream.
            lose_packets: Leave out 100 ms of every second of what the caller sends.
        """
        super().__init__(sample_rate=SAMPLE_RATE, lose_packets=lose_packets)
        self.call_sid = "CA" + secrets.token_hex(16)
        self.stream_sid = "MZ" + secrets.token_hex(16)
        self.from_number, self.to_number = from_number, to_number
        self.received: list[tuple[float, dict[str, Any]]] = []
        self.is_held = False
        self.stream_over = asyncio.Event()
        self._url = url
        self._account_sid = "AC" + secrets.token_hex(16)
        self._parameters = {"from_number": from_number, "to_number": to_number}
        self._parameters.update(parameters or {})
        self._session: aiohttp.ClientSession | None = None
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._sequence = 0

    async def dial(self) -> None:
        """Open the media stream. Raises aiohttp.ClientError if the bot does not take it."""
        self._session = aiohttp.ClientSession()
        try:
            self._socket = await self._session.ws_connect(self._url)
        except BaseException:
            await self._session.close()
            raise
        await self._send({"event": "connected", "protocol": "Call", "version": "1.0.0"})
        start = {
            "accountSid": self._account_sid,
            "streamSid": self.stream_sid,
            "callSid": self.call_sid,
            "tracks": ["inbound"],
            "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": SAMPLE_RATE, "channels": 1},
            "customParameters": self._parameters,
        }
        await self._send(self._numbered({"event": "start", "start": start}))
        self._tasks = [asyncio.create_task(self._speak()), asyncio.create_task(self._listen())]

    async def press(self, digit: str) -> None:
        """Press a key of the phone."""
        dtmf = {"track": "inbound_track", "digit": digit}
        await self._send(self._numbered({"event": "dtmf", "dtmf": dtmf}))

    async def stop(self) -> None:
        """Say that the stream is over, without closing the socket (Twilio closes it next)."""
        stop = {"accountSid": self._account_sid, "callSid": self.call_sid}
        await self._send(self._numbered({"event": "stop", "stop": stop}))

    async def send_raw(self, text: str) -> None:
        """Send a message that need not be one of Twilio's."""
        assert self._socket is not None
        await self._socket.send_str(text)

    async def leave_stream(self) -> None:
        """End the media stream as Twilio does for new instructions; the call goes on."""
        self.is_held = True
        await self._be_still()
        await self._close()
        # The next stream counts from its own beginning.
        self._next_frame = 0

    async def join_stream(self, url: str, parameters: Mapping[str, str]) -> None:
        """Begin another media stream of the same call.

        Args:
            url: Of the bot; on this machine without TLS, whatever it says.
            parameters: The stream's `customParameters`.
        """
        self._url = url.replace("wss:", "ws:", 1)
        self._parameters = dict(parameters)
        self.stream_sid = "MZ" + secrets.token_hex(16)
        self._sequence = 0
        self.stream_over.clear()
        await self.dial()

    async def hang_up(self) -> None:
        """Send `stop` and close the socket."""
        await self._close()
        await self._put_down()

    async def vanish(self) -> None:
        """Drop the TCP connection: no `stop`, no closing handshake."""
        if self._session is not None:
            await self._session.close()
        await self._put_down()

    def release(self) -> None:
        """Have the line ended by the phone company."""
        self.is_held = False
        self._line_is_gone()

    def _line_is_gone(self) -> None:
        self.stream_over.set()
        if not self.is_held:
            super()._line_is_gone()

    async def _close(self) -> None:
        if self._socket is not None and not self._socket.closed:
            await self.stop()
            await self._socket.close()
        if self._session is not None:
            await self._session.close()

    async def _put_down(self) -> None:
        await self._be_still()
        if self._session is not None:
            await self._session.close()
        self.release()

    async def _be_still(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _speak(self) -> None:
        number = 0
        async for frame in self._microphone():
            number += 1
            if frame is None:
                continue
            media = {
                "track": "inbound",
                "chunk": str(number),
                "timestamp": str(round(number * FRAME_SECONDS * 1000)),
                "payload": base64.b64encode(to_mulaw(frame)).decode(),
            }
            await self._send(self._numbered({"event": "media", "media": media}))

    async def _listen(self) -> None:
        assert self._socket is not None
        async for message in self._socket:
            at = time.monotonic()
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            if event["streamSid"] != self.stream_sid:
                # Meant for another call: Twilio would not play it here.
                continue
            if event["event"] == "media":
                self._hears(from_mulaw(base64.b64decode(event["media"]["payload"])), at)
                continue
            if event["event"] == "clear":
                self.heard.cut(at)
            self.received.append((at, event))
        self._line_is_gone()

    def _numbered(self, event: dict[str, Any]) -> dict[str, Any]:
        self._sequence += 1
        return {"sequenceNumber": str(self._sequence), "streamSid": self.stream_sid, **event}

    async def _send(self, message: dict[str, Any]) -> None:
        assert self._socket is not None
        try:
            await self._socket.send_json(message)
        except ConnectionError:
            # The bot hung up between two frames; the listener says so to whoever waits.
            self._line_is_gone()


def to_mulaw(pcm: bytes) -> bytes:
    """Encode PCM16 as mu-law (ITU-T G.711)."""
    samples = np.frombuffer(pcm, dtype="<i2").astype(np.int32)
    magnitude = np.minimum(np.abs(samples), _CLIP) + _BIAS
    exponent = np.floor(np.log2(magnitude)).astype(np.int32) - 7
    mantissa = (magnitude >> (exponent + 3)) & 0x0F
    sign = np.where(samples < 0, 0x80, 0)
    return (~(sign | (exponent << 4) | mantissa) & 0xFF).astype(np.uint8).tobytes()


def from_mulaw(mulaw: bytes) -> bytes:
    """Decode mu-law to PCM16."""
    code = ~np.frombuffer(mulaw, dtype=np.uint8).astype(np.int32) & 0xFF
    magnitude = (((code & 0x0F) << 3) + _BIAS << ((code >> 4) & 0x07)) - _BIAS
    return np.where(code & 0x80, -magnitude, magnitude).astype("<i2").tobytes()
