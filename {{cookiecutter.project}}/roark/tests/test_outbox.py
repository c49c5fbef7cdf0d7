"""What the outbox accepted is delivered, or still on disk in a form that will be."""

import asyncio
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from rehearsal.providers.roark import RoarkReceiver
from roark import folder as folders
from roark.client import ATTEMPT_SECONDS, Backoff, RoarkClient, warm_up
from roark.folder import Folder, Lock, call_folders, folder_name
from roark.outbox import Flushed, Outbox, outbox_for, outbox_from_environment

KEY = "rk_live_8d1f"
CALL = "SmallWebRTCConnection#0-5ee1"
RATE = 8000
CHUNK_BYTES = RATE * 4 // 10
PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def warm() -> None:
    """As a bot is before its first call: the first request does not wait for httpx."""
    warm_up()


@pytest.fixture(autouse=True)
def patience_with_a_busy_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where other tests keep the disk busy it does not hang."""
    monkeypatch.setattr("roark.outbox.HUNG_DISK_SECONDS", 30.0)


@pytest.fixture
def slept() -> list[float]:
    """The waits between attempts, in the order they were asked for; nothing really waits."""
    return []


@pytest.fixture
def calls_dir(tmp_path) -> Path:
    return tmp_path / "calls"


@pytest.fixture
def open_outbox(calls_dir, slept):
    """Makes outboxes on `calls_dir`, each as the one of a new process."""
    opened: list[Outbox] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await asyncio.sleep(0.001)

    def make(url: str | None, **settings: Any) -> Outbox:
        client = RoarkClient(api_key=KEY, base_url=url) if url else None
        settings = {
            "backoff": Backoff(jitter=lambda: 1.0),
            "sleep": sleep,
            "delivers_leftovers": False,
            "leftovers_after_s": 0.0,
            **settings,
        }
        outbox = Outbox(calls_dir, client, **settings)
        opened.append(outbox)
        return outbox

    yield make
    for outbox in opened:
        outbox.close()


def sound(call_id: str, index: int) -> bytes:
    """The audio of a chunk: different for every call and index."""
    seed = f"{call_id}/{index}/".encode()
    return (seed * (CHUNK_BYTES // len(seed) + 1))[:CHUNK_BYTES]


def call_started(call_id: str = CALL) -> dict[str, Any]:
    return {
        "event": "call-started",
        "pipecatCallId": call_id,
        "eventTimestamp": "2026-11-21T12:00:00+00:00",
        "agentId": "agent",
    }


def call_ended(call_id: str = CALL) -> dict[str, Any]:
    return {
        "event": "call-ended",
        "pipecatCallId": call_id,
        "eventTimestamp": "2026-11-21T12:00:09+00:00",
        "callStartedAt": "2026-11-21T12:00:00+00:00",
        "callEndedAt": "2026-11-21T12:00:09+00:00",
        "callEndedReason": "client-disconnected",
        "recordingSampleRate": RATE,
        "recordingNumChannels": 2,
        "transcript": [
            {
                "role": "user",
                "content": "Grüße",
                "timestamp": "2026-11-21T12:00:01+00:00",
                "endTimestamp": "2026-11-21T12:00:02+00:00",
                "audioOffsetMs": 1000,
                "endAudioOffsetMs": 2000,
            }
        ],
    }


def hold(outbox: Outbox, call_id: str = CALL, *, chunks: int = 4, ends: bool = True):
    """A call as the observer hands it over."""
    call = outbox.open(call_id)
    call.started(call_started(call_id))
    for index in range(chunks):
        call.journal({"event": "sound", "at": index})
        call.chunk(index, sound(call_id, index), RATE, 2)
    if ends:
        call.ended(call_ended(call_id), {"call": call_id})
    return call


def assert_whole(roark: RoarkReceiver, call_id: str = CALL, *, chunks: int = 4) -> None:
    received = roark.calls[call_id]
    assert received.started == call_started(call_id)
    assert received.ended == call_ended(call_id)
    assert received.chunks == {index: sound(call_id, index) for index in range(chunks)}
    assert received.requests[0].step == "call-started"
    assert received.requests[-1].step == "call-ended"


def audio_of(path: Path) -> bytes:
    with wave.open(str(path / "recording.wav")) as recording:
        assert recording.getparams()[:3] == (2, 2, RATE)
        return recording.readframes(recording.getnframes())


# A healthy Roark, and none


@pytest.mark.anyio
async def test_a_call_arrives_complete_and_in_order_with_each_request_sent_once(roark, open_outbox):
    call = hold(open_outbox(roark.url))
    assert await call.flush(10) == Flushed(delivered=6, left=0, given_up=0)
    assert_whole(roark)
    assert set(roark.calls[CALL].stored.values()) == {1}


@pytest.mark.anyio
async def test_without_a_key_the_call_is_kept_with_a_recording_to_play(open_outbox):
    call = hold(open_outbox(None))
    assert await call.flush(10) == Flushed(delivered=0, left=0, given_up=0)
    assert audio_of(call.path) == b"".join(sound(CALL, index) for index in range(4))
    assert json.loads((call.path / "call.json").read_bytes()) == {"call": CALL}
    kept = {path.name for path in call.path.iterdir()}
    assert kept == {
        "call-started.json",
        "journal.jsonl",
        "recording.wav",
        "call.json",
        "call-ended.json",
        "delivery.jsonl",
    }


@pytest.mark.anyio
async def test_after_delivery_the_record_stays_and_the_chunks_go(roark, open_outbox):
    call = hold(open_outbox(roark.url))
    await call.flush(10)
    assert audio_of(call.path) == roark.calls[CALL].recording
    assert not list(call.path.glob("*.pcm"))
    assert (call.path / "call.json").exists()


@pytest.mark.anyio
async def test_chunks_are_delivered_while_the_call_lasts(roark, open_outbox):
    hold(open_outbox(roark.url), ends=False)
    await roark.until(lambda: len(roark.call(CALL).chunks) == 4)
    assert roark.calls[CALL].ended is None


@pytest.mark.anyio
async def test_few_chunks_are_on_their_way_at_once(roark, open_outbox):
    roark.fail("put", slow_s=0.02)
    outbox = open_outbox(roark.url)
    calls = [hold(outbox, f"call {number}", chunks=6) for number in range(5)]
    await asyncio.gather(*(call.flush(10) for call in calls))
    assert all(roark.calls[call.call_id].whole for call in calls)
    assert 1 < roark.uploads_at_once <= 4


@pytest.mark.anyio
async def test_audio_that_comes_after_the_flush_still_belongs_to_the_call(roark, open_outbox):
    call = hold(open_outbox(roark.url), chunks=3)
    await call.flush(10)
    call.chunk(3, sound(CALL, 3), RATE, 2)
    assert await call.flush(10) == Flushed(delivered=6, left=0, given_up=0)
    assert roark.calls[CALL].chunks[3] == sound(CALL, 3)
    assert audio_of(call.path) == roark.calls[CALL].recording


@pytest.mark.anyio
async def test_chunks_that_come_out_of_order_are_recorded_in_order(roark, open_outbox):
    call = hold(open_outbox(roark.url), chunks=0, ends=False)
    for index in (1, 0, 3, 2):
        call.chunk(index, sound(CALL, index), RATE, 2)
    call.ended(call_ended(), {})
    await call.flush(10)
    assert_whole(roark)
    assert audio_of(call.path) == roark.calls[CALL].recording


# Faults and what becomes of the call. The waits are those of full jitter at its upper end.


@dataclass
class Case:
    """A fault of four chunks' delivery, and what the flush comes to."""

    fault: Callable[[RoarkReceiver], object]
    slept: list[Any] = field(default_factory=list)
    repeated: dict[str, int] = field(default_factory=dict)
    attempt_seconds: float = 10.0


