"""Cartesia's wire, as Pipecat's own class sees it: healthy, then failing."""

import time
from typing import Any

import pytest
from pipecat.frames.frames import (
    InterruptionFrame,
    TTSAudioRawFrame,
    TTSSpeakFrame,
    TTSStoppedFrame,
    TTSTextFrame,
)
from pipecat.services.cartesia.tts import CartesiaTTSService
from pipecat.utils.errors import ErrorCategory

from rehearsal.engines.scripted import ScriptedEngine
from rehearsal.providers.all import Providers, serve
from rehearsal.providers.cartesia import CartesiaServer
from rehearsal.providers.faults import Faults
from rehearsal.tests.service_pipeline import answer, line

pytestmark = pytest.mark.anyio

KEY = "a-secret-of-the-bot"


def cartesia(providers: Providers) -> CartesiaTTSService:
    return CartesiaTTSService(
        api_key=KEY,
        url=providers.environment["CARTESIA_BASE_URL"],
        settings=CartesiaTTSService.Settings(voice="voice"),
    )


def cancels(providers: Providers) -> list[dict[str, Any]]:
    return [m for c in providers[CartesiaServer].connections for m in c.received if m.get("cancel")]


def sent_in(providers: Providers, context_id: str) -> list[dict[str, Any]]:
    sent = [m for c in providers[CartesiaServer].connections for m in c.sent]
    return [message for message in sent if message["context_id"] == context_id]


def sent_kinds(providers: Providers, connection: int) -> list[str]:
    return [message["type"] for message in providers[CartesiaServer].connections[connection].sent]


async def test_cartesia_speaks_with_word_timestamps() -> None:
    async with serve(ScriptedEngine()) as providers, line(cartesia(providers)) as call:
        await call.send(TTSSpeakFrame("Good morning everybody."))
        await call.until(lambda: call.of(TTSStoppedFrame))
    assert [frame.text for frame in call.of(TTSTextFrame)] == ["Good", "morning", "everybody."]
    said = ScriptedEngine().speak("Good morning everybody.", 24000)
    pcm = b"".join([speech.pcm async for speech in said])
    assert b"".join(frame.audio for frame in call.of(TTSAudioRawFrame)) == pcm
    (connection,) = providers[CartesiaServer].connections
    assert connection.audio_bytes == len(pcm)
    assert connection.request.key == KEY
    assert connection.sent[-1]["type"] == "done"
    assert providers.peers == {"127.0.0.1"}


async def test_the_times_of_words_run_on_over_the_texts_of_a_context() -> None:
    """Two sentences of one turn: the second one's words begin after the first one's audio."""
    async with serve(ScriptedEngine()) as providers, line(cartesia(providers)) as call:
        await call.send(*answer("One two. ", "Three."))
        await call.until(lambda: call.of(TTSStoppedFrame))
    sent = providers[CartesiaServer].connections[0].sent
    starts = [s for m in sent if m["type"] == "timestamps" for s in m["word_timestamps"]["start"]]
    assert starts == pytest.approx([0.0, 0.13, 0.29])
    assert len({message["context_id"] for message in sent}) == 1


async def test_speech_comes_near_real_time_so_that_it_can_be_interrupted() -> None:
    async with serve(ScriptedEngine()) as providers, line(cartesia(providers)) as call:
        providers[CartesiaServer].lead_s = 0.1
        began = time.monotonic()
        await call.send(TTSSpeakFrame("Half a second of speech."))
        await providers.log.until(lambda: sent_kinds(providers, 0)[-1:] == ["done"])
    seconds = providers[CartesiaServer].connections[0].audio_bytes / 2 / 24000
    assert seconds > 0.5
    assert time.monotonic() - began >= seconds - 0.1


async def test_barge_in_cancels_what_is_being_spoken() -> None:
    async with serve(ScriptedEngine()) as providers, line(cartesia(providers)) as call:
        await call.send(TTSSpeakFrame("a long sentence " * 10))
        await call.until(lambda: call.of(TTSAudioRawFrame))
        await call.send(InterruptionFrame())
        await providers.log.until(lambda: cancels(providers))
        (cancelled,) = cancels(providers)
        sent = list(sent_in(providers, cancelled["context_id"]))
        await call.send(TTSSpeakFrame("Spoken for longer than the audio runs ahead."))
        await providers.log.until(lambda: sent_kinds(providers, 0)[-1:] == ["done"])
    assert "chunk" in [message["type"] for message in sent]
    assert sent_in(providers, cancelled["context_id"]) == sent


