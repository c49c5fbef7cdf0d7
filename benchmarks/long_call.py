"""A call of hours in seconds: what an observer costs per second of call, and what it holds on to.

A pipeline without services, whose clock and audio run faster than the day: a caller and a bot who
take turns every ten seconds, a tool call every minute. One observer per process, so that memory
and processor time are its own.

    python -m benchmarks.long_call OBSERVER URL SECONDS FRAME_SECONDS [--hangs]

prints JSON. The peers' timeouts are real time; with `--hangs` pipecat-roark's are shortened by as
much as the call is, else nothing would ever time out. Ours are left as they are, which is harder.
"""

import asyncio
import json
import os
import resource
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from loguru import logger
from pipecat.clocks.base_clock import BaseClock
from pipecat.frames.frames import (
    BotStartedSpeakingFrame,
    BotStoppedSpeakingFrame,
    EndWorkerFrame,
    Frame,
    FunctionCallInProgressFrame,
    FunctionCallResultFrame,
    InputAudioRawFrame,
    OutputAudioRawFrame,
    StartFrame,
    TranscriptionFrame,
    TTSTextFrame,
    UserStartedSpeakingFrame,
    UserStoppedSpeakingFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.utils.text.base_text_aggregator import TextType
from pipecat.workers.runner import WorkerRunner
from rehearsal.providers.roark import RoarkReceiver
from roark.client import warm_up

from benchmarks import REPOSITORY
from benchmarks.subjects import NAMES, NULL, OURS, PUBLISHED, TUNER, subject

RATE = 8000
TURN_SECONDS = 10
WORDS_PER_SECOND = 3
CPU_CALL_SECONDS = 1200.0
CPU_ROUNDS = 3
MEMORY_HOURS = 4
SAMPLES_PER_HOUR = 12
CATCH_UP_SECONDS = 0.5


class CallClock(BaseClock):
    """The call's time, which is moved on by whoever sends the audio."""

    def __init__(self) -> None:
        self.now = 0.0

    def get_time(self) -> int:
        """Nanoseconds since the call began."""
        return round(self.now * 1e9)

    def start(self) -> None:
        """Nothing to start."""


@dataclass
class Costs:
    """What a simulated call took.

    Parameters:
        cpu_seconds: Processor time of the whole process between first and last frame.
        wall_seconds: How long that lasted.
        memory: Megabytes of memory in use, at the start and then several times an hour.
        disk: Megabytes in the calls folder at the end.
    """

    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    memory: list[float] = field(default_factory=list[float])
    disk: float = 0.0


class Conversation(FrameProcessor):
    """Sends a whole call into the pipeline, no faster than the sink at its other end takes it."""

    def __init__(self, clock: CallClock, seconds: float, frame_seconds: float) -> None:
        super().__init__()
        self._clock = clock
        self._seconds = seconds
        self._frame_seconds = frame_seconds
        self._sent = 0
        self._taken = 0
        self._sending: asyncio.Task[None] | None = None
        self.costs = Costs()

    def took(self, frame: Frame) -> None:
        """Hear from the other end that an audio frame has come through."""
        self._taken += isinstance(frame, InputAudioRawFrame)

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Begin when the pipeline does."""
        await super().process_frame(frame, direction)
        await self.push_frame(frame, direction)
        if isinstance(frame, StartFrame):
            self._sending = asyncio.create_task(self._send())

    async def _send(self) -> None:
        samples = round(RATE * self._frame_seconds)
        loud = (b"\x00\x10\x00\xf0" * (samples // 2))[: 2 * samples]
        silence = bytes(2 * samples)
        frames = round(self._seconds / self._frame_seconds)
        every = max(1, round(3600 / SAMPLES_PER_HOUR / self._frame_seconds))
        cpu, wall = time.process_time(), time.perf_counter()
        self.costs.memory.append(memory_mb())
        turn = -1
        for number in range(frames):
            self._clock.now = (number + 1) * self._frame_seconds
            if int(self._clock.now / TURN_SECONDS) != turn:
                turn = int(self._clock.now / TURN_SECONDS)
                await self._begin_turn(turn)
            bot_speaks = turn % 2 == 0
            await self.push_frame(InputAudioRawFrame(silence if bot_speaks else loud, RATE, 1))
            if bot_speaks:
                await self.push_frame(OutputAudioRawFrame(loud, RATE, 1))
                if number % max(1, round(1 / WORDS_PER_SECOND / self._frame_seconds)) == 0:
                    await self.push_frame(TTSTextFrame(f"word{number}", TextType.WORD))
            self._sent += 1
            while self._sent - self._taken > 5:
                await asyncio.sleep(0)
            if (number + 1) % every == 0:
                # The disk is no faster than in a real call: let it catch up.
                await asyncio.sleep(CATCH_UP_SECONDS)
                self.costs.memory.append(memory_mb())
        self.costs.cpu_seconds = time.process_time() - cpu
        self.costs.wall_seconds = time.perf_counter() - wall
        await self.push_frame(EndWorkerFrame(), FrameDirection.UPSTREAM)

    async def _begin_turn(self, turn: int) -> None:
        if turn % 2 == 0:
            await self.push_frame(UserStoppedSpeakingFrame())
            await self.push_frame(BotStartedSpeakingFrame())
        else:
            await self.push_frame(BotStoppedSpeakingFrame())
            await self.push_frame(UserStartedSpeakingFrame())
            await self.push_frame(TranscriptionFrame(f"What about {turn}?", "caller", ""))
        if turn % 6 == 0:
            name, arguments = "look_up", {"number": turn}
            await self.push_frame(FunctionCallInProgressFrame(name, f"call{turn}", arguments))
            result = FunctionCallResultFrame(name, f"call{turn}", arguments, {"ok": True})
            await self.push_frame(result)


class Sink(FrameProcessor):
    """The pipeline's other end."""

    def __init__(self, source: Conversation) -> None:
        super().__init__()
        self._source = source

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Report the frame to the source and pass it on."""
        await super().process_frame(frame, direction)
        self._source.took(frame)
        await self.push_frame(frame, direction)


def memory_mb() -> float:
    """Memory in use by this process now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 1e6


async def simulate(name: str, url: str, seconds: float, frame_seconds: float) -> Costs:
    """Run one call with the observer called `name`."""
    clock = CallClock()
    if name == OURS:
        # As a bot is before its first call; pipecat-roark loads its HTTP client when imported.
        warm_up()
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["CALLS_DIR"] = folder
        measured = subject(name, url=url)
        source = Conversation(clock, seconds, frame_seconds)
        worker = PipelineWorker(
            Pipeline([source, *measured.processors, Sink(source)]),
            params=PipelineParams(audio_in_sample_rate=RATE, audio_out_sample_rate=RATE),
            observers=measured.observers,
            clock=clock,
            enable_rtvi=False,
            enable_turn_tracking=False,
            idle_timeout_secs=None,
        )
        runner = WorkerRunner(handle_sigint=False)
        await runner.add_workers(worker)
        await runner.run()
        if name == OURS:
            await measured.observer.aflush(timeout=2.0)
        files = [entry for entry in Path(folder).rglob("*") if entry.is_file()]
        source.costs.disk = sum(entry.stat().st_size for entry in files) / 1e6
        return source.costs


def _shorten_timeouts(by: float) -> None:
    from pipecat_roark import client

    client.DEFAULT_TIMEOUT_SECONDS /= by
    client.DEFAULT_CHUNK_TIMEOUT_SECONDS /= by


async def in_a_process(name: str, url: str, seconds: float, frame: float, *more: str) -> Costs:
    """Run `simulate` in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.long_call", name, url, str(seconds), str(frame), *more),
        cwd=REPOSITORY,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    output, _ = await process.communicate()
    return Costs(**json.loads(output))


async def _cpu() -> str:
    best: dict[str, float] = {}
    async with RoarkReceiver() as roark:
        for _ in range(CPU_ROUNDS):
            for name in NAMES:
                costs = await in_a_process(name, roark.url, CPU_CALL_SECONDS, 0.02)
                per_second = 1000 * costs.cpu_seconds / CPU_CALL_SECONDS
                best[name] = min(best.get(name, per_second), per_second)
    floor = best[NULL]
    own = {name: best[name] - floor for name in NAMES}
    lines = [
        "| | null observer | ours | pipecat-roark 0.2.5 | tuner 0.2.9 |",
        "|---|---|---|---|---|",
        f"| whole process | {' | '.join(f'{best[name]:.2f}' for name in NAMES)} |",
        f"| over the null observer | - | {own[OURS]:.2f} | {own[PUBLISHED]:.2f} "
        f"| {own[TUNER]:.2f} |",
        "",
        "Milliseconds of processor time per second of call (20 ms frames, 8 kHz), recording, "
        "writing and sending included where an observer does that. "
        f"pipecat-roark takes {own[PUBLISHED] / own[OURS]:.1f} times what ours takes.",
    ]
    return "\n".join(lines)


async def _memory() -> str:
    lines = [
        "| | ours | pipecat-roark 0.2.5 |",
        "|---|---|---|",
    ]
    found: dict[str, Costs] = {}
    async with RoarkReceiver() as roark:
        roark.fail(hang=True)
        for name in (OURS, PUBLISHED):
            found[name] = await in_a_process(name, roark.url, 3600 * MEMORY_HOURS, 0.1, "--hangs")
    for hour in range(MEMORY_HOURS + 1):
        cells = (
            f"{found[name].memory[hour * SAMPLES_PER_HOUR] - found[name].memory[0]:+.0f} MB"
            for name in (OURS, PUBLISHED)
        )
        lines.append(f"| after {hour} h | {' | '.join(cells)} |")
    peaks = (
        f"{max(found[name].memory) - found[name].memory[0]:+.0f} MB" for name in (OURS, PUBLISHED)
    )
    lines.append(f"| peak | {' | '.join(peaks)} |")
    lines.append(f"| kept on disk | {found[OURS].disk:.0f} MB | {found[PUBLISHED].disk:.0f} MB |")
    speed = 3600 * MEMORY_HOURS / found[OURS].wall_seconds
    lines += ["", f"A call of {MEMORY_HOURS} h at 8 kHz, at {speed:.0f} times real time."]
    return "\n".join(lines)


def report() -> str:
    """Measure, and return the section for README.md."""
    cpu = asyncio.run(_cpu())
    memory = asyncio.run(_memory())
    return f"{cpu}\n\nMemory while Roark takes requests and never answers:\n\n{memory}"


def main() -> None:
    """Simulate one call, or all of them."""
    if len(sys.argv) == 1:
        print(report())
        return
    name, url, seconds, frame_seconds, *more = sys.argv[1:]
    logger.remove()
    if more and name == PUBLISHED:
        # Measured: the simulation runs at about this multiple of real time.
        _shorten_timeouts(200.0)
    costs = asyncio.run(simulate(name, url, float(seconds), float(frame_seconds)))
    print(json.dumps(asdict(costs)), flush=True)
    threading.excepthook = lambda _: None
    os._exit(0)


if __name__ == "__main__":
    main()
