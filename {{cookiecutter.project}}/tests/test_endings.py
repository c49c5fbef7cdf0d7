"""Every way a call can end, over both transports: the record says which, and arrives complete."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from harness import SECONDS, VOICE_HZ, Harness, run_harness
from pipecat.runner.types import RunnerArguments
from pipecat.services.tts_service import TTSService
from pipecat.transports.base_transport import BaseTransport
from pipecatcloud.agent import SmallWebRTCSessionArguments

import bot
import config
import services
import transports
from conversation import endings
from conversation.floor import Floor
from host import calls, telemetry
from rehearsal.callers import webrtc as webrtc_caller
from rehearsal.callers.caller import Caller
from rehearsal.engines.scripted import Script

pytestmark = pytest.mark.anyio

FLUSH_SECONDS = 20.0
BOTH_TRANSPORTS = pytest.mark.parametrize("transport", ["twilio", "webrtc"])
LONG_STORY = " ".join(["Once upon a time there was a telephone that would not stop ringing."] * 4)


@pytest.fixture
async def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The bot and its world; the bot greets at length."""
    async with run_harness(monkeypatch, tmp_path) as harness:
        harness.engine.script = Script(greeting=LONG_STORY)
        yield harness


async def assert_ended(harness: Harness, reason: str, *, detail: str = "") -> None:
    """bot() has returned in time, and record and delivery are complete and agree."""
    asked_at = time.monotonic()
    assert (await harness.over()).error is None
    assert time.monotonic() - asked_at < FLUSH_SECONDS
    assert harness.record["ending"]["reason"] == reason
    assert detail in harness.record["ending"]["detail"]
    assert harness.received.whole
    assert harness.received.ended
    assert harness.received.ended["callEndedReason"] == reason


def said_by_bot(harness: Harness) -> str:
    ended = harness.received.ended
    assert ended
    said = [turn["content"] for turn in ended["transcript"] if turn["role"] == "assistant"]
    return " ".join(said)


async def hang_up_while_the_bot_speaks(_stage: Harness, caller: Caller) -> None:
    await caller.hear(within=SECONDS)
    await caller.hang_up()


async def hang_up_in_mid_sentence(harness: Harness, caller: Caller) -> None:
    speaking = asyncio.create_task(harness.say(caller, LONG_STORY))
    recogniser = harness.server("stt")
    await harness.providers.log.until(
        lambda: sum(connection.audio_bytes for connection in recogniser.connections) > VOICE_HZ,
        within_s=SECONDS,
    )
    await caller.hang_up()
    with pytest.raises(ConnectionError):
        await speaking


async def hang_up_at_once(_stage: Harness, caller: Caller) -> None:
    await caller.hang_up()


@BOTH_TRANSPORTS
@pytest.mark.parametrize(
    "leave", [hang_up_while_the_bot_speaks, hang_up_in_mid_sentence, hang_up_at_once]
)
async def test_a_caller_may_hang_up_at_any_moment(
    harness: Harness, transport: str, leave: Callable[[Harness, Caller], Awaitable[None]]
) -> None:
    async with harness.caller(transport) as caller:
        await leave(harness, caller)
    await assert_ended(harness, "client-disconnected")


@pytest.mark.slow
@BOTH_TRANSPORTS
async def test_a_caller_may_hang_up_before_the_pipeline_has_started(
    harness: Harness, transport: str
) -> None:
    await harness.server("stt").refuse()
    async with harness.caller(transport):
        pass
    await assert_ended(harness, "client-disconnected")
    assert harness.received.ended and not harness.received.ended.get("transcript")


async def test_a_phone_that_vanishes_ends_the_call(harness: Harness) -> None:
    async with harness.caller("twilio") as caller:
        await caller.hear(within=SECONDS)
        await caller.vanish()
        await assert_ended(harness, "client-disconnected")


@pytest.mark.slow
async def test_a_browser_that_vanishes_is_noticed_within_ten_seconds(harness: Harness) -> None:
    async with harness.caller("webrtc") as caller:
        await caller.hear(within=SECONDS)
        await caller.vanish()
        vanished_at = time.monotonic()
        await harness.over()
        assert time.monotonic() - vanished_at < 10
        await assert_ended(harness, "client-disconnected", detail="went dead")


