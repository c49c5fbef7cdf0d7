"""What every caller can do: speak in real time, listen, and say when it heard what.

A bot is judged at the caller's end of the line, so this is where time is taken: everything a
caller says and hears is on one clock (`time.monotonic`, seconds), and the time from the caller's
last sound to the bot's first is a subtraction. `twilio.py` and `webrtc.py` bring the two
kinds of line.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import soxr
from numpy.typing import NDArray

FRAME_SECONDS = 0.02
"""Both lines carry audio in pieces of this length."""

LOUD_RMS = 200.0
"""Root mean square of PCM16 above which there is sound; -44 dBFS, well over codec noise."""

_OF_LOUDEST = 0.1
"""A recorded voice ends where it falls 20 dB below its loudest; what follows is breath and room."""

_WINDOW_SECONDS = 0.01
_LOOK_EVERY_SECONDS = 0.1
_PAUSE_SECONDS = 0.3
"""Silence after which a sound counts as the bot beginning to speak anew."""

_LOST_FRAMES, _FRAMES_PER_LOSS = 5, 50
"""The packet loss switch: 100 ms missing in every second."""


@dataclass(frozen=True, slots=True)
class Utterance:
    """Something said: when its first and last sound were made, seconds on the caller's clock."""

    start: float
    end: float


class Track:
    """Audio as it was played to the caller, mono PCM16, each piece with its time on the clock.

    Attributes:
        sample_rate: Hz.
        utterances: The stretches of sound so far, at least 0.3 s apart.
    """

    def __init__(self, sample_rate: int) -> None:
        self.sample_rate = sample_rate
        self.utterances: list[Utterance] = []
        self._pieces: list[tuple[float, bytes]] = []

    @property
    def start(self) -> float:
        """When the first sample was played; 0.0 if there is none."""
        return self._pieces[0][0] if self._pieces else 0.0

    @property
    def end(self) -> float:
        """When the last sample received so far is (or will be) played; 0.0 if there is none."""
        if not self._pieces:
            return 0.0
        start, pcm = self._pieces[-1]
        return start + len(pcm) / 2 / self.sample_rate

    def add(self, pcm: bytes, at: float) -> None:
        """Append audio that arrived `at`; it is played after what is still waiting."""
        start = max(at, self.end)
        self._pieces.append((start, pcm))
        for offset in _loud_windows(pcm, self.sample_rate):
            loud = Utterance(start + offset, start + offset + _WINDOW_SECONDS)
            if self.utterances and loud.start - self.utterances[-1].end < _PAUSE_SECONDS:
                self.utterances[-1] = Utterance(self.utterances[-1].start, loud.end)
            else:
                self.utterances.append(loud)

    def cut(self, at: float) -> None:
        """Forget what would have been played after `at`: the bot took it back."""
        pieces: list[tuple[float, bytes]] = []
        for start, pcm in self._pieces:
            if start < at:
                pieces.append((start, pcm[: 2 * round((at - start) * self.sample_rate)]))
        self._pieces = pieces
        self.utterances = [
            Utterance(spoken.start, min(spoken.end, at))
            for spoken in self.utterances
            if spoken.start < at
        ]

    def sound_at(self, start: float, count: int) -> NDArray[np.float32]:
        """Return `count` samples as they were played from `start` on; silence where none were."""
        sound = np.zeros(count, np.float32)
        for at, piece in reversed(self._pieces):
            first = round((at - start) * self.sample_rate)
            samples = np.frombuffer(piece, dtype="<i2")
            if first + len(samples) <= 0:
                break
            begin, end = max(0, first), min(count, first + len(samples))
            if begin < end:
                sound[begin:end] = samples[begin - first : end - first]
        return sound

    def pcm(self) -> bytes:
        """Return everything played, from the first sample on, gaps as silence."""
        if not self._pieces:
            return b""
        origin = self._pieces[0][0]
        whole = np.zeros(round((self.end - origin) * self.sample_rate) + 1, dtype="<i2")
        for start, piece in self._pieces:
            samples = np.frombuffer(piece, dtype="<i2")
            first = round((start - origin) * self.sample_rate)
            whole[first : first + len(samples)] = samples[: len(whole) - first]
        return whole.tobytes()


