"""Who has the floor: who makes a sound, who owes the next one, and since when.

`Floor` is fed with what happens and asked by turns, silence, recovery and endings. Its time comes
from a clock, not from frames: where frames stop, the silence still grows, and `FloorObserver` has
those who wait for it look several times a second.
"""

import asyncio
import re
import time
from collections import deque
from collections.abc import Callable
from difflib import SequenceMatcher
from enum import StrEnum
from typing import Any

from loguru import logger
from pipecat.frames.frames import (
    BotSpeakingFrame,
    BotStartedSpeakingFrame,
    BotStoppedSpeakingFrame,
    Frame,
    FunctionCallCancelFrame,
    FunctionCallResultFrame,
    FunctionCallsStartedFrame,
    InterruptionFrame,
    LLMContextUserTurnFrame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    LLMMessagesAppendFrame,
    LLMRunFrame,
    LLMTextFrame,
    TTSSpeakFrame,
    TTSStartedFrame,
    TTSTextFrame,
    UserSpeakingFrame,
    UserStartedSpeakingFrame,
    UserStoppedSpeakingFrame,
    VADUserStartedSpeakingFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.observers.base_observer import BaseObserver, FramePushed
from pipecat.processors.frame_processor import FrameDirection

LOOK_EVERY_SECONDS = 0.1
# Whoever speaks is heard of several times a second. Not for so long: the end of it got lost.
LOST_SECONDS = 3.0
# The bot's own sound comes back so long after it, from a loudspeaker and a room.
ECHO_SECONDS = 0.7
# So many of the bot's last words are remembered, to know them again.
OWN_WORDS = 80
# Of the words heard, so many are its own where it hears itself; recognisers get some wrong.
OWN_SHARE = 0.8
# Nobody has heard a word, said it after the bot and been recognised by then.
LAST_WORD_SECONDS = 0.5
# An LLM that writes at all writes several words a second.
STUCK_SECONDS = 1.5


class Side(StrEnum):
    """One of the two on the line."""

    BOT = "bot"
    CALLER = "caller"


class Floor:
    """The floor of one call. It does no I/O; the same events at the same times give the same.

    Attributes:
        caller_turns: How many times the caller has said, typed or pressed something.
        is_greeting: Whether the bot's first words have not been heard to their end.
        turn_is_open: Whether the caller has the turn, in a pause of theirs too.
        is_saying_goodbye: Whether the call ends once the bot has said what it says.
        is_final: Whether nothing the caller says can take that back.
        hears_itself: Whether the bot's own words have come back in this call.
        caller_is_hushed: Whether the caller has been silent for vad.HUSH_SECONDS, though the
            detector is not sure yet.
        caller_sounds: Whether the caller makes a sound like a voice, however short.
        turn_is_echo: Whether of the caller's turn only the bot's own words were recognised.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Take the time from `clock`, in seconds. Nobody owes anything yet."""
        self.caller_turns = 0
        self.is_greeting = True
        self.turn_is_open = False
        self.is_saying_goodbye = False
        self.is_final = False
        self.hears_itself = False
        self.caller_is_hushed = False
        self.caller_sounds = False
        self.turn_is_echo = False
        self._said: deque[str] = deque(maxlen=OWN_WORDS)
        self._saying: list[str] = []
        self._has_said = False
        self._cut_off_words: list[str] = []
        self._bot_silent_at: float | None = None
        self._began_under_bot = False
        self._clock = clock
        self._has_begun = False
        self._bot_heard_at: float | None = None
        self._caller_heard_at: float | None = None
        self._changed_at = clock()
        # What the bot still has to do: an answer asked for but not begun to be heard, a request the
        # LLM has not finished, tools that run.
        self._is_due = False
        self._is_thinking = False
        self._was_cut_off = False
        self._has_text = False
        self._wrote_at = 0.0
        self._voice_is_asked = False
        self._tools: set[str] = set()

    # What is so.

    @property
    def bot_speaks(self) -> bool:
        """Whether the bot is to be heard."""
        return self._is_recent(self._bot_heard_at)

    @property
    def caller_speaks(self) -> bool:
        """Whether the caller makes a sound like speech."""
        return self._is_recent(self._caller_heard_at)

    @property
    def may_be_echo(self) -> bool:
        """Whether a sound may be the bot's own, made just now; it has come back before."""
        return self.hears_itself and self._was_just_heard()

    def is_own(self, text: str, *, may_grow: bool = False) -> bool:
        """Whether these words, recognised on the caller's side, are what the bot has just said.

        A single word is not enough, for people repeat what they choose; unless the bot has heard
        itself before, was cut off when it had said no other, or has said it last and this moment.
        With `may_grow` there may be more words to come: then the first one of what the bot says is
        its own too.
        """
        words = spoken_words(text)
        if not words or not (self._began_under_bot or self._was_just_heard()):
            return False
        if words == self._cut_off_words[: len(words)]:
            return True
        if len(words) == 1:
            if words == self._saying[-1:] and self._has_just_stopped(LAST_WORD_SECONDS):
                return True
            is_first = may_grow and words == self._saying[:1]
            is_known = is_first or (self.hears_itself and words[0] in self._saying)
            # An answer in the bot's own words comes later than its last ones come back.
            return is_known and self._was_just_heard()
        blocks = SequenceMatcher(None, words, [*self._said], autojunk=False).get_matching_blocks()
        is_run = max(block.size for block in blocks) >= max(2, len(words) / 2)
        return is_run and sum(block.size for block in blocks) >= OWN_SHARE * len(words)

    @property
    def is_thinking(self) -> bool:
        """Whether the LLM is in the middle of an answer."""
        return self._is_thinking

    @property
    def is_answering(self) -> bool:
        """Whether an answer is being written, or is written and not yet heard."""
        return self._is_thinking or (self._is_due and self._has_text)

    @property
    def has_text(self) -> bool:
        """Whether the present or last answer holds words to be spoken."""
        return self._has_text

    @property
    def answer_is_due(self) -> bool:
        """Whether the bot has something to say that is not heard yet, whoever makes a sound."""
        return self._is_due or self._is_thinking or bool(self._tools)

    @property
    def owed_by(self) -> Side | None:
        """Who has to make the next sound; None while somebody makes one, or before the call.

        A sound that does not take the turn, of a cough or a television, is no answer.
        """
        if not self._has_begun or self.bot_speaks or (self.caller_speaks and not self._bot_is_next):
            return None
        return Side.BOT if self.answer_is_due else Side.CALLER

    @property
    def owed_seconds(self) -> float:
        """How long `owed_by` has kept the other waiting; 0.0 where nobody has to."""
        if self.owed_by is None:
            return 0.0
        heard_at = (self._bot_heard_at, None if self._bot_is_next else self._caller_heard_at)
        lost = [at + LOST_SECONDS for at in heard_at if at is not None]
        return max(0.0, self._clock() - max([self._changed_at, *lost]))

    @property
    def was_cut_off(self) -> bool:
        """Whether the caller cut the bot's last answer off, and it has not begun another."""
        return self._was_cut_off

    @property
    def waits_for_tool(self) -> bool:
        """Whether the bot owes an answer that waits for nothing but a tool."""
        return bool(self._tools) and not self._is_due and not self._is_thinking

    @property
    def waits_for_voice(self) -> bool:
        """Whether there is text to say, and the voice has it, but nothing is heard.

        An LLM that has stopped in the middle of its answer is waited for itself.
        """
        if not self._is_thinking:
            return self._has_text
        is_stuck = self._clock() - self._wrote_at >= STUCK_SECONDS
        return self._has_text and self._voice_is_asked and not is_stuck

    # What happens.

    def bot_owes(self, *, has_text: bool = False) -> None:
        """The bot has to say something; with `has_text`, something that is already known."""
        self._has_begun = self._is_due = True
        self._has_text = self._voice_is_asked = has_text
        self._change()

    def wait_anew(self) -> None:
        """Something was done about the silence: count from here."""
        self._change()

    def caller_took_turn(self) -> None:
        """The caller said, typed or pressed something that is to be answered."""
        self.caller_turns += 1

    def sound(self, is_sound: bool) -> None:
        """What the detector makes of the last moment; `caller_heard` when it is sure."""
        self.caller_sounds = is_sound

    def caller_heard(self) -> None:
        """The caller makes a sound."""
        self._has_begun = True
        if not self.caller_speaks:
            self._began_under_bot = self._was_just_heard()
        self._caller_heard_at = self._clock()

    def caller_silent(self) -> None:
        """The caller stopped."""
        self._caller_heard_at = None
        if not self._bot_is_next:
            self._change()

    def turn_began(self) -> None:
        """The caller has the turn."""
        self.turn_is_open = True
        self.turn_is_echo = False
        self.is_greeting = False
        self.interrupted()

    def turn_ended(self) -> None:
        """The caller is done, whether or not there were words."""
        self.turn_is_open = False
        self._caller_heard_at = None
        self._change()

    def own_heard(self) -> None:
        """The bot's own words were recognised on the caller's side."""
        self.hears_itself = self.turn_is_echo = True

    def interrupted(self) -> None:
        """What the bot was about to say is dropped; tools may go on."""
        if self._is_due or self._is_thinking or self.bot_speaks:
            self._was_cut_off = True
        if self.bot_speaks and self._saying:
            self._cut_off_words, self._saying = self._saying, []
        self._is_due = self._is_thinking = self._has_text = self._voice_is_asked = False
        self._change()

    def llm_began(self) -> None:
        """The LLM is asked."""
        if not self._is_due:
            # Otherwise the caller has waited since it was due.
            self._change()
        self._was_cut_off = False
        self._has_begun = self._is_due = self._is_thinking = True
        self._has_text = self._voice_is_asked = False

    def llm_wrote(self, *, is_spoken: bool = True) -> None:
        """The LLM has written something; if not `is_spoken`, for reading only."""
        self._has_text = self._has_text or is_spoken
        self._wrote_at = self._clock()
        if not is_spoken:
            self._is_due = False
            self._change()

    def llm_ended(self) -> None:
        """The LLM has finished its answer; an empty one is still owed."""
        self._is_thinking = False

    def voice_asked(self) -> None:
        """The voice has been given text."""
        self._voice_is_asked = True

    def tool_began(self, call_id: str) -> None:
        """A tool runs; the LLM has said what it wanted to."""
        self._has_begun = True
        self._is_due = self._is_due and self._has_text
        self._tools.add(call_id)
        self._change()

    def tool_ended(self, call_id: str, *, is_answered: bool = True) -> None:
        """A tool is done; `is_answered` if the LLM will speak of it."""
        if call_id in self._tools:
            self._tools.discard(call_id)
            self._is_due = self._is_due or is_answered
            self._change()

    def bot_heard(self) -> None:
        """The bot is to be heard."""
        self._has_begun = True
        if not (self._is_thinking and not self._has_text):
            # Otherwise this is the word before an answer that is still to come.
            self._is_due = False
        self._bot_heard_at = self._clock()

    def bot_silent(self) -> None:
        """The bot stopped."""
        self.is_greeting = False
        self._bot_silent_at = self._clock()
        self._bot_heard_at = None
        self._has_said = True
        self._change()

    def bot_said(self, text: str) -> None:
        """The voice says `text`, or is about to."""
        words = spoken_words(text)
        if self._has_said:
            self._saying, self._has_said = [], False
        self._said.extend(words)
        self._saying.extend(words)

    @property
    def _bot_is_next(self) -> bool:
        return self.answer_is_due and not self.turn_is_open

    def _was_just_heard(self) -> bool:
        return self.bot_speaks or self._has_just_stopped(ECHO_SECONDS)

    def _has_just_stopped(self, seconds: float) -> bool:
        if self.bot_speaks or self._bot_silent_at is None:
            return False
        return self._clock() - self._bot_silent_at < seconds

    def _change(self) -> None:
        self._changed_at = self._clock()

    def _is_recent(self, heard_at: float | None) -> bool:
        return heard_at is not None and self._clock() - heard_at < LOST_SECONDS


def is_of_caller(message: Any) -> bool:
    """Whether a message for the LLM is what the caller has said, typed or pressed."""
    return isinstance(message, dict) and message.get("role") == "user"


def spoken_words(text: str) -> list[str]:
    """Return the words of `text` as they can be compared."""
    return re.sub(r"[^\w\s]", "", text.lower()).split()


class FloorObserver(BaseObserver):
    """Tells the floor what passes through the pipeline, and has others look at it in time."""

    def __init__(self, floor: Floor) -> None:
        """Feed `floor`. Add this to the worker before it runs."""
        super().__init__(observe_every_push=False)
        self._floor = floor
        self._looks: list[Callable[[], None]] = []
        self._clock: asyncio.Task[None] | None = None

    def look(self, often: Callable[[], None]) -> None:
        """Call `often` several times a second from now on, whatever flows or does not.

        That one look fails is not the others' end, nor its own: it is called again.
        """
        self._looks.append(often)
        self._clock = self._clock or asyncio.create_task(self._run())

    async def on_push_frame(self, data: FramePushed) -> None:
        """Follow whose turn it is to make a sound."""
        is_copy = data.frame.broadcast_sibling_id is not None
        if not (is_copy and data.direction is FrameDirection.UPSTREAM):
            tell(self._floor, data.frame)

    async def cleanup(self) -> None:
        """The call is over."""
        await super().cleanup()
        if self._clock:
            self._clock.cancel()

    async def _run(self) -> None:
        failures = set[str]()
        while True:
            await asyncio.sleep(LOOK_EVERY_SECONDS)
            for often in self._looks:
                try:
                    often()
                except Exception as error:
                    failure = f"{getattr(often, '__qualname__', often)}: {type(error).__name__}"
                    # There are ten looks a second, and an error's text may be what a caller said.
                    if failure not in failures:
                        failures.add(failure)
                        logger.error(f"A look at the floor failed: {failure}")


def tell(floor: Floor, frame: Frame) -> None:
    """Tell `floor` what `frame` means for it; most frames mean nothing."""
    match frame:
        case UserSpeakingFrame() | VADUserStartedSpeakingFrame():
            floor.caller_heard()
        case VADUserStoppedSpeakingFrame():
            floor.caller_silent()
        case UserStartedSpeakingFrame():
            floor.turn_began()
        case UserStoppedSpeakingFrame():
            floor.turn_ended()
        case BotStartedSpeakingFrame() | BotSpeakingFrame():
            floor.bot_heard()
        case BotStoppedSpeakingFrame():
            floor.bot_silent()
        case InterruptionFrame():
            floor.interrupted()
        case LLMFullResponseStartFrame():
            floor.llm_began()
        case LLMTextFrame():
            floor.llm_wrote(is_spoken=not frame.skip_tts)
        case LLMFullResponseEndFrame():
            floor.llm_ended()
        case TTSTextFrame():
            floor.bot_said(frame.text)
        case TTSStartedFrame():
            floor.voice_asked()
        case TTSSpeakFrame():
            floor.bot_owes(has_text=True)
        case LLMContextUserTurnFrame():
            floor.caller_took_turn()
            # The answer may be there before the turn is.
            if not floor.is_answering:
                floor.bot_owes()
        case LLMMessagesAppendFrame():
            if any(map(is_of_caller, frame.messages)):
                floor.caller_took_turn()
            if frame.run_llm:
                floor.bot_owes()
        case LLMRunFrame():
            floor.bot_owes()
        case FunctionCallsStartedFrame():
            for call in frame.function_calls:
                floor.tool_began(call.tool_call_id)
        case FunctionCallResultFrame():
            properties = frame.properties
            if properties is None or properties.is_final:
                answered = properties is None or properties.run_llm is not False
                floor.tool_ended(frame.tool_call_id, is_answered=answered)
        case FunctionCallCancelFrame():
            floor.tool_ended(frame.tool_call_id, is_answered=bool(frame.run_llm))
        case _:
            pass
