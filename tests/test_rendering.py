"""What is generated: for every answer complete, clean, and free of the template it came from."""

import json
import random
import re
import runpy
import shutil
import tomllib
from itertools import combinations, cycle, product
from pathlib import Path
from typing import Any

import pytest
import yaml
from baking import FOLDER, FORM, PATIENT, ROOT, Bake, BakedProject, is_vendored, succeed

# The questions with a choice, each with its answers.
CHOICES: dict[str, list[Any]] = {
    name: [True, False] if isinstance(value, bool) else value
    for name, value in FORM.items()
    if not name.startswith("_") and isinstance(value, bool | list)
}
# Together these have every answer to every question about services; the default's own tests run
# where the template lies, and in a fresh environment those of the one farthest from it.
WHOSE_CALLS_ARE_HELD = (
    {"stt": "openai", "llm": "google", "tts": "deepgram", "transport": "daily"},
    {"stt": "deepgram-flux", "llm": "compatible", "tts": "cartesia", "record_audio": False},
)
WHAT_ANSWERS_TOUCH = ("tests", "deploy", "host", "telephony", "conversation/tests/test_turns.py")
FARTHEST = {
    "project": "another-bot",
    "purpose": 'Say "hello" \\ {{ and }} """goodbye""".',
    "language": "de",
    "transport": "twilio",
    "stt": "assemblyai",
    "llm": "anthropic",
    "tts": "elevenlabs",
    "region": "ap-south",
    "record_audio": False,
}


def pairs(answers: dict[str, Any]) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    """Return each two of the answers that meet in a form."""
    return set(combinations(answers.items(), 2))


def covering() -> list[dict[str, Any]]:
    """Return few forms in which any two answers to different questions meet at least once.

    The language, which is a setting and no code, only has each of its answers.
    """
    choices = {name: answers for name, answers in CHOICES.items() if name != "language"}
    forms = [dict(zip(choices, answers, strict=True)) for answers in product(*choices.values())]
    # In another order the best of many equally good ones is seldom the first.
    random.Random(68).shuffle(forms)
    missing = set[tuple[tuple[str, Any], tuple[str, Any]]]().union(*map(pairs, forms))
    chosen: list[dict[str, Any]] = []
    while missing:
        best = max(forms, key=lambda form: len(missing & pairs(form)))
        chosen.append(best)
        missing -= pairs(best)
    languages = cycle(CHOICES["language"])
    return [form | {"language": next(languages)} for form in chosen]


ANSWERS = covering()
# Sources that are allowed to name the generator: where they say how to take a newer template.
NAMES_THE_GENERATOR = {"README.md", "AGENTS.md"}

# Beside these, one name for each line of the project's .gitignore is planted.
PLANTED_FILES = (
    ".env",
    ".env.local",
    "rehearsal/.env",
    "tests/.env",
    "bot.pyc",
    "__pycache__/bot.cpython-311.pyc",
    "roark/__pycache__/call.cpython-311.pyc",
    "rehearsal/__pycache__/deeper/twilio.cpython-311.pyc",
    ".pytest_cache/README.md",
    "tests/.pytest_cache/v/cache",
    ".ruff_cache/0.1/data",
    ".mypy_cache/3.11/bot.data.json",
    ".venv/lib/python3.11/site-packages/evil.py",
    "calls/one/recording.wav",
    "roark/calls/one/call.json",
    ".coverage",
    ".github/.env/bin/python",
    ".DS_Store",
    "tests/.DS_Store",
)


@pytest.fixture(
    scope="module",
    params=ANSWERS,
    ids=lambda answers: "-".join(map(str, answers.values())),
)
def project(request: pytest.FixtureRequest, bake: Bake) -> BakedProject:
    """One rendering of each kind."""
    return bake(**request.param)


def test_every_rendering_holds_exactly_the_files_of_the_template(
    project: BakedProject, template: Path
) -> None:
    chosen = {f"{question}={answer}" for question, answer in project.answers.items()}
    others = {name for name, of in FORM["_belongs"].items() if not chosen & set(of)}
    template_files = BakedProject(template / FOLDER).files()
    assert set(FORM["_belongs"]) <= template_files
    assert project.files() == template_files - others


def test_vendored_files_are_the_template_s_byte_for_byte(
    project: BakedProject, template: Path
) -> None:
    vendored = {name for name in project.files() if is_vendored(name)}

    assert {Path(name).parts[0] for name in vendored} >= {"roark", "rehearsal", "tests"}
    for name in vendored:
        assert project.read_bytes(name) == (template / FOLDER / name).read_bytes(), name


def test_no_file_shows_a_trace_of_the_template(project: BakedProject) -> None:
    for name in project.files():
        content = project.read_bytes(name)
        assert not re.search(rb"# <%|%>|# <#|# #>", content), name
        if not is_vendored(name) and name not in NAMES_THE_GENERATOR:
            assert b"cookiecutter" not in content.lower(), name


