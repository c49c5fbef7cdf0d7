"""Whichever Python a user has: the same project, and one that works."""

import os
import shutil
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from baking import PATIENT, ROOT, BakedProject, succeed

PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
OLDEST, NEWEST_TRIED = PYTHONS[0], "3.13"


def interpreter(python: str) -> Path:
    """Return the program of a Python that is installed here, or skip."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = [shutil.which(f"python{python}"), *versions.glob(f"{python}.*/bin/python")]
    for program in filter(None, found):
        say = "import sys; print('%d.%d' % sys.version_info[:2])"
        said = subprocess.run([program, "-c", say], capture_output=True, text=True)
        if said.stdout.strip() == python:
            return Path(program)
    pytest.skip(f"Python {python} is not installed here")


def test_the_oldest_python_tried_is_the_oldest_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == f">={OLDEST}"


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_every_python_generates_the_same_project_and_compiles_it_without_a_warning(
    python: str,
    template: Path,
    cookiecutter_home: Path,
    default_project: BakedProject,
    tmp_path: Path,
) -> None:
    program = interpreter(python)
    generator = ["uvx", "--python", program, f"cookiecutter=={version('cookiecutter')}"]
    home = ["--config-file", cookiecutter_home / "config.yaml"]
    done = subprocess.run(
        [*generator, "--no-input", *home, "--output-dir", tmp_path, template],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    succeed(done)
    project = BakedProject(tmp_path / "my-voice-bot")
    assert not project.differences(default_project)

    succeed(project.run(str(program), "-W", "error", "-m", "compileall", "-q", "."))


@pytest.mark.slow
def test_a_project_holds_a_call_on_the_newest_python_tried(
    default_project: BakedProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its tests would take minutes; on 3.11 they run elsewhere."""
    monkeypatch.setenv(*PATIENT)
    program = interpreter(NEWEST_TRIED)
    project = BakedProject(Path(shutil.copytree(default_project.path, tmp_path / "bot")))

    succeed(project.run("uv", "sync", "--quiet", "--python", str(program)))
    quick = ["tests/test_config.py", "tests/test_calls.py", "-k", "config or arrives_complete"]
    tested = project.run("uv", "run", "--no-sync", "pytest", "-q", "-n", "0", *quick)
    succeed(tested)

    used = project.run("uv", "run", "--no-sync", "python", "--version").stdout
    assert used.startswith(f"Python {NEWEST_TRIED}.")
