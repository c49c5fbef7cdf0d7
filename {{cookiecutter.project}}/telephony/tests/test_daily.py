"""A telephone in a Daily room: its errors end the call, it can be handed over, and be called.

Daily's own network cannot be rehearsed. Here stands a transport with the same events and methods.
"""

import asyncio
import inspect
import json
from calendar import day_name
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from harness import SECONDS, Harness, run_harness
from pipecat.frames.frames import (
    CancelFrame,
    EndFrame,
    Frame,
    InputAudioRawFrame,
    StartFrame,
    TTSAudioRawFrame,
)
from pipecat.processors.filters.identity_filter import IdentityFilter
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.runner.types import DailyRunnerArguments, RunnerArguments
from pipecat.transports.base_transport import BaseTransport

import bot
import transports
from rehearsal.dial import ENVIRONMENT
from rehearsal.engines.scripted import ScriptedEngine
from rehearsal.host.bot_process import run_bot
from rehearsal.providers.all import serve
from rehearsal.providers.server import HOST, free_port
from telephony import __main__ as command
from telephony import daily_dialout
from telephony.daily_dialout import DailyOutbound
from telephony.errand import Errand, NotPlaced
from telephony.transfer import DailyTransfer, NotTransferred

pytestmark = pytest.mark.anyio


DIALOUT_EVENTS = ("on_dialout_answered", "on_dialout_stopped", "on_dialout_error")
KEY = "a-key-of-dailys"
NUMBER = "+493012345678"
ERRAND = Errand(callee_number=NUMBER, callee_name="Ann", call_reason="your appointment")


class Room(BaseTransport):
    """What the bot knows of a Daily room.

    Attributes:
        transferred, dialled, pressed: What Daily was asked for.
        stopped: The telephones that the bot has hung up on.
        error: What it answers.
        is_heard: Set once a sound of the bot's has come to the line.
    """

    def __init__(self, error: str | None = None) -> None:
        super().__init__()
        self.transferred: list[dict[str, str]] = []
        self.dialled: list[dict[str, str]] = []
        self.pressed: list[str] = []
        self.stopped: list[str] = []
        self.error = error
        self.is_heard = asyncio.Event()
        self._ears, self._door = IdentityFilter(), Door(self)
        clients = ("on_client_connected", "on_client_disconnected", "on_joined")
        for event in (*clients, *transports.DAILY_LOSSES, *DIALOUT_EVENTS):
            self._register_event_handler(event)
        self._register_event_handler("on_before_leave", sync=True)

    def input(self) -> FrameProcessor:
        return self._ears

    def output(self) -> FrameProcessor:
        return self._door

    async def sip_call_transfer(self, settings: dict[str, str]) -> str | None:
        self.transferred.append(settings)
        return self.error

    async def start_dialout(self, settings: dict[str, str]) -> tuple[str, str | None]:
        self.dialled.append(settings)
        return "telephone", self.error

    async def stop_dialout(self, participant_id: str) -> None:
        self.stopped.append(participant_id)

    async def send_dtmf(self, settings: dict[str, str]) -> None:
        assert settings["sessionId"] == "telephone"
        self.pressed.append(settings["tones"])

    async def happens(self, event: str, *data: Any) -> None:
        await self._call_event_handler(event, *data)

    async def is_quiet(self, seconds: float) -> None:
        """Nothing is heard on the line for so long; it takes no time."""
        for _ in range(round(seconds * 50)):
            await self._ears.push_frame(InputAudioRawFrame(bytes(640), 16000, 1))


class Door(IdentityFilter):
    """Where the bot joins and leaves the room, and is heard in it."""

    def __init__(self, room: Room) -> None:
        super().__init__()
        self._room = room

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, StartFrame):
            await self._room.happens("on_joined", {})
        elif isinstance(frame, EndFrame | CancelFrame):
            await self._room.happens("on_before_leave")
        elif isinstance(frame, TTSAudioRawFrame):
            self._room.is_heard.set()


@pytest.fixture
async def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The bot's world, and somebody to hand over to."""
    async with run_harness(monkeypatch, tmp_path) as harness:
        monkeypatch.setenv("TRANSFER_TO", "ann=+493012345678")
        yield harness


