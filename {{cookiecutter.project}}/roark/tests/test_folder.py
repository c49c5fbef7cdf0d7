"""What lies on disk: who may read it, what cannot be read, and what a dead process leaves."""

import asyncio
import json
import os
import re
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from roark.__main__ import main
from roark.client import RoarkClient
from roark.folder import Folder, call_folders, folder_name
from roark.outbox import Outbox
from roark.tests.test_cli import leave
from roark.tests.test_outbox import (
    CALL,
    CHUNK_BYTES,
    RATE,
    call_ended,
    call_started,
    hold,
    run_python,
    said_by,
    sound,
)


async def next_process(calls_dir: Path, url: str) -> None:
    """Delivers what is left, as the next process does."""
    outbox = Outbox(calls_dir, RoarkClient(api_key="k", base_url=url), delivers_leftovers=False)
    await asyncio.wrap_future(outbox.deliver_leftovers(lambda *_: None))
    await asyncio.to_thread(outbox.close)


# Private


@pytest.fixture
def careless_umask():
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.anyio
async def test_nobody_else_on_the_machine_may_read_a_call(roark, calls_dir, careless_umask):
    """While the call lasts, when it is over, and in what is made of it later."""
    seen: dict[str, set[str]] = {}

    def look() -> None:
        for path in [calls_dir, *calls_dir.rglob("*")]:
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & 0o077:
                seen.setdefault(oct(mode), set()).add(path.name)

    outbox = Outbox(calls_dir, None)
    call = hold(outbox, ends=False)
    await call.flush(10)
    look()
    call.ended(call_ended(), {"call": CALL})
    await call.flush(10)
    await asyncio.to_thread(outbox.close)
    assert await asyncio.to_thread(main, ["report"]) == 0
    look()
    assert seen == {}


@pytest.mark.anyio
async def test_a_folder_that_others_could_look_into_is_closed_at_the_start(calls_dir, log):
    calls_dir.mkdir(mode=0o755)
    calls_dir.chmod(0o755)
    outbox = Outbox(calls_dir, None)
    await hold(outbox).flush(10)
    await asyncio.to_thread(outbox.close)
    assert stat.S_IMODE(calls_dir.stat().st_mode) == 0o700
    assert sum("could look into" in line for line in log) == 1


# What cannot be read

DEEP = b"[" * 100_000 + b"]" * 100_000


def renamed(path: Path) -> Path:
    return path.rename(path.with_name("2026-notes"))


def spoilt(name: str, content: bytes):
    def spoil(path: Path) -> Path:
        (path / name).write_bytes(content)
        return path

    return spoil


UNREADABLE = {
    "a folder named 2026-notes": (renamed, "its name does not begin with the time of a call"),
    "an empty delivery.jsonl": (spoilt("delivery.jsonl", b""), "does not say whom the call is for"),
    "a deeply nested delivery.jsonl": (spoilt("delivery.jsonl", DEEP), "nested too deeply"),
    "a deeply nested call-ended.json": (spoilt("call-ended.json", DEEP), "nested too deeply"),
    "a recording without a rate": (
        lambda path: spoilt(
            "delivery.jsonl", (path / "delivery.jsonl").read_bytes() + b'{"format":[0,0]}\n'
        )(path),
        r"the format \[0, 0\]",
    ),
}


@pytest.mark.anyio
@pytest.mark.parametrize("name", UNREADABLE)
async def test_what_cannot_be_read_is_named_and_passed_over(
    name, roark, calls_dir, capsys, monkeypatch
):
    spoil, why = UNREADABLE[name]
    await roark.stop()
    (first,) = await leave(calls_dir, roark.url, "first")
    await asyncio.sleep(0)
    await leave(calls_dir, roark.url, "second")
    await roark.start()
    first = spoil(first)
    before = {path.name for path in first.iterdir()}

    assert await asyncio.to_thread(main, ["calls"]) == 1
    output = capsys.readouterr()
    assert re.search(rf"{first.name}: cannot be read, passed over: .*{why}", output.err)
    assert output.out.splitlines()[-1] == f"1 call in {calls_dir}, 1 undelivered."
    assert " second" in output.out

    monkeypatch.setenv("ROARK_API_KEY", "k")
    monkeypatch.setenv("ROARK_BASE_URL", roark.url)
    assert await asyncio.to_thread(main, ["deliver"]) == 1
    output = capsys.readouterr()
    assert re.search(rf"{first.name}: cannot be read, passed over: .*{why}", output.err)
    assert roark.calls["second"].whole
    assert "first" not in roark.calls
    assert {path.name for path in first.iterdir()} == before

    assert await asyncio.to_thread(main, ["report"]) == 1
    output = capsys.readouterr()
    assert re.search(rf"{first.name}: cannot be read, passed over: .*{why}", output.err)
    assert len(list(calls_dir.glob("*-second-*/report.html"))) == 1


