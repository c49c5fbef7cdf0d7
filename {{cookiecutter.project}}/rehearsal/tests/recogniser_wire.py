"""A recogniser's wire under test: its server, and Pipecat's own class that hears through it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from pipecat.frames.frames import (
    InterimTranscriptionFrame,
    TranscriptionFrame,
    VADUserStartedSpeakingFrame,
)
from pipecat.services.stt_service import STTService

import services
from rehearsal.engines.scripted import Script, ScriptedEngine
from rehearsal.providers.faults import Faults
from rehearsal.providers.server import Connection, EngineServer, ProviderServer, WireLog
from rehearsal.tests.service_pipeline import SAMPLE_RATE, Line, spoken

KEY = "a-secret-of-the-bot"
PHONE_HZ = 8000


@dataclass(frozen=True)
class Recogniser:
    """A vendor, and in what its wire differs from the others'.

    Attributes:
        server: Plays the vendor.
        create: Makes Pipecat's service for it, given the server's variables.
        asks_with: The message by which Pipecat asks for the transcript of what was said.
        hears_at_hz: The rate of the audio on the wire.
        refuses_once_open: Refusals come in an open socket, when Pipecat believes itself connected.
        keeps_what_was_said: While the vendor is away Pipecat keeps the audio for it.
    """

    server: Callable[..., EngineServer]
    create: Callable[[dict[str, str]], STTService]
    asks_with: str
    hears_at_hz: int
    refuses_once_open: bool = False
    keeps_what_was_said: bool = False


@dataclass
class Wire:
    """A provider, a service that is to hear through it, and what passes between them."""

    server: ProviderServer
    log: WireLog
    stt: STTService
    connects: int = 0

    @property
    def statuses(self) -> list[int | None]:
        return [request.status for request in self.server.requests]

    @property
    def connection(self) -> Connection:
        return self.server.connections[-1]

    async def until_connected(self, times: int = 1) -> None:
        """Wait until the service has connected this often and sends what it is given."""
        await self.log.until(lambda: self.connects == times)

    async def until_received(self, kind: str) -> None:
        await self.log.until(lambda: kind in kinds(self.connection.received))


@asynccontextmanager
async def wire(vendor: Recogniser, faults: Faults | None = None) -> AsyncIterator[Wire]:
    """Run the vendor's server, and make a service that hears through it."""
    log = WireLog()
    engine = ScriptedEngine(Script(hears=("I am calling.", "Bye.")))
    server = vendor.server(engine, log, faults)
    await server.start()
    wire = Wire(server, log, vendor.create(server.environment))

    @wire.stt.event_handler("on_connected")
    async def on_connected(_stt: STTService) -> None:
        wire.connects += 1
        log.changed()

    try:
        yield wire
    finally:
        await server.aclose()


def kinds(messages: list[dict[str, object]]) -> list[object]:
    return [message["type"] for message in messages]


def finals(call: Line) -> list[str]:
    return [frame.text for frame in call.of(TranscriptionFrame)]


def interims(call: Line) -> list[str]:
    return [frame.text for frame in call.of(InterimTranscriptionFrame)]


async def speak_twice(call: Line, sample_rate: int = SAMPLE_RATE) -> None:
    await call.send(*await spoken(sample_rate=sample_rate))
    await call.until(lambda: len(finals(call)) == 1)
    again = VADUserStartedSpeakingFrame(start_secs=0.2)
    await call.send(again, *await spoken(sample_rate=sample_rate))
    await call.until(lambda: len(finals(call)) == 2)


def projects_own(kind: type[STTService], ear: Wire, monkeypatch: pytest.MonkeyPatch) -> STTService:
    """Return what services.py builds, pointed at this wire; in the template that may be another."""
    for name, value in ear.server.environment.items():
        monkeypatch.setenv(name, value)
    stt = services.create_stt()
    if not isinstance(stt, kind):
        pytest.skip("the template builds the default recogniser")
    return stt
