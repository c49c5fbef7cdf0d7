"""What old calls cost a new process and `python -m roark calls`, by how many there are.

    python -m benchmarks.growth

"First" is the first process that ever looks at these folders: it reads each of them once. All
later ones know what it learnt (`.catalog.jsonl`).
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

from benchmarks import PROJECT, REPOSITORY
from benchmarks.kept_calls import write_calls

CALLS = (10, 1000, 10_000)
# A new process looks after old calls 2 s after its start, and keeps the folder's bounds then.
LIVES_SECONDS = 10.0

START = """
import asyncio, sys, time
from roark.outbox import outbox_from_environment

async def live(seconds):
    began, longest, last = time.process_time(), 0.0, time.perf_counter()
    outbox = outbox_from_environment()
    ends = last + seconds
    while last < ends:
        await asyncio.sleep(0.005)
        now = time.perf_counter()
        longest, last = max(longest, now - last - 0.005), now
    beat = 0.00002 * seconds / 0.005
    print(time.process_time() - began - beat, longest)

asyncio.run(live(float(sys.argv[1])))
"""


def start(directory: Path, seconds: float) -> tuple[float, float]:
    """Return the processor seconds of a new process's first `seconds`, and its loop's stall (s)."""
    done = _run(["-c", START, str(seconds)], directory)
    cpu, stall = done.stdout.split()
    return float(cpu), float(stall)


def calls(directory: Path) -> tuple[float, float]:
    """Return the wall-clock and processor seconds of `python -m roark calls`."""
    before, began = os.times(), time.perf_counter()
    done = _run(["-m", "roark", "calls"], directory)
    wall, after = time.perf_counter() - began, os.times()
    if len(done.stdout.splitlines()) < 3:
        raise AssertionError(done.stdout)
    cpu = after.children_user + after.children_system
    return wall, cpu - before.children_user - before.children_system


def _run(arguments: list[str], directory: Path) -> "subprocess.CompletedProcess[str]":
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{PROJECT}:{REPOSITORY}",
        "CALLS_DIR": str(directory),
        "ROARK_API_KEY": "key",
        "ROARK_BASE_URL": "http://127.0.0.1:9",
    }
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=True
    )


HEAD = """\
| old calls | first start | a start | longest stall | first `roark calls` | `roark calls` |
|---|---|---|---|---|---|"""


def report() -> str:
    """Measure, and return the section for README.md."""
    lines = [HEAD]
    for number in CALLS:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "calls"
            # Made-up calls need not outlast a power cut.
            with patch("os.fsync"):
                write_calls(directory, number)
            first_calls, _ = calls(directory)
            (directory / ".catalog.jsonl").unlink()
            first_cpu, _ = start(directory, LIVES_SECONDS)
            # The first start may have ended before it was through.
            later_calls = min(calls(directory)[0] for _ in range(3))
            cpu, stall = start(directory, LIVES_SECONDS)
        lines.append(
            f"| {number:,} | {first_cpu:.2f} s | {cpu:.2f} s | {1000 * stall:.0f} ms "
            f"| {first_calls:.2f} s | {later_calls:.2f} s |"
        )
    lines += [
        "",
        f"Processor time of a process's first {LIVES_SECONDS:g} s beyond its imports; wall-clock "
        "time of the command. Goals: a start 1 s, the command 1 s, whatever lies there.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
