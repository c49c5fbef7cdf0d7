"""Fixtures every test may use."""

import pytest

from machine import machine

__all__ = ["anyio_backend", "machine"]


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio, the loop Pipecat runs on."""
    return "asyncio"
