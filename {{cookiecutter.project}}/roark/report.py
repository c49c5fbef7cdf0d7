"""Calls as pages a person can read: one HTML file per call, and an index of them.

A page needs nothing but itself: style (report.css), player (report.js), transcript and sound are
inside, it asks no network for anything, and can be mailed. The sound is what decides its size: it
is kept at 8 bits (companded, as the telephone does) and at the highest of a few rates at which it
stays below `SOUND_BYTES` before compression. A call too long even for 8 kHz (about 13 minutes of
stereo) is played from the recording.wav beside its page.

Everything that was said is text from outside: it is escaped where it is put in, and a content
security policy lets nothing but the page's own script run.

    page = write_report(Path("calls/20261121T140509-0f3c-9c41d07b"))
    index = write_index(Path("calls"))
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
import re
import statistics
import sys
import wave
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soxr

from roark.call import ENDINGS, CallRecord
from roark.folder import (
    DELIVERY,
    JOURNAL,
    RECORD,
    RECORDING,
    Folder,
    Lock,
    Unreadable,
    open_private,
    read_lines,
)

Row = dict[str, Any]

PAGE = "report.html"
INDEX = "index.html"
SOURCES = ("py", "css", "js")

# A page stays below 16 MiB then, which mail servers take.
SOUND_BYTES = 12_000_000
# The rate of the recording is divided by these until the sound fits; not below 8 kHz.
RATE_DIVISORS = (1, 2, 3, 4, 6)
LOWEST_RATE = 8000
HIGHEST_RATE = 24000

# The picture: one peak per bucket. 20000 buckets are 10 ms each for the first 3 minutes.
BUCKET_MS = 10
MOST_BUCKETS = 20_000
# A side that never gets louder than this (-30 dBFS) is drawn as quiet as it is.
QUIET_LEVEL = 1036

GOOD_ENDINGS = ("agent-ended", "client-disconnected")
BAD_ENDINGS = ("error", "process-died")
IN_PROGRESS = "in progress"
SIDES = ("user", "assistant")
NAMES = {"user": "Caller", "assistant": "Bot"}

# In the order in which a caller waits for them: name in the record, colour, label, explanation.
PARTS = (
    (
        "stt_ms",
        "stt",
        "Speech to text",
        "from the caller's last sound to the last words recognised",
    ),
    ("end_of_turn_ms", "turn", "End of turn", "until the caller's turn was taken to be over"),
    ("llm_ms", "llm", "LLM first token", "from then to the first token"),
    ("tools_ms", "tools", "Tools", "while any of them ran"),
    ("tts_ms", "tts", "Voice first byte", "from its first sentence to its first byte"),
    ("rest_ms", "rest", "Rest", "further LLM requests, sentences being put together, the way out"),
)


def write_report(folder: Path) -> Path:
    """Write the page of a call into its folder and return its path.

    Raises:
        FileNotFoundError: there is no such folder, or nothing of a call in it.
    """
    call = Call.read(folder)
    page = folder / PAGE
    _write(page, _call_page(call))
    return page


def write_index(calls_dir: Path) -> Path:
    """Write the pages that are missing or older than their call, and the index; return its path.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    if not calls_dir.is_dir():
        raise FileNotFoundError(f"{calls_dir} is not a directory, so there are no calls in it.")
    rows = []
    for folder in call_folders(calls_dir):
        # The outbox may tidy a call away while we write.
        with suppress(FileNotFoundError):
            if _is_stale(folder):
                write_report(folder)
            rows.append(_index_row(Call.read(folder, with_sound=False)))
    index = calls_dir / INDEX
    _write(index, _index_page(rows))
    return index


