"""Twilio, as far as a bot meets it beside the media stream: its REST API, and its TwiML played.

Asked by the bot, with basic authentication:

- `POST /2010-04-01/Accounts/{account}/Calls/{call}.json` with the form field `Status=completed` or
  `Twiml=<Response>…`. 404 with code 20404 means that the call has ended already. New instructions
  end the call's media stream.
- `GET /2010-04-01/Accounts/{account}/Calls.json?ParentCallSid=…`: what became of the calls that a
  `<Dial>` placed, the last one first.
- `POST /2010-04-01/Accounts/{account}/Calls.json` with `To`, `From`, `Twiml` and `Timeout`: calls
  somebody, 201. 400 with code 21211 for a `To` that is no number, 21212 for such a `From`, 21205
  without TwiML. `GET …/Calls/{call}.json`: how the call stands, its `status` as Twilio documents
  it. `Status=canceled` takes it back while it rings.
  https://www.twilio.com/docs/voice/api/call-resource

  With `StatusCallback` the stages named by `StatusCallbackEvent` (initiated, ringing, answered;
  "completed", whatever the end, if none is named) are posted there, with `CallStatus` and a
  `SequenceNumber`, the end with `CallDuration` and `SipResponseCode` as well.

  With `MachineDetection=Enable` who answered is known as soon as it is known to be a machine, with
  `DetectMessageEnd` after its greeting; `answered_by` of the call says it. The TwiML waits for
  that, unless `AsyncAmd=true`: then `AnsweredBy` and `MachineDetectionDuration` (milliseconds) are
  posted to `AsyncAmdStatusCallback`. Nothing listens here: a Callee says what Twilio finds.
  https://www.twilio.com/docs/voice/answering-machine-detection

Of TwiML these verbs are played, one after the other: `<Connect><Stream>` until the bot closes the
stream, `<Dial>` with its `action` and the `url` of its `<Number>` (there `<Say>`, and a `<Gather>`
for one key), `<Play digits>`, `<Hangup>`, `<Reject>`. What is fetched for them is posted and signed
as Twilio does it, over the address of HTTPS, and goes to this machine.
https://www.twilio.com/docs/voice/twiml
"""

import asyncio
import base64
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any, Protocol
from xml.etree import ElementTree

import aiohttp
from aiohttp import BasicAuth, web

from rehearsal.providers.faults import Faults
from rehearsal.providers.server import HOST, ProviderServer, WireLog

_ERRORS = {
    400: (21218, "Neither Status=completed nor Twiml with verbs that are rehearsed"),
    401: (20003, "Authenticate"),
    404: (20404, "The requested resource was not found"),
    429: (20429, "Too Many Requests"),
    500: (20500, "Internal Server Error"),
}
_VERBS = {"Connect", "Dial", "Hangup", "Play", "Reject"}
_NUMBER = re.compile(r"\+[1-9]\d{6,14}")
_DETECTIONS = ("", "Enable", "DetectMessageEnd")
# What a network answers, by the status in which Twilio puts it. RFC 3261, section 21.
_SIP_CODES = {
    "completed": "200",
    "busy": "486",
    "no-answer": "487",
    "canceled": "487",
    "failed": "404",
}


class Phone(Protocol):
    """The caller's end of a call.

    Attributes:
        from_number: The caller's number.
        to_number: The number called.
        call_sid: The call's id.
        is_held: Whether the line stays open when a media stream is over.
        stream_over: Set once a media stream is over, whoever ended it.
        ended: Set once the call is over.
    """

    from_number: str
    to_number: str
    call_sid: str
    is_held: bool
    stream_over: asyncio.Event
    ended: asyncio.Event

    async def leave_stream(self) -> None:
        """End the media stream; the call goes on."""
        ...

    async def join_stream(self, url: str, parameters: Mapping[str, str]) -> None:
        """Begin another media stream of the same call."""
        ...

    def release(self) -> None:
        """End the call."""
        ...


@dataclass
class Colleague:
    """Somebody whom a `<Dial>` calls.

    Attributes:
        does: What comes of calling them: "completed" if they answer and talk, else "busy",
            "no-answer" or "failed".
        rings_s: How long it rings at theirs, seconds.
        talks_s: How long they talk until they hang up, seconds; None for as long as the caller.
        presses: The key they press when a whisper asks for one; empty for none, as of a mailbox.
    """

    does: str = "busy"
    rings_s: float = 0.0
    talks_s: float | None = None
    presses: str = ""


