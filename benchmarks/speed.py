"""How fast our bot is beside the one that `pipecat init` writes, on the same scripted providers.

What is timed is what the two bots' authors decide: the services answer at once, so the time from
the caller's last sound to the bot's first is the pipeline's, with its voice activity and turn
detection; and once more with services that take as long as in the cloud (REALISTIC). Both bots run
in this environment, each in a process of its own; turns alternate between them, so that whatever
else the machine does falls on both. Ours records and reports every call to a Roark on this machine;
the scaffold's reports nothing.
"""

import asyncio
import os
import shutil
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
from aiortc import MediaStreamTrack
from aiortc.rtp import RtpPacket
from av import AudioFrame
from rehearsal.callers.caller import Caller
from rehearsal.callers.twilio import TwilioCaller
from rehearsal.callers.webrtc import WebRTCCaller
from rehearsal.engines.delayed import DelayedEngine, Latencies
from rehearsal.engines.engine import Engine
from rehearsal.engines.scripted import Answer, Script, ScriptedEngine
from rehearsal.providers.all import Providers, serve
from rehearsal.providers.roark import RoarkReceiver
from rehearsal.providers.server import free_port

from benchmarks import PROJECT, REPOSITORY
from benchmarks.scaffold import generate

OURS, SCAFFOLD = "ours", "pipecat init 1.14.0"
TRANSPORTS = ("twilio", "webrtc")

CALLS, TURNS = 3, 8
"""Per bot and transport: so many calls of so many turns."""
IMPORTS, STARTS = 7, 8
MEMORY_CALLS, AT_ONCE = 50, 5

SECONDS = 60.0
"""What anything may take on a busy machine before it counts as broken."""
QUIET_SECONDS = 0.6
VOICE_HZ = 16000
REALISTIC = Latencies(llm=0.45, tts=0.15, stt=0.1)
QUESTIONS = ("Can you hear me?", "What time is it?", "Are you open today?")
SCRIPT = Script(greeting="Hello there.", hears=QUESTIONS, answers=(Answer(says="Yes, of course."),))


@dataclass(frozen=True)
class Bot:
    """One of the two, and how to start it.

    Parameters:
        name: For the tables.
        folder: With its bot.py, as its image would hold it.
        launcher: What runs it under Pipecat's runner, on the providers of the environment.
        image: What runs it under the base image's contract.
        python: The interpreter.
    """

    name: str
    folder: Path
    launcher: tuple[str, ...]
    image: tuple[str, ...]
    python: str = sys.executable


@dataclass
class Times:
    """What was measured of one bot; seconds and MiB.

    Parameters:
        answers: Transport -> from the caller's last sound to the bot's first.
        realistic: The same, with services that take their time.
        greetings: Transport -> from dialling to the bot's first sound.
        after_open: The same, from the open line.
        imports: `import bot` in a fresh process.
        ready: From the start of the process until `/readyz` says yes.
        first_greetings: The greeting of the first phone call after that.
        memory: Resident, after AT_ONCE calls and after MEMORY_CALLS more.
    """

    answers: dict[str, list[float]] = field(
        default_factory=lambda: {transport: [] for transport in TRANSPORTS}
    )
    realistic: dict[str, list[float]] = field(
        default_factory=lambda: {transport: [] for transport in TRANSPORTS}
    )
    greetings: dict[str, list[float]] = field(
        default_factory=lambda: {transport: [] for transport in TRANSPORTS}
    )
    after_open: dict[str, list[float]] = field(
        default_factory=lambda: {transport: [] for transport in TRANSPORTS}
    )
    imports: list[float] = field(default_factory=list[float])
    ready: list[float] = field(default_factory=list[float])
    first_greetings: list[float] = field(default_factory=list[float])
    memory: tuple[float, float] = (0.0, 0.0)


@dataclass
class Running:
    """A bot's process."""

    process: asyncio.subprocess.Process
    url: str

    def memory(self) -> float:
        """Resident memory now, MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) / 1024

    def cpu_seconds(self) -> float:
        """Processor time spent so far, all threads."""
        return _cpu_seconds(Path(f"/proc/{self.process.pid}/stat"))

    def loop_seconds(self) -> float:
        """Processor time spent so far by the first thread, in which the event loop runs."""
        return _cpu_seconds(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/stat"))

    def caller(self, transport: str) -> Caller:
        """Return a caller, not yet connected."""
        if transport == "twilio":
            return TwilioCaller(self.url.replace("http", "ws", 1) + "/ws")
        return PromptCaller(self.url)


def _cpu_seconds(stat: Path) -> float:
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class PromptCaller(WebRTCCaller):
    """A browser that plays a packet when it arrives.

    aiortc's jitter buffer, in which the fifth packet drives out the first, is the measuring
    caller's: 80 ms that no bot has to answer for. The bot has one as well, for what it hears.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._arrived: dict[int, float] = {}
        self._first: int | None = None

        @self._peer.on("track")
        def note_arrivals(track: MediaStreamTrack) -> None:
            (receiver,) = (one for one in self._peer.getReceivers() if one.track is track)
            handle = receiver._handle_rtp_packet

            async def handled(packet: RtpPacket, arrival_time_ms: int) -> None:
                self._note_arrival(packet.timestamp)
                await handle(packet, arrival_time_ms)

            receiver._handle_rtp_packet = handled

    def _note_arrival(self, timestamp: int) -> None:
        if self._first is None:
            self._first = timestamp
        self._arrived[(timestamp - self._first) % 2**32] = time.monotonic()

    def _heard_at(self, frame: AudioFrame) -> float:
        return self._arrived.pop(frame.pts or 0, time.monotonic())