def main(calls_dir: Path, wanted: str | None) -> int:
    """Write the page of one call, or all of them and the index; returns the exit status."""
    try:
        page = write_report(find_call(calls_dir, wanted)) if wanted else write_index(calls_dir)
    except (LookupError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(page.resolve().as_uri())
    return 0


def call_folders(calls_dir: Path) -> list[Path]:
    """The folders that hold a call, newest first; a half-written one counts."""
    found = [path for path in calls_dir.glob("*/") if path.is_dir() and _holds_a_call(path)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def find_call(calls_dir: Path, wanted: str) -> Path:
    """The folder of a call named by its path, its folder's name or a part of that.

    Raises:
        LookupError: with a sentence that says why there is not exactly one.
    """
    for path in (Path(wanted), calls_dir / wanted):
        if path.is_dir() and _holds_a_call(path):
            return path
    found = [path for path in call_folders(calls_dir) if wanted in path.name]
    if len(found) == 1:
        return found[0]
    if not found:
        raise LookupError(f"There is no call {wanted!r} in {calls_dir}.")
    names = ", ".join(path.name for path in found[:5])
    raise LookupError(f"{wanted!r} is a part of {len(found)} calls' names: {names}")


def _holds_a_call(folder: Path) -> bool:
    return any((folder / name).exists() for name in (RECORD, JOURNAL, DELIVERY))


def _is_stale(folder: Path) -> bool:
    """Whether the page of a call is missing or older than what it is made of."""
    page = folder / PAGE
    if not page.exists() or not (folder / RECORD).exists():
        return True
    sources = [*folder.iterdir(), *(Path(__file__).with_suffix(f".{kind}") for kind in SOURCES)]
    return max(path.stat().st_mtime for path in sources) > page.stat().st_mtime


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    # As private as the call itself.
    with os.fdopen(open_private(unfinished, flags), "wb") as file:
        file.write(text.encode("utf-8", "replace"))
    os.replace(unfinished, path)


# What is known of a call


@dataclass(frozen=True)
class Sound:
    """A recording: int16 samples, one row per moment, one column per side."""

    samples: npt.NDArray[np.int16]
    rate: int

    @property
    def length_ms(self) -> float:
        return len(self.samples) / self.rate * 1000


@dataclass(frozen=True)
class Call:
    """A call folder as far as it can be read; `notices` say in sentences what cannot."""

    folder: Path
    record: Row
    sound: Sound | None
    notices: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path, *, with_sound: bool = True) -> Call:
        """What the folder holds; raises FileNotFoundError when that is nothing of a call."""
        if not _holds_a_call(folder):
            raise FileNotFoundError(f"{folder} holds no call: no {RECORD} and no {JOURNAL}.")
        notices = []
        record = _finished_record(folder)
        if record is None:
            record = _record_so_far(folder)
            going_on = Lock(folder).is_taken
            record["ending"] = {"reason": IN_PROGRESS if going_on else "process-died"}
            notices.append(
                "This call is still going on; here is what was written down so far."
                if going_on
                else "This call is not closed yet: that happens at the next start of the bot."
            )
        sound = None
        if with_sound:
            try:
                sound = _read_sound(folder)
            except (OSError, EOFError, ValueError, wave.Error) as error:
                notices.append(f"The recording cannot be read: {error or 'it is not complete'}.")
        return cls(folder, record, sound, tuple(notices))

    @property
    def turns(self) -> list[Row]:
        """In order of their start; a turn without a time or a known speaker is left out."""
        turns = [
            turn
            for turn in _rows(self.record, "turns")
            if turn.get("role") in SIDES and _number(turn, "start_ms") is not None
        ]
        return sorted(turns, key=_start_ms)

    @property
    def tools(self) -> list[Row]:
        return _rows(self.record, "tools")

    @property
    def agent(self) -> str:
        agent = _row(self.record, "agent")
        return _text(agent, "name") or _text(agent, "id") or "a bot"

    @property
    def started_at(self) -> datetime | None:
        return _time(self.record, "started_at")

    @property
    def duration_ms(self) -> float:
        last = max((_end_ms(turn) for turn in self.turns), default=0.0)
        return _number(self.record, "duration_ms") or last

    @property
    def ending(self) -> tuple[str, str]:
        """The reason and its sentence."""
        ending = _row(self.record, "ending")
        reason = _text(ending, "reason") or "unknown"
        return reason, _text(ending, "detail") or ENDINGS.get(reason, "")

    @property
    def errors(self) -> list[tuple[float | None, Row]]:
        """(position in the recording or None, error)."""
        zero = self._recording_zero()
        placed: list[tuple[float | None, Row]] = []
        for error in _rows(self.record, "errors"):
            at = _time(error, "at")
            position = None
            if at is not None and zero is not None:
                position = max(at.timestamp() * 1000 - zero, 0.0)
            placed.append((position, error))
        return placed

    def _recording_zero(self) -> float | None:
        """Epoch milliseconds of the recording's first sample."""
        for turn in self.turns:
            if at := _time(turn, "started_at"):
                return at.timestamp() * 1000 - _start_ms(turn)
        return self.started_at.timestamp() * 1000 if self.started_at else None

    @property
    def responses(self) -> list[tuple[Row, float]]:
        """(turn of the bot, milliseconds the caller had waited for it)."""
        found = []
        for turn in self.turns:
            total = _number(_row(turn, "latency"), "total_ms")
            if turn["role"] == "assistant" and total is not None and total > 0:
                found.append((turn, total))
        return found


def _finished_record(folder: Path) -> Row | None:
    with suppress(OSError, ValueError):
        record = json.loads((folder / RECORD).read_bytes())
        return record if isinstance(record, dict) else None
    return None


def _record_so_far(folder: Path) -> Row:
    record = CallRecord()
    for event in read_lines(folder / JOURNAL):
        with suppress(KeyError, TypeError, ValueError):
            record.apply(event)
    return record.as_dict() if record.started else {"call_id": record.call_id}


def _read_sound(folder: Path) -> Sound | None:
    """recording.wav, or the chunks where it was not made; None where nothing was recorded."""
    if (folder / RECORDING).exists():
        with open(folder / RECORDING, "rb") as file, wave.open(file) as header:
            if header.getsampwidth() != 2:
                raise wave.Error(f"it has {8 * header.getsampwidth()} bits per sample, not 16")
            rate, sides, start = header.getframerate(), header.getnchannels(), file.tell()
        size = (folder / RECORDING).stat().st_size - start
        count = size // (2 * sides)
        if not count:
            return None
        samples = np.memmap(folder / RECORDING, "<i2", "r", start, (count, sides))
        return Sound(samples, rate)
    chunks = sorted(folder.glob("chunk-*.pcm"))
    events = (event for event in read_lines(folder / JOURNAL) if event.get("event") == "chunk")
    described = next(events, None)
    if not chunks or described is None:
        return None
    rate = int(_number(described, "sample_rate") or 0)
    sides = int(_number(described, "num_channels") or 0)
    if rate <= 0 or sides <= 0:
        return None
    pcm = b"".join(chunk.read_bytes() for chunk in chunks)
    whole = len(pcm) // (2 * sides) * 2 * sides
    samples = np.frombuffer(pcm[:whole], "<i2").reshape(-1, sides)
    return Sound(samples, rate) if len(samples) else None


# Reading what may be anything


def _rows(record: Row, name: str) -> list[Row]:
    rows = record.get(name)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _row(record: Row, name: str) -> Row:
    row = record.get(name)
    return row if isinstance(row, dict) else {}


def _number(row: Row, name: str) -> float | None:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def _time(row: Row, name: str) -> datetime | None:
    with suppress(ValueError, TypeError, OverflowError):
        time = datetime.fromisoformat(row.get(name) or "")
        return time if time.tzinfo else None
    return None


def _start_ms(turn: Row) -> float:
    return _number(turn, "start_ms") or 0.0


def _end_ms(turn: Row) -> float:
    return max(_number(turn, "end_ms") or 0.0, _start_ms(turn))


# Sound


def _waves(sound: Sound, bucket_ms: float) -> list[str]:
    """Per side the peak of each bucket as a byte, base64; soft speech is lifted to be seen."""
    edges = np.arange(0, sound.length_ms, bucket_ms) * sound.rate / 1000
    edges = edges.astype(np.int64)
    sides = sound.samples.shape[1]
    peaks = np.zeros((len(edges), min(sides, 2)))
    # In stretches, so that hours of audio are never in memory at once.
    for first in range(0, len(edges), 2000):
        begin = int(edges[first])
        stretch = edges[first : first + 2000]
        end = int(edges[first + 2000]) if first + 2000 < len(edges) else len(sound.samples)
        block = np.abs(sound.samples[begin:end, :2].astype(np.int32))
        peaks[first : first + len(stretch)] = np.maximum.reduceat(block, stretch - begin)
    loudest = np.maximum(peaks.max(axis=0), QUIET_LEVEL)
    drawn = np.round((peaks / loudest) ** 0.8 * 255).astype(np.uint8)
    return [_base64(drawn[:, side].tobytes()) for side in range(drawn.shape[1])]


def _embedded_rate(sound: Sound) -> int | None:
    """The rate at which the recording goes into the page; None when it is too long for that."""
    seconds = sound.length_ms / 1000
    for divisor in RATE_DIVISORS:
        rate = sound.rate / divisor
        size = seconds * rate * min(sound.samples.shape[1], 2)
        if rate.is_integer() and LOWEST_RATE <= rate <= HIGHEST_RATE and size <= SOUND_BYTES:
            return int(rate)
    return None


def _packed(sound: Sound, rate: int) -> str:
    """8 bits per sample, companded with mu = 255, side after side, deflated, base64."""
    samples = np.asarray(sound.samples[:, :2], np.float32) / 32768
    if rate != sound.rate:
        samples = soxr.resample(samples, sound.rate, rate)
    level = np.log1p(255 * np.minimum(np.abs(samples), 1)) / math.log(256)
    companded = (np.round(np.copysign(level, samples) * 127) + 128).astype(np.uint8)
    return _base64(zlib.compress(companded.T.tobytes(), 9))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


# Pages


def _call_page(call: Call) -> str:
    length_ms = max(call.sound.length_ms if call.sound else call.duration_ms, 1.0)
    bucket_ms = max(BUCKET_MS, length_ms / MOST_BUCKETS)
    rate = _embedded_rate(call.sound) if call.sound else None
    sound: Row | None = None
    if call.sound and rate:
        sound = {"rate": rate, "sides": min(call.sound.samples.shape[1], 2)}
    elif call.sound and (call.folder / RECORDING).exists():
        sound = {"file": RECORDING}
    data = {
        "length_ms": length_ms,
        "bucket_ms": bucket_ms,
        "waves": _waves(call.sound, bucket_ms) if call.sound else [],
        "sound": sound,
        "turns": [
            {
                "side": SIDES.index(turn["role"]),
                "start_ms": _start_ms(turn),
                "end_ms": _end_ms(turn),
                "interrupted_ms": _number(turn, "interrupted_ms"),
            }
            for turn in call.turns
        ],
        "waits": [
            {"from_ms": _start_ms(turn) - total, "parts": _parts(call, turn, total)}
            for turn, total in call.responses
        ],
        "marks": [
            {"at_ms": at, "bad": bool(tool.get("error")), "name": _text(tool, "name")}
            for tool in call.tools
            if (at := _number(tool, "at_ms")) is not None
        ]
        + [
            {"at_ms": at, "bad": True, "name": _text(error, "message")}
            for at, error in call.errors
            if at is not None
        ],
    }
    packed = _packed(call.sound, rate) if call.sound and rate else ""
    body = f"""
<main>
{_head(call)}
{_player(call, sound, rate)}
<div class="columns">
<section aria-label="Transcript">
<ol class="transcript">
{_transcript(call)}
</ol>
</section>
<div class="beside">
{_responses_card(call)}
{_usage_card(call)}
{_details_card(call)}
</div>
</div>
</main>
<script type="application/json" id="call">{_json(data)}</script>
<script type="application/octet-stream" id="sound">{packed}</script>
"""
    title = f"Call with {call.agent}" + (f", {_day(call.started_at)}" if call.started_at else "")
    return _page(title, body, script=_asset("report.js"))


def _head(call: Call) -> str:
    reason, sentence = call.ending
    tone = "good" if reason in GOOD_ENDINGS else "bad" if reason in BAD_ENDINGS else ""
    when = ""
    if call.started_at:
        when = f'<time datetime="{call.started_at.isoformat()}">{_day(call.started_at)}</time>'
    ending = ""
    if reason != "unfinished":
        ending = (
            f'<span class="badge {tone}">{_h(reason)}</span><span>{_text_span(sentence)}</span>'
        )
    notices = "".join(f'<p class="notice" role="status">{_h(text)}</p>' for text in call.notices)
    facts = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in _facts(call))
    return f"""<header class="head">
<p class="muted">{when}</p>
<h1>Call with {_text_span(call.agent)}</h1>
<p class="ending">{ending}</p>
{notices}
<dl class="facts">{facts}</dl>
</header>"""


