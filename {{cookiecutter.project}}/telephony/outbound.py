"""Calls a person by Twilio, and follows what becomes of the call.

    python -m telephony call +4930123456 --name Ann --reason "your appointment on Friday"

One request asks Twilio to call and brings the TwiML that connects whoever picks up with the running
bot. With it goes the errand (errand.py), signed, so the bot knows whom it has on the line, and why.
A call that nobody picked up never reaches the bot: its record is written here, by the bot's server,
which Twilio tells of the end, or where Twilio reaches none, by who asks how the call stands.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import httpx

from config import setting
from roark import RoarkObserver
from telephony import twilio_rest, twiml
from telephony.errand import (
    DECLINED,
    DIGITS,
    SIP_ENDINGS,
    Errand,
    NotPlaced,
    check,
)
from telephony.transfer import E164
from telephony.twilio_auth import HOST, is_sid

# Twilio lets it ring for so long, voicemail comes in sooner: after some 25 s.
RING_SECONDS = 30
REQUEST_SECONDS = 10.0
ASK_EVERY_SECONDS = 1.0
# How often in a row Twilio may not answer before nobody watches the call any more.
UNANSWERED = 10

# As in the TwiML of `python -m deploy twiml`; of another region by TWILIO_STREAM_URL.
CLOUD_STREAM_URL = "wss://api.pipecat.daily.co/ws/twilio"

# Where Twilio comes with the end of a call, on a server whose public name is known.
STATUS_PATH = "/calls/status"
# What Twilio's end of a call means that never reached the bot.
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
        self._status_url = f"https://{name}{STATUS_PATH}" if name else ""
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

    @property
    def server_is_told(self) -> bool:
        """Whether Twilio tells the bot's server how a call ended, which then writes its record."""
        return bool(self._status_url)

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
        if self._status_url:
            form["StatusCallback"] = self._status_url
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
        """Tell how a call goes until it is over.

        Cancelled while it rings, the call is taken back. The record of one that nobody took is
        written where no server is told of it.

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
                await self._keep(call_sid, errand, "canceled")
            raise
        if unanswered:
            self._tell("Twilio does not say how the call stands; it may go on.")
            return status
        if status not in NOT_REACHED:
            return status
        await self._keep(call_sid, errand, status)
        return NOT_REACHED[status][0]

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

    async def _keep(self, call_sid: str, errand: Errand, status: str) -> None:
        if not self.server_is_told:
            end = {"CallSid": call_sid, "CallStatus": status}
            numbers = {"From": self._from_number, "To": errand.callee_number}
            await keep(self._agent, {**end, **numbers})

    async def _ask(
        self, method: str, call: str, form: Mapping[str, str] | None = None
    ) -> httpx.Response:
        path = f"Calls{quote(call)}.json"
        return await twilio_rest.request(method, path, form, seconds=REQUEST_SECONDS)


async def keep(agent: str, end: Mapping[str, str]) -> None:
    """Write the record of a call that never had a pipeline, and deliver it; nothing of others.

    Args:
        agent: The bot's name.
        end: What Twilio says of it, by the names of its status callback: CallSid, CallStatus, From,
            To and perhaps SipResponseCode.
            https://www.twilio.com/docs/voice/api/call-resource#statuscallback
    """
    status, sip_code = end.get("CallStatus", ""), end.get("SipResponseCode", "")
    if status not in NOT_REACHED or not is_sid(end.get("CallSid"), "CA"):
        return
    reason, detail = NOT_REACHED[status]
    if reason != "cancelled" and SIP_ENDINGS.get(sip_code) == "declined":
        reason, detail = "declined", DECLINED
    roark = RoarkObserver(
        api_key=setting("ROARK_API_KEY"),
        agent_id=agent,
        agent_name=agent,
        pipecat_call_id=end["CallSid"],
        runner_args=SimpleNamespace(
            call_data={
                "from_number": end.get("From", ""),
                "to_number": end.get("To", ""),
                "call_id": end["CallSid"],
            }
        ),
    )
    roark.annotate(direction="outbound", transport="twilio")
    if sip_code:
        roark.annotate(sip_response_code=sip_code)
    roark.note_ending(reason, detail)
    await roark.aflush(reason=reason)


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
