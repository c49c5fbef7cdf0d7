"""What the person-like callers of conversation.py say: human recordings, and a synthetic voice."""

import asyncio
import tomllib
import wave
from functools import cache
from pathlib import Path

import numpy as np
from rehearsal.engines.engine import Word
from rehearsal.engines.language_model import ScriptedAnswerer
from rehearsal.engines.local import LocalEngine

from benchmarks.known_words import Phrase, phrases_of

# Piper's voice, for what no recording has: groups of a number, a name spelled letter by letter.
DIGITS = (
    ("four one five", "five five five", "zero one nine nine"),
    ("nine zero two one", "seven seven", "three eight"),
    ("double six two", "eight four zero", "one one three"),
)
SPELLED = (("S M I", "T H"), ("K O W", "A L", "S K I"), ("B A", "R B A", "R A"))

_VOICE_HZ = 16000
_QUIET = 0.02

VOICES = Path(__file__).with_name("voices")


@cache
def recordings() -> dict[str, tuple[Phrase, ...]]:
    """Return the human recordings by name, each cut where its speaker pauses or could have."""
    known = tomllib.loads((VOICES / "words.toml").read_text(encoding="utf-8"))
    return {name: _recording(name, **entry) for name, entry in known.items()}


def _recording(name: str, says: str, begins: list[float], ends: float) -> tuple[Phrase, ...]:
    with wave.open(str(VOICES / f"{name}.wav")) as file:
        pcm, rate = file.readframes(file.getnframes()), file.getframerate()
    parts = [part.split() for part in says.split("|")]
    texts = [text for part in parts for text in part]
    pauses = [sum(map(len, parts[:number])) for number in range(1, len(parts))]
    words = [
        Word(text, begin, end)
        for text, begin, end in zip(texts, begins, [*begins[1:], ends], strict=True)
    ]
    return phrases_of(pcm, rate, words, pauses)


def in_groups(groups: tuple[str, ...]) -> tuple[Phrase, ...]:
    """Return groups of digits or letters, each as a phrase of its own."""
    return tuple(phrase for group in groups for phrase in synthetic(f"{group},"))


@cache
def synthetic(text: str) -> tuple[Phrase, ...]:
    """Return `text` as the rehearsal's local voice says it, as one phrase without its silence."""
    return (asyncio.run(_spoken(_engine(), text)),)


async def _spoken(engine: LocalEngine, text: str) -> Phrase:
    pcm = b"".join([piece.pcm async for piece in engine.speak(text, _VOICE_HZ)])
    samples = np.frombuffer(pcm, dtype="<i2")
    loud = np.flatnonzero(np.abs(samples) > _QUIET * np.abs(samples).max())
    samples = samples[loud[0] : loud[-1] + 1]
    words = text.rstrip(",?.").lower().split()
    each = len(samples) / _VOICE_HZ / len(words)
    timed = (Word(word, n * each, (n + 1) * each) for n, word in enumerate(words))
    return Phrase(samples.tobytes(), _VOICE_HZ, tuple(timed))


@cache
def _engine() -> LocalEngine:
    return asyncio.run(LocalEngine.load(ScriptedAnswerer()))
