"""The apology as a recording: the last words of a call whose voice is what failed.

    python -m conversation.recorded     records it anew, spoken by the voice of services.py

The recordings lie beside the phrases, mono, as `.au` files: a header of 24 bytes and 16-bit
samples, which every player knows. English is spoken by Kokoro-82M, voice af_heart (Apache-2.0).
"""

import asyncio
import struct
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from loguru import logger
from pipecat.frames.frames import (
    EndFrame,
    Frame,
    InterruptionFrame,
    SystemFrame,
    TTSAudioRawFrame,
    TTSSpeakFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
    TTSTextFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.utils.text.base_text_aggregator import TextType
from pipecat.workers.runner import WorkerRunner

import config
import services
from conversation import phrases

# https://en.wikipedia.org/wiki/Au_file_format
MAGIC, HEADER, LINEAR_16 = b".snd", ">4s5I", 3
# Good enough for a sentence that nobody should hear; 80 kB.
RECORDED_HZ = 8000
RECORD_SECONDS = 30.0
CONTEXT = "recorded"


@dataclass
class RecordedApologyFrame(SystemFrame):
    """The recording is to be played now; it waits for nothing that the voice still owes."""


class RecordedApology(FrameProcessor):
    """Plays the recording when a RecordedApologyFrame comes; to be placed after the voice."""

    def __init__(self) -> None:
        """Nothing waits here, so no queue: it would cost each of fifty frames a second."""
        super().__init__(enable_direct_mode=True)

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Pass everything on, and in place of a RecordedApologyFrame its sound and its words."""
        await super().process_frame(frame, direction)
        if not isinstance(frame, RecordedApologyFrame):
            await self.push_frame(frame, direction)
            return
        text, recording = phrases.spoken_with_recording()
        pcm, sample_rate = load(recording)
        # What the voice was given meanwhile, and nobody hears, is not taken for said.
        await self.push_frame(InterruptionFrame())
        words = TTSTextFrame(text, TextType.SENTENCE, context_id=CONTEXT)
        await self.push_frame(TTSStartedFrame(context_id=CONTEXT))
        await self.push_frame(TTSAudioRawFrame(pcm, sample_rate, 1, context_id=CONTEXT))
        await self.push_frame(words)
        await self.push_frame(TTSStoppedFrame(context_id=CONTEXT))


@cache
def load(file: Path) -> tuple[bytes, int]:
    """Return a recording as mono PCM16, and its sample rate in Hz."""
    content = file.read_bytes()
    magic, begin, _, encoding, sample_rate, channels = struct.unpack_from(HEADER, content)
    if (magic, encoding, channels) != (MAGIC, LINEAR_16, 1):
        raise ValueError(f"{file} is no mono .au file of 16 bits")
    return np.frombuffer(content, ">i2", offset=begin).astype("<i2").tobytes(), sample_rate


def save(file: Path, pcm: bytes, sample_rate: int) -> None:
    """Write mono PCM16 to a file that `load` reads."""
    header = struct.pack(HEADER, MAGIC, 24, len(pcm), LINEAR_16, sample_rate, 1)
    file.write_bytes(header + np.frombuffer(pcm, "<i2").astype(">i2").tobytes())


class _Tape(FrameProcessor):
    """Keeps what the voice says."""

    def __init__(self) -> None:
        super().__init__()
        self.pcm = b""

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, TTSAudioRawFrame):
            self.pcm += frame.audio
        await self.push_frame(frame, direction)


async def record(file: Path, text: str) -> None:
    """Have the voice of services.py say `text`, and write it to `file`.

    Raises:
        TimeoutError: It said nothing within RECORD_SECONDS.
    """
    tape = _Tape()
    worker = PipelineWorker(
        Pipeline([services.create_tts(), tape]),
        params=PipelineParams(audio_out_sample_rate=RECORDED_HZ),
        enable_rtvi=False,
    )
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    await worker.queue_frames([TTSSpeakFrame(text), EndFrame()])
    await asyncio.wait_for(runner.run(), RECORD_SECONDS)
    if not tape.pcm:
        raise TimeoutError("the voice said nothing: see python -m preflight")
    save(file, tape.pcm, RECORDED_HZ)


def main() -> int:
    """Record the apology of LANGUAGE; returns the exit status."""
    logger.remove()
    config.exit_without_keys()
    file = phrases.recording_of(config.language())
    try:
        asyncio.run(record(file, phrases.spoken().apology))
    except TimeoutError as error:
        print(f"Nothing was recorded: {error or 'the voice took too long'}.", file=sys.stderr)
        return 1
    print(f"Recorded in {file}. Listen to it, and commit it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
