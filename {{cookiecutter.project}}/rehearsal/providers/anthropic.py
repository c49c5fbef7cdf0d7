"""Anthropic's messages: `POST /v1/messages`, streamed as server-sent events or whole.

An answer is a list of blocks, each a text or one tool call. A stream opens the message, opens,
fills and closes one block after the other, says why it stops and what it used, and closes the
message. What goes wrong after it has begun is an event too, for the status has been sent.
"""

import json
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any
from uuid import uuid4

from aiohttp import web
from loguru import logger

from rehearsal.engines.engine import TextDelta, ToolCall, with_instructions
from rehearsal.providers.server import HOST, EngineServer, break_off

_BREAK_AFTER_EVENTS = 5
_CHARACTERS_PER_TOKEN = 4

_ERRORS = {
    401: ("authentication_error", "invalid x-api-key"),
    429: ("rate_limit_error", "This request would exceed your organization's rate limit."),
    500: ("api_error", "Internal server error"),
}


class AnthropicServer(EngineServer):
    """Thinks with the engine."""

    name = "anthropic"
    kind = "llm"
    speaks_to = ("AnthropicLLMService",)
    module = "pipecat.services.anthropic.llm"
    url_variables = ("ANTHROPIC_BASE_URL",)

    def routes(self) -> Iterable[web.RouteDef]:
        """Return the one route a voice bot needs."""
        return [web.post("/v1/messages", self._answer)]

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point a bot here."""
        return {
            "ANTHROPIC_API_KEY": "rehearsal",
            "ANTHROPIC_BASE_URL": f"http://{HOST}:{self.port}",
        }

    def key_of(self, request: web.Request) -> str:
        """Anthropic's key has a header of its own."""
        return request.headers.get("X-API-Key", "")

    def error(self, status: int) -> Mapping[str, Any]:
        """Return Anthropic's error object; in a stream it is an event as it stands."""
        kind, message = _ERRORS[status]
        return {"type": "error", "error": {"type": kind, "message": message}}

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await self.admit_posted(request)
        if isinstance(body, web.Response):
            return body
        pieces = self.engine.think(_conversation(body), _tools(body))
        if not body.get("stream"):
            return web.json_response(await _whole(body, pieces))
        breaks = self.faults.breaks()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        sent = 0
        try:
            async for event in _events(body, pieces):
                await _send(response, event)
                sent += 1
                if breaks and sent == _BREAK_AFTER_EVENTS:
                    await break_off(breaks, response, request)
                    return response
        except ConnectionError:
            raise
        except Exception as error:
            logger.warning(f"rehearsal: the engine failed: {error}")
            await _send(response, self.error(500))
        return response


async def _send(response: web.StreamResponse, event: Mapping[str, Any]) -> None:
    await response.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())


def _conversation(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the request's system prompt and messages as OpenAI writes them.

    Pipecat joins messages that follow each other in the same role; their blocks tell them apart.
    """
    messages: list[dict[str, Any]] = []
    if body.get("system"):
        prompt = " ".join(block["text"] for block in _blocks(body["system"]))
        messages.append({"role": "system", "content": prompt})
    for message in body["messages"]:
        calls: list[dict[str, Any]] = []
        for block in _blocks(message["content"]):
            match block["type"]:
                case "text":
                    messages.append({"role": message["role"], "content": block["text"]})
                case "tool_use":
                    function = {"name": block["name"], "arguments": json.dumps(block["input"])}
                    calls.append({"id": block["id"], "type": "function", "function": function})
                case "tool_result":
                    result = {"tool_call_id": block["tool_use_id"], "content": block["content"]}
                    messages.append({"role": "tool", **result})
        if calls:
            messages.append({"role": "assistant", "tool_calls": calls})
    return with_instructions(messages)


def _blocks(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _tools(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tools on offer as OpenAI writes them."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool["name"],
                "description": tool.get("description", ""),
                "parameters": tool["input_schema"],
            },
        }
        for tool in body.get("tools", [])
    ]


def _may_call_several(body: dict[str, Any]) -> bool:
    return not body.get("tool_choice", {}).get("disable_parallel_tool_use")


def _message(body: dict[str, Any]) -> dict[str, Any]:
    """Return an answer without its content."""
    return {
        "id": f"msg_{uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": body["model"],
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(body, 1),
    }


def _usage(body: dict[str, Any], pieces: int) -> dict[str, int]:
    """Estimate the tokens: of the prompt by its length, of the answer by its pieces."""
    prompt = json.dumps([body.get("system"), body["messages"]])
    return {
        "input_tokens": len(prompt) // _CHARACTERS_PER_TOKEN,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": pieces,
    }


def _tool_use(call: ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{uuid4().hex}", "name": call.name, "input": {}}


async def _events(
    body: dict[str, Any], pieces: AsyncIterator[TextDelta | ToolCall]
) -> AsyncIterator[dict[str, Any]]:
    yield {"type": "message_start", "message": _message(body)}
    yield {"type": "ping"}
    index, count, stop_reason = 0, 0, "end_turn"
    is_text_open = False
    async for piece in pieces:
        count += 1
        if isinstance(piece, TextDelta):
            if not is_text_open:
                is_text_open = True
                yield _opened(index, {"type": "text", "text": ""})
            yield _filled(index, {"type": "text_delta", "text": piece.text})
            continue
        if is_text_open:
            is_text_open = False
            yield _closed(index)
            index += 1
        if stop_reason == "tool_use" and not _may_call_several(body):
            break
        stop_reason = "tool_use"
        arguments = json.dumps(piece.arguments)
        yield _opened(index, _tool_use(piece))
        # The first piece is empty, as Anthropic's is; the others break off anywhere.
        for part in ("", arguments[:7], arguments[7:]):
            yield _filled(index, {"type": "input_json_delta", "partial_json": part})
        yield _closed(index)
        index += 1
    if is_text_open:
        yield _closed(index)
    delta = {"stop_reason": stop_reason, "stop_sequence": None}
    yield {"type": "message_delta", "delta": delta, "usage": _usage(body, count)}
    yield {"type": "message_stop"}


def _opened(index: int, block: dict[str, Any]) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def _filled(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": delta}


def _closed(index: int) -> dict[str, Any]:
    return {"type": "content_block_stop", "index": index}


async def _whole(
    body: dict[str, Any], pieces: AsyncIterator[TextDelta | ToolCall]
) -> dict[str, Any]:
    text, calls, count = "", list[dict[str, Any]](), 0
    async for piece in pieces:
        count += 1
        if isinstance(piece, TextDelta):
            text += piece.text
        else:
            calls.append({**_tool_use(piece), "input": piece.arguments})
    return {
        **_message(body),
        "content": [*([{"type": "text", "text": text}] if text else []), *calls],
        "stop_reason": "tool_use" if calls else "end_turn",
        "usage": _usage(body, count),
    }
