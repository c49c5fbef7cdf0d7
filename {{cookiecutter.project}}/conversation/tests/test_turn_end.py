"""When the caller's turn is over: the rules on a clock of their own, then the strategy."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from pipecat.audio.turn.base_turn_analyzer import BaseTurnAnalyzer, BaseTurnParams, EndOfTurnState
from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.frames.frames import (
    EagerEndOfTurnCancelFrame,
    ErrorFrame,
    Frame,
    InputAudioRawFrame,
    InterimTranscriptionFrame,
    TranscriptionFrame,
    VADUserStartedSpeakingFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.processors.frame_processor import FrameProcessorSetup
from pipecat.services.llm_service import LLMService
from pipecat.turns.types import UserTurnSpeculation
from pipecat.turns.user_stop import UserTurnStoppedParams
from pipecat.utils.asyncio.task_manager import TaskManager

from conversation.line_clock import LineClock
from conversation.turn_end import (
    ASK_AGAIN_SECONDS,
    LEAD_SECONDS,
    LISTENS_SECONDS,
    LONGEST_PAUSE_SECONDS,
    MOST_SPECULATIONS,
    NO_WORDS_SECONDS,
    TRANSCRIPT_SECONDS,
    WORDLESS_SECONDS,
    PauseUserTurnStopStrategy,
    Step,
    TurnEnd,
)
from conversation.turns import goes_on
from conversation.vad import (
    HUSH_SECONDS,
    ONSET_SECONDS,
    Hush,
    HushVADAnalyzer,
    Onset,
    VoicesAround,
    loudness_db,
)
from rehearsal.engines.scripted import ScriptedEngine

VAD_SECONDS = 0.2
VOICE_HZ = 16000


class Clock:
    """Seconds, as told; a look at it may take a moment."""

    def __init__(self) -> None:
        self.now = 100.0
        self.seconds_a_look = 0.0

    def __call__(self) -> float:
        self.now += self.seconds_a_look
        return self.now


class Caller:
    """A turn whose caller, recogniser and analyzer are told what to do and when."""

    def __init__(
        self,
        is_complete: Callable[[float], bool] = lambda pause: True,
        *,
        speculates: bool = False,
        patience: float = 0.0,
    ) -> None:
        self.clock = Clock()
        # What was listened to is behind the clock by what is still on its way.
        self.delayed = 0.0
        self.turn = TurnEnd(
            LineClock(lambda: self.clock.now - self.delayed, clock=self.clock),
            latency=0.35,
            speculates=speculates,
            patience=patience,
            goes_on=goes_on,
        )
        self.is_complete = is_complete
        self.asked_at: list[float] = []
        self.speculated: list[str] = []
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
            if step is Step.SPECULATE:
                self.speculated.append(self.turn.text)
                continue
            if step is Step.TELL_GUESS:
                self.turn.heard(self.turn.guess, is_last=True)
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


def test_the_analyzer_is_asked_before_the_pause_is_one_and_not_again_when_it_is() -> None:
    caller = Caller()
    caller.turn.begin()
    caller.turn.speech_started()
    assert caller.turn.step() is Step.WAIT
    caller.turn.hushed(True)
    assert caller.turn.step() is Step.ASK
    caller.turn.judged(True)
    # A gap between two words: what was made of it is void.
    caller.turn.hushed(False)
    assert caller.turn.step() is Step.WAIT
    caller.turn.hushed(True)
    assert caller.turn.step() is Step.ASK
    caller.turn.judged(True)
    assert caller.turn.step() is Step.WAIT
    caller.turn.speech_stopped(VAD_SECONDS)
    caller.turn.heard("That is all.", is_last=True)
    assert caller.turn.step() is Step.END


def test_the_longest_pause_ends_a_turn_that_the_analyzer_thinks_incomplete() -> None:
    caller = Caller(is_complete=lambda pause: False)
    caller.speaks()
    caller.turn.heard("He might even have", is_last=True)
    assert caller.waits(5.0) == LONGEST_PAUSE_SECONDS


def test_a_pause_in_which_no_sound_came_through_is_no_longer_for_it() -> None:
    """The process stands still for a second, and behind the pause wait the words that follow it."""
    caller = Caller()
    caller.speaks()
    caller.turn.heard("My number is 4 1", is_last=True)
    assert caller.waits(0.2) is None
    caller.clock.now += 1.5
    caller.delayed = 1.5
    assert caller.turn.step() is not Step.END
    # It comes all at once.
    caller.delayed = 0.0
    caller.turn.speech_started()
    assert caller.turn.step() is Step.WAIT
    caller.speaks()
    caller.turn.heard("5 5", is_last=True)
    assert caller.waits(2.0) == LONGEST_PAUSE_SECONDS


def test_who_turned_their_microphone_off_is_answered_as_if_they_had_paused() -> None:
    caller = Caller()
    caller.speaks()
    caller.turn.heard("My number is 4 1 5", is_last=True)
    silent_since = caller.clock.now
    caller.turn.clock = LineClock(lambda: silent_since, clock=caller.clock)
    caller.turn.speech_stopped(VAD_SECONDS)
    assert caller.waits(2.0) == pytest.approx(LONGEST_PAUSE_SECONDS, abs=0.1)


def test_with_patience_no_pause_is_the_end_sooner_and_the_answer_is_begun_all_the_same() -> None:
    caller = Caller(speculates=True, patience=1.3)
    caller.turn.begin()
    caller.speaks()
    caller.turn.heard("go somewhere", is_last=True)
    assert caller.waits(0.9) is None
    assert caller.speculated == ["go somewhere"]
    caller.speaks()
    caller.turn.heard("and do something", is_last=True)
    assert caller.waits(5.0) == 1.3


@pytest.mark.parametrize(
    ("language", "words"),
    [
        ("en", "My number is 4 1 5"),
        ("en", "four one five"),
        ("en", "It is spelled K"),
        ("en", "double two."),
        ("en", "It is 415."),
        ("en", "I would like to come on Tuesday, um"),
        ("en", "I am calling because"),
        ("de", "null eins sieben"),
        ("de", "Ich hätte gern einen"),
        ("fr", "zéro six, vingt"),
        ("ja", "電話番号は〇三"),
        ("ja", "予約したいのですが、えっと"),
    ],
)
def test_numbers_and_what_is_no_end_of_a_sentence_are_given_the_longest_pause(
    monkeypatch: pytest.MonkeyPatch, language: str, words: str
) -> None:
    monkeypatch.setenv("LANGUAGE", language)
    caller = Caller(speculates=True)
    caller.turn.begin()
    caller.speaks()
    caller.turn.heard(words, is_last=True)
    assert caller.waits(0.9) is None
    assert caller.speculated == []
    caller.speaks()
    caller.turn.heard("and that is all.", is_last=True)
    assert caller.waits(5.0) == VAD_SECONDS


@pytest.mark.parametrize(
    ("language", "words"), [("en", "Hello?"), ("de", "Ich will das."), ("ja", "こんにちは。")]
)
def test_a_sentence_is_not_taken_for_half_of_one(
    monkeypatch: pytest.MonkeyPatch, language: str, words: str
) -> None:
    monkeypatch.setenv("LANGUAGE", language)
    assert not goes_on(words)


def test_no_moment_is_missed_where_looking_takes_time_and_the_loop_wakes_early() -> None:
    for seed in range(300):
        chance = random.Random(seed)
        caller = Caller()
        caller.turn.begin()
        caller.speaks()
        caller.turn.heard("four one five", is_last=True)
        caller.turn.judged(True)
        caller.clock.seconds_a_look = chance.random() * 1e-4
        while caller.turn.step() is not Step.END:
            # As uvloop does, by up to a millisecond.
            early = chance.random() * 1e-3
            caller.clock.now += (caller.turn.due_in() or 0.0) - early
        assert caller.clock.now - caller.last_sound == pytest.approx(
            LONGEST_PAUSE_SECONDS, abs=0.01
        )


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


def test_a_voice_without_words_behind_the_callers_words_does_not_hold_their_turn_open() -> None:
    caller = Caller()
    caller.turn.begin()
    caller.turn.speech_started()
    caller.clock.now += 1.0
    caller.turn.hears("I need")
    caller.turn.heard("I need a table.", is_last=False)
    # The television goes on.
    assert caller.turn.step() is Step.WAIT
    assert caller.turn.due_in() == pytest.approx(WORDLESS_SECONDS)
    caller.clock.now += WORDLESS_SECONDS / 2
    caller.turn.hears("for four")
    caller.turn.heard("For four.", is_last=False)
    caller.clock.now += WORDLESS_SECONDS - 0.1
    assert caller.turn.step() is Step.WAIT
    caller.clock.now += 0.1
    assert caller.turn.step() is Step.END


def test_who_is_heard_by_a_recogniser_that_waits_for_their_silence_may_speak_for_long() -> None:
    caller = Caller()
    caller.turn.begin()
    caller.speaks()
    caller.turn.heard("I need a table.", is_last=True)
    caller.turn.speech_started()
    caller.clock.now += 60.0
    assert caller.turn.step() is Step.WAIT
    assert caller.turn.due_in() is None


def test_words_too_soft_for_the_detector_are_a_turn() -> None:
    caller = Caller()
    caller.turn.begin()
    caller.last_sound = caller.clock.now
    caller.turn.heard("Yes.", is_last=True)
    assert caller.waits(1.0) == 0.0


class TestSpeculation:
    """The answer that is begun before the turn has ended."""

    @staticmethod
    def caller(is_complete: bool = True) -> Caller:
        caller = Caller(is_complete=lambda pause: is_complete, speculates=True)
        caller.turn.begin()
        caller.speaks()
        return caller

    def test_begins_with_the_words_that_are_there_when_the_caller_falls_silent(self) -> None:
        caller = self.caller()
        caller.turn.hears("can you hear me")
        assert caller.waits(0.05) is None
        assert caller.speculated == ["can you hear me"]
        caller.turn.heard("Can you hear me?", is_last=True)
        assert not caller.turn.is_answered_amiss
        assert caller.waits(0.0) == 0.25
        assert caller.turn.is_being_answered

    def test_is_amiss_once_the_caller_has_said_something_else(self) -> None:
        caller = self.caller(is_complete=False)
        caller.turn.heard("I would like", is_last=True)
        assert caller.waits(0.3) is None
        caller.turn.speech_started()
        assert not caller.turn.is_answered_amiss, "a cough takes nothing back"
        caller.turn.hears("an appointment")
        assert caller.turn.is_answered_amiss
        caller.turn.forget_answer()
        caller.speaks()
        caller.turn.heard("an appointment.", is_last=True)
        caller.waits(0.1)
        assert caller.speculated == ["I would like", "I would like an appointment."]

    def test_is_not_begun_again_with_words_to_which_it_came_to_nothing(self) -> None:
        caller = self.caller()
        caller.turn.hears("cancel it")
        assert caller.waits(0.05) is None
        caller.turn.forget_answer()
        caller.turn.heard("Cancel it!", is_last=True)
        assert caller.waits(0.1) == 0.25
        assert caller.speculated == ["cancel it"]
        assert not caller.turn.is_being_answered

    def test_of_what_reads_like_a_sentence_begins_before_the_pause_is_one(self) -> None:
        caller = self.caller()
        caller.turn.speech_started()
        caller.turn.hears("Are you")
        caller.turn.hushed(True)
        assert caller.turn.step() is Step.ASK
        assert caller.turn.step() is Step.WAIT
        caller.turn.hushed(False)
        caller.turn.hears("Are you open?")
        assert caller.turn.step() is Step.WAIT
        caller.turn.hushed(True)
        assert caller.turn.step() is Step.ASK
        caller.turn.judged(True)
        assert caller.turn.step() is Step.SPECULATE
        assert caller.turn.step() is Step.WAIT
        caller.turn.speech_stopped(VAD_SECONDS)
        caller.turn.heard("Are you open?", is_last=True)
        assert caller.waits(0.0) is not None
        assert caller.turn.is_being_answered

    def test_of_a_number_waits_for_its_end(self) -> None:
        caller = self.caller()
        caller.turn.heard("It is 4 1 5", is_last=True)
        assert caller.waits(0.5) is None
        assert caller.speculated == []

    def test_is_tried_a_few_times_in_a_turn(self) -> None:
        caller = self.caller(is_complete=False)
        for number in range(MOST_SPECULATIONS + 2):
            caller.turn.heard(f"and then {'more ' * number}", is_last=True)
            caller.waits(0.1)
            caller.turn.forget_answer()
            caller.speaks()
        assert len(caller.speculated) == MOST_SPECULATIONS

    def test_is_not_of_words_outside_a_turn(self) -> None:
        caller = self.caller()
        caller.turn.end()
        caller.speaks()
        caller.turn.heard("mhm", is_last=True)
        caller.waits(0.1)
        assert caller.speculated == []


def test_in_any_order_a_turn_ends_in_time_and_never_while_somebody_speaks() -> None:
    for seed in range(3000):
        one_random_turn(random.Random(seed))


def one_random_turn(chance: random.Random) -> None:
    caller = Caller(is_complete=lambda pause: chance.random() < 0.5, speculates=True)
    caller.turn.begin()
    for _ in range(chance.randrange(1, 12)):
        match chance.randrange(5):
            case 0:
                caller.turn.speech_started()
                assert caller.turn.step() is Step.WAIT
                caller.clock.now += chance.random()
                assert caller.turn.step() is Step.WAIT
                if chance.random() < 0.5:
                    caller.turn.forget_answer()
                caller.speaks(chance.random())
            case 1:
                caller.turn.heard("so and so", is_last=chance.random() < 0.5)
            case 2:
                caller.turn.hears(chance.choice(["", "so"]))
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
        self.listened = b""
        self.asked_about: list[bytes] = []

    @property
    def speech_triggered(self) -> bool:
        return True

    @property
    def params(self) -> BaseTurnParams:
        return BaseTurnParams()

    def append_audio(self, buffer: bytes, is_speech: bool) -> EndOfTurnState:
        self.listened += buffer if is_speech else b""
        return EndOfTurnState.INCOMPLETE

    async def analyze_end_of_turn(self) -> tuple[EndOfTurnState, None]:
        self.asked_about.append(self.listened)
        return await asyncio.shield(self.answer), None

    def clear(self) -> None:
        self.listened = b""


class Watched:
    """A strategy, and what it did, in order."""

    def __init__(self, analyzer: Verdict, clock: LineClock | None = None) -> None:
        self.strategy = PauseUserTurnStopStrategy(
            turn_analyzer=analyzer, speculates=True, clock=clock
        )
        self.did: list[str] = []
        self.happened = asyncio.Event()
        for event in ("inference_triggered", "speculation_cancelled", "stopped"):
            name = f"on_user_turn_{event}"
            self.strategy.add_event_handler(name, self._note_of(event))
        self.strategy.add_event_handler("on_push_frame", self._note_of("push"))
        self.strategy.add_event_handler("on_broadcast_frame", self._note_broadcast)

    async def _note_broadcast(self, _strategy: object, _kind: type[Frame], **told: object) -> None:
        self.did.append(f"broadcast {told['text']!r}")
        self.happened.set()

    def _note_of(self, event: str) -> Callable[..., Awaitable[None]]:
        async def note(_strategy: object, what: object = None, *_: object) -> None:
            self.did.append(f"{event} {_told(what)}".strip())
            self.happened.set()

        return note

    async def until(self, *did: str) -> None:
        """Wait until it has done so much, and nothing else."""
        async with asyncio.timeout(30):
            while len(self.did) < len(did):
                self.happened.clear()
                await self.happened.wait()
        assert self.did == list(did)
        self.did.clear()


def _told(what: object) -> str:
    match what:
        case UserTurnSpeculation(text=text):
            return f"of {text!r}"
        case UserTurnStoppedParams(confirms_speculation=True):
            return "and answered"
        case Frame():
            return type(what).__name__
    return ""


@asynccontextmanager
async def watched(analyzer: Verdict, clock: LineClock | None = None) -> AsyncIterator[Watched]:
    """Set a strategy up as Pipecat does: what it reads of it; whole calls are in test_turns.py."""
    watched = Watched(analyzer, clock)
    setup = SimpleNamespace(task_manager=TaskManager(), audio_in_sample_rate=16000)
    await watched.strategy.setup(cast(FrameProcessorSetup, setup))
    await watched.strategy.handle_user_turn_started()
    try:
        yield watched
    finally:
        await watched.strategy.cleanup()


@pytest.mark.anyio
async def test_a_pause_is_told_of_before_it_is_one_and_taken_back_once_they_go_on() -> None:
    told: list[tuple[bool, float]] = []
    second = 0.0
    sounds: list[bool] = []
    analyzer = HushVADAnalyzer()
    analyzer.tell(
        on_hush=lambda is_hushed: told.append((is_hushed, second)), on_sound=sounds.append
    )
    analyzer.set_sample_rate(VOICE_HZ)
    voice = b"".join([p.pcm async for p in ScriptedEngine().speak("as long as a cat is", VOICE_HZ)])
    spoken = len(voice) / 2 / VOICE_HZ
    sound, size = bytes(2 * VOICE_HZ) + voice + bytes(2 * VOICE_HZ), 2 * VOICE_HZ // 50
    sound += voice + bytes(2 * VOICE_HZ)
    for at in range(0, len(sound), size):
        second = at / 2 / VOICE_HZ
        await analyzer.analyze_audio(sound[at : at + size].ljust(size, b"\0"))
    kinds = [is_hushed for is_hushed, _ in told]
    assert kinds == [True, False, True]
    (_, hushed_at), (_, on_at), (_, again_at) = told
    # Behind its last word the voice is silent for 0.04 s; a frame's time is its beginning.
    assert HUSH_SECONDS - 0.06 <= hushed_at - (1.0 + spoken) < VAD_SECONDS
    assert 2.0 + spoken < on_at < 2.5 + spoken < again_at
    assert (sounds[0], any(sounds), sounds[-1]) == (False, True, False)
    await analyzer.cleanup()


@pytest.mark.anyio
async def test_a_detector_that_lags_holds_up_nothing_else_and_misses_no_sound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pipecat waits for it before it passes a word or an answer on."""
    goes_on = threading.Event()
    heard: list[bytes] = []

    def voice_confidence(_analyzer: SileroVADAnalyzer, buffer: bytes) -> float:
        goes_on.wait(30)
        heard.append(buffer)
        return 0.0

    monkeypatch.setattr(SileroVADAnalyzer, "voice_confidence", voice_confidence)
    analyzer = HushVADAnalyzer()
    analyzer.set_sample_rate(VOICE_HZ)
    pieces = [bytes([number]) * 640 for number in range(8)]
    for piece in pieces:
        await analyzer.analyze_audio(piece)
    assert not heard and not analyzer.listened()
    goes_on.set()
    whole_windows = sum(map(len, pieces)) // 1024
    async with asyncio.timeout(30):
        while analyzer.listened() < whole_windows * 512 / VOICE_HZ:
            await analyzer.analyze_audio(b"")
            await asyncio.sleep(0)
    assert b"".join(heard) == b"".join(pieces)
    await analyzer.cleanup()


