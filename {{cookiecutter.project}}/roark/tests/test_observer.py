"""The observer in a running pipeline: what it tells, when, and that nothing stops it."""

import asyncio
import json
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from loguru import logger
from pipecat.adapters.llm.schemas.tools_schema import ToolsSchema
from pipecat.audio.dtmf.types import KeypadEntry
from pipecat.flows import FlowManager, NodeConfig
from pipecat.frames.frames import (
    BotStartedSpeakingFrame,
    EagerEndOfTurnCancelFrame,
    EndFrame,
    ErrorFrame,
    Frame,
    FunctionCallInProgressFrame,
    FunctionCallResultFrame,
    FunctionCallResultProperties,
    InputAudioRawFrame,
    InputDTMFFrame,
    InputTransportMessageFrame,
    InterruptionFrame,
    LLMContextFrame,
    LLMContextSummaryRequestFrame,
    LLMFullResponseStartFrame,
    LLMRunFrame,
    LLMSetToolsFrame,
    OutputAudioRawFrame,
    StartFrame,
    StopFrame,
    TranscriptionFrame,
    TTSAudioRawFrame,
    TTSSpeakFrame,
    TTSTextFrame,
    UserStartedSpeakingFrame,
    UserStoppedSpeakingFrame,
)
from pipecat.observers.base_observer import FramePushed
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.aggregators.dtmf_aggregator import DTMFAggregator
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
from pipecat.processors.audio.audio_buffer_processor import AudioBufferProcessor
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.processors.frameworks.rtvi import RTVIProcessor
from pipecat.processors.frameworks.rtvi import models as RTVI
from pipecat.services.llm_service import LLMService
from pipecat.services.settings import TTSSettings
from pipecat.services.tts_service import TTSService
from pipecat.transports.base_output import BaseOutputTransport
from pipecat.transports.base_transport import TransportParams
from pipecat.workers.runner import WorkerRunner

from roark.call import CallRecord
from roark.observer import RoarkObserver, call_id_of, git_commit

pytestmark = pytest.mark.anyio


