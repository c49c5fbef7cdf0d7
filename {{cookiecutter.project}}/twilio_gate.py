"""Lets in the phone calls that Twilio sends to your own server, and nobody else's.

`python bot.py` serves `/ws` to whoever finds it, and a stranger on the line costs money. With
`TWILIO_AUTH_TOKEN` set, two things are asked for. The request for the TwiML has to be signed by
Twilio. And the call that follows has to bring the token written into that TwiML: good for that
one call, once, for a minute.

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

TOKEN_PARAMETER = "gate_token"
# Twilio opens the stream as soon as it has read the TwiML.
TOKEN_SECONDS = 60.0
# Only a signed request makes a token, so this is a bound on memory and no limit on callers.
MAX_TOKENS = 1000
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
