"""Eight phone calls at once for minutes, while everything around them fails now and then.

    uv run python -m benchmarks soak --minutes 20

The bot is served as DEPLOY.md says: so many processes as hold eight calls within their `MAX_CALLS`,
with one `calls/`, each caller put through to the one with the fewest calls. Callers dial, ask, hang
up or vanish in any moment, and dial again. Meanwhile one provider after the other fails in some way
for some seconds, Roark goes down and comes back, and processes are killed with SIGKILL and started
again, all but one, which lives from the first minute to the last. Every call has a number of its
own, that its caller says and the bot has to say back: one that turns up in another call is
cross-talk. At the end all is mended, what is left is delivered, and every call that was answered
has to be at Roark.
"""

import asyncio
import json
import os
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
from host.calls import MAX_PHONE_CALLS
from rehearsal.callers.twilio import TwilioCaller
from rehearsal.engines.engine import TextDelta, ToolCall
from rehearsal.engines.scripted import Script, ScriptedEngine, ScriptedRecogniser
from rehearsal.providers.all import Providers, serve
from rehearsal.providers.faults import Faults
from rehearsal.providers.roark import RoarkReceiver

from benchmarks.speed import VOICE_HZ, Bot, Running, environment_of, our_bot, running

MINUTES = 20.0
CALLERS = 8
PROCESSES = -(-CALLERS // MAX_PHONE_CALLS)
"""As many as have lines for them all. One process with all eight would be far over its bound."""
FAULT_SECONDS, HEALTHY_SECONDS = (2.0, 8.0), (3.0, 10.0)
ROARK_DOWN_SECONDS, ROARK_UP_SECONDS = (5.0, 20.0), (15.0, 40.0)
PATIENCE_SECONDS = 20.0
"""How long a caller waits for the bot to say something."""
BUSY = "found every line busy"
REDIAL_SECONDS = (0.5, 2.0)
"""After the busy tone."""
SAMPLE_SECONDS = 5.0
POINTS = 5
"""Of a process's life so many parts are shown, each by its median."""
SETTLE_SECONDS = 60.0
"""For the last calls' delivery, once all is mended."""
REST_SECONDS = 3.0
"""After that, until a process is looked at that holds no call."""
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

    minute: float
    memory_mib: float
    descriptors: int
    threads: int


@dataclass
class Life:
    """One process of the bot, from its start to its end.

    Parameters:
        running: The process.
        lines: How many calls it has, as the proxy counts them.
        calls: How many it has taken.
        holds: What it held, every SAMPLE_SECONDS.
        at_rest: What it held when all calls were over.
        cpu_seconds: The processor time it took.
    """

    running: Running
    lines: int = 0
    calls: int = 0
    holds: list[Holds] = field(default_factory=list[Holds])
    at_rest: Holds | None = None
    cpu_seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)

    @property
    def is_up(self) -> bool:
        """Whether the process is there."""
        return self.running.process.returncode is None

    def look(self) -> Holds:
        """What the process holds now."""
        pid = self.running.process.pid
        self.cpu_seconds = self.running.cpu_seconds()
        return Holds(
            (time.monotonic() - self.began) / 60,
            self.running.memory(),
            len(os.listdir(f"/proc/{pid}/fd")),
            len(os.listdir(f"/proc/{pid}/task")),
        )


