"""Roark's observer for Pipecat, as a part of this project.

An independent implementation of the wire contract of Roark's Pipecat integration. BSD-2-Clause
(see LICENSE). Not affiliated with Roark; the public names are those of the published
`pipecat-roark` package, so that one can be swapped for the other by changing an import.
"""

from roark.observer import RoarkObserver
from roark.recorder import CallRecorder

__version__ = "0.1.0"

__all__ = ["CallRecorder", "RoarkObserver", "__version__"]
