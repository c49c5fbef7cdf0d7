"""AssemblyAI's streaming speech-to-text websocket: `GET /v3/ws`.

The server opens with `Begin`. The client sends audio as binary messages and `ForceEndpoint`,
`UpdateConfiguration` and `Terminate` as JSON. What is heard comes as `Turn`, the whole of it each
time it grows and, with `end_of_turn`, a last time; `ForceEndpoint` asks for that one at once.
`Terminate` is answered with `Termination`, which Pipecat waits for.

Who is refused learns it in an open socket: from an `Error`, and from the code it closes with.
"""

import time
from collections.abc import Iterable, Mapping
from typing import Any
from uuid import uuid4

from aiohttp import web

from rehearsal.engines.engine import Heard
from rehearsal.providers.server import HOST, Connection, EngineServer

_SESSION_SECONDS = 3 * 60 * 60

_ERRORS = {
    401: (1008, "Unauthorized Connection: Not authorized"),
    429: (1008, "Unauthorized Connection: Too many concurrent sessions"),
    500: (3005, "Session Cancelled: An error occurred"),
}


class AssemblyAIServer(EngineServer):
    """Hears with the engine, one recogniser per connection."""

    name = "assemblyai"
    kind = "stt"
    speaks_to = ("AssemblyAISTTService",)
    module = "pipecat.services.assemblyai.stt"
    url_variables = ("ASSEMBLYAI_BASE_URL",)
    url_argument = "api_endpoint_base_url"

    def routes(self) -> Iterable[web.RouteDef]:
        """Return the one route of the streaming API."""
        return [web.get("/v3/ws", self._listen)]

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point a bot here."""
        return {
            "ASSEMBLYAI_API_KEY": "rehearsal",
            "ASSEMBLYAI_BASE_URL": f"ws://{HOST}:{self.port}/v3/ws",
        }

    def key_of(self, request: web.Request) -> str:
        """AssemblyAI's key is the whole header."""
        return request.headers.get("Authorization", "")

    def error(self, status: int) -> Mapping[str, Any]:
        """Return AssemblyAI's error message."""
        code, message = _ERRORS[status]
        return {"type": "Error", "error_code": code, "error": message}

    async def _listen(self, request: web.Request) -> web.StreamResponse:
        entry = await self.admit(request)
        if isinstance(entry, web.Response):
            code, message = _ERRORS[entry.status]
            error = self.error(entry.status)
            return await self.refuse_in_socket(request, error, code=code, reason=message)
        query = entry.query
        sample_rate = query.get("sample_rate", "16000")
        is_pcm = query.get("encoding", "pcm_s16le") == "pcm_s16le"
        if not is_pcm or not sample_rate.isdecimal() or not query.get("speech_model"):
            raise web.HTTPBadRequest(reason="the rehearsal hears pcm_s16le, and wants a model")
        recogniser = self.engine.listen(int(sample_rate))
        began = time.monotonic()
        async with self.websocket(request, entry) as connection:
            expires = int(time.time()) + _SESSION_SECONDS
            await self._send(
                connection, {"type": "Begin", "id": str(uuid4()), "expires_at": expires}
            )
            async for message in connection:
                match message:
                    case bytes():
                        await self._answer(connection, await recogniser.feed(message))
                    case {"type": "ForceEndpoint"}:
                        await self._answer(connection, await recogniser.finalize())
                    case {"type": "Terminate"}:
                        await self._answer(connection, await recogniser.finalize())
                        seconds = {
                            "audio_duration_seconds": connection.audio_bytes / 2 / int(sample_rate),
                            "session_duration_seconds": time.monotonic() - began,
                        }
                        await self._send(connection, {"type": "Termination", **seconds})
                        break
                    case _:
                        pass  # UpdateConfiguration, KeepAlive
        return connection.response

    async def _answer(self, connection: Connection, heard: list[Heard]) -> None:
        for item in heard:
            if not item.text:
                continue
            turns = [message for message in connection.sent if message["type"] == "Turn"]
            if not turns or turns[-1]["end_of_turn"]:
                began = {"type": "SpeechStarted", "timestamp": _milliseconds(item.start_s)}
                await self._send(connection, began)
            order = sum(message["end_of_turn"] for message in turns)
            if item.is_final and (breaks := self.faults.breaks()):
                await self._send(connection, _turn(item, order, is_over=False))
                await connection.break_off(breaks, _turn(item, order, is_over=True))
                return
            await self._send(connection, _turn(item, order, is_over=item.is_final))

    async def _send(self, connection: Connection, message: dict[str, Any]) -> None:
        # A hanging AssemblyAI still reads: pings are answered, the client notices nothing.
        if not self.faults.hang:
            await self.before_answer()
            await connection.send(message)


def _turn(heard: Heard, order: int, *, is_over: bool) -> dict[str, Any]:
    return {
        "type": "Turn",
        "turn_order": order,
        "turn_is_formatted": is_over,
        "end_of_turn": is_over,
        "end_of_turn_confidence": 1.0 if is_over else 0.0,
        "transcript": heard.text,
        "utterance": heard.text if is_over else "",
        "words": [
            {
                "text": word.text,
                "start": _milliseconds(word.start_s),
                "end": _milliseconds(word.end_s),
                "confidence": 0.99,
                "word_is_final": is_over,
            }
            for word in heard.words()
        ],
    }


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
