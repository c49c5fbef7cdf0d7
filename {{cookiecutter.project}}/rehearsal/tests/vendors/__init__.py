"""The vendors of this project whose wires share their tests; one file each."""

from importlib import import_module
from importlib.util import find_spec

import pytest


def every(*names: str) -> pytest.MarkDecorator:
    """Have a test run with each of these vendors, as `vendor`, that this project has."""
    here = [name for name in names if find_spec(f"{__name__}.{name}")]
    vendors = [import_module(f"{__name__}.{name}").VENDOR for name in here]
    return pytest.mark.parametrize("vendor", vendors, ids=here)
