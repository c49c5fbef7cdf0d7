"""What the loopback providers have in common: a listener on 127.0.0.1, a log, and the faults.

A protocol is a subclass with routes; everything it says on the wire is in its own file.
"""

import asyncio
import base64
import json
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp import WSMsgType, web
from loguru import logger

from rehearsal.engines.engine import Engine
from rehearsal.providers.faults import Break, Faults

HOST = "127.0.0.1"
# Below what systems give by themselves to those who connect: Linux from 32768, others from 49152.
FIRST_PORT, PORTS = 20_000, 12_000

_SECRET_HEADERS = {"authorization", "x-api-key", "x-goog-api-key", "xi-api-key"}
# A handler that hangs on purpose would otherwise hold the shutdown for aiohttp's 60 seconds.
_SHUTDOWN_SECONDS = 0.1
# Who looks keys up behind an open socket takes a moment; a client believes itself connected.
_LOOKUP_SECONDS = 0.1
_GARBAGE = "\x00 no message of this protocol {"


def free_port(preferred: int = 0) -> int:
    """Return `preferred`, else the next free port after it; any free port for 0.

    It is bound later: until then no connection of another process is given that port.
    """
    for port in range(preferred or FIRST_PORT + secrets.randbelow(PORTS), 65536):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind((HOST, port))
                return probe.getsockname()[1]
    raise OSError(f"no free port from {preferred} on")


@dataclass
class Request:
    """One HTTP request or websocket handshake as it arrived.

    Attributes:
        provider: Name of the server it came to.
        peer: Host and port it came from.
        headers: Names in lower case; values that hold a key are replaced.
        key: The API key it brought, empty without one. Never logged.
        at: Arrival, seconds on `time.monotonic`.
        body: What was posted, parsed; None for a websocket.
        status: The HTTP status it was answered with; None while unanswered.
    """

    provider: str
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    peer: tuple[str, int]
    key: str = field(repr=False)
    at: float = field(default_factory=time.monotonic)
    body: Any = None
    status: int | None = None


class WireLog:
    """What passed on the wires of a rehearsal, all of it, and a way to wait for it."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.requests: list[Request] = []
        self.connections: list[Connection] = []
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Let those who wait look again; to be called after every change."""
        self._changed.set()

    async def until(self, happened: Callable[[], object], *, within_s: float = 30.0) -> None:
        """Wait until `happened()` is true, looking again whenever something passes on the wire.

        Raises:
            TimeoutError: It did not happen in time; the text says what did.
        """
        try:
            async with asyncio.timeout(within_s):
                while not happened():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise TimeoutError(f"not within {within_s} s; on the wire: {self}") from None

    def __str__(self) -> str:
        requests = [f"{r.method} {r.path} -> {r.status}" for r in self.requests]
        messages = [
            f"{c.request.provider}: {len(c.received)} in, {len(c.sent)} out, {c.audio_bytes} B"
            for c in self.connections
        ]
        return "; ".join(requests + messages) or "nothing"


