"""Deepgram's wire, as Pipecat's own class sees it: healthy, then failing."""

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest
from pipecat.frames.frames import (
    InterimTranscriptionFrame,
    TextFrame,
    TranscriptionFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.services.deepgram.stt import DeepgramSTTService

from rehearsal.engines.engine import Heard
from rehearsal.engines.scripted import Script, ScriptedEngine, ScriptedRecogniser
from rehearsal.providers.all import Providers, serve
from rehearsal.providers.deepgram import DeepgramServer
from rehearsal.providers.faults import ALWAYS, Faults
from rehearsal.tests.service_pipeline import SAMPLE_RATE, line, spoken

pytestmark = pytest.mark.anyio

KEY = "a-secret-of-the-bot"


def deepgram(providers: Providers) -> DeepgramSTTService:
    return DeepgramSTTService(api_key=KEY, base_url=providers.environment["DEEPGRAM_BASE_URL"])


def finalized(providers: Providers) -> int:
    return providers[DeepgramServer].connections[0].received.count({"type": "Finalize"})


async def test_deepgram_hears_what_the_script_says_when_somebody_spoke() -> None:
    script = Script(hears=("I am calling.", "Bye."))
    async with serve(ScriptedEngine(script)) as providers, line(deepgram(providers)) as call:
        await call.send(*await spoken())
        await call.until(lambda: call.of(TranscriptionFrame))
        await call.send(*await spoken())
        await call.until(lambda: len(call.of(TranscriptionFrame)) == 2)
    assert [frame.text for frame in call.of(TranscriptionFrame)] == ["I am calling.", "Bye."]
    guesses = [frame.text for frame in call.of(InterimTranscriptionFrame)]
    assert guesses == ["I", "I am calling.", "Bye.", "Bye."]
    assert call.of(TranscriptionFrame)[0].finalized
    (connection,) = providers[DeepgramServer].connections
    assert connection.request.key == KEY
    assert KEY not in repr(connection.request)
    assert connection.request.query["sample_rate"] == str(SAMPLE_RATE)
    assert connection.received.count({"type": "Finalize"}) == 2
    assert providers.peers == {"127.0.0.1"}


async def test_deepgram_says_when_the_speech_was() -> None:
    """The times are those of the audio received: half a second of silence, then speech."""
    async with serve(ScriptedEngine()) as providers, line(deepgram(providers)) as call:
        await call.send(*await spoken("measured"))
        await call.until(lambda: call.of(TranscriptionFrame))
    result: Any = call.of(TranscriptionFrame)[0].result
    words = result.channel.alternatives[0].words
    assert result.start == pytest.approx(0.5, abs=0.011)
    assert result.duration == pytest.approx(8 * 0.03, abs=0.021)
    assert words[0].start == result.start
    assert words[-1].end == pytest.approx(result.start + result.duration)


async def test_deepgram_goes_on_listening_until_its_last_words_are_known() -> None:
    """What is said while a recogniser takes its time is not part of what it was asked for."""

    class Late(ScriptedRecogniser):
        async def finalize(self) -> list[Heard]:
            return [replace(heard, known_after_s=0.4) for heard in await super().finalize()]

    class LateEngine(ScriptedEngine):
        def listen(self, sample_rate: int) -> Late:
            return Late(self.script.hears, sample_rate)

    engine = LateEngine(Script(hears=("first things", "second things")))
    async with serve(engine) as providers, line(deepgram(providers)) as call:
        await call.send(*await spoken("first things"))
        await providers.log.until(lambda: finalized(providers))
        await call.send(*await spoken("second things"))
        await call.until(lambda: len(call.of(TranscriptionFrame)) == 2)
    told = [frame.text for frame in call.of(TextFrame)]
    assert told[: told.index("second")] == ["first", "first things"]
    assert told[-2:] == ["first things", "second things"]


async def test_silence_is_finalized_without_a_transcript() -> None:
    async with serve(ScriptedEngine()) as providers, line(deepgram(providers)) as call:
        await call.send(VADUserStoppedSpeakingFrame(stop_secs=0.2))
        await providers.log.until(lambda: providers[DeepgramServer].connections[0].sent)
        await call.send(*await spoken())
        await call.until(lambda: call.of(TranscriptionFrame))
    empty, *_ = providers[DeepgramServer].connections[0].sent
    assert empty["from_finalize"]
    assert empty["channel"]["alternatives"][0]["transcript"] == ""
    assert len(call.of(TranscriptionFrame)) == 1


async def test_deepgram_gives_up_at_once_on_a_wrong_key() -> None:
    async with serve(ScriptedEngine(), faults={"deepgram": Faults(wrong_key=True)}) as providers:
        stt = deepgram(providers)
        async with line(stt) as call:
            await call.until(lambda: call.errors)
    assert not stt.is_usable
    assert [request.status for request in providers[DeepgramServer].requests] == [401]
    assert KEY not in call.errors[0].error


async def test_deepgram_gives_up_at_once_on_a_429_too() -> None:
    """Pipecat 1.14 takes every 4xx of the handshake for permanent."""
    async with serve(ScriptedEngine(), faults={"deepgram": Faults(rate_limited=1)}) as providers:
        stt = deepgram(providers)
        async with line(stt) as call:
            await call.until(lambda: call.errors)
    assert not stt.is_usable
    assert [request.status for request in providers[DeepgramServer].requests] == [429]


async def test_a_hanging_deepgram_goes_unnoticed() -> None:
    script = Script(hears=("Lost.", "Heard."))
    async with serve(ScriptedEngine(script)) as providers, line(deepgram(providers)) as call:
        providers[DeepgramServer].faults.hang = True
        await call.send(*await spoken())
        await providers.log.until(lambda: finalized(providers) == 1)
        providers[DeepgramServer].faults.hang = False
        await call.send(*await spoken())
        await call.until(lambda: call.of(TranscriptionFrame))
    assert [frame.text for frame in call.of(TranscriptionFrame)] == ["Heard."]
    assert call.errors == []


async def test_a_slow_deepgram_is_late() -> None:
    async with serve(ScriptedEngine()) as providers, line(deepgram(providers)) as call:
        providers[DeepgramServer].faults.slow_s = 0.3
        before = time.monotonic()
        await call.send(*await spoken())
        await call.until(lambda: call.of(TranscriptionFrame))
    assert time.monotonic() - before >= 0.3


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["cut", "drop"])
async def test_deepgram_reconnects_when_its_socket_breaks(fault: str) -> None:
    """After 4 s; what was being said is lost."""
    async with serve(ScriptedEngine()) as providers, line(deepgram(providers)) as call:
        if fault == "cut":
            providers[DeepgramServer].faults.cuts = 1
            await call.send(*await spoken())
        else:
            await providers.log.until(lambda: providers[DeepgramServer].connections)
            await providers[DeepgramServer].drop()
        await providers.log.until(lambda: len(providers[DeepgramServer].connections) == 2)
        assert call.of(TranscriptionFrame) == []
        await call.send(*await spoken())
        await call.until(lambda: call.of(TranscriptionFrame))
    assert [connection.is_open for connection in providers[DeepgramServer].connections] == [
        False,
        False,
    ]


@pytest.mark.slow
async def test_deepgram_recovers_from_one_500() -> None:
    async with serve(ScriptedEngine(), faults={"deepgram": Faults(server_errors=1)}) as providers:
        async with line(deepgram(providers)) as call:
            await call.send(*await spoken())
            await call.until(lambda: call.of(TranscriptionFrame))
    assert [request.status for request in providers[DeepgramServer].requests] == [500, 101]


@pytest.mark.slow
async def test_deepgram_gives_up_after_three_attempts() -> None:
    """4 s apart, and the pipeline does not start before."""

    async def given_up(fault: str) -> None:
        async with serve(ScriptedEngine()) as providers:
            if fault == "refused":
                await providers[DeepgramServer].refuse()
            else:
                providers[DeepgramServer].faults.server_errors = ALWAYS
            stt = deepgram(providers)
            before = time.monotonic()
            async with line(stt) as call:
                assert time.monotonic() - before >= 8
                await call.until(lambda: not stt.is_usable)
        assert len(providers[DeepgramServer].requests) == (0 if fault == "refused" else 3)

    async with asyncio.TaskGroup() as both:
        for fault in ("refused", "500"):
            both.create_task(given_up(fault))
