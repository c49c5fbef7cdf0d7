"""`python bot.py`: Pipecat's development server with this bot, in a process of its own."""

import json
import re
import shutil
import signal
import time
import wave
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from host import front_door
from host.tests.development_server import development_server
from rehearsal.call import HUMAN_VOICE
from rehearsal.callers.twilio import TwilioCaller
from rehearsal.callers.webrtc import WebRTCCaller
from rehearsal.providers.roark import ReceivedCall, RoarkReceiver
from roark.folder import Folder, folder_name

# Each starts a process and holds calls in real time.
pytestmark = [pytest.mark.anyio, pytest.mark.slow]

SECONDS = 30.0
PAUSE_SECONDS = 6
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
]
NONSENSE = [
    ("POST", "/api/offer", {}),
    ("POST", "/api/offer", {"sdp": "v=0", "type": "rubbish"}),
    ("POST", "/api/offer", {"sdp": "v=0", "type": "answer"}),
    ("PATCH", "/api/offer", []),
    ("POST", "/start", [1]),
    ("POST", "/files", None),
    ("GET", "/daily", None),
]
"""What nobody asks Pipecat's server who means to call."""


async def delivered(roark: RoarkReceiver) -> ReceivedCall:
    """Return the one call, once Roark has all of it."""
    await roark.until(lambda: any(call.whole for call in roark.calls.values()), timeout=SECONDS)
    (call,) = roark.calls.values()
    return call


async def test_the_server_has_pipecats_routes_and_takes_calls_on_each(tmp_path: Path) -> None:
    async with development_server("webrtc", tmp_path) as (bot, roark):
        async with aiohttp.ClientSession() as browser:
            async with browser.get(f"{bot.url}/client/") as page:
                assert page.status == 200
                assert "<script" in await page.text()
            async with browser.post(f"{bot.url}/start", json={"transport": "webrtc"}) as started:
                first = last = (await started.json())["sessionId"]
            for _ in range(front_door.MAX_SESSIONS):
                async with browser.post(f"{bot.url}/start", json={"body": {}}) as started:
                    last = (await started.json())["sessionId"]
            for session, status in ((first, 404), (last, 200)):
                async with browser.get(f"{bot.url}/sessions/{session}/x") as answer:
                    assert answer.status == status, "Pipecat keeps each, and most never call"
            async with browser.post(f"{bot.url}/sessions/{last}/api/offer", json={}) as answer:
                assert answer.status == 400
            for method, path, body in NONSENSE:
                async with browser.request(method, bot.url + path, json=body) as answer:
                    assert answer.status in (400, 422), path
                    assert "{" not in (await answer.json())["detail"], "nothing is repeated"
        lines = bot.log.read_text()
        assert lines.count("could not be answered") == len(NONSENSE)
        assert "Traceback" not in lines and " ERROR " not in lines
        async with WebRTCCaller(bot.url) as caller:
            await caller.hear(within=SECONDS)
        async with TwilioCaller(bot.url.replace("http", "ws", 1) + "/ws") as caller:
            await caller.hear(within=SECONDS)
        await roark.until(lambda: len(roark.calls) == 2, timeout=SECONDS)
        await roark.until(lambda: all(call.whole for call in roark.calls.values()), timeout=SECONDS)


