"""What a second of a talking call costs in processor time, beside the peer.

    python -m benchmarks cpu

Both bots hold the same conversation in the same time: a caller says a sentence every TURN_SECONDS,
whenever the answer to the one before it came. The processor time is that of the bot's process with
all its threads; callers and providers have another. The bots take turns, so that whatever else the
machine does falls on both. Ours is measured once more with a change to Pipecat (upstream.py).
"""

import asyncio
import statistics
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


@dataclass
class Spent:
    """Processor seconds per second of a call, one figure a round.

    Parameters:
        all: Of the whole process.
        loop: Of the thread in which the event loop runs.
    """

    all: list[float] = field(default_factory=list[float])
    loop: list[float] = field(default_factory=list[float])


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


async def measure() -> dict[tuple[str, str], Spent]:
    """Return (bot, transport) -> what its calls cost."""
    found: dict[tuple[str, str], Spent] = {}
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
            for number in range(ROUNDS + 1):
                for transport in TRANSPORTS:
                    for bot, host in hosts.items():
                        if not number:
                            # The first call of each kind finds the process cold.
                            async with host.caller(transport) as caller:
                                await greeting_of(caller)
                            continue
                        spent = found.setdefault((bot, transport), Spent())
                        in_all, loop = await talk(host, transport, speech)
                        spent.all.append(in_all)
                        spent.loop.append(loop)
    return found


def report() -> str:
    """Measure, and return the section for README.md."""
    lines = [
        "| line | bot | a second of a call takes | of it the event loop's thread | goal |",
        "|---|---|---|---|---|",
    ]
    found = asyncio.run(measure())
    for (bot, transport), spent in sorted(found.items(), key=lambda item: item[0][1]):
        in_all, loop = (1000 * statistics.median(each) for each in (spent.all, spent.loop))
        goal = f"{GOALS_MS[transport]} ms" if bot == OURS else ""
        spread = f"{1000 * min(spent.all):.0f} to {1000 * max(spent.all):.0f}"
        lines.append(
            f"| {transport} | {bot} | {in_all:.0f} ms ({spread}) | {loop:.0f} ms | {goal} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"Processor time, medians of {ROUNDS} calls by turns, one call at a time, a question "
            f"every {TURN_SECONDS:g} s, services that answer at once.",
        ]
    )


if __name__ == "__main__":
    print(report())
