"""What is waited for a limited time, and for how long: without a call, on the moment."""

import asyncio
import time

import pytest
from pipecat.clocks.system_clock import SystemClock
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.frame_processor import FrameProcessor, FrameProcessorSetup
from pipecat.utils.asyncio.task_manager import TaskManager

from conversation.recovery import limit_setup

pytestmark = pytest.mark.anyio


class Connecting(FrameProcessor):
    """A service that waits for its connection, as Pipecat's wait: by asyncio.wait_for()."""

    def __init__(self) -> None:
        super().__init__()
        self.is_connected = asyncio.Event()

    async def setup(self, setup: FrameProcessorSetup) -> None:
        await asyncio.wait_for(self.is_connected.wait(), 60)


async def test_what_is_done_the_moment_its_time_is_up_ends_nothing_else() -> None:
    """On a busy machine a flush was, and the caller was not answered again."""
    service = Connecting()
    limit_setup(service, 0.01)
    worker = PipelineWorker(Pipeline([service]), enable_rtvi=False)
    setup = FrameProcessorSetup(SystemClock(), TaskManager(), worker)
    set_up = asyncio.create_task(service.setup(setup))
    await asyncio.sleep(0)
    # The process stands still for longer than both take: both are over when it goes on.
    loop = asyncio.get_running_loop()
    loop.call_later(0.005, service.is_connected.set)
    loop.call_soon(time.sleep, 0.02)
    await asyncio.wait([set_up])
    assert not set_up.cancelled()
    await set_up
