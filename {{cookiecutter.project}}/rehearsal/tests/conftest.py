"""Fixtures every test may use."""

from machine import anyio_backend, goes_first, shows_its_log, weights_of_this_machine

__all__ = ["anyio_backend", "goes_first", "shows_its_log", "weights_of_this_machine"]
