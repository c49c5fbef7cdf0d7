"""Fixtures every test may use."""

from pathlib import Path

from machine import (
    anyio_backend,
    goes_first,
    shows_its_log,
    weights_of_this_machine,
    without_rehearsal,
)

__all__ = ["anyio_backend", "goes_first", "shows_its_log", "weights_of_this_machine"]

collect_ignore = without_rehearsal(Path(__file__).parent)
