"""Anthropic's, Google's and other OpenAI-compatible language models, as Pipecat's classes see them.

A service is tested where its SDK is installed: a project brings those of the services it uses.
"""

# Each service is skipped where the project does not use it, and its SDK is missing.
# pyright: reportMissingImports=false

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
from pipecat.frames.frames import InterruptionFrame, LLMRunFrame, LLMTextFrame
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
from pipecat.services.llm_service import FunctionCallParams, LLMService
from pipecat.utils.errors import ErrorCategory

from conversation import recovery
from conversation.endings import instruction
from rehearsal.engines.engine import TextDelta, ToolCall
from rehearsal.engines.scripted import Answer, Script, ScriptedEngine
from rehearsal.providers.anthropic import AnthropicServer
from rehearsal.providers.faults import ALWAYS, Faults
from rehearsal.providers.google import GoogleServer
from rehearsal.providers.openai import OpenAIServer
from rehearsal.providers.server import HOST, ProviderServer, Request, WireLog
from rehearsal.tests.service_pipeline import Line, ask, line, usage

pytestmark = pytest.mark.anyio

KEY = "a-secret-of-the-bot"
PROMPT = "You work for a clinic."


class Thinker(ScriptedEngine):
    """A scripted engine that remembers the conversations it answered.

    Attributes:
        asked: The messages of each, as OpenAI writes them.
        offered: The tools of each, likewise.
        breaks: Fail after the first word.
        waits: Wait after the first word, for ever.
        was_left: Set when nobody wanted the rest of an answer.
    """

    def __init__(self, script: Script | None = None) -> None:
        super().__init__(script)
        self.asked: list[list[dict[str, Any]]] = []
        self.offered: list[list[dict[str, Any]]] = []
        self.breaks = False
        self.waits = False
        self.was_left = asyncio.Event()

    async def think(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> AsyncIterator[TextDelta | ToolCall]:
        self.asked.append(messages)
        self.offered.append(tools)
        async for piece in super().think(messages, tools):
            yield piece
            if self.breaks:
                raise RuntimeError("the model has a headache")
            if self.waits:
                try:
                    await asyncio.Event().wait()
                finally:
                    self.was_left.set()


@dataclass
class Wire:
    """A language model on this machine, and the service that asks it, as services.py makes it."""

    engine: Thinker
    log: WireLog
    server: ProviderServer
    llm: LLMService[Any]

    @property
    def requests(self) -> list[Request]:
        return self.server.requests

    @property
    def statuses(self) -> list[int | None]:
        return [request.status for request in self.requests]


def anthropic(
    url: str, closing: AsyncExitStack, *, calls_one_at_a_time: bool = True
) -> LLMService[Any]:
    pytest.importorskip("anthropic")
    from anthropic import APIRequest, AsyncAnthropic, AsyncAPIResponse, AsyncCallNext
    from pipecat.services.anthropic.llm import AnthropicLLMService

    async def one_call(request: APIRequest, call_next: AsyncCallNext) -> AsyncAPIResponse[Any]:
        body = request.json
        if isinstance(body, dict) and body.get("tools"):
            choice = {"type": "auto", "disable_parallel_tool_use": True}
            request = request.copy(body={**body, "tool_choice": choice})
        return await call_next(request)

    middleware = [one_call] if calls_one_at_a_time else []
    client = AsyncAnthropic(api_key=KEY, base_url=url, middleware=middleware)
    closing.push_async_callback(client.close)
    return AnthropicLLMService(
        api_key=KEY,
        client=client,
        settings=AnthropicLLMService.Settings(system_instruction=PROMPT),
    )


def google(url: str, _closing: AsyncExitStack) -> LLMService[Any]:
    pytest.importorskip("google.genai")
    from google.genai.types import HttpOptions, HttpRetryOptions
    from pipecat.services.google.llm import GoogleLLMService

    retries = HttpRetryOptions(attempts=3, initial_delay=0.5, max_delay=1.0, jitter=0.25)
    return GoogleLLMService(
        api_key=KEY,
        http_options=HttpOptions(base_url=url, retry_options=retries),
        settings=GoogleLLMService.Settings(system_instruction=PROMPT),
    )


def compatible(url: str, closing: AsyncExitStack) -> LLMService[Any]:
    pytest.importorskip("openai")
    from pipecat.services.openai.llm import OpenAILLMService

    class Closed(OpenAILLMService):
        def create_client(self, *args: Any, **kwargs: Any) -> Any:
            client = super().create_client(*args, **kwargs)
            closing.push_async_callback(client.close)
            return client

    llm = Closed(
        api_key=KEY,
        base_url=f"{url}/v1",
        settings=OpenAILLMService.Settings(model="any", system_instruction=PROMPT),
    )
    llm.supports_developer_role = False
    return llm


Factory = Callable[[str, AsyncExitStack], LLMService[Any]]
SERVERS: dict[Factory, type[AnthropicServer | GoogleServer | OpenAIServer]] = {
    anthropic: AnthropicServer,
    google: GoogleServer,
    compatible: OpenAIServer,
}
EVERY_LLM = pytest.mark.parametrize("factory", [anthropic, google, compatible])
EVERY_VENDOR = pytest.mark.parametrize("factory", [anthropic, google])


@asynccontextmanager
async def wire(
    factory: Factory, script: Script | None = None, faults: Faults | None = None
) -> AsyncIterator[Wire]:
    engine, log = Thinker(script), WireLog()
    # A copy, for the switches count down and the table of a test is one for all services.
    server = SERVERS[factory](engine, log, replace(faults or Faults()))
    async with AsyncExitStack() as closing:
        await server.start()
        closing.push_async_callback(server.aclose)
        yield Wire(engine, log, server, factory(f"http://{HOST}:{server.port}", closing))


@asynccontextmanager
async def conversation(llm: LLMService[Any], context: LLMContext) -> AsyncIterator[Line]:
    user, assistant = LLMContextAggregatorPair(context)
    async with line(user, llm, assistant) as call:
        yield call


def said_last(context: LLMContext) -> str:
    said = [m for m in context.get_messages() if isinstance(m, dict) and m["role"] == "assistant"]
    return str(said[-1].get("content")) if said else ""


@dataclass
class Desk:
    """Two tools of a clinic, and what was done with them."""

    done: list[str]

    @property
    def tools(self) -> list[Any]:
        async def book(params: FunctionCallParams, day: str) -> None:
            """Book.

            Args:
                day: The day.
            """
            self.done.append(f"booked {day}")
            await params.result_callback("booked")

        async def notify(params: FunctionCallParams) -> None:
            """Notify."""
            self.done.append("notified")
            await params.result_callback({"status": "notified"})

        return [book, notify]


BOOK, NOTIFY = ToolCall("book", {"day": "Monday"}), ToolCall("notify")
ONE_CALL = Script(
    answers=(
        Answer(heard="book", says="Let me see.", calls=(BOOK,)),
        Answer(result="book", says="You are booked."),
    )
)
TWO_CALLS = Script(
    answers=(
        Answer(heard="book", calls=(BOOK, NOTIFY)),
        Answer(result="notify", says="Both done."),
        Answer(result="book", calls=(NOTIFY,)),
    )
)


def booking(desk: Desk) -> LLMContext:
    return LLMContext([{"role": "user", "content": "Please book me in."}], tools=desk.tools)


@EVERY_LLM
async def test_an_answer_comes_in_pieces_and_with_its_usage(factory: Factory) -> None:
    script = Script(answers=(Answer(says="It is ten past nine."),))
    async with wire(factory, script) as it, line(it.llm) as call:
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


@EVERY_LLM
async def test_the_prompt_and_the_conversation_arrive_as_they_are(factory: Factory) -> None:
    context = LLMContext(
        [
            {"role": "user", "content": "Hello?"},
            {"role": "assistant", "content": "Good morning."},
            {"role": "user", "content": "Are you"},
            {"role": "user", "content": "open today?"},
        ]
    )
    async with wire(factory) as it, conversation(it.llm, context) as call:
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


@EVERY_LLM
async def test_an_instruction_is_not_taken_for_the_callers_words(factory: Factory) -> None:
    """Pipecat sends it as if the caller had said it, for these models know no other role."""
    script = Script(greeting="Hello, this is the clinic.", answers=(Answer(says="Yes?"),))
    context = LLMContext()
    async with wire(factory, script) as it, conversation(it.llm, context) as call:
        await call.send(instruction("Greet the caller."))
        await call.until(lambda: said_last(context) == "Hello, this is the clinic.")
    assert '"developer"' not in str(it.requests[0].body).replace("'", '"')
    assert it.engine.asked[0][-1] == {"role": "developer", "content": "[Greet the caller.]"}


@EVERY_LLM
async def test_the_instruction_to_answer_again_follows_what_was_said(factory: Factory) -> None:
    script = Script(answers=(Answer(told="did not reach", says="Again: yes."), Answer(says="Yes.")))
    context = LLMContext([{"role": "user", "content": "Are you open?"}])
    async with wire(factory, script) as it, conversation(it.llm, context) as call:
        await call.send(instruction(recovery.SAY_AGAIN))
        await call.until(lambda: said_last(context) == "Again: yes.")
    said, told = it.engine.asked[0][-2:]
    assert said == {"role": "user", "content": "Are you open?"}
    assert told == {"role": "developer", "content": f"[{recovery.SAY_AGAIN}]"}


@EVERY_LLM
async def test_a_tool_is_offered_called_and_its_result_answered(factory: Factory) -> None:
    desk = Desk([])
    context = booking(desk)
    async with wire(factory, ONE_CALL) as it, conversation(it.llm, context) as call:
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


@pytest.mark.parametrize("factory", [google, compatible])
async def test_parallel_tool_calls_are_all_made_and_their_results_answered(
    factory: Factory,
) -> None:
    desk = Desk([])
    context = booking(desk)
    async with wire(factory, TWO_CALLS) as it, conversation(it.llm, context) as call:
        await call.send(LLMRunFrame())
        await call.until(lambda: said_last(context) == "Both done.")
    assert sorted(desk.done) == ["booked Monday", "notified"]
    assert len(it.requests) == 2
    assert [m["role"] for m in it.engine.asked[1]].count("tool") == 2


async def test_anthropic_is_made_to_call_one_tool_after_the_other() -> None:
    desk = Desk([])
    context = booking(desk)
    async with wire(anthropic, TWO_CALLS) as it, conversation(it.llm, context) as call:
        await call.send(LLMRunFrame())
        await call.until(lambda: said_last(context) == "Both done.")
    assert desk.done == ["booked Monday", "notified"]
    assert len(it.requests) == 3


async def test_pipecat_would_lose_all_but_the_last_of_anthropics_parallel_calls() -> None:
    """The reason for the above: once this fails, services.py may let Claude call several."""

    def all_at_once(url: str, closing: AsyncExitStack) -> LLMService[Any]:
        return anthropic(url, closing, calls_one_at_a_time=False)

    SERVERS[all_at_once] = AnthropicServer
    desk = Desk([])
    context = booking(desk)
    async with wire(all_at_once, TWO_CALLS) as it, conversation(it.llm, context) as call:
        await call.send(LLMRunFrame())
        await call.until(lambda: said_last(context) == "Both done.")
    assert desk.done == ["notified"]


async def test_anthropics_sdk_puts_streamed_calls_together() -> None:
    pytest.importorskip("anthropic")
    from anthropic import AsyncAnthropic

    script = Script(answers=(Answer(says="A moment.", calls=(BOOK, NOTIFY)),))
    async with wire(anthropic, script) as it:
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


@EVERY_LLM
async def test_one_shot_inference_gets_a_whole_answer_to_a_prompt_of_its_own(
    factory: Factory,
) -> None:
    """So long calls are summarised, while the LLM may be speaking."""
    script = Script(answers=(Answer(says="They asked whether we are open."),))
    async with wire(factory, script) as it, line(it.llm):
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
@EVERY_VENDOR
async def test_an_llm_is_asked_up_to_three_times(
    factory: Factory, faults: Faults, statuses: list[int], category: ErrorCategory | None
) -> None:
    if factory is google and faults.wrong_key:
        # No failed login, but for the bot just as final.
        statuses, category = [400], ErrorCategory.INVALID_REQUEST
    async with wire(factory, faults=faults) as it, line(it.llm) as call:
        await call.send(ask("Hello?"))
        await call.until(lambda: call.text or call.errors)
    assert it.statuses == statuses
    assert [error.category for error in call.errors] == ([category] if category else [])
    assert bool(call.text) == (category is None)
    assert it.llm.is_usable == (not faults.wrong_key)
    assert KEY not in str(call.errors)


async def test_anthropic_is_asked_again_when_its_retry_after_has_passed() -> None:
    faults = Faults(rate_limited=1, retry_after_s=0.8)
    async with wire(anthropic, faults=faults) as it, line(it.llm) as call:
        await call.send(ask("Hello?"))
        await call.until(lambda: call.text)
    first, second = it.requests
    assert second.at - first.at >= 0.8


@EVERY_VENDOR
async def test_an_llm_that_refuses_connections_is_asked_again_soon(factory: Factory) -> None:
    """Google's SDK, left to itself, waits up to ten seconds in between."""
    async with wire(factory) as it, line(it.llm) as call:
        await it.server.refuse()
        await call.send(ask("Hello?"))
        await call.until(lambda: call.errors)
        assert it.llm.is_usable
        await it.server.accept()
        await call.send(ask("Hello?"))
        await call.until(lambda: call.text)
    assert it.statuses == [200]


@EVERY_VENDOR
async def test_a_hanging_llm_is_left_when_the_caller_interrupts(factory: Factory) -> None:
    async with wire(factory) as it, line(it.llm) as call:
        it.server.faults.hang = True
        await call.send(ask("Hello?"))
        await it.log.until(lambda: it.requests)
        it.server.faults.hang = False
        await call.send(InterruptionFrame(), ask("Hello?"))
        await call.until(lambda: call.text)
    assert it.statuses == [None, 200]
    assert call.errors == []


@EVERY_VENDOR
async def test_an_interruption_ends_the_answer_on_the_wire_too(factory: Factory) -> None:
    async with wire(factory) as it, line(it.llm) as call:
        it.engine.waits = True
        await call.send(ask("Hello?"))
        await call.until(lambda: call.text)
        await call.send(InterruptionFrame())
        await asyncio.wait_for(it.engine.was_left.wait(), 5)
    assert call.text == "Yes,"
    assert call.errors == []


@EVERY_VENDOR
async def test_a_dropped_request_is_made_again(factory: Factory) -> None:
    async with wire(factory) as it, line(it.llm) as call:
        it.server.faults.hang = True
        await call.send(ask("Hello?"))
        await it.log.until(lambda: it.requests)
        it.server.faults.hang = False
        await it.server.drop()
        await call.until(lambda: call.text)
    assert it.statuses == [None, 200]


@EVERY_VENDOR
async def test_a_slow_llm_is_late(factory: Factory) -> None:
    async with wire(factory, faults=Faults(slow_s=0.3)) as it, line(it.llm) as call:
        await call.send(ask("Hello?"))
        await call.until(lambda: call.text)
        assert time.monotonic() - it.requests[0].at >= 0.3


@EVERY_VENDOR
async def test_a_stream_that_breaks_off_leaves_half_a_sentence_and_an_error(
    factory: Factory,
) -> None:
    async with wire(factory, faults=Faults(cuts=1)) as it, line(it.llm) as call:
        await call.send(ask("Hello?"))
        await call.until(lambda: call.errors)
    assert call.text and "Yes, I can hear".startswith(call.text)
    assert len(it.requests) == 1
    assert it.llm.is_usable


@EVERY_VENDOR
async def test_an_error_within_a_stream_is_told_and_passes(factory: Factory) -> None:
    async with wire(factory) as it, line(it.llm) as call:
        it.engine.breaks = True
        await call.send(ask("Hello?"))
        await call.until(lambda: call.errors)
        assert call.text == "Yes,"
        it.engine.breaks = False
        await call.send(ask("Hello?"))
        await call.until(lambda: len(usage(call)) == 2)
    assert call.text.startswith("Yes,Yes, I can hear you.")
    assert it.llm.is_usable
    assert it.statuses == [200, 200]
