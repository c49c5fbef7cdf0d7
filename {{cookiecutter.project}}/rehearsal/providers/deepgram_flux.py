"""Deepgram Flux, which also tells whose turn it is: the websocket `GET /v2/listen`.

The server opens with `Connected`. The client sends audio as binary messages and `Configure`,
`ForceEndTurn` and `CloseStream` as JSON. What is heard comes as `TurnInfo`, each with the whole
transcript of the turn: `StartOfTurn` with its first words, `Update`, `EagerEndOfTurn` where it may
be over (only if the client gave an `eager_eot_threshold`), `TurnResumed` where it was not, and
`EndOfTurn`. Nothing tells the server that the caller went quiet: it hears that for itself.

Flux decides by the confidence of its model. Here a pause decides, of the lengths below.
"""

from collections.abc import Iterable, Mapping
from typing import Any
from uuid import uuid4

from aiohttp import web

from rehearsal.engines.engine import Heard, Recogniser, Word
from rehearsal.engines.loudness import rms
from rehearsal.providers.deepgram import error_object
from rehearsal.providers.server import HOST, Connection, EngineServer

EAGER_SECONDS = 0.25
END_SECONDS = 0.5
UPDATE_SECONDS = 0.25
"""So often a turn that goes on is told of, whether or not there are new words."""
LOUD_RMS = 300.0
"""Of a piece of audio, PCM16: what is quieter, -41 dBFS, is a pause."""


class DeepgramFluxServer(EngineServer):
    """Hears with the engine, one recogniser per connection."""

    name = "deepgram_flux"
    kind = "stt"
    speaks_to = ("DeepgramFluxSTTService",)
    module = "pipecat.services.deepgram.flux.stt"
    url_variables = ("DEEPGRAM_FLUX_URL",)
    url_argument = "url"

    def routes(self) -> Iterable[web.RouteDef]:
        """Return the one route of the turn-based API."""
        return [web.get("/v2/listen", self._listen)]

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point a bot here."""
        return {
            "DEEPGRAM_API_KEY": "rehearsal",
            "DEEPGRAM_FLUX_URL": f"ws://{HOST}:{self.port}/v2/listen",
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
        is_pcm = query.get("encoding") == "linear16" and sample_rate.isdecimal()
        if not is_pcm or not query.get("model", "").startswith("flux-"):
            raise web.HTTPBadRequest(reason="the rehearsal hears linear16 with a model of Flux")
        async with self.websocket(request, entry) as connection:
            turns = _Turns(self, connection, self.engine.listen(int(sample_rate)))
            await turns.send({"type": "Connected"})
            async for message in connection:
                match message:
                    case bytes():
                        await turns.feed(message)
                    case {"type": "Configure"}:
                        await turns.configure(message)
                    case {"type": "ForceEndTurn"}:
                        await turns.end("manual")
                    case {"type": "CloseStream"}:
                        break
                    case _:
                        pass
        return connection.response


class _Turns:
    """The turns of one connection."""

    def __init__(
        self, server: DeepgramFluxServer, connection: Connection, recogniser: Recogniser
    ) -> None:
        query = connection.request.query
        self._server, self._connection, self._recogniser = server, connection, recogniser
        self._bytes_per_second = 2 * int(query["sample_rate"])
        self._thresholds: dict[str, Any] = {
            name: float(query[name])
            for name in ("eager_eot_threshold", "eot_threshold", "eot_timeout_ms")
            if name in query
        }
        self._request_id = str(uuid4())
        self._now_s = self._quiet_s = self._told_s = 0.0
        self._index = 0
        self._began_s: float | None = None
        self._final: list[Heard] = []
        self._guess: Heard | None = None
        self._is_finalized = self._is_eager = False

    async def feed(self, pcm: bytes) -> None:
        """Take the next piece of audio; tell what became known by it."""
        seconds = len(pcm) / self._bytes_per_second
        self._now_s += seconds
        self._quiet_s = 0.0 if rms(pcm) >= LOUD_RMS else self._quiet_s + seconds
        if not self._quiet_s and self._is_finalized:
            self._is_finalized = False
            if self._is_eager:
                self._is_eager = False
                await self._tell("TurnResumed", confidence=0.1)
        await self._hear(await self._recogniser.feed(pcm))
        if self._quiet_s >= EAGER_SECONDS and not self._is_finalized:
            self._is_finalized = True
            await self._hear(await self._recogniser.finalize())
            if self._began_s is not None and self._thresholds.get("eager_eot_threshold"):
                self._is_eager = True
                await self._tell("EagerEndOfTurn", confidence=0.6)
        if self._quiet_s >= END_SECONDS:
            await self.end("model")
        elif self._began_s is not None and self._now_s - self._told_s >= UPDATE_SECONDS:
            await self._tell("Update")

    async def end(self, trigger: str) -> None:
        """End the turn, if there is one."""
        if self._began_s is None:
            return
        if not self._is_finalized:
            await self._hear(await self._recogniser.finalize())
        if breaks := self._server.faults.breaks():
            await self._tell("Update")
            message = self._message("EndOfTurn", confidence=0.9)
            await self._connection.break_off(breaks, message)
            return
        await self._tell("EndOfTurn", confidence=0.9, trigger=trigger)
        self._index += 1
        self._began_s, self._guess = None, None
        self._final.clear()
        self._is_eager = False

    async def configure(self, message: Mapping[str, Any]) -> None:
        """Take other thresholds; they hold from now on."""
        self._thresholds |= message.get("thresholds", {})
        success = {"thresholds": self._thresholds, "keyterms": message.get("keyterms", [])}
        await self.send({"type": "ConfigureSuccess", **success})

    async def send(self, message: dict[str, Any]) -> None:
        """Number a message and send it, unless Flux hangs: it still reads then."""
        if not self._server.faults.hang:
            await self._server.before_answer()
            numbered = {"request_id": self._request_id, "sequence_id": len(self._connection.sent)}
            await self._connection.send({**message, **numbered})

    async def _hear(self, heard: list[Heard]) -> None:
        for item in heard:
            if not item.text:
                continue
            if item.is_final:
                self._final.append(item)
            self._guess = None if item.is_final else item
            if self._began_s is None:
                self._began_s = item.start_s
                await self._tell("StartOfTurn")
            else:
                await self._tell("Update")

    async def _tell(self, event: str, *, confidence: float = 0.1, **more: str) -> None:
        self._told_s = self._now_s
        await self.send({**self._message(event, confidence=confidence), **more})

    def _message(self, event: str, *, confidence: float) -> dict[str, Any]:
        heard = [*self._final, *([self._guess] if self._guess else [])]
        return {
            "type": "TurnInfo",
            "event": event,
            "turn_index": self._index,
            "audio_window_start": round(self._began_s or 0.0, 3),
            "audio_window_end": round(self._now_s, 3),
            "transcript": " ".join(item.text for item in heard),
            "words": [_word(word) for item in heard for word in item.words()],
            "end_of_turn_confidence": confidence,
        }


def _word(word: Word) -> dict[str, Any]:
    times = {"start": round(word.start_s, 3), "end": round(word.end_s, 3)}
    return {"word": word.text, "confidence": 0.99, **times}