async def test_what_a_killed_process_left_is_delivered_by_the_next_before_anybody_calls(
    tmp_path: Path,
) -> None:
    async with RoarkReceiver() as roark:
        path = tmp_path / "calls" / folder_name("killed", datetime.now(UTC))
        left = Folder(path, call_id="killed", destination=roark.url)
        assert left.create()
        begun = {"event": "call", "at": time.time_ns(), "call_id": "killed", "agent_id": "a"}
        left.keep_events([json.dumps(begun).encode() + b"\n"])
        left.lock.release()
        async with development_server("webrtc", tmp_path, ROARK_BASE_URL=roark.url):
            await roark.until(
                lambda: any(call.ended for call in roark.calls.values()), timeout=SECONDS
            )
        (call,) = roark.calls.values()
        assert call.ended
        assert (call.call_id, call.ended["callEndedReason"]) == ("killed", "process-died")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_closes_and_delivers_the_calls_in_progress(
    tmp_path: Path, number: signal.Signals
) -> None:
    """One of a browser and one of a phone."""
    async with development_server("webrtc", tmp_path) as (bot, roark):
        phone = TwilioCaller(bot.url.replace("http", "ws", 1) + "/ws")
        async with WebRTCCaller(bot.url) as browser, phone:
            for caller in (browser, phone):
                await caller.hear(within=SECONDS)
                # Of a greeting that is cut in its first word nothing has been said.
                await caller.hear_out(quiet=0.5, within=SECONDS)
            bot.send_signal(number)
            await roark.until(
                lambda: [call.whole for call in roark.calls.values()] == [True, True],
                timeout=SECONDS,
            )
        for call in roark.calls.values():
            assert call.ended
            assert call.ended["callEndedReason"] == "signal"
            assert call.ended["transcript"]


async def test_a_browser_calls_the_bot_and_hears_it(tmp_path: Path) -> None:
    """Debian's chromium, its microphone fed with the recorded human voice."""
    playwright = pytest.importorskip(
        "playwright.async_api", reason="drives the browser: pip install playwright"
    )
    if not CHROMIUM:
        pytest.skip("no chromium on this machine")
    voice = with_a_pause(HUMAN_VOICE, tmp_path / "voice.wav")
    async with (
        development_server("webrtc", tmp_path) as (bot, roark),
        playwright.async_playwright() as driver,
    ):
        browser = await driver.chromium.launch(
            executable_path=CHROMIUM,
            args=[*CHROMIUM_ARGUMENTS, f"--use-file-for-fake-audio-capture={voice}"],
        )
        context = await browser.new_context(permissions=["microphone"])
        page = await context.new_page()
        asked_for: list[str] = []
        page.on("request", lambda request: asked_for.append(request.url))
        await page.goto(f"{bot.url}/rehearsal")
        await page.get_by_role("button", name="Call").click()
        await page.get_by_text("Connected").wait_for(timeout=SECONDS * 1000)
        await page.locator("li.bot").first.wait_for(timeout=SECONDS * 1000)
        assert await loudness_heard(page) > 0.01
        # What the bot says after the caller's words are final answers them.
        answer = page.locator("li.caller:not(.guess) ~ li.bot").first
        await answer.wait_for(timeout=SECONDS * 1000)
        await page.screenshot(path=tmp_path / "call.png")
        await page.get_by_role("button", name="Hang up").click()
        call = await delivered(roark)
        await browser.close()
    assert call.ended
    roles = {turn["role"] for turn in call.ended["transcript"]}
    assert roles == {"assistant", "user"}
    assert all(re.match(r"http://127\.0\.0\.1:", url) for url in asked_for), asked_for


def with_a_pause(recording: Path, path: Path) -> Path:
    """Write the recording with silence before it: Chromium says it over and over."""
    with wave.open(str(recording)) as source:
        parameters, voice = source.getparams(), source.readframes(source.getnframes())
    with wave.open(str(path), "wb") as padded:
        padded.setparams(parameters)
        padded.writeframes(bytes(2 * PAUSE_SECONDS * parameters.framerate) + voice)
    return path


async def loudness_heard(page: Any) -> float:
    """Return the greatest amplitude (0 to 1) of the bot's voice over some seconds of listening."""
    return await page.evaluate(
        """async () => {
            const context = new AudioContext();
            const analyser = context.createAnalyser();
            const voice = document.getElementById("voice").srcObject;
            context.createMediaStreamSource(voice).connect(analyser);
            const samples = new Float32Array(analyser.fftSize);
            let loudest = 0;
            for (let tries = 0; tries < 200 && loudest < 0.02; tries++) {
                await new Promise((resolve) => setTimeout(resolve, 50));
                analyser.getFloatTimeDomainData(samples);
                loudest = Math.max(loudest, ...samples.map(Math.abs));
            }
            return loudest;
        }"""
    )
