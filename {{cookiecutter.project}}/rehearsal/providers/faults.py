"""What can go wrong with a provider: switches of the same servers, set before or during a call.

Two more faults are actions of a server rather than switches: `drop()` cuts its live connections,
`refuse()` closes its listener until `accept()`.
"""

import sys
from dataclasses import dataclass

ALWAYS = sys.maxsize
"""For the counted switches: every request from now on."""


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
        slow_s: Seconds by which every answer is late.
        cuts: How many of the next answers break off in the middle, with the connection.
    """

    wrong_key: bool = False
    rate_limited: int = 0
    retry_after_s: float | None = None
    server_errors: int = 0
    hang: bool = False
    slow_s: float = 0.0
    cuts: int = 0

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

    def cut(self) -> bool:
        """Whether this answer shall break off in the middle, and count it."""
        if self.cuts > 0:
            self.cuts -= 1
            return True
        return False