class KeptCall:
    """A call folder that keeps everything in memory, in the order it came."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.started_body: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        self.chunks: dict[int, bytes] = {}
        self.ended_body: dict[str, Any] = {}
        self.record: dict[str, Any] = {}

    def started(self, body: dict[str, Any]) -> None:
        self.order.append("started")
        self.started_body = body

    def journal(self, event: dict[str, Any]) -> None:
        self.events.append(json.loads(json.dumps(event)))

    def chunk(self, index: int, pcm: bytes, sample_rate: int, num_channels: int) -> None:
        self.order.append(f"chunk {index}")
        self.chunks[index] = pcm

    def ended(self, body: dict[str, Any], record: dict[str, Any]) -> None:
        self.order.append("ended")
        self.ended_body = body
        self.record = record

    async def flush(self, timeout: float) -> None:
        self.order.append("flushed")

    @property
    def recording(self) -> bytes:
        return b"".join(self.chunks[index] for index in sorted(self.chunks))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> KeptCall:
    monkeypatch.setattr("roark.observer.GRACE_SECONDS", 0.01)
    return KeptCall()


def observer_of(call: KeptCall, **arguments: Any) -> RoarkObserver:
    return RoarkObserver(api_key="key", agent_id="agent", folder=call, **arguments)


async def run(
    observer: RoarkObserver,
    frames: Sequence[Frame],
    first: FrameProcessor | None = None,
    *,
    record: bool = True,
    end: bool = True,
    talk: Callable[[PipelineWorker], Awaitable[None]] | None = None,
) -> PipelineWorker:
    """Run frames through a real pipeline, to its end, which they bring about without `end`."""
    processors = [first or FramePasser(), *([observer.audio_processor] if record else [])]
    worker = PipelineWorker(
        Pipeline(processors),
        params=PipelineParams(audio_out_sample_rate=8000),
        observers=[observer],
        enable_rtvi=False,
    )
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)

    async def drive() -> None:
        if talk:
            await talk(worker)
        await worker.queue_frames([*frames, *([EndFrame()] if end else [])])

    await asyncio.wait_for(asyncio.gather(drive(), runner.run()), 10)
    return worker


class FramePasser(FrameProcessor):
    """A processor that only passes frames on."""

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        await self.push_frame(frame, direction)


def transcription(text: str) -> TranscriptionFrame:
    return TranscriptionFrame(text, "", "2026-01-01T00:00:00Z")


CONVERSATION = [
    UserStartedSpeakingFrame(),
    transcription("Hello."),
    UserStoppedSpeakingFrame(),
    BotStartedSpeakingFrame(),
]


async def test_a_call_is_told_in_order_start_audio_end(call):
    observer = observer_of(call)
    audio = InputAudioRawFrame(b"\1\1" * 160, 8000, 1)
    await run(observer, [audio, transcription("Hello.")])
    await observer.aflush()
    assert call.order[0] == "started"
    assert call.order[1:3] == ["chunk 0", "ended"]
    assert call.started_body["pipecatCallId"] == observer.pipecat_call_id
    assert call.ended_body["callEndedReason"] == "agent-ended"
    assert call.ended_body["transcript"][0]["content"] == "Hello."
    assert call.ended_body["recordingSampleRate"] == 8000


async def test_the_observer_sees_the_start_frame_of_a_running_pipeline(call):
    await run(observer_of(call), [])
    assert "started" in [event["event"] for event in call.events]


async def test_without_the_recorder_in_the_pipeline_there_are_no_recording_fields(call):
    observer = observer_of(call)
    await run(observer, [InputAudioRawFrame(b"\1\1" * 160, 8000, 1)], record=False)
    await observer.aflush()
    assert not {"recordingSampleRate", "recordingNumChannels"} & call.ended_body.keys()
    assert call.chunks == {}


async def test_the_journal_replays_to_the_record(call):
    observer = observer_of(call)
    await run(observer, [*CONVERSATION])
    await observer.aflush()
    assert CallRecord.replay(call.events).call_ended() == call.ended_body


async def test_flushing_twice_tells_the_end_once(call):
    observer = observer_of(call)
    await run(observer, [])
    await observer.aflush()
    await observer.aflush(reason="signal")
    assert call.order.count("ended") == 1


async def test_a_pipeline_that_nobody_flushes_is_told_all_the_same(call):
    await run(observer_of(call), [transcription("Hello.")])
    assert "ended" in call.order


async def test_a_call_that_never_started_is_told_with_its_reason(call):
    observer = observer_of(call)
    observer.note_ending("error", "no room")
    await observer.aflush()
    assert call.order == ["started", "ended", "flushed"]
    assert call.ended_body["callEndedReason"] == "error"
    assert call.record["ending"] == {"reason": "error", "detail": "no room"}


def pushed(frame: Frame, at_ms: float = 0, source: Any = None, up: bool = False) -> FramePushed:
    direction = FrameDirection.UPSTREAM if up else FrameDirection.DOWNSTREAM
    return FramePushed(source, source, frame, direction, int(at_ms * 1e6))


async def test_a_handler_that_fails_does_not_cost_the_next_frame(call):
    observer = observer_of(call)
    await observer.on_push_frame(pushed(StartFrame()))
    await observer.on_push_frame(pushed(TranscriptionFrame(None, "", "")))  # pyright: ignore
    await observer.on_push_frame(pushed(transcription("Hello.")))
    await observer.on_push_frame(pushed(EndFrame()))
    await observer.aflush()
    assert call.ended_body["transcript"][0]["content"] == "Hello."


async def test_a_handler_that_fails_says_where_and_not_what(call):
    said: list[str] = []
    sink = logger.add(said.append, format="{message}{exception}", diagnose=True, backtrace=True)
    observer = observer_of(call)
    broken = transcription("My secret.")
    del broken.includes_inter_frame_spaces
    await observer.on_push_frame(pushed(broken))
    await observer.on_push_frame(pushed(broken))
    logger.remove(sink)
    assert len(said) == 1
    assert "TranscriptionFrame" in said[0]
    assert "secret" not in said[0]


async def test_times_are_those_of_the_push_and_not_of_the_handling(call):
    observer = observer_of(call)
    await observer.on_push_frame(pushed(StartFrame()))
    await observer.on_push_frame(pushed(UserStartedSpeakingFrame(), 1000))
    await observer.on_push_frame(pushed(transcription("Hello."), 1500))
    await observer.on_push_frame(pushed(UserStoppedSpeakingFrame(), 2000))
    await observer.on_push_frame(pushed(EndFrame(), 2500))
    await observer.aflush()
    [turn] = call.record["turns"]
    assert (turn["start_ms"], turn["end_ms"]) == (1000.0, 2000.0)


@pytest.mark.parametrize("frames", [[], [StartFrame(), EndFrame()]], ids=["never started", "held"])
async def test_a_clock_that_is_set_back_ends_no_call_before_it_began(call, frames, monkeypatch):
    observer = observer_of(call)
    hours_ago = time.time_ns() - 2 * 3600 * 10**9
    monkeypatch.setattr("roark.observer.time.time_ns", lambda: hours_ago)
    for frame in frames:
        await observer.on_push_frame(pushed(frame))
    await observer.aflush()
    made, *later = (event["at"] for event in call.events)
    assert all(made <= at < made + 60 * 10**9 for at in later)
    assert call.ended_body["callStartedAt"] <= call.ended_body["callEndedAt"]


async def test_a_frame_sent_both_ways_counts_once(call):
    down = FunctionCallInProgressFrame("book", "t1", {"seats": 2})
    up = FunctionCallInProgressFrame("book", "t1", {"seats": 2})
    down.broadcast_sibling_id, up.broadcast_sibling_id = up.id, down.id
    observer = observer_of(call)
    await observer.on_push_frame(pushed(down))
    await observer.on_push_frame(pushed(up, up=True))
    assert [event["event"] for event in call.events] == ["call", "tool"]


async def test_requests_to_the_llm_are_told_apart_and_the_news_of_what_was_said_is_none(call):
    context = LLMContext()
    provisional = LLMContextFrame(LLMContext(), speculation=True)
    summary = LLMContextSummaryRequestFrame("s", context, 3, 2000, "Sum up.")
    observer = observer_of(call)
    users, assistants = LLMContextAggregatorPair(context)
    for source, frame, up in (
        (users, provisional, False),
        (users, EagerEndOfTurnCancelFrame(), False),
        (users, LLMContextFrame(context), False),
        # After a tool; then when the bot has spoken.
        (assistants, LLMContextFrame(context), True),
        (assistants, LLMContextFrame(context), False),
        (assistants, summary, True),
    ):
        await observer.on_push_frame(pushed(frame, up=up, source=source))
    told = [(event["event"], event.get("kind")) for event in call.events[1:]]
    assert told == [
        *[("request", "speculation"), ("withdrawn", None), ("request", "answer")],
        *[("request", "answer"), ("request", "summary")],
    ]


async def test_keys_are_a_turn_from_the_first_one_pressed(call):
    observer = observer_of(call)
    keys = [InputDTMFFrame(button=KeypadEntry(key)) for key in "22#"]
    await run(observer, [transcription("Hello."), *keys], DTMFAggregator())
    [first, *_] = [event for event in call.events if event["event"] == "typed"]
    assert (first["text"], first["via"]) == ("DTMF: 22#", "keys")
    assert first["since"] <= first["at"]
    assert [turn["text"] for turn in call.record["turns"]] == ["Hello.", "DTMF: 22#"]


async def test_text_that_a_client_sends_is_recorded_once_and_told_to_roark(call):
    observer = observer_of(call)
    rtvi = RTVIProcessor()
    message = RTVI.Message(
        id="1",
        type="send-text",
        label=RTVI.MESSAGE_LABEL,
        data={"content": "A table.", "options": {"run_immediately": False}},
    )
    await run(observer, [InputTransportMessageFrame(message=message.model_dump())], rtvi)
    [turn] = call.record["turns"]
    assert (turn["role"], turn["text"], turn["via"]) == ("user", "A table.", "text")
    assert [said["content"] for said in call.ended_body["transcript"]] == ["A table."]


async def test_a_client_that_disconnects_the_bot_ended_the_call(call):
    observer = observer_of(call)
    message = {"id": "1", "type": "disconnect-bot", "label": RTVI.MESSAGE_LABEL}
    leaves = InputTransportMessageFrame(message=message)
    await run(observer, [leaves], RTVIProcessor(), end=False)
    assert call.ended_body["callEndedReason"] == "client-disconnected"
    assert call.record["ending"]["detail"] == "the client asked the bot to leave"


async def test_a_tool_that_is_not_there_did_not_complete(call):
    observer = observer_of(call)
    missing = LLMService.MISSING_FUNCTION_CALL_MESSAGE_TEMPLATE.format(function_name="book")
    await observer.on_push_frame(pushed(FunctionCallInProgressFrame("book", "t1", {})))
    await observer.on_push_frame(pushed(FunctionCallResultFrame("book", "t1", {}, missing)))
    await observer.aflush()
    [tool] = call.record["tools"]
    assert (tool["status"], tool["error"]) == ("failed", missing)


async def test_a_tool_that_returns_an_error_failed_and_its_result_is_told_as_it_is(call):
    observer = observer_of(call)
    result = {"error": "no table", "next": "21:00"}
    await observer.on_push_frame(pushed(FunctionCallInProgressFrame("book", "t1", {})))
    await observer.on_push_frame(pushed(FunctionCallResultFrame("book", "t1", {}, result)))
    await observer.aflush()
    assert call.record["tools"][0]["status"] == "failed"
    assert call.ended_body["toolCalls"][1]["content"] == '{"error":"no table","next":"21:00"}'


async def test_a_call_carries_values_of_ones_own_and_they_stay_here(call, monkeypatch):
    monkeypatch.setenv("APP_VERSION", "2026.11")
    observer = observer_of(call, runner_args=SimpleNamespace(transport_type="twilio", body={}))
    await observer.on_push_frame(pushed(StartFrame()))
    observer.annotate(customer=7, tags=["new"])
    observer.annotate(customer=8, when=Path("x"))
    await observer.aflush()
    assert call.record["metadata"] == {
        "version": "2026.11",
        "transport": "twilio",
        "direction": "inbound",
        "customer": 8,
        "tags": ["new"],
        "when": "x",
    }
    assert "customer" not in json.dumps([call.started_body, call.ended_body])


def test_the_version_is_the_commit_of_the_folder(tmp_path):
    git = tmp_path / ".git"
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert git_commit(tmp_path / "nowhere") is None
    (git / "packed-refs").write_text(f"# packed\n{'a' * 40} refs/heads/main\n")
    assert git_commit(tmp_path) == "a" * 12
    (git / "refs/heads/main").write_text("b" * 40)
    git_commit.cache_clear()
    assert git_commit(tmp_path / "project") == "b" * 12


@pytest.mark.parametrize(
    ("result", "content"),
    [
        ({"ok": True, "at": [1, 2]}, '{"ok":true,"at":[1,2]}'),
        ("done", "done"),
        (None, ""),
        (7, "7"),
        (True, "True"),
    ],
)
async def test_results_take_roarks_form(call, result, content):
    observer = observer_of(call)
    await observer.on_push_frame(pushed(FunctionCallInProgressFrame("book", "t1", None)))
    await observer.on_push_frame(pushed(FunctionCallResultFrame("book", "t1", None, result)))
    await observer.aflush()
    told, answer = call.ended_body["toolCalls"]
    assert (told["arguments"], answer["content"]) == ("{}", content)


async def test_an_intermediate_result_is_an_update(call):
    observer = observer_of(call)
    await observer.on_push_frame(pushed(FunctionCallInProgressFrame("search", "t1", {})))
    half = FunctionCallResultFrame(
        "search", "t1", {}, "half", properties=FunctionCallResultProperties(is_final=False)
    )
    await observer.on_push_frame(pushed(half))
    await observer.aflush()
    assert len(call.ended_body["toolCalls"]) == 1


async def test_a_frame_type_of_ones_own_is_handled_like_its_parent(call):
    class MyTranscription(TranscriptionFrame):
        pass

    observer = observer_of(call)
    await observer.on_push_frame(pushed(MyTranscription("Hello.", "", "")))
    assert [event["event"] for event in call.events] == ["call", "transcript"]


async def test_an_error_is_kept_with_the_processor_it_came_from(call):
    observer = observer_of(call)
    await observer.on_push_frame(pushed(ErrorFrame("no key"), source="STT#0"))
    await observer.aflush()
    [error] = call.record["errors"]
    assert (error["processor"], error["message"]) == ("STT#0", "no key")


CONNECTION = SimpleNamespace(pc_id="SmallWebRTCConnection#0-1")


@pytest.mark.parametrize(
    ("runner_args", "expected"),
    [
        (SimpleNamespace(webrtc_connection=CONNECTION, session_id="s"), CONNECTION.pc_id),
        ({"webrtc_connection": {"pc_id": "pc"}, "session_id": "s"}, "pc"),
        (SimpleNamespace(session_id="s"), "s"),
        ({"session_id": "s"}, "s"),
    ],
)
def test_the_call_id_is_the_peers_or_the_sessions(runner_args, expected):
    assert call_id_of(runner_args) == expected


def test_without_either_every_call_gets_an_id_of_its_own():
    assert call_id_of(None) != call_id_of(object())


async def test_an_explicit_call_id_comes_first(call):
    assert (
        observer_of(call, pipecat_call_id="x", runner_args={"session_id": "s"}).pipecat_call_id
        == "x"
    )


async def test_phone_numbers_are_read_when_the_call_starts(call):
    runner_args = SimpleNamespace(session_id="s", call_data=None)
    observer = observer_of(call, runner_args=runner_args)
    runner_args.call_data = SimpleNamespace(
        call_id="CA1", stream_id="MZ1", from_number="+1", to_number=None
    )
    await observer.on_push_frame(pushed(StartFrame()))
    await observer.on_push_frame(pushed(EndFrame()))
    await observer.aflush()
    assert call.record["phone"] == {"call_id": "CA1", "stream_id": "MZ1", "from_number": "+1"}


async def test_a_twilio_call_over_a_sip_trunk_keeps_its_sip_ids_and_nothing_else(call):
    brought = {"SipCallId": "a84b@10.0.0.1", "SipHeader_X-Customer": "7", "token": "secret"}
    call_data = SimpleNamespace(call_id="CA1", stream_id="MZ1", body=brought)
    observer = observer_of(call, runner_args=SimpleNamespace(call_data=call_data))
    await observer.aflush()
    assert call.record["phone"] == {
        "call_id": "CA1",
        "stream_id": "MZ1",
        "sip_call_id": "a84b@10.0.0.1",
        "sip_headers": {"X-Customer": "7"},
    }


async def test_a_dial_in_is_kept_without_the_key_that_comes_with_it(call):
    headers = {"X-Customer": "7"}
    settings = {"From": "+1", "To": "+2", "call_id": "d", "call_domain": "x"}
    settings |= {"sip_headers": headers, "token": "secret"}
    body = {"dialin_settings": settings, "daily_api_key": "secret"}
    observer = observer_of(call, runner_args=SimpleNamespace(session_id="s", body=body))
    await observer.aflush()
    assert call.record["phone"] == {
        "call_id": "d",
        "sip_headers": headers,
        "from_number": "+1",
        "to_number": "+2",
        "call_domain": "x",
    }
    assert "secret" not in json.dumps([call.events, call.record])


async def test_what_is_redacted_is_neither_written_nor_sent(call):
    observer = observer_of(call, redact=lambda text: text.replace("4111", "[card]"))
    await observer.on_push_frame(pushed(StartFrame()))
    await observer.on_push_frame(pushed(UserStartedSpeakingFrame()))
    await observer.on_push_frame(pushed(transcription("My card is 4111.")))
    await observer.on_push_frame(pushed(UserStoppedSpeakingFrame()))
    tool = FunctionCallInProgressFrame("pay", "t1", {"card": 4111, "to": "4111"})
    await observer.on_push_frame(pushed(tool))
    await observer.on_push_frame(pushed(EndFrame()))
    await observer.aflush()
    everything = json.dumps([call.events, call.ended_body, call.record])
    assert "4111" not in everything
    assert call.ended_body["transcript"][0]["content"] == "My card is [card]."
    assert call.ended_body["toolCalls"][0]["arguments"] == '{"card":"[card]","to":"[card]"}'

    killed = CallRecord.replay(call.events[:-1])
    killed.close("process-died")
    assert killed.call_ended()["transcript"][0]["content"] == "My card is [card]."


@pytest.mark.parametrize("first", ["with functions", "without"])
async def test_the_nodes_of_a_flow_are_noticed(call, first, monkeypatch):
    """A real manager on a real worker; the LLM is a processor that only says it begins."""

    class Begins(FramePasser):
        async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
            await super().process_frame(frame, direction)
            if isinstance(frame, LLMRunFrame):
                await self.push_frame(LLMFullResponseStartFrame())

    async def choose(flow_manager: FlowManager) -> tuple[None, NodeConfig]:
        """Go on to the end."""
        return None, NodeConfig(name="end", task_messages=[])

    async def talk(worker: PipelineWorker) -> None:
        manager = FlowManager(worker=worker, llm=None, context_aggregator=None)  # pyright: ignore
        start = NodeConfig(name="start", task_messages=[])
        if first == "with functions":
            start["functions"] = [choose]
        await manager.initialize(start)
        await noticed.wait()
        await manager.set_node_from_config((await choose(manager))[1])

    def journal(event: dict[str, Any]) -> None:
        KeptCall.journal(call, event)
        if event["event"] == "node":
            noticed.set()

    noticed = asyncio.Event()
    monkeypatch.setattr(call, "journal", journal)
    observer = observer_of(call)
    await run(observer, [], Begins(), talk=talk)
    await observer.aflush()
    assert [node["name"] for node in call.record["nodes"]] == ["start", "end"]


class FlatVoice(TTSService):
    """A voice without word timestamps: 15 characters a second, all of it at once."""

    def __init__(self) -> None:
        settings = TTSSettings(model=None, voice=None, language=None)
        super().__init__(push_start_frame=True, push_stop_frames=True, settings=settings)

    async def run_tts(self, text: str, context_id: str) -> AsyncGenerator[Frame, None]:
        for _ in range(len(text)):
            tone = b"\0\x20" * (8000 // 15)
            yield TTSAudioRawFrame(tone, 8000, 1, context_id=context_id)


class Loudspeaker(BaseOutputTransport):
    """An output transport that plays in real time; `played` is set after so many seconds.

    `began` and `interrupted` are when, on the clock.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(TransportParams(audio_out_enabled=True, audio_out_sample_rate=8000))
        self.played = asyncio.Event()
        self.began = self.interrupted = 0.0
        self._seconds = seconds
        self._due = 0.0

    async def start(self, frame: StartFrame) -> None:
        await super().start(frame)
        await self.set_transport_ready(frame)

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, InterruptionFrame):
            self.interrupted = time.monotonic()

    async def write_audio_frame(self, frame: OutputAudioRawFrame) -> bool:
        now = time.monotonic()
        self.began = self.began or now
        self._due = (self._due or now) + frame.num_frames / frame.sample_rate
        await asyncio.sleep(max(0.0, self._due - now))
        if time.monotonic() >= self.began + self._seconds:
            self.played.set()
        return True


