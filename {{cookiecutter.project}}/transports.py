"""How a caller reaches the bot: a browser (webrtc), a Daily room (daily) or a phone (twilio).

A transport's libraries are imported when a call comes in on it, so a phone call never pays for
WebRTC's, nor dies of Daily's where those do not load.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loguru import logger
from pipecat.runner.types import (
    DailyRunnerArguments,
    RunnerArguments,
    SmallWebRTCRunnerArguments,
    WebSocketRunnerArguments,
)
from pipecat.runner.utils import create_transport, parse_telephony_websocket
from pipecat.transports.base_transport import BaseTransport, TransportParams

from config import setting
from telephony import twilio_auth

if TYPE_CHECKING:
    from pipecat.evals.transport import EvalTransportParams
    from pipecat.serializers.twilio import TwilioFrameSerializer

PHONE_HZ = 8000
# Twilio sends both messages of its handshake at once; Pipecat waits for them without a limit.
HANDSHAKE_SECONDS = 10.0
# How long a web client may take to say it is ready to play audio. One that speaks no RTVI, the
# protocol of Pipecat's client SDKs, never says so and is greeted then.
CLIENT_READY_SECONDS = 2.0


class Refused(Exception):
    """This caller may not talk to the bot; the connection is closed. The text says why."""


@dataclass(frozen=True)
class Connection:
    """One caller's connection, and what depends on its kind.

    Parameters:
        transport: Pipecat's transport, with audio in and out.
        audio_in_hz: Rate of the caller's audio through the pipeline.
        audio_out_hz: Rate of the bot's audio through the pipeline.
        is_phone: Whether a telephone is at the other end: no RTVI client, no "ready" to wait for.
        is_alive: Whether the caller's end shows signs of life; None where Pipecat tells if not.
        is_closed: Whether the connection was closed, perhaps before Pipecat listened for that.
    """

    transport: BaseTransport
    audio_in_hz: int = 16000
    audio_out_hz: int = 24000
    is_phone: bool = False
    is_alive: Callable[[], bool] | None = None
    is_closed: Callable[[], bool] = lambda: False

    @property
    def client_ready_seconds(self) -> float:
        """How long to wait for the client to say it is ready before greeting it."""
        return 0.0 if self.is_phone else CLIENT_READY_SECONDS


async def answer(runner_args: RunnerArguments) -> Connection:
    """Take the call that `runner_args` describes.

    Raises:
        ValueError: The session has no transport, or one this bot does not speak.
        TimeoutError: The telephony handshake did not arrive.
        Refused: The caller may not talk to the bot.
    """
    if isinstance(runner_args, WebSocketRunnerArguments):
        return await _answer_phone(runner_args)
    if isinstance(runner_args, DailyRunnerArguments):
        dialled_in = bool((runner_args.body or {}).get("dialin_settings"))
        transport = await create_transport(runner_args, {"daily": _daily_params})
        return Connection(transport, is_phone=dialled_in)
    if isinstance(runner_args, SmallWebRTCRunnerArguments):
        transport = await create_transport(runner_args, {"webrtc": _webrtc_params})
        connection = runner_args.webrtc_connection
        return Connection(
            transport,
            is_alive=connection.is_connected,
            is_closed=lambda: connection.pc.connectionState in ("closed", "failed"),
        )
    raise ValueError(
        f"this session came without a transport ({type(runner_args).__name__}): start it with a "
        "Daily room, over /api/offer (webrtc) or over /ws (twilio)"
    )


async def hang_up(runner_args: RunnerArguments) -> None:
    """Close the caller's line, whatever became of the call. Harmless where that has happened."""
    with suppress(Exception):
        if isinstance(runner_args, SmallWebRTCRunnerArguments):
            await runner_args.webrtc_connection.disconnect()
        elif isinstance(runner_args, WebSocketRunnerArguments):
            await runner_args.websocket.close()


def warm_up() -> None:
    """Import what a phone call needs, which is little; the runners import WebRTC themselves."""
    import pipecat.serializers.twilio
    import pipecat.transports.websocket.fastapi  # noqa: F401


def client_id(client: Any) -> str:
    """Who this client of a transport is: a Daily room has several, the others one."""
    return client["id"] if isinstance(client, dict) else "caller"


def _eval_params() -> "EvalTransportParams":
    from pipecat.evals.transport import EvalTransportParams

    return EvalTransportParams(audio_in_enabled=True, audio_out_enabled=True)


def _webrtc_params() -> TransportParams:
    # 20 ms are a packet. What was handed over is played after an interruption, too: Pipecat's 40
    # ms would let the bot speak on longer.
    return TransportParams(audio_in_enabled=True, audio_out_enabled=True, audio_out_10ms_chunks=2)


def _daily_params() -> TransportParams:
    from pipecat.transports.daily.transport import DailyParams

    return DailyParams(audio_in_enabled=True, audio_out_enabled=True)


async def _answer_phone(runner_args: WebSocketRunnerArguments) -> Connection:
    from pipecat.transports.websocket.fastapi import (
        FastAPIWebsocketParams,
        FastAPIWebsocketTransport,
    )

    websocket = runner_args.websocket
    async with asyncio.timeout(HANDSHAKE_SECONDS):
        provider, call = await parse_telephony_websocket(websocket)
    # Whoever speaks this protocol can rewrite what the bot was told: only where it was asked for.
    if provider == "eval" and setting("ALLOW_EVAL") == "1":
        return Connection(await create_transport(runner_args, {"eval": _eval_params}))
    if provider != "twilio":
        raise ValueError(f"/ws speaks Twilio media streams, and this looks like {provider!r}")
    if not twilio_auth.lets_in(websocket, call.call_id, call.body or {}):
        await websocket.close(code=1008)
        raise Refused("it did not bring the token of a call that Twilio sent here")
    # Where create_transport leaves them, for whoever wants to know who is calling.
    runner_args.transport_type = provider
    runner_args.call_data = call
    params = FastAPIWebsocketParams(
        audio_in_enabled=True,
        audio_out_enabled=True,
        serializer=_twilio_serializer(call.stream_id or "", call.call_id),
    )
    transport = FastAPIWebsocketTransport(websocket=websocket, params=params)
    return Connection(transport, audio_in_hz=PHONE_HZ, audio_out_hz=PHONE_HZ, is_phone=True)


def _twilio_serializer(stream_id: str, call_id: str | None) -> "TwilioFrameSerializer":
    # Built here rather than by create_transport, which refuses a call without credentials.
    from pipecat.serializers.twilio import TwilioFrameSerializer

    account, token = setting("TWILIO_ACCOUNT_SID"), setting("TWILIO_AUTH_TOKEN")
    can_hang_up = bool(account and token and call_id)
    if not can_hang_up:
        logger.warning(
            "TWILIO_ACCOUNT_SID and TWILIO_AUTH_TOKEN are not both set: when the bot ends this "
            "call the audio stops, and what happens next is up to the rest of the TwiML"
        )
    return TwilioFrameSerializer(
        stream_sid=stream_id,
        call_sid=call_id,
        account_sid=account or None,
        auth_token=token or None,
        base_url=setting("TWILIO_BASE_URL") or None,
        params=TwilioFrameSerializer.InputParams(auto_hang_up=can_hang_up),
    )
