"""A pipeline for tests of single services: the service, and at its end what came out of it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from pipecat.frames.frames import (
    ErrorFrame,
    Frame,
    InputAudioRawFrame,
    LLMContextFrame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    MetricsFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.metrics.metrics import LLMTokenUsage, LLMUsageMetricsData
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.workers.runner import WorkerRunner

from rehearsal.engines.scripted import ScriptedEngine

F = TypeVar("F", bound=Frame)

SAMPLE_RATE = 16000
"""Of the caller's audio, in Hz, unless a test says otherwise."""


class Line(FrameProcessor):
    """The end of a pipeline: keeps what comes out of the service under test."""

    def __init__(self) -> None:
        """Begin with nothing."""
        super().__init__()
        self.frames: list[Frame] = []
        self.errors: list[ErrorFrame] = []
        self.worker: PipelineWorker | None = None
        self._changed = asyncio.Event()

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Keep the frame."""
        await super().process_frame(frame, direction)
        self.frames.append(frame)
        self._changed.set()
        await self.push_frame(frame, direction)

    @property
    def text(self) -> str:
        """What the LLM wrote."""
        return "".join(frame.text for frame in self.of(LLMTextFrame))

    def fail(self, error: ErrorFrame) -> None:
        """Note an error that reached the pipeline."""
        self.errors.append(error)
        self._changed.set()

    def of(self, kind: type[F]) -> list[F]:
        """Return the frames of one kind, oldest first."""
        return [frame for frame in self.frames if isinstance(frame, kind)]

    async def send(self, *frames: Frame) -> None:
        """Put frames into the pipeline, at its beginning."""
        assert self.worker
        await self.worker.queue_frames(list(frames))

    async def until(self, happened: Callable[[], object], within_s: float = 30.0) -> None:
        """Wait until `happened()` is true, looking again at every frame; TimeoutError if not."""
        async with asyncio.timeout(within_s):
            while not happened():
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def line(*processors: FrameProcessor, sample_rate: int = SAMPLE_RATE) -> AsyncIterator[Line]:
    """Run processors in a pipeline that ends in a `Line`."""
    end = Line()
    worker = PipelineWorker(
        Pipeline([*processors, end]),
        params=PipelineParams(
            audio_in_sample_rate=sample_rate, enable_metrics=True, enable_usage_metrics=True
        ),
        cancel_on_idle_timeout=False,
        enable_rtvi=False,
    )
    end.worker = worker
    started = asyncio.Event()

    @worker.event_handler("on_pipeline_started")
    async def on_pipeline_started(worker: PipelineWorker, frame: Frame) -> None:
        started.set()

    @worker.event_handler("on_pipeline_error")
    async def on_pipeline_error(worker: PipelineWorker, frame: ErrorFrame) -> None:
        end.fail(frame)

    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    running = asyncio.create_task(runner.run())
    try:
        async with asyncio.timeout(30):
            await started.wait()
        yield end
    finally:
        await runner.cancel()
        await running


async def spoken(
    text: str = "Some words that are spoken", sample_rate: int = SAMPLE_RATE
) -> list[Frame]:
    """Return a caller's audio: speech, then silence, then what the VAD says about it."""
    speech = b"".join([s.pcm async for s in ScriptedEngine().speak(text, sample_rate)])
    second = 2 * sample_rate
    pcm = bytes(second // 2) + speech + bytes(second // 5)
    frames: list[Frame] = [
        InputAudioRawFrame(
            audio=pcm[at : at + second // 50], sample_rate=sample_rate, num_channels=1
        )
        for at in range(0, len(pcm), second // 50)
    ]
    return [*frames, VADUserStoppedSpeakingFrame(stop_secs=0.2)]


def answer(*texts: str) -> list[Frame]:
    """Return an LLM's answer as the voice gets it."""
    pieces = [LLMTextFrame(text) for text in texts]
    return [LLMFullResponseStartFrame(), *pieces, LLMFullResponseEndFrame()]


def usage(call: Line) -> list[LLMTokenUsage]:
    """Return what each answer of the LLM used."""
    metrics = [data for frame in call.of(MetricsFrame) for data in frame.data]
    return [data.value for data in metrics if isinstance(data, LLMUsageMetricsData)]


def ask(text: str, **context: Any) -> LLMContextFrame:
    """Return what makes an LLM answer `text`, which the caller said."""
    return LLMContextFrame(LLMContext([{"role": "user", "content": text}], **context))
