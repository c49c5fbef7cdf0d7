"""The other recognisers' wires, as Pipecat's own classes see them: healthy, then failing."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from pipecat.frames.frames import (
    InputAudioRawFrame,
    InterimTranscriptionFrame,
    LLMContextAssistantTurnFrame,
    TranscriptionFrame,
    VADUserStartedSpeakingFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.services.assemblyai.stt import AssemblyAISTTService
from pipecat.services.openai.stt import OpenAIRealtimeSTTService
from pipecat.services.stt_service import STTService
from pipecat.transcriptions.language import Language
from pipecat.utils.errors import ErrorCategory
from pipecat.utils.time import time_now_iso8601

import services
from rehearsal.engines.scripted import Script, ScriptedEngine
from rehearsal.providers.assemblyai import AssemblyAIServer
from rehearsal.providers.faults import ALWAYS, Faults
from rehearsal.providers.openai_stt import OpenAIListenServer
from rehearsal.providers.server import Connection, ProviderServer, WireLog
from rehearsal.tests.service_pipeline import SAMPLE_RATE, Line, line, spoken

pytestmark = pytest.mark.anyio

KEY = "a-secret-of-the-bot"
PHONE_HZ = 8000
CreateSTT = Callable[[dict[str, str]], STTService]


def assemblyai(environment: dict[str, str]) -> STTService:
    return AssemblyAISTTService(
        api_key=KEY,
        api_endpoint_base_url=environment["ASSEMBLYAI_BASE_URL"],
        settings=AssemblyAISTTService.Settings(language_codes=[Language.DE]),
    )


def openai(environment: dict[str, str]) -> STTService:
    return OpenAIRealtimeSTTService(
        api_key=KEY,
        base_url=environment["OPENAI_STT_BASE_URL"],
        settings=OpenAIRealtimeSTTService.Settings(language=Language.DE),
    )


@dataclass
class Wire:
    """A provider, a service that is to hear through it, and what passes between them."""

    server: ProviderServer
    log: WireLog
    stt: STTService
    connects: int = 0

    @property
    def statuses(self) -> list[int | None]:
        return [request.status for request in self.server.requests]

    @property
    def connection(self) -> Connection:
        return self.server.connections[-1]

    async def until_connected(self, times: int = 1) -> None:
        """Wait until the service has connected this often and sends what it is given."""
        await self.log.until(lambda: self.connects == times, within_s=20)

    async def until_received(self, kind: str) -> None:
        await self.log.until(lambda: kind in kinds(self.connection.received))


@asynccontextmanager
async def wire(create_stt: CreateSTT, faults: Faults | None = None) -> AsyncIterator[Wire]:
    log = WireLog()
    engine = ScriptedEngine(Script(hears=("I am calling.", "Bye.")))
    servers: dict[CreateSTT, ProviderServer] = {
        assemblyai: AssemblyAIServer(engine, log, faults),
        openai: OpenAIListenServer(engine, log, faults),
    }
    server = servers[create_stt]
    await server.start()
    wire = Wire(server, log, create_stt(server.environment))

    @wire.stt.event_handler("on_connected")
    async def on_connected(_stt: STTService) -> None:
        wire.connects += 1
        log.changed()

    try:
        yield wire
    finally:
        await server.aclose()


def projects_own(kind: type[STTService], ear: Wire, monkeypatch: pytest.MonkeyPatch) -> STTService:
    """Return what services.py builds, pointed at this wire; skip where that is another class."""
    for name, value in ear.server.environment.items():
        monkeypatch.setenv(name, value)
    stt = services.create_stt()
    if not isinstance(stt, kind):
        pytest.skip("this project hears with another recogniser")
    return stt


def kinds(messages: list[dict[str, object]]) -> list[object]:
    return [message["type"] for message in messages]


def finals(call: Line) -> list[str]:
    return [frame.text for frame in call.of(TranscriptionFrame)]


def interims(call: Line) -> list[str]:
    return [frame.text for frame in call.of(InterimTranscriptionFrame)]


async def speak_twice(call: Line, sample_rate: int = SAMPLE_RATE) -> None:
    await call.send(*await spoken(sample_rate=sample_rate))
    await call.until(lambda: len(finals(call)) == 1)
    again = VADUserStartedSpeakingFrame(start_secs=0.2)
    await call.send(again, *await spoken(sample_rate=sample_rate))
    await call.until(lambda: len(finals(call)) == 2)


BOTH = pytest.mark.parametrize("create_stt", [assemblyai, openai])


@BOTH
@pytest.mark.parametrize("sample_rate", [SAMPLE_RATE, PHONE_HZ])
async def test_what_the_script_says_is_heard_when_somebody_spoke(
    create_stt: CreateSTT, sample_rate: int
) -> None:
    async with wire(create_stt) as ear, line(ear.stt, sample_rate=sample_rate) as call:
        await ear.until_connected()
        await speak_twice(call, sample_rate)
    assert finals(call) == ["I am calling.", "Bye."]
    assert interims(call)[0] == "I"
    assert call.errors == []
    (connection,) = ear.server.connections
    assert connection.request.key == KEY
    assert KEY not in repr(connection.request)
    assert ear.statuses == [101]


async def test_assemblyai_leaves_the_turns_to_the_bot_and_asks_for_each_transcript() -> None:
    """It is told the language, the phone's sample rate, and to wait for no more than a breath."""
    async with wire(assemblyai) as ear, line(ear.stt, sample_rate=PHONE_HZ) as call:
        await ear.until_connected()
        await speak_twice(call, PHONE_HZ)
    query = ear.connection.request.query
    assert query["sample_rate"] == str(PHONE_HZ)
    assert query["encoding"] == "pcm_s16le"
    assert query["language_codes"] == '["de"]'
    assert query["speech_model"] == "universal-3-6-pro"
    assert query["min_turn_silence"] == query["max_turn_silence"] == "100"
    assert [frame.finalized for frame in call.of(TranscriptionFrame)] == [True, True]
    assert kinds(ear.connection.received) == ["ForceEndpoint", "ForceEndpoint", "Terminate"]
    turns = [message for message in ear.connection.sent if message["type"] == "Turn"]
    assert [turn["turn_order"] for turn in turns] == [0, 0, 1, 1]
    assert [turn["end_of_turn"] for turn in turns] == [False, True, False, True]
    opening, *_ = kinds(ear.connection.sent)
    assert opening == "Begin"
    assert kinds(ear.connection.sent).count("SpeechStarted") == 2