@pytest.mark.slow
async def test_a_voice_without_word_timestamps_is_cut_where_it_was_interrupted(call):
    observer = observer_of(call)
    loudspeaker = Loudspeaker(1.0)
    sentence = "We are open every day until nine in the evening."
    worker = PipelineWorker(
        Pipeline([FlatVoice(), loudspeaker, observer.audio_processor]),
        params=PipelineParams(audio_out_sample_rate=8000),
        observers=[observer],
        enable_rtvi=False,
    )
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)

    asked = 0.0

    async def interrupt() -> None:
        nonlocal asked
        await loudspeaker.played.wait()
        asked = time.monotonic()
        await worker.queue_frames([InterruptionFrame(), EndFrame()])

    await worker.queue_frame(TTSSpeakFrame(sentence))
    await asyncio.wait_for(asyncio.gather(runner.run(), interrupt()), 20)
    [turn] = call.record["turns"]
    assert turn["estimated_cut"] is True
    seconds = (turn["end_ms"] - turn["start_ms"]) / 1000
    # On a busy machine the interruption takes its time.
    assert asked - 0.1 < loudspeaker.began + seconds < loudspeaker.interrupted + 0.1
    assert sentence.startswith(turn["text"])
    assert len(turn["text"]) / 15 == pytest.approx(seconds, abs=0.4), "to the nearest word"