@dataclass
class Soak:
    """What happened.

    Parameters:
        ended: How often calls came to which end, as their callers saw it.
        faults: How often which provider failed.
        greeted: The ids of the calls whose caller heard something.
        answered: Answers heard.
        asked: Questions asked.
        at_once: How many calls there were, every SAMPLE_SECONDS.
        kills: How often a process was killed.
        roark_downs: How often Roark was down.
        records: Calls on disk at the end.
        undelivered: Of these, not whole at Roark.
        missing: Calls that were greeted and have no record.
        crossed: Numbers in a call that is not theirs.
        lives: Every process there was.
        seconds: How long calls were held.
    """

    ended: Counter[str] = field(default_factory=Counter[str])
    faults: Counter[str] = field(default_factory=Counter[str])
    greeted: set[str] = field(default_factory=set[str])
    answered: int = 0
    asked: int = 0
    at_once: list[int] = field(default_factory=list[int])
    kills: int = 0
    roark_downs: int = 0
    records: int = 0
    undelivered: int = 0
    missing: int = 0
    crossed: int = 0
    lives: list[Life] = field(default_factory=list[Life])
    seconds: float = 0.0

    def least_busy(self) -> Life | None:
        """The process with the fewest calls, as Caddy's `least_conn` chooses."""
        return min((life for life in self.lives if life.is_up), key=_lines, default=None)


def _lines(life: Life) -> int:
    return life.lines


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


async def _calls(found: Soak, speech: bytes, number: int) -> None:
    """Be one caller who calls again and again, until cancelled."""
    chance = random.Random(number)
    while True:
        life = found.least_busy()
        if life is None:
            await asyncio.sleep(0.5)
            continue
        line = TwilioCaller(
            life.running.url.replace("http", "ws", 1) + "/ws", from_number=f"+1555{number:07}"
        )
        life.lines += 1
        end = "the bot was not there"
        try:
            if await _is_busy(life, line):
                end = BUSY
            else:
                await line.dial()
                life.calls += 1
                end = await _talk(line, found, speech, chance)
        except (OSError, aiohttp.ClientError):
            if not life.is_up:
                end = "cut by SIGKILL"
            elif line.heard.utterances:
                end = "the bot ended the call"
        finally:
            await (line.vanish() if chance.random() < 0.3 else line.hang_up())
            life.lines -= 1
        found.ended[end] += 1
        if end == BUSY:
            await asyncio.sleep(chance.uniform(*REDIAL_SECONDS))


async def _is_busy(life: Life, line: TwilioCaller) -> bool:
    """Ask for the call's TwiML, as Twilio does."""
    form = {"CallSid": line.call_sid, "From": line.from_number, "To": line.to_number}
    async with aiohttp.ClientSession() as twilio, twilio.post(life.running.url, data=form) as asked:
        return "<Reject" in await asked.text()


async def _talk(line: TwilioCaller, found: Soak, speech: bytes, chance: random.Random) -> str:
    await line.hear(within=PATIENCE_SECONDS)
    found.greeted.add(line.call_sid)
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


async def _look(found: Soak) -> None:
    while True:
        await asyncio.sleep(SAMPLE_SECONDS)
        found.at_once.append(sum(life.lines for life in found.lives))
        for life in found.lives:
            with suppress(OSError, ValueError):
                life.holds.append(life.look())


async def _keep_up(
    bot: Bot,
    environment: dict[str, str],
    found: Soak,
    killed_after: float | None,
    over: asyncio.Event,
) -> None:
    """Run one process of the bot until all is over, killed and started again in the middle."""
    while not over.is_set():
        async with running(bot, environment, "-t", "twilio", "-x", "voice.example.org") as process:
            life = Life(process)
            found.lives.append(life)
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), killed_after)
            if over.is_set():
                return
            found.kills += 1
            killed_after = None
            process.process.send_signal(SIGKILL)
            await process.process.wait()


