"""Whichever Python a user has: the same project, and one that works."""

import os
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from baking import GIVING_WAY, ROOT, BakedProject, installed_python, succeed

PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
OLDEST = PYTHONS[0]


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
    program = installed_python(python)
    if not program:
        pytest.skip(f"Python {python} is not installed here")
    generator = ["uvx", "--python", program, f"cookiecutter=={version('cookiecutter')}"]
    home = ["--config-file", cookiecutter_home / "config.yaml"]
    done = subprocess.run(
        [*GIVING_WAY, *generator, "--no-input", *home, "--output-dir", tmp_path, template],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    succeed(done)
    project = BakedProject(tmp_path / "my-voice-bot")
    assert not project.differences(default_project)

    succeed(project.run(str(program), "-W", "error", "-m", "compileall", "-q", "."))
