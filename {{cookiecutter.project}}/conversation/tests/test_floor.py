"""Who has the floor, in any order of events: nothing hangs, and nobody owes a sound unnoticed."""

import asyncio
import random
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest
from loguru import logger
from pipecat.frames.frames import LLMMessagesAppendFrame

from conversation import silence
from conversation.floor import LOST_SECONDS, Floor, FloorObserver, Side, tell

ORDERS = 3000
EVENTS_EACH = 40


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def floor_and_clock() -> tuple[Floor, Clock]:
    clock = Clock()
    return Floor(clock=clock), clock


def events(floor: Floor, chance: random.Random) -> list[Callable[[], None]]:
    tool = f"call-{chance.randrange(3)}"
    return [
        lambda: floor.bot_owes(has_text=chance.random() < 0.5),
        floor.caller_heard,
        floor.caller_silent,
        floor.caller_took_turn,
        floor.turn_began,
        floor.turn_ended,
        floor.interrupted,
        floor.llm_began,
        lambda: floor.llm_wrote(is_spoken=chance.random() < 0.8),
        floor.llm_ended,
        floor.voice_asked,
        lambda: floor.tool_began(tool),
        lambda: floor.tool_ended(tool, is_answered=chance.random() < 0.5),
        floor.bot_heard,
        floor.bot_silent,
        floor.wait_anew,
    ]


def test_in_any_order_of_events_somebody_speaks_or_somebody_owes_and_the_wait_grows() -> None:
    chance = random.Random(10)
    for _ in range(ORDERS):
        floor, clock = floor_and_clock()
        for _ in range(EVENTS_EACH):
            chance.choice(events(floor, chance))()
            assert floor.owed_seconds >= 0.0
            if floor.bot_speaks:
                assert floor.owed_by is None
            if floor.caller_speaks:
                assert floor.owed_by is not Side.CALLER
            before = (floor.owed_by, floor.owed_seconds)
            clock.now += (step := chance.choice([0.0, 0.02, 0.5, 4.0]))
            if before[0] is not None:
                # Time alone does not pass the floor on, it only makes the wait longer.
                assert floor.owed_by is before[0]
                assert floor.owed_seconds == pytest.approx(before[1] + step)
        # However it came to this: where nothing flows any more, it is noticed.
        floor.bot_owes()
        clock.now += LOST_SECONDS + 8.0
        assert floor.owed_by is Side.BOT
        assert floor.owed_seconds > 7.99


def test_in_any_order_an_answer_heard_to_its_end_gives_the_floor_to_the_caller() -> None:
    chance = random.Random(11)
    for _ in range(ORDERS):
        floor, clock = floor_and_clock()
        for _ in range(chance.randrange(EVENTS_EACH)):
            chance.choice(events(floor, chance))()
            clock.now += chance.choice([0.0, 0.02, 0.5])
        for number in range(3):
            floor.tool_ended(f"call-{number}")
        floor.caller_silent()
        floor.llm_began()
        floor.llm_wrote()
        floor.llm_ended()
        floor.bot_heard()
        assert floor.owed_by is None
        floor.bot_silent()
        assert floor.owed_by is Side.CALLER
        assert floor.owed_seconds == 0.0


def test_nobody_owes_a_sound_before_the_call_has_begun() -> None:
    floor, clock = floor_and_clock()
    clock.now = 60.0
    assert floor.owed_by is None


def test_the_word_before_an_answer_is_not_the_answer() -> None:
    floor, clock = floor_and_clock()
    floor.bot_owes(has_text=True)
    floor.llm_began()
    floor.bot_heard()
    floor.bot_silent()
    clock.now += 8.0
    assert (floor.owed_by, floor.owed_seconds) == (Side.BOT, 8.0)


def test_an_answer_that_stops_in_its_middle_is_still_owed_by_the_llm() -> None:
    floor, clock = floor_and_clock()
    floor.llm_began()
    floor.llm_wrote()
    floor.voice_asked()
    assert floor.waits_for_voice
    clock.now += 8.0
    assert not floor.waits_for_voice, "the voice was blamed"
    floor.bot_heard()
    floor.bot_silent()
    assert floor.owed_by is Side.BOT
    floor.llm_ended()
    assert floor.waits_for_voice