class Holder(FrameProcessor):
    """Lets no sound and no word through; `sound` and `words` are set once one has come."""

    def __init__(self) -> None:
        super().__init__()
        self.sound, self.words = asyncio.Event(), asyncio.Event()

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        match frame:
            case TTSAudioRawFrame():
                self.sound.set()
            case TTSTextFrame():
                self.words.set()
            case _:
                await self.push_frame(frame, direction)


def loudspeaker_without_sound() -> BaseOutputTransport:
    loudspeaker = Loudspeaker(0.0)
    loudspeaker._params.audio_out_enabled = False
    return loudspeaker


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (FramePasser, ["Hello."]),
        (loudspeaker_without_sound, ["Hello."]),
        (lambda: Loudspeaker(0.0), []),
    ],
    ids=["no output transport", "one without sound", "one with sound"],
)
async def test_what_is_held_before_the_output_transport_was_not_said(call, output, said):
    observer = observer_of(call)
    holder = Holder()
    worker = PipelineWorker(
        Pipeline([FlatVoice(), holder, output(), observer.audio_processor]),
        params=PipelineParams(audio_out_sample_rate=8000),
        observers=[observer],
        enable_rtvi=False,
    )
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)

    async def hang_up() -> None:
        await holder.sound.wait()
        await holder.words.wait()
        await worker.cancel()

    await worker.queue_frame(TTSSpeakFrame("Hello."))
    await asyncio.wait_for(asyncio.gather(runner.run(), hang_up()), 30)
    await observer.aflush()
    assert [turn["text"] for turn in call.record["turns"]] == said
    assert CallRecord.replay(call.events).as_dict()["turns"] == call.record["turns"]
    told = [event for event in call.events if event["event"] == "output"]
    assert len(told) == (0 if said else 1)