def in_seconds(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


REPAIRED = {
    "429 once on call-ended": Case(
        lambda roark: roark.fail("call-ended", status=429, times=1), [0.5]
    ),
    "503 three times on call-started": Case(
        lambda roark: roark.fail("call-started", status=503, times=3), [0.5, 1, 2]
    ),
    "408 then 425": Case(
        lambda roark: (
            roark.fail("call-started", status=408, times=1),
            roark.fail("call-started", status=425, times=1),
        ),
        [0.5, 1],
    ),
    "500 seven times": Case(
        lambda roark: roark.fail("call-ended", status=500, times=7), [0.5, 1, 2, 4, 8, 8, 8]
    ),
    "Retry-After in seconds": Case(
        lambda roark: roark.fail("call-ended", status=429, times=1, retry_after=3), [3]
    ),
    "Retry-After as a date": Case(
        lambda roark: roark.fail("call-ended", status=503, times=1, retry_after=in_seconds(25)),
        [pytest.approx(20, abs=5)],
    ),
    "Retry-After of a day": Case(
        lambda roark: roark.fail("call-ended", status=429, times=1, retry_after=86400), [30]
    ),
    "429 on three upload URLs": Case(
        lambda roark: roark.fail("chunk-url", status=429, times=3, chunks={0}), [0.5, 1, 2]
    ),
    "500 twice on the PUT of two chunks": Case(
        lambda roark: (
            roark.fail("put", status=500, times=2, chunks={1}),
            roark.fail("put", status=500, times=2, chunks={2}),
        ),
        [0.5, 0.5, 1, 1],
    ),
    "an upload URL that has expired": Case(
        lambda roark: roark.fail("put", status=403, times=1, chunks={2}),
        [0.5],
        {"chunk-url 2": 2},
    ),
    "a cut in the middle of a chunk": Case(
        lambda roark: roark.fail("put", cut=True, times=2, chunks={0}),
        [0.5, 1],
    ),
    "an answer that is lost": Case(
        lambda roark: (
            roark.fail("call-started", cut=True, after_storing=True, times=1),
            roark.fail("call-ended", cut=True, after_storing=True, times=1),
        ),
        [0.5, 0.5],
        {"call-started": 2, "call-ended": 2},
    ),
    "a hang on each request once": Case(
        lambda roark: (
            roark.fail("call-started", hang=True, times=1),
            roark.fail("chunk-url", hang=True, times=1),
            roark.fail("put", hang=True, times=1),
            roark.fail("call-ended", hang=True, times=1),
        ),
        [0.5, 0.5, 0.5, 0.5],
        attempt_seconds=0.4,
    ),
    "everything slow": Case(lambda roark: roark.fail(slow_s=0.05)),
}


@pytest.mark.anyio
@pytest.mark.parametrize("name", REPAIRED)
async def test_a_fault_that_passes_costs_nothing(name, roark, open_outbox, slept, monkeypatch):
    case = REPAIRED[name]
    monkeypatch.setattr("roark.client.ATTEMPT_SECONDS", case.attempt_seconds)
    case.fault(roark)
    call = hold(open_outbox(roark.url))
    assert await call.flush(10) == Flushed(delivered=6, left=0, given_up=0)
    assert sorted(slept) == case.slept
    assert_whole(roark)
    stored = roark.calls[CALL].stored
    assert {step: times for step, times in stored.items() if times > 1} == case.repeated


REFUSED = {
    "call-started": (
        lambda roark: roark.fail("call-started", status=400),
        1,
        "call-started is given up: 400",
    ),
    "one upload URL": (
        lambda roark: roark.fail("chunk-url", status=413, chunks={2}),
        1,
        "audio is given up: 413",
    ),
    "one PUT": (
        lambda roark: roark.fail("put", status=400, chunks={0}),
        1,
        "audio is given up: 400",
    ),
    "every URL of one chunk": (
        lambda roark: roark.fail("put", status=403, chunks={3}),
        1,
        "audio is given up: 403",
    ),
    "all audio": (
        lambda roark: roark.fail("chunk-url", status=422),
        4,
        "audio is given up: 422",
    ),
    "call-ended": (
        lambda roark: roark.fail("call-ended", status=413),
        1,
        "call-ended is given up: 413",
    ),
}


@pytest.mark.anyio
@pytest.mark.parametrize("name", REFUSED)
async def test_a_final_refusal_is_said_once_and_the_rest_goes_on(name, roark, open_outbox, log):
    fault, given_up, said = REFUSED[name]
    fault(roark)
    call = hold(open_outbox(roark.url))
    assert await call.flush(10) == Flushed(delivered=6 - given_up, left=0, given_up=given_up)
    assert sum(said in line for line in log) == 1
    assert audio_of(call.path) == b"".join(sound(CALL, index) for index in range(4))


@pytest.mark.anyio
async def test_after_a_hole_nothing_is_said_of_a_recording(roark, open_outbox):
    """Roark joins what it has: behind a hole every marker would point at the wrong sound."""
    roark.fail("put", status=400, chunks={1})
    await hold(open_outbox(roark.url)).flush(10)
    ended = roark.calls[CALL].ended
    assert ended is not None
    assert not {"recordingSampleRate", "recordingNumChannels"} & ended.keys()
    assert not {"audioOffsetMs", "endAudioOffsetMs"} & ended["transcript"][0].keys()
    assert ended["transcript"][0]["content"] == "Grüße"


@pytest.mark.anyio
async def test_repeats_are_byte_identical_under_one_key_and_each_new_url_has_its_own(
    roark, open_outbox
):
    roark.fail(status=500, times=3)
    roark.fail("put", status=403, times=2, chunks={0})
    roark.fail("call-ended", status=500, times=2)
    await hold(open_outbox(roark.url)).flush(10)
    bodies: dict[tuple[str, int | None], set[bytes]] = {}
    keys: dict[tuple[str, int | None], list[str | None]] = {}
    for request in roark.requests:
        bodies.setdefault((request.step, request.chunk), set()).add(request.body)
        keys.setdefault((request.step, request.chunk), []).append(request.idempotency_key)
    assert all(len(same) == 1 for same in bodies.values())
    assert len(set(keys["call-ended", None])) == 1 < len(keys["call-ended", None])
    assert None not in keys["call-ended", None]
    assert len(set(keys["chunk-url", 0])) == 3
    assert set(keys["put", 0]) == {None}


@pytest.mark.anyio
async def test_another_process_repeats_a_request_under_the_same_key(roark, open_outbox):
    roark.fail("call-ended", cut=True, after_storing=True)
    first = open_outbox(roark.url)
    hold(first)
    await roark.until(lambda: any(sent.step == "call-ended" for sent in roark.requests))
    first.close()
    roark.heal()
    open_outbox(roark.url, delivers_leftovers=True)
    await roark.until(lambda: roark.requests[-1].status == 200)
    await roark.complete(CALL)
    repeats = [request for request in roark.requests if request.step == "call-ended"]
    assert len(repeats) > 1
    assert len({(request.idempotency_key, request.body) for request in repeats}) == 1


@pytest.mark.anyio
async def test_neither_key_nor_signed_url_is_ever_logged(roark, open_outbox, log, monkeypatch):
    monkeypatch.setattr("roark.client.ATTEMPT_SECONDS", 0.1)
    roark.fail("put", status=403, chunks={0})
    roark.fail("put", hang=True, times=1)
    roark.fail("call-ended", status=401)
    await hold(open_outbox(roark.url)).flush(5)
    await roark.stop()
    await hold(open_outbox(roark.url), "another").flush(0.1)
    assert log
    assert not [line for line in log if KEY in line or "Signature" in line or "storage/" in line]


@pytest.mark.anyio
async def test_a_refused_key_is_tried_once_and_the_call_waits_for_the_right_one(
    calls_dir, open_outbox, log
):
    async with RoarkReceiver(api_key="the right one") as roark:
        call = hold(open_outbox(roark.url))
        assert await call.flush(10) == Flushed(delivered=0, left=6, given_up=0)
        assert len(roark.requests) == 1
        await hold(open_outbox(roark.url), "another").flush(10)
        assert sum("turned away: 401" in line for line in log) == 2  # once per outbox
        right = Outbox(
            calls_dir, RoarkClient(api_key="the right one", base_url=roark.url), leftovers_after_s=0
        )
        await roark.complete(CALL)
        await roark.complete("another")
        right.close()


# The deadline, and what is left at it


@pytest.mark.anyio
@pytest.mark.parametrize(
    "fault",
    [
        lambda roark: roark.fail(hang=True),
        lambda roark: roark.fail("call-ended", hang=True),
        lambda roark: roark.fail("put", status=500, chunks={3}),
        lambda roark: roark.fail(slow_s=1.0),
    ],
    ids=["all hang", "call-ended hangs", "one chunk fails", "all slow"],
)
async def test_the_flush_ends_at_its_deadline_and_the_next_process_delivers_the_rest(
    fault, roark, open_outbox
):
    fault(roark)
    first = open_outbox(roark.url)
    call = hold(first)
    began = time.monotonic()
    flushed = await call.flush(0.4)
    assert time.monotonic() - began < ATTEMPT_SECONDS
    assert flushed.left > 0
    assert flushed.delivered + flushed.left == 6
    first.close()
    roark.heal()
    open_outbox(roark.url, delivers_leftovers=True)
    await roark.complete(CALL)
    assert_whole(roark)


@pytest.mark.anyio
async def test_the_same_process_goes_on_once_roark_is_back(roark, open_outbox):
    await roark.stop()
    call = hold(open_outbox(roark.url, delivers_leftovers=True))
    assert (await call.flush(0.2)).left == 6
    await roark.start()
    await roark.complete(CALL)
    assert_whole(roark)


@pytest.mark.anyio
async def test_what_is_left_at_the_deadline_is_free_for_another_process(roark, open_outbox):
    await roark.stop()
    first = open_outbox(roark.url)
    assert (await hold(first).flush(0.1)).left == 6
    await until(lambda: not any(Lock(path).is_taken for path in call_folders(first.directory)))
    await roark.start()
    second = open_outbox(roark.url)
    await asyncio.wrap_future(second.deliver_leftovers(lambda *_: None))
    assert_whole(roark)


@pytest.mark.anyio
async def test_call_ended_waits_for_a_chunk_that_cannot_be_delivered_now(roark, open_outbox):
    roark.fail("put", status=500, chunks={1})
    first = open_outbox(roark.url)
    await hold(first).flush(0.3)
    assert roark.calls[CALL].ended is None
    assert sorted(roark.calls[CALL].chunks) == [0, 2, 3]
    first.close()
    roark.heal()
    open_outbox(roark.url, delivers_leftovers=True)
    await roark.complete(CALL)
    assert_whole(roark)


@pytest.mark.anyio
async def test_a_call_goes_only_to_the_roark_it_was_meant_for(roark, open_outbox):
    async with RoarkReceiver() as rehearsed:
        await rehearsed.stop()
        await hold(open_outbox(rehearsed.url)).flush(0.1)
        real = open_outbox(roark.url, delivers_leftovers=True)
        await hold(real, "another").flush(10)
        real.close()
        assert CALL not in roark.calls


@pytest.mark.anyio
async def test_a_call_that_was_kept_without_a_key_is_not_sent_when_there_is_one(roark, open_outbox):
    await hold(open_outbox(None)).flush(10)
    later = open_outbox(roark.url, delivers_leftovers=True)
    await hold(later, "another").flush(10)
    later.close()
    assert set(roark.calls) == {"another"}


@pytest.mark.anyio
async def test_what_is_left_does_not_hold_up_a_live_call(roark, open_outbox):
    roark.fail("put", status=500)
    first = open_outbox(roark.url)
    calls = [hold(first, f"left {number}", chunks=6) for number in range(10)]
    await asyncio.gather(*(call.flush(0.5) for call in calls))
    first.close()
    roark.heal()
    roark.fail("put", slow_s=0.2, chunks=set(range(1, 6)))
    second = open_outbox(roark.url, delivers_leftovers=True)
    await roark.until(lambda: any(r.step == "put" and r.stored for r in roark.requests))
    await hold(second, "live", chunks=1).flush(30)
    assert roark.calls["live"].whole
    # All that is left takes 5 s.
    assert sum(call.whole for call in roark.calls.values()) < len(calls) / 2


# Loops, cancellation, and the end of the process


def test_a_call_is_delivered_when_its_loop_ends_right_after_the_flush(open_outbox):
    """`asyncio.run(bot())` hosts; several loops one after the other use one outbox."""
    received: list[bool] = []

    async def call_in_a_loop(number: int) -> None:
        async with RoarkReceiver() as roark:
            await hold(open_outbox(roark.url), f"call {number}").flush(10)
            received.append(roark.calls[f"call {number}"].whole)

    for number in range(3):
        asyncio.run(call_in_a_loop(number))
    assert received == [True, True, True]


@pytest.mark.anyio
async def test_a_cancelled_flush_lets_go_at_once_and_the_delivery_goes_on(roark, open_outbox):
    may_answer = asyncio.Event()
    roark.fail("call-started", held=may_answer)
    call = hold(open_outbox(roark.url))
    flush = asyncio.create_task(call.flush(10))
    await asyncio.sleep(0.05)
    flush.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(30):
            await flush
    may_answer.set()
    await roark.complete(CALL)
    assert (await call.flush(10)).left == 0


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_process_that_exits_in_a_cancelled_flush_waits_for_the_delivery(roark, calls_dir):
    roark.fail("call-started", slow_s=0.3)
    process = await run_python(
        """
        async def main():
            call = hold(outbox)
            flush = asyncio.create_task(call.flush(10))
            await asyncio.sleep(0.05)
            flush.cancel()
            await asyncio.gather(flush, return_exceptions=True)
        asyncio.run(main())
        """,
        calls_dir,
        roark.url,
    )
    assert await process.wait() == 0
    assert roark.calls[CALL].whole


@pytest.mark.anyio
async def test_handing_over_does_not_wait_for_the_disk(roark, open_outbox, monkeypatch):
    real_fsync, disk_answers = os.fsync, threading.Event()

    def hanging_fsync(file: int) -> None:
        disk_answers.wait(10)
        real_fsync(file)

    monkeypatch.setattr(os, "fsync", hanging_fsync)
    monkeypatch.setattr("roark.outbox.HUNG_DISK_SECONDS", 0.1)
    call = hold(open_outbox(roark.url))
    assert not disk_answers.is_set()
    assert (await call.flush(0.1)).delivered == 0
    disk_answers.set()
    assert (await call.flush(10)).left == 0


@pytest.mark.anyio
async def test_a_call_costs_its_own_thread_next_to_nothing_at_its_start(roark, open_outbox):
    """CPU time, since that is what a busy event loop notices; a TLS context alone takes 20 ms."""
    began = time.thread_time()
    call = open_outbox(roark.url).open(CALL)
    call.started(call_started())
    assert time.thread_time() - began < 0.01


@pytest.mark.anyio
async def test_what_cannot_be_written_as_json_does_not_raise(roark, open_outbox):
    call = hold(open_outbox(roark.url), ends=False)
    call.journal({"event": object(), "text": "\ud800"})
    call.ended(call_ended(), {"when": datetime.now(UTC), "text": "\ud800"})
    assert (await call.flush(10)).left == 0


# A process that dies


def died(events: list[dict[str, Any]], at: int) -> tuple[dict, dict, dict]:
    """The reconstruction these tests look at: the reason, and how many events there were."""
    ended = {**call_ended(), "callEndedReason": "process-died"}
    return call_started(), ended, {"events": len(events), "at": at}


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_killed_process_leaves_a_call_that_the_next_one_closes_and_delivers(
    roark, calls_dir, open_outbox
):
    roark.fail("put", status=500)
    process = await run_python(
        """
        call = hold(outbox, ends=False)
        while len(list(call.path.glob("*.pcm"))) < 4: time.sleep(0.01)
        print("kept", flush=True)
        time.sleep(60)
        """,
        calls_dir,
        roark.url,
    )
    await said_by(process, "kept")
    process.kill()
    await process.wait()
    (path,) = call_folders(calls_dir)
    with open(path / "journal.jsonl", "ab") as journal:
        journal.write(b'{"event":"torn')
    with open(path / "recording.wav", "ab") as recording:
        recording.write(b"torn")
    roark.heal()
    open_outbox(roark.url, delivers_leftovers=True, reconstruct=died)
    received = await roark.complete(CALL)
    assert received.ended is not None
    assert received.ended["callEndedReason"] == "process-died"
    assert received.recording == b"".join(sound(CALL, index) for index in range(4))
    record = json.loads((path / "call.json").read_bytes())
    assert record["events"] == 4
    assert abs(record["at"] / 1e9 - time.time()) < 30


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_call_killed_before_it_said_anything_is_closed_too(roark, calls_dir, open_outbox):
    process = await run_python(
        """
        call = outbox.open("silent")
        while not (call.path / "delivery.jsonl").exists(): time.sleep(0.01)
        call.journal({"event": "call", "at": 1, "call_id": "silent", "agent_id": "agent"})
        journal = call.path / "journal.jsonl"
        while not (journal.exists() and journal.stat().st_size): time.sleep(0.01)
        print("kept", flush=True)
        time.sleep(60)
        """,
        calls_dir,
        roark.url,
    )
    await said_by(process, "kept")
    process.kill()
    await process.wait()
    open_outbox(roark.url, delivers_leftovers=True)
    received = await roark.complete("silent")
    assert received.ended is not None
    assert received.ended["callEndedReason"] == "process-died"


@pytest.mark.anyio
async def test_a_call_that_said_nothing_before_its_process_died_leaves_nothing(
    roark, calls_dir, open_outbox
):
    folder = Folder(
        calls_dir / folder_name("a", datetime.now(UTC)), call_id="a", destination=roark.url
    )
    folder.create()
    folder.lock.release()
    outbox = open_outbox(roark.url)
    await asyncio.wrap_future(outbox.deliver_leftovers(lambda *_: None))
    assert call_folders(calls_dir) == []
    assert roark.calls == {}


@pytest.mark.anyio
async def test_a_journal_that_cannot_be_replayed_still_ends_the_call(
    roark, calls_dir, open_outbox, log
):
    def fails(events: list[dict[str, Any]], at: int) -> tuple[dict, dict, dict]:
        raise KeyError("what the caller said")

    leave_dead(calls_dir, roark.url)
    open_outbox(roark.url, delivers_leftovers=True, reconstruct=fails)
    received = await roark.complete(CALL)
    assert received.ended is not None
    assert received.ended["callEndedReason"] == "process-died"
    assert received.ended["recordingSampleRate"] == RATE
    assert not [line for line in log if "what the caller said" in line]


@pytest.mark.anyio
async def test_a_recording_that_was_cut_short_in_an_append_is_made_right(calls_dir, open_outbox):
    path = leave_dead(calls_dir, None)
    with open(path / "delivery.jsonl", "r+b") as delivery:
        facts = [line for line in delivery if b'"recorded":1' not in line]
        delivery.seek(0)
        delivery.truncate()
        delivery.writelines([*facts, b'{"recorded":'])
    with open(path / "recording.wav", "r+b") as recording:
        recording.truncate(44 + CHUNK_BYTES)
        recording.seek(0, os.SEEK_END)
        recording.write(b"torn" * CHUNK_BYTES)
    (path / "chunk-00001.pcm").write_bytes(sound(CALL, 1))
    outbox = open_outbox(None, reconstruct=died)
    await asyncio.wrap_future(outbox.deliver_leftovers(lambda *_: None))
    assert audio_of(path) == sound(CALL, 0) + sound(CALL, 1)
    assert (path / "recording.wav").stat().st_size == 44 + 2 * CHUNK_BYTES
    assert Folder.load(path).recording_seconds == pytest.approx(0.2)
    assert json.loads((path / "call.json").read_bytes())["events"] == 2


@pytest.mark.anyio
async def test_a_power_cut_may_leave_the_log_ahead_of_the_recording(calls_dir, open_outbox):
    path = leave_dead(calls_dir, None)
    with open(path / "recording.wav", "r+b") as recording:
        recording.truncate(44 + CHUNK_BYTES)
    (path / "chunk-00001.pcm").write_bytes(sound(CALL, 1))
    outbox = open_outbox(None, reconstruct=died)
    await asyncio.wrap_future(outbox.deliver_leftovers(lambda *_: None))
    assert audio_of(path) == sound(CALL, 0) + sound(CALL, 1)


def leave_dead(calls_dir: Path, url: str | None) -> Path:
    """A call of two chunks whose process died, as it lies on disk."""
    folder = Folder(calls_dir / folder_name(CALL, datetime.now(UTC)), call_id=CALL, destination=url)
    folder.keep_started(json.dumps(call_started()).encode())
    for index in range(2):
        folder.keep_events([b'{"event":"sound"}\n'])
        folder.keep_chunk(index, sound(CALL, index), RATE, 2)
    folder.lock.release()
    return folder.path


@pytest.mark.anyio
async def test_events_that_come_together_share_one_write_and_each_is_behind_what_it_is_about(
    open_outbox, monkeypatch
):
    """What a burst of words costs the disk; a chunk's event still comes when its audio is there."""
    written: list[int] = []
    append = folders.append_whole

    def counted(file: int, lines: bytes) -> None:
        written.append(lines.count(b"\n"))
        append(file, lines)

    outbox = open_outbox(None)
    call, other = outbox.open(CALL), outbox.open("another")
    await other.flush(10)
    monkeypatch.setattr(folders, "append_whole", counted)
    is_busy = threading.Event()
    outbox.hand_over(other._folder, is_busy.wait)
    for at in range(50):
        call.journal({"event": "words", "at": at})
    call.chunk(0, sound(CALL, 0), RATE, 2)
    call.journal({"event": "chunk", "at": 50})
    other.journal({"event": "words", "at": 0})
    call.journal({"event": "words", "at": 51})
    is_busy.set()
    await asyncio.gather(call.flush(10), other.flush(10))
    # Beside the journal's there are the lines of the delivery log, one by one.
    assert [count for count in written if count > 1] == [50]
    assert [event["at"] for event in Folder.load(call.path).journal()] == list(range(52))
    assert len(Folder.load(other.path).journal()) == 1


# One folder, two processes


@pytest.mark.slow
@pytest.mark.anyio
async def test_two_processes_on_one_folder_do_not_send_twice(roark, calls_dir, open_outbox):
    await roark.stop()
    first = open_outbox(roark.url)
    calls = [hold(first, f"call {number}") for number in range(3)]
    await asyncio.gather(*(call.flush(0.1) for call in calls))
    first.close()
    await roark.start()
    roark.fail(slow_s=0.05)
    script = "outbox.deliver_leftovers(lambda *_: None).result()"
    processes = [await run_python(script, calls_dir, roark.url) for _ in range(2)]
    assert [await process.wait() for process in processes] == [0, 0]
    open_outbox(roark.url, delivers_leftovers=True)
    for call in calls:
        received = await roark.complete(call.call_id)
        assert set(received.stored.values()) == {1}


@pytest.mark.anyio
async def test_a_live_call_is_left_alone_by_other_processes(roark, open_outbox):
    roark.fail("call-started", status=500)
    call = hold(open_outbox(roark.url), ends=False)
    await roark.until(lambda: len(roark.requests) > 0)
    other = open_outbox(roark.url, reconstruct=died)
    seen: list[Flushed | None] = []
    await asyncio.wrap_future(other.deliver_leftovers(lambda _, flushed: seen.append(flushed)))
    assert seen == [None]
    roark.heal()
    call.ended(call_ended(), {})
    await call.flush(10)
    assert_whole(roark)


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    folder = tmp_path / "20261121T120000-call"
    script = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[2]);"
        "from folder import Lock; print(Lock(Path(sys.argv[1])).acquire(), flush=True);"
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder), str(PROJECT / "roark")],
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert "True" in holder.stdout.readline()
        assert Lock(folder).acquire() is False
        holder.send_signal(signal.SIGKILL)
    assert Lock(folder).acquire() is True


