"""Where the time of a turn goes: the same moments in our bot and in the one of `pipecat init`.

Both bots' processes note what they do (turn_probe.py), the providers when they are asked and when
they answer, and the caller when it falls silent and hears something. All is on one clock.
"""

import asyncio
import json
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rehearsal.engines.delayed import DelayedEngine, Latencies
from rehearsal.engines.engine import Engine, Heard, Recogniser, Speech, TextDelta, ToolCall
from rehearsal.engines.scripted import ScriptedEngine
from rehearsal.providers.all import serve
from rehearsal.providers.roark import RoarkReceiver

from benchmarks import turn_probe
from benchmarks.speed import (
    OURS,
    REALISTIC,
    SCAFFOLD,
    SCRIPT,
    SECONDS,
    TRANSPORTS,
    VOICE_HZ,
    Bot,
    Running,
    bots,
    environment_of,
    greeting_of,
    running,
)
from benchmarks.speed import Speech as Sentences

TURNS = 5
# Before the caller's last sound nothing of its answer happens, but for clocks that are not exact.
EARLY_SECONDS = 0.1
SERVICES = {"at once": Latencies(), "realistic": REALISTIC}

MOMENTS = {
    turn_probe.TAKEN: "the caller's last sound is taken in by the bot",
    "whole": "the interim transcript is whole",
    turn_probe.ASKED: "Smart Turn is asked",
    "llm asked": "the LLM is asked",
    turn_probe.JUDGED: "Smart Turn's verdict",
    "finalize": "the detector calls it a pause: `Finalize` at the recogniser",
    "final": "the final transcript",
    "llm": "the LLM's first token",
    "tts asked": "the voice is asked",
    "tts": "the voice's first byte",
    turn_probe.WRITTEN: "the first sound is written to the transport",
    "heard": "it arrives at the caller",
}
"""What is noted -> how the table calls it."""

Moments = list[tuple[str, float]]


class WatchedEngine:
    """Another engine, that notes when it is asked and when it answers."""

    def __init__(self, engine: Engine) -> None:
        self.name = engine.name
        self.engine = engine
        self.moments: Moments = []

    def note(self, name: str) -> None:
        """Something happens now."""
        self.moments.append((name, time.monotonic()))

    def listen(self, sample_rate: int) -> "WatchedRecogniser":
        """Return a recogniser that notes what it is told and what it says."""
        return WatchedRecogniser(self.engine.listen(sample_rate), self)

    async def think(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> AsyncIterator[TextDelta | ToolCall]:
        """Answer."""
        self.note("llm asked")
        async for piece in self.engine.think(messages, tools):
            self.note("llm")
            yield piece

    async def speak(self, text: str, sample_rate: int) -> AsyncIterator[Speech]:
        """Say `text`."""
        self.note("tts asked")
        async for piece in self.engine.speak(text, sample_rate):
            self.note("tts")
            yield piece

    async def aclose(self) -> None:
        """Give back what the engine holds."""
        await self.engine.aclose()


class WatchedRecogniser:
    """Another recogniser, that notes what it is told and what it says."""

    def __init__(self, recogniser: Recogniser, engine: WatchedEngine) -> None:
        self._recogniser = recogniser
        self._engine = engine

    async def feed(self, pcm: bytes) -> list[Heard]:
        """Listen on."""
        heard = await self._recogniser.feed(pcm)
        if any(not part.is_final and part.text in SCRIPT.hears for part in heard):
            self._engine.note("whole")
        return heard

    async def finalize(self) -> list[Heard]:
        """Say what was heard."""
        self._engine.note("finalize")
        heard = await self._recogniser.finalize()
        if heard:
            self._engine.note("final")
        return heard


async def turns(
    host: Running, notes: Path, engine: WatchedEngine, transport: str, sentences: Sentences
) -> dict[str, list[float]]:
    """Hold a call; return for each of MOMENTS how long after the caller's last sound it came."""
    found: dict[str, list[float]] = defaultdict(list)
    async with host.caller(transport) as caller:
        await greeting_of(caller)
        for number in range(TURNS):
            engine.moments.clear()
            notes.write_text("", encoding="utf-8")
            sentence = sentences.sentences[number % len(sentences.sentences)]
            said = await caller.say(sentence, VOICE_HZ)
            answer = await caller.hear(since=said.end, within=SECONDS)
            await caller.hear_out(quiet=0.6, within=SECONDS)
            noted: Moments = [json.loads(line) for line in notes.read_text().splitlines()]
            seen: set[str] = set()
            for name, at in sorted([*noted, *engine.moments], key=lambda moment: moment[1]):
                if name not in seen and at >= said.end - EARLY_SECONDS:
                    seen.add(name)
                    found[name].append(at - said.end)
            found["heard"].append(answer.start - said.end)
    return found


async def measure() -> dict[tuple[str, str, str], dict[str, list[float]]]:
    """Return (bot, transport, services) -> moment -> seconds after the caller's last sound."""
    found: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    sentences = await Sentences.make()
    with TemporaryDirectory(prefix="turn-") as name:
        folder = Path(name)
        for services, latencies in SERVICES.items():
            engine = WatchedEngine(DelayedEngine(ScriptedEngine(SCRIPT), latencies))
            async with serve(engine) as providers, RoarkReceiver() as roark:
                environment = environment_of(providers, roark, folder)
                for bot in bots(folder / services.replace(" ", "-"), environment):
                    async with AsyncExitStack() as stack:
                        host, notes = await _started(bot, environment, stack)
                        for transport in TRANSPORTS:
                            # The first call of each kind finds the process cold.
                            async with host.caller(transport) as caller:
                                await greeting_of(caller)
                            found[bot.name, transport, services] = await turns(
                                host, notes, engine, transport, sentences
                            )
    return found


async def _started(
    bot: Bot, environment: dict[str, str], stack: AsyncExitStack
) -> tuple[Running, Path]:
    notes = bot.folder.parent / f"{bot.folder.name}-notes.jsonl"
    probe = {"PIPECAT_SETUP_FILES": str(turn_probe.__file__), "TURN_PROBE": str(notes)}
    return await stack.enter_async_context(running(bot, environment | probe)), notes


def report() -> str:
    """Measure, and return the section for README.md."""
    found = asyncio.run(measure())
    lines = list[str]()
    for services in SERVICES:
        columns = [(bot, transport) for transport in TRANSPORTS for bot in (OURS, SCAFFOLD)]
        heads = [f"{transport}, {bot}" for bot, transport in columns]
        lines += [f"| services {services} | " + " | ".join(heads) + " |"]
        lines += ["|---|" + "---|" * len(heads)]
        for name, what in MOMENTS.items():
            cells = list[str]()
            for bot, transport in columns:
                seconds = found[bot, transport, services].get(name)
                cells.append(f"{statistics.median(seconds) * 1000:.0f} ms" if seconds else "")
            lines.append(f"| {what} | " + " | ".join(cells) + " |")
        lines.append("")
    lines.append(f"Medians of {TURNS} turns, after the caller's last sound; one call at a time.")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
