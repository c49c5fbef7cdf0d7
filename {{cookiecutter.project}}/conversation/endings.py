"""How a call ends: at once, or after a goodbye, and never later than it must.

Pipecat's own graceful end, the EndFrame, waits without a limit for all that is queued, and nothing
overtakes it: a caller who hangs up during the goodbye, or a service that hangs, would hold up the
end. Here a goodbye is waited for up to a limit, and then the call is cancelled. A caller who says
more than "bye" into it takes the ending back, and is answered.
"""

import asyncio
import gc
from typing import TYPE_CHECKING

from loguru import logger
from pipecat.frames.frames import Frame, LLMMessagesAppendFrame
from pipecat.processors.aggregators.llm_response_universal import LLMUserAggregator

import config
from conversation.floor import Floor

if TYPE_CHECKING:
    from pipecat.pipeline.worker import PipelineWorker
    from pipecat.workers.runner import WorkerRunner

    from roark import RoarkObserver
    from transports import Connection

GOODBYE_SECONDS = 15.0
# The last word has left the pipeline, but not yet reached the caller's ear.
LAST_WORD_SECONDS = 0.7
# What the caller said into the end of the goodbye, until it is recognised.
RECOGNISE_SECONDS = 1.0
# The time limit, taken back by a caller who had more to say, comes again after so long.
MORE_SECONDS = 30.0
# Longer than a browser's hiccup; a peer that is gone for good stays gone.
DEAD_LINE_SECONDS = 5.0
# How long a peer may take to connect at all.
CONNECT_SECONDS = 20.0
LOOK_EVERY_SECONDS = 0.5
# For Pipecat, to take a cancelled pipeline down: its connections are closed meanwhile.
TEARDOWN_SECONDS = 5.0
# The second time for what a busy machine had not let go of at the first.
FORGET_SECONDS = (0.5, 5.0)
# Below max_session_duration in pcc-deploy.toml, which ends a call without a goodbye.
MAX_CALL_SECONDS = 3300.0

SESSION_LIMIT = ("max-duration", "bot() was cancelled: the host's session limit")
"""The reason and its detail when Pipecat Cloud cancels `bot()`."""

TIME_IS_UP = "This call has reached its time limit. Say so in one sentence, and say goodbye."


def forget_soon() -> None:
    """Free the memory of a call that is over, once bot() has let go of it.

    A call is full of cycles and holds 10 MB. Python's own collection, which counts objects and not
    bytes, would let dozens of calls pile up.
    """
    for seconds in FORGET_SECONDS:
        asyncio.get_running_loop().call_later(seconds, gc.collect)


def note(roark: "RoarkObserver", reason: str, detail: str) -> None:
    """Put down why the call ends, one of roark.call.ENDINGS; what is noted first stands.

    Where the import was changed to the published observer, it tells that from the frames.
    """
    if note_ending := getattr(roark, "note_ending", None):
        note_ending(reason, detail)


def annotate(roark: "RoarkObserver", **values: object) -> None:
    """Put values of one's own into the record; the published observer has no place for them."""
    if add := getattr(roark, "annotate", None):
        add(**values)


def instruction(text: str) -> LLMMessagesAppendFrame:
    """Tell the LLM something the caller does not hear, and have it speak."""
    # Most LLMs know no role "developer": Pipecat passes it on as the caller's. The brackets tell
    # them apart.
    content = f"[{text}]"
    return LLMMessagesAppendFrame([{"role": "developer", "content": content}], run_llm=True)


