"""What the caller hears when a provider fails, and what the record says: never silence, no lies."""

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import SECONDS, Harness, classes, run_harness
from pipecat.frames.frames import Frame, InterruptionFrame
from pipecat.processors.aggregators.llm_response_universal import LLMAssistantAggregator
from pipecat.processors.frame_processor import FrameDirection
from pipecat.services.tts_service import TTSService

import bot
import services
from conversation import phrases, recorded, recovery
from rehearsal.callers.caller import Caller
from rehearsal.engines.scripted import Script
from rehearsal.providers.faults import ALWAYS

pytestmark = pytest.mark.anyio

TALK = Script.parse(
    {
        "greeting": "Hello there.",
        "hears": ["Can you hear me?", "Then tell me more."],
        "answers": [
            {"told": "did not reach", "says": "Here is my answer again."},
            {"says": "Yes, and it is loud and clear, every single word of it."},
        ],
    }
)


@pytest.fixture
async def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The bot and its world; the bot loses patience with its providers soon."""
    async with run_harness(monkeypatch, tmp_path) as harness:
        harness.engine.script = TALK
        monkeypatch.setenv("ANSWER_SECONDS", "3")
        yield harness


async def bot_hangs_up(caller: Caller) -> None:
    await asyncio.wait_for(caller.ended.wait(), SECONDS)


def noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails is noticed when it happens, not for the silence after it."""
    monkeypatch.setenv("ANSWER_SECONDS", "60")


def said_by_bot(harness: Harness) -> list[str]:
    ended = harness.received.ended
    assert ended
    return [turn["content"] for turn in ended.get("transcript", []) if turn["role"] == "assistant"]


def assert_recording_was_heard(caller: Caller, harness: Harness) -> None:
    """And nothing but the recording, in the record too."""
    text, recording = phrases.spoken_with_recording()
    once = sounding_seconds(*recorded.load(recording))
    # Opus takes up to a quarter of it. Said twice it would be twice as much.
    assert 0.6 < sounding_seconds(caller.heard.pcm(), caller.heard.sample_rate) / once < 1.3
    assert said_by_bot(harness) == [text]


def sounding_seconds(pcm: bytes, sample_rate: int) -> float:
    """How much of PCM16 is within 20 dB of its peak, sample by sample.

    Holes add nothing: a busy process plays 10 ms of silence between any two pieces, and by windows
    or by the clock that is twice as much.
    """
    loudness = np.abs(np.frombuffer(pcm, dtype="<i2").astype(int))
    return np.count_nonzero(loudness > loudness.max() / 10) / sample_rate


def spoken_seconds(caller: Caller) -> float:
    return sum(utterance.end - utterance.start for utterance in caller.heard.utterances)


async def assert_failed(harness: Harness, kind: str) -> None:
    assert (await harness.over()).error is None
    ending: dict[str, Any] = harness.record["ending"]
    assert ending["reason"] == "error"
    assert classes()[kind] in ending["detail"]
    assert harness.received.ended
    assert harness.received.ended["callEndedReason"] == "error"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "transport"), [("stt", "twilio"), ("llm", "webrtc")])
async def test_a_wrong_key_is_apologised_for_and_ends_the_call(
    harness: Harness, kind: str, transport: str
) -> None:
    harness.server(kind).faults.wrong_key = True
    async with harness.caller(transport) as caller:
        await bot_hangs_up(caller)
        assert spoken_seconds(caller) > 1
    await assert_failed(harness, kind)
    assert " ".join(said_by_bot(harness)).endswith(phrases.spoken().apology)


async def test_a_voice_with_a_wrong_key_is_apologised_for_by_the_recording_and_by_nothing_else(
    harness: Harness,
) -> None:
    harness.server("tts").faults.wrong_key = True
    async with harness.caller("twilio") as caller:
        await bot_hangs_up(caller)
    await assert_failed(harness, "tts")
    assert_recording_was_heard(caller, harness)
    # Some voices only show by their silence that the key is wrong.
    assert len(harness.engine.asked) <= recovery.TTS_ATTEMPTS


@pytest.mark.slow
async def test_a_recogniser_that_is_down_is_apologised_for(harness: Harness) -> None:
    await harness.server("stt").refuse()
    async with harness.caller("twilio") as caller:
        await bot_hangs_up(caller)
    await assert_failed(harness, "stt")
    assert " ".join(said_by_bot(harness)).endswith(phrases.spoken().apology)


