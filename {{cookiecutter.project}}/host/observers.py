"""Several observers of a call for the price of one.

Pipecat keeps a queue and a task for each observer, and tells it of every processor that works on a
frame: 860 times in a second of a call (Pipecat 1.14), of which those here want 80. That is some
5 ms of processor time in each second.
"""

from loguru import logger
from pipecat.observers.base_observer import BaseObserver, FramePushed
from pipecat.utils.asyncio.task_manager import BaseTaskManager


class Together(BaseObserver):
    """Tells several observers of the frames that are pushed; to the worker it is one.

    What else an observer can be told of, that frames are processed and processors set up, it is not
    told.
    """

    def __init__(self, *observers: BaseObserver) -> None:
        """Each is told only of first pushes, or of every one, as it wants."""
        super().__init__(observe_every_push=any(one.observe_every_push for one in observers))
        self._observers = observers
        self._failures = set[str]()

    async def setup(self, task_manager: BaseTaskManager) -> None:
        """The pipeline is being built."""
        await super().setup(task_manager)
        for observer in self._observers:
            await observer.setup(task_manager)

    async def cleanup(self) -> None:
        """The pipeline is gone; that one fails is not the others' end."""
        await super().cleanup()
        for observer in self._observers:
            try:
                await observer.cleanup()
            except Exception as error:
                self._fail(observer, error)

    async def on_pipeline_started(self) -> None:
        """All processors have the first frame."""
        for observer in self._observers:
            await observer.on_pipeline_started()

    async def on_push_frame(self, data: FramePushed) -> None:
        """A processor passes a frame on; that one observer fails is not the others' end."""
        for observer in self._observers:
            if data.first_push or observer.observe_every_push:
                try:
                    await observer.on_push_frame(data)
                except Exception as error:
                    self._fail(observer, error)

    def _fail(self, observer: BaseObserver, error: Exception) -> None:
        failure = f"{type(observer).__name__}: {type(error).__name__}"
        # There may be a hundred frames a second.
        if failure not in self._failures:
            self._failures.add(failure)
            logger.error(f"An observer failed: {failure}")
