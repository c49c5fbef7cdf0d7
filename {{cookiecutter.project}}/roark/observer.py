"""The observer: Pipecat's frames in, events out.

It translates and nothing else. What an event means is decided in `call.py`; what happens to it on
its way to Roark in `outbox.py`. No handler awaits anything, so a slow Roark cannot hold up the
observer's queue, and a handler that fails costs the frame it failed on and no other.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Coroutine, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import numpy as np
from loguru import logger
from pipecat.frames.frames import (
    AggregatedTextFrame,
    BotStartedSpeakingFrame,
    BotStoppedSpeakingFrame,
    CancelFrame,
    EagerEndOfTurnCancelFrame,
    EndFrame,
    EndWorkerFrame,
    ErrorFrame,
    Frame,
    FunctionCallCancelFrame,
    FunctionCallInProgressFrame,
    FunctionCallResultFrame,
    InputAudioRawFrame,
    InputDTMFFrame,
    InterruptionFrame,
    LLMContextFrame,
    LLMContextSummaryRequestFrame,
    LLMFullResponseStartFrame,
    LLMSetToolsFrame,
    MetricsFrame,
    OutputAudioRawFrame,
    OutputTransportReadyFrame,
    StartFrame,
    StopFrame,
    TranscriptionFrame,
    TTSAudioRawFrame,
    TTSStoppedFrame,
    TTSTextFrame,
    UserStartedSpeakingFrame,
    UserStoppedSpeakingFrame,
    VADUserStartedSpeakingFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.metrics.metrics import (
    LLMUsageMetricsData,
    STTUsageMetricsData,
    TTFBMetricsData,
    TTSUsageMetricsData,
    TurnMetricsData,
)
from pipecat.observers.base_observer import BaseObserver, FramePushed
from pipecat.processors.aggregators.dtmf_aggregator import DTMFAggregator
from pipecat.processors.aggregators.llm_response_universal import LLMAssistantAggregator
from pipecat.processors.audio.audio_buffer_processor import AudioBufferProcessor
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.processors.frameworks.rtvi import RTVIProcessor, RTVISendTextFrame
from pipecat.services.llm_service import LLMService
from pipecat.services.stt_service import STTService
from pipecat.services.tts_service import TTSService
from pipecat.transports.base_output import BaseOutputTransport
from pipecat.utils.asyncio.task_manager import BaseTaskManager

from roark.call import ENDINGS, CallRecord, Event, Rank, Redact
from roark.outbox import number_setting, outbox_for, setting
from roark.prices import prices_in
from roark.recorder import CallRecorder, Sounds, sounds_of
from roark.redaction import card_and_phone_numbers

FLUSH_SECONDS = 20.0
# A caller's disconnect handler may flush before the pipeline has ended. The end is waited for this
# long; after that the call is finished in the background, when the end comes.
GRACE_SECONDS = 1.0

# What is kept of a phone call: the name in Pipecat's call_data, and in Daily's dial-in settings.
# A Twilio call that came over a SIP trunk has more among the parameters of its stream.
PHONE_FIELDS = {
    "from_number": "From",
    "to_number": "To",
    "call_id": "call_id",
    "stream_id": "stream_id",
    "call_domain": "call_domain",
}
# How Twilio names the headers of the INVITE.
SIP_HEADER = "SipHeader_"

Handler = Callable[[Any, int, Any], None]


class CallFolder(Protocol):
    """Where a call goes: the outbox's folder. No method blocks, none raises."""

    def started(self, body: Event) -> None: ...
    def journal(self, event: Event) -> None: ...
    def chunk(self, index: int, pcm: bytes, sample_rate: int, num_channels: int) -> None: ...
    def ended(self, body: Event, record: Event) -> None: ...
    async def flush(self, timeout: float) -> object: ...


