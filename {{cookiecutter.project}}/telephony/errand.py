"""Whom the bot calls and why, and whether it may: nobody, until CALL_PREFIXES says who."""

import json
import re
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Self
from zoneinfo import ZoneInfo

from config import setting
from telephony.transfer import E164
from telephony.twilio_auth import HOST, TOKEN_PARAMETER, Gate
from telephony.twiml import NO_XML

# From the request to the stream: waiting in a queue, ringing, a phone tree's digits.
ERRAND_SECONDS = 300
# Where CALL_HOURS does not say: from eight in the morning to eight in the evening.
CALL_HOURS = "08-20"
# Twilio allows name and value of a parameter 500 characters together.
MAX_CHARACTERS = 450

HOURS = re.compile(r"([01]?\d|2[0-3])-([01]?\d|2[0-4])")
PREFIX = re.compile(r"\+[1-9][0-9]{0,14}")
STREAM_URL = re.compile(rf"wss?://({HOST.pattern})(/\S*)?")
# https://www.twilio.com/docs/voice/twiml/play#digits
DIGITS = re.compile(r"[0-9*#w]{0,32}")
# What their network says of a call that was not taken: RFC 3261, section 21; 607 is RFC 8197.
# https://www.twilio.com/docs/api/errors/31603: 603 is to be treated as declined. Most mobile
# networks answer 486 for who presses "decline", as for who is talking.
SIP_ENDINGS = {
    "408": "no-answer",
    "480": "no-answer",
    "486": "busy",
    "600": "busy",
    "603": "declined",
    "607": "declined",
}
DECLINED = "their network says that they declined the call"


