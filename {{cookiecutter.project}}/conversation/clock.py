"""What day it is and what time, for the LLM, which would guess.

It is the last line of the system prompt: what stands before is the same in every call, so that the
LLM's provider still finds it in its cache, and a summary of a long call does not lose it. A tool
would cost the caller another request to the LLM, a second of silence.
"""

from datetime import datetime

import config

# Not by strftime, whose names follow the machine's locale.
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


def instruction(now: datetime | None = None) -> str:
    """Say when the call began: now, or at `now`, a time with a zone; in the zone of TIMEZONE.

    Raises:
        RuntimeError: TIMEZONE is no zone.
    """
    zone = config.timezone()
    at = now.astimezone(zone) if now else datetime.now(zone)
    day = f"{DAYS[at.weekday()]}, {at.day} {MONTHS[at.month - 1]} {at.year}"
    return f"This call began on {day} at {at:%H:%M}, {zone.key} time."
