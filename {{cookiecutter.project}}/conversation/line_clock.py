"""How long something lasts on the line: no longer than the sound that came of it.

A network, a machine or a process stands still now and then, for a second even, and what the caller
said meanwhile comes all at once afterwards. To a clock on the wall they paused for so long, and
their sentence would be answered in the middle.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

# Sound is on its way for some 20 ms, and listened to in pieces of 32 ms. It is not waited for.
DELAY_SECONDS = 0.1
# Of what is missing for so long nothing comes: a microphone was turned off, or sends no silence.
# From then on time alone counts.
MISSING_SECONDS = 1.0
# Between two looks no more than this can be missing. Who looks less often, or is late because
# their process stood still, does not know what the line brings.
LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Moment:
    """A moment of a call.

    Parameters:
        time: Seconds, on any clock.
        heard: Seconds of sound that were listened to by then, or that will not come.
    """

    time: float
    heard: float

    def before(self, seconds: float) -> "Moment":
        """Return the moment so many seconds before this."""
        return Moment(self.time - seconds, self.heard - seconds)

    def since(self, earlier: "Moment") -> float:
        """Return the seconds that the line has lasted since."""
        return min(self.time - earlier.time, self.heard - earlier.heard + DELAY_SECONDS)

    def is_held(self, earlier: "Moment") -> bool:
        """Return whether time has passed since of which no sound was heard yet."""
        return self.since(earlier) < self.time - earlier.time


class LineClock:
    """Tells moments of one call. Whoever waits for one looks again every LOOK_SECONDS."""

    def __init__(
        self,
        listened: Callable[[], float] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Ask `listened` how many seconds of sound were listened to so far, `clock` for seconds.

        Without `listened` time alone counts.
        """
        self._clock = clock
        self._listened = listened or clock
        self._sound = self._listened()
        self._looked_at = clock()
        self._missing = 0.0
        self._lost = 0.0

    def now(self) -> Moment:
        """Look at the clock."""
        now, sound = self._clock(), self._listened()
        waited, came = min(now - self._looked_at, LOOK_SECONDS), sound - self._sound
        self._looked_at, self._sound = now, sound
        self._missing = max(0.0, self._missing + waited - came)
        if self._missing > MISSING_SECONDS:
            self._lost += self._missing
            self._missing = MISSING_SECONDS
        return Moment(now, sound + self._lost)
