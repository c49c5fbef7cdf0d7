"""Calls a person: whom and why, whether that is allowed, and what becomes of the call.

    python -m telephony call +4930123456 --name Ann --reason "your appointment on Friday"

One request asks Twilio to call and brings the TwiML that connects whoever picks up with the running
bot. With it goes the errand, signed, so the bot knows whom it has on the line, and why. From there
on Twilio is asked how the call stands. A call that nobody picked up never reaches the bot: its
record is written here.

Nobody may be called until CALL_PREFIXES says who.
"""

import asyncio
import hmac
import json
import re
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote
from xml.sax.saxutils import quoteattr
from zoneinfo import ZoneInfo

import httpx
from loguru import logger

from config import setting
from roark import RoarkObserver
from telephony import twilio_rest, twiml
from telephony.twilio_auth import TOKEN_PARAMETER, Gate, is_sid

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

# Twilio lets it ring for so long, voicemail comes in sooner: after some 25 s.
RING_SECONDS = 30
# From the request to the stream: waiting in Twilio's queue, ringing, a phone tree's digits.
ERRAND_SECONDS = 300
REQUEST_SECONDS = 10.0
ASK_EVERY_SECONDS = 1.0
# How often in a row Twilio may not answer before nobody watches the call any more.
UNANSWERED = 10
# Where CALL_HOURS does not say: from eight in the morning to eight in the evening.
CALL_HOURS = "08-20"

# As in the TwiML of `python -m deploy twiml`; of another region by TWILIO_STREAM_URL.
CLOUD_STREAM_URL = "wss://api.pipecat.daily.co/ws/twilio"

E164 = re.compile(r"\+[1-9]\d{6,14}")
HOURS = re.compile(r"([01]?\d|2[0-3])-([01]?\d|2[0-4])")
HOST = re.compile(r"[\w.-]+(:\d+)?")
# https://www.twilio.com/docs/voice/twiml/play#digits
DIGITS = re.compile(r"[0-9*#w]{0,32}")
# Twilio allows name and value of a parameter 500 characters together.
MAX_CHARACTERS = 450
# What Twilio's end of a call means that never reached the bot. Who presses "decline" is busy, or
# does not answer: networks do not tell.
NOT_REACHED = {
    "busy": ("busy", "the line was busy, or the call was rejected"),
    "no-answer": ("no-answer", f"nobody picked up within {RING_SECONDS} s"),
    "failed": ("failed", "the number could not be reached"),
    "canceled": ("cancelled", "taken back while it rang"),
}

TWIML = """<?xml version="1.0" encoding="UTF-8"?>
<Response>{digits}
  <Connect>
    <Stream url={url}>{parameters}
    </Stream>
  </Connect>
</Response>"""


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

    def parameters(self, auth_token: str) -> dict[str, str]:
        """The errand as parameters of a stream, with the token that only this bot can have made."""
        token = Gate(auth_token).issue(self._text, seconds=ERRAND_SECONDS)
        return {**asdict(self), TOKEN_PARAMETER: token}

    @classmethod
    def of(cls, parameters: Mapping[str, object]) -> Self:
        """The errand that a stream says it is on."""
        return cls(**{one.name: str(parameters.get(one.name, "")) for one in fields(cls)})

    def is_ours(self, parameters: MutableMapping[str, object], gate: Gate | None) -> bool:
        """Whether this bot sent the stream on this errand. Takes the token out of `parameters`.

        Args:
            parameters: What the stream brought.
            gate: Of this server. On Pipecat Cloud there is none, and a token may be used again.
        """
        token = str(parameters.pop(TOKEN_PARAMETER, ""))
        auth_token = setting("TWILIO_AUTH_TOKEN")
        gate = gate or (Gate(auth_token) if auth_token else None)
        return gate is not None and gate.lets_in(self._text, token)

    @property
    def _text(self) -> str:
        return json.dumps(asdict(self))


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
    prefixes = [prefix.strip() for prefix in setting("CALL_PREFIXES").split(",") if prefix.strip()]
    if not prefixes:
        raise NotPlaced(
            "CALL_PREFIXES is empty, so nobody may be called: set it to the beginnings of the "
            "numbers that may be, such as +4930,+4989"
        )
    if not number.startswith(tuple(prefixes)):
        raise NotPlaced(f"{number} begins with none of CALL_PREFIXES ({', '.join(prefixes)})")
    for part in (errand.callee_name, errand.call_reason):
        if not part.strip() or len(part) > MAX_CHARACTERS:
            raise NotPlaced(f"name and reason are needed, up to {MAX_CHARACTERS} characters each")
    hours = HOURS.fullmatch(setting("CALL_HOURS", CALL_HOURS))
    if not hours:
        raise NotPlaced(f"CALL_HOURS is like 08-20, hours of the day, not {setting('CALL_HOURS')}")
    first, last = map(int, hours.groups())
    # In every zone the number may be in: those of a mobile phone can be many.
    for zone in zones(number):
        there = now().astimezone(ZoneInfo(zone))
        if not first <= there.hour < last:
            raise NotPlaced(
                f"it is {there:%H:%M} in {zone}, and CALL_HOURS allows calls from {first}:00 to "
                f"{last}:00 there"
            )


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