@dataclass
class Callee:
    """Somebody whom the bot calls.

    Attributes:
        phone: Of theirs; None where it is not picked up.
        does: What comes of calling them where it is not: "busy", "no-answer" or "failed".
        sip_code: What their network answered in the end; blank for the usual one of what they do.
        talks: What they do once they have picked up and the stream is open; then they hang up.
        rings_s: How long it rings, seconds.
        answered_by: What machine detection finds: "human", "machine", "fax" or "unknown".
        detected_after_s: How long that takes, seconds.
        greets_s: When the greeting of a machine is over, seconds from where it answered.
    """

    phone: Phone | None = None
    does: str = "no-answer"
    sip_code: str = ""
    talks: Callable[[], Coroutine[Any, Any, None]] | None = None
    rings_s: float = 0.0
    answered_by: str = "unknown"
    detected_after_s: float = 0.0
    greets_s: float = 0.0


@dataclass
class _Placed:
    """A call of the bot's.

    Attributes:
        shown: As Twilio shows it.
        events: The stages of which StatusCallback is told.
        status_url: StatusCallback; empty without one.
        detects: MachineDetection; empty without it.
        is_detected_aside: Whether the TwiML does not wait for it: AsyncAmd.
        detection_url: AsyncAmdStatusCallback; empty without one.
        sequence: Of the next stage.
        picked_up_at: On the monotonic clock.
    """

    shown: dict[str, str | None]
    events: frozenset[str] = frozenset({"completed"})
    status_url: str = ""
    detects: str = ""
    is_detected_aside: bool = False
    detection_url: str = ""
    sequence: int = 0
    picked_up_at: float = field(default_factory=time.monotonic)


