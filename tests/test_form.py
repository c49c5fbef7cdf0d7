"""The form: what is asked, and that every answer makes a difference."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from baking import Bake, BakedProject

QUESTIONS = {"project", "purpose", "transport", "region", "record_audio"}

# One answer other than the default, for each thing that can be answered.
OTHER_ANSWERS: list[dict[str, Any]] = [
    {"project": "another-bot"},
    {"purpose": "You tell callers the time."},
    {"transport": "daily"},
    {"transport": "twilio"},
    {"region": "us-east"},
    {"region": "eu-central"},
    {"region": "ap-south"},
    {"record_audio": False},
]

TRANSCRIPT = """\
  [1/5] Project name: the folder, the package and the agent on Pipecat Cloud (my-voice-bot): \
  [2/5] Purpose: one sentence to the bot, who it is and what it does \
(You are the friendly receptionist of a small dental practice and help callers with opening hours \
and appointments.): \
  [3/5] Transport to start with (the code has all three)
    1 - WebRTC: a browser page on your own machine, no account
    2 - Daily: rooms for browsers and apps, what Pipecat Cloud uses
    3 - Twilio: phone calls
    Choose from [1/2/3] (1): \
  [4/5] Pipecat Cloud region to deploy to
    1 - us-west: Oregon
    2 - us-east: Virginia
    3 - eu-central: Frankfurt
    4 - ap-south: Mumbai
    Choose from [1/2/3/4] (1): \
  [5/5] Record each call's audio [y/n] (y): \

A voice bot. Rehearse a call with it first: no account, no key.

    cd my-voice-bot
    uv sync --extra local
    uv run python -m rehearsal

"""


@pytest.fixture
def answer_prompts(command_line: list[str], template: Path, tmp_path: Path):
    """Type these lines into the real command line; return the project and what was shown."""

    def answer(*lines: str) -> tuple[BakedProject, str]:
        done = subprocess.run(
            [*command_line, str(template), "--output-dir", str(tmp_path)],
            input="".join(f"{line}\n" for line in lines),
            env={"COLUMNS": "1000", "PYTHONUTF8": "1"},
            encoding="utf-8",
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        (project,) = tmp_path.iterdir()
        return BakedProject(project), done.stdout

    return answer


def test_every_question_and_every_choice_has_a_human_label(form: dict[str, Any]) -> None:
    labels = form["__prompts__"]

    assert {name for name in form if not name.startswith("_")} == QUESTIONS == labels.keys()
    for name, default in form.items():
        if isinstance(default, list) and name in QUESTIONS:
            assert labels[name].keys() == {"__prompt__", *default}


def test_enter_enter_enter_gives_the_default_project(
    answer_prompts: Any, default_project: BakedProject
) -> None:
    project, shown = answer_prompts("", "", "", "", "")

    assert shown == TRANSCRIPT
    assert project.contents() == default_project.contents()


def test_answers_typed_at_the_prompts_are_the_answers_given_as_arguments(
    answer_prompts: Any, bake: Bake
) -> None:
    purpose = 'Say {{ "hi" }} and # <% raw %> \\ with \U0001f600 {%'

    project, _ = answer_prompts("another-bot", purpose, "3", "4", "no")

    assert purpose in project.read("prompt.md")
    assert (
        project.contents()
        == bake(
            project="another-bot",
            purpose=purpose,
            transport="twilio",
            region="ap-south",
            record_audio=False,
        ).contents()
    )


@pytest.mark.parametrize("answer", OTHER_ANSWERS, ids=str)
def test_every_answer_changes_the_project(
    bake: Bake, default_project: BakedProject, answer: dict[str, Any]
) -> None:
    assert bake(**answer).contents() != default_project.contents()


def test_no_two_choices_of_a_question_give_the_same_project(
    bake: Bake, form: dict[str, Any]
) -> None:
    for name in ("transport", "region"):
        renderings = [bake(**{name: choice}).contents() for choice in form[name]]
        for index, rendering in enumerate(renderings):
            assert rendering not in renderings[:index], (name, form[name][index])


def test_the_other_answers_above_are_all_there_are(form: dict[str, Any]) -> None:
    asked = {name for answer in OTHER_ANSWERS for name in answer}
    given = {(name, value) for answer in OTHER_ANSWERS for name, value in answer.items()}

    assert asked == QUESTIONS
    for name in ("transport", "region"):
        assert {choice for question, choice in given if question == name} == set(form[name][1:])


def test_the_three_commands_at_the_end_start_in_the_new_folder(
    bake: Bake, capfd: pytest.CaptureFixture[str]
) -> None:
    bake(project="another-bot")

    commands = re.findall(r"^    (.+)$", capfd.readouterr().out, flags=re.MULTILINE)
    assert commands == ["cd another-bot", "uv sync --extra local", "uv run python -m rehearsal"]
