"""A language model's wire under test: its server, and Pipecat's own class that asks it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
from pipecat.services.llm_service import FunctionCallParams, LLMService

from rehearsal.engines.engine import TextDelta, ToolCall
from rehearsal.engines.scripted import Answer, Script, ScriptedEngine
from rehearsal.providers.faults import Faults
from rehearsal.providers.server import HOST, ProviderServer, Request, WireLog
from rehearsal.tests.service_pipeline import Line, ask, line, usage

KEY = "a-secret-of-the-bot"
PROMPT = "You work for a clinic."

Factory = Callable[[str, AsyncExitStack], LLMService[Any]]


@dataclass(frozen=True)
class LanguageModel:
    """A vendor, and in what its wire differs from the others'.

    Attributes:
        server: Plays the vendor.
        create: Makes Pipecat's service for it as services.py does, given the server's address.
        refuses_a_key_with: The status for a wrong key.
        calls_in_parallel: One answer may call several tools.
    """

    server: Callable[..., ProviderServer]
    create: Factory
    refuses_a_key_with: int = 401
    calls_in_parallel: bool = True


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


@asynccontextmanager
async def wire(
    vendor: LanguageModel, script: Script | None = None, faults: Faults | None = None
) -> AsyncIterator[Wire]:
    """Run the vendor's server, and make a service that asks it."""
    engine, log = Thinker(script), WireLog()
    # A copy, for the switches count down and the table of a test is one for all services.
    server = vendor.server(engine, log, replace(faults or Faults()))
    async with AsyncExitStack() as closing:
        await server.start()
        closing.push_async_callback(server.aclose)
        yield Wire(engine, log, server, vendor.create(f"http://{HOST}:{server.port}", closing))


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


async def tells_an_error_within_a_stream(vendor: LanguageModel) -> None:
    """Assert that an answer which fails half way is told, and that the next one is whole."""
    async with wire(vendor) as it, line(it.llm) as call:
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
