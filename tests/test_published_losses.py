"""What the published observer loses or gets wrong, and ours does not: one test per case.

Each test fails for the published package (it asserts so) and passes for ours, on the same call.
benchmarks/README.md has all cases, with the numbers; the ones that take a minute are only there.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loguru import logger
from pipecat.frames.frames import (
    BotStartedSpeakingFrame,
    BotStoppedSpeakingFrame,
    EndFrame,
    Frame,
    TranscriptionFrame,
    UserStartedSpeakingFrame,
    UserStoppedSpeakingFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.filters.identity_filter import IdentityFilter
from pipecat.workers.runner import WorkerRunner

pytest.importorskip(
    "pipecat_roark", reason="the dependency group bench, with the published package, is missing"
)
# These need the published package.
from rehearsal.callers.twilio import SAMPLE_RATE
from rehearsal.engines.scripted import Answer, Script
from rehearsal.providers.roark import ReceivedCall, RoarkReceiver

from benchmarks import markers
from benchmarks.calls import SECONDS, VOICE_HZ, caller, host, world
from benchmarks.faults import FAULTS, one_row
from benchmarks.subjects import OURS, PUBLISHED, subject

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

FAST_FAULTS = (
    "one 429 on call-ended",
    "PUT 500 for two chunks",
    "host is asyncio.run(bot()), aflush not awaited, call-ended outlasts the loop",
)
LOUD = 1000
"""Of 32767; the voice's peak is 12000."""


# benchmarks/markers.py has each by itself.
EVERYTHING = markers.Condition("all at once", call_started_s=3.0, busy_ms=30, lose_packets=True)


@pytest.mark.parametrize("name", FAST_FAULTS)
async def test_a_fault_costs_the_published_call_something_and_ours_nothing(name: str) -> None:
    (fault,) = (fault for fault in FAULTS if fault.name == name)
    row = await one_row(fault, observers=(OURS, PUBLISHED))
    assert row.lost[PUBLISHED].anything
    assert not row.lost[OURS].anything, str(row.lost[OURS])


async def test_a_killed_process_costs_no_more_than_five_seconds_of_audio() -> None:
    (fault,) = (fault for fault in FAULTS if fault.name == "SIGKILL")
    row = await one_row(fault, observers=(OURS, PUBLISHED))
    assert row.lost[PUBLISHED].events == ["call-ended"]
    ours = row.lost[OURS]
    assert not ours.events and not ours.turns and not ours.tools
    assert ours.seconds is not None and ours.seconds <= 5.0


@pytest.mark.slow(seconds=25)
@pytest.mark.timed
async def test_markers_are_on_the_audio_where_the_published_ones_are_not(tmp_path: Path) -> None:
    """The goals for a quiet machine, 100 ms and a length within 50 ms, are the benchmark's.

    On a busy one a sentence may have a hole, and an edge in it, to either observer.
    """
    async with world(tmp_path, markers.LONG_CALL) as around:
        of_call, _measured = await markers.one_call(around, "twilio", EVERYTHING)
    ours, theirs = of_call[OURS], of_call[PUBLISHED]
    assert np.median(np.abs(ours.errors)) <= 40
    assert np.percentile(np.abs(theirs.errors), 95) > 100
    assert np.percentile(np.abs(ours.errors), 95) < np.percentile(np.abs(theirs.errors), 95)
    assert abs(ours.length) <= 150


