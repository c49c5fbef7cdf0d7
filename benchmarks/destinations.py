"""What a webhook of one's own and Tuner are without under faults: the rows beside Roark's.

In every row one real call goes to both, each with the same fault, from one bot (its Roark is well).
Then the fault is over, and what is left is delivered as the next process would do it.

    python -m benchmarks.destinations [WORD ...]      the rows whose names hold one of the words
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL
from tempfile import TemporaryDirectory
from typing import Any

from aiohttp import web
from rehearsal.providers.server import free_port
from roark.destinations import tuner_payload
from roark.folder import RECORD, call_folders

from benchmarks import PROJECT, REPOSITORY
from benchmarks.calls import SECONDS, TURNS, World, caller, host, talk, world
from benchmarks.faults import end_process, rows_of
from benchmarks.subjects import OURS

WEBHOOK, TUNER = "webhook", "tuner"
FLUSH_SECONDS = 3.0
"""How long the bot waits for its calls to be delivered: less than everybody's, to be quick."""


@dataclass(frozen=True)
class Fault:
    """One row: what goes wrong.

    Parameters:
        name: As in the table.
        answers: For the first requests: a status, "hang", or "cut" (taken, the answer is lost).
        always: For all later ones, until the fault is over.
        down: Nobody listens.
        is_killed: The process is killed in the middle of the call.
        full_disk: Every file in the folder of calls is refused for want of space.
        deliverers: How many processes deliver at once afterwards.
    """

    name: str
    answers: tuple[int | str, ...] = ()
    always: int | str = 200
    down: bool = False
    is_killed: bool = False
    full_disk: bool = False
    deliverers: int = 1


FAULTS = (
    Fault("none"),
    Fault("refused throughout", down=True),
    Fault("hangs throughout", always="hang"),
    Fault("one 429 that asks for a second", (429,)),
    Fault("one 500", (500,)),
    Fault("500 throughout", always=500),
    Fault("taken, and the connection cut before the answer", ("cut",)),
    Fault("kill -9 in the middle of the call", is_killed=True),
    Fault("a full disk, destination healthy", full_disk=True),
    Fault("a full disk, one 500", (500,), full_disk=True),
    Fault("refused throughout, then two processes deliver at once", down=True, deliverers=2),
)


@dataclass
class Receiver:
    """Takes posts on a port of its own; `taken` are (idempotency key, body)."""

    fault: Fault
    answers: list[int | str] = field(default_factory=list[int | str])
    is_healed: bool = False
    taken: list[tuple[str, bytes]] = field(default_factory=list[tuple[str, bytes]])
    requests: int = 0
    port: int = 0
    _over: asyncio.Event = field(default_factory=asyncio.Event)
    _runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """Its base address."""
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen from now on."""
        app = web.Application()
        app.router.add_post("/{any:.*}", self._take)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def aclose(self) -> None:
        """Let go of what hangs, and stop."""
        self._over.set()
        if self._runner:
            await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.requests += 1
        answer = 200 if self.is_healed else self.fault.always
        if self.answers:
            answer = self.answers.pop(0)
        if answer == "hang":
            await self._over.wait()
            return web.Response(status=503)
        if answer in (200, "cut"):
            key = request.headers.get("Idempotency-Key") or ""
            self.taken.append((key, body))
        if answer == "cut" and request.transport:
            request.transport.abort()
        headers = {"Retry-After": "1"} if answer == 429 else {}
        return web.Response(status=answer if isinstance(answer, int) else 500, headers=headers)


@dataclass
class Row:
    """What came of a call under a fault: destination -> (what is lost, requests, repeats taken)."""

    fault: Fault
    found: dict[str, tuple[str, int, int]]
    is_late: bool


async def one_row(fault: Fault) -> Row:
    """Hold a call under `fault` and see what is missing in the end."""
    with TemporaryDirectory() as folder:
        async with world(Path(folder)) as around, _receivers(fault) as receivers:
            environment = _environment(receivers)
            program: dict[str, Any] = {}
            if fault.full_disk:
                program = {"program": ("-m", "benchmarks.full_disk")}
            async with host(around, observers=(OURS,), environment=environment, **program) as bot:
                line = caller(bot, "twilio")
                async with line:
                    await talk(line, around)
                    if fault.is_killed:
                        await end_process(bot, SIGKILL)
                if not fault.is_killed:
                    await bot.measured(within=SECONDS)
            is_late = any(not receiver.taken for receiver in receivers.values())
            if is_late:
                for receiver in receivers.values():
                    receiver.is_healed = True
                    receiver.answers.clear()
                    if fault.down:
                        await receiver.start()
                await asyncio.gather(
                    *(_deliver(around, environment) for _ in range(fault.deliverers))
                )
            found = {
                name: (_lost(name, receiver, around), receiver.requests, _repeats(receiver))
                for name, receiver in receivers.items()
            }
    return Row(fault, found, is_late)


@asynccontextmanager
async def _receivers(fault: Fault) -> AsyncIterator[dict[str, Receiver]]:
    async with AsyncExitStack() as stack:
        receivers = {
            name: Receiver(fault, list(fault.answers), port=free_port())
            for name in (WEBHOOK, TUNER)
        }
        for receiver in receivers.values():
            stack.push_async_callback(receiver.aclose)
            if not fault.down:
                await receiver.start()
        yield receivers


def _environment(receivers: dict[str, Receiver]) -> dict[str, str]:
    return {
        "ROARK_FLUSH_SECONDS": str(FLUSH_SECONDS),
        "CALL_WEBHOOK_URL": f"{receivers[WEBHOOK].url}/calls",
        "CALL_WEBHOOK_SECRET": "secret",
        "TUNER_API_KEY": "key",
        "TUNER_WORKSPACE_ID": "1",
        "TUNER_AGENT_ID": "agent",
        "TUNER_BASE_URL": receivers[TUNER].url,
    }


async def _deliver(world: World, environment: dict[str, str]) -> None:
    """What the next process does."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "roark", "deliver"),
        cwd=world.folder,
        env={
            "PYTHONPATH": f"{REPOSITORY}:{PROJECT}",
            "CALLS_DIR": str(world.calls_dir),
            **environment,
        },
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    await asyncio.wait_for(process.wait(), SECONDS)


