"""A change to Pipecat 1.14 that would make every bot cheaper, to be measured (cpu.py).

Loaded into a bot's process by Pipecat (PIPECAT_SETUP_FILES). For each processor that works on a
frame, `WorkerObserver` puts an event into the queue of every observer, whose task takes it out and
calls `on_process_frame`, which none of Pipecat's observers has. With the change only those that
have one are told.
"""

import functools

from pipecat.observers.base_observer import BaseObserver, FrameProcessed
from pipecat.pipeline.worker import PipelineWorker
from pipecat.pipeline.worker_observer import WorkerObserver


async def setup_pipeline_worker(_worker: PipelineWorker) -> None:
    """Make the change, with the process's first call."""
    _change()


@functools.cache
def _change() -> None:
    async def on_process_frame(self: WorkerObserver, data: FrameProcessed) -> None:
        for proxy in (self._proxies or {}).values():
            if type(proxy.observer).on_process_frame is not BaseObserver.on_process_frame:
                await proxy.queue.put(data)

    WorkerObserver.on_process_frame = on_process_frame
