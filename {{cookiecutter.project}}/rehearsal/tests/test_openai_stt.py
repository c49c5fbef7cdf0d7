"""What is OpenAI's own as a recogniser, as Pipecat's class sees it."""

import asyncio
import time
from typing import Any

import aiohttp
import pytest
from pipecat.frames.frames import (
    InputAudioRawFrame,
    TranscriptionFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.services.openai.stt import OpenAIRealtimeSTTService

from rehearsal.providers.faults import ALWAYS
from rehearsal.tests.recogniser_wire import (
    KEY,
    PHONE_HZ,
    interims,
    kinds,
    projects_own,
    speak_twice,
    wire,
)
from rehearsal.tests.service_pipeline import line
from rehearsal.tests.vendors.openai_stt import VENDOR

pytestmark = pytest.mark.anyio


async def test_openai_is_asked_for_24_khz_and_leaves_the_turns_to_the_bot() -> None:
    """Pipecat resamples what comes from a phone."""
    async with wire(VENDOR) as ear, line(ear.stt, sample_rate=PHONE_HZ) as call:
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
    async with wire(VENDOR) as ear, line(ear.stt) as call:
        await ear.until_connected()
        await speak_twice(call)
    assert interims(call) == ["I", " am calling.", "Bye."]
    assert not any(frame.finalized for frame in call.of(TranscriptionFrame))


async def test_the_projects_openai_ends_turns_at_once_and_its_interim_transcripts_grow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with wire(VENDOR) as ear:
        stt = projects_own(OpenAIRealtimeSTTService, ear, monkeypatch)
        async with line(stt) as call:
            await ear.log.until(lambda: ear.server.connections and ear.connection.received)
            await speak_twice(call)
    assert interims(call) == ["I", "I am calling.", "Bye."]
    assert [frame.finalized for frame in call.of(TranscriptionFrame)] == [True, True]


@pytest.mark.slow
async def test_openai_is_given_up_after_four_attempts() -> None:
    """4 s apart, the second at once. The pipeline starts before."""

    async def given_up(fault: str) -> None:
        async with wire(VENDOR) as ear:
            if fault == "refused":
                await ear.server.refuse()
            else:
                ear.server.faults.server_errors = ALWAYS
            began = time.monotonic()
            async with line(ear.stt) as call:
                await call.until(lambda: not ear.stt.is_usable)
            assert time.monotonic() - began >= 12
        assert ear.statuses == ([] if fault == "refused" else [500] * 4)

    async with asyncio.TaskGroup() as both:
        for fault in ("500", "refused"):
            both.create_task(given_up(fault))


async def test_openai_is_left_when_there_is_nothing_to_commit() -> None:
    """Its answer is an error, and after an error Pipecat connects anew."""
    async with wire(VENDOR) as ear, line(ear.stt) as call:
        await ear.until_connected()
        await ear.log.until(lambda: ear.connection.received)
        await call.send(VADUserStoppedSpeakingFrame(stop_secs=0.2))
        await ear.until_connected(2)
    assert "input_audio_buffer_commit_empty" in call.errors[0].error
    assert ear.stt.is_usable


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
    async with wire(VENDOR) as ear, aiohttp.ClientSession() as http:
        url = f"{ear.server.environment['OPENAI_STT_BASE_URL']}?intent=transcription"
        async with http.ws_connect(url, headers={"Authorization": f"Bearer {KEY}"}) as socket:
            assert (await socket.receive_json())["type"] == "session.created"
            answers: list[Any] = []
            for audio in (possible, possible | wish):
                session = {"type": "transcription", "audio": {"input": audio}}
                await socket.send_json({"type": "session.update", "session": session})
                answers.append(await socket.receive_json(timeout=30))
    updated, refused = answers
    assert updated["type"] == "session.updated"
    assert refused["type"] == "error"
    assert refused["error"]["code"] == "invalid_value"
