"""Made-up calls on disk, plausible enough to judge the report by.

    python -m benchmarks.kept_calls DIRECTORY [CALLS] [WITH_RECORDING]

writes CALLS (500) of a dental practice over the last days, the newest WITH_RECORDING (20) of them
with sound; then `CALLS_DIR=DIRECTORY python -m roark report` shows them. The same every time.
"""

import json
import random
import sys
import wave
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from roark.call import CallRecord
from roark.folder import Folder, folder_name

RATE = 8000
CALLS_PER_DAY = 60
NEWEST = datetime(2026, 11, 25, 18, 0, tzinfo=UTC)
OPENING = "Hello, Maple Dental. How can I help you today?"
EXCHANGES = (
    ("Hi, I chipped a tooth. Can I see somebody today?", "find_appointment",
     "I am sorry to hear that. I have eleven forty, and a quarter past four in the afternoon."),
    ("The first one, please. My name is Elinor Dashwood.", "book_appointment",
     "Thank you, Elinor. You are booked for eleven forty."),
    ("Do you take my insurance? It's Northern Mutual.", "look_up_insurance",
     "We do. A check-up is covered, a filling up to eighty per cent."),
    ("Is Dr. Alvarez in on Thursday?", "", "She is, from nine until four."),
    ("Could you say that again?", "", "Of course. She is in from nine until four on Thursday."),
    ("What does a cleaning cost?", "price_of", "A cleaning is ninety-five, forty minutes."),
    ("Ich wollte eigentlich nur fragen, ob Sie am Samstag auf haben.", "",
     "Am Samstag sind wir von neun bis eins da."),
    ("I need to move my appointment, the one on Friday.", "move_appointment",
     "No problem. Would Monday at ten suit you?"),
    ("Monday at ten is fine.", "", "Then I'll see you on Monday at ten."),
)  # fmt: skip
GOODBYE = ("That's all. Thank you so much!", "You are welcome. Goodbye!")
REASONS = ("agent-ended", "client-disconnected", "idle-timeout", "error", "max-duration")
REASON_WEIGHTS = (55, 35, 4, 4, 2)


class MadeUpCall:
    """Events of a call as its observer would have written them; times in ms from the start."""

    def __init__(self, dice: random.Random, started: datetime, call_id: str) -> None:
        self._dice = dice
        self._zero = int(started.timestamp() * 1e9)
        self.now = 700.0
        self.events: list[dict[str, Any]] = []
        self.spoken: list[tuple[int, float, float]] = []
        self.note("call", 0, call_id=call_id, agent_id="maple", agent_name="Maple Dental")
        self.note("started", 0)
        self.note("anchor", 0, ms=0.0)
        if dice.random() < 0.8:
            number = f"+1 555 01{dice.randrange(100):02} {dice.randrange(10_000):04}"
            self.note("phone", 0, from_number=number, to_number="+1 555 0100 199")

    def note(self, name: str, at_ms: float, /, **fields: Any) -> None:
        self.events.append({"event": name, "at": self._zero + int(at_ms * 1e6), **fields})

    def bot(self, text: str, *, may_be_cut: bool = True) -> None:
        begin, context = self.now, str(len(self.events))
        length = len(text) * 62
        is_cut = may_be_cut and self._dice.random() < 0.12
        self.now += length * (0.6 if is_cut else 1)
        words = text.split()
        self.note("bot", begin, edge="start")
        for position, word in enumerate(words):
            due = self._zero + int((begin + length * position / len(words)) * 1e6)
            self.note("words", begin, context=context, segment=1, text=word, due=due)
        self.note("voice-done", begin, context=context)
        self.spoken.append((1, begin, self.now))
        if is_cut:
            self.note("interruption", self.now)
            self.now -= 300
        else:
            self.note("bot", self.now, edge="stop")
            self.now += self._dice.uniform(300, 1500)

    def caller(self, text: str, tool: str = "") -> None:
        """Says something and waits: the bot's answer begins at `now`."""
        dice = self._dice
        begin, self.now = self.now, self.now + len(text) * 68
        self.spoken.append((0, begin, self.now))
        self.note("vad", begin + 200, edge="start", secs=0.2)
        self.note("vad", self.now + 200, edge="stop", secs=0.2)
        heard = dice.uniform(180, 420)
        released = heard + dice.uniform(30, 500)
        self.note("transcript", self.now + heard, text=text)
        sure = dice.uniform(0.5, 0.99)
        self.note("turn-guess", self.now + released - 1, complete=sure > 0.6, probability=sure)
        self.note("user-turn", self.now + released, edge="stop")
        self.note("metric", self.now + released, kind="ttfb", service="stt", value=heard / 1000)
        think, voice = dice.lognormvariate(5.9, 0.35), dice.uniform(90, 220)
        at = self.now + released + think
        for kind, service, model, value in (
            ("ttfb", "llm", "gpt-4.1", think / 1000),
            ("ttfb", "tts", "sonic-3", voice / 1000),
            ("prompt_tokens", "llm", "gpt-4.1", dice.randrange(400, 1800)),
            ("completion_tokens", "llm", "gpt-4.1", dice.randrange(12, 60)),
            ("tts_characters", "tts", "sonic-3", 70),
            ("stt_seconds", "stt", "nova-3", len(text) / 15),
        ):
            self.note("metric", at, kind=kind, service=service, model=model, value=value)
        if tool:
            took = dice.lognormvariate(6, 0.8)
            error = "HTTP 503: the calendar is busy" if dice.random() < 0.06 else None
            about = {"id": str(len(self.events))}
            self.note("tool", at, **about, name=tool, arguments='{"day":"today"}')
            content = '{"free":["11:40","16:15"]}'
            self.note("tool-result", at + took, **about, content=content, error=error)
            at += took + think / 2
        self.now = at + voice + dice.uniform(20, 90)

    def tell(self) -> None:
        """Does what some do: presses keys, types, is looked up, has a booking to show for it."""
        dice = self._dice
        self.note("annotation", 0, values={"version": "41", "transport": "twilio"})
        if dice.random() < 0.3:
            self.note("typed", self.now, text="DTMF: 4711#", via="keys", since=self.ns(-900))
            self.now += 900
            self.bot("Thank you. I have found your appointment.")
        if dice.random() < 0.1:
            self.note("typed", self.now, text="elinor.dashwood@example.com", via="text")
            self.now += 700
            self.bot("I have written that down.")
        outcome = {"status": dice.choice(("booked", "answered", "moved")), "by": "the bot"}
        summary = "A chipped tooth; the caller took eleven forty and asked about the insurance."
        self.note("annotation", self.now, values={"outcome": outcome, "summary": summary})

    def ns(self, ms: float) -> int:
        """Epoch ns of so many ms after now."""
        return self._zero + int((self.now + ms) * 1e6)

    def end(self) -> None:
        if self._dice.random() < 0.05:
            self.note("tool", self.now, id="last", name="look_up_insurance", arguments="{}")
        reason = self._dice.choices(REASONS, REASON_WEIGHTS)[0]
        if reason == "error":
            self.note("error", self.now, processor="OpenAILLMService", category="quota",
                      message="429: you exceeded your current quota")  # fmt: skip
        self.now += 500
        self.note("chunk", self.now, index=0, ms=self.now, sample_rate=RATE, num_channels=2)
        self.note("ending", self.now, reason=reason)
        self.note("ended", self.now)

    @property
    def record(self) -> CallRecord:
        return CallRecord.replay(sorted(self.events, key=lambda event: event["at"]))


