"""Calls a person by Daily: has the bot started in a room, and dials from there.

    python -m telephony call +4930123456 --name Ann --reason "your appointment on Friday" -t daily

Who starts the bot's sessions, `python bot.py -t daily` or Pipecat Cloud, is asked for one in a room
that may dial out. The errand (errand.py) goes along, signed: whoever finds `/start` cannot have the
bot call. It joins the room, dials, and begins when somebody picks up; the record, of a call that
nobody took too, is the bot's.

Daily's telephone network cannot be rehearsed: no call over it has been tried.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any, Protocol

import httpx
from loguru import logger

from config import setting
from telephony.errand import DECLINED, DIGITS, SIP_ENDINGS, Errand, NotPlaced, check
from telephony.transfer import DAILY_ID, DailyTransfer
from telephony.twilio_auth import HOST, Gate

# https://docs.pipecat.ai/pipecat-cloud/guides/telephony/daily-dial-out
CLOUD = "https://api.pipecat.daily.co/v1/public"
LOCAL = "localhost:7860"
# A room is made and the bot started in it.
START_SECONDS = 60.0
# As long as Pipecat's own rooms.
ROOM_SECONDS = 4 * 3600
# Daily names no limit of its own; voicemail comes in sooner.
RING_SECONDS = 30.0
STOP_SECONDS = 3.0
# Of a `w` among the digits, as in Twilio's.
WAIT_SECONDS = 0.5
SIP_CODE = re.compile(r"\b[4-6]\d\d\b")


class DailyOutbound:
    """Has a bot started that calls by Daily."""

    def __init__(self, *, host: str = "", cloud_agent: str = "") -> None:
        """Check what every call needs.

        Args:
            host: Of the server of `python bot.py -t daily`; blank for this machine.
            cloud_agent: The bot's name at Pipecat Cloud, AGENT or AGENT.ORGANIZATION, in its place.

        Raises:
            NotPlaced: Something is missing.
        """
        self._key = setting("DAILY_API_KEY")
        if not self._key:
            raise NotPlaced(
                "calling out by Daily needs DAILY_API_KEY, here and where the bot runs: it signs "
                "whom the bot may call"
            )
        self._headers: dict[str, str] = {}
        if cloud_agent:
            public_key = setting("PIPECAT_API_KEY")
            if not public_key:
                raise NotPlaced(
                    "a bot at Pipecat Cloud is started with PIPECAT_API_KEY, a public key (pk_...) "
                    "of its dashboard"
                )
            self._headers["Authorization"] = f"Bearer {public_key}"
            self._address = f"{CLOUD}/{cloud_agent.partition('.')[0]}/start"
            return
        name = host.rpartition("://")[2].strip("/") or LOCAL
        if not HOST.fullmatch(name):
            raise NotPlaced(f"the host is a name such as voice.example.org, not {host!r}")
        is_here = name.partition(":")[0] in ("localhost", "127.0.0.1")
        self._address = f"{'http' if is_here else 'https'}://{name}/start"

    async def place(self, errand: Errand, *, digits: str = "") -> str:
        """Have the bot called into being, and call; returns its session. It is tried once.

        Args:
            errand: Whom and why.
            digits: Keys pressed once it is answered, as at Twilio: 0-9, *, # and w for a wait.

        Raises:
            NotPlaced: It may not be called now, or the bot could not be started.
        """
        check(errand)
        if not DIGITS.fullmatch(digits):
            raise NotPlaced("digits are up to 32 of 0-9, *, # and w, half a second's wait")
        dialled = {"phoneNumber": errand.callee_number}
        if caller_id := setting("DAILY_CALLER_ID"):
            dialled["callerId"] = caller_id
        until = int(time.time()) + ROOM_SECONDS
        asked = {
            "createDailyRoom": True,
            "dailyRoomProperties": {
                "enable_dialout": True,
                "exp": until,
                "eject_at_room_exp": True,
            },
            "body": {
                "dialout_settings": [dialled],
                "digits": digits,
                **errand.parameters(self._key),
            },
        }
        try:
            async with httpx.AsyncClient(timeout=START_SECONDS) as http:
                response = await http.post(self._address, json=asked, headers=self._headers)
        except httpx.HTTPError as error:
            raise NotPlaced(
                f"{self._address} did not answer ({type(error).__name__}): `python bot.py -t "
                "daily` has to run there"
            ) from error
        if response.is_error:
            raise NotPlaced(
                f"{self._address} refused to start the bot with {response.status_code}; its log "
                "says why. Is its DAILY_API_KEY right, and does it run with -t daily?"
            )
        return str(response.json().get("sessionId") or "unknown")


class DialOutLine(Protocol):
    """What Pipecat's Daily transport can do for a call out of its room."""

    def add_event_handler(self, event_name: str, handler: Any) -> None:
        """Have `handler` called when something happens."""
        ...

    async def start_dialout(self, settings: dict[str, str]) -> tuple[str, object | None]:
        """Dial; returns the telephone's session, and what went wrong, if something did."""
        ...

    async def stop_dialout(self, participant_id: str) -> object | None:
        """Hang up on the telephone."""
        ...

    async def send_dtmf(self, settings: dict[str, str]) -> object | None:
        """Press keys."""
        ...


