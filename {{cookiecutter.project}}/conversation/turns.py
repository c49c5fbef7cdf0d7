"""Whose turn it is: when the caller interrupts the bot, and when they only say "mhm"."""

import re
from collections import deque
from functools import cached_property

from pipecat.audio.turn.smart_turn.local_smart_turn_v3 import LocalSmartTurnAnalyzerV3
from pipecat.audio.vad.vad_analyzer import VAD_STOP_SECS
from pipecat.frames.frames import (
    BotStartedSpeakingFrame,
    BotStoppedSpeakingFrame,
    Frame,
    InterimTranscriptionFrame,
    InterruptionFrame,
    LLMMessagesAppendFrame,
    ProposedUserStartedSpeakingFrame,
    ProposedUserStoppedSpeakingFrame,
    TranscriptionFrame,
    UserBackchannelFrame,
    UserSpeakingFrame,
    VADUserStartedSpeakingFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.processors.aggregators.llm_response_universal import LLMUserAggregatorParams
from pipecat.services.stt_service import STTService
from pipecat.turns.types import ProcessFrameResult
from pipecat.turns.user_mute import MuteUntilFirstBotCompleteUserMuteStrategy
from pipecat.turns.user_start import BaseUserTurnStartStrategy
from pipecat.turns.user_turn_strategies import ExternalUserTurnStrategies, UserTurnStrategies

import config
from conversation import phrases
from conversation.floor import Floor, spoken_words
from conversation.line_clock import LineClock, Moment
from conversation.turn_end import PauseUserTurnStopStrategy, in_group
from conversation.vad import HushVADAnalyzer

# Speech that goes on longer than this is an interruption, whatever the recogniser makes of it.
LONGEST_BACKCHANNEL_SECONDS = 0.6
# One said this shortly before the bot falls silent is taken for an answer to what it said.
BACKCHANNEL_ANSWERS_SECONDS = 1.0
# From here on Unicode has the scripts of Chinese and Japanese.
FIRST_WITHOUT_SPACES = "\u2e80"


class Models:
    """What listens to one caller, not shared with any other. Loading it takes 0.1 s."""

    @cached_property
    def voice(self) -> HushVADAnalyzer:
        """Silero hears when the caller speaks."""
        return HushVADAnalyzer()

    @cached_property
    def turn(self) -> LocalSmartTurnAnalyzerV3:
        """Smart Turn hears, with turn_end.py, whether they are done."""
        return LocalSmartTurnAnalyzerV3()


# Loaded, and not used yet: the next caller is greeted so much sooner.
_spare = deque[Models](maxlen=1)


def prepare(recogniser: STTService | None = None) -> None:
    """Load the models of the next call; `recogniser` is one of the kind that it will have."""
    if not _spare:
        models = Models()
        params(Floor(), recogniser, models)
        _spare.append(models)


def _take_spare() -> Models:
    # Calls begin in threads of their own.
    try:
        return _spare.pop()
    except IndexError:
        return Models()


def params(
    floor: Floor, recogniser: STTService | None = None, models: Models | None = None
) -> LLMUserAggregatorParams:
    """How turns are taken in the call whose floor this is. Each call needs its own.

    A recogniser that tells by itself when a turn begins and ends (Deepgram Flux, Cartesia Turns) is
    believed the end, and the beginning where it is not the bot's turn.
    """
    protected = config.is_on("PROTECT_GREETING")
    models = models or _take_spare()
    strategies = _strategies(floor, recogniser, models)

    def on_hush(is_hushed: bool) -> None:
        floor.caller_is_hushed = is_hushed
        for stop in strategies.stop or []:
            if isinstance(stop, PauseUserTurnStopStrategy):
                stop.hushed(is_hushed)

    models.voice.tell(on_hush=on_hush, on_sound=floor.sound)
    return LLMUserAggregatorParams(
        vad_analyzer=models.voice,
        user_turn_strategies=strategies,
        user_mute_strategies=[MuteUntilFirstBotCompleteUserMuteStrategy()] if protected else [],
        # silence.py sees to turns without a word.
        empty_user_turn=None,
    )


def _strategies(floor: Floor, recogniser: STTService | None, models: Models) -> UserTurnStrategies:
    clock = LineClock(models.voice.listened)
    recommended = recogniser and recogniser.service_metadata_frame().user_turn_strategies
    if isinstance(recommended, ExternalUserTurnStrategies):
        start = InterruptionUserTurnStartStrategy(
            floor,
            clock,
            is_proposed=True,
            enable_interruptions=recommended.enable_interruptions,
        )
        return UserTurnStrategies(start=[start], stop=recommended.stop)
    if recommended:
        # Of a kind that is not known here.
        return recommended
    stop = PauseUserTurnStopStrategy(
        turn_analyzer=models.turn,
        speculates=config.is_on("SPECULATE", True),
        patience=config.seconds("PATIENCE_SECONDS", 0.0),
        goes_on=goes_on,
        clock=clock,
    )
    return UserTurnStrategies(start=[InterruptionUserTurnStartStrategy(floor, clock)], stop=[stop])


def is_backchannel(text: str) -> bool:
    """Whether these words only say that somebody is listening."""
    words = _words(text)
    return bool(words) and all(word in phrases.spoken().backchannels for word in words)


def is_hello(text: str) -> bool:
    """Whether these words only say that somebody is on the line."""
    known = phrases.spoken()
    words = _words(text)
    return bool(words) and all(word in known.hellos | known.backchannels for word in words)


def is_farewell(text: str) -> bool:
    """Whether these words only return a goodbye."""
    known = phrases.spoken()
    words = _words(text)
    return bool(words) and all(word in known.farewells | known.backchannels for word in words)


def goes_on(text: str) -> bool:
    """Whether more is likely to come: the caller is in a number, or paused after an "and"."""
    known = phrases.spoken().goes_on
    last = "".join(_words(text)[-1:])
    # Where there are no spaces, the last word is the end of the last part.
    is_known = last in known or any(
        word >= FIRST_WITHOUT_SPACES and last.endswith(word) for word in known
    )
    return is_known or in_group(text)


def _words(text: str) -> list[str]:
    # Japanese has no spaces; what stands between its sentences parts the words.
    return spoken_words(re.sub("[\u3001\u3002\uff01\uff1f]", " ", text))


class InterruptionUserTurnStartStrategy(BaseUserTurnStartStrategy):
    """Starts the caller's turn with their first sound; where it is the bot's, if they mean it.

    They mean it when a word is recognised that is no backchannel, or when they go on speaking for
    LONGEST_BACKCHANNEL_SECONDS, or until the bot begins. A cough while the LLM thinks does not cost
    the answer. Once the bot was cut off by a voice that had no words, though the recogniser tells
    them as they are said, other voices are around: from then on only words cut it off. The
    greeting answers a "hello?", before it or into it. Into a goodbye only words count, and more
    than a "bye".
    """

    def __init__(
        self,
        floor: Floor,
        clock: LineClock,
        *,
        is_proposed: bool = False,
        enable_interruptions: bool = True,
    ) -> None:
        """Ask `floor` who speaks; take the time from `clock`.

        `is_proposed`: the recogniser proposes turns, and the voice activity detector is not asked.
        """
        super().__init__(enable_interruptions=enable_interruptions)
        self._is_proposed = is_proposed
        self._begins, self._ends = (
            (ProposedUserStartedSpeakingFrame, ProposedUserStoppedSpeakingFrame)
            if is_proposed
            else (VADUserStartedSpeakingFrame, VADUserStoppedSpeakingFrame)
        )
        self._floor = floor
        self._clock = clock
        self._speaks_since: Moment | None = None
        self._spoke_until: Moment | None = None
        self._backchannel = ""
        self._backchannel_at = self._clock.now()
        self._is_hello_due = False
        self._tells_while_spoken = False
        self._is_cut_by_sound = False
        self._is_among_voices = False

    @property
    def resolves_proposed_turn_start_frames(self) -> bool:
        """Whether it is for this strategy to say what becomes of a proposal."""
        return self._is_proposed

    async def handle_user_turn_started(self) -> None:
        """Forget what was said before: the turn holds it now."""
        self._floor.turn_began()
        self._speaks_since = None
        self._backchannel = ""

    async def handle_user_turn_stopped(self) -> None:
        """Tell the floor, whose observer learns of it a moment later, as of a turn that begins."""
        self._floor.turn_ended()
        self._is_among_voices |= self._is_cut_by_sound and self._tells_while_spoken
        self._is_cut_by_sound = False

    async def process_frame(self, frame: Frame) -> ProcessFrameResult:
        """Tell from the frames whether the caller takes the turn."""
        floor = self._floor
        if isinstance(frame, (InterimTranscriptionFrame, TranscriptionFrame)):
            self._tells_while_spoken |= isinstance(frame, InterimTranscriptionFrame)
            self._is_cut_by_sound = False
        match frame:
            case BotStartedSpeakingFrame():
                # Its observer learns of it a moment later.
                floor.bot_heard()
                if floor.is_saying_goodbye:
                    pass
                elif floor.turn_is_open:
                    # It was on its way when the caller began, behind the interruption.
                    await self.broadcast_frame(InterruptionFrame)
                elif self._speaks_since is not None and not floor.is_greeting:
                    return await self._cut_off()
            case BotStoppedSpeakingFrame():
                floor.bot_silent()
                is_callers = not floor.is_saying_goodbye and not floor.hears_itself
                if self._speaks_since is not None and is_callers:
                    return await self._start_turn()
                await self._answer_with_backchannel()
            case _ if isinstance(frame, self._begins):
                lead = getattr(frame, "start_secs", 0.0)
                self._speaks_since, self._spoke_until = self._clock.now().before(lead), None
                is_bots = floor.bot_speaks or floor.answer_is_due or floor.is_saying_goodbye
                if not is_bots and not floor.may_be_echo:
                    return await self._start_turn()
            case _ if isinstance(frame, self._ends):
                self._speaks_since = None
                self._spoke_until = self._clock.now().before(getattr(frame, "stop_secs", 0.0))
            case UserSpeakingFrame() if self._speaks_since is not None:
                # Until the bot is to be heard there is no hurry: a cough may be over by then, of
                # which the detector tells so much later.
                patience = 0.0 if floor.bot_speaks else VAD_STOP_SECS
                spoken = self._clock.now().since(self._speaks_since)
                is_long = spoken >= LONGEST_BACKCHANNEL_SECONDS + patience
                # The detector goes on for a while after a sound.
                if is_long and not floor.caller_is_hushed and not floor.is_saying_goodbye:
                    return await self._cut_off()
            case InterimTranscriptionFrame() if not self._is_aside(frame.text):
                return await self._start_turn()
            case TranscriptionFrame() if not isinstance(frame, InterimTranscriptionFrame):
                if not self._is_aside(frame.text):
                    return await self._start_turn()
                await self._note_backchannel(frame)
            case _:
                pass
        return ProcessFrameResult.CONTINUE

    def _is_aside(self, text: str) -> bool:
        """Whether these words leave the turn where it is."""
        if self._floor.is_saying_goodbye:
            return self._floor.is_final or not text.strip() or is_farewell(text)
        if self._floor.is_greeting and (self._floor.bot_speaks or self._floor.answer_is_due):
            self._is_hello_due = is_hello(text)
            return self._is_hello_due
        if self._is_hello_due and is_hello(text):
            # It began before the greeting was over, which has answered it.
            return True
        return self._floor.bot_speaks and is_backchannel(text)

    async def _cut_off(self) -> ProcessFrameResult:
        """Let a sound take the turn that is the bot's, unless it is not the caller's."""
        if self._floor.may_be_echo or self._is_among_voices:
            return ProcessFrameResult.CONTINUE
        self._is_cut_by_sound = True
        return await self._start_turn()

    async def _start_turn(self) -> ProcessFrameResult:
        await self.trigger_user_turn_started()
        return ProcessFrameResult.STOP

    async def _note_backchannel(self, frame: TranscriptionFrame) -> None:
        self._is_hello_due = False
        if is_backchannel(frame.text):
            # Its words come some time after it was said.
            self._backchannel_at = self._spoke_until or self._clock.now()
            self._backchannel = frame.text
        # It is not the beginning of what they say next.
        await self.trigger_reset_aggregation()
        await self.push_frame(
            UserBackchannelFrame(text=frame.text, user_id=frame.user_id, timestamp=frame.timestamp)
        )

    async def _answer_with_backchannel(self) -> None:
        said, self._backchannel = self._backchannel, ""
        ago = self._clock.now().since(self._backchannel_at)
        is_recent = ago < BACKCHANNEL_ANSWERS_SECONDS
        if said and is_recent and not self._floor.is_saying_goodbye:
            message = LLMMessagesAppendFrame([{"role": "user", "content": said}], run_llm=True)
            await self.push_frame(message)
