"""A telephone in a Daily room: its errors end the call, and it can be handed over.

Daily's own network cannot be rehearsed. Here stands a transport with the same events and methods.
"""

import asyncio
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from harness import SECONDS, Harness, run_harness
from pipecat.processors.filters.identity_filter import IdentityFilter
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.runner.types import RunnerArguments
from pipecat.transports.base_transport import BaseTransport

import bot
import transports
from telephony.transfer import DailyTransfer, NotTransferred

pytestmark = pytest.mark.anyio


class Room(BaseTransport):
    """What the bot knows of a Daily room.

    Attributes:
        transferred: What Daily was asked for.
        error: What it answers.
    """

    def __init__(self, error: str | None = None) -> None:
        super().__init__()
        self.transferred: list[dict[str, str]] = []
        self.error = error
        for event in ("on_client_connected", "on_client_disconnected", *transports.DAILY_LOSSES):
            self._register_event_handler(event)

    def input(self) -> FrameProcessor:
        return IdentityFilter()

    def output(self) -> FrameProcessor:
        return IdentityFilter()

    async def sip_call_transfer(self, settings: dict[str, str]) -> str | None:
        self.transferred.append(settings)
        return self.error

    async def happens(self, event: str, data: Any) -> None:
        await self._call_event_handler(event, data)


@pytest.fixture
async def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The bot's world, and somebody to hand over to."""
    async with run_harness(monkeypatch, tmp_path) as harness:
        monkeypatch.setenv("TRANSFER_TO", "ann=+493012345678")
        yield harness


async def test_what_daily_says_of_a_lost_line_ends_the_call_at_once_with_the_reason(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here every event for a call of its own; in the last the caller had been handed over."""
    calls = [(event, *ends, "") for event, ends in transports.DAILY_LOSSES.items()]
    calls.append(("on_dialin_stopped", "transferred", "handed over to ann", "ann"))
    for event, reason, detail, to in calls:
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
        (record,) = harness.calls_dir.glob("*/call.json")
        ending = json.loads(record.read_bytes())["ending"]
        assert (ending["reason"], ending["detail"]) == (reason, detail), event
        record.unlink()


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


def test_pipecats_daily_transport_has_these_events_and_this_method() -> None:
    daily = pytest.importorskip(
        "pipecat.transports.daily.transport", reason="needs the extra daily"
    )
    assert set(transports.DAILY_LOSSES) <= set(daily.DailyCallbacks.model_fields)
    transfers = inspect.signature(daily.DailyTransport.sip_call_transfer)
    assert list(transfers.parameters) == ["self", "settings"]