async def test_the_end_that_follows_a_lost_service_is_an_error(call):
    observer = observer_of(call)
    stt = SimpleNamespace(is_usable=False)
    await observer.on_push_frame(pushed(ErrorFrame("401"), source=stt))
    await observer.on_push_frame(pushed(EndFrame()))
    await observer.aflush()
    assert call.ended_body["callEndedReason"] == "error"


async def test_a_flush_before_the_end_waits_for_the_chunks_that_follow(call):
    observer = observer_of(call)
    flushed_early = asyncio.Event()

    class FlushesEarly(FramePasser):
        async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
            await super().process_frame(frame, direction)
            if isinstance(frame, TranscriptionFrame):
                await observer.aflush(reason="client-disconnected")
                assert "ended" not in call.order
                flushed_early.set()

    audio = InputAudioRawFrame(b"\1\1" * 160, 8000, 1)
    await run(observer, [audio, transcription("Bye.")], FlushesEarly())
    assert flushed_early.is_set()
    assert call.order.index("ended") > call.order.index("chunk 0")


async def test_a_text_whose_redaction_fails_is_left_out(call):
    def fails(text: str) -> str:
        raise LookupError(text)

    observer = observer_of(call, redact=fails)
    await observer.on_push_frame(pushed(transcription("My card is 4111.")))
    await observer.aflush()
    assert call.ended_body["transcript"][0]["content"] == "[left out]"
    assert "4111" not in json.dumps([call.events, call.record])