class Caller(ABC):
    """One call, from picking up to hanging up; use with `async with`.

    Attributes:
        heard: What the bot said, when the caller could hear it.
        sent: What the caller said, in order.
        ended: Set once the line is gone, whoever closed it.
        sample_rate: Of the line, Hz.
        surroundings: What the microphone picks up besides the caller: given the caller, a time on
            the clock and a number of samples, the samples.
        slowness: How much longer than real time the caller's sound takes: 1, or more for a bot
            that has to share its machine. What counts samples does not notice.
    """

    slowness = 1.0
    surroundings: Callable[["Caller", float, int], NDArray[np.float32]] | None = None

    def __init__(self, *, sample_rate: int, lose_packets: bool) -> None:
        self.heard = Track(sample_rate)
        self.sent: list[Utterance] = []
        self.ended = asyncio.Event()
        self.sample_rate = sample_rate
        self._lose_packets = lose_packets
        self._began = 0.0
        self._next_frame = 0
        self._to_say: deque[bytes] = deque()
        self._said: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._news = asyncio.Event()

    @abstractmethod
    async def dial(self) -> None:
        """Connect to the bot and start the microphone."""

    @abstractmethod
    async def hang_up(self) -> None:
        """End the call as a caller does."""

    @abstractmethod
    async def vanish(self) -> None:
        """Be gone without a word, as a killed process or a dead phone is."""

    async def __aenter__(self) -> Self:
        await self.dial()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.hang_up()

    async def say(self, pcm: bytes, sample_rate: int) -> Utterance:
        """Speak mono PCM16 of `sample_rate` Hz in real time; return once it was sent.

        Raises:
            ConnectionError: The bot ended the call meanwhile.
        """
        samples = np.frombuffer(pcm, dtype="<i2")
        if sample_rate != self.sample_rate:
            samples = soxr.resample(samples, sample_rate, self.sample_rate)
        speech = samples.tobytes()
        frame_bytes = 2 * round(self.sample_rate * FRAME_SECONDS)
        first = self._next_frame + len(self._to_say)
        for start in range(0, len(speech), frame_bytes):
            self._to_say.append(speech[start : start + frame_bytes].ljust(frame_bytes, b"\0"))
        sent = asyncio.get_running_loop().create_future()
        self._said.append((self._next_frame + len(self._to_say), sent))
        await self._unless_ended(sent)
        began = self._began + first * FRAME_SECONDS * self.slowness
        loud = _loud_windows(speech, self.sample_rate, of_loudest=_OF_LOUDEST) or [0.0]
        start, end = loud[0] * self.slowness, (loud[-1] + _WINDOW_SECONDS) * self.slowness
        utterance = Utterance(began + start, began + end)
        self.sent.append(utterance)
        return utterance

    async def hear(self, *, since: float | None = None, within: float = 20.0) -> Utterance:
        """Wait until the bot begins to speak; return that beginning as far as it was heard.

        Args:
            since: Count only what begins after this, default the caller's own last sound.
            within: Seconds to wait.

        Raises:
            TimeoutError: The bot said nothing.
            ConnectionError: The bot ended the call without a word.
        """
        after = since if since is not None else (self.sent[-1].end if self.sent else 0.0)
        deadline = time.monotonic() + within
        while True:
            for utterance in self.heard.utterances:
                if utterance.start >= after:
                    return utterance
            if self.ended.is_set():
                raise ConnectionError("the bot ended the call without a word")
            if not await self._news_before(deadline):
                raise TimeoutError(f"the bot said nothing within {within:g} s")

    async def hear_out(self, *, quiet: float = 1.0, within: float = 60.0) -> float:
        """Wait until the bot has been silent for `quiet` seconds; return when it fell silent.

        Returns at once if the call has ended.

        Raises:
            TimeoutError: The bot kept talking.
        """
        deadline = time.monotonic() + within
        not_before = 0.0
        while True:
            spoken = self.heard.utterances
            silent_since = spoken[-1].end if spoken else self._began
            looked_at = time.monotonic()
            silent_enough_at = max(silent_since + quiet, not_before)
            if self.ended.is_set() or looked_at >= silent_enough_at:
                return silent_since
            if looked_at >= deadline:
                raise TimeoutError(f"the bot was still talking after {within:g} s")
            look_again_at = looked_at + _LOOK_EVERY_SECONDS
            await self._news_before(min(deadline, silent_enough_at, look_again_at))
            stood_still = time.monotonic() - look_again_at
            if stood_still > 0.0:
                # In a process that stood still nobody listened: what came meanwhile is heard first.
                not_before = time.monotonic() + min(stood_still, quiet)

    def _hears(self, pcm: bytes, at: float) -> None:
        """Take what the bot said; for the line to call."""
        self.heard.add(pcm, at)
        self._news.set()

    def _line_is_gone(self) -> None:
        """Mark the call as over; for the line to call, any number of times."""
        self.ended.set()
        self._news.set()

    async def _news_before(self, deadline: float) -> bool:
        self._news.clear()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self._news.wait()
        except TimeoutError:
            return False
        return True

    async def _unless_ended(self, sent: asyncio.Future[None]) -> None:
        ended = asyncio.ensure_future(self.ended.wait())
        try:
            await asyncio.wait([sent, ended], return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        if not sent.done():
            raise ConnectionError("the bot ended the call while the caller was speaking")

    async def _microphone(self) -> AsyncIterator[bytes | None]:
        """Yield a frame every 20 ms, silence included; None where a packet got lost.

        Frame n holds the sound of the 20 ms that begin at n * 20 ms and can leave when they are
        over. Late frames follow at once: the pace is the clock's, not the loop's.
        """
        silence = bytes(2 * round(self.sample_rate * FRAME_SECONDS))
        self._began = time.monotonic()
        while True:
            due = self._began + (self._next_frame + 1) * FRAME_SECONDS * self.slowness
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            lost = self._lose_packets and self._next_frame % _FRAMES_PER_LOSS < _LOST_FRAMES
            frame = self._to_say.popleft() if self._to_say else silence
            if self.surroundings:
                begin = self._began + self._next_frame * FRAME_SECONDS * self.slowness
                frame = _mixed(frame, self.surroundings(self, begin, len(frame) // 2))
            self._next_frame += 1
            yield None if lost else frame
            while self._said and self._said[0][0] <= self._next_frame:
                sent = self._said.popleft()[1]
                if not sent.done():
                    sent.set_result(None)


def _mixed(pcm: bytes, sound: NDArray[np.float32]) -> bytes:
    samples = np.frombuffer(pcm, dtype="<i2") + sound
    return np.clip(samples, -32768, 32767).astype("<i2").tobytes()


def _loud_windows(pcm: bytes, sample_rate: int, *, of_loudest: float = 0.0) -> list[float]:
    """Return the offsets, seconds, of the 10 ms windows that hold sound."""
    samples = np.frombuffer(pcm, dtype="<i2").astype(np.float64)
    size = round(sample_rate * _WINDOW_SECONDS)
    windows = np.pad(samples, (0, -len(samples) % size)).reshape(-1, size)
    rms: NDArray[np.float64] = np.sqrt(np.mean(windows**2, axis=1))
    loud = np.flatnonzero(rms > max(LOUD_RMS, of_loudest * rms.max(initial=0.0)))
    return [float(index) * _WINDOW_SECONDS for index in loud]
