"""Our observer and the published one can be swapped by changing an import.

One call is reported by both at once, each to a Roark of its own; what arrived is compared field by
field. Every difference is one of `INTENDED`, with what it may be and why it is there.
"""

import asyncio
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from re import fullmatch, sub
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from roark import RoarkObserver

published = pytest.importorskip(
    "pipecat_roark", reason="the dependency group bench, with the published package, is missing"
)
# These need the published package.
import bot  # noqa: E402
from harness import SECONDS, run_harness  # noqa: E402
from rehearsal.engines.engine import ToolCall  # noqa: E402
from rehearsal.engines.scripted import Answer, Script  # noqa: E402
from rehearsal.providers.roark import ReceivedCall  # noqa: E402

from benchmarks.calls import caller, host, talk, world  # noqa: E402
from benchmarks.markers import utterances  # noqa: E402
from benchmarks.subjects import OURS, PUBLISHED, point_published_to  # noqa: E402


@dataclass(frozen=True)
class Difference:
    """A field in which the two may differ.

    Parameters:
        field: Pattern of its path in what arrived.
        why: Why ours is different.
        holds: Whether two different values (ours, published) are what is meant.
    """

    field: str
    why: str
    holds: Callable[[Any, Any], bool]


def seconds_apart(limit: float) -> Callable[[str, str], bool]:
    """Tell whether two ISO times are closer than that."""
    return lambda ours, theirs: (
        abs((datetime.fromisoformat(ours) - datetime.fromisoformat(theirs)).total_seconds()) < limit
    )


def within_ms(limit: float) -> Callable[[float, float], bool]:
    """Tell whether two positions are closer than that."""
    return lambda ours, theirs: abs(ours - theirs) < limit


INTENDED = (
    Difference(
        r"call-(started|ended)\.(eventTimestamp|callStartedAt|callEndedAt)",
        "when it happened by the pipeline's clock, not when the observer got round to it",
        seconds_apart(10.0),
    ),
    Difference(
        r"call-ended\.transcript\[\d\]\.(timestamp|endTimestamp)",
        "where speech begins and ends in the audio, not when the detectors had decided so",
        seconds_apart(10.0),
    ),
    Difference(
        r"call-ended\.transcript\[\d\]\.(audioOffsetMs|endAudioOffsetMs)",
        "the same, on a recording that begins with the call and not with its first audio frame",
        within_ms(10_000),
    ),
    Difference(
        r"call-ended\.toolCalls\[\d\]\.timestamp",
        "when the frame was pushed, not when it was handled",
        seconds_apart(10.0),
    ),
    Difference(
        r"call-ended\.toolCalls\[\d\]\.audioOffsetMs",
        "on a recording that begins with the call",
        within_ms(10_000),
    ),
    Difference(
        r"requests\.idempotency-key",
        "every request may be repeated",
        lambda ours, theirs: ours is True and theirs is False,
    ),
    Difference(
        r"requests\.longest chunk, s",
        "at most 5 s are at risk when the process is killed",
        lambda ours, theirs: 0 < ours <= 5.0 and theirs > 0,
    ),
)


async def one_call(folder: Path) -> dict[str, ReceivedCall]:
    """Hold a call over WebRTC; return it as it arrived from either."""
    async with world(folder) as around:
        async with host(around, "webrtc") as bot:
            line = caller(bot, "webrtc")
            async with line:
                await talk(line, around)
            await bot.measured()
        for receiver in around.receivers.values():
            assert receiver.problems == []
        return {name: around.received(name) for name in around.receivers}


def fields_of(call: ReceivedCall) -> dict[str, Any]:
    """Return everything that arrived as path -> value."""
    assert call.started and call.ended
    rate = call.ended["recordingSampleRate"]
    steps = [request.step for request in call.requests]
    found: dict[str, Any] = {
        "requests.first": steps[0],
        "requests.last": steps[-1],
        "requests.kinds": sorted(set(steps)),
        "requests.longest chunk, s": max(map(len, call.chunks.values())) / 4 / rate,
        "requests.idempotency-key": all(
            request.idempotency_key for request in call.requests if request.step != "put"
        ),
        "chunk-url": json.loads(
            next(request.body for request in call.requests if request.step == "chunk-url")
        ),
    }

    def flatten(path: str, value: Any) -> None:
        match value:
            case dict():
                for key, item in value.items():
                    flatten(f"{path}.{key}", item)
            case list():
                for index, item in enumerate(value):
                    flatten(f"{path}[{index}]", item)
            case _:
                found[path] = value

    flatten("call-started", call.started)
    flatten("call-ended", call.ended)
    return found


