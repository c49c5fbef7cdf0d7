"""The numbers of this process for Prometheus, at http://127.0.0.1:METRICS_PORT/metrics.

Only where METRICS_PORT is set, and only for this machine: calls in progress and refused, how calls
ended, how long callers waited for answers, what Roark does not have yet; and what the client
library tells of every process, its memory, processor time and open files.
"""

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

from config import setting
from host import calls
from roark import folder
from roark.catalog import Catalog

if TYPE_CHECKING:
    from roark import RoarkObserver

LOOPBACK = "127.0.0.1"
# An answer is good below a second, and the bot says a word after six.
RESPONSE_BUCKETS = (0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 8.0, 15.0)
# Looking through all folders is work, for which the calls in progress stand still.
LOOK_SECONDS = 60.0


def serve() -> Callable[[], object]:
    """Answer Prometheus from now on, where METRICS_PORT is set; returns what ends that.

    Raises:
        SystemExit: METRICS_PORT is no free port, or the client library is not installed.
    """
    if not setting("METRICS_PORT"):
        return lambda: None
    try:
        from prometheus_client import start_http_server
    except ModuleNotFoundError:
        raise SystemExit("METRICS_PORT is set: run uv sync --extra metrics") from None
    port = setting("METRICS_PORT")
    try:
        server, _ = start_http_server(int(port), addr=LOOPBACK)
    except (ValueError, OSError, OverflowError):
        raise SystemExit(
            f"METRICS_PORT is a free port of this machine, which {port} is not"
        ) from None
    _numbers()
    logger.info(f"Numbers for Prometheus at http://{LOOPBACK}:{server.server_port}/metrics")
    return server.shutdown


def call_ended(roark: "RoarkObserver") -> None:
    """Count a call that is over; where the import was changed to the published observer, nothing.

    Its record has the reason and, for each answer, how long the caller waited.
    """
    record = getattr(roark, "record", None)
    if not setting("METRICS_PORT") or record is None:
        return
    ended, response = _numbers()
    known = record.as_dict()
    ended.labels(known["ending"]["reason"]).inc()
    for turn in known["turns"]:
        if latency := turn.get("latency"):
            response.observe(latency["total_ms"] / 1000)


@cache
def _numbers() -> tuple[Any, Any]:
    """Once per process: the counter of endings and the histogram of response times."""
    from prometheus_client import Counter, Gauge, Histogram

    Gauge("bot_calls", "Calls in progress.").set_function(lambda: len(calls.of_process))
    Gauge("bot_calls_refused", "Calls that found every line busy.").set_function(
        lambda: calls.of_process.refused
    )
    waiting = Undelivered(Path(setting("CALLS_DIR") or "calls"))
    Gauge("bot_calls_undelivered", "Closed calls that Roark does not have whole.").set_function(
        waiting.count
    )
    return (
        Counter("bot_calls_ended", "Calls that are over, by what ended them.", ["reason"]),
        Histogram(
            "bot_response_seconds",
            "From a caller's last sound to the answer's first.",
            buckets=RESPONSE_BUCKETS,
        ),
    )


class Undelivered:
    """How many calls in a directory are over and not delivered whole."""

    def __init__(self, directory: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Look through `directory` when asked, at most once in LOOK_SECONDS of `clock`."""
        self._directory = directory
        self._catalog = Catalog(directory)
        self._clock = clock
        self._counted: tuple[float, int] | None = None

    def count(self) -> int:
        """As of the last look; what cannot be read counts, for nobody will have it."""
        now = self._clock()
        if self._counted is None or now - self._counted[0] >= LOOK_SECONDS:
            names = folder.call_names(self._directory, known=self._catalog.names)
            self._counted = (now, sum(map(self._is_due, names)))
        return self._counted[1]

    def _is_due(self, name: str) -> bool:
        if self._catalog.settled(name):
            return False
        try:
            call = self._catalog.look(name)
        except (OSError, folder.Unreadable):
            return True
        if isinstance(call, folder.Folder):
            return bool(call.destinations) and not call.lock.is_taken
        return bool(call.left)
