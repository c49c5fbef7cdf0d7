"""`python bot.py`, in a process of its own, and the world it talks to."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from rehearsal.engines.scripted import Script, ScriptedEngine
from rehearsal.host.bot_process import BotProcess, run_bot
from rehearsal.providers.all import serve as serve_providers
from rehearsal.providers.roark import RoarkReceiver
from rehearsal.providers.server import free_port


@asynccontextmanager
async def development_server(
    transport: str, tmp_path: Path, *options: str, **settings: str
) -> AsyncIterator[tuple[BotProcess, RoarkReceiver]]:
    """Run `python bot.py -t TRANSPORT`, pointed at providers and a Roark of this machine."""
    engine = ScriptedEngine(Script(greeting="Hello there."))
    async with serve_providers(engine) as providers, RoarkReceiver() as roark:
        world = {
            **providers.environment,
            "ROARK_BASE_URL": roark.url,
            "ROARK_API_KEY": "rehearsal",
            "CALLS_DIR": str(tmp_path / "calls"),
            **settings,
        }
        async with run_bot(transport, free_port(), world, options=options) as bot:
            yield bot, roark
