"""How long generating a project takes, beside `pipecat init`, each less its own `--version`.

Both tools run from the environments that `uvx` makes for them, without uvx's own time, by turns,
and with the answers that make the two projects as alike as they come.
"""

import os
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import REPOSITORY, scaffold

ROUNDS = 15
GOAL_SECONDS = 0.5


@dataclass
class Tool:
    """A generator, and the seconds and processor seconds of each of its runs.

    Parameters:
        name: For the table.
        program: Its command.
        generate: What makes a project in the folder it runs in.
    """

    name: str
    program: Path
    generate: Sequence[str]
    took: list[tuple[float, float]] = field(default_factory=list)
    start: list[tuple[float, float]] = field(default_factory=list)

    def run(self, arguments: Sequence[str]) -> tuple[float, float]:
        """Run it in an empty folder; return the seconds and the processor seconds it took."""
        with TemporaryDirectory() as folder:
            before = time.perf_counter()
            process = subprocess.Popen(
                [self.program, *arguments],
                cwd=folder,
                env=os.environ | {"TMPDIR": folder, "HOME": folder},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            _, status, used = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - before
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, self.name)
        return seconds, used.ru_utime + used.ru_stime

    def row(self) -> str:
        """Return its line of the table: medians in seconds."""
        cells = []
        for kind in (0, 1):
            took = [run[kind] for run in self.took]
            start = [run[kind] for run in self.start]
            over = [one - other for one, other in zip(took, start, strict=True)]
            cells += [f"{statistics.median(took):.2f} s", f"{statistics.median(over):.2f} s"]
        return f"| {self.name} | {' | '.join(cells)} |"


def program(package: str, name: str) -> Path:
    """Return a command in the environment that `uvx` keeps for a package."""
    command = ["uvx", "--from", package, "python", "-c", "import sys; print(sys.prefix)"]
    prefix = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return Path(prefix, "bin", name)


def report() -> str:
    """Measure and return the table."""
    with TemporaryDirectory() as folder:
        clone = Path(folder, "template")
        subprocess.run(["git", "clone", "--quiet", REPOSITORY, clone], check=True)
        cookiecutter = program(f"cookiecutter=={version('cookiecutter')}", "cookiecutter")
        pipecat = program(scaffold.PACKAGE, "pipecat")
        options = [word for pair in scaffold.ANSWERS.items() for word in pair]
        options += [word for transport in scaffold.TRANSPORTS for word in ("-t", transport)]
        init = ["init", "bot", *options, "--no-context-hub"]
        ours = Tool("this template", cookiecutter, ["--no-input", str(clone)])
        tools = [ours, Tool("pipecat init 1.14.0", pipecat, init)]
        for tool in tools:  # Bytecode is compiled and files are read once before it counts.
            tool.run(["--version"])
            tool.run(tool.generate)
        for _ in range(ROUNDS):
            for tool in tools:
                tool.start.append(tool.run(["--version"]))
                tool.took.append(tool.run(tool.generate))
    return "\n".join(
        [
            "| | generates in | over its `--version` | processor time | over its `--version` |",
            "|---|---|---|---|---|",
            *(tool.row() for tool in tools),
            "",
            f"Medians of {ROUNDS} runs each, by turns. Goal: at most {GOAL_SECONDS} s over "
            "`cookiecutter --version`.",
        ]
    )
