"""The engine that knows the words: a recogniser that finds known recordings in the audio it is fed.

What a bot makes of a pause depends on when its recogniser says what; a small recogniser would mix
its own mistakes into that. This one makes none and is as late as it is told to be. It is not told
who speaks when: it looks for the beginnings of the phrases it knows in the audio, by correlation,
and then for each of their words, so that a word which the bot never sent on is not heard. That
works through mu-law at 8 kHz with noise or babble 10 dB below the voice, and through Opus with
noise 20 dB below; at 10 dB it misses a part of 3 of 10 sentences there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import soxr
from numpy.typing import NDArray
from rehearsal.engines.engine import Heard, Speech, Word
from rehearsal.engines.scripted import Script, ScriptedEngine

RECOGNISER_HZ = 8000
"""Rate at which phrases are looked for; what is above 4 kHz a telephone does not carry."""

FINAL_SECONDS = 0.1
INTERIM_SECONDS = 0.1
"""From a word's end until it stands in an interim result. Of the order that clouds promise."""
PAUSE_SECONDS = 1.0
"""After so much silence what was heard is final, without a `finalize`."""

_BEGINNING = round(0.4 * RECOGNISER_HZ)
"""A phrase is found by its first sound; in less than this voices resemble one another."""
_GUARD = round(0.02 * RECOGNISER_HZ)
_LOOK_EVERY_SECONDS = 0.06
_SAME_PHRASE, _SAME_WORD = 0.55, 0.3
"""Correlation, of 1: two different voices have 0.5 at most; with 10 dB of noise it is 0.95."""
_DRIFT_SECONDS = 0.03
"""By so much a word may come earlier or later than it should: jitter buffers stretch time."""
_AUDIBLE_RMS = 12.0
_KNOWN_SHARE = 0.6
"""So much of a word is enough where a pause is finalized in it: a soft end is a pause to many."""
_SHORTEST_SECONDS = 0.05
"""A shorter word is taken as heard with its phrase: its sound alone says too little."""


@dataclass(frozen=True, eq=False)
class Phrase:
    """Something said without a pause, whose words and their times are known.

    Attributes:
        pcm: Its sound, mono PCM16.
        sample_rate: Hz.
        words: What is said, timed from the first sample. None for a sound without words.
    """

    pcm: bytes
    sample_rate: int
    words: tuple[Word, ...] = ()
    _spectra: dict[int, NDArray[np.complexfloating]] = field(
        default_factory=dict[int, NDArray[np.complexfloating]], init=False, repr=False
    )

    @property
    def text(self) -> str:
        """The words as one line."""
        return " ".join(word.text for word in self.words)

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return len(self.pcm) / 2 / self.sample_rate

    @cached_property
    def at_recogniser_rate(self) -> NDArray[np.float32]:
        """Its samples as a recogniser compares them."""
        samples = np.frombuffer(self.pcm, dtype="<i2").astype(np.float32)
        return soxr.resample(samples, self.sample_rate, RECOGNISER_HZ)

    @property
    def begins(self) -> float:
        """Where its first word begins, seconds."""
        return self.words[0].start_s if self.words else 0.0

    @cached_property
    def beginning(self) -> NDArray[np.float32]:
        """The sound by which a recogniser finds it."""
        begin = round(self.begins * RECOGNISER_HZ)
        return self.at_recogniser_rate[begin : begin + _BEGINNING]

    def spectrum(self, size: int) -> NDArray[np.complexfloating]:
        """Return the spectrum of its beginning, of `size` samples."""
        if self._spectra.get(size) is None:
            self._spectra[size] = np.fft.rfft(self.beginning, size)
        return self._spectra[size]

    def sound(self, start_s: float, end_s: float) -> NDArray[np.float32]:
        """Return a part of it, from one moment to another."""
        return self.at_recogniser_rate[
            round(start_s * RECOGNISER_HZ) : round(end_s * RECOGNISER_HZ)
        ]


class KnownWordsEngine(ScriptedEngine):
    """Answers by a script and hums, as the scripted engine does, but hears what is really said.

    Attributes:
        phrases: What its recognisers know; phrases may be added at any time.
        final_s: From `finalize` until the words are final, seconds; clouds take 0.02 to 0.7.
        hears_itself: Whether its own voice is known to its recognisers: for lines with an echo.
    """

    name = "known words"

    def __init__(
        self,
        phrases: Iterable[Phrase],
        script: Script | None = None,
        *,
        final_s: float = FINAL_SECONDS,
        hears_itself: bool = False,
    ) -> None:
        """Know `phrases`; no two of them may begin with the same sound."""
        super().__init__(script)
        self.phrases = [phrase for phrase in phrases if phrase.words]
        self.final_s = final_s
        self.hears_itself = hears_itself

    # A recogniser of another kind than the scripted engine's.
    def listen(self, sample_rate: int) -> "KnownWordsRecogniser":  # type: ignore[override]
        """Return a fresh recogniser for audio of `sample_rate` Hz, a multiple of RECOGNISER_HZ."""
        return KnownWordsRecogniser(self.phrases, sample_rate, final_s=self.final_s)

    async def speak(self, text: str, sample_rate: int):
        """Say `text` as the scripted engine does."""
        spoken = [piece async for piece in super().speak(text, sample_rate)]
        if self.hears_itself and spoken:
            self.phrases.append(joined(spoken, sample_rate))
        for piece in spoken:
            yield piece


