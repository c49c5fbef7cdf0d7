"""What is ElevenLabs's own as a voice, as Pipecat's class sees it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from pipecat.frames.frames import (
    InterruptionFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    TTSAudioRawFrame,
)
from pipecat.services.elevenlabs.tts import ElevenLabsTTSService
from pipecat.services.tts_service import TextAggregationMode, TTSService
from pipecat.utils.errors import ErrorCategory

import services
from deploy import preflight
from rehearsal.engines.engine import Speech, Word
from rehearsal.engines.scripted import ScriptedEngine
from rehearsal.providers.all import serve
from rehearsal.providers.elevenlabs import ElevenLabsServer
from rehearsal.providers.faults import Faults
from rehearsal.providers.server import ProviderServer
from rehearsal.tests.service_pipeline import answer
from rehearsal.tests.vendors.elevenlabs import VENDOR
from rehearsal.tests.voice_wire import KEY, LONG, PHONE_HZ, WEB_HZ, pcm_of, scene, seconds_of_words

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("rate", [PHONE_HZ, WEB_HZ])
async def test_elevenlabs_times_the_words_of_all_sentences_of_a_turn(rate: int) -> None:
    async with scene(VENDOR, sample_rate=rate) as voice:
        await voice.say("One two. ", "Three.")
        assert voice.words == ["One", "two.", "Three."]
        assert seconds_of_words(voice.call) == pytest.approx([0.0, 0.13, 0.29])
    query = voice.server.requests[0].query
    assert query["output_format"] == f"pcm_{rate}"
    assert query["model_id"] == "eleven_flash_v2_5"


async def test_elevenlabs_times_words_over_audio_in_which_no_word_begins() -> None:
    second = bytes(2 * WEB_HZ)

    class Slow(ScriptedEngine):
        async def speak(self, text: str, sample_rate: int) -> AsyncIterator[Speech]:
            yield Speech(second, (Word("One", 0.25, 1.5),))
            yield Speech(second)
            yield Speech(second, (Word("two", 2.5, 2.75), Word("three.", 2.75, 3.0)))

    async with scene(VENDOR, engine=Slow(), lead_s=10.0) as voice:
        await voice.say("One two three.")
        assert voice.words == ["One", "two", "three."]
        assert seconds_of_words(voice.call) == pytest.approx([0.0, 2.25, 2.5])
    alignments = [message["alignment"] for message in voice.sent() if message.get("alignment")]
    assert [alignment["charStartTimesMs"][0] for alignment in alignments] == [250, 1500]
    assert [len(alignment["chars"]) for alignment in alignments] == [4, 11]
    assert min(ms for alignment in alignments for ms in alignment["charDurationsMs"]) >= 0
    ends = [a["charStartTimesMs"][-1] + a["charDurationsMs"][-1] for a in alignments]
    assert ends == [1000, 2000], "the client adds them up to know where the next one begins"


async def test_elevenlabs_says_what_was_flushed_before_it_closes_a_context() -> None:
    async with scene(VENDOR) as voice:
        await voice.say("One two. ", "Three.")
        received = list(voice.server.connections[0].received)
    assert received[-2:] == [
        {"context_id": received[0]["context_id"], "flush": True},
        {"context_id": received[0]["context_id"], "close_context": True},
    ]
    assert voice.sent()[-1] == {"isFinal": True, "contextId": received[0]["context_id"]}


async def test_elevenlabs_drops_what_was_not_flushed_when_it_closes_a_context() -> None:
    """An interruption while the LLM still writes."""
    async with scene(VENDOR) as voice:
        await voice.call.send(LLMFullResponseStartFrame(), LLMTextFrame(f"{LONG} And more"))
        await voice.call.until(lambda: voice.call.of(TTSAudioRawFrame))
        await voice.call.send(InterruptionFrame())
        await voice.log.until(lambda: "isFinal" in voice.sent()[-1])
    assert voice.server.connections[0].audio_bytes < len(await pcm_of(LONG))


async def test_elevenlabs_gathers_text_that_comes_word_by_word() -> None:
    spoken: list[str] = []

    class ListenedTo(ScriptedEngine):
        def speak(self, text: str, sample_rate: int) -> AsyncIterator[Speech]:
            spoken.append(text)
            return super().speak(text, sample_rate)

    mode = TextAggregationMode.TOKEN
    async with scene(VENDOR, engine=ListenedTo(), text_aggregation_mode=mode) as voice:
        await voice.say("One ", "two ", "three.")
    assert voice.server.requests[0].query["auto_mode"] == "false"
    assert voice.texts == ["One", "two", "three."]
    assert [text.strip() for text in spoken] == ["One two three."]
    assert voice.words == ["One", "two", "three."]


@asynccontextmanager
async def elevenlabs_socket(
    server: ProviderServer,
) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    """Connect as a client that is not Pipecat."""
    path = "/v1/text-to-speech/voice/multi-stream-input?output_format=pcm_8000&model_id=m"
    headers = {"xi-api-key": KEY}
    async with (
        aiohttp.ClientSession(f"http://127.0.0.1:{server.port}", headers=headers) as http,
        http.ws_connect(path) as socket,
    ):
        yield socket


async def test_elevenlabs_is_kept_alive_without_opening_a_context() -> None:
    async with scene(VENDOR) as voice, elevenlabs_socket(voice.server) as socket:
        voice.server.faults.server_errors = 1  # of the contexts to be opened
        await socket.send_json({"text": ""})
        await socket.send_json({"text": "", "context_id": "unknown"})
        await socket.send_json({"close_context": True, "context_id": "unknown"})
        await socket.send_json({"close_socket": True})
        assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE
        assert voice.sent(1) == []
        assert voice.server.faults.server_errors == 1


async def test_elevenlabs_gives_its_reason_and_closes() -> None:
    async with scene(VENDOR) as voice, elevenlabs_socket(voice.server) as socket:
        voice.server.faults.wrong_key = True
        await socket.send_json({"text": " ", "context_id": "a"})
        message = "Invalid API key"
        assert await socket.receive_json() == {
            "message": message,
            "error": "invalid_api_key",
            "code": 1008,
        }
        assert await socket.receive() == (aiohttp.WSMsgType.CLOSE, 1008, message)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("wrong_key", "invalid_api_key"),
        ("rate_limited", "too_many_concurrent_requests"),
        ("server_errors", "internal_error"),
    ],
)
async def test_elevenlabs_refuses_in_an_open_socket_and_pipecat_does_not_see_why(
    fault: str, reason: str
) -> None:
    async with scene(VENDOR, faults=Faults(**{fault: True})) as voice:
        disconnected: list[bool] = []

        @voice.tts.event_handler("on_disconnected")
        async def on_disconnected(_tts: TTSService) -> None:
            disconnected.append(True)

        await voice.call.send(*answer("Nobody hears this."))
        await voice.log.until(lambda: len(voice.server.connections) == 2)
        await voice.call.until(lambda: voice.call.errors)
        assert disconnected
    assert voice.sent()[0]["error"] == reason
    assert [request.status for request in voice.server.requests] == [101, 101]
    assert [error.category for error in voice.call.errors] == [ErrorCategory.UNKNOWN]
    assert voice.tts.is_usable
    assert voice.words == ["Nobody hears this."], "the LLM is told that it was spoken"


async def test_elevenlabs_is_given_up_after_three_silent_answers() -> None:
    async with scene(VENDOR, faults=Faults(wrong_key=True)) as voice:
        for number in (1, 2, 3):
            await voice.call.send(*answer("Nobody hears this."))
            await voice.call.until(lambda n=number: len(voice.call.errors) == n)
            if number < 3:
                await voice.log.until(lambda n=number: len(voice.server.connections) == n + 1)
                assert voice.tts.is_usable
        assert not voice.tts.is_usable
    assert voice.call.errors[-1].category is ErrorCategory.UNKNOWN


async def test_the_preflight_tells_a_reason_that_only_pipecats_log_tells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As in a process of its own, where the bot does not hush the log.
    monkeypatch.setenv("LOG_EVERYTHING", "1")
    async with serve(ScriptedEngine()) as providers:
        for name, value in providers.environment.items():
            monkeypatch.setenv(name, value)
        url = providers.environment["ELEVENLABS_BASE_URL"]
        voice = ElevenLabsTTSService(
            api_key="wrong", url=url, settings=ElevenLabsTTSService.Settings(voice="voice")
        )
        monkeypatch.setattr(services, "create_tts", lambda: voice)
        providers[ElevenLabsServer].faults.wrong_key = True
        results = await preflight.check()
    assert results["ElevenLabsTTSService"] == "1008 (policy violation) Invalid API key"
