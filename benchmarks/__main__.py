"""Measures, and writes the tables of README.md anew: python -m benchmarks [SECTION ...]."""

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from loguru import logger

from benchmarks import (
    conversation,
    cpu,
    crowd,
    destinations,
    faults,
    frames,
    generation,
    growth,
    images,
    long_call,
    markers,
    openings,
    pythons,
    replaced,
    report,
    soak,
    speed,
    stall,
    stalls,
    turn,
)

README = Path(__file__).with_name("README.md")

SECTIONS: dict[str, Callable[[], str]] = {
    "frames": frames.report,
    "stall": stall.report,
    "long_call": long_call.report,
    "markers": markers.report,
    "faults": faults.report,
    "destinations": destinations.report,
    "speed": speed.report,
    "turn": turn.report,
    "cpu": cpu.report,
    "pythons": pythons.report,
    "crowd": crowd.report,
    "bound": crowd.bound_report,
    "conversation": conversation.report,
    "openings": openings.report,
    "generation": generation.report,
    "report": report.report,
    "growth": growth.report,
    "stalls": stalls.report,
    "replaced": replaced.report,
    "images": images.report,
}

LONG = ("images", "pythons", "replaced", "soak", "stalls")
"""Only when they are named."""


def main() -> int:
    """Run the sections named on the command line, or all short ones; returns the exit status."""
    if sys.argv[1:2] == ["conversation"] and sys.argv[2:]:
        # A part of it, to tune by; README.md stays as it is.
        return conversation.main(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION")
    parser.add_argument("--minutes", type=float, default=soak.MINUTES, help="how long soak lasts")
    arguments = parser.parse_args()
    SECTIONS["soak"] = partial(soak.report, arguments.minutes)
    chosen = arguments.sections or [name for name in SECTIONS if name not in LONG]
    if unknown := sorted(set(chosen) - set(SECTIONS)):
        print(f"There is {', '.join(SECTIONS)}; not {', '.join(unknown)}.", file=sys.stderr)
        return 2
    logger.remove()
    for name in chosen:
        print(f"{name} ...", flush=True)
        table = SECTIONS[name]()
        print(table, flush=True)
        _write(name, table)
    return 0


def _write(name: str, table: str) -> None:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = README.read_text(encoding="utf-8")
    section = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not section.search(text):
        raise ValueError(f"README.md has no place for {name}")
    README.write_text(section.sub(lambda _: f"{begin}\n{table}\n{end}", text), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
