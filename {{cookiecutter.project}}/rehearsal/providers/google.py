"""Google's Gemini: `POST /v1beta/models/MODEL:streamGenerateContent`, or whole without `stream`.

An answer is a list of parts, each a text or one tool call. A stream is server-sent events of the
same shape as a whole answer: every one carries the next parts and the usage so far, the last one
the reason why it ends. Gemini 3 signs its thoughts: the first of parallel calls, and the end of a
text. A client that does not send the signatures back is refused; this server does not look.
"""

import asyncio
import json
from base64 import b64encode
from collections.abc import Iterable, Mapping
from typing import Any
from uuid import uuid4

from aiohttp import web
from loguru import logger

from rehearsal.engines.engine import TextDelta, ToolCall, with_instructions
from rehearsal.providers.server import HOST, EngineServer, break_off

_BREAK_AFTER_CHUNKS = 2
# Google's SDK forgets what it has received and not yet read when the connection breaks.
_BEFORE_BREAK_SECONDS = 0.05
_CHARACTERS_PER_TOKEN = 4
_SIGNATURE = b64encode(b"a thought of the rehearsal").decode()

# A key that Google does not know is an invalid argument, not a failed login.
_ERRORS = {
    400: ("INVALID_ARGUMENT", "API key not valid. Please pass a valid API key."),
    429: ("RESOURCE_EXHAUSTED", "Resource has been exhausted (e.g. check quota)."),
    500: ("INTERNAL", "An internal error has occurred."),
}


