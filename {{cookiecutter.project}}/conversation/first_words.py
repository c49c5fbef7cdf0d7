"""How a call begins: the bot speaks first, unless the caller does."""

from typing import TYPE_CHECKING

from pipecat.frames.frames import LLMRunFrame, TTSSpeakFrame
from pipecat.processors.aggregators.llm_response_universal import LLMUserAggregator

import config
from conversation.endings import instruction

if TYPE_CHECKING:
    from pipecat.pipeline.worker import PipelineWorker

    from conversation.endings import Ending

# For the LLM, where GREETING in .env does not say what to say.
GREET = "The caller is on the line. Greet them and ask what you can do for them, briefly."
CUT_OFF = (
    "The caller spoke into your greeting. Say in your answer what they have not heard of it and "
    "have to know: “{greeting}”"
)


class FirstWords:
    """The greeting of one call. It waits for a caller who speaks first, and answers them.

    The words of GREETING are spoken at once, and the LLM remembers them as its own; where it is
    blank, the LLM finds the words.
    """

    def __init__(
        self,
        worker: "PipelineWorker",
        ending: "Ending",
        caller: LLMUserAggregator,
        *,
        told: str = "",
        to_say: str = "",
    ) -> None:
        """Greet the caller of `worker`'s call; `told`, if not blank, is for the LLM to begin by.

        `to_say` is what the LLM's own greeting has to hold.
        """
        self._worker = worker
        self._ending = ending
        self._floor = ending.floor
        self._caller = caller
        self._greeting = "" if told else config.setting("GREETING")
        self._told = told or f"{GREET} {to_say}".strip()
        self._caller_has_spoken = False

        @caller.event_handler("on_user_turn_started")
        async def on_user_turn_started(_caller, _strategy):
            floor = self._floor
            is_cut_off = floor.answer_is_due or floor.bot_speaks or floor.was_cut_off
            if self._greeting and is_cut_off and not self._caller_has_spoken:
                about = CUT_OFF.format(greeting=self._greeting)
                caller.add_messages(instruction(about).messages)
            self._caller_has_spoken = True

    async def say(self) -> None:
        """Greet the caller now, unless they spoke first: the answer to that is the greeting."""
        self._floor.bot_owes(has_text=bool(self._greeting))
        if not self._greeting:
            # Whatever the LLM says first, it greets. Not by a frame, which speech would drop.
            self._caller.add_messages(instruction(self._told).messages)
        if self._caller_has_spoken or self._floor.caller_turns or self._ending.has_begun:
            return
        if self._greeting:
            await self._worker.queue_frame(TTSSpeakFrame(self._greeting, append_to_context=True))
        else:
            await self._worker.queue_frame(LLMRunFrame())
