"""Lets in the phone calls that Twilio sends to your own server, and nobody else.

`python bot.py` talks to whoever finds it, and a stranger on the line costs money. With
`TWILIO_AUTH_TOKEN` set, a phone call has to pass twice: the request for its TwiML has to be signed
by Twilio, and its stream has to bring the token written into that TwiML, which is good for that
one call, for a minute, once. With `-t twilio` the other ways to the bot are closed as well.

The token is signed, so the stream may reach another process of the same server than the one that
answered with the TwiML; that it was used stands in the folder of calls, which they share. It
travels as a `<Parameter>` of the stream, inside the connection, not in its address: addresses end
up in the access logs of every proxy on the way.
"""

import argparse
import base64
import hashlib
import hmac
import re
import time
from collections.abc import Callable, Coroutine, Mapping, MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from loguru import logger

from config import setting
from telephony import transfer, twiml

if TYPE_CHECKING:
    from fastapi import FastAPI, WebSocket
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

TOKEN_PARAMETER = "gate_token"
# Brought by the stream of a call that the bot itself has placed: telephony/errand.py.
CALLEE_PARAMETER = "callee_number"
# Twilio opens the stream as soon as it has read the TwiML.
TOKEN_SECONDS = 60
# Twilio takes less than 500 for a parameter's name and value.
PARAMETER_CHARACTERS = 500
# In the folder of calls: an empty file for each token that was used, until it expires.
USED_TOKENS = ".tokens"
# What `-t twilio` serves behind a gate. Pipecat's server has more: a browser could call by
# /api/offer, whatever -t says.
OPEN_PATHS = {
    *("/", "/ws", "/status", "/calls", "/calls/status"),
    *(transfer.OUTCOME_PATH, transfer.WHISPER_PATH),
}

NO_HOST = (
    "Phone calls need -x HOST, the public name under which Twilio reaches this server over HTTPS: "
    "python bot.py -t twilio -x voice.example.org"
)

# A name or address, perhaps with a port; what follows it is ours to say.
HOST = re.compile(r"([\w.-]+|\[[0-9a-fA-F:]+\])(:[0-9]{1,5})?")

Reserve = Callable[[str, str, Callable[[], bool]], str]

# Of everything that Twilio gives an id to: calls, media streams, accounts.
# https://www.twilio.com/docs/glossary/what-is-a-sid
SID = re.compile(r"(?P<kind>[A-Z]{2})[0-9a-fA-F]{32}")
TOKEN = re.compile(r"([0-9]{1,12})\.[0-9a-f]{64}")
# Twilio's forms have some 30. Thousands would hold up the calls while they are looked through.
MAX_FORM_FIELDS = 200

TWIML = """<?xml version="1.0" encoding="UTF-8"?>
<Response>
  <Connect>
    <Stream url="wss://{host}/ws">{parameters}
    </Stream>
  </Connect>{failover}
</Response>"""
BUSY = """<?xml version="1.0" encoding="UTF-8"?>
<Response>
  <Reject reason="busy" />
</Response>"""


def is_sid(value: object, kind: str) -> bool:
    """Whether `value` is an id of Twilio's own form: "CA" a call, "MZ" a stream, "AC" an account.

    What a stream says of itself is a stranger's word, and ids become addresses and file names.
    """
    match = SID.fullmatch(value) if isinstance(value, str) else None
    return bool(match and match["kind"] == kind)


