"""A recording as its page needs it: drawn, and packed to be played. Never in memory as a whole."""

from __future__ import annotations

import base64
import math
import wave
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soxr

Samples = npt.NDArray[np.int16]

# A page stays below 16 MiB then, which mail servers take.
SOUND_BYTES = 12_000_000
# The rate of the recording is divided by these until the sound fits; not below 8 kHz.
RATE_DIVISORS = (1, 2, 3, 4, 6)
LOWEST_RATE = 8000
HIGHEST_RATE = 24000

# The picture: one peak per bucket. 800,000 buckets are 10 ms each for the first 2 h 13 min; silence
# packs to nothing, an hour of talk to some 300 kB.
BUCKET_MS = 10
MOST_BUCKETS = 800_000
# A side that never gets louder than this (-30 dBFS) is drawn as quiet as it is.
QUIET_LEVEL = 1036

# How much is read at once.
BLOCK_FRAMES = 1 << 18


@dataclass(frozen=True)
class Sound:
    """16 bit samples in one file or several, which follow each other without a gap.

    Parameters:
        files: path, first byte of the samples, how many bytes of them.
        rate: frames (one sample of each side) per second.
        sides: 1, or 2 with the caller first and the bot second; further ones are not looked at.
    """

    files: tuple[tuple[Path, int, int], ...]
    rate: int
    sides: int

    @classmethod
    def of_wav(cls, path: Path) -> Sound | None:
        """A WAV file as far as it goes, None without a sample; raises ValueError for others."""
        try:
            with open(path, "rb") as file, wave.open(file) as header:
                if header.getsampwidth() != 2:
                    raise ValueError(f"it has {8 * header.getsampwidth()} bits per sample, not 16")
                rate, sides, start = header.getframerate(), header.getnchannels(), file.tell()
        except wave.Error as error:
            raise ValueError(str(error)) from error
        if rate <= 0:
            raise ValueError("it has no sample rate")
        sound = cls(((path, start, path.stat().st_size - start),), rate, sides)
        return sound if sound.frames else None

    @classmethod
    def of_chunks(cls, paths: Iterable[Path], rate: int, sides: int) -> Sound | None:
        """Files of bare samples; None when there is not one frame in them."""
        sound = cls(tuple((path, 0, path.stat().st_size) for path in paths), rate, sides)
        return sound if sound.frames else None

    @property
    def frames(self) -> int:
        return sum(size for *_, size in self.files) // (2 * self.sides)

    @property
    def length_ms(self) -> float:
        return self.frames / self.rate * 1000

    @property
    def heard_sides(self) -> int:
        """The sides that are drawn and played."""
        return min(self.sides, 2)

    def blocks(self, frames: int) -> Iterator[Samples]:
        """Blocks of so many frames, the last one shorter; one column per heard side."""
        frame_bytes = 2 * self.sides
        rest = b""
        for path, start, size in self.files:
            with open(path, "rb") as file:
                file.seek(start)
                while size > 0:
                    wanted = frames * frame_bytes - len(rest)
                    read = file.read(min(wanted, size))
                    if not read:
                        break
                    size -= len(read)
                    rest += read
                    if len(rest) == frames * frame_bytes:
                        yield self._samples(rest)
                        rest = b""
        if whole := len(rest) // frame_bytes * frame_bytes:
            yield self._samples(rest[:whole])

    def _samples(self, pcm: bytes) -> Samples:
        return np.frombuffer(pcm, "<i2").reshape(-1, self.sides)[:, :2]


def waves(sound: Sound) -> tuple[float, list[str]]:
    """Milliseconds per bucket, and per side the peak of each bucket as a byte, packed.

    A bucket is a whole number of frames. Soft speech is lifted to be seen.
    """
    bucket = max(
        round(sound.rate * BUCKET_MS / 1000), math.ceil(sound.frames / MOST_BUCKETS), 1
    )  # frames
    peaks = []
    for block in sound.blocks(max(BLOCK_FRAMES // bucket, 1) * bucket):
        missing = -len(block) % bucket
        # -32768 has no counterpart in 16 bits.
        loud = np.pad(np.abs(block.astype(np.int32)), ((0, missing), (0, 0)))
        peaks.append(loud.reshape(-1, bucket, loud.shape[1]).max(axis=1))
    drawn = np.concatenate(peaks).astype(np.float32)
    loudest = np.maximum(drawn.max(axis=0), QUIET_LEVEL)
    levels = np.round((drawn / loudest) ** 0.8 * 255).astype(np.uint8)
    packed = [_base64(zlib.compress(side.tobytes(), 9)) for side in levels.T]
    return bucket / sound.rate * 1000, packed


def embedded_rate(sound: Sound) -> int | None:
    """The rate at which the recording goes into the page; None when it is too long for that."""
    for divisor in RATE_DIVISORS:
        rate = sound.rate / divisor
        size = sound.length_ms / 1000 * rate * sound.heard_sides
        if rate.is_integer() and LOWEST_RATE <= rate <= HIGHEST_RATE and size <= SOUND_BYTES:
            return int(rate)
    return None


def packed(sound: Sound, rate: int) -> str:
    """8 bits per sample, companded with mu = 255, side after side, deflated, base64."""
    packer = zlib.compressobj(9)
    pieces = []
    for side in range(sound.heard_sides):
        for samples in _resampled(sound, side, rate):
            level = np.log1p(255 * np.minimum(np.abs(samples), 1)) / math.log(256)
            companded = np.round(np.copysign(level, samples) * 127) + 128
            pieces.append(packer.compress(companded.astype(np.uint8).tobytes()))
    return _base64(b"".join([*pieces, packer.flush()]))


def _resampled(sound: Sound, side: int, rate: int) -> Iterator[npt.NDArray[np.float32]]:
    """One side at another rate, from -1 to 1, block by block."""
    stream = soxr.ResampleStream(sound.rate, rate, 1, "float32") if rate != sound.rate else None
    for block in sound.blocks(BLOCK_FRAMES):
        samples = np.divide(block[:, side], 32768, dtype=np.float32)
        yield stream.resample_chunk(samples) if stream else samples
    if stream:
        yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