class RoarkObserver(BaseObserver):
    """Reports one call to Roark and keeps its record under `calls_dir`."""

    def __init__(
        self,
        *,
        api_key: str | None,
        agent_id: str,
        runner_args: Any = None,
        agent_name: str | None = None,
        agent_prompt: str | None = None,
        audio_buffer_processor: AudioBufferProcessor | None = None,
        pipecat_call_id: str | None = None,
        base_url: str | None = None,
        calls_dir: str | Path | None = None,
        flush_seconds: float | None = None,
        redact: Redact | bool | None = None,
        folder: CallFolder | None = None,
    ) -> None:
        """Describe the call; nothing is sent before the pipeline starts.

        Args:
            api_key: Roark's key; None or blank keeps the call on disk and sends nothing.
            agent_id: Your id of this agent.
            runner_args: What the runner gave to `bot()`: the call id and phone numbers are in it.
            agent_name: Shown in Roark.
            agent_prompt: Shown in Roark.
            audio_buffer_processor: Records in place of our own recorder, as it is set up.
            pipecat_call_id: The call's id; otherwise WebRTC's peer, the runner's session or a new
                one.
            base_url: Another Roark than api.roark.ai; default `ROARK_BASE_URL`.
            calls_dir: Where calls are kept; default `CALLS_DIR`, else `calls`.
            flush_seconds: Upper limit of `aflush`; default `ROARK_FLUSH_SECONDS`, else 20.
            redact: Gets every text that was said and returns what may be kept and sent of it;
                True takes out card and phone numbers, as `ROARK_REDACT=1` does.
            folder: Takes the call in place of the outbox.
        """
        super().__init__(observe_every_push=False)
        self._runner_args = runner_args
        self._call_id = pipecat_call_id or call_id_of(runner_args)
        self._redact = redaction(redact)
        self._flush_seconds = flush_seconds or number_setting("ROARK_FLUSH_SECONDS", FLUSH_SECONDS)
        self._folder = folder or open_folder(
            self._call_id,
            api_key=api_key,
            base_url=base_url or setting("ROARK_BASE_URL"),
            calls_dir=Path(calls_dir or setting("CALLS_DIR") or "calls"),
        )
        self._record = CallRecord(redact=self._redact)
        self._routes: dict[type[Frame], Handler | None] = {}
        self._is_downstream = True
        self._failures: set[str] = set()
        # The wall's clock is read once: set back later, it would end the call before it began.
        self._made_at, self._made_on = time.time_ns(), time.monotonic_ns()
        self._origin: int | None = None
        self._clock: Any = None
        self._observes = False
        self._started = False
        self._terminal: Frame | None = None
        self._ended_at: int | None = None
        self._over = asyncio.Event()
        self._finished = False
        self._stays_open = False
        self._waits_for_end = False
        self._deadline: float | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._keys_since: int | None = None
        self._voice: str | None = None
        self._voiced: dict[str | None, float] = {}
        self._unusable: str | None = None
        self._flow: Any = None
        self._node: str | None = None
        self._chunks = 0
        self._recorded_samples = 0
        self._first_audio_at: int | None = None
        self._latest_audio_at: int | None = None
        self._anchored = False
        self._recorder: CallRecorder | None = None
        if audio_buffer_processor is None:
            self._recorder = CallRecorder(
                on_chunk=self._on_chunk,
                on_sound=self._on_sound,
                on_started=self._on_recording_started,
                on_ended=self._on_recording_ended,
            )
        self._audio_processor: FrameProcessor = (
            self._recorder or audio_buffer_processor  # pyright: ignore[reportAttributeAccessIssue]
        )
        if audio_buffer_processor is not None:
            self._listen_to(audio_buffer_processor)
        self._publish(
            {
                "event": "call",
                "at": self._made_at,
                "call_id": self._call_id,
                "agent_id": agent_id,
                "agent_name": agent_name,
                "agent_prompt": agent_prompt,
            }
        )

    @property
    def pipecat_call_id(self) -> str:
        """The call's id, at Roark and on disk."""
        return self._call_id

    @property
    def audio_processor(self) -> FrameProcessor:
        """The recorder; put it right after `transport.output()`."""
        return self._audio_processor

    @property
    def record(self) -> CallRecord:
        """The call as known so far."""
        return self._record

    def note_ending(self, reason: str, detail: str | None = None) -> None:
        """Say why the call ends, as one of `call.ENDINGS`; the first to say it is believed."""
        self._ending(reason, detail, Rank.SAID)

    def annotate(self, **values: Any) -> None:
        """Attach values of one's own to the call, under `metadata` in call.json.

        They are kept on this machine, not sent to Roark, and redacted as everything else is. What
        JSON cannot hold is kept as its text; a value given again replaces the one before.
        """
        if values and not self._finished:
            kept = json.loads(json.dumps(values, default=str))
            if self._redact:
                kept = redacted(kept, self._redact)
            self._emit("annotation", self._now(), values=kept)

    def stay_open(self) -> None:
        """Let `aflush` finish the call, not the end of its pipeline: for what is annotated then.

        A call that nobody flushes is finished by the next process.
        """
        self._stays_open = True

    async def aflush(
        self,
        *,
        reason: str = "client-disconnected",
        detail: str | None = None,
        timeout: float | None = None,
    ) -> None:
        """Finish the call and wait until it is delivered, at most `timeout` s; idempotent.

        Belongs in the `finally` around `runner.run()`. Called while the pipeline still runs, it
        waits a moment for the end; audio that comes after it still belongs to the call.
        """
        self._ending(reason, detail, Rank.ASSUMED)
        if self._deadline is None:
            self._deadline = time.monotonic() + (timeout or self._flush_seconds)
        if self._observes and not self._over.is_set():
            try:
                patience = min(GRACE_SECONDS, self._remaining_seconds())
                await asyncio.wait_for(self._over.wait(), patience)
            except TimeoutError:
                self._finish_when_over()
                return
        if not self._finished:
            await self._stop_recorder()
        self._finish()
        await self._folder.flush(self._remaining_seconds())

    async def setup(self, task_manager: BaseTaskManager) -> None:
        """A pipeline is being built, and its end will be told by `cleanup`."""
        await super().setup(task_manager)
        self._observes = True

    async def cleanup(self) -> None:
        """The pipeline is gone, whether or not anybody will flush."""
        await super().cleanup()
        self._over.set()
        await self._stop_recorder()
        if self._stays_open:
            self._ended_at = self._ended_at or self._now()
        else:
            self._finish()
        # Not waited for: the outbox goes on by itself, and outlives this loop.
        self._keep(self._folder.flush(self._flush_seconds))

    async def on_pipeline_started(self) -> None:
        """Have a recorder that was passed in record, if it does not yet."""
        if isinstance(self._audio_processor, AudioBufferProcessor):
            await self._audio_processor.start_recording()

    async def _stop_recorder(self) -> None:
        """Have a recorder that was passed in give out what it still has."""
        if isinstance(self._audio_processor, AudioBufferProcessor):
            try:
                await self._audio_processor.stop_recording()
                # It hands its last chunk to a task.
                await asyncio.sleep(0)
            except Exception as error:
                self._fail("the last of the recording", error)

    async def on_push_frame(self, data: FramePushed) -> None:
        """Translate a frame; the types nobody handles cost one lookup."""
        try:
            handler = self._routes[type(data.frame)]
        except KeyError:
            handler = self._route(type(data.frame))
        # A frame that is sent both ways is told once.
        if handler is None or (
            data.direction is FrameDirection.UPSTREAM
            and data.frame.broadcast_sibling_id is not None
        ):
            return
        self._is_downstream = data.direction is FrameDirection.DOWNSTREAM
        try:
            handler(data.frame, self._at(data), data.source)
        except Exception as error:
            self._fail(type(data.frame).__name__, error)

    # From frames to events

    def _handlers(self) -> dict[type[Frame], Handler]:
        handlers = self._translations()
        if not self._recorder:
            # Somebody else's recorder tells nobody when what it has was said.
            handlers |= {InputAudioRawFrame: self._on_audio, OutputAudioRawFrame: self._on_audio}
        return handlers

    def _translations(self) -> dict[type[Frame], Handler]:
        return {
            StartFrame: self._on_start,
            EndFrame: self._on_terminal,
            CancelFrame: self._on_terminal,
            StopFrame: self._on_terminal,
            VADUserStartedSpeakingFrame: self._on_vad_started,
            VADUserStoppedSpeakingFrame: self._on_vad_stopped,
            UserStartedSpeakingFrame: self._on_user_started,
            UserStoppedSpeakingFrame: self._on_user_stopped,
            TranscriptionFrame: self._on_transcription,
            InputDTMFFrame: self._on_key,
            RTVISendTextFrame: self._on_typed_text,
            EndWorkerFrame: self._on_end_wanted,
            OutputTransportReadyFrame: self._on_output_ready,
            BotStartedSpeakingFrame: self._on_bot_started,
            BotStoppedSpeakingFrame: self._on_bot_stopped,
            AggregatedTextFrame: self._on_sentence,
            TTSTextFrame: self._on_words,
            TTSAudioRawFrame: self._on_voice,
            TTSStoppedFrame: self._on_voice_done,
            InterruptionFrame: self._on_interruption,
            FunctionCallInProgressFrame: self._on_tool,
            FunctionCallResultFrame: self._on_tool_result,
            FunctionCallCancelFrame: self._on_tool_cancel,
            LLMContextFrame: self._on_request,
            LLMContextSummaryRequestFrame: self._on_summary_request,
            EagerEndOfTurnCancelFrame: self._on_withdrawn,
            MetricsFrame: self._on_metrics,
            ErrorFrame: self._on_error,
            LLMSetToolsFrame: self._on_tools_set,
            LLMFullResponseStartFrame: self._on_reply,
        }

    def _route(self, frame_type: type[Frame]) -> Handler | None:
        """Find the handler a new frame type inherits, and remember it."""
        handlers = self._handlers()
        handler = next((handlers[base] for base in frame_type.__mro__ if base in handlers), None)
        self._routes[frame_type] = handler
        return handler

    def _on_start(self, frame: StartFrame, at: int, source: FrameProcessor) -> None:
        if not self._started:
            self._started = True
            # The pipeline's clock starts with its setup, and so do the call and its recording.
            self._emit("started", self._origin or at)
            self._note_phone()
            self.annotate(**circumstances(self._runner_args))
            if prices := prices_in(setting("PRICES_FILE")):
                self._emit("prices", self._now(), values=prices)
            self._folder.started(self._record.call_started())

    def _on_terminal(self, frame: Frame, at: int, source: FrameProcessor) -> None:
        self._note_terminal(frame)
        if not self._observes:
            self._finish_when_over()

    def _on_vad_started(
        self, frame: VADUserStartedSpeakingFrame, at: int, source: FrameProcessor
    ) -> None:
        self._emit("vad", at, edge="start", secs=frame.start_secs)

    def _on_vad_stopped(
        self, frame: VADUserStoppedSpeakingFrame, at: int, source: FrameProcessor
    ) -> None:
        self._emit("vad", at, edge="stop", secs=frame.stop_secs)

    def _on_user_started(self, frame: Frame, at: int, source: FrameProcessor) -> None:
        self._emit("user-turn", at, edge="start")

    def _on_user_stopped(self, frame: Frame, at: int, source: FrameProcessor) -> None:
        self._emit("user-turn", at, edge="stop")

    def _on_transcription(self, frame: TranscriptionFrame, at: int, source: FrameProcessor) -> None:
        if isinstance(source, DTMFAggregator):
            since, self._keys_since = self._keys_since, None
            self._emit("typed", at, text=frame.text, via="keys", since=since)
            return
        self._emit(
            "transcript",
            at,
            text=frame.text,
            spaced=frame.includes_inter_frame_spaces,
            user_id=frame.user_id or None,
            language=frame.language and str(getattr(frame.language, "value", frame.language)),
            service="llm" if isinstance(source, LLMService) else None,
        )

    def _on_key(self, frame: InputDTMFFrame, at: int, source: FrameProcessor) -> None:
        self._keys_since = self._keys_since or at

    def _on_typed_text(self, frame: RTVISendTextFrame, at: int, source: FrameProcessor) -> None:
        self._emit("typed", at, text=frame.text, via="text", user_id=frame.user_id or None)

    def _on_end_wanted(self, frame: EndWorkerFrame, at: int, source: FrameProcessor) -> None:
        # A client's disconnectBot(): the EndFrame that follows would pass for the agent's.
        if isinstance(source, RTVIProcessor) and not frame.reason:
            self._ending("client-disconnected", "the client asked the bot to leave", Rank.SAID)

    def _on_output_ready(self, frame: Frame, at: int, source: FrameProcessor) -> None:
        # One that plays no sound never tells that it began to.
        if isinstance(source, BaseOutputTransport) and source.capabilities.audio_out:
            self._emit("output", at)

    def _on_bot_started(self, frame: Frame, at: int, source: FrameProcessor) -> None:
        self._emit_voiced(at)
        self._emit("bot", at, edge="start")

    def _on_bot_stopped(self, frame: Frame, at: int, source: FrameProcessor) -> None:
        self._emit_voiced(at)
        self._emit("bot", at, edge="stop")

    def _on_sentence(self, frame: AggregatedTextFrame, at: int, source: FrameProcessor) -> None:
        if frame.will_be_spoken:
            self._emit_voiced(at)
            self._emit(
                "say",
                at,
                context=frame.context_id,
                segment=frame.id,
                text=frame.text,
                keep=not frame.interruptible,
            )

    def _on_words(self, frame: TTSTextFrame, at: int, source: FrameProcessor) -> None:
        due = None
        if isinstance(source, BaseOutputTransport):
            due = at
        elif frame.pts and self._origin is not None:
            due = self._origin + frame.pts
        if due is None:
            self._emit_voiced(at)
        self._emit(
            "words",
            at,
            context=frame.context_id,
            segment=frame.segment_id,
            text=frame.text,
            spaced=frame.includes_inter_frame_spaces,
            due=due,
            keep=not frame.interruptible,
        )

    def _on_voice(self, frame: TTSAudioRawFrame, at: int, source: FrameProcessor) -> None:
        # The output transport pushes the same audio again, cut to size, as it plays.
        if not isinstance(source, BaseOutputTransport):
            context, seconds = frame.context_id, frame.num_frames / frame.sample_rate
            if context != self._voice:
                self._voice = context
                self._emit("voice", at, context=context)
            self._voiced[context] = self._voiced.get(context, 0.0) + seconds
        elif not self._recorder:
            self._on_audio(frame, at, source)

    def _on_audio(
        self, frame: InputAudioRawFrame | OutputAudioRawFrame, at: int, source: FrameProcessor
    ) -> None:
        duration = round(frame.num_frames / frame.sample_rate * 1e9)
        is_input = isinstance(frame, InputAudioRawFrame)
        if self._first_audio_at is None:
            # Its recording begins with the first frame, and a caller's is over when it comes.
            self._first_audio_at = at - duration if is_input else at
        self._latest_audio_at = at if is_input else at + duration

    def _on_voice_done(self, frame: TTSStoppedFrame, at: int, source: FrameProcessor) -> None:
        self._emit_voiced(at)
        self._emit("voice-done", at, context=frame.context_id)

    def _on_interruption(self, frame: Frame, at: int, source: FrameProcessor) -> None:
        self._emit_voiced(at)
        self._emit("interruption", at)

    def _on_tool(self, frame: FunctionCallInProgressFrame, at: int, source: FrameProcessor) -> None:
        self._emit(
            "tool",
            at,
            id=frame.tool_call_id,
            name=frame.function_name,
            arguments=self._shown_json(frame.arguments, empty="{}"),
        )

    def _on_tool_result(
        self, frame: FunctionCallResultFrame, at: int, source: FrameProcessor
    ) -> None:
        final = frame.properties.is_final if frame.properties else True
        error = frame.error
        if frame.result == LLMService.MISSING_FUNCTION_CALL_MESSAGE_TEMPLATE.format(
            function_name=frame.function_name
        ):
            # Pipecat answers the LLM in place of a tool that is not there.
            error = error or str(frame.result)
        # A tool that says so itself; what it returned is its result all the same.
        failed = isinstance(frame.result, Mapping) and bool(frame.result.get("error"))
        self._emit(
            "tool-result" if final else "tool-update",
            at,
            id=frame.tool_call_id,
            name=frame.function_name,
            arguments=self._shown_json(frame.arguments, empty="{}"),
            content=self._shown_json(frame.result, empty=""),
            error=self._shown(error) if error else None,
            failed=failed or None,
        )

    def _on_tool_cancel(
        self, frame: FunctionCallCancelFrame, at: int, source: FrameProcessor
    ) -> None:
        # pipecat 1.14: only a call that ran out of time asks the LLM to go on without it.
        self._emit("tool-cancel", at, id=frame.tool_call_id, timed_out=frame.run_llm)

    def _on_request(self, frame: LLMContextFrame, at: int, source: FrameProcessor) -> None:
        if self._is_downstream and isinstance(source, LLMAssistantAggregator):
            # The LLM is behind it: this tells others what has been said.
            return
        self._emit("request", at, kind="speculation" if frame.speculation else "answer")

    def _on_summary_request(self, frame: Frame, at: int, source: FrameProcessor) -> None:
        self._emit("request", at, kind="summary")

    def _on_withdrawn(self, frame: Frame, at: int, source: FrameProcessor) -> None:
        self._emit("withdrawn", at)

    def _on_metrics(self, frame: MetricsFrame, at: int, source: FrameProcessor) -> None:
        service = service_of(source)
        for item in frame.data:
            measured: dict[str, float] = {}
            if isinstance(item, TTFBMetricsData):
                measured["ttfb"] = item.value
            elif isinstance(item, LLMUsageMetricsData):
                measured["prompt_tokens"] = item.value.prompt_tokens
                measured["completion_tokens"] = item.value.completion_tokens
                measured["cached_tokens"] = item.value.cache_read_input_tokens or 0
            elif isinstance(item, TTSUsageMetricsData):
                measured["tts_characters"] = item.value
            elif isinstance(item, TurnMetricsData):
                self._emit(
                    "turn-guess", at, complete=item.is_complete, probability=item.probability
                )
            elif isinstance(item, STTUsageMetricsData):
                measured["stt_seconds"] = item.value.audio_seconds
            for kind, value in measured.items():
                # The first metrics of a pipeline are all zero.
                if value:
                    self._emit(
                        "metric", at, kind=kind, service=service, model=item.model, value=value
                    )

    def _on_error(self, frame: ErrorFrame, at: int, source: FrameProcessor) -> None:
        processor = frame.processor or source
        unusable = not getattr(processor, "is_usable", True)
        if unusable:
            self._unusable = f"{processor} can no longer do its job"
        self._emit(
            "error",
            at,
            processor=str(processor),
            message=self._shown(frame.error),
            category=str(frame.category.value) if frame.category else None,
            unusable=unusable,
        )

    def _on_tools_set(self, frame: LLMSetToolsFrame, at: int, source: FrameProcessor) -> None:
        self._flow = self._flow or flow_manager_of(source)

    def _on_reply(self, frame: Frame, at: int, source: FrameProcessor) -> None:
        if isinstance(source, LLMService):
            self._emit("asked", at)
        # Flows names its node after it has handed over the node's tools, and runs the LLM then.
        node = self._flow.current_node if self._flow else None
        if node and node != self._node:
            self._node = node
            self._emit("node", at, name=node)

    # The recording

    def _on_recording_started(self) -> None:
        self._emit("anchor", self._origin_of(self._audio_processor), ms=0.0)

    def _on_chunk(self, index: int, pcm: bytes, sample_rate: int, num_channels: int) -> None:
        self._recorded_samples += len(pcm) // (2 * num_channels)
        self._folder.chunk(index, pcm, sample_rate, num_channels)
        self._emit(
            "chunk",
            self._now(),
            index=index,
            ms=round(1000 * self._recorded_samples / sample_rate, 1),
            sample_rate=sample_rate,
            num_channels=num_channels,
        )

    def _on_sound(self, role: str, start_ms: float, end_ms: float) -> None:
        self._emit("sound", self._now(), role=role, start_ms=start_ms, end_ms=end_ms)

    def _on_recording_ended(self, frame: Frame | None, at_ns: int) -> None:
        self._ended_at = (self._origin or 0) + at_ns
        if frame is not None:
            self._note_terminal(frame)

    def _listen_to(self, processor: AudioBufferProcessor) -> None:
        """Take the chunks of somebody else's recorder, in the order it gives them out."""
        sounds: dict[str, Sounds] = {}

        @processor.event_handler("on_audio_data")
        async def on_audio_data(_, pcm: bytes, sample_rate: int, num_channels: int) -> None:
            index, self._chunks = self._chunks, self._chunks + 1
            self._on_chunk(index, bytes(pcm), sample_rate, num_channels)
            # It leaves out what it did not get: between its beginning and where it is now, when the
            # latest audio has come, more cannot be known.
            ms = 1000 * self._recorded_samples / sample_rate
            if not self._anchored:
                self._anchored = True
                begun_at = self._first_audio_at or self._now() - round(ms * 1e6)
                self._emit("anchor", begun_at, ms=0.0)
            self._emit("anchor", self._latest_audio_at or self._now(), ms=round(ms, 1))
            if num_channels == 2:
                sounds.update(sounds or sounds_of(sample_rate, self._on_sound))
                samples = np.frombuffer(pcm, np.int16).reshape(-1, 2)
                for channel, track in enumerate(sounds.values()):
                    track.feed(samples[:, channel])

    # The end

    def _note_terminal(self, frame: Frame) -> None:
        if self._terminal is not None:
            return
        self._terminal = frame
        reason = getattr(frame, "reason", None)
        if reason:
            # Pipecat's own reasons ("idle timeout") are ours with a space.
            text = str(reason)
            name = text.replace(" ", "-")
            self._ending(name if name in ENDINGS else text, None, Rank.SAID)
        elif isinstance(frame, EndFrame):
            # A worker that gives up because a service is of no more use ends without a reason.
            lost = self._unusable
            self._ending("error" if lost else "agent-ended", lost, Rank.SAID)
        elif isinstance(frame, CancelFrame):
            self._ending("cancelled", None, Rank.FALLBACK)

    def _ending(self, reason: str, detail: str | None, rank: int) -> None:
        if not self._finished:
            self._emit("ending", self._now(), reason=reason, detail=detail, rank=rank)

    def _finish_when_over(self) -> None:
        """Finish once the pipeline is gone, or when it should have been."""

        async def finish() -> None:
            if self._observes:
                try:
                    await asyncio.wait_for(self._over.wait(), self._flush_seconds)
                except TimeoutError:
                    logger.warning("Roark: the pipeline did not end; closing the call as it is")
            self._finish()

        if not self._finished and not self._waits_for_end:
            self._waits_for_end = True
            self._keep(finish())

    def _keep(self, work: Coroutine[Any, Any, object]) -> None:
        """Run something in the background, if there is still a loop to run it."""
        try:
            task = asyncio.get_running_loop().create_task(work)
        except RuntimeError:
            work.close()
            return
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _finish(self) -> None:
        """Close the record and hand it over; once."""
        if self._finished:
            return
        self._finished = True
        steps = {
            "the end of the recording": self._end_recording,
            "the identity of a phone call": self._note_phone,
            "the start of the call": self._tell_start,
            "the end of the call": self._tell_end,
        }
        for what, step in steps.items():
            try:
                step()
            except Exception as error:
                self._fail(what, error)

    def _end_recording(self) -> None:
        if self._recorder:
            self._recorder.finish()
        self._emit_voiced(self._now())

    def _tell_start(self) -> None:
        """A call whose pipeline never started began when its observer was made."""
        if not self._record.started:
            self._emit("started", self._made_at)
            self._folder.started(self._record.call_started())

    def _tell_end(self) -> None:
        self._emit("ended", self._ended_at or self._now())
        self._folder.ended(self._record.call_ended(), self._record.as_dict())

    def _remaining_seconds(self) -> float:
        return max(0.0, (self._deadline or 0.0) - time.monotonic())

    # Time, and what is written

    def _at(self, data: FramePushed) -> int:
        """Epoch ns of a push."""
        return self._origin_of(data.source, data.timestamp) + data.timestamp

    def _origin_of(self, processor: Any, elapsed: int = 0) -> int:
        """Epoch ns at the zero of the pipeline's clock."""
        if self._origin is None:
            try:
                self._clock = processor.get_clock()
                elapsed = self._clock.get_time()
            except Exception:
                self._clock = None
            self._origin = self._since_made() - elapsed
        return self._origin

    def _now(self) -> int:
        if self._clock is not None and self._origin is not None:
            return self._origin + self._clock.get_time()
        return self._since_made()

    def _since_made(self) -> int:
        """Epoch ns of now, by the wall's clock as it was when the observer was made."""
        return self._made_at + time.monotonic_ns() - self._made_on

    def _emit(self, event_name: str, at: int, /, **fields: Any) -> None:
        event: Event = {"event": event_name, "at": at}
        for name, value in fields.items():
            if value is not None:
                event[name] = value
        self._publish(event)

    def _emit_voiced(self, at: int) -> None:
        if self._voiced:
            voiced, self._voiced = self._voiced, {}
            for context, seconds in voiced.items():
                self._emit("voiced", at, context=context, seconds=round(seconds, 3))

    def _publish(self, event: Event) -> None:
        self._record.apply(event)
        if self._redact is None:
            self._folder.journal(event)
            return
        # What was said may only be written once the whole turn has been redacted.
        self._folder.journal(masked(event))
        for turn, text in self._record.unwritten_texts():
            self._folder.journal(
                {"event": "turn-text", "at": event["at"], "turn": turn, "text": text}
            )

    def _shown(self, text: str) -> str:
        return self._redact(text) if self._redact and text else text

    def _shown_json(self, value: Any, *, empty: str) -> str:
        return as_text(redacted(value, self._redact) if self._redact else value, empty=empty)

    def _note_phone(self) -> None:
        # `create_transport` fills call_data in, after the observer may have been made. A Daily body
        # holds an API key besides: only these fields are taken from it.
        call_data = field_of(self._runner_args, "call_data")
        dialin = field_of(field_of(self._runner_args, "body"), "dialin_settings")
        found: dict[str, Any] = {
            name: self._shown(str(value))
            for name, daily in PHONE_FIELDS.items()
            if (value := field_of(call_data, name) or field_of(dialin, daily))
        }
        brought = field_of(call_data, "body")
        brought = brought if isinstance(brought, Mapping) else {}
        if sip_call_id := brought.get("SipCallId"):
            found["sip_call_id"] = self._shown(str(sip_call_id))
        headers = field_of(dialin, "sip_headers")
        if not isinstance(headers, Mapping):
            named = ((str(name), value) for name, value in brought.items())
            headers = {
                name.removeprefix(SIP_HEADER): value
                for name, value in named
                if name.startswith(SIP_HEADER)
            }
        if headers:
            found["sip_headers"] = {
                str(name): self._shown(str(value)) for name, value in headers.items()
            }
        if found:
            self._emit("phone", self._now(), **found)

    def _fail(self, what: str, error: Exception) -> None:
        if what not in self._failures:
            self._failures.add(what)
            # Neither the message nor the values in a traceback: they may be what a caller said.
            place = traceback.extract_tb(error.__traceback__)[-1]
            logger.error(
                f"Roark: {what} is missing from the call record: "
                f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
            )


