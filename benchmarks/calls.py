"""A measured call: the host in a process of its own, the world around it, and one caller.

The bot's process is alone with its work: providers, receivers and the caller live in this one, so
that a busy or dying bot does not distort what is measured of it.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import aiohttp
from rehearsal.callers.caller import Caller
from rehearsal.callers.twilio import TwilioCaller
from rehearsal.callers.webrtc import WebRTCCaller
from rehearsal.engines.engine import ToolCall
from rehearsal.engines.scripted import Answer, Script, ScriptedEngine
from rehearsal.providers.all import Providers, serve
from rehearsal.providers.roark import ReceivedCall, RoarkReceiver
from rehearsal.providers.server import free_port

from benchmarks import PROJECT, REPOSITORY
from benchmarks.host import Measured, Settings, loop_is_over
from benchmarks.subjects import OURS, PUBLISHED, TUNER
from benchmarks.tuner_receiver import TunerReceiver

SECONDS = 40.0
"""What anything may take on a busy machine before it counts as broken."""

VOICE_HZ = 16000

SHORT_CALL = Script(
    greeting="Hello there.",
    hears=("What do I owe you?",),
    answers=(
        Answer(heard="owe", calls=(ToolCall("look_up", {"name": "Ada"}),)),
        Answer(result="look_up", says="It is twelve fifty."),
    ),
)
"""Greeting, question, tool, answer: three turns and one tool call in about seven seconds."""

TURNS = (
    ("assistant", "Hello there."),
    ("user", "What do I owe you?"),
    ("assistant", "It is twelve fifty."),
)


@dataclass
class World:
    """The servers around a bot, one receiver per observer."""

    providers: Providers
    engine: ScriptedEngine
    receivers: dict[str, RoarkReceiver]
    tuner: TunerReceiver
    folder: Path

    @property
    def servers(self) -> dict[str, str]:
        """Observer -> its receiver's address."""
        return {
            **{name: receiver.url for name, receiver in self.receivers.items()},
            TUNER: self.tuner.url,
        }

    @property
    def calls_dir(self) -> Path:
        """Where our observer keeps its calls."""
        return self.folder / "calls"

    def received(self, name: str) -> ReceivedCall:
        """The one call that this observer's receiver heard of; an empty one if there is none."""
        calls = list(self.receivers[name].calls.values())
        return calls[0] if calls else ReceivedCall("")


@asynccontextmanager
async def world(folder: Path, script: Script = SHORT_CALL) -> AsyncIterator[World]:
    """Start the providers and the receivers."""
    engine = ScriptedEngine(script)
    async with AsyncExitStack() as stack:
        yield World(
            await stack.enter_async_context(serve(engine)),
            engine,
            {name: await stack.enter_async_context(RoarkReceiver()) for name in (OURS, PUBLISHED)},
            await stack.enter_async_context(TunerReceiver()),
            folder,
        )


@dataclass
class Host:
    """The running bot."""

    process: asyncio.subprocess.Process
    url: str
    result: Path

    def signal(self, number: Signals) -> None:
        """Send the bot a signal; SIGKILL ends it in the middle of whatever it does."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def measured(self, within: float = SECONDS) -> Measured:
        """Wait for the call's end and return what the bot measured."""
        await _exists(self.result, within)
        found = Measured(**json.loads(self.result.read_text(encoding="utf-8")))
        self.result.unlink()
        return found

    async def loop_is_over(self) -> None:
        """Wait until the event loop of a `once` host is gone, with all its tasks."""
        await _exists(loop_is_over(self.result), SECONDS)


@asynccontextmanager
async def host(
    world: World,
    transport: str = "twilio",
    *,
    observers: tuple[str, ...] = (OURS, PUBLISHED),
    environment: Mapping[str, str] | None = None,
    program: tuple[str, ...] = (
        "-m",
        "rehearsal.host.launch_bot",
        str(Path(__file__).with_name("host.py")),
    ),
    **options: Any,
) -> AsyncIterator[Host]:
    """Run the bot with `observers` until the context ends; options are those of `Settings`."""
    port = free_port()
    result = world.folder / f"result-{port}.json"
    settings = Settings(
        servers={name: url for name, url in world.servers.items() if name in observers},
        result=str(result),
        **options,
    )
    log = (world.folder / f"host-{port}.log").open("wb")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *program,
        *("-t", transport, "--host", "127.0.0.1", "--port", str(port)),
        # Pipecat's runner imports every file of the folder it runs in: this one has none.
        cwd=world.folder,
        env={
            **{name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ},
            **world.providers.environment,
            **settings.to_environment(),
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{PROJECT}",
            "PYTHONUNBUFFERED": "1",
            "CALLS_DIR": str(world.calls_dir),
            **(environment or {}),
        },
        stdin=asyncio.subprocess.PIPE,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        await _answers(process, url, Path(log.name))
        yield Host(process, url, result)
    finally:
        log.close()
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()


async def _exists(path: Path, within: float) -> None:
    async with asyncio.timeout(within):
        while not path.exists():
            await asyncio.sleep(0.02)


async def _answers(process: asyncio.subprocess.Process, url: str, log: Path) -> None:
    async with asyncio.timeout(SECONDS), aiohttp.ClientSession() as http:
        while process.returncode is None:
            with suppress(aiohttp.ClientError):
                async with http.get(f"{url}/status"):
                    return
            await asyncio.sleep(0.05)
    raise RuntimeError(f"the host did not start:\n{log.read_text(encoding='utf-8')[-2000:]}")


def caller(host: Host, transport: str, **options: Any) -> Caller:
    """Return a caller, not yet connected."""
    if transport == "twilio":
        return TwilioCaller(host.url.replace("http", "ws", 1) + "/ws", **options)
    return WebRTCCaller(host.url, **options)


async def talk(
    line: Caller, world: World, questions: tuple[str, ...] = ("What do I owe you?",)
) -> None:
    """Hear the greeting, ask every question and hear its answer out."""
    await line.hear(within=SECONDS)
    await line.hear_out(quiet=0.6, within=SECONDS)
    for question in questions:
        pieces = [piece.pcm async for piece in world.engine.speak(question, VOICE_HZ)]
        said = await line.say(b"".join(pieces), VOICE_HZ)
        await line.hear(since=said.end, within=SECONDS)
        await line.hear_out(quiet=0.6, within=SECONDS)
