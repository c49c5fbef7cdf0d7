"""Two hundred random schedules of faults, kills and restarts: no call is lost, none is spoilt.

A schedule is a seed. It breaks the loopback Roark in a few ways at random, holds calls in real
processes, kills some of them with SIGKILL at a random moment, starts others on the same folder,
and in the end heals everything. Then every call that any process began must be at Roark whole.
"""

import asyncio
import json
import os
import random
import signal
import sys
import time
import wave
from pathlib import Path
from typing import Any

import pytest

from rehearsal.providers.roark import RoarkReceiver
from roark.folder import Folder, call_folders, chunk_step

SCHEDULES = 120
SCHEDULES_AT_ONCE = 8
PROJECT = Path(__file__).parents[2]
# A disk that has not taken a chunk after this long, on a machine with better things to do, is late.
LATE_SECONDS = 2.0

# Imports once, then forks a process per line on stdin; nothing of a call is alive before the fork.
NURSERY = """
import asyncio, json, os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, {project!r})
from loguru import logger
import roark.client
from roark.call import CallRecord
from roark.client import Backoff, RoarkClient
from roark.outbox import Outbox

roark.client.ATTEMPT_SECONDS = 0.3
# As a bot does: half a second of work, or each process does it where it should write.
roark.client.warm_up()
logger.remove()


def sound(call_id, index):
    return random.Random(f"{{call_id}}/{{index}}").randbytes(3200)


async def quick(seconds):
    await asyncio.sleep(seconds / 40)


def hold(outbox, job, call_id, log):
    folder, record = outbox.open(call_id), CallRecord()

    def happens(name, **event):
        event = {{"event": name, "at": time.time_ns(), **event}}
        record.apply(event)
        folder.journal(event)

    def note(what):
        os.write(log, json.dumps([call_id, what, time.monotonic()]).encode() + b"\\n")

    happens("call", call_id=call_id, agent_id="agent")
    happens("started")
    folder.started(record.call_started())
    note("started")
    for index in range(job["chunks"]):
        time.sleep(job["pace"])
        happens("bot", edge="start")
        happens("words", context="c", segment=index, text=f"word {{index}}", spaced=False)
        happens("bot", edge="stop")
        folder.chunk(index, sound(call_id, index), 8000, 2)
        happens("chunk", index=index, ms=100 * (index + 1), sample_rate=8000, num_channels=2)
        note(index)
    record.close("client-disconnected")
    folder.ended(record.call_ended(), record.as_dict())
    note("ended")
    asyncio.run(folder.flush(job["flush"]))


def work(job):
    log = os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    outbox = Outbox(
        Path(job["directory"]),
        RoarkClient(api_key="k", base_url=job["url"]),
        sleep=quick,
        leftovers_after_s=0.05,
        delivers_leftovers=bool(job["calls"]),
    )
    for call_id in job["calls"]:
        hold(outbox, job, call_id, log)
    if not job["calls"]:
        outbox.deliver_leftovers(lambda *_: None).result()
    outbox.close()


for line in sys.stdin:
    job = json.loads(line)
    if (child := os.fork()) == 0:
        status = 1
        try:
            work(job)
            status = 0
        finally:
            os._exit(status)
    print(child, flush=True)
"""