def _facts(call: Call) -> Iterator[tuple[str, str]]:
    yield "Duration", _clock(call.duration_ms)
    by_bot = sum(turn["role"] == "assistant" for turn in call.turns)
    count = len(call.turns)
    yield "Turns", f"{count} <small>{count - by_bot} caller, {by_bot} bot</small>"
    if totals := [total for _, total in call.responses]:
        slowest = f"<small>slowest {_seconds(max(totals))}</small>"
        yield "Typical response", f"{_seconds(statistics.median(totals))} {slowest}"
    if cuts := sum(_number(turn, "interrupted_ms") is not None for turn in call.turns):
        yield "Interruptions", str(cuts)
    if call.tools:
        failed = sum(bool(tool.get("error")) for tool in call.tools)
        yield "Tools", f"{len(call.tools)}" + (f" <small>{failed} failed</small>" if failed else "")
    if call.errors:
        yield "Errors", str(len(call.errors))


PLAYER = """<section class="card player" aria-label="Recording">
<div class="stage">
<div class="lanes" aria-hidden="true">
<span class="caller">Caller</span><i></i><span class="bot">Bot</span><i></i>
</div>
<div id="timeline" role="slider" tabindex="0" aria-label="Position in the call"
 aria-valuemin="0" aria-valuemax="{seconds}" aria-valuenow="0">
<canvas role="img" aria-label="The call over time: caller above, bot below"></canvas>
<div id="cursor"></div>
<div id="tip" hidden></div>
</div>
</div>
<div class="controls">
<button id="play" aria-label="Play" disabled{hidden}>
<svg class="start" viewBox="0 0 16 16" aria-hidden="true"><path d="M3 1l12 7-12 7z"/></svg>
<svg class="pause" viewBox="0 0 16 16" aria-hidden="true"><path d="M2 1h4v14H2zM10 1h4v14h-4z"/>
</svg>
</button>
<span id="time" aria-hidden="true"></span>
<span id="note" role="status">{note}</span>
<span class="keys muted"{hidden}>{keys}</span>
<button id="speed" class="small" aria-label="Speed" disabled{hidden}>1\u00d7</button>
<button id="wider" class="small" aria-label="Show more of the call">\u2212</button>
<button id="closer" class="small" aria-label="Show less of the call, larger">+</button>
</div>
<audio id="recording" preload="auto"></audio>
</section>"""
KEYS = (
    "<kbd>space</kbd> plays, <kbd>\u2190</kbd> <kbd>\u2192</kbd> seek, "
    "<kbd>shift</kbd> with them by turn"
)


