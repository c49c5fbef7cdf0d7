"""Lets in the phone calls that Twilio sends to your own server, and nobody else.

`python bot.py` talks to whoever finds it, and a stranger on the line costs money. With
`TWILIO_AUTH_TOKEN` set, a phone call has to pass twice: the request for its TwiML has to be signed
by Twilio, and its stream has to bring the token written into that TwiML, which is good for that
one call, once, for a minute. With `-t twilio` the other ways to the bot are closed as well.

The token travels as a `<Parameter>` of the stream, inside the connection, not in its address:
addresses end up in the access logs of every proxy on the way.
"""

import argparse
import base64
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Coroutine, MutableMapping, Sequence
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl
from xml.sax.saxutils import quoteattr

from loguru import logger

from config import setting

if TYPE_CHECKING:
    from fastapi import FastAPI, WebSocket
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

TOKEN_PARAMETER = "gate_token"
# Twilio opens the stream as soon as it has read the TwiML.
TOKEN_SECONDS = 60.0
# Only a signed request makes a token, so this is a bound on memory and no limit on callers.
MAX_TOKENS = 1000
# What `-t twilio` serves behind a gate. Pipecat's server has more: a browser could call by
# /api/offer, whatever -t says.
OPEN_PATHS = {"/", "/ws", "/status"}
# Twilio's form is one or two kilobytes.
MAX_BODY_BYTES = 64 * 1024

TWIML = """<?xml version="1.0" encoding="UTF-8"?>
<Response>
  <Connect>
    <Stream url="wss://{host}/ws">
      <Parameter name="from_number" value={from_number} />
      <Parameter name="to_number" value={to_number} />
      <Parameter name="{parameter}" value={token} />
    </Stream>
  </Connect>
</Response>"""


class Gate:
    """Checks Twilio's signature, and gives out the tokens that calls have to bring."""

    def __init__(self, auth_token: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Open a gate.

        Args:
            auth_token: The auth token of the Twilio account, which signs its requests.
            clock: Seconds; tokens expire by it.
        """
        self._auth_token = auth_token.encode()
        self._clock = clock
        # By call, oldest first. The id of a call is no secret, so looking it up betrays nothing.
        self._tokens: dict[str, tuple[str, float]] = {}

    def signed_by_twilio(
        self, host: str, query: str, form: Sequence[tuple[str, str]], signature: str
    ) -> bool:
        """Whether Twilio signed this request for `https://HOST/?QUERY`.

        Args:
            host: The public name of this server, with the port if it has one.
            query: What follows the question mark, as requested; empty without one.
            form: The posted fields.
            signature: The header X-Twilio-Signature.
        """
        # Twilio signs the address as it was entered in its console, with or without what goes
        # without saying: the port of HTTPS, the slash after a bare name.
        name = host.removesuffix(":443")
        rests = [f"/?{query}", f"?{query}"] if query else ["/", ""]
        addresses = [f"https://{name}{port}{rest}" for port in ("", ":443") for rest in rests]
        wanted = [self.signature(address, form) for address in addresses]
        return any([hmac.compare_digest(one, signature.encode()) for one in wanted])

    def signature(self, address: str, form: Sequence[tuple[str, str]]) -> bytes:
        """Sign as Twilio does: HMAC-SHA1 over the address and all fields in order of their names.

        https://www.twilio.com/docs/usage/security#validating-requests
        """
        text = address + "".join(name + value for name, value in sorted(set(form)))
        return base64.b64encode(hmac.digest(self._auth_token, text.encode(), hashlib.sha1))

    def issue(self, call_sid: str) -> str:
        """Return a new token for this call. An older one of the same call is void."""
        now = self._clock()
        self._tokens.pop(call_sid, None)
        for call, (_, expires) in list(self._tokens.items()):
            if expires > now and len(self._tokens) < MAX_TOKENS:
                break
            del self._tokens[call]
        token = secrets.token_urlsafe(32)
        self._tokens[call_sid] = (token, now + TOKEN_SECONDS)
        return token

    def lets_in(self, call_sid: str, token: str) -> bool:
        """Whether the token was issued for this call and is neither used nor too old; uses it."""
        issued, expires = self._tokens.get(call_sid, ("", 0.0))
        if not issued or not hmac.compare_digest(issued.encode(), token.encode()):
            return False
        del self._tokens[call_sid]
        return self._clock() < expires


def guard(app: "FastAPI", arguments: Sequence[str]) -> None:
    """Put a gate before the telephony routes of `app`, where TWILIO_AUTH_TOKEN is set.

    Args:
        app: Pipecat's development server, before it starts.
        arguments: The command line of bot.py, without the program.

    Raises:
        SystemExit: `-t twilio` was asked for and not said under which name Twilio reaches it.
    """
    # Pipecat reads its options when it is too late to add a route, so these two are read here too.
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-t", "--transport", nargs="?")
    parser.add_argument("-x", "--proxy", nargs="?")
    options, _ = parser.parse_known_args(arguments)
    host = (options.proxy or "").rpartition("://")[2].strip("/")
    is_for_twilio = options.transport == "twilio"
    if is_for_twilio and not host:
        raise SystemExit(
            "-t twilio needs -x HOST as well, the public name under which Twilio reaches this "
            "server over HTTPS, such as voice.example.org"
        )
    auth_token = setting("TWILIO_AUTH_TOKEN")
    if not auth_token:
        if is_for_twilio:
            logger.warning(
                "TWILIO_AUTH_TOKEN is not set: whoever finds this server can talk to the bot"
            )
        return

    from starlette.routing import Route

    gate = Gate(auth_token)
    # Where lets_in finds it. On Pipecat Cloud nobody calls guard, and the platform answers.
    app.state.twilio_gate = gate
    if is_for_twilio:
        # Before Pipecat's own route for the same address: the first one answers.
        app.router.routes.append(Route("/", _answer_with_twiml(gate, host), methods=["POST"]))
        app.add_middleware(_OnlyOpenPaths)


def lets_in(
    websocket: "WebSocket", call_sid: str | None, parameters: MutableMapping[str, object]
) -> bool:
    """Whether this call may talk to the bot. Where no gate was put up, everyone may.

    Takes the token out of `parameters`, for what is left is kept with the call.
    """
    token = parameters.pop(TOKEN_PARAMETER, "")
    app = websocket.scope.get("app")
    gate: Gate | None = getattr(app.state, "twilio_gate", None) if app else None
    return gate is None or gate.lets_in(call_sid or "", str(token))


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
    gate: Gate, host: str
) -> "Callable[[Request], Coroutine[None, None, Response]]":
    from starlette.responses import Response

    async def answer(request: "Request") -> "Response":
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY_BYTES:
                return Response(status_code=413)
        form = parse_qsl(body.decode("utf-8", errors="replace"), keep_blank_values=True)
        fields = dict(form)
        signature = request.headers.get("X-Twilio-Signature", "")
        is_signed = gate.signed_by_twilio(host, request.url.query, form, signature)
        if not is_signed or not fields.get("CallSid"):
            logger.warning(f"Refused a request for TwiML: no call signed for https://{host}/")
            return Response("not signed by Twilio", status_code=403)
        twiml = TWIML.format(
            host=host,
            from_number=quoteattr(fields.get("From", "")),
            to_number=quoteattr(fields.get("To", "")),
            parameter=TOKEN_PARAMETER,
            token=quoteattr(gate.issue(fields["CallSid"])),
        )
        return Response(twiml, media_type="application/xml")

    return answer
