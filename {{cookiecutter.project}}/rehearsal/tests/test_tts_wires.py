"""ElevenLabs' and Deepgram's loopback voices, as Pipecat's own classes see them."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from pipecat.frames.frames import (
    InterruptionFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    TTSAudioRawFrame,
    TTSSpeakFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
    TTSTextFrame,
)
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.services.deepgram.tts import DeepgramTTSService
from pipecat.services.elevenlabs.tts import ElevenLabsTTSService
from pipecat.services.tts_service import TextAggregationMode, TTSService
from pipecat.utils.errors import ErrorCategory
from pipecat.utils.text.transforms import strip_markdown

from rehearsal.engines.engine import Speech, Word
from rehearsal.engines.scripted import ScriptedEngine
from rehearsal.providers.deepgram_tts import DeepgramSpeakServer
from rehearsal.providers.elevenlabs import ElevenLabsServer
from rehearsal.providers.faults import Faults
from rehearsal.providers.pace import LEAD_SECONDS
from rehearsal.providers.server import ProviderServer, WireLog
from rehearsal.tests.service_pipeline import Line, answer, line

pytestmark = pytest.mark.anyio

KEY = "a-secret-of-the-bot"
WEB_HZ = 24000
PHONE_HZ = 8000
LONG = "This is a sentence that is interrupted long before its end, as everybody can hear."

BOTH = pytest.mark.parametrize("vendor", ["elevenlabs", "deepgram"])


@dataclass
class Scene:
    """A voice in a pipeline, and the server it talks to."""

    server: ElevenLabsServer | DeepgramSpeakServer
    tts: TTSService
    call: Line
    log: WireLog

    @property
    def texts(self) -> list[str]:
        """What the server was told to say."""
        received = [message for c in self.server.connections for message in c.received]
        return [text for message in received if (text := message.get("text", "").strip())]

    @property
    def words(self) -> list[str]:
        """What Pipecat takes for spoken."""
        return [frame.text for frame in self.call.of(TTSTextFrame)]

    def sent(self, connection: int = 0) -> list[dict[str, Any]]:
        """The server's messages on one connection."""
        return self.server.connections[connection].sent

    async def say(self, *texts: str, within_s: float = 5.0) -> None:
        """Let the bot answer, and wait until its speech is over."""
        before = len(self.call.of(TTSStoppedFrame))
        await self.call.send(*answer(*texts))
        await self.call.until(lambda: len(self.call.of(TTSStoppedFrame)) > before, within_s)


@asynccontextmanager
async def scene(
    vendor: str,
    *after: FrameProcessor,
    engine: ScriptedEngine | None = None,
    faults: Faults | None = None,
    lead_s: float = LEAD_SECONDS,
    is_down: bool = False,
    **options: Any,
) -> AsyncIterator[Scene]:
    """Run a vendor's server and Pipecat's class for it."""
    log = WireLog()
    engine = engine or ScriptedEngine()
    server: ElevenLabsServer | DeepgramSpeakServer
    tts: TTSService
    if vendor == "elevenlabs":
        server = ElevenLabsServer(engine, log, faults)
        await server.start()
        voice = ElevenLabsTTSService.Settings(voice="voice")
        url = server.environment["ELEVENLABS_BASE_URL"]
        tts = ElevenLabsTTSService(api_key=KEY, url=url, settings=voice, **options)
    else:
        server = DeepgramSpeakServer(engine, log, faults)
        await server.start()
        url = server.environment["DEEPGRAM_TTS_BASE_URL"]
        tts = DeepgramTTSService(api_key=KEY, base_url=url, **options)
    server.lead_s = lead_s
    try:
        if is_down:
            await server.refuse()
        async with line(tts, *after) as call:
            yield Scene(server, tts, call, log)
    finally:
        await server.aclose()


async def pcm_of(*texts: str, rate: int = WEB_HZ) -> bytes:
    """Return the sound of texts, as the engine makes it."""
    engine = ScriptedEngine()
    return b"".join([speech.pcm for text in texts async for speech in engine.speak(text, rate)])


def sound(call: Line, since: int = 0) -> bytes:
    """Return what came out of the voice after the first `since` frames."""
    frames = call.frames[since:]
    return b"".join(frame.audio for frame in frames if isinstance(frame, TTSAudioRawFrame))


