"""A call leaves nothing behind in its process, however it ended."""

import asyncio
import gc
import os
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conversation import endings
from harness import SECONDS, Harness, run_harness
from pipecat.frames.frames import Frame
from pipecat.pipeline.worker import PipelineWorker
from rehearsal.engines.scripted import Script
from roark import RoarkObserver

pytestmark = pytest.mark.anyio

WARM_UP, CALLS = 4, 12


def of_calls() -> int:
    """How many objects of calls there are; the bot sees to their collection itself."""
    kinds = (PipelineWorker, RoarkObserver, Frame)
    return sum(issubclass(type(thing), kinds) for thing in gc.get_objects())


@pytest.fixture
def nobody_else_collects() -> Iterator[None]:
    """Only what asks for the garbage collector gets it, as long as the test lasts."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.slow(seconds=15)
@pytest.mark.usefixtures("nobody_else_collects")
async def test_twelve_calls_leave_no_task_no_open_file_and_no_object(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with run_harness(monkeypatch, tmp_path) as harness:
        harness.engine.script = Script(greeting="Hello.")
        for number in range(WARM_UP):
            await one_call(harness, number)
        # As long as it takes to tidy up after the last of them.
        await asyncio.sleep(2)
        before = held()
        for number in range(CALLS):
            await one_call(harness, number)
        # What was delivered is tidied up, and sockets are closed, a moment after bot() returned.
        deadline = time.monotonic() + SECONDS
        while more_than(before) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        assert more_than(before) == {}, who_is_left()


class Call:
    """What a call is to Python's memory: a circle."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.usefixtures("nobody_else_collects")
async def test_what_a_busy_machine_lets_go_of_late_is_freed_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    later: list[Callable[[], object]] = []
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_later", lambda _seconds, collect: later.append(collect))
    endings.forget_soon()
    call = Call()
    is_there = weakref.ref(call)
    first, *again = later
    first()
    del call
    for collect in again:
        collect()
    assert not is_there()


async def one_call(harness: Harness, number: int) -> None:
    """A phone or a web call; in every other pair the caller gives up before the bot has spoken."""
    voice = harness.server("tts")
    voice.faults.hang = number % 4 >= 2
    call = harness.caller("twilio" if number % 2 else "webrtc")
    async with call as caller:
        if voice.faults.hang:
            await asyncio.sleep(0.3)
        else:
            await caller.hear(within=SECONDS)
    await harness.over()
    harness.image.sessions.clear()


def held() -> dict[str, int]:
    """What this process holds."""
    return {
        "calls": of_calls(),
        "tasks": len(asyncio.all_tasks()),
        "files": len(os.listdir("/proc/self/fd")),
    }


def who_is_left() -> Counter[str]:
    """What the tasks of this process run, and what its open files are."""
    tasks = [str(getattr(task.get_coro(), "__qualname__", task)) for task in asyncio.all_tasks()]
    files: list[str] = []
    for number in os.listdir("/proc/self/fd"):
        # The one that lists them is gone.
        with suppress(FileNotFoundError):
            files.append(os.readlink(f"/proc/self/fd/{number}").partition(":[")[0])
    return Counter(tasks + files)


def more_than(before: dict[str, int]) -> dict[str, int]:
    """What there is more of than before."""
    return {what: number for what, number in held().items() if number > before[what]}
