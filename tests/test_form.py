"""The form: what is asked, and that every answer makes a difference."""

import os
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from baking import Bake, BakedProject, CommandLine, succeed

# Every answer a question can have; where any text will do, the default and another one.
ANSWERS: dict[str, list[Any]] = {
    "project": ["my-voice-bot", "another-bot"],
    "purpose": ["You tell callers the time.", "You take orders for a pizzeria."],
    "language": ["en", "de", "es", "fr", "it", "ja", "nl", "pt"],
    "transport": ["webrtc", "daily", "twilio"],
    "stt": ["deepgram", "deepgram-flux", "assemblyai", "openai", "local"],
    "llm": ["openai", "anthropic", "google", "compatible"],
    "tts": ["cartesia", "elevenlabs", "deepgram", "local"],
    "region": ["us-west", "us-east", "eu-central", "ap-south"],
    "record_audio": [True, False],
}

TRANSCRIPT = """\
  [1/9] Project name: the folder, the package and the agent on Pipecat Cloud (my-voice-bot): \
  [2/9] Purpose: one sentence to the bot, who it is and what it does \
(You are the friendly receptionist of a small dental practice and help callers with opening hours \
and appointments.): \
  [3/9] Language of the calls (LANGUAGE in .env takes any other)
    1 - English
    2 - German
    3 - Spanish
    4 - French
    5 - Italian
    6 - Japanese
    7 - Dutch
    8 - Portuguese
    Choose from [1/2/3/4/5/6/7/8] (1): \
  [4/9] Transport to start with (the code has all three)
    1 - WebRTC: a browser page on your own machine, no account
    2 - Daily: rooms for browsers and apps, what Pipecat Cloud uses
    3 - Twilio: phone calls
    Choose from [1/2/3] (1): \
  [5/9] Speech recognition: who hears the caller
    1 - Deepgram
    2 - Deepgram Flux: it also tells when the caller's turn ends
    3 - AssemblyAI
    4 - OpenAI
    5 - Whisper in the bot's own process: no key, slower, needs a good CPU
    Choose from [1/2/3/4/5] (1): \
  [6/9] Language model: who decides what to say
    1 - OpenAI
    2 - Anthropic
    3 - Google Gemini
    4 - Any OpenAI-compatible server by its URL, such as Ollama, Groq or vLLM
    Choose from [1/2/3/4] (1): \
  [7/9] Voice: who speaks
    1 - Cartesia
    2 - ElevenLabs
    3 - Deepgram
    4 - Piper in the bot's own process: no key (its licence is GPL-3.0)
    Choose from [1/2/3/4] (1): \
  [8/9] Pipecat Cloud region to deploy to
    1 - us-west: Oregon
    2 - us-east: Virginia
    3 - eu-central: Frankfurt
    4 - ap-south: Mumbai
    Choose from [1/2/3/4] (1): \
  [9/9] Record each call's audio [y/n] (y): \

The template is no git clone: the project is not linked to its later versions.

A voice bot. Rehearse a call with it first: no account, no key.

    cd my-voice-bot
    uv sync --extra local
    uv run python -m rehearsal

"""


def test_every_question_and_every_choice_has_a_human_label(form: dict[str, Any]) -> None:
    labels = form["__prompts__"]

    assert {name for name in form if not name.startswith("_")} == ANSWERS.keys() == labels.keys()
    for name in ("language", "transport", "stt", "llm", "tts", "region"):
        assert form[name] == ANSWERS[name]
        assert labels[name].keys() == {"__prompt__", *ANSWERS[name]}


def test_enter_enter_enter_gives_the_default_project(
    command_line: CommandLine, template: Path, tmp_path: Path, default_project: BakedProject
) -> None:
    done = command_line(template, "--output-dir", tmp_path, lines=[""] * 9)

    assert (done.stdout, done.stderr, done.returncode) == (TRANSCRIPT, "", 0)
    assert not BakedProject(tmp_path / "my-voice-bot").differences(default_project)


def test_answers_typed_at_the_prompts_are_the_answers_given_as_arguments(
    command_line: CommandLine, template: Path, tmp_path: Path, bake: Bake
) -> None:
    purpose = 'Say {{ "hi" }} and # <% raw %> \\ with \U0001f600 {%'
    lines = ["another-bot", purpose, "2", "3", "3", "3", "4", "4", "no"]

    succeed(command_line(template, "--output-dir", tmp_path, lines=lines))

    typed = BakedProject(tmp_path / "another-bot")
    given = bake(
        project="another-bot",
        purpose=purpose,
        language="de",
        transport="twilio",
        stt="assemblyai",
        llm="google",
        tts="local",
        region="ap-south",
        record_audio=False,
    )
    assert purpose in typed.read("prompt.md")
    assert not typed.differences(given)


def test_who_records_says_so_in_a_sentence_of_the_first_words_and_nobody_else(
    bake: Bake, default_project: BakedProject
) -> None:
    german = bake(language="de")
    for project, sentence in (
        (default_project, " This call is recorded. "),
        (german, " Dieses Gespräch wird aufgezeichnet. "),
    ):
        greetings = re.findall(r"^(?:CALL_)?GREETING=(.*)", project.read("env.example"), re.M)
        assert len(greetings) == 2 and all(sentence in greeting for greeting in greetings)
    silent = bake(language="de", record_audio=False).read("env.example")
    assert "aufgezeichnet" not in silent and "recorded: many places" not in silent


def test_answers_come_by_arguments_or_by_a_file(
    command_line: CommandLine, template: Path, tmp_path: Path, bake: Bake
) -> None:
    answers = tmp_path / "answers.yaml"
    answers.write_text("default_context: {stt: assemblyai, llm: anthropic}")
    for name, given in (("one", ["stt=assemblyai", "llm=anthropic"]), ("other", [])):
        # As it is typed: a relative path.
        by_file = [] if given else ["--config-file", os.path.relpath(answers)]
        (tmp_path / name).mkdir()
        command = [template, "--no-input", *given, *by_file, "--output-dir", tmp_path / name]
        succeed(command_line(*command))

    wanted = bake(stt="assemblyai", llm="anthropic")
    for name in ("one", "other"):
        assert not BakedProject(tmp_path / name / "my-voice-bot").differences(wanted)


@pytest.mark.parametrize("question", ANSWERS)
def test_every_answer_to_a_question_gives_a_project_of_its_own(
    bake: Bake, rendered_part: Path, question: str
) -> None:
    projects = [bake(template=rendered_part, **{question: answer}) for answer in ANSWERS[question]]

    for one, other in combinations(projects, 2):
        assert one.differences(other)


def test_the_three_commands_at_the_end_start_in_the_new_folder(
    bake: Bake, capfd: pytest.CaptureFixture[str]
) -> None:
    bake(project="another-bot")

    commands = re.findall(r"^    (.+)$", capfd.readouterr().out, flags=re.MULTILINE)
    assert commands == ["cd another-bot", "uv sync --extra local", "uv run python -m rehearsal"]