async def measure(minutes: float = MINUTES) -> Soak:
    """Hold calls for so many minutes, mend everything, and look at what became of them."""
    found = Soak()
    engine = Numbered()
    pieces = [p.pcm async for p in ScriptedEngine().speak("My number is this one.", VOICE_HZ)]
    with TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        async with serve(engine) as providers, RoarkReceiver() as roark:
            environment = environment_of(providers, roark, folder)
            del environment["MAX_CALLS"]
            # As DEPLOY.md's unit has it.
            environment["MALLOC_ARENA_MAX"] = "2"
            bot, over = our_bot(folder), asyncio.Event()
            weather = Weather(providers, roark, found)
            async with asyncio.TaskGroup() as group:
                for number in range(PROCESSES):
                    # All but the last, one after the other.
                    kill_at = 60 * minutes * (number + 1) / PROCESSES
                    is_last = number == PROCESSES - 1
                    group.create_task(
                        _keep_up(bot, environment, found, None if is_last else kill_at, over)
                    )
                while len(found.lives) < PROCESSES:
                    await asyncio.sleep(0.1)
                began = time.monotonic()
                tasks = [
                    asyncio.create_task(weather.of_providers()),
                    asyncio.create_task(weather.of_roark()),
                    asyncio.create_task(_look(found)),
                    *(
                        asyncio.create_task(_calls(found, b"".join(pieces), number))
                        for number in range(CALLERS)
                    ),
                ]
                await asyncio.sleep(60 * minutes)
                found.seconds = time.monotonic() - began
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await weather.clear()
                await _settled(folder / "calls", roark)
                await asyncio.sleep(REST_SECONDS)
                for life in found.lives:
                    if life.is_up:
                        life.at_rest = life.look()
                over.set()
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


def _record(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "call.json").read_text(encoding="utf-8"))
    except OSError:
        return {}


def _is_whole(folder: Path, roark: RoarkReceiver) -> bool:
    call_id = _record(folder).get("call_id")
    return call_id in roark.calls and roark.calls[call_id].whole


def _judge(found: Soak, calls: Path, roark: RoarkReceiver) -> None:
    records = _records(calls)
    found.records = len(records)
    kept = {_record(record).get("phone", {}).get("call_id") for record in records}
    found.missing = len(found.greeted - kept)
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
    return table(asyncio.run(measure(minutes)), minutes)


def table(found: Soak, minutes: float) -> str:
    """Return what `measure` found as a table."""
    cores = sum(life.cpu_seconds for life in found.lives) / found.seconds
    rows = [
        ("calls answered", f"{len(found.greeted)}"),
        ("how they ended", ", ".join(f"{end} {n}" for end, n in found.ended.most_common())),
        ("questions asked, answered", f"{found.asked}, {found.answered}"),
        ("calls at once, on average", f"{statistics.mean(found.at_once):.1f}"),
        ("faults", ", ".join(f"{name} {n}" for name, n in sorted(found.faults.items()))),
        ("Roark down, SIGKILL", f"{found.roark_downs} times, {found.kills} times"),
        ("records on disk", f"{found.records}"),
        ("answered and without a record", f"{found.missing}"),
        ("not whole at Roark", f"{found.undelivered}"),
        ("cross-talk", f"{found.crossed}"),
        ("processor of the bots", f"{cores:.2f} cores"),
    ]
    return "\n".join(
        [
            f"| {CALLERS} phone calls at once, {PROCESSES} processes, {minutes:g} minutes | |",
            "|---|---|",
            *(f"| {what} | {value} |" for what, value in rows),
            "",
            "| process | memory, MiB | descriptors | threads | at rest |",
            "|---|---|---|---|---|",
            *(_row(life) for life in found.lives),
            "",
            f"Medians of {POINTS} equal parts of each process's life; a SIGKILL ended those that "
            "were never at rest. At rest: when all calls were over and delivered.",
        ]
    )


def _row(life: Life) -> str:
    count = len(life.holds)
    parts = [
        life.holds[count * part // POINTS : count * (part + 1) // POINTS] for part in range(POINTS)
    ]

    def medians(name: str) -> str:
        return ", ".join(
            f"{statistics.median(getattr(held, name) for held in part):.0f}"
            for part in parts
            if part
        )

    minutes = life.holds[-1].minute if life.holds else 0.0
    rest = life.at_rest
    cells = [
        f"{minutes:.1f} minutes, {life.calls} calls",
        medians("memory_mib"),
        medians("descriptors"),
        medians("threads"),
        f"{rest.memory_mib:.0f} MiB, {rest.descriptors}, {rest.threads}" if rest else "killed",
    ]
    return f"| {' | '.join(cells)} |"
