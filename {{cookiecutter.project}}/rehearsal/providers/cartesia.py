"""Cartesia's text-to-speech websocket: `GET /tts/websocket`, API version 2026-03-01.

The client sends pieces of text that belong to a context; the server answers, context by context,
with `timestamps` (the words), `chunk` (base64 audio), `flush_done` after each piece of text and
`done` at the end. Every message carries its `context_id`.
"""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

from aiohttp import web

from rehearsal.providers.pace import Pace, VoiceServer
from rehearsal.providers.server import HOST, Connection

_BREAK_AFTER_CHUNKS = 3

_ERRORS = {
    400: ("Invalid request", "invalid_request"),
    401: ("Invalid API key", "invalid_api_key"),
    429: ("Too many concurrent requests", "concurrency_limited"),
    500: ("Internal server error", "internal_error"),
}


class CartesiaServer(VoiceServer):
    """Speaks with the engine; several contexts at once on one socket."""

    name = "cartesia"
    kind = "tts"
    speaks_to = ("CartesiaTTSService",)
    module = "pipecat.services.cartesia.tts"
    url_variables = ("CARTESIA_BASE_URL",)
    url_argument = "url"

    def routes(self) -> Iterable[web.RouteDef]:
        """Return the one route of the websocket API."""
        return [web.get("/tts/websocket", self._converse)]

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point a bot here."""
        return {
            "CARTESIA_API_KEY": "rehearsal",
            "CARTESIA_VOICE_ID": "rehearsal",
            "CARTESIA_BASE_URL": f"ws://{HOST}:{self.port}/tts/websocket",
        }

    def key_of(self, request: web.Request) -> str:
        """Cartesia's key has a header of its own."""
        return request.headers.get("X-API-Key", "")

    def error(self, status: int) -> Mapping[str, Any]:
        """Return Cartesia's error object."""
        title, code = _ERRORS[status]
        return {"title": title, "message": title, "error_code": code, "status_code": status}

    async def _converse(self, request: web.Request) -> web.StreamResponse:
        entry = await self.admit(request)
        if isinstance(entry, web.Response):
            return entry
        contexts: dict[str, _Context] = {}
        async with self.websocket(request, entry) as connection:
            try:
                async for message in connection:
                    if isinstance(message, dict):
                        await self._take(message, contexts, connection)
            finally:
                for context in contexts.values():
                    context.cancel()
        return connection.response

    async def _take(
        self, message: dict[str, Any], contexts: dict[str, "_Context"], connection: Connection
    ) -> None:
        context_id = message.get("context_id", "")
        context = contexts.get(context_id)
        if message.get("cancel"):
            if context:
                context.cancel()
            return
        if context is None or context.is_over:
            status = self.faults.refusal() or (None if _is_valid(message) else 400)
            if status is not None:
                failure = {"type": "error", "done": True, "context_id": context_id}
                await connection.send({**failure, **self.error(status)})
                return
            context = contexts[context_id] = _Context(self, connection, message)
        context.take(message)


def _is_valid(message: dict[str, Any]) -> bool:
    audio = message.get("output_format", {})
    return (
        audio.get("container") == "raw"
        and audio.get("encoding") == "pcm_s16le"
        and isinstance(audio.get("sample_rate"), int)
        and bool(message.get("voice", {}).get("id"))
        and bool(message.get("model_id"))
        and isinstance(message.get("transcript"), str)
    )


class _Context:
    """One turn's speech: text comes in by pieces, audio goes out in their order."""

    def __init__(
        self, server: CartesiaServer, connection: Connection, first_message: dict[str, Any]
    ) -> None:
        self._server = server
        self._connection = connection
        self._id: str = first_message["context_id"]
        self._sample_rate: int = first_message["output_format"]["sample_rate"]
        # Without a delay of 0 Cartesia gathers tokens itself before it speaks.
        self._gathers = first_message.get("max_buffer_delay_ms") != 0
        self._gathered = ""
        self._texts: asyncio.Queue[str | None] = asyncio.Queue()
        self._pace = Pace(self._sample_rate, server.lead_s)
        self._spoken_samples = 0
        self._task = asyncio.create_task(self._speak_all())

    @property
    def is_over(self) -> bool:
        return self._task.done()

    def cancel(self) -> None:
        self._task.cancel()

    def take(self, message: dict[str, Any]) -> None:
        """Take one message of the client: text, perhaps the last one."""
        is_last = not message.get("continue", False)
        self._gathered += message["transcript"]
        is_sentence = self._gathered.rstrip().endswith((".", "!", "?"))
        if is_last or is_sentence or not self._gathers or message.get("flush"):
            if self._gathered.strip():
                self._texts.put_nowait(self._gathered)
            self._gathered = ""
        if is_last:
            self._texts.put_nowait(None)

    async def _speak_all(self) -> None:
        flush_id = 0
        while (text := await self._texts.get()) is not None:
            await self._server.before_answer()
            await self._speak(text)
            flush_id += 1
            await self._send("flush_done", done=False, flush_done=True, flush_id=flush_id)
        await self._server.before_answer()
        await self._send("done", done=True, status_code=200)

    async def _speak(self, text: str) -> None:
        breaks, chunks = self._server.faults.breaks(), 0
        begin = self._spoken_samples / self._sample_rate
        async for speech in self._server.engine.speak(text, self._sample_rate):
            self._spoken_samples += len(speech.pcm) // 2
            if speech.words:
                timestamps = {
                    "words": [word.text for word in speech.words],
                    "start": [begin + word.start_s for word in speech.words],
                    "end": [begin + word.end_s for word in speech.words],
                }
                await self._send("timestamps", done=False, word_timestamps=timestamps)
            async for chunk in self._pace.chunks(speech.pcm):
                message = {"type": "chunk", "status_code": 206, "done": False, "step_time": 1.0}
                await self._connection.send_audio({**message, "context_id": self._id}, chunk)
                chunks += 1
                if breaks and chunks == _BREAK_AFTER_CHUNKS:
                    await self._connection.break_off(breaks, {**message, "context_id": self._id})
                    return

    async def _send(self, kind: str, **fields: Any) -> None:
        message = {"type": kind, "status_code": 206, "context_id": self._id, **fields}
        await self._connection.send(message)