# Names


@pytest.mark.parametrize(
    "call_id",
    [
        CALL,
        "../../etc/passwd",
        "C:\\nul",
        "a" * 500,
        "",
        "..",
        "\0",
        "Grüße",
        "con",
        "a/b",
        "-rf",
    ],
)
def test_any_call_id_makes_a_safe_readable_name(call_id, tmp_path):
    name = folder_name(call_id, datetime(2026, 11, 21, 12, 0, 5, tzinfo=UTC))
    assert re.fullmatch(r"20261121T120005-[A-Za-z0-9-]{1,48}-[0-9a-f]{8}", name)
    assert (tmp_path / name).parent == tmp_path


def test_names_differ_for_ids_that_read_the_same():
    at = datetime.now(UTC)
    assert folder_name("a#1", at) != folder_name("a/1", at) != folder_name("a#1", at)


# A disk that does not take it


@pytest.mark.anyio
async def test_with_no_place_to_write_calls_are_delivered_from_memory_and_it_is_said_once(
    roark, calls_dir, open_outbox, log
):
    calls_dir.write_text("a file where the directory should be")
    outbox = open_outbox(roark.url)
    for number in range(2):
        call = hold(outbox, f"call {number}")
        assert await call.flush(10) == Flushed(delivered=6, left=0, given_up=0)
        assert_whole(roark, f"call {number}")
    assert sum("cannot write to" in line for line in log) == 1


