"""The recording of a call: caller on the left, bot on the right, exactly as long as the call.

The recording is the call's timeline: sample 0 is the zero of the pipeline's clock, so a moment of
the pipeline is a position in the recording. Audio frames carry no time of their own, so a frame is
placed by when it got here, which is late by whatever held it up on the way, and never early:

- What follows a frame says how late it was. Every frame is held back for `SETTLE_SECONDS`, and
  placed at the earliest time that the frames behind it allow: a burst after a stall goes back to
  where it belongs, and the recording gets no longer.
- Frames that follow one another closely are joined without a seam; jitter makes no clicks.
- Time in which no audio came is silence: a muted caller, packets that went missing.

The last frame of a speech has none behind it. If the caller's frames of the same moment were late,
the whole process stood still, and the bot's frame was as late as they. A first frame was not: it
was made when the process went on.

The bot's frames come from the output transport as they are played, some transports at the start
of a frame (websocket), some near its end (WebRTC). `BotStartedSpeakingFrame` is pushed just before
the first one plays; how far behind it that frame arrives is how late this transport is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import soxr
from loguru import logger
from pipecat.frames.frames import (
    AudioRawFrame,
    BotStartedSpeakingFrame,
    CancelFrame,
    EndFrame,
    Frame,
    InputAudioRawFrame,
    OutputAudioRawFrame,
    StartFrame,
    StopFrame,
)
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor, FrameProcessorSetup

Samples = npt.NDArray[np.int16]
Chunk = Callable[[int, bytes, int, int], None]
Sound = Callable[[str, float, float], None]

# A killed process loses at most CHUNK_SECONDS + HOLD_SECONDS of audio, at any sample rate.
CHUNK_SECONDS = 3.0
# How long a frame waits for the ones that tell how late it was.
SETTLE_SECONDS = 0.5
# How long a track without frames waits for them before the time is written down as silence.
HOLD_SECONDS = 1.5
# Less than this is jitter; more is audio that never came.
GAP_SECONDS = 0.015
# How many late frames are remembered: as many as a burst may have.
LATE_FRAMES = 100
# A frame goes on with the speech before it if, set right, it is no farther from it than this.
LATE_SECONDS = 0.1
# A sender whose clock is fast gets ahead of ours: beyond this its quiet frames are left out.
AHEAD_SECONDS = 0.04

WINDOW_SECONDS = 0.01
# Root mean square of PCM16: -45 dBFS, below soft speech and above a codec's silence.
AUDIBLE_LEVEL = 184.0
# Speech begins and ends where it is this far below its loudest: around a caller's are breath and
# room (-20 dB), a voice made by machine fades into nothing (-30 dB).
OF_LOUDEST = {"user": 0.1, "assistant": 0.03}
# How long a loud sound sets the measure for those after it.
LOUDEST_HALVES_IN_SECONDS = 5.0
# Speech has to last this many windows to count, and be gone this many to have ended.
SPEECH_WINDOWS = 3
PAUSE_WINDOWS = 20
# A sound without a pause is told of in parts this long: a noisy line must not fill the memory.
MAX_SOUND_WINDOWS = 6000


class Sounds:
    """Finds the stretches of sound on a track, on a 10 ms grid."""

    def __init__(
        self, sample_rate: int, of_loudest: float, on_sound: Callable[[float, float], None]
    ) -> None:
        """`on_sound` gets where a sound began and ended, in ms, when it is over."""
        self._window = max(1, round(sample_rate * WINDOW_SECONDS))
        self._of_loudest = of_loudest
        self._on_sound = on_sound
        self._rest = np.zeros(0, np.int16)
        self._position = 0
        self._loudest = 0.0
        self._decay = 0.5 ** (WINDOW_SECONDS / LOUDEST_HALVES_IN_SECONDS)
        self._levels: list[float] = []
        self._quiet = 0

    def feed(self, samples: Samples) -> None:
        if len(self._rest):
            samples = np.concatenate((self._rest, samples))
        count = len(samples) // self._window
        self._rest = samples[count * self._window :]
        windows = samples[: count * self._window].reshape(count, self._window)
        levels = np.sqrt(np.mean(np.square(windows, dtype=np.float32), axis=1))
        # A hundred windows a second: what is looked up for each of them is looked up once.
        loudest, decay, of_loudest = self._loudest, self._decay, self._of_loudest
        for level in levels.tolist():
            self._position += 1
            loudest *= decay
            if level > loudest:
                loudest = level
            if level >= AUDIBLE_LEVEL and level >= of_loudest * loudest:
                self._quiet = 0
            elif self._levels:
                self._quiet += 1
            else:
                # The silence goes on.
                continue
            self._levels.append(level)
            if self._quiet == PAUSE_WINDOWS or len(self._levels) == MAX_SOUND_WINDOWS:
                self._end()
        self._loudest = loudest

    def finish(self) -> None:
        """Tell of the sound that the end of the track cut off."""
        if self._levels:
            self._end()

    def _end(self) -> None:
        levels, self._levels = self._levels, []
        # Known only now: how loud the sound got. What led up to it was not yet speech.
        enough = max(AUDIBLE_LEVEL, self._of_loudest * max(levels))
        speech = [index for index, level in enumerate(levels) if level >= enough]
        if len(speech) >= SPEECH_WINDOWS:
            began = self._position - len(levels)
            self._on_sound(self._ms(began + speech[0]), self._ms(began + speech[-1] + 1))

    @staticmethod
    def _ms(windows: int) -> float:
        return round(windows * WINDOW_SECONDS * 1000, 1)


def sounds_of(sample_rate: int, on_sound: Sound) -> dict[str, Sounds]:
    """What listens to the caller's and to the bot's track, in this order."""
    return {
        role: Sounds(sample_rate, share, partial(on_sound, role))
        for role, share in OF_LOUDEST.items()
    }


class Track:
    """One speaker's audio on the call's timeline, resampled to the recording's rate.

    `sounds` listens to what is taken.
    """

    def __init__(self, sample_rate: int, sounds: Sounds) -> None:
        self._rate = sample_rate
        self._native_rate = 0
        self._resampler: soxr.ResampleStream | None = None
        # (arrived, earliest start) in seconds, PCM16 at the native rate: as bytes, because most of
        # what a frame costs is the way into numpy, and many go it together.
        self._pending: deque[tuple[float, float, bytes]] = deque()
        self._cursor = 0
        # Where the latest frame ended, s.
        self._spoken_until = 0.0
        self._done: deque[Samples] = deque()
        self._done_samples = 0
        # (arrived, by how much too late) of the latest frames that were.
        self._late: deque[tuple[float, float]] = deque(maxlen=LATE_FRAMES)
        self.sounds = sounds

    @property
    def ready(self) -> int:
        """Samples that can be taken."""
        return self._done_samples

    def add(self, pcm: bytes, rate: int, arrived: float, start: float) -> None:
        """Queue a frame that arrived at `arrived` s and cannot have begun after `start` s."""
        if not self._native_rate:
            self._native_rate = rate
            self._cursor = round(self._cursor * rate / self._rate)
            if rate != self._rate:
                self._resampler = soxr.ResampleStream(rate, self._rate, 1, dtype="int16")
        if rate != self._native_rate:
            samples = soxr.resample(_samples(pcm), rate, self._native_rate)
            pcm = np.asarray(samples, np.int16).tobytes()
        self._pending.append((arrived, start, pcm))

    def settle(self, until: float, was_late: Callable[[float], float] | None = None) -> None:
        """Place every frame that arrived before `until` s, in the light of all that came since.

        `was_late` tells how late, in s, whatever arrived at a moment was.
        """
        frames = self._pending
        if not frames or frames[0][0] > until:
            return
        byte_seconds = 0.5 / self._native_rate
        starts: list[float] = []
        latest = float("inf")
        for _, start, pcm in reversed(frames):
            latest = min(start, latest - len(pcm) * byte_seconds)
            starts.append(latest)
        placed: list[bytes] = []
        while frames and frames[0][0] <= until:
            arrived, earliest, pcm = frames.popleft()
            start = starts.pop()
            if earliest - start > GAP_SECONDS:
                self._late.append((arrived, earliest - start))
            late = was_late(arrived) if was_late else 0.0
            # Speech that begins was not held up: nothing of it had been said before.
            if start - late - self._spoken_until > LATE_SECONDS:
                late = 0.0
            placed += self._placed(pcm, start - late)
            self._spoken_until = self._cursor / self._native_rate
        if placed:
            self._emit(self._resampled(_samples(b"".join(placed))))

    def was_late(self, arrived: float) -> float:
        """How late, in s, the frames were that arrived at that moment."""
        latest = 0.0
        for at, late in reversed(self._late):
            if at <= arrived - GAP_SECONDS:
                break
            if at < arrived + GAP_SECONDS:
                latest = max(latest, late)
        return latest

    def silence_until(self, position: float) -> None:
        """Fill up to `position` s, or to where the first waiting frame may begin."""
        rate = self._native_rate or self._rate
        # Most often there is nothing to fill, and no need to look through what waits.
        if round(position * rate) <= self._cursor:
            return
        if self._pending:
            position = min(position, *(start for _, start, _ in self._pending))
        missing = round(position * rate) - self._cursor
        if missing > 0:
            self._cursor += missing
            self._emit(self._resampled(np.zeros(missing, np.int16)))

    def finish(self, length: int, end: float) -> None:
        """Make the settled track `length` samples long at the recording's rate."""
        self.silence_until(end)
        if self._resampler:
            self._emit(self._resampler.resample_chunk(np.zeros(0, np.int16), last=True))
        short = length - self._done_samples
        if short > 0:
            self._emit(np.zeros(short, np.int16))

    def take(self, count: int) -> Samples:
        """Remove and return the next `count` samples."""
        parts: list[Samples] = []
        self._done_samples -= count
        while count:
            part = self._done.popleft()
            if len(part) > count:
                self._done.appendleft(part[count:])
                part = part[:count]
            parts.append(part)
            count -= len(part)
        taken = np.concatenate(parts) if parts else np.zeros(0, np.int16)
        # All at once, and not as it comes: what is heard in the recording is told with it.
        self.sounds.feed(taken)
        return taken

    def _placed(self, pcm: bytes, start: float) -> list[bytes]:
        """What a frame that begins at `start` s adds to the track: silence before it, itself."""
        offset = start - self._cursor / self._native_rate
        self._cursor += len(pcm) // 2
        if offset > GAP_SECONDS:
            missing = round(offset * self._native_rate)
            self._cursor += missing
            return [bytes(2 * missing), pcm]
        if offset < -AHEAD_SECONDS and np.abs(_samples(pcm)).max(initial=0) < AUDIBLE_LEVEL:
            self._cursor -= len(pcm) // 2
            return []
        return [pcm]

    def _resampled(self, samples: Samples) -> Samples:
        return self._resampler.resample_chunk(samples) if self._resampler else samples

    def _emit(self, samples: Samples) -> None:
        if len(samples):
            self._done.append(samples)
            self._done_samples += len(samples)


