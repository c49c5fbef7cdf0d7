"""The preflight names the service that would fail a caller."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from harness import classes, server_of, skip_unless_scripted, stand_in

import services
from deploy import preflight
from rehearsal.engines.scripted import ScriptedEngine
from rehearsal.providers.all import Providers, serve

pytestmark = pytest.mark.anyio


@pytest.fixture
async def providers(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Providers]:
    """The providers, and an environment that points at them."""
    skip_unless_scripted()
    monkeypatch.setattr(preflight, "REFUSAL_SECONDS", 0.3)
    async with serve(ScriptedEngine()) as providers:
        for name, value in providers.environment.items():
            monkeypatch.setenv(name, value)
        stand_in(monkeypatch)
        yield providers


async def test_services_that_work_are_said_to(providers: Providers) -> None:
    assert await preflight.check() == dict.fromkeys(classes().values(), "")


@pytest.mark.parametrize("kind", ["stt", "llm", "tts"])
async def test_a_wrong_key_is_named_with_its_service(providers: Providers, kind: str) -> None:
    server_of(providers, kind).faults.wrong_key = True
    results = await preflight.check()
    assert results[classes()[kind]]
    broken = {name for name, problem in results.items() if problem}
    # Without an answer there is nothing to say.
    assert broken - {classes()["tts"]} <= {classes()[kind]}


@pytest.mark.parametrize("kind", ["llm", "tts"])
async def test_a_service_that_hangs_is_given_up_on(
    providers: Providers, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "TIMEOUT_SECONDS", 1.0)
    server_of(providers, kind).faults.hang = True
    assert (await preflight.check())[classes()[kind]] == "no answer in 1 s"


async def test_the_exit_status_tells(providers: Providers) -> None:
    server_of(providers, "llm").faults.wrong_key = True
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "ignore", "-m", "rehearsal.host.launch_bot"),
        *("--stand-in", "preflight.py"),
        cwd=Path(services.__file__).parent,
        # The rehearsal's hand on it, until the end.
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    lines = output.decode().splitlines()
    assert [line.split()[0] for line in lines] == list(classes().values())
    assert [line.endswith("works") for line in lines[:2]] == [True, False]