@pytest.mark.slow
@pytest.mark.skipif(
    classes()["stt"] != "DeepgramSTTService", reason="others do not hold up the call's beginning"
)
async def test_a_recogniser_that_refuses_twice_is_not_waited_for_any_longer(
    harness: Harness,
) -> None:
    harness.server("stt").faults.server_errors = ALWAYS
    async with harness.caller("twilio") as caller:
        await bot_hangs_up(caller)
    await assert_failed(harness, "stt")
    assert " ".join(said_by_bot(harness)).endswith(phrases.spoken().apology)
    assert len(harness.server("stt").requests) == recovery.STT_ATTEMPTS


@pytest.mark.slow
async def test_an_llm_that_fails_once_is_asked_again(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    noticed_at_once(monkeypatch)
    harness.server("llm").faults.cuts = 1
    async with harness.caller("twilio") as caller:
        await harness.hear_said(caller, TALK.answers[0].says)
    await harness.over()
    assert " ".join(said_by_bot(harness)).endswith(
        f"{phrases.spoken().one_moment} Here is my answer again."
    )


@pytest.mark.slow
async def test_what_was_heard_of_an_answer_is_in_the_context_before_the_llm_is_asked_again(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late it is known: an LLM that finds it at the end takes it for its answer."""
    llm, is_asked_again = harness.server("llm"), asyncio.Event()
    take = LLMAssistantAggregator.process_frame

    async def take_late(
        self: LLMAssistantAggregator, frame: Frame, direction: FrameDirection
    ) -> None:
        if isinstance(frame, InterruptionFrame):
            with suppress(TimeoutError):
                await asyncio.wait_for(is_asked_again.wait(), 0.3)
        await take(self, frame, direction)

    async with harness.caller("twilio") as caller:
        await harness.hear_greeting(caller)
        said = await harness.say(caller)
        await caller.hear(since=said.end, within=SECONDS)
        questions = len(llm.requests)
        monkeypatch.setattr(LLMAssistantAggregator, "process_frame", take_late)
        await harness.server("tts").drop()
        await harness.providers.log.until(lambda: len(llm.requests) > questions, within_s=SECONDS)
        is_asked_again.set()
    await harness.over()
    heard, instruction = harness.engine.asked[-1][-2:]
    assert heard["role"] == "assistant" and TALK.answers[1].says.startswith(heard["content"])
    assert recovery.SAY_AGAIN in instruction["content"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["server_errors", "hang"])
async def test_an_llm_that_stays_broken_ends_the_call_with_an_apology(
    harness: Harness, fault: str
) -> None:
    async with harness.caller("twilio") as caller:
        await harness.hear_greeting(caller)
        setattr(harness.server("llm").faults, fault, True if fault == "hang" else 1000)
        await harness.say(caller)
        await bot_hangs_up(caller)
    await assert_failed(harness, "llm")
    assert " ".join(said_by_bot(harness)).endswith(phrases.spoken().apology)


@pytest.mark.slow
async def test_an_llm_that_is_down_ends_the_call_with_an_apology(harness: Harness) -> None:
    await harness.server("llm").refuse()
    async with harness.caller("twilio") as caller:
        await bot_hangs_up(caller)
    await assert_failed(harness, "llm")
    assert " ".join(said_by_bot(harness)).endswith(phrases.spoken().apology)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["rate_limited", "server_errors"])
async def test_one_refused_request_goes_unnoticed(
    harness: Harness, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK asks again by itself."""
    noticed_at_once(monkeypatch)
    async with harness.caller("twilio") as caller:
        await harness.hear_greeting(caller)
        setattr(harness.server("llm").faults, fault, 1)
        await harness.ask(caller)
    await harness.over()
    assert " ".join(said_by_bot(harness)) == f"Hello there. {TALK.answers[1].says}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transport", "fault"),
    [("twilio", "cut"), ("twilio", "half"), ("webrtc", "hang")],
)
async def test_an_llm_that_fails_once_is_asked_again_and_the_call_goes_on(
    harness: Harness, transport: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault != "hang":
        noticed_at_once(monkeypatch)
    llm = harness.server("llm")
    if fault == "half" and classes()["llm"] != "OpenAILLMService":
        pytest.skip("Pipecat takes what ends early for a whole answer of this LLM")
    async with harness.caller(transport) as caller:
        await harness.hear_greeting(caller)
        # The first break is of what is answered before the turn has ended: nobody hears of it.
        llm.faults.cuts, llm.faults.halves = 2 * (fault == "cut"), 2 * (fault == "half")
        llm.faults.hang = fault == "hang"
        questions = len(llm.requests)
        await harness.say(caller)
        await harness.providers.log.until(lambda: len(llm.requests) > questions, within_s=SECONDS)
        llm.faults.hang = False
        await harness.hear_said(caller, TALK.answers[0].says)
        await harness.ask(caller)
    await harness.over()
    again = f"{phrases.spoken().one_moment} Here is my answer again. {TALK.answers[1].says}"
    assert " ".join(said_by_bot(harness)).endswith(again)
    assert harness.record["ending"]["reason"] == "client-disconnected"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["server_errors", "cuts", "drop"])
