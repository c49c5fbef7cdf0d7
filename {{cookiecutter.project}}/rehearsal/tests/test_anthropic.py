"""What is Anthropic's own, as Pipecat's class sees it."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from pipecat.frames.frames import LLMRunFrame

from rehearsal.engines.scripted import Answer, Script
from rehearsal.providers.faults import Faults
from rehearsal.providers.server import HOST
from rehearsal.tests.language_model_wire import (
    BOOK,
    KEY,
    NOTIFY,
    TWO_CALLS,
    Desk,
    booking,
    conversation,
    said_last,
    tells_an_error_within_a_stream,
    wire,
)
from rehearsal.tests.service_pipeline import ask, line
from rehearsal.tests.vendors.anthropic import VENDOR, create

pytestmark = pytest.mark.anyio


async def test_anthropic_is_made_to_call_one_tool_after_the_other() -> None:
    desk = Desk([])
    context = booking(desk)
    async with wire(VENDOR, TWO_CALLS) as it, conversation(it.llm, context) as call:
        await call.send(LLMRunFrame())
        await call.until(lambda: said_last(context) == "Both done.")
    assert desk.done == ["booked Monday", "notified"]
    assert len(it.requests) == 3


async def test_pipecat_would_lose_all_but_the_last_of_anthropics_parallel_calls() -> None:
    """The reason for the above: once this fails, services.py may let Claude call several."""

    all_at_once = replace(VENDOR, create=partial(create, calls_one_at_a_time=False))
    desk = Desk([])
    context = booking(desk)
    async with wire(all_at_once, TWO_CALLS) as it, conversation(it.llm, context) as call:
        await call.send(LLMRunFrame())
        await call.until(lambda: said_last(context) == "Both done.")
    assert desk.done == ["notified"]


async def test_anthropics_sdk_puts_streamed_calls_together() -> None:
    from anthropic import AsyncAnthropic

    script = Script(answers=(Answer(says="A moment.", calls=(BOOK, NOTIFY)),))
    async with wire(VENDOR, script) as it:
        url = f"http://{HOST}:{it.server.port}"
        question: Any = {
            "model": "any",
            "max_tokens": 10,
            "messages": [{"role": "user", "content": "Book."}],
        }
        async with AsyncAnthropic(api_key=KEY, base_url=url) as client:
            async with client.messages.stream(**question) as stream:
                streamed = await stream.get_final_message()
            whole = await client.messages.create(**question)
    assert [block.type for block in streamed.content] == ["text", "tool_use", "tool_use"]
    without_ids = [
        [{k: v for k, v in block.to_dict().items() if k != "id"} for block in message.content]
        for message in (streamed, whole)
    ]
    assert without_ids[0] == without_ids[1]
    assert without_ids[0][1]["input"] == {"day": "Monday"}
    assert (streamed.stop_reason, streamed.usage) == (whole.stop_reason, whole.usage)


async def test_anthropic_is_asked_again_when_its_retry_after_has_passed() -> None:
    faults = Faults(rate_limited=1, retry_after_s=0.8)
    async with wire(VENDOR, faults=faults) as it, line(it.llm) as call:
        await call.send(ask("Hello?"))
        await call.until(lambda: call.text)
    first, second = it.requests
    assert second.at - first.at >= 0.8


async def test_an_error_within_a_stream_is_told_and_passes() -> None:
    await tells_an_error_within_a_stream(VENDOR)
