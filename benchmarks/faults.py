"""What is lost under faults: the table of the published package's losses, row by row.

In every row the same call is reported by all observers at once, each to a receiver of its own that
has the same fault. Then the fault is over, and our observer's folder is delivered as the next
process, or `python -m roark deliver`, would do it. The published packages keep nothing that could
be: for them it ends with the process.

pipecat-roark gets chunks of a second here, through its public argument: with its own of 256 KB (16
s of a phone call) it would have one chunk to lose, the whole call.
"""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from rehearsal.callers.caller import Caller
from rehearsal.providers.roark import ReceivedCall

from benchmarks import PROJECT
from benchmarks.calls import SECONDS, TURNS, Host, World, caller, host, talk, world
from benchmarks.host import Measured
from benchmarks.subjects import OURS, PUBLISHED, TUNER

TOOL_RECORDS = 2
CHUNK_SECONDS = 1.0
GRACE_SECONDS = 12.0
"""What a process gets after SIGTERM before it is killed: Docker's default and a little more."""


@dataclass(frozen=True)
class Fault:
    """One row: what goes wrong, and how the call ends.

    Parameters:
        name: As in the table.
        switches: Arguments of `RoarkReceiver.fail`, each of one fault.
        down: Nobody listens.
        transport: "twilio" or "webrtc".
        leaves_early: The caller hangs up after the greeting.
        ends_by: Ends the process in the middle of the call, instead of the caller hanging up.
        flush: Where the observers are flushed, see `Settings`.
        once: The process ends with the call; call-ended is answered when its event loop is gone,
            as by a Roark that takes longer than the process has left.
        ends_on_signal: The bot ends its calls on SIGTERM, as ours does.
    """

    name: str
    switches: tuple[dict[str, Any], ...] = ()
    down: bool = False
    transport: str = "twilio"
    leaves_early: bool = False
    ends_by: Signals | None = None
    flush: str = "finally"
    once: bool = False
    ends_on_signal: bool = False


def _all(**switch: Any) -> tuple[dict[str, Any], ...]:
    return ({"step": None, **switch},)


FAULTS = (
    Fault("none: a healthy Roark"),
    Fault("unreachable throughout", down=True),
    Fault("401 throughout", _all(status=401)),
    Fault("500 throughout", _all(status=500)),
    Fault("one 429 on call-ended", ({"step": "call-ended", "status": 429, "times": 1},)),
    Fault("one 503 on call-ended", ({"step": "call-ended", "status": 503, "times": 1},)),
    Fault("429 on three chunk-url requests", ({"step": "chunk-url", "status": 429, "times": 3},)),
    Fault("PUT 500 for two chunks", ({"step": "put", "status": 500, "times": 2},)),
    Fault("PUT hangs", ({"step": "put", "hang": True},)),
    Fault("chunk-url hangs", ({"step": "chunk-url", "hang": True},)),
    Fault("call-ended hangs", ({"step": "call-ended", "hang": True},)),
    Fault("everything hangs", _all(hang=True)),
    Fault(
        "call-started slow by 20 s, caller gone sooner", ({"step": "call-started", "slow_s": 20.0},)
    ),
    Fault(
        "SIGTERM while an upload takes 1 s, twilio, flush in the disconnect handler",
        ({"step": "put", "slow_s": 1.0},),
        ends_by=SIGTERM,
        flush="disconnect",
    ),
    Fault(
        "SIGTERM while an upload takes 1 s, webrtc, flush in the disconnect handler",
        ({"step": "put", "slow_s": 1.0},),
        ends_by=SIGTERM,
        transport="webrtc",
        flush="disconnect",
    ),
    Fault(
        "the same, webrtc, in a bot that ends its calls on SIGTERM and flushes in finally",
        ({"step": "put", "slow_s": 1.0},),
        ends_by=SIGTERM,
        transport="webrtc",
        ends_on_signal=True,
    ),
    Fault("SIGKILL", ends_by=SIGKILL),
    Fault(
        "host is asyncio.run(bot()), aflush not awaited, call-ended outlasts the loop",
        flush="never",
        once=True,
    ),
)


