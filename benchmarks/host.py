"""The bot of the measured calls: an ordinary bot.py, with the observers it is told to use.

    python -m rehearsal.host.launch_bot benchmarks/host.py -t twilio --port 7860

What the environment says of it (see `Settings`) is what the calls differ in. When a call is over,
what only the bot's side can know is written to a file: the call's length by the pipeline's clock,
and how long each observer took to finish.
"""

import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import services
import transports
import uvicorn
from host import shutdown
from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.frames.frames import (
    CancelFrame,
    EndFrame,
    Frame,
    InputAudioRawFrame,
    LLMRunFrame,
    OutputAudioRawFrame,
    TTSAudioRawFrame,
)
from pipecat.observers.base_observer import BaseObserver, FramePushed
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import (
    LLMContextAggregatorPair,
    LLMUserAggregatorParams,
)
from pipecat.processors.audio.audio_buffer_processor import AudioBufferProcessor
from pipecat.runner.types import RunnerArguments
from pipecat.services.llm_service import FunctionCallParams
from pipecat.services.settings import TTSSettings
from pipecat.services.tts_service import TTSService
from pipecat.workers.runner import WorkerRunner
from rehearsal.engines.scripted import ScriptedEngine
from rehearsal.host.base_image import BaseImage

from benchmarks.subjects import PUBLISHED, TUNER, Subject, subject


@dataclass(frozen=True)
class Settings:
    """How this bot differs from an ordinary one; comes as JSON in BENCHMARK_HOST.

    Parameters:
        servers: Observer name -> where it reports to.
        result: The file for what is measured here.
        flush: Where the observers are flushed: in the `finally` around the call, in the disconnect
            handler alone, or "never".
        busy_ms: For so long of every 100 ms the event loop is blocked.
        second_chunks: pipecat-roark records in chunks of a second instead of 256 KB, so that it
            has several to lose in a short call.
        plain_voice: The voice gives no word timestamps.
        once: The bot ends the call when the caller is gone, and the process ends with the call, as
            `asyncio.run(bot())` does.
        ends_on_signal: SIGTERM ends the call, as in our bot.py.
    """

    servers: dict[str, str]
    result: str
    flush: str = "finally"
    busy_ms: int = 0
    second_chunks: bool = False
    plain_voice: bool = False
    once: bool = False
    ends_on_signal: bool = False

    @classmethod
    def read(cls) -> Self:
        """Read what this process was told."""
        return cls(**json.loads(os.environ["BENCHMARK_HOST"]))

    def to_environment(self) -> dict[str, str]:
        """Return the variable that says all this."""
        return {"BENCHMARK_HOST": json.dumps(asdict(self))}


@dataclass
class Measured:
    """What the bot's side knows of a call.

    Parameters:
        seconds: How long the call was: from the zero of the pipeline's clock to its terminal frame.
        audio_seconds: From its first audio frame, which is where pipecat-roark's recording begins.
        flush_seconds: Observer -> how long its `aflush` took.
        cpu_seconds: Processor time of the process during the call.
    """

    seconds: float = 0.0
    audio_seconds: float = 0.0
    flush_seconds: dict[str, float] = field(default_factory=dict[str, float])
    cpu_seconds: float = 0.0


class Stopwatch(BaseObserver):
    """Takes the call's length from when its last frame was pushed."""

    def __init__(self, measured: Measured) -> None:
        super().__init__(observe_every_push=False)
        self._measured = measured
        self._first_audio: int | None = None

    async def on_push_frame(self, data: FramePushed) -> None:
        """Note the pipeline clock's time of the first audio and of the end."""
        if isinstance(data.frame, InputAudioRawFrame | OutputAudioRawFrame):
            if self._first_audio is None:
                self._first_audio = data.timestamp
        elif isinstance(data.frame, EndFrame | CancelFrame) and not self._measured.seconds:
            self._measured.seconds = data.timestamp / 1e9
            if self._first_audio is not None:
                self._measured.audio_seconds = (data.timestamp - self._first_audio) / 1e9


class PlainVoice(TTSService):
    """The scripted voice as a service that does not say when which word is spoken."""

    def __init__(self) -> None:
        settings = TTSSettings(model=None, voice=None, language=None)
        super().__init__(push_start_frame=True, push_stop_frames=True, settings=settings)
        self._engine = ScriptedEngine()

    async def run_tts(self, text: str, context_id: str) -> AsyncGenerator[Frame, None]:
        """Say `text`."""
        async for piece in self._engine.speak(text, self.sample_rate):
            yield TTSAudioRawFrame(piece.pcm, self.sample_rate, 1, context_id=context_id)


