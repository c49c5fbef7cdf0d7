"""Fixtures every test may use."""

from collections.abc import Iterator

import pytest
from machine import machine

from rehearsal.engines import weights

__all__ = ["anyio_backend", "machine"]


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio, the loop Pipecat runs on."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def weights_of_this_machine() -> Iterator[None]:
    """Services that run in the bot's own process load what is installed, and download nothing."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in weights.environment().items():
            patch.setenv(name, value)
        yield
