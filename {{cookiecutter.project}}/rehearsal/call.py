"""A rehearsed call: a caller that says one thing, and a report of what came back.

The caller waits for the greeting, speaks, waits for the answer and hangs up. What was said is read
from what Roark received; how long the bot took is measured at the caller's end of the line.
"""

import io
import json
import time
import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from rehearsal.callers.caller import Caller
from rehearsal.callers.twilio import TwilioCaller
from rehearsal.callers.webrtc import WebRTCCaller
from rehearsal.engines.engine import Engine
from rehearsal.host.bot_process import BotProcess

HUMAN_VOICE = Path(__file__).with_name("made-amiable.wav")

GREETING_SECONDS = 20.0
ANSWER_SECONDS = 30.0
QUIET_SECONDS = 2.0
"""A bot that is silent for so long has finished; on a busy machine it pauses between sentences."""

VOICE_HZ = 16000


class NoAnswer(Exception):
    """The bot never answered; the text says at which point."""


@dataclass(frozen=True, slots=True)
class Voice:
    """What the caller says: mono PCM16, and where it comes from."""

    pcm: bytes
    sample_rate: int
    source: str

    @property
    def seconds(self) -> float:
        """How long it takes to say."""
        return len(self.pcm) / 2 / self.sample_rate


def recorded_voice(path: Path) -> Voice:
    """Read a WAV file.

    Raises:
        ValueError: It is missing, or no mono 16-bit WAV; the text is one sentence.
    """
    try:
        with wave.open(io.BytesIO(path.read_bytes())) as recording:
            if recording.getnchannels() != 1 or recording.getsampwidth() != 2:
                raise ValueError(f"{path} is not mono with 16 bits per sample.")
            pcm = recording.readframes(recording.getnframes())
            return Voice(pcm, recording.getframerate(), f"the recording {path.name}")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path} is not a WAV file of plain PCM ({error}).") from error


async def spoken_voice(engine: Engine, text: str) -> Voice:
    """Let the engine's own voice say `text`. Raises ValueError if there is no word in it."""
    pieces = [piece.pcm async for piece in engine.speak(text, VOICE_HZ)]
    if not pieces:
        raise ValueError(f"There is nothing to say in {text!r}.")
    return Voice(b"".join(pieces), VOICE_HZ, f"the {engine.name} engine's voice")


async def talk(line: str, bot: BotProcess, voice: Voice, tell: Callable[[str], None]) -> float:
    """Place one call over `line` and say what `voice` says; `tell` is given the progress.

    Returns:
        The time from the caller's last sound to the bot's first, seconds.

    Raises:
        NoAnswer: The bot did not take the call, or did not answer what was said.
    """
    dialled = time.monotonic()
    try:
        async with _caller(line, bot.url) as caller:
            tell(f"The line is open, over {line}.")
            try:
                greeting = await caller.hear(within=GREETING_SECONDS)
                tell(f"The bot begins to speak after {greeting.start - dialled:.2f} s.")
                await caller.hear_out(quiet=QUIET_SECONDS)
            except TimeoutError:
                tell(f"The bot has not greeted within {GREETING_SECONDS:g} s.")
            tell(f"The caller speaks for {voice.seconds:.1f} s: {voice.source}.")
            said = await caller.say(voice.pcm, voice.sample_rate)
            answer = await caller.hear(within=ANSWER_SECONDS)
            tell(f"The bot answers after {answer.start - said.end:.2f} s.")
            await caller.hear_out(quiet=QUIET_SECONDS)
            tell("The bot hangs up." if caller.ended.is_set() else "The caller hangs up.")
            return answer.start - said.end
    except (aiohttp.ClientError, OSError) as error:
        # What a caller raises when nothing comes, TimeoutError and ConnectionError, are OSErrors.
        raise NoAnswer(f"The bot never answered: {error or type(error).__name__}.") from error


def _caller(line: str, url: str) -> Caller:
    if line == "twilio":
        return TwilioCaller(url.replace("http", "ws", 1) + "/ws")
    return WebRTCCaller(url)


def conversation(ended: Mapping[str, Any], answered_after: float | None = None) -> list[str]:
    """Return the turns of a `call-ended` message, one line each.

    Args:
        ended: The message that Roark got.
        answered_after: The measured time before the bot's first answer to the caller, seconds.
    """
    lines: list[str] = []
    caller_spoke = False
    for turn in ended.get("transcript", []):
        who = "caller" if turn["role"] == "user" else "bot"
        begun = turn.get("audioOffsetMs")
        line = f"{begun / 1000:7.2f} s" if begun is not None else " " * 9
        line += f"  {who:6}  {turn['content']}"
        caller_spoke = caller_spoke or who == "caller"
        if who == "bot" and caller_spoke and answered_after is not None:
            line += f"  [after {answered_after:.2f} s]"
            answered_after = None
        lines.append(line)
    return lines


def kept_at(calls_dir: Path, call_id: str) -> Path | None:
    """Return the folder in which the bot kept the call of this id."""
    for started in calls_dir.glob("*/call-started.json"):
        if json.loads(started.read_bytes())["pipecatCallId"] == call_id:
            return started.parent
    return None
