"""When the caller's turn is over: the rules on a clock of their own, then the strategy."""

import asyncio
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
from pipecat.audio.turn.base_turn_analyzer import BaseTurnAnalyzer, BaseTurnParams, EndOfTurnState
from pipecat.frames.frames import (
    TranscriptionFrame,
    VADUserStartedSpeakingFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.processors.frame_processor import FrameProcessorSetup
from pipecat.utils.asyncio.task_manager import TaskManager

from conversation.turn_end import (
    ASK_AGAIN_SECONDS,
    LONGEST_PAUSE_SECONDS,
    NO_WORDS_SECONDS,
    TRANSCRIPT_SECONDS,
    PauseUserTurnStopStrategy,
    Step,
    TurnEnd,
)

VAD_SECONDS = 0.2


class Clock:
    """Seconds, as told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Caller:
    """A turn whose caller, recogniser and analyzer are told what to do and when."""

    def __init__(self, is_complete: Callable[[float], bool] = lambda pause: True) -> None:
        self.clock = Clock()
        self.turn = TurnEnd(self.clock, latency=0.35)
        self.is_complete = is_complete
        self.asked_at: list[float] = []
        self.last_sound = 0.0

    def speaks(self, seconds: float = 1.0) -> None:
        self.turn.speech_started()
        self.clock.now += seconds
        self.last_sound = self.clock.now
        self.clock.now += VAD_SECONDS
        self.turn.speech_stopped(VAD_SECONDS)

    def waits(self, seconds: float) -> float | None:
        """Let time pass; return how long after the last sound the turn ended, None if not."""
        end = self.clock.now + seconds
        while True:
            step = self.turn.step()
            if step is Step.END:
                return round(self.clock.now - self.last_sound, 2)
            if step is Step.ASK:
                self.asked_at.append(round(self.clock.now - self.last_sound, 2))
                self.turn.judged(self.is_complete(self.clock.now - self.last_sound))
                continue
            due = self.turn.due_in()
            if due is None or self.clock.now + due > end:
                self.clock.now = end
                return None
            self.clock.now += due


def test_a_whole_sentence_is_over_with_its_last_words() -> None:
    caller = Caller()
    caller.speaks()
    assert caller.waits(0.1) is None
    caller.turn.heard("I am calling.", is_last=True)
    assert caller.waits(0.0) == 0.3


def test_half_a_sentence_is_not_over_when_the_transcript_of_the_rest_is_late() -> None:
    """The first half is there, the second is still being recognised."""
    caller = Caller()
    caller.speaks()
    caller.turn.heard("I am calling because", is_last=True)
    caller.speaks()
    assert caller.waits(0.7) is None
    caller.turn.heard("of my appointment.", is_last=True)
    assert caller.waits(0.0) == pytest.approx(0.9)


def test_the_analyzer_is_asked_again_as_the_pause_goes_on() -> None:
    caller = Caller(is_complete=lambda pause: pause > 0.7)
    caller.speaks()
    caller.turn.heard("He might.", is_last=True)
    assert caller.waits(5.0) == ASK_AGAIN_SECONDS[1]
    assert caller.asked_at == [VAD_SECONDS, *ASK_AGAIN_SECONDS]


def test_the_longest_pause_ends_a_turn_that_the_analyzer_thinks_incomplete() -> None:
    caller = Caller(is_complete=lambda pause: False)
    caller.speaks()
    caller.turn.heard("He might even have", is_last=True)
    assert caller.waits(5.0) == LONGEST_PAUSE_SECONDS


@pytest.mark.parametrize(
    "words", ["My number is 4 1 5", "four one five", "It is spelled K", "double two.", "It is 415."]
)
def test_digits_and_letters_are_given_the_time_that_groups_take(words: str) -> None:
    caller = Caller()
    caller.speaks()
    caller.turn.heard(words, is_last=True)
    assert caller.waits(0.9) is None
    caller.speaks()
    caller.turn.heard("and that is all.", is_last=True)
    assert caller.waits(5.0) == VAD_SECONDS


def test_a_sound_without_words_ends_its_turn_soon() -> None:
    caller = Caller()
    caller.speaks()
    assert caller.waits(10.0) == NO_WORDS_SECONDS


def test_a_recogniser_that_confirms_nothing_is_waited_for_once() -> None:
    caller = Caller()
    caller.speaks()
    caller.turn.hears()
    caller.clock.now += 0.05
    caller.turn.heard("One.", is_last=False)
    caller.turn.hears()
    assert caller.waits(10.0) == TRANSCRIPT_SECONDS
    caller.turn.begin()
    caller.speaks()
    caller.turn.heard("Hello.", is_last=False)
    caller.turn.hears()
    assert caller.waits(10.0) == 0.35


def test_a_recogniser_with_an_endpoint_of_its_own_has_told_all_before_it_is_asked() -> None:
    caller = Caller()
    caller.speaks()
    caller.turn.heard("That is all.", is_last=False)
    assert caller.waits(10.0) == 0.35


def test_words_too_soft_for_the_detector_are_a_turn() -> None:
    caller = Caller()
    caller.turn.begin()
    caller.last_sound = caller.clock.now
    caller.turn.heard("Yes.", is_last=True)
    assert caller.waits(1.0) == 0.0


def test_in_any_order_a_turn_ends_in_time_and_never_while_somebody_speaks() -> None:
    for seed in range(3000):
        one_random_turn(random.Random(seed))


def one_random_turn(chance: random.Random) -> None:
    caller = Caller(is_complete=lambda pause: chance.random() < 0.5)
    caller.turn.begin()
    for _ in range(chance.randrange(1, 12)):
        match chance.randrange(5):
            case 0:
                caller.turn.speech_started()
                assert caller.turn.step() is Step.WAIT
                caller.clock.now += chance.random()
                assert caller.turn.step() is Step.WAIT
                caller.speaks(chance.random())
            case 1:
                caller.turn.heard("so and so", is_last=chance.random() < 0.5)
            case 2:
                caller.turn.hears()
            case 3:
                caller.turn.judged(chance.random() < 0.5)
            case _:
                caller.clock.now += chance.random() / 4
    caller.speaks()
    ended = caller.waits(10.0)
    assert ended is not None and ended <= NO_WORDS_SECONDS


class Verdict(BaseTurnAnalyzer):
    """An analyzer that answers what it is told, when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.answer: asyncio.Future[EndOfTurnState] = asyncio.get_running_loop().create_future()

    @property
    def speech_triggered(self) -> bool:
        return True

    @property
    def params(self) -> BaseTurnParams:
        return BaseTurnParams()

    def append_audio(self, buffer: bytes, is_speech: bool) -> EndOfTurnState:
        return EndOfTurnState.INCOMPLETE

    async def analyze_end_of_turn(self) -> tuple[EndOfTurnState, None]:
        return await self.answer, None

    def clear(self) -> None:
        pass


@pytest.mark.anyio
async def test_a_transcript_is_not_held_up_by_the_analyzer_nor_an_old_verdict_taken_for_new() -> (
    None
):
    analyzer = Verdict()
    strategy = PauseUserTurnStopStrategy(turn_analyzer=analyzer)
    over = asyncio.Event()

    @strategy.event_handler("on_user_turn_stopped")
    async def on_user_turn_stopped(*_):
        over.set()

    # What a strategy reads of it; a whole pipeline is in test_turns.py.
    setup = SimpleNamespace(task_manager=TaskManager(), audio_in_sample_rate=16000)
    await strategy.setup(cast(FrameProcessorSetup, setup))
    try:
        await strategy.process_frame(VADUserStartedSpeakingFrame(start_secs=0.2))
        await strategy.process_frame(VADUserStoppedSpeakingFrame(stop_secs=0.2))
        words = TranscriptionFrame(text="Hello.", user_id="", timestamp="", finalized=True)
        # Comes back at once, though the analyzer has not answered.
        await asyncio.wait_for(strategy.process_frame(words), 5)
        await strategy.process_frame(VADUserStartedSpeakingFrame(start_secs=0.2))
        analyzer.answer.set_result(EndOfTurnState.COMPLETE)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not over.is_set()
        await strategy.process_frame(VADUserStoppedSpeakingFrame(stop_secs=0.2))
        await strategy.process_frame(words)
        await asyncio.wait_for(over.wait(), 5)
    finally:
        await strategy.cleanup()
