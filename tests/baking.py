"""A project baked from a clone of this repository, and what its user would do with it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "{{cookiecutter.project}}"
FORM: dict[str, Any] = json.loads((ROOT / "cookiecutter.json").read_text(encoding="utf-8"))
# The newest Python on which a call is held; newer ones generate and compile.
NEWEST_TRIED = "3.13"
# What installs, lints and types whole projects gives way to the calls that are held beside it in
# real time, however busy it keeps the machine.
GIVING_WAY = (nice, "-n", "10") if (nice := shutil.which("nice")) else ()
HOLDS_CALLS = re.compile(r"(?<![\w/-])(pytest|rehearsal)(?![\w/-])")
# For whole projects whose calls are not about time: on a busy machine the answer may be late.
PATIENT = ("ANSWER_SECONDS", "30")


@dataclass(frozen=True)
class BakedProject:
    """A project as its user gets it."""

    path: Path
    answers: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def read(self, name: str) -> str:
        """Return the text of a file, line endings as they are on disk."""
        return self.read_bytes(name).decode()

    def read_bytes(self, name: str) -> bytes:
        """Return the bytes of a file."""
        return (self.path / name).read_bytes()

    def differences(self, other: "BakedProject") -> set[str]:
        """Return the files that only one of the two has, or that differ by a byte."""
        shared = self.files() & other.files()
        changed = {name for name in shared if self.read_bytes(name) != other.read_bytes(name)}
        return changed | self.files() ^ other.files()

    def files(self) -> set[str]:
        """Return the paths of all files, relative and with forward slashes."""
        return {
            path.relative_to(self.path).as_posix()
            for path in self.path.rglob("*")
            if not path.is_dir()
        }

    def run(self, *command: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run a command in the project, without this repository's environment."""
        own = {"VIRTUAL_ENV", "PYTEST_ADDOPTS"}
        environment = {name: value for name, value in os.environ.items() if name not in own}
        return subprocess.run(
            (*giving_way(*command), *command),
            cwd=self.path,
            env=environment,
            text=True,
            capture_output=True,
            timeout=timeout,
        )

    def tool(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a tool of this repository's environment in the project."""
        return self.run(sys.executable, "-m", name, *arguments)


class Bake(Protocol):
    """Generates a project, unless told otherwise from a clone into a new output directory."""

    def __call__(
        self, *, template: Path = ..., output: Path | None = None, **answers: Any
    ) -> BakedProject: ...


class CommandLine(Protocol):
    """Runs the cookiecutter command, typing `lines` at its prompts."""

    def __call__(
        self, *arguments: str | Path, lines: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]: ...


def giving_way(*command: str) -> tuple[str, ...]:
    """Return what goes before a command that has time, so that calls are not held up by it."""
    return () if any(map(HOLDS_CALLS.search, command)) else GIVING_WAY


def is_vendored(name: str) -> bool:
    """Tell whether a file of the template is copied without rendering."""
    return any(fnmatch(name, pattern) for pattern in FORM["_copy_without_render"])


def succeed(done: subprocess.CompletedProcess[str]) -> None:
    """Fail with what a command printed, unless it succeeded."""
    assert done.returncode == 0, done.stdout + done.stderr


def installed_python(python: str) -> Path | None:
    """Return the program of a Python that is installed here."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = [shutil.which(f"python{python}"), *versions.glob(f"{python}.*/bin/python")]
    for program in filter(None, found):
        say = "import sys; print('%d.%d' % sys.version_info[:2])"
        said = subprocess.run([program, "-c", say], capture_output=True, text=True)
        if said.stdout.strip() == python:
            return Path(program)
    return None


def tracked_files(folder: Path = ROOT) -> list[str]:
    """Return what git tracks (or would, once added) below a folder, relative to the folder."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=folder, check=True, capture_output=True)
    names = listing.stdout.decode().split("\0")[:-1]
    return [name for name in names if (folder / name).is_file()]
