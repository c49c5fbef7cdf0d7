"""The servers of all services that the bot may use, and Twilio's REST API, on this machine."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import TypeVar

import config
from rehearsal.engines.engine import Engine
from rehearsal.providers.faults import Faults
from rehearsal.providers.pace import VoiceServer
from rehearsal.providers.server import EngineServer, ProviderServer, WireLog, free_port
from rehearsal.providers.twilio_rest import TwilioServer

S = TypeVar("S", bound=ProviderServer)

# One file for each in this folder; a project has those of the services it was generated with. The
# name is the file's, and that by which faults are switched.
WIRES = {
    "deepgram": "DeepgramServer",
    "deepgram_flux": "DeepgramFluxServer",
    "assemblyai": "AssemblyAIServer",
    "openai_stt": "OpenAIListenServer",
    "openai": "OpenAIServer",
    "anthropic": "AnthropicServer",
    "google": "GoogleServer",
    "cartesia": "CartesiaServer",
    "elevenlabs": "ElevenLabsServer",
    "deepgram_tts": "DeepgramSpeakServer",
}


class Providers:
    """The running servers, each on a port of its own, and the log of what passed on their wires.

    Attributes:
        servers: In the order of their ports.
        twilio: The one that phone calls are hung up by.
    """

    def __init__(self, engine: Engine, log: WireLog, faults: Mapping[str, Faults]) -> None:
        """Make the servers of the wires that are here, none of them running yet."""
        self.log = log
        self.twilio = TwilioServer(log, faults.get("twilio"))
        self.servers: list[ProviderServer] = [
            wire(name)(engine, log, faults.get(name)) for name in wires()
        ]
        self.servers.append(self.twilio)

    def __getitem__(self, kind: type[S]) -> S:
        """Return the server of this class."""
        return next(server for server in self.servers if isinstance(server, kind))

    @property
    def voices(self) -> list[VoiceServer]:
        """The servers that speak."""
        return [server for server in self.servers if isinstance(server, VoiceServer)]

    @property
    def by_service(self) -> dict[str, ProviderServer]:
        """The server that speaks to each of Pipecat's service classes, by the class's name."""
        return {name: server for server in self.servers for name in server.speaks_to}

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point a bot here. The keys are placeholders; any key is taken."""
        # Those of a service that has no server here too: another stands in for it.
        keys = dict.fromkeys(config.REQUIRED, "rehearsal")
        own = [server.environment.items() for server in self.servers]
        return keys | {name: value for pairs in own for name, value in pairs}

    @property
    def peers(self) -> set[str]:
        """The addresses all requests came from."""
        return {request.peer[0] for request in self.log.requests}


def wires() -> list[str]:
    """Return the names of the wires that are here."""
    return [name for name in WIRES if find_spec(f"rehearsal.providers.{name}")]


def wire(name: str) -> type[EngineServer]:
    """Return the class that speaks a wire."""
    return getattr(import_module(f"rehearsal.providers.{name}"), WIRES[name])


@asynccontextmanager
async def serve(
    engine: Engine, *, faults: Mapping[str, Faults] | None = None, port: int = 0
) -> AsyncIterator[Providers]:
    """Run all providers on 127.0.0.1 before `engine`, which stays open.

    Args:
        engine: What hears, thinks and speaks.
        faults: Switches by the name of a wire or "twilio", to begin with.
        port: Port of the first server, the others take the free ones after it; 0 takes any.

    Raises:
        OSError: That port is taken.
    """
    switches = faults or {}
    if unknown := set(switches) - {*wires(), "twilio"}:
        raise ValueError(f"no such provider: {', '.join(sorted(unknown))}")
    providers = Providers(engine, WireLog(), switches)
    try:
        next_port = port
        for server in providers.servers:
            await server.start(next_port)
            next_port = free_port(server.port + 1) if port else 0
        yield providers
    finally:
        for server in providers.servers:
            await server.aclose()