def _player(call: Call, sound: Row | None, rate: int | None) -> str:
    if sound is None:
        note = "There is no recording of this call."
    elif rate is None:
        note = f"Too long to be inside this page: it is played from {RECORDING} beside it."
    elif call.sound and rate < call.sound.rate:
        note = f"In this page at {rate / 1000:g} kHz."
    else:
        note = ""
    seconds = (call.sound.length_ms if call.sound else call.duration_ms) / 1000
    hidden = "" if sound else " hidden"
    return PLAYER.format(note=note, seconds=round(seconds), keys=KEYS, hidden=hidden)


def _transcript(call: Call) -> str:
    speakers = {_text(turn, "user_id") for turn in call.turns if turn["role"] == "user"}
    entries = [(_start_ms(turn), _turn(turn, len(speakers) > 1)) for turn in call.turns]
    entries += [(_number(tool, "at_ms") or 0.0, _tool(tool)) for tool in call.tools]
    entries += [
        (_number(node, "at_ms") or 0.0, f'<li class="node">{_text_span(_text(node, "name"))}</li>')
        for node in _rows(call.record, "nodes")
    ]
    entries += [
        (at if at is not None else math.inf, _error(at, error)) for at, error in call.errors
    ]
    if not entries:
        return '<li class="muted">Nothing was said.</li>'
    return "\n".join(entry for _, entry in sorted(entries, key=lambda entry: entry[0]))