def _lost(name: str, receiver: Receiver, world: World) -> str:
    """What the destination has not: all of the call, turns of it, or that it is the record."""
    if not receiver.taken:
        return "the call"
    body = json.loads(receiver.taken[-1][1])
    if name == WEBHOOK:
        said = [(turn["role"], turn["text"]) for turn in body["turns"]]
    else:
        roles = {"user": "user", "agent": "assistant"}
        rows = body["transcript_with_tool_calls"]
        said = [(roles.get(row["role"], ""), row.get("text") or "") for row in rows]
    missing = sum(
        words not in " ".join(text for role, text in said if role == speaker)
        for speaker, words in TURNS
    )
    if missing:
        return f"{missing} of {len(TURNS)} turns"
    for path in call_folders(world.calls_dir):
        record = (path / RECORD).read_bytes()
        expected = json.loads(record) if name == WEBHOOK else tuner_payload(json.loads(record))
        if body != expected:
            return "it differs from the record"
    return "nothing"


def _repeats(receiver: Receiver) -> int:
    """How often the call was taken again, each time by the key it had before."""
    if len({key for key, _ in receiver.taken}) > 1:
        raise AssertionError(f"{receiver.fault.name}: a repeat with another key")
    return max(0, len(receiver.taken) - 1)


def line_of(row: Row) -> str:
    """Return a row of the table."""
    cells = [row.fault.name]
    for name in (WEBHOOK, TUNER):
        lost, requests, repeats = row.found[name]
        again = f", taken {repeats + 1} times by one key" if repeats else ""
        cells += [lost, f"{requests}{again}"]
    cells.append("by the next process" if row.is_late else "")
    return f"| {' | '.join(cells)} |"


HEAD = """\
| fault | lost by the webhook | requests | lost by Tuner | requests | delivered late |
|---|---|---|---|---|---|"""


async def measure(fault: Fault) -> str:
    """Return the row of one fault."""
    return line_of(await one_row(fault))


def report() -> str:
    """Measure, and return the section for README.md."""
    return "\n".join([HEAD, *asyncio.run(rows_of(FAULTS, measure))])


if __name__ == "__main__":
    chosen = [fault for fault in FAULTS if any(word in fault.name for word in sys.argv[1:])]
    asyncio.run(rows_of(chosen or FAULTS, measure))
