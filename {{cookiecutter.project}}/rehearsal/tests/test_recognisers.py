"""What every recogniser's wire does, as Pipecat's own classes see it: healthy, then failing.

Deepgram's, which differs in most, has tests of its own.
"""

import time

import pytest
from pipecat.frames.frames import (
    InputAudioRawFrame,
    VADUserStartedSpeakingFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.utils.errors import ErrorCategory

from rehearsal.providers.faults import Faults
from rehearsal.tests.recogniser_wire import (
    KEY,
    PHONE_HZ,
    Recogniser,
    finals,
    interims,
    speak_twice,
    wire,
)
from rehearsal.tests.service_pipeline import SAMPLE_RATE, line, spoken
from rehearsal.tests.vendors import every

pytestmark = pytest.mark.anyio

EVERY = every("assemblyai", "openai_stt")


@EVERY
@pytest.mark.parametrize("sample_rate", [SAMPLE_RATE, PHONE_HZ])
async def test_what_the_script_says_is_heard_when_somebody_spoke(
    vendor: Recogniser, sample_rate: int
) -> None:
    async with wire(vendor) as ear, line(ear.stt, sample_rate=sample_rate) as call:
        await ear.until_connected()
        await speak_twice(call, sample_rate)
    assert finals(call) == ["I am calling.", "Bye."]
    assert interims(call)[0] == "I"
    assert call.errors == []
    (connection,) = ear.server.connections
    assert connection.request.key == KEY
    assert KEY not in repr(connection.request)
    assert ear.statuses == [101]


@EVERY
async def test_silence_brings_forth_no_transcript(vendor: Recogniser) -> None:
    async with wire(vendor) as ear, line(ear.stt) as call:
        await ear.until_connected()
        *audio, _ = await spoken("")
        await call.send(*audio, VADUserStoppedSpeakingFrame(stop_secs=0.2))
        await call.send(VADUserStartedSpeakingFrame(start_secs=0.2), *await spoken())
        await call.until(lambda: finals(call))
    assert finals(call) == ["I am calling."]
    assert call.errors == []


@EVERY
async def test_a_wrong_key_is_noticed_at_the_third_refusal(vendor: Recogniser) -> None:
    """Both refuse it in an open socket, so Pipecat believes itself connected, and tries again."""
    async with wire(vendor, Faults(wrong_key=True)) as ear, line(ear.stt) as call:
        await call.until(lambda: not ear.stt.is_usable and call.errors)
    assert set(ear.statuses) == {401}
    assert len(ear.statuses) >= 3
    assert all(KEY not in error.error for error in call.errors)
    assert call.errors[-1].category is not ErrorCategory.AUTHENTICATION


@EVERY
@pytest.mark.parametrize(
    ("faults", "status"), [(Faults(rate_limited=1), 429), (Faults(server_errors=1), 500)]
)
async def test_one_refusal_is_overcome_at_once(
    vendor: Recogniser, faults: Faults, status: int
) -> None:
    async with wire(vendor, Faults(**vars(faults))) as ear, line(ear.stt) as call:
        await ear.log.until(lambda: ear.server.connections)
        # Who is refused in an open socket was connected before.
        await ear.until_connected(2 if vendor.refuses_once_open else 1)
        await call.send(*await spoken())
        await call.until(lambda: finals(call))
    assert ear.statuses == [status, 101]


@EVERY
async def test_a_hanging_provider_goes_unnoticed(vendor: Recogniser) -> None:
    async with wire(vendor) as ear, line(ear.stt) as call:
        await ear.until_connected()
        await ear.log.until(lambda: ear.connection.sent)
        ear.server.faults.hang = True
        await call.send(*await spoken())
        await ear.until_received(vendor.asks_with)
        ear.server.faults.hang = False
        await call.send(VADUserStartedSpeakingFrame(start_secs=0.2), *await spoken())
        await call.until(lambda: finals(call))
    assert finals(call) == ["Bye."]
    assert call.errors == []


@EVERY
async def test_a_slow_provider_is_late(vendor: Recogniser) -> None:
    async with wire(vendor) as ear, line(ear.stt) as call:
        await ear.until_connected()
        await ear.log.until(lambda: ear.connection.sent)
        ear.server.faults.slow_s = 0.3
        began = time.monotonic()
        await call.send(*await spoken())
        await call.until(lambda: finals(call))
        assert time.monotonic() - began >= 0.3


@EVERY
@pytest.mark.parametrize("fault", ["cut", "drop"])
async def test_a_broken_socket_is_replaced_at_once(vendor: Recogniser, fault: str) -> None:
    """What was being said is lost."""
    async with wire(vendor) as ear, line(ear.stt) as call:
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
@EVERY
async def test_what_was_said_to_a_provider_that_is_away_is_heard_later_or_lost(
    vendor: Recogniser,
) -> None:
    """For 4 s: Pipecat keeps the audio for it."""
    async with wire(vendor) as ear, line(ear.stt) as call:
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
    seconds = ear.connection.audio_bytes / 2 / vendor.hears_at_hz
    audio = sum(len(frame.audio) for frame in call.of(InputAudioRawFrame))
    sent = audio / 2 / SAMPLE_RATE
    assert seconds == pytest.approx(sent if vendor.keeps_what_was_said else sent / 2, rel=0.05)
