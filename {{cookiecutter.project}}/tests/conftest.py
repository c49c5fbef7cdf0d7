"""Fixtures every test may use."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from machine import (
    anyio_backend,
    compile_first,
    goes_first,
    project,
    shows_its_log,
    weights_of_this_machine,
    without_rehearsal,
)

__all__ = ["anyio_backend", "goes_first", "project", "shows_its_log", "weights_of_this_machine"]

collect_ignore = without_rehearsal(Path(__file__).parent)


def pytest_configure(config: pytest.Config) -> None:
    """Compile what is tested before several processes do."""
    compile_first(config)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which service was replaced in calls, and what is left out without rehearsal/."""
    if collect_ignore:
        terminalreporter.write_line(
            f"{len(collect_ignore)} test files skipped: they need rehearsal/, which is not here"
        )
    if find_spec("rehearsal"):
        from rehearsal import stand_ins

        try:
            sentences = stand_ins.sentences()
        except ValueError as nothing_to_stand_in:
            sentences = [f"No call was held. {nothing_to_stand_in}"]
        for sentence in sentences:
            terminalreporter.write_line(sentence)