@pytest.mark.slow
async def test_the_time_limit_ends_the_call_with_a_goodbye(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.engine.script = Script.parse(
        {"greeting": "Hello.", "answers": [{"told": "time limit", "says": "Time is up. Goodbye."}]}
    )
    monkeypatch.setenv("MAX_CALL_SECONDS", "3")
    async with harness.caller("twilio") as caller:
        await asyncio.wait_for(caller.ended.wait(), SECONDS)
    await assert_ended(harness, "max-duration", detail="MAX_CALL_SECONDS")
    assert said_by_bot(harness).endswith("Time is up. Goodbye.")


@pytest.mark.slow
async def test_a_caller_who_talks_on_after_the_time_limit_takes_it_back_once(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.engine.script = Script.parse(
        {"greeting": "Hello.", "answers": [{"told": "time limit", "says": "Time is up."}]}
    )
    monkeypatch.setenv("MAX_CALL_SECONDS", "1")
    monkeypatch.setattr(endings, "MORE_SECONDS", 2.0)

    async def talk_on(caller: Caller) -> None:
        while True:
            await harness.ask(caller)

    async with harness.caller("twilio") as caller:
        talking = asyncio.create_task(talk_on(caller))
        await asyncio.wait_for(caller.ended.wait(), SECONDS)
        talking.cancel()
    await assert_ended(harness, "max-duration", detail="MAX_CALL_SECONDS")


@pytest.mark.parametrize("broken", ["its prompt", "what watches a call"])
async def test_whatever_breaks_before_a_call_begins_nobody_is_left_on_a_silent_line(
    broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def answer(_session: RunnerArguments) -> transports.Connection:
        return transports.Connection(cast(BaseTransport, None))

    async def hang_up(session: RunnerArguments) -> None:
        hung_up.append(session)

    for name in config.REQUIRED:
        monkeypatch.setenv(name, "a-key")
    monkeypatch.setenv("CALLS_DIR", str(tmp_path))
    monkeypatch.setattr(transports, "answer", answer)
    monkeypatch.setattr(transports, "hang_up", hang_up)
    if broken == "its prompt":
        monkeypatch.setattr(bot, "PROMPT_FILE", tmp_path / "prompt.md")
    else:
        monkeypatch.setattr(telemetry, "of_call", None)
    hung_up: list[RunnerArguments] = []
    session = RunnerArguments()
    with pytest.raises((RuntimeError, TypeError)):
        await bot.bot(session)
    assert hung_up == [session]
    assert not len(calls.of_process)


@pytest.mark.slow
async def test_the_platforms_session_limit_is_recorded_as_such(
    harness: Harness,
) -> None:
    headers = {"x-daily-transport-type": "webrtc", "x-pcc-max-session-seconds": "4"}
    async with aiohttp.ClientSession() as platform:
        waiting = asyncio.create_task(platform.post(f"{harness.url}/bot", json={}, headers=headers))
        async with asyncio.timeout(SECONDS):
            while not harness.image.awaits_offer:
                await asyncio.sleep(0.01)
        async with harness.caller("webrtc") as caller:
            await asyncio.wait_for(caller.ended.wait(), SECONDS)
        await assert_ended(harness, "max-duration", detail="session limit")
        await waiting


@pytest.mark.slow
async def test_a_goodbye_that_hangs_does_not_hang_the_call(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "GOODBYE_SECONDS", 0.5)
    monkeypatch.setenv("MAX_CALL_SECONDS", "3")
    # So does the greeting: it may be under way when the time is up.
    harness.server("llm").faults.hang = True
    async with harness.caller("webrtc") as caller:
        await asyncio.wait_for(caller.ended.wait(), SECONDS)
    await assert_ended(harness, "max-duration")


async def test_hanging_up_during_the_goodbye_ends_the_call_at_once(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.engine.script = Script.parse(
        {"greeting": "Hello.", "answers": [{"told": "time limit", "says": LONG_STORY}]}
    )
    monkeypatch.setenv("MAX_CALL_SECONDS", "1")
    async with harness.caller("twilio") as caller:
        await harness.providers.log.until(
            lambda: any(LONG_STORY.startswith(text) for text in harness.spoken),
            within_s=SECONDS,
        )
        asked_at = time.monotonic()
        async with asyncio.timeout(SECONDS):
            while not any(heard.end > asked_at + 0.3 for heard in caller.heard.utterances):
                await asyncio.sleep(0.02)
        await caller.hang_up()
        hung_up_at = time.monotonic()
        await harness.over()
        # The goodbye takes nine.
        assert time.monotonic() - hung_up_at < 5
    await assert_ended(harness, "max-duration")


async def test_a_service_that_cannot_be_closed_does_not_hold_up_the_end(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    closable = asyncio.Event()

    create_tts = services.create_tts

    def stuck() -> TTSService:
        tts = create_tts()
        cleanup = tts.cleanup

        async def stuck_cleanup() -> None:
            await closable.wait()
            await cleanup()

        monkeypatch.setattr(tts, "cleanup", stuck_cleanup)
        return tts

    monkeypatch.setattr(services, "create_tts", stuck)
    monkeypatch.setattr(endings, "TEARDOWN_SECONDS", 0.3)
    async with harness.caller("twilio") as caller:
        await caller.hear(within=SECONDS)
    try:
        await assert_ended(harness, "client-disconnected")
    finally:
        closable.set()


@pytest.mark.slow
@BOTH_TRANSPORTS
async def test_an_exception_of_ours_ends_the_call_and_closes_the_line(
    harness: Harness, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_instructions: str) -> None:
        raise LookupError("a bug")

    monkeypatch.setattr(bot.services, "create_llm", broken)
    await assert_hung_up(harness, transport, monkeypatch)
    assert isinstance((await harness.over()).error, LookupError)
    assert harness.received.ended
    assert harness.received.ended["callEndedReason"] == "error"
    assert "LookupError" in harness.record["ending"]["detail"]


@pytest.mark.slow
async def test_a_call_that_cannot_be_answered_is_hung_up(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = next(iter(config.REQUIRED), None)
    if needed is None:
        pytest.skip("this bot needs no key")
    monkeypatch.setenv(needed, "")
    await assert_hung_up(harness, "webrtc", monkeypatch)
    assert needed in str((await harness.over()).error)


async def assert_hung_up(harness: Harness, transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller finds the line closed, a web caller perhaps before it was up."""
    monkeypatch.setattr(webrtc_caller, "CONNECT_SECONDS", 2.0)
    with suppress(TimeoutError):
        async with harness.caller(transport) as caller:
            await asyncio.wait_for(caller.ended.wait(), SECONDS)
    if transport == "webrtc":
        args = (await harness.over()).args
        assert isinstance(args, SmallWebRTCSessionArguments)
        assert args.webrtc_connection.pc.connectionState == "closed"


class Runner:
    """A runner that notes that it was cancelled."""

    def __init__(self) -> None:
        self.cancelled_for: list[str] = []

    async def cancel(self, reason: str) -> None:
        self.cancelled_for.append(reason)


class Worker:
    """A worker that is done with a goodbye when it is told so."""

    def __init__(self) -> None:
        self.heard = asyncio.Event()
        self.said: list[object] = []

    async def queue_frames(self, frames: Iterable[object]) -> None:
        self.said.extend(frames)

    async def flush_pipeline(self, _timeout: float) -> None:
        await self.heard.wait()


class Roark:
    """An observer that keeps the reasons it was told."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def note_ending(self, reason: str, _detail: str) -> None:
        self.reasons.append(reason)


class CallerSide:
    """A user aggregator, as far as an ending knows it."""

    def __init__(self) -> None:
        self.takes_turn: Callable[..., Awaitable[None]] | None = None

    def event_handler(self, _name: str) -> Callable[[Any], Any]:
        def add(handler: Callable[..., Awaitable[None]]) -> Any:
            self.takes_turn = handler
            return handler

        return add


@pytest.mark.parametrize("is_final", [False, True])
@pytest.mark.parametrize("begins_turn", [True, False])
async def test_a_sentence_into_the_goodbye_takes_the_ending_back_unless_it_is_final(
    monkeypatch: pytest.MonkeyPatch, is_final: bool, begins_turn: bool
) -> None:
    """One that was typed, or begun before the goodbye, begins no turn in it."""
    monkeypatch.setattr(endings, "LAST_WORD_SECONDS", 0.0)
    worker, runner, roark, caller = Worker(), Runner(), Roark(), CallerSide()
    doubles: Any = (worker, runner, roark)
    caller_side: Any = caller
    ending = endings.Ending(*doubles, floor=Floor(), caller=caller_side)
    goodbye: Any = "goodbye"
    ending.after(goodbye, reason="agent-ended", detail="", is_final=is_final)
    ending.look()
    assert ending.has_begun
    if begins_turn:
        assert caller.takes_turn
        await caller.takes_turn(caller, None)
    else:
        ending.floor.caller_took_turn()
        ending.look()
    worker.heard.set()
    for _ in range(10):
        await asyncio.sleep(0)
    assert ending.has_begun is is_final
    assert ending.floor.is_saying_goodbye is is_final
    expected = ["agent-ended"] if is_final else []
    assert (runner.cancelled_for, roark.reasons) == (expected, expected)
    if not is_final:
        # Who hangs up afterwards has hung up.
        await ending.now("client-disconnected", "")
        assert roark.reasons == ["client-disconnected"]


async def test_a_turn_that_is_open_when_the_goodbye_begins_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Words in it take the ending back, when it is over; without any the call ends then."""
    for seconds in ("LAST_WORD_SECONDS", "RECOGNISE_SECONDS", "LOOK_EVERY_SECONDS"):
        monkeypatch.setattr(endings, seconds, 0.0)
    worker, runner, roark, caller = Worker(), Runner(), Roark(), CallerSide()
    doubles: Any = (worker, runner, roark)
    caller_side: Any = caller
    ending = endings.Ending(*doubles, floor=Floor(), caller=caller_side)
    ending.floor.turn_began()
    worker.heard.set()
    ending.after(reason="agent-ended", detail="")
    for _ in range(10):
        await asyncio.sleep(0)
    assert not runner.cancelled_for
    ending.floor.turn_ended()
    async with asyncio.timeout(SECONDS):
        while not runner.cancelled_for:
            await asyncio.sleep(0)
