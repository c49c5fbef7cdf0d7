"""What a user may answer: everything they may arrives as it was given, the rest is refused."""

import ast
import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from baking import FOLDER, ROOT, Bake, BakedProject, CommandLine, succeed, tracked_files
from cookiecutter.exceptions import FailedHookException
from cookiecutter.main import cookiecutter

from extensions.answer_checks import taken_names

PURPOSES = {
    "double quotes": 'You are "Ann".',
    "single quotes": "You're Ann's assistant.",
    "three double quotes": 'Say """hello""" to all.',
    "three single quotes": "Say '''hello''' to all.",
    "a backslash": r"Files are in C:\new\table.",
    "a trailing backslash": "Ends in one \\",
    "backslash n as typed": r"One\nstill one.",
    "newlines": "One.\n\nTwo.\n- three",
    "a leading and a trailing newline": "\nOne.\n",
    "an emoji": "Cheerful \U0001f600, a family \U0001f468\u200d\U0001f469\u200d\U0001f467.",
    "another script": "Du bist höflich. 你好. שלום.",
    "an expression": "Sums like {{ 7 * 7 }} stay.",
    "an answer's name": "{{ cookiecutter.project }}",
    "the folder's name": FOLDER,
    "an unknown name": "{{ nobody.knows }}",
    "an open expression": "Braces {{ and no end",
    "a closed expression": "Braces }} and no beginning",
    "a Jinja statement": "{% if x %}",
    "the template's statement": "# <% raw %>",
    "the template's comment": "# <# a comment # #>",
    "the template's end of statement": "%>",
    "an f-string": "f'{name!r}' %s {0}",
    "a shell command": "$(touch pwned) `touch pwned`; ${HOME}",
    "a comment": "# Not a heading",
    "toml": '"]\n[tool.evil]\nx = "1',
    "markup": "<b>bold</b> [red]red[/red] &amp; [bold",
    "an equals sign": "a=b=c",
    "4000 characters": "x" * 4000,
}

# What the first line on stderr says after the name of the question.
REFUSED: list[tuple[dict[str, str], str]] = [
    *(
        ({"project": name}, f"project: {name!r} must be 1 to 63 lowercase letters, digits")
        for name in (
            *("", " ", ".", "..", "-", "-x", "x-", "a_b", "a.b", "a b", "Bad Name", "MyBot"),
            *("bot\n", "x" * 64, "x" * 400, "a/b", "../escaped", "/tmp/escaped", "a\\b", "bot;ls"),
            *("{{ 7 * 7 }}", '"; import os; "', "$(id)", "--help"),
        )
    ),
    ({"project": "größe"}, r"project: 'gr\xf6\xdfe' must be 1 to 63 lowercase letters"),
    *(
        ({"project": name}, f"project: '{name}' is already a module, package or device")
        for name in (
            *("daily", "openai", "deepgram", "cartesia", "twilio", "pipecat", "pipecat-ai"),
            *("pipecat--ai", "pipecatcloud", "aiohttp", "loguru", "numpy", "pytest", "ruff"),
            *("bot", "roark", "rehearsal", "services", "transports", "tools", "tests"),
            *("asyncio", "json", "types", "con", "nul", "com1", "lpt9"),
        )
    ),
    *(
        ({"purpose": blank}, "purpose: say in a sentence who the bot is")
        for blank in ("", " ", "\n \n", "\N{NO-BREAK SPACE}")
    ),
    ({"purpose": "x" * 4001}, "purpose: 4001 characters are too many; at most 4000."),
    *(
        ({"purpose": f"One{chr(code)}two"}, f"purpose: U+{code:04X} is a control character")
        for code in (0, 7, 8, 9, 0xB, 0xC, 0xD, 0x1B, 0x7F, 0x85, 0x9B, 0x202E, 0x2066, 0xDC80)
    ),
]


def refused_id(value: object) -> str | None:
    """Name a case after its answer."""
    return ascii(next(iter(value.values())))[:30] if isinstance(value, dict) else ""