def open_folder(
    call_id: str, *, api_key: str | None, base_url: str | None, calls_dir: Path
) -> CallFolder:
    """Return the folder of this call in the process's outbox for `calls_dir`."""
    return outbox_for(calls_dir, api_key=api_key or None, base_url=base_url).open(call_id)


def redaction(wanted: Redact | bool | None) -> Redact | None:
    """The function that redacts, if any; where it fails, nothing of the text is kept."""
    if wanted is None:
        wanted = (setting("ROARK_REDACT") or "0").lower() not in ("0", "false", "no", "off")
    if not wanted:
        return None
    redact = wanted if callable(wanted) else card_and_phone_numbers

    def safely(text: str) -> str:
        try:
            return redact(text)
        except Exception as error:
            logger.error(f"Roark: redaction failed with {type(error).__name__}; a text is left out")
            return "[left out]"

    return safely


def field_of(thing: Any, name: str) -> Any:
    """A field of an object or mapping, None if there is none."""
    if isinstance(thing, Mapping):
        return thing.get(name)
    return getattr(thing, name, None)


def call_id_of(runner_args: Any) -> str:
    """WebRTC's peer id, else the runner's session id, else a new uuid."""
    peer = field_of(field_of(runner_args, "webrtc_connection"), "pc_id")
    return str(peer or field_of(runner_args, "session_id") or uuid4())


