"""How many calls one process of our bot holds at once, and what they cost each other.

The bot has a process of its own; callers, providers and Roark live in this one, so that on two
cores the bot has one to itself. Half of the calls come by phone, half by WebRTC; all are up and
talk at the same time. Latency is the time from a caller's last sound to the bot's first.
"""

import asyncio
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.speed import (
    TRANSPORTS,
    Bot,
    Running,
    Speech,
    greeting_of,
    our_bot,
    p95,
    running,
    world,
)

CROWDS = (1, 5, 10, 15, 20)
TURNS = 6
SINGLE_TURNS = 20
STAGGER_SECONDS = 0.3
"""Between two callers who dial: twenty people do not pick up the phone in the same instant."""


@dataclass
class Crowd:
    """What so many calls at once were like.

    Parameters:
        answers: From a caller's last sound to the bot's first, seconds.
        cores: Processor time of the bot per second while all were talking.
        callers_cores: The same of this process; near 1, it is what slows the calls down.
        threads: Of the bot.
    """

    answers: list[float]
    cores: float
    callers_cores: float
    threads: int


async def crowd(host: Running, size: int, speech: Speech, turns: int) -> Crowd:
    """Hold `size` calls at once, of so many turns each."""
    everybody_is_here = asyncio.Barrier(size + 1)
    answers: list[float] = []

    async def call(number: int) -> None:
        await asyncio.sleep(number * STAGGER_SECONDS)
        async with host.caller(TRANSPORTS[number % len(TRANSPORTS)]) as caller:
            await greeting_of(caller)
            await everybody_is_here.wait()
            # Not all in the same breath.
            await asyncio.sleep(number * 2.0 / size)
            for turn in range(turns):
                answers.append(await speech.answer_to(caller, number + turn))
            await everybody_is_here.wait()

    async with asyncio.TaskGroup() as calls:
        for number in range(size):
            calls.create_task(call(number))
        await everybody_is_here.wait()
        began, cpu, own = time.monotonic(), host.cpu_seconds(), time.process_time()
        await everybody_is_here.wait()
        seconds = time.monotonic() - began
        spent, own = host.cpu_seconds() - cpu, time.process_time() - own
        threads = len(os.listdir(f"/proc/{host.process.pid}/task"))
    return Crowd(answers, spent / seconds, own / seconds, threads)


async def measure(sizes: tuple[int, ...] = CROWDS) -> dict[int, Crowd]:
    """Measure crowds of several sizes, one after the other, on one process of the bot."""
    found: dict[int, Crowd] = {}
    with TemporaryDirectory(prefix="crowd-") as folder:
        async with world(Path(folder)) as environment:
            bot: Bot = our_bot(Path(folder))
            speech = await Speech.make()
            async with running(bot, environment) as host:
                # The first call of each kind finds the process cold.
                await crowd(host, len(TRANSPORTS), speech, 1)
                for size in sizes:
                    turns = SINGLE_TURNS if size == 1 else TURNS
                    found[size] = await crowd(host, size, speech, turns)
    return found


def report() -> str:
    """Measure, and return the section for README.md."""
    found = asyncio.run(measure())
    alone = found[min(found)]
    lines = [
        "| calls at once | median is | 95th percentile is | median | 95th percentile "
        "| bot, cores | callers, cores | calls per core |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size, here in found.items():
        median, worst = statistics.median(here.answers), p95(here.answers)
        lines.append(
            f"| {size} | {median / statistics.median(alone.answers):.2f}x "
            f"| {worst / p95(alone.answers):.2f}x | {median * 1000:.0f} ms | {worst * 1000:.0f} ms "
            f"| {here.cores:.2f} | {here.callers_cores:.2f} | {size / here.cores:.0f} |"
        )
    return "\n".join([*lines, "", "Goal: at 20 within 2x of 1."])


if __name__ == "__main__":
    print(report())
