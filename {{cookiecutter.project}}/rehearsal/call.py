"""A rehearsed call: a caller that says one thing or several, and a report of what came back.

The caller waits for the greeting, speaks, waits for the answer, says the next thing and hangs up.
What was said is read from the record of the call; how long the bot took is measured at the
caller's end of the line.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import av
from av.error import FFmpegError

from rehearsal.callers.caller import Caller
from rehearsal.callers.twilio import TwilioCaller
from rehearsal.callers.webrtc import WebRTCCaller
from rehearsal.engines.engine import Engine
from rehearsal.host.bot_process import BotProcess

HUMAN_VOICE = Path(__file__).with_name("made-amiable.wav")

GREETING_SECONDS = 20.0
ANSWER_WAIT_SECONDS = 30.0
QUIET_SECONDS = 2.0
"""A bot that is silent for so long has finished; on a busy machine it pauses between sentences."""

SAME_SOUND_SECONDS = 2.0
"""No further apart are the beginnings of a turn in the record and at the caller's ear."""

VOICE_HZ = 16000

PARTS = ("pause", "verdict", "transcript", "LLM", "tools", "voice", "line", "rest")
"""What a caller waits for, as it is shown; in the record the same in lower case."""


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


def words_file(kind: str, language: str) -> Path:
    """The file of what is said in a rehearsal of this kind; the English one where it has none."""
    code = language.partition("-")[0].lower()
    files = [Path(__file__).with_name(f"{kind}.{one}.toml") for one in (code, "en")]
    return next(file for file in files if file.exists())


def without_words(kind: str, language: str) -> str:
    """Say so where the people of a rehearsal do not speak the bot's language; "" where they do."""
    file, code = words_file(kind, language), language.partition("-")[0].lower()
    if file.name == f"{kind}.{code}.toml":
        return ""
    return f"They speak English: {kind}.{code}.toml is missing beside rehearsal/{file.name}."


def recorded_voice(path: Path) -> Voice:
    """Read a recording of any kind that FFmpeg knows: WAV, MP3, Ogg, M4A; channels are mixed.

    Raises:
        ValueError: It is missing, no recording, or empty; the text is one sentence.
    """
    try:
        # A file that is open, and no name: FFmpeg would take some for addresses.
        with path.open("rb") as file, av.open(file, "r") as container:
            if not container.streams.audio:
                raise ValueError(f"{path} holds no sound.")
            rate = container.streams.audio[0].codec_context.sample_rate
            to_mono = av.AudioResampler(format="s16", layout="mono", rate=rate)
            frames = [
                converted
                for frame in [*container.decode(audio=0), None]
                for converted in to_mono.resample(frame)
            ]
    except FFmpegError as error:
        raise ValueError(
            f"{path} is no recording that can be read (WAV, MP3, Ogg, M4A): {error.strerror}."
        ) from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    pcm = b"".join(frame.to_ndarray().astype("<i2").tobytes() for frame in frames)
    if not pcm:
        raise ValueError(f"{path} holds no sound.")
    return Voice(pcm, rate, f"the recording {path.name}")