@pytest.mark.anyio
async def test_a_disk_that_recovers_gets_the_whole_call(roark, calls_dir, open_outbox):
    calls_dir.write_text("in the way")
    await roark.stop()
    first = open_outbox(roark.url)
    call = hold(first, ends=False)
    assert (await call.flush(0.1)).left == 5
    calls_dir.unlink()
    call.ended(call_ended(), {"call": CALL})
    assert (await call.flush(0.1)).left == 6
    assert audio_of(call.path) == b"".join(sound(CALL, index) for index in range(4))
    assert len(Folder.load(call.path).journal()) == 4
    first.close()
    await roark.start()
    open_outbox(roark.url, delivers_leftovers=True)
    await roark.complete(CALL)
    assert_whole(roark)


def test_a_line_that_does_not_fit_the_disk_does_not_spoil_the_next_one(tmp_path):
    folder = Folder(tmp_path / "20261121T120000-call", call_id=CALL)
    folder.create()
    lines = [json.dumps({"event": "words", "text": "x" * 600, "at": at}) for at in range(3)]
    folder.keep_events([f"{lines[0]}\n".encode()])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        folder.keep_events([f"{lines[1]}\n".encode()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert folder.disk_error is not None
    assert (folder.path / "journal.jsonl").read_text() == f"{lines[0]}\n"
    folder.keep_events([f"{lines[2]}\n".encode()])
    assert [event["at"] for event in folder.journal()] == [0, 1, 2]
    folder.release()


@pytest.mark.slow
@pytest.mark.anyio
async def test_files_that_the_system_does_not_let_grow_do_not_cost_the_call(roark, calls_dir):
    """RLIMIT_FSIZE is a full disk that only this process sees."""
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({CHUNK_BYTES // 2}, {CHUNK_BYTES // 2}))"
    process = await run_python(
        f"""
        import resource
        {limit}
        call = hold(outbox)
        print(asyncio.run(call.flush(10)), flush=True)
        """,
        calls_dir,
        roark.url,
    )
    await said_by(process, "Flushed(delivered=6, left=0, given_up=0)")
    assert await process.wait() == 0
    assert_whole(roark)


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
    ).returncode
    != 0,
    reason="a small disk cannot be mounted here",
)
async def test_a_full_disk_does_not_cost_the_call(roark, calls_dir):
    calls_dir.mkdir()
    process = await run_python(
        """
        import subprocess
        mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(outbox.directory)]
        subprocess.run(mount, check=True)
        call = hold(outbox, chunks=40)
        print(asyncio.run(call.flush(10)), flush=True)
        print(sorted(path.name for path in call.path.iterdir()), flush=True)
        """,
        calls_dir,
        roark.url,
        prefix=["unshare", "-rm"],
    )
    await said_by(process, "Flushed(delivered=42, left=0, given_up=0)")
    assert await process.wait() == 0
    assert_whole(roark, chunks=40)


@pytest.mark.anyio
async def test_memory_is_bounded_and_what_does_not_fit_is_said_and_counted(
    roark, calls_dir, open_outbox, log
):
    calls_dir.write_text("in the way")
    await roark.stop()
    outbox = open_outbox(roark.url, memory_bytes=3 * CHUNK_BYTES + 1000)
    call = hold(outbox, chunks=6)
    assert await call.flush(0.2) == Flushed(delivered=0, left=5, given_up=3)
    assert sum("audio is being dropped" in line for line in log) == 1
    await roark.start()
    assert await call.flush(10) == Flushed(delivered=5, left=0, given_up=3)
    assert sorted(roark.calls[CALL].chunks) == [0, 1, 2]
    assert "recordingSampleRate" not in (roark.calls[CALL].ended or {})
    # What was delivered has made room again.
    assert await hold(outbox, "next", chunks=3).flush(10) == Flushed(5, 0, 0)


@pytest.mark.anyio
async def test_the_disk_is_bounded_and_delivered_calls_go_first(roark, calls_dir, open_outbox, log):
    outbox = open_outbox(roark.url)
    await roark.stop()
    left = hold(outbox, "left").path
    await asyncio.sleep(0)
    await hold(outbox, "warm up", chunks=0).flush(0.1)
    outbox.close()
    await roark.start()
    outbox = open_outbox(roark.url)
    delivered = [hold(outbox, f"delivered {number}") for number in range(2)]
    for call in delivered:
        await call.flush(10)
    outbox.close()
    # Older than all, yet not the first to go.
    older = left.with_name("20200101" + left.name[8:])
    left.rename(older)
    await roark.stop()
    size = sum(file.stat().st_size for file in older.iterdir())
    open_outbox(roark.url, delivers_leftovers=True, disk_bytes=2 * size)
    await until(lambda: not all(call.path.exists() for call in delivered))
    assert older.exists()
    assert not any("removed before it was delivered" in line for line in log)
    open_outbox(roark.url, delivers_leftovers=True, disk_bytes=0)
    await until(lambda: any("removed before it was delivered" in line for line in log))


@pytest.mark.anyio
async def test_old_calls_go_when_they_are_delivered(roark, open_outbox, calls_dir):
    outbox = open_outbox(roark.url)
    call = hold(outbox)
    await call.flush(10)
    await roark.stop()
    other = hold(outbox, "left")
    await other.flush(0.1)
    outbox.close()
    long_ago = time.time() - 40 * 86400
    for folder in (call.path, other.path):
        for path in [*folder.iterdir(), folder]:
            os.utime(path, (long_ago, long_ago))
    open_outbox(roark.url, delivers_leftovers=True, disk_days=30)
    await until(lambda: not call.path.exists())
    assert other.path.exists()


@pytest.mark.anyio
async def test_nothing_but_calls_is_ever_removed(roark, open_outbox, calls_dir):
    mine = calls_dir / "2026 notes"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    outbox = open_outbox(roark.url)
    call = hold(outbox)
    await call.flush(10)
    outbox.close()
    open_outbox(roark.url, delivers_leftovers=True, disk_bytes=0)
    await until(lambda: not call.path.exists())
    assert (mine / "notes.txt").exists()


# One outbox per process and directory


def test_the_outbox_of_a_directory_is_shared(tmp_path):
    kept = outbox_for(tmp_path, api_key="  ")
    assert kept is outbox_for(tmp_path)
    assert kept.client is None
    sent = outbox_for(tmp_path, api_key=KEY)
    assert sent is not kept
    assert sent.client is not None
    assert sent.client.base_url == "https://api.roark.ai"
    kept.close()
    sent.close()


@pytest.mark.anyio
async def test_a_server_that_starts_delivers_what_is_left_before_its_first_call(
    roark, calls_dir, monkeypatch
):
    leave_dead(calls_dir, roark.url)
    monkeypatch.setenv("CALLS_DIR", str(calls_dir))
    monkeypatch.setenv("ROARK_API_KEY", KEY)
    monkeypatch.setenv("ROARK_BASE_URL", roark.url)
    outbox = outbox_from_environment()
    assert outbox is outbox_for(calls_dir, api_key=KEY, base_url=roark.url)
    await roark.complete(CALL)
    outbox.close()


def test_blank_and_wrong_bounds_fall_back(tmp_path, monkeypatch, log):
    monkeypatch.setenv("CALLS_MAX_MB", " ")
    monkeypatch.setenv("CALLS_MAX_DAYS", "many")
    outbox_for(tmp_path).close()
    monkeypatch.setenv("CALLS_MAX_DAYS", "-5")
    outbox_for(tmp_path / "other").close()
    said = "CALLS_MAX_DAYS is not a number of 0 or more; 30 is used"
    assert sum(said in line for line in log) == 2


# Processes

CHILD = """
import asyncio, sys, time
from pathlib import Path
sys.path.insert(0, {project!r})
from roark.client import RoarkClient, warm_up
from roark.outbox import Outbox
from roark.tests.test_outbox import hold
warm_up()
outbox = Outbox(
    Path({calls_dir!r}),
    RoarkClient(api_key="rk_live_8d1f", base_url={url!r}),
    delivers_leftovers=False,
)
"""


async def run_python(
    script: str, calls_dir: Path, url: str, *, prefix: list[str] | None = None
) -> asyncio.subprocess.Process:
    """A process with `outbox` and `hold`, that runs a script."""
    lines = script.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    program = CHILD.format(project=str(PROJECT), calls_dir=str(calls_dir), url=url) + "\n".join(
        line[indent:] for line in lines
    )
    return await asyncio.create_subprocess_exec(
        *(prefix or []), sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE
    )


async def said_by(process: asyncio.subprocess.Process, text: str) -> None:
    """Waits for a line of a process."""
    assert process.stdout is not None
    async with asyncio.timeout(60):
        while text not in (line := (await process.stdout.readline()).decode()):
            assert line, f"the process ended without saying {text!r}"


async def until(condition: Callable[[], bool]) -> None:
    """Waits for something on disk or in the log, which nobody tells of."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)
