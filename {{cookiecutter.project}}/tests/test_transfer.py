"""A phone call handed over to a person, and taken back where nobody answers."""

import time
from pathlib import Path
from typing import Any

import pytest
from harness import SECONDS, Harness, run_harness

from conversation import phrases
from rehearsal.engines.engine import ToolCall
from rehearsal.engines.scripted import Answer, Script
from telephony import transfer

pytestmark = pytest.mark.anyio

ACCOUNT = "AC" + "0123456789abcdef" * 2
CALL = "CA" + "0123456789abcdef" * 2
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
        Answer(told="could not be reached", says="Ann is busy, a message?"),
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
    harness.providers.twilio.answering.add(COLLEAGUE)
    async with harness.caller("twilio") as caller:
        await ask_for_a_person(harness, caller)
        await harness.over()
        assert not caller.ended.is_set()

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


def test_a_failover_to_nobody_known_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRANSFER_TO", f"ann={COLLEAGUE}")
    monkeypatch.setenv("TRANSFER_ON_FAILURE", "bob")
    with pytest.raises(RuntimeError, match="'bob' is not"):
        transfer.failover()


@pytest.mark.parametrize(
    ("value", "named"),
    [("+493012345678", "'+493012345678'"), ("ann=030123", "'ann'"), ("a=+4930123456;b=1", "'a'")],
)
def test_what_is_no_list_of_numbers_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, value: str, named: str
) -> None:
    monkeypatch.setenv("TRANSFER_TO", value)
    with pytest.raises(RuntimeError, match=r"in E\.164 form") as refusal:
        transfer.people()
    assert f"the entry for {named} is not" in str(refusal.value)


@pytest.mark.parametrize("summary", ["", ABOUT, "ö" * 2000])
def test_a_note_fits_into_a_parameter_and_is_read_by_the_bot_that_signed_it(summary: str) -> None:
    parameters: dict[str, object] = dict(transfer.Note(CALL, "ann", summary, 0.0).sign(KEY))
    assert all(len(name) + len(str(value)) < 500 for name, value in parameters.items())
    note = transfer.Note.take(parameters, CALL, KEY)
    assert note and summary.startswith(note.summary)
    assert not parameters


@pytest.mark.parametrize(("call", "key"), [(CALL[:-1] + "0", KEY), (CALL, "another"), (CALL, "")])
def test_a_note_of_another_call_or_hand_is_none(call: str, key: str) -> None:
    parameters: dict[str, object] = dict(transfer.Note(CALL, "ann", ABOUT, time.time()).sign(KEY))
    assert transfer.Note.take(parameters, call, key) is None


def test_who_was_held_for_longer_than_it_rings_was_answered() -> None:
    ringing = transfer.RING_SECONDS + transfer.RETURN_SECONDS
    assert not transfer.Note(CALL, "ann", "", time.time() - ringing + 5).is_of_a_call_held
    assert transfer.Note(CALL, "ann", "", time.time() - ringing - 5).is_of_a_call_held
