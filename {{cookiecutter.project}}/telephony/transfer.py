"""Hands a phone call over to a person, and takes it back where nobody answers.

TRANSFER_TO names who may be called, as `name=+E.164` pairs; the LLM chooses a name, never a number.
Twilio is given new instructions for the call: dial the person, and if that came to nothing connect
the caller with the bot again. With these goes a note, signed, that says what the call was about:
the bot that the caller comes back to may be another process.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import re
import ssl
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Protocol, Self
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import httpx
from loguru import logger

from config import setting

if TYPE_CHECKING:
    from telephony.media_stream import MediaStreamSerializer

# How long it rings at the person's. https://www.twilio.com/docs/voice/twiml/dial#timeout
RING_SECONDS = 20
# Who comes back later than this after the ringing has been answered: Twilio goes on in its
# instructions after every call, and a call that was held is over.
RETURN_SECONDS = 15.0
# For Twilio's answer, within services.TOOL_TIMEOUT_SECONDS.
REQUEST_SECONDS = 4.0
# Twilio allows name and value of a parameter 500 characters together.
MAX_NOTE_CHARACTERS = 450
NOTE, SIGNATURE = "transfer_note", "transfer_signature"
TWILIO_API = "https://api.twilio.com"

PERSON = re.compile(r"\s*([\w-]+)\s*=\s*(\+[1-9]\d{6,14})\s*")
TWIML = """<?xml version="1.0" encoding="UTF-8"?>
<Response>
  <Dial timeout="{seconds}" answerOnBridge="true">{number}</Dial>
  <Connect>
    <Stream url={url}>
{parameters}
    </Stream>
  </Connect>
</Response>"""


class NotTransferred(Exception):
    """The call could not be handed over; it goes on. The text says why, without a number."""


class Transfer(Protocol):
    """How the call on one line is handed over."""

    async def to(self, name: str, summary: str) -> None:
        """Hand the call over to `name` of TRANSFER_TO; raises NotTransferred."""
        ...

    async def done_to(self) -> str | None:
        """Who has been given the call; None for nobody. Waits for a transfer under way."""
        ...

    def fail_over(self) -> str | None:
        """Let the call's own instructions go on when it ends: to whom, None where to nobody."""
        ...


def people() -> dict[str, str]:
    """The numbers of TRANSFER_TO, by name.

    Raises:
        RuntimeError: TRANSFER_TO is no list of names and numbers.
    """
    found: dict[str, str] = {}
    for pair in filter(str.strip, setting("TRANSFER_TO").split(",")):
        person = PERSON.fullmatch(pair)
        if person is None:
            raise RuntimeError(
                "TRANSFER_TO is a list such as reception=+4930123456,doctor=+4930123457, its "
                f"numbers in E.164 form; the entry for {pair.partition('=')[0].strip()!r} is not"
            )
        found[person[1]] = person[2]
    return found


def failover() -> tuple[str, str] | None:
    """The name and number of TRANSFER_ON_FAILURE, one of TRANSFER_TO; None where it is blank.

    Raises:
        RuntimeError: TRANSFER_TO has no such name.
    """
    name = setting("TRANSFER_ON_FAILURE")
    if not name:
        return None
    number = people().get(name)
    if number is None:
        raise RuntimeError(f"TRANSFER_ON_FAILURE is a name of TRANSFER_TO, and {name!r} is not")
    return name, number


def failover_twiml() -> str:
    """What follows `<Connect>` in a call's TwiML: Twilio comes to it if nobody has hung up.

    So it does when the whole process is gone; a call that ends as it should is hung up by the bot,
    for which both credentials are needed.
    """
    person = failover()
    if person is None or not (setting("TWILIO_ACCOUNT_SID") and setting("TWILIO_AUTH_TOKEN")):
        return ""
    return f'\n  <Dial timeout="{RING_SECONDS}">{person[1]}</Dial>'