class Recording:
    """Two tracks cut into chunks of interleaved stereo PCM16; times in seconds of the call."""

    def __init__(self, sample_rate: int, on_chunk: Chunk, on_sound: Sound) -> None:
        """`on_chunk` gets index, PCM, rate, channels; `on_sound` role, start ms, end ms."""
        self.sample_rate = sample_rate
        self._on_chunk = on_chunk
        self._tracks = {
            role: Track(sample_rate, sounds)
            for role, sounds in sounds_of(sample_rate, on_sound).items()
        }
        self._chunk_samples = round(CHUNK_SECONDS * sample_rate)
        self._samples = 0
        self._index = 0
        self._settled_at = 0.0
        self._heard_anything = False

    def add(self, role: str, frame: AudioRawFrame, arrived: float, start: float) -> None:
        """Place a frame that got here at `arrived` and cannot have begun after `start`."""
        pcm = frame.audio
        if frame.num_channels > 1:
            mixed = _samples(pcm).reshape(-1, frame.num_channels).mean(axis=1)
            pcm = mixed.astype(np.int16).tobytes()
        if len(pcm) % 2:
            # Half a sample would make noise of all that is joined to it.
            pcm = pcm[:-1]
        if pcm:
            self._heard_anything = True
            self._tracks[role].add(pcm, frame.sample_rate, arrived, start)
        if arrived - self._settled_at >= SETTLE_SECONDS / 2:
            self._settled_at = arrived
            self._advance(arrived)

    def finish(self, end: float) -> None:
        """Bring both tracks to exactly `end` and give out what is left."""
        if not self._heard_anything:
            return
        total = round(end * self.sample_rate)
        self._settle(float("inf"))
        for track in self._tracks.values():
            track.finish(max(0, total - self._samples), end)
        while self._samples < total:
            self._cut(min(self._chunk_samples, total - self._samples))
        for track in self._tracks.values():
            track.sounds.finish()

    def _advance(self, now: float) -> None:
        self._settle(now - SETTLE_SECONDS)
        for track in self._tracks.values():
            track.silence_until(now - HOLD_SECONDS)
        while min(track.ready for track in self._tracks.values()) >= self._chunk_samples:
            self._cut(self._chunk_samples)

    def _settle(self, until: float) -> None:
        user, bot = self._tracks["user"], self._tracks["assistant"]
        user.settle(until)
        # A loop that stood still held up both; only the caller sends without a pause, and so tells.
        bot.settle(until, user.was_late)

    def _cut(self, count: int) -> None:
        stereo = np.empty((count, 2), np.int16)
        stereo[:, 0] = self._tracks["user"].take(count)
        stereo[:, 1] = self._tracks["assistant"].take(count)
        self._samples += count
        index, self._index = self._index, self._index + 1
        self._on_chunk(index, stereo.tobytes(), self.sample_rate, 2)


