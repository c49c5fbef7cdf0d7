"""What every voice's wire does, as Pipecat's own classes see it.

Cartesia's, which differs in most, has tests of its own.
"""

import time
from typing import Any

import aiohttp
import pytest
from pipecat.frames.frames import (
    InterruptionFrame,
    TTSAudioRawFrame,
    TTSSpeakFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
)
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
from pipecat.utils.errors import ErrorCategory
from pipecat.utils.text.transforms import strip_markdown

from rehearsal.providers.faults import Faults
from rehearsal.tests.service_pipeline import answer
from rehearsal.tests.vendors import every
from rehearsal.tests.voice_wire import KEY, LONG, PHONE_HZ, WEB_HZ, Voice, pcm_of, scene, sound

pytestmark = pytest.mark.anyio

EVERY = every("elevenlabs", "deepgram_tts")


@EVERY
@pytest.mark.parametrize("rate", [PHONE_HZ, WEB_HZ])
async def test_a_voice_sounds_as_the_engine_made_it(vendor: Voice, rate: int) -> None:
    async with scene(vendor, sample_rate=rate) as voice:
        await voice.call.send(TTSSpeakFrame("Good morning everybody."))
        await voice.call.until(lambda: voice.call.of(TTSStoppedFrame))
    assert sound(voice.call) == await pcm_of("Good morning everybody.", rate=rate)
    assert {frame.sample_rate for frame in voice.call.of(TTSAudioRawFrame)} == {rate}
    assert {request.peer[0] for request in voice.log.requests} == {"127.0.0.1"}
    (request,) = voice.server.requests
    assert request.key == KEY
    assert KEY not in repr(request)


@EVERY
async def test_the_sentences_of_a_turn_are_one_speech(vendor: Voice) -> None:
    async with scene(vendor) as voice:
        await voice.say("One two. ", "Three.")
        assert sound(voice.call) == await pcm_of("One two.", "Three.")
        assert len(voice.call.of(TTSStartedFrame)) == len(voice.call.of(TTSStoppedFrame)) == 1
    assert voice.texts == ["One two.", "Three."]


@EVERY
async def test_turns_follow_each_other_on_one_socket(vendor: Voice) -> None:
    async with scene(vendor) as voice:
        await voice.say("One two.")
        await voice.say("Three.")
    assert sound(voice.call) == await pcm_of("One two.", "Three.")
    assert len(voice.server.connections) == 1


@EVERY
async def test_a_voice_is_given_text_without_markdown(vendor: Voice) -> None:
    async with scene(vendor, text_transforms=[("*", strip_markdown)]) as voice:
        await voice.say("This is **bold**.")
    assert voice.texts == ["This is bold."]


@EVERY
async def test_speech_comes_near_real_time_so_that_it_can_be_interrupted(vendor: Voice) -> None:
    async with scene(vendor, lead_s=0.1) as voice:
        began = time.monotonic()
        await voice.say("Half a second of speech.")
    seconds = len(sound(voice.call)) / 2 / WEB_HZ
    assert seconds > 0.5
    assert voice.server.connections[0].audio_bytes == len(sound(voice.call))
    assert time.monotonic() - began >= seconds - 0.1


@EVERY
async def test_after_a_barge_in_only_the_next_sentence_is_heard(vendor: Voice) -> None:
    async with scene(vendor) as voice:
        await voice.call.send(*answer(*[f"{LONG} "] * 5))
        await voice.call.until(lambda: voice.call.of(TTSAudioRawFrame))
        await voice.call.send(InterruptionFrame())
        await voice.log.until(lambda: {"isFinal", "sequence_id"} & set(voice.sent()[-1]))
        interrupted = len(voice.call.frames)
        await voice.say("Next.")
        assert sound(voice.call, interrupted) == await pcm_of("Next.")
    assert voice.server.connections[0].audio_bytes < len(await pcm_of(LONG))


@EVERY
@pytest.mark.parametrize("fault", ["cut", "drop"])
async def test_a_voice_reconnects_when_its_socket_breaks(vendor: Voice, fault: str) -> None:
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


@EVERY
@pytest.mark.parametrize("fault", ["rate_limited", "server_errors"])
async def test_a_voice_speaks_again_after_one_refusal_in_a_call(vendor: Voice, fault: str) -> None:
    async with scene(vendor) as voice:
        await voice.say("Hello.")
        setattr(voice.server.faults, fault, 1)
        await voice.call.send(*answer("Lost."))
        await voice.log.until(lambda: len(voice.server.connections) == 2)
        await voice.say("Hello again.")
    assert sound(voice.call) == await pcm_of("Hello.", "Hello again.")


@EVERY
async def test_a_voice_that_is_down_lets_the_call_start_and_speaks_when_it_is_up(
    vendor: Voice,
) -> None:
    async with scene(vendor, is_down=True) as voice:
        await voice.call.until(lambda: voice.call.errors)
        await voice.server.accept()
        await voice.say("Hello.")
    assert voice.call.errors[0].category is ErrorCategory.CONNECTIVITY
    assert voice.tts.is_usable


@EVERY
@pytest.mark.slow
async def test_a_hanging_voice_is_noticed_after_3_s_and_its_text_taken_for_spoken(
    vendor: Voice,
) -> None:
    async with scene(vendor, faults=Faults(hang=True)) as voice:
        await voice.call.send(*answer("Never heard."))
        await voice.call.until(lambda: voice.call.errors)
        assert voice.tts.is_usable
    assert "no audio" in voice.call.errors[0].error
    assert voice.words == ["Never heard."]
    assert sound(voice.call) == b""


@EVERY
async def test_a_slow_voice_is_late(vendor: Voice) -> None:
    async with scene(vendor) as voice:
        voice.server.faults.slow_s = 0.3
        before = time.monotonic()
        await voice.say("Hello.")
    assert time.monotonic() - before >= 0.3


@EVERY
async def test_what_the_rehearsal_cannot_speak_is_refused(vendor: Voice) -> None:
    async with scene(vendor) as voice, aiohttp.ClientSession() as http:
        path = voice.server.requests[0].path
        url = f"http://127.0.0.1:{voice.server.port}{path}?output_format=mp3_44100_128&model=m"
        headers = {"xi-api-key": KEY, "Authorization": f"Token {KEY}"}
        async with http.get(url, headers=headers) as response:
            assert response.status == 400


@EVERY
async def test_what_the_llm_is_told_of_an_interrupted_answer(vendor: Voice) -> None:
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
    assert (told["content"] == LONG) == (not vendor.times_words)


@EVERY
@pytest.mark.slow
async def test_a_voice_that_goes_down_in_a_call_is_given_up_after_three_attempts(
    vendor: Voice,
) -> None:
    """4 s apart."""
    async with scene(vendor) as voice:
        await voice.say("Hello.")
        await voice.server.refuse()
        await voice.server.drop()
        before = time.monotonic()
        await voice.call.until(lambda: not voice.tts.is_usable)
        assert time.monotonic() - before >= 8
    assert voice.call.errors[-1].category is ErrorCategory.CONNECTIVITY
