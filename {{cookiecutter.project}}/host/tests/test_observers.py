"""Several observers for the price of one."""

from typing import Any

from loguru import logger
from pipecat.frames.frames import TextFrame
from pipecat.observers.base_observer import BaseObserver, FramePushed
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.filters.identity_filter import IdentityFilter
from pipecat.workers.runner import WorkerRunner

from host.observers import Together


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
        if isinstance(data.frame, TextFrame):
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
    once, often, alone = Witness(observe_every_push=False), Witness(), Witness()
    worker = PipelineWorker(
        Pipeline([IdentityFilter(), IdentityFilter()]), observers=[alone], enable_rtvi=False
    )
    worker.add_observer(Together(Broken(), once, often))
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    await worker.queue_frames([TextFrame("one"), TextFrame("two")])
    await worker.stop_when_done()
    await runner.run()
    logger.remove(sink)

    assert often.told == alone.told
    assert once.told == ["setup", "started", "one", "two", "cleanup"]
    assert often.told.count("one") > 1
    assert lines == ["An observer failed: Broken: RuntimeError\n"]
