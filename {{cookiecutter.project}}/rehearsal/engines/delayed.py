"""An engine that takes its time, as the services in the cloud do.

An engine on this machine answers at once, or as fast as its processor. What a caller waits for in
a real call is mostly the services: their times are drawn anew for every request, around a median.
"""

import asyncio
import math
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, fields
from typing import Any, Self

from rehearsal.engines.engine import Engine, Heard, Recogniser, Speech, TextDelta, ToolCall

SPREAD = 0.25
"""Of the logarithm of a latency: two of three requests take 0.78 to 1.28 of the median."""


@dataclass(frozen=True, slots=True)
class Latencies:
    """How long the services take; medians in seconds.

    Attributes:
        llm: From the request to the first token.
        tts: From the text to the first byte of its sound.
        stt: From `Finalize` to the final transcript.
    """

    llm: float = 0.0
    tts: float = 0.0
    stt: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `llm=450,tts=150,stt=100`, in milliseconds.

        Raises:
            ValueError: It is nothing of the kind; the text says what it has to be.
        """
        known = {field.name for field in fields(cls)}
        values: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.partition("=")
            if name.strip() not in known or not value.strip().isdecimal():
                raise ValueError(
                    f"latencies are milliseconds, such as llm=450,tts=150,stt=100, not {text!r}"
                )
            values[name.strip()] = int(value) / 1000
        return cls(**values)


class DelayedEngine:
    """Another engine, later."""

    def __init__(self, engine: Engine, latencies: Latencies, *, seed: int = 0) -> None:
        """Let `engine` wait for as long as `latencies` say.

        The same `seed` gives the same, of each of the three, whatever is asked of the others.
        """
        self.name = engine.name
        self._engine = engine
        self._latencies = latencies
        self._chances = {name: random.Random(f"{seed} {name}") for name in ("llm", "tts", "stt")}

    def listen(self, sample_rate: int) -> "DelayedRecogniser":
        """Return a recogniser whose final words come late."""
        return DelayedRecogniser(self._engine.listen(sample_rate), self)

    async def think(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> AsyncIterator[TextDelta | ToolCall]:
        """Answer after a while, and then at once."""
        await self._wait("llm")
        async for piece in self._engine.think(messages, tools):
            yield piece

    async def speak(self, text: str, sample_rate: int) -> AsyncIterator[Speech]:
        """Say `text` after a while."""
        await self._wait("tts")
        async for piece in self._engine.speak(text, sample_rate):
            yield piece

    async def aclose(self) -> None:
        """Give back what the engine holds."""
        await self._engine.aclose()

    async def confirm(self) -> None:
        """Take the time of a recogniser that was told to say what it has."""
        await self._wait("stt")

    async def _wait(self, name: str) -> None:
        if median := getattr(self._latencies, name):
            await asyncio.sleep(median * math.exp(self._chances[name].gauss(0.0, SPREAD)))


class DelayedRecogniser:
    """Another recogniser, whose final words come late."""

    def __init__(self, recogniser: Recogniser, engine: DelayedEngine) -> None:
        self._recogniser = recogniser
        self._engine = engine

    async def feed(self, pcm: bytes) -> list[Heard]:
        """Listen on."""
        return await self._recogniser.feed(pcm)

    async def finalize(self) -> list[Heard]:
        """Say after a while what was heard."""
        await self._engine.confirm()
        return await self._recogniser.finalize()
