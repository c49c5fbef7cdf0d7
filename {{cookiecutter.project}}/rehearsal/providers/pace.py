"""The pace of synthesised speech: near real time.

The voices in the cloud make their audio far faster than it is played. The rehearsal does not, so
that a sentence is still being made when the caller barges in, and what the client does then shows.
"""

import asyncio
import time
from collections.abc import AsyncIterator

from rehearsal.engines.engine import Engine
from rehearsal.providers.faults import Faults
from rehearsal.providers.server import EngineServer, WireLog

LEAD_SECONDS = 0.4
"""How far the audio runs ahead of its playing; enough to survive a busy machine."""

_CHUNK_SECONDS = 0.05


class VoiceServer(EngineServer):
    """A provider that speaks.

    Attributes:
        lead_s: How far its audio runs ahead of its playing, seconds.
    """

    def __init__(self, engine: Engine, log: WireLog, faults: Faults | None = None) -> None:
        """Prepare the server; `start` makes it listen."""
        super().__init__(engine, log, faults)
        self.lead_s = LEAD_SECONDS


class Pace:
    """Cuts the audio of one speech into chunks and lets them go one by one."""

    def __init__(self, sample_rate: int, lead_s: float) -> None:
        """Keep audio of `sample_rate` Hz at most `lead_s` ahead of its playing."""
        self._sample_rate = sample_rate
        self._lead_s = lead_s
        self._played_until = 0.0

    async def chunks(self, pcm: bytes) -> AsyncIterator[bytes]:
        """Yield mono PCM16 in chunks of 50 ms, each when it is time to send it."""
        size = 2 * round(_CHUNK_SECONDS * self._sample_rate)
        for at in range(0, len(pcm), size):
            chunk = pcm[at : at + size]
            now = time.monotonic()
            seconds = len(chunk) / 2 / self._sample_rate
            self._played_until = max(now, self._played_until) + seconds
            await asyncio.sleep(self._played_until - now - self._lead_s)
            yield chunk
