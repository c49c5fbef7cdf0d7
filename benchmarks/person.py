"""A caller who talks as people do: with pauses, coughs and noise around them, and who listens.

What they say are phrases whose words and times are known, so that afterwards it can be told what
the bot had heard when it spoke, and whether it spoke while they did.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from rehearsal.callers.caller import Caller, Utterance

from benchmarks.known_words import Phrase

PATIENCE_SECONDS = 8.0
"""After so long without an answer people say the next thing."""
QUIET_SECONDS = 1.2
"""People take a bot that is silent for so long for finished."""


@dataclass(frozen=True)
class Saying:
    """One thing to say: phrases with pauses between.

    Attributes:
        phrases: In their order, all of the same sample rate.
        pause_s: Silence added between two of them, seconds; 0 leaves them as they were spoken.
    """

    phrases: tuple[Phrase, ...]
    pause_s: float = 0.0

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.phrases[0].sample_rate

    @property
    def text(self) -> str:
        """All its words."""
        return " ".join(phrase.text for phrase in self.phrases if phrase.words)

    @property
    def pcm(self) -> bytes:
        """Its sound, mono PCM16."""
        pause = bytes(2 * round(self.pause_s * self.sample_rate))
        return pause.join(phrase.pcm for phrase in self.phrases)


@dataclass(frozen=True)
class Said:
    """Something that was said, and when.

    Attributes:
        saying: What.
        start: The first sound, seconds on `time.monotonic`.
        end: The last sound.
    """

    saying: Saying
    start: float
    end: float


@dataclass
class Person:
    """Holds a conversation over a caller's line; use after it was dialled.

    When the bot was audible is in `caller.heard.utterances`, on the same clock as `said`.

    Attributes:
        caller: The line.
        said: What they said, in order.
        patience_s: How long they wait for an answer, seconds.
        quiet_s: How long the bot is silent when it has finished, seconds.
    """

    caller: Caller
    patience_s: float = PATIENCE_SECONDS
    quiet_s: float = QUIET_SECONDS
    said: list[Said] = field(default_factory=list[Said])

    async def say(self, saying: Saying) -> Said:
        """Say something to its end, whatever the bot does meanwhile."""
        sent = await self.caller.say(saying.pcm, saying.sample_rate)
        self.said.append(Said(saying, sent.start, sent.end))
        return self.said[-1]

    async def hear_answer(self) -> Utterance | None:
        """Wait for the bot to speak and to finish; return its first sound, None without one."""
        since = self.said[-1].end if self.said else 0.0
        answer = None
        try:
            answer = await self.caller.hear(since=since, within=self.patience_s)
        except TimeoutError:
            pass
        # What the bot began while the person spoke they let it finish, too.
        await self.caller.hear_out(quiet=self.quiet_s)
        return answer

    async def ask(self, saying: Saying) -> Said:
        """Say something and hear the answer out."""
        said = await self.say(saying)
        await self.hear_answer()
        return said

    async def wait(self, seconds: float) -> None:
        """Say nothing for a while."""
        await asyncio.sleep(seconds)


def without_words(phrase: Phrase, seconds: float) -> Phrase:
    """Return a human voice in which no recogniser finds a word: a piece of a phrase, backwards."""
    samples = np.frombuffer(phrase.pcm, dtype="<i2")[::-1]
    length = round(seconds * phrase.sample_rate)
    loudness = np.convolve(np.abs(samples.astype(np.float32)), np.ones(length), "valid")
    at = int(np.argmax(loudness)) if len(loudness) else 0
    piece = samples[at : at + length].astype(np.float32)
    edge = np.minimum(np.arange(len(piece)), np.arange(len(piece))[::-1])
    piece *= np.minimum(1.0, edge / (0.01 * phrase.sample_rate))
    return Phrase(piece.astype("<i2").tobytes(), phrase.sample_rate)


def rms(phrases: Sequence[Phrase]) -> float:
    """Return how loud voices are, root mean square of PCM16 where there is sound."""
    samples = np.concatenate([np.frombuffer(p.pcm, dtype="<i2") for p in phrases]).astype(float)
    windows = samples[: len(samples) // 160 * 160].reshape(-1, 160)
    levels = np.sqrt(np.mean(windows**2, axis=1))
    return float(np.sqrt(np.mean(levels[levels > 0.1 * levels.max()] ** 2)))


@dataclass
class Sound:
    """A sound that goes on around the caller; what a microphone picks up besides them.

    Attributes:
        samples: Played over and over, at `sample_rate` Hz.
    """

    samples: NDArray[np.float32]
    sample_rate: int

    def __call__(self, caller: Caller, begin: float, count: int) -> NDArray[np.float32]:
        """Return what is heard from `begin` on."""
        at = np.arange(count) * (self.sample_rate / caller.sample_rate)
        first = round((begin % 3600.0) * self.sample_rate)
        return self.samples[(first + at.astype(int)) % len(self.samples)]


def white_noise(loudness: float, sample_rate: int = 16000) -> Sound:
    """Return noise of a root mean square."""
    samples = np.random.default_rng(1).normal(0.0, loudness, 4 * sample_rate)
    return Sound(samples.astype(np.float32), sample_rate)


def babble(voices: Sequence[Phrase], loudness: float, *, talkers: int = 6) -> Sound:
    """Return people who talk all at once: voices over one another, backwards, at a loudness."""
    rate = voices[0].sample_rate
    speech = np.concatenate([np.frombuffer(v.pcm, dtype="<i2")[::-1] for v in voices])
    speech = speech.astype(np.float32)
    apart = len(speech) // talkers
    together = np.sum([np.roll(speech, number * apart) for number in range(talkers)], axis=0)
    return Sound((together * (loudness / np.sqrt(np.mean(together**2)))), rate)


@dataclass
class Echo:
    """The bot's own sound, picked up again.

    Attributes:
        below_db: By how much it is softer than it was heard.
        delay_s: How long it takes, seconds.
    """

    below_db: float
    delay_s: float = 0.25

    def __call__(self, caller: Caller, begin: float, count: int) -> NDArray[np.float32]:
        """Return what of the bot is heard from `begin` on."""
        heard = caller.heard.sound_at(begin - self.delay_s, count)
        return heard * np.float32(10 ** (-self.below_db / 20))