def sides_in_order(call: ReceivedCall) -> list[str]:
    """Return who is heard in the recording, one after the other.

    What one side says with nothing of the other between is one, however long the silence in it: in
    a process that stalls, Pipecat's recorder leaves holes in the bot's sound.
    """
    assert call.ended
    stereo = np.frombuffer(call.recording, dtype="<i2").reshape(-1, 2)
    rate = call.ended["recordingSampleRate"]
    begun = [
        (start, side)
        for channel, side in enumerate(("caller", "bot"))
        for start, _end in utterances(stereo[:, channel], rate)
    ]
    return [side for side, _ in groupby(side for _start, side in sorted(begun))]


@pytest.mark.slow
@pytest.mark.anyio
async def test_both_tell_the_same_of_a_call_and_every_difference_is_an_intended_one(
    tmp_path: Path,
) -> None:
    """The same fields of the same types, and recordings with the same turns on the same sides."""
    arrived = await one_call(tmp_path)
    ours, theirs = (fields_of(arrived[name]) for name in (OURS, PUBLISHED))
    types = [{path: type(value) for path, value in each.items()} for each in (ours, theirs)]
    assert types[0] == types[1]

    different = {path for path in ours if ours[path] != theirs.get(path)}
    assert "call-ended.transcript[0].content" not in different
    for path in sorted(different):
        allowed = [each for each in INTENDED if fullmatch(each.field, path)]
        assert allowed, f"{path}: {ours[path]!r} instead of {theirs.get(path)!r}"
        assert allowed[0].holds(ours[path], theirs[path]), (
            f"{path}: {ours[path]!r} instead of {theirs[path]!r}, more than "
            f"{allowed[0].why} explains"
        )
    # An entry that nothing differs in any more is a claim about the published package gone stale.
    unused = [
        each.field for each in INTENDED if not any(fullmatch(each.field, p) for p in different)
    ]
    assert unused == []

    turns = [sides_in_order(arrived[name]) for name in (OURS, PUBLISHED)]
    assert turns == [["bot", "caller", "bot"]] * 2


def test_whatever_the_published_observer_takes_ours_takes() -> None:
    theirs = inspect.signature(published.RoarkObserver.__init__).parameters
    ours = inspect.signature(RoarkObserver.__init__).parameters
    assert set(theirs) <= set(ours)
    for name, parameter in theirs.items():
        assert ours[name].kind is parameter.kind, name
        if parameter.default is not inspect.Parameter.empty:
            assert ours[name].default == parameter.default, name


def test_the_names_a_bot_uses_are_there(tmp_path: Path) -> None:
    ours = RoarkObserver(api_key=None, agent_id="a", runner_args=None, calls_dir=tmp_path)
    theirs = published.RoarkObserver(api_key="k", agent_id="a", runner_args=None)
    for name in ("pipecat_call_id", "audio_processor", "aflush"):
        assert hasattr(ours, name) and hasattr(theirs, name)
    flush = inspect.signature(theirs.aflush).parameters
    assert flush["reason"].default == inspect.signature(ours.aflush).parameters["reason"].default


@pytest.mark.parametrize(
    "runner_args",
    [
        SimpleNamespace(webrtc_connection=SimpleNamespace(pc_id="SmallWebRTCConnection#0-5ee1")),
        SimpleNamespace(webrtc_connection=None, session_id="session"),
        {"webrtc_connection": {"pc_id": "peer"}, "session_id": "session"},
        {"session_id": "session"},
        SimpleNamespace(session_id=""),
        None,
    ],
)
def test_both_call_a_call_by_the_same_id(runner_args: Any, tmp_path: Path) -> None:
    ours = RoarkObserver(api_key=None, agent_id="a", runner_args=runner_args, calls_dir=tmp_path)
    theirs = published.RoarkObserver(api_key="k", agent_id="a", runner_args=runner_args)
    ids = [sub(r"[0-9a-f-]{36}", "a uuid", each.pipecat_call_id) for each in (ours, theirs)]
    assert ids[0] == ids[1]


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.parametrize("transport", ["twilio", "webrtc"])
@pytest.mark.parametrize("who", ["caller", "bot"])
async def test_with_the_published_observer_in_place_of_ours_a_call_ends_whoever_ends_it(
    transport: str, who: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    goodbye = Answer(heard="goodbye", calls=(ToolCall("end_call", {"goodbye": "Goodbye."}),))
    async with run_harness(monkeypatch, tmp_path) as harness:
        monkeypatch.setattr(bot, "RoarkObserver", published.RoarkObserver)
        point_published_to(harness.roark.url)
        harness.engine.script = Script(greeting="Hello.", hears=("Goodbye.",), answers=(goodbye,))
        async with harness.caller(transport) as line:
            await line.hear(within=SECONDS)
            await line.hear_out(quiet=0.5, within=SECONDS)
            if who == "bot":
                await harness.say(line)
                await asyncio.wait_for(line.ended.wait(), SECONDS)
        assert (await harness.over()).error is None
        assert harness.received.started and harness.received.ended
        assert harness.received.ended["transcript"][0]["content"] == "Hello."