class Speech:
    """The caller's sentences as audio, made once.

    Attributes:
        sentences: Mono PCM16 at VOICE_HZ.
    """

    def __init__(self, sentences: tuple[bytes, ...]) -> None:
        self.sentences = sentences

    @classmethod
    async def make(cls) -> "Speech":
        """Let the scripted voice say them."""
        engine = ScriptedEngine()
        sentences = [
            b"".join([piece.pcm async for piece in engine.speak(question, VOICE_HZ)])
            for question in QUESTIONS
        ]
        return cls(tuple(sentences))

    async def answer_to(self, caller: Caller, number: int) -> float:
        """Say the n-th sentence, hear the answer out; return how long it took to come, seconds."""
        said = await caller.say(self.sentences[number % len(self.sentences)], VOICE_HZ)
        answer = await caller.hear(since=said.end, within=SECONDS)
        await caller.hear_out(quiet=QUIET_SECONDS, within=SECONDS)
        return answer.start - said.end


@asynccontextmanager
async def world(
    folder: Path, script: Script = SCRIPT, latencies: Latencies | None = None
) -> AsyncIterator[dict[str, str]]:
    """Run providers and a Roark; yields the environment of a bot that uses them."""
    engine: Engine = ScriptedEngine(script)
    if latencies:
        engine = DelayedEngine(engine, latencies)
    async with serve(engine) as providers, RoarkReceiver() as roark:
        yield environment_of(providers, roark, folder)


def environment_of(providers: Providers, roark: RoarkReceiver, folder: Path) -> dict[str, str]:
    """Return the environment of a bot, either one, that uses these; calls are kept in `folder`."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {
        **kept,
        **providers.environment,
        # How many calls are too many is what crowd.py measures.
        "MAX_CALLS": "0",
        "MAX_CALLS_PER_CALLER": "0",
        "ROARK_BASE_URL": roark.url,
        "ROARK_API_KEY": "key",
        "CALLS_DIR": str(folder / "calls"),
        # The scaffold's bot takes no phone call without them.
        "TWILIO_ACCOUNT_SID": "AC1",
        "TWILIO_AUTH_TOKEN": "token",
        "TWILIO_BASE_URL": f"http://127.0.0.1:{providers.twilio.port}",
    }


def bots(folder: Path, environment: dict[str, str]) -> tuple[Bot, Bot]:
    """Lay out both bots in `folder`, each as its image would hold it."""
    return our_bot(folder), scaffolds_bot(folder, environment)


def scaffolds_bot(folder: Path, environment: dict[str, str]) -> Bot:
    """Let `pipecat init` write its bot in `folder`."""
    return Bot(
        SCAFFOLD,
        generate(folder / "scaffold", environment["TWILIO_BASE_URL"]),
        ("-m", "benchmarks.scaffold", "bot"),
        ("-m", "benchmarks.scaffold", "image"),
    )


def our_bot(folder: Path, project: Path = PROJECT) -> Bot:
    """Lay out our bot in `folder`: what the Dockerfile of a project copies."""
    ours = folder / "ours"
    for room in ("roark", "conversation", "telephony", "host"):
        shutil.copytree(project / room, ours / room, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*project.glob("*.py"), project / "prompt.md"):
        shutil.copy(file, ours)
    return Bot(OURS, ours, ("-m", "rehearsal.host.launch_bot"), ("-m", "rehearsal.host.base_image"))


@asynccontextmanager
async def running(bot: Bot, environment: dict[str, str], *options: str) -> AsyncIterator[Running]:
    """Run a bot under Pipecat's runner, for calls over both transports or as `options` say."""
    port = free_port()
    # WebRTC and /ws are served whatever -t says; with webrtc nothing but 127.0.0.1 is offered.
    options = (*(options or ("-t", "webrtc")), "--host", "127.0.0.1", "--port", str(port))
    command = (*bot.launcher, str(bot.folder / "bot.py"), *options)
    # A gate would keep out callers without a token; the scaffold's bot has none.
    ours = {**environment, "TWILIO_AUTH_TOKEN": ""} if bot.name == OURS else environment
    async with _process(command, bot, ours) as process:
        url = f"http://127.0.0.1:{port}"
        await until_ok(process, f"{url}/status")
        yield Running(process, url)


