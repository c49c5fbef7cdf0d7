"""Pipecat Cloud's base image as a bot meets it, without Docker: its routes, its session types.

Not a copy of the image's server: a small one of our own on the public types of pipecatcloud and
Pipecat, for what bot.py can notice. `dailyco/pipecat-base` 0.2.3 is what it was written after.
As a program it runs the bot.py of the current folder until SIGTERM, and prints its address:

    python -m rehearsal.host.base_image
"""

import asyncio
import base64
import inspect
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import ModuleType
from typing import Annotated, Any

import uvicorn
from fastapi import BackgroundTasks, FastAPI, Header, Request, WebSocket
from fastapi.responses import JSONResponse
from loguru import logger
from pipecatcloud.agent import (
    DailySessionArguments,
    PipecatSessionArguments,
    SessionArguments,
    SmallWebRTCSessionArguments,
    WebSocketSessionArguments,
)

WEBRTC_WAIT_SECONDS = 120.0
DRAIN_SECONDS = 7200.0
"""The image's defaults: how long a room-less session waits for its offer, a shutdown for calls."""

LOG_FORMAT = "{time} | {level: <8} | {name}:{line} | {extra[session_id]} - {message}"

Readiness = bool | dict[str, Any]


@dataclass
class Session:
    """One call of bot(): what it was given, and how it went."""

    args: SessionArguments
    error: Exception | None = None
    cancelled: bool = False
    returned: asyncio.Event = field(default_factory=asyncio.Event)


