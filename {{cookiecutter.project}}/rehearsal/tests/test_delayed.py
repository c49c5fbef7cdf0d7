"""Services that take their time: how long, and that nothing else changes."""

import asyncio
import statistics

import pytest

from rehearsal.engines.delayed import SPREAD, DelayedEngine, Latencies
from rehearsal.engines.scripted import ScriptedEngine

pytestmark = pytest.mark.anyio


async def test_latencies_are_drawn_around_their_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    engine = DelayedEngine(ScriptedEngine(), Latencies.parse("llm=450, stt=100"))
    for _ in range(400):
        assert [piece async for piece in engine.think([], [])]
    assert statistics.median(slept) == pytest.approx(0.45, rel=0.05)
    assert statistics.quantiles(slept, n=6)[-1] < 0.45 * (1 + 1.4 * SPREAD)
    slept.clear()
    assert [piece async for piece in engine.speak("Hello there.", 8000)]
    assert slept == []
    recogniser = engine.listen(8000)
    await recogniser.feed(b"\0\0" * 800)
    assert await recogniser.finalize() == []
    assert len(slept) == 1


@pytest.mark.parametrize("text", ["", "llm", "llm=fast", "llm=450;tts=150", "ears=3", "llm=-1"])
async def test_what_are_no_latencies_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="such as llm=450,tts=150,stt=100, not"):
        Latencies.parse(text)
