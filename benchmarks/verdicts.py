"""What Smart Turn makes of half sentences and whole ones: how much taking turns can rest on it.

    python -m benchmarks.verdicts

Each human recording of conversation.py is cut where its speaker pauses. Smart Turn is asked about
the part up to each cut, and about the whole, as a telephone carries them (8 kHz), after 0.2, 0.5
and 0.8 s of silence: the moments at which the bot asks.
"""

import asyncio
from collections.abc import Sequence

import numpy as np
import soxr
from conversation.turn_end import ASK_AGAIN_SECONDS
from loguru import logger
from pipecat.audio.turn.smart_turn.local_smart_turn_v3 import LocalSmartTurnAnalyzerV3
from pipecat.audio.vad.vad_analyzer import VAD_STOP_SECS
from pipecat.metrics.metrics import TurnMetricsData

from benchmarks.conversation import SENTENCES
from benchmarks.known_words import RECOGNISER_HZ, Phrase
from benchmarks.material import recordings

SILENCES_SECONDS = (VAD_STOP_SECS, *ASK_AGAIN_SECONDS)
SMART_TURN_HZ = 16000
FRAME_BYTES = 2 * SMART_TURN_HZ // 50


async def probability(analyzer: LocalSmartTurnAnalyzerV3, pcm: bytes, silence_s: float) -> float:
    """Return how sure Smart Turn is, 0 to 1, that speech at SMART_TURN_HZ was the end of a turn."""
    analyzer.clear()
    for begin in range(0, len(pcm), FRAME_BYTES):
        piece = pcm[begin : begin + FRAME_BYTES].ljust(FRAME_BYTES, b"\0")
        analyzer.append_audio(piece, is_speech=True)
    for _ in range(round(50 * silence_s)):
        analyzer.append_audio(bytes(FRAME_BYTES), is_speech=False)
    _, verdict = await analyzer.analyze_end_of_turn()
    if not isinstance(verdict, TurnMetricsData):
        raise ValueError("Smart Turn was given no speech")
    return verdict.probability


def by_phone(phrases: Sequence[Phrase]) -> bytes:
    """Return phrases as one sound that has gone through a telephone."""
    samples = np.concatenate([phrase.at_recogniser_rate for phrase in phrases])
    return soxr.resample(samples, RECOGNISER_HZ, SMART_TURN_HZ).astype("<i2").tobytes()


async def main() -> None:
    """Print the table."""
    logger.remove()
    analyzer = LocalSmartTurnAnalyzerV3()
    analyzer.set_sample_rate(SMART_TURN_HZ)
    print("| up to | | " + " | ".join(f"after {s:g} s" for s in SILENCES_SECONDS) + " |")
    print("|---|---|" + "---|" * len(SILENCES_SECONDS))
    for name in SENTENCES:
        phrases = recordings()[name]
        for count in range(1, len(phrases) + 1):
            pcm = by_phone(phrases[:count])
            sure = [await probability(analyzer, pcm, silence) for silence in SILENCES_SECONDS]
            kind = "the end" if count == len(phrases) else "a pause"
            last = " ".join(phrases[count - 1].text.split()[-4:])
            print(f"| … {last} | {kind} | " + " | ".join(f"{one:.2f}" for one in sure) + " |")
    await analyzer.cleanup()


if __name__ == "__main__":
    asyncio.run(main())
