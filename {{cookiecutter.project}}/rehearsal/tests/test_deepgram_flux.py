"""Deepgram Flux's wire, as Pipecat's class sees it: healthy, then failing."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from pipecat.frames.frames import (
    EagerEndOfTurnCancelFrame,
    EagerTranscriptionFrame,
    Frame,
    InputAudioRawFrame,
    InterimTranscriptionFrame,
    ProposedUserStartedSpeakingFrame,
    ProposedUserStoppedSpeakingFrame,
    STTUpdateSettingsFrame,
    TranscriptionFrame,
)
from pipecat.services.deepgram.flux.stt import DeepgramFluxSTTService
from pipecat.services.stt_service import STTService
from pipecat.transcriptions.language import Language
from pipecat.turns.user_turn_strategies import EagerUserTurnStrategies

import services
from rehearsal.providers.deepgram_flux import DeepgramFluxServer
from rehearsal.providers.faults import Faults
from rehearsal.tests.recogniser_wire import KEY, PHONE_HZ, Recogniser, Wire, finals, kinds, wire
from rehearsal.tests.service_pipeline import SAMPLE_RATE, Line, line, spoken

pytestmark = pytest.mark.anyio


def create(environment: dict[str, str]) -> STTService:
    return DeepgramFluxSTTService(
        api_key=KEY, url=environment["DEEPGRAM_FLUX_URL"], enable_eager_end_of_turn=True
    )


VENDOR = Recogniser(DeepgramFluxServer, create, asks_with="", hears_at_hz=SAMPLE_RATE)


@asynccontextmanager
async def flux(
    faults: Faults | None = None, sample_rate: int = SAMPLE_RATE
) -> AsyncIterator[tuple[Wire, Line]]:
    async with wire(VENDOR, faults) as ear, line(ear.stt, sample_rate=sample_rate) as call:
        yield ear, call


async def speech(pause_s: float, sample_rate: int = SAMPLE_RATE) -> list[Frame]:
    """Return speech with a pause behind it, which is all that Flux is told."""
    audio = [
        one for one in await spoken(sample_rate=sample_rate) if isinstance(one, InputAudioRawFrame)
    ]
    silence = bytes(2 * sample_rate // 50)
    # There are 0.2 s of it already.
    more = round((pause_s - 0.2) * 50)
    quiet = [InputAudioRawFrame(silence, sample_rate, num_channels=1) for _ in range(more)]
    return [*audio, *quiet]


def events(ear: Wire) -> list[str]:
    """What was told of turns, an update that follows another left out."""
    told = [one["event"] for one in ear.connection.sent if one["type"] == "TurnInfo"]
    return [one for before, one in zip([None, *told], told, strict=False) if one != before]


@pytest.mark.parametrize("sample_rate", [SAMPLE_RATE, PHONE_HZ])
async def test_flux_tells_both_ends_of_each_turn_and_what_may_be_its_end(sample_rate: int) -> None:
    async with flux(sample_rate=sample_rate) as (ear, call):
        await ear.until_connected()
        for number in (1, 2):
            await call.send(*await speech(0.6, sample_rate))
            await call.until(lambda: len(finals(call)) == number)  # noqa: B023
        await call.until(lambda: len(call.of(ProposedUserStoppedSpeakingFrame)) == 2)
    turn = ["StartOfTurn", "Update", "EagerEndOfTurn", "EndOfTurn"]
    assert events(ear) == [*turn, *turn]
    assert finals(call) == ["I am calling.", "Bye."]
    assert all(frame.finalized for frame in call.of(TranscriptionFrame))
    assert [frame.text for frame in call.of(EagerTranscriptionFrame)] == finals(call)
    assert len(call.of(ProposedUserStartedSpeakingFrame)) == 2
    assert call.of(InterimTranscriptionFrame) and call.errors == []
    sent = ear.connection.sent
    assert [one["sequence_id"] for one in sent] == list(range(len(sent)))
    over = [one for one in sent if one.get("event") == "EndOfTurn"]
    assert [(one["turn_index"], one["trigger"]) for one in over] == [(0, "model"), (1, "model")]
    assert [one["word"] for one in over[0]["words"]] == ["I", "am", "calling."]
    query = ear.connection.request.query
    assert query["model"] == "flux-general-en" and query["sample_rate"] == str(sample_rate)
    assert float(query["eager_eot_threshold"]) == 0.5
    assert kinds(ear.connection.received) == ["CloseStream"]
    assert KEY not in repr(ear.connection.request)


async def test_who_goes_on_after_a_pause_has_not_ended_their_turn() -> None:
    async with flux() as (ear, call):
        await ear.until_connected()
        await call.send(*await speech(0.36), *(await speech(0.6))[25:])
        await call.until(lambda: finals(call))
    assert events(ear) == [
        *("StartOfTurn", "Update", "EagerEndOfTurn", "TurnResumed"),
        *("Update", "EagerEndOfTurn", "EndOfTurn"),
    ]
    assert finals(call) == ["I am calling. Bye."]
    assert call.of(EagerEndOfTurnCancelFrame)


async def test_other_thresholds_hold_from_then_on() -> None:
    async with flux() as (ear, call):
        await ear.until_connected()
        other: Any = DeepgramFluxSTTService.Settings(eager_eot_threshold=None, eot_threshold=0.8)
        await call.send(STTUpdateSettingsFrame(delta=other))
        await ear.log.until(lambda: "ConfigureSuccess" in kinds(ear.connection.sent))
        await call.send(*await speech(0.6))
        await call.until(lambda: finals(call))
    assert events(ear) == ["StartOfTurn", "Update", "EndOfTurn"]


@pytest.mark.parametrize("speculates", [True, False])
async def test_the_projects_flux_ends_turns_by_itself_and_early_where_that_is_wanted(
    monkeypatch: pytest.MonkeyPatch, speculates: bool
) -> None:
    monkeypatch.setenv("LANGUAGE", "de")
    monkeypatch.setenv("SPECULATE", "" if speculates else "0")
    async with wire(VENDOR) as ear:
        for name, value in ear.server.environment.items():
            monkeypatch.setenv(name, value)
        stt = services.create_stt()
        if not isinstance(stt, DeepgramFluxSTTService):
            pytest.skip("the template builds the default recogniser")
        strategies = stt.service_metadata_frame().user_turn_strategies
        assert isinstance(strategies, EagerUserTurnStrategies) is speculates
        async with line(stt) as call:
            await ear.log.until(lambda: ear.server.connections)
            await call.send(*await speech(0.6))
            await call.until(lambda: finals(call))
    query = ear.connection.request.query
    assert (query["model"], query["language_hint"]) == ("flux-general-multi", Language.DE.value)
    assert ("EagerEndOfTurn" in events(ear)) is speculates


async def test_a_flux_that_refuses_the_key_is_given_up_at_once_and_no_key_is_told() -> None:
    async with flux(Faults(wrong_key=True)) as (ear, call):
        await call.until(lambda: not ear.stt.is_usable and call.errors)
    assert ear.statuses == [401]
    assert all(KEY not in error.error for error in call.errors)


@pytest.mark.parametrize("fault", ["cut", "drop"])
async def test_a_broken_socket_to_flux_is_replaced_and_ends_the_turn(fault: str) -> None:
    async with flux() as (ear, call):
        await ear.until_connected()
        if fault == "cut":
            ear.server.faults.cuts = 1
            await call.send(*await speech(0.6))
        else:
            await ear.server.drop()
        await ear.until_connected(2)
        before = len(finals(call))
        await call.send(*await speech(0.6))
        await call.until(lambda: len(finals(call)) > before)
    assert finals(call)[-1] in ("I am calling.", "Bye.")
    assert ear.stt.is_usable


async def test_a_hanging_flux_goes_unnoticed_and_a_slow_one_is_late() -> None:
    async with flux() as (ear, call):
        await ear.until_connected()
        await ear.log.until(lambda: ear.connection.sent)
        ear.server.faults.hang = True
        await call.send(*await speech(0.6))
        heard = sum(
            len(one.audio) for one in await speech(0.6) if isinstance(one, InputAudioRawFrame)
        )
        await ear.log.until(lambda: ear.connection.audio_bytes >= heard)
        ear.server.faults.hang, ear.server.faults.slow_s = False, 0.1
        began = time.monotonic()
        await call.send(*await speech(0.6))
        await call.until(lambda: finals(call))
        assert time.monotonic() - began >= 0.3
    assert call.errors == []


@pytest.mark.parametrize(
    "query",
    ["model=flux-general-en&sample_rate=8000&encoding=opus", "sample_rate=8000&encoding=linear16"],
)
async def test_flux_wants_pcm_and_a_model_of_its_own(query: str) -> None:
    async with wire(VENDOR) as ear, aiohttp.ClientSession() as http:
        url = f"http://127.0.0.1:{ear.server.port}/v2/listen?{query}"
        async with http.get(url, headers={"Authorization": f"Token {KEY}"}) as response:
            assert response.status == 400
