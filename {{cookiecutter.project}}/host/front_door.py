"""What `python bot.py` asks of strangers before they cost anything.

Pipecat's development server takes what comes: bodies that never end, sockets that say nothing,
messages of megabytes, and calls until none is held well. Here whoever has not proved to be a caller
has few seconds and kilobytes and may have few connections, and the calls in progress go on.
"""

import argparse
import asyncio
import inspect
import ipaddress
import json
import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn.config
from fastapi.exceptions import RequestValidationError
from loguru import logger
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

import config
from host import calls, shutdown

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Twilio's form is one or two kilobytes, the offer of a browser ten.
MAX_BODY_BYTES = 64 * 1024
BODY_SECONDS = 10.0
# What a browser may upload in a call, where that is switched on.
MAX_FILE_BYTES = 25 * 1024 * 1024
# What of a request is no body: its header, and all that may stand between and behind the pieces of
# a body. Of a browser with many cookies it is a few kilobytes and forty fields.
MAX_HEADER_BYTES = 64 * 1024
MAX_HEADER_FIELDS = 200
# A message of Twilio's is less than one; a burst is many messages.
MAX_MESSAGE_BYTES = 64 * 1024
# Of answers to pings, of what comes after the end, and of pieces of one message: uvicorn takes any
# number.
MAX_UNREAD_BYTES, MAX_PIECES = 1024 * 1024, 1000
# How long a peer may take to read the last of what it was sent.
UNREAD_SECONDS = 10.0
# For everything up to the proof: header, body, the first messages of a stream. Counts anew when a
# request was answered: a proxy sends many through one connection.
UNPROVEN_SECONDS = 30.0
# Of those that wait for longer than a moment, and of all: below the 1024 files that a process may
# have open. Whoever comes in a burst of strangers is not read yet when the last of them is there.
MAX_UNPROVEN, MAX_WITH_A_BURST = 128, 768
MOMENT_SECONDS = 1.0
# Microphone, camera, screen and data: all that a client of Pipecat's offers. What it sends besides
# is decoded and kept, for nobody.
MAX_MEDIA = 4
# Pipecat keeps the body of each POST /start until its call is over, and most may never come.
MAX_SESSIONS = 50
# Of `POST /start`: what a room of Daily's, made at the owner's cost, lets its guests do.
ROOM = ("dailyRoomProperties", "dailyMeetingTokenProperties")
LAST_PORT = 65535
TRANSPORTS = ["webrtc", "daily", "twilio"]
# What Pipecat's server answers itself, in whatever way a stranger asks.
PIPECATS = re.compile(r"(/.+)?/api/offer|/start|/daily|/daily-dialin-webhook|/sessions/.+|/files")


