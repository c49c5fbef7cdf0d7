"""What every language model's wire does, as Pipecat's own classes see it.

OpenAI's own, which the others follow, has further tests.
"""

import asyncio
import time

import pytest
from pipecat.frames.frames import InterruptionFrame, LLMRunFrame, LLMTextFrame
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.utils.errors import ErrorCategory

from conversation import recovery
from conversation.endings import instruction
from rehearsal.engines.scripted import Answer, Script
from rehearsal.providers.faults import ALWAYS, Faults
from rehearsal.providers.server import HOST
from rehearsal.tests.language_model_wire import (
    KEY,
    ONE_CALL,
    PROMPT,
    TWO_CALLS,
    Desk,
    LanguageModel,
    booking,
    conversation,
    said_last,
    wire,
)
from rehearsal.tests.service_pipeline import ask, line, usage
from rehearsal.tests.vendors import every

pytestmark = pytest.mark.anyio

EVERY = every("anthropic", "google", "compatible")


@EVERY
async def test_an_answer_comes_in_pieces_and_with_its_usage(vendor: LanguageModel) -> None:
    script = Script(answers=(Answer(says="It is ten past nine."),))
    async with wire(vendor, script) as it, line(it.llm) as call:
        await call.send(ask("What time is it?"))
        await call.until(lambda: usage(call))
    assert call.text == "It is ten past nine."
    assert len(call.of(LLMTextFrame)) == 5
    assert usage(call)[0].prompt_tokens > 0
    assert usage(call)[0].completion_tokens >= 5
    (request,) = it.requests
    assert request.key == KEY
    assert KEY not in repr(request)
    assert request.peer[0] == HOST


@EVERY
async def test_the_prompt_and_the_conversation_arrive_as_they_are(vendor: LanguageModel) -> None:
    context = LLMContext(
        [
            {"role": "user", "content": "Hello?"},
            {"role": "assistant", "content": "Good morning."},
            {"role": "user", "content": "Are you"},
            {"role": "user", "content": "open today?"},
        ]
    )
    async with wire(vendor) as it, conversation(it.llm, context) as call:
        await call.send(LLMRunFrame())
        await call.until(lambda: said_last(context) != "Good morning.")
    assert it.engine.asked == [
        [
            {"role": "system", "content": PROMPT},
            {"role": "user", "content": "Hello?"},
            {"role": "assistant", "content": "Good morning."},
            {"role": "user", "content": "Are you"},
            {"role": "user", "content": "open today?"},
        ]
    ]


@EVERY
async def test_an_instruction_is_not_taken_for_the_callers_words(vendor: LanguageModel) -> None:
    """Pipecat sends it as if the caller had said it, for these models know no other role."""
    script = Script(greeting="Hello, this is the clinic.", answers=(Answer(says="Yes?"),))
    context = LLMContext()
    async with wire(vendor, script) as it, conversation(it.llm, context) as call:
        await call.send(instruction("Greet the caller."))
        await call.until(lambda: said_last(context) == "Hello, this is the clinic.")
    assert '"developer"' not in str(it.requests[0].body).replace("'", '"')
    assert it.engine.asked[0][-1] == {"role": "developer", "content": "[Greet the caller.]"}


@EVERY
async def test_the_instruction_to_answer_again_follows_what_was_said(vendor: LanguageModel) -> None:
    script = Script(answers=(Answer(told="did not reach", says="Again: yes."), Answer(says="Yes.")))
    context = LLMContext([{"role": "user", "content": "Are you open?"}])
    async with wire(vendor, script) as it, conversation(it.llm, context) as call:
        await call.send(instruction(recovery.SAY_AGAIN))
        await call.until(lambda: said_last(context) == "Again: yes.")
    said, told = it.engine.asked[0][-2:]
    assert said == {"role": "user", "content": "Are you open?"}
    assert told == {"role": "developer", "content": f"[{recovery.SAY_AGAIN}]"}


@EVERY
async def test_a_tool_is_offered_called_and_its_result_answered(vendor: LanguageModel) -> None:
    desk = Desk([])
    context = booking(desk)
    async with wire(vendor, ONE_CALL) as it, conversation(it.llm, context) as call:
        await call.send(LLMRunFrame())
        await call.until(lambda: said_last(context) == "You are booked.")
    assert desk.done == ["booked Monday"]
    offered = [tool["function"] for tool in it.engine.offered[0]]
    assert [tool["name"] for tool in offered] == ["book", "notify"]
    assert offered[0]["parameters"]["properties"]["day"]["type"] == "string"
    assert offered[0]["parameters"]["required"] == ["day"]
    called, result = it.engine.asked[1][-2:]
    assert it.engine.asked[1][-3] == {"role": "assistant", "content": "Let me see."}
    assert called["tool_calls"][0]["id"] == result["tool_call_id"]
    assert "booked" in result["content"]


@EVERY
async def test_all_the_tools_it_calls_are_called_and_their_results_answered(
    vendor: LanguageModel,
) -> None:
    desk = Desk([])
    context = booking(desk)
    async with wire(vendor, TWO_CALLS) as it, conversation(it.llm, context) as call:
        await call.send(LLMRunFrame())
        await call.until(lambda: said_last(context) == "Both done.")
    assert sorted(desk.done) == ["booked Monday", "notified"]
    # Both at once, or one after the other.
    assert len(it.requests) == (2 if vendor.calls_in_parallel else 3)
    assert [m["role"] for m in it.engine.asked[-1]].count("tool") == 2


