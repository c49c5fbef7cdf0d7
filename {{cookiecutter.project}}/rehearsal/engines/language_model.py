"""What the local engine thinks with: a real language model if there is one, else a plain answerer.

A real one is OpenAI's when the user has set `OPENAI_API_KEY`, or an Ollama server on this machine.
Both speak chat completions, so their stream is passed on. Without either, the answerer says
honestly that it is none, and repeats what it understood: that is what a rehearsal is to show.
"""

import json
import re
from collections.abc import AsyncIterator, Mapping
from itertools import takewhile
from typing import Any, Protocol

import aiohttp

from rehearsal.engines.engine import TextDelta, ToolCall

OLLAMA_URL = "http://127.0.0.1:11434"
OPENAI_URL = "https://api.openai.com/v1"
OPENAI_MODEL = "gpt-4.1"
"""What Pipecat's own OpenAI service takes by default."""

_LOOK_FOR_OLLAMA_SECONDS = 1.0
_LANGUAGE_MODEL_SECONDS = 60.0

_WHAT_I_AM = "I am a scripted answerer, not a language model. I repeat what I understood."
_GOODBYE = re.compile(r"\b(good[ -]?bye|bye|hang up|that'?s all|that is all)\b", re.IGNORECASE)
_WHO = re.compile(
    r"\b(who|what) are you\b|\byour name\b|\bare you (an? )?(real|human|robot|bot|machine)\b",
    re.IGNORECASE,
)
_HELP = re.compile(r"\b(help|what can you do|how does this work)\b", re.IGNORECASE)


class Answerer(Protocol):
    """Answers a conversation; arguments as in `Engine.think`."""

    @property
    def description(self) -> str:
        """What it is, for people."""
        ...

    def think(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> AsyncIterator[TextDelta | ToolCall]:
        """Answer."""
        ...


async def choose_answerer(environment: Mapping[str, str]) -> Answerer:
    """Return the best answerer at hand: OpenAI with the user's key, Ollama, the scripted one."""
    key = environment.get("OPENAI_API_KEY", "").strip()
    # The placeholder that `python -m rehearsal providers` prints is no key.
    if key and key != "rehearsal":
        url = environment.get("OPENAI_BASE_URL", "").strip() or OPENAI_URL
        model = environment.get("OPENAI_MODEL", "").strip() or OPENAI_MODEL
        return LanguageModel(url, model, key, f"OpenAI's {model}, with your OPENAI_API_KEY")
    if model := await _ollama_model(environment.get("OLLAMA_MODEL", "").strip()):
        return LanguageModel(f"{OLLAMA_URL}/v1", model, "", f"Ollama's {model}, on this machine")
    return ScriptedAnswerer()


async def _ollama_model(wanted: str) -> str:
    """Return the wanted, else the first model of a local Ollama server; empty without one."""
    timeout = aiohttp.ClientTimeout(total=_LOOK_FOR_OLLAMA_SECONDS)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, raise_for_status=True) as http,
            http.get(f"{OLLAMA_URL}/api/tags") as response,
        ):
            names = [str(model["name"]) for model in (await response.json())["models"]]
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError):
        return ""
    return wanted if wanted in names else next(iter(names), "")


class ScriptedAnswerer:
    """A few keywords; everything else is repeated."""

    description = "a scripted answerer (no language model)"

    async def think(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> AsyncIterator[TextDelta | ToolCall]:
        """Answer what was said last, in one piece."""
        if messages and messages[-1].get("role") == "tool":
            yield TextDelta("Done.")
            return
        said = _last_said(messages)
        end_call = next((tool for tool in tools if tool["function"]["name"] == "end_call"), None)
        if not said and not any(message.get("role") == "assistant" for message in messages):
            yield TextDelta(f"Hello. {_WHAT_I_AM} Say thank you and goodbye to hang up.")
        elif not said:
            yield TextDelta("Are you still there? Say anything and I repeat it.")
        elif _GOODBYE.search(said) and end_call is not None:
            yield ToolCall("end_call", _goodbye_arguments(end_call))
        elif _WHO.search(said):
            yield TextDelta(_WHAT_I_AM)
        elif _HELP.search(said):
            yield TextDelta(
                "Say anything and I repeat it. Say thank you and goodbye, and I hang up."
            )
        else:
            yield TextDelta(f"I understood: {said}")


class LanguageModel:
    """Any server of OpenAI's chat completions.

    Attributes:
        description: What it is, for people.
    """

    def __init__(self, url: str, model: str, key: str, description: str) -> None:
        """Prepare to ask `model` at `url` (which ends in `/v1`); an empty key is not sent."""
        self.description = description
        self._url = url.rstrip("/")
        self._model = model
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def think(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> AsyncIterator[TextDelta | ToolCall]:
        """Pass the model's stream on; tool calls follow once their arguments are complete."""
        # Not every server knows the role `developer`; every one knows what it replaced.
        known = [
            {**message, "role": "system"} if message["role"] == "developer" else message
            for message in messages
        ]
        body: dict[str, Any] = {"model": self._model, "messages": known, "stream": True}
        if tools:
            body["tools"] = tools
        calls: dict[int, dict[str, str]] = {}
        timeout = aiohttp.ClientTimeout(total=_LANGUAGE_MODEL_SECONDS)
        async with (
            aiohttp.ClientSession(headers=self._headers, timeout=timeout) as http,
            http.post(f"{self._url}/chat/completions", json=body) as response,
        ):
            if not response.ok:
                raise RuntimeError(f"{self.description} answered HTTP {response.status}")
            async for delta in _deltas(response.content):
                if text := delta.get("content"):
                    yield TextDelta(text)
                for piece in delta.get("tool_calls") or []:
                    call = calls.setdefault(piece["index"], {"name": "", "arguments": ""})
                    function = piece.get("function", {})
                    call["name"] += function.get("name") or ""
                    call["arguments"] += function.get("arguments") or ""
        for call in calls.values():
            yield ToolCall(call["name"], json.loads(call["arguments"] or "{}"))


async def _deltas(stream: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    async for line in stream:
        data = line.decode().removeprefix("data:").strip()
        if not line.startswith(b"data:") or data == "[DONE]":
            continue
        for choice in json.loads(data).get("choices", []):
            yield choice.get("delta", {})


def _last_said(messages: list[dict[str, Any]]) -> str:
    """Return what the caller said since the last answer; empty if that was nothing."""
    since = list(takewhile(lambda message: message.get("role") == "user", reversed(messages)))
    return " ".join(_text_of(message) for message in reversed(since)).strip()


def _text_of(message: dict[str, Any]) -> str:
    """Return a message's text; its content is a string or a list of parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content.strip()
    return " ".join(part["text"] for part in content if part.get("type") == "text").strip()


def _goodbye_arguments(tool: dict[str, Any]) -> dict[str, Any]:
    """Fill the strings that a tool insists on; ours asks for the last words to say."""
    parameters: dict[str, Any] = tool["function"].get("parameters") or {}
    properties: dict[str, dict[str, Any]] = parameters.get("properties", {})
    required: list[str] = parameters.get("required", [])
    return {name: "Goodbye." for name in required if properties[name].get("type") == "string"}
