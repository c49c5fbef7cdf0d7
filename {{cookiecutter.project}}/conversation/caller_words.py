"""What the caller says, types and presses, as text that cannot pass for an instruction.

What happens on the line is told to the LLM in [square brackets], and prompt.md says that the caller
did not say it. So nothing that comes from the caller may hold any.
"""

from typing import Any

from loguru import logger
from pipecat.frames.frames import (
    EagerTranscriptionFrame,
    Frame,
    FunctionCallResultFrame,
    InputTransportMessageFrame,
    InterimTranscriptionFrame,
    LLMMessagesAppendFrame,
    TranscriptionFrame,
    UserFileRawFrame,
    UserImageRawFrame,
)
from pipecat.processors.aggregators.dtmf_aggregator import DTMFAggregator
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor

from conversation.floor import Floor, is_of_caller, spoken_words
from host.calls import Allowance

# Whatever a reader would take for a square bracket: what Unicode calls square, tortoise shell or
# lenticular.
OPENING = (
    "[\uff3b\u3010\u3014\u3016\u3018\u301a\u27e6\u27ec\u2045\u2772\ufe5d\ufe47\u298b\u298d\u298f\u2997\u2e22"
    "\u2e55\u2e57\ufe17\ufe39\ufe3b\u23a1\u23a2\u23a3\u23b4"
)
CLOSING = (
    "]\uff3d\u3011\u3015\u3017\u3019\u301b\u27e7\u27ed\u2046\u2773\ufe5e\ufe48\u298c\u298e\u2990\u2998\u2e23"
    "\u2e56\u2e58\ufe18\ufe3a\ufe3c\u23a4\u23a5\u23a6\u23b5"
)
# What nobody sees and a model reads: characters of control, and tags, which spell ASCII.
UNSEEN = [*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), 0x7F, *range(0xE0000, 0xE0080)]
# As which a client's message counts: twenty a second, and a hundred at once.
MESSAGE_SECONDS = 0.1
# Longer than any that a client has reason to send.
MAX_MESSAGE_CHARACTERS = 64 * 1024
# What is typed or pasted stays in the context, and is paid for with each answer: some two pages.
MAX_TYPED_CHARACTERS = 4000
ROUND = str.maketrans(OPENING + CLOSING, "(" * len(OPENING) + ")" * len(CLOSING))
# JSON can name half a character, which no request to an LLM can hold: all later ones would fail.
PLAIN = ROUND | dict.fromkeys(range(0xD800, 0xE000), "\ufffd") | dict.fromkeys(UNSEEN, "")


class CallerWords(DTMFAggregator):
    """Stands where the caller's words come into the pipeline; keys pressed become text here, too.

    A client that speaks RTVI can send more than words. A result for a tool that runs here is
    dropped, and so is a file: what is written in it, or behind its address, could say anything.
    """

    def __init__(self, floor: Floor) -> None:
        """Ask `floor` what the bot has just said: that is not the caller's."""
        # Nothing waits here, so no queue: it would cost each of fifty frames a second.
        super().__init__(enable_direct_mode=True)
        self._floor = floor
        self._echo: list[str] = []

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Pass on what the caller may say, with round brackets."""
        # Upstream come the LLM's own frames.
        if direction is FrameDirection.DOWNSTREAM:
            match frame:
                # The first words of a turn are asked about too, before it is over.
                case TranscriptionFrame() | InterimTranscriptionFrame() | EagerTranscriptionFrame():
                    is_interim = isinstance(frame, InterimTranscriptionFrame)
                    if self._is_echo(frame.text, may_grow=is_interim):
                        return
                    frame.text = frame.text.translate(PLAIN)
                case LLMMessagesAppendFrame():
                    # Instructions come this way as well; theirs is another role.
                    frame.messages = [_of_caller(message) for message in frame.messages]
                case FunctionCallResultFrame() | UserFileRawFrame() | UserImageRawFrame():
                    logger.warning(f"Dropped a {type(frame).__name__}: callers may talk and type")
                    return
                case _:
                    pass
        await super().process_frame(frame, direction)

    async def push_frame(
        self, frame: Frame, direction: FrameDirection = FrameDirection.DOWNSTREAM
    ) -> None:
        """Pass a frame on, words such that no interruption drops them on their way.

        A process that lags gets the first and the last words of a turn at once: those begin the
        turn, and its interruption would drop these.
        """
        is_typed = isinstance(frame, LLMMessagesAppendFrame) and any(
            map(is_of_caller, frame.messages)
        )
        if isinstance(frame, TranscriptionFrame) or is_typed:
            frame.interruptible = False
        await super().push_frame(frame, direction)

    def _is_echo(self, text: str, *, may_grow: bool) -> bool:
        words = spoken_words(text)
        # What is its own stays so until the recogniser is certain of it, however late that is.
        is_known = bool(words) and words == self._echo
        self._echo = []
        if not is_known and not self._floor.is_own(text, may_grow=may_grow):
            return False
        if is_known or self._floor.is_own(text):
            self._echo = words if may_grow else []
            if not self._floor.hears_itself:
                logger.warning("The bot hears itself: from now on only words cut it off")
            self._floor.own_heard()
        return True


class CallerAudio(FrameProcessor):
    """Stands before the line, which brings the caller's audio at a rate that is known.

    A client that speaks RTVI can send audio in messages as well, at any rate it likes: the models
    would hear nonsense, and the recording would be as long as the client says. And what is no audio
    would end Pipecat's reading of its messages. And a message of any size, which would stand in the
    record and be paid for with each answer.
    """

    def __init__(self) -> None:
        """No message was too long so far."""
        super().__init__()
        self._has_warned = False
        self._allowance = Allowance()

    def _takes(self, message: Any) -> bool:
        is_short = len(repr(message)) <= MAX_MESSAGE_CHARACTERS
        return is_short and self._allowance.takes(MESSAGE_SECONDS)

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Pass everything on but messages with audio and long ones."""
        await super().process_frame(frame, direction)
        match frame:
            case InputTransportMessageFrame(message={"type": "raw-audio" | "raw-audio-batch"}):
                return
            case InputTransportMessageFrame() if not self._takes(frame.message):
                if not self._has_warned:
                    logger.warning(
                        f"Dropped a client's message: over {MAX_MESSAGE_CHARACTERS} characters, or "
                        "one of too many"
                    )
                self._has_warned = True
                return
            case _:
                pass
        await self.push_frame(frame, direction)


def _of_caller(message: Any) -> Any:
    match message:
        case {"role": "user", "content": str(text)}:
            return {**message, "content": text[:MAX_TYPED_CHARACTERS].translate(PLAIN)}
    return message
