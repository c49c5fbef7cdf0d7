"""Calls placed over HTTP: `POST /calls` of `python bot.py`, for whoever has CALL_API_KEY."""

import asyncio
import hmac
from collections.abc import Callable
from typing import TYPE_CHECKING

from loguru import logger

from config import setting
from telephony.errand import Errand, NotPlaced
from telephony.outbound import Outbound

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response


def serve(app: "FastAPI", *, agent: str, busy: Callable[[str], str]) -> None:
    """Let whoever has CALL_API_KEY place calls by `POST /calls`.

    The body is a JSON object with `to`, `name`, `reason` and perhaps `digits`; the answer holds the
    call's `sid`, or a sentence as `detail`.

    Args:
        app: Pipecat's development server, before it starts, behind twilio_auth's gate.
        agent: The bot's name.
        busy: Says why no call with this number can be held now; empty where it can.
    """
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    following: set[asyncio.Task[str]] = set()

    def answer(status: int, **body: str) -> "Response":
        return JSONResponse(body, status)

    async def place(request: "Request") -> "Response":
        given = request.headers.get("Authorization", "").encode()
        wanted = f"Bearer {setting('CALL_API_KEY')}".encode()
        if not hmac.compare_digest(given, wanted):
            return answer(401, detail="Placing a call needs Authorization: Bearer CALL_API_KEY.")
        try:
            asked = await request.json()
            to, name, reason, digits = (
                str(asked.get(key, "")) for key in ("to", "name", "reason", "digits")
            )
        except (ValueError, AttributeError):
            return answer(400, detail="The body is a JSON object with to, name and reason.")
        errand = Errand(callee_number=to, callee_name=name, call_reason=reason)
        if refusal := busy(to):
            return answer(503, detail=refusal)
        try:
            host = getattr(app.state, "twilio_host", "")
            outbound = Outbound(agent=agent, host=host, tell=lambda text: logger.info(text))
            sid = await outbound.place(errand, digits=digits)
        except NotPlaced as refusal:
            return answer(422, detail=f"{refusal}.")
        task = asyncio.create_task(outbound.follow(sid, errand))
        following.add(task)
        task.add_done_callback(following.discard)
        return answer(201, sid=sid)

    app.router.routes.append(Route("/calls", place, methods=["POST"]))