def seconds_of_words(call: Line) -> list[float]:
    """Return when each word is spoken, seconds after the first."""
    times = [frame.pts or 0 for frame in call.of(TTSTextFrame)]
    return [(at - times[0]) / 1e9 for at in times]


@BOTH
@pytest.mark.parametrize("rate", [PHONE_HZ, WEB_HZ])
async def test_a_voice_sounds_as_the_engine_made_it(vendor: str, rate: int) -> None:
    async with scene(vendor, sample_rate=rate) as voice:
        await voice.call.send(TTSSpeakFrame("Good morning everybody."))
        await voice.call.until(lambda: voice.call.of(TTSStoppedFrame))
    assert sound(voice.call) == await pcm_of("Good morning everybody.", rate=rate)
    assert {frame.sample_rate for frame in voice.call.of(TTSAudioRawFrame)} == {rate}
    assert {request.peer[0] for request in voice.log.requests} == {"127.0.0.1"}
    (request,) = voice.server.requests
    assert request.key == KEY
    assert KEY not in repr(request)


@BOTH
async def test_the_sentences_of_a_turn_are_one_speech(vendor: str) -> None:
    async with scene(vendor) as voice:
        await voice.say("One two. ", "Three.")
        assert sound(voice.call) == await pcm_of("One two.", "Three.")
        assert len(voice.call.of(TTSStartedFrame)) == len(voice.call.of(TTSStoppedFrame)) == 1
    assert voice.texts == ["One two.", "Three."]


@BOTH
async def test_turns_follow_each_other_on_one_socket(vendor: str) -> None:
    async with scene(vendor) as voice:
        await voice.say("One two.")
        await voice.say("Three.")
    assert sound(voice.call) == await pcm_of("One two.", "Three.")
    assert len(voice.server.connections) == 1


@BOTH
async def test_a_voice_is_given_text_without_markdown(vendor: str) -> None:
    async with scene(vendor, text_transforms=[("*", strip_markdown)]) as voice:
        await voice.say("This is **bold**.")
    assert voice.texts == ["This is bold."]


@BOTH
async def test_speech_comes_near_real_time_so_that_it_can_be_interrupted(vendor: str) -> None:
    async with scene(vendor, lead_s=0.1) as voice:
        began = time.monotonic()
        await voice.say("Half a second of speech.")
    seconds = len(sound(voice.call)) / 2 / WEB_HZ
    assert seconds > 0.5
    assert voice.server.connections[0].audio_bytes == len(sound(voice.call))
    assert time.monotonic() - began >= seconds - 0.1


@BOTH
async def test_after_a_barge_in_only_the_next_sentence_is_heard(vendor: str) -> None:
    async with scene(vendor) as voice:
        await voice.call.send(*answer(*[f"{LONG} "] * 5))
        await voice.call.until(lambda: voice.call.of(TTSAudioRawFrame))
        await voice.call.send(InterruptionFrame())
        await voice.log.until(lambda: {"isFinal", "sequence_id"} & set(voice.sent()[-1]))
        interrupted = len(voice.call.frames)
        await voice.say("Next.")
        assert sound(voice.call, interrupted) == await pcm_of("Next.")
    assert voice.server.connections[0].audio_bytes < len(await pcm_of(LONG))


@BOTH
@pytest.mark.parametrize("fault", ["cut", "drop"])
async def test_a_voice_reconnects_when_its_socket_breaks(vendor: str, fault: str) -> None:
    async with scene(vendor) as voice:
        voice.server.faults.cuts = int(fault == "cut")
        await voice.call.send(*answer(LONG))
        await voice.call.until(lambda: voice.call.of(TTSAudioRawFrame))
        if fault == "drop":
            await voice.server.drop()
        await voice.log.until(lambda: len(voice.server.connections) == 2)
        before = len(voice.call.frames)
        await voice.say("Next.")
        assert sound(voice.call, before).endswith(await pcm_of("Next."))
    assert len(sound(voice.call)) < len(await pcm_of(LONG))


