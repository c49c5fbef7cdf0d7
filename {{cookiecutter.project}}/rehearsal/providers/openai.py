"""OpenAI's chat completions: `POST /v1/chat/completions`, streamed as server-sent events or whole.

A stream opens with the role, continues with pieces of text or of tool calls, names a finish
reason, reports usage if asked to, and ends with `[DONE]`. Pipecat 1.14 reads only the first tool
call of a chunk, so parallel calls come in separate ones, as OpenAI sends them.
"""

import json
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any
from uuid import uuid4

from aiohttp import web

from rehearsal.engines.engine import TextDelta, with_instructions
from rehearsal.providers.server import HOST, EngineServer, break_off

_BREAK_AFTER_CHUNKS = 4
_CHARACTERS_PER_TOKEN = 4

_ERRORS = {
    401: ("Incorrect API key provided.", "invalid_request_error", "invalid_api_key"),
    429: ("Rate limit reached.", "requests", "rate_limit_exceeded"),
    500: ("The server had an error while processing your request.", "server_error", None),
}


class OpenAIServer(EngineServer):
    """Thinks with the engine."""

    name = "openai"
    kind = "llm"
    speaks_to = ("OpenAILLMService",)
    module = "pipecat.services.openai.llm"
    url_variables = ("OPENAI_BASE_URL", "LLM_URL")
    url_argument = "base_url"

    def routes(self) -> Iterable[web.RouteDef]:
        """Return the one route a voice bot needs."""
        return [web.post("/v1/chat/completions", self._complete)]

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point a bot here."""
        return {
            "OPENAI_API_KEY": "rehearsal",
            "OPENAI_BASE_URL": f"http://{HOST}:{self.port}/v1",
            # The same protocol for any other server that speaks it.
            "LLM_URL": f"http://{HOST}:{self.port}/v1",
            "LLM_MODEL": "rehearsal",
        }

    def error(self, status: int) -> Mapping[str, Any]:
        """Return OpenAI's error object."""
        message, kind, code = _ERRORS[status]
        return {"error": {"message": message, "type": kind, "param": None, "code": code}}

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await self.admit_posted(request)
        if isinstance(body, web.Response):
            return body
        deltas = self._deltas(body)
        if not body.get("stream"):
            return web.json_response(await _whole(body, deltas))
        breaks = self.faults.breaks()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        sent = 0
        async for chunk in _chunks(body, deltas):
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
            sent += 1
            if breaks and sent == _BREAK_AFTER_CHUNKS:
                await break_off(breaks, response, request)
                return response
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _deltas(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Yield the `delta` objects of an answer: role first, then text and tool calls."""
        role: dict[str, Any] = {"role": "assistant", "content": ""}
        calls = 0
        messages = with_instructions(body["messages"])
        async for piece in self.engine.think(messages, body.get("tools", [])):
            if isinstance(piece, TextDelta):
                if role:
                    yield role
                    role = {}
                yield {"content": piece.text}
                continue
            function = {"name": piece.name, "arguments": ""}
            opening = {"index": calls, "id": f"call_{uuid4().hex}", "type": "function"}
            if role:
                role["content"] = None
            yield {**role, "tool_calls": [{**opening, "function": function}]}
            role = {}
            arguments = {"arguments": json.dumps(piece.arguments)}
            yield {"tool_calls": [{"index": calls, "function": arguments}]}
            calls += 1
        if role:
            yield role


def _header(body: dict[str, Any], kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": body["model"],
    }


def _usage(body: dict[str, Any], pieces: int) -> dict[str, int]:
    """Estimate the tokens: of the prompt by its length, of the answer by its pieces."""
    prompt = len(json.dumps(body["messages"])) // _CHARACTERS_PER_TOKEN
    return {
        "prompt_tokens": prompt,
        "completion_tokens": pieces,
        "total_tokens": prompt + pieces,
    }


async def _chunks(
    body: dict[str, Any], deltas: AsyncIterator[dict[str, Any]]
) -> AsyncIterator[dict[str, Any]]:
    header = _header(body, "chat.completion.chunk")
    finish, pieces = "stop", 0
    async for delta in deltas:
        pieces += 1
        if "tool_calls" in delta:
            finish = "tool_calls"
        yield {**header, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    yield {**header, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}
    if (body.get("stream_options") or {}).get("include_usage"):
        yield {**header, "choices": [], "usage": _usage(body, pieces)}


async def _whole(body: dict[str, Any], deltas: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    text, calls, pieces = "", list[dict[str, Any]](), 0
    async for delta in deltas:
        pieces += 1
        text += delta.get("content") or ""
        for call in delta.get("tool_calls", []):
            if "id" in call:
                calls.append({key: call[key] for key in ("id", "type", "function")})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    message: dict[str, Any] = {"role": "assistant", "content": text or None}
    if calls:
        message["tool_calls"] = calls
    finish = "tool_calls" if calls else "stop"
    return {
        **_header(body, "chat.completion"),
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": _usage(body, pieces),
    }