async def test_what_daily_says_of_a_lost_line_ends_the_call_at_once_with_the_reason(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Here every event for a call of its own; in the last the caller had been handed over."""
    calls = [(event, *ends, "") for event, ends in transports.DAILY_LOSSES.items()]
    calls.append(("on_dialin_stopped", "transferred", "handed over to ann", "ann"))
    for event, reason, detail, to in calls:
        # Of a delivered call something is written a moment after bot() has returned.
        calls_dir = tmp_path / f"calls-{event}-{to}"
        monkeypatch.setenv("CALLS_DIR", str(calls_dir))
        room = Room()
        handing = DailyTransfer(room)
        connection = transports.Connection(
            room, is_phone=True, transfer=handing, losses=transports.DAILY_LOSSES
        )

        async def answer(_: object, connection: transports.Connection = connection) -> object:
            return connection

        monkeypatch.setattr(transports, "answer", answer)
        before = len(harness.server("tts").connections)
        call = asyncio.create_task(bot.bot(RunnerArguments()))
        await harness.providers.log.until(
            lambda n=before: len(harness.server("tts").connections) > n, within_s=SECONDS
        )
        if to:
            await handing.to(to, "what it is about")
        await room.happens(event, {"errorMsg": "of Daily's"})
        await asyncio.wait_for(call, SECONDS)
        (record,) = calls_dir.glob("*/call.json")
        ending = json.loads(record.read_bytes())["ending"]
        assert (ending["reason"], ending["detail"]) == (reason, detail), event


async def test_a_telephone_is_handed_over_by_daily_unless_daily_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRANSFER_TO", "ann=+493012345678")
    room, full = Room(), Room(error="no dial-out in this room")
    handing, refused = DailyTransfer(room), DailyTransfer(full)
    assert await handing.done_to() is None
    await handing.to("ann", "")
    assert room.transferred == [{"toEndPoint": "+493012345678"}]
    assert await handing.done_to() == "ann"
    for name, why in (("ann", "refused it"), ("bob", "there is no 'bob'")):
        with pytest.raises(NotTransferred, match=why):
            await refused.to(name, "")
    assert await refused.done_to() is None


def test_pipecats_daily_transport_has_these_events_and_methods() -> None:
    daily = pytest.importorskip(
        "pipecat.transports.daily.transport", reason="needs the extra daily"
    )
    events = {*transports.DAILY_LOSSES, *DIALOUT_EVENTS, "on_joined", "on_before_leave"}
    assert events <= set(daily.DailyCallbacks.model_fields)
    for name in ("sip_call_transfer", "start_dialout", "stop_dialout", "send_dtmf"):
        takes = list(inspect.signature(getattr(daily.DailyTransport, name)).parameters)
        wanted = list(inspect.signature(getattr(Room, name)).parameters)
        assert takes == wanted, name


@pytest.fixture
def may_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that calling out by Daily needs."""
    settings = {
        **ENVIRONMENT,
        "TWILIO_ACCOUNT_SID": "",
        "DAILY_API_KEY": KEY,
        "DAILY_CALLER_ID": "a-number-of-ours",
        "CALL_GREETING": "Hello {name}, about {reason}.",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


@asynccontextmanager
async def answering(status: int = 200, **routes: Any) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """A server of JSON; yields where it is, and what was posted to it."""
    asked: dict[str, Any] = {}

    async def answer(request: web.Request) -> web.Response:
        asked[request.path] = await request.json()
        return web.json_response(routes[request.path.strip("/").replace("-", "_")], status=status)

    app = web.Application()
    app.router.add_post("/{path}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, HOST, 0)
    await site.start()
    try:
        yield f"{HOST}:{runner.addresses[0][1]}", asked
    finally:
        await runner.cleanup()


async def body_of_a_call(reason: str = "it", digits: str = "") -> dict[str, Any]:
    """What the command sends to have the bot call."""
    errand = replace(ERRAND, call_reason=reason)
    async with answering(start={"sessionId": "a session"}) as (host, asked):
        assert await DailyOutbound(host=host).place(errand, digits=digits) == "a session"
    assert asked["/start"]["createDailyRoom"]
    assert asked["/start"]["dailyRoomProperties"]["enable_dialout"] is True
    return asked["/start"]["body"]


@pytest.mark.slow
@pytest.mark.usefixtures("may_call")
async def test_a_call_out_by_daily_begins_when_it_is_answered_and_each_end_has_its_reason(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DAILY_API_KEY", KEY)
    monkeypatch.setattr(daily_dialout, "WAIT_SECONDS", 0.0)
    answered = "on_dialout_answered"
    ends: tuple[tuple[list[str], float, str, str], ...] = (
        ([], 30.0, "failed", "Daily did not take the call"),
        (["on_dialout_error"], 30.0, "failed", "Daily: the telephone could not be called"),
        (["on_dialout_stopped"], 30.0, "no-answer", "nobody picked up"),
        ([], 0.1, "no-answer", "nobody picked up within 0.1 s"),
        ([answered, "on_dialout_error"], 30.0, "error", "Daily: the telephone's line broke"),
        ([answered, "on_dialout_stopped"], 30.0, "client-disconnected", "the callee hung up"),
    )
    for number, (happens, rings_s, reason, detail) in enumerate(ends):
        # Of a delivered call something is written a moment after bot() has returned.
        calls_dir = tmp_path / f"calls-{number}"
        monkeypatch.setenv("CALLS_DIR", str(calls_dir))
        room = Room(error="not allowed" if not happens and rings_s > 1 else None)
        monkeypatch.setattr(daily_dialout, "RING_SECONDS", rings_s)

        async def in_the_room(*_: object, room: Room = room) -> Room:
            return room

        monkeypatch.setattr(transports, "create_transport", in_the_room)
        body = await body_of_a_call(day_name[number], "ww1w2#" if answered in happens else "")
        session = DailyRunnerArguments(room_url="https://a.daily.co/room", token="", body=body)
        call = asyncio.create_task(bot.bot(session))
        async with asyncio.timeout(SECONDS):
            while not room.dialled:
                await asyncio.sleep(0.02)
        await room.happens("on_client_connected", {"id": "telephone"})
        if happens:
            # However long it rings, the bot says nothing.
            await room.is_quiet(3.0)
        for event in happens:
            if event != answered:
                assert len(harness.spoken) == (answered in happens)
            await room.happens(event, {"sessionId": "telephone"})
            if event == answered:
                async with asyncio.timeout(SECONDS):
                    while len(room.pressed) < 2:
                        await asyncio.sleep(0.02)
                await room.is_quiet(2.5)
                await asyncio.wait_for(room.is_heard.wait(), SECONDS)
        await asyncio.wait_for(call, SECONDS)
        assert harness.spoken == (
            [f"Hello Ann, about {day_name[number]}."] if answered in happens else []
        )
        assert room.dialled == [{"phoneNumber": NUMBER, "callerId": "a-number-of-ours"}]
        assert room.pressed == (["1", "2#"] if answered in happens else [])
        assert room.stopped == ([] if room.error else ["telephone"])
        (file,) = calls_dir.glob("*/call.json")
        record = json.loads(file.read_bytes())
        assert record["ending"] == {"reason": reason, "detail": detail}
        assert record["phone"]["to_number"] == NUMBER
        assert record["metadata"]["direction"] == "outbound"
        assert record["metadata"]["transport"] == "daily"
        harness.spoken.clear()


@pytest.mark.parametrize(
    ("event", "reason", "detail"),
    [
        ({"errorMsg": "SIP 603 Decline"}, "declined", "they declined the call (SIP 603)"),
        ({"errorMsg": "dial-out failed: 486 Busy Here"}, "busy", "rejected (SIP 486)"),
        ({"errorMsg": "480"}, "no-answer", "nobody picked up (SIP 480)"),
        ({"errorMsg": "404 Not Found"}, "failed", "could not be called"),
        ({"errorMsg": "+4930603486 is not allowed"}, "failed", "could not be called"),
        ({}, "failed", "could not be called"),
        (None, "failed", "could not be called"),
    ],
)
def test_what_a_network_answered_is_read_from_dailys_error_where_it_names_it(
    event: object, reason: str, detail: str
) -> None:
    found, told = daily_dialout.how_it_failed(event)
    assert found == reason
    assert told.endswith(detail)


@pytest.mark.usefixtures("may_call")
async def test_nobody_but_the_command_has_the_bot_call_by_daily_and_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def in_the_room(*_: object) -> Room:
        return Room()

    monkeypatch.setattr(transports, "create_transport", in_the_room)

    def session(body: dict[str, Any]) -> DailyRunnerArguments:
        return DailyRunnerArguments(room_url="https://a.daily.co/room", token="", body=body)

    body = await body_of_a_call()
    bare = {"dialout_settings": [{"phoneNumber": "+19005550100"}]}
    for forged in (bare, {**body, "callee_number": "+19005550100"}):
        with pytest.raises(transports.Refused, match="is to call somebody"):
            await transports.answer(session(forged))
    assert (await transports.answer(session(body))).errand == replace(ERRAND, call_reason="it")
    with pytest.raises(transports.Refused, match="is to call somebody"):
        await transports.answer(session(body))


@pytest.mark.parametrize(
    ("setting", "value", "options", "sentence"),
    [
        ("DAILY_API_KEY", "", {}, "needs DAILY_API_KEY"),
        ("PIPECAT_API_KEY", "", {"cloud_agent": "bot"}, "PIPECAT_API_KEY"),
        ("", "", {"host": "http://a b"}, "the host is a name"),
        ("", "", {"host": "127.0.0.1:9"}, "did not answer"),
        ("CALL_PREFIXES", "", {}, "CALL_PREFIXES is empty"),
    ],
)
@pytest.mark.usefixtures("may_call")
async def test_what_a_call_by_daily_lacks_is_said_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    value: str,
    options: dict[str, str],
    sentence: str,
) -> None:
    if setting:
        monkeypatch.setenv(setting, value)
    with pytest.raises(NotPlaced, match=sentence) as refusal:
        await DailyOutbound(**options).place(ERRAND)
    assert "\n" not in str(refusal.value)


@pytest.mark.slow
@pytest.mark.usefixtures("may_call")
async def test_the_command_has_pipecats_runner_make_a_room_that_may_dial_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("daily", reason="needs the extra daily")
    monkeypatch.setattr("config.read_env", lambda: None)
    room = {"id": "1", "name": "a", "api_created": True, "privacy": "public", "config": {}}
    room |= {"url": f"http://{HOST}:{free_port()}/a", "created_at": "2026-11-26T12:00:00.000Z"}
    async with (
        serve(ScriptedEngine()) as providers,
        answering(rooms=room, meeting_tokens={"token": "a token"}) as (daily, asked),
    ):
        world = {
            **providers.environment,
            "DAILY_API_URL": f"http://{daily}",
            "DAILY_API_KEY": KEY,
            "CALLS_DIR": str(tmp_path),
        }
        port = free_port()
        async with run_bot("daily", port, world):
            words = ["call", NUMBER, "--name", "Ann", "--reason", "it"]
            words += ["--webhook-host", f"{HOST}:{port}"]
            assert await asyncio.to_thread(command.main, words) == 0
            rooms = dict(asked)
            asked.clear()
            session = {"createDailyRoom": True, "body": {"callee_number": NUMBER}}
            for name in ("dailyRoomProperties", "dailyMeetingTokenProperties"):
                wanted = {**session, name: {"enable_dialout": True}}
                async with (
                    aiohttp.ClientSession() as stranger,
                    stranger.post(f"http://{HOST}:{port}/start", json=wanted) as answer,
                ):
                    assert answer.status == 403, "or they call whom they like, at our cost"
            assert not asked
            asked = rooms
    assert capsys.readouterr().out.startswith("The bot dials: session ")
    assert asked["/rooms"]["properties"]["enable_dialout"] is True
    assert asked["/rooms"]["properties"]["eject_at_room_exp"] is True
    # Only an owner of the room may dial out of it.
    assert asked["/meeting-tokens"]["properties"]["is_owner"] is True
