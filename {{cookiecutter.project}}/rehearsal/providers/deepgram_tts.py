"""Deepgram's text-to-speech websocket: `GET /v1/speak`.

The client sends text as `Speak`, `Flush` after the last of a turn and `Clear` when the caller
barges in; the server sends the audio as binary messages, `Flushed` after the last of a turn and
`Cleared`. It says neither which text the audio belongs to nor when a word is spoken.

Who is refused learns it from the handshake, and in an open socket from how it closes.
"""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any
from uuid import uuid4

from aiohttp import web

from rehearsal.providers.deepgram import ERRORS, error_object
from rehearsal.providers.pace import Pace, VoiceServer
from rehearsal.providers.server import HOST, Connection

_BREAK_AFTER_CHUNKS = 3
_CLOSE_CODE = 1011


class DeepgramSpeakServer(VoiceServer):
    """Speaks with the engine, one voice per connection."""

    name = "deepgram_tts"
    kind = "tts"
    speaks_to = ("DeepgramTTSService",)
    module = "pipecat.services.deepgram.tts"
    url_variables = ("DEEPGRAM_TTS_BASE_URL",)
    url_argument = "base_url"

    def routes(self) -> Iterable[web.RouteDef]:
        """Return the one route of the websocket API."""
        return [web.get("/v1/speak", self._converse)]

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point a bot here."""
        return {
            "DEEPGRAM_API_KEY": "rehearsal",
            "DEEPGRAM_TTS_BASE_URL": f"ws://{HOST}:{self.port}",
        }

    def error(self, status: int) -> Mapping[str, Any]:
        """Return Deepgram's error object."""
        return error_object(status)

    async def _converse(self, request: web.Request) -> web.StreamResponse:
        entry = await self.admit(request)
        if isinstance(entry, web.Response):
            # Clients that cannot read the body of a refused handshake find the reason here.
            entry.headers["dg-error"] = ERRORS[entry.status][1]
            return entry
        rate = entry.query.get("sample_rate", "")
        is_pcm = entry.query.get("encoding") == "linear16" and rate.isdecimal()
        if not is_pcm or not entry.query.get("model"):
            raise web.HTTPBadRequest(reason="the rehearsal speaks linear16, and wants a model")
        async with self.websocket(request, entry) as connection:
            voice = _Voice(self, connection, int(rate))
            try:
                async for message in connection:
                    match message:
                        case {"type": "Speak", "text": str(text)}:
                            refusal = self.faults.refusal() if voice.is_idle else None
                            if refusal is not None:
                                reason = ERRORS[refusal][1].encode()
                                await connection.response.close(code=_CLOSE_CODE, message=reason)
                                break
                            voice.take(text)
                        case {"type": "Flush"}:
                            voice.flush()
                        case {"type": "Clear"}:
                            voice.clear()
                        case {"type": "Close"}:
                            break
                        case _:
                            pass
            finally:
                voice.cancel()
        return connection.response


class _Voice:
    """What one connection says, turn after turn.

    Attributes:
        is_idle: Whether the next text is the first of a turn.
    """

    def __init__(
        self, server: DeepgramSpeakServer, connection: Connection, sample_rate: int
    ) -> None:
        self._server = server
        self._connection = connection
        self._sample_rate = sample_rate
        self._pace = Pace(sample_rate, server.lead_s)
        self._gathered = ""
        self._texts: asyncio.Queue[str | None] = asyncio.Queue()
        self.is_idle = True
        self._sequence_id = 0
        model = {"model_name": connection.request.query["model"], "model_version": "1"}
        ids = {"request_id": str(uuid4()), "model_uuid": str(uuid4())}
        self._task = asyncio.create_task(self._speak_all("Metadata", **ids, **model))

    def take(self, text: str) -> None:
        """Take a piece of text. A sentence is spoken when it is whole."""
        self.is_idle = False
        self._gathered += text
        if self._gathered.rstrip().endswith((".", "!", "?")):
            self._end_text()

    def flush(self) -> None:
        """Speak what is left, and say when all of it is spoken."""
        self._end_text()
        self._texts.put_nowait(None)
        self.is_idle = True

    def clear(self) -> None:
        """Drop all text and audio."""
        self._gathered = ""
        self.is_idle = True
        self._texts = asyncio.Queue()
        self._task.cancel()
        self._task = asyncio.create_task(self._speak_all("Cleared", sequence_id=self._next_id()))

    def cancel(self) -> None:
        self._task.cancel()

    def _end_text(self) -> None:
        if self._gathered.strip():
            self._texts.put_nowait(self._gathered)
        self._gathered = ""

    def _next_id(self) -> int:
        self._sequence_id += 1
        return self._sequence_id - 1

    async def _speak_all(self, opening: str, **fields: Any) -> None:
        await self._server.before_answer()
        await self._connection.send({"type": opening, **fields})
        while True:
            text = await self._texts.get()
            await self._server.before_answer()
            if text is not None:
                await self._speak(text)
            else:
                flushed = {"type": "Flushed", "sequence_id": self._next_id()}
                await self._connection.send(flushed)

    async def _speak(self, text: str) -> None:
        breaks, chunks = self._server.faults.breaks(), 0
        async for speech in self._server.engine.speak(text, self._sample_rate):
            async for chunk in self._pace.chunks(speech.pcm):
                await self._connection.send_binary(chunk)
                chunks += 1
                if breaks and chunks == _BREAK_AFTER_CHUNKS:
                    await self._connection.break_off(breaks, {"type": "Flushed", "sequence_id": 0})
                    return
