"""Eight phone calls at once for minutes, while everything around them fails now and then.

    uv run python -m benchmarks soak --minutes 20

Callers dial, ask, hang up or vanish in any moment, and dial again. Meanwhile one provider after the
other fails in some way for some seconds, Roark goes down and comes back, and the bot is killed with
SIGKILL and started again. Every call has a number of its own, that its caller says and the bot has
to say back: one that turns up in another call is cross-talk. At the end all is mended, what is left
is delivered, and every call that was answered has to be at Roark.
"""

import asyncio
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
from rehearsal.callers.twilio import TwilioCaller
from rehearsal.engines.engine import TextDelta, ToolCall
from rehearsal.engines.scripted import Script, ScriptedEngine, ScriptedRecogniser
from rehearsal.providers.all import Providers, serve
from rehearsal.providers.faults import Faults
from rehearsal.providers.roark import RoarkReceiver

from benchmarks.speed import VOICE_HZ, Running, environment_of, our_bot, running

MINUTES = 20.0
CALLERS = 8
KILLS = 2
"""How often the bot is killed, at even distances."""
FAULT_SECONDS, HEALTHY_SECONDS = (2.0, 8.0), (3.0, 10.0)
ROARK_DOWN_SECONDS, ROARK_UP_SECONDS = (5.0, 20.0), (15.0, 40.0)
PATIENCE_SECONDS = 20.0
"""How long a caller waits for the bot to say something."""
SAMPLE_SECONDS = 5.0
SETTLE_SECONDS = 60.0
"""For the last calls' delivery, once all is mended."""
SEED = 14
NUMBER = re.compile(r"\b\d{4}\b")
PROVIDERS = ("deepgram", "openai", "cartesia")
FAULTS: tuple[dict[str, Any], ...] = (
    {"cuts": 2},
    {"stalls": 1},
    {"halves": 2},
    {"garbage": 1},
    {"server_errors": 3},
    {"rate_limited": 3},
    {"hang": True},
    {"hang_handshake": True},
    {"slow_s": 2.0},
)


