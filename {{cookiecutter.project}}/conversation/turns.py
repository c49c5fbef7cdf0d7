"""Whose turn it is: when the caller interrupts the bot, and when they only say "mhm"."""

import re
import time
from collections.abc import Callable

from pipecat.audio.turn.smart_turn.local_smart_turn_v3 import LocalSmartTurnAnalyzerV3
from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.frames.frames import (
    BotStartedSpeakingFrame,
    BotStoppedSpeakingFrame,
    Frame,
    InterimTranscriptionFrame,
    LLMMessagesAppendFrame,
    TranscriptionFrame,
    UserBackchannelFrame,
    UserSpeakingFrame,
    VADUserStartedSpeakingFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.processors.aggregators.llm_response_universal import LLMUserAggregatorParams
from pipecat.turns.types import ProcessFrameResult
from pipecat.turns.user_mute import MuteUntilFirstBotCompleteUserMuteStrategy
from pipecat.turns.user_start import BaseUserTurnStartStrategy
from pipecat.turns.user_turn_strategies import UserTurnStrategies

import config
from conversation import phrases, silence
from conversation.turn_end import PauseUserTurnStopStrategy

# Speech that goes on longer than this is an interruption, whatever the recogniser makes of it.
LONGEST_BACKCHANNEL_SECONDS = 0.6
# One said this shortly before the bot falls silent is taken for an answer to what it said.
ANSWER_SECONDS = 1.0


def params() -> LLMUserAggregatorParams:
    """How turns are taken in this call. Each call needs its own."""
    protected = config.setting("PROTECT_GREETING").lower() in ("1", "true", "yes", "on")
    return LLMUserAggregatorParams(
        # Silero hears when the caller speaks; Smart Turn, with turn_end.py, whether they are done.
        vad_analyzer=SileroVADAnalyzer(),
        user_turn_strategies=UserTurnStrategies(
            start=[InterruptionUserTurnStartStrategy()],
            stop=[PauseUserTurnStopStrategy(turn_analyzer=LocalSmartTurnAnalyzerV3())],
        ),
        user_mute_strategies=[MuteUntilFirstBotCompleteUserMuteStrategy()] if protected else [],
        user_idle_timeout=silence.timeout_seconds(),
    )


def is_backchannel(text: str) -> bool:
    """Whether these words only say that somebody is listening."""
    words = re.sub(r"[^\w\s]", "", text.lower()).split()
    return bool(words) and all(word in phrases.spoken().backchannels for word in words)


class InterruptionUserTurnStartStrategy(BaseUserTurnStartStrategy):
    """Starts the caller's turn with their first sound; while the bot speaks, only if they mean it.

    They mean it when a word is recognised that is no backchannel, or when they go on speaking for
    LONGEST_BACKCHANNEL_SECONDS.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Take the time from `clock`, in seconds."""
        super().__init__()
        self._clock = clock
        self._bot_speaks = False
        self._speaks_since: float | None = None
        self._backchannel = ""
        self._backchannel_at = 0.0

    async def handle_user_turn_started(self) -> None:
        """Forget what was said before: the turn holds it now."""
        self._speaks_since = None
        self._backchannel = ""

    async def process_frame(self, frame: Frame) -> ProcessFrameResult:
        """Tell from the frames whether the caller takes the turn."""
        match frame:
            case BotStartedSpeakingFrame():
                self._bot_speaks = True
            case BotStoppedSpeakingFrame():
                self._bot_speaks = False
                if self._speaks_since is not None:
                    return await self._start_turn()
                await self._answer_with_backchannel()
            case VADUserStartedSpeakingFrame():
                self._speaks_since = self._clock() - frame.start_secs
                if not self._bot_speaks:
                    return await self._start_turn()
            case VADUserStoppedSpeakingFrame():
                self._speaks_since = None
            case UserSpeakingFrame() if self._speaks_since is not None:
                if self._clock() - self._speaks_since >= LONGEST_BACKCHANNEL_SECONDS:
                    return await self._start_turn()
            case InterimTranscriptionFrame():
                if not (self._bot_speaks and is_backchannel(frame.text)):
                    return await self._start_turn()
            case TranscriptionFrame():
                if not (self._bot_speaks and is_backchannel(frame.text)):
                    return await self._start_turn()
                await self._note_backchannel(frame)
            case _:
                pass
        return ProcessFrameResult.CONTINUE

    async def _start_turn(self) -> ProcessFrameResult:
        await self.trigger_user_turn_started()
        return ProcessFrameResult.STOP

    async def _note_backchannel(self, frame: TranscriptionFrame) -> None:
        self._backchannel, self._backchannel_at = frame.text, self._clock()
        # It is not the beginning of what they say next.
        await self.trigger_reset_aggregation()
        await self.push_frame(
            UserBackchannelFrame(text=frame.text, user_id=frame.user_id, timestamp=frame.timestamp)
        )

    async def _answer_with_backchannel(self) -> None:
        said, self._backchannel = self._backchannel, ""
        if said and self._clock() - self._backchannel_at < ANSWER_SECONDS:
            message = LLMMessagesAppendFrame([{"role": "user", "content": said}], run_llm=True)
            await self.push_frame(message)
