"""Fixtures every test may use."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from machine import anyio_backend, machine, weights_of_this_machine

__all__ = ["anyio_backend", "machine", "weights_of_this_machine"]

HOLDS_CALLS = re.compile(r"^ *(?:from|import) (?:harness|rehearsal)\b", re.MULTILINE)
has_rehearsal = find_spec("rehearsal") is not None
collect_ignore = [
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if not has_rehearsal and HOLDS_CALLS.search(path.read_text(encoding="utf-8"))
]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which service was replaced in calls, and what is left out without rehearsal/."""
    if collect_ignore:
        terminalreporter.write_line(
            f"{len(collect_ignore)} test files skipped: they need rehearsal/, which is not here"
        )
    if has_rehearsal:
        from rehearsal import stand_ins

        try:
            sentences = stand_ins.sentences()
        except ValueError as nothing_to_stand_in:
            sentences = [f"No call was held. {nothing_to_stand_in}"]
        for sentence in sentences:
            terminalreporter.write_line(sentence)
