"""The preflight names the service that would fail a caller."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import preflight
from rehearsal.providers import Providers, serve
from rehearsal.script import ScriptedEngine

pytestmark = pytest.mark.anyio

NAMES = {
    "deepgram": "DeepgramSTTService",
    "openai": "OpenAILLMService",
    "cartesia": "CartesiaTTSService",
}


@pytest.fixture
async def providers(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Providers]:
    """The providers, and an environment that points at them."""
    async with serve(ScriptedEngine()) as providers:
        for name, value in providers.environment.items():
            monkeypatch.setenv(name, value)
        yield providers


async def test_services_that_work_are_said_to(providers: Providers) -> None:
    assert await preflight.check() == dict.fromkeys(NAMES.values(), "")


@pytest.mark.parametrize("provider", NAMES)
async def test_a_wrong_key_is_named_with_its_service(providers: Providers, provider: str) -> None:
    getattr(providers, provider).faults.wrong_key = True
    results = await preflight.check()
    assert results[NAMES[provider]].startswith("authentication")
    broken = {name for name, problem in results.items() if problem}
    # Without an answer there is nothing to say.
    assert broken - {NAMES["cartesia"]} <= {NAMES[provider]}


@pytest.mark.parametrize("provider", ["openai", "cartesia"])
async def test_a_service_that_hangs_is_given_up_on(
    providers: Providers, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "TIMEOUT_SECONDS", 1.0)
    getattr(providers, provider).faults.hang = True
    assert (await preflight.check())[NAMES[provider]] == "no answer in 1 s"


async def test_the_exit_status_tells(providers: Providers, tmp_path: Path) -> None:
    providers.openai.faults.wrong_key = True
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "ignore", str(Path(preflight.__file__))),
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    lines = output.decode().splitlines()
    assert [line.split()[0] for line in lines] == list(NAMES.values())
    assert lines[0].endswith("works") and "authentication" in lines[1]
