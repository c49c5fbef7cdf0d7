"""What all tests share, those of the folders too: the loop, weights, a copy of the project."""

import os
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from loguru import logger

import config

KEYS = {name: f"value-of-{name.lower()}" for name in config.REQUIRED}
A_KEY = next(iter(KEYS), "")
# Some of roark's take from one another what they need of rehearsal/.
HOLDS_CALLS = re.compile(r"^ *(?:from|import) (?:harness|rehearsal|roark\.tests)\b", re.MULTILINE)

# A nice value, 19 to -20: ten times the share of a process at 0.
TIMED_PRIORITY = -10

SHOWN_LINES = 400


def without_rehearsal(folder: Path) -> list[str]:
    """Return the files of tests in a folder that need rehearsal/; none where that is there."""
    if find_spec("rehearsal"):
        return []
    files = folder.glob("test_*.py")
    return [file.name for file in files if HOLDS_CALLS.search(file.read_text(encoding="utf-8"))]


def compile_first(run: pytest.Config) -> None:
    """In a fresh environment let one process compile what all of pytest-xdist's would.

    They begin at the same moment and would each compile the same: half a minute on two cores.
    """
    pipecat = find_spec("pipecat")
    is_fresh = pipecat and pipecat.cached and not Path(pipecat.cached).exists()
    if is_fresh and run.getoption("numprocesses", 0) and not sys.dont_write_bytecode:
        collect = [sys.executable, "-m", "pytest", "-n", "0", "--collect-only", "-q", *run.args]
        subprocess.run(collect, cwd=run.invocation_params.dir, stdout=subprocess.DEVNULL)


@pytest.fixture(autouse=True)
def goes_first(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have a test marked `timed` go before pytest-xdist's other workers, where one may ask so."""
    if not request.node.get_closest_marker("timed") or not hasattr(os, "setpriority"):
        yield
        return
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, TIMED_PRIORITY)
    yield
    os.setpriority(os.PRIO_PROCESS, 0, before)


@pytest.fixture(autouse=True)
def shows_its_log(request: pytest.FixtureRequest) -> Iterator[None]:
    """What was logged in a test is shown where it fails, its last SHOWN_LINES."""
    # A command that a test has run may have left one that writes into that test's stream.
    logger.remove()
    lines = deque[str](maxlen=SHOWN_LINES)
    line = "{time:HH:mm:ss.SSS} {level} {name}: {message}"
    sink = logger.add(lambda message: lines.append(str(message)), level="DEBUG", format=line)
    yield
    # Or has taken this one away.
    with suppress(ValueError):
        logger.remove(sink)
    request.node.add_report_section("teardown", "log", "".join(lines))


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio, the loop Pipecat runs on."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def weights_of_this_machine() -> Iterator[None]:
    """Services that run in the bot's own process load what is installed, and download nothing."""
    if not find_spec("rehearsal"):
        yield
        return
    from rehearsal.engines import weights

    with pytest.MonkeyPatch.context() as patch:
        for name, value in weights.environment().items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of this project under a name that the platform takes, its keys filled in."""
    caches = shutil.ignore_patterns(
        ".venv", "*cache*", ".env", "uv.lock", "calls", "rehearsal", "tests"
    )
    copy = Path(shutil.copytree(Path(config.__file__).parent, tmp_path / "project", ignore=caches))
    toml = (copy / "pcc-deploy.toml").read_text()
    for key, value in (("agent_name", "my-bot"), ("region", "us-east"), ("secret_set", "keys")):
        toml = re.sub(rf'(?m)^{key} = ".*"$', f'{key} = "{value}"', toml)
    (copy / "pcc-deploy.toml").write_text(toml)
    (copy / ".env").write_text("".join(f"{name}={value}\n" for name, value in KEYS.items()))
    return copy