class Ending:
    """The end of one call. Who asks for it first decides why and how."""

    def __init__(
        self,
        worker: "PipelineWorker",
        runner: "WorkerRunner",
        roark: "RoarkObserver",
        *,
        floor: Floor,
        caller: LLMUserAggregator,
    ) -> None:
        """Prepare the end of the call that `runner` runs; `caller` reports the caller's turns."""
        self._floor = floor
        self._wanted: tuple[str, str] | None = None
        self._worker = worker
        self._runner = runner
        self._roark = roark
        self._goodbye: asyncio.Task[None] | None = None
        self._limit_seconds = config.seconds("MAX_CALL_SECONDS", MAX_CALL_SECONDS)
        self._has_begun = False
        self._turns_before = 0
        self._connection: Connection | None = None
        self._cancelled = asyncio.Event()

        @caller.event_handler("on_user_turn_started")
        async def on_user_turn_started(_caller, _strategy):
            self._take_back()

    @property
    def floor(self) -> Floor:
        """Who has the floor in this call."""
        return self._floor

    @property
    def has_begun(self) -> bool:
        """Whether the call is ending: nothing new may be said."""
        return self._has_begun

    async def now(self, reason: str, detail: str) -> None:
        """End the call at once; `reason` is one of roark.call.ENDINGS.

        A goodbye that was under way had its own reason, which stands.
        """
        self._has_begun = True
        reason, detail = self._wanted or (reason, detail)
        note(self._roark, reason, detail)
        if self._connection and (dropped := self._connection.dropped()):
            annotate(self._roark, dropped_messages=dropped)
        await self._cancel(reason)

    def after(self, *goodbye: Frame, reason: str, detail: str, is_final: bool = False) -> None:
        """End the call once what the bot is saying, and `goodbye`, has been heard.

        Args:
            goodbye: What it says last; nothing, if it is saying it.
            reason: One of roark.call.ENDINGS.
            detail: The reason in words.
            is_final: Whether a caller who goes on talking cannot be answered any more.
        """
        if self._has_begun:
            return
        self._has_begun = True
        self._wanted = (reason, detail)
        self._turns_before = self._floor.caller_turns
        self._floor.is_saying_goodbye, self._floor.is_final = True, is_final
        self._goodbye = asyncio.create_task(self._say_goodbye(goodbye))

    def look(self) -> None:
        """See whether the caller said more than a "bye" into the goodbye; call it often.

        A sentence that they type starts no turn of speech, and one that they had begun before the
        goodbye does not start another.
        """
        if self._floor.caller_turns > self._turns_before:
            self._take_back()

    def instead(self, *goodbye: Frame) -> None:
        """Say `goodbye` in place of the one under way, which cannot be said."""
        if self._wanted and self._goodbye:
            self._goodbye.cancel()
            self._floor.is_final = True
            self._goodbye = asyncio.create_task(self._say_goodbye(goodbye))

    def _take_back(self) -> None:
        """Go on with the call: the caller had more to say."""
        if self._wanted is None or self._floor.is_final or self._cancelled.is_set():
            return
        logger.info("The caller had more to say; the call goes on")
        self._wanted, self._has_begun = None, False
        self._floor.is_saying_goodbye = False
        if self._goodbye:
            self._goodbye.cancel()

    async def run(self, connection: "Connection") -> None:
        """Run the call on `connection` to its end, whoever brings that about."""
        self._connection = connection
        running = asyncio.create_task(self._runner.run())
        cancelled = asyncio.create_task(self._cancelled.wait())
        watches = [
            cancelled,
            asyncio.create_task(self._limit_duration()),
            asyncio.create_task(self._notice_dead_line(connection)),
        ]
        try:
            await asyncio.wait([running, cancelled], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            # So Pipecat Cloud ends a session at its limit. The runner would cancel the call too,
            # but not say why.
            await self.now(*SESSION_LIMIT)
        finally:
            if self._wanted:
                note(self._roark, *self._wanted)
            tasks = [*watches, self._goodbye] if self._goodbye else watches
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait([running], timeout=2 * TEARDOWN_SECONDS)
        if not running.done():
            logger.error("The pipeline could not be taken down; leaving it behind")
            running.cancel()
            return
        running.result()

    async def _say_goodbye(self, goodbye: tuple[Frame, ...]) -> None:
        try:
            # Not timeout(): see recovery.py.
            await asyncio.wait_for(self._goodbye_is_over(goodbye), GOODBYE_SECONDS)
        except TimeoutError:
            logger.warning(f"The goodbye took longer than {GOODBYE_SECONDS:g} s; ending without it")
        if self._wanted:
            await self.now(*self._wanted)

    async def _goodbye_is_over(self, goodbye: tuple[Frame, ...]) -> None:
        if goodbye:
            await self._worker.queue_frames(goodbye)
        await self._worker.flush_pipeline(GOODBYE_SECONDS)
        await asyncio.sleep(LAST_WORD_SECONDS)
        while self._is_callers():
            while self._is_callers():
                await asyncio.sleep(LOOK_EVERY_SECONDS / 5)
            # Words that are more than a "bye" cancel this.
            await asyncio.sleep(RECOGNISE_SECONDS)

    def _is_callers(self) -> bool:
        return self._floor.caller_speaks or self._floor.turn_is_open

    async def _cancel(self, reason: str) -> None:
        await self._runner.cancel(reason)
        self._cancelled.set()

    async def _limit_duration(self) -> None:
        if self._limit_seconds:
            await asyncio.sleep(self._limit_seconds)
            detail = f"MAX_CALL_SECONDS is {self._limit_seconds:g}"
            was_said = False
            while True:
                # A caller who talks on takes it back once: a television would for ever.
                self.after(
                    instruction(TIME_IS_UP), reason="max-duration", detail=detail, is_final=was_said
                )
                await asyncio.sleep(MORE_SECONDS)
                was_said = True

    async def _notice_dead_line(self, connection: "Connection") -> None:
        # Pipecat tells of a webrtc peer that vanished when ICE gives up, after about 30 s.
        if connection.is_alive is None:
            return
        patience = CONNECT_SECONDS
        dead_for = 0.0
        while dead_for < patience and not connection.is_closed():
            await asyncio.sleep(LOOK_EVERY_SECONDS)
            if connection.is_alive():
                patience, dead_for = DEAD_LINE_SECONDS, 0.0
            else:
                dead_for += LOOK_EVERY_SECONDS
        await self.now("client-disconnected", "the caller's connection went dead")