def joined(pieces: Sequence[Speech], sample_rate: int) -> Phrase:
    """Return what an engine's voice said as one phrase."""
    words = tuple(word for piece in pieces for word in piece.words)
    return Phrase(b"".join(piece.pcm for piece in pieces), sample_rate, words)


@dataclass
class _Found:
    """A phrase in the audio.

    Attributes:
        at: The recogniser's sample at which its first one is.
        next_word: The first of its words that has not been listened for.
    """

    phrase: Phrase
    at: int
    next_word: int = 0


class KnownWordsRecogniser:
    """Listens to one connection; finds the phrases it knows, word by word."""

    def __init__(
        self,
        phrases: Sequence[Phrase],
        sample_rate: int,
        *,
        final_s: float = FINAL_SECONDS,
        interim_s: float = INTERIM_SECONDS,
        pause_s: float = PAUSE_SECONDS,
    ) -> None:
        """Know `phrases`, of which more may come, in audio of `sample_rate` Hz.

        Raises:
            ValueError: The rate is no multiple of RECOGNISER_HZ.
        """
        if sample_rate % RECOGNISER_HZ:
            raise ValueError(
                f"the recogniser takes multiples of {RECOGNISER_HZ} Hz, not {sample_rate}"
            )
        self._phrases = phrases
        self._every = sample_rate // RECOGNISER_HZ
        self._final_s, self._interim_s, self._pause_s = final_s, interim_s, pause_s
        self._rest = b""
        self._audio = np.zeros(0, np.float32)
        self._forgotten = 0
        self._looked_until = 0
        self._playing: list[_Found] = []
        self._last_found: dict[Phrase, int] = {}
        self._heard: list[Word] = []
        self._told = 0
        self._finishing_until = 0

    @property
    def _now(self) -> int:
        return self._forgotten + len(self._audio)

    async def feed(self, pcm: bytes) -> list[Heard]:
        """Listen to the next piece of audio."""
        self._append(pcm)
        if self._now - self._looked_until < _LOOK_EVERY_SECONDS * RECOGNISER_HZ:
            return []
        self._look()
        self._follow()
        if self._now < self._finishing_until or not self._heard:
            return []
        silent_s = self._now / RECOGNISER_HZ - self._heard[-1].end_s
        if silent_s >= self._pause_s and not self._playing:
            return [self._take()]
        known = sum(
            self._now / RECOGNISER_HZ >= word.end_s + self._interim_s for word in self._heard
        )
        if known <= self._told:
            return []
        self._told = known
        return [_result(self._heard[:known], is_final=False)]

    async def finalize(self) -> list[Heard]:
        """Say what was heard until now; it is known after the time that this takes."""
        self._look()
        self._follow(_KNOWN_SHARE)
        self._finishing_until = self._now + round(self._final_s * RECOGNISER_HZ)
        heard = self._take() if self._heard else Heard("", True, self._now / RECOGNISER_HZ, 0.0)
        return [replace(heard, known_after_s=self._final_s)]

    def _append(self, pcm: bytes) -> None:
        pcm = self._rest + pcm
        whole = len(pcm) - len(pcm) % (2 * self._every)
        self._rest = pcm[whole:]
        samples = np.frombuffer(pcm[:whole], dtype="<i2").astype(np.float32)
        # The mean of neighbours is filter enough: what is sought goes through worse.
        fresh = samples.reshape(-1, self._every).mean(axis=1)
        self._audio = np.concatenate([self._audio, fresh])

    def _look(self) -> None:
        """Look for beginnings in what has come since the last time."""
        news = self._now - self._looked_until + _GUARD
        self._looked_until = self._now
        audio = self._audio[-(_BEGINNING + news) :]
        if np.any(np.abs(audio) > _AUDIBLE_RMS):
            spectrum = np.fft.rfft(audio, _size(len(audio)))
            found = [self._found(phrase, audio, spectrum, news) for phrase in self._phrases]
            # Two voices at once are heard one after the other, as people do it.
            alike, phrase, at = max(found, key=lambda place: place[0])
            if alike >= _SAME_PHRASE:
                self._playing.append(_Found(phrase, at))
                self._last_found[phrase] = at
        self._forget(_BEGINNING + 2 * _GUARD)

    def _found(
        self,
        phrase: Phrase,
        audio: NDArray[np.float32],
        spectrum: NDArray[np.complexfloating],
        news: int,
    ) -> tuple[float, Phrase, int]:
        """Return how alike a phrase's beginning is to what it is most alike to, and where it is."""
        sound = phrase.beginning
        places = min(news, len(audio) - len(sound) + 1)
        if places <= _GUARD:
            return 0.0, phrase, 0
        alike, at = _find(audio, sound, places, spectrum, phrase.spectrum(_size(len(audio))))
        begin = self._now - len(audio) + at - round(phrase.begins * RECOGNISER_HZ)
        since = begin - self._last_found.get(phrase, -self._now - len(phrase.at_recogniser_rate))
        is_same = since < len(phrase.at_recogniser_rate) - _GUARD
        # A better place may follow, one pitch period on.
        is_early = at > len(audio) - len(sound) - _GUARD
        return (0.0 if is_same or is_early else alike), phrase, begin

    def _follow(self, share: float = 1.0) -> None:
        """Listen for the words of which that share must have been said by now."""
        for found in self._playing:
            while found.next_word < len(found.phrase.words):
                word = found.phrase.words[found.next_word]
                begin, end = (
                    found.at + round(t * RECOGNISER_HZ) for t in (word.start_s, word.end_s)
                )
                slack = round(_DRIFT_SECONDS * RECOGNISER_HZ)
                is_said = self._now >= end + slack
                # All that there is of it: through Opus a part is less like what it should be.
                known_s = word.start_s + (1.0 if is_said else share) * (word.end_s - word.start_s)
                known = found.at + round(known_s * RECOGNISER_HZ)
                if self._now < known + slack:
                    break
                around = self._audio[max(0, begin - slack - self._forgotten) :]
                around = around[: known - begin + 2 * slack]
                is_heard = self._is_heard(found.phrase.sound(word.start_s, known_s), around)
                if not (is_heard or is_said):
                    break
                found.next_word += 1
                if is_heard:
                    self._heard.append(Word(word.text, begin / RECOGNISER_HZ, end / RECOGNISER_HZ))
        self._playing = [f for f in self._playing if f.next_word < len(f.phrase.words)]

    def _is_heard(self, sound: NDArray[np.float32], around: NDArray[np.float32]) -> bool:
        """Whether a word is in the audio where it should be."""
        if len(sound) < _SHORTEST_SECONDS * RECOGNISER_HZ:
            return True
        if len(around) < len(sound):
            return False
        size = _size(len(around))
        spectra = np.fft.rfft(around, size), np.fft.rfft(sound, size)
        return _find(around, sound, len(around) - len(sound) + 1, *spectra)[0] >= _SAME_WORD

    def _forget(self, keep: int) -> None:
        """Let go of audio that nothing will be looked for in any more."""
        needed = [self._now - 2 * keep]
        for found in self._playing:
            begins = found.phrase.words[found.next_word].start_s
            needed.append(found.at + round((begins - _DRIFT_SECONDS) * RECOGNISER_HZ))
        count = max(0, min(min(needed) - self._forgotten, len(self._audio)))
        self._audio = self._audio[count:]
        self._forgotten += count

    def _take(self) -> Heard:
        heard = _result(self._heard, is_final=True)
        self._heard, self._told = [], 0
        return heard


