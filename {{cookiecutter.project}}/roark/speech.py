"""What the caller heard of what the bot said.

A voice makes its words long before they are played, and an interruption throws the rest away. A
voice with word timestamps says when each word is heard. For any other the share of the sentence
that was played is estimated from the share of its audio. Pure: times are epoch nanoseconds.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """A piece of a turn's text, whether it carries its own spacing, and when it is heard."""

    text: str
    spaced: bool = False
    heard_at: int | None = None


# By so much less than a sentence's audio the bot may be told to have spoken.
EARLY_SECONDS = 0.1
# How long a sentence takes is known when all its audio is there. Before that it has to be guessed:
# English speech runs at about this rate.
CHARACTERS_PER_SECOND = 15.0


def join(pieces: Iterable[Piece]) -> str:
    """Join pieces the way they are spoken."""
    text = ""
    after_spaced = True
    for piece, spaced, _ in pieces:
        if spaced:
            # A speech that carries its spacing may follow one that does not, right behind its end.
            meets = text[-1:].strip() and piece[:1].isalnum() and not is_spaceless(piece[0])
            text += (" " if meets and not after_spaced else "") + piece
            after_spaced = True
        elif piece.strip():
            text += ("" if not text or text[-1].isspace() else " ") + piece.strip()
            after_spaced = False
    return text.strip()


def is_spaceless(character: str) -> bool:
    """Whether words of this script stand without spaces between: Chinese, Japanese, Thai, ..."""
    if "\uac00" <= character <= "\ud7a3":
        return False  # Hangul is as wide, and spaced.
    wide = unicodedata.east_asian_width(character) in "WF"
    name = unicodedata.name(character, "")
    return wide or name.startswith(("THAI", "LAO", "KHMER", "MYANMAR"))


def ends_word(before: str, after: str) -> bool:
    """Whether a word may end between these two characters."""
    is_mark = unicodedata.category(after).startswith("M")
    return after.isspace() or (not is_mark and (is_spaceless(before) or is_spaceless(after)))


@dataclass
class Word:
    """Words the voice speaks; `due` is when they are heard, None if nobody knows."""

    at: int
    text: str
    spaced: bool
    due: int | None


@dataclass
class Sentence:
    """One sentence on its way to the caller: its words and the seconds of audio made for it.

    Parameters:
        context: The voice's id of the speech it belongs to.
        id: Pipecat's id of the sentence.
        text: As it was given to the voice.
        keep: Whether it is spoken to its end whatever the caller does.
        complete: Whether all its audio is there.
        last: Whether the speech ends with it.
    """

    context: str | None
    id: int | None
    text: str = ""
    keep: bool = False
    seconds: float = 0.0
    complete: bool = False
    last: bool = False
    words: list[Word] = field(default_factory=list)

    @property
    def pieces(self) -> list[Piece]:
        """Its words, or its text if the voice spoke but told no words."""
        if self.words:
            return [Piece(word.text, word.spaced) for word in self.words]
        return [Piece(self.text)] if self.text and self.seconds else []

    @property
    def is_timed(self) -> bool:
        """Whether the voice told when its words are heard."""
        return any(word.due is not None for word in self.words)

    def share(self, share: float) -> list[Piece]:
        """Its first `share` (0 to 1), to the end of the last whole word or character."""
        text = join(self.pieces) or self.text
        limit = int(len(text) * share)
        if limit < len(text):
            limit = next((i for i in range(limit, 0, -1) if ends_word(text[i - 1], text[i])), 0)
        return [Piece(text[:limit])] if text[:limit].strip() else []


def _shared(sentences: list[Sentence]) -> list[float]:
    """Seconds each of these takes, by its share of their text."""
    lengths = [len(join(sentence.pieces) or sentence.text) for sentence in sentences]
    made = sum(sentence.seconds for sentence in sentences)
    if not made or not sentences[-1].complete:
        made = max(made, sum(lengths) / CHARACTERS_PER_SECOND)
    return [made * length / max(1, sum(lengths)) for length in lengths]


