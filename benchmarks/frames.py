"""What one frame costs: the observers called directly, one after the other, in one process.

Each observer gets the same frames 100,000 times; the best of several interleaved rounds counts,
because on a shared machine everything else is somebody else's time. Calls are what is compared:
in a pipeline pipecat-roark and Tuner's are called at every hop of a frame, ours once per frame.
"""

import asyncio
import gc
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipecat.clocks.system_clock import SystemClock
from pipecat.frames.frames import (
    Frame,
    InputAudioRawFrame,
    LLMTextFrame,
    TTSTextFrame,
)
from pipecat.observers.base_observer import FramePushed
from pipecat.processors.frame_processor import FrameDirection
from pipecat.utils.text.base_text_aggregator import TextType

from benchmarks.subjects import NAMES, NULL, OURS, PUBLISHED, subject

FRAMES = 100_000
ROUNDS = 3


class _Processor:
    """What the observers ask a frame's source for."""

    def __init__(self) -> None:
        self._clock = SystemClock()
        self._clock.start()

    def get_clock(self) -> SystemClock:
        return self._clock


def _audio(_: int) -> Frame:
    return _ONE_FRAME


_ONE_FRAME = InputAudioRawFrame(audio=bytes(320), sample_rate=8000, num_channels=1)

KINDS: dict[str, Callable[[int], Frame]] = {
    "the same audio frame": _audio,
    "a fresh LLM text frame": lambda n: LLMTextFrame(f"word{n}"),
    "a fresh TTS text frame": lambda n: TTSTextFrame(f"word{n}", TextType.WORD),
}


async def microseconds(
    observer: Any, make: Callable[[int], Frame], *, count: int = FRAMES
) -> float:
    """Return what one of `count` frames costs the observer, on average."""
    source = _Processor()
    pushed: list[Any] = [
        FramePushed(
            source=source,  # pyright: ignore[reportArgumentType]
            destination=source,  # pyright: ignore[reportArgumentType]
            frame=make(number),
            direction=FrameDirection.DOWNSTREAM,
            timestamp=number * 1000,
        )
        for number in range(count)
    ]
    on_push_frame = observer.on_push_frame
    # The first frames make caches; they are not what 100,000 cost.
    for data in pushed[:100]:
        await on_push_frame(data)
    gc.collect()
    gc.disable()
    started = time.perf_counter()
    for data in pushed:
        await on_push_frame(data)
    spent = time.perf_counter() - started
    gc.enable()
    return spent / count * 1e6


async def measure() -> dict[str, dict[str, float]]:
    """Return microseconds per frame: kind -> observer -> best of the rounds."""
    best: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    with TemporaryDirectory() as folder:
        for number in range(ROUNDS):
            for kind, make in KINDS.items():
                for name in NAMES:
                    options: dict[str, Any] = {}
                    if name == OURS:
                        # Everything is written to disk; that nothing is sent costs no frame less.
                        options = {"calls_dir": Path(folder) / f"{number}", "api_key": None}
                    observer = subject(name, **options).observer
                    spent = await microseconds(observer, make)
                    best[kind][name] = min(best[kind].get(name, spent), spent)
                    # Ours writes what it got in a thread; let it end before the next is measured.
                    if name == OURS:
                        await observer.aflush(timeout=30.0)
    return best


def report() -> str:
    """Measure, and return the section for README.md."""
    best = asyncio.run(measure())
    lines = [
        "| µs per frame | null observer | ours | pipecat-roark 0.2.5 | tuner 0.2.9 | ours is |",
        "|---|---|---|---|---|---|",
    ]
    for kind, spent in best.items():
        cells = " | ".join(f"{spent[name]:.2f}" for name in NAMES)
        ratio = spent[PUBLISHED] / spent[OURS]
        verdict = f"{ratio:.1f}x cheaper" if ratio >= 1 else f"{1 / ratio:.1f}x dearer"
        lines.append(f"| {kind} | {cells} | {verdict} |")
    floor = best["the same audio frame"][NULL]
    lines += ["", f"Floor: an observer that does nothing costs {floor:.2f} µs. Goal: 8x or more."]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
