"""Makes docs/report.png: the report of a made-up call, as `python -m roark report` writes it.

    .venv/bin/python docs/report_picture.py

The conversation, its timing and its numbers are invented here; voices and page are the real ones.
Needs the packages of the local engine, playwright, and Debian's chromium.
"""

import asyncio
import json
import sys
import tempfile
import wave
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "{{cookiecutter.project}}"))

from rehearsal.engines.language_model import ScriptedAnswerer  # noqa: E402
from rehearsal.engines.local import LocalEngine  # noqa: E402
from roark.call import CallRecord  # noqa: E402
from roark.report import write_report  # noqa: E402

RATE = 24000
START = 1_795_269_909_000_000_000
# The one voice there is, played faster, is a second one.
CALLER_PITCH = 1.18
BARGE_IN_MS = 450
WIDTH, HEIGHT = 1200, 1010


class Stage:
    """Puts speech and events where they happened, in ms of the recording."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self.events: list[dict[str, Any]] = []
        self.sides = np.zeros((RATE * 120, 2), np.float32)
        self.now = 0.0

    def note(self, name: str, at_ms: float, /, **fields: Any) -> None:
        self.events.append({"event": name, "at": START + int(at_ms * 1e6), **fields})

    async def _speak(self, text: str, rate: int, side: int, cut_ms: float | None) -> list[Any]:
        speech = [piece async for piece in self._engine.speak(text, rate)]
        pcm = np.frombuffer(b"".join(piece.pcm for piece in speech), "<i2")
        first = round(self.now * RATE / 1000)
        pcm = pcm[: round(cut_ms * RATE / 1000)] if cut_ms else pcm
        self.sides[first : first + len(pcm), side] = pcm
        begin, self.now = self.now, self.now + len(pcm) / RATE * 1000
        role = ("user", "assistant")[side]
        self.note("sound", self.now, role=role, start_ms=begin, end_ms=self.now)
        return [word for piece in speech for word in piece.words]

    async def bot(self, after_ms: float, text: str, cut_ms: float | None = None) -> None:
        self.now += after_ms
        begin, context = self.now, str(len(self.events))
        words = await self._speak(text, RATE, 1, cut_ms)
        self.note("bot", begin, edge="start")
        for word in words:
            due = START + int((begin + word.start_s * 1000) * 1e6)
            self.note("words", begin, context=context, segment=1, text=word.text, due=due)
        self.note("voice-done", begin, context=context)
        self.note("interruption", self.now) if cut_ms else self.note("bot", self.now, edge="stop")

    async def caller(self, after_ms: float, text: str, waits: tuple[int, int, int, int]) -> None:
        """`waits`: to the last words, to the end of the turn, LLM first token, voice first byte."""
        self.now += after_ms
        words_ms, turn_ms, llm_ms, voice_ms = waits
        self.note("vad", self.now + 200, edge="start", secs=0.2)
        await self._speak(text, round(RATE / CALLER_PITCH), 0, None)
        self.note("vad", self.now + 200, edge="stop", secs=0.2)
        self.note("transcript", self.now + words_ms, text=text)
        self.note("user-turn", self.now + turn_ms, edge="stop")
        at = self.now + turn_ms + llm_ms
        for kind, service, model, value in (
            ("ttfb", "llm", "gpt-4.1", llm_ms / 1000),
            ("ttfb", "tts", "sonic-3", voice_ms / 1000),
            ("prompt_tokens", "llm", "gpt-4.1", 460),
            ("completion_tokens", "llm", "gpt-4.1", 34),
            ("tts_characters", "tts", "sonic-3", len(text) * 2),
            ("stt_seconds", "stt", "nova-3", len(text) / 15),
        ):
            self.note("metric", at, kind=kind, service=service, model=model, value=value)

    def tool(self, after_ms: float, took_ms: float, name: str, arguments: Any, **end: str) -> None:
        at, number = self.now + after_ms, str(len(self.events))
        self.note("tool", at, id=number, name=name, arguments=json.dumps(arguments))
        self.note("tool-result", at + took_ms, id=number, **{"content": ""} | end)


async def play(stage: Stage) -> None:
    """The call."""
    stage.note("call", 0, call_id="CA7c1f20e9b1d54f0f", agent_id="maple", agent_name="Maple Dental")
    stage.note("started", 0)
    stage.note("anchor", 0, ms=0.0)
    stage.note("phone", 0, from_number="+1 555 010 0142", to_number="+1 555 010 0199")
    await stage.bot(600, "Hello, Maple Dental. How can I help you today?")
    await stage.caller(
        700, "Hi, I chipped a tooth. Can I see somebody today?", (260, 430, 390, 160)
    )
    stage.tool(
        900, 340, "find_appointment", {"day": "today"}, content='{"free": ["11:40", "4:15"]}'
    )
    offer = "I am sorry to hear that. I have eleven forty, and a quarter past four in the afternoon"
    await stage.bot(1640, offer, cut_ms=4300)
    stage.now -= BARGE_IN_MS
    await stage.caller(0, "The first one, please. Elinor Dashwood.", (310, 560, 420, 150))
    booking = {"time": "11:40", "name": "Elinor Dashwood"}
    stage.tool(1000, 1300, "book_appointment", booking, error="HTTP 503: the calendar is busy")
    stage.tool(2500, 420, "book_appointment", booking, content='{"reference": "MD-2231"}')
    await stage.bot(3350, "Thank you, Elinor. You are booked for eleven forty.")
    await stage.caller(800, "That's all. Thank you so much!", (220, 380, 310, 140))
    stage.tool(700, 10, "end_call", {"goodbye": "You are welcome. Goodbye!"}, content="ending")
    await stage.bot(880, "You are welcome. Goodbye!")
    end = stage.now + 400
    stage.note("chunk", end, index=0, ms=end, sample_rate=RATE, num_channels=2)
    stage.note("ending", end, reason="agent-ended")
    stage.note("ended", end)
    stage.now = end


async def make_call(folder: Path) -> None:
    """Writes the call's folder."""
    engine = await LocalEngine.load(ScriptedAnswerer())
    stage = Stage(engine)
    try:
        await play(stage)
    finally:
        await engine.aclose()
    record = CallRecord.replay(sorted(stage.events, key=lambda event: event["at"]))
    (folder / "call.json").write_text(json.dumps(record.as_dict()))
    with wave.open(str(folder / "recording.wav"), "wb") as wav:
        wav.setnchannels(2)
        wav.setsampwidth(2)
        wav.setframerate(RATE)
        wav.writeframes(stage.sides[: round(stage.now * RATE / 1000)].astype("<i2").tobytes())


def take_picture(page: Path, picture: Path) -> None:
    """Photographs the page, its player a little way into the call."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
        )
        tab = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        tab.goto(page.as_uri())
        tab.locator("#play:enabled").wait_for()
        tab.keyboard.press("ArrowRight")
        tab.keyboard.press("ArrowRight")
        tab.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(make_call(Path(name)))
        take_picture(write_report(Path(name)), ROOT / "docs" / "report.png")
