"""The bot under rehearsal: the project's own `bot.py`, in a process of its own.

Its environment is the user's, from the shell and `.env`, with everything replaced that could reach
beyond this machine: keys, tokens, proxies, and addresses that are not of this machine.
"""

import asyncio
import os
import re
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
from dotenv import dotenv_values

from rehearsal import stand_ins
from rehearsal.host.launch_bot import STAND_IN
from rehearsal.providers.server import HOST

PROJECT = Path(__file__).resolve().parents[2]

START_SECONDS = 90.0
"""A cold start imports Pipecat; on a busy machine that takes long."""

STOP_SECONDS = 20.0
"""More than the bot may take to deliver its last call; after that it is killed, and its log tells
what each of its threads was doing."""

_POLL_SECONDS = 0.1
_TAIL_LINES = 15
_TAIL_LINES_WITH_THREADS = 150

_REACHES_OUT = re.compile(
    r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL|PROXY|URL|_SID|^OTEL_|^SENTRY_|"
    r"^PIPECAT_(ICE_SERVERS|ALLOWED_ORIGINS|WEBSOCKET_AUTH)$",
    re.IGNORECASE,
)

# A proxy or a collector on this machine passes on what it gets.
_ADDRESS = re.compile(r"^(?!OTEL_|SENTRY_|.*PROXY).*URL", re.IGNORECASE)


class BotFailed(Exception):
    """The bot did not start, or is gone; the text says so and shows the end of its log."""


class BotProcess:
    """A running bot.

    Attributes:
        url: Its address, without a path.
        log: Where its output goes.
    """

    def __init__(self, process: asyncio.subprocess.Process, port: int, log: Path) -> None:
        """Wrap a process that was just started."""
        self.url = f"http://{HOST}:{port}"
        self.log = log
        self._process = process

    @property
    def pid(self) -> int:
        """The id of its process."""
        return self._process.pid

    async def wait_until_ready(self) -> None:
        """Return once it answers. Raises BotFailed if it ends or takes too long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(START_SECONDS), aiohttp.ClientSession() as http:
                while self._process.returncode is None:
                    with suppress(aiohttp.ClientError):
                        async with http.get(f"{self.url}/status") as response:
                            if response.ok:
                                return
                    await asyncio.sleep(_POLL_SECONDS)
        if self._process.returncode is None:
            raise BotFailed(f"The bot did not start within {START_SECONDS:g} s.\n{self.tail()}")
        raise self._gone()

    async def wait_until_gone(self) -> None:
        """Wait for an end that nobody asked for. Raises BotFailed then."""
        await self._process.wait()
        raise self._gone()

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    async def stop(self) -> None:
        """Ask it to end, so that it can deliver its calls; kill it and raise BotFailed if not."""
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        except TimeoutError:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGABRT)
            await self._process.wait()
            late = f"The bot did not end within {STOP_SECONDS:g} s of being asked to."
            raise BotFailed(f"{late}\n{self.tail(_TAIL_LINES_WITH_THREADS)}") from None
        finally:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    def tail(self, count: int = _TAIL_LINES) -> str:
        """Return the end of its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        shown = "\n".join(f"  {line}" for line in lines[-count:])
        return f"The end of its log ({self.log}):\n{shown}" if shown else "Its log is empty."

    def _gone(self) -> BotFailed:
        return BotFailed(f"The bot ended with status {self._process.returncode}.\n{self.tail()}")


@asynccontextmanager
async def run_bot(
    transport: str, port: int, environment: Mapping[str, str], options: Sequence[str] = ()
) -> AsyncIterator[BotProcess]:
    """Run the bot for `transport` on `port` and wait until it answers; end it afterwards.

    Its log is kept if it or the code in the context fails.

    Args:
        transport: "webrtc" or "twilio".
        port: Where it is to listen, on 127.0.0.1.
        environment: What points it at the rehearsal, on top of the user's own settings.
        options: Further arguments of `bot.py`.

    Raises:
        BotFailed: It did not start.
    """
    descriptor, name = tempfile.mkstemp(prefix="rehearsal-bot-", suffix=".log")
    replace = [STAND_IN] if stand_ins.missing() else []
    command = ["-m", "rehearsal.host.launch_bot", *replace, "bot.py", "-t", transport]
    with os.fdopen(descriptor, "wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            *options,
            *("--host", HOST, "--port", str(port)),
            cwd=PROJECT,
            env=_settings(environment),
            # Open as long as this process lives: the bot ends when it breaks.
            stdin=asyncio.subprocess.PIPE,
            stdout=log,
            stderr=log,
            # Ctrl-C is for the rehearsal, which then ends the bot in order.
            start_new_session=True,
        )
    bot = BotProcess(process, port, Path(name))
    went_wrong = True
    try:
        await bot.wait_until_ready()
        yield bot
        went_wrong = False
    except asyncio.CancelledError:
        went_wrong = False
        raise
    finally:
        await bot.stop()
        if not went_wrong:
            bot.log.unlink()


async def run_command(
    file: str, arguments: Sequence[str], environment: Mapping[str, str], tell: Callable[[str], None]
) -> int:
    """Run another command of the project in the bot's circumstances; return its exit status.

    Args:
        file: What holds it, such as `telephony/__main__.py`.
        arguments: Its arguments.
        environment: What points it at the rehearsal, on top of the user's own settings.
        tell: Is given each line that it prints.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "rehearsal.host.launch_bot", file, *arguments),
        cwd=PROJECT,
        env=_settings(environment),
        # As for the bot.
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout
    try:
        while line := await process.stdout.readline():
            tell(line.decode(errors="replace").rstrip())
        return await process.wait()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _settings(environment: Mapping[str, str]) -> dict[str, str]:
    return {**_harmless(user_settings()), **environment, "PYTHONUNBUFFERED": "1"}


def user_settings() -> dict[str, str]:
    """Return the user's environment as the bot would see it: `.env` wins over the shell.

    Raises:
        ValueError: `.env` is no text; the sentence has nothing of it.
    """
    try:
        written = dotenv_values(PROJECT / ".env", encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(".env is no plain text in UTF-8, as env.example is.") from None
    return {**os.environ, **{name: value for name, value in written.items() if value is not None}}


def _harmless(settings: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in settings.items()
        if not _REACHES_OUT.search(name) or _stays_here(name, value)
    }


def _stays_here(name: str, value: str) -> bool:
    """Whether it is the address of something on this machine, which a tool may ask."""
    if not _ADDRESS.search(name):
        return False
    with suppress(ValueError):
        return urlsplit(value.strip()).hostname in ("localhost", "127.0.0.1", "::1")
    return False
