"""What 200 calls leave behind in one process: tasks, open files, objects of calls, memory.

    uv run python -m benchmarks.leaks [CALLS]

The bot has a process of its own, under the base image's contract; callers, providers and Roark
live in this one. Calls alternate between phone and WebRTC, and between the ways to end: the caller
hangs up, the caller is cut off, the bot says goodbye, a voice with a wrong key.
"""

import asyncio
import gc
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
from loguru import logger

from benchmarks import PROJECT

CALLS = 200
# The first calls of a process load what the others share.
WARM_UP = 10
SECONDS = 40.0
OF_CALLS = ("PipelineWorker", "RoarkObserver", "LLMContext", "Ending", "Recovery", "Session")


async def host() -> None:
    """Serve the bot, and beside it what the process holds, until killed."""
    import bot
    from rehearsal.callers.loopback_ice import keep_ice_on_loopback
    from rehearsal.host.base_image import BaseImage, serve

    keep_ice_on_loopback()
    image = BaseImage(bot)
    bot.readyz()

    async def holds() -> dict[str, Any]:
        kinds = [type(thing).__name__ for thing in gc.get_objects()]
        rss = Path("/proc/self/statm").read_text().split()[1]
        return {
            "tasks": len(asyncio.all_tasks()),
            "files": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            "objects of calls": sum(kinds.count(kind) for kind in OF_CALLS),
            "objects": len(kinds),
            "RSS, MiB": round(int(rss) * os.sysconf("SC_PAGE_SIZE") / 2**20, 1),
        }

    image.app.add_api_route("/holds", holds)
    async with serve(image) as url:
        print(url, flush=True)
        while True:
            # Our image remembers its sessions for the tests' sake; the platform's does not.
            image.sessions[:] = [s for s in image.sessions if not s.returned.is_set()]
            await asyncio.sleep(0.1)


@asynccontextmanager
async def running(environment: dict[str, str], folder: Path) -> AsyncIterator[str]:
    """Run `host` in a process of its own; yields its address."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "ignore", "-m", "benchmarks.leaks", "host"),
        cwd=Path(__file__).resolve().parent.parent,
        env={**os.environ, **environment, "CALLS_DIR": str(folder / "calls"), "ENV": ""},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout
    try:
        yield (await asyncio.wait_for(process.stdout.readline(), SECONDS)).decode().strip()
    finally:
        process.kill()
        await process.wait()


async def measure(calls: int) -> list[tuple[int, dict[str, Any]]]:
    """Hold so many calls; return what the process held after some of them."""
    from rehearsal.callers import webrtc as webrtc_caller
    from rehearsal.callers.twilio import TwilioCaller
    from rehearsal.callers.webrtc import WebRTCCaller
    from rehearsal.engines.engine import ToolCall
    from rehearsal.engines.scripted import Answer, Script, ScriptedEngine
    from rehearsal.providers.all import serve as serve_providers
    from rehearsal.providers.cartesia import CartesiaServer
    from rehearsal.providers.roark import RoarkReceiver

    # A web call that the bot gives up at once never comes up.
    webrtc_caller.CONNECT_SECONDS = 2.0
    engine = ScriptedEngine()
    polite = Script(greeting="Hello.")
    curt = Script(
        greeting="Hello.",
        answers=(Answer(told="greet", calls=(ToolCall("end_call", {"goodbye": "Bye."}),)),),
    )
    found: list[tuple[int, dict[str, Any]]] = []
    with TemporaryDirectory(prefix="leaks-") as name:
        async with serve_providers(engine) as providers, RoarkReceiver() as roark:
            environment = {
                **providers.environment,
                "ROARK_BASE_URL": roark.url,
                "ROARK_API_KEY": "rehearsal",
            }
            async with running(environment, Path(name)) as url, aiohttp.ClientSession() as http:
                for number in range(WARM_UP + calls + 1):
                    done = number - WARM_UP
                    if done >= 0 and done % (calls // 4) == 0:
                        # Delivery goes on in the background for a moment.
                        await asyncio.sleep(3)
                        found.append((done, await (await http.get(f"{url}/holds")).json()))
                    way = number // 2 % 4
                    engine.script = curt if way == 2 else polite
                    providers[CartesiaServer].faults.wrong_key = way == 3
                    caller = (
                        TwilioCaller(url.replace("http", "ws", 1) + "/ws")
                        if number % 2
                        else WebRTCCaller(url)
                    )
                    with suppress(TimeoutError, ConnectionError):
                        async with asyncio.timeout(SECONDS), caller:
                            match way:
                                case 0:
                                    await caller.hear(within=5)
                                case 1:
                                    await caller.hear(within=5)
                                    if number % 2:
                                        await caller.vanish()
                                case _:
                                    await asyncio.wait_for(caller.ended.wait(), 5)
    return found


def report(calls: int = CALLS) -> str:
    """Measure, and return a table."""
    found = asyncio.run(measure(calls))
    columns = list(found[0][1])
    lines = [f"| after calls | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {number} | {' | '.join(str(held[column]) for column in columns)} |"
        for number, held in found
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    logger.remove()
    if sys.argv[1:] == ["host"]:
        os.chdir(PROJECT)
        asyncio.run(host())
    else:
        print(report(int(sys.argv[1]) if sys.argv[1:] else CALLS))
