"""Calls as pages a person can read: one HTML file per call, and an index of them.

A page needs nothing but itself: style, script, transcript and sound are inside, it asks no network
for anything, and can be mailed. The sound is what decides its size: it is kept at 8 bits
(companded, as the telephone does) and at the highest of a few rates at which it stays below
`sound.SOUND_BYTES` before compression. A call too long even for 8 kHz (about 13 minutes of stereo)
is played from the recording.wav beside its page.

Everything that was said is text from outside: it is escaped where it is put in, and a content
security policy lets nothing but the page's own script run. Only the user who owns them may read
the pages. All times are UTC.

    reading.py      what a folder knows of its call
    sound.py        the recording, drawn and packed
    page.py         the frame of a page, text
    call_page.py    the page of a call, with call_page.js
    index_page.py   the index, with index_page.js

    page = write_report(Path("calls/20261121T140509-0f3c-9c41d07b"))
    report = write_index(Path("calls"))
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from roark.folder import JOURNAL, RECORD, RECORDING, reason_of
from roark.report import call_page, index_page
from roark.report.index_page import KnownIndex
from roark.report.page import SOURCES, write
from roark.report.reading import Call, Files, files_of, is_a_call

PAGE = "report.html"
INDEX = "index.html"
# How often `watch` looks for what is new.
WATCH_SECONDS = 10.0
# How old the page of a call that goes on may be meanwhile.
LIVE_PAGE_SECONDS = 60


@dataclass(frozen=True)
class Report:
    """Where the index is, and the folders that were passed over: (name, why)."""

    index: Path
    unreadable: tuple[tuple[str, str], ...]


def write_report(folder: Path) -> Path:
    """Write the page of a call into its folder and return its path.

    Raises:
        FileNotFoundError: there is no such folder, or nothing of a call in it.
    """
    page = folder / PAGE
    write(page, call_page.render(Call.read(folder)))
    return page


def write_index(calls_dir: Path, *, watched: bool = False) -> Report:
    """Write the pages that are missing or older than their call, and the index.

    What has not changed since the last time is neither read nor written again. One folder that
    cannot be read costs its own row, no other. The index of a `watched` directory looks for its
    next version by itself.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    if not calls_dir.is_dir():
        raise FileNotFoundError(f"{calls_dir} is not a directory, so there are no calls in it.")
    index = calls_dir / INDEX
    known = KnownIndex.of(index)
    code_changed_at = max(path.stat().st_mtime_ns for path in SOURCES)
    rows, unreadable = [], []
    for folder in _folders(calls_dir):
        try:
            seen = os.stat(folder).st_mtime_ns
            row = known.settled(folder.name, seen)
            if row is None:
                files = files_of(folder)
                if not is_a_call(files):
                    continue
                if _is_stale(files, code_changed_at, watched=watched):
                    write_report(folder)
                    seen, files = os.stat(folder).st_mtime_ns, files_of(folder)
                row = known.row(folder, files, seen)
            rows.append(row)
            if "damage" in row:
                unreadable.append((folder.name, row["damage"]))
        # Whatever lies in one folder must not keep the others from being shown.
        except Exception as error:
            # The outbox may tidy a call away while we look; what is not named like one may be
            # anybody's.
            if folder.is_dir() and folder.name[0].isdigit():
                unreadable.append((folder.name, reason_of(error)))
    if unreadable or not known.shows(rows, watched=watched):
        text = index_page.render(rows, unreadable, watched=watched)
        if text != known.page:
            write(index, text)
    # The index says when it was looked at last.
    os.utime(index)
    return Report(index, tuple(unreadable))


def main(
    calls_dir: Path,
    wanted: str | None,
    *,
    watch: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Write the page of one call, or all of them and the index; returns the exit status.

    It is 1 when there is no such call or directory, or when a folder could not be read. With
    `watch` the pages follow the calls until Ctrl-C.
    """
    try:
        if wanted:
            print(write_report(find_call(calls_dir, wanted)).resolve().as_uri())
            return 0
        report = write_index(calls_dir, watched=watch)
        with suppress(KeyboardInterrupt):
            print(report.index.resolve().as_uri(), flush=True)
            while watch:
                sleep(WATCH_SECONDS)
                report = write_index(calls_dir, watched=True)
    except LookupError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        # A full disk's own words name no place.
        is_nameless = error.errno and not error.filename
        print(f"{calls_dir}: {error.strerror}" if is_nameless else error, file=sys.stderr)
        return 1
    for name, why in report.unreadable:
        print(f"{name}: cannot be read, passed over: {why}", file=sys.stderr)
    return 1 if report.unreadable else 0


def find_call(calls_dir: Path, wanted: str) -> Path:
    """The folder of a call named by its path, its folder's name or a part of that.

    Raises:
        LookupError: with a sentence that says why there is not exactly one.
    """
    for path in (Path(wanted), calls_dir / wanted):
        if path.is_dir() and is_a_call(files_of(path)):
            return path
    named = [path for path in _folders(calls_dir) if wanted in path.name]
    found = [path for path in named if is_a_call(files_of(path))]
    if len(found) == 1:
        return found[0]
    if not found:
        raise LookupError(f"There is no call {wanted!r} in {calls_dir}.")
    names = ", ".join(path.name for path in found[:5])
    raise LookupError(f"{wanted!r} is a part of {len(found)} calls' names: {names}")


def _folders(directory: Path) -> list[Path]:
    """The folders in a directory, newest call first; none where there is no directory."""
    if not directory.is_dir():
        return []
    names = [entry.name for entry in os.scandir(directory) if entry.is_dir()]
    return [directory / name for name in sorted(names, reverse=True)]


def _is_stale(files: Files, code_changed_at: int, *, watched: bool) -> bool:
    """Whether the page of a call is missing or older than what it is made of."""
    if PAGE not in files:
        return True
    if RECORD not in files:
        # The call goes on, perhaps for hours, and shares the machine with us.
        return not watched or time.time_ns() - files[PAGE][1] > LIVE_PAGE_SECONDS * 1e9
    changed = [files[name][1] for name in (RECORD, JOURNAL, RECORDING) if name in files]
    return max(*changed, code_changed_at) > files[PAGE][1]
