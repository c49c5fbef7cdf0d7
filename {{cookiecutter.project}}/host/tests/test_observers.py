"""Several observers for the price of one."""

from typing import Any

import pytest
from loguru import logger
from pipecat.frames.frames import TextFrame
from pipecat.observers.base_observer import BaseObserver, FramePushed
from pipecat.processors.filters.identity_filter import IdentityFilter
from pipecat.processors.frame_processor import FrameDirection
from pipecat.utils.asyncio.task_manager import TaskManager

from host.observers import Together

pytestmark = pytest.mark.anyio


class Witness(BaseObserver):
    """Remembers what it is told."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.told: list[str] = []

    async def setup(self, task_manager: Any) -> None:
        await super().setup(task_manager)
        self.told.append("setup")

    async def cleanup(self) -> None:
        await super().cleanup()
        self.told.append("cleanup")

    async def on_pipeline_started(self) -> None:
        self.told.append("started")

    async def on_push_frame(self, data: FramePushed) -> None:
        assert isinstance(data.frame, TextFrame)
        self.told.append(data.frame.text)


class Broken(Witness):
    """Cannot stand anything."""

    async def cleanup(self) -> None:
        raise RuntimeError("secret")

    async def on_push_frame(self, data: FramePushed) -> None:
        raise RuntimeError("secret")


async def test_each_observer_is_told_as_if_it_were_alone_and_none_suffers_from_another() -> None:
    lines: list[str] = []
    sink = logger.add(lines.append, level="ERROR", format="{message}")
    once, often = Witness(observe_every_push=False), Witness()
    together = Together(Broken(), once, often)
    here, there, frame = IdentityFilter(), IdentityFilter(), TextFrame("word")
    await together.setup(TaskManager())
    await together.on_pipeline_started()
    for is_first in (True, False):
        push = FramePushed(here, there, frame, FrameDirection.DOWNSTREAM, 0, first_push=is_first)
        await together.on_push_frame(push)
    await together.cleanup()
    logger.remove(sink)

    assert once.told == ["setup", "started", "word", "cleanup"]
    assert often.told == ["setup", "started", "word", "word", "cleanup"]
    assert together.observe_every_push and not Together(once).observe_every_push
    assert lines == ["An observer failed: Broken: RuntimeError\n"]