def test_every_file_of_a_rendering_ends_its_lines_the_unix_way(project: BakedProject) -> None:
    for name in project.files():
        content = project.read_bytes(name)
        if b"\0" not in content:
            assert b"\r" not in content, name
            assert content.endswith(b"\n") or not content, f"{name}: no newline at its end"


def test_every_toml_yaml_and_json_file_of_a_rendering_parses(project: BakedProject) -> None:
    for name in project.files():
        match Path(name).suffix:
            case ".toml":
                tomllib.loads(project.read(name))
            case ".yaml" | ".yml":
                yaml.safe_load(project.read(name))
            case ".json":
                json.loads(project.read(name))


def test_every_rendering_is_linted_and_formatted(project: BakedProject) -> None:
    succeed(project.tool("ruff", "check", "--no-cache", "."))
    succeed(project.tool("ruff", "format", "--check", "--no-cache", "."))


def test_a_developer_s_leftovers_are_never_baked(
    template: Path, bake: Bake, default_project: BakedProject, tmp_path: Path
) -> None:
    littered = tmp_path / "template"
    shutil.copytree(template, littered)
    ignored = BakedProject(littered / FOLDER).read(".gitignore").splitlines()
    patterns = [line for line in ignored if line and not line.startswith("#")]
    assert not [pattern for pattern in patterns if re.search(r"[!?\[]|/.", pattern)]

    for name in (*PLANTED_FILES, *(f"roark/{pattern.replace('*', 'x')}" for pattern in patterns)):
        path = littered / FOLDER / name
        if name.endswith("/"):
            path = path / "file"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Neither a template nor text: some bytecode looks like text to cookiecutter and is none.
        path.write_bytes(b"SECRET={{ cookiecutter.nope }}\x8b\n" * 20)

    project = bake(template=littered)

    assert not project.differences(default_project)
    assert {path.name for path in project.path.rglob("*") if path.is_dir()} == {
        path.name for path in default_project.path.rglob("*") if path.is_dir()
    }


def test_what_cannot_be_swept_is_named_and_the_project_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".gitignore").write_text("# Secrets\n.env\n")
    (tmp_path / "roark").mkdir()
    (tmp_path / "roark" / ".env").write_text("SECRET=1")
    monkeypatch.chdir(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    hook = (ROOT / "hooks" / "post_gen_project.py").read_text(encoding="utf-8")
    rendered = tmp_path / "post_gen_project.py"
    rendered.write_text(re.sub(r"^\{\{.*\}\}$", "[[], false, null]", hook, flags=re.MULTILINE))
    monkeypatch.setattr(Path, "unlink", refuse)

    runpy.run_path(str(rendered))

    assert capsys.readouterr().err == (
        f"Could not remove {Path('roark', '.env')}, which is not part of the project.\n"
    )


@pytest.mark.slow(seconds=50)
@pytest.mark.parametrize(
    "answers", WHOSE_CALLS_ARE_HELD, ids=lambda answers: "-".join(map(str, answers.values()))
)
def test_a_rendering_holds_calls_with_its_own_services(
    bake: Bake, answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(*PATIENT)
    files = ["tests/test_calls.py", "deploy/tests/test_preflight.py"]
    succeed(bake(**answers).tool("pytest", "-q", "-n", "0", "-m", "not slow", *files))


@pytest.mark.slow(seconds=130)
def test_the_rendering_farthest_from_the_default_passes_its_own_tests_in_a_fresh_environment(
    bake: Bake,
) -> None:
    """What does not depend on answers, roark/ and the engines, is tested where it lies."""
    project = bake(**FARTHEST)
    run = ("uv", "run", "--locked")
    # No workers: each would load Pipecat for itself.
    tests = ("pytest", "-q", "-rs", "-n", "0", *WHAT_ANSWERS_TOUCH)

    for command in (("uv", "lock", "--python", "3.11"), ("uv", "sync", "--locked")):
        succeed(project.run(*command))
    succeed(project.run(*run, "ruff", "check", "."))
    succeed(project.run(*run, "ruff", "format", "--check", "."))
    # Here all of it is typed, as its user types it.
    typed = project.run(*run, "pyright")
    succeed(typed)
    # Folders warn of what is an extra and not installed; its modules of nothing.
    of_a_module = re.compile(
        rf"^ *{re.escape(str(project.path))}/\w+\.py:.* warning: ", re.MULTILINE
    )
    assert not of_a_module.search(typed.stdout), typed.stdout
    tested = project.run(*run, *tests)
    succeed(tested)
    assert "skipped" not in tested.stdout, tested.stdout

    environment = project.run(*run, "python", "-c", "import sys;print(sys.prefix)")
    assert Path(environment.stdout.strip()) == project.path / ".venv"
