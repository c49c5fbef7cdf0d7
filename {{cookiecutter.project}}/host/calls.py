"""How many calls this process holds, and whether it takes another.

Too many calls at once spoil every one of them: they share a processor, and each has to answer
within a second. So the next caller is told that all lines are busy.
"""

import os
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar

import config
from host import shutdown

# One process is one event loop, which keeps one core busy and shares a second. Measured on two
# cores, everybody talking: the slowest of twenty answers took 0.50 s with one phone call, 0.56 s
# with three, 0.62 with four, 1.20 with five; in browsers 0.96, 1.5 and 3.0 s, and with five each
# answer came later than the one before.
MAX_CALLS = 3 if (os.cpu_count() or 1) > 1 else 2
# Somebody who lost the line and calls again may still have the old one.
MAX_CALLS_PER_CALLER = 3
# From the answer with the TwiML to the stream that it asks for.
RESERVED_SECONDS = 2.0
# A withheld number comes as a word or as a number that many share.
NUMBER = re.compile(r"\+[1-9][0-9]{6,14}")

caller_address: ContextVar[str] = ContextVar("caller_address", default="")
"""Where the request came from that this code answers; empty where nobody looked."""

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


class Calls:
    """The calls in progress.

    Attributes:
        refused: How many calls found every line busy.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with none; `clock` counts seconds."""
        self.refused = 0
        self._clock = clock
        self._lines: dict[Line, str] = {}
        # Until when a line is kept for a call on its way here.
        self._reserved: dict[str, tuple[str, float]] = {}

    def __len__(self) -> int:
        """How many are in progress."""
        return len(self._lines)

    def refusal(self, caller: str = "", call_id: str = "") -> str:
        """Why a call cannot be taken now; empty where it can.

        Args:
            caller: The number or address it comes from.
            call_id: Its id, if a line may have been kept for it.
        """
        if shutdown.takes_no_calls():
            return "this server is about to stop and takes no new calls"
        now = self._clock()
        self._reserved = {
            call: kept for call, kept in self._reserved.items() if kept[1] > now and call != call_id
        }
        lines = [*self._lines.values(), *(caller for caller, _ in self._reserved.values())]
        limit = whole_number("MAX_CALLS", MAX_CALLS)
        if limit and len(lines) >= limit:
            return "all lines are busy; please try again in a few minutes"
        limit = whole_number("MAX_CALLS_PER_CALLER", MAX_CALLS_PER_CALLER)
        if limit and caller and lines.count(caller) >= limit:
            return "you have other calls here; please end one of them first"
        return ""

    def reserve(self, call_id: str, number: str) -> str:
        """Keep a line for a phone call on its way here; return why not, where there is none."""
        caller = identity(number)
        if refusal := self.refusal(caller, call_id):
            self.refused += 1
            return refusal
        if call_id:
            self._reserved[call_id] = (caller, self._clock() + RESERVED_SECONDS)
        return ""

    def begin(self, caller: str, call_id: str = "") -> Line:
        """Take a call, which is in progress until its line is given back or its context is left.

        Raises:
            Busy: It cannot be taken.
        """
        if refusal := self.refusal(caller, call_id):
            self.refused += 1
            raise Busy(refusal)
        line = Line(self._lines, caller)
        line.enter_context(shutdown.waits_for_call())
        proves_its_connection.get()()
        return line


of_process = Calls()
"""The calls of this process."""


def identity(number: str | None) -> str:
    """Who calls from this number; empty where that cannot be told."""
    return number if number and NUMBER.fullmatch(number) else ""


def whole_number(name: str, default: int) -> int:
    """The variable `name`, or `default` where it is unset or blank.

    Raises:
        RuntimeError: It is no whole number.
    """
    value = config.setting(name, str(default))
    if not value.isdecimal():
        raise RuntimeError(f"{name} is a whole number, 0 for no limit, not {value!r}")
    return int(value)
