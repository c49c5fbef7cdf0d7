"""OpenAI's live speech to text: the websocket `GET /v1/realtime?intent=transcription`.

The server opens with `session.created`, the client sets its wishes with `session.update`. It
appends audio to a buffer, base64 of 24 kHz PCM, and commits the buffer when the caller went quiet.
The server sends each `delta` of the text as it is heard, and `completed` with all of it after the
commit; that one may be empty. Events that Pipecat passes over are left out.

An unknown key is refused in an open socket, everything else before it is one.
"""

import base64
from collections.abc import Iterable, Mapping
from typing import Any
from uuid import uuid4

from aiohttp import web

from rehearsal.engines.engine import Engine, Heard
from rehearsal.providers.server import HOST, Connection, EngineServer, ProviderServer

SAMPLE_RATE = 24000
"""The only one OpenAI hears, in Hz."""

_LEAST_COMMIT_BYTES = SAMPLE_RATE * 2 // 10
_UNKNOWN_KEY_CODE = 3000
_TRANSCRIPTION = "conversation.item.input_audio_transcription"

_ERRORS = {
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    429: ("requests", "rate_limit_exceeded", "Rate limit reached."),
    500: ("server_error", None, "The server had an error while processing your request."),
}


class OpenAIListenServer(EngineServer):
    """Hears with the engine, one recogniser per connection."""

    name = "openai_stt"
    kind = "stt"
    speaks_to = ("OpenAIRealtimeSTTService",)
    module = "pipecat.services.openai.stt"
    url_variables = ("OPENAI_STT_BASE_URL",)
    url_argument = "base_url"

    def routes(self) -> Iterable[web.RouteDef]:
        """Return the one route of the realtime API."""
        return [web.get("/v1/realtime", self._listen)]

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point a bot here."""
        return {
            "OPENAI_API_KEY": "rehearsal",
            "OPENAI_STT_BASE_URL": f"ws://{HOST}:{self.port}/v1/realtime",
        }

    def error(self, status: int) -> Mapping[str, Any]:
        """Return OpenAI's error object."""
        return _failure(*_ERRORS[status])

    async def _listen(self, request: web.Request) -> web.StreamResponse:
        entry = await self.admit(request)
        if isinstance(entry, web.Response):
            if entry.status != 401:
                return entry
            kind, code, _ = _ERRORS[401]
            error = {"type": "error", "event_id": _new_id("event"), **self.error(401)}
            return await self.refuse_in_socket(
                request, error, code=_UNKNOWN_KEY_CODE, reason=f"{kind}.{code}"
            )
        if entry.query.get("intent") != "transcription":
            raise web.HTTPBadRequest(reason="the rehearsal transcribes, it does not converse")
        async with self.websocket(request, entry) as connection:
            await _Session(connection, self.engine, self).run()
        return connection.response


class _Session:
    """One connection: its recogniser, and the item it listens to, which the next commit ends."""

    def __init__(self, connection: Connection, engine: Engine, server: ProviderServer) -> None:
        self._connection = connection
        self._recogniser = engine.listen(SAMPLE_RATE)
        self._server = server
        self._begin_item()

    async def run(self) -> None:
        session = {"type": "transcription", "id": _new_id("sess")}
        await self._send("session.created", session=session)
        async for message in self._connection:
            match message:
                case {"type": "session.update", "session": wishes} if _can_be_met(wishes):
                    await self._send("session.updated", session={**session, **wishes})
                case {"type": "session.update"}:
                    await self._fail("invalid_value", "The rehearsal cannot meet these wishes.")
                case {"type": "input_audio_buffer.append", "audio": str(audio)}:
                    # Audio is only counted, also where it comes as text.
                    self._connection.received.pop()
                    await self._append(base64.b64decode(audio))
                case {"type": "input_audio_buffer.commit"}:
                    await self._commit()
                case _:
                    pass

    def _begin_item(self) -> None:
        self._item = {"item_id": _new_id("item"), "content_index": 0}
        self._item_bytes = 0
        self._told = ""
        self._finals: list[str] = []

    async def _append(self, pcm: bytes) -> None:
        self._connection.audio_bytes += len(pcm)
        self._item_bytes += len(pcm)
        await self._tell(await self._recogniser.feed(pcm))

    async def _commit(self) -> None:
        if self._item_bytes < _LEAST_COMMIT_BYTES:
            await self._fail("input_audio_buffer_commit_empty", "There are not 100 ms to commit.")
            return
        await self._send("input_audio_buffer.committed", item_id=self._item["item_id"])
        await self._tell(await self._recogniser.finalize())
        text = " ".join(self._finals)
        if text and (breaks := self._server.faults.breaks()):
            completed = {"type": f"{_TRANSCRIPTION}.completed", **self._item, "transcript": text}
            await self._connection.break_off(breaks, completed)
            return
        usage = {"type": "duration", "seconds": self._item_bytes / 2 / SAMPLE_RATE}
        await self._send(f"{_TRANSCRIPTION}.completed", **self._item, transcript=text, usage=usage)
        self._begin_item()

    async def _tell(self, heard: list[Heard]) -> None:
        """Send what is new; a delta cannot take back what another one said."""
        for item in heard:
            text = " ".join([*self._finals, item.text])
            if item.is_final and item.text:
                self._finals.append(item.text)
            if len(text) > len(self._told) and text.startswith(self._told):
                delta = text.removeprefix(self._told)
                self._told = text
                await self._send(f"{_TRANSCRIPTION}.delta", **self._item, delta=delta)

    async def _fail(self, code: str, message: str) -> None:
        await self._send("error", **_failure("invalid_request_error", code, message))

    async def _send(self, event: str, **content: Any) -> None:
        # A hanging OpenAI still reads: pings are answered, the client notices nothing.
        if not self._server.faults.hang:
            await self._server.before_answer()
            await self._connection.send({"type": event, "event_id": _new_id("event"), **content})


def _can_be_met(wishes: dict[str, Any]) -> bool:
    """Whether the audio is what this server hears, and the client commits it by itself."""
    audio = wishes.get("audio", {}).get("input", {})
    return (
        audio.get("format") == {"type": "audio/pcm", "rate": SAMPLE_RATE}
        and bool((audio.get("transcription") or {}).get("model"))
        and audio.get("turn_detection", {}) is None
    )


def _failure(kind: str, code: str | None, message: str) -> dict[str, Any]:
    return {"error": {"type": kind, "code": code, "message": message, "param": None}}


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid4().hex}"