def circumstances(runner_args: Any) -> dict[str, str]:
    """What is known of a call before anybody says anything: version, transport, direction.

    The version is `APP_VERSION`, else the git commit of the folder the bot runs in, if there is
    one. The direction is "outbound" where the runner's body holds `dialout_settings` or says so
    itself (`direction`), "inbound" otherwise.
    """
    body = field_of(runner_args, "body")
    told = field_of(body, "direction") or (field_of(body, "dialout_settings") and "outbound")
    found = {
        "version": setting("APP_VERSION") or git_commit(Path.cwd()),
        "transport": transport_of(runner_args),
        "direction": str(told) if told else "inbound",
    }
    return {name: value for name, value in found.items() if value}


def transport_of(runner_args: Any) -> str | None:
    """The name of the runner's transport ("twilio", "webrtc", "daily"), None if it tells none."""
    if named := field_of(runner_args, "transport_type"):
        return str(named)
    fields = {"webrtc": "webrtc_connection", "daily": "room_url", "websocket": "websocket"}
    return next((name for name, field in fields.items() if field_of(runner_args, field)), None)


@cache
def git_commit(folder: Path) -> str | None:
    """The first 12 digits of the commit that `folder` or the one above is at; None without git."""
    for place in (folder / ".git", folder.parent / ".git"):
        try:
            head = (place / "HEAD").read_text().strip()
            if head.startswith("ref: "):
                name = head.removeprefix("ref: ")
                loose = place / name
                if loose.is_file():
                    head = loose.read_text().strip()
                else:
                    packed = (place / "packed-refs").read_text().splitlines()
                    head = next(line.split()[0] for line in packed if line.endswith(f" {name}"))
            return head[:12]
        except (OSError, StopIteration, ValueError):
            continue
    return None


