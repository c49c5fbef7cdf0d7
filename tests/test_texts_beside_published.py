"""Where a text lands, beside the published observer: the same frames through both.

The published one says nothing of what comes late from a speech-to-speech service; ours does.
"""

from typing import Any

import pytest
from pipecat.frames.frames import (
    BotStartedSpeakingFrame,
    BotStoppedSpeakingFrame,
    EndFrame,
    Frame,
    InterruptionFrame,
    StartFrame,
    TranscriptionFrame,
    TTSTextFrame,
    UserStartedSpeakingFrame,
    UserStoppedSpeakingFrame,
    VADUserStartedSpeakingFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.observers.base_observer import FramePushed
from pipecat.processors.aggregators.dtmf_aggregator import DTMFAggregator
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.transports.base_output import BaseOutputTransport
from pipecat.transports.base_transport import TransportParams
from pipecat.utils.text.base_text_aggregator import TextType
from roark import RoarkObserver

published = pytest.importorskip(
    "pipecat_roark", reason="the dependency group bench, with the published package, is missing"
)

pytestmark = pytest.mark.anyio

# (ms since the one before, frame, who pushes it)
Steps = list[tuple[int, Frame, Any]]


def said(text: str) -> TranscriptionFrame:
    return TranscriptionFrame(text, "", "")


def keyed(text: str) -> Steps:
    keys = DTMFAggregator()
    return [
        (700, InterruptionFrame(), keys),
        (200, said(f"DTMF: {text}"), keys),
        (5, UserStartedSpeakingFrame(), None),
        (5, UserStoppedSpeakingFrame(), None),
    ]


def spoken(text: str) -> Steps:
    return [
        (500, VADUserStartedSpeakingFrame(start_secs=0.2), None),
        (0, UserStartedSpeakingFrame(), None),
        (1000, VADUserStoppedSpeakingFrame(stop_secs=0.2), None),
        (50, said(text), None),
        (50, UserStoppedSpeakingFrame(), None),
    ]


def answered(text: str) -> Steps:
    out = BaseOutputTransport(TransportParams())
    return [
        (500, BotStartedSpeakingFrame(), out),
        (100, TTSTextFrame(text, TextType.SENTENCE), out),
        (1500, BotStoppedSpeakingFrame(), out),
    ]


QUESTION = [*spoken("I want a table."), *answered("For two?")]
BEGINS = UserStartedSpeakingFrame()
CASES: dict[str, tuple[Steps, list[str]]] = {
    "keys after each answer": (
        [*keyed("1#"), *answered("One."), *keyed("22#"), *answered("Two."), *keyed("333#")],
        ["DTMF: 1#", "One.", "DTMF: 22#", "Two.", "DTMF: 333#"],
    ),
    "a soft word that begins a turn": (
        [*QUESTION, (600, said("Yes."), None), (1, BEGINS, None)],
        ["I want a table.", "For two?", "Yes."],
    ),
    "a soft word in a turn that an interim began": (
        [*QUESTION, (500, BEGINS, None), (100, said("Yes."), None)],
        ["I want a table.", "For two?", "Yes."],
    ),
    "a soft word that begins no turn": (
        [*QUESTION, (600, said("Yes."), None)],
        ["I want a table.", "For two?", "Yes."],
    ),
}


class Kept:
    """A call folder that keeps what Roark would be told at the end."""

    def __init__(self) -> None:
        self.body: dict[str, Any] = {}

    def started(self, body: dict[str, Any]) -> None: ...
    def journal(self, event: dict[str, Any]) -> None: ...
    def chunk(self, index: int, pcm: bytes, sample_rate: int, num_channels: int) -> None: ...

    def ended(self, body: dict[str, Any], record: dict[str, Any]) -> None:
        self.body = body

    async def flush(self, timeout: float) -> None: ...


async def transcript(observer: Any, steps: Steps) -> None:
    """Give `observer` the frames, at the pipeline's times."""
    out = BaseOutputTransport(TransportParams())
    at_ms = 0
    for delay_ms, frame, source in [(0, StartFrame(), out), *steps, (2000, EndFrame(), out)]:
        at_ms += delay_ms
        source = source or FrameProcessor()
        down = FrameDirection.DOWNSTREAM
        await observer.on_push_frame(FramePushed(source, source, frame, down, at_ms * 1_000_000))


async def ours(steps: Steps) -> list[str]:
    kept = Kept()
    observer = RoarkObserver(api_key="key", agent_id="agent", folder=kept)
    await transcript(observer, steps)
    await observer.aflush()
    return [turn["content"] for turn in kept.body["transcript"]]


async def theirs(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    bodies: list[dict[str, Any]] = []

    async def keep(_client: object, body: dict[str, Any]) -> None:
        bodies.append(body)

    monkeypatch.setattr("pipecat_roark.client.RoarkClient.post_call_ended", keep)
    observer = published.RoarkObserver(api_key="key", agent_id="agent", runner_args=None)
    await transcript(observer, steps)
    await observer.aflush()
    return [turn["content"] for turn in bodies[0]["transcript"]]


@pytest.mark.parametrize("case", CASES)
async def test_a_text_lands_where_the_published_observer_puts_it(case, monkeypatch):
    steps, expected = CASES[case]
    assert await theirs(steps, monkeypatch) == expected
    assert await ours(steps) == expected


async def test_a_late_final_of_speech_to_speech_comes_before_its_answer_in_ours_alone(monkeypatch):
    begun, heard, ended = answered("Sure.")
    steps: Steps = [
        (500, UserStartedSpeakingFrame(), None),
        (1000, UserStoppedSpeakingFrame(), None),
        *(begun, (300, said("A pizza."), None), heard, ended),
    ]
    assert await theirs(steps, monkeypatch) == ["Sure.", "A pizza."]
    assert await ours(steps) == ["A pizza.", "Sure."]
