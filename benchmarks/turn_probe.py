"""Loaded into a bot's process by Pipecat (PIPECAT_SETUP_FILES): notes the moments of a turn there.

One JSON line for each in the file that TURN_PROBE names; seconds on the machine's monotonic clock,
which all its processes share.
"""

import functools
import json
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from pipecat.audio.turn.smart_turn.base_smart_turn import BaseSmartTurn
from pipecat.pipeline.worker import PipelineWorker
from pipecat.transports.base_input import BaseInputTransport
from pipecat.transports.smallwebrtc.transport import SmallWebRTCOutputTransport
from pipecat.transports.websocket.fastapi import FastAPIWebsocketOutputTransport

LOUD_RMS = 400.0
SILENCE_SECONDS = 0.08

TAKEN, ASKED, JUDGED, WRITTEN = "taken", "asked", "judged", "written"


async def setup_pipeline_worker(_worker: PipelineWorker) -> None:
    """Begin to take notes, with the process's first call."""
    _probe()


@functools.cache
def _probe() -> None:
    _before(BaseInputTransport, "push_audio_frame", _Ends(TAKEN))
    _before(BaseSmartTurn, "analyze_end_of_turn", lambda: _note(ASKED))
    _after(BaseSmartTurn, "analyze_end_of_turn", lambda: _note(JUDGED))
    for output in (SmallWebRTCOutputTransport, FastAPIWebsocketOutputTransport):
        _before(output, "write_audio_frame", _Begins(WRITTEN))


class _Ends:
    """Notes the last loud frame before a silence, once it is known to be one."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loud_at = 0.0

    def __call__(self, frame: Any) -> None:
        now = time.monotonic()
        if _is_loud(frame.audio):
            self._loud_at = now
        elif self._loud_at and now - self._loud_at > SILENCE_SECONDS:
            _note(self._name, self._loud_at)
            self._loud_at = 0.0


class _Begins:
    """Notes the first loud frame after a silence."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loud_at = 0.0

    def __call__(self, frame: Any) -> None:
        if not _is_loud(frame.audio):
            return
        now = time.monotonic()
        if now - self._loud_at > SILENCE_SECONDS:
            _note(self._name)
        self._loud_at = now


def _is_loud(pcm: bytes) -> bool:
    samples = np.frombuffer(pcm, np.int16).astype(np.float64)
    return bool(samples.size) and float(np.sqrt(np.mean(samples**2))) > LOUD_RMS


def _note(name: str, at: float | None = None) -> None:
    at = time.monotonic() if at is None else at
    with open(os.environ["TURN_PROBE"], "a", encoding="utf-8") as notes:
        notes.write(json.dumps([name, at]) + "\n")


def _before(kind: type, name: str, note: Callable[..., None]) -> None:
    method: Callable[..., Awaitable[Any]] = getattr(kind, name)

    @functools.wraps(method)
    async def noted(self: Any, *args: Any) -> Any:
        note(*args)
        return await method(self, *args)

    setattr(kind, name, noted)


def _after(kind: type, name: str, note: Callable[[], None]) -> None:
    method: Callable[..., Awaitable[Any]] = getattr(kind, name)

    @functools.wraps(method)
    async def noted(self: Any, *args: Any) -> Any:
        result = await method(self, *args)
        note()
        return result

    setattr(kind, name, noted)
