"""How far the turns' markers are from the audio they mark, on the same calls.

The truth is what Roark stitches together: where, in the delivered recording, each speaker's sound
begins and ends. Both observers are attached to the same call, each with its own recorder and its
own receiver, and each is held against its own recording.
"""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rehearsal.callers.caller import Caller
from rehearsal.engines.scripted import Answer, Script
from rehearsal.providers.roark import ReceivedCall

from benchmarks.calls import World, caller, host, talk, world
from benchmarks.host import Measured
from benchmarks.subjects import OURS, PUBLISHED

WINDOW_SECONDS = 0.005
LOUD_RMS = 300.0
"""Well over both codecs' silence, and reached within a word's first 10 ms."""
PAUSE_SECONDS = 0.35
"""Silence that ends an utterance: more than lies between words, or than 100 ms of loss make."""

QUESTIONS = (
    "What do I owe you?",
    "And until when do I have to pay that?",
    "Fine.",
    "Can I pay it in two parts, one now and the other one in spring?",
    "Thank you very much.",
)
ANSWERS = (
    "It is twelve fifty.",
    "You have got until the end of the month.",
    "Is there anything else?",
    "Yes, that can be done. I will send you a letter about it.",
    "You are welcome.",
)
LONG_CALL = Script(
    greeting="Hello there, this is the office.",
    hears=QUESTIONS,
    answers=tuple(Answer(says=answer) for answer in ANSWERS),
)


@dataclass(frozen=True)
class Condition:
    """What makes the calls hard."""

    name: str
    call_started_s: float = 0.0
    busy_ms: int = 0
    lose_packets: bool = False


CONDITIONS = (
    Condition("healthy"),
    Condition("call-started takes 3 s", call_started_s=3.0),
    Condition("event loop blocked 30 of every 100 ms", busy_ms=30),
    Condition("caller loses 100 ms of every second", lose_packets=True),
)


@dataclass
class Markers:
    """One observer's errors in one call, ms.

    Parameters:
        errors: One per marker: marker minus audio.
        missing: Turns without a counterpart in the audio or in the transcript.
        length: The recording's length minus the call's.
        drift: How far the caller's utterances shift against one another between the caller's own
            clock and the recording.
    """

    errors: list[float] = field(default_factory=list[float])
    missing: int = 0
    length: float = 0.0
    drift: float = 0.0


def utterances(track: np.ndarray, rate: int) -> list[tuple[float, float]]:
    """Return the first and the last moment of sound of every utterance, ms."""
    size = round(rate * WINDOW_SECONDS)
    whole = track[: len(track) - len(track) % size].astype(np.float64).reshape(-1, size)
    loud = np.flatnonzero(np.sqrt(np.mean(whole**2, axis=1)) > LOUD_RMS)
    if not len(loud):
        return []
    breaks = np.flatnonzero(np.diff(loud) * WINDOW_SECONDS > PAUSE_SECONDS)
    firsts = [loud[0], *loud[breaks + 1]]
    lasts = [*loud[breaks], loud[-1]]
    window_ms = 1000 * WINDOW_SECONDS
    return [
        (float(a) * window_ms, float(b + 1) * window_ms) for a, b in zip(firsts, lasts, strict=True)
    ]


def compare(call: ReceivedCall, line: Caller, call_seconds: float) -> Markers:
    """Hold a call's markers against its recording."""
    result = Markers()
    if call.ended is None:
        raise RuntimeError(f"call-ended never came: {dict(call.stored)}")
    ended: dict[str, Any] = call.ended
    rate = int(ended["recordingSampleRate"])
    stereo = np.frombuffer(call.recording, dtype="<i2").reshape(-1, 2)
    result.length = 1000 * (len(stereo) / rate - call_seconds)
    for channel, role in enumerate(("user", "assistant")):
        heard = utterances(stereo[:, channel], rate)
        turns = [turn for turn in ended.get("transcript", []) if turn["role"] == role]
        result.missing += abs(len(heard) - len(turns))
        in_order = len(heard) == len(turns)
        for index, turn in enumerate(turns):
            start, end = turn.get("audioOffsetMs", 0), turn.get("endAudioOffsetMs", 0)
            if not heard:
                continue
            truth = heard[index] if in_order else min(heard, key=lambda span: abs(span[0] - start))
            result.errors += [start - truth[0], end - truth[1]]
        if role == "user" and len(heard) == len(line.sent):
            shifts = [a[0] - 1000 * b.start for a, b in zip(heard, line.sent, strict=True)]
            result.drift = max(shifts) - min(shifts)
    return result


async def one_call(
    world: World, transport: str, condition: Condition
) -> tuple[dict[str, Markers], Measured]:
    """Place one call under `condition` and compare both observers' markers with their audio."""
    for receiver in world.receivers.values():
        receiver.calls.clear()
        if condition.call_started_s:
            receiver.fail("call-started", slow_s=condition.call_started_s)
    try:
        async with host(world, transport, busy_ms=condition.busy_ms) as bot:
            line = caller(bot, transport, lose_packets=condition.lose_packets)
            async with line:
                await talk(line, world, QUESTIONS)
            measured = await bot.measured()
    finally:
        for receiver in world.receivers.values():
            receiver.heal()
    lengths = {OURS: measured.seconds, PUBLISHED: measured.audio_seconds}
    return (
        {name: compare(world.received(name), line, lengths[name]) for name in world.receivers},
        measured,
    )


def median_and_p95(errors: list[float]) -> str:
    """Return both of the absolute errors, ms."""
    absolute = np.abs(errors) if errors else np.array([np.nan])
    return f"{np.median(absolute):.0f} / {np.percentile(absolute, 95):.0f}"


async def measure() -> list[str]:
    """Return one table row per transport and condition."""
    rows: list[str] = []
    for transport in ("twilio", "webrtc"):
        for condition in CONDITIONS:
            with TemporaryDirectory() as folder:
                async with world(Path(folder), LONG_CALL) as around:
                    found, _ = await one_call(around, transport, condition)
            cells = [f"{transport}: {condition.name}", str(len(found[OURS].errors))]
            for name in (OURS, PUBLISHED):
                markers = found[name]
                missing = f", {markers.missing} missing" if markers.missing else ""
                cells.append(f"{median_and_p95(markers.errors)}{missing}")
            cells += [f"{found[name].length:+.0f}" for name in (OURS, PUBLISHED)]
            cells += [f"{found[name].drift:.0f}" for name in (OURS, PUBLISHED)]
            rows.append(f"| {' | '.join(cells)} |")
            print(rows[-1], flush=True)
    return rows


HEAD = """\
| call | markers | error, ours | error, pipecat-roark | length, ours | length, pipecat-roark \
| drift, ours | drift, pipecat-roark |
|---|---|---|---|---|---|---|---|"""

LEGEND = """\
All in ms. Error: median / 95th percentile of |marker - audio| over the starts and ends of all \
turns. Length: recording minus call (ours against the whole call, pipecat-roark's against the \
call from its first audio frame on). Drift: by how much the caller's utterances moved against one \
another between the caller's clock and the recording; a lost packet at the edge of an utterance \
counts here as well. Goals: median at most 40, 95th percentile at most 100, length within 50."""


def report() -> str:
    """Measure, and return the section for README.md."""
    return "\n".join([HEAD, *asyncio.run(measure()), "", LEGEND])


if __name__ == "__main__":
    print(report())
