"""SIGTERM and SIGINT end the calls in progress, so that each is closed and reported.

With DRAIN_SECONDS the first SIGTERM lets them go on to their own end for so long, and the process
goes after the last of them; no new ones are taken meanwhile. A second SIGTERM ends them now.

Pipecat's development server does not tell a webrtc call that the process is stopping: it waits
for the call instead, until whoever sent the signal loses patience and kills it. Pipecat Cloud's
server waits too, and means it: there a call goes on to its own end, and this module keeps out.
"""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from loguru import logger

import config

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A proxy that asks for /status every second has noticed by then. Until it has, it sends calls here.
NOTICE_SECONDS = 3.0


@dataclass
class _Process:
    """What signals this process has had, and the calls they are about.

    Attributes:
        calls: Each call in progress.
        ends: How those end that have come so far as to have an end.
        previous: What handled the signals before.
        drain_seconds: How long SIGTERM lets calls go on.
        draining_since: When it first came, in seconds of time.monotonic.
        ended_by: The signal that ends calls, once it has come.
    """

    calls: set[object] = field(default_factory=set)
    ends: dict[object, Callable[[str], object]] = field(default_factory=dict)
    previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = field(
        default_factory=dict
    )
    drain_seconds: float = 0.0
    draining_since: float | None = None
    ended_by: str = ""


_process = _Process()


@contextmanager
def waits_for_call() -> Iterator[None]:
    """While this context is open, a call is in progress, and the process does not go without it."""
    if not _is_ours_to_handle():
        yield
        return
    call = object()
    if not _process.calls:
        _process.drain_seconds = config.seconds("DRAIN_SECONDS", 0.0)
        _take_signals(_process, asyncio.get_running_loop())
    _process.calls.add(call)
    try:
        yield
    finally:
        _process.calls.discard(call)
        if not _process.calls:
            _give_signals_back()


@contextmanager
def ends_call(end: Callable[[str], Coroutine[None, None, None]]) -> Iterator[None]:
    """While this context is open, a signal runs `end(signal name)` in the running event loop.

    Whatever handled the signal before (the server's own shutdown) runs as well, right after.
    """
    if not _is_ours_to_handle():
        yield
        return
    loop = asyncio.get_running_loop()
    call = object()
    with waits_for_call():
        _process.ends[call] = lambda name: asyncio.run_coroutine_threadsafe(end(name), loop)
        if _process.ended_by:
            # It came while the pipeline was being built.
            _process.ends[call](_process.ended_by)
        try:
            yield
        finally:
            del _process.ends[call]


def is_draining() -> bool:
    """Whether the process goes as soon as its calls are over."""
    return _process.draining_since is not None


def takes_no_calls() -> bool:
    """Whether it is too late for a new call: it is draining, and whoever asks has noticed."""
    since = _process.draining_since
    return since is not None and time.monotonic() - since > NOTICE_SECONDS


def _is_ours_to_handle() -> bool:
    # Only a main thread can; a host that runs calls elsewhere has its own way.
    if threading.current_thread() is not threading.main_thread():
        return False
    # ENV is "local" under the development server. A host without any handler would just die.
    if os.environ.get("ENV") == "local" or _process.calls:
        return True
    return signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def _take_signals(process: _Process, loop: asyncio.AbstractEventLoop) -> None:
    # A signal may come between any two lines here and in _give_signals_back(): as soon as this
    # handler is there, and until the server's own is there again, it knows whom to pass it on to.
    def on_signal(number: int, frame: FrameType | None) -> None:
        if (
            number == signal.SIGTERM
            and process.drain_seconds
            and process.draining_since is None
            and process.calls
        ):
            process.draining_since = time.monotonic()
            # In the loop: a handler of signals may run in the middle of anything.
            loop.call_soon_threadsafe(_drain, process, loop)
        else:
            _end_calls(process, number, frame)

    process.previous = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, on_signal)


def _drain(process: _Process, loop: asyncio.AbstractEventLoop) -> None:
    logger.info(
        f"Draining: calls may go on for {process.drain_seconds:g} s; another SIGTERM ends them now"
    )

    def end_now() -> None:
        if process is _process:
            _end_calls(process, signal.SIGTERM, None)

    loop.call_later(process.drain_seconds, end_now)


def _end_calls(process: _Process, number: int, frame: FrameType | None) -> None:
    process.ended_by = signal.Signals(number).name
    for end in list(process.ends.values()):
        end(process.ended_by)
    previous = process.previous.get(number)
    if callable(previous):
        previous(number, frame)


def _give_signals_back() -> None:
    global _process
    over = _process
    for number, handler in over.previous.items():
        # Somebody took the signal over since: theirs to keep.
        if getattr(signal.getsignal(number), "__module__", None) == __name__:
            signal.signal(number, handler)
    _process = _Process()
    if over.draining_since is not None and not over.ended_by:
        # The last call is over: now for what the signal was about.
        os.kill(os.getpid(), signal.SIGTERM)