class BaseImage:
    """The image's server around one bot module; `app` is its FastAPI application.

    Attributes:
        sessions: Every session so far, oldest first.
    """

    def __init__(self, bot_module: ModuleType) -> None:
        self.app = FastAPI()
        self.sessions: list[Session] = []
        self._bot: Callable[[Any], Awaitable[None]] = bot_module.bot
        self._readyz: Callable[[], Readiness | Awaitable[Readiness]] = getattr(
            bot_module, "readyz", lambda: True
        )
        # What /bot of a room-less session leaves for the offer that follows.
        self._waiting: asyncio.Future[None] | None = None
        self._body: Any = None
        self._limit: float | None = None
        self.app.add_api_route("/livez", self.livez)
        self.app.add_api_route("/readyz", self.readyz)
        self.app.add_api_route("/bot", self.start, methods=["POST"])
        self.app.add_api_websocket_route("/ws", self.websocket)
        if find_spec("aiortc"):
            self._serve_offers()

    @property
    def awaits_offer(self) -> bool:
        """Whether a room-less session was started whose offer has not come yet."""
        return self._waiting is not None

    async def livez(self) -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    async def readyz(self) -> JSONResponse:
        """Ask the bot whether it is ready; an exception means no."""
        try:
            ready = self._readyz()
            ready = await ready if inspect.isawaitable(ready) else ready
        except Exception as error:
            ready = {"ready": False, "error": str(error)}
        if isinstance(ready, bool):
            ready = {"ready": ready}
        return JSONResponse(ready, 200 if ready.get("ready") else 503)

    async def start(
        self,
        body: dict[str, Any],
        x_daily_session_id: Annotated[str | None, Header()] = None,
        x_daily_room_url: Annotated[str | None, Header()] = None,
        x_daily_room_token: Annotated[str | None, Header()] = None,
        x_daily_transport_type: Annotated[str | None, Header()] = None,
        x_pcc_max_session_seconds: Annotated[float | None, Header()] = None,
    ) -> dict[str, Any]:
        """Run a session from its headers; the response comes when the session is over."""
        self._limit = x_pcc_max_session_seconds
        if x_daily_room_url and x_daily_room_token:
            await self._run(
                DailySessionArguments(
                    session_id=x_daily_session_id,
                    body=body,
                    room_url=x_daily_room_url,
                    token=x_daily_room_token,
                )
            )
        elif x_daily_transport_type == "webrtc":
            self._body, self._waiting = body, asyncio.get_running_loop().create_future()
            await asyncio.wait_for(self._waiting, WEBRTC_WAIT_SECONDS)
        else:
            await self._run(PipecatSessionArguments(session_id=x_daily_session_id, body=body))
        return {}

    async def websocket(self, websocket: WebSocket) -> None:
        """Run a session on a websocket that is already accepted; `?body=` is base64 JSON."""
        await websocket.accept()
        body = websocket.query_params.get("body")
        await self._run(
            WebSocketSessionArguments(
                session_id=websocket.headers.get("x-daily-session-id"),
                websocket=websocket,
                body=json.loads(base64.b64decode(body)) if body else None,
            )
        )

    def _serve_offers(self) -> None:
        """Answer WebRTC offers, as the image does where aiortc is installed."""
        from pipecat.transports.smallwebrtc.request_handler import (
            ConnectionMode,
            SmallWebRTCPatchRequest,
            SmallWebRTCRequest,
            SmallWebRTCRequestHandler,
        )

        # One call at a time, and no ICE server but those the platform names: here none.
        offers = SmallWebRTCRequestHandler(ice_servers=[], connection_mode=ConnectionMode.SINGLE)

        @self.app.post("/api/offer")
        async def offer(
            request: Request,
            background: BackgroundTasks,
            x_daily_session_id: Annotated[str | None, Header()] = None,
        ) -> dict[str, str] | None:
            """Answer an offer; the session runs on after the response."""
            offered = SmallWebRTCRequest.from_dict(await request.json())

            async def connected(connection: Any) -> None:
                args = SmallWebRTCSessionArguments(
                    session_id=x_daily_session_id,
                    webrtc_connection=connection,
                    body=offered.request_data or self._body,
                )
                background.add_task(self._run, args)

            return await offers.handle_web_request(offered, connected)

        @self.app.patch("/api/offer")
        async def candidates(request: SmallWebRTCPatchRequest) -> dict[str, str]:
            """Take ICE candidates that come after the offer."""
            await offers.handle_patch_request(request)
            return {"status": "success"}

    async def _run(self, args: SessionArguments) -> None:
        """Run bot() to its end: its exceptions are one log line, its time is limited."""
        session = Session(args)
        self.sessions.append(session)
        limit, self._limit = self._limit, None
        with logger.contextualize(session_id=args.session_id):
            running = asyncio.ensure_future(self._bot(args))

            def cancel() -> None:
                session.cancelled = running.cancel()

            stop = asyncio.get_running_loop().call_later(limit, cancel) if limit else None
            try:
                await running
            except asyncio.CancelledError:
                if not session.cancelled:
                    raise
            except Exception as error:
                session.error = error
                logger.error(f"Exception running bot(): {error}")
            finally:
                if stop:
                    stop.cancel()
                session.returned.set()
                if self._waiting and not self._waiting.done():
                    self._waiting.set_result(None)
                self._waiting = self._body = None


class DrainingServer(uvicorn.Server):
    """uvicorn, except that a stop leaves the calls in progress alone until they end."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, wait for open connections and tasks, then stop the application."""
        for server in self.servers:
            server.close()
        for listening in sockets or []:
            listening.close()
        state = self.server_state
        deadline = asyncio.get_running_loop().time() + DRAIN_SECONDS
        while (state.connections or state.tasks) and not self.force_exit:
            if asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.02)
        await self.lifespan.shutdown()


def listen() -> socket.socket:
    """Return a socket on a free port of 127.0.0.1; who connects waits until it is served."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    return listening


@asynccontextmanager
async def serve(image: BaseImage) -> AsyncIterator[str]:
    """Run the image in this event loop; yields `http://127.0.0.1:PORT`."""
    with listen() as listening:
        server = DrainingServer(uvicorn.Config(image.app, log_config=None, lifespan="on"))
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        while not server.started:
            await asyncio.sleep(0)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            await serving


def main() -> None:
    """Serve the bot.py of the current folder as the image does: ENV unset, log with session id."""
    sys.path.insert(0, os.getcwd())
    import bot

    logger.remove()
    logger.configure(extra={"session_id": "NONE"})
    logger.add(sys.stderr, format=LOG_FORMAT)
    with listen() as listening:
        print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
        server = DrainingServer(uvicorn.Config(BaseImage(bot).app, log_config=None))
        server.run(sockets=[listening])


if __name__ == "__main__":
    main()