async def test_redaction_can_be_switched_on_by_the_environment(call, monkeypatch):
    monkeypatch.setenv("ROARK_REDACT", "1")
    observer = observer_of(call)
    await observer.on_push_frame(pushed(transcription("Call +1 415 555 0132.")))
    await observer.aflush()
    assert call.ended_body["transcript"][0]["content"] == "Call [phone]."
    assert "0132" not in json.dumps(call.events)


async def test_a_recorder_of_ones_own_is_used_as_given(call):
    processor = AudioBufferProcessor(num_channels=2, buffer_size=1600)
    observer = observer_of(call, audio_buffer_processor=processor)
    assert observer.audio_processor is processor
    frames = [OutputAudioRawFrame(b"\1\1" * 160, 8000, 1) for _ in range(20)]
    await run(observer, frames)
    await observer.aflush()
    assert sorted(call.chunks) == list(range(len(call.chunks)))
    assert len(call.recording) == 20 * 160 * 4
    assert call.ended_body["recordingNumChannels"] == 2


async def test_markers_on_a_recorder_of_ones_own_count_from_its_first_frame(call):
    """One chunk at the end of the call, long after the microphone stopped."""
    processor = AudioBufferProcessor(num_channels=2, sample_rate=8000)
    observer = observer_of(call, audio_buffer_processor=processor)
    second = InputAudioRawFrame(b"\1\1" * 8000, 8000, 1)
    await observer.on_push_frame(pushed(StartFrame()))
    for at_ms in (2000, 3000, 4000):
        await observer.on_push_frame(pushed(second, at_ms))
    await observer.on_push_frame(pushed(UserStartedSpeakingFrame(), 1500))
    await observer.on_push_frame(pushed(transcription("Hello."), 2600))
    await observer.on_push_frame(pushed(UserStoppedSpeakingFrame(), 2500))
    await processor._call_event_handler("on_audio_data", b"\1\1" * 48000, 8000, 2)
    await asyncio.sleep(0)
    await observer.on_push_frame(pushed(EndFrame(), 60_000))
    await observer.aflush()
    [turn] = call.record["turns"]
    assert (turn["start_ms"], turn["end_ms"]) == (500.0, 1500.0)


