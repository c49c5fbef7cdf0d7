"""How a caller reaches the bot: a browser (webrtc), a Daily room (daily) or a phone (twilio).

A transport's libraries are imported when a call comes in on it, so a phone call never pays for
WebRTC's, nor dies of Daily's where those do not load.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from loguru import logger
from pipecat.runner.types import (
    CallData,
    DailyRunnerArguments,
    RunnerArguments,
    SmallWebRTCRunnerArguments,
    WebSocketRunnerArguments,
)
from pipecat.runner.utils import create_transport, parse_telephony_websocket
from pipecat.transports.base_transport import BaseTransport, TransportParams

from config import setting
from host import calls
from telephony import twilio_auth
from telephony.transfer import (
    DAILY_ID,
    NOTE,
    NOTE_SECONDS,
    DailyTransfer,
    Note,
    SipLine,
    Transfer,
    TwilioTransfer,
    outcome_at_twilio,
)

if TYPE_CHECKING:
    from pipecat.evals.transport import EvalTransportParams

    from telephony.daily_dialout import DialOut, DialOutLine
    from telephony.errand import Errand
    from telephony.media_stream import MediaStreamSerializer

PHONE_HZ = 8000
# Twilio sends both messages of its handshake at once; Pipecat waits for them without a limit.
HANDSHAKE_SECONDS = 10.0
HANG_UP_SECONDS = 5.0
# How long a web client may take to say it is ready to play audio. One that speaks no RTVI, the
# protocol of Pipecat's client SDKs, never says so and is greeted then.
CLIENT_READY_SECONDS = 2.0
DAILY_API = "https://api.daily.co/v1"
# Of its own servers; a parser of addresses reads more into a stranger's than the client asks for.
DAILYS = re.compile(r"https://([a-z0-9-]+\.)+daily\.co(/[\w./-]*)?", re.ASCII)
# What Daily says of a line that is lost, and how the call ends then: in a room to which no
# telephone comes, nothing else would happen.
DAILY_LOSSES = {
    "on_error": ("error", "Daily: the room could not be joined or was lost"),
    "on_dialin_error": ("error", "Daily: the caller's telephone could not be connected"),
    "on_dialin_stopped": ("client-disconnected", "the caller's telephone line ended"),
}


class Refused(Exception):
    """This is no call, or not one for this bot; the connection is closed. The text says why."""


@dataclass(frozen=True)
class Connection:
    """One caller's connection, and what depends on its kind.

    Parameters:
        transport: Pipecat's transport, with audio in and out.
        audio_in_hz: Rate of the caller's audio through the pipeline.
        audio_out_hz: Rate of the bot's audio through the pipeline.
        caller: The number or address it comes from, where that is known.
        call_id: Its id at the phone company.
        is_promised: Whether this server, any process of it, has said that it takes the call.
        is_phone: Whether a telephone is at the other end: no RTVI client, no "ready" to wait for.
        is_alive: Whether the caller's end shows signs of life; None where Pipecat itself notices.
        is_broken_off: Whether it was closed for what came over it.
        is_closed: Whether the connection was closed, perhaps before Pipecat listened for that.
        dropped: How many of the line's messages made no sense so far.
        say_busy: Lets a caller whose call is not taken hear so; a web client was told by HTTP.
        transfer: Hands the caller over to a person; None where the line cannot.
        note: What is known of a caller who comes back from a transfer.
        errand: Whom the bot has called, and why; None where it was called.
        dial_out: Calls them, by Daily, once the bot is in its room; None where they are there.
        losses: Events of the transport after which there is no caller, each with the reason, one of
            roark.call.ENDINGS, and its detail.
    """

    transport: BaseTransport
    audio_in_hz: int = 16000
    audio_out_hz: int = 24000
    caller: str = field(default_factory=calls.caller_address.get)
    call_id: str = ""
    is_promised: bool = False
    is_phone: bool = False
    is_alive: Callable[[], bool] | None = None
    is_broken_off: Callable[[], bool] = lambda: False
    is_closed: Callable[[], bool] = lambda: False
    dropped: Callable[[], int] = lambda: 0
    say_busy: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0)
    transfer: Transfer | None = None
    note: Note | None = None
    errand: "Errand | None" = None
    dial_out: "DialOut | None" = None
    losses: Mapping[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])

    @property
    def client_ready_seconds(self) -> float:
        """How long to wait for the client to say it is ready before greeting it."""
        return 0.0 if self.is_phone else CLIENT_READY_SECONDS


async def answer(runner_args: RunnerArguments) -> Connection:
    """Take the call that `runner_args` describes.

    Raises:
        Refused: It is no call, or one that may not talk to the bot.
    """
    if isinstance(runner_args, WebSocketRunnerArguments):
        return await _answer_phone(runner_args)
    if isinstance(runner_args, DailyRunnerArguments):
        if _is_dial_out(runner_args.body):
            return await _call_by_daily(runner_args)
        dialled_in = _is_dial_in(runner_args.body)
        transport = await create_transport(runner_args, {"daily": _daily_params})
        return Connection(
            transport,
            is_phone=dialled_in,
            transfer=DailyTransfer(cast(SipLine, transport)) if dialled_in else None,
            losses=DAILY_LOSSES,
        )
    if isinstance(runner_args, SmallWebRTCRunnerArguments):
        transport = await create_transport(runner_args, {"webrtc": _webrtc_params})
        connection = runner_args.webrtc_connection
        return Connection(
            transport,
            is_alive=connection.is_connected,
            is_closed=lambda: connection.pc.connectionState in ("closed", "failed"),
        )
    raise Refused(
        f"this session came without a transport ({type(runner_args).__name__}): start it with a "
        "Daily room, over /api/offer (webrtc) or over /ws (twilio)"
    )


async def hang_up(runner_args: RunnerArguments) -> None:
    """Close the caller's line, whatever became of the call. Harmless where that has happened.

    A Daily room is left by its transport; there is none before the pipeline runs.
    """
    with suppress(Exception):
        if isinstance(runner_args, SmallWebRTCRunnerArguments):
            closing = runner_args.webrtc_connection.disconnect()
        elif isinstance(runner_args, WebSocketRunnerArguments):
            closing = runner_args.websocket.close()
        else:
            return
        # Whoever does not read what they are sent would keep their line for good.
        await asyncio.wait_for(closing, HANG_UP_SECONDS)


def warm_up() -> None:
    """Import what a phone call needs, which is little; the runners import WebRTC themselves."""

    import telephony.media_stream  # noqa: F401


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

    from telephony.media_stream import play_busy_tone

    websocket = runner_args.websocket
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            provider, call = await parse_telephony_websocket(websocket)
    except TimeoutError:
        raise Refused(
            f"its socket did not begin a media stream within {HANDSHAKE_SECONDS:g} s"
        ) from None
    # A health check, a scan, a connection that broke: whatever the stranger sent or did not send.
    except Exception as error:
        raise Refused(f"its socket began no media stream ({type(error).__name__})") from None
    if provider == "eval":
        # Whoever speaks this protocol can rewrite what the bot was told: only where asked for.
        if setting("ALLOW_EVAL") != "1":
            await websocket.close(code=1008, reason="set ALLOW_EVAL=1 to let evals in")
            raise Refused("it is an eval, and ALLOW_EVAL is not set to 1; see evals/README.md")
        return Connection(await create_transport(runner_args, {"eval": _eval_params}))
    if provider != "twilio":
        raise Refused(f"/ws speaks Twilio media streams, and this looks like {provider!r}")
    call_id, stream_id = call.call_id, call.stream_id
    if not (twilio_auth.is_sid(call_id, "CA") and twilio_auth.is_sid(stream_id, "MZ")):
        raise Refused("its ids are none of Twilio's")
    assert call_id and stream_id
    is_back = NOTE in call.body
    note = Note.take(call.body, call_id, setting("TWILIO_AUTH_TOKEN"))
    if is_back and note is None:
        # Not as a new caller: who has talked to the person for long has nobody to come back to.
        await websocket.close()
        raise Refused("its note of a transfer is too old, or none of this bot's")
    errand = None
    if twilio_auth.CALLEE_PARAMETER in call.body:
        # Only who calls out pays for it.
        from telephony.errand import Errand

        errand = Errand.of(call.body)
    if errand and not note:
        if not errand.is_ours(call.body, twilio_auth.gate_before(websocket)):
            await websocket.close(code=1008)
            raise Refused("it brought an errand that is none of this bot's")
        runner_args.body = {"direction": "outbound"}
    elif not twilio_auth.lets_in(websocket, call_id, call.body):
        await websocket.close(code=1008)
        raise Refused("it did not bring the token of a call that Twilio sent here")
    # Who comes back by the instructions of the transfer itself, as where Twilio has no address of
    # ours to ask. A note is no pass: they too have brought a token, where there is a gate.
    is_back_by_itself = note is not None and not note.outcome
    if note and is_back_by_itself:
        note = replace(note, outcome=await outcome_at_twilio(call_id))
        if note.outcome == "completed":
            await websocket.close()
            raise Refused("it was handed over, and the person has hung up")
    # Where create_transport leaves them, for whoever wants to know who is calling.
    runner_args.transport_type = provider
    runner_args.call_data = call
    serializer = _twilio_serializer(stream_id, call_id, websocket.close)
    transfer = None
    if serializer.can_hang_up:
        host = websocket.headers.get("host", "")
        transfer = TwilioTransfer(
            call_sid=call_id,
            # On Pipecat Cloud the name under which Twilio came is not the one it is to come to.
            stream_url=setting("TWILIO_STREAM_URL", f"wss://{host}{websocket.url.path}"),
            parameters=call.body,
            line=serializer,
            # There the instructions end.
            has_failover=not is_back_by_itself and errand is None,
            host=twilio_auth.public_host(websocket),
            token=partial(twilio_auth.token_back, websocket, call_id, NOTE_SECONDS),
        )
    params = FastAPIWebsocketParams(
        audio_in_enabled=True, audio_out_enabled=True, serializer=serializer
    )
    return Connection(
        FastAPIWebsocketTransport(websocket=websocket, params=params),
        audio_in_hz=PHONE_HZ,
        audio_out_hz=PHONE_HZ,
        caller=calls.identity(errand.callee_number if errand else call.from_number),
        call_id=call_id,
        is_promised=errand is None and twilio_auth.gate_before(websocket) is not None,
        is_phone=True,
        dropped=lambda: serializer.dropped,
        is_broken_off=lambda: serializer.is_hopeless or calls.is_broken_off(websocket.scope),
        say_busy=lambda: play_busy_tone(websocket.send_text, stream_id),
        transfer=transfer,
        note=note,
        errand=errand,
    )


def _is_dial_out(body: Any) -> bool:
    return isinstance(body, dict) and bool(cast("dict[str, Any]", body).get("dialout_settings"))


async def _call_by_daily(runner_args: DailyRunnerArguments) -> Connection:
    # Only who calls out pays for it.
    from telephony import daily_dialout
    from telephony.errand import Errand

    body = dict(cast("dict[str, Any]", runner_args.body))
    key = setting("DAILY_API_KEY")
    errand = Errand.of(body)
    # Whoever finds /start can write a body.
    if not key or not errand.is_ours(body, daily_dialout.gate(key)):
        raise Refused(
            "it is to call somebody, and `python -m telephony call` with this DAILY_API_KEY has "
            "not asked for that, or longer ago than five minutes"
        )
    runner_args.body = {"direction": "outbound"}
    runner_args.call_data = CallData.model_validate({"to": errand.callee_number})
    transport = await create_transport(runner_args, {"daily": _daily_params})
    handing = DailyTransfer(cast(SipLine, transport))
    return Connection(
        transport,
        caller=calls.identity(errand.callee_number),
        is_phone=True,
        transfer=handing,
        errand=errand,
        dial_out=daily_dialout.DialOut(cast("DialOutLine", transport), errand, body, handing),
        losses={"on_error": DAILY_LOSSES["on_error"]},
    )


def _is_dial_in(body: Any) -> bool:
    """Whether a Daily session's body is that of a phone call; Refused where it is a forged one.

    Pipecat asks the API that the body names about the call that the body names.
    """
    settings = body.get("dialin_settings") if isinstance(body, dict) else None
    if not settings:
        return False
    assert isinstance(body, dict)
    api = body.get("daily_api_url")
    ids = (
        [settings.get(name) for name in ("call_id", "call_domain")]
        if isinstance(settings, dict)
        else [None]
    )
    is_daily = isinstance(api, str) and _is_dailys(api)
    if not is_daily or not all(isinstance(i, str) and DAILY_ID.fullmatch(i) for i in ids):
        raise Refused("its dial-in settings are none of Daily's")
    return True


def _is_dailys(url: str) -> bool:
    return url == setting("DAILY_API_URL", DAILY_API) or bool(DAILYS.fullmatch(url))


def _twilio_serializer(
    stream_id: str, call_id: str, close: Callable[[], Awaitable[None]]
) -> "MediaStreamSerializer":
    # Built here rather than by create_transport, which refuses a call without credentials.
    from telephony.media_stream import MediaStreamSerializer

    account, token = setting("TWILIO_ACCOUNT_SID"), setting("TWILIO_AUTH_TOKEN")
    can_hang_up = bool(twilio_auth.is_sid(account, "AC") and token)
    if not can_hang_up:
        logger.warning(
            "TWILIO_ACCOUNT_SID (AC and 32 digits) and TWILIO_AUTH_TOKEN are not both set: when "
            "the bot ends this call the audio stops, and what happens next is up to the rest of "
            "the TwiML"
        )
    return MediaStreamSerializer(
        hang_up=close,
        takes=calls.Allowance().takes,
        stream_sid=stream_id,
        call_sid=call_id,
        account_sid=account or None,
        auth_token=token or None,
        base_url=setting("TWILIO_BASE_URL") or None,
        params=MediaStreamSerializer.InputParams(auto_hang_up=can_hang_up),
    )
