"""How many calls one process of our bot holds at once, what they cost each other, beside the peer.

The bot has a process of its own; callers, providers and Roark live in this one, so that on two
cores the bot has one to itself. Half of the calls come by phone, half by WebRTC; all are up and
talk at the same time. Latency is the time from a caller's last sound to the bot's first. The bot
that `pipecat init` writes shows what of it is Pipecat's: it neither records nor reports.
"""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from host.calls import MAX_CALLS, MAX_PHONE_CALLS

from benchmarks.speed import (
    TRANSPORTS,
    Bot,
    Running,
    Speech,
    bots,
    greeting_of,
    p95,
    running,
    world,
)

CROWDS = (5, 10)
TURNS = 3
ALONE_TURNS = 12
AT_ONCE = {"twilio": MAX_PHONE_CALLS, "webrtc": MAX_CALLS}
"""What one process takes by default."""
STAGGER_SECONDS = 0.3
"""Between two callers who dial: twenty people do not pick up the phone in the same instant."""


@dataclass
class Crowd:
    """What so many calls at once were like.

    Parameters:
        size: How many.
        answers: From a caller's last sound to the bot's first, seconds.
        broken: Calls that came to nothing: no greeting, no answer within a minute, hung up.
        cores: Processor time of the bot per second while all were talking.
        callers_cores: The same of this process.
    """

    size: int
    answers: list[float] = field(default_factory=list[float])
    broken: int = 0
    cores: float = 0.0
    callers_cores: float = 0.0

    @contextmanager
    def counting_broken(self) -> Iterator[None]:
        """Note that a call broke, and go on."""
        try:
            yield
        except OSError:
            # TimeoutError and ConnectionError, which callers raise, are OSErrors.
            self.broken += 1


async def crowd(
    host: Running, speech: Speech, size: int, turns: int, transports: tuple[str, ...] = TRANSPORTS
) -> Crowd:
    """Hold `size` calls at once, of so many turns each."""
    found = Crowd(size)
    all_here, all_done = asyncio.Barrier(size + 1), asyncio.Barrier(size + 1)

    async def call(number: int) -> None:
        await asyncio.sleep(number * STAGGER_SECONDS)
        async with AsyncExitStack() as line:
            caller = None
            with found.counting_broken():
                caller = host.caller(transports[number % len(transports)])
                await line.enter_async_context(caller)
                await greeting_of(caller)
            await all_here.wait()
            # Not all in the same breath.
            await asyncio.sleep(number * 2.0 / size)
            with found.counting_broken():
                for turn in range(turns if caller else 0):
                    found.answers.append(await speech.answer_to(caller, number + turn))
            await all_done.wait()

    async with asyncio.TaskGroup() as calls:
        for number in range(size):
            calls.create_task(call(number))
        await all_here.wait()
        began, cpu, own = time.monotonic(), host.cpu_seconds(), time.process_time()
        await all_done.wait()
        seconds = time.monotonic() - began
        found.cores = (host.cpu_seconds() - cpu) / seconds
        found.callers_cores = (time.process_time() - own) / seconds
    return found


async def _crowds(
    bot: Bot, environment: dict[str, str], speech: Speech, sizes: tuple[int, ...]
) -> list[Crowd]:
    async with running(bot, environment) as host:
        # The first call of each kind finds the process cold.
        await crowd(host, speech, len(TRANSPORTS), 1)
        alone = Crowd(1)
        for transport in TRANSPORTS:
            found = await crowd(host, speech, 1, ALONE_TURNS, (transport,))
            alone.answers += found.answers
            alone.cores += found.cores / len(TRANSPORTS)
            alone.callers_cores += found.callers_cores / len(TRANSPORTS)
        return [alone, *[await crowd(host, speech, size, TURNS) for size in sizes]]


async def _at_the_bound(
    bot: Bot, environment: dict[str, str], speech: Speech
) -> dict[str, tuple[Crowd, Crowd]]:
    async with running(bot, environment) as host:
        await crowd(host, speech, len(TRANSPORTS), 1)
        return {
            transport: (
                await crowd(host, speech, 1, 2 * ALONE_TURNS, (transport,)),
                await crowd(host, speech, AT_ONCE[transport], ALONE_TURNS, (transport,)),
            )
            for transport in TRANSPORTS
        }


@asynccontextmanager
async def _both() -> AsyncIterator[tuple[tuple[Bot, Bot], dict[str, str], Speech]]:
    with TemporaryDirectory(prefix="crowd-") as folder:
        async with world(Path(folder)) as environment:
            # Callers who wait for the others are not to be asked whether they are still there.
            environment |= {"SILENCE_SECONDS": "600"}
            yield bots(Path(folder), environment), environment, await Speech.make()


async def measure(sizes: tuple[int, ...] = CROWDS) -> dict[str, list[Crowd]]:
    """Measure one call alone and crowds of several sizes, on one process of either bot."""
    async with _both() as (both, environment, speech):
        return {bot.name: await _crowds(bot, environment, speech, sizes) for bot in both}


async def measure_bound() -> dict[str, dict[str, tuple[Crowd, Crowd]]]:
    """Measure one call alone and as many as there may be at once, either transport and bot."""
    async with _both() as (both, environment, speech):
        return {bot.name: await _at_the_bound(bot, environment, speech) for bot in both}


def bound_report() -> str:
    """Measure as many calls as one process takes, and return the section for README.md."""
    lines = [
        "| bot | transport | calls | median, 1 call | median, all | p95, 1 call | p95, all "
        "| p95 is | broken | bot, cores |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, kinds in asyncio.run(measure_bound()).items():
        for transport, (alone, full) in kinds.items():
            figures = [
                f"{1000 * figure(each.answers):.0f} ms"
                for figure in (statistics.median, p95)
                for each in (alone, full)
            ]
            lines.append(
                f"| {name} | {transport} | {full.size} | {' | '.join(figures)} "
                f"| {p95(full.answers) / p95(alone.answers):.2f}x | {full.broken} "
                f"| {full.cores:.2f} |"
            )
    return "\n".join(
        [
            *lines,
            "",
            f"Calls: what `MAX_CALLS` is by default on this machine. {2 * ALONE_TURNS} answers to "
            f"one caller, {ALONE_TURNS} to each of several. Goal: p95 at most 1.5x.",
        ]
    )


def report() -> str:
    """Measure, and return the section for README.md."""
    lines = [
        "| bot | calls at once | median is | 95th percentile is | median | 95th percentile "
        "| broken | bot, cores | callers, cores | calls per core |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in asyncio.run(measure()).items():
        alone = found[0].answers
        for here in found:
            median, worst = statistics.median(here.answers), p95(here.answers)
            lines.append(
                f"| {name} | {here.size} | {median / statistics.median(alone):.2f}x "
                f"| {worst / p95(alone):.2f}x | {median * 1000:.0f} ms | {worst * 1000:.0f} ms "
                f"| {here.broken} | {here.cores:.2f} | {here.callers_cores:.2f} "
                f"| {here.size / here.cores:.1f} |"
            )
    return "\n".join([*lines, "", "Ratios are to one call alone. Goal: at 5 within 1.2x of 1."])


if __name__ == "__main__":
    print(report())