class TwilioServer(ProviderServer):
    """Records what becomes of calls.

    Attributes:
        auth_token: What signs the requests of this Twilio.
        hung_up: The calls that the bot ended.
        gone: The calls that have ended.
        dialled: Whom `<Dial>` has called, as (call, number).
        whispered: What they were told before they were connected.
        colleagues: Who answers at which number; at others it is busy.
        phones: The phone at the caller's end of a call, for calls that are given instructions.
        children: The calls that `<Dial>` placed, by the call they belong to, the last one first.
        callees: Who is reached at which number by the bot's own calls; at others nobody answers.
        placed: The bot's own calls, by their ids, as Twilio shows them.
        pressed: The digits that `<Play>` has pressed, as (call, digits).
    """

    name = "twilio"

    def __init__(self, log: WireLog, faults: Faults | None = None) -> None:
        """Prepare the server; `start` makes it listen."""
        super().__init__(log, faults)
        self.auth_token = "rehearsal"
        self.hung_up: list[str] = []
        self.gone: set[str] = set()
        self.dialled: list[tuple[str, str]] = []
        self.whispered: list[str] = []
        self.colleagues: dict[str, Colleague] = {}
        self.phones: dict[str, Phone] = {}
        self.children: dict[str, list[dict[str, str]]] = {}
        self.callees: dict[str, Callee] = {}
        self.placed: dict[str, dict[str, str | None]] = {}
        self.pressed: list[tuple[str, str]] = []
        self._calling: set[asyncio.Task[None]] = set()
        self._playing: dict[str, asyncio.Task[None]] = {}

    def routes(self) -> Iterable[web.RouteDef]:
        """Return the routes of the call resource."""
        calls = "/2010-04-01/Accounts/{account}/Calls"
        return [
            web.post(calls + "/{call}.json", self._update),
            web.get(calls + ".json", self._list),
            web.post(calls + ".json", self._create),
            web.get(calls + "/{call}.json", self._show),
        ]

    @property
    def environment(self) -> dict[str, str]:
        """The variable that points a bot here."""
        return {"TWILIO_BASE_URL": f"http://{HOST}:{self.port}"}

    def key_of(self, request: web.Request) -> str:
        """Return the password, if the login is the account itself or an API key (`SK…`)."""
        try:
            login = BasicAuth.decode(request.headers.get("Authorization", ""))
        except ValueError:
            return ""
        is_known = login.login == request.match_info["account"] or login.login.startswith("SK")
        return login.password if is_known else ""

    def error(self, status: int) -> Mapping[str, Any]:
        """Return Twilio's error object."""
        code, message = _ERRORS[status]
        return {"code": code, "message": message, "status": status}

    async def ring(self, phone: Phone, url: str) -> None:
        """Let a phone call the number whose webhook is `url`; return when it has its instructions.

        Raises:
            ConnectionError: The webhook did not answer with TwiML.
        """
        self.phones[phone.call_sid] = phone
        verbs = await self._fetch(url, self._form_of(phone))
        if not verbs:
            raise ConnectionError("the bot's webhook answered without TwiML")
        self._start(phone, verbs)

    async def aclose(self) -> None:
        """Stop playing, cut what is live and stop listening."""
        at_work = [*self._calling, *self._playing.values()]
        for task in at_work:
            task.cancel()
        await asyncio.gather(*at_work, return_exceptions=True)
        await super().aclose()

    async def _update(self, request: web.Request) -> web.Response:
        form = dict(await request.post())
        entry = await self.admit(request, form)
        if isinstance(entry, web.Response):
            return entry
        await self.before_answer()
        call = request.match_info["call"]
        verbs = _verbs(str(form.get("Twiml", "")))
        if form.get("Status") == "canceled" and self._rings(call):
            entry.status = 200
            self.placed[call]["status"] = "canceled"
        elif form.get("Status") != "completed" and not verbs:
            entry.status = 400
        elif call in self.gone:
            entry.status = 404
        elif verbs:
            entry.status = 200
            self._start(self.phones[call], verbs)
        else:
            entry.status = 200
            self.gone.add(call)
            self.hung_up.append(call)
        self._log.changed()
        if entry.status != 200:
            return web.json_response(dict(self.error(entry.status)), status=entry.status)
        status = "in-progress" if verbs else str(form["Status"])
        return web.json_response({"sid": call, "status": status})

    async def _create(self, request: web.Request) -> web.Response:
        posted = await request.post()
        form = {name: str(value) for name, value in posted.items()}
        entry = await self.admit(request, form)
        if isinstance(entry, web.Response):
            return entry
        await self.before_answer()
        verbs = _verbs(form.get("Twiml", ""))
        refused = [
            (code, f"{message}: {form.get(name, '')}")
            for code, name, message, is_right in (
                (21211, "To", "Invalid 'To' Phone Number", _NUMBER.fullmatch(form.get("To", ""))),
                (21212, "From", "Invalid 'From'", _NUMBER.fullmatch(form.get("From", ""))),
                (21205, "Twiml", "Url is not a valid URL, and there is no TwiML", verbs),
                # The code of the real one for this is not documented.
                (
                    *(20001, "MachineDetection", "Invalid 'MachineDetection'"),
                    form.get("MachineDetection", "") in _DETECTIONS,
                ),
            )
            if not is_right
        ]
        entry.status = 400 if refused else 201
        self._log.changed()
        if refused:
            code, message = refused[0]
            return web.json_response({"code": code, "message": message, "status": 400}, status=400)
        callee = self.callees.get(form["To"], Callee())
        sid = "CA" + secrets.token_hex(16)
        if callee.phone:
            sid = callee.phone.call_sid
        self.placed[sid] = {
            "sid": sid,
            "status": "queued",
            "to": form["To"],
            "from": form["From"],
            "account_sid": request.match_info["account"],
            "direction": "outbound-api",
            "answered_by": None,
        }
        events = {str(event) for event in posted.getall("StatusCallbackEvent", ["completed"])}
        placed = _Placed(
            self.placed[sid],
            events=frozenset(events),
            status_url=form.get("StatusCallback", ""),
            detects=form.get("MachineDetection", ""),
            is_detected_aside=form.get("AsyncAmd") == "true",
            detection_url=form.get("AsyncAmdStatusCallback", ""),
        )
        # As it is now, not as it may be when the answer is written.
        shown = dict(placed.shown)
        self._do(self._call(placed, callee, verbs))
        return web.json_response(shown, status=201)

    async def _show(self, request: web.Request) -> web.Response:
        entry = await self.admit(request)
        if isinstance(entry, web.Response):
            return entry
        await self.before_answer()
        found = self.placed.get(request.match_info["call"])
        entry.status = 200 if found else 404
        self._log.changed()
        return web.json_response(found or dict(self.error(404)), status=entry.status)

    def _rings(self, call: str) -> bool:
        return self.placed.get(call, {}).get("status") in ("queued", "initiated", "ringing")

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._calling.add(task)
        task.add_done_callback(self._calling.discard)

    async def _call(
        self, placed: _Placed, callee: Callee, verbs: list[ElementTree.Element]
    ) -> None:
        """Call somebody, and play the TwiML to who picks up."""
        sid = str(placed.shown["sid"])
        self._stage(placed, "initiated", "initiated")
        self._stage(placed, "ringing", "ringing")
        await asyncio.sleep(callee.rings_s)
        if not self._rings(sid):
            self._stage(placed, "completed", "canceled")
            return
        if callee.phone is None:
            self._stage(placed, "completed", callee.does, callee.sip_code)
            return
        placed.picked_up_at = time.monotonic()
        self._stage(placed, "answered", "in-progress")
        self.phones[sid] = callee.phone
        if placed.detects and not placed.is_detected_aside:
            await self._detect(placed, callee)
        self._start(callee.phone, verbs)
        async with asyncio.TaskGroup() as tasks:
            if callee.talks:
                tasks.create_task(callee.talks())
            detecting = (
                tasks.create_task(self._detect(placed, callee))
                if placed.detects and placed.is_detected_aside
                else None
            )
            await asyncio.wait([self._playing[sid]])
            if detecting:
                detecting.cancel()
        self._stage(placed, "completed", "completed")

    def _stage(self, placed: _Placed, event: str, status: str, sip_code: str = "") -> None:
        """A call has come to a stage; who wants to know is told beside it."""
        call = placed.shown
        call["status"] = status
        self._log.changed()
        sequence, placed.sequence = placed.sequence, placed.sequence + 1
        if not placed.status_url or event not in placed.events:
            return
        form = {
            **_form_of_placed(call),
            "CallStatus": status,
            "Timestamp": format_datetime(datetime.now(UTC)),
            "CallbackSource": "call-progress-events",
            "SequenceNumber": str(sequence),
        }
        if event == "completed":
            talked_s = time.monotonic() - placed.picked_up_at if status == "completed" else 0.0
            form["CallDuration"] = str(round(talked_s))
            form["SipResponseCode"] = sip_code or _SIP_CODES[status]
        self._do(self._tell(placed.status_url, form))

    async def _detect(self, placed: _Placed, callee: Callee) -> None:
        """Find out who answered, as the callee says it is found out."""
        began = time.monotonic()
        found, after_s = callee.answered_by, callee.detected_after_s
        if found == "machine" and placed.detects == "DetectMessageEnd":
            found, after_s = "machine_end_beep", callee.greets_s
        elif found == "machine":
            found = "machine_start"
        await asyncio.sleep(after_s)
        placed.shown["answered_by"] = found
        self._log.changed()
        if placed.is_detected_aside and placed.detection_url:
            form = {
                "CallSid": str(placed.shown["sid"]),
                "AccountSid": str(placed.shown["account_sid"]),
                "AnsweredBy": found,
                "MachineDetectionDuration": str(round(1000 * (time.monotonic() - began))),
            }
            self._do(self._tell(placed.detection_url, form))

    async def _tell(self, url: str, form: Mapping[str, str]) -> None:
        """Post a signed form; what comes back does not matter, as to the real one."""
        with suppress(aiohttp.ClientError):
            async with aiohttp.ClientSession() as http, self._post(http, url, form):
                pass

    async def _list(self, request: web.Request) -> web.Response:
        entry = await self.admit(request)
        if isinstance(entry, web.Response):
            return entry
        await self.before_answer()
        entry.status = 200
        self._log.changed()
        found = self.children.get(request.query.get("ParentCallSid", ""), [])
        return web.json_response({"calls": found[: int(request.query.get("PageSize", "50"))]})

    def _start(self, phone: Phone, verbs: list[ElementTree.Element]) -> None:
        """Play new instructions for a call in place of those it had."""
        if before := self._playing.get(phone.call_sid):
            before.cancel()
        phone.is_held = True
        self._playing[phone.call_sid] = asyncio.create_task(self._play(phone, verbs))

    async def _play(self, phone: Phone, verbs: list[ElementTree.Element]) -> None:
        """Do what the TwiML says, at the phone's end, and hang up after its last verb."""
        await phone.leave_stream()
        waiting = list(verbs)
        while waiting and not phone.ended.is_set() and phone.call_sid not in self.gone:
            verb = waiting.pop(0)
            if verb.tag == "Dial":
                posted = await self._dial(phone, verb)
                # What stands behind a <Dial> with an action is never reached.
                if url := verb.get("action"):
                    waiting = await self._fetch(url, {**self._form_of(phone), **posted})
            elif verb.tag == "Play":
                self.pressed.append((phone.call_sid, verb.get("digits", "")))
            elif (stream := verb.find("Stream")) is not None:
                brought = {
                    one.attrib["name"]: one.attrib["value"] for one in stream.iter("Parameter")
                }
                # One that cannot be opened is over, too.
                with suppress(aiohttp.ClientError):
                    await phone.join_stream(stream.attrib["url"], brought)
                    await phone.stream_over.wait()
            else:
                break
        self.gone.add(phone.call_sid)
        phone.release()
        self._log.changed()

    async def _dial(self, phone: Phone, verb: ElementTree.Element) -> dict[str, str]:
        """Call somebody; return what an action is told of it."""
        noun = verb.find("Number")
        number = ((verb.text if noun is None else noun.text) or "").strip()
        child = {"sid": "CA" + secrets.token_hex(16), "status": "ringing", "to": number}
        self.children.setdefault(phone.call_sid, []).insert(0, child)
        self.dialled.append((phone.call_sid, number))
        self._log.changed()
        colleague = self.colleagues.get(number, Colleague())
        await asyncio.sleep(colleague.rings_s)
        if colleague.does == "completed":
            child["status"] = "in-progress"
            if noun is not None and (url := noun.get("url")):
                leg = {"CallSid": child["sid"], "ParentCallSid": phone.call_sid, "To": number}
                said = await self._fetch(url, leg)
                self.whispered += [
                    (say.text or "").strip() for one in said for say in one.iter("Say")
                ]
                self._log.changed()
                if any(one.tag == "Gather" for one in said) and colleague.presses:
                    said = await self._fetch(url, {**leg, "Digits": colleague.presses})
                if any(one.tag == "Hangup" for one in said):
                    child["status"] = "completed"
                    # They have answered, and talked to nobody.
                    return {
                        "DialCallSid": child["sid"],
                        "DialCallStatus": "completed",
                        "DialBridged": "false",
                    }
            with suppress(TimeoutError):
                async with asyncio.timeout(colleague.talks_s):
                    await phone.ended.wait()
        child["status"] = colleague.does
        return {"DialCallSid": child["sid"], "DialCallStatus": colleague.does}

    def _form_of(self, phone: Phone) -> dict[str, str]:
        return {
            "CallSid": phone.call_sid,
            "From": phone.from_number,
            "To": phone.to_number,
            "CallStatus": "in-progress",
            "Direction": "inbound",
            "ApiVersion": "2010-04-01",
        }

    async def _fetch(self, url: str, form: Mapping[str, str]) -> list[ElementTree.Element]:
        """Ask for TwiML; a bot that has none, or is gone, is an application error: none."""
        try:
            async with aiohttp.ClientSession() as http, self._post(http, url, form) as answer:
                return _verbs(await answer.text(), {*_VERBS, "Say", "Gather"}) if answer.ok else []
        except aiohttp.ClientError:
            return []

    def _post(
        self, http: aiohttp.ClientSession, url: str, form: Mapping[str, str]
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        headers = {"X-Twilio-Signature": sign(self.auth_token, url, form)}
        return http.post(url.replace("https:", "http:", 1), data=form, headers=headers)


def _form_of_placed(call: Mapping[str, str | None]) -> dict[str, str]:
    return {
        "CallSid": str(call["sid"]),
        "AccountSid": str(call["account_sid"]),
        "From": str(call["from"]),
        "To": str(call["to"]),
        "Direction": "outbound-api",
        "ApiVersion": "2010-04-01",
    }


def sign(auth_token: str, url: str, form: Mapping[str, str]) -> str:
    """Return the header X-Twilio-Signature of a posted form.

    https://www.twilio.com/docs/usage/security#validating-requests
    """
    text = url + "".join(name + value for name, value in sorted(form.items()))
    return base64.b64encode(hmac.digest(auth_token.encode(), text.encode(), hashlib.sha1)).decode()


def _verbs(twiml: str, known: Iterable[str] = _VERBS) -> list[ElementTree.Element]:
    """Return the verbs of a TwiML document; none of one that cannot be rehearsed."""
    try:
        verbs = list(ElementTree.fromstring(twiml))
    except ElementTree.ParseError:
        return []
    return verbs if all(verb.tag in known for verb in verbs) else []
