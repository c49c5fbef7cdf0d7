"""What is Deepgram's own as a voice, as Pipecat's class sees it."""

import pytest
from pipecat.frames.frames import (
    InterruptionFrame,
    TTSAudioRawFrame,
    TTSTextFrame,
)
from pipecat.utils.errors import ErrorCategory

from rehearsal.providers.faults import Faults
from rehearsal.tests.service_pipeline import answer
from rehearsal.tests.vendors.deepgram_tts import VENDOR
from rehearsal.tests.voice_wire import KEY, LONG, pcm_of, scene, sound

pytestmark = pytest.mark.anyio


async def test_deepgram_introduces_itself_and_confirms_a_flush() -> None:
    async with scene(VENDOR) as voice:
        await voice.say("One two.")
        await voice.say("Three.")
    assert [message["type"] for message in voice.sent()] == ["Metadata", "Flushed", "Flushed"]
    assert [message["sequence_id"] for message in voice.sent()[1:]] == [0, 1]


async def test_deepgram_speaks_a_rest_that_is_no_sentence_when_it_is_flushed() -> None:
    async with scene(VENDOR) as voice:
        await voice.say("One moment")
    assert sound(voice.call) == await pcm_of("One moment")


async def test_deepgram_confirms_that_it_dropped_an_interrupted_speech() -> None:
    async with scene(VENDOR) as voice:
        await voice.call.send(*answer(LONG))
        await voice.call.until(lambda: voice.call.of(TTSAudioRawFrame))
        await voice.call.send(InterruptionFrame())
        await voice.log.until(lambda: voice.sent()[-1]["type"] == "Cleared")
    assert "Flushed" not in [message["type"] for message in voice.sent()]


async def test_deepgram_does_not_time_its_words_so_pipecat_takes_them_for_spoken_at_once() -> None:
    async with scene(VENDOR) as voice:
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
    async with scene(VENDOR, faults=faults) as voice:
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