async def spoken_voice(engine: Engine, text: str) -> Voice:
    """Let the engine's own voice say `text`. Raises ValueError if there is no word in it."""
    pieces = [piece.pcm async for piece in engine.speak(text, VOICE_HZ)]
    if not pieces:
        raise ValueError(f"There is nothing to say in {text!r}.")
    return Voice(b"".join(pieces), VOICE_HZ, f"the {engine.name} engine's voice")


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer as the caller heard it.

    Attributes:
        at: When it began, seconds since the epoch.
        after: How long after the caller's last sound, seconds.
    """

    at: float
    after: float


async def talk(
    line: str, bot: BotProcess, voices: Sequence[Voice], tell: Callable[[str], None]
) -> list[Answered]:
    """Place one call over `line` and say one thing after another; `tell` is given the progress.

    Returns:
        The answers, one for each thing said before the bot hung up.

    Raises:
        NoAnswer: The bot did not take the call, or did not answer what was said.
    """
    dialled = time.monotonic()
    answers: list[Answered] = []
    try:
        async with _caller(line, bot.url) as caller:
            tell(f"The line is open, over {line}.")
            try:
                greeting = await caller.hear(within=GREETING_SECONDS)
                tell(f"The bot begins to speak after {greeting.start - dialled:.2f} s.")
                await caller.hear_out(quiet=QUIET_SECONDS)
            except TimeoutError:
                tell(f"The bot has not greeted within {GREETING_SECONDS:g} s.")
            for voice in voices:
                if caller.ended.is_set() and answers:
                    break
                tell(f"The caller speaks for {voice.seconds:.1f} s: {voice.source}.")
                said = await caller.say(voice.pcm, voice.sample_rate)
                answer = await caller.hear(within=ANSWER_WAIT_SECONDS)
                tell(f"The bot answers after {answer.start - said.end:.2f} s.")
                at = time.time() - (time.monotonic() - answer.start)
                answers.append(Answered(at, answer.start - said.end))
                await caller.hear_out(quiet=QUIET_SECONDS)
            tell("The bot hangs up." if caller.ended.is_set() else "The caller hangs up.")
            return answers
    except (aiohttp.ClientError, OSError) as error:
        # What a caller raises when nothing comes, TimeoutError and ConnectionError, are OSErrors.
        raise NoAnswer(f"The bot never answered: {error or type(error).__name__}.") from error


def _caller(line: str, url: str) -> Caller:
    if line == "twilio":
        return TwilioCaller(url.replace("http", "ws", 1) + "/ws")
    return WebRTCCaller(url)


def conversation(record: Mapping[str, Any], answers: Sequence[Answered] = ()) -> list[str]:
    """Return the turns and tool calls of a call's record, one line each, in their order.

    Args:
        record: What `call.json` holds.
        answers: What the caller measured; each is put to the turn that began then.
    """
    turns = list(record["turns"])
    after: dict[int, float] = {}
    for answer in answers:
        apart = {
            index: abs(datetime.fromisoformat(turn["started_at"]).timestamp() - answer.at)
            for index, turn in enumerate(turns)
            if turn["role"] == "assistant"
        }
        nearest = min(apart, key=apart.__getitem__, default=None)
        if nearest is not None and apart[nearest] <= SAME_SOUND_SECONDS:
            after[nearest] = answer.after
    lines: list[tuple[float, str]] = []
    for index, turn in enumerate(turns):
        line = f"{'caller' if turn['role'] == 'user' else 'bot':6}  {turn['text']}"
        if index in after:
            line += f"  [after {after[index]:.2f} s]"
            if parts := _parts(turn.get("latency") or {}, after[index]):
                line += f"\n{'':19}{parts}"
        lines.append((turn["start_ms"], line))
    for tool in record["tools"]:
        came = tool["error"] or tool["result"]
        line = f"tool    {tool['name']} {tool['arguments']} {tool['status']}"
        lines.append((tool["at_ms"], line + (f": {came}" if came else "")))
    return [f"{ms / 1000:7.2f} s  {line}" for ms, line in sorted(lines, key=lambda pair: pair[0])]


def _parts(latency: Mapping[str, Any], after: float) -> str:
    """Say where the time before an answer went, in seconds; "" where the record does not tell.

    The line takes what is left to the caller's ear.
    """
    parts = {name.removesuffix("_ms"): ms / 1000 for name, ms in latency.get("parts", {}).items()}
    if not parts:
        return ""
    parts["line"] = max(0.0, after - sum(ms for name, ms in parts.items() if name != "line"))
    about: dict[str, str] = {}
    if saved := latency.get("llm_saved_ms", 0) / 1000:
        parts.setdefault("llm", 0.0)
        about["LLM"] = f" ({saved:.2f} saved)"
    return ", ".join(
        f"{part} {parts[part.lower()]:.2f}{about.get(part, '')}"
        for part in PARTS
        if part.lower() in parts
    )


def speculation(record: Mapping[str, Any]) -> str:
    """Say what it saved and cost to begin answers in the caller's pause; "" if none was begun."""
    waits = [turn["latency"] for turn in record["turns"] if turn.get("latency")]
    saved = [wait["llm_saved_ms"] / 1000 for wait in waits if wait.get("llm_saved_ms")]
    usage = record.get("usage", {})
    withdrawn = usage.get("llm_requests_withdrawn", 0)
    if not saved and not withdrawn:
        return ""
    return (
        f"Answers begun in the caller's pause saved {sum(saved):.2f} s, in {len(saved)} of "
        f"{len(waits)} turns; requests to the LLM that were withdrawn: {withdrawn} of "
        f"{usage.get('llm_requests', 0)}."
    )


def what_broke(record: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each tool that is not there or broke, and one for a broken call."""
    broken = [
        f"The tool {tool['name']} was called and failed: {tool['error']}"
        for tool in record["tools"]
        if tool["error"] and tool["status"] == "failed"
    ]
    if record["ending"]["reason"] == "error":
        broken.append(f"The call ended in an error: {record['ending']['detail']}")
    return broken


def kept_at(calls_dir: Path, call_id: str) -> Path | None:
    """Return the folder in which the bot kept the call of this id."""
    for started in calls_dir.glob("*/call-started.json"):
        if json.loads(started.read_bytes())["pipecatCallId"] == call_id:
            return started.parent
    return None