class Outbound:
    """Places calls by Twilio's REST API and follows them."""

    def __init__(
        self,
        *,
        agent: str,
        host: str = "",
        cloud_agent: str = "",
        tell: Callable[[str], None],
        ask_every_seconds: float = ASK_EVERY_SECONDS,
    ) -> None:
        """Check what every call needs.

        Args:
            agent: The bot's name, for the record of a call that never reached it.
            host: The public name of the running bot's server; blank for TWILIO_STREAM_URL.
            cloud_agent: The bot's name at Pipecat Cloud, AGENT.ORGANIZATION, where it runs there.
            tell: Is given the progress, a sentence at a time, without a number.
            ask_every_seconds: How often Twilio is asked how a call stands.

        Raises:
            NotPlaced: Something is missing.
        """
        self._agent = agent
        self._tell = tell
        self._ask_every_seconds = ask_every_seconds
        name = host.rpartition("://")[2].strip("/")
        if name and not HOST.fullmatch(name):
            raise NotPlaced(f"the host is a name such as voice.example.org, not {host!r}")
        self._cloud_agent = cloud_agent
        there = CLOUD_STREAM_URL if cloud_agent else ""
        self._stream_url = f"wss://{name}/ws" if name else setting("TWILIO_STREAM_URL", there)
        if not self._stream_url:
            raise NotPlaced(
                "the bot's public host is missing: --webhook-host voice.example.org, the name that "
                "`python bot.py -t twilio -x` was given, or TWILIO_STREAM_URL"
            )
        self._auth_token = setting("TWILIO_AUTH_TOKEN")
        if not (is_sid(setting("TWILIO_ACCOUNT_SID"), "AC") and self._auth_token):
            raise NotPlaced(
                "calling out needs TWILIO_ACCOUNT_SID (AC and 32 digits) and TWILIO_AUTH_TOKEN, "
                "in the environment or in .env"
            )
        self._from_number = setting("CALL_FROM")
        if not E164.fullmatch(self._from_number):
            raise NotPlaced(
                "CALL_FROM is the number of your Twilio account that calls, in E.164 form such as "
                f"+4930123456, not {self._from_number!r}"
            )

    async def place(self, errand: Errand, *, digits: str = "") -> str:
        """Have Twilio call; returns the call's id. It is tried once.

        Args:
            errand: Whom and why.
            digits: Keys pressed once it is answered, for a phone tree on the way: 0-9, * and #,
                and w for half a second's wait. They are played before the bot hears anything.

        Raises:
            NotPlaced: It may not be called now, or Twilio did not take the call.
        """
        check(errand)
        if not DIGITS.fullmatch(digits):
            raise NotPlaced("digits are up to 32 of 0-9, *, # and w, half a second's wait")
        form = {
            "To": errand.callee_number,
            "From": self._from_number,
            "Timeout": str(RING_SECONDS),
            "Twiml": self._twiml(errand, digits),
        }
        try:
            response = await self._ask("POST", "", form)
        except (httpx.HTTPError, TimeoutError) as error:
            raise NotPlaced(
                f"Twilio did not answer ({type(error).__name__}); whether it rings is not known, "
                "and it was not tried again"
            ) from error
        answer = _object(response)
        if response.is_error or not is_sid(answer.get("sid"), "CA"):
            raise NotPlaced(
                f"Twilio refused the call with {response.status_code}: "
                f"{answer.get('message', 'no reason')} (code {answer.get('code', 'unknown')})"
            )
        return str(answer["sid"])

    async def follow(self, call_sid: str, errand: Errand) -> str:
        """Tell how a call goes until it is over, and write the record of one that nobody took.

        Cancelled while it rings, the call is taken back.

        Returns:
            How it ended: "completed" where the bot had it, else one of roark.call.ENDINGS.
        """
        status, unanswered = "queued", 0
        try:
            while status not in ("completed", *NOT_REACHED) and unanswered < UNANSWERED:
                await asyncio.sleep(self._ask_every_seconds)
                latest = ""
                with suppress(httpx.HTTPError, TimeoutError):
                    latest = str(_object(await self._ask("GET", f"/{call_sid}")).get("status", ""))
                unanswered = 0 if latest else unanswered + 1
                if latest and latest != status:
                    status = latest
                    self._tell(PROGRESS.get(status, status))
        except asyncio.CancelledError:
            if status in ("queued", "initiated", "ringing"):
                await self._take_back(call_sid)
                await self._keep(call_sid, errand, *NOT_REACHED["canceled"])
            raise
        if unanswered:
            self._tell("Twilio does not say how the call stands; it may go on.")
            return status
        if status not in NOT_REACHED:
            return status
        reason, detail = NOT_REACHED[status]
        await self._keep(call_sid, errand, reason, detail)
        return reason

    def _twiml(self, errand: Errand, digits: str) -> str:
        parameters = {
            **errand.parameters(self._auth_token),
            "from_number": self._from_number,
            "to_number": errand.callee_number,
        }
        if self._cloud_agent:
            parameters["_pipecatCloudServiceHost"] = self._cloud_agent
        return TWIML.format(
            digits=f'\n  <Play digits="{digits}" />' if digits else "",
            url=quoteattr(self._stream_url),
            parameters=twiml.parameters(parameters),
        )

    async def _take_back(self, call_sid: str) -> None:
        with suppress(httpx.HTTPError, TimeoutError):
            await self._ask("POST", f"/{call_sid}", {"Status": "canceled"})
            self._tell("The call is taken back.")

    async def _keep(self, call_sid: str, errand: Errand, reason: str, detail: str) -> None:
        """Write the record of a call that never had a pipeline, and deliver it."""
        roark = RoarkObserver(
            api_key=setting("ROARK_API_KEY"),
            agent_id=self._agent,
            agent_name=self._agent,
            pipecat_call_id=call_sid,
            runner_args=SimpleNamespace(
                call_data={
                    "from_number": self._from_number,
                    "to_number": errand.callee_number,
                    "call_id": call_sid,
                }
            ),
        )
        roark.annotate(direction="outbound", transport="twilio")
        roark.note_ending(reason, detail)
        await roark.aflush(reason=reason)

    async def _ask(
        self, method: str, call: str, form: Mapping[str, str] | None = None
    ) -> httpx.Response:
        path = f"Calls{quote(call)}.json"
        return await twilio_rest.request(method, path, form, seconds=REQUEST_SECONDS)