class NotPlaced(Exception):
    """No call was placed; the text is a sentence that says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Errand:
    """Whom the bot calls, and why.

    Parameters:
        callee_number: In E.164 form.
        callee_name: As the bot may say it.
        call_reason: What the call is about, such as "your appointment on Friday".
    """

    callee_number: str
    callee_name: str
    call_reason: str

    def fill_in(self, text: str) -> str:
        """Return `text` with name and reason in the places of {name} and {reason}."""
        return text.replace("{name}", self.callee_name).replace("{reason}", self.call_reason)

    def parameters(self, key: str) -> dict[str, str]:
        """The errand as parameters of a stream or a session, with a token that `key` has signed."""
        token = Gate(key).issue(self._text, seconds=ERRAND_SECONDS)
        return {**asdict(self), TOKEN_PARAMETER: token}

    @classmethod
    def of(cls, parameters: Mapping[str, object]) -> Self:
        """The errand that a stream says it is on."""
        return cls(**{one.name: str(parameters.get(one.name, "")) for one in fields(cls)})

    def is_ours(self, parameters: MutableMapping[str, object], gate: Gate | None) -> bool:
        """Whether this bot was sent on this errand by its owner. Takes the token out.

        Args:
            parameters: What the stream brought, or the session's body.
            gate: Of this server. On Pipecat Cloud there is none, and a token may be used again.
        """
        token = str(parameters.pop(TOKEN_PARAMETER, ""))
        auth_token = setting("TWILIO_AUTH_TOKEN")
        gate = gate or (Gate(auth_token) if auth_token else None)
        return gate is not None and gate.lets_in(self._text, token)

    def is_signed(self, parameters: Mapping[str, object], gate: Gate) -> bool:
        """Whether `gate` has signed this errand in `parameters`; it may still be taken then."""
        return gate.knows(self._text, str(parameters.get(TOKEN_PARAMETER, "")))

    @property
    def _text(self) -> str:
        return json.dumps(asdict(self))


def check_values() -> None:
    """Raise RuntimeError where a setting of calls that the bot places is not what it has to be."""
    prefixes()
    hours()
    number = setting("CALL_FROM")
    if number and not E164.fullmatch(number):
        raise RuntimeError(
            "CALL_FROM is the number of your Twilio account that calls, in E.164 form such as "
            f"+4930123456, not {number!r}"
        )
    url = setting("TWILIO_STREAM_URL")
    if url and not STREAM_URL.fullmatch(url):
        raise RuntimeError(f"TWILIO_STREAM_URL is like wss://voice.example.org/ws, not {url!r}")


def prefixes() -> tuple[str, ...]:
    """CALL_PREFIXES, the beginnings of the numbers that may be called.

    Raises:
        RuntimeError: One is no beginning of a number in E.164 form.
    """
    found = tuple(filter(None, map(str.strip, setting("CALL_PREFIXES").split(","))))
    for prefix in found:
        if not PREFIX.fullmatch(prefix):
            raise RuntimeError(
                "CALL_PREFIXES is a list of beginnings of numbers, each with a plus and the "
                f"country's code, such as +4930,+4989; {prefix!r} is none"
            )
    return found


def hours() -> tuple[int, int]:
    """CALL_HOURS, the first hour of the day in which may be called and the one after the last.

    Raises:
        RuntimeError: It is no such pair.
    """
    value = setting("CALL_HOURS", CALL_HOURS)
    if pair := HOURS.fullmatch(value):
        first, last = int(pair[1]), int(pair[2])
        if first < last:
            return first, last
    raise RuntimeError(
        f"CALL_HOURS is like 08-20, hours of one day, the earlier first, not {value!r}"
    )


def check(errand: Errand, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
    """See whether the bot may call this number now.

    Raises:
        NotPlaced: It may not.
    """
    number = errand.callee_number
    if not E164.fullmatch(number):
        raise NotPlaced(
            f"{number} is not in E.164 form: a plus, the country's code and the number without "
            "spaces, such as +4930123456"
        )
    try:
        allowed, (first, last) = prefixes(), hours()
    except RuntimeError as error:
        raise NotPlaced(str(error)) from None
    if not allowed:
        raise NotPlaced(
            "CALL_PREFIXES is empty, so nobody may be called: set it to the beginnings of the "
            "numbers that may be, such as +4930,+4989"
        )
    if not number.startswith(allowed):
        raise NotPlaced(f"{number} begins with none of CALL_PREFIXES ({', '.join(allowed)})")
    for part in (errand.callee_name, errand.call_reason):
        # Of others the stream would bring back something else than was signed.
        if not part.strip() or len(part) > MAX_CHARACTERS or NO_XML.search(part):
            raise NotPlaced(
                f"name and reason are needed, up to {MAX_CHARACTERS} characters each, and none of "
                "control"
            )
    # In every zone the number may be in: those of a mobile phone can be many.
    for zone in zones(number):
        there = now().astimezone(ZoneInfo(zone))
        if not first <= there.hour < last:
            raise NotPlaced(
                f"it is {there:%H:%M} in {zone}, and CALL_HOURS allows calls from {first}:00 to "
                f"{last}:00 there"
            )


def usual_transport() -> str:
    """Who calls where nobody says: Twilio, where the project does not have Daily's key alone."""
    return "daily" if setting("DAILY_API_KEY") and not setting("TWILIO_ACCOUNT_SID") else "twilio"


def zones(number: str) -> tuple[str, ...]:
    """The time zones in which a number in E.164 form may be.

    Raises:
        NotPlaced: No country has such a number, or what knows them is not installed.
    """
    try:
        import phonenumbers
        from phonenumbers import timezone
    except ImportError:
        raise NotPlaced("calling out needs one more package: uv sync --extra dialout") from None
    try:
        parsed = phonenumbers.parse(number)
    except phonenumbers.NumberParseException:
        raise NotPlaced(f"{number} has no country's code that is in use") from None
    if not phonenumbers.is_possible_number(parsed):
        raise NotPlaced(f"{number} is too short or too long for a number of its country")
    known = timezone.time_zones_for_number(parsed)
    return tuple(zone for zone in known if zone != "Etc/Unknown") or ("UTC",)
