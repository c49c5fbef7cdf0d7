"""The recording is as long as the call, and every sound is where it was."""

from collections.abc import AsyncIterator, Iterator
from typing import cast

import numpy as np
import pytest
from pipecat.clocks.base_clock import BaseClock
from pipecat.frames.frames import (
    BotStartedSpeakingFrame,
    CancelFrame,
    EndFrame,
    Frame,
    InputAudioRawFrame,
    OutputAudioRawFrame,
    StartFrame,
    StopFrame,
)
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.frame_processor import FrameDirection, FrameProcessorSetup
from pipecat.utils.asyncio.task_manager import TaskManager

from roark.recorder import CallRecorder, Recording

RATE = 8000


class Tape:
    """What a recording gave out."""

    def __init__(self) -> None:
        self.chunks: list[np.ndarray] = []
        self.indexes: list[int] = []
        self.sounds: list[tuple[str, float, float]] = []

    def chunk(self, index: int, pcm: bytes, sample_rate: int, channels: int) -> None:
        self.indexes.append(index)
        self.chunks.append(np.frombuffer(pcm, np.int16).reshape(-1, channels))

    def sound(self, role: str, start_ms: float, end_ms: float) -> None:
        self.sounds.append((role, start_ms, end_ms))

    @property
    def audio(self) -> np.ndarray:
        return np.concatenate(self.chunks) if self.chunks else np.zeros((0, 2), np.int16)

    @property
    def seconds(self) -> float:
        return len(self.audio) / RATE

    def loud(self, channel: int) -> list[tuple[float, float]]:
        """Runs of sound on a channel, in seconds, on a 10 ms grid."""
        track = np.abs(self.audio[:, channel].astype(int))
        windows = track[: len(track) // 80 * 80].reshape(-1, 80).max(axis=1) > 200
        edges = np.flatnonzero(np.diff(np.concatenate(([0], windows.astype(int), [0]))))
        return [(a / 100, b / 100) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.fixture
def tape() -> Tape:
    return Tape()


@pytest.fixture
def recording(tape: Tape) -> Recording:
    return Recording(RATE, tape.chunk, tape.sound)


def tone(seconds: float, rate: int = RATE) -> bytes:
    t = np.arange(round(seconds * rate)) / rate
    return (8000 * np.sin(2 * np.pi * 440 * t)).astype(np.int16).tobytes()


def caller(seconds: float = 0.02, *, loud: bool = True, rate: int = RATE) -> InputAudioRawFrame:
    audio = tone(seconds, rate) if loud else bytes(2 * round(seconds * rate))
    return InputAudioRawFrame(audio, rate, 1)


def sends(until: float, *, step: float = 0.02) -> Iterator[float]:
    """When the frames of a caller who sends in real time are complete."""
    for index in range(1, round(until / step) + 1):
        yield index * step


def feed(recording: Recording, arrived: float, frame: InputAudioRawFrame) -> None:
    recording.add("user", frame, arrived, arrived - frame.num_frames / frame.sample_rate)


def test_a_caller_is_on_the_left_and_the_bot_on_the_right(recording, tape):
    feed(recording, 0.5, caller(0.5))
    recording.add("assistant", caller(0.5), 1.0, 1.0)
    recording.finish(2.0)
    assert tape.loud(0) == [(0.0, 0.5)]
    assert tape.loud(1) == [(1.0, 1.5)]
    assert tape.seconds == 2.0


def test_chunks_are_numbered_whole_and_short(recording, tape):
    for at in sends(10.0):
        feed(recording, at, caller())
    recording.finish(10.0)
    assert tape.indexes == list(range(len(tape.chunks)))
    assert max(len(chunk) for chunk in tape.chunks) <= 5 * RATE
    assert tape.seconds == 10.0


@pytest.mark.parametrize("rate", [8000, 16000, 24000, 48000])
def test_at_any_rate_no_more_than_five_seconds_are_at_risk(rate):
    given_out = 0
    risk = 0.0

    def chunk(index: int, pcm: bytes, sample_rate: int, channels: int) -> None:
        nonlocal given_out
        given_out += len(pcm) // 4

    recording = Recording(rate, chunk, lambda role, start_ms, end_ms: None)
    for at in sends(20.0):
        feed(recording, at, caller(rate=rate))
        risk = max(risk, at - given_out / rate)
    assert risk <= 5.0


def test_packets_that_go_missing_are_silence_where_they_were(recording, tape):
    for at in sends(6.0):
        if not 0.9 < at % 1.0 <= 0.999 and at % 1.0 > 0.0001:
            feed(recording, at, caller())
    recording.finish(6.0)
    assert tape.seconds == 6.0
    starts = [start for start, _ in tape.loud(0)]
    assert np.allclose(starts, [0, 1, 2, 3, 4, 5], atol=0.021)


def test_a_muted_caller_does_not_shorten_the_recording(recording, tape):
    for at in np.arange(1.0, 2.5, 0.04):
        recording.add("assistant", caller(0.04), at, at)
    recording.finish(5.0)
    assert tape.seconds == 5.0
    [(start, end)] = tape.loud(1)
    assert start == pytest.approx(1.0, abs=0.011)
    assert end == pytest.approx(2.52, abs=0.011)


def test_a_burst_after_a_stall_goes_back_to_where_it_belongs(recording, tape):
    for at in sends(4.0):
        loud = 1.5 <= at < 2.5
        feed(recording, 2.0 + at / 1e6 if 1.2 < at <= 2.0 else at, caller(loud=loud))
    recording.finish(4.0)
    assert tape.seconds == 4.0
    [(start, end)] = tape.loud(0)
    assert start == pytest.approx(1.48, abs=0.021)
    assert end == pytest.approx(2.48, abs=0.021)


def test_the_last_frame_of_a_speech_that_a_stall_held_up_is_not_cut_off(recording, tape):
    stall = (1.9, 2.2)
    for at in sends(4.0):
        feed(recording, stall[1] if stall[0] < at <= stall[1] else at, caller(loud=False))
        if 1.0 < at <= 2.0 and round(at * 50) % 2 == 0:
            arrived = stall[1] if at > stall[0] else at
            recording.add("assistant", caller(0.04), arrived, arrived - 0.04)
    recording.finish(4.0)
    [(start, end)] = tape.loud(1)
    assert start == pytest.approx(1.0, abs=0.011)
    assert end == pytest.approx(2.0, abs=0.011)


def test_the_first_frame_of_a_speech_is_not_as_late_as_the_callers(recording, tape):
    stall = (1.5, 2.0)
    for at in sends(4.0):
        feed(recording, stall[1] if stall[0] < at <= stall[1] else at, caller(loud=False))
        if 2.0 <= at < 3.0 and round(at * 50) % 2 == 0:
            # Made when the process went on, and played from then on.
            recording.add("assistant", caller(0.04), at, at)
    recording.finish(4.0)
    [(start, _)] = tape.loud(1)
    assert start == pytest.approx(2.0, abs=0.011)


def test_jitter_leaves_no_seams(recording, tape):
    jitter = np.random.default_rng(7).uniform(0, 0.015, 500)
    phase = np.arange(160 * 500) * 2 * np.pi * 440 / RATE
    wave = (8000 * np.sin(phase)).astype(np.int16).reshape(500, 160)
    for index in range(500):
        frame = InputAudioRawFrame(wave[index].tobytes(), RATE, 1)
        feed(recording, (index + 1) * 0.02 + jitter[index], frame)
    recording.finish(10.02)
    steps = np.abs(np.diff(tape.audio[200:-600, 0].astype(int)))
    assert steps.max() < 3500


def test_a_fast_sender_does_not_run_away(recording, tape):
    for index in range(3000):
        loud = index % 50 < 25
        feed(recording, (index + 1) * 0.02 * 0.998, caller(loud=loud))
    recording.finish(3000 * 0.02 * 0.998)
    assert tape.seconds == pytest.approx(59.88)
    last = tape.loud(0)[-1]
    assert last[0] == pytest.approx(2950 * 0.02 * 0.998, abs=0.09)


def test_audio_at_another_rate_lands_at_the_same_time(recording, tape):
    for at in sends(3.0):
        feed(recording, at, caller(rate=16000, loud=1.0 < at <= 2.0))
    recording.finish(3.0)
    [(start, end)] = tape.loud(0)
    assert start == pytest.approx(1.0, abs=0.011)
    assert end == pytest.approx(2.0, abs=0.011)
    assert tape.seconds == 3.0


def test_sounds_are_told_on_the_recordings_own_time(recording, tape):
    for at in sends(4.0):
        feed(recording, at, caller(loud=1.0 < at <= 2.0 or 3.0 < at))
    recording.finish(4.0)
    assert [role for role, *_ in tape.sounds] == ["user", "user"]
    assert np.allclose([sound[1:] for sound in tape.sounds], [(1000, 2000), (3000, 4000)], atol=11)


def test_breath_and_room_around_speech_are_not_speech(recording, tape):
    noise = np.random.default_rng(1)
    for at in sends(4.0):
        level = 4000 if 1.0 < at <= 2.0 else 250
        pcm = noise.normal(0, level, 160).astype(np.int16).tobytes()
        feed(recording, at, InputAudioRawFrame(pcm, RATE, 1))
    recording.finish(4.0)
    assert any(np.allclose(sound[1:], (1000, 2000), atol=21) for sound in tape.sounds)


def test_half_a_sample_spoils_nothing_behind_it(recording, tape):
    for at in sends(2.0):
        frame = caller(loud=at > 1.0)
        if at <= 1.0:
            frame.audio += b"\x7f"
        feed(recording, at, frame)
    recording.finish(2.0)
    [(start, end)] = tape.loud(0)
    assert (start, end) == pytest.approx((1.0, 2.0), abs=0.011)


def test_without_audio_there_is_no_recording(recording, tape):
    recording.finish(3.0)
    assert tape.chunks == []


class HandClock(BaseClock):
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def get_time(self) -> int:
        return round(self.seconds * 1e9)

    def start(self) -> None:
        pass


class Studio:
    """A recorder with a clock that is set by hand, and no pipeline."""

    def __init__(self, tape: Tape) -> None:
        self.clock = HandClock()
        self.ended: list[tuple[Frame | None, int]] = []
        self.recorder = CallRecorder(
            on_chunk=tape.chunk,
            on_sound=tape.sound,
            on_ended=lambda frame, at_ns: self.ended.append((frame, at_ns)),
        )

    async def hear(self, at: float, frame: Frame) -> None:
        self.clock.seconds = at
        await self.recorder.process_frame(frame, FrameDirection.DOWNSTREAM)


@pytest.fixture
async def studio(tape: Tape) -> AsyncIterator[Studio]:
    studio = Studio(tape)
    setup = FrameProcessorSetup(
        clock=studio.clock,
        task_manager=TaskManager(),
        pipeline_worker=cast(PipelineWorker, None),
        audio_out_sample_rate=RATE,
    )
    await studio.recorder.setup(setup)
    yield studio
    await studio.recorder.cleanup()


@pytest.mark.anyio
@pytest.mark.parametrize("lag", [0.0, 0.03], ids=["websocket", "webrtc"])
async def test_the_bots_first_sample_is_where_the_bot_started(studio, tape, lag):
    await studio.hear(0.1, StartFrame())
    await studio.hear(1.0, BotStartedSpeakingFrame())
    for index in range(25):
        frame = OutputAudioRawFrame(tone(0.04), RATE, 1)
        await studio.hear(1.0 + lag + index * 0.04, frame)
    await studio.hear(3.0, EndFrame())
    assert tape.loud(1) == [(1.0, 2.0)]


@pytest.mark.anyio
@pytest.mark.parametrize("frame", [EndFrame(), CancelFrame(), StopFrame()], ids=lambda f: f.name)
async def test_the_last_chunk_comes_with_every_kind_of_end(studio, tape, frame):
    await studio.hear(0.0, StartFrame())
    await studio.hear(0.02, caller())
    await studio.hear(1.0, frame)
    assert tape.seconds == 1.0
    assert studio.ended == [(frame, 1_000_000_000)]


@pytest.mark.anyio
async def test_what_comes_after_the_end_is_not_recorded(studio, tape):
    await studio.hear(0.0, StartFrame())
    await studio.hear(0.02, caller())
    await studio.hear(1.0, EndFrame())
    await studio.hear(1.02, caller())
    studio.recorder.finish()
    assert tape.seconds == 1.0


@pytest.mark.anyio
async def test_a_pipeline_that_never_started_records_nothing(studio, tape):
    await studio.recorder.cleanup()
    assert tape.chunks == []
    assert studio.ended == []