@asynccontextmanager
async def under_image(
    bot: Bot, environment: dict[str, str]
) -> AsyncIterator[tuple[Running, float]]:
    """Run a bot under the base image's contract; yields it and the seconds until it was ready."""
    began = time.monotonic()
    ours = {**environment, "TWILIO_AUTH_TOKEN": ""} if bot.name == OURS else environment
    async with _process(bot.image, bot, ours) as process:
        assert process.stdout
        url = (await asyncio.wait_for(process.stdout.readline(), SECONDS)).decode().strip()
        await until_ok(process, f"{url}/readyz")
        yield Running(process, url), time.monotonic() - began


@asynccontextmanager
async def _process(
    command: tuple[str, ...], bot: Bot, environment: dict[str, str]
) -> AsyncIterator[asyncio.subprocess.Process]:
    path = os.pathsep.join(str(part) for part in (bot.folder, REPOSITORY, PROJECT))
    log = (bot.folder.parent / f"{bot.folder.name}.log").open("ab")
    process = await asyncio.create_subprocess_exec(
        bot.python,
        *command,
        cwd=bot.folder,
        env={**environment, "PYTHONPATH": path},
        # launch_bot ends the bot when this pipe breaks.
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=log,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        log.close()
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()


async def until_ok(process: asyncio.subprocess.Process, url: str) -> None:
    """Ask an address until it answers with success.

    Raises:
        TimeoutError: It did not within SECONDS.
        RuntimeError: The process ended.
    """
    async with asyncio.timeout(SECONDS), aiohttp.ClientSession() as http:
        while process.returncode is None:
            with suppress(aiohttp.ClientError):
                async with http.get(url) as response:
                    if response.ok:
                        return
            await asyncio.sleep(0.02)
    raise RuntimeError(f"{url} never answered: the bot ended with status {process.returncode}")


async def greeting_of(caller: Caller) -> float:
    """Hear the greeting out; return how long after the line was open it came, seconds."""
    opened = time.monotonic()
    greeting = await caller.hear(within=SECONDS)
    await caller.hear_out(quiet=QUIET_SECONDS, within=SECONDS)
    return greeting.start - opened


async def _measure_calls(
    both: tuple[Bot, Bot],
    environments: tuple[dict[str, str], dict[str, str]],
    times: dict[str, Times],
    *,
    is_realistic: bool = False,
) -> None:
    speech = await Speech.make()
    of_ours, of_theirs = environments
    async with running(both[0], of_ours) as ours, running(both[1], of_theirs) as theirs:
        # The first round does not count: only a server's first caller finds it cold.
        for number in range(CALLS + 1):
            for transport in TRANSPORTS:
                async with AsyncExitStack() as open_lines:
                    lines: list[tuple[Times, Caller]] = []
                    for bot, host in zip(both, (ours, theirs), strict=True):
                        dialled = time.monotonic()
                        line = await open_lines.enter_async_context(host.caller(transport))
                        opened = time.monotonic()
                        greeting = await greeting_of(line)
                        measured = times[bot.name] if number else Times()
                        lines.append((measured, line))
                        if not is_realistic:
                            measured.greetings[transport].append(opened - dialled + greeting)
                            measured.after_open[transport].append(greeting)
                    # Both calls are up; the callers take turns, each time another one first.
                    for turn in range(TURNS if number else 1):
                        for measured, line in lines[:: 1 if turn % 2 else -1]:
                            seconds = await speech.answer_to(line, turn)
                            answers = measured.realistic if is_realistic else measured.answers
                            answers[transport].append(seconds)


async def _measure_imports(
    both: tuple[Bot, Bot], environment: dict[str, str], times: dict[str, Times]
) -> None:
    # The first round is for the disk and for Python's own cache.
    for number in range(IMPORTS + 1):
        for bot in both:
            began = time.monotonic()
            async with _process(("-c", "import bot"), bot, environment) as process:
                assert await process.wait() == 0
            if number:
                times[bot.name].imports.append(time.monotonic() - began)


async def _measure_starts(
    both: tuple[Bot, Bot], environment: dict[str, str], times: dict[str, Times]
) -> None:
    for _ in range(STARTS):
        for bot in both:
            async with under_image(bot, environment) as (host, seconds):
                times[bot.name].ready.append(seconds)
                async with host.caller("twilio") as caller:
                    times[bot.name].first_greetings.append(await greeting_of(caller))


async def _measure_memory(
    both: tuple[Bot, Bot], environment: dict[str, str], times: dict[str, Times]
) -> None:
    speech = await Speech.make()

    async def call(host: Running) -> None:
        async with host.caller("twilio") as caller:
            await greeting_of(caller)
            await speech.answer_to(caller, 0)

    for bot in both:
        async with under_image(bot, environment) as (host, _):
            await asyncio.gather(*(call(host) for _ in range(AT_ONCE)))
            early = host.memory()
            for _ in range(MEMORY_CALLS // AT_ONCE):
                await asyncio.gather(*(call(host) for _ in range(AT_ONCE)))
            times[bot.name].memory = (early, host.memory())


async def measure() -> dict[str, Times]:
    """Measure everything, one thing after the other; takes about a quarter of an hour."""
    times = {OURS: Times(), SCAFFOLD: Times()}
    with TemporaryDirectory(prefix="speed-") as folder:
        async with world(Path(folder)) as environment:
            both = bots(Path(folder), environment)
            await _measure_imports(both, environment, times)
            await _measure_starts(both, environment, times)
            await _measure_calls(both, (environment, environment), times)
            await _measure_memory(both, environment, times)
    await measure_realistic(times)
    return times


async def measure_realistic(times: dict[str, Times]) -> None:
    """Measure the answers once more, with services that take their time."""
    # The n-th request of either bot takes as long as the other's: their luck is the same.
    with TemporaryDirectory(prefix="speed-") as folder:
        async with (
            world(Path(folder), latencies=REALISTIC) as of_ours,
            world(Path(folder), latencies=REALISTIC) as of_theirs,
        ):
            both = our_bot(Path(folder)), scaffolds_bot(Path(folder), of_theirs)
            await _measure_calls(both, (of_ours, of_theirs), times, is_realistic=True)


def p95(values: list[float]) -> float:
    """Return the value that 95 of 100 do not exceed."""
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


def report() -> str:
    """Measure, and return the section for README.md."""
    times = asyncio.run(measure())
    both = ours, theirs = times[OURS], times[SCAFFOLD]
    lines = [f"| | ours is | ours | {SCAFFOLD} | goal |", "|---|---|---|---|---|"]

    def row(what: str, mine: float, other: float, unit: str, goal: str = "") -> None:
        scale, digits = {"ms": (1000, 0), "s": (1, 2), "MiB": (1, 0)}[unit]
        cells = [f"{value * scale:.{digits}f} {unit}" for value in (mine, other)]
        lines.append(f"| {what} | {mine / other:.2f}x | {' | '.join(cells)} | {goal} |")

    for transport in TRANSPORTS:
        mine, other = ours.answers[transport], theirs.answers[transport]
        what = f"answer, {transport}"
        row(f"{what}, median", statistics.median(mine), statistics.median(other), "ms", "0.75x")
        row(f"{what}, 95th percentile", p95(mine), p95(other), "ms")
    for transport in TRANSPORTS:
        mine, other = ours.realistic[transport], theirs.realistic[transport]
        what = f"answer, {transport}, realistic services"
        row(f"{what}, median", statistics.median(mine), statistics.median(other), "ms", "0.80x")
        row(f"{what}, 95th percentile", p95(mine), p95(other), "ms", "0.85x")
    for transport in TRANSPORTS:
        for what, which in (("from dialling", "greetings"), ("from the open line", "after_open")):
            mine, other = (statistics.median(getattr(each, which)[transport]) for each in both)
            row(f"greeting, {transport}, {what}, median", mine, other, "ms", "1.0x")
    median = statistics.median
    row("cold `import bot`", median(ours.imports), median(theirs.imports), "s", "0.7x")
    row("until ready, base image's contract", median(ours.ready), median(theirs.ready), "s")
    first = "greeting of the first phone call after that"
    row(first, median(ours.first_greetings), median(theirs.first_greetings), "ms")
    row(f"memory after {AT_ONCE} phone calls", ours.memory[0], theirs.memory[0], "MiB")
    growth = [(after - before) for before, after in (ours.memory, theirs.memory)]
    row(f"memory after {MEMORY_CALLS} more", ours.memory[1], theirs.memory[1], "MiB")
    lines += [
        "",
        f"Answers: {CALLS} calls of {TURNS} turns per bot and transport, from the caller's last "
        "sound to the bot's first; on the web, until the packet with that sound arrives, without "
        "the 80 ms of the measuring caller's own jitter buffer. Realistic services: the LLM's "
        f"first token after {REALISTIC.llm * 1000:.0f} ms, the voice's first byte after "
        f"{REALISTIC.tts * 1000:.0f}, the final transcript {REALISTIC.stt * 1000:.0f} after "
        "`Finalize`, medians of a log-normal spread of 0.25, the same ones for both bots; the "
        "interim transcript of a sentence is whole 100 ms after its end. "
        f"Grown by {growth[0]:.1f} and {growth[1]:.1f} MiB over {MEMORY_CALLS} calls.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
