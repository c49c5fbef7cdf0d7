"""What is known of the closed calls of a directory, so that no process reads them all again.

    .catalog.jsonl   a line for each closed call; the last line about a folder counts

A line holds as long as the two files that decide the call's state have their size and time. The
file is a cache: without it, or with lines of it lost, folders are read again, that is all. Lines
are appended by every process, whole ones by one write; it is written anew when most are outdated.
"""

import os
import stat
from collections.abc import Container, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from roark import folder as folders
from roark.folder import DELIVERY, ENDED, Folder, as_json

CATALOG = ".catalog.jsonl"
# So many outdated lines are left alone.
OUTDATED_LINES = 1000
# What was learnt is written when it is so much, and not only when all folders were looked through:
# a process may end before.
UNSAVED_LINES = 100


@dataclass(frozen=True, slots=True)
class Entry:
    """A closed call.

    Parameters:
        name: Of its folder.
        stamp: Size and time (ns) of delivery.jsonl and of call-ended.json.
        looked_at: The folder's own time (ns) when `size` was its size in bytes.
        seconds: Its length.
        reason: Why it ended.
        left: Address -> how many requests it still has to get.
        given_up: How many requests nobody will take.
        lost: Chunks that nobody has.
        closed_at: Epoch seconds.
    """

    name: str
    call_id: str
    stamp: tuple[int, ...]
    looked_at: int
    size: int
    seconds: float
    reason: str
    left: dict[str, int]
    is_sent: bool
    given_up: int
    lost: int
    closed_at: float


class Catalog:
    """The entries of one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / CATALOG
        self._entries: dict[str, Entry] = {}
        self._unsaved: list[Entry] = []
        self._lines = 0
        for line in folders.read_lines(self._path):
            self._lines += 1
            with suppress(TypeError, KeyError):
                entry = Entry(**{**line, "stamp": tuple(line["stamp"])})
                self._entries[entry.name] = entry

    @property
    def names(self) -> Container[str]:
        """The names of the folders of which something is known."""
        return self._entries

    def settled(self, name: str) -> Entry | None:
        """A call of which nothing was left, and to which nothing came, by one look at its folder.

        The folder's own time tells that: audio that comes late is a new file.
        """
        known = self._entries.get(name)
        if known is None or known.left:
            return None
        with suppress(OSError):
            if os.stat(f"{self._directory}/{name}").st_mtime_ns == known.looked_at:
                return known
        return None

    def entry(self, name: str) -> Entry | None:
        """What is known of a closed call, if it still holds."""
        known = self._entries.get(name)
        if known is None:
            return None
        path = f"{self._directory}/{name}"
        try:
            if _stamp(path) != known.stamp:
                return None
            looked_at = os.stat(path).st_mtime_ns
            if looked_at != known.looked_at:
                # A page was made of it, or audio came late.
                size, has_chunks = _size(path)
                if has_chunks:
                    return None
                known = self._keep(replace(known, looked_at=looked_at, size=size))
        except OSError:
            return None
        return known

    def look(self, name: str) -> Entry | Folder:
        """A closed call's entry, or the folder of one that is not closed.

        What is not known yet is read: that raises Unreadable or OSError.
        """
        if known := self.entry(name):
            return known
        path = self._directory / name
        stamp = _stamp(path) if os.path.exists(path / f"{ENDED}.json") else None
        folder = Folder.load(path)
        return (self.learn(folder, stamp=stamp) if stamp else None) or folder

    def learn(self, folder: Folder, *, stamp: tuple[int, ...] | None = None) -> Entry | None:
        """Remembers a closed call; `stamp` is that of the files it was read from."""
        if folder.ended is None:
            return None
        looked_at = os.stat(folder.path).st_mtime_ns
        stamp = stamp or _stamp(folder.path)
        size, _ = _size(folder.path)
        return self._keep(
            Entry(
                name=folder.path.name,
                call_id=folder.call_id,
                stamp=stamp,
                looked_at=looked_at,
                size=size,
                seconds=round(folder.seconds, 3),
                reason=folder.reason,
                left=folder.left,
                is_sent=bool(folder.destinations),
                given_up=len(folder.steps_given_up),
                lost=len(folder.lost),
                closed_at=folder.closed_at.timestamp(),
            )
        )

    def _keep(self, entry: Entry) -> Entry:
        self._entries[entry.name] = entry
        self._unsaved.append(entry)
        if len(self._unsaved) >= UNSAVED_LINES:
            self.save()
        return entry

    def save(self, names: Iterable[str] | None = None) -> None:
        """Writes what was learnt; with the `names` of all folders there are, forgets the others."""
        if names is not None:
            self._entries = {name: self._entries[name] for name in names if name in self._entries}
        outdated = self._lines + len(self._unsaved) - len(self._entries)
        # A disk that does not take it costs the next process some time.
        with suppress(OSError):
            if outdated > OUTDATED_LINES + len(self._entries):
                folders.replace(self._path, _lines(self._entries.values()))
                self._lines = len(self._entries)
            elif self._unsaved:
                folders.append_lines(self._path, _lines(self._unsaved))
                self._lines += len(self._unsaved)
        self._unsaved.clear()


def _lines(entries: Iterable[Entry]) -> bytes:
    return b"".join(as_json(asdict(entry)) + b"\n" for entry in entries)


def _stamp(path: Path | str) -> tuple[int, ...]:
    delivery, ended = os.stat(f"{path}/{DELIVERY}"), os.stat(f"{path}/{ENDED}.json")
    return delivery.st_size, delivery.st_mtime_ns, ended.st_size, ended.st_mtime_ns


def size_of(path: Path) -> int:
    """Bytes of a folder's files."""
    return _size(path)[0]


def _size(path: Path | str) -> tuple[int, bool]:
    """Bytes of a folder's files, and whether chunks are among them."""
    size, has_chunks = 0, False
    with os.scandir(path) as entries:
        for entry in entries:
            status = entry.stat()
            size += status.st_size if stat.S_ISREG(status.st_mode) else 0
            has_chunks |= entry.name.startswith("chunk-")
    return size, has_chunks
