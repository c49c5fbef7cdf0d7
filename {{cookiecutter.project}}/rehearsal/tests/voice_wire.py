"""A voice's wire under test: its server, and Pipecat's own class that speaks through it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from pipecat.frames.frames import (
    TTSAudioRawFrame,
    TTSStoppedFrame,
    TTSTextFrame,
)
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.services.tts_service import TTSService

from rehearsal.engines.scripted import ScriptedEngine
from rehearsal.providers.faults import Faults
from rehearsal.providers.pace import LEAD_SECONDS, VoiceServer
from rehearsal.providers.server import WireLog
from rehearsal.tests.service_pipeline import Line, answer, line

KEY = "a-secret-of-the-bot"
WEB_HZ = 24000
PHONE_HZ = 8000
LONG = "This is a sentence that is interrupted long before its end, as everybody can hear."


@dataclass(frozen=True)
class Voice:
    """A vendor, and in what its wire differs from the others'.

    Attributes:
        server: Plays the vendor.
        create: Makes Pipecat's service for it, given the server's variables and options.
        times_words: The vendor says when each word is spoken.
    """

    server: Callable[..., VoiceServer]
    create: Callable[..., TTSService]
    times_words: bool


@dataclass
class Scene:
    """A voice in a pipeline, and the server it talks to."""

    server: VoiceServer
    tts: TTSService
    call: Line
    log: WireLog

    @property
    def texts(self) -> list[str]:
        """What the server was told to say."""
        received = [message for c in self.server.connections for message in c.received]
        return [text for message in received if (text := message.get("text", "").strip())]

    @property
    def words(self) -> list[str]:
        """What Pipecat takes for spoken."""
        return [frame.text for frame in self.call.of(TTSTextFrame)]

    def sent(self, connection: int = 0) -> list[dict[str, Any]]:
        """The server's messages on one connection."""
        return self.server.connections[connection].sent

    async def say(self, *texts: str, within_s: float = 30.0) -> None:
        """Let the bot answer, and wait until its speech is over."""
        before = len(self.call.of(TTSStoppedFrame))
        await self.call.send(*answer(*texts))
        await self.call.until(lambda: len(self.call.of(TTSStoppedFrame)) > before, within_s)


@asynccontextmanager
async def scene(
    vendor: Voice,
    *after: FrameProcessor,
    engine: ScriptedEngine | None = None,
    faults: Faults | None = None,
    lead_s: float = LEAD_SECONDS,
    is_down: bool = False,
    **options: Any,
) -> AsyncIterator[Scene]:
    """Run a vendor's server and Pipecat's class for it."""
    log = WireLog()
    server = vendor.server(engine or ScriptedEngine(), log, faults)
    await server.start()
    tts = vendor.create(server.environment, **options)
    server.lead_s = lead_s
    try:
        if is_down:
            await server.refuse()
        async with line(tts, *after) as call:
            yield Scene(server, tts, call, log)
    finally:
        await server.aclose()


async def pcm_of(*texts: str, rate: int = WEB_HZ) -> bytes:
    """Return the sound of texts, as the engine makes it."""
    engine = ScriptedEngine()
    return b"".join([speech.pcm for text in texts async for speech in engine.speak(text, rate)])


def sound(call: Line, since: int = 0) -> bytes:
    """Return what came out of the voice after the first `since` frames."""
    frames = call.frames[since:]
    return b"".join(frame.audio for frame in frames if isinstance(frame, TTSAudioRawFrame))


def seconds_of_words(call: Line) -> list[float]:
    """Return when each word is spoken, seconds after the first."""
    times = [frame.pts or 0 for frame in call.of(TTSTextFrame)]
    return [(at - times[0]) / 1e9 for at in times]
