"""What is known of a call: its folder read as far as it goes, whatever lies in it."""

from __future__ import annotations

import json
import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from roark.call import ENDINGS, CallRecord
from roark.folder import DELIVERY, JOURNAL, RECORD, RECORDING, Lock, read_lines
from roark.report.sound import Sound

Row = dict[str, Any]

GOOD_ENDINGS = ("agent-ended", "client-disconnected", "transferred")
BAD_ENDINGS = ("error", "process-died")
IN_PROGRESS = "in progress"
SIDES = ("user", "assistant")

# What a caller waits for, in this order: name in the record, colour, label, explanation.
PARTS = (
    ("pause_ms", "pause", "Pause", "from the caller's last sound until it was called a pause"),
    ("verdict_ms", "turn", "End of turn", "until their turn was taken to be over"),
    ("transcript_ms", "stt", "Transcript", "until their last words were recognised"),
    ("llm_ms", "llm", "LLM", "to its first token; of each request, where tools were called"),
    ("tools_ms", "tools", "Tools", "while any of them ran"),
    ("voice_ms", "tts", "Voice", "from its first sentence to its first byte"),
    ("line_ms", "way", "Line", "from its first byte until the bot was to be heard"),
    ("rest_ms", "rest", "Rest", "between these: the LLM's first sentence being written"),
)


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
        if not is_a_call(files_of(folder)):
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
            except (OSError, EOFError, ValueError) as error:
                notices.append(f"The recording cannot be read: {error or 'it is not complete'}.")
        return cls(folder, record, sound, tuple(notices))

    @property
    def turns(self) -> list[Row]:
        """In order of their start; a turn without a time or a known speaker is left out."""
        turns = [
            turn
            for turn in rows_of(self.record, "turns")
            if turn.get("role") in SIDES and number_of(turn, "start_ms") is not None
        ]
        return sorted(turns, key=start_ms)

    @property
    def tools(self) -> list[Row]:
        return rows_of(self.record, "tools")

    @property
    def failed_tools(self) -> list[Row]:
        return [tool for tool in self.tools if tool.get("error")]

    @property
    def agent(self) -> str:
        agent = row_of(self.record, "agent")
        return text_of(agent, "name") or text_of(agent, "id") or "a bot"

    @property
    def other_number(self) -> str:
        """The telephone number of the person on the line, "" where it is not known."""
        phone = row_of(self.record, "phone")
        side = "to_number" if text_of(self.record, "direction") == "outbound" else "from_number"
        return text_of(phone, side)

    @property
    def started_at(self) -> datetime | None:
        return time_of(self.record, "started_at")

    @property
    def duration_ms(self) -> float:
        last = max((end_ms(turn) for turn in self.turns), default=0.0)
        return number_of(self.record, "duration_ms") or last

    @property
    def ending(self) -> tuple[str, str]:
        """The reason and its sentence."""
        ending = row_of(self.record, "ending")
        reason = text_of(ending, "reason") or "unknown"
        return reason, text_of(ending, "detail") or ENDINGS.get(reason, "")

    @property
    def errors(self) -> list[tuple[float | None, Row]]:
        """(position in the recording or None, error)."""
        zero = self._recording_zero()
        placed: list[tuple[float | None, Row]] = []
        for error in rows_of(self.record, "errors"):
            at = time_of(error, "at")
            position = None
            if at is not None and zero is not None:
                position = max(at.timestamp() * 1000 - zero, 0.0)
            placed.append((position, error))
        return placed

    def _recording_zero(self) -> float | None:
        """Epoch milliseconds of the recording's first sample."""
        for turn in self.turns:
            if at := time_of(turn, "started_at"):
                return at.timestamp() * 1000 - start_ms(turn)
        return self.started_at.timestamp() * 1000 if self.started_at else None

    @property
    def responses(self) -> list[tuple[Row, float]]:
        """(turn of the bot, milliseconds the caller had waited for it)."""
        found = []
        for turn in self.turns:
            total = number_of(row_of(turn, "latency"), "total_ms")
            if turn["role"] == "assistant" and total is not None and total > 0:
                found.append((turn, total))
        return found

    def parts(self, turn: Row, total: float) -> list[tuple[str, float]]:
        """What a wait was for: (colour, ms) in order, the rest last; adds up to `total` or more."""
        parts = row_of(row_of(turn, "latency"), "parts")
        known = {name: max(number_of(parts, name) or 0.0, 0.0) for name, *_ in PARTS}
        known["rest_ms"] = 0.0
        known["rest_ms"] = round(max(total - sum(known.values()), 0.0), 1)
        return [(colour, known[name]) for name, colour, *_ in PARTS if known[name] > 0]

    @property
    def saved(self) -> list[float]:
        """For how long, ms, each answer that was begun in the caller's pause was made in it."""
        known = (number_of(row_of(turn, "latency"), "llm_saved_ms") for turn, _ in self.responses)
        return [ms for ms in known if ms]


# Of each file of a folder its size in bytes and the epoch nanoseconds of its last change.
Files = dict[str, tuple[int, int]]


def files_of(folder: Path) -> Files:
    """What lies in a folder, by one look at it; raises OSError when we may not look."""
    found = {}
    for entry in os.scandir(folder):
        # A file may be put in its place between the two.
        with suppress(FileNotFoundError):
            status = entry.stat()
            found[entry.name] = (status.st_size, status.st_mtime_ns)
    return found


def is_a_call(files: Files) -> bool:
    """Whether there is anything of a call in a folder."""
    return not files.keys().isdisjoint((RECORD, JOURNAL, DELIVERY))


def _finished_record(folder: Path) -> Row | None:
    # Deeply nested JSON ends in a RecursionError.
    with suppress(OSError, ValueError, RecursionError):
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
        return Sound.of_wav(folder / RECORDING)
    chunks = sorted(folder.glob("chunk-*.pcm"))
    events = (event for event in read_lines(folder / JOURNAL) if event.get("event") == "chunk")
    described = next(events, None)
    if not chunks or described is None:
        return None
    rate = int(number_of(described, "sample_rate") or 0)
    sides = int(number_of(described, "num_channels") or 0)
    return Sound.of_chunks(chunks, rate, sides) if rate > 0 and sides > 0 else None


# Reading what may be anything


def rows_of(record: Row, name: str) -> list[Row]:
    """The objects of a list."""
    found = record.get(name)
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def row_of(record: Row, name: str) -> Row:
    """An object, empty where there is none."""
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def number_of(record: Row, name: str) -> float | None:
    """A finite number."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def text_of(record: Row, name: str) -> str:
    """A text; another value as JSON, "" for none."""
    value = record.get(name)
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def time_of(record: Row, name: str) -> datetime | None:
    """A moment whose time zone is known."""
    with suppress(ValueError, TypeError, OverflowError):
        moment = datetime.fromisoformat(record.get(name) or "")
        return moment if moment.tzinfo else None
    return None


def start_ms(turn: Row) -> float:
    """Where a turn begins in the recording."""
    return number_of(turn, "start_ms") or 0.0


def end_ms(turn: Row) -> float:
    """Where a turn ends in the recording, not before it begins."""
    return max(number_of(turn, "end_ms") or 0.0, start_ms(turn))


def language(turn: Row) -> str:
    """The language of a turn where it may stand in `lang`, else ""."""
    found = text_of(turn, "language")
    return found if re.fullmatch(r"[A-Za-z0-9-]{1,35}", found) else ""
