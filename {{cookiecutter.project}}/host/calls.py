"""How many calls this process holds, and whether it takes another.

Too many calls at once spoil every one of them: they share a processor, and each has to answer
within a second. So the next caller is told that all lines are busy.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import config
from host import shutdown

# One process is one event loop, which keeps one core busy and shares a second. Measured on two
# cores, everybody talking: the slowest of twenty answers took 0.50 s with one phone call, 0.56 s
# with three, 0.62 with four, 1.20 with five; in browsers 0.96 s with one, and three are on the
# edge: 1.5 s, or each answer later than the one before.
MAX_CALLS = 2
MAX_PHONE_CALLS = 3 if (os.cpu_count() or 1) > 1 else 2
# Somebody who lost the line and calls again may still have the old one.
MAX_CALLS_PER_CALLER = 3
# From the answer with the TwiML to the stream that it asks for.
RESERVED_SECONDS = 2.0
# From the offer of a browser to its call: addresses are gathered, which somebody may draw out.
PROMISED_SECONDS = 10.0
# What the line of a call may bring: twice what comes in real time, for clocks differ, and before
# that what a process that stood still finds waiting.
ALLOWED_AT_ONCE_SECONDS, ALLOWED_PER_SECOND = 10.0, 2.0
# A withheld number comes as a word or as a number that many share.
NUMBER = re.compile(r"\+[1-9][0-9]{6,14}")
# In the scope of a websocket; RFC 6455, section 7.4.1.
CLOSE_CODE = "close_code"

caller_address: ContextVar[str] = ContextVar("caller_address", default="")
"""Where the request came from that this code answers; empty where nobody looked."""

_promise: ContextVar[object] = ContextVar("_promise", default=None)

proves_its_connection: ContextVar[Callable[[], None]] = ContextVar(
    "proves_its_connection", default=lambda: None
)
"""Says that the connection of that request is a call's; see front_door.py."""


class Busy(Exception):
    """This call cannot be taken now; the text says why."""


class Line(ExitStack):
    """The line of one call. The process waits for the call until this context is left."""

    def __init__(self, lines: dict["Line", str], caller: str) -> None:
        """Take a line, one of `lines`, for `caller`."""
        super().__init__()
        self._lines = lines
        lines[self] = caller
        self.callback(self.give_back)

    def give_back(self) -> None:
        """Let another caller have it: this one is gone, and only the call's record is left."""
        self._lines.pop(self, None)


class Allowance:
    """How much the line of one call may bring: a flood of one caller's spoils all calls at once."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with ALLOWED_AT_ONCE_SECONDS; `clock` counts seconds."""
        self._clock = clock
        self._left = ALLOWED_AT_ONCE_SECONDS
        self._at = clock()

    def takes(self, seconds: float) -> bool:
        """Whether there is room for something that lasts so long, which is used up then."""
        now = self._clock()
        self._left += (now - self._at) * ALLOWED_PER_SECOND
        self._left = min(self._left, ALLOWED_AT_ONCE_SECONDS)
        self._at = now
        if self._left < seconds:
            return False
        self._left -= seconds
        return True


@dataclass(frozen=True)
class _Kept:
    """A line kept for a call on its way here."""

    caller: str
    until: float
    has_come: Callable[[], bool]


class Calls:
    """The calls in progress.

    Attributes:
        refused: How many calls found every line busy.
        default_limit: How many there may be at once where MAX_CALLS does not say so.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with none; `clock` counts seconds."""
        self.refused = 0
        self.default_limit = MAX_CALLS
        self._clock = clock
        self._lines: dict[Line, str] = {}
        # By the id of a call, or the promise to a request that is being answered.
        self._kept: dict[object, _Kept] = {}

    def __len__(self) -> int:
        """How many are in progress."""
        return len(self._lines)

    @property
    def limit(self) -> int:
        """How many there may be at once; 0 is no limit.

        Raises:
            RuntimeError: MAX_CALLS is no whole number.
        """
        return config.whole_number("MAX_CALLS", self.default_limit)

    def refusal(self, caller: str = "", call_id: str = "") -> str:
        """Why a call cannot be taken now; empty where it can.

        Args:
            caller: The number or address it comes from.
            call_id: Its id, if a line may have been kept for it.
        """
        if shutdown.takes_no_calls():
            return "this server is about to stop and takes no new calls"
        now = self._clock()
        self._kept = {
            call: kept
            for call, kept in self._kept.items()
            if kept.until > now and call != call_id and not kept.has_come()
        }
        lines = [*self._lines.values(), *(kept.caller for kept in self._kept.values())]
        if self.limit and len(lines) >= self.limit:
            return "all lines are busy; please try again in a few minutes"
        limit = config.whole_number("MAX_CALLS_PER_CALLER", MAX_CALLS_PER_CALLER)
        if limit and caller and lines.count(caller) >= limit:
            return "you have other calls here; please end one of them first"
        return ""

    def reserve(
        self, call_id: str, number: str, has_come: Callable[[], bool] = lambda: False
    ) -> str:
        """Keep a line for a phone call on its way here; return why not, where there is none.

        Args:
            call_id: Its id.
            number: The number it comes from.
            has_come: Whether it has, to whichever process of the server.
        """
        caller = identity(number)
        if refusal := self.refusal(caller, call_id):
            self.refused += 1
            return refusal
        if call_id:
            self._kept[call_id] = _Kept(caller, self._clock() + RESERVED_SECONDS, has_come)
        return ""

    @contextmanager
    def promised(self, caller: str) -> Iterator[None]:
        """While this context is open, keep a line for the call that begins in it, if one does soon.

        Args:
            caller: The address it comes from.
        """
        promise = object()
        until = self._clock() + PROMISED_SECONDS
        self._kept[promise] = _Kept(caller, until, has_come=lambda: False)
        outer = _promise.set(promise)
        try:
            yield
        finally:
            self._kept.pop(promise, None)
            _promise.reset(outer)

    def begin(self, caller: str, call_id: str = "", *, is_promised: bool = False) -> Line:
        """Take a call, which is in progress until its line is given back or its context is left.

        Args:
            caller: The number or address it comes from.
            call_id: Its id, if a line may have been kept for it.
            is_promised: Whether a process of this server has kept a line for it. The proxy may have
                sent it to another one, and its caller has heard the phone being picked up.

        Raises:
            Busy: It cannot be taken.
        """
        self._kept.pop(_promise.get(), None)
        refusal = self.refusal(caller, call_id)
        if refusal and (shutdown.takes_no_calls() or not is_promised):
            self.refused += 1
            raise Busy(refusal)
        line = Line(self._lines, caller)
        line.enter_context(shutdown.waits_for_call())
        proves_its_connection.get()()
        return line


of_process = Calls()
"""The calls of this process."""


def is_broken_off(scope: Mapping[str, Any]) -> bool:
    """Whether the websocket of this scope was closed for what came over it, no text or too long."""
    return scope.get(CLOSE_CODE) in (1002, 1003, 1007, 1009)


def identity(number: str | None) -> str:
    """Who calls from this number; empty where that cannot be told."""
    return number if number and NUMBER.fullmatch(number) else ""