class Numbered(ScriptedEngine):
    """Hears a number of its own on every connection, and answers with the one it was told."""

    def __init__(self) -> None:
        super().__init__(Script(greeting="Hello there."))
        self._next = 1000

    def listen(self, sample_rate: int) -> ScriptedRecogniser:
        """Return an ear that hears a number nobody else says."""
        self._next += 1
        return ScriptedRecogniser((f"My number is {self._next}.",), sample_rate)

    async def think(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> AsyncIterator[TextDelta | ToolCall]:
        """Say the caller's number back to them."""
        said = [str(message["content"]) for message in messages if message["role"] == "user"]
        numbers = NUMBER.findall(said[-1]) if said else []
        answer = f"I have noted {numbers[-1]} for you." if numbers else "Hello there."
        for word in answer.split():
            yield TextDelta(f"{word} ")


@dataclass
class Holds:
    """What a process of the bot holds at one moment."""

    at: float
    process: int
    memory_mib: float
    descriptors: int
    threads: int

    @classmethod
    def of(cls, running: Running) -> "Holds":
        """Look at a process."""
        pid = running.process.pid
        return cls(
            time.monotonic(),
            pid,
            running.memory(),
            len(os.listdir(f"/proc/{pid}/fd")),
            len(os.listdir(f"/proc/{pid}/task")),
        )


@dataclass
class Soak:
    """What happened.

    Parameters:
        ended: How often calls came to which end, as their callers saw it.
        faults: How often which provider failed.
        greeted: Calls whose caller heard something.
        answered: Answers heard.
        asked: Questions asked.
        records: Calls on disk at the end.
        undelivered: Those of them that Roark does not have whole.
        missing: Calls that were greeted and of which there is no record.
        crossed: Numbers that turned up in two calls, or were said back to another caller.
        holds: Samples of the bot's process.
    """

    ended: Counter[str] = field(default_factory=Counter[str])
    faults: Counter[str] = field(default_factory=Counter[str])
    greeted: int = 0
    answered: int = 0
    asked: int = 0
    kills: int = 0
    roark_downs: int = 0
    records: int = 0
    undelivered: int = 0
    missing: int = 0
    crossed: int = 0
    holds: list[Holds] = field(default_factory=list[Holds])


class Weather:
    """Lets the world fail and mends it, by a seed."""

    def __init__(self, providers: Providers, roark: RoarkReceiver, found: Soak) -> None:
        self._providers = providers
        self._roark = roark
        self._found = found
        self._chance = random.Random(SEED)

    async def of_providers(self) -> None:
        """One provider after the other fails for a while."""
        while True:
            await asyncio.sleep(self._chance.uniform(*HEALTHY_SECONDS))
            name = self._chance.choice(PROVIDERS)
            server = next(s for s in self._providers.servers if s.name == name)
            self._found.faults[name] += 1
            if self._chance.random() < 0.1:
                await server.refuse()
            else:
                vars(server.faults).update(self._chance.choice(FAULTS))
            await asyncio.sleep(self._chance.uniform(*FAULT_SECONDS))
            await self.clear()

    async def clear(self) -> None:
        """Mend all providers."""
        for server in self._providers.servers:
            vars(server.faults).update(vars(Faults()))
            await server.accept()

    async def of_roark(self) -> None:
        """Roark goes down and comes back."""
        while True:
            await asyncio.sleep(self._chance.uniform(*ROARK_UP_SECONDS))
            self._found.roark_downs += 1
            await self._roark.stop()
            try:
                await asyncio.sleep(self._chance.uniform(*ROARK_DOWN_SECONDS))
            finally:
                await self._roark.start()


async def _calls(host: Callable[[], Running | None], found: Soak, speech: bytes, seed: int) -> None:
    """Be one caller who calls again and again, until cancelled."""
    chance = random.Random(seed)
    while True:
        if (bot := host()) is None:
            await asyncio.sleep(0.5)
            continue
        line = TwilioCaller(
            bot.url.replace("http", "ws", 1) + "/ws", from_number=f"+1555{seed:04}{0:03}"
        )
        end = "the bot was not there"
        try:
            await line.dial()
            end = await _talk(line, found, speech, chance)
        except (OSError, aiohttp.ClientError):
            if bot.process.returncode is not None:
                end = "cut by SIGKILL"
            elif line.heard.utterances:
                end = "the bot ended the call"
        finally:
            await (line.vanish() if chance.random() < 0.3 else line.hang_up())
        found.ended[end] += 1


async def _talk(line: TwilioCaller, found: Soak, speech: bytes, chance: random.Random) -> str:
    await line.hear(within=PATIENCE_SECONDS)
    found.greeted += 1
    if chance.random() < 0.15:
        return "hung up into the greeting"
    await line.hear_out(quiet=0.8)
    for _ in range(chance.randrange(1, 5)):
        said = await line.say(speech, VOICE_HZ)
        found.asked += 1
        if chance.random() < 0.15:
            return "hung up without waiting"
        await line.hear(since=said.end, within=PATIENCE_SECONDS)
        found.answered += 1
        if chance.random() < 0.15:
            return "hung up into an answer"
        await line.hear_out(quiet=0.8)
    return "hung up at the end"


async def _look(host: Callable[[], Running | None], found: Soak) -> None:
    while True:
        await asyncio.sleep(SAMPLE_SECONDS)
        if bot := host():
            with suppress(OSError, ValueError):
                found.holds.append(Holds.of(bot))


async def measure(minutes: float = MINUTES) -> Soak:
    """Hold calls for so many minutes, mend everything, and look at what became of them."""
    found = Soak()
    engine = Numbered()
    pieces = [p.pcm async for p in ScriptedEngine().speak("My number is this one.", VOICE_HZ)]
    with TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        async with serve(engine) as providers, RoarkReceiver() as roark:
            environment = environment_of(providers, roark, folder)
            bot = our_bot(folder)
            here: Running | None = None
            weather = Weather(providers, roark, found)
            tasks = [
                asyncio.create_task(weather.of_providers()),
                asyncio.create_task(weather.of_roark()),
                asyncio.create_task(_look(lambda: here, found)),
                *(
                    asyncio.create_task(_calls(lambda: here, found, b"".join(pieces), number))
                    for number in range(CALLERS)
                ),
            ]
            for life in range(KILLS + 1):
                async with running(bot, environment) as process:
                    here = process
                    await asyncio.sleep(60 * minutes / (KILLS + 1))
                    if life < KILLS:
                        found.kills += 1
                        process.process.send_signal(SIGKILL)
                        await process.process.wait()
                    else:
                        for task in tasks:
                            task.cancel()
                        await asyncio.gather(*tasks, return_exceptions=True)
                        await weather.clear()
                        await _settled(folder / "calls", roark)
                        found.holds.append(Holds.of(process))
                here = None
            _judge(found, folder / "calls", roark)
    return found


async def _settled(calls: Path, roark: RoarkReceiver) -> None:
    """Wait until Roark has every call, or SETTLE_SECONDS are over."""
    with suppress(TimeoutError):
        async with asyncio.timeout(SETTLE_SECONDS):
            while any(not _is_whole(record, roark) for record in _records(calls)):
                await asyncio.sleep(0.5)


def _records(calls: Path) -> list[Path]:
    return sorted(path for path in calls.iterdir() if (path / "delivery.jsonl").exists())


def _is_whole(folder: Path, roark: RoarkReceiver) -> bool:
    record = folder / "call.json"
    if not record.exists():
        return False
    call_id = json.loads(record.read_text(encoding="utf-8"))["call_id"]
    return call_id in roark.calls and roark.calls[call_id].whole


def _judge(found: Soak, calls: Path, roark: RoarkReceiver) -> None:
    records = _records(calls)
    found.records = len(records)
    found.missing = max(0, found.greeted - len(records))
    found.undelivered = sum(not _is_whole(record, roark) for record in records)
    said_in: dict[str, set[str]] = {}
    for call in roark.calls.values():
        turns = (call.ended or {}).get("transcript", [])
        told = {
            n for turn in turns if turn["role"] == "user" for n in NUMBER.findall(turn["content"])
        }
        for turn in turns:
            for number in NUMBER.findall(turn["content"]):
                said_in.setdefault(number, set()).add(call.call_id)
                found.crossed += turn["role"] == "assistant" and number not in told
    found.crossed += sum(len(call_ids) > 1 for call_ids in said_in.values())


def report(minutes: float = MINUTES) -> str:
    """Measure, and return the section for README.md."""
    found = asyncio.run(measure(minutes))
    lives = dict.fromkeys(held.process for held in found.holds)
    rows = [
        ("calls answered", f"{found.greeted}"),
        ("how they ended", ", ".join(f"{end} {n}" for end, n in found.ended.most_common())),
        ("questions asked, answered", f"{found.asked}, {found.answered}"),
        ("faults", ", ".join(f"{name} {n}" for name, n in sorted(found.faults.items()))),
        ("Roark down, SIGKILL", f"{found.roark_downs} times, {found.kills} times"),
        ("records on disk", f"{found.records}"),
        ("answered and without a record", f"{found.missing}"),
        ("not whole at Roark", f"{found.undelivered}"),
        ("cross-talk", f"{found.crossed}"),
    ]
    for number, life in enumerate(lives, 1):
        holds = [held for held in found.holds if held.process == life]
        early, late = holds[len(holds) // 3], holds[-1]
        rows.append(
            (
                f"process {number}: memory, descriptors, threads",
                f"{early.memory_mib:.0f} MiB, {early.descriptors}, {early.threads} after a third; "
                f"{late.memory_mib:.0f} MiB, {late.descriptors}, {late.threads} at its end",
            )
        )
    return "\n".join(
        [
            f"| {CALLERS} phone calls at once, {minutes:g} minutes | |",
            "|---|---|",
            *(f"| {what} | {value} |" for what, value in rows),
        ]
    )
