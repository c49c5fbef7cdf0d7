"""Fixtures every test may use."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from loguru import logger
from machine import (
    anyio_backend,
    goes_first,
    shows_its_log,
    weights_of_this_machine,
    without_rehearsal,
)

__all__ = ["anyio_backend", "goes_first", "shows_its_log", "weights_of_this_machine"]

collect_ignore = without_rehearsal(Path(__file__).parent)


@pytest.fixture
def calls_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the commands look at, from a directory without .env, and no key."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CALLS_DIR", str(tmp_path / "calls"))
    for name in ("ROARK_API_KEY", "ROARK_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "calls"


@pytest.fixture
async def roark(anyio_backend: str) -> AsyncIterator[Any]:
    """A Roark on this machine; whatever came to it has to be as the wire contract says."""
    # Not at the top: the other tests here run where rehearsal/ was deleted.
    from rehearsal.providers.roark import RoarkReceiver

    async with RoarkReceiver() as receiver:
        yield receiver
        assert receiver.problems == []


@pytest.fixture
def log() -> Iterator[list[str]]:
    """All lines that were logged."""
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(str(message)), level="TRACE")
    yield lines
    logger.remove(sink)
