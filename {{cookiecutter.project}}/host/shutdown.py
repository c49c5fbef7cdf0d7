"""SIGTERM and SIGINT end the calls in progress, so that each is closed and reported.

Pipecat's development server does not tell a webrtc call that the process is stopping: it waits
for the call instead, until whoever sent the signal loses patience and kills it. Pipecat Cloud's
server waits too, and means it: there a call goes on to its own end, and this module keeps out.
"""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_in_progress: dict[object, Callable[[str], object]] = {}
_previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}


@contextmanager
def ends_call(end: Callable[[str], Coroutine[None, None, None]]) -> Iterator[None]:
    """While this context is open, a signal runs `end(signal name)` in the running event loop.

    Whatever handled the signal before (the server's own shutdown) runs as well, right after.
    """
    if not _is_ours_to_handle():
        yield
        return
    loop = asyncio.get_running_loop()
    key = object()
    _in_progress[key] = lambda name: asyncio.run_coroutine_threadsafe(end(name), loop)
    if not _previous:
        _previous.update({number: signal.signal(number, _on_signal) for number in SIGNALS})
    try:
        yield
    finally:
        del _in_progress[key]
        if not _in_progress:
            for number, handler in _previous.items():
                # Somebody took the signal over since: theirs to keep.
                if signal.getsignal(number) is _on_signal:
                    signal.signal(number, handler)
            _previous.clear()


def _is_ours_to_handle() -> bool:
    # Only a main thread can; a host that runs calls elsewhere has its own way.
    if threading.current_thread() is not threading.main_thread():
        return False
    # ENV is "local" under the development server. A host without any handler would just die.
    handlers = (signal.SIG_DFL, _on_signal)
    return os.environ.get("ENV") == "local" or signal.getsignal(signal.SIGTERM) in handlers


def _on_signal(number: int, frame: FrameType | None) -> None:
    for end in list(_in_progress.values()):
        end(signal.Signals(number).name)
    previous = _previous.get(number)
    if callable(previous):
        previous(number, frame)