class CallRecorder(FrameProcessor):
    """Records the call it is part of; belongs right after `transport.output()`.

    Event handlers: `on_audio_data(recorder, pcm, sample_rate, num_channels)`, called with every
    chunk as Pipecat's `AudioBufferProcessor` does.
    """

    def __init__(
        self,
        *,
        on_chunk: Chunk,
        on_sound: Sound | None = None,
        on_started: Callable[[], None] | None = None,
        on_ended: Callable[[Frame | None, int], None] | None = None,
        **kwargs,
    ) -> None:
        """All callbacks are called on the event loop and must not block.

        Args:
            on_chunk: Gets index, interleaved stereo PCM16, sample rate and 2 (channels).
            on_sound: Gets "user" or "assistant", and where a sound began and ended, in ms.
            on_started: Called when the recording begins; its sample 0 is the clock's zero.
            on_ended: Called after the last chunk, with the terminal frame if there was one and
                the pipeline's time (ns) at which the recording ends.
        """
        # Nothing waits here, so no queue: it would cost each of a hundred frames a second.
        super().__init__(enable_direct_mode=True, **kwargs)
        self._register_event_handler("on_audio_data")
        self._chunk_callback = on_chunk
        self._telling: set[asyncio.Task[None]] = set()
        self._on_sound = on_sound or (lambda role, start_ms, end_ms: None)
        self._on_started = on_started
        self._on_ended = on_ended
        self._sample_rate = 0
        self._recording: Recording | None = None
        self._ended = False
        self._failed = False
        self._bot_began: float | None = None
        self._bot_lag = 0.0
        # The pipeline's clock, asked for every frame.
        self._time: Callable[[], int] | None = None

    async def setup(self, setup: FrameProcessorSetup) -> None:
        """Adopt the pipeline's output rate."""
        await super().setup(setup)
        self._sample_rate = setup.audio_out_sample_rate

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Record audio, pass everything on."""
        await super().process_frame(frame, direction)
        try:
            self._record(frame)
        except Exception as error:
            if not self._failed:
                self._failed = True
                logger.error(f"Roark: part of the recording is lost: {type(error).__name__}")
        await self.push_frame(frame, direction)

    async def cleanup(self) -> None:
        """The pipeline is gone: give out what is left."""
        self.finish()
        await asyncio.gather(*self._telling)
        await super().cleanup()

    def finish(self, frame: Frame | None = None) -> None:
        """End the recording now; idempotent. Without a recording nobody is told."""
        recording, self._recording, self._ended = self._recording, None, True
        if recording is None:
            return
        now = self.get_clock().get_time()
        try:
            recording.finish(now / 1e9)
        finally:
            if self._on_ended:
                self._on_ended(frame, now)

    def _on_chunk(self, index: int, pcm: bytes, sample_rate: int, num_channels: int) -> None:
        self._chunk_callback(index, pcm, sample_rate, num_channels)
        tell = self._call_event_handler("on_audio_data", pcm, sample_rate, num_channels)
        try:
            task = asyncio.get_running_loop().create_task(tell)
        except RuntimeError:
            tell.close()
            return
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    def _record(self, frame: Frame) -> None:
        if isinstance(frame, InputAudioRawFrame):
            if self._recording:
                now = self._now()
                self._recording.add("user", frame, now, now - seconds(frame))
        elif isinstance(frame, OutputAudioRawFrame):
            if self._recording:
                self._record_bot(frame, self._recording)
        elif isinstance(frame, BotStartedSpeakingFrame):
            self._bot_began = self._now()
        elif isinstance(frame, StartFrame):
            if self._recording is None and not self._ended:
                self._time = self.get_clock().get_time
                self._recording = Recording(self._sample_rate, self._on_chunk, self._on_sound)
                if self._on_started:
                    self._on_started()
        elif isinstance(frame, EndFrame | CancelFrame | StopFrame):
            self.finish(frame)

    def _record_bot(self, frame: OutputAudioRawFrame, recording: Recording) -> None:
        now = self._now()
        if self._bot_began is not None:
            self._bot_lag = min(max(now - self._bot_began, 0.0), seconds(frame))
            self._bot_began = None
        recording.add("assistant", frame, now, now - self._bot_lag)

    def _now(self) -> float:
        return (self._time or self.get_clock().get_time)() / 1e9


def _samples(pcm: bytes) -> Samples:
    return np.frombuffer(pcm, np.int16)


def seconds(frame: AudioRawFrame) -> float:
    """How long a frame plays."""
    return frame.num_frames / frame.sample_rate