class Gate:
    """Checks Twilio's signature, and gives out the tokens that calls have to bring."""

    def __init__(
        self,
        auth_token: str,
        *,
        used: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open a gate.

        Args:
            auth_token: The auth token of the Twilio account, which signs its requests.
            used: A folder that all processes of the server share, for the tokens that were used.
            clock: Seconds of a clock that all processes share; tokens expire by it.
        """
        self._auth_token = auth_token.encode()
        # Not the auth token itself: what signs Twilio's requests signs nothing else.
        self._token_key = hmac.digest(self._auth_token, b"tokens of media streams", hashlib.sha256)
        self._clock = clock
        self._folder = used
        # When each used token expires. Only a signed request makes a token, so nobody can fill it.
        self._used: dict[str, int] = {}

    def signed_by_twilio(
        self,
        host: str,
        query: str,
        form: Sequence[tuple[str, str]],
        signature: str,
        *,
        path: str = "/",
    ) -> bool:
        """Whether Twilio signed this request for `https://HOST/PATH?QUERY`.

        Args:
            host: The public name of this server, with the port if it has one.
            query: What follows the question mark, as requested; empty without one.
            form: The posted fields.
            signature: The header X-Twilio-Signature.
            path: What it asks for.
        """
        # Twilio signs the address as it was entered in its console, with or without what goes
        # without saying: the port of HTTPS, the slash after a bare name.
        name = host.removesuffix(":443")
        paths = ["/", ""] if path == "/" else [path]
        rest = f"?{query}" if query else ""
        addresses = [f"https://{name}{port}{one}{rest}" for port in ("", ":443") for one in paths]
        wanted = [self.signature(address, form) for address in addresses]
        return any([hmac.compare_digest(one, signature.encode()) for one in wanted])

    def signature(self, address: str, form: Sequence[tuple[str, str]]) -> bytes:
        """Sign as Twilio does: HMAC-SHA1 over the address and all fields in order of their names.

        https://www.twilio.com/docs/usage/security#validating-requests
        """
        text = address + "".join(name + value for name, value in sorted(set(form)))
        return base64.b64encode(hmac.digest(self._auth_token, text.encode(), hashlib.sha1))

    def issue(self, call: str, *, seconds: int = TOKEN_SECONDS) -> str:
        """Return a token for this call, its id or all that is known of one that has none yet.

        It holds when it expires, in so many seconds, and a signature of both.
        """
        return self._token(call, int(self._clock()) + seconds)

    def knows(self, call: str, token: str) -> bool:
        """Whether the token was issued for this call and is neither used here nor too old."""
        return self._end_of(call, token, self._clock()) is not None

    def lets_in(self, call: str, token: str) -> bool:
        """Whether the token was issued for this call and is neither used nor too old; uses it."""
        now = self._clock()
        expires = self._end_of(call, token, now)
        if expires is None:
            return False
        self._used = {used: until for used, until in self._used.items() if until > now}
        self._used[token] = expires
        return self._is_first_use(token)

    def _end_of(self, call: str, token: str, now: float) -> int | None:
        """Until when a token lets this call in; None where it does not."""
        match = TOKEN.fullmatch(token)
        if not match:
            return None
        expires = int(match[1])
        is_ours = hmac.compare_digest(self._token(call, expires), token)
        return expires if is_ours and now < expires and token not in self._used else None

    def is_used(self, token: str) -> bool:
        """Whether a call has come with this token, to whichever process of the server."""
        return token in self._used or (self._folder is not None and (self._folder / token).exists())

    def _is_first_use(self, token: str) -> bool:
        """Whether no process of the server has let a call in with this token."""
        if self._folder is None:
            return True
        # A disk that takes no file keeps no call out; each process still knows its own.
        with suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for old in self._folder.iterdir():
                until = old.name.partition(".")[0]
                if until.isdecimal() and int(until) <= self._clock():
                    old.unlink(missing_ok=True)
            try:
                (self._folder / token).touch(mode=0o600, exist_ok=False)
            except FileExistsError:
                return False
        return True

    def _token(self, call: str, expires: int) -> str:
        signed = f"{call} {expires}".encode()
        return f"{expires}.{hmac.digest(self._token_key, signed, hashlib.sha256).hex()}"


def guard(
    app: "FastAPI",
    arguments: Sequence[str],
    *,
    reserve: Reserve = lambda _call_sid, _number, _has_come: "",
) -> None:
    """Answer Twilio's requests for TwiML, and put a gate before the phone calls of `app`.

    The gate stands where TWILIO_AUTH_TOKEN is set.

    Args:
        app: Pipecat's development server, before it starts.
        arguments: The command line of bot.py, without the program.
        reserve: Keeps a line for a call from a number until it has come, to whichever process;
            returns why it cannot be taken now, if so.

    Raises:
        SystemExit: What -x gives is no name of a server.
    """
    # Pipecat reads its options when it is too late to add a route, so these two are read here too.
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-t", "--transport", nargs="?")
    parser.add_argument("-x", "--proxy", nargs="?")
    options, _ = parser.parse_known_args(arguments)
    host = (options.proxy or "").rpartition("://")[2].strip("/")
    auth_token = setting("TWILIO_AUTH_TOKEN")
    # Where lets_in finds it. On Pipecat Cloud nobody calls guard, and the platform answers.
    used = Path(setting("CALLS_DIR", "calls"), USED_TOKENS)
    app.state.twilio_gate = gate = Gate(auth_token, used=used) if auth_token else None
    app.state.twilio_host = ""
    if options.transport != "twilio":
        return
    if host and not HOST.fullmatch(host):
        raise SystemExit(
            f"-x is the public name of this server, such as voice.example.org, not {host!r}"
        )

    from starlette.routing import Route

    if not host:
        logger.warning(NO_HOST + (". Until then calls are refused" if gate else ""))
    elif not gate:
        logger.warning(
            "TWILIO_AUTH_TOKEN is not set: whoever finds this server can talk to the bot"
        )
    # Before Pipecat's own routes for the same address: the first one answers.
    app.router.routes.append(
        Route("/", _answer_with_twiml(gate, host, reserve), methods=["GET", "POST"])
    )
    if gate:
        app.state.twilio_host = host
        for path, answer in (
            (transfer.OUTCOME_PATH, _go_on_after_transfer(gate, host, reserve)),
            (transfer.WHISPER_PATH, _whisper(gate, host)),
        ):
            app.router.routes.append(Route(path, answer, methods=["POST"]))
        app.add_middleware(_OnlyOpenPaths)


def public_host(websocket: "WebSocket") -> str:
    """The name under which Twilio's signed requests reach this server; empty where none does."""
    app = websocket.scope.get("app")
    return getattr(app.state, "twilio_host", "") if app else ""


def lets_in(
    websocket: "WebSocket", call_sid: str | None, parameters: MutableMapping[str, object]
) -> bool:
    """Whether this call may talk to the bot. Where no gate was put up, everyone may.

    Takes the token out of `parameters`, for what is left is kept with the call.
    """
    token = parameters.pop(TOKEN_PARAMETER, "")
    gate = gate_before(websocket)
    return gate is None or gate.lets_in(call_sid or "", str(token))


def token_back(websocket: "WebSocket", call_sid: str, seconds: int) -> dict[str, str]:
    """The parameter with which a later stream of this call is let in; none without a gate."""
    gate = gate_before(websocket)
    return {TOKEN_PARAMETER: gate.issue(call_sid, seconds=seconds)} if gate else {}


def gate_before(websocket: "WebSocket") -> Gate | None:
    """The gate of this server; None where none was put up."""
    app = websocket.scope.get("app")
    return getattr(app.state, "twilio_gate", None) if app else None


class _OnlyOpenPaths:
    """Middleware: there is nothing at any other address."""

    def __init__(self, app: "ASGIApp") -> None:
        self._app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        from starlette.responses import Response
        from starlette.websockets import WebSocketClose

        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        refusal = Response(status_code=404) if scope["type"] == "http" else WebSocketClose()
        await refusal(scope, receive, send)


def _answer_with_twiml(
    gate: Gate | None, host: str, reserve: Reserve
) -> "Callable[[Request], Coroutine[None, None, Response]]":
    from starlette.responses import RedirectResponse, Response

    async def answer(request: "Request") -> "Response":
        fields = await signed_form(gate, host, request)
        if fields is None:
            return not_signed(host)
        if request.method != "POST" and "CallSid" not in fields:
            # A browser, to Pipecat's page.
            return RedirectResponse("/client/")
        if not host:
            return Response(NO_HOST, status_code=503, media_type="text/plain")
        call_sid, caller = fields.get("CallSid", ""), fields.get("From", "")
        if (gate or call_sid) and not is_sid(call_sid, "CA"):
            logger.warning("Refused a request for TwiML: its CallSid is none of Twilio's")
            return Response("not a call of Twilio's", status_code=400)
        token = gate.issue(call_sid) if gate else ""
        if refusal := reserve(call_sid, caller, _is_used(gate, token)):
            logger.warning(f"A call was refused: {refusal}")
            return Response(BUSY, media_type="application/xml")
        parameters = {"from_number": caller, "to_number": fields.get("To", "")} if call_sid else {}
        return _connect(host, token, parameters | _sip(fields))

    return answer


def _sip(fields: Mapping[str, str]) -> dict[str, str]:
    """What a call that came over a SIP trunk brings along, as far as a stream may carry it."""
    return {
        name: value
        for name, value in fields.items()
        if (name == "SipCallId" or name.startswith(transfer.SIP_HEADER))
        and len(name) + len(value) < PARAMETER_CHARACTERS
    }


def _is_used(gate: Gate | None, token: str) -> Callable[[], bool]:
    return lambda: gate is not None and gate.is_used(token)


def _connect(host: str, token: str, parameters: Mapping[str, str]) -> "Response":
    """Answer with the TwiML that connects a call with the bot."""
    from starlette.responses import Response

    brought = {**parameters, TOKEN_PARAMETER: token} if token else parameters
    document = TWIML.format(
        host=host, parameters=twiml.parameters(brought), failover=transfer.failover_twiml()
    )
    return Response(document, media_type="application/xml")


def _go_on_after_transfer(
    gate: Gate, host: str, reserve: Reserve
) -> "Callable[[Request], Coroutine[None, None, Response]]":
    from starlette.responses import Response

    async def answer(request: "Request") -> "Response":
        fields, note = await _about_transfer(gate, host, request)
        if note is None:
            return not_signed(host)
        outcome = transfer.outcome_of_dial(fields)
        logger.info(f"A transfer came to: {outcome}")
        if outcome == "completed":
            return Response(transfer.HANG_UP, media_type="application/xml")
        call_sid = fields["call"]
        # They have had a line and get one: what is refused here could not be told them.
        token = gate.issue(call_sid)
        reserve(call_sid, fields.get("From", ""), _is_used(gate, token))
        told = transfer.Note(note.name, note.summary, outcome)
        sealed = told.seal(call_sid, setting("TWILIO_AUTH_TOKEN"))
        return _connect(host, token, {**note.parameters, transfer.NOTE: sealed})

    return answer


def _whisper(gate: Gate, host: str) -> "Callable[[Request], Coroutine[None, None, Response]]":
    from starlette.responses import Response

    async def answer(request: "Request") -> "Response":
        fields, note = await _about_transfer(gate, host, request)
        if note is None:
            return not_signed(host)
        told = transfer.CONNECT if fields.get("Digits") else note.whisper
        return Response(told, media_type="application/xml")

    return answer


async def signed_form(gate: Gate | None, host: str, request: "Request") -> dict[str, str] | None:
    """What Twilio has sent to this server, known to it as `host`; None if that was not Twilio.

    Without a gate it is whatever came. Twilio's webhooks can be set to GET, with the fields in the
    address.
    """
    signature = request.headers.get("X-Twilio-Signature", "")
    # Without waiting for a body that a stranger may take hours to send.
    if gate and not signature:
        return None
    is_posted = request.method == "POST"
    query, path = request.url.query, request.url.path
    body = await request.body() if is_posted else query.encode()
    try:
        form = parse_qsl(
            body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=MAX_FORM_FIELDS
        )
    except ValueError:
        return None
    signed = form if is_posted else []
    if gate and not gate.signed_by_twilio(host, query, signed, signature, path=path):
        return None
    return dict(form)


async def _about_transfer(
    gate: Gate, host: str, request: "Request"
) -> tuple[dict[str, str], transfer.Note | None]:
    """The fields of a request that a transfer had Twilio make, and its note; None if forged."""
    form = await signed_form(gate, host, request)
    if form is None:
        return {}, None
    fields = {**form, **request.query_params}
    sealed, call_sid = fields.get("note", ""), fields.get("call", "")
    # Of any age: they may have talked for hours. That Twilio asks is shown by the signature.
    note = transfer.Note.open(sealed, call_sid, setting("TWILIO_AUTH_TOKEN"), place="address")
    return fields, note


def not_signed(host: str) -> "Response":
    """Refuse what Twilio has not signed for `https://HOST/`."""
    from starlette.responses import Response

    if not host:
        return Response(NO_HOST, status_code=503, headers={"Connection": "close"})
    logger.warning(f"Refused a request for TwiML: not signed by Twilio for https://{host}/")
    # What is left of the body is nobody's business: the connection closes.
    return Response("not signed by Twilio", status_code=403, headers={"Connection": "close"})
