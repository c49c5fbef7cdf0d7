"""Fixtures every test may use."""

from pathlib import Path

import pytest
from machine import anyio_backend, machine, weights_of_this_machine

__all__ = ["anyio_backend", "machine", "weights_of_this_machine"]


@pytest.fixture
def calls_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the commands look at, from a directory without .env, and no key."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CALLS_DIR", str(tmp_path / "calls"))
    for name in ("ROARK_API_KEY", "ROARK_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "calls"