async def look_up(params: FunctionCallParams, name: str) -> None:
    """Look up a customer.

    Args:
        name: Whom to look up.
    """
    await params.result_callback({"name": name, "balance": 12.5})


async def bot(runner_args: RunnerArguments) -> None:
    """Hold one call with every observer asked for."""
    settings = Settings.read()
    line = await transports.answer(runner_args)
    measured = Measured()
    subjects = [
        _subject(name, url, settings, runner_args) for name, url in settings.servers.items()
    ]

    context = LLMContext(tools=[look_up])
    aggregators = LLMContextAggregatorPair(
        context, user_params=LLMUserAggregatorParams(vad_analyzer=SileroVADAnalyzer())
    )
    pipeline = Pipeline(
        [
            line.transport.input(),
            services.create_stt(),
            aggregators.user(),
            services.create_llm("Be brief."),
            PlainVoice() if settings.plain_voice else services.create_tts(),
            line.transport.output(),
            *(processor for subject in subjects for processor in subject.processors),
            aggregators.assistant(),
        ]
    )
    worker = PipelineWorker(
        pipeline,
        params=PipelineParams(
            audio_in_sample_rate=line.audio_in_hz,
            audio_out_sample_rate=line.audio_out_hz,
            enable_metrics=True,
            enable_usage_metrics=True,
        ),
        enable_rtvi=not line.is_phone,
        observers=[
            Stopwatch(measured),
            *(observer for subject in subjects for observer in subject.observers),
        ],
    )
    runner = WorkerRunner(handle_sigint=runner_args.handle_sigint)
    await runner.add_workers(worker)

    @line.transport.event_handler("on_client_connected")
    async def on_client_connected(_transport, _client):
        context.add_message({"role": "developer", "content": "Greet the caller."})
        await worker.queue_frame(LLMRunFrame())

    @line.transport.event_handler("on_client_disconnected")
    async def on_client_disconnected(_transport, _client):
        if settings.flush == "disconnect":
            await _flush(subjects, measured)
        if settings.once:
            await worker.queue_frame(EndFrame())
        else:
            await runner.cancel()

    blocking = asyncio.create_task(_keep_busy(settings.busy_ms / 1000))
    cpu = time.process_time()

    async def end(name: str) -> None:
        await runner.cancel(name)

    try:
        with shutdown.ends_call(end) if settings.ends_on_signal else nullcontext():
            await runner.run()
    finally:
        measured.cpu_seconds = time.process_time() - cpu
        blocking.cancel()
        if settings.flush == "finally":
            await _flush(subjects, measured)
        temporary = Path(settings.result).with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(measured)), encoding="utf-8")
        temporary.replace(settings.result)


def _subject(name: str, url: str, settings: Settings, runner_args: RunnerArguments) -> Subject:
    options: dict[str, Any] = {}
    if name == PUBLISHED and settings.second_chunks:
        rate = 8000 if hasattr(runner_args, "websocket") else 24000
        options["audio_buffer_processor"] = AudioBufferProcessor(
            num_channels=2, buffer_size=2 * rate, auto_start_recording=True
        )
    return subject(name, url=url, runner_args=runner_args, **options)


async def _flush(subjects: list[Subject], measured: Measured) -> None:
    """Flush all that can be flushed, beside one another; Tuner's cannot."""

    async def flush(subject: Subject) -> None:
        started = time.monotonic()
        await subject.observer.aflush(reason="client-disconnected")
        measured.flush_seconds[subject.name] = time.monotonic() - started

    await asyncio.gather(
        *(flush(subject) for subject in subjects if subject.processors and subject.name != TUNER)
    )


async def _keep_busy(seconds: float) -> None:
    while seconds:
        time.sleep(seconds)
        await asyncio.sleep(0.1 - seconds)


async def _one_call(port: int) -> None:
    """Serve one call and be gone: what is still under way then goes with the event loop."""
    image = BaseImage(sys.modules[__name__])
    config = uvicorn.Config(image.app, port=port, log_config=None)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not image.sessions:
        await asyncio.sleep(0.01)
    await image.sessions[0].returned.wait()
    serving.cancel()


def loop_is_over(result: Path) -> Path:
    """The file that tells that the event loop of a `once` host is gone, with all its tasks."""
    return result.with_suffix(".loop-is-over")


if __name__ == "__main__":
    if Settings.read().once:
        asyncio.run(_one_call(int(sys.argv[sys.argv.index("--port") + 1])))
        # A socket that a cancelled task held is closed with the task.
        gc.collect()
        loop_is_over(Path(Settings.read().result)).touch()
    else:
        from pipecat.runner.run import main

        main()
