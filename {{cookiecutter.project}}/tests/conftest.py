"""Fixtures every test may use."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from machine import machine

__all__ = ["anyio_backend", "machine"]

HOLDS_CALLS = re.compile(r"^ *(?:from|import) (?:harness|rehearsal)\b", re.MULTILINE)
has_rehearsal = find_spec("rehearsal") is not None
collect_ignore = [
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if not has_rehearsal and HOLDS_CALLS.search(path.read_text(encoding="utf-8"))
]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what is left out where rehearsal/ was deleted."""
    if collect_ignore:
        terminalreporter.write_line(
            f"{len(collect_ignore)} test files skipped: they need rehearsal/, which is not here"
        )


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio, the loop Pipecat runs on."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def weights_of_this_machine() -> Iterator[None]:
    """Services that run in the bot's own process load what is installed, and download nothing."""
    if not has_rehearsal:
        yield
        return
    from rehearsal.engines import weights

    with pytest.MonkeyPatch.context() as patch:
        for name, value in weights.environment().items():
            patch.setenv(name, value)
        yield
