"""The providers of all services a bot may use, and Twilio's REST API, on this machine."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from rehearsal.engines.engine import Engine
from rehearsal.providers.anthropic import AnthropicServer
from rehearsal.providers.assemblyai import AssemblyAIServer
from rehearsal.providers.cartesia import CartesiaServer
from rehearsal.providers.deepgram import DeepgramServer
from rehearsal.providers.deepgram_tts import DeepgramSpeakServer
from rehearsal.providers.elevenlabs import ElevenLabsServer
from rehearsal.providers.faults import Faults
from rehearsal.providers.google import GoogleServer
from rehearsal.providers.openai import OpenAIServer
from rehearsal.providers.openai_stt import OpenAIListenServer
from rehearsal.providers.pace import VoiceServer
from rehearsal.providers.server import ProviderServer, WireLog, free_port
from rehearsal.providers.twilio_rest import TwilioServer


@dataclass(frozen=True)
class Providers:
    """The running servers, each on a port of its own, and the log of what passed on their wires."""

    deepgram: DeepgramServer
    assemblyai: AssemblyAIServer
    openai_stt: OpenAIListenServer
    openai: OpenAIServer
    anthropic: AnthropicServer
    google: GoogleServer
    cartesia: CartesiaServer
    elevenlabs: ElevenLabsServer
    deepgram_tts: DeepgramSpeakServer
    twilio: TwilioServer
    log: WireLog

    @property
    def servers(self) -> tuple[ProviderServer, ...]:
        """All servers, in the order of their ports."""
        return tuple(part for part in vars(self).values() if isinstance(part, ProviderServer))

    @property
    def voices(self) -> tuple[VoiceServer, ...]:
        """The servers that speak."""
        return (self.cartesia, self.elevenlabs, self.deepgram_tts)

    @property
    def by_service(self) -> dict[str, ProviderServer]:
        """The server that speaks to each of Pipecat's service classes, by the class's name."""
        return {name: server for server in self.servers for name in server.speaks_to}

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point a bot here. The keys are placeholders; any key is taken."""
        return {
            name: value for server in self.servers for name, value in server.environment.items()
        }

    @property
    def peers(self) -> set[str]:
        """The addresses all requests came from."""
        return {request.peer[0] for request in self.log.requests}


@asynccontextmanager
async def serve(
    engine: Engine, *, faults: Mapping[str, Faults] | None = None, port: int = 0
) -> AsyncIterator[Providers]:
    """Run all providers on 127.0.0.1 before `engine`, which stays open.

    Args:
        engine: What hears, thinks and speaks.
        faults: Switches by server name (deepgram, openai, cartesia, ...) to begin with.
        port: Port of the first server, the others take the free ones after it; 0 takes any.

    Raises:
        OSError: That port is taken.
    """
    log = WireLog()
    switches = dict(faults or {})
    providers = Providers(
        deepgram=DeepgramServer(engine, log, switches.pop("deepgram", None)),
        assemblyai=AssemblyAIServer(engine, log, switches.pop("assemblyai", None)),
        openai_stt=OpenAIListenServer(engine, log, switches.pop("openai_stt", None)),
        openai=OpenAIServer(engine, log, switches.pop("openai", None)),
        anthropic=AnthropicServer(engine, log, switches.pop("anthropic", None)),
        google=GoogleServer(engine, log, switches.pop("google", None)),
        cartesia=CartesiaServer(engine, log, switches.pop("cartesia", None)),
        elevenlabs=ElevenLabsServer(engine, log, switches.pop("elevenlabs", None)),
        deepgram_tts=DeepgramSpeakServer(engine, log, switches.pop("deepgram_tts", None)),
        twilio=TwilioServer(log, switches.pop("twilio", None)),
        log=log,
    )
    if switches:
        raise ValueError(f"no such provider: {', '.join(switches)}")
    try:
        next_port = port
        for server in providers.servers:
            await server.start(next_port)
            next_port = free_port(server.port + 1) if port else 0
        yield providers
    finally:
        for server in providers.servers:
            await server.aclose()