def _turn(turn: Row, several_speakers: bool) -> str:
    role, start = turn["role"], _start_ms(turn)
    side = "bot" if role == "assistant" else "caller"
    classes = ["turn", side]
    about = []
    if several_speakers and _text(turn, "user_id"):
        about.append(f"<span>{_text_span(_text(turn, 'user_id'))}</span>")
    total = _number(_row(turn, "latency"), "total_ms")
    if total is not None and role == "assistant":
        waited = f"after {_seconds(total)}" if total > 0 else "before the caller had finished"
        about.append(f"<span>{waited}</span>")
    cut = _number(turn, "interrupted_ms")
    if cut is not None:
        classes.append("cut")
        about.append(f'<span class="wrong">interrupted at {_clock(cut)}</span>')
    if turn.get("estimated_cut"):
        classes.append("estimated")
        about.append("<span>text estimated: the voice does not say when its words are heard</span>")
    language = _text(turn, "language")
    lang = f' lang="{_h(language)}"' if re.fullmatch(r"[A-Za-z0-9-]{1,35}", language) else ""
    name = NAMES[role]
    return f"""<li class="{" ".join(classes)}">
<div class="said" data-ms="{start:.0f}"{lang}><p dir="auto">{_h(_text(turn, "text"))}</p></div>
<div class="about"><button data-ms="{start:.0f}" aria-label="{name}, play from {_clock(start)}">\
<span class="who">{name}</span> {_clock(start)}</button>{"".join(about)}</div>
</li>"""