@dataclass
class Lost:
    """What one observer's receiver is without.

    Parameters:
        events: Of call-started and call-ended.
        turns: Of the call's turns.
        tools: Of the tool call and its result.
        seconds: Of the call's audio; None where none is promised.
    """

    events: list[str] = field(default_factory=list[str])
    turns: int = 0
    tools: int = 0
    seconds: float | None = None

    @property
    def anything(self) -> bool:
        """Whether something is lost; half a second of audio is the call's beginning and end."""
        return bool(self.events or self.turns or self.tools or (self.seconds or 0.0) > 0.5)

    def __str__(self) -> str:
        """As in the table."""
        lost = [*self.events]
        if self.turns:
            lost.append(f"{self.turns} of {len(TURNS)} turns")
        if self.tools:
            lost.append(f"{self.tools} of {TOOL_RECORDS} tool records")
        if (self.seconds or 0.0) > 0.5:
            lost.append(f"{self.seconds:.1f} s of audio")
        return ", ".join(lost) or "nothing"


@dataclass
class Row:
    """What came of a call under a fault.

    Parameters:
        lost: Observer -> what its receiver is without, after everything was tried.
        lost_at_first: Ours, before the next process delivered the rest.
        flush_seconds: Observer -> how long `aflush` took; missing where it was not reached.
    """

    fault: Fault
    lost: dict[str, Lost]
    lost_at_first: Lost
    flush_seconds: dict[str, float]


async def one_row(fault: Fault, observers: tuple[str, ...] = (OURS, PUBLISHED, TUNER)) -> Row:
    """Hold a call under `fault` and see what is missing in the end."""
    with TemporaryDirectory() as folder:
        async with world(Path(folder)) as around:
            loop_is_over = asyncio.Event()
            await _apply(fault, around, loop_is_over)
            line, measured = await _call(fault, around, observers, loop_is_over)
            call_seconds = line.heard.end - line.heard.utterances[0].start
            if measured is not None:
                call_seconds = measured.audio_seconds
            expected = TURNS[:1] if fault.leaves_early else TURNS
            first = _lost(around.received(OURS), expected, call_seconds)
            published = _lost(around.received(PUBLISHED), expected, call_seconds)
            tuner = _lost_by_tuner(around.tuner.calls, expected)
            if first.anything:
                await _heal(fault, around)
                await _deliver(around)
            ours = _lost(around.received(OURS), expected, call_seconds)
            problems = around.receivers[OURS].problems
            if problems:
                raise AssertionError(f"{fault.name}: {problems}")
    return Row(
        fault,
        {OURS: ours, PUBLISHED: published, TUNER: tuner},
        first,
        measured.flush_seconds if measured else {},
    )


async def _apply(fault: Fault, world: World, loop_is_over: asyncio.Event) -> None:
    for receiver in world.receivers.values():
        for switch in fault.switches:
            receiver.fail(**switch)
        if fault.once:
            receiver.fail("call-ended", held=loop_is_over)
        if fault.down:
            await receiver.stop()
    for switch in fault.switches:
        # Tuner has one request, so what happens to all or to the last one happens to it.
        if switch["step"] in (None, "call-ended"):
            world.tuner.status = switch.get("status", 200)
            world.tuner.times = switch.get("times")
            world.tuner.hang = switch.get("hang", False)
    if fault.down:
        await world.tuner.stop()


async def _heal(fault: Fault, world: World) -> None:
    for receiver in world.receivers.values():
        receiver.heal()
        if fault.down:
            await receiver.start()


async def _call(
    fault: Fault, world: World, observers: tuple[str, ...], loop_is_over: asyncio.Event
) -> tuple[Caller, Measured | None]:
    program: dict[str, Any] = {"program": ("-m", "benchmarks.host")} if fault.once else {}
    async with host(
        world,
        fault.transport,
        observers=observers,
        second_chunks=True,
        flush=fault.flush,
        once=fault.once,
        ends_on_signal=fault.ends_on_signal,
        **program,
    ) as bot:
        line = caller(bot, fault.transport)
        async with line:
            await talk(line, world, () if fault.leaves_early else ("What do I owe you?",))
            if fault.ends_by:
                await end_process(bot, fault.ends_by)
        if fault.ends_by:
            return line, None
        # pipecat-roark takes a minute when everything hangs.
        measured = await bot.measured(within=SECONDS + 60.0)
        if fault.once:
            await bot.loop_is_over()
            loop_is_over.set()
            await asyncio.wait_for(bot.process.wait(), SECONDS)
        elif not fault.switches and not fault.down:
            await asyncio.sleep(0.5)
        return line, measured


