"""ElevenLabs' text-to-speech websocket: `GET /v1/text-to-speech/{voice}/multi-stream-input`.

The client opens contexts, each with a text of one space, sends them text, flushes and closes them.
The server answers, context by context, with base64 audio and its `alignment`: the characters and
when they are spoken, in milliseconds that begin anew with every alignment. `isFinal` ends a context
that was closed.

Every handshake is accepted. A key may also come with a context's first text, and who is refused
learns it then: from an error without a context, and the socket closes.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from aiohttp import web

from rehearsal.engines.engine import Word
from rehearsal.providers.pace import Pace, VoiceServer
from rehearsal.providers.server import HOST, Connection

_BREAK_AFTER_CHUNKS = 3
# Without `auto_mode` ElevenLabs gathers about as much before it speaks.
_GATHERED_CHARACTERS = 120
_CLOSE_CODE = 1008

_ERRORS = {
    401: ("invalid_api_key", "Invalid API key"),
    429: ("too_many_concurrent_requests", "Too many concurrent requests."),
    500: ("internal_error", "We are sorry, something went wrong."),
}


class ElevenLabsServer(VoiceServer):
    """Speaks with the engine; several contexts at once on one socket."""

    name = "elevenlabs"
    kind = "tts"
    speaks_to = ("ElevenLabsTTSService",)
    module = "pipecat.services.elevenlabs.tts"
    url_variables = ("ELEVENLABS_BASE_URL",)
    url_argument = "url"

    def routes(self) -> Iterable[web.RouteDef]:
        """Return the one route of the websocket API."""
        return [web.get("/v1/text-to-speech/{voice}/multi-stream-input", self._converse)]

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point a bot here."""
        return {
            "ELEVENLABS_API_KEY": "rehearsal",
            "ELEVENLABS_VOICE_ID": "rehearsal",
            "ELEVENLABS_BASE_URL": f"ws://{HOST}:{self.port}",
        }

    def key_of(self, request: web.Request) -> str:
        """ElevenLabs' key has a header of its own."""
        return request.headers.get("xi-api-key", "")

    def error(self, status: int) -> Mapping[str, Any]:
        """Return ElevenLabs' error message."""
        error, message = _ERRORS[status]
        return {"message": message, "error": error, "code": _CLOSE_CODE}

    async def _converse(self, request: web.Request) -> web.StreamResponse:
        entry = await self.admit(request)
        refusal = None
        if isinstance(entry, web.Response):
            refusal, entry = entry.status, self.requests[-1]
        rate = entry.query.get("output_format", "").removeprefix("pcm_")
        if not rate.isdecimal() or not entry.query.get("model_id"):
            raise web.HTTPBadRequest(reason="the rehearsal speaks PCM, and wants a model")
        contexts: dict[str, _Context] = {}
        async with self.websocket(request, entry) as connection:
            try:
                async for message in connection:
                    if not isinstance(message, dict):
                        continue
                    if message.get("close_socket"):
                        break
                    context_id = message.get("context_id", "")
                    context = contexts.get(context_id)
                    if context is None or context.is_over:
                        if not message.get("text"):
                            continue  # keeps something alive, or closes what is over
                        refusal = refusal or self.faults.refusal()
                        if refusal is not None:
                            await self._refuse(connection, refusal)
                            break
                        context = _Context(self, connection, context_id, int(rate))
                        contexts[context_id] = context
                    context.take(message)
            finally:
                for context in contexts.values():
                    context.cancel()
        return connection.response

    async def _refuse(self, connection: Connection, status: int) -> None:
        error = self.error(status)
        await connection.send({**error})
        await connection.response.close(code=_CLOSE_CODE, message=error["message"].encode())


class _Context:
    """One turn's speech: text comes in by pieces, audio goes out in their order."""

    def __init__(
        self, server: ElevenLabsServer, connection: Connection, context_id: str, sample_rate: int
    ) -> None:
        self._server = server
        self._connection = connection
        self._id = context_id
        self._sample_rate = sample_rate
        self._gathers = connection.request.query.get("auto_mode") != "true"
        self._gathered = ""
        self._texts: asyncio.Queue[str | None] = asyncio.Queue()
        self._is_flushed = False
        self._pace = Pace(sample_rate, server.lead_s)
        self._spoken_samples = 0
        self._aligned_ms = 0
        self._task = asyncio.create_task(self._speak_all())

    @property
    def is_over(self) -> bool:
        return self._task.done()

    def cancel(self) -> None:
        self._task.cancel()

    def take(self, message: dict[str, Any]) -> None:
        """Take one message of the client: text, perhaps the wish to hear it or to end here."""
        if message.get("text"):
            self._gathered += message["text"]
            self._is_flushed = False
        is_enough = not self._gathers or len(self._gathered) >= _GATHERED_CHARACTERS
        if is_enough or message.get("flush"):
            if self._gathered.strip():
                self._texts.put_nowait(self._gathered)
            self._gathered = ""
        self._is_flushed = self._is_flushed or bool(message.get("flush"))
        if message.get("close_context"):
            self._close()

    def _close(self) -> None:
        """Say what was flushed and end; a second time, or with nothing flushed, end now."""
        if self._is_flushed:
            self._texts.put_nowait(None)
            self._is_flushed = False
        else:
            self._task.cancel()
            self._task = asyncio.create_task(self._end())

    async def _speak_all(self) -> None:
        while (text := await self._texts.get()) is not None:
            await self._server.before_answer()
            await self._speak(text)
        await self._end()

    async def _end(self) -> None:
        await self._server.before_answer()
        await self._connection.send({"isFinal": True, "contextId": self._id})

    async def _speak(self, text: str) -> None:
        breaks, chunks = self._server.faults.breaks(), 0
        begin = self._spoken_samples / self._sample_rate
        async for speech in self._server.engine.speak(text, self._sample_rate):
            self._spoken_samples += len(speech.pcm) // 2
            alignment = self._align(speech.words, begin) if speech.words else None
            async for chunk in self._pace.chunks(speech.pcm):
                timing = {"alignment": alignment, "normalizedAlignment": alignment}
                message = {"contextId": self._id, **timing}
                await self._connection.send_audio(message, chunk, field="audio")
                alignment = None
                chunks += 1
                if breaks and chunks == _BREAK_AFTER_CHUNKS:
                    await self._connection.break_off(breaks, message)
                    return

    def _align(self, words: Sequence[Word], begin: float) -> dict[str, Any]:
        """Time the characters from the end of the alignment before to the end of the audio."""
        chars: list[str] = []
        starts: list[float] = []
        for word in words:
            per_letter = (word.end_s - word.start_s) / len(word.text)
            for index, letter in enumerate(f"{word.text} "):
                chars.append(letter)
                starts.append(begin + word.start_s + index * per_letter)
        end_ms = round(1000 * self._spoken_samples / self._sample_rate)
        edges = [min(round(1000 * start), end_ms) - self._aligned_ms for start in starts]
        edges.append(end_ms - self._aligned_ms)
        self._aligned_ms = end_ms
        return {
            "chars": chars,
            "charStartTimesMs": edges[:-1],
            "charDurationsMs": [after - before for before, after in pairwise(edges)],
        }