def test_a_caller_of_whose_silence_nobody_is_told_is_taken_for_silent() -> None:
    floor, clock = floor_and_clock()
    floor.caller_heard()
    clock.now += LOST_SECONDS + 8.0
    assert (floor.owed_by, floor.owed_seconds) == (Side.CALLER, 8.0)


def test_while_a_tool_runs_the_bot_owes_and_nothing_but_the_tool_is_waited_for() -> None:
    floor, _ = floor_and_clock()
    floor.llm_began()
    floor.tool_began("a")
    floor.llm_ended()
    assert floor.owed_by is Side.BOT and floor.waits_for_tool
    floor.tool_ended("a")
    assert floor.owed_by is Side.BOT and not floor.waits_for_tool


def test_an_answer_for_reading_is_an_answer() -> None:
    floor, _ = floor_and_clock()
    floor.llm_began()
    floor.llm_wrote(is_spoken=False)
    floor.llm_ended()
    assert floor.owed_by is Side.CALLER


def test_typed_text_is_a_turn_of_the_callers_and_no_silence() -> None:
    floor, clock = floor_and_clock()
    floor.bot_heard()
    floor.bot_silent()
    clock.now += 7.0
    tell(floor, LLMMessagesAppendFrame([{"role": "user", "content": "Where?"}], run_llm=True))
    assert (floor.caller_turns, floor.owed_by, floor.owed_seconds) == (1, Side.BOT, 0.0)


def test_an_answer_is_owed_until_it_is_heard_also_while_somebody_else_makes_a_sound() -> None:
    floor, clock = floor_and_clock()
    floor.caller_heard()
    floor.turn_began()
    clock.now += 1.0
    assert floor.owed_by is None
    floor.turn_ended()
    floor.bot_owes()
    for _ in range(8):
        # A television, now and then.
        floor.caller_heard()
        clock.now += 0.5
        floor.caller_silent()
        clock.now += 0.5
    floor.caller_heard()
    assert (floor.owed_by, floor.owed_seconds) == (Side.BOT, 8.0)
    floor.bot_heard()
    assert not floor.answer_is_due and floor.owed_by is None


@pytest.mark.parametrize(
    ("heard", "is_own"),
    [
        ("Open from nine to five.", True),
        ("from nine to", True),
        # A recogniser gets a word wrong.
        ("We are open from mine to five today.", True),
        # What people say to it.
        ("Nine.", False),
        ("No, wait.", False),
        ("Are you open on Sunday from ten to five?", False),
    ],
)
def test_the_bot_knows_its_own_words_when_they_come_back(heard: str, is_own: bool) -> None:
    floor, clock = floor_and_clock()
    floor.bot_said("Good morning.")
    floor.bot_said("We are open from nine to five today.")
    assert not floor.is_own(heard), "it has not said them yet"
    floor.bot_heard()
    assert floor.is_own(heard) is is_own
    clock.now += 1.0
    floor.caller_heard()
    floor.bot_silent()
    clock.now += 1.0
    assert floor.is_own(heard) is is_own, "they began while it spoke"
    floor.caller_silent()
    clock.now += 1.0
    floor.caller_heard()
    assert not floor.is_own(heard), "the caller repeats them"


@pytest.mark.parametrize(("heard", "is_own"), [("Tuesday.", True), ("Wednesday.", False)])
def test_a_single_word_is_the_bots_own_where_it_was_cut_off_with_it(
    heard: str, is_own: bool
) -> None:
    floor, clock = floor_and_clock()
    floor.bot_said("Tuesday or Wednesday?")
    floor.bot_heard()
    clock.now += 0.5
    floor.caller_heard()
    assert not floor.is_own(heard), "people choose while it speaks"
    assert floor.is_own(heard, may_grow=True) is is_own, "if it is an echo, more will follow"
    floor.turn_began()
    floor.interrupted()
    floor.bot_silent()
    assert floor.is_own(heard) is is_own


def test_a_single_word_out_of_what_it_says_is_the_bots_own_where_it_hears_itself() -> None:
    floor, clock = floor_and_clock()
    floor.hears_itself = True
    floor.bot_said("On Monday. Then on Tuesday.")
    floor.bot_heard()
    assert floor.is_own("Then")
    floor.bot_silent()
    clock.now += 0.4
    assert floor.is_own("Tuesday"), "its last word comes back when it is silent"
    clock.now += 0.5
    assert not floor.is_own("Tuesday"), "the caller's answer"
    floor.bot_said("Tuesday it is.")
    floor.bot_said("At noon?")
    floor.bot_heard()
    assert floor.is_own("Noon") and not floor.is_own("Monday")