@EVERY
async def test_one_shot_inference_gets_a_whole_answer_to_a_prompt_of_its_own(
    vendor: LanguageModel,
) -> None:
    """So long calls are summarised, while the LLM may be speaking."""
    script = Script(answers=(Answer(says="They asked whether we are open."),))
    async with wire(vendor, script) as it, line(it.llm):
        answer = await it.llm.run_inference(
            ask("CALLER: Are you open?").context, system_instruction="Sum up.", max_tokens=99
        )
    assert answer == "They asked whether we are open."
    (asked,) = it.engine.asked
    assert asked[0] == {"role": "system", "content": "Sum up."}
    assert asked[1] == {"role": "user", "content": "CALLER: Are you open?"}
    assert "99" in str(it.requests[0].body)


@pytest.mark.parametrize(
    ("faults", "statuses", "category"),
    [
        (Faults(wrong_key=True), [401], ErrorCategory.AUTHENTICATION),
        (Faults(rate_limited=1), [429, 200], None),
        (Faults(rate_limited=ALWAYS, retry_after_s=0.1), [429] * 3, ErrorCategory.RATE_LIMIT),
        (Faults(server_errors=1), [500, 200], None),
        (Faults(server_errors=ALWAYS), [500] * 3, ErrorCategory.SERVER),
    ],
    ids=["401", "429 once", "429 always", "500 once", "500 always"],
)
@EVERY
async def test_an_llm_is_asked_up_to_three_times(
    vendor: LanguageModel, faults: Faults, statuses: list[int], category: ErrorCategory | None
) -> None:
    if faults.wrong_key and vendor.refuses_a_key_with == 400:
        # No failed login, but for the bot just as final.
        statuses, category = [400], ErrorCategory.INVALID_REQUEST
    async with wire(vendor, faults=faults) as it, line(it.llm) as call:
        await call.send(ask("Hello?"))
        await call.until(lambda: call.text or call.errors)
    assert it.statuses == statuses
    assert [error.category for error in call.errors] == ([category] if category else [])
    assert bool(call.text) == (category is None)
    assert it.llm.is_usable == (not faults.wrong_key)
    assert KEY not in str(call.errors)


@EVERY
async def test_an_llm_that_refuses_connections_is_asked_again_soon(vendor: LanguageModel) -> None:
    """Google's SDK, left to itself, waits up to ten seconds in between."""
    async with wire(vendor) as it, line(it.llm) as call:
        await it.server.refuse()
        await call.send(ask("Hello?"))
        await call.until(lambda: call.errors)
        assert it.llm.is_usable
        await it.server.accept()
        await call.send(ask("Hello?"))
        await call.until(lambda: call.text)
    assert it.statuses == [200]


@EVERY
async def test_a_hanging_llm_is_left_when_the_caller_interrupts(vendor: LanguageModel) -> None:
    async with wire(vendor) as it, line(it.llm) as call:
        it.server.faults.hang = True
        await call.send(ask("Hello?"))
        await it.log.until(lambda: it.requests)
        it.server.faults.hang = False
        await call.send(InterruptionFrame(), ask("Hello?"))
        await call.until(lambda: call.text)
    assert it.statuses == [None, 200]
    assert call.errors == []


@EVERY
async def test_an_interruption_ends_the_answer_on_the_wire_too(vendor: LanguageModel) -> None:
    async with wire(vendor) as it, line(it.llm) as call:
        it.engine.waits = True
        await call.send(ask("Hello?"))
        await call.until(lambda: call.text)
        await call.send(InterruptionFrame())
        await asyncio.wait_for(it.engine.was_left.wait(), 5)
    assert call.text == "Yes,"
    assert call.errors == []


@EVERY
async def test_a_dropped_request_is_made_again(vendor: LanguageModel) -> None:
    async with wire(vendor) as it, line(it.llm) as call:
        it.server.faults.hang = True
        await call.send(ask("Hello?"))
        await it.log.until(lambda: it.requests)
        it.server.faults.hang = False
        await it.server.drop()
        await call.until(lambda: call.text)
    assert it.statuses == [None, 200]


@EVERY
async def test_a_slow_llm_is_late(vendor: LanguageModel) -> None:
    async with wire(vendor, faults=Faults(slow_s=0.3)) as it, line(it.llm) as call:
        await call.send(ask("Hello?"))
        await call.until(lambda: call.text)
        assert time.monotonic() - it.requests[0].at >= 0.3


@EVERY
async def test_a_stream_that_breaks_off_leaves_half_a_sentence_and_an_error(
    vendor: LanguageModel,
) -> None:
    async with wire(vendor, faults=Faults(cuts=1)) as it, line(it.llm) as call:
        await call.send(ask("Hello?"))
        await call.until(lambda: call.errors)
    assert call.text and "Yes, I can hear".startswith(call.text)
    assert len(it.requests) == 1
    assert it.llm.is_usable