@pytest.mark.anyio
async def test_on_a_machine_that_is_too_busy_the_detector_does_not_hold_the_words_up() -> None:
    """Each wait takes longer than a piece of sound lasts."""
    looks, seconds_a_wait = 0, 0.05

    def clock() -> float:
        nonlocal looks
        looks += 1
        return looks // 2 * seconds_a_wait

    analyzer = HushVADAnalyzer(clock=clock)
    analyzer.set_sample_rate(VOICE_HZ)
    seconds = 2.0
    for _ in range(round(50 * seconds)):
        await analyzer.analyze_audio(bytes(2 * VOICE_HZ // 50))
    waited = looks // 2 * seconds_a_wait
    assert 0.0 < waited <= seconds / 2 + seconds_a_wait
    await analyzer.cleanup()


def told_of(levels: list[int]) -> list[bool]:
    """Say what is an onset of 32 ms windows of noise, each as loud as it is told (PCM16, RMS)."""
    noise = np.random.default_rng(1)
    onset = Onset()
    return [
        onset.heard(loudness_db((noise.standard_normal(256) * level).astype("<i2")), 0.032)
        for level in levels
    ]


def test_a_soft_consonant_is_a_sound_before_it_is_a_voice() -> None:
    """The beginning of "four" by phone: Silero takes 0.3 s to call it a voice."""
    four = [0, 80, 145, 145, 290, 145, 260, 580, 650, 3200, 5200]
    assert told_of([0, 0, 0, *four]) == [False] * 5 + [True] * 9


def test_a_noise_that_goes_on_is_none_and_the_louder_sound_in_it_is() -> None:
    street = told_of([*[300] * 60, 2000, 2000])
    assert sum(street[:60]) <= ONSET_SECONDS / 0.032
    assert street[-2:] == [True, True]


def test_a_voice_that_has_fallen_is_silent_and_a_soft_word_or_a_noisy_line_is_not() -> None:
    hush = Hush()

    def silent(*levels: float, is_voice: bool = True) -> list[float]:
        return [hush.heard(level, 0.03, is_voice=is_voice) for level in levels]

    assert silent(-20.0, -25.0, -22.0, -38.0, -30.0) == [0.0] * 5
    assert silent(-60.0, -70.0, -48.0, -21.0) == pytest.approx([0.03, 0.06, 0.09, 0.0])
    assert silent(-40.0, -41.0, -40.0, is_voice=False) == [0.0] * 3
    # A click, and who speaks softly after it.
    silent(-1.0, is_voice=False)
    assert silent(-30.0, -35.0) == [0.0] * 2


def test_voices_that_never_stop_are_told_from_the_caller_who_is_louder() -> None:
    around = VoicesAround()
    of_others = [around.drown(-40.0 - number % 3, 0.9, 0.032) for number in range(100)]
    assert all(of_others[10:])
    assert [around.drown(level, 0.9, 0.032) for level in (-40.0, -30.0, -20.0, -33.0)] == [
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize("confidence", [0.0, 0.4])
def test_a_soft_voice_on_a_quiet_or_noisy_line_is_the_callers(confidence: float) -> None:
    around = VoicesAround()
    for _ in range(100):
        assert not around.drown(-40.0, confidence, 0.032)
    assert not around.drown(-39.0, 0.9, 0.032)


SPEAKS = VADUserStartedSpeakingFrame(start_secs=0.2)
IS_SILENT = VADUserStoppedSpeakingFrame(stop_secs=0.2)


def words(text: str) -> TranscriptionFrame:
    return TranscriptionFrame(text=text, user_id="", timestamp="", finalized=True)


def guess(text: str) -> InterimTranscriptionFrame:
    return InterimTranscriptionFrame(text=text, user_id="", timestamp="")


@pytest.mark.anyio
async def test_a_transcript_is_not_held_up_by_the_analyzer_nor_an_old_verdict_taken_for_new() -> (
    None
):
    analyzer = Verdict()
    async with watched(analyzer) as call:
        await call.strategy.process_frame(SPEAKS)
        await call.strategy.process_frame(IS_SILENT)
        # Comes back at once, though the analyzer has not answered.
        await asyncio.wait_for(call.strategy.process_frame(words("Hello.")), 5)
        await call.until("inference_triggered of 'Hello.'")
        await call.strategy.process_frame(SPEAKS)
        analyzer.answer.set_result(EndOfTurnState.COMPLETE)
        for _ in range(20):
            await asyncio.sleep(0)
        assert call.did == []
        await call.strategy.process_frame(IS_SILENT)
        await call.strategy.process_frame(words("Are you there?"))
        again = "inference_triggered of 'Hello. Are you there?'"
        await call.until("speculation_cancelled", again, "stopped and answered")


@pytest.mark.anyio
async def test_an_answer_to_the_same_words_is_kept_and_one_to_others_withdrawn() -> None:
    analyzer = Verdict()
    async with watched(analyzer) as call:
        await call.strategy.process_frame(SPEAKS)
        await call.strategy.process_frame(guess("can you hear me"))
        await call.strategy.process_frame(IS_SILENT)
        await call.until("inference_triggered of 'can you hear me'")
        await call.strategy.process_frame(guess("can you hear me now"))
        await call.until("speculation_cancelled", "inference_triggered of 'can you hear me now'")
        await call.strategy.process_frame(words("Can you hear me now?"))
        analyzer.answer.set_result(EndOfTurnState.COMPLETE)
        await call.until("stopped and answered")


@pytest.mark.anyio
async def test_an_answer_that_wants_a_tool_or_fails_is_asked_for_when_the_turn_is_over() -> None:
    failed = ErrorFrame("timeout", processor=LLMService())
    for lost in (EagerEndOfTurnCancelFrame(), failed):
        analyzer = Verdict()
        async with watched(analyzer) as call:
            await call.strategy.process_frame(SPEAKS)
            await call.strategy.process_frame(words("Cancel it."))
            await call.strategy.process_frame(IS_SILENT)
            await call.until("inference_triggered of 'Cancel it.'")
            await call.strategy.process_frame(lost)
            analyzer.answer.set_result(EndOfTurnState.COMPLETE)
            withdrawn = ["speculation_cancelled"] if lost is failed else []
            await call.until(*withdrawn, "inference_triggered", "stopped")


@pytest.mark.anyio
async def test_an_answer_that_wants_a_tool_as_the_turn_ends_is_asked_for_again() -> None:
    """The service withdraws it while the word that it stands is on its way."""
    analyzer = Verdict()
    analyzer.answer.set_result(EndOfTurnState.COMPLETE)
    async with watched(analyzer) as call:
        await call.strategy.process_frame(SPEAKS)
        await call.strategy.process_frame(guess("cancel it"))
        await call.strategy.process_frame(IS_SILENT)
        await call.until("inference_triggered of 'cancel it'")
        await call.strategy.process_frame(words("Cancel it."))
        await call.until("stopped and answered")
        await call.strategy.handle_user_turn_stopped()
        await call.strategy.process_frame(EagerEndOfTurnCancelFrame())
        await call.until("push LLMRunFrame")
        await call.strategy.process_frame(EagerEndOfTurnCancelFrame())
        assert call.did == []


@pytest.mark.anyio
async def test_words_that_were_answered_and_never_confirmed_are_told_before_the_turn_ends() -> None:
    analyzer = Verdict()
    clock = Clock()
    async with watched(analyzer, LineClock(clock=clock)) as call:
        await call.strategy.process_frame(SPEAKS)
        await call.strategy.process_frame(guess("Is it nine?"))
        await call.strategy.process_frame(IS_SILENT)
        await call.until("inference_triggered of 'Is it nine?'")
        clock.now += NO_WORDS_SECONDS
        await call.until("broadcast 'Is it nine?'")
        for _ in range(20):
            await asyncio.sleep(0)
        assert call.did == []
        await call.strategy.process_frame(words("Is it nine?"))
        await call.until("stopped and answered")


def sound(number: int, seconds: float) -> InputAudioRawFrame:
    """Audio that is nothing but one number."""
    pcm = number.to_bytes(2, "little") * round(seconds * 16000)
    return InputAudioRawFrame(audio=pcm, sample_rate=16000, num_channels=1)


@pytest.mark.anyio
async def test_the_analyzer_hears_the_whole_turn_each_time_and_nothing_of_the_one_before() -> None:
    analyzer = Verdict()
    analyzer.answer.set_result(EndOfTurnState.INCOMPLETE)

    async def asked(times: int) -> list[int]:
        """Wait until it was asked so often; return which sounds it heard the last time."""
        async with asyncio.timeout(30):
            while len(analyzer.asked_about) < times:
                await asyncio.sleep(0)
        heard = analyzer.asked_about[-1]
        return sorted(
            {int.from_bytes(heard[at : at + 2], "little") for at in range(0, len(heard), 2)}
        )

    async with watched(analyzer) as call:
        await call.strategy.process_frame(SPEAKS)
        await call.strategy.process_frame(sound(1, 1.0))
        call.strategy.hushed(True)
        assert await asked(1) == [1]
        # They go on, and pause again.
        call.strategy.hushed(False)
        await call.strategy.process_frame(sound(2, 1.0))
        call.strategy.hushed(True)
        assert await asked(2) == [1, 2]
        await call.strategy.process_frame(IS_SILENT)
        await call.strategy.handle_user_turn_stopped()
        await call.strategy.process_frame(sound(3, 10.0))
        await call.strategy.process_frame(sound(4, LEAD_SECONDS))
        await call.strategy.process_frame(SPEAKS)
        await call.strategy.handle_user_turn_started()
        await call.strategy.process_frame(sound(5, LISTENS_SECONDS - LEAD_SECONDS))
        await call.strategy.process_frame(IS_SILENT)
        assert await asked(3) == [4, 5]
