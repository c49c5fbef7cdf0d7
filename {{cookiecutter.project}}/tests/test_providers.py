"""The loopback providers, as Pipecat's own service classes see them: healthy, then failing."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import aiohttp
import numpy as np
import pytest
from pipecat.adapters.llm.schemas.function_schema import FunctionSchema
from pipecat.frames.frames import (
    ErrorFrame,
    Frame,
    FunctionCallResultFrame,
    InputAudioRawFrame,
    InterimTranscriptionFrame,
    InterruptionFrame,
    LLMContextFrame,
    LLMTextFrame,
    TranscriptionFrame,
    TTSAudioRawFrame,
    TTSSpeakFrame,
    TTSStoppedFrame,
    TTSTextFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.services.cartesia.tts import CartesiaTTSService
from pipecat.services.deepgram.stt import DeepgramSTTService
from pipecat.services.openai.llm import OpenAILLMService
from pipecat.workers.runner import WorkerRunner

from rehearsal.engine import ToolCall
from rehearsal.faults import ALWAYS, Faults
from rehearsal.providers import Providers, serve
from rehearsal.script import Answer, Script, ScriptedEngine

F = TypeVar("F", bound=Frame)

pytestmark = pytest.mark.anyio

SAMPLE_RATE = 16000
FRAME_BYTES = 640


def deepgram(providers: Providers) -> DeepgramSTTService:
    return DeepgramSTTService(api_key="key", base_url=providers.environment["DEEPGRAM_BASE_URL"])


def openai(providers: Providers) -> OpenAILLMService:
    return OpenAILLMService(api_key="key", base_url=providers.environment["OPENAI_BASE_URL"])


def cartesia(providers: Providers) -> CartesiaTTSService:
    return CartesiaTTSService(
        api_key="key",
        url=providers.environment["CARTESIA_BASE_URL"],
        settings=CartesiaTTSService.Settings(voice="voice"),
    )


class Line(FrameProcessor):
    """The end of a pipeline: keeps what comes out of the service under test."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[Frame] = []
        self.errors: list[ErrorFrame] = []
        self.worker: PipelineWorker | None = None
        self._changed = asyncio.Event()

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        self.frames.append(frame)
        self._changed.set()
        await self.push_frame(frame, direction)

    def fail(self, error: ErrorFrame) -> None:
        self.errors.append(error)
        self._changed.set()

    def of(self, kind: type[F]) -> list[F]:
        return [frame for frame in self.frames if isinstance(frame, kind)]

    async def send(self, *frames: Frame) -> None:
        assert self.worker
        await self.worker.queue_frames(list(frames))

    async def until(self, happened: Callable[[], Any], within_s: float = 5.0) -> None:
        async with asyncio.timeout(within_s):
            while not happened():
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def line(service: FrameProcessor) -> AsyncIterator[Line]:
    """Run `service` alone in a pipeline."""
    end = Line()
    worker = PipelineWorker(
        Pipeline([service, end]),
        params=PipelineParams(audio_in_sample_rate=SAMPLE_RATE),
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
        async with asyncio.timeout(20):
            await started.wait()
        yield end
    finally:
        await runner.cancel()
        await running


async def spoken(text: str = "Some words that are spoken") -> list[Frame]:
    """Return a caller's audio: speech, then silence, then what the VAD says about it."""
    pcm = b"".join([s.pcm async for s in ScriptedEngine().speak(text, SAMPLE_RATE)])
    pcm = b"\0" * 16000 + pcm + b"\0" * 6400
    frames: list[Frame] = [
        InputAudioRawFrame(
            audio=pcm[at : at + FRAME_BYTES], sample_rate=SAMPLE_RATE, num_channels=1
        )
        for at in range(0, len(pcm), FRAME_BYTES)
    ]
    return [*frames, VADUserStoppedSpeakingFrame(stop_secs=0.2)]


def ask(text: str, **context: Any) -> LLMContextFrame:
    return LLMContextFrame(LLMContext([{"role": "user", "content": text}], **context))


async def test_deepgram_hears_what_the_script_says_when_somebody_spoke() -> None:
    async with serve(ScriptedEngine(Script(hears=("I am calling.", "Bye.")))) as providers:
        async with line(deepgram(providers)) as call:
            await call.send(*await spoken())
            await call.until(lambda: call.of(TranscriptionFrame))
            await call.send(*await spoken())
            await call.until(lambda: len(call.of(TranscriptionFrame)) == 2)
    assert [frame.text for frame in call.of(TranscriptionFrame)] == ["I am calling.", "Bye."]
    assert [frame.text for frame in call.of(InterimTranscriptionFrame)] == ["I", "Bye."]
    assert call.of(TranscriptionFrame)[0].finalized
    (connection,) = providers.deepgram.connections
    assert connection.request.key == "key"
    assert connection.request.query["sample_rate"] == "16000"
    assert connection.received.count({"type": "Finalize"}) == 2
    assert providers.peers == {"127.0.0.1"}


async def test_openai_answers_in_pieces_and_reports_usage() -> None:
    script = Script(answers=(Answer(says="It is ten past nine."),))
    async with serve(ScriptedEngine(script)) as providers, line(openai(providers)) as call:
        await call.send(ask("What time is it?"))
        await call.until(lambda: "nine" in "".join(f.text for f in call.of(LLMTextFrame)))
    assert "".join(f.text for f in call.of(LLMTextFrame)) == "It is ten past nine."
    (request,) = providers.openai.requests
    assert request.body["messages"][-1]["content"] == "What time is it?"


async def test_cartesia_speaks_with_word_timestamps() -> None:
    async with serve(ScriptedEngine()) as providers, line(cartesia(providers)) as call:
        await call.send(TTSSpeakFrame("Good morning everybody."))
        await call.until(lambda: call.of(TTSStoppedFrame))
    words = [frame.text for frame in call.of(TTSTextFrame)]
    assert words == ["Good", "morning", "everybody."]
    assert call.of(TTSAudioRawFrame)
