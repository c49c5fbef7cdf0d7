"""What the servers have in common."""

import pytest

from rehearsal.engines.scripted import ScriptedEngine
from rehearsal.providers.all import serve

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