def _tool(tool: Row) -> str:
    error, duration = _text(tool, "error"), _number(tool, "duration_ms")
    took = f", {_seconds(duration)}" if duration is not None else ""
    tone = "wrong" if error else "muted"
    result = _text(tool, "result")
    parts = [("Arguments", _pretty(_text(tool, "arguments")))]
    parts += [("Update", _pretty(_text(row, "content"))) for row in _rows(tool, "updates")]
    parts += [("Error", error)] if error else []
    parts += [("Result", _pretty(result))] if result and result != error else []
    shown = "".join(f'<h3>{name}</h3><pre dir="auto">{_h(text)}</pre>' for name, text in parts)
    brief = f'<span class="brief wrong" dir="auto">{_h(_shortened(error))}</span>' if error else ""
    return f"""<li class="aside"><details class="{"failed" if error else ""}">
<summary><code>{_h(_text(tool, "name"))}</code>\
<code class="muted">{_h(_brief(_text(tool, "arguments")))}</code>
<span class="{tone}">{_h(_text(tool, "status"))}{took}</span>{brief}</summary>
{shown}
</details></li>"""


def _error(at: float | None, error: Row) -> str:
    origin = ", ".join(
        _h(text) for name in ("processor", "category") if (text := _text(error, name))
    )
    when = f'<button class="when" data-ms="{max(at, 0):.0f}">{_clock(at)}</button> ' if at else ""
    return f"""<li class="aside"><div class="failed">{when}<strong class="wrong">Error</strong>
<span class="muted">{origin}</span><p dir="auto">{_h(_text(error, "message"))}</p></div></li>"""


def _parts(call: Call, turn: Row, total: float) -> list[tuple[str, float]]:
    """(colour, ms) one after the other, the rest last; they add up to at least `total`."""
    latency = _row(turn, "latency")
    known = {name: max(_number(latency, name) or 0.0, 0.0) for name, *_ in PARTS}
    # Hearing happens while the end of the turn is awaited: what is left of it comes after.
    known["end_of_turn_ms"] = max(known["end_of_turn_ms"] - known["stt_ms"], 0.0)
    known["tools_ms"] = _tools_ms(call, _start_ms(turn) - total, _start_ms(turn))
    known["rest_ms"] = max(total - sum(known.values()), 0.0)
    return [(colour, known[name]) for name, colour, *_ in PARTS if known[name] > 0]


def _tools_ms(call: Call, begin: float, end: float) -> float:
    """For how long of a stretch of the call at least one tool ran."""
    busy, done = 0.0, begin
    for tool in sorted(call.tools, key=lambda tool: _number(tool, "at_ms") or 0.0):
        at, duration = _number(tool, "at_ms"), _number(tool, "duration_ms")
        if at is not None and duration is not None:
            until = min(at + duration, end)
            busy += max(until - max(at, done), 0.0)
            done = max(done, until)
    return busy


