"""OpenAI's chat completions, as Pipecat's own class sees them: healthy, then failing."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from pipecat.frames.frames import (
    InterruptionFrame,
    LLMRunFrame,
    LLMTextFrame,
)
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
from pipecat.services.llm_service import FunctionCallParams
from pipecat.services.openai.llm import OpenAILLMService

from rehearsal.engines.engine import TextDelta, ToolCall
from rehearsal.engines.scripted import Answer, Script, ScriptedEngine
from rehearsal.providers.all import Providers, serve
from rehearsal.providers.faults import ALWAYS, Faults
from rehearsal.providers.openai import OpenAIServer
from rehearsal.providers.server import HOST, WireLog
from rehearsal.tests.service_pipeline import ask, line, usage

pytestmark = pytest.mark.anyio

KEY = "a-secret-of-the-bot"


def openai(providers: Providers) -> OpenAILLMService:
    return OpenAILLMService(api_key=KEY, base_url=providers.environment["OPENAI_BASE_URL"])


async def test_openai_answers_in_pieces_and_reports_usage() -> None:
    script = Script(answers=(Answer(says="It is ten past nine."),))
    async with serve(ScriptedEngine(script)) as providers, line(openai(providers)) as call:
        await call.send(ask("What time is it?"))
        await call.until(lambda: usage(call))
    assert call.text == "It is ten past nine."
    assert len(call.of(LLMTextFrame)) == 5
    assert usage(call)[0].prompt_tokens > 0
    (request,) = providers[OpenAIServer].requests
    assert request.body["messages"][-1]["content"] == "What time is it?"
    assert request.key == KEY
    assert providers.peers == {"127.0.0.1"}


async def test_parallel_tool_calls_are_all_made_and_their_results_answered() -> None:
    called: list[tuple[str, Any]] = []

    async def book(params: FunctionCallParams, day: str) -> None:
        """Book.

        Args:
            day: The day.
        """
        called.append(("book", day))
        await params.result_callback("booked")

    async def notify(params: FunctionCallParams) -> None:
        """Notify."""
        called.append(("notify", None))
        await params.result_callback("notified")

    script = Script(
        answers=(
            Answer(heard="book", calls=(ToolCall("book", {"day": "Monday"}), ToolCall("notify"))),
            Answer(result="notify", says="Both done."),
        )
    )
    context = LLMContext([{"role": "user", "content": "Book me in."}], tools=[book, notify])
    messages = context.messages
    user, assistant = LLMContextAggregatorPair(context)
    async with serve(ScriptedEngine(script)) as providers:
        async with line(user, openai(providers), assistant) as call:
            await call.send(LLMRunFrame())
            await call.until(lambda: {"role": "assistant", "content": "Both done."} in messages)
    assert sorted(called) == [("book", "Monday"), ("notify", None)]
    assert len(providers[OpenAIServer].requests) == 2
    offered = [
        tool["function"]["name"] for tool in providers[OpenAIServer].requests[0].body["tools"]
    ]
    assert offered == ["book", "notify"]


async def test_one_shot_inference_gets_a_whole_completion() -> None:
    script = Script(answers=(Answer(says="A summary."),))
    async with serve(ScriptedEngine(script)) as providers:
        answer = await openai(providers).run_inference(ask("Sum up.").context)
    assert answer == "A summary."


@pytest.mark.parametrize(
    ("faults", "requests", "is_answered"),
    [
        (Faults(wrong_key=True), [401], False),
        (Faults(rate_limited=1), [429, 200], True),
        (Faults(rate_limited=ALWAYS, retry_after_s=0.1), [429, 429, 429], False),
        (Faults(server_errors=1), [500, 200], True),
        (Faults(server_errors=ALWAYS), [500, 500, 500], False),
    ],
    ids=["401", "429 once", "429 always", "500 once", "500 always"],
)
async def test_openai_is_asked_up_to_three_times(
    faults: Faults, requests: list[int], is_answered: bool
) -> None:
    async with serve(ScriptedEngine(), faults={"openai": faults}) as providers:
        llm = openai(providers)
        async with line(llm) as call:
            await call.send(ask("Hello?"))
            await call.until(lambda: usage(call) or call.errors)
    assert [request.status for request in providers[OpenAIServer].requests] == requests
    assert bool(call.text) == is_answered
    assert len(call.errors) == (0 if is_answered else 1)
    assert llm.is_usable == (not faults.wrong_key)


async def test_openai_is_asked_again_when_its_retry_after_has_passed() -> None:
    """Left to itself the SDK would wait half a second at most."""
    faults = Faults(rate_limited=1, retry_after_s=0.8)
    async with serve(ScriptedEngine(), faults={"openai": faults}) as providers:
        async with line(openai(providers)) as call:
            await call.send(ask("Hello?"))
            await call.until(lambda: usage(call))
    first, second = providers[OpenAIServer].requests
    assert second.at - first.at >= 0.8


async def test_openai_is_asked_three_times_when_it_refuses_connections() -> None:
    async with serve(ScriptedEngine()) as providers, line(openai(providers)) as call:
        await providers[OpenAIServer].refuse()
        await call.send(ask("Hello?"))
        await call.until(lambda: call.errors)
        await providers[OpenAIServer].accept()
        await call.send(ask("Hello?"))
        await call.until(lambda: call.text)
    assert len(providers[OpenAIServer].requests) == 1


async def test_a_hanging_openai_is_left_when_the_caller_interrupts() -> None:
    async with serve(ScriptedEngine()) as providers, line(openai(providers)) as call:
        providers[OpenAIServer].faults.hang = True
        await call.send(ask("Hello?"))
        await providers.log.until(lambda: len(providers[OpenAIServer].requests) == 1)
        providers[OpenAIServer].faults.hang = False
        await call.send(InterruptionFrame(), ask("Hello?"))
        await call.until(lambda: usage(call))
    assert [request.status for request in providers[OpenAIServer].requests] == [None, 200]
    assert call.errors == []


async def test_a_dropped_openai_request_is_made_again() -> None:
    async with serve(ScriptedEngine()) as providers, line(openai(providers)) as call:
        providers[OpenAIServer].faults.hang = True
        await call.send(ask("Hello?"))
        await providers.log.until(lambda: len(providers[OpenAIServer].requests) == 1)
        providers[OpenAIServer].faults.hang = False
        await providers[OpenAIServer].drop()
        await call.until(lambda: usage(call))
    assert [request.status for request in providers[OpenAIServer].requests] == [None, 200]


async def test_a_slow_openai_is_late() -> None:
    async with serve(ScriptedEngine(), faults={"openai": Faults(slow_s=0.3)}) as providers:
        async with line(openai(providers)) as call:
            await call.send(ask("Hello?"))
            await call.until(lambda: call.text)
            assert time.monotonic() - providers[OpenAIServer].requests[0].at >= 0.3


async def test_an_openai_stream_that_breaks_off_leaves_half_a_sentence_and_an_error() -> None:
    async with serve(ScriptedEngine(), faults={"openai": Faults(cuts=1)}) as providers:
        async with line(openai(providers)) as call:
            await call.send(ask("Hello?"))
            await call.until(lambda: call.errors)
    assert call.text == "Yes, I can"
    assert len(providers[OpenAIServer].requests) == 1


async def test_a_request_without_a_key_is_refused() -> None:
    async with serve(ScriptedEngine()) as providers, aiohttp.ClientSession() as http:
        url = f"{providers.environment['OPENAI_BASE_URL']}/chat/completions"
        async with http.post(url, json={"model": "m", "messages": []}) as response:
            assert response.status == 401


@pytest.mark.parametrize("left", ["before the answer", "in the middle of it"])
async def test_a_client_that_left_is_no_error_of_the_servers(
    left: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client is gone when the server writes, and aiohttp has not told the handler yet."""
    log, wakes = WireLog(), asyncio.Event()

    class Held(ScriptedEngine):
        async def think(
            self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
        ) -> AsyncIterator[TextDelta | ToolCall]:
            async for piece in super().think(messages, tools):
                yield piece
                await wakes.wait()

    server = OpenAIServer(Held(), log)
    if left == "before the answer":
        monkeypatch.setattr(server, "before_answer", wakes.wait)
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "Hello?"}]}
    headers = {"Authorization": "Bearer k"}
    await server.start()
    with caplog.at_level(logging.DEBUG, "aiohttp"):
        async with aiohttp.ClientSession(f"http://{HOST}:{server.port}", headers=headers) as http:
            asked = asyncio.create_task(http.post("/v1/chat/completions", json=body))
            if left == "before the answer":
                await log.until(lambda: server.requests)
            else:
                await (await asked).content.readany()
            wakes.set()
            await server.drop()
            with pytest.raises(aiohttp.ClientError):
                await (await asked).read()
        await server.aclose()
    assert [record.message for record in caplog.records if record.levelno > logging.DEBUG] == []