def _result(words: Sequence[Word], *, is_final: bool) -> Heard:
    text = " ".join(word.text for word in words)
    start, end = words[0].start_s, words[-1].end_s
    return Heard(text, is_final, start, end - start, timed=tuple(words))


def _size(samples: int) -> int:
    return 1 << (samples - 1).bit_length()


def _find(
    audio: NDArray[np.float32],
    sound: NDArray[np.float32],
    places: int,
    audio_spectrum: NDArray[np.complexfloating],
    sound_spectrum: NDArray[np.complexfloating],
) -> tuple[float, int]:
    """Return how alike `sound` is to the most alike of the last stretches of `audio`, and where."""
    product = np.fft.irfft(audio_spectrum * np.conj(sound_spectrum), _size(len(audio)))
    end = len(audio) - len(sound) + 1
    begin = end - places
    heard = audio[begin:].astype(np.float64)
    energy = np.concatenate([[0.0], np.cumsum(heard**2)])
    windows = energy[len(sound) :] - energy[:places]
    quiet = _AUDIBLE_RMS**2 * len(sound)
    norm = np.sqrt(np.maximum(windows, quiet) * float(np.sum(sound.astype(np.float64) ** 2)) + 1)
    alike = product[begin:end] / norm
    at = int(np.argmax(alike))
    return float(alike[at]), begin + at


def phrases_of(
    pcm: bytes, sample_rate: int, words: Sequence[Word], pauses: Sequence[int]
) -> tuple[Phrase, ...]:
    """Cut a recording where its speaker pauses.

    Args:
        pcm: Mono PCM16.
        sample_rate: Hz.
        words: What is said, timed from the first sample.
        pauses: The words, by number, before which there is a pause; it is cut where they begin.
    """
    edges = [0, *pauses, len(words)]
    cuts = [0.0, *(words[number].start_s for number in pauses), len(pcm) / 2 / sample_rate]
    phrases: list[Phrase] = []
    for (first, last), (begin, end) in zip(pairwise(edges), pairwise(cuts), strict=True):
        piece = pcm[2 * round(begin * sample_rate) : 2 * round(end * sample_rate)]
        shifted = (
            Word(word.text, word.start_s - begin, word.end_s - begin) for word in words[first:last]
        )
        phrases.append(Phrase(piece, sample_rate, tuple(shifted)))
    return tuple(phrases)
