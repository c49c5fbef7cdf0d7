"""Whole calls through the bot as it is shipped, over loopback: what is said, heard and reported."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from harness import RECORDS_AUDIO, SECONDS, Harness, run_harness, turns_of
from loguru import logger

from rehearsal.engines.engine import ToolCall
from rehearsal.engines.scripted import Answer, Script

pytestmark = pytest.mark.anyio

TALK = Script(
    greeting="Hello there.",
    hears=("Can you hear me?", "Goodbye then."),
    answers=(
        Answer(heard="Goodbye", calls=(ToolCall("end_call", {"goodbye": "Have a nice day."}),)),
        # Where the machine stands still, the rest of a sentence is a sound to ask about.
        Answer(told="a sound without words", says="Go on."),
        Answer(says="Yes, loud and clear."),
    ),
)
BOTH_TRANSPORTS = pytest.mark.parametrize("transport", ["twilio", "webrtc"])


@pytest.fixture
async def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The bot and its world, with a script for a short talk."""
    async with run_harness(monkeypatch, tmp_path) as harness:
        harness.engine.script = TALK
        yield harness


def texts(call: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Who said what."""
    assert call
    return [
        (role, " ".join(entry["content"] for entry in entries)) for role, entries in turns_of(call)
    ]


def is_silent(track: np.ndarray) -> bool:
    return int(np.abs(track).max(initial=0)) < 300


@BOTH_TRANSPORTS
async def test_a_call_arrives_complete_when_the_caller_hangs_up(
    harness: Harness, transport: str
) -> None:
    async with harness.caller(transport) as caller:
        await harness.hear_greeting(caller)
        await harness.ask(caller)
    assert (await harness.over()).error is None

    call = harness.received
    assert call.whole
    assert call.ended
    *asked, (answerer, answer) = texts(call.ended)
    assert asked == [("assistant", "Hello there."), ("user", "Can you hear me?")]
    assert answerer == "assistant" and answer.startswith("Yes, loud and clear.")
    assert answer.count("Yes") == 1
    assert call.ended["callEndedReason"] == "client-disconnected"
    assert call.ended["agentSpokeFirst"] is True
    # Every server the bot has talked to is this machine, and none but those of its services.
    assert harness.providers.peers == {"127.0.0.1"}
    called = {request.provider for request in harness.providers.log.requests}
    assert called == {harness.server(kind).name for kind in ("stt", "llm", "tts")}
    if RECORDS_AUDIO:
        assert_recording_shows(harness, call.ended)
        assert call.ended["recordingSampleRate"] == (8000 if transport == "twilio" else 24000)
    else:
        assert not call.chunks
        assert "recordingSampleRate" not in call.ended


def assert_recording_shows(harness: Harness, ended: dict[str, Any]) -> None:
    """The WAV on disk is what Roark got; each turn is heard on its side where it is said to be."""
    samples, rate = harness.recording()
    assert rate == ended["recordingSampleRate"]
    assert samples.tobytes() == harness.received.recording
    starts = [turn["audioOffsetMs"] for turn in ended["transcript"]]
    assert starts == sorted(starts)
    for turn in ended["transcript"]:
        first, last = (turn[name] * rate // 1000 for name in ("audioOffsetMs", "endAudioOffsetMs"))
        side = 0 if turn["role"] == "user" else 1
        assert not is_silent(samples[first:last, side])
        assert is_silent(samples[first:last, 1 - side])


@pytest.mark.slow
@BOTH_TRANSPORTS
async def test_the_bot_says_goodbye_and_hangs_up(
    harness: Harness, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWILIO_ACCOUNT_SID", "AC" + "0" * 32)
    monkeypatch.setenv("TWILIO_AUTH_TOKEN", "token")
    async with harness.caller(transport) as caller:
        await harness.hear_greeting(caller)
        for _ in range(2):
            await harness.ask(caller)
        await asyncio.wait_for(caller.ended.wait(), SECONDS)
    assert (await harness.over()).error is None

    call = harness.received
    assert call.whole
    assert call.ended
    assert texts(call.ended)[-2:] == [("user", "Goodbye then."), ("assistant", "Have a nice day.")]
    assert call.ended["callEndedReason"] == "agent-ended"
    assert [
        (entry["kind"], entry.get("name"), entry.get("arguments"), entry.get("content"))
        for entry in call.ended["toolCalls"]
    ] == [
        ("tool_call", "end_call", '{"goodbye":"Have a nice day."}', None),
        ("tool_result", None, None, '{"status":"ending"}'),
    ]
    if RECORDS_AUDIO:
        assert_recording_shows(harness, call.ended)
    hang_ups = [
        request for request in harness.providers.log.requests if request.provider == "twilio"
    ]
    assert len(hang_ups) == (1 if transport == "twilio" else 0)


@pytest.mark.slow
async def test_each_call_runs_at_the_rate_of_its_line(harness: Harness) -> None:
    for number, transport in enumerate(["twilio", "webrtc"]):
        async with harness.caller(transport) as caller:
            await harness.hear_greeting(caller)
        await harness.over(number)
    assert harness.engine.hears_at_hz == [8000, 16000]
    assert set(harness.engine.speaks_at_hz) == {8000, 24000}


@pytest.mark.slow
@pytest.mark.parametrize("speaks_rtvi", [True, False])
async def test_a_web_client_is_greeted_exactly_once(harness: Harness, speaks_rtvi: bool) -> None:
    async with harness.caller("webrtc", rtvi=speaks_rtvi) as caller:
        await harness.hear_greeting(caller)
        # Longer than the bot waits for a client that never says it is ready.
        await caller.hear_out(quiet=2.5, within=SECONDS)
    await harness.over()
    assert harness.received.ended
    assert texts(harness.received.ended) == [("assistant", "Hello there.")]
    assert len(harness.engine.asked) == 1


async def test_without_keys_of_roark_and_twilio_the_call_is_kept_and_the_log_says_so_once(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROARK_API_KEY", "")
    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    try:
        async with harness.caller("twilio") as caller:
            await harness.hear_greeting(caller)
        assert (await harness.over()).error is None
    finally:
        logger.remove(sink)
    assert len([line for line in lines if "TWILIO_ACCOUNT_SID" in line]) == 1
    assert not harness.roark.calls
    assert harness.record["ending"]["reason"] == "client-disconnected"
    if RECORDS_AUDIO:
        samples, rate = harness.recording()
        assert len(samples) > rate / 2


@pytest.mark.slow
@pytest.mark.parametrize("accepts", [True, False])
async def test_a_message_is_sent_only_after_the_caller_agreed(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, accepts: bool
) -> None:
    """The worked example of tools.py, against a real HTTP server."""
    arguments = {"message": "Please call Ada back.", "callback_number": "5550100"}
    harness.engine.script = Script(
        greeting="Hello there.",
        hears=("I have a message.", "Yes, that is right."),
        answers=(
            Answer(result="take_message", says="All right."),
            Answer(calls=(ToolCall("take_message", arguments),)),
        ),
    )
    posted: list[Any] = []

    async def take(request: web.Request) -> web.Response:
        posted.append(await request.json())
        return web.Response(status=204 if accepts else 500)

    app = web.Application()
    app.router.add_post("/messages", take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    monkeypatch.setenv("MESSAGE_URL", f"http://127.0.0.1:{port}/messages")
    try:
        async with harness.caller("twilio") as caller:
            await harness.hear_greeting(caller)
            for times_asked in (0, 1):
                assert len(posted) == 0, f"sent before the caller agreed ({times_asked})"
                await harness.ask(caller)
        await harness.over()
    finally:
        await runner.cleanup()
    assert posted == [arguments]
    assert harness.received.ended
    results = [
        entry["content"]
        for entry in harness.received.ended["toolCalls"]
        if entry["kind"] == "tool_result"
    ]
    assert "not sent yet" in results[0]
    assert ("sent" if accepts else "error") in results[1]


@pytest.mark.slow
async def test_an_interrupted_answer_is_kept_as_far_as_it_was_heard(harness: Harness) -> None:
    greeting = "One two three four. Five six seven eight nine ten. Eleven twelve thirteen fourteen."
    harness.engine.script = Script(
        greeting=greeting, hears=("Stop, please.",), answers=(Answer(says="All right."),)
    )
    async with harness.caller("webrtc") as caller:
        greeted = await caller.hear(within=SECONDS)
        async with asyncio.timeout(SECONDS):
            while caller.heard.end < greeted.start + 0.6:
                await asyncio.sleep(0.02)
        await harness.say(caller, "whatever the script hears")
        # What is heard next may be a rest of the greeting.
        await harness.hear_said(caller, "All right.")
    await harness.over()
    ended = harness.received.ended
    (first, cut), (second, asked), (third, answer) = texts(ended)
    assert (first, second, third) == ("assistant", "user", "assistant")
    assert greeting.startswith(cut) and 0 < len(cut) < len(greeting)
    assert (asked, answer) == ("Stop, please.", "All right.")
    assert harness.record["turns"][0]["interrupted_ms"] is not None
