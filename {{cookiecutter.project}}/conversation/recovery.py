"""What can fail during a call, and what the caller hears then: anything but silence.

A turn that fails, or brings forth no sound in ANSWER_SECONDS, is tried again after a word to the
caller. What stays broken ends the call, with an apology if there is still a voice to say it.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING

from loguru import logger
from pipecat.frames.frames import (
    BotStartedSpeakingFrame,
    BotStoppedSpeakingFrame,
    EndFrame,
    ErrorFrame,
    Frame,
    FunctionCallsStartedFrame,
    InterruptionFrame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    TTSSpeakFrame,
    UserStartedSpeakingFrame,
    UserStoppedSpeakingFrame,
)
from pipecat.observers.base_observer import BaseObserver, FramePushed
from pipecat.processors.aggregators.llm_response_universal import (
    AssistantTurnStoppedMessage,
    LLMAssistantAggregator,
)
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.services.llm_service import LLMService
from pipecat.services.stt_service import STTService
from pipecat.services.tts_service import TTSService
from pipecat.utils.errors import ErrorCategory

import config
from conversation import phrases
from conversation.endings import instruction

if TYPE_CHECKING:
    from pipecat.pipeline.worker import PipelineWorker

    from conversation.endings import Ending

# The slowest models begin to answer after 3 or 4 s.
ANSWER_SECONDS = 8.0
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


class Failures(BaseObserver):
    """Watches one call for what fails, and sees to it. Add it to the worker before it runs."""

    def __init__(
        self,
        worker: "PipelineWorker",
        ending: "Ending",
        *,
        llm: FrameProcessor,
        tts: TTSService,
        bot_side: LLMAssistantAggregator,
        fail_over: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Watch the call of `worker`, which speaks through `llm` and `tts`.

        Where `fail_over` names a person, they are who the caller gets at the end.
        """
        super().__init__(observe_every_push=False)
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
        self._is_thinking = False
        self._has_text = False
        self._owes_answer = False
        self._bot_speaks = False
        self._caller_speaks = False
        self._alarm: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._handlers: dict[type[Frame], Callable[[Frame], None]] = {
            LLMFullResponseStartFrame: self._on_thinking,
            LLMTextFrame: self._on_text,
            LLMFullResponseEndFrame: self._on_thought,
            FunctionCallsStartedFrame: self._on_tool,
            BotStartedSpeakingFrame: self._on_bot_started,
            BotStoppedSpeakingFrame: self._on_bot_stopped,
            UserStartedSpeakingFrame: self._on_caller_started,
            UserStoppedSpeakingFrame: self._on_caller_stopped,
            ErrorFrame: self._on_error,
        }

        @worker.event_handler("on_pipeline_error")
        async def on_pipeline_error(_worker, frame: ErrorFrame):
            if frame.processor and not frame.processor.is_usable:
                await self._on_broken(frame.processor, frame)
            elif isinstance(frame.processor, STTService) and not self._has_started:
                await self._on_no_recogniser(frame.processor)

        @tts.event_handler("on_disconnected")
        async def on_disconnected(service: TTSService):
            if self._owes_answer or self._bot_speaks:
                self._fail(service, "lost its connection while the bot spoke")

        @bot_side.event_handler("on_assistant_turn_stopped")
        async def on_assistant_turn_stopped(_side, turn: AssistantTurnStoppedMessage):
            if turn.content and self._failed_attempt != self._attempt:
                self._failed_in_a_row = 0

    def expect_answer(self, *, has_text: bool = False) -> None:
        """The bot is about to speak first; with `has_text` only its voice can be late."""
        self._owes_answer, self._has_text = True, has_text
        self._set_alarm()

    async def on_pipeline_started(self) -> None:
        """From here on what is queued is processed: an answer can be waited for."""
        self._has_started = True
        self._set_alarm()

    async def on_push_frame(self, data: FramePushed) -> None:
        """Follow whose turn it is to make a sound."""
        if handler := self._handlers.get(type(data.frame)):
            handler(data.frame)

    async def cleanup(self) -> None:
        """The call is over."""
        await super().cleanup()
        if self._alarm:
            self._alarm.cancel()

    def _on_thinking(self, _frame: Frame) -> None:
        self._attempt += 1
        self._is_thinking, self._has_text = True, False
        self._owes_answer = True
        self._set_alarm()

    def _on_text(self, frame: Frame) -> None:
        self._has_text = True
        if isinstance(frame, LLMTextFrame) and frame.skip_tts:
            # An eval in text mode: this is the answer, there will be no sound.
            self._owes_answer = False
            self._set_alarm()

    def _on_thought(self, _frame: Frame) -> None:
        self._is_thinking = False

    def _on_tool(self, _frame: Frame) -> None:
        # A tool has a time limit of its own, and the LLM speaks after it.
        self._owes_answer = False
        self._set_alarm()

    def _on_bot_started(self, _frame: Frame) -> None:
        self._bot_speaks = True
        # What it says may still be the word before the next attempt.
        self._owes_answer = self._owes_answer and not self._has_text
        self._set_alarm()

    def _on_bot_stopped(self, _frame: Frame) -> None:
        self._bot_speaks = False
        self._set_alarm()

    def _on_caller_started(self, _frame: Frame) -> None:
        self._caller_speaks, self._owes_answer = True, False
        self._set_alarm()

    def _on_caller_stopped(self, _frame: Frame) -> None:
        self._caller_speaks = False
        self._set_alarm()

    def _on_error(self, frame: Frame) -> None:
        assert isinstance(frame, ErrorFrame)
        service = frame.processor
        if service is None or not service.is_usable or frame.category is ErrorCategory.APPLICATION:
            return
        # The LLM also fails at other work: summaries of long calls.
        of_answer = isinstance(service, LLMService) and self._is_thinking
        of_voice = isinstance(service, TTSService) and (self._owes_answer or self._bot_speaks)
        if of_answer or of_voice:
            self._fail(service, str(frame.category.value if frame.category else "failed"))

    async def _on_broken(self, service: FrameProcessor, frame: ErrorFrame) -> None:
        """End the call: this service will not come back."""
        category = frame.category.value if frame.category else "failed"
        detail = f"{type(service).__name__}: {category}"
        logger.error(f"A service is broken for good: {detail}")
        if isinstance(service, STTService | LLMService):
            self._apologise(detail)
        elif isinstance(service, TTSService):
            await self._ending.now("error", detail)
        else:
            # A transport: the caller no longer takes what is sent.
            await self._ending.now("client-disconnected", detail)

    async def _on_no_recogniser(self, service: STTService) -> None:
        """Stop waiting for a recogniser that holds up the beginning of the call."""
        self._failed_connections += 1
        if self._failed_connections == STT_ATTEMPTS:
            await service.push_error("no connection", force_treat_as_permanent=True)
            await service.stop(EndFrame())

    def _set_alarm(self) -> None:
        """Wait for an answer exactly while nobody makes a sound and the bot owes one."""
        if self._alarm:
            self._alarm.cancel()
            self._alarm = None
        is_quiet = self._has_started and not self._bot_speaks and not self._caller_speaks
        if is_quiet and self._owes_answer and self._answer_seconds and not self._ending.has_begun:
            loop = asyncio.get_running_loop()
            self._alarm = loop.call_later(self._answer_seconds, self._on_dead_air)

    def _on_dead_air(self) -> None:
        self._alarm = None
        service = self._tts if self._has_text else self._llm
        self._fail(service, f"no answer in {self._answer_seconds:g} s")

    def _fail(self, service: FrameProcessor, what: str) -> None:
        """Try the turn again, or give up."""
        if self._ending.has_begun or self._failed_attempt == self._attempt:
            return
        self._failed_attempt = self._attempt
        self._failed_in_a_row += 1
        detail = f"{type(service).__name__}: {what}"
        logger.warning(f"A turn failed ({self._failed_in_a_row} in a row): {detail}")
        has_voice = not isinstance(service, TTSService)
        if self._failed_in_a_row < (LLM_ATTEMPTS if has_voice else TTS_ATTEMPTS):
            self._run(self._try_again())
        elif has_voice:
            self._apologise(detail)
        else:
            self._run(self._ending.now("error", detail))

    async def _try_again(self) -> None:
        """Break the answer off, say a word to the caller, and have the LLM answer again."""
        await self._worker.queue_frame(InterruptionFrame())
        # What was heard of the answer is in the context only then. The instruction comes after it,
        # for an LLM that finds words of its own at the end may take them for its answer.
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_SECONDS):
                await self._worker.flush_pipeline(SETTLE_SECONDS)
        if not self._ending.has_begun:
            one_moment = TTSSpeakFrame(self._phrases.one_moment, append_to_context=False)
            await self._worker.queue_frames([one_moment, instruction(SAY_AGAIN)])

    def _apologise(self, detail: str) -> None:
        last_words = self._phrases.apology
        if person := None if self._ending.has_begun else self._fail_over():
            last_words = self._phrases.transferring
            detail += f"; handed over to {person}"
        self._ending.after(
            InterruptionFrame(), TTSSpeakFrame(last_words), reason="error", detail=detail
        )

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