def service_of(source: Any) -> str:
    for kind, name in ((STTService, "stt"), (LLMService, "llm"), (TTSService, "tts")):
        if isinstance(source, kind):
            return name
    return "other"


def flow_manager_of(source: FrameProcessor) -> Any:
    """The FlowManager of the worker that `source` runs in, None if it has none.

    Flows tells nobody which node it enters. Its manager knows (`current_node`), and is what the
    handler it gives to its worker is bound to; pipecat 1.14 has no public way to ask for either.
    """
    if "pipecat_flows" in sys.modules:
        warn_of_other_flows()
    flows = sys.modules.get("pipecat.flows")
    handlers = getattr(source.pipeline_worker, "_event_handlers", {}) if flows else {}
    for handler in getattr(handlers.get("on_frame_reached_downstream"), "handlers", ()):
        for value in inspect.getclosurevars(handler).nonlocals.values():
            if flows and isinstance(value, flows.FlowManager):
                return value
    return None


@cache
def warn_of_other_flows() -> None:
    """Say once that the nodes of this process's flows are not recorded, and what to do."""
    logger.warning(
        "Roark: nodes of the package pipecat-ai-flows are not recorded; import pipecat.flows, "
        "which is part of pipecat-ai, in its place"
    )


def as_text(value: Any, *, empty: str) -> str:
    """Roark's form of arguments and results: text as it is, objects and lists compact JSON."""
    if value is None:
        return empty
    if isinstance(value, str):
        return value or empty
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False, default=str)
    return str(value)


def redacted(value: Any, redact: Redact) -> Any:
    """Apply `redact` to every text, and to every number as text, in a JSON value."""
    if isinstance(value, Mapping):
        return {key: redacted(item, redact) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, redact) for item in value]
    if value is None or isinstance(value, bool):
        return value
    text = redact(str(value))
    return value if text == str(value) else text


def masked(event: Event) -> Event:
    """The event without what was said; the length stays, it decides how a cut is estimated."""
    if event["event"] in ("transcript", "typed", "say", "words"):
        return event | {"text": re.sub(r"\S", "*", event["text"])}
    return event
