"""What `python -m roark report` costs, by how many calls are kept and how long one of them was.

    python -m benchmarks.report DIRECTORY [CALL]

writes the report of made-up calls (kept_calls.py) once, in a process of its own, and prints JSON.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import REPOSITORY, kept_calls

KEPT = (10, 1_000, 10_000)
HOURS = 2.0


def measure(directory: Path, call: str | None) -> dict[str, float]:
    """Write the report, or the page of one call: seconds of processor time, MB of memory."""
    from roark import report

    before = time.process_time()
    if call:
        report.write_report(report.find_call(directory, call))
    else:
        report.write_index(directory)
    return {
        "seconds": time.process_time() - before,
        "megabytes": _peak_megabytes(),
    }


def _peak_megabytes() -> float:
    # Not ru_maxrss, which begins with the peak of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found.group(1)) / 1024 if found else 0.0


def report() -> str:
    """Measure, and return the section for README.md."""
    lines = [
        "| calls kept | first time | nothing new | one new call | a call of 2 h | memory | index |",
        "|---|---|---|---|---|---|---|",
    ]
    with TemporaryDirectory() as temporary:
        directory = Path(temporary)
        written = 0
        kept_calls.write_long_call(directory, HOURS)
        [long_call] = directory.glob("2*")
        for calls in KEPT:
            (directory / "index.html").unlink(missing_ok=True)
            for page in directory.glob("*/report.html"):
                page.unlink()
            kept_calls.write_calls(directory, calls - written - 1, first=written)
            first, again = _measured(directory), _measured(directory)
            kept_calls.write_calls(directory, 1, first=calls - 1)
            one_more = _measured(directory)
            alone = _measured(directory, long_call.name)
            written = calls
            size = (directory / "index.html").stat().st_size / 1e6
            peak = max(found["megabytes"] for found in (first, again, one_more))
            lines.append(
                f"| {calls:,} | {first['seconds']:.1f} s | {again['seconds']:.2f} s | "
                f"{one_more['seconds']:.2f} s | {alone['seconds']:.1f} s, "
                f"{alone['megabytes']:.0f} MB | {peak:.0f} MB | {size:.1f} MB |"
            )
        page = (long_call / "report.html").stat().st_size / 1e6
    lines += [
        "",
        "Seconds of processor, peak of memory of the process. Imports are in the memory and not "
        "in the time. One of the calls lasts "
        f"{HOURS:.0f} h; its page is {page:.1f} MB. The others have no recording.",
    ]
    return "\n".join(lines)


def _measured(directory: Path, *call: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.report", directory, *call],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    )
    return json.loads(done.stdout)


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)))