@dataclass(frozen=True)
class Note:
    """What is known of a call that comes back to the bot after a transfer that came to nothing.

    Parameters:
        call_sid: The call.
        name: Who did not answer.
        summary: What the call was about, as the LLM put it.
        at: When the person was dialled, Unix seconds.
    """

    call_sid: str
    name: str
    summary: str
    at: float

    def sign(self, key: str) -> dict[str, str]:
        """Return the note as parameters of a stream; its summary is cut to what fits in there."""
        summary = self.summary
        while True:
            note = [self.call_sid, self.name, summary, round(self.at)]
            content = json.dumps(note, ensure_ascii=False)
            packed = base64.urlsafe_b64encode(content.encode()).decode()
            if len(packed) <= MAX_NOTE_CHARACTERS:
                return {NOTE: packed, SIGNATURE: _signature(packed, key)}
            summary = summary[: len(summary) * 9 // 10]

    @classmethod
    def take(cls, parameters: MutableMapping[str, object], call_sid: str, key: str) -> Self | None:
        """Take a note out of a stream's parameters; None without one of this bot, on this call.

        Args:
            parameters: What the stream brought.
            call_sid: The call that the stream says it belongs to.
            key: What the note has to be signed with.
        """
        packed = str(parameters.pop(NOTE, ""))
        signature = str(parameters.pop(SIGNATURE, ""))
        if not (
            key
            and packed
            and hmac.compare_digest(_signature(packed, key).encode(), signature.encode())
        ):
            return None
        note = cls(*json.loads(base64.urlsafe_b64decode(packed)))
        return note if note.call_sid == call_sid else None

    @property
    def is_of_a_call_held(self) -> bool:
        """Whether the person must have answered: it did not ring for so long."""
        return time.time() - self.at > RING_SECONDS + RETURN_SECONDS

    @property
    def instruction(self) -> str:
        """What the LLM is told of it."""
        return (
            f"The caller comes back to you: {self.name} could not be reached. What they had told "
            f"you: {self.summary} Say so, and ask what you can do instead, for example take a "
            "message. Do not greet them again."
        )


def _signature(text: str, key: str) -> str:
    return hmac.digest(key.encode(), text.encode(), hashlib.sha256).hex()


class TwilioTransfer:
    """Hands one of Twilio's calls over, by a change of its instructions."""

    def __init__(
        self,
        *,
        call_sid: str,
        stream_url: str,
        parameters: Mapping[str, object],
        line: "MediaStreamSerializer",
        has_failover: bool,
    ) -> None:
        """Prepare for the call `call_sid`.

        Args:
            call_sid: Checked to be one of Twilio's ids.
            stream_url: Where the caller comes back to, `wss://…/ws`.
            parameters: What the stream of this call brought, for the next one.
            line: What must not hang up on a caller who has been handed over.
            has_failover: Whether the call's instructions go on with TRANSFER_ON_FAILURE.
        """
        self._call_sid = call_sid
        self._account_sid = setting("TWILIO_ACCOUNT_SID")
        self._auth_token = setting("TWILIO_AUTH_TOKEN")
        self._stream_url = stream_url
        self._parameters = {name: str(value) for name, value in parameters.items()}
        self._line = line
        self._has_failover = has_failover
        self._request: asyncio.Task[None] | None = None
        self._name = ""

    async def to(self, name: str, summary: str) -> None:
        """Hand the call over to `name` of TRANSFER_TO.

        Raises:
            NotTransferred: There is no such person, or Twilio did not take the instructions.
        """
        number = people().get(name)
        if number is None:
            raise NotTransferred(f"there is no {name!r}; there is {', '.join(people())}")
        note = Note(self._call_sid, name, summary, time.time()).sign(self._auth_token)
        parameters = "\n".join(
            f"      <Parameter name={quoteattr(key)} value={quoteattr(value)} />"
            for key, value in {**self._parameters, **note}.items()
        )
        twiml = TWIML.format(
            seconds=RING_SECONDS,
            number=number,
            url=quoteattr(self._stream_url),
            parameters=parameters,
        )
        self._name = name
        # The stream closes as soon as Twilio has read this; hanging up then would be on them both.
        self._line.can_hang_up = False
        self._request = asyncio.create_task(self._update(twiml))
        try:
            await asyncio.shield(self._request)
        except NotTransferred:
            self._line.can_hang_up = True
            raise

    async def done_to(self) -> str | None:
        """Who has been given the call; None for nobody. Waits for a transfer under way."""
        if self._request is None:
            return None
        await asyncio.wait([self._request])
        return None if self._request.exception() else self._name

    def fail_over(self) -> str | None:
        """Let the call's own instructions go on when it ends: to whom, None where to nobody."""
        person = failover() if self._has_failover else None
        if person is None:
            return None
        self._line.can_hang_up = False
        return person[0]

    async def _update(self, twiml: str) -> None:
        address = (
            f"{setting('TWILIO_BASE_URL', TWILIO_API)}/2010-04-01/Accounts/"
            f"{quote(self._account_sid)}/Calls/{quote(self._call_sid)}.json"
        )
        try:
            tls = await asyncio.to_thread(_tls_context)
            login = httpx.BasicAuth(self._account_sid, self._auth_token)
            # The timeout of httpx is for each step; this one is for the whole.
            async with (
                asyncio.timeout(REQUEST_SECONDS),
                httpx.AsyncClient(verify=tls, auth=login) as http,
            ):
                response = await http.post(address, data={"Twiml": twiml})
        except (httpx.HTTPError, TimeoutError) as error:
            logger.warning(f"A transfer did not reach Twilio: {type(error).__name__}")
            raise NotTransferred("the telephone network did not answer") from error
        if response.is_error:
            logger.warning(f"Twilio refused a transfer with {response.status_code}")
            raise NotTransferred("the telephone network refused it")


@cache
def _tls_context() -> ssl.SSLContext:
    """Made once and in a thread: reading all certificates would hold up every call for 100 ms."""
    return httpx.create_ssl_context()


def ending_of(name: str) -> tuple[str, str]:
    """The reason, one of roark.call.ENDINGS, and its detail, once `name` has been given a call."""
    return "transferred", f"handed over to {name}"


def instruction() -> str:
    """What the prompt says of the people; empty where there is nobody."""
    names = ", ".join(people())
    return (
        f"You can hand a phone call over with the transfer_call tool, to: {names}. Ask first."
        if names
        else ""
    )
