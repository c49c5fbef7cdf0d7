"""The language of calls, LANGUAGE, and their clock, TIMEZONE: what the bot hears, says, knows."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from harness import SECONDS, Harness, classes, run_harness
from loguru import logger

import bot
import config
import services
from conversation import clock, outcome, phrases, warm_up
from conversation.turns import is_backchannel, is_farewell
from rehearsal.engines.engine import ToolCall
from rehearsal.engines.scripted import Answer, Script

pytestmark = pytest.mark.anyio

GREETING = "Guten Tag, was kann ich für Sie tun?"
ANSWER = "Wir haben von acht bis achtzehn Uhr geöffnet."
GOODBYE = "Auf Wiederhören, einen schönen Tag noch."
GERMAN = Script(
    hears=("Wann haben Sie geöffnet?", "Danke, auf Wiederhören."),
    answers=(
        Answer(heard="Wiederhören", calls=(ToolCall("end_call", {"goodbye": GOODBYE}),)),
        Answer(says=ANSWER),
        Answer(told="did not reach", says=ANSWER),
    ),
)


def wire_of(harness: Harness, kind: str) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The query and the messages of the bot's last connection to a service."""
    connection = harness.server(kind).connections[-1]
    return dict(connection.request.query), connection.received


# Where each service is told the language, by its class.
TOLD = {
    "DeepgramSTTService": lambda query, _: query["language"],
    "DeepgramFluxSTTService": lambda query, _: query["language_hint"],
    "AssemblyAISTTService": lambda query, _: query["language_codes"].strip('["]'),
    "OpenAIRealtimeSTTService": lambda _, messages: next(
        message["session"]["audio"]["input"]["transcription"]["language"]
        for message in messages
        if message["type"] == "session.update"
    ),
    "CartesiaTTSService": lambda _, messages: messages[0]["language"],
    "ElevenLabsTTSService": lambda query, _: query["language_code"],
    "DeepgramTTSService": lambda query, _: query["model"].rpartition("-")[2],
}


@pytest.fixture
async def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A bot that speaks German."""
    monkeypatch.setenv("LANGUAGE", "de")
    async with run_harness(monkeypatch, tmp_path) as harness:
        monkeypatch.setenv("GREETING", GREETING)
        harness.engine.script = GERMAN
        yield harness


@pytest.mark.slow
async def test_a_call_in_german_is_german_from_the_first_word_to_the_last(
    harness: Harness,
) -> None:
    async with harness.caller("twilio") as caller:
        await harness.hear_greeting(caller)
        harness.server("llm").faults.server_errors = 9
        await harness.say(caller)
        await harness.providers.log.until(
            lambda: "Einen Moment, bitte." in [text.strip() for text in harness.spoken],
            within_s=SECONDS,
        )
        harness.server("llm").faults.server_errors = 0
        await harness.hear_said(caller, ANSWER)
        await harness.say(caller)
        await harness.over()

    said = [text.strip() for text in harness.spoken]
    assert set(said) == {GREETING, "Einen Moment, bitte.", ANSWER, GOODBYE}
    assert (said[0], said[-1]) == (GREETING, GOODBYE)
    assert "Speak German" in harness.engine.asked[0][0]["content"]
    assert harness.record["ending"]["reason"] == "agent-ended"
    ended = harness.received.ended
    assert ended
    heard = [turn["content"] for turn in ended["transcript"] if turn["role"] == "user"]
    assert heard == list(GERMAN.hears)


@pytest.mark.parametrize("kind", ["stt", "tts"])
async def test_each_service_is_told_the_language_in_its_own_form(
    harness: Harness, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here from `de-AT`, which most of them do not know."""
    monkeypatch.setenv("LANGUAGE", "de-AT")
    name = classes()[kind]
    async with harness.caller("twilio") as caller:
        await caller.hear(within=SECONDS)
    await harness.over()
    assert TOLD[name](*wire_of(harness, kind)) in ("de", "de-AT")


@pytest.mark.parametrize(
    ("value", "code"), [("", config.DEFAULT_LANGUAGE), ("DE", "de"), ("pt_br", "pt-BR")]
)
def test_a_language_is_a_code_in_any_case(
    monkeypatch: pytest.MonkeyPatch, value: str, code: str
) -> None:
    monkeypatch.setenv("LANGUAGE", value)
    assert config.language() == code


def test_what_is_no_code_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANGUAGE", "deutsch")
    with pytest.raises(RuntimeError, match=r"such as en, de or pt-BR, not 'deutsch'"):
        config.language()


def test_a_language_without_phrases_falls_back_and_is_doubted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LANGUAGE", "tr")
    assert phrases.spoken().language == "English"
    assert "no tr.toml" in next(phrases.doubts())
    assert phrases.instruction().startswith("Speak the language with the code tr,")


# A service of the form that may not speak LANGUAGE: its factory, its variable, a value, the doubt.
DOUBTED = {
    "Whisper": ("_whisper_model", "WHISPER_MODEL", "base.en", "which hears English only"),
    "Piper": ("_piper_voice", "PIPER_VOICE", "en_US-ljspeech-medium", "does not speak de"),
    "Aura": ("_deepgram_voice", "DEEPGRAM_TTS_VOICE", "aura-2-andromeda-en", "does not speak de"),
}


