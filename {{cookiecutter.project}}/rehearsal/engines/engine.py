"""What stands behind the loopback providers: something that hears, thinks and speaks.

The servers in this package know the providers' protocols and nothing else. What was said, what
to answer and how it sounds is asked of an engine: the scripted one (`scripted.py`) for tests, the
local one for people.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Heard:
    """What a recogniser understood so far.

    Attributes:
        text: The words. Empty when there was nothing to understand.
        is_final: False for a guess that a later `Heard` replaces.
        start_s: Where the speech began, seconds from the first sample fed to this recogniser.
        duration_s: How long it lasted, seconds.
        known_after_s: How much later than it is returned it is to be told, seconds.
        timed: The words with their times, where the recogniser knows them.
    """

    text: str
    is_final: bool
    start_s: float
    duration_s: float
    known_after_s: float = 0.0
    timed: tuple["Word", ...] = ()

    def words(self) -> list["Word"]:
        """Return the words; unless timed, spread over the time that was really spoken."""
        if self.timed:
            return list(self.timed)
        texts = self.text.split()
        per_letter = self.duration_s / max(1, sum(map(len, texts)))
        spread: list[Word] = []
        at = self.start_s
        for text in texts:
            end = at + per_letter * len(text)
            spread.append(Word(text, at, end))
            at = end
        return spread


class Recogniser(Protocol):
    """Listens to one connection. Audio is mono PCM16 little-endian, in pieces of any size."""

    async def feed(self, pcm: bytes) -> list[Heard]:
        """Take the next piece of audio; return what became known by it, oldest first."""
        ...

    async def finalize(self) -> list[Heard]:
        """Say now what was heard and not yet returned as final; the caller has gone quiet."""
        ...


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of an answer, to be spoken. Pieces are joined without adding spaces."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The wish to call one of the offered tools; several in one answer are parallel calls."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Word:
    """A spoken word; times are seconds from the first sample of the text or the audio it is in."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Speech:
    """A piece of synthesised speech: mono PCM16 little-endian and the words that begin in it."""

    pcm: bytes
    words: tuple[Word, ...] = ()


class Engine(Protocol):
    """Recogniser, language model and voice behind the providers; may serve several calls."""

    @property
    def name(self) -> str:
        """Short name for logs and answers: "scripted" or "local"."""
        ...

    def listen(self, sample_rate: int) -> Recogniser:
        """Return a fresh recogniser for one connection whose audio has `sample_rate` Hz."""
        ...

    def think(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> AsyncIterator[TextDelta | ToolCall]:
        """Answer a conversation. Both arguments have the shape of OpenAI's chat completions."""
        ...

    def speak(self, text: str, sample_rate: int) -> AsyncIterator[Speech]:
        """Say `text` at `sample_rate` Hz, in pieces as they are ready."""
        ...

    async def aclose(self) -> None:
        """Give back what the engine holds (models, threads, connections)."""
        ...


def with_instructions(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation in which the bot's instructions have the role "developer" again.

    Where a model does not know that role, Pipecat sends them as if the caller had said them. The
    bot writes them in square brackets, for the model's sake and for ours.
    """
    return [
        {**message, "role": "developer"} if _is_instruction(message) else message
        for message in messages
    ]


def _is_instruction(message: dict[str, Any]) -> bool:
    content = message.get("content")
    is_bracketed = isinstance(content, str) and content.startswith("[") and content.endswith("]")
    return message["role"] == "user" and is_bracketed
