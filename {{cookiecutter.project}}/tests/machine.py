"""Tests that measure time have the machine to themselves."""

import os
from collections.abc import Iterator

import pytest

try:
    import fcntl
except ImportError:  # Windows: there they share it.
    fcntl = None


@pytest.fixture(autouse=True)
def machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Share the machine with pytest-xdist's other workers; have it alone where marked `alone`."""
    if fcntl is None or "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    shared = tmp_path_factory.getbasetemp().parent
    with (
        open(shared / "turnstile.lock", "w", encoding="utf-8") as turnstile,
        open(shared / "machine.lock", "w", encoding="utf-8") as machine,
    ):
        # Whoever waits to be alone keeps the turnstile, so that nobody overtakes.
        fcntl.flock(turnstile, fcntl.LOCK_EX)
        alone = request.node.get_closest_marker("alone") is not None
        fcntl.flock(machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(turnstile, fcntl.LOCK_UN)
        yield
