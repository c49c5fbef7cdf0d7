"""The documents' commands: followed literally on a machine that has Python and nothing else.

Which test runs which command, and which need an account instead, is in tests/documented.py.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import wave
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from baking import (
    FOLDER,
    NEWEST_TRIED,
    PATIENT,
    ROOT,
    BakedProject,
    giving_way,
    installed_python,
    succeed,
)
from documented import FOLLOWED, NEEDS, TESTED, commands, shell_blocks

SPOKEN = "he might even have been made amiable himself"
SECONDS = 900
LOUD = 500
"""Of 32767: more than a line makes of silence, less than a voice."""

# Documents of this repository, and of the project it generates.
OURS = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")
THEIRS = ("README.md", "AGENTS.md", "DEPLOY.md", "evals/README.md", "rehearsal/README.md")

# What a command may take until it has served and has ended.
SERVED_SECONDS = 120.0


def fresh_environment(home: Path) -> dict[str, str]:
    """An empty home and no environment but the way to Python and to its package index.

    And the patience of a machine with other things to do.
    """
    ours = Path(sys.prefix, "bin")
    kept = r"SSL_CERT_.*|REQUESTS_CA_BUNDLE|PIP_.*|UV_INDEX.*|LANG"
    environment = {name: value for name, value in os.environ.items() if re.fullmatch(kept, name)}
    path = [entry for entry in os.environ["PATH"].split(os.pathsep) if Path(entry) != ours]
    patience, seconds = PATIENT
    return environment | {"PATH": os.pathsep.join(path), "HOME": str(home), patience: seconds}


def follow(command: str, folder: Path, environment: dict[str, str]) -> str:
    """Type a command; return what it printed, fail with that unless it succeeds."""
    done = subprocess.run(
        [*giving_way(command), "bash", "-e", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def serve(command: str, address: str, folder: Path, environment: dict[str, str]) -> None:
    """Type a command that serves until Ctrl-C; fail unless it prints a line with its address."""
    with subprocess.Popen(
        ["bash", "-c", f"exec {command}"],
        cwd=folder,
        env=environment | {"PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Where these tests run in the background of a shell, Ctrl-C is ignored, and inherited so.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as server:
        assert server.stdout
        late = threading.Timer(SERVED_SECONDS, server.kill)
        late.start()
        printed = ""
        for line in server.stdout:
            printed += line
            if re.search(address, line):
                # Without a terminal uv hands it on; to the group, Python would get it twice.
                server.send_signal(signal.SIGINT)
                break
        printed += server.stdout.read()
        late.cancel()
    assert server.returncode == 0, f"{command}\n{printed}"


def test_every_documented_command_is_run_by_a_test_or_needs_what_no_test_has(
    default_project: BakedProject,
) -> None:
    documented = {
        command
        for folder, names in ((ROOT, OURS), (default_project.path, THEIRS))
        for name in names
        for command in commands((folder / name).read_text(encoding="utf-8"))
    }

    known = {*FOLLOWED, *TESTED, *NEEDS}
    assert documented - known == set(), "say in tests/documented.py which test runs it"
    assert known - documented == set(), "no document says these any longer"
    assert len(known) == len(FOLLOWED) + len(TESTED) + len(NEEDS)


@pytest.mark.parametrize("place", sorted(set(TESTED.values())))
def test_the_test_that_is_said_to_run_a_command_exists(place: str) -> None:
    file, _, name = place.partition("::")
    source = ROOT / file if (ROOT / file).exists() else ROOT / FOLDER / file
    assert re.search(rf"\bdef {name}", source.read_text(encoding="utf-8")), place


def test_the_readme_has_the_two_commands_it_promises_and_ci_runs_the_second() -> None:
    first, second = readme_commands()
    assert "-m rehearsal call" in first
    typed_after_installing_uv = second.split("&&")[-1].strip()
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert typed_after_installing_uv in lines


def readme_commands() -> list[str]:
    """The two commands at the top of the README."""
    blocks = shell_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    return [line for block in blocks[:2] for line in block]


@pytest.mark.slow(seconds=90)
def test_followed_from_nothing_a_human_voice_is_answered_on_both_transports_and_the_rest_works(
    template: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = fresh_environment(home)
    project = template.parent / "my-voice-bot"

    # As on Debian, whose own Python takes no packages; in both commands uv is installed first.
    (own_place,) = re.findall(r"`(python3 -m venv [^`]+)`", (ROOT / "README.md").read_text("utf-8"))
    first, second = readme_commands()
    assert first.startswith(install := "pip install uv && ") and second.startswith(install)
    printed = follow(f"{own_place}\n{first}", template, environment)
    assert len(re.findall(rf"(?i)caller  {SPOKEN}", printed)) == 2, printed
    answered = r"bot     I understood: He might even .*\[after \d\.\d\d s\]"
    assert len(re.findall(answered, printed)) == 2, printed
    environment["PATH"] = f"{home}/uv/bin{os.pathsep}{environment['PATH']}"

    records = sorted((project / "calls").glob("*/call.json"))
    assert len(records) == 2
    for path in records:
        turns = json.loads(path.read_text(encoding="utf-8"))["turns"]
        assert [turn["role"] for turn in turns] == ["assistant", "user", "assistant"]
        assert SPOKEN in turns[1]["text"].lower()
        assert SPOKEN in turns[2]["text"].lower()
        with wave.open(str(path.with_name("recording.wav"))) as recording:
            rate = recording.getframerate()
            pcm = recording.readframes(recording.getnframes())
        samples = np.frombuffer(pcm, dtype="<i2").reshape(-1, 2)
        times = {role: np.zeros(len(samples), bool) for role in ("user", "assistant")}
        for turn in turns:
            first, last = (int(turn[edge] * rate / 1000) for edge in ("start_ms", "end_ms"))
            times[turn["role"]][first:last] = True
        # On a busy machine there are holes in what is said, and the other speaks into them.
        for side, (own, others) in enumerate(permutations(times.values())):
            loud = np.abs(samples[:, side].astype(int)) > LOUD
            heard, misplaced = (np.count_nonzero(loud & when) for when in (own, others & ~own))
            assert heard > 5 * misplaced, f"{heard} and {misplaced} in {path}: {turns}"

    for command, address in FOLLOWED.items():
        if address:
            serve(command, address, project, environment)
        else:
            follow(command, project, environment)
    assert list((project / "calls").glob("*/report.html"))


@pytest.mark.slow(seconds=150)
def test_a_project_installs_and_holds_a_call_with_pip_alone(
    default_project: BakedProject, tmp_path: Path
) -> None:
    """Its README's lines for pip, where there is no uv; but not all of its tests.

    On the newest Python that is tried, where it is installed: on 3.11 uv installs it elsewhere.
    """
    blocks = shell_blocks(default_project.read("README.md"))
    (block,) = [block for block in blocks if "-m venv" in block[0]]
    *install, test = block
    assert test.startswith("pytest")
    programs, home = tmp_path / "bin", tmp_path / "home"
    programs.mkdir()
    home.mkdir()
    python = installed_python(NEWEST_TRIED) or Path(sys.base_prefix, "bin", "python3")
    (programs / "python").symlink_to(python)
    path = f"{programs}{os.pathsep}{os.defpath}"
    if shutil.which("uv", path=path):
        pytest.skip("uv is installed for the whole system")
    project = Path(shutil.copytree(default_project.path, tmp_path / "my-voice-bot"))
    quick = "tests/test_config.py tests/test_calls.py -n 0 -k 'help_needs or arrives_complete'"

    # Python compiles what is imported; pip would compile all that is there, half a minute's work,
    # and keep what it has downloaded for a next time.
    saving = {"PIP_NO_COMPILE": "1", "PIP_NO_CACHE_DIR": "1"}
    environment = fresh_environment(home) | {"PATH": path} | saving
    install = [
        " ".join([*giving_way(line), line]) if line.startswith("pip ") else line for line in install
    ]
    follow("\n".join([*install, f"{test} {quick}"]), project, environment)
    if installed_python(NEWEST_TRIED):
        assert list(project.glob(f".venv/lib/python{NEWEST_TRIED}"))

    git = BakedProject(project)
    for command in (["git", "init", "-q"], ["git", "add", "--all"]):
        succeed(git.run(*command))
    assert git.run("git", "ls-files").stdout.split() == sorted(default_project.files())


def test_the_readme_says_of_speed_what_was_measured_last() -> None:
    """It said 0.99 long after the table said 0.7."""
    table = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    row = re.compile(r"^\| (answer|cold `import bot`)[, ][^|]*?\| ([0-9.]+)x \|", re.MULTILINE)
    rows = row.findall(table)
    rounded = {kind: {round(float(x), 1) for k, x in rows if k == kind} for kind, _ in rows}
    answers, imports = sorted(rounded["answer"]), rounded["cold `import bot`"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"| {answers[0]} to {answers[-1]} of its, median and 95th percentile |" in readme
    assert f"| cold `import bot` | {imports.pop()} of its |" in readme