class Nursery:
    """Processes that hold calls, made quickly."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> "Nursery":
        program = NURSERY.format(project=str(PROJECT))
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            program,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # Nobody waits for the children: let the system clear them away.
            preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.kill()
        await self._process.wait()

    async def begin(self, **job: Any) -> int:
        """Starts a process; its id."""
        assert self._process is not None and self._process.stdin and self._process.stdout
        async with self._turn:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            return int(await self._process.stdout.readline())


async def ends(process: int, *, within: float) -> bool:
    """Whether a process has ended in time; it is not our child, so it has to be looked at."""
    deadline = time.monotonic() + within
    while Path(f"/proc/{process}").exists():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


def break_at_random(roark: RoarkReceiver, chance: random.Random) -> list[str]:
    """Switches one to four faults on; says which."""
    faults: list[dict[str, Any]] = []
    for _ in range(chance.randint(1, 4)):
        kind = chance.choice(["status", "status", "hang", "cut", "cut answer", "slow"])
        fault: dict[str, Any] = {
            "step": chance.choice(["call-started", "chunk-url", "put", "call-ended", None]),
            "times": chance.randint(1, 5),
        }
        match kind:
            case "status":
                fault["status"] = chance.choice([408, 425, 429, 500, 502, 503, 401])
                fault["retry_after"] = chance.choice([None, None, 1, 5])
                if fault["step"] == "put" and fault["status"] == 401:
                    fault["status"] = 500
                if fault["step"] is None:
                    fault["status"] = 500
            case "hang":
                fault.update(hang=True, times=chance.randint(1, 2))
                fault["after_storing"] = chance.random() < 0.5
            case "cut":
                fault["cut"] = True
            case "cut answer":
                fault.update(cut=True, after_storing=True)
            case _:
                fault["slow_s"] = chance.uniform(0.05, 0.5)
        if chance.random() < 0.3:
            fault["step"], fault["chunks"] = "put", chance.sample(range(8), 2)
            if fault.get("status") == 401:
                fault["status"] = 500
        faults.append(fault)
    if chance.random() < 0.3:
        faults.append({"step": "put", "status": 403, "times": chance.randint(1, 2)})
    for fault in faults:
        roark.fail(**fault)
    return [str(fault) for fault in faults]


async def play(seed: int, directory: Path, nursery: Nursery) -> dict[str, int]:
    """Plays one schedule and looks at what came of it; counts for the summary."""
    chance = random.Random(seed)
    log = directory / "handed-over.jsonl"
    calls_dir = directory / "calls"
    killed_at: dict[str, float] = {}
    on_disk_at_kill: dict[Path, set[int]] = {}
    kills = 0
    async with RoarkReceiver() as roark:
        faults = break_at_random(roark, chance)
        for number in range(chance.randint(1, 3)):
            calls = [f"call#{seed}/{number}.{n}" for n in range(chance.randint(1, 2))]
            process = await nursery.begin(
                directory=str(calls_dir),
                url=roark.url,
                log=str(log),
                calls=calls,
                chunks=chance.randint(0, 8),
                pace=chance.uniform(0.0, 0.04),
                flush=chance.choice([0.0, 0.1, 0.5]),
            )
            if chance.random() < 0.25:
                await roark.stop()
                await asyncio.sleep(chance.uniform(0.0, 0.3))
                await roark.start()
            if chance.random() < 0.6:
                await asyncio.sleep(chance.uniform(0.0, 0.7))
                if Path(f"/proc/{process}").exists():
                    kills += 1
                    os.kill(process, signal.SIGKILL)
                    now = time.monotonic()
                    killed_at.update(dict.fromkeys(calls, now))
            assert await ends(process, within=30), f"{seed}: a process does not end: {faults}"
            for path in call_folders(calls_dir):
                on_disk_at_kill.setdefault(path, chunks_of(path))
        roark.heal()
        for _ in range(3):
            process = await nursery.begin(
                directory=str(calls_dir), url=roark.url, log=str(log), calls=[]
            )
            assert await ends(process, within=30), f"{seed}: the delivery does not end: {faults}"
        check(seed, roark, calls_dir, log, killed_at, on_disk_at_kill, faults)
        return {
            "calls": len(roark.calls),
            "kills": kills,
            "killed calls": sum(
                (call.ended or {}).get("callEndedReason") == "process-died"
                for call in roark.calls.values()
            ),
            "chunks": sum(len(call.chunks) for call in roark.calls.values()),
            "requests": len(roark.requests),
        }


def chunks_of(path: Path) -> set[int]:
    """The chunks that a folder has, on their own or in the recording."""
    folder = Folder.load(path)
    chunks = {int(chunk.stem.split("-")[1]) for chunk in path.glob("chunk-*.pcm")}
    recorded = int(folder.recording_seconds * 10 + 0.5)
    return chunks | set(range(recorded))


def check(
    seed: int,
    roark: RoarkReceiver,
    calls_dir: Path,
    log: Path,
    killed_at: dict[str, float],
    on_disk_at_kill: dict[Path, set[int]],
    faults: list[str],
) -> None:
    """Every call is at Roark whole, each chunk with its own content, call-ended last."""
    scene = f"schedule {seed}, faults {faults}"
    assert roark.problems == [], scene
    handed_over: dict[str, dict[str | int, float]] = {}
    for line in log.read_text().splitlines():
        call_id, what, at = json.loads(line)
        handed_over.setdefault(call_id, {})[what] = at
    kept = {Folder.load(path).call_id: path for path in call_folders(calls_dir)}
    for call_id, path in kept.items():
        folder, received = Folder.load(path), roark.call(call_id)
        assert folder.is_finished, f"{scene}: {call_id} is not finished: {folder.steps_left}"
        assert folder.steps_given_up == [], f"{scene}: {call_id}"
        assert received.whole, f"{scene}: {call_id}: {received.stored}"
        for index, pcm in received.chunks.items():
            expected = random.Random(f"{call_id}/{index}").randbytes(3200)
            assert pcm == expected, f"{scene}: {call_id} chunk {index}"
        if on_disk_at_kill[path]:
            assert set(received.chunks) == on_disk_at_kill[path], f"{scene}: {call_id}"
            with wave.open(str(path / "recording.wav")) as recording:
                assert recording.readframes(recording.getnframes()) == received.recording, scene
        first = [
            (request.step, request.chunk)
            for request in received.requests
            if request.stored and request.step != "chunk-url"
        ]
        assert first.index(("call-ended", None)) >= len(received.chunks) + 1, f"{scene}: {first}"
        assert received.ended is not None
        whole = bool(received.chunks)
        assert ("recordingSampleRate" in received.ended) == whole, f"{scene}: {call_id}"
        assert folder.idempotency_key(chunk_step(0))
    for call_id, accepted in handed_over.items():
        until = killed_at.get(call_id, float("inf")) - LATE_SECONDS
        expected = {what for what, at in accepted.items() if isinstance(what, int) and at < until}
        if "started" in accepted and accepted["started"] < until:
            assert call_id in kept, f"{scene}: {call_id} is lost"
        if expected:
            assert expected <= set(roark.call(call_id).chunks), f"{scene}: {call_id}"
        if "ended" in accepted and accepted["ended"] < until:
            ended = roark.call(call_id).ended or {}
            assert ended["callEndedReason"] == "client-disconnected", f"{scene}: {call_id}"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks at /proc")
@pytest.mark.anyio
async def test_no_schedule_of_faults_kills_and_restarts_loses_or_spoils_a_call(tmp_path):
    began = time.monotonic()
    places = asyncio.Semaphore(SCHEDULES_AT_ONCE)
    totals: dict[str, int] = {}

    async def one(seed: int, nursery: Nursery) -> None:
        async with places:
            directory = tmp_path / str(seed)
            directory.mkdir()
            for what, number in (await play(seed, directory, nursery)).items():
                totals[what] = totals.get(what, 0) + number

    async with Nursery() as nursery, asyncio.TaskGroup() as group:
        for seed in range(SCHEDULES):
            group.create_task(one(seed, nursery))
    print(f"{SCHEDULES} schedules in {time.monotonic() - began:.0f} s: {totals}")
    assert totals["killed calls"] > SCHEDULES / 10
