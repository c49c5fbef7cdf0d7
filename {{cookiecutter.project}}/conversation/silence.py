"""When the caller says nothing: the bot asks twice whether they are there, then says goodbye.

A caller whom the speech recogniser no longer hears is the same to us, except that they did speak:
then the bot asks them to say it again, and the record names the recogniser. If it was a cough that
cut the bot off, the bot says again what was not heard.
"""

import asyncio
from typing import TYPE_CHECKING

from pipecat.processors.aggregators.llm_response_universal import (
    LLMUserAggregator,
    UserTurnStoppedMessage,
)

import config
from conversation.endings import instruction
from conversation.floor import FloorObserver, Side

if TYPE_CHECKING:
    from pipecat.pipeline.worker import PipelineWorker

    from conversation.endings import Ending

SILENCE_SECONDS = 8.0
QUESTIONS = 2
# How often in a row an answer that a sound without words cut off is begun again.
RECOVERIES = 3
# A caller who has said something that nobody recognised is waiting, not silent. Their turn was
# held open for some seconds already.
NOT_UNDERSTOOD_SECONDS = 4.0
# Longer than a turn without words stays open; one that is open longer has got stuck.
OPEN_TURN_SECONDS = 5.0

STILL_THERE = "The caller has been silent. Ask in one short sentence whether they are still there."
NOT_UNDERSTOOD = (
    "The caller spoke, but none of it could be recognised. Say so in one short sentence, and ask "
    "them to say it again."
)
GO_ON = (
    "A sound without words cut you off. Answer what the caller said before it, or say again what "
    "they have not heard; do not mention the sound."
)
GOODBYE = "The caller does not answer. Say goodbye in one short sentence, and ask nothing more."


def timeout_seconds() -> float:
    """How long the caller may be silent after the bot has spoken; 0 is for ever.

    Who has said something that was not understood is asked to say it again all the same.
    """
    return config.seconds("SILENCE_SECONDS", SILENCE_SECONDS)


def watch(
    caller: LLMUserAggregator,
    worker: "PipelineWorker",
    ending: "Ending",
    floor_observer: FloorObserver,
    *,
    recogniser: str,
) -> None:
    """See to the silences of one call: nothing happens here while the bot owes an answer.

    Args:
        caller: Reports the caller's turns.
        worker: Runs the call.
        ending: Ends it.
        floor_observer: Has the silence looked at in time.
        recogniser: What is to blame if the caller speaks and nothing is recognised.
    """
    floor = ending.floor
    limit_seconds = timeout_seconds()
    silences = not_understood = turns_answered = 0
    tasks: set[asyncio.Task[None]] = set()

    @caller.event_handler("on_user_turn_stopped")
    async def on_user_turn_stopped(_caller, _strategy, turn: UserTurnStoppedMessage):
        nonlocal not_understood
        is_answered = floor.answer_is_due or ending.has_begun
        # Nobody waits for an answer to the bot's own words, unless they cost one.
        is_echo = floor.turn_is_echo and not floor.was_cut_off
        if turn.content or is_answered or is_echo:
            return
        not_understood += 1
        if floor.was_cut_off and not_understood <= RECOVERIES:
            tell_llm(GO_ON)
        elif not_understood == 1 and not floor.was_cut_off:
            # A sound without words into the silence is asked about at once; the next ones may be
            # a noisy room.
            on_silence()

    def look() -> None:
        nonlocal silences, not_understood, turns_answered
        if turns_answered != floor.caller_turns:
            turns_answered = floor.caller_turns
            silences = not_understood = 0
        patience = limit_seconds + (OPEN_TURN_SECONDS if floor.turn_is_open else 0.0)
        if not_understood > silences:
            patience = min(patience, NOT_UNDERSTOOD_SECONDS)
        if floor.owed_by is Side.CALLER and limit_seconds and floor.owed_seconds >= patience:
            on_silence()

    def on_silence() -> None:
        nonlocal silences
        if ending.has_begun:
            return
        floor.wait_anew()
        silences += 1
        if silences <= QUESTIONS:
            question = NOT_UNDERSTOOD if not_understood >= silences else STILL_THERE
            tell_llm(question)
        elif not_understood > QUESTIONS:
            ending.after(
                instruction(GOODBYE), reason="error", detail=f"{recogniser} recognised nothing"
            )
        else:
            ending.after(
                instruction(GOODBYE),
                reason="idle-timeout",
                detail=f"silent {silences} times for {limit_seconds:g} s",
            )

    def tell_llm(what: str) -> None:
        floor.bot_owes()
        task = asyncio.create_task(worker.queue_frame(instruction(what)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    floor_observer.look(look)