async def test_assemblyai_says_when_the_speech_was() -> None:
    """In milliseconds of the audio received: half a second of silence, then speech."""
    async with wire(assemblyai) as ear, line(ear.stt) as call:
        await ear.until_connected()
        await call.send(*await spoken("measured"))
        await call.until(lambda: finals(call))
    result: Any = call.of(TranscriptionFrame)[0].result
    first, *_, last = result.words
    assert first.text == "I"
    assert first.start == pytest.approx(500, abs=11)
    assert last.end - first.start == pytest.approx(8 * 30, abs=21)
    assert last.word_is_final


async def test_assemblyai_is_told_what_the_bot_said() -> None:
    """Pipecat does so by itself; it helps to make out short answers."""
    async with wire(assemblyai) as ear, line(ear.stt) as call:
        await ear.until_connected()
        await call.send(LLMContextAssistantTurnFrame("Your name?", time_now_iso8601()))
        await ear.until_received("UpdateConfiguration")
    assert ear.connection.received[0]["agent_context"] == "Your name?"


async def test_assemblyai_counts_the_audio_of_a_session_it_is_asked_to_end() -> None:
    async with wire(assemblyai) as ear, line(ear.stt) as call:
        await ear.until_connected()
        await call.send(*await spoken())
        await call.until(lambda: finals(call))
    goodbye = ear.connection.sent[-1]
    assert goodbye["type"] == "Termination"
    seconds = ear.connection.audio_bytes / 2 / SAMPLE_RATE
    assert goodbye["audio_duration_seconds"] == pytest.approx(seconds)
    assert seconds > 1
    assert goodbye["session_duration_seconds"] > 0


async def test_openai_is_asked_for_24_khz_and_leaves_the_turns_to_the_bot() -> None:
    """Pipecat resamples what comes from a phone."""
    async with wire(openai) as ear, line(ear.stt, sample_rate=PHONE_HZ) as call:
        await ear.until_connected()
        await speak_twice(call, PHONE_HZ)
    assert ear.connection.request.query == {"intent": "transcription"}
    update, *commits = ear.connection.received
    assert update["session"]["audio"]["input"] == {
        "format": {"type": "audio/pcm", "rate": 24000},
        "transcription": {"model": "gpt-realtime-whisper", "language": "de"},
        "turn_detection": None,
    }
    assert kinds(commits) == ["input_audio_buffer.commit"] * 2
    phone = sum(len(frame.audio) for frame in call.of(InputAudioRawFrame))
    assert ear.connection.audio_bytes == pytest.approx(phone * 3, rel=0.05)


async def test_openais_interim_transcripts_hold_only_what_is_new() -> None:
    """And Pipecat takes none of its transcripts for the last of a turn."""
    async with wire(openai) as ear, line(ear.stt) as call:
        await ear.until_connected()
        await speak_twice(call)
    assert interims(call) == ["I", " am calling.", "Bye."]
    assert not any(frame.finalized for frame in call.of(TranscriptionFrame))


