"""Roark's observer for Pipecat, as a part of this project.

An independent implementation of the wire contract of Roark's Pipecat integration. BSD-2-Clause
(see LICENSE). Not affiliated with Roark; the public names are those of the published
`pipecat-roark` package, so that one can be swapped for the other by changing an import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roark.observer import RoarkObserver
    from roark.recorder import CallRecorder

__version__ = "0.1.0"

__all__ = ["CallRecorder", "RoarkObserver", "__version__"]


def __getattr__(name: str) -> Any:
    # `python -m roark calls` need not wait for Pipecat.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "roark.observer" if name == "RoarkObserver" else "roark.recorder"
    return getattr(import_module(module), name)