@BOTH
@pytest.mark.parametrize("fault", ["rate_limited", "server_errors"])
async def test_a_voice_speaks_again_after_one_refusal_in_a_call(vendor: str, fault: str) -> None:
    async with scene(vendor) as voice:
        await voice.say("Hello.")
        setattr(voice.server.faults, fault, 1)
        await voice.call.send(*answer("Lost."))
        await voice.log.until(lambda: len(voice.server.connections) == 2)
        await voice.say("Hello again.")
    assert sound(voice.call) == await pcm_of("Hello.", "Hello again.")


@BOTH
async def test_a_voice_that_is_down_lets_the_call_start_and_speaks_when_it_is_up(
    vendor: str,
) -> None:
    async with scene(vendor, is_down=True) as voice:
        await voice.call.until(lambda: voice.call.errors)
        await voice.server.accept()
        await voice.say("Hello.")
    assert voice.call.errors[0].category is ErrorCategory.CONNECTIVITY
    assert voice.tts.is_usable


@BOTH
@pytest.mark.slow
async def test_a_hanging_voice_is_noticed_after_3_s_and_its_text_taken_for_spoken(
    vendor: str,
) -> None:
    async with scene(vendor, faults=Faults(hang=True)) as voice:
        await voice.call.send(*answer("Never heard."))
        await voice.call.until(lambda: voice.call.errors)
        assert voice.tts.is_usable
    assert "no audio" in voice.call.errors[0].error
    assert voice.words == ["Never heard."]
    assert sound(voice.call) == b""


@BOTH
async def test_a_slow_voice_is_late(vendor: str) -> None:
    async with scene(vendor) as voice:
        voice.server.faults.slow_s = 0.3
        before = time.monotonic()
        await voice.say("Hello.")
    assert time.monotonic() - before >= 0.3


@BOTH
async def test_what_the_rehearsal_cannot_speak_is_refused(vendor: str) -> None:
    async with scene(vendor) as voice, aiohttp.ClientSession() as http:
        path = voice.server.requests[0].path
        url = f"http://127.0.0.1:{voice.server.port}{path}?output_format=mp3_44100_128&model=m"
        headers = {"xi-api-key": KEY, "Authorization": f"Token {KEY}"}
        async with http.get(url, headers=headers) as response:
            assert response.status == 400


@BOTH
async def test_what_the_llm_is_told_of_an_interrupted_answer(vendor: str) -> None:
    """Only a voice that times its words can be interrupted between them."""
    context = LLMContext([{"role": "user", "content": "Well?"}])
    messages = context.messages
    _, assistant = LLMContextAggregatorPair(context)
    async with scene(vendor, assistant) as voice:
        await voice.call.send(*answer(LONG))
        await voice.log.until(lambda: voice.server.connections[0].audio_bytes > 0.5 * 2 * WEB_HZ)
        await voice.call.send(InterruptionFrame())
        await voice.call.until(lambda: len(messages) > 1 and voice.call.of(InterruptionFrame))
    told: Any = messages[1]
    assert LONG.startswith(told["content"])
    assert (told["content"] == LONG) == (vendor == "deepgram")


# ElevenLabs


@pytest.mark.parametrize("rate", [PHONE_HZ, WEB_HZ])
async def test_elevenlabs_times_the_words_of_all_sentences_of_a_turn(rate: int) -> None:
    async with scene("elevenlabs", sample_rate=rate) as voice:
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

    async with scene("elevenlabs", engine=Slow(), lead_s=10.0) as voice:
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
    async with scene("elevenlabs") as voice:
        await voice.say("One two. ", "Three.")
        received = list(voice.server.connections[0].received)
    assert received[-2:] == [
        {"context_id": received[0]["context_id"], "flush": True},
        {"context_id": received[0]["context_id"], "close_context": True},
    ]
    assert voice.sent()[-1] == {"isFinal": True, "contextId": received[0]["context_id"]}


async def test_elevenlabs_drops_what_was_not_flushed_when_it_closes_a_context() -> None:
    """An interruption while the LLM still writes."""
    async with scene("elevenlabs") as voice:
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
    async with scene("elevenlabs", engine=ListenedTo(), text_aggregation_mode=mode) as voice:
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
    async with scene("elevenlabs") as voice, elevenlabs_socket(voice.server) as socket:
        voice.server.faults.server_errors = 1  # of the contexts to be opened
        await socket.send_json({"text": ""})
        await socket.send_json({"text": "", "context_id": "unknown"})
        await socket.send_json({"close_context": True, "context_id": "unknown"})
        await socket.send_json({"close_socket": True})
        assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE
        assert voice.sent(1) == []
        assert voice.server.faults.server_errors == 1