class Connections:
    """The connections that have proved nothing yet, oldest first. When there are too many the
    oldest goes: a caller proves it within milliseconds, and whoever only waits makes room.
    """

    def __init__(
        self,
        limit: int = MAX_UNPROVEN,
        limit_with_a_burst: int = MAX_WITH_A_BURST,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Let `limit` wait for longer than a moment, and `limit_with_a_burst` at all."""
        self._limit = limit
        self._limit_with_a_burst = limit_with_a_burst
        self._clock = clock
        # Each with the time since which it has proved nothing.
        self._unproven: dict[asyncio.Transport, float] = {}

    def __len__(self) -> int:
        """How many there are."""
        return len(self._unproven)

    def opened(self, connection: asyncio.Transport) -> None:
        """Note a new connection."""
        now = self._clock()
        self._unproven[connection] = now
        while len(self._unproven) > self._limit:
            oldest, since = next(iter(self._unproven.items()))
            is_burst = now - since < MOMENT_SECONDS
            if is_burst and len(self._unproven) <= self._limit_with_a_burst:
                break
            self.forget(oldest)
            oldest.abort()

    def renew(self, connection: asyncio.Transport) -> None:
        """Take a connection for the newest, if it has still to prove something."""
        if connection in self._unproven:
            self.forget(connection)
            self._unproven[connection] = self._clock()

    def forget(self, connection: asyncio.Transport) -> None:
        """Let a connection be: it is proven, or gone."""
        self._unproven.pop(connection, None)

    def expire(self, connection: asyncio.Transport) -> None:
        """Close a connection if it still has proved nothing."""
        if connection in self._unproven:
            self.forget(connection)
            connection.abort()


connections = Connections()
"""Those of this process."""


class Protocol(AutoHTTPProtocol):
    """uvicorn's, with limits for those that have proved nothing."""

    def __init__(self, config: uvicorn.Config, *args: Any, **options: Any) -> None:
        # Pipecat's runner passes nothing on to uvicorn: this is the way to its settings.
        config.ws_max_size = MAX_MESSAGE_BYTES
        super().__init__(config, *args, **options)  # type: ignore[call-arg]
        self.ws_protocol_class = WebSocketProtocol
        self._connection: asyncio.Transport | None = None
        self._time_is_up: asyncio.TimerHandle | None = None
        # Of the request that is being read; h11 has a limit of its own and does not count here.
        self._header_bytes: int | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to count its time."""
        super().connection_made(transport)
        self._connection = transport
        connections.opened(transport)
        self._count_time(transport)

    def on_message_begin(self) -> None:
        """Begin to count what is no body; httptools, unlike h11, takes any number of bytes."""
        self._header_bytes = 0
        super().on_message_begin()  # type: ignore[misc]

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a field of the header, or one behind the body, which uvicorn keeps as well."""
        if len(self.headers) < MAX_HEADER_FIELDS:  # type: ignore[attr-defined]
            super().on_header(name, value)  # type: ignore[misc]
        elif self._connection:
            self._connection.abort()

    def on_body(self, body: bytes) -> None:
        """Leave to the middleware how long a body may be."""
        if self._header_bytes is not None:
            self._header_bytes -= len(body)
        super().on_body(body)  # type: ignore[misc]

    def on_response_complete(self) -> None:
        """Begin to count anew."""
        if self._connection:
            connections.renew(self._connection)
            self._count_time(self._connection)
        super().on_response_complete()  # type: ignore[misc]

    def _count_time(self, connection: asyncio.Transport) -> None:
        if self._time_is_up:
            self._time_is_up.cancel()
        loop = asyncio.get_running_loop()
        self._time_is_up = loop.call_later(UNPROVEN_SECONDS, connections.expire, connection)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        if self._connection:
            connections.forget(self._connection)
        if self._time_is_up:
            self._time_is_up.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Let what answers this request vouch for its connection."""
        assert self._connection
        if self._header_bytes is not None:
            self._header_bytes += len(data)
        vouch = partial(connections.forget, self._connection)
        outer = calls.proves_its_connection.set(vouch)
        try:
            super().data_received(data)
        finally:
            calls.proves_its_connection.reset(outer)
        if (self._header_bytes or 0) > MAX_HEADER_BYTES:
            self._connection.abort()


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's, with limits for a peer that sends and does not read."""

    # Since it was told that the connection is closed.
    _late_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Break off what only fills memory, or takes time from the calls."""
        if self.close_sent:
            self._late_bytes += len(data)
        super().data_received(data)
        unread = max(self.transport.get_write_buffer_size(), self._late_bytes)
        if unread > MAX_UNREAD_BYTES or len(self.frames) > MAX_PIECES:
            self.transport.abort()

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        """See to it that a connection is closed when its call is over, read or unread."""
        super().on_task_complete(task)
        self.loop.call_later(UNREAD_SECONDS, self.transport.abort)


def guard(
    app: "FastAPI",
    arguments: Sequence[str],
    *,
    may_choose_room: Callable[[Mapping[str, Any]], bool] = lambda _asked: False,
) -> None:
    """Put limits before every route of `app`, Pipecat's server, and say at /status how it is.

    Args:
        app: Pipecat's development server, before it starts.
        arguments: The command line of bot.py, without the program.
        may_choose_room: Whether whoever asks for this session may say what its Daily room can do.

    Raises:
        SystemExit: A limit in the environment is no number, or --port is no port.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-t", "--transport", nargs="?")
    parser.add_argument("--port", nargs="?")
    options = parser.parse_known_args(arguments)[0]
    transport, port = options.transport, options.port
    # The system would take the rest of a division, and the log would name another.
    if port and port.isdecimal() and int(port) > LAST_PORT:
        raise SystemExit(f"--port is one of this machine's, up to {LAST_PORT}, not {port}")
    if transport == "twilio":
        calls.of_process.default_limit = calls.MAX_PHONE_CALLS
    try:
        limit = calls.of_process.limit
        config.whole_number("MAX_CALLS_PER_CALLER", calls.MAX_CALLS_PER_CALLER)
    except RuntimeError as error:
        raise SystemExit(str(error)) from None

    async def status(request: Request) -> Response:
        draining = shutdown.is_draining()
        busy = bool(limit) and len(calls.of_process) >= limit
        answer = {
            "status": "draining" if draining else "busy" if busy else "ready",
            "transports": [transport] if transport else TRANSPORTS,
            "calls": len(calls.of_process),
            "max_calls": limit,
            "refused": calls.of_process.refused,
        }
        # A proxy that asks sends its next call to another process; one that asks for a line does
        # so when this one is full, too.
        is_none = draining or (busy and "line" in request.query_params)
        return JSONResponse(answer, 503 if is_none else 200)

    # Before Pipecat's own route for the same address: the first one answers.
    app.router.routes.append(Route("/status", status, methods=["GET"]))
    app.add_middleware(FrontDoor, may_choose_room=may_choose_room)
    build = app.build_middleware_stack

    def build_with_answer() -> "ASGIApp":
        # Pipecat adds its own when it starts, after this: two ERROR lines for any stranger's {}.
        app.add_exception_handler(RequestValidationError, _not_valid)
        return build()

    app.build_middleware_stack = build_with_answer
    # What uvicorn speaks HTTP with where nothing else was asked for.
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{Protocol.__name__}"


class FrontDoor:
    """Middleware: limits how long and large a request may be, and turns calls away when full."""

    def __init__(
        self,
        app: "ASGIApp",
        *,
        may_choose_room: Callable[[Mapping[str, Any]], bool] = lambda _asked: False,
    ) -> None:
        self._app = app
        self._may_choose_room = may_choose_room

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Pass on what is within the limits."""
        calls.caller_address.set(_address(scope))
        if scope["type"] == "websocket":
            receive = _noting_close(scope, receive)
        if scope["type"] != "http":
            await self._pass_on(scope, receive, send)
            return
        is_file = scope["path"].endswith("/files")
        receive = _limited(receive, MAX_FILE_BYTES if is_file else MAX_BODY_BYTES)
        if not _asks_for_call(scope):
            await self._pass_on(scope, receive, send)
            return
        receive, asked = await _read(receive)
        if _media(asked) > MAX_MEDIA:
            detail = f"An offer has up to {MAX_MEDIA} media sections."
            await JSONResponse({"detail": detail}, 400)(scope, receive, send)
            return
        if any(name in asked for name in ROOM) and not self._may_choose_room(asked):
            detail = f"{' and '.join(ROOM)} are for calls that the bot is to place."
            await JSONResponse({"detail": detail}, 403)(scope, receive, send)
            return
        # One that names its connection is about the tracks of a call that is on.
        if scope["path"].endswith("/api/offer") and asked.get("pc_id"):
            await self._pass_on(scope, receive, send)
            return
        if refusal := calls.of_process.refusal(calls.caller_address.get()):
            calls.of_process.refused += 1
            logger.warning(f"A call was refused: {refusal}")
            detail = f"{refusal[0].upper()}{refusal[1:]}."
            answer = JSONResponse({"detail": detail}, 503, headers={"Connection": "close"})
            await answer(scope, receive, send)
            return
        with calls.of_process.promised(calls.caller_address.get()):
            await self._pass_on(scope, receive, send)
        _forget_sessions(scope)

    async def _pass_on(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        has_answered = False

        async def answering(message: "Message") -> None:
            nonlocal has_answered
            has_answered = True
            await send(message)

        try:
            # Who hangs up in the middle of a request is nobody's fault.
            with suppress(ClientDisconnect):
                await self._app(scope, receive, answering)
        except Exception as error:
            if has_answered or scope["type"] != "http" or not PIPECATS.fullmatch(scope["path"]):
                raise
            # Nor is what a stranger asks for: one line, and no traceback.
            await _cannot_be_answered(scope["path"], error, 400)(scope, receive, send)


async def _not_valid(request: Request, error: Exception) -> Response:
    return _cannot_be_answered(request.url.path, error, 422)


def _cannot_be_answered(path: str, error: Exception, status: int) -> Response:
    place = traceback.extract_tb(error.__traceback__)[-1]
    # Of an address of strangers only what is known here.
    known = path if path in ("/api/offer", "/start", "/daily", "/files") else "/…"
    logger.warning(
        f"A request for {known} could not be answered: {type(error).__name__} in "
        f"{Path(place.filename).name}:{place.lineno}"
    )
    return JSONResponse({"detail": "This request cannot be answered."}, status)


def _address(scope: "Scope") -> str:
    """Where a request comes from; empty for this machine, where a proxy may speak for anybody.

    Of IPv6 the network of 64 bits, in which everybody has all addresses.
    """
    host = (scope.get("client") or [""])[0]
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if address.is_loopback:
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def _asks_for_call(scope: "Scope") -> bool:
    path, method = scope["path"], scope["method"]
    return (method == "POST" and path.endswith("/api/offer")) or (method, path) in (
        ("POST", "/start"),
        ("POST", "/daily-dialin-webhook"),
        ("GET", "/daily"),
    )


def _noting_close(scope: "Scope", receive: "Receive") -> "Receive":
    """Let calls.is_broken_off() know why a websocket was closed."""

    async def noting() -> "Message":
        message = await receive()
        if message["type"] == "websocket.disconnect":
            scope[calls.CLOSE_CODE] = message.get("code")
        return message

    return noting


def _limited(receive: "Receive", max_bytes: int) -> "Receive":
    """Read a body for BODY_SECONDS and up to `max_bytes`."""
    deadline = asyncio.get_running_loop().time() + BODY_SECONDS
    size, is_whole = 0, False

    async def limited() -> "Message":
        nonlocal size, is_whole
        if is_whole:
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise _refused(408) from None
        size += len(message.get("body", b""))
        if size > max_bytes:
            raise _refused(413)
        is_whole = not message.get("more_body")
        return message

    return limited


def _refused(status: int) -> HTTPException:
    # What is left of the body is nobody's business: the connection closes.
    return HTTPException(status, headers={"Connection": "close"})


async def _read(receive: "Receive") -> "tuple[Receive, dict[str, Any]]":
    """Read a JSON object; returns what gives the body out once more, and the object.

    It is empty where the body is none; whoever reads it next says so.
    """
    body = b""
    try:
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        else:
            return receive, {}
    except HTTPException:
        # Too slow or too large, and so it is found next time.
        return receive, {}
    asked: Any = None
    with suppress(ValueError, RecursionError):
        asked = json.loads(body)
    given = False

    async def again() -> "Message":
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again, asked if isinstance(asked, dict) else {}


def _media(offer: dict[str, Any]) -> int:
    return sum(line.startswith("m=") for line in str(offer.get("sdp")).splitlines())


def _forget_sessions(scope: "Scope") -> None:
    """Forget the oldest of the sessions that were asked for; Pipecat has no other way to them."""
    endpoint = scope.get("endpoint")
    if scope["path"] == "/start" and inspect.isfunction(endpoint):
        sessions = inspect.getclosurevars(endpoint).nonlocals.get("active_sessions", {})
        while len(sessions) > MAX_SESSIONS:
            del sessions[next(iter(sessions))]
