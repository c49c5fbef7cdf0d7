"""When the caller's turn is over: how long they pause, and what tells that it was the end.

People pause inside sentences and between the groups of a number. Pipecat asks Smart Turn once per
pause whether it was the end; where that says no it waits three seconds, and where the transcript is
late it answers half a sentence. Here the pause goes on and the evidence grows: Smart Turn is asked
again, the whole transcript is waited for, and a number gets the time that numbers take.

Smart Turn takes 0.1 to 0.2 s of a processor. It is asked before the detector is sure of the pause,
so that both have come to their conclusion at the same time.

Meanwhile the LLM already answers what is there (speculation): held back in Pipecat's LLM service,
the answer is spoken if the turn ends with these words, and thrown away if there come others.
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from pipecat.audio.turn.base_turn_analyzer import BaseTurnAnalyzer, EndOfTurnState
from pipecat.frames.frames import (
    EagerEndOfTurnCancelFrame,
    ErrorFrame,
    Frame,
    InputAudioRawFrame,
    InterimTranscriptionFrame,
    InterruptionFrame,
    LLMMessagesAppendFrame,
    LLMRunFrame,
    MetricsFrame,
    SpeechControlParamsFrame,
    StartFrame,
    STTMetadataFrame,
    TranscriptionFrame,
    VADUserStartedSpeakingFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.metrics.metrics import MetricsData
from pipecat.processors.frame_processor import FrameProcessorSetup
from pipecat.services.llm_service import LLMService
from pipecat.turns.types import ProcessFrameResult, UserTurnSpeculation
from pipecat.turns.user_stop import BaseUserTurnStopStrategy, NormalizedMatch
from pipecat.utils.time import time_now_iso8601

from conversation.line_clock import LOOK_SECONDS, LineClock, Moment

# What Smart Turn listens to, at most; it is longer than most turns.
LISTENS_SECONDS = 8.0
# Of what came before the detector was sure of a voice: it takes 0.2 s, and a first sound is soft.
LEAD_SECONDS = 0.7

# Asked before the pause is one, it is given what is missing: the last moment again and again. Of 69
# ends and pauses of the benchmark's sentences it then thinks of 64 what it thinks 0.1 s later, when
# the detector is sure; of 60 without.
STILL_SECONDS, STILL_TIMES = 0.06, 2

# All measured from the caller's last sound.
# Smart Turn hears the pause grow: what it took for a pause at first it may take for the end later.
ASK_AGAIN_SECONDS = (0.5, 0.8)
# Whatever Smart Turn says, this is the end. Shorter than the time after which people repeat
# themselves, longer than nearly all pauses inside a sentence.
LONGEST_PAUSE_SECONDS = 1.2
# A recogniser that confirms the last words of a pause does so in 20 to 700 ms. One that confirms
# nothing costs this once, and from then on what Pipecat knows of its latency.
TRANSCRIPT_SECONDS = 1.5
# A turn without a word ends here, so that the bot can ask again.
NO_WORDS_SECONDS = 2.5
# A voice that goes on for so long after the caller's words, and of which no word is recognised, is
# not theirs: a television, a party. Longer than the longest pause and the slowest recogniser
# together, and than a short break of its network.
WORDLESS_SECONDS = 3.0

SENTENCE_END = re.compile(r"[.!?\u2026\u3002\uff01\uff1f][\"')\u201d]*$")

# Each costs a request to the LLM. Who pauses oftener in one turn is answered when they are done.
MOST_SPECULATIONS = 3

# An event loop whose clock counts milliseconds, as uvloop's does, wakes before the moment that it
# was told. That is not waited for in a circle.
SOONEST_SECONDS = 0.001
# Sound comes in pieces of this length.
SOUND_SECONDS = 0.02

# Digits and spelled letters come in groups, each of which sounds complete.
GROUP = re.compile(r"(\d|\b[^\W\d_])[\W_]*$")


def in_group(text: str) -> bool:
    """Whether these words end with a digit or a spelled letter, in whatever language."""
    return bool(GROUP.search(text))


class Step(Enum):
    """What is to be done now."""

    WAIT = "wait"
    ASK = "ask the analyzer"
    SPECULATE = "have the words answered that are there"
    TELL_GUESS = "tell what was never confirmed, for it is what the answer answers"
    END = "end the turn"


@dataclass
class TurnEnd:
    """Pure: what is known of a caller's turn, and what follows from it. Times are seconds.

    Parameters:
        clock: Tells how long a pause has lasted on the line.
        latency: What Pipecat knows of the recogniser: from the last sound to the transcript.
        speculates: Whether to answer before the turn has ended.
        patience: No pause shorter than this is the end, however whole the sentence sounds.
        goes_on: Whether more is likely to come after these words. Such a turn gets the longest
            pause, and is not answered in it.
    """

    clock: LineClock
    latency: float = 0.0
    speculates: bool = False
    patience: float = 0.0
    goes_on: Callable[[str], bool] = in_group
    _is_open: bool = False
    _is_speaking: bool = False
    _is_hushed: bool = False
    _silent_since: Moment | None = None
    _words: list[str] = field(default_factory=list[str])
    _guess: str = ""
    _is_guess_told: bool = False
    _are_words_due: bool = False
    _has_last_words: bool = False
    _is_complete: bool = False
    _asked: int = 0
    _confirms: bool = True
    _speculated: str = ""
    _speculations: int = 0
    _is_being_answered: bool = False
    _tells_while_spoken: bool = False
    _word_at: Moment = field(init=False)
    _looked_at: Moment = field(init=False)

    def __post_init__(self) -> None:
        self._word_at = self._looked_at = self.clock.now()

    def begin(self) -> None:
        """Forget the turn before. Whether somebody speaks is the caller's, not the turn's."""
        self._is_open = True
        self._words.clear()
        self._set_guess("")
        self._silent_since = None
        self._speculated = ""
        self._speculations = 0
        self._is_being_answered = False
        self._word_at = self.clock.now()
        self._forget_pause()

    def end(self) -> None:
        """The turn is over, whoever ended it."""
        self.begin()
        self._is_open = False

    def speech_started(self) -> None:
        """The caller speaks, again perhaps: whatever was concluded from a pause is void."""
        self._is_speaking = True
        self._is_hushed = False
        self._silent_since = None
        self._forget_pause()
        self._are_words_due = True

    def hushed(self, is_hushed: bool) -> None:
        """The caller has made no sound for vad.HUSH_SECONDS; or they go on."""
        self._is_hushed = is_hushed and self._is_speaking
        if self._is_speaking and not is_hushed:
            self._forget_verdict()

    def speech_stopped(self, silent_for: float) -> None:
        """The caller made their last sound `silent_for` seconds ago."""
        self._is_speaking = self._is_hushed = False
        self._silent_since = self.clock.now().before(silent_for)

    def heard(self, text: str, *, is_last: bool) -> None:
        """Words were recognised; `is_last`: the recogniser says there are no more in this pause."""
        self._words.append(text)
        self._set_guess("")
        self._has_last_words = is_last
        self._note_word()
        if self._is_speaking:
            return
        # A recogniser with an endpoint of its own has told all by then, and confirms nothing more.
        self._are_words_due = False
        if self._silent_since is None:
            # Too soft for the detector: there is only the transcript to go by.
            self._silent_since = self.clock.now()
            self._is_complete = True

    def hears(self, guess: str = "") -> None:
        """Words are on their way: what is there is not all. `guess` is what they may be."""
        self._set_guess(guess)
        self._are_words_due = True
        self._has_last_words = False
        self._note_word()

    def judged(self, is_complete: bool) -> None:
        """The analyzer has listened to the pause."""
        self._is_complete = is_complete

    @property
    def is_open(self) -> bool:
        """Whether the caller has the turn."""
        return self._is_open

    @property
    def guess(self) -> str:
        """The words that are not certain yet."""
        return self._guess

    @property
    def text(self) -> str:
        """All words of the turn so far, with those that are not certain yet."""
        return " ".join(word for word in (*self._words, self._guess) if word).strip()

    @property
    def is_being_answered(self) -> bool:
        """Whether the LLM answers, or has answered, what `step` told it to."""
        return self._is_being_answered

    @property
    def is_answered_amiss(self) -> bool:
        """Whether the caller has said something else since."""
        return self._is_being_answered and not self._was_speculated(self.text)

    def forget_answer(self) -> None:
        """The answer is given, or nothing will come of it: the same words are not tried again."""
        self._is_being_answered = False

    def step(self) -> Step:
        """What is to be done now."""
        # `due_in` goes by the same moment. One that came between two looks at the clock would be
        # ahead for neither, and the turn end with the next limit, a second later.
        self._looked_at = self.clock.now()
        if (wordless := self._wordless_due_in()) is not None and wordless <= 0.0:
            return Step.END
        if (pause := self._pause()) is None:
            return self._before_pause()
        if self._is_over(pause):
            if self._words and self._are_words_due and not self._has_last_words:
                self._confirms = False
            return self._end()
        if not self._is_complete and self._asked < self._times_to_ask(pause):
            self._asked += 1
            return Step.ASK
        return self._speculate()

    def _end(self) -> Step:
        # Behind certain words it is waited for less long, and mostly still comes: as the next turn.
        if self._words or not (self._guess and self._is_being_answered):
            return Step.END
        # The caller hears an answer to it, so the LLM and the record have to know what was asked.
        # It comes back as words, and with them the turn ends.
        if self._is_guess_told:
            return Step.WAIT
        self._is_guess_told = True
        return Step.TELL_GUESS

    def _set_guess(self, guess: str) -> None:
        self._guess, self._is_guess_told = guess, False

    def _before_pause(self) -> Step:
        """What may be done while the detector is not sure that the caller is silent."""
        if not (self._is_hushed and self._is_open):
            return Step.WAIT
        if not self._asked:
            self._asked = 1
            return Step.ASK
        return self._speculate() if SENTENCE_END.search(self.text) else Step.WAIT

    def due_in(self) -> float | None:
        """Seconds from the last `step` until it may say something else by itself.

        None: not before something is told.
        """
        if (pause := self._pause()) is None:
            wordless = self._wordless_due_in()
            return None if wordless is None else self._next_look(wordless, self._word_at)
        limits = (LONGEST_PAUSE_SECONDS, NO_WORDS_SECONDS, self.patience, self._transcript_due)
        moments = (*ASK_AGAIN_SECONDS, *limits)
        ahead = [moment - pause for moment in moments if moment > pause]
        # Whether sound is missing is known by looking.
        return self._next_look(min(*ahead, LOOK_SECONDS), self._silent_since) if ahead else None

    def _next_look(self, seconds: float, since: Moment | None) -> float:
        # Where sound is missing, nothing is due before it comes.
        is_held = since is not None and self._looked_at.is_held(since)
        return max(seconds, SOUND_SECONDS if is_held else SOONEST_SECONDS)

    @property
    def _transcript_due(self) -> float:
        return TRANSCRIPT_SECONDS if self._are_words_due and self._confirms else self.latency

    def _pause(self) -> float | None:
        if self._is_speaking or self._silent_since is None:
            return None
        return self._looked_at.since(self._silent_since)

    def _wordless_due_in(self) -> float | None:
        """Seconds until the voice that is heard is somebody else's; None: there is no telling."""
        is_told = self._words and self._tells_while_spoken
        if not (self._is_open and self._is_speaking and is_told):
            return None
        return WORDLESS_SECONDS - self._looked_at.since(self._word_at)

    def _note_word(self) -> None:
        self._word_at = self.clock.now()
        # Some recognisers tell nothing before the caller is silent.
        self._tells_while_spoken = self._tells_while_spoken or self._is_speaking

    def _is_over(self, pause: float) -> bool:
        if not self._words:
            return pause >= NO_WORDS_SECONDS
        if pause < self.patience or (not self._has_last_words and pause < self._transcript_due):
            return False
        is_end = self._is_complete and not self.goes_on(self._words[-1])
        return is_end or pause >= LONGEST_PAUSE_SECONDS

    def _speculate(self) -> Step:
        if not self._may_speculate():
            return Step.WAIT
        self._speculated = self.text
        self._speculations += 1
        self._is_being_answered = True
        return Step.SPECULATE

    def _may_speculate(self) -> bool:
        if not (self.speculates and self._is_open and self.text) or self._is_being_answered:
            return False
        is_new = self._speculations < MOST_SPECULATIONS and not self._was_speculated(self.text)
        return is_new and not self.goes_on(self.text)

    def _was_speculated(self, text: str) -> bool:
        return NormalizedMatch().matches(self._speculated, text)

    def _times_to_ask(self, pause: float) -> int:
        return 1 + sum(pause >= moment for moment in ASK_AGAIN_SECONDS)

    def _forget_pause(self) -> None:
        self._has_last_words = False
        self._forget_verdict()

    def _forget_verdict(self) -> None:
        self._is_complete = False
        self._asked = 0


