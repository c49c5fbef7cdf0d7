"""A phone call handed over to a person, and taken back where nobody answers."""

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from harness import SECONDS, Harness, run_harness

from conversation import phrases
from rehearsal.callers.twilio import TwilioCaller
from rehearsal.engines.engine import ToolCall
from rehearsal.engines.scripted import Answer, Script, ScriptedEngine
from rehearsal.host.bot_process import BotFailed, run_bot
from rehearsal.providers.all import serve as serve_providers
from rehearsal.providers.server import HOST, free_port
from rehearsal.providers.twilio_rest import Colleague
from telephony import transfer

pytestmark = pytest.mark.anyio

ACCOUNT = "AC" + "0123456789abcdef" * 2
COLLEAGUE = "+493012345678"
KEY = "an-auth-token"
ABOUT = "Frau Özdemir möchte ihren Termin verlegen."
SCRIPT = Script(
    greeting="Good morning.",
    hears=("I want a person.", "A message, please."),
    answers=(
        Answer(
            heard="person", calls=(ToolCall("transfer_call", {"name": "ann", "summary": ABOUT}),)
        ),
        Answer(told="the line of ann is busy", says="Ann is busy, a message?"),
        Answer(result="transfer_call", says="That did not work, a message?"),
        Answer(heard="message", says="Go ahead."),
    ),
)


@pytest.fixture
async def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A bot that may hand over to Ann, and a telephone network where she is busy."""
    async with run_harness(monkeypatch, tmp_path) as harness:
        monkeypatch.setenv("TWILIO_ACCOUNT_SID", ACCOUNT)
        monkeypatch.setenv("TWILIO_AUTH_TOKEN", KEY)
        monkeypatch.setenv("TRANSFER_TO", f"ann={COLLEAGUE}")
        harness.engine.script = SCRIPT
        yield harness


async def ask_for_a_person(harness: Harness, caller: Any) -> None:
    await caller.hear(within=SECONDS)
    await caller.hear_out(quiet=0.5, within=SECONDS)
    await harness.say(caller)


@pytest.mark.slow
async def test_a_caller_is_handed_over_and_nobody_hangs_up_on_them(harness: Harness) -> None:
    harness.providers.twilio.colleagues[COLLEAGUE] = Colleague("completed", talks_s=2.0)
    async with harness.caller("twilio") as caller:
        await ask_for_a_person(harness, caller)
        await harness.over()
        assert not caller.ended.is_set()
        # Then the colleague hangs up; nobody wants the bot again.
        await asyncio.wait_for(caller.ended.wait(), SECONDS)

    assert [number for _, number in harness.providers.twilio.dialled] == [COLLEAGUE]
    assert harness.spoken[-1].strip() == phrases.spoken().transferring
    assert not harness.providers.twilio.hung_up
    assert harness.record["ending"] == {"reason": "transferred", "detail": "handed over to ann"}
    assert harness.received.ended
    assert harness.received.ended["callEndedReason"] == "transferred"


@pytest.mark.slow
async def test_where_it_is_busy_the_caller_comes_back_and_need_not_say_it_all_again(
    harness: Harness,
) -> None:
    async with harness.caller("twilio") as caller:
        await ask_for_a_person(harness, caller)
        await harness.hear_said(caller, "Ann is busy, a message?")
    await harness.over(1)

    first, second = harness.roark.calls.values()
    assert first.ended and second.ended
    assert first.ended["callEndedReason"] == "transferred"
    assert ABOUT in harness.engine.asked[-1][-1]["content"]
    assert second.ended["transcript"][0]["content"] == "Ann is busy, a message?"
    records = [json.loads(one.read_bytes()) for one in harness.calls_dir.glob("*/call.json")]
    (back,) = [one["metadata"] for one in records if "transfer_to" in one["metadata"]]
    assert (back["transfer_to"], back["transfer_outcome"]) == ("ann", "busy")


@pytest.mark.slow
async def test_a_transfer_that_the_network_refuses_leaves_the_caller_with_the_bot(
    harness: Harness,
) -> None:
    harness.providers.twilio.faults.server_errors = 1
    async with harness.caller("twilio") as caller:
        await ask_for_a_person(harness, caller)
        await harness.hear_said(caller, "That did not work, a message?")
    await harness.over()
    assert not harness.providers.twilio.dialled
    assert harness.record["ending"]["reason"] == "client-disconnected"
    # It hangs up again where the pipeline ends.
    assert len(harness.roark.calls) == 1


@pytest.mark.slow
async def test_a_browser_is_told_that_it_cannot_be_handed_over(harness: Harness) -> None:
    async with harness.caller("webrtc") as caller:
        await ask_for_a_person(harness, caller)
        await harness.hear_said(caller, "That did not work, a message?")
    await harness.over()
    (result,) = [m for m in harness.engine.asked[-1] if m["role"] == "tool"]
    assert "not on a phone line" in result["content"]


@pytest.mark.slow
async def test_a_call_that_cannot_go_on_is_left_to_the_instructions_that_dial_a_person(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSFER_ON_FAILURE", "ann")
    harness.server("llm").faults.wrong_key = True
    async with harness.caller("twilio"):
        await harness.over()
    assert harness.spoken[-1].strip() in phrases.spoken().transferring
    assert not harness.providers.twilio.hung_up
    ending = harness.record["ending"]
    assert ending["reason"] == "error"
    assert ending["detail"].endswith("handed over to ann")
    assert transfer.failover_twiml().strip() == f'<Dial timeout="20">{COLLEAGUE}</Dial>'


@pytest.mark.slow
async def test_a_killed_bot_leaves_its_caller_to_a_person(tmp_path: Path) -> None:
    engine = ScriptedEngine(SCRIPT)
    async with serve_providers(engine) as providers:
        twilio = providers.twilio
        twilio.auth_token = KEY
        twilio.colleagues[COLLEAGUE] = Colleague("no-answer")
        port = free_port()
        world = {
            **providers.environment,
            "CALLS_DIR": str(tmp_path / "calls"),
            "TWILIO_ACCOUNT_SID": ACCOUNT,
            "TWILIO_AUTH_TOKEN": KEY,
            "TRANSFER_TO": f"ann={COLLEAGUE}",
            "TRANSFER_ON_FAILURE": "ann",
        }
        async with run_bot("twilio", port, world, options=["-x", f"{HOST}:{port}"]) as bot:
            caller = TwilioCaller(f"ws://{HOST}:{port}/ws")
            await twilio.ring(caller, f"https://{HOST}:{port}/")
            try:
                await caller.hear(within=SECONDS)
                bot.send_signal(signal.SIGKILL)
                with pytest.raises(BotFailed):
                    await asyncio.wait_for(bot.wait_until_gone(), SECONDS)
                await providers.log.until(lambda: twilio.dialled, within_s=SECONDS)
                await asyncio.wait_for(caller.ended.wait(), SECONDS)
            finally:
                await caller.hang_up()
    assert twilio.dialled == [(caller.call_sid, COLLEAGUE)]
    assert not twilio.hung_up