@pytest.fixture(scope="session")
def another(bake: Bake, rendered_part: Path) -> BakedProject:
    """With another purpose, what is rendered of a project."""
    return bake(template=rendered_part, purpose="SPLITHERE")


@pytest.fixture(scope="session")
def prompt_around(another: BakedProject) -> tuple[str, str]:
    """What stands before and after the purpose in prompt.md."""
    before, after = another.read("prompt.md").split("SPLITHERE")
    return before, after


@pytest.mark.parametrize("purpose", PURPOSES.values(), ids=PURPOSES)
def test_any_purpose_arrives_verbatim_and_touches_no_other_file(
    bake: Bake,
    rendered_part: Path,
    another: BakedProject,
    prompt_around: tuple[str, str],
    purpose: str,
) -> None:
    before, after = prompt_around

    project = bake(template=rendered_part, purpose=purpose)

    assert project.read("prompt.md") == before + purpose + after
    assert project.differences(another) == {"prompt.md"}


@pytest.fixture(scope="session")
def defaults(form: dict[str, Any]) -> dict[str, Any]:
    """The answer to each question that Enter gives."""
    return {
        name: default[0] if isinstance(default, list) else default
        for name, default in form.items()
        if not name.startswith("_")
    }


@pytest.mark.parametrize("way", ["argument", "replay file", "configuration file"])
def test_a_purpose_full_of_markup_arrives_verbatim_however_it_is_given(
    command_line: CommandLine,
    template: Path,
    prompt_around: tuple[str, str],
    defaults: dict[str, Any],
    tmp_path: Path,
    way: str,
) -> None:
    purpose = 'Say "{{ cookiecutter.project }}", {% x %}, # <% raw %>, \\ \U0001f600.\n"""Two"""'
    answers = defaults | {"purpose": purpose}
    file = tmp_path / "answers.json"  # JSON is also YAML, but for an emoji in two halves.
    file.write_text(json.dumps({"cookiecutter": answers, "default_context": answers}))
    arguments = {
        "argument": ("--no-input", template, f"purpose={purpose}"),
        "replay file": ("--replay-file", file, template),
        "configuration file": ("--no-input", "--config-file", file, template),
    }[way]

    succeed(command_line(*arguments, "--output-dir", tmp_path))

    project = BakedProject(tmp_path / "my-voice-bot")
    assert project.read("prompt.md") == purpose.join(prompt_around)


@pytest.mark.parametrize(("answers", "sentence"), REFUSED, ids=refused_id)
def test_a_bad_answer_is_refused_in_a_sentence_and_leaves_nothing(
    bake: Bake,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    answers: dict[str, Any],
    sentence: str,
) -> None:
    output = tmp_path / "here" / "out"
    output.mkdir(parents=True)

    with pytest.raises(FailedHookException):
        bake(output=output, **answers)

    assert capfd.readouterr().err.splitlines()[0].startswith(sentence)
    assert [path for path in tmp_path.rglob("*")] == [output.parent, output]


TAKEN = "project: 'daily' is already a module, package or device; try 'daily-bot'."


def test_the_command_line_refuses_with_the_sentence_alone_and_a_failing_exit_code(
    command_line: CommandLine, template: Path, tmp_path: Path
) -> None:
    done = command_line("--no-input", template, "project=daily", "--output-dir", tmp_path)

    assert done.returncode == 1
    assert (done.stdout, done.stderr) == (f"{TAKEN}\n", "")
    assert not list(tmp_path.iterdir())


def test_a_bad_answer_at_the_prompt_is_refused_before_the_next_question(
    command_line: CommandLine, template: Path, tmp_path: Path
) -> None:
    for lines, sentence in (
        (["daily"], TAKEN),
        (["my-bot", "x" * 4001], "purpose: 4001 characters are too many; at most 4000."),
    ):
        done = command_line(template, "--output-dir", tmp_path, lines=lines)

        assert done.returncode == 1
        assert done.stdout.endswith(f"{sentence}\n")
        assert f"[{len(lines) + 1}/" not in done.stdout
        assert "Traceback" not in done.stdout + done.stderr
        assert not list(tmp_path.iterdir())


