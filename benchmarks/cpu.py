"""What a second of a talking call costs in processor time, beside the peer.

    python -m benchmarks cpu

Both bots hold the same conversation in the same time: a caller says a sentence every TURN_SECONDS,
whenever the answer to the one before it came. The processor time is that of the bot's process with
all its threads; callers and providers have another. The bots take turns, so that whatever else the
machine does falls on both. Ours is measured once more with a change to Pipecat (upstream.py).
"""

import asyncio
import statistics
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import upstream
from benchmarks.speed import (
    OURS,
    SECONDS,
    TRANSPORTS,
    VOICE_HZ,
    Running,
    Speech,
    bots,
    greeting_of,
    running,
    world,
)

TURN_SECONDS = 4.0
TURNS, ROUNDS = 4, 3
GOALS_MS = {"twilio": 75, "webrtc": 120}
CHANGED = f"{OURS}, Pipecat changed"
"""As upstream.py says."""


HOW = (
    f"medians of {ROUNDS} calls by turns, one call at a time, a question every {TURN_SECONDS:g} s, "
    "services that answer at once."
)


@dataclass
class Spent:
    """Processor seconds per second of a call, one figure a round.

    Parameters:
        all: Of the whole process.
        loop: Of the thread in which the event loop runs.
    """

    all: list[float] = field(default_factory=list[float])
    loop: list[float] = field(default_factory=list[float])

    @property
    def in_all(self) -> str:
        """The first for a table: median, least and most."""
        median, least, most = (
            1000 * figure for figure in (statistics.median(self.all), min(self.all), max(self.all))
        )
        return f"{median:.0f} ms ({least:.0f} to {most:.0f})"

    @property
    def of_loop(self) -> str:
        """The second for a table, its median."""
        return f"{1000 * statistics.median(self.loop):.0f} ms"


async def talk(host: Running, transport: str, speech: Speech) -> tuple[float, float]:
    """Hold a call of TURNS turns; return what it cost a second: in all, and of the loop's thread.

    Raises:
        TimeoutError: An answer took longer than a turn.
    """
    clock = asyncio.get_running_loop().time
    async with host.caller(transport) as caller:
        await greeting_of(caller)
        began, cpu, loop = clock(), host.cpu_seconds(), host.loop_seconds()
        for turn in range(TURNS):
            async with asyncio.timeout_at(began + TURN_SECONDS * (turn + 1)):
                sentence = speech.sentences[turn % len(speech.sentences)]
                said = await caller.say(sentence, VOICE_HZ)
                await caller.hear(since=said.end, within=SECONDS)
            await asyncio.sleep(began + TURN_SECONDS * (turn + 1) - clock())
        seconds = clock() - began
        return (host.cpu_seconds() - cpu) / seconds, (host.loop_seconds() - loop) / seconds


async def by_turns(hosts: Mapping[str, Running], speech: Speech) -> dict[tuple[str, str], Spent]:
    """Hold ROUNDS calls over each transport with each; return (transport, name) -> their cost."""
    found: dict[tuple[str, str], Spent] = {}
    for number in range(ROUNDS + 1):
        for transport in TRANSPORTS:
            for name, host in hosts.items():
                if not number:
                    # The first call of each kind finds the process cold.
                    async with host.caller(transport) as caller:
                        await greeting_of(caller)
                    continue
                spent = found.setdefault((transport, name), Spent())
                in_all, loop = await talk(host, transport, speech)
                spent.all.append(in_all)
                spent.loop.append(loop)
    return found


async def measure() -> dict[tuple[str, str], Spent]:
    """Return (transport, bot) -> what its calls cost."""
    with TemporaryDirectory(prefix="cpu-") as name:
        async with AsyncExitStack() as stack:
            environment = await stack.enter_async_context(world(Path(name)))
            speech = await Speech.make()
            both = bots(Path(name), environment)
            changed = environment | {"PIPECAT_SETUP_FILES": str(upstream.__file__)}
            hosts = {
                bot.name: await stack.enter_async_context(running(bot, environment)) for bot in both
            }
            hosts[CHANGED] = await stack.enter_async_context(running(both[0], changed))
            return await by_turns(hosts, speech)


def report() -> str:
    """Measure, and return the section for README.md."""
    lines = [
        "| line | bot | a second of a call takes | of it the event loop's thread | goal |",
        "|---|---|---|---|---|",
    ]
    found = asyncio.run(measure())
    for (transport, bot), spent in found.items():
        goal = f"{GOALS_MS[transport]} ms" if bot == OURS else ""
        lines.append(f"| {transport} | {bot} | {spent.in_all} | {spent.of_loop} | {goal} |")
    return "\n".join(
        [
            *lines,
            "",
            f"Processor time, {HOW}",
        ]
    )


if __name__ == "__main__":
    print(report())
