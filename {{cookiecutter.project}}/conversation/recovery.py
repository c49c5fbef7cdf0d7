"""What can fail during a call, and what the caller hears then: anything but silence.

A turn that fails, or brings forth no sound in ANSWER_SECONDS, is tried again after a word to the
caller. What stays broken ends the call with an apology, a recorded one if it is the voice.

Whatever of Pipecat's is given a time limit is given it by asyncio.wait_for(), never by
asyncio.timeout(): before Python 3.12 Pipecat has a wait_for() of its own, and what that raises when
it is over at the very moment the time is up, timeout() takes for the end of the whole task.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING

from loguru import logger
from pipecat.frames.frames import (
    EndFrame,
    ErrorFrame,
    Frame,
    InterruptionFrame,
    LLMFullResponseStartFrame,
    TTSSpeakFrame,
)
from pipecat.observers.base_observer import FramePushed
from pipecat.processors.aggregators.llm_response_universal import (
    AssistantTurnStoppedMessage,
    LLMAssistantAggregator,
)
from pipecat.processors.frame_processor import FrameProcessor, FrameProcessorSetup
from pipecat.services.llm_service import LLMService
from pipecat.services.stt_service import STTService
from pipecat.services.tts_service import TTSService
from pipecat.utils.errors import ErrorCategory

import config
from conversation import phrases
from conversation.endings import instruction
from conversation.floor import Floor, FloorObserver, Side
from conversation.recorded import RecordedApologyFrame

if TYPE_CHECKING:
    from pipecat.pipeline.worker import PipelineWorker

    from conversation.endings import Ending

# The slowest models begin to answer after 3 or 4 s. The caller has waited a second longer, and
# hears what is said then a second later: it makes eight.
ANSWER_SECONDS = 6.0
# A service that is not connected by then, when the call begins, is not waited for.
CONNECT_SECONDS = 5.0
# A model may be overloaded for a moment; a voice that fails twice cannot say that it is sorry.
LLM_ATTEMPTS = 3
TTS_ATTEMPTS = 2
# A recogniser's connections before the call has begun. Pipecat tries 3, each 4 s after the one
# before, and the caller is in silence as long.
STT_ATTEMPTS = 2
# An interruption is through the pipeline in milliseconds; one that is stuck is not waited for.
SETTLE_SECONDS = 1.0

SAY_AGAIN = "Your last answer did not reach the caller, or not all of it. Answer again, briefly."
"""For the LLM: goes before every further attempt."""


def limit_setup(service: FrameProcessor, seconds: float) -> None:
    """Let `service` be broken, and the call begin, if it is not connected within `seconds`.

    Pipecat starts a call when all services are connected, and waits for each as long as it takes.
    """
    set_up = service.setup

    async def set_up_in_time(setup: FrameProcessorSetup) -> None:
        try:
            await asyncio.wait_for(set_up(setup), seconds)
        except TimeoutError:
            await service.push_error(
                f"no connection within {seconds:g} s",
                category=ErrorCategory.CONNECTIVITY,
                force_treat_as_permanent=True,
            )

    service.setup = set_up_in_time


class Recovery(FloorObserver):
    """Watches one call for what fails, and sees to it. Add it to the worker before it runs."""

    def __init__(
        self,
        worker: "PipelineWorker",
        ending: "Ending",
        *,
        floor: Floor,
        stt: FrameProcessor,
        llm: FrameProcessor,
        tts: TTSService,
        bot_side: LLMAssistantAggregator,
        fail_over: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Watch the call of `worker`, which hears with `stt` and speaks through `llm` and `tts`.

        Where `fail_over` names a person, they are who the caller gets at the end.
        """
        super().__init__(floor)
        self._floor = floor
        self._worker = worker
        self._ending = ending
        self._llm = llm
        self._tts = tts
        self._fail_over = fail_over
        # Spoken as they stand, for the LLM that could put them better may be what failed.
        self._phrases = phrases.spoken()
        self._answer_seconds = config.seconds("ANSWER_SECONDS", ANSWER_SECONDS)
        self._has_started = False
        self._failed_connections = 0
        self._attempt = 0
        self._failed_attempt = -1
        self._failed_in_a_row = 0
        self._has_asked_for_patience = False
        self._plays_recording = False
        self._voice_failed: Callable[[], None] | None = None
        self._voice_is_connected = asyncio.Event()
        self._voice_is_connected.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.look(self._look)
        for service in (stt, llm, tts):
            limit_setup(service, CONNECT_SECONDS)

        @worker.event_handler("on_pipeline_error")
        async def on_pipeline_error(_worker, frame: ErrorFrame):
            if frame.processor and not frame.processor.is_usable:
                await self._on_broken(frame.processor, frame)
            elif isinstance(frame.processor, STTService) and not self._has_started:
                await self._on_no_recogniser(frame.processor)

        @tts.event_handler("on_connected")
        async def on_connected(_service: TTSService):
            self._voice_is_connected.set()

        @tts.event_handler("on_disconnected")
        async def on_disconnected(service: TTSService):
            self._voice_is_connected.clear()
            if floor.owed_by is Side.BOT or floor.bot_speaks:
                self._fail(service, "lost its connection while the bot spoke")

        @bot_side.event_handler("on_assistant_turn_stopped")
        async def on_assistant_turn_stopped(_side, turn: AssistantTurnStoppedMessage):
            if turn.content and self._failed_attempt != self._attempt:
                self._failed_in_a_row = 0

    def leave_to(self, voice_failed: Callable[[], None]) -> None:
        """From here on, do nothing about what fails but to call `voice_failed` if it is the voice.

        For what is said to a machine: no word is for it but those, and nothing else is needed.
        """
        self._voice_failed = voice_failed

    async def break_off(self) -> None:
        """Drop what is being said, and wait until something else can be said."""
        await self._worker.queue_frame(InterruptionFrame())
        # What was heard of the answer is in the context only then.
        with suppress(TimeoutError):
            await asyncio.wait_for(self._settled(), SETTLE_SECONDS)

    async def on_pipeline_started(self) -> None:
        """From here on what is queued is processed: an answer can be waited for."""
        self._has_started = True
        self._floor.wait_anew()

    async def on_push_frame(self, data: FramePushed) -> None:
        """Count the attempts to answer, and see to what fails."""
        await super().on_push_frame(data)
        if isinstance(data.frame, LLMFullResponseStartFrame):
            self._attempt += 1
        elif isinstance(data.frame, ErrorFrame):
            self._on_error(data.frame)

    def _on_error(self, frame: ErrorFrame) -> None:
        service = frame.processor
        if service is None or not service.is_usable:
            return
        # The LLM also fails at other work: summaries of long calls, and tools, whose failure it is
        # told and speaks of. What fails in the project's own code for the voice is not spoken.
        is_tools = frame.category is ErrorCategory.APPLICATION
        of_answer = isinstance(service, LLMService) and self._floor.is_thinking and not is_tools
        of_voice = isinstance(service, TTSService) and (
            self._floor.owed_by is Side.BOT or self._floor.bot_speaks
        )
        if of_answer or of_voice:
            self._fail(service, str(frame.category.value if frame.category else "failed"))

    async def _on_broken(self, service: FrameProcessor, frame: ErrorFrame) -> None:
        """End the call: this service will not come back."""
        category = frame.category.value if frame.category else "failed"
        detail = f"{type(service).__name__}: {category}"
        logger.error(f"A service is broken for good: {detail}")
        is_service = isinstance(service, STTService | LLMService | TTSService)
        if is_service and self._voice_failed:
            if isinstance(service, TTSService):
                self._voice_failed()
        elif is_service:
            self._apologise(detail, is_final=True, has_voice=not isinstance(service, TTSService))
        else:
            # A transport: the caller no longer takes what is sent.
            await self._ending.now("client-disconnected", detail)

    async def _on_no_recogniser(self, service: STTService) -> None:
        """Stop waiting for a recogniser that holds up the beginning of the call."""
        self._failed_connections += 1
        if self._failed_connections == STT_ATTEMPTS:
            await service.push_error("no connection", force_treat_as_permanent=True)
            await service.stop(EndFrame())

    def _look(self) -> None:
        """See that the bot does not owe a sound for too long."""
        floor = self._floor
        if floor.owed_by is not Side.BOT:
            if floor.bot_speaks:
                self._has_asked_for_patience = False
            return
        is_late = floor.owed_seconds >= self._answer_seconds > 0
        if not is_late or not self._has_started:
            return
        floor.wait_anew()
        if self._ending.has_begun:
            # The goodbye does not come, whatever holds it up.
            self._apologise("")
            return
        if floor.waits_for_tool:
            # It has a time limit of its own, and what it does may not be undone.
            if not self._has_asked_for_patience and not self._voice_failed:
                self._has_asked_for_patience = True
                self._start(self._worker.queue_frame(self._one_moment()))
            return
        service = self._tts if floor.waits_for_voice else self._llm
        # Nothing came of the request before it either, so this is not the same failure.
        self._failed_attempt = -1
        self._fail(service, f"no answer in {self._answer_seconds:g} s")

    def _fail(self, service: FrameProcessor, what: str) -> None:
        """Try the turn again, or give up."""
        has_voice = not isinstance(service, TTSService)
        if self._ending.has_begun:
            if not has_voice:
                self._apologise("", has_voice=False)
            return
        detail = f"{type(service).__name__}: {what}"
        if self._voice_failed:
            if not has_voice:
                logger.warning(f"The voice failed: {detail}")
                self._voice_failed()
            return
        if self._failed_attempt == self._attempt:
            return
        self._failed_attempt = self._attempt
        self._failed_in_a_row += 1
        logger.warning(f"A turn failed ({self._failed_in_a_row} in a row): {detail}")
        if self._failed_in_a_row < (LLM_ATTEMPTS if has_voice else TTS_ATTEMPTS):
            self._start(self._try_again())
        else:
            self._apologise(detail, has_voice=has_voice)

    async def _try_again(self) -> None:
        """Break the answer off, say a word to the caller, and have the LLM answer again."""
        await self.break_off()
        if not self._ending.has_begun and not self._voice_failed:
            # The instruction comes after what was heard of the answer, for an LLM that finds words
            # of its own at the end may take them for its answer.
            await self._worker.queue_frames([self._one_moment(), instruction(SAY_AGAIN)])

    async def _settled(self) -> None:
        """Wait until nothing is on its way through the pipeline, and there is a voice."""
        await self._worker.flush_pipeline(SETTLE_SECONDS)
        # What is said into a connection that is being made anew is lost.
        await self._voice_is_connected.wait()

    def _apologise(self, detail: str, *, is_final: bool = False, has_voice: bool = True) -> None:
        """End the call with an apology, or hand it over to a person.

        Where it is ending already, what was to be said last is replaced by the recording.
        """
        if self._ending.has_begun:
            if not self._plays_recording:
                self._plays_recording = True
                self._ending.instead(InterruptionFrame(), RecordedApologyFrame())
            return
        last_words: Frame | None = TTSSpeakFrame(self._phrases.apology)
        if not has_voice:
            self._plays_recording = True
            last_words = RecordedApologyFrame()
        if person := self._fail_over():
            # Without a voice they go without a word.
            last_words = TTSSpeakFrame(self._phrases.transferring) if has_voice else None
            detail += f"; handed over to {person}"
            is_final = True
        self._ending.after(
            InterruptionFrame(),
            *([last_words] if last_words else []),
            reason="error",
            detail=detail,
            is_final=is_final or not has_voice,
        )

    def _one_moment(self) -> TTSSpeakFrame:
        """The word to a caller who has to wait; the LLM does not hear of it."""
        return TTSSpeakFrame(self._phrases.one_moment, append_to_context=False)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