PROGRESS = {
    "initiated": "Twilio dials.",
    "ringing": "It rings.",
    "in-progress": "Picked up.",
    "completed": "The call is over.",
    "busy": "Busy, or rejected.",
    "no-answer": f"Nobody picked up within {RING_SECONDS} s.",
    "failed": "The number could not be reached.",
    "canceled": "Taken back.",
}


def _object(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of a response; an empty one where it holds none."""
    with suppress(ValueError):
        answer = response.json()
        if isinstance(answer, dict):
            return answer
    return {}


def serve(app: "FastAPI", *, agent: str, busy: Callable[[str], str]) -> None:
    """Let whoever has CALL_API_KEY place calls by `POST /calls`.

    The body is a JSON object with `to`, `name`, `reason` and perhaps `digits`; the answer holds the
    call's `sid`, or a sentence as `detail`.

    Args:
        app: Pipecat's development server, before it starts, behind twilio_auth's gate.
        agent: The bot's name.
        busy: Says why no call with this number can be held now; empty where it can.
    """
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    following: set[asyncio.Task[str]] = set()

    def answer(status: int, **body: str) -> "Response":
        return JSONResponse(body, status)

    async def place(request: "Request") -> "Response":
        given = request.headers.get("Authorization", "").encode()
        wanted = f"Bearer {setting('CALL_API_KEY')}".encode()
        if not hmac.compare_digest(given, wanted):
            return answer(401, detail="Placing a call needs Authorization: Bearer CALL_API_KEY.")
        try:
            asked = await request.json()
            to, name, reason, digits = (
                str(asked.get(key, "")) for key in ("to", "name", "reason", "digits")
            )
        except (ValueError, AttributeError):
            return answer(400, detail="The body is a JSON object with to, name and reason.")
        errand = Errand(callee_number=to, callee_name=name, call_reason=reason)
        if refusal := busy(to):
            return answer(503, detail=refusal)
        try:
            host = getattr(app.state, "twilio_host", "")
            outbound = Outbound(agent=agent, host=host, tell=lambda text: logger.info(text))
            sid = await outbound.place(errand, digits=digits)
        except NotPlaced as refusal:
            return answer(422, detail=f"{refusal}.")
        task = asyncio.create_task(outbound.follow(sid, errand))
        following.add(task)
        task.add_done_callback(following.discard)
        return answer(201, sid=sid)

    app.router.routes.append(Route("/calls", place, methods=["POST"]))