@pytest.mark.parametrize(
    ("heard", "after_s", "is_own"),
    [("Tuesday.", 0.4, True), ("Tuesday.", 0.6, False), ("Wrote.", 0.4, False)],
)
def test_the_last_word_is_the_bots_own_sooner_than_anybody_can_have_said_it_again(
    heard: str, after_s: float, is_own: bool
) -> None:
    floor, clock = floor_and_clock()
    floor.bot_said("I wrote it down for Tuesday.")
    floor.bot_heard()
    clock.now += 1.0
    floor.bot_silent()
    clock.now += after_s
    assert floor.is_own(heard) is is_own


def watched(floor: Floor) -> tuple[AsyncMock, Callable[[], None], Any]:
    """What silence.py asks of the LLM, its look at the clock, and its handler of turns."""
    looks: list[Callable[[], None]] = []
    handlers: list[Any] = []
    worker = MagicMock(queue_frame=AsyncMock())
    caller = MagicMock(event_handler=lambda _name: handlers.append)
    ending, observer = MagicMock(floor=floor, has_begun=False), MagicMock(look=looks.append)
    silence.watch(caller, worker, ending, observer, recogniser="Recogniser")
    (look,), (turn_stopped,) = looks, handlers
    return worker.queue_frame, look, partial(turn_stopped, caller, None)


@pytest.mark.anyio
async def test_a_caller_to_whom_the_bot_owes_a_sound_is_asked_nothing() -> None:
    floor, clock = floor_and_clock()
    asks, look, turn_stopped = watched(floor)

    floor.caller_heard()
    floor.caller_silent()
    floor.bot_owes()
    clock.now += 60
    look()
    await turn_stopped(MagicMock(content=""))
    await asyncio.sleep(0)
    asks.assert_not_called()

    floor.bot_heard()
    floor.bot_silent()
    clock.now += silence.SILENCE_SECONDS
    look()
    await asyncio.sleep(0)
    asks.assert_called_once()


@pytest.mark.anyio
@pytest.mark.parametrize("cuts_off", [True, False])
async def test_the_bots_own_words_are_asked_about_only_if_they_cut_its_answer_off(
    cuts_off: bool,
) -> None:
    floor, _clock = floor_and_clock()
    asks, _look, turn_stopped = watched(floor)
    floor.bot_heard()
    if not cuts_off:
        floor.bot_silent()
    floor.turn_began()
    floor.own_heard()
    floor.turn_ended()
    await turn_stopped(MagicMock(content=""))
    await asyncio.sleep(0)
    assert asks.called is cuts_off


@pytest.mark.anyio
async def test_where_callers_may_be_silent_one_who_was_not_understood_is_asked_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SILENCE_SECONDS", "0")
    floor, clock = floor_and_clock()
    asks, look, turn_stopped = watched(floor)
    floor.bot_heard()
    floor.bot_silent()
    clock.now += 600
    look()
    await asyncio.sleep(0)
    asks.assert_not_called()

    await turn_stopped(MagicMock(content=""))
    await asyncio.sleep(0)
    asks.assert_called_once()


@pytest.mark.anyio
async def test_a_look_that_fails_stops_no_other_and_its_error_is_logged_once_without_its_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("conversation.floor.LOOK_EVERY_SECONDS", 0.0)
    lines: list[str] = []
    sink = logger.add(lambda line: lines.append(str(line)), level="WARNING")
    observer = FloorObserver(Floor())
    begun, looked = 0, asyncio.Event()

    def fails() -> None:
        nonlocal begun
        begun += 1
        raise KeyError("+49 170 1234567") if begun < 3 else ValueError("+49 170 1234567")

    def sees() -> None:
        if begun >= 5:
            looked.set()

    observer.look(fails)
    observer.look(sees)
    try:
        await asyncio.wait_for(looked.wait(), 30)
    finally:
        await observer.cleanup()
        logger.remove(sink)
    assert [line.rsplit(maxsplit=1)[-1] for line in lines] == ["KeyError", "ValueError"]
    assert all("fails" in line and "1234567" not in line for line in lines)