UNKNOWN = "'trasport' is no question of this template (project, purpose, "
MISTAKES = {
    "an unknown question as an argument": ("argument", {"trasport": "daily"}, UNKNOWN),
    "an unknown question in a configuration": ("config", {"trasport": "daily"}, UNKNOWN),
    "an unknown question in a replay file": ("replay", {"trasport": "daily"}, UNKNOWN),
    "a bad choice in a configuration": ("config", {"transport": "fax"}, "transport: 'fax' is none"),
    "a bad choice in a replay file": ("replay", {"transport": "fax"}, "transport: 'fax' is none"),
    "neither yes nor no": (
        "config",
        {"record_audio": "perhaps"},
        "record_audio: 'perhaps' is none",
    ),
    "a number for yes": ("config", {"record_audio": 3}, "record_audio: 3 is none of True, False."),
    "a list for a choice": ("config", {"transport": ["daily"]}, "transport: ['daily'] is none of"),
}


@pytest.mark.parametrize(("way", "given", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistyped_question_or_choice_is_refused_in_a_sentence_before_anything_is_asked(
    command_line: CommandLine,
    template: Path,
    defaults: dict[str, Any],
    tmp_path: Path,
    way: str,
    given: dict[str, Any],
    sentence: str,
) -> None:
    file = tmp_path / "answers.json"
    file.write_text(json.dumps({"cookiecutter": defaults | given, "default_context": given}))
    arguments = {
        "argument": [f"{name}={answer}" for name, answer in given.items()],
        "config": ["--config-file", file],
        "replay": ["--replay-file", file],
    }[way]

    done = command_line(template, *arguments, "--output-dir", tmp_path / "out")

    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert line.startswith(sentence)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_nearest_question_is_suggested_where_one_is_near(
    command_line: CommandLine, template: Path, tmp_path: Path
) -> None:
    near = command_line("--no-input", template, "trasport=daily", "--output-dir", tmp_path)
    far = command_line("--no-input", template, "colour=blue", "--output-dir", tmp_path)

    assert near.stdout.endswith("; did you mean 'transport'?\n")
    assert far.stdout.endswith(", record_audio).\n")


def test_a_cookiecutter_that_is_too_old_is_named_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, template: Path
) -> None:
    """It prints the text of the ImportError after "Unable to load extension: "."""
    monkeypatch.delattr("cookiecutter.prompt.YesNoPrompt")
    with pytest.raises(ImportError, match=r"^this template needs cookiecutter 2\.5 or newer$"):
        runpy.run_path(str(template / "extensions" / "answer_checks.py"))


def test_a_shared_file_may_hold_answers_to_other_templates_but_no_typo_of_ours(
    command_line: CommandLine, template: Path, tmp_path: Path
) -> None:
    file = tmp_path / "answers.yaml"
    others = "  full_name: Ann\n  email: a@b.c\n  project_name: X\n  project_slug: x\n"
    arguments = ("--no-input", "--config-file", file, template, "--output-dir", tmp_path)

    file.write_text(f"default_context:\n{others}  region: ap-south\n")
    succeed(command_line(*arguments))
    assert "ap-south" in BakedProject(tmp_path / "my-voice-bot").read("pcc-deploy.toml")

    for typo, ours in (("sst", "stt"), ("languages", "language"), ("record-audio", "record_audio")):
        file.write_text(f"default_context:\n{others}  {typo}: whatever\n")
        done = command_line(*arguments)
        assert done.returncode == 1
        assert done.stdout.endswith(f"; did you mean {ours!r}?\n")


def test_a_bad_choice_as_an_argument_is_refused_by_cookiecutter_itself_and_leaves_nothing(
    command_line: CommandLine, template: Path, tmp_path: Path
) -> None:
    """With a traceback: it raises before it has loaded a line of any template."""
    done = command_line("--no-input", template, "transport=fax", "--output-dir", tmp_path)

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ValueError: fax provided for choice variable transport, but the choices are ['webrtc',"
    )
    assert not list(tmp_path.iterdir())


def test_a_bad_choice_that_only_the_hook_sees_is_refused_there(
    template: Path,
    cookiecutter_home: Path,
    defaults: dict[str, Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As it comes from a replay file by way of cookiecutter's Python API."""
    file = tmp_path / "answers.json"
    config, output = cookiecutter_home / "config.yaml", tmp_path / "out"
    file.write_text(json.dumps({"cookiecutter": defaults | {"region": "atlantis"}}))

    with pytest.raises(FailedHookException):
        cookiecutter(
            str(template), replay=str(file), config_file=str(config), output_dir=str(output)
        )

    assert capfd.readouterr().err.startswith("region: 'atlantis' is none of us-west, us-east, ")
    assert not list(output.iterdir())


def test_yes_may_be_said_in_a_configuration_as_at_the_prompt(
    command_line: CommandLine, template: Path, tmp_path: Path, bake: Bake
) -> None:
    file = tmp_path / "answers.yaml"
    file.write_text("default_context:\n  record_audio: 'No'\n  transport: twilio\n")

    succeed(command_line("--no-input", "--config-file", file, template, "--output-dir", tmp_path))

    given = bake(record_audio=False, transport="twilio")
    assert not BakedProject(tmp_path / "my-voice-bot").differences(given)


def test_answers_to_other_templates_in_a_user_s_own_configuration_are_no_mistake(
    template: Path, cookiecutter_home: Path, tmp_path: Path
) -> None:
    settings = json.loads((cookiecutter_home / "config.yaml").read_text())
    settings["default_context"] = {"github_username": "ann", "region": "ap-south"}
    file = tmp_path / "cookiecutterrc"
    file.write_text(json.dumps(settings))

    done = subprocess.run(
        [sys.executable, "-m", "cookiecutter", "--no-input", template, "-o", tmp_path],
        env={**os.environ, "COOKIECUTTER_CONFIG": str(file), "TMPDIR": str(tmp_path)},
        text=True,
        capture_output=True,
        timeout=60,
    )

    succeed(done)
    assert "ap-south" in BakedProject(tmp_path / "my-voice-bot").read("pcc-deploy.toml")


def test_nothing_is_generated_over_a_project_that_exists(
    command_line: CommandLine, template: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "my-voice-bot" / ".env"
    secret.parent.mkdir()
    secret.write_text("KEY=1")

    done = command_line("--no-input", "--overwrite-if-exists", template, "--output-dir", tmp_path)

    assert done.returncode == 1
    assert done.stderr.startswith("project: the folder 'my-voice-bot' is not empty ('.env' is")
    assert [path.name for path in secret.parent.iterdir()] == [".env"]
    assert secret.read_text() == "KEY=1"


def test_a_folder_that_only_holds_a_git_repository_may_be_filled(
    command_line: CommandLine, template: Path, tmp_path: Path
) -> None:
    (tmp_path / "my-voice-bot" / ".git").mkdir(parents=True)

    succeed(command_line("--no-input", "--overwrite-if-exists", template, "--output-dir", tmp_path))

    assert (tmp_path / "my-voice-bot" / "bot.py").is_file()


def imported_names(node: ast.AST) -> list[str]:
    """Return the absolute modules an import statement names; nothing for any other node."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def test_every_name_a_project_would_clash_with_is_taken() -> None:
    taken = taken_names(ROOT)
    lock = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
    packages = {package["name"] for package in lock["package"]}
    imports = {
        name.split(".")[0]
        for source in tracked_files(ROOT / FOLDER)
        if source.endswith(".py")
        for node in ast.walk(ast.parse((ROOT / FOLDER / source).read_bytes()))
        for name in imported_names(node)
    }
    own = {path.stem for path in (ROOT / FOLDER).glob("*.py")}
    folders = {Path(name).parts[0] for name in tracked_files(ROOT / FOLDER) if "/" in name}
    needed = {re.sub("[-_.]+", "-", name) for name in {*packages, *imports, *own, *folders}}

    missing = {name for name in needed if re.fullmatch("[a-z0-9][a-z0-9-]*", name)}
    missing -= {"cookiecutter-pipecat-roark", *taken, *sys.stdlib_module_names}

    assert not missing, "add these to extensions/taken_names.txt"
    assert taken == sorted(set(taken))