async def test_a_voice_that_fails_once_speaks_again_and_the_call_goes_on(
    harness: Harness, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noticed_at_once(monkeypatch)
    async with harness.caller("twilio") as caller:
        await harness.hear_greeting(caller)
        voice = harness.server("tts")
        if fault != "drop":
            setattr(voice.faults, fault, 1)
        said = await harness.say(caller)
        await caller.hear(since=said.end, within=SECONDS)
        if fault == "drop":
            await voice.drop()
        await harness.hear_said(caller, TALK.answers[0].says)
        await harness.ask(caller)
    await harness.over()
    answer = TALK.answers[1].says
    again = [phrases.spoken().one_moment, "Here is my answer again.", answer]
    is_refused = fault == "server_errors"
    to_say = ["Hello there.", *again] if is_refused else ["Hello there.", answer, *again]
    assert [text.strip() for text in harness.spoken] == to_say
    spoken = said_by_bot(harness)
    assert " ".join(spoken).endswith(" ".join(again))
    if is_refused:
        assert answer not in spoken[:-1], "never played, recorded as spoken"


@pytest.mark.slow
async def test_an_answer_that_could_not_be_prepared_for_the_voice_is_given_again(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever of the project's own raises there, Pipecat drops the sentence."""
    noticed_at_once(monkeypatch)
    create = services.create_tts
    broken = [TALK.answers[1].says]

    async def breaks_once(text: str, _type: object) -> str:
        if text.strip() in broken:
            broken.clear()
            raise OverflowError("a bug")
        return text

    def create_tts() -> TTSService:
        voice = create()
        voice.add_text_transformer(breaks_once)
        return voice

    monkeypatch.setattr(services, "create_tts", create_tts)
    async with harness.caller("twilio") as caller:
        await harness.hear_greeting(caller)
        await harness.say(caller)
        await harness.hear_said(caller, TALK.answers[0].says)
    await harness.over()
    again = ["Hello there.", phrases.spoken().one_moment, TALK.answers[0].says]
    assert [text.strip() for text in harness.spoken] == again
    assert harness.record["ending"]["reason"] == "client-disconnected"


@pytest.mark.slow
async def test_a_voice_that_hangs_is_apologised_for_by_the_recording(harness: Harness) -> None:
    harness.server("tts").faults.hang = True
    async with harness.caller("webrtc") as caller:
        await bot_hangs_up(caller)
    await assert_failed(harness, "tts")
    assert_recording_was_heard(caller, harness)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stt", "tts"])
async def test_a_service_whose_handshake_hangs_is_not_waited_for(
    harness: Harness, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "CONNECT_SECONDS", 1.0)
    harness.server(kind).faults.hang_handshake = True
    async with harness.caller("twilio") as caller:
        await bot_hangs_up(caller)
    await assert_failed(harness, kind)
    assert " ".join(said_by_bot(harness)).endswith(phrases.spoken().apology)
    assert spoken_seconds(caller) > 1


@pytest.mark.slow
async def test_with_nothing_reachable_the_caller_hears_the_recording(harness: Harness) -> None:
    for kind in ("stt", "llm", "tts"):
        await harness.server(kind).refuse()
    async with harness.caller("twilio") as caller:
        await bot_hangs_up(caller)
    assert (await harness.over()).error is None
    assert harness.record["ending"]["reason"] == "error"
    assert_recording_was_heard(caller, harness)


async def test_the_apology_is_recorded_by_the_bots_own_voice(
    harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "de.au"
    await recorded.record(file, "Es tut mir leid.")
    assert [text.strip() for text in harness.spoken] == ["Es tut mir leid."]
    pcm, sample_rate = recorded.load(file)
    assert np.abs(np.frombuffer(pcm, "<i2")).max() > 1000
    assert 0.3 < len(pcm) / 2 / sample_rate < 5
    harness.server("tts").faults.wrong_key = True
    monkeypatch.setattr(recorded, "RECORD_SECONDS", 2.0)
    with pytest.raises(TimeoutError):
        await recorded.record(tmp_path / "fr.au", "Je suis désolé.")
    assert not (tmp_path / "fr.au").exists()


async def test_a_greeting_that_breaks_is_made_up_for(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_text: str) -> None:
        raise LookupError("a bug")

    monkeypatch.setattr(bot.endings, "instruction", broken)
    async with harness.caller("twilio") as caller:
        await caller.hear(within=SECONDS)
    await harness.over()
