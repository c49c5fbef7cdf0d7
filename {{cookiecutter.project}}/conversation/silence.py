"""When the caller says nothing: the bot asks twice whether they are there, then says goodbye.

A caller whom the speech recogniser no longer hears is the same to us, except that they did speak:
then the bot asks them to say it again, and the record names the recogniser.
"""

from typing import TYPE_CHECKING

from pipecat.processors.aggregators.llm_response_universal import (
    LLMUserAggregator,
    UserTurnStoppedMessage,
)

import config
from conversation.endings import instruction

if TYPE_CHECKING:
    from pipecat.pipeline.worker import PipelineWorker

    from conversation.endings import Ending

SILENCE_SECONDS = 8.0
QUESTIONS = 2

STILL_THERE = "The caller has been silent. Ask in one short sentence whether they are still there."
NOT_UNDERSTOOD = (
    "The caller spoke, but none of it could be recognised. Say so in one short sentence, and ask "
    "them to say it again."
)
GOODBYE = "The caller does not answer. Say goodbye in one short sentence, and ask nothing more."


def timeout_seconds() -> float:
    """How long the caller may be silent after the bot has spoken; 0 is for ever."""
    return config.seconds("SILENCE_SECONDS", SILENCE_SECONDS)


def watch(
    caller: LLMUserAggregator, worker: "PipelineWorker", ending: "Ending", *, recogniser: str
) -> None:
    """See to the silences of one call, which `caller` reports after `timeout_seconds`.

    Args:
        recogniser: What is to blame if the caller speaks and nothing is recognised.
    """
    silences = 0
    not_understood = 0

    @caller.event_handler("on_user_turn_stopped")
    async def on_user_turn_stopped(_caller, _strategy, turn: UserTurnStoppedMessage):
        nonlocal silences, not_understood
        if turn.content:
            silences = not_understood = 0
        else:
            not_understood += 1

    @caller.event_handler("on_user_turn_idle")
    async def on_user_turn_idle(_caller):
        nonlocal silences
        if ending.has_begun:
            return
        silences += 1
        if silences <= QUESTIONS:
            question = NOT_UNDERSTOOD if not_understood >= silences else STILL_THERE
            await worker.queue_frame(instruction(question))
        elif not_understood > QUESTIONS:
            ending.after(
                instruction(GOODBYE), reason="error", detail=f"{recogniser} recognised nothing"
            )
        else:
            ending.after(
                instruction(GOODBYE),
                reason="idle-timeout",
                detail=f"silent {silences} times for {timeout_seconds():g} s",
            )
