"""What the servers have in common."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from rehearsal.engines.engine import TextDelta, ToolCall
from rehearsal.engines.scripted import ScriptedEngine
from rehearsal.providers.all import serve
from rehearsal.providers.openai import OpenAIServer
from rehearsal.providers.server import HOST, WireLog

pytestmark = pytest.mark.anyio

KEY = "a-secret-of-the-bot"


async def test_waiting_for_what_does_not_happen_ends_and_says_what_did() -> None:
    async with serve(ScriptedEngine()) as providers:
        with pytest.raises(TimeoutError, match="on the wire: nothing"):
            await providers.log.until(lambda: False, within_s=0.01)


async def test_a_taken_port_is_named() -> None:
    async with serve(ScriptedEngine()) as first:
        with pytest.raises(OSError, match=f"port {first.servers[0].port} of 127.0.0.1"):
            async with serve(ScriptedEngine(), port=first.servers[0].port):
                pass


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
