"""What a bot asks of Twilio's REST API: to hang up, and to give a call new instructions.

`POST /2010-04-01/Accounts/{account}/Calls/{call}.json` with the form field `Status=completed` or
`Twiml=<Response>…` and basic authentication. 404 with code 20404 means that the call has ended
already. New instructions end the call's media stream; of their verbs `<Dial>` with a number and
`<Connect><Stream>` are played, one after the other, as Twilio does without an `action`.
https://www.twilio.com/docs/voice/api/call-resource#update-a-call-resource
"""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any, Protocol
from xml.etree import ElementTree

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


class Phone(Protocol):
    """The caller's end of a call."""

    async def leave_stream(self) -> None:
        """End the media stream; the call goes on."""
        ...

    async def join_stream(self, url: str, parameters: Mapping[str, str]) -> None:
        """Begin another media stream of the same call."""
        ...


class TwilioServer(ProviderServer):
    """Records what becomes of calls.

    Attributes:
        hung_up: The calls that the bot ended.
        gone: The calls that have ended.
        dialled: Whom `<Dial>` has called, as (call, number).
        answering: The numbers at which somebody answers; at others it is busy.
        phones: The phone at the caller's end of a call, for calls that are given instructions.
    """

    name = "twilio"

    def __init__(self, log: WireLog, faults: Faults | None = None) -> None:
        """Prepare the server; `start` makes it listen."""
        super().__init__(log, faults)
        self.hung_up: list[str] = []
        self.gone: set[str] = set()
        self.dialled: list[tuple[str, str]] = []
        self.answering: set[str] = set()
        self.phones: dict[str, Phone] = {}
        self._playing: set[asyncio.Task[None]] = set()

    def routes(self) -> Iterable[web.RouteDef]:
        """Return the route of the call resource."""
        return [web.post("/2010-04-01/Accounts/{account}/Calls/{call}.json", self._update)]

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

    async def _update(self, request: web.Request) -> web.Response:
        form = dict(await request.post())
        entry = await self.admit(request, form)
        if isinstance(entry, web.Response):
            return entry
        await self.before_answer()
        call = request.match_info["call"]
        verbs = _verbs(str(form.get("Twiml", "")))
        if form.get("Status") != "completed" and not verbs:
            entry.status = 400
        elif call in self.gone:
            entry.status = 404
        elif verbs:
            entry.status = 200
            playing = asyncio.create_task(self._play(call, verbs))
            self._playing.add(playing)
            playing.add_done_callback(self._playing.discard)
        else:
            entry.status = 200
            self.gone.add(call)
            self.hung_up.append(call)
        self._log.changed()
        if entry.status != 200:
            return web.json_response(dict(self.error(entry.status)), status=entry.status)
        status = "in-progress" if verbs else "completed"
        return web.json_response({"sid": call, "status": status})

    async def _play(self, call: str, verbs: list[ElementTree.Element]) -> None:
        """Do what the TwiML says, at the phone's end."""
        phone = self.phones[call]
        await phone.leave_stream()
        for verb in verbs:
            if verb.tag == "Dial":
                number = (verb.text or "").strip()
                self.dialled.append((call, number))
                self._log.changed()
                if number in self.answering:
                    # They talk; nobody hangs up first.
                    return
            elif (stream := verb.find("Stream")) is not None:
                await phone.join_stream(
                    stream.attrib["url"],
                    {one.attrib["name"]: one.attrib["value"] for one in stream.iter("Parameter")},
                )
                return


def _verbs(twiml: str) -> list[ElementTree.Element]:
    """Return the verbs of a TwiML document; none of one that cannot be rehearsed."""
    try:
        verbs = list(ElementTree.fromstring(twiml))
    except ElementTree.ParseError:
        return []
    return verbs if all(verb.tag in ("Dial", "Connect") for verb in verbs) else []