class GoogleServer(EngineServer):
    """Thinks with the engine."""

    name = "google"
    kind = "llm"
    speaks_to = ("GoogleLLMService",)
    module = "pipecat.services.google.llm"
    url_variables = ("GOOGLE_BASE_URL",)
    wrong_key_status = 400

    def routes(self) -> Iterable[web.RouteDef]:
        """Return the routes of the streamed and the whole answer."""
        return [
            web.post("/v1beta/models/{model}:streamGenerateContent", self._stream),
            web.post("/v1beta/models/{model}:generateContent", self._answer),
        ]

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point a bot here."""
        url = f"http://{HOST}:{self.port}"
        # The second is the SDK's own, for a service that is not told.
        return {
            "GOOGLE_API_KEY": "rehearsal",
            "GOOGLE_BASE_URL": url,
            "GOOGLE_GEMINI_BASE_URL": url,
        }

    def key_of(self, request: web.Request) -> str:
        """Google's key has a header of its own."""
        return request.headers.get("X-Goog-Api-Key", "")

    def error(self, status: int) -> Mapping[str, Any]:
        """Return Google's error object; in a stream it is an event as it stands."""
        code, message = _ERRORS[status]
        details: list[dict[str, Any]] = []
        if status == 400:
            info = {"reason": "API_KEY_INVALID", "domain": "googleapis.com"}
            details = [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", **info}]
        elif status == 429 and self.faults.retry_after_s is not None:
            delay = {"retryDelay": f"{self.faults.retry_after_s:g}s"}
            details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", **delay}]
        return {"error": {"code": status, "message": message, "status": code, "details": details}}

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await self.admit_posted(request)
        if isinstance(body, web.Response):
            return body
        parts, count = list[dict[str, Any]](), 0
        async for piece in self.engine.think(_conversation(body), _tools(body)):
            count += 1
            if isinstance(piece, TextDelta) and parts and "text" in parts[-1]:
                parts[-1]["text"] += piece.text
            else:
                parts.append(_part(piece, is_signed=not parts))
        return web.json_response(_response(request, body, parts, count, is_last=True))

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        body = await self.admit_posted(request)
        if isinstance(body, web.Response):
            return body
        breaks = self.faults.breaks()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        count, has_called = 0, False
        try:
            async for piece in self.engine.think(_conversation(body), _tools(body)):
                count += 1
                is_first_call = isinstance(piece, ToolCall) and not has_called
                has_called = has_called or is_first_call
                parts = [_part(piece, is_signed=is_first_call)]
                await _send(response, _response(request, body, parts, count))
                if breaks and count == _BREAK_AFTER_CHUNKS:
                    await asyncio.sleep(_BEFORE_BREAK_SECONDS)
                    await break_off(breaks, response, request)
                    return response
            last = {"text": ""} if has_called else {"text": "", "thoughtSignature": _SIGNATURE}
            await _send(response, _response(request, body, [last], count, is_last=True))
        except ConnectionError:
            raise
        except Exception as error:
            logger.warning(f"rehearsal: the engine failed: {error}")
            await _send(response, self.error(500))
        return response


async def _send(response: web.StreamResponse, event: Mapping[str, Any]) -> None:
    await response.write(f"data: {json.dumps(event)}\r\n\r\n".encode())


def _conversation(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the request's system instruction and contents as OpenAI writes them."""
    messages: list[dict[str, Any]] = []
    if "systemInstruction" in body:
        prompt = " ".join(part["text"] for part in body["systemInstruction"]["parts"])
        messages.append({"role": "system", "content": prompt})
    for content in body["contents"]:
        role = "assistant" if content["role"] == "model" else "user"
        calls: list[dict[str, Any]] = []
        for part in content["parts"]:
            if call := part.get("functionCall"):
                arguments = json.dumps(call.get("args", {}))
                function = {"name": call["name"], "arguments": arguments}
                calls.append({"id": _id(call), "type": "function", "function": function})
            elif result := part.get("functionResponse"):
                returned = {"tool_call_id": _id(result), "content": json.dumps(result["response"])}
                messages.append({"role": "tool", **returned})
            elif "text" in part:
                messages.append({"role": role, "content": part["text"]})
        if calls:
            messages.append({"role": "assistant", "tool_calls": calls})
    return with_instructions(messages)


def _id(part: dict[str, Any]) -> str:
    """Return what joins a result to its call: an id, or the tool's name where there is none."""
    return part.get("id") or part["name"]


def _tools(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tools on offer as OpenAI writes them."""
    return [
        {
            "type": "function",
            "function": {
                "name": function["name"],
                "description": function.get("description", ""),
                "parameters": _json_schema(function.get("parameters", {})),
            },
        }
        for tool in body.get("tools", [])
        for function in tool.get("functionDeclarations", [])
    ]


def _json_schema(schema: Any) -> Any:
    """Return Google's schema with the names of types as JSON Schema has them, in lower case."""
    if isinstance(schema, list):
        return [_json_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value.lower() if key == "type" and isinstance(value, str) else _json_schema(value)
        for key, value in schema.items()
    }


def _part(piece: TextDelta | ToolCall, *, is_signed: bool) -> dict[str, Any]:
    if isinstance(piece, TextDelta):
        return {"text": piece.text}
    call = {"id": uuid4().hex[:8], "name": piece.name, "args": piece.arguments}
    return {"functionCall": call, **({"thoughtSignature": _SIGNATURE} if is_signed else {})}


def _response(
    request: web.Request,
    body: dict[str, Any],
    parts: list[dict[str, Any]],
    pieces: int,
    *,
    is_last: bool = False,
) -> dict[str, Any]:
    """Return an answer; its tokens are estimated, by the length of the prompt and its pieces."""
    candidate = {"content": {"role": "model", "parts": parts}, "index": 0}
    prompt = len(json.dumps(body["contents"])) // _CHARACTERS_PER_TOKEN
    return {
        "candidates": [{**candidate, "finishReason": "STOP"} if is_last else candidate],
        "usageMetadata": {
            "promptTokenCount": prompt,
            "candidatesTokenCount": pieces,
            "totalTokenCount": prompt + pieces,
        },
        "modelVersion": request.match_info["model"],
        "responseId": uuid4().hex,
    }