def _responses_card(call: Call) -> str:
    if not call.responses:
        return ""
    rows = [(turn, total, _parts(call, turn, total)) for turn, total in call.responses]
    longest = max(sum(ms for _, ms in parts) for *_, parts in rows)
    labels = {colour: label for _, colour, label, _ in PARTS}
    used = {colour for *_, parts in rows for colour, _ in parts}
    legend = "".join(
        f'<li title="{_h(meaning)}"><i class="part-{colour}"></i>{label}</li>'
        for _, colour, label, meaning in PARTS
        if colour in used
    )
    bars = []
    for turn, total, parts in rows:
        spoken = ", ".join(f"{labels[colour]} {_seconds(ms)}" for colour, ms in parts)
        pieces = "".join(
            f'<i class="part-{colour}" style="width: {ms / longest * 100:.2f}%"'
            f' title="{labels[colour]} {_seconds(ms)}"></i>'
            for colour, ms in parts
        )
        at = _start_ms(turn)
        bars.append(
            f'<li><button class="when" data-ms="{at:.0f}"'
            f' aria-label="Play the response at {_clock(at)}">{_clock(at)}</button>'
            f'<div class="bar" role="img" aria-label="{spoken}">{pieces}</div>'
            f"<output>{_seconds(total)}</output></li>"
        )
    return f"""<section class="card"><h2>How long the caller waited</h2>
<ul class="legend">{legend}</ul>
<ol class="bars">{"".join(bars)}</ol></section>"""


USAGE = {
    "prompt_tokens": "Tokens read",
    "cached_tokens": "of these cached",
    "completion_tokens": "Tokens written",
    "tts_characters": "Characters spoken",
    "stt_seconds": "Seconds heard",
}
SERVICES = {"stt": "Ears", "llm": "Brain", "tts": "Voice"}


def _usage_card(call: Call) -> str:
    usage = _row(call.record, "usage")
    pairs = [
        (USAGE.get(name, name), f"{value:,.10g}")
        for name in [*USAGE, *sorted(usage.keys() - USAGE.keys())]
        if (value := _number(usage, name)) is not None
    ]
    models = _row(call.record, "models")
    for service in [*SERVICES, *sorted(models.keys() - SERVICES.keys())]:
        if isinstance(names := models.get(service), list):
            shown = ", ".join(map(str, names))
            pairs.append((SERVICES.get(service, service), _text_span(shown)))
    return _pairs_card("Usage", pairs)


def _details_card(call: Call) -> str:
    phone = _row(call.record, "phone")
    labels = {
        "from_number": "From",
        "to_number": "To",
        "call_id": "Carrier's call id",
        "stream_id": "Carrier's stream id",
    }
    pairs = [
        (label, _text_span(_text(phone, name))) for name, label in labels.items() if phone.get(name)
    ]
    agent = _row(call.record, "agent")
    pairs += [
        (label, _text_span(text))
        for label, text in (
            ("Call id", _text(call.record, "call_id")),
            ("Agent id", _text(agent, "id")),
        )
        if text
    ]
    if call.sound:
        kilohertz = f"{call.sound.rate / 1000:g} kHz"
        sides = "stereo" if call.sound.samples.shape[1] > 1 else "mono"
        pairs.append(("Recording", f"{_clock(call.sound.length_ms)}, {kilohertz}, {sides}"))
    prompt = _text(agent, "prompt")
    more = f'<details><summary>Prompt</summary><pre dir="auto">{_h(prompt)}</pre></details>'
    return _pairs_card("Details", pairs, more if prompt else "")


def _pairs_card(title: str, pairs: list[tuple[str, str]], more: str = "") -> str:
    if not pairs and not more:
        return ""
    shown = "".join(f"<dt>{_h(name)}</dt><dd>{value}</dd>" for name, value in pairs)
    return f'<section class="card"><h2>{title}</h2><dl class="pairs">{shown}</dl>{more}</section>'


def _index_row(call: Call) -> str:
    reason, sentence = call.ending
    tone = "good" if reason in GOOD_ENDINGS else "bad" if reason in BAD_ENDINGS else ""
    totals = [total for _, total in call.responses]
    response = _seconds(statistics.median(totals)) if totals else ""
    when = f"{_day(call.started_at, '%d %b %Y')}" if call.started_at else call.folder.name
    return f"""<tr>
<td class="when"><a href="{_h(call.folder.name)}/{PAGE}">{_h(when)}</a></td>
<td class="agent">{_text_span(call.agent)}</td>
<td class="picture">{_strip(call)}</td>
<td class="number duration">{_clock(call.duration_ms)}</td>
<td class="number turns">{len(call.turns)}</td>
<td class="number response">{response}</td>
<td class="end"><span class="badge {tone}" title="{_h(sentence)}">{_h(reason)}</span></td>
<td class="delivery">{_delivery(call.folder)}</td>
</tr>"""