class Speech:
    """The sentences that were made and not yet heard, in order."""

    def __init__(self) -> None:
        self._sentences: list[Sentence] = []
        self._begun: Sentence | None = None
        self._made_at: dict[str | None, int] = {}
        self._behind: dict[str | None, int] = {}
        self._taken_back: set[str] = set()

    # What the voice does

    def say(self, event: dict[str, Any]) -> None:
        """A sentence goes to the voice."""
        if event.get("context") in self._taken_back:
            return
        self._sentences.append(
            Sentence(
                event.get("context"), event.get("segment"), event["text"], bool(event.get("keep"))
            )
        )

    def voice(self, at: int, event: dict[str, Any]) -> None:
        """The first audio of a speech was made."""
        self._made_at.setdefault(event.get("context"), at)

    def voiced(self, event: dict[str, Any]) -> None:
        """Audio was made for the sentence in hand."""
        if sentence := self._sentence_of(event):
            sentence.seconds += float(event["seconds"])

    def words(self, at: int, event: dict[str, Any]) -> None:
        """The voice tells words that it speaks."""
        if sentence := self._sentence_of(event):
            due = event.get("due")
            sentence.words.append(Word(at, event["text"], bool(event.get("spaced")), due))
            sentence.keep = sentence.keep or bool(event.get("keep"))
            # A voice without timestamps tells the sentence before it makes it, or after all of it.
            sentence.complete = sentence.complete or (due is None and bool(sentence.seconds))

    def voice_done(self, event: dict[str, Any]) -> None:
        """A speech has been made to its end."""
        mine = [s for s in self._sentences if s.context == event.get("context")]
        if mine:
            mine[-1].last = mine[-1].complete = True

    def _sentence_of(self, event: dict[str, Any]) -> Sentence | None:
        context, wanted = event.get("context"), event.get("segment")
        if context in self._taken_back:
            return None
        if self._sentences and wanted is not None:
            # Most words are of the sentence that goes to the voice now.
            latest = self._sentences[-1]
            if latest.id == wanted and latest.context == context and not latest.last:
                return latest
        mine = [s for s in self._sentences if s.context == context and not s.last]
        named = [s for s in mine if wanted is not None and s.id == wanted]
        if named or mine:
            return (named or mine[-1:])[0]
        sentence = Sentence(context, wanted)
        self._sentences.append(sentence)
        return sentence

    # What the caller hears of it

    def begins(self, at: int) -> None:
        """The first sentence waiting begins to play; without one, what was taken back already."""
        self._begun = None
        if not self._sentences:
            return
        first = self._sentences[0]
        # Of what has no sound yet nothing can play.
        if not self._made_at or first.context in self._made_at:
            self._begun = first
        # The voice times its words from when it made the first; they may have had to wait.
        made_at = self._made_at.get(first.context, at)
        self._behind.setdefault(first.context, max(0, at - made_at))

    def ends(self, at: int) -> list[Piece]:
        """The speech came to its end: its words."""
        done = next((i for i, sentence in enumerate(self._sentences) if sentence.last), None)
        if done is None and any(sentence.is_timed for sentence in self._sentences):
            # Only a pause: the voice was slow. The rest is still to come.
            pieces = [piece for s in self._sentences for piece in self._heard(s, at)]
            for sentence in self._sentences:
                sentence.words = [w for w in sentence.words if not self._is_heard(sentence, w, at)]
            return pieces
        count = len(self._sentences) if done is None else done + 1
        heard, self._sentences = self._sentences[:count], self._sentences[count:]
        return [piece for s in heard for piece in self._timed(s) or s.pieces]

    def heard_until(self, began: int, at: int) -> tuple[list[Piece], bool]:
        """The words heard of the speech that began at `began`, and whether that is an estimate."""
        pieces: list[Piece] = []
        estimated = False
        seconds_left = (at - began) / 1e9
        for sentence, seconds in zip(self._sentences, self._durations(), strict=True):
            if sentence.is_timed:
                pieces += self._heard(sentence, at)
            elif seconds_left >= seconds:
                pieces += sentence.pieces or [Piece(sentence.text)]
            elif seconds_left > 0:
                pieces += sentence.share(seconds_left / seconds)
                estimated = True
            seconds_left -= seconds
            if sentence.last:
                break
        return pieces, estimated

    def _durations(self) -> list[float]:
        """Seconds each sentence takes to say.

        A voice that is given several at once does not tell whose its audio is: they share it.
        """
        durations: list[float] = []
        together: list[Sentence] = []
        for sentence in self._sentences:
            if together and (together[-1].complete or together[-1].context != sentence.context):
                durations += _shared(together)
                together = []
            together.append(sentence)
        return durations + _shared(together)

    @property
    def goes_on(self) -> bool:
        """Whether the sentence in hand cannot be interrupted."""
        return bool(self._sentences) and self._sentences[0].keep

    def take_back(self) -> None:
        """The caller interrupted: what was not heard never will be."""
        dropped = [sentence for sentence in self._sentences if not sentence.keep]
        self._sentences = [sentence for sentence in self._sentences if sentence.keep]
        # Words already on their way come after the interruption that overtook them.
        kept = {sentence.context for sentence in self._sentences}
        self._taken_back |= {s.context for s in dropped if s.context} - kept

    def is_played(self, began: int, at: int) -> bool:
        """Whether the speech in hand was made to its end, and there was time to play it."""
        seconds = 0.0
        for sentence in self._sentences:
            seconds += sentence.seconds
            if sentence.last:
                return (at - began) / 1e9 > seconds - EARLY_SECONDS
        return False

    def take_back_begun(self) -> None:
        """An interruption stopped what began to play when it was on its way, and nothing else."""
        self._take_back({s.context for s in self._sentences if s is self._begun})

    def take_back_before(self, context: str | None) -> None:
        """A voice makes one speech at a time: an unfinished one before this was interrupted."""
        unfinished = {s.context for s in self._sentences} - {context}
        self._take_back(unfinished - {s.context for s in self._sentences if s.last})

    def _take_back(self, contexts: set[str | None]) -> None:
        dropped = [s for s in self._sentences if s.context in contexts and not s.keep]
        self._sentences = [s for s in self._sentences if s not in dropped]
        self._taken_back |= {s.context for s in dropped if s.context}

    def take_all(self) -> list[Word]:
        """All words that were voiced; for a pipeline without an output transport."""
        voiced = {sentence.context for sentence in self._sentences if sentence.seconds}
        words = [w for s in self._sentences if s.context in voiced for w in s.words]
        self._sentences = []
        return words

    def _is_heard(self, sentence: Sentence, word: Word, at: int) -> bool:
        return word.due is None or word.due + self._behind.get(sentence.context, 0) <= at

    def _heard(self, sentence: Sentence, at: int) -> list[Piece]:
        pieces = self._timed(sentence)
        return [piece for piece in pieces if piece.heard_at is None or piece.heard_at <= at]

    def _timed(self, sentence: Sentence) -> list[Piece]:
        """Its words, each with the time at which it is heard where the voice told that."""
        behind = self._behind.get(sentence.context, 0)
        return [
            Piece(word.text, word.spaced, None if word.due is None else word.due + behind)
            for word in sentence.words
        ]