class DialOut:
    """The call out of one room: it is dialled once the bot is there."""

    def __init__(
        self, line: DialOutLine, errand: Errand, body: Mapping[str, Any], transfer: DailyTransfer
    ) -> None:
        """Prepare to call.

        Args:
            line: The bot's room.
            errand: Whom to call; signed by this bot.
            body: Of the session: the number it calls from, by its id at Daily, and the digits.
            transfer: Hands the telephone over; then nobody hangs up on it.
        """
        self._line = line
        self._settings = {"phoneNumber": errand.callee_number}
        dialled = body.get("dialout_settings")
        first = dialled[0] if isinstance(dialled, list) and dialled else None
        caller_id = first.get("callerId") if isinstance(first, dict) else None
        if isinstance(caller_id, str) and DAILY_ID.fullmatch(caller_id):
            self._settings["callerId"] = caller_id
        digits = str(body.get("digits", ""))
        self._digits = digits if DIGITS.fullmatch(digits) else ""
        self._transfer = transfer
        self._session = ""
        self._was_answered = False
        self._is_settled = asyncio.Event()

    def watch(
        self,
        *,
        picked_up: Callable[[], None],
        gone: Callable[[str, str], Awaitable[None]],
        how_it_ended: Callable[[], tuple[str, str]],
    ) -> None:
        """Dial once the bot has joined its room, and tell what becomes of it.

        Args:
            picked_up: Called when it was answered, and the digits are pressed.
            gone: Given reason, one of roark.call.ENDINGS, and detail, when the call is over.
            how_it_ended: Both of them, where the other side has hung up.
        """

        async def joined(_line: object, _data: object) -> None:
            session, error = await self._line.start_dialout(dict(self._settings))
            if error:
                logger.warning("Daily did not take a call out: may this account and room dial out?")
                await gone("failed", "Daily did not take the call")
                return
            self._session = session
            try:
                await asyncio.wait_for(self._is_settled.wait(), RING_SECONDS)
            except TimeoutError:
                await gone("no-answer", f"nobody picked up within {RING_SECONDS:g} s")

        async def answered(_line: object, data: Mapping[str, Any]) -> None:
            if self._was_answered:
                return
            self._was_answered = True
            self._is_settled.set()
            self._session = str(data.get("sessionId") or self._session)
            for part in re.findall(r"w+|[^w]+", self._digits):
                if part[0] == "w":
                    await asyncio.sleep(WAIT_SECONDS * len(part))
                else:
                    await self._line.send_dtmf({"sessionId": self._session, "tones": part})
            picked_up()

        async def stopped(_line: object, _data: object) -> None:
            await gone(*how_it_ended())

        async def failed(_line: object, data: object) -> None:
            if self._was_answered:
                await gone("error", "Daily: the telephone's line broke")
            else:
                await gone(*how_it_failed(data))

        async def leaving(_line: object) -> None:
            self._is_settled.set()
            # A room without a bot is no place to leave them in.
            if self._session and not await self._transfer.done_to():
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._line.stop_dialout(self._session), STOP_SECONDS)

        for event, handler in (
            ("on_joined", joined),
            ("on_dialout_answered", answered),
            ("on_dialout_stopped", stopped),
            ("on_dialout_error", failed),
            ("on_before_leave", leaving),
        ):
            self._line.add_event_handler(event, handler)


def how_it_failed(event: object) -> tuple[str, str]:
    """The reason, one of roark.call.ENDINGS, and its detail, of a call that nobody took.

    Daily documents no codes: where its text names that of a SIP answer, this is what it says.

    Args:
        event: Of `on_dialout_error`; its `errorMsg` is a text.
    """
    text = str(event.get("errorMsg", "")) if isinstance(event, Mapping) else ""
    code = next((code for code in SIP_CODE.findall(text) if code in SIP_ENDINGS), "")
    reason = SIP_ENDINGS.get(code, "failed")
    details = {
        "busy": "the line was busy, or the call was rejected",
        "no-answer": "nobody picked up",
        "declined": DECLINED,
        "failed": "Daily: the telephone could not be called",
    }
    return reason, details[reason] + (f" (SIP {code})" if code else "")


def may_choose_room(asked: Mapping[str, Any]) -> bool:
    """Whether whoever asks for this session has DAILY_API_KEY: its body is a call they may place.

    Pipecat has a room made with the properties that it is asked for, and gives out the token of its
    owner: with these anybody could call from it whom they like.
    """
    body, key = asked.get("body"), setting("DAILY_API_KEY")
    if not isinstance(body, dict) or not key:
        return False
    return Errand.of(body).is_signed(body, gate(key))


@cache
def gate(api_key: str) -> Gate:
    """Knows the errands that were signed with this key, and which of them this process has had."""
    return Gate(api_key)
