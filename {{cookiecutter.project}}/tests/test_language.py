"""The language of calls, LANGUAGE: everything the bot says and hears is in it."""

from pathlib import Path
from typing import Any

import pytest
from harness import SECONDS, Harness, classes, run_harness
from loguru import logger

import bot
import config
import services
from conversation import phrases, warm_up
from conversation.turns import is_backchannel
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
        await caller.hear(within=SECONDS)
        await caller.hear_out(quiet=0.5, within=SECONDS)
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


@pytest.mark.parametrize("name", DOUBTED)
def test_a_model_or_voice_that_cannot_speak_it_is_said_when_the_bot_starts(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    function, variable, value, doubt = DOUBTED[name]
    if not hasattr(services, function):
        pytest.skip(f"{name} is not among the services")
    monkeypatch.setenv("LANGUAGE", "de")
    monkeypatch.setenv(variable, value)
    for build in ("create_stt", "create_llm", "create_tts", "memory_params"):
        monkeypatch.setattr(services, build, lambda *_: None)
    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    try:
        warm_up.once.__wrapped__()
    finally:
        logger.remove(sink)
    assert any(value in line and doubt in line for line in lines)
    assert any(value in one for one in bot.doubts()), "python -m deploy check asks for these"
    monkeypatch.setenv("LANGUAGE", "en")
    assert not any(value in one for one in bot.doubts())


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


@pytest.mark.parametrize(("code", "noise"), [("de", "Ach so, genau."), ("ja", "はい。")])
def test_listening_noises_are_those_of_the_language(
    monkeypatch: pytest.MonkeyPatch, code: str, noise: str
) -> None:
    monkeypatch.setenv("LANGUAGE", "en")
    assert not is_backchannel(noise)
    monkeypatch.setenv("LANGUAGE", code)
    assert is_backchannel(noise)