async def test_elevenlabs_gives_its_reason_and_closes() -> None:
    async with scene("elevenlabs") as voice, elevenlabs_socket(voice.server) as socket:
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
    async with scene("elevenlabs", faults=Faults(**{fault: True})) as voice:
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
    async with scene("elevenlabs", faults=Faults(wrong_key=True)) as voice:
        for number in (1, 2, 3):
            await voice.call.send(*answer("Nobody hears this."))
            await voice.call.until(lambda n=number: len(voice.call.errors) == n)
            if number < 3:
                await voice.log.until(lambda n=number: len(voice.server.connections) == n + 1)
                assert voice.tts.is_usable
        assert not voice.tts.is_usable
    assert voice.call.errors[-1].category is ErrorCategory.UNKNOWN


# Deepgram


async def test_deepgram_introduces_itself_and_confirms_a_flush() -> None:
    async with scene("deepgram") as voice:
        await voice.say("One two.")
        await voice.say("Three.")
    assert [message["type"] for message in voice.sent()] == ["Metadata", "Flushed", "Flushed"]
    assert [message["sequence_id"] for message in voice.sent()[1:]] == [0, 1]


async def test_deepgram_speaks_a_rest_that_is_no_sentence_when_it_is_flushed() -> None:
    async with scene("deepgram") as voice:
        await voice.say("One moment")
    assert sound(voice.call) == await pcm_of("One moment")


async def test_deepgram_confirms_that_it_dropped_an_interrupted_speech() -> None:
    async with scene("deepgram") as voice:
        await voice.call.send(*answer(LONG))
        await voice.call.until(lambda: voice.call.of(TTSAudioRawFrame))
        await voice.call.send(InterruptionFrame())
        await voice.log.until(lambda: voice.sent()[-1]["type"] == "Cleared")
    assert "Flushed" not in [message["type"] for message in voice.sent()]


async def test_deepgram_does_not_time_its_words_so_pipecat_takes_them_for_spoken_at_once() -> None:
    async with scene("deepgram") as voice:
        await voice.say("One two. ", "Three.")
    kinds = [type(f) for f in voice.call.frames if isinstance(f, TTSTextFrame | TTSAudioRawFrame)]
    assert kinds[:3] == [TTSTextFrame, TTSTextFrame, TTSAudioRawFrame]
    assert voice.words == ["One two.", "Three."]
    assert not any(frame.pts for frame in voice.call.of(TTSTextFrame))


@pytest.mark.parametrize(
    ("faults", "status", "category"),
    [
        (Faults(wrong_key=True), 401, ErrorCategory.AUTHENTICATION),
        (Faults(rate_limited=1), 429, ErrorCategory.RATE_LIMIT),
        (Faults(server_errors=1), 500, ErrorCategory.SERVER),
    ],
    ids=["401", "429", "500"],
)
async def test_deepgram_tells_why_it_refuses_a_handshake_and_lets_the_call_start(
    faults: Faults, status: int, category: ErrorCategory
) -> None:
    async with scene("deepgram", faults=faults) as voice:
        await voice.call.until(lambda: voice.call.errors)
        error = voice.call.errors[0]
        if status != 401:
            await voice.say("Hello.")
    assert f"HTTP {status}" in error.error
    assert voice.server.error(status)["err_msg"] in error.error
    assert KEY not in error.error
    assert error.category is category
    assert voice.tts.is_usable == (status != 401)
    assert [request.status for request in voice.server.requests] == (
        [401] if status == 401 else [status, 101]
    )


@BOTH
@pytest.mark.slow
async def test_a_voice_that_goes_down_in_a_call_is_given_up_after_three_attempts(
    vendor: str,
) -> None:
    """4 s apart."""
    async with scene(vendor) as voice:
        await voice.say("Hello.")
        await voice.server.refuse()
        await voice.server.drop()
        before = time.monotonic()
        await voice.call.until(lambda: not voice.tts.is_usable, within_s=30)
        assert time.monotonic() - before >= 8
    assert voice.call.errors[-1].category is ErrorCategory.CONNECTIVITY
