"""Deepgram's live speech-to-text websocket: `GET /v1/listen`.

The client sends audio as binary messages and `KeepAlive`, `Finalize` and `CloseStream` as JSON;
the server sends `Results`, first interim, then final ones. What Pipecat waits for after the caller
went quiet is a final result with `from_finalize`; an empty one is legal.
"""

import asyncio
from collections.abc import Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from string import punctuation
from typing import Any
from uuid import uuid4

from aiohttp import web

from rehearsal.engines.engine import Heard
from rehearsal.providers.server import HOST, Connection, EngineServer

ERRORS = {
    401: ("INVALID_AUTH", "Invalid credentials."),
    429: ("TOO_MANY_REQUESTS", "Too many requests. Please try again later."),
    500: ("INTERNAL_SERVER_ERROR", "An internal error occurred."),
}


class DeepgramServer(EngineServer):
    """Hears with the engine, one recogniser per connection."""

    name = "deepgram"
    kind = "stt"
    speaks_to = ("DeepgramSTTService",)
    module = "pipecat.services.deepgram.stt"
    url_variables = ("DEEPGRAM_BASE_URL",)
    url_argument = "base_url"

    def routes(self) -> Iterable[web.RouteDef]:
        """Return the one route of the live API."""
        return [web.get("/v1/listen", self._listen)]

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point a bot here."""
        return {
            "DEEPGRAM_API_KEY": "rehearsal",
            "DEEPGRAM_BASE_URL": f"ws://{HOST}:{self.port}",
        }

    def error(self, status: int) -> Mapping[str, Any]:
        """Return Deepgram's error object."""
        return error_object(status)

    async def _listen(self, request: web.Request) -> web.StreamResponse:
        entry = await self.admit(request)
        if isinstance(entry, web.Response):
            return entry
        query = entry.query
        sample_rate = query.get("sample_rate", "")
        is_pcm = query.get("encoding") == "linear16" and query.get("channels", "1") == "1"
        if not is_pcm or not sample_rate.isdecimal():
            raise web.HTTPBadRequest(reason="the rehearsal hears linear16 on one channel")
        recogniser = self.engine.listen(int(sample_rate))
        async with self.websocket(request, entry) as connection, asyncio.TaskGroup() as later:
            async for message in connection:
                match message:
                    case bytes():
                        await self._answer(connection, await recogniser.feed(message))
                    case {"type": "Finalize"}:
                        heard = await recogniser.finalize() or [Heard("", True, 0.0, 0.0)]
                        answer = self._answer(connection, heard, from_finalize=True)
                        if delay_s := heard[-1].known_after_s:
                            later.create_task(_after(delay_s, answer))
                        else:
                            await answer
                    case {"type": "CloseStream"}:
                        await self._answer(connection, await recogniser.finalize())
                        break
                    case _:
                        pass  # KeepAlive
        return connection.response

    async def _answer(
        self, connection: Connection, heard: list[Heard], *, from_finalize: bool = False
    ) -> None:
        with_interim = connection.request.query.get("interim_results") == "true"
        # A hanging Deepgram still reads: pings are answered, the client notices nothing.
        for item in heard if not self.faults.hang else []:
            if not item.is_final and not with_interim:
                continue
            await self.before_answer()
            breaks = self.faults.breaks() if item.is_final and item.text else None
            if breaks:
                await connection.send(_results(replace(item, is_final=False)))
                await connection.break_off(breaks, _results(item))
                return
            await connection.send(_results(item, from_finalize=from_finalize and item.is_final))


async def _after(seconds: float, answer: Coroutine[None, None, None]) -> None:
    """Answer later, while the server goes on listening; a client that is gone misses nothing."""
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        answer.close()
        raise
    with suppress(ConnectionError):
        await answer


def error_object(status: int) -> dict[str, Any]:
    """Return what Deepgram refuses a request with, whatever was asked for."""
    code, message = ERRORS[status]
    return {"err_code": code, "err_msg": message, "request_id": str(uuid4())}


def _results(heard: Heard, *, from_finalize: bool = False) -> dict[str, Any]:
    alternative = {"transcript": heard.text, "confidence": 0.99, "words": _words(heard)}
    return {
        "type": "Results",
        "channel_index": [0, 1],
        "start": heard.start_s,
        "duration": heard.duration_s,
        "is_final": heard.is_final,
        "speech_final": heard.is_final,
        "from_finalize": from_finalize,
        "channel": {"alternatives": [alternative]},
        "metadata": {
            "request_id": str(uuid4()),
            "model_uuid": str(uuid4()),
            "model_info": {"name": "rehearsal", "version": "1", "arch": "rehearsal"},
        },
    }


def _words(heard: Heard) -> list[dict[str, Any]]:
    return [
        {
            "word": word.text.strip(punctuation).lower(),
            "punctuated_word": word.text,
            "start": word.start_s,
            "end": word.end_s,
            "confidence": 0.99,
        }
        for word in heard.words()
    ]
