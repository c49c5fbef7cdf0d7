"""Hands a phone call over to a person, and takes it back where nobody answers.

TRANSFER_TO names who may be called, as `name=+E.164` pairs; the LLM chooses a name, never a number.
Twilio is given new instructions for the call: dial the person, tell them in a sentence or two what
it is about, and where they do not answer connect the caller with the bot again. What the call was
about travels with these as a note: the bot that the caller comes back to may be another process.
The note is sealed, for addresses end up in the access logs of every proxy on the way, and it lets
nobody in: that takes a token (twilio_auth.py). What is sealed for an address no stream can bring.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import re
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self
from urllib.parse import quote
from xml.sax.saxutils import escape, quoteattr

from loguru import logger

import config
from config import setting
from telephony import twilio_rest, twiml

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

    from telephony.media_stream import MediaStreamSerializer

# How long it rings at the person's. https://www.twilio.com/docs/voice/twiml/dial#timeout
RING_SECONDS = 20
# For Twilio's answer, within services.TOOL_TIMEOUT_SECONDS.
REQUEST_SECONDS = 4.0
# How long a stream may bring a note: it rings, and Twilio takes its time before and after that. Who
# comes back later has talked to the person.
NOTE_SECONDS = 120
# Twilio allows name and value of a parameter 500 characters together.
MAX_NOTE_CHARACTERS = 480
# Of the TwiML in a request it takes 4000; there are two addresses in it.
MAX_TWIML_CHARACTERS, MAX_ADDRESS_CHARACTERS = 4000, 1200
NOTE = "transfer_note"
# As Twilio names what a call over a SIP trunk brings, and a stream's parameters after it.
SIP_HEADER = "SipHeader_"
# Where Twilio comes, on a server whose public name is known: with what became of the transfer, and
# for what the person is told before they are connected.
OUTCOME_PATH, WHISPER_PATH = "/transfer/outcome", "/transfer/whisper"

# What came of it, as Twilio has it (DialCallStatus), in words for the LLM.
OUTCOMES = {
    "busy": "the line of {name} is busy",
    "no-answer": "{name} did not answer",
    "failed": "the call to {name} could not be put through",
}
ANSWERED = ("completed", "answered", "in-progress")
# For <Say>. https://www.twilio.com/docs/voice/twiml/say/text-speech
VOICES = {
    **{"de": "de-DE", "en": "en-US", "es": "es-ES", "fr": "fr-FR"},
    **{"it": "it-IT", "ja": "ja-JP", "nl": "nl-NL", "pt": "pt-PT"},
}

# Of a session's telephone: ids in its body, which whoever starts one can write.
DAILY_ID = re.compile(r"[\w.@:+-]{1,200}")
# Where a note travels: in the address of a request that Twilio signs, or in a stream's parameters.
Place = Literal["address", "stream"]

E164 = re.compile(r"\+[1-9][0-9]{6,14}")
PERSON = re.compile(rf"\s*([\w-]+)\s*=\s*({E164.pattern})\s*")
TWIML = """<?xml version="1.0" encoding="UTF-8"?>
<Response>
  <Dial timeout="{seconds}" answerOnBridge="true"{action}>
    <Number{whisper}>{number}</Number>
  </Dial>{then}
</Response>"""
# Where Twilio goes after any <Dial> without an `action`.
COME_BACK = """
  <Connect>
    <Stream url={url}>{parameters}
    </Stream>
  </Connect>"""
HANG_UP = """<?xml version="1.0" encoding="UTF-8"?>
<Response>
  <Hangup />
</Response>"""
WHISPER = """<?xml version="1.0" encoding="UTF-8"?>
<Response>
  <Say language="{language}">{text}</Say>
</Response>"""
# A mailbox presses nothing: Twilio hangs up on it, and the caller comes back. A key that is pressed
# is sent to the address of this document. https://www.twilio.com/docs/voice/twiml/gather
WHISPER_AND_ASK = """<?xml version="1.0" encoding="UTF-8"?>
<Response>
  <Gather numDigits="1" timeout="{seconds}">
    <Say language="{language}">{text} {press}</Say>
  </Gather>
  <Hangup />