def write_calls(directory: Path, calls: int, *, with_recording: int = 0, first: int = 0) -> None:
    """Writes the folders of so many calls, the newest first, after `first` newer ones."""
    for number in range(first, first + calls):
        dice = random.Random(number)
        started = NEWEST - timedelta(minutes=number * 24 * 60 / CALLS_PER_DAY, seconds=number % 50)
        call_id = f"CA{dice.randrange(16**16):016x}"
        call = MadeUpCall(dice, started, call_id)
        call.bot(OPENING)
        for said, tool, answer in dice.sample(EXCHANGES, dice.randint(0, 6)):
            call.caller(said, tool)
            call.bot(answer)
        call.tell()
        if dice.random() < 0.7:
            call.caller(GOODBYE[0])
            call.bot(GOODBYE[1], may_be_cut=False)
        call.end()
        write_call(directory, call, started, with_sound=number < first + with_recording)


def write_long_call(directory: Path, hours: float) -> None:
    """Writes the folder of one call of hours, with its recording."""
    dice = random.Random(0)
    call = MadeUpCall(dice, NEWEST, "CA-long")
    call.bot(OPENING)
    while call.now < hours * 3_600_000:
        said, tool, answer = dice.choice(EXCHANGES)
        call.caller(said, tool)
        call.bot(answer)
    call.end()
    write_call(directory, call, NEWEST, with_sound=True)


def write_call(directory: Path, call: MadeUpCall, started: datetime, *, with_sound: bool) -> None:
    """Writes a finished call's folder; a few of them have not reached Roark."""
    record = call.record
    is_sent = record.call_id[-1] != "a"
    path = directory / folder_name(record.call_id, started)
    folder = Folder(path, call_id=record.call_id, destination="https://api.roark.ai")
    # None of this has to survive a power cut, and ten thousand calls are many syncs.
    with patch("os.fsync"):
        folder.keep_started(json.dumps(record.call_started()).encode())
        folder.keep_ended(
            json.dumps(record.call_ended()).encode(), json.dumps(record.as_dict()).encode()
        )
        for step in ("call-started", "call-ended") if is_sent else ():
            folder.note_delivered(step)
        folder.release()
    if with_sound:
        _write_recording(path / "recording.wav", call)


def _write_recording(path: Path, call: MadeUpCall) -> None:
    """A murmur with syllables where somebody speaks, a minute of it in memory at a time."""
    noise = np.random.default_rng(0)
    frames = int(call.now * RATE / 1000)
    with wave.open(str(path), "wb") as wav:
        wav.setnchannels(2)
        wav.setsampwidth(2)
        wav.setframerate(RATE)
        for first in range(0, frames, 60 * RATE):
            at = np.arange(first, min(first + 60 * RATE, frames)) / RATE * 1000
            sides = np.zeros((len(at), 2))
            for side, begin, end in call.spoken:
                if end < at[0] or begin > at[-1]:
                    continue
                here = (at >= begin) & (at < end)
                pitch = 0.13 if side else 0.2
                syllables = np.abs(np.sin(at[here] / 90)) * (0.6 + 0.4 * np.sin(at[here] / 610))
                voice = sum(np.sin(2 * np.pi * pitch * n * at[here]) / n for n in range(1, 7))
                hiss = noise.normal(0, 0.1, len(at[here]))
                sides[here, side] = syllables * (voice + hiss) * (0.25 - 0.1 * side)
            wav.writeframes((sides * 32767).clip(-32768, 32767).astype("<i2").tobytes())


if __name__ == "__main__":
    target = Path(sys.argv[1])
    numbers = [int(argument) for argument in sys.argv[2:]]
    count, recorded = [*numbers, *(500, 20)[len(numbers) :]]
    write_calls(target, count, with_recording=recorded)