async def test_the_projects_openai_ends_turns_at_once_and_its_interim_transcripts_grow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with wire(openai) as ear:
        stt = projects_own(OpenAIRealtimeSTTService, ear, monkeypatch)
        async with line(stt) as call:
            await ear.log.until(lambda: ear.server.connections and ear.connection.received)
            await speak_twice(call)
    assert interims(call) == ["I", "I am calling.", "Bye."]
    assert [frame.finalized for frame in call.of(TranscriptionFrame)] == [True, True]


async def test_the_projects_assemblyai_is_told_which_language_is_spoken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with wire(assemblyai) as ear:
        monkeypatch.setenv("ASSEMBLYAI_LANGUAGE", "fr")
        stt = projects_own(AssemblyAISTTService, ear, monkeypatch)
        async with line(stt):
            await ear.log.until(lambda: ear.server.connections)
    assert ear.connection.request.query["language_codes"] == '["fr"]'


@BOTH
async def test_silence_brings_forth_no_transcript(create_stt: CreateSTT) -> None:
    async with wire(create_stt) as ear, line(ear.stt) as call:
        await ear.until_connected()
        *audio, _ = await spoken("")
        await call.send(*audio, VADUserStoppedSpeakingFrame(stop_secs=0.2))
        await call.send(VADUserStartedSpeakingFrame(start_secs=0.2), *await spoken())
        await call.until(lambda: finals(call))
    assert finals(call) == ["I am calling."]
    assert call.errors == []


# What follows states what the stock classes really do when a provider fails.


@BOTH
async def test_a_wrong_key_is_noticed_at_the_third_refusal(create_stt: CreateSTT) -> None:
    """Both refuse it in an open socket, so Pipecat believes itself connected, and tries again."""
    async with wire(create_stt, Faults(wrong_key=True)) as ear, line(ear.stt) as call:
        await call.until(lambda: not ear.stt.is_usable and call.errors, within_s=20)
    assert set(ear.statuses) == {401}
    assert len(ear.statuses) >= 3
    assert all(KEY not in error.error for error in call.errors)
    assert call.errors[-1].category is not ErrorCategory.AUTHENTICATION


@BOTH
@pytest.mark.parametrize(
    ("faults", "status"), [(Faults(rate_limited=1), 429), (Faults(server_errors=1), 500)]
)
async def test_one_refusal_is_overcome_at_once(
    create_stt: CreateSTT, faults: Faults, status: int
) -> None:
    async with wire(create_stt, Faults(**vars(faults))) as ear, line(ear.stt) as call:
        await ear.log.until(lambda: ear.server.connections)
        # Who is refused in an open socket was connected before.
        await ear.until_connected(2 if create_stt is assemblyai else 1)
        await call.send(*await spoken())
        await call.until(lambda: finals(call))
    assert ear.statuses == [status, 101]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["500", "refused"])
async def test_openai_is_given_up_after_four_attempts(fault: str) -> None:
    """4 s apart, the second at once. The pipeline starts before."""
    async with wire(openai) as ear:
        if fault == "refused":
            await ear.server.refuse()
        else:
            ear.server.faults.server_errors = ALWAYS
        began = time.monotonic()
        async with line(ear.stt) as call:
            await call.until(lambda: not ear.stt.is_usable, within_s=30)
        assert time.monotonic() - began >= 12
    assert ear.statuses == ([] if fault == "refused" else [500] * 4)


@pytest.mark.parametrize("faults", [Faults(rate_limited=ALWAYS), Faults(server_errors=ALWAYS)])
async def test_assemblyai_is_given_up_at_the_third_refusal(faults: Faults) -> None:
    async with wire(assemblyai, faults) as ear, line(ear.stt) as call:
        await call.until(lambda: not ear.stt.is_usable and call.errors, within_s=20)
    assert len(ear.statuses) >= 3


@BOTH
async def test_a_hanging_provider_goes_unnoticed(create_stt: CreateSTT) -> None:
    async with wire(create_stt) as ear, line(ear.stt) as call:
        await ear.until_connected()
        await ear.log.until(lambda: ear.connection.sent)
        ear.server.faults.hang = True
        await call.send(*await spoken())
        kind = "ForceEndpoint" if create_stt is assemblyai else "input_audio_buffer.commit"
        await ear.until_received(kind)
        ear.server.faults.hang = False
        await call.send(VADUserStartedSpeakingFrame(start_secs=0.2), *await spoken())
        await call.until(lambda: finals(call))
    assert finals(call) == ["Bye."]
    assert call.errors == []


@pytest.mark.slow
async def test_a_hanging_assemblyai_holds_up_the_end_for_5_s() -> None:
    """Pipecat waits for its goodbye, and the call cannot be taken down before."""
    async with wire(assemblyai) as ear:
        async with line(ear.stt):
            await ear.until_connected()
            ear.server.faults.hang = True
            began = time.monotonic()
        assert 5 <= time.monotonic() - began < 10


