"""What calls out need of `python bot.py` by HTTP.

`POST /calls` places a call, for whoever has CALL_API_KEY. At outbound.STATUS_PATH Twilio says how a
call ended, and the record of one that never reached a bot is written then, by whichever process of
this server is asked.
"""

import asyncio
import hmac
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from loguru import logger

from config import setting
from telephony import outbound, twilio_auth
from telephony.errand import Errand, NotPlaced, usual_transport
from telephony.outbound import Outbound

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response


def may_choose_room(asked: Mapping[str, Any]) -> bool:
    """Whether `POST /start` may say what its Daily room and token can do: for calling out alone."""
    # Only who is asked for that pays for it.
    from telephony import daily_dialout

    return daily_dialout.may_choose_room(asked)


def serve(app: "FastAPI", *, agent: str, busy: Callable[[str], str]) -> None:
    """Let whoever has CALL_API_KEY place calls, and Twilio say how its calls ended.

    The body of `POST /calls` is a JSON object with `to`, `name`, `reason` and perhaps `digits` and
    `transport` ("twilio" or "daily"); the answer holds the call's `sid`, or for Daily the bot's
    `session`, or a sentence as `detail`.

    Args:
        app: Pipecat's development server, before it starts, behind twilio_auth's gate.
        agent: The bot's name.
        busy: Says why no call with this number can be held now; empty where it can.
    """
    from starlette.background import BackgroundTask
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    gate, host = getattr(app.state, "twilio_gate", None), getattr(app.state, "twilio_host", "")
    following: set[asyncio.Task[str]] = set()

    def answer(status: int, **body: str) -> "Response":
        return JSONResponse(body, status)

    async def by_twilio(errand: Errand, digits: str) -> "Response":
        calls = Outbound(agent=agent, host=host, tell=lambda text: logger.info(text))
        sid = await calls.place(errand, digits=digits)
        if not calls.server_is_told:
            task = asyncio.create_task(calls.follow(sid, errand))
            following.add(task)
            task.add_done_callback(following.discard)
        return answer(201, sid=sid)

    async def by_daily(errand: Errand, digits: str, port: int) -> "Response":
        from telephony.daily_dialout import DailyOutbound

        daily = DailyOutbound(host=f"127.0.0.1:{port}")
        return answer(201, session=await daily.place(errand, digits=digits))

    async def place(request: "Request") -> "Response":
        given = request.headers.get("Authorization", "").encode()
        wanted = f"Bearer {setting('CALL_API_KEY')}".encode()
        if not hmac.compare_digest(given, wanted):
            return answer(401, detail="Placing a call needs Authorization: Bearer CALL_API_KEY.")
        try:
            asked = await request.json()
            to, name, reason, digits, transport = (
                str(asked.get(key, "")) for key in ("to", "name", "reason", "digits", "transport")
            )
        except (ValueError, AttributeError, RecursionError):
            return answer(400, detail="The body is a JSON object with to, name and reason.")
        if transport not in ("", "twilio", "daily"):
            return answer(400, detail="The transport is twilio or daily.")
        errand = Errand(callee_number=to, callee_name=name, call_reason=reason)
        if refusal := busy(to):
            return answer(503, detail=refusal)
        try:
            if (transport or usual_transport()) == "daily":
                # Who starts the bot's sessions is this server.
                return await by_daily(errand, digits, request.scope["server"][1])
            return await by_twilio(errand, digits)
        except NotPlaced as refusal:
            return answer(422, detail=f"{refusal}.")

    async def note_end(request: "Request") -> "Response":
        end = await twilio_auth.signed_form(gate, host, request) if gate else None
        if end is None:
            return twilio_auth.not_signed(host)
        # Delivering takes longer than Twilio waits where Roark is down.
        return Response(status_code=204, background=BackgroundTask(outbound.keep, agent, end))

    if setting("CALL_API_KEY"):
        app.router.routes.append(Route("/calls", place, methods=["POST"]))
    if host:
        app.router.routes.append(Route(outbound.STATUS_PATH, note_end, methods=["POST"]))
