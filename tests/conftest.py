"""Where the generator's tests bake from, and how."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from baking import FOLDER, FORM, ROOT, Bake, BakedProject, CommandLine, is_vendored, tracked_files
from cookiecutter.main import cookiecutter
from machine import goes_first, shows_its_log

__all__ = ["goes_first", "shows_its_log"]

# Of the many processes that tests start each would compile Pipecat again: three seconds of work.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest tests first, so that no worker begins one when the others are done.

    These install and test whole projects and keep a core busy. xdist deals the list out in equal
    shares, one behind the other: of four workers the first and the third begin with a half of them
    each, while the others hold calls, which take time and no processor; what is left at the end of
    a share is stolen. Those of the rest that measure time come last, for in the first seconds all
    workers load what they need.
    """
    items.sort(key=_is_timed)
    long = sorted(filter(_is_long, items), key=_seconds, reverse=True)
    short = [item for item in items if not _is_long(item)]
    # What a file makes for all its tests is made once; the first and the last of four take as long
    # as the two between.
    groups = groupby(long, key=lambda item: (_seconds(item), item.path))
    halves = list[pytest.Item](), list[pytest.Item]()
    for number, (_, group) in enumerate(groups):
        halves[number % 4 in (1, 2)].extend(group)
    rest = len(items) // 2 - len(halves[0])
    items[:] = [*halves[0], *short[:rest], *halves[1], *short[rest:]]


def _is_timed(item: pytest.Item) -> bool:
    return item.get_closest_marker("timed") is not None


def _is_long(item: pytest.Item) -> bool:
    return item.path.parent == ROOT / "tests" and item.get_closest_marker("slow") is not None


def _seconds(item: pytest.Item) -> int:
    slow = item.get_closest_marker("slow")
    return slow.kwargs.get("seconds", 0) if slow else 0


@pytest.fixture(scope="session")
def form() -> dict[str, Any]:
    """cookiecutter.json."""
    return FORM


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as a clone has it: tracked files only, nothing a developer left lying."""
    copy = tmp_path_factory.mktemp("clone") / "cookiecutter-pipecat-roark"
    for name in tracked_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="session")
def rendered_part(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template without the folders that are copied: it is baked in a fraction of the time."""
    copy = tmp_path_factory.mktemp("part") / template.name
    for name in BakedProject(template).files():
        _, _, in_project = name.partition(f"{FOLDER}/")
        if not is_vendored(in_project):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(template / name, copy / name)
    return copy


@pytest.fixture(scope="session")
def cookiecutter_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home of cookiecutter's own: no answers from ~/.cookiecutterrc, no replay files there."""
    home = tmp_path_factory.mktemp("home")
    settings = {"cookiecutters_dir": str(home / "templates"), "replay_dir": str(home / "replay")}
    (home / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML.
    (home / "tmp").mkdir()
    return home


@pytest.fixture(scope="session")
def bake(template: Path, cookiecutter_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Bake:
    """Bake with these answers and the defaults for the rest."""

    def bake(
        *, template: Path = template, output: Path | None = None, **answers: Any
    ) -> BakedProject:
        with pytest.MonkeyPatch.context() as patch:
            # cookiecutter never removes the hooks it renders there.
            patch.setattr(tempfile, "tempdir", str(cookiecutter_home / "tmp"))
            project = cookiecutter(
                str(template),
                no_input=True,
                extra_context=answers,
                output_dir=str(output or tmp_path_factory.mktemp("baked")),
                config_file=str(cookiecutter_home / "config.yaml"),
            )
        return BakedProject(Path(project), answers)

    return bake


@pytest.fixture(scope="session")
def default_project(bake: Bake) -> BakedProject:
    """The default rendering. Shared: look, do not touch."""
    return bake()


@pytest.fixture(scope="session")
def command_line(cookiecutter_home: Path) -> CommandLine:
    """cookiecutter in a home of its own, as a user types it."""

    def run(*arguments: str | Path, lines: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        config = cookiecutter_home / "config.yaml"
        return subprocess.run(
            [sys.executable, "-m", "cookiecutter", "--config-file", config, *arguments],
            input="".join(f"{line}\n" for line in lines),
            env={
                **os.environ,
                "HOME": str(cookiecutter_home),
                "TMPDIR": str(cookiecutter_home / "tmp"),
                "PYTHONUTF8": "1",
                "COLUMNS": "1000",
            },
            encoding="utf-8",
            capture_output=True,
            timeout=60,
        )

    return run