</Response>"""
CONNECT = """<?xml version="1.0" encoding="UTF-8"?>
<Response />"""
KEY_SECONDS = 8
PRESS = {
    "de": "Drücken Sie eine Taste, um das Gespräch anzunehmen.",
    "en": "Press any key to take the call.",
    "es": "Pulse cualquier tecla para aceptar la llamada.",
    "fr": "Appuyez sur une touche pour prendre l'appel.",
    "it": "Prema un tasto per accettare la chiamata.",
    "ja": "電話に出るには、いずれかのキーを押してください。",
    "nl": "Druk op een toets om het gesprek aan te nemen.",
    "pt": "Pressione uma tecla para atender a chamada.",
}


class NotTransferred(Exception):
    """The call could not be handed over; it goes on. The text says why, without a number."""


class InDoubt(NotTransferred):
    """Nobody has said that it was done, and it may be yet: the answer came late, or none came."""


class Transfer(Protocol):
    """How the call on one line is handed over."""

    async def to(self, name: str, summary: str) -> None:
        """Hand the call over to `name` of TRANSFER_TO; raises NotTransferred."""
        ...

    async def done_to(self) -> str | None:
        """Who has been given the call whose line has closed; None for nobody.

        Waits for a transfer under way.
        """
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


def check_values() -> None:
    """Raise RuntimeError where TRANSFER_TO or TRANSFER_ON_FAILURE is not what it has to be."""
    people()
    failover()


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
        name: Who was called.
        summary: What the call was about, as the LLM put it.
        outcome: What came of it, as Twilio has it; empty while nobody knows.
        parameters: What the stream of the call brought, for the next one.
    """

    name: str
    summary: str
    outcome: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict[str, str])

    def seal(
        self,
        call_sid: str,
        key: str,
        *,
        place: Place = "stream",
        limit: int = MAX_NOTE_CHARACTERS,
    ) -> str:
        """Return the note as text that only this call's bot can read; it needs no escaping.

        Args:
            call_sid: The call.
            key: The account's auth token.
            place: Where it travels; it is a note nowhere else.
            limit: How many characters it may have. Headers of a SIP trunk are left out first,
                from the last on, and then the summary is cut.
        """
        summary, parameters = self.summary, dict(self.parameters)
        while True:
            note = [self.name, summary, self.outcome, parameters]
            content = json.dumps(note, ensure_ascii=False, separators=(",", ":"))
            sealed = _box(call_sid, key, place).encrypt(content.encode()).decode().rstrip("=")
            if len(sealed) <= limit:
                return sealed
            if not _leave_a_header_out(parameters):
                if not summary:
                    return sealed
                summary = summary[: len(summary) * 9 // 10]

    @classmethod
    def open(
        cls, sealed: str, call_sid: str, key: str, *, place: Place, seconds: int | None = None
    ) -> Self | None:
        """Return the note in a text; None where it is no note of this bot on this call.

        Args:
            sealed: The text.
            call_sid: The call.
            key: The account's auth token.
            place: Where it came.
            seconds: How old it may be; None for any age.
        """
        from cryptography.fernet import InvalidToken

        try:
            content = _box(call_sid, key, place).decrypt(sealed + "=" * (-len(sealed) % 4), seconds)
        except (InvalidToken, ValueError):
            return None
        return cls(*json.loads(content))

    @classmethod
    def take(cls, parameters: MutableMapping[str, object], call_sid: str, key: str) -> Self | None:
        """Take a note out of a stream's parameters; None without one of this bot, on this call.

        So it is with one that is older than NOTE_SECONDS.

        Args:
            parameters: What the stream brought.
            call_sid: The call that the stream says it belongs to.
            key: The account's auth token.
        """
        sealed = str(parameters.pop(NOTE, ""))
        if not (key and sealed):
            return None
        return cls.open(sealed, call_sid, key, place="stream", seconds=NOTE_SECONDS)

    @property
    def instruction(self) -> str:
        """What the LLM is told of it."""
        what = OUTCOMES.get(self.outcome, "{name} could not be reached").format(name=self.name)
        return (
            f"The caller comes back to you: {what}. What they had told you: {self.summary} Say so, "
            "and ask what you can do instead, for example take a message. Do not greet them again."
        )

    @property
    def whisper(self) -> str:
        """The TwiML that tells the person what it is about, before they are connected."""
        code = config.language().partition("-")[0]
        code = code if code in VOICES else "en"
        document = WHISPER_AND_ASK if config.is_on("TRANSFER_ASK") else WHISPER
        return document.format(
            language=VOICES[code],
            text=escape(self.summary),
            press=PRESS[code],
            seconds=KEY_SECONDS,
        )


def outcome_of_dial(fields: Mapping[str, str]) -> str:
    """What came of a transfer, by what Twilio posts after a `<Dial>`; "completed" if they talked.

    https://www.twilio.com/docs/voice/twiml/dial#action
    """
    outcome = fields.get("DialCallStatus", "failed")
    # Who hangs up during the whisper has answered and has talked to nobody.
    if outcome in ANSWERED:
        return "no-answer" if fields.get("DialBridged") == "false" else "completed"
    return outcome


async def outcome_at_twilio(call_sid: str) -> str:
    """What came of the call's last transfer, asked of Twilio; empty where it does not say.

    For where Twilio cannot be told of an address to come to with it.
    """
    try:
        children = await _ask_twilio("GET", "Calls.json", ParentCallSid=call_sid, PageSize="1")
        status = str(children["calls"][0]["status"])
    except (NotTransferred, LookupError, TypeError):
        return ""
    return "completed" if status in ANSWERED else status if status in OUTCOMES else ""


def _leave_a_header_out(parameters: MutableMapping[str, str]) -> bool:
    """Take the last header of a SIP trunk out of `parameters`; whether there was one."""
    last = next((name for name in reversed([*parameters]) if name.startswith(SIP_HEADER)), None)
    if last is None:
        return False
    del parameters[last]
    return True


def _box(call_sid: str, key: str, place: Place) -> "Fernet":
    # Only where a call is handed over: most never are.
    from cryptography.fernet import Fernet

    of_call = hmac.digest(key.encode(), f"note in {place} of {call_sid}".encode(), hashlib.sha256)
    return Fernet(base64.urlsafe_b64encode(of_call))


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
        host: str = "",
        token: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        """Prepare for the call `call_sid`.

        Args:
            call_sid: Checked to be one of Twilio's ids.
            stream_url: Where the caller comes back to, `wss://…/ws`.
            parameters: What the stream of this call brought, for the next one.
            line: What must not hang up on a caller who has been handed over.
            has_failover: Whether the call's instructions go on with TRANSFER_ON_FAILURE.
            host: The public name of this server, where Twilio may come to OUTCOME_PATH; else empty.
            token: Makes the parameter that lets the caller in again where there is no host.
        """
        self._call_sid = call_sid
        self._host = host
        self._token = token
        self._stream_url = stream_url
        self._parameters = {name: str(value) for name, value in parameters.items()}
        self._line = line
        self._has_failover = has_failover
        self._request: asyncio.Task[dict[str, Any]] | None = None
        self._name = ""
        self._is_in_doubt = False
        self._fails_over = False

    async def to(self, name: str, summary: str) -> None:
        """Hand the call over to `name` of TRANSFER_TO.

        Raises:
            NotTransferred: There is no such person, or Twilio did not take the instructions.
        """
        number = people().get(name)
        if number is None:
            raise NotTransferred(f"there is no {name!r}; there is {', '.join(people())}")
        if self._request:
            # The tool that asked was cancelled by a caller who spoke, and is called again.
            await asyncio.wait([self._request])
            if not self._has_failed(self._request):
                return
        twiml = self._twiml(number, Note(name, summary, parameters=self._parameters))
        self._name = name
        # The stream closes as soon as Twilio has read this; hanging up then would be on them both.
        self._line.can_hang_up = False
        self._request = asyncio.create_task(
            _ask_twilio("POST", f"Calls/{quote(self._call_sid)}.json", Twiml=twiml)
        )
        # Not where it is waited for: a caller who speaks cancels that, and the request goes on.
        self._request.add_done_callback(self._answered)
        await asyncio.shield(self._request)

    def _answered(self, request: "asyncio.Task[dict[str, Any]]") -> None:
        if not self._has_failed(request):
            return
        # The caller is on the line, and the bot must be able to end their call.
        self._line.can_hang_up = not self._fails_over
        # It stays so whatever comes of a second request: Twilio may yet do what the first asked.
        self._is_in_doubt |= request.cancelled() or isinstance(request.exception(), InDoubt)

    @staticmethod
    def _has_failed(request: "asyncio.Task[dict[str, Any]]") -> bool:
        return request.cancelled() or request.exception() is not None

    async def done_to(self) -> str | None:
        """Who has been given the call whose line has closed; None for nobody.

        Waits for a transfer under way. After one in doubt nobody hangs up any more: the line has
        closed because Twilio carried it out late, or because the caller is gone anyway.
        """
        if self._request is None:
            return None
        await asyncio.wait([self._request])
        if not self._has_failed(self._request):
            return self._name
        if not self._is_in_doubt:
            return None
        self._line.can_hang_up = False
        return self._name if await self._goes_on() else None

    async def _goes_on(self) -> bool:
        """Whether the call goes on at Twilio without its line to the bot."""
        try:
            call = await _ask_twilio("GET", f"Calls/{quote(self._call_sid)}.json")
        except NotTransferred:
            return False
        return call.get("status") == "in-progress"

    def fail_over(self) -> str | None:
        """Let the call's own instructions go on when it ends: to whom, None where to nobody."""
        person = failover() if self._has_failover else None
        if person is None:
            return None
        self._fails_over, self._line.can_hang_up = True, False
        return person[0]

    def _twiml(self, number: str, note: Note) -> str:
        key = setting("TWILIO_AUTH_TOKEN")
        action = whisper = then = ""
        if self._host:
            outcome, about = (
                quoteattr(
                    f"https://{self._host}{path}?call={self._call_sid}&note="
                    + one.seal(self._call_sid, key, place="address", limit=MAX_ADDRESS_CHARACTERS)
                )
                # The person is told the summary, and nothing else of it.
                for path, one in (
                    (OUTCOME_PATH, note),
                    (WHISPER_PATH, Note(note.name, note.summary)),
                )
            )
            action, whisper = f" action={outcome}", f" url={about}"
        else:
            sealed = Note(note.name, note.summary).seal(self._call_sid, key)
            brought = {**note.parameters, NOTE: sealed, **self._token()}
            room = MAX_TWIML_CHARACTERS - len(TWIML) - len(COME_BACK) - len(self._stream_url)
            while len(twiml.parameters(brought)) > room and _leave_a_header_out(brought):
                pass
            then = COME_BACK.format(
                url=quoteattr(self._stream_url), parameters=twiml.parameters(brought)
            )
        return TWIML.format(
            seconds=RING_SECONDS, action=action, whisper=whisper, number=number, then=then
        )


class SipLine(Protocol):
    """What Pipecat's Daily transport can do for a telephone in its room."""

    async def sip_call_transfer(self, settings: dict[str, str]) -> object | None:
        """Connect the telephone with another; returns what went wrong, if something did."""
        ...


class DailyTransfer:
    """Hands over a telephone that is in a Daily room. It does not come back: Daily tells nobody
    whether the person answered, and carries no note.
    """

    def __init__(self, line: SipLine) -> None:
        """Prepare for the telephone on `line`."""
        self._line = line
        self._request: asyncio.Task[object | None] | None = None
        self._name = ""

    async def to(self, name: str, summary: str) -> None:
        """Hand the call over to `name` of TRANSFER_TO; nobody hears `summary`.

        Raises:
            NotTransferred: There is no such person, or Daily refused.
        """
        number = people().get(name)
        if number is None:
            raise NotTransferred(f"there is no {name!r}; there is {', '.join(people())}")
        self._name = name
        # Not a frame behind the speech, which would not say whether it was done: the announcement
        # has been heard by now.
        self._request = asyncio.create_task(self._line.sip_call_transfer({"toEndPoint": number}))
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                error = await asyncio.shield(self._request)
        except TimeoutError:
            raise NotTransferred("the telephone network did not answer") from None
        if error:
            logger.warning("Daily refused a transfer")
            raise NotTransferred("the telephone network refused it")

    async def done_to(self) -> str | None:
        """Who has been given the call; None for nobody. Waits for a transfer under way."""
        if self._request is None:
            return None
        await asyncio.wait([self._request], timeout=REQUEST_SECONDS)
        is_done = self._request.done() and not self._request.exception()
        return self._name if is_done and not self._request.result() else None

    def fail_over(self) -> str | None:
        """None: a room has no instructions that go on."""
        return None


async def _ask_twilio(method: str, path: str, **fields: str) -> dict[str, Any]:
    """Ask Twilio's REST API for something of the account.

    Raises:
        NotTransferred: It refused.
        InDoubt: It did not answer, or not with what became of it.
    """
    import httpx

    try:
        response = await twilio_rest.request(method, path, fields, seconds=REQUEST_SECONDS)
        answer = response.json() if response.is_success else {}
    except httpx.InvalidURL as error:
        logger.warning("A transfer did not reach Twilio: TWILIO_BASE_URL is no address")
        raise NotTransferred("the telephone network cannot be reached") from error
    except (httpx.HTTPError, ValueError, TimeoutError) as error:
        logger.warning(f"Twilio did not answer to a transfer: {type(error).__name__}")
        raise InDoubt("the telephone network did not answer") from error
    if response.is_server_error:
        logger.warning(f"Twilio answered to a transfer with {response.status_code}")
        raise InDoubt("the telephone network did not answer")
    if not response.is_success:
        logger.warning(f"Twilio refused a transfer with {response.status_code}")
        raise NotTransferred("the telephone network refused it")
    return answer


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
