"""What is AssemblyAI's own as a recogniser, as Pipecat's class sees it."""

import time
from typing import Any

import aiohttp
import pytest
from pipecat.frames.frames import (
    LLMContextAssistantTurnFrame,
    TranscriptionFrame,
)
from pipecat.services.assemblyai.stt import AssemblyAISTTService
from pipecat.utils.time import time_now_iso8601

from rehearsal.providers.faults import ALWAYS, Faults
from rehearsal.tests.recogniser_wire import (
    KEY,
    PHONE_HZ,
    finals,
    kinds,
    projects_own,
    speak_twice,
    wire,
)
from rehearsal.tests.service_pipeline import SAMPLE_RATE, line, spoken
from rehearsal.tests.vendors.assemblyai import VENDOR

pytestmark = pytest.mark.anyio


async def test_assemblyai_leaves_the_turns_to_the_bot_and_asks_for_each_transcript() -> None:
    """It is told the language, the phone's sample rate, and to wait for no more than a breath."""
    async with wire(VENDOR) as ear, line(ear.stt, sample_rate=PHONE_HZ) as call:
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
    assert [turn["turn_order"] for turn in turns] == [0, 0, 0, 1, 1, 1]
    assert [turn["end_of_turn"] for turn in turns] == [False, False, True] * 2
    opening, *_ = kinds(ear.connection.sent)
    assert opening == "Begin"
    assert kinds(ear.connection.sent).count("SpeechStarted") == 2


async def test_assemblyai_says_when_the_speech_was() -> None:
    """In milliseconds of the audio received: half a second of silence, then speech."""
    async with wire(VENDOR) as ear, line(ear.stt) as call:
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
    async with wire(VENDOR) as ear, line(ear.stt) as call:
        await ear.until_connected()
        await call.send(LLMContextAssistantTurnFrame("Your name?", time_now_iso8601()))
        await ear.until_received("UpdateConfiguration")
    assert ear.connection.received[0]["agent_context"] == "Your name?"


async def test_assemblyai_counts_the_audio_of_a_session_it_is_asked_to_end() -> None:
    async with wire(VENDOR) as ear, line(ear.stt) as call:
        await ear.until_connected()
        await call.send(*await spoken())
        await call.until(lambda: finals(call))
    goodbye = ear.connection.sent[-1]
    assert goodbye["type"] == "Termination"
    seconds = ear.connection.audio_bytes / 2 / SAMPLE_RATE
    assert goodbye["audio_duration_seconds"] == pytest.approx(seconds)
    assert seconds > 1
    assert goodbye["session_duration_seconds"] > 0


async def test_the_projects_assemblyai_is_told_which_language_is_spoken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with wire(VENDOR) as ear:
        monkeypatch.setenv("ASSEMBLYAI_LANGUAGE", "fr")
        stt = projects_own(AssemblyAISTTService, ear, monkeypatch)
        async with line(stt):
            await ear.log.until(lambda: ear.server.connections)
    assert ear.connection.request.query["language_codes"] == '["fr"]'


@pytest.mark.parametrize("faults", [Faults(rate_limited=ALWAYS), Faults(server_errors=ALWAYS)])
async def test_assemblyai_is_given_up_at_the_third_refusal(faults: Faults) -> None:
    async with wire(VENDOR, faults) as ear, line(ear.stt) as call:
        await call.until(lambda: not ear.stt.is_usable and call.errors)
    assert len(ear.statuses) >= 3


@pytest.mark.slow
async def test_a_hanging_assemblyai_holds_up_the_end_for_5_s() -> None:
    """Pipecat waits for its goodbye, and the call cannot be taken down before."""
    async with wire(VENDOR) as ear:
        async with line(ear.stt):
            await ear.until_connected()
            ear.server.faults.hang = True
            began = time.monotonic()
        assert 5 <= time.monotonic() - began < 20


@pytest.mark.parametrize("path", ["/v3/ws?encoding=opus", "/v3/ws?sample_rate=16000"])
async def test_assemblyai_wants_pcm_and_a_model(path: str) -> None:
    async with wire(VENDOR) as ear, aiohttp.ClientSession() as http:
        url = f"http://127.0.0.1:{ear.server.port}{path}"
        async with http.get(url, headers={"Authorization": KEY}) as response:
            assert response.status == 400