class Connection:
    """One websocket: its handshake, its messages and how to send more. Audio is only counted.

    Attributes:
        received: JSON messages of the client, oldest first.
        sent: JSON messages of the server; audio in them is replaced by its size in bytes.
        audio_bytes: Size of the audio that passed, whichever way.
        is_open: Whether it still is.
    """

    def __init__(
        self, request: Request, http: web.Request, socket: web.WebSocketResponse, log: WireLog
    ) -> None:
        """Begin the record of a socket whose handshake is done."""
        self.request = request
        self.received: list[dict[str, Any]] = []
        self.sent: list[dict[str, Any]] = []
        self.audio_bytes = 0
        self.is_open = True
        self._http = http
        self._socket = socket
        self._log = log

    @property
    def response(self) -> web.WebSocketResponse:
        """What the handler of this socket returns in the end."""
        return self._socket

    async def __aiter__(self) -> AsyncIterator[bytes | dict[str, Any]]:
        """Yield what the client sends, audio as bytes and JSON parsed, until it goes away."""
        async for message in self._socket:
            if message.type is WSMsgType.BINARY:
                self.audio_bytes += len(message.data)
                self._log.changed()
                yield message.data
            elif message.type is WSMsgType.TEXT:
                parsed = json.loads(message.data)
                self.received.append(parsed)
                self._log.changed()
                yield parsed

    async def send(self, message: dict[str, Any]) -> None:
        """Send a JSON message."""
        await self._send(message, message)

    async def send_audio(self, message: dict[str, Any], pcm: bytes, *, field: str = "data") -> None:
        """Send a JSON message that carries `pcm` as base64 in one of its fields."""
        self.audio_bytes += len(pcm)
        encoded = base64.b64encode(pcm).decode()
        await self._send({**message, field: encoded}, {**message, field: len(pcm)})

    async def send_binary(self, pcm: bytes) -> None:
        """Send audio as a binary message."""
        self.audio_bytes += len(pcm)
        self._log.changed()
        await self._socket.send_bytes(pcm)

    async def break_off(self, how: Break, message: dict[str, Any]) -> None:
        """Break in the middle of an answer, where `message` would have come; stalls for ever."""
        match how:
            case Break.CUT:
                cut(self._http)
            case Break.STALL:
                await asyncio.Event().wait()
            case Break.HALF:
                text = json.dumps(message)
                await self._socket.send_str(text[: len(text) // 2])
                await self._socket.close()
            case Break.GARBAGE:
                await self._socket.send_str(_GARBAGE)

    async def _send(self, message: dict[str, Any], as_logged: dict[str, Any]) -> None:
        self.sent.append(as_logged)
        self._log.changed()
        await self._socket.send_json(message)


class ProviderServer:
    """A provider on its own port of 127.0.0.1. Subclasses speak its protocol.

    Attributes:
        name: Of the provider; with the role where it has two.
        speaks_to: Names of the service classes of Pipecat, or of services.py, at the other end.
        wrong_key_status: The HTTP status that answers a missing or wrong key.
    """

    name: str
    speaks_to: tuple[str, ...] = ()
    wrong_key_status: int = 401

    def __init__(self, log: WireLog, faults: Faults | None = None) -> None:
        """Prepare the server; `start` makes it listen."""
        self.faults = faults or Faults()
        self.port = 0
        self._log = log
        self._runner: web.AppRunner | None = None
        self._site: web.SockSite | None = None
        self._reserved: socket.socket | None = None

    def routes(self) -> Iterable[web.RouteDef]:
        """Return the protocol's routes."""
        raise NotImplementedError

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point a bot here. The keys are placeholders; any key is taken."""
        raise NotImplementedError

    def key_of(self, request: web.Request) -> str:
        """Return the API key the request brings, empty without one."""
        return request.headers.get("Authorization", "").partition(" ")[2]

    def error(self, status: int) -> Mapping[str, Any]:
        """Return the JSON body with which the provider refuses a request."""
        raise NotImplementedError

    @property
    def requests(self) -> list[Request]:
        """The requests and handshakes that came to this server, oldest first."""
        return [r for r in self._log.requests if r.provider == self.name]

    @property
    def connections(self) -> list[Connection]:
        """The websockets of this server, oldest first, closed ones too."""
        return [c for c in self._log.connections if c.request.provider == self.name]

    async def start(self, port: int = 0) -> None:
        """Listen on `port`, or on a free one for 0.

        Raises:
            OSError: The port is taken.
        """
        application = web.Application(middlewares=[_who_left_is_not_answered])
        application.add_routes(self.routes())
        self._runner = web.AppRunner(
            application,
            access_log=None,
            # A client that goes away (barge-in cancels a completion) ends the work for it.
            handler_cancellation=True,
            shutdown_timeout=_SHUTDOWN_SECONDS,
        )
        await self._runner.setup()
        self._reserved = _reserve(port)
        self.port = self._reserved.getsockname()[1]
        await self.accept()

    async def accept(self) -> None:
        """Listen again after `refuse`."""
        if self._runner and self._reserved:
            self._site = web.SockSite(self._runner, self._reserved)
            self._reserved = None
            await self._site.start()

    async def refuse(self) -> None:
        """Refuse new connections. Live ones stay; the port stays reserved."""
        if self._site:
            await self._site.stop()
            self._site = None
            self._reserved = _reserve(self.port)

    async def drop(self) -> None:
        """Cut all live connections, without goodbye."""
        server = self._runner.server if self._runner else None
        for handler in server.connections if server else []:
            if isinstance(handler.transport, asyncio.Transport):
                handler.transport.abort()

    async def aclose(self) -> None:
        """Cut what is live and stop listening."""
        await self.drop()
        if self._runner:
            await self._runner.cleanup()
        if self._reserved:
            self._reserved.close()

    async def admit(self, request: web.Request, body: Any = None) -> Request | web.Response:
        """Log a request; return its entry, or the refusal to answer it with."""
        peer = request.transport.get_extra_info("peername") if request.transport else None
        entry = Request(
            provider=self.name,
            method=request.method,
            path=request.path,
            query=dict(request.query),
            headers={
                name.lower(): "[REDACTED]" if name.lower() in _SECRET_HEADERS else value
                for name, value in request.headers.items()
            },
            peer=peer[:2] if peer else ("", 0),
            key=self.key_of(request),
            body=body,
        )
        self._log.requests.append(entry)
        self._log.changed()
        if self.faults.hang_handshake:
            await asyncio.Event().wait()
        status = self.faults.refusal() or (None if entry.key else 401)
        if status == 401:
            status = self.wrong_key_status
        logger.debug(
            f"rehearsal: {self.name} got {request.method} {request.path}: {status or 'ok'}"
        )
        if status is None:
            return entry
        headers: dict[str, str] = {}
        if status == 429 and self.faults.retry_after_s is not None:
            headers["Retry-After"] = f"{self.faults.retry_after_s:g}"
        entry.status = status
        self._log.changed()
        return web.json_response(dict(self.error(status)), status=status, headers=headers)

    async def refuse_in_socket(
        self, request: web.Request, error: Mapping[str, Any], *, code: int, reason: str
    ) -> web.WebSocketResponse:
        """Accept a handshake that `admit` refused, only to say why and close with `code`."""
        response = web.WebSocketResponse()
        await response.prepare(request)
        await asyncio.sleep(_LOOKUP_SECONDS)
        await response.send_json(dict(error))
        await response.close(code=code, message=reason.encode())
        return response

    @asynccontextmanager
    async def websocket(self, request: web.Request, entry: Request) -> AsyncIterator[Connection]:
        """Accept the handshake of an admitted request; the socket is closed at the end."""
        # Deflating audio would cost the bot processor time and save next to nothing.
        response = web.WebSocketResponse(compress=False)
        await response.prepare(request)
        entry.status = 101
        connection = Connection(entry, request, response, self._log)
        self._log.connections.append(connection)
        self._log.changed()
        try:
            yield connection
        finally:
            connection.is_open = False
            self._log.changed()
            await response.close()

    async def before_answer(self) -> None:
        """Hold an answer back for as long as the faults say: not at all, a while, for ever."""
        if self.faults.hang:
            await asyncio.Event().wait()
        await asyncio.sleep(self.faults.slow_s)


class EngineServer(ProviderServer):
    """A provider of a service, with an engine behind it that hears, thinks and speaks.

    Attributes:
        engine: Is shared with the other providers, and stays open.
        kind: "stt", "llm" or "tts".
        url_variables: What holds this server's address in the bot's environment.
        module: Where Pipecat has the first class of `speaks_to`; "" if it stands in for none.
        url_argument: What that class calls it; "" where its SDK reads a variable of its own.
    """

    kind: str
    module: str = ""
    url_variables: tuple[str, ...] = ()
    url_argument: str = ""

    def __init__(self, engine: Engine, log: WireLog, faults: Faults | None = None) -> None:
        """Prepare the server; `start` makes it listen."""
        super().__init__(log, faults)
        self.engine = engine

    async def admit_posted(self, request: web.Request) -> dict[str, Any] | web.Response:
        """Log a posted request; return its body when it is time to answer, or the refusal."""
        body = await request.json()
        entry = await self.admit(request, body)
        if isinstance(entry, web.Response):
            return entry
        await self.before_answer()
        entry.status = 200
        self._log.changed()
        return body


@web.middleware
async def _who_left_is_not_answered(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """End the work for a client that went away, or was cut off, before its answer was through.

    aiohttp cancels a handler whose client is gone; one that writes before it does gets an error of
    the connection, which is no fault of the server's to be shown with a traceback.
    """
    try:
        return await handler(request)
    except ConnectionError:
        # aiohttp takes any answer, and finds by itself that there is nobody to send it to.
        return web.Response(status=499)


async def break_off(how: Break, response: web.StreamResponse, request: web.Request) -> None:
    """Break in the middle of a streamed answer, of which nothing more is to be sent then."""
    match how:
        case Break.CUT:
            cut(request)
        case Break.STALL:
            await asyncio.Event().wait()
        case Break.HALF:
            await response.write_eof()
        case Break.GARBAGE:
            await response.write(f"data: {_GARBAGE}\n\n".encode())
            await response.write_eof()


def cut(request: web.Request) -> None:
    """Break the connection of `request` off, without goodbye."""
    if isinstance(request.transport, asyncio.Transport):
        request.transport.abort()


def _reserve(port: int) -> socket.socket:
    """Bind a port without listening: connections to it are refused and nobody else gets it."""
    reserved = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        reserved.bind((HOST, port))
    except OSError as error:
        reserved.close()
        raise OSError(error.errno, f"port {port} of {HOST}: {error.strerror}") from None
    return reserved