async def test_a_recorder_of_ones_own_gives_out_its_last_chunk_where_no_end_frame_comes(call):
    processor = AudioBufferProcessor(num_channels=2, sample_rate=8000, buffer_size=0)
    observer = observer_of(call, audio_buffer_processor=processor)
    audio = OutputAudioRawFrame(b"\1\1" * 160, 8000, 1)
    await run(observer, [audio, audio, StopFrame()], end=False)
    await observer.aflush()
    assert len(call.recording) == 2 * 160 * 4
    assert call.ended_body["recordingSampleRate"] == 8000


async def test_handlers_of_the_recorders_audio_get_every_chunk(call):
    observer = observer_of(call)
    heard: list[bytes] = []

    @observer.audio_processor.event_handler("on_audio_data")
    async def on_audio_data(_, pcm: bytes, sample_rate: int, num_channels: int) -> None:
        assert (sample_rate, num_channels) == (8000, 2)
        heard.append(pcm)

    await run(observer, [InputAudioRawFrame(b"\1\1" * 160, 8000, 1)])
    assert heard
    assert b"".join(heard) == call.recording


async def test_flows_of_the_other_package_are_warned_of_once(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "pipecat_flows", ModuleType("pipecat_flows"))
    monkeypatch.delitem(sys.modules, "pipecat.flows")
    said: list[str] = []
    sink = logger.add(said.append, format="{message}")
    for _ in range(2):
        observer = observer_of(call)
        await observer.on_push_frame(pushed(LLMSetToolsFrame(tools=ToolsSchema(standard_tools=[]))))
    logger.remove(sink)
    assert [text for text in said if "import pipecat.flows" in text] == said[:1]
    assert len(said) == 1