@pytest.mark.anyio
async def test_a_folder_that_cannot_be_read_does_not_hold_up_the_next_process(
    roark, calls_dir, log
):
    await roark.stop()
    (first,) = await leave(calls_dir, roark.url, "first")
    await leave(calls_dir, roark.url, "second")
    await roark.start()
    spoilt("delivery.jsonl", DEEP)(first)
    client = RoarkClient(api_key="k", base_url=roark.url)
    outbox = Outbox(calls_dir, client, leftovers_after_s=0.0)
    await roark.complete("second")
    await asyncio.to_thread(outbox.close)
    assert sum(f"{first.name} is passed over" in line for line in log) == 1


# A killed call


def leave_dead(
    calls_dir: Path, url: str, *moments: datetime, posts: dict[str, str] | None = None
) -> Folder:
    """A call whose process died after these moments of it."""
    path = calls_dir / folder_name(CALL, moments[0])
    folder = Folder(path, call_id=CALL, destination=url, posts=posts)
    folder.keep_started(json.dumps(call_started()).encode())
    call = {"call_id": CALL, "agent_id": "agent"}
    for event, moment in zip(("call", "started", "llm", "llm"), moments, strict=False):
        at = int(moment.timestamp() * 1e9)
        line = {"event": event, "at": at, "edge": "start", **(call if event == "call" else {})}
        folder.keep_events([json.dumps(line).encode() + b"\n"])
    folder.keep_chunk(0, sound(CALL, 0), RATE, 2)
    folder.lock.release()
    return folder


@pytest.mark.anyio
async def test_a_killed_call_ends_with_its_last_event_whatever_came_into_its_folder_later(
    roark, calls_dir
):
    began = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=2)
    folder = leave_dead(calls_dir, roark.url, began, began, began + timedelta(seconds=3))
    (folder.path / "report.html").write_text("a report, two hours later")
    with open(folder.path / "journal.jsonl", "ab") as journal:
        journal.write(b'{"event":"torn')
    await next_process(calls_dir, roark.url)
    ended = roark.calls[CALL].ended
    assert ended is not None
    assert datetime.fromisoformat(ended["callStartedAt"]) == began
    assert datetime.fromisoformat(ended["callEndedAt"]) == began + timedelta(seconds=3)
    record = json.loads((folder.path / "call.json").read_bytes())
    assert record["duration_ms"] == 3000


@pytest.mark.anyio
async def test_a_killed_call_does_not_end_before_it_began_when_the_clock_was_set_back(
    roark, calls_dir
):
    began = datetime.now(UTC).replace(microsecond=0)
    before = began - timedelta(hours=2)
    leave_dead(calls_dir, roark.url, began, began, before)
    await next_process(calls_dir, roark.url)
    ended = roark.calls[CALL].ended
    assert ended is not None
    assert ended["callStartedAt"] == ended["callEndedAt"]


@pytest.mark.anyio
async def test_a_call_killed_without_a_readable_journal_ends_when_its_folder_was_made(
    roark, calls_dir
):
    began = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=2)
    folder = leave_dead(calls_dir, roark.url, began, began)
    (folder.path / "journal.jsonl").write_bytes(b"torn")
    await next_process(calls_dir, roark.url)
    ended = roark.calls[CALL].ended
    assert ended is not None
    assert datetime.fromisoformat(ended["callEndedAt"]) == began


# A full disk, and nobody at Roark


@pytest.mark.slow
@pytest.mark.anyio
async def test_what_dies_with_a_process_on_a_full_disk_is_counted_and_not_claimed(roark, calls_dir):
    """RLIMIT_FSIZE is a disk on which lines still fit and chunks do not."""
    await roark.stop()
    process = await run_python(
        f"""
        import resource
        call = hold(outbox, chunks=2, ends=False)
        asyncio.run(call.flush(0.1))
        resource.setrlimit(resource.RLIMIT_FSIZE, ({CHUNK_BYTES // 2}, {CHUNK_BYTES // 2}))
        from roark.tests.test_outbox import call_ended, sound
        for index in range(2, 6):
            call.chunk(index, sound(call.call_id, index), 8000, 2)
        call.ended(call_ended(), {{"call": call.call_id}})
        from loguru import logger
        logger.remove()
        logger.add(sys.stdout, format="{{message}}", level="INFO")
        print(asyncio.run(call.flush(0.2)), flush=True)
        """,
        calls_dir,
        roark.url,
    )
    await said_by(process, "4 chunks of audio, 12800 B, are only in memory")
    await said_by(process, "Flushed(delivered=0, left=8, given_up=0)")
    await said_by(process, "4 chunks of audio, 12800 B, are lost")
    assert await process.wait() == 0

    await roark.start()
    await next_process(calls_dir, roark.url)
    received = roark.calls[CALL]
    assert received.recording == sound(CALL, 0) + sound(CALL, 1)
    assert received.ended is not None
    assert "recordingSampleRate" not in received.ended
    assert "endAudioOffsetMs" not in received.ended["transcript"][0]
    (path,) = call_folders(calls_dir)
    folder = Folder.load(path)
    assert (len(folder.lost), folder.steps_left) == (4, [])
    assert folder.recording_seconds == pytest.approx(0.6)
    assert len(folder.steps_given_up) == 4