@pytest.mark.parametrize(
    ("faults", "status"),
    [(Faults(wrong_key=True), 401), (Faults(rate_limited=2), 429), (Faults(server_errors=2), 500)],
)
async def test_cartesia_tells_of_a_refused_handshake_and_lets_the_call_start(
    faults: Faults, status: int
) -> None:
    async with serve(ScriptedEngine(), faults={"cartesia": faults}) as providers:
        tts = cartesia(providers)
        async with line(tts) as call:
            await call.until(lambda: call.errors)
    assert str(status) in call.errors[0].error
    assert tts.is_usable == (status != 401)
    assert providers[CartesiaServer].requests[0].status == status


async def test_cartesia_recovers_with_the_next_text_after_one_500() -> None:
    async with serve(ScriptedEngine(), faults={"cartesia": Faults(server_errors=1)}) as providers:
        async with line(cartesia(providers)) as call:
            await call.until(lambda: call.errors)
            await call.send(TTSSpeakFrame("Hello."))
            await call.until(lambda: call.of(TTSAudioRawFrame))
    assert [request.status for request in providers[CartesiaServer].requests] == [500, 101]


async def test_cartesia_reports_an_error_in_an_open_socket() -> None:
    async with serve(ScriptedEngine()) as providers, line(cartesia(providers)) as call:
        providers[CartesiaServer].faults.server_errors = 1
        await call.send(TTSSpeakFrame("Lost."))
        await call.until(lambda: call.errors)
        await call.send(TTSSpeakFrame("Hello."))
        await call.until(lambda: call.of(TTSAudioRawFrame))
    assert len(providers[CartesiaServer].connections) == 1


async def test_cartesia_lets_the_call_start_when_it_refuses_connections() -> None:
    async with serve(ScriptedEngine()) as providers:
        await providers[CartesiaServer].refuse()
        tts = cartesia(providers)
        async with line(tts) as call:
            await call.until(lambda: call.errors)
            await providers[CartesiaServer].accept()
            await call.send(TTSSpeakFrame("Hello."))
            await call.until(lambda: call.of(TTSAudioRawFrame))
    assert call.errors[0].category is ErrorCategory.CONNECTIVITY


@pytest.mark.slow
async def test_without_a_voice_pipecat_takes_the_text_for_spoken() -> None:
    """With a wrong key nothing is played, yet after 3 s the text enters the context."""
    async with serve(ScriptedEngine(), faults={"cartesia": Faults(wrong_key=True)}) as providers:
        async with line(cartesia(providers)) as call:
            await call.send(*answer("Nobody hears this."))
            await call.until(lambda: call.of(TTSTextFrame))
    assert not call.of(TTSAudioRawFrame)


@pytest.mark.parametrize("fault", ["cut", "drop"])
async def test_cartesia_reconnects_when_its_socket_breaks(fault: str) -> None:
    async with serve(ScriptedEngine()) as providers, line(cartesia(providers)) as call:
        if fault == "cut":
            providers[CartesiaServer].faults.cuts = 1
        await call.send(TTSSpeakFrame("A sentence that nobody hears the end of."))
        await call.until(lambda: call.of(TTSAudioRawFrame))
        if fault == "drop":
            await providers[CartesiaServer].drop()
        await providers.log.until(lambda: len(providers[CartesiaServer].connections) == 2)
        await call.send(TTSSpeakFrame("Hello."))
        await providers.log.until(lambda: sent_kinds(providers, 1)[-1:] == ["done"])
    assert "done" not in sent_kinds(providers, 0)


async def test_a_hanging_cartesia_is_silent() -> None:
    async with serve(ScriptedEngine()) as providers, line(cartesia(providers)) as call:
        providers[CartesiaServer].faults.hang = True
        await call.send(TTSSpeakFrame("Never heard."))
        await providers.log.until(lambda: providers[CartesiaServer].connections[0].received)
        providers[CartesiaServer].faults.hang = False
        await call.send(InterruptionFrame(), TTSSpeakFrame("Heard."))
        await call.until(lambda: call.of(TTSTextFrame))
    assert [frame.text for frame in call.of(TTSTextFrame)] == ["Heard."]


async def test_a_slow_cartesia_is_late() -> None:
    async with serve(ScriptedEngine(), faults={"cartesia": Faults(slow_s=0.3)}) as providers:
        async with line(cartesia(providers)) as call:
            before = time.monotonic()
            await call.send(TTSSpeakFrame("Hello."))
            await call.until(lambda: call.of(TTSAudioRawFrame))
    assert time.monotonic() - before >= 0.3