class PauseUserTurnStopStrategy(BaseUserTurnStopStrategy):
    """Ends the caller's turn as `TurnEnd` says; the analyzer runs beside the frames."""

    def __init__(
        self,
        *,
        turn_analyzer: BaseTurnAnalyzer,
        speculates: bool = False,
        patience: float = 0.0,
        goes_on: Callable[[str], bool] = in_group,
        clock: LineClock | None = None,
    ) -> None:
        """Ask `turn_analyzer` whether a pause was the end; take the time from `clock`.

        With `speculates` the LLM begins its answer in the pause: sooner, and for more requests.
        Before `patience` seconds no pause is the end; after words of which `goes_on` says that
        more is likely to come, only the longest is.
        """
        super().__init__()
        self._analyzer = turn_analyzer
        self._turn = TurnEnd(
            clock or LineClock(), speculates=speculates, patience=patience, goes_on=goes_on
        )
        self._was_confirmed = False
        self._is_speaking = False
        self._sound = bytearray()
        self._sample_rate = 0
        self._pauses = 0
        self._verdict: MetricsData | None = None
        self._changed = asyncio.Event()
        self._is_asked = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def hushed(self, is_hushed: bool) -> None:
        """Take from a HushVADAnalyzer that the caller may be done; or that they go on."""
        if not is_hushed:
            self._goes_on()
        self._turn.hushed(is_hushed)
        self._changed.set()

    async def setup(self, setup: FrameProcessorSetup) -> None:
        """Begin to watch the clock."""
        await super().setup(setup)
        self._sample_rate = setup.audio_in_sample_rate
        self._analyzer.set_sample_rate(setup.audio_in_sample_rate)
        self._tasks = [
            self.create_task(self._watch(), f"{self}::watch"),
            self.create_task(self._judge(), f"{self}::judge"),
        ]

    async def cleanup(self) -> None:
        """The call is over, or another strategy takes over."""
        await super().cleanup()
        for task in self._tasks:
            await self.cancel_task(task)
        self._tasks.clear()
        await self._analyzer.cleanup()

    async def handle_user_turn_started(self) -> None:
        """A turn begins, without the words of the one before."""
        self._turn.begin()
        self._was_confirmed = False

    async def handle_user_turn_stopped(self) -> None:
        """The turn is over, whoever ended it."""
        await self._withdraw()
        self._turn.end()
        self._sound.clear()

    async def process_frame(self, frame: Frame) -> ProcessFrameResult:
        """Take from the frames what they tell of the turn."""
        match frame:
            case StartFrame():
                params = self._analyzer.params
                await self.broadcast_frame(SpeechControlParamsFrame, turn_params=params)
            case InputAudioRawFrame():
                self._listen(frame.audio)
            case VADUserStartedSpeakingFrame():
                self._is_speaking = True
                self._goes_on()
                self._turn.speech_started()
            case VADUserStoppedSpeakingFrame():
                self._is_speaking = False
                self._turn.speech_stopped(frame.stop_secs)
                await self._tell_verdict()
                self._changed.set()
            case TranscriptionFrame():
                self._turn.heard(frame.text, is_last=frame.finalized)
                await self._withdraw_if_amiss()
                self._changed.set()
            case InterimTranscriptionFrame():
                self._turn.hears(frame.text)
                await self._withdraw_if_amiss()
                self._changed.set()
            case EagerEndOfTurnCancelFrame():
                if self._was_confirmed and not self._turn.is_being_answered:
                    # It wants a tool, which speculation may not run, and said so as the turn ended.
                    await self.push_frame(LLMRunFrame())
                self._answer_is_dropped()
            case InterruptionFrame():
                self._answer_is_dropped()
            case ErrorFrame() if isinstance(frame.processor, LLMService):
                await self._withdraw()
            case LLMMessagesAppendFrame() if frame.run_llm:
                # Another answer is on its way, and takes this one's place.
                await self._withdraw()
            case STTMetadataFrame():
                self._turn.latency = frame.ttfs_p99_latency
            case _:
                pass
        return ProcessFrameResult.CONTINUE

    async def _watch(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._turn.due_in()):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            while (step := self._turn.step()) is not Step.WAIT:
                match step:
                    case Step.ASK:
                        self._is_asked.set()
                    case Step.SPECULATE:
                        await self.trigger_user_turn_inference_triggered(
                            speculation=UserTurnSpeculation(self._turn.text)
                        )
                    case Step.TELL_GUESS:
                        await self.broadcast_frame(
                            TranscriptionFrame,
                            text=self._turn.guess,
                            user_id="",
                            timestamp=time_now_iso8601(),
                            finalized=True,
                        )
                    case Step.END:
                        await self._end()
                        break
                    case Step.WAIT:
                        pass

    async def _end(self) -> None:
        await self._withdraw_if_amiss()
        if not self._turn.is_being_answered:
            await self.trigger_user_turn_stopped()
            return
        self._turn.forget_answer()
        self._was_confirmed = True
        await self.trigger_user_turn_finalized(confirms_speculation=True)

    async def _withdraw_if_amiss(self) -> None:
        if self._turn.is_answered_amiss:
            await self._withdraw()

    async def _withdraw(self) -> None:
        if self._turn.is_being_answered:
            self._turn.forget_answer()
            await self.trigger_user_turn_speculation_cancelled()

    def _answer_is_dropped(self) -> None:
        self._was_confirmed = False
        self._turn.forget_answer()

    def _listen(self, audio: bytes) -> None:
        in_turn = self._is_speaking or self._turn.is_open
        seconds = LISTENS_SECONDS if in_turn else LEAD_SECONDS
        self._sound += audio
        del self._sound[: -2 * round(seconds * self._sample_rate)]

    def _goes_on(self) -> None:
        """What the analyzer is about to say is of a pause that is over."""
        self._pauses += 1
        self._verdict = None

    async def _judge(self) -> None:
        while True:
            await self._is_asked.wait()
            self._is_asked.clear()
            pause = self._pauses
            # Given anew each time, for it forgets what it took for a whole turn. The last piece
            # that it has it leaves out.
            still = self._sound[-2 * round(STILL_SECONDS * self._sample_rate) :]
            sound = self._sound + still * (STILL_TIMES if self._is_speaking else 0)
            self._analyzer.clear()
            self._analyzer.append_audio(bytes(sound), is_speech=True)
            self._analyzer.append_audio(bytes(2), is_speech=False)
            state, verdict = await self._analyzer.analyze_end_of_turn()
            if pause == self._pauses:
                self._verdict = verdict
                if not self._is_speaking:
                    await self._tell_verdict()
                self._turn.judged(state is EndOfTurnState.COMPLETE)
                self._changed.set()

    async def _tell_verdict(self) -> None:
        """Let observers know, once the detector is sure that this is a pause."""
        verdict, self._verdict = self._verdict, None
        if verdict:
            await self.push_frame(MetricsFrame(data=[verdict]))