@BOTH
async def test_a_slow_provider_is_late(create_stt: CreateSTT) -> None:
    async with wire(create_stt) as ear, line(ear.stt) as call:
        await ear.until_connected()
        await ear.log.until(lambda: ear.connection.sent)
        ear.server.faults.slow_s = 0.3
        began = time.monotonic()
        await call.send(*await spoken())
        await call.until(lambda: finals(call))
        assert time.monotonic() - began >= 0.3


@BOTH
@pytest.mark.parametrize("fault", ["cut", "drop"])
async def test_a_broken_socket_is_replaced_at_once(create_stt: CreateSTT, fault: str) -> None:
    """What was being said is lost."""
    async with wire(create_stt) as ear, line(ear.stt) as call:
        await ear.until_connected()
        if fault == "cut":
            ear.server.faults.cuts = 1
            await call.send(*await spoken())
        else:
            await ear.server.drop()
        await ear.until_connected(2)
        assert finals(call) == []
        await call.send(VADUserStartedSpeakingFrame(start_secs=0.2), *await spoken())
        await call.until(lambda: finals(call))
    assert [connection.is_open for connection in ear.server.connections] == [False, False]
    assert ear.stt.is_usable


@pytest.mark.slow
@BOTH
async def test_of_a_provider_that_is_away_only_assemblyai_hears_later_what_was_said(
    create_stt: CreateSTT,
) -> None:
    """For 4 s: Pipecat keeps the audio for it."""
    async with wire(create_stt) as ear, line(ear.stt) as call:
        await ear.until_connected()
        await ear.server.refuse()
        await ear.server.drop()
        await call.until(lambda: call.errors)
        await call.send(*await spoken())
        await call.until(lambda: call.of(VADUserStoppedSpeakingFrame))
        await ear.server.accept()
        await ear.until_connected(2)
        await call.send(VADUserStartedSpeakingFrame(start_secs=0.2), *await spoken())
        await call.until(lambda: finals(call))
    heard_hz = SAMPLE_RATE if create_stt is assemblyai else 24000
    seconds = ear.connection.audio_bytes / 2 / heard_hz
    audio = sum(len(frame.audio) for frame in call.of(InputAudioRawFrame))
    sent = audio / 2 / SAMPLE_RATE
    assert seconds == pytest.approx(sent if create_stt is assemblyai else sent / 2, rel=0.05)


async def test_openai_is_left_when_there_is_nothing_to_commit() -> None:
    """Its answer is an error, and after an error Pipecat connects anew."""
    async with wire(openai) as ear, line(ear.stt) as call:
        await ear.until_connected()
        await ear.log.until(lambda: ear.connection.received)
        await call.send(VADUserStoppedSpeakingFrame(stop_secs=0.2))
        await ear.until_connected(2)
    assert "input_audio_buffer_commit_empty" in call.errors[0].error
    assert ear.stt.is_usable


@pytest.mark.parametrize("path", ["/v3/ws?encoding=opus", "/v3/ws?sample_rate=16000"])
async def test_assemblyai_wants_pcm_and_a_model(path: str) -> None:
    async with wire(assemblyai) as ear, aiohttp.ClientSession() as http:
        url = f"http://127.0.0.1:{ear.server.port}{path}"
        async with http.get(url, headers={"Authorization": KEY}) as response:
            assert response.status == 400


@pytest.mark.parametrize(
    "wish",
    [
        {"format": {"type": "audio/pcm", "rate": PHONE_HZ}},
        {"turn_detection": {"type": "server_vad"}},
        {"transcription": None},
    ],
    ids=lambda wish: next(iter(wish)),
)
async def test_openai_refuses_a_session_it_cannot_hold(wish: dict[str, Any]) -> None:
    possible: dict[str, Any] = {
        "format": {"type": "audio/pcm", "rate": 24000},
        "transcription": {"model": "gpt-realtime-whisper"},
        "turn_detection": None,
    }
    async with wire(openai) as ear, aiohttp.ClientSession() as http:
        url = f"{ear.server.environment['OPENAI_STT_BASE_URL']}?intent=transcription"
        async with http.ws_connect(url, headers={"Authorization": f"Bearer {KEY}"}) as socket:
            assert (await socket.receive_json())["type"] == "session.created"
            answers: list[Any] = []
            for audio in (possible, possible | wish):
                session = {"type": "transcription", "audio": {"input": audio}}
                await socket.send_json({"type": "session.update", "session": session})
                answers.append(await socket.receive_json(timeout=5))
    updated, refused = answers
    assert updated["type"] == "session.updated"
    assert refused["type"] == "error"
    assert refused["error"]["code"] == "invalid_value"
