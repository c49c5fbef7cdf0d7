"""How long the event loop stands still while a call begins: a process's first call, each time.

A pipeline without services starts with one observer attached. A task that wants to run every
millisecond notes when it could not; the longest such time between the moment before the observer
is made and two seconds later is the stall that every other call of the process would have heard.

    python -m benchmarks.stall OBSERVER URL

prints it, in ms.
"""

import asyncio
import importlib
import os
import statistics
import sys
import time
from tempfile import TemporaryDirectory

# What a bot has imported by the time of its first call.
import aiohttp  # noqa: F401
import httpx  # noqa: F401
from loguru import logger
from pipecat.frames.frames import InputAudioRawFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.filters.identity_filter import IdentityFilter
from pipecat.workers.runner import WorkerRunner
from rehearsal.providers.roark import RoarkReceiver
from roark import client

from benchmarks import REPOSITORY
from benchmarks.subjects import MODULES, NAMES, subject

PROCESSES = 7
CALL_SECONDS = 2.0


class Heartbeat:
    """Wants to run every millisecond and keeps the longest time it had to wait, in seconds."""

    def __init__(self) -> None:
        self.longest = 0.0

    async def beat(self) -> None:
        """Run until cancelled."""
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            self.longest = max(self.longest, now - last - 0.001)
            last = now


async def one_call(name: str, url: str) -> float:
    """Return the longest stall of one call's beginning, in seconds."""
    heart = Heartbeat()
    beating = asyncio.create_task(heart.beat())
    await asyncio.sleep(0.1)
    heart.longest = 0.0
    measured = subject(name, url=url)
    worker = PipelineWorker(
        Pipeline([IdentityFilter(), *measured.processors]),
        params=PipelineParams(audio_in_sample_rate=8000, audio_out_sample_rate=8000),
        observers=measured.observers,
        enable_rtvi=False,
    )
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    running = asyncio.create_task(runner.run())
    ends = time.perf_counter() + CALL_SECONDS
    while time.perf_counter() < ends:
        await worker.queue_frame(InputAudioRawFrame(bytes(320), 8000, 1))
        await asyncio.sleep(0.02)
    longest = heart.longest
    beating.cancel()
    await runner.cancel("measured")
    await running
    return longest


async def _in_processes() -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    async with RoarkReceiver() as roark:
        for _ in range(PROCESSES):
            for name in NAMES:
                with TemporaryDirectory() as folder:
                    process = await asyncio.create_subprocess_exec(
                        *(sys.executable, "-m", "benchmarks.stall", name, roark.url),
                        cwd=REPOSITORY,
                        env={**os.environ, "CALLS_DIR": folder},
                        stdout=asyncio.subprocess.PIPE,
                        stderr=asyncio.subprocess.DEVNULL,
                    )
                    output, _ = await asyncio.wait_for(process.communicate(), 60.0)
                    found[name].append(float(output))
    return found


def report() -> str:
    """Measure, and return the section for README.md."""
    found = asyncio.run(_in_processes())
    lines = [
        "| longest stall, ms | null observer | ours | pipecat-roark 0.2.5 | tuner 0.2.9 |",
        "|---|---|---|---|---|",
    ]
    for what, of in (("median", statistics.median), ("least", min), ("most", max)):
        lines.append(f"| {what} | {' | '.join(f'{of(found[name]):.0f}' for name in NAMES)} |")
    lines += [
        "",
        f"Of {PROCESSES} processes each. pipecat-roark builds an HTTP client with its TLS context; "
        "its second one, at the first chunk, is not in this.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure one call, or all."""
    if len(sys.argv) == 1:
        print(report())
        return
    logger.remove()
    # As our bot does before its first call; the modules are there for all four then.
    client.warm_up()
    if sys.argv[1] in MODULES:
        getattr(importlib.import_module(MODULES[sys.argv[1]]), "RoarkObserver", None)
    print(1000 * asyncio.run(one_call(sys.argv[1], sys.argv[2])))


if __name__ == "__main__":
    main()
