"""The scenarios of evals/ hold, `pipecat eval` says so, and only where it is let in."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from pipecat.evals.scenario import EvalScenarioFile

from rehearsal.engines.scripted import Script, ScriptedEngine
from rehearsal.host.bot_process import BotProcess, run_bot
from rehearsal.providers.all import serve as serve_providers
from rehearsal.providers.server import free_port

# Each starts the bot and the harness, which takes seconds to import.
pytestmark = [pytest.mark.anyio, pytest.mark.slow]

EVALS = Path(__file__).parent.parent / "evals"
# Not the folder: your own scenarios may want a real LLM.
STARTER = EVALS / "starter.yaml"
SECONDS = 120.0


@asynccontextmanager
async def bot_for_evals(tmp_path: Path, **settings: str) -> AsyncIterator[BotProcess]:
    """`python bot.py` before the engine that plays evals/script.toml."""
    engine = ScriptedEngine(Script.load(EVALS / "script.toml"))
    async with serve_providers(engine) as providers:
        world = {**providers.environment, "CALLS_DIR": str(tmp_path / "calls"), **settings}
        async with run_bot("webrtc", free_port(), world) as bot:
            yield bot


async def run_evals(bot: BotProcess, scenarios: Path, tmp_path: Path) -> tuple[int, str]:
    """Run `pipecat eval run SCENARIOS`; return its exit status and what it printed."""
    address = bot.url.replace("http", "ws", 1) + "/ws"
    options = ["--bot-url", address, "--logs-dir", str(tmp_path), "--bot-ready-timeout", "10"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pipecat.evals", "run", str(scenarios), *options),
        # It reads the first .env it finds from here upwards.
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    printed, _ = await asyncio.wait_for(process.communicate(), SECONDS)
    assert process.returncode is not None
    return process.returncode, printed.decode()


async def test_the_starter_scenarios_hold_and_one_that_does_not_fails(tmp_path: Path) -> None:
    """In text mode nothing is spoken: to the bot that is no answer that failed to come."""
    wrong = tmp_path / "wrong.yaml"
    starter = STARTER.read_text()
    patience = "text_contains: midnight\n            within_ms: 3000"
    assert starter.count('text_excludes: "**"\n            within_ms: 15000') == 1
    wrong.write_text(starter.replace('text_excludes: "**"\n            within_ms: 15000', patience))
    async with bot_for_evals(tmp_path, ALLOW_EVAL="1", ANSWER_SECONDS="2") as bot:
        status, printed = await run_evals(bot, STARTER, tmp_path)
        assert status == 0, printed
        assert "3/3 passed" in printed
        status, printed = await run_evals(bot, wrong, tmp_path)
        log = bot.log.read_text()
    assert status == 1, printed
    assert "2/3 passed" in printed
    assert "A turn failed" not in log


async def test_the_simulated_callers_are_scenarios_that_the_harness_takes() -> None:
    """They need a model, so they are not run here."""
    file = EvalScenarioFile.load(EVALS / "simulated" / "callers.yaml")
    loaded = [scenario.name for scenario in file]
    assert loaded == ["callers/opening_hours", "callers/changes_their_mind"]


async def test_evals_are_turned_away_unless_the_environment_lets_them_in(tmp_path: Path) -> None:
    async with bot_for_evals(tmp_path, ALLOW_EVAL="0") as bot:
        status, printed = await run_evals(bot, STARTER, tmp_path)
        log = bot.log.read_text()
    assert status == 1, printed
    assert "0/3 passed" in printed
    assert "A call was refused" in log and "ALLOW_EVAL" in log