async def end_process(bot: Host, number: Signals) -> None:
    bot.signal(number)
    try:
        await asyncio.wait_for(bot.process.wait(), GRACE_SECONDS)
    except TimeoutError:
        bot.signal(SIGKILL)
        await bot.process.wait()


async def _deliver(world: World) -> None:
    """What the next process does."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "roark", "deliver"),
        cwd=world.folder,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(PROJECT),
            "CALLS_DIR": str(world.calls_dir),
            "ROARK_API_KEY": "key",
            "ROARK_BASE_URL": world.receivers[OURS].url,
        },
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    await asyncio.wait_for(process.wait(), SECONDS)


def _lost(call: ReceivedCall, expected: tuple[tuple[str, str], ...], call_seconds: float) -> Lost:
    ended = call.ended or {}
    rate = int(ended.get("recordingSampleRate", 8000))
    stored = len(call.recording) / 4 / rate
    # Silence that a recorder made up must not hide a chunk that was asked for and never stored.
    holes = {request.chunk for request in call.requests} - {None} - call.chunks.keys()
    return Lost(
        events=[
            name
            for name, body in (("call-started", call.started), ("call-ended", call.ended))
            if not body
        ],
        turns=_missing(expected, [(t["role"], t["content"]) for t in ended.get("transcript", [])]),
        tools=(TOOL_RECORDS - len(ended.get("toolCalls", []))) if len(expected) > 1 else 0,
        seconds=max(0.0, call_seconds - stored, len(holes) * CHUNK_SECONDS),
    )


def _lost_by_tuner(calls: list[dict[str, Any]], expected: tuple[tuple[str, str], ...]) -> Lost:
    roles = {"agent": "assistant", "user": "user"}
    entries = calls[0]["transcript_with_tool_calls"] if calls else []
    said = [(roles.get(entry["role"], ""), entry.get("text") or "") for entry in entries]
    return Lost(turns=_missing(expected, said))


def _missing(expected: tuple[tuple[str, str], ...], said: list[tuple[str, str]]) -> int:
    """Count the turns that nobody said, be it in several pieces: a busy machine makes pauses."""
    return sum(
        content not in " ".join(text for role, text in said if role == speaker)
        for speaker, content in expected
    )


F = TypeVar("F")


async def rows_of(faults: Iterable[F], measure: Callable[[F], Awaitable[str]]) -> list[str]:
    """Measure one fault after the other, and print each row of the table as it is there."""
    rows: list[str] = []
    for fault in faults:
        rows.append(await measure(fault))
        print(rows[-1], flush=True)
    return rows


async def measure(fault: Fault) -> str:
    """Return the row of one fault."""
    return line_of(await one_row(fault))


def line_of(row: Row) -> str:
    """Return a row of the table."""
    flushes = [
        f"{row.flush_seconds[name]:.1f}" if name in row.flush_seconds else "-"
        for name in (OURS, PUBLISHED)
    ]
    cells = [row.fault.name, *(str(row.lost[name]) for name in (OURS, PUBLISHED, TUNER)), *flushes]
    kept = "" if not row.lost_at_first.anything else "by the next process"
    return f"| {' | '.join([*cells[:2], kept, *cells[2:]])} |"


HEAD = """\
| fault | lost by ours | delivered late | lost by pipecat-roark | lost by tuner \
| flush, ours | flush, pipecat-roark |
|---|---|---|---|---|---|---|"""


def report() -> str:
    """Measure, and return the section for README.md."""
    return "\n".join([HEAD, *asyncio.run(rows_of(FAULTS, measure))])


if __name__ == "__main__":
    chosen = [fault for fault in FAULTS if any(word in fault.name for word in sys.argv[1:])]
    asyncio.run(rows_of(chosen or FAULTS, measure))
