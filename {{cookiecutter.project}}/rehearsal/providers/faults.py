"""What can go wrong with a provider: switches of the same servers, set before or during a call.

Two more faults are actions of a server rather than switches: `drop()` cuts its live connections,
`refuse()` closes its listener until `accept()`.
"""

import sys
from dataclasses import dataclass
from enum import Enum

ALWAYS = sys.maxsize
"""For the counted switches: every request from now on."""


class Break(Enum):
    """How an answer breaks in its middle."""

    CUT = "the connection is cut"
    STALL = "nothing more comes, the connection stays"
    HALF = "it ends as if that were all, inside a message"
    GARBAGE = "what comes is no message of the protocol"


@dataclass
class Faults:
    """The switches of one provider, read at every request. The default is a healthy provider.

    A request is an HTTP request, a websocket handshake or, on the socket of a voice, a new speech.

    Attributes:
        wrong_key: Answer 401, as to a key that was revoked.
        rate_limited: How many of the next requests get a 429.
        retry_after_s: Seconds asked for in the `Retry-After` header of a 429; None leaves it out.
        server_errors: How many of the next requests get a 500.
        hang: Accept connections and read them, but never answer.
        hang_handshake: Accept connections, but answer neither handshake nor request.
        slow_s: Seconds by which every answer is late.
        cuts: How many of the next answers break off in the middle, with the connection.
        stalls: How many of the next answers stop in the middle; the connection stays.
        halves: How many of the next answers end in the middle of a message, in good order.
        garbage: How many of the next answers turn into no message of the protocol.
    """

    wrong_key: bool = False
    rate_limited: int = 0
    retry_after_s: float | None = None
    server_errors: int = 0
    hang: bool = False
    hang_handshake: bool = False
    slow_s: float = 0.0
    cuts: int = 0
    stalls: int = 0
    halves: int = 0
    garbage: int = 0

    def refusal(self) -> int | None:
        """Return the HTTP status that refuses this request, if one does, and count it."""
        if self.wrong_key:
            return 401
        if self.rate_limited > 0:
            self.rate_limited -= 1
            return 429
        if self.server_errors > 0:
            self.server_errors -= 1
            return 500
        return None

    def breaks(self) -> Break | None:
        """Return how this answer shall break in its middle, if it shall, and count it."""
        if self.cuts > 0:
            self.cuts -= 1
            return Break.CUT
        if self.stalls > 0:
            self.stalls -= 1
            return Break.STALL
        if self.halves > 0:
            self.halves -= 1
            return Break.HALF
        if self.garbage > 0:
            self.garbage -= 1
            return Break.GARBAGE
        return None