async def test_of_an_interrupted_sentence_only_what_was_heard_is_kept(tmp_path: Path) -> None:
    """The voice gives no word timestamps; the published transcript has all of it, or nothing."""
    answer = " ".join(f"number{number}" for number in range(40))
    script = Script(greeting="Hello.", hears=("Count, please.",), answers=(Answer(says=answer),))
    async with world(tmp_path, script) as around:
        question = b"".join(
            [piece.pcm async for piece in around.engine.speak("Count please", VOICE_HZ)]
        )
        async with host(around, plain_voice=True) as bot:
            line = caller(bot, "twilio")
            async with line:
                await line.hear(within=SECONDS)
                await line.hear_out(quiet=0.6, within=SECONDS)
                said = await line.say(question, VOICE_HZ)
                began = await line.hear(since=said.end, within=SECONDS)
                await asyncio.sleep(2.0)
                await line.say(question, VOICE_HZ)
                heard = samples_of(line.heard.pcm(), after=began.start - line.heard.start)
            await bot.measured()
        texts = {name: bot_text(around.received(name)) for name in around.receivers}
        spoken = [piece.pcm async for piece in around.engine.speak(answer, SAMPLE_RATE)]
    share = len(texts[OURS]) / len(answer)
    whole = samples_of(b"".join(spoken))
    assert texts[OURS] and answer.startswith(texts[OURS])
    assert abs(share - heard / whole) < 0.1
    assert texts[PUBLISHED] in ("", answer)


def samples_of(pcm: bytes, *, after: float = 0.0) -> int:
    """How many samples hold sound, `after` seconds; the holes of a busy process hold none."""
    loudness = np.abs(np.frombuffer(pcm, "<i2").astype(int))[round(after * SAMPLE_RATE) :]
    return int(np.count_nonzero(loudness > LOUD))


def bot_text(call: ReceivedCall) -> str:
    """What the bot is reported to have said after its greeting."""
    assert call.ended
    said = [t["content"] for t in call.ended["transcript"] if t["role"] == "assistant"]
    return " ".join(said[1:])


async def test_a_transcript_that_comes_late_joins_the_turn_it_belongs_to(tmp_path: Path) -> None:
    said = [
        UserStartedSpeakingFrame(),
        TranscriptionFrame("I would like", "caller", ""),
        UserStoppedSpeakingFrame(),
        BotStartedSpeakingFrame(),
        TranscriptionFrame("to pay.", "caller", ""),
        BotStoppedSpeakingFrame(),
    ]
    arrived = await report(said, tmp_path)
    turns = {
        name: [turn["content"] for turn in (call.ended or {})["transcript"]]
        for name, call in arrived.items()
    }
    assert turns[PUBLISHED] == ["I would like", "to pay."]
    assert turns[OURS] == ["I would like to pay."]


async def test_a_roark_that_fails_is_seen_in_the_bots_log(tmp_path: Path) -> None:
    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING", format="{name} {message}")
    try:
        await report([], tmp_path, status=401)
    finally:
        logger.remove(sink)
    assert not [line for line in lines if line.startswith("pipecat_roark")]
    assert any(line.startswith("roark") and "401" in line for line in lines)


async def report(said: Sequence[Frame], calls_dir: Path, **fault: Any) -> dict[str, ReceivedCall]:
    """Send frames through a pipeline that both observe; return what Roark has of either."""
    async with RoarkReceiver() as ours, RoarkReceiver() as theirs:
        receivers = {OURS: ours, PUBLISHED: theirs}
        if fault:
            for receiver in receivers.values():
                receiver.fail(**fault)
        subjects = [
            subject(OURS, url=ours.url, calls_dir=calls_dir),
            subject(PUBLISHED, url=theirs.url),
        ]
        recorders = [processor for each in subjects for processor in each.processors]
        worker = PipelineWorker(
            Pipeline([IdentityFilter(), *recorders]),
            params=PipelineParams(audio_out_sample_rate=8000),
            observers=[each.observer for each in subjects],
            enable_rtvi=False,
        )
        runner = WorkerRunner(handle_sigint=False)
        await runner.add_workers(worker)
        await worker.queue_frames([*said, EndFrame()])
        await asyncio.wait_for(runner.run(), SECONDS)
        for each in subjects:
            await asyncio.wait_for(each.observer.aflush(), SECONDS)
        return {
            name: next(iter(receiver.calls.values()), ReceivedCall(""))
            for name, receiver in receivers.items()
        }
