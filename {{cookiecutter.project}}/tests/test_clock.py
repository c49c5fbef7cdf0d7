"""The bot knows the day and the time, and its LLM's provider keeps what it has cached."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from harness import SECONDS, Harness, run_harness

import config
from conversation import clock

EVENING = datetime(2026, 11, 25, 23, 40, tzinfo=UTC)


def test_the_time_is_told_in_the_zone_of_the_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIMEZONE", raising=False)
    assert clock.instruction(EVENING) == (
        "This call began on Wednesday, 25 November 2026 at 23:40, UTC time."
    )
    monkeypatch.setenv("TIMEZONE", "Europe/Berlin")
    assert clock.instruction(EVENING) == (
        "This call began on Thursday, 26 November 2026 at 00:40, Europe/Berlin time."
    )


@pytest.mark.parametrize("zone", ["Berlin", "../etc/passwd", "Europe", "UTC+1"])
def test_what_is_no_zone_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, zone: str
) -> None:
    monkeypatch.setenv("TIMEZONE", zone)
    with pytest.raises(RuntimeError, match="TIMEZONE is a zone such as Europe/Berlin, not"):
        config.timezone()


@pytest.fixture
async def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The bot and its world."""
    async with run_harness(monkeypatch, tmp_path) as harness:
        yield harness


@pytest.mark.anyio
@pytest.mark.slow
async def test_what_two_calls_are_told_differs_in_the_last_line_alone(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in a call each request begins with the one before: what a provider can have cached."""
    for zone in ("Europe/Berlin", "Asia/Tokyo"):
        monkeypatch.setenv("TIMEZONE", zone)
        async with harness.caller("twilio") as caller:
            await caller.hear(within=SECONDS)
            if zone == "Asia/Tokyo":
                await caller.hear_out(quiet=0.5, within=SECONDS)
                await harness.say(caller)
                await caller.hear(within=SECONDS)
    await harness.over(1)

    asked_first, asked_then, *_ = harness.engine.asked[1:]
    assert asked_then[: len(asked_first)] == asked_first
    (one, *_), (other, *_) = harness.engine.asked[:2]
    *same, clock_of_one = one["content"].splitlines()
    assert other["content"].splitlines()[:-1] == same
    assert "Europe/Berlin" in clock_of_one
    for call in harness.roark.calls.values():
        assert "This call began" not in str(call.started)