def test_a_model_or_voice_that_cannot_speak_it_is_said_when_the_bot_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CALLS_DIR", str(tmp_path))
    here = [case for case in DOUBTED.values() if hasattr(services, case[0])]
    monkeypatch.setenv("LANGUAGE", "de")
    for _, variable, value, _ in here:
        monkeypatch.setenv(variable, value)
    for build in ("create_stt", "create_llm", "create_tts", "memory_params"):
        monkeypatch.setattr(services, build, lambda *_: None)
    (tmp_path / "outcome.json").write_text("{")
    monkeypatch.setattr(outcome, "SCHEMA_FILE", tmp_path / "outcome.json")
    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    try:
        warm_up.once.__wrapped__()
    finally:
        logger.remove(sink)
    assert "outcome.json is no JSON schema" in "".join(lines), "the file is called so"
    for _, _, value, doubt in here:
        assert any(value in line and doubt in line for line in lines)
        assert any(value in one for one in bot.doubts()), "python -m deploy check asks for these"
    monkeypatch.setenv("LANGUAGE", "en")
    assert not any(value in one for _, _, value, _ in here for one in bot.doubts())


@pytest.mark.parametrize("file", sorted(phrases.FOLDER.glob("*.toml")), ids=lambda file: file.stem)
def test_every_file_of_phrases_has_them_all_in_its_own_language(
    monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    monkeypatch.setenv("LANGUAGE", file.stem)
    of_file = phrases.spoken()
    assert all(vars(of_file).values())
    assert not [doubt for doubt in phrases.doubts() if ".toml" in doubt]
    monkeypatch.setenv("LANGUAGE", "en")
    assert file.stem == "en" or of_file.apology != phrases.spoken().apology


@pytest.mark.parametrize(
    ("code", "goodbye", "sentence"),
    [
        ("en", "Thanks, you too. Bye!", "Thanks, one more question."),
        ("de", "Danke, Ihnen auch. Auf Wiederhören!", "Danke, noch eine Frage."),
        ("es", "Gracias, igualmente. ¡Adiós!", "Gracias, otra pregunta."),
        ("fr", "Merci, à vous aussi. Au revoir.", "Merci, encore une question."),
        ("it", "Grazie, altrettanto. Arrivederci!", "Grazie, ancora una domanda."),
        ("ja", "ありがとうございました。失礼します。", "すみません、もう一つ質問があります。"),
        ("nl", "Bedankt, hetzelfde. Tot ziens!", "Bedankt, nog een vraag."),
        ("pt", "Obrigado, igualmente. Tchau!", "Obrigado, mais uma pergunta."),
    ],
)
def test_a_goodbye_returned_is_told_from_a_sentence_in_each_language(
    monkeypatch: pytest.MonkeyPatch, code: str, goodbye: str, sentence: str
) -> None:
    monkeypatch.setenv("LANGUAGE", code)
    assert is_farewell(goodbye)
    assert not is_farewell(sentence)


@pytest.mark.parametrize(("code", "noise"), [("de", "Ach so, genau."), ("ja", "はい。")])
def test_listening_noises_are_those_of_the_language(
    monkeypatch: pytest.MonkeyPatch, code: str, noise: str
) -> None:
    monkeypatch.setenv("LANGUAGE", "en")
    assert not is_backchannel(noise)
    monkeypatch.setenv("LANGUAGE", code)
    assert is_backchannel(noise)


EVENING = datetime(2026, 11, 25, 23, 40, tzinfo=UTC)


def test_the_time_is_told_in_the_zone_of_the_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIMEZONE", raising=False)
    assert clock.instruction(EVENING) == (
        "This call began on Wednesday, 25 November 2026 at 23:40, UTC time."
    )
    monkeypatch.setenv("TIMEZONE", "Europe/Berlin")
    assert clock.instruction(EVENING) == (
        "This call began on Thursday, 26 November 2026 at 00:40, Europe/Berlin time."
    )


@pytest.mark.parametrize("zone", ["Berlin", "../etc/passwd", "Europe", "UTC+1"])
def test_what_is_no_zone_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, zone: str
) -> None:
    monkeypatch.setenv("TIMEZONE", zone)
    with pytest.raises(RuntimeError, match="TIMEZONE is a zone such as Europe/Berlin, not"):
        config.timezone()


@pytest.mark.slow
async def test_what_two_calls_are_told_of_the_time_differs_in_the_last_line_alone(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in a call each request begins with the one before: what a provider can have cached."""
    monkeypatch.setenv("GREETING", "")
    for zone in ("Europe/Berlin", "Asia/Tokyo"):
        monkeypatch.setenv("TIMEZONE", zone)
        async with harness.caller("twilio") as caller:
            await caller.hear(within=SECONDS)
            if zone == "Asia/Tokyo":
                await caller.hear_out(quiet=0.5, within=SECONDS)
                await harness.say(caller)
                await caller.hear(within=SECONDS)
    await harness.over(1)

    asked_first, asked_then, *_ = harness.engine.asked[1:]
    assert asked_then[: len(asked_first)] == asked_first
    (one, *_), (other, *_) = harness.engine.asked[:2]
    *same, clock_of_one = one["content"].splitlines()
    assert other["content"].splitlines()[:-1] == same
    assert "Europe/Berlin" in clock_of_one
    for call in harness.roark.calls.values():
        assert "This call began" not in str(call.started)