def _delivery(folder: Path) -> str:
    """What of the call has reached Roark, in a few words."""
    try:
        kept = Folder.load(folder)
    except (OSError, Unreadable):
        return '<span class="wrong">cannot be read</span>'
    if kept.destination is None:
        return '<span class="muted">kept here</span>'
    if kept.steps_left or kept.ended is None:
        return '<span class="wrong">undelivered</span>'
    if kept.steps_given_up:
        return f'delivered, <span class="wrong">{len(kept.steps_given_up)} given up</span>'
    return "delivered"


def _strip(call: Call) -> str:
    """The course of the conversation, small: caller above, bot below."""
    length = max(call.duration_ms, 1.0)
    bars = "".join(
        f'<rect class="strip-{"bot" if turn["role"] == "assistant" else "caller"}" rx="1"'
        f' x="{_start_ms(turn) / length * 150:.1f}" y="{12 if turn["role"] == "assistant" else 2}"'
        f' width="{max((_end_ms(turn) - _start_ms(turn)) / length * 150, 1):.1f}" height="8"/>'
        for turn in call.turns
    )
    return f'<svg viewBox="0 0 150 22" aria-hidden="true">{bars}</svg>'


def _index_page(rows: list[str]) -> str:
    columns = (
        ("", "Started"),
        ("agent", "Agent"),
        ("picture", "Conversation"),
        ("number", "Duration"),
        ("number turns", "Turns"),
        ("number response", "Response"),
        ("", "Ending"),
        ("", "Roark"),
    )
    heads = "".join(f'<th scope="col" class="{name}">{label}</th>' for name, label in columns)
    count = "1 call" if len(rows) == 1 else f"{len(rows)} calls"
    empty = '<tr><td colspan="8" class="muted">No calls yet.</td></tr>'
    body = f"""
<main>
<header class="head"><h1>Calls</h1><p class="muted">{count}, newest first</p></header>
<div class="card"><table><thead><tr>{heads}</tr></thead>
<tbody>{"".join(rows) or empty}</tbody></table></div>
</main>
"""
    return _page("Calls", body)


def _page(title: str, body: str, script: str = "") -> str:
    digest = _base64(hashlib.sha256(script.encode()).digest())
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "media-src blob: file: 'self'"
    )
    run = f"<script>{script}</script>\n" if script else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_h(title)}</title>
<style>
{_asset("report.css")}</style>
</head>
<body>{body}{run}</body>
</html>
"""


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


# Text


def _h(text: str) -> str:
    """Text as HTML text or attribute; control characters, which HTML cannot hold, are left out."""
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "", text))


def _text_span(text: str) -> str:
    """Text of unknown direction within a line of ours."""
    return f"<bdi>{_h(text)}</bdi>"


def _json(value: Any) -> str:
    """JSON for inside a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _pretty(text: str) -> str:
    """JSON with its lines broken, anything else as it is."""
    with suppress(ValueError):
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    return text


def _brief(arguments: str) -> str:
    """A tool's arguments as they are written in a call, shortened."""
    with suppress(ValueError):
        values = json.loads(arguments)
        if isinstance(values, dict):
            pairs = [f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in values.items()]
            return _shortened(f"({', '.join(pairs)})")
    return _shortened(f"({arguments})")


def _shortened(text: str, length: int = 120) -> str:
    return text if len(text) <= length else text[: length - 1] + "\u2026"


def _clock(ms: float) -> str:
    seconds = int(max(ms, 0) // 1000)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"


def _seconds(ms: float) -> str:
    return f"{ms / 1000:.2f} s" if ms >= 1000 else f"{ms:.0f} ms"


def _day(at: datetime, form: str = "%d %B %Y") -> str:
    zone = "" if at.utcoffset() else " UTC"
    return f"{at:{form}, %H:%M}".lstrip("0") + zone
