"""What the person-like callers of conversation.py say: human recordings, and a synthetic voice."""

import tomllib
import wave
from functools import cache
from pathlib import Path

from rehearsal.engines.engine import Word
from rehearsal.engines.known_words import Phrase, phrases_of

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
