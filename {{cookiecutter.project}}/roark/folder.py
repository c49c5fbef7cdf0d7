"""One call on disk. Everything here blocks: it runs in the outbox's thread or in a command.

    calls/20261121T140509-SmallWebRTCConnection-0-5ee1f2-9c41d07b/
        call-started.json   what Roark is told first, byte for byte
        journal.jsonl       what happened, as it happened; a killed call is closed from it
        chunk-00007.pcm     audio that Roark does not have yet
        recording.wav       all audio so far, left the caller, right the bot
        call.json           the call record
        call-ended.json     what Roark is told last, byte for byte; its presence closes the call
        delivery.jsonl      to whom the call goes, and what of it is there

A file is written beside its place, synced and renamed: it is whole or it is not there. The two
.jsonl grow line by line; a torn last line is ignored. The recording and the delivery log are
synced before a chunk is removed on their word, and at the end: a power cut in between costs at
most a request sent again. The lock is taken by whoever writes or delivers the folder, and freed
by the operating system when that process dies.

Calls are private: folders are 0700 and files 0600 from their first byte, whatever the umask.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import struct
import sys
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

STARTED = "call-started"
ENDED = "call-ended"

DELIVERY = "delivery.jsonl"
JOURNAL = "journal.jsonl"
RECORD = "call.json"
RECORDING = "recording.wav"

# Chunks that are done with are removed in batches: each batch costs two syncs.
TIDY_CHUNKS = 8
# A journal that the disk does not take may wait this long in memory.
JOURNAL_BACKLOG_BYTES = 1_000_000

WAV_HEADER_BYTES = 44
WAV_MAX_BYTES = 0xFFFFFFFF - WAV_HEADER_BYTES


def chunk_step(index: int) -> str:
    """The name of a chunk, as a file and in the delivery log."""
    return f"chunk-{index:05d}"


def folder_name(call_id: str, at: datetime) -> str:
    """A name that sorts by time, can be read, is safe on any disk and is never given twice."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", call_id).strip("-")[:48].strip("-")
    return f"{at:%Y%m%dT%H%M%S}-{readable or 'call'}-{secrets.token_hex(4)}"


def begun_at(name: str) -> datetime:
    """The time (UTC) that the name of a call's folder begins with; raises Unreadable if none."""
    text = name.split("-", 1)[0]
    try:
        # A quarter of what `strptime` takes: it is asked of every call there is.
        if len(text) == len("20261121T140509") and text[8] == "T":
            return datetime.fromisoformat(text).replace(tzinfo=UTC)
    except ValueError:
        pass
    raise Unreadable("its name does not begin with the time of a call")


def call_names(directory: Path, known: Container[str] = ()) -> list[str]:
    """The names of a directory's call folders, oldest first; whatever else lies there is not ours.

    Those that are `known` to be calls need no look.
    """
    try:
        names = [name for name in os.listdir(directory) if name[:1].isdigit()]
    except OSError:
        return []
    names.sort()
    return [
        name for name in names if name in known or os.path.exists(f"{directory}/{name}/{DELIVERY}")
    ]


def call_folders(directory: Path) -> list[Path]:
    """The call folders of a directory, oldest first."""
    return [directory / name for name in call_names(directory)]


class Unreadable(Exception):
    """A folder whose files do not say what became of its call; the text says why."""


def reason_of(error: Exception) -> str:
    """What is wrong with a folder, in words that hold nothing of its content."""
    if isinstance(error, Unreadable):
        return str(error)
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__


def make_private(directory: Path) -> str | None:
    """Closes a directory of calls to everybody else; says what was, or is, wrong with it."""
    if sys.platform == "win32":
        return None
    try:
        mode = directory.stat().st_mode & 0o777
        if not mode & 0o077:
            return None
        directory.chmod(mode & 0o700)
    except FileNotFoundError:
        return None
    except OSError as error:
        return (
            f"other users of this machine may look into {directory}, and this one may not change "
            f"that ({error.strerror}): have its owner do `chmod 700`"
        )
    return f"other users of this machine could look into {directory}; it is closed to them now"


def open_private(path: Path, flags: int) -> int:
    """A file descriptor of a file that nobody else may read, for `os.fdopen` or as an opener."""
    file = os.open(path, flags | getattr(os, "O_BINARY", 0), 0o600)
    if sys.platform != "win32" and os.fstat(file).st_mode & 0o077:
        # It was there before, from a time or a hand that did not care.
        with suppress(OSError):
            os.fchmod(file, 0o600)
    return file


class Lock:
    """One holder per folder name, over all processes.

    The lock files lie outside the folders, so that a new folder is locked before it exists.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder.parent / ".locks" / f"{folder.name}.lock"
        self._file: int | None = None

    def acquire(self) -> bool:
        """Takes the lock unless somebody has it; OSError where files cannot be locked."""
        if self._file is not None:
            return True
        _make_directory(self._path.parent)
        file = open_private(self._path, os.O_RDWR | os.O_CREAT)
        try:
            if sys.platform == "win32":
                msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(file)
            return False
        except OSError:
            os.close(file)
            raise
        self._file = file
        return True

    @property
    def is_taken(self) -> bool:
        """Whether somebody has the lock."""
        if self._file is None and self._path.exists() and self.acquire():
            self.release()
            return False
        return self._path.exists()

    def release(self, *, for_good: bool = False) -> None:
        """Lets go; `for_good` when nobody will need to lock this folder again."""
        if self._file is None:
            return
        if for_good and sys.platform != "win32":
            self._path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None


class Folder:
    """What is kept of one call, and what of it has been delivered.

    What the disk does not take stays in memory, with the reason in `disk_error`; every further
    write tries again.

    Args:
        path: Where it is.
        call_id: The call's id.
        destination: The address of the Roark it is for; None for none.
        posts: Name -> address of what gets the closed call in one request.
    """

    def __init__(
        self,
        path: Path,
        *,
        call_id: str = "",
        destination: str | None = None,
        posts: dict[str, str] | None = None,
    ) -> None:
        self.path = path
        self.posts = dict(posts or {})
        self.lock = Lock(path)
        self.call_id = call_id
        self.destination = destination
        self.started: bytes | None = None
        self.ended: bytes | None = None
        self.held: dict[int, bytes] = {}
        self.delivered: set[str] = set()
        self.given_up: dict[str, str] = {}
        self.disk_error: OSError | None = None
        self._seed = secrets.token_hex(8)
        self._format: tuple[int, int] | None = None
        self._chunks: set[int] = set()
        self._waiting: set[int] = set()
        self._files: set[int] = set()
        self._lost: set[int] = set()
        self._noted_lost: set[int] = set()
        self._silence: dict[int, int] = {}
        self._only_held: dict[int, int] = {}
        self._has_header = True
        self._recorded = 0
        self._recording_bytes = 0
        self._ending_is_final = False
        self._is_on_disk = False
        self._unwritten: dict[str, bytes] = {}
        self._journal_backlog = b""
        self._journal_is_dirty = False
        # Open from the first event until the folder is let go: opening takes longer than writing.
        self._journal: int | None = None
        header: dict[str, Any] = {"call_id": call_id, "to": destination, "seed": self._seed}
        if self.posts:
            header["posts"] = self.posts
        self._delivery_backlog = as_json(header) + b"\n"

    # Reading

    @classmethod
    def load(cls, path: Path) -> "Folder":
        """The folder as it lies on disk; for looking at. Raises Unreadable or OSError."""
        folder = cls(path)
        folder._read()
        return folder

    @classmethod
    def claim(cls, path: Path) -> "Folder | None":
        """The folder and its lock; None when somebody else has it or it is gone.

        Raises Unreadable or OSError, and then has neither.
        """
        folder = cls(path)
        if not folder.lock.acquire():
            return None
        try:
            if not (path / DELIVERY).exists():
                folder.lock.release(for_good=True)
                return None
            for name in (DELIVERY, JOURNAL):
                _mend(path / name)
            folder._read()
            for index in folder._lost - folder._noted_lost:
                folder._note(lost=index, bytes=folder._only_held[index])
        except BaseException:
            folder.lock.release()
            raise
        return folder

    def journal(self) -> list[dict[str, Any]]:
        """The events of the call as far as they were written whole."""
        return list(read_lines(self.path / JOURNAL))

    def read_record(self) -> bytes:
        """The call record (call.json); raises FileNotFoundError when there is none."""
        unwritten = self._unwritten.get(RECORD)
        return unwritten if unwritten is not None else (self.path / RECORD).read_bytes()

    def read_chunk(self, index: int) -> bytes:
        """The audio of a chunk; raises FileNotFoundError when there is none any more."""
        held = self.held.get(index)
        return held if held is not None else self._chunk_path(index).read_bytes()

    def idempotency_key(self, step: str) -> str:
        """The same for every repeat of a step, in any process."""
        return hashlib.sha256(f"{self._seed}/{step}".encode()).hexdigest()[:32]

    def is_settled(self, step: str) -> bool:
        """Whether Roark has it, or never will."""
        return step in self.delivered or step in self.given_up

    @property
    def waiting_chunks(self) -> list[int]:
        """Chunks that are still to be delivered, in order."""
        return sorted(self._waiting)

    @property
    def destinations(self) -> list[str]:
        """The addresses the call is meant for; none for a call that is only kept."""
        return [*([self.destination] if self.destination else []), *self.posts.values()]

    @property
    def left(self) -> dict[str, int]:
        """How many requests each address has still to get; those with none are left out."""
        left = dict.fromkeys((self.posts[name] for name in self.posts_left), 1)
        if self.destination and (steps := self.roark_steps_left):
            left[self.destination] = len(steps)
        return left

    @property
    def steps_left(self) -> list[str]:
        """What is still to be delivered, in order; nothing for a call that is only kept."""
        return [*self.roark_steps_left, *self.posts_left]

    @property
    def posts_left(self) -> list[str]:
        """Which of `posts` are still to be made; each once the call is closed."""
        if self.ended is None:
            return []
        return [name for name in self.posts if not self.is_settled(name)]

    @property
    def roark_steps_left(self) -> list[str]:
        """What Roark is still to get, in order."""
        if self.destination is None:
            return []
        steps = [chunk_step(index) for index in self.waiting_chunks]
        if self.started is not None and not self.is_settled(STARTED):
            steps.insert(0, STARTED)
        if self.ended is not None and not self.is_settled(ENDED):
            steps.append(ENDED)
        return steps

    @property
    def steps_given_up(self) -> list[str]:
        """What Roark will never have, in order."""
        return sorted({*self.given_up, *(chunk_step(index) for index in self._lost)})

    @property
    def lost(self) -> list[int]:
        """Chunks that nobody has."""
        return sorted(self._lost)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known of the call but its id."""
        anything = self.started or self.ended or self._chunks or self._lost
        return not anything and not self.journal()

    @property
    def is_finished(self) -> bool:
        """Closed, and nothing left to deliver or to record."""
        return self.ended is not None and not self.steps_left and not self._next_is_here()

    @property
    def is_in_memory(self) -> bool:
        """Whether something of the call is nowhere but in memory."""
        return bool(self.held or self._unwritten) or not self._is_on_disk

    @property
    def only_in_memory(self) -> list[str]:
        """What is neither on disk nor delivered, by the names of files: lost if we die now."""
        names = [f"{chunk_step(index)}.pcm" for index in sorted(self.held)]
        for name in self._unwritten:
            if not self.is_settled(name.removesuffix(".json")):
                names.append(name)
        return names

    @property
    def is_journal_dirty(self) -> bool:
        """Whether a power cut would take events along."""
        return self._journal_is_dirty

    @property
    def recording_seconds(self) -> float:
        """The length of recording.wav."""
        if self._format is None:
            return 0.0
        sample_rate, num_channels = self._format
        return self._recording_bytes / (2 * sample_rate * num_channels)

    @property
    def seconds(self) -> float:
        """The call's length: that of its recording, or what its ending says; 0 if neither."""
        if self.recording_seconds:
            return self.recording_seconds
        body = json.loads(self.ended or b"{}")
        try:
            started, ended = map(
                datetime.fromisoformat, (body["callStartedAt"], body["callEndedAt"])
            )
        except (KeyError, TypeError, ValueError):
            return 0.0
        return (ended - started).total_seconds()

    @property
    def reason(self) -> str:
        """Why the call ended; "-" while it has not."""
        return str(json.loads(self.ended or b"{}").get("callEndedReason", "-"))

    @property
    def begun_at(self) -> datetime:
        """When the folder was made, as its name says; raises Unreadable when it does not."""
        return begun_at(self.path.name)

    @property
    def closed_at(self) -> datetime:
        """When the call was closed; its beginning while it is not."""
        try:
            at = (self.path / f"{ENDED}.json").stat().st_mtime
        except FileNotFoundError:
            return self.begun_at
        return datetime.fromtimestamp(at, UTC)

    # Writing

    def create(self) -> bool:
        """Makes the folder and takes its lock; False when the disk does not let us."""
        return self._is_on_disk or self._try(self._create)

    def keep_started(self, body: bytes) -> None:
        """Keeps the body of call-started."""
        self.started = body
        self._write(f"{STARTED}.json", body)

    def keep_ended(self, body: bytes, record: bytes) -> None:
        """Keeps the call record and the body of call-ended; closes the call."""
        if not self._ending_is_final:
            self.ended = body
        self.settle_disk()
        self.sync_journal()
        self._write(RECORD, record)
        self._write_ending(self.ended or body)

    def _write_ending(self, body: bytes) -> None:
        # Never ahead of what the log says is missing: the ending speaks of the whole recording.
        if self._settle_delivery():
            self._write(f"{ENDED}.json", body)
        else:
            self._unwritten[f"{ENDED}.json"] = body

    def keep_events(self, lines: Iterable[bytes]) -> None:
        """Appends to the journal, all at once; `sync_journal` makes it last."""
        for line in lines:
            if len(self._journal_backlog) + len(line) <= JOURNAL_BACKLOG_BYTES:
                self._journal_backlog += line
                self._journal_is_dirty = True
        self._append_journal()

    def sync_journal(self) -> None:
        """Makes the journal survive a power cut."""

        def sync() -> None:
            if self._journal is None:
                _sync(self.path / JOURNAL)
            else:
                os.fsync(self._journal)

        if self._journal_is_dirty and self._is_on_disk:
            self._journal_is_dirty = not self._try(sync)

    def keep_chunk(self, index: int, pcm: bytes, sample_rate: int, num_channels: int) -> None:
        """Keeps a chunk and adds it to the recording; the first of an index counts."""
        if index in self._chunks or index in self._lost:
            return
        if self._format is None:
            self._note(format=[sample_rate, num_channels])
        self._chunks.add(index)
        self._waiting.add(index)
        self.held[index] = pcm
        self.settle_disk()

    def lose_chunk(self, index: int, size: int) -> None:
        """Remembers a chunk that nobody has: silence in the recording, a hole for Roark."""
        self._note(lost=index, bytes=size)
        self.settle_disk()

    def note_delivered(self, step: str) -> None:
        """Roark has it."""
        self._note(delivered=step)
        self.settle_disk()

    def note_given_up(self, step: str, reason: str) -> None:
        """Roark will never take it."""
        self._note(given_up=step, reason=reason)
        self.settle_disk()

    def settle_disk(self) -> None:
        """Writes what is still in memory, extends the recording, removes what is done with."""
        ending = self._unwritten.pop(f"{ENDED}.json", None)
        for name, content in list(self._unwritten.items()):
            self._write(name, content)
        self._append_journal()
        for index in sorted(self.held):
            path, pcm = self._chunk_path(index), self.held[index]
            if self.create() and self._try(lambda path=path, pcm=pcm: replace(path, pcm)):
                self._files.add(index)
            elif index not in self._waiting:
                # Delivered from memory; nothing needs it now but the recording's time line.
                self._silence[index] = len(pcm)
            else:
                if index not in self._only_held:
                    # A line may fit where a chunk does not: without it nobody would miss the chunk.
                    self._note(held=index, bytes=len(pcm))
                continue
            del self.held[index]
        if ending is not None:
            self._write_ending(ending)
        if self._is_on_disk and self._try(self._record):
            self._try(self._tidy)

    def final_ending(self) -> bytes:
        """The body of call-ended, true about the recording; from now on it does not change.

        Roark joins the chunks it has and cannot see a hole: with a chunk missing for good, every
        marker behind it would point at the wrong sound. Then nothing is said of a recording.
        """
        assert self.ended is not None
        if self._ending_is_final:
            return self.ended
        body = json.loads(self.ended)
        delivered = {index for index in self._chunks if chunk_step(index) in self.delivered}
        is_whole = not self._lost and delivered == set(range(len(self._chunks)))
        if delivered and is_whole and self._format is not None:
            body["recordingSampleRate"], body["recordingNumChannels"] = self._format
        else:
            body.pop("recordingSampleRate", None)
            body.pop("recordingNumChannels", None)
            for entry in [*body.get("transcript", []), *body.get("toolCalls", [])]:
                entry.pop("audioOffsetMs", None)
                entry.pop("endAudioOffsetMs", None)
        final = as_json(body)
        if final != self.ended:
            self.ended = final
            self._write_ending(final)
        self._note(ending="final")
        return final

    def release(self) -> None:
        """Lets another process have the folder."""
        self._close_journal()
        self._try(lambda: self.lock.release(for_good=self.is_finished))

    def remove(self) -> None:
        """Deletes the folder; its lock must be held."""
        self._close_journal()
        shutil.rmtree(self.path, ignore_errors=True)
        self.lock.release(for_good=True)

    def _read(self) -> None:
        try:
            self._read_files()
        except RecursionError:
            raise Unreadable("its JSON is nested too deeply") from None
        except (TypeError, ValueError, OverflowError) as error:
            raise Unreadable(f"its files make no sense ({type(error).__name__})") from None

    def _read_files(self) -> None:
        begun_at(self.path.name)
        self._delivery_backlog = b""
        self._has_header = False
        try:
            recorded = (self.path / RECORDING).stat().st_size - WAV_HEADER_BYTES
        except FileNotFoundError:
            recorded = 0
        for fact in read_lines(self.path / DELIVERY):
            # After a power cut the log may be ahead of the recording; the chunks are still there.
            if "recorded" not in fact or fact.get("bytes", 0) <= recorded:
                self._apply(fact)
        for name in os.listdir(self.path):
            if found := re.fullmatch(r"chunk-(\d+)\.pcm", name):
                index = int(found.group(1))
                self._files.add(index)
                self._chunks.add(index)
                if not self.is_settled(chunk_step(index)):
                    self._waiting.add(index)
        if not self._has_header:
            raise Unreadable(f"{DELIVERY} does not say whom the call is for")
        self.started = _read_body(self.path / f"{STARTED}.json")
        self.ended = _read_body(self.path / f"{ENDED}.json")
        self._is_on_disk = True
        for index, size in self._only_held.items():
            if index in self._files or index < self._recorded:
                continue
            # Its process ended before the disk took it.
            self._silence[index] = size
            if not self.is_settled(chunk_step(index)):
                self._lost.add(index)

    def _create(self) -> None:
        try:
            self.lock.acquire()
        except OSError as error:
            # Some network disks know no locks. A new call needs none; nobody will claim it either.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        _make_directory(self.path)
        # Whole from the start: without its first line nobody knows whom the call is for.
        replace(self.path / DELIVERY, self._delivery_backlog)
        self._delivery_backlog = b""
        _sync_directory(self.path.parent)
        self._is_on_disk = True

    def _note(self, **fact: Any) -> None:
        self._apply(fact)
        self._delivery_backlog += as_json(fact) + b"\n"
        self._settle_delivery()

    def _apply(self, fact: dict[str, Any]) -> None:
        match fact:
            case {"call_id": str(call_id), "to": str() | None as destination, "seed": str(seed)}:
                self.call_id, self.destination, self._seed = call_id, destination, seed
                posts = fact.get("posts")
                self.posts = cast("dict[str, str]", posts) if isinstance(posts, dict) else {}
                self._has_header = True
            case {"format": [int(sample_rate), int(num_channels)]}:
                if sample_rate <= 0 or num_channels <= 0:
                    raise Unreadable(f"its recording has the format {[sample_rate, num_channels]}")
                self._format = (sample_rate, num_channels)
            case {"held": int(index), "bytes": int(size)}:
                self._only_held[index] = size
            case {"recorded": int(index), "bytes": int(size)}:
                self._recorded, self._recording_bytes = index + 1, size
                if index not in self._lost:
                    self._chunks.add(index)
            case {"lost": int(index), "bytes": int(size)}:
                self._lost.add(index)
                self._noted_lost.add(index)
                self._silence[index] = size
            case {"delivered": str(step)}:
                self.delivered.add(step)
                self._settle(step)
            case {"given_up": str(step), "reason": str(reason)}:
                self.given_up[step] = reason
                self._settle(step)
            case {"ending": "final"}:
                self._ending_is_final = True
            case _:
                pass

    def _settle(self, step: str) -> None:
        if found := re.fullmatch(r"chunk-(\d+)", step):
            index = int(found.group(1))
            self._chunks.add(index)
            self._waiting.discard(index)

    def _append_journal(self) -> None:
        def append() -> None:
            if self._journal is None:
                self._journal = open_private(self.path / JOURNAL, APPEND)
            append_whole(self._journal, self._journal_backlog)
            self._journal_backlog = b""

        if self._journal_backlog and self.create() and not self._try(append):
            # What is wrong with the file may be mended by opening it again.
            self._close_journal()

    def _close_journal(self) -> None:
        journal, self._journal = self._journal, None
        if journal is not None:
            with suppress(OSError):
                os.close(journal)

    def _settle_delivery(self) -> bool:
        """Writes the facts that the disk has not taken yet; whether it has them all now."""
        return self.create() and (not self._delivery_backlog or self._try(self._append_delivery))

    def _append_delivery(self) -> None:
        append_lines(self.path / DELIVERY, self._delivery_backlog)
        self._delivery_backlog = b""

    def _next_is_here(self) -> bool:
        return self._recorded in self._silence or self._recorded in self._files

    def _record(self) -> None:
        """Appends to recording.wav what comes next, as far as it is here."""
        while self._format is not None and self._next_is_here():
            index = self._recorded
            silence = self._silence.get(index)
            pcm = self.read_chunk(index) if silence is None else bytes(silence)
            size = self._recording_bytes + len(pcm)
            begins = 0 if self._recording_bytes else os.O_CREAT | os.O_TRUNC
            file = open_private(self.path / RECORDING, os.O_RDWR | begins)
            with os.fdopen(file, "r+b") as wav:
                wav.seek(WAV_HEADER_BYTES + self._recording_bytes)
                # What an append that was cut short has left.
                wav.truncate()
                wav.write(pcm)
                wav.seek(0)
                wav.write(_wav_header(size, *self._format))
            self._note(recorded=index, bytes=size)

    def _tidy(self) -> None:
        """Removes chunk files whose audio is in the recording and at Roark."""
        if self.destination is None:
            self._waiting = {index for index in self._waiting if index >= self._recorded}
        needless = {i for i in self._files if i < self._recorded and i not in self._waiting}
        is_due = len(needless) >= TIDY_CHUNKS or (self.ended is not None and not self._waiting)
        if not needless or not is_due or self._delivery_backlog:
            return
        _sync(self.path / RECORDING)
        _sync(self.path / DELIVERY)
        for index in sorted(needless):
            self._chunk_path(index).unlink(missing_ok=True)
            self._files.discard(index)

    def _chunk_path(self, index: int) -> Path:
        return self.path / f"{chunk_step(index)}.pcm"

    def _write(self, name: str, content: bytes) -> bool:
        if self.create() and self._try(lambda: replace(self.path / name, content)):
            self._unwritten.pop(name, None)
            return True
        self._unwritten[name] = content
        return False

    def _try(self, action: Callable[[], None]) -> bool:
        try:
            action()
        except OSError as error:
            self.disk_error = error
            return False
        return True


_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, default=str)


def as_json(value: Any) -> bytes:
    """Compact JSON; what JSON does not know becomes its text."""
    return _ENCODER.encode(value).encode("utf-8", "replace")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a .jsonl file; lines that were not written whole are left out."""
    for line in (_read(path) or b"").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _read_body(path: Path) -> bytes | None:
    """The body of a request; None when it is not there, or spoilt and to be made again."""
    content = _read(path)
    try:
        return content if isinstance(json.loads(content or b""), dict) else None
    except ValueError:
        return None


def replace(path: Path, content: bytes) -> None:
    """Writes a private file whole, or leaves what was there."""
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with os.fdopen(open_private(unfinished, flags), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND


def append_lines(path: Path, lines: bytes) -> None:
    """Appends to a private file all of it or nothing."""
    file = open_private(path, APPEND)
    try:
        append_whole(file, lines)
    finally:
        os.close(file)


def append_whole(file: int, lines: bytes) -> None:
    """Appends all of it or nothing: half a line would spoil the next one."""
    written = os.write(file, lines)
    if written != len(lines):
        os.ftruncate(file, os.lseek(file, 0, os.SEEK_END) - written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _mend(path: Path) -> None:
    """Ends a torn last line, so that the next one is not spoilt."""
    try:
        with open(path, "rb") as file:
            # The last byte alone: the journal of a long call is long.
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            is_torn = file.read() not in (b"", b"\n")
    except FileNotFoundError:
        return
    if is_torn:
        append_lines(path, b"\n")


def _sync(path: Path) -> None:
    with open(path, "ab") as file:
        os.fsync(file.fileno())


def _make_directory(path: Path) -> None:
    """A directory and what is missing above it; of ours only we may read."""
    if not path.is_dir():
        # `parents` would give the one above the folders of calls to everybody.
        if not path.parent.is_dir():
            path.parent.parent.mkdir(parents=True, exist_ok=True)
            path.parent.mkdir(0o700, exist_ok=True)
        path.mkdir(0o700, exist_ok=True)


def _sync_directory(path: Path) -> None:
    if sys.platform == "win32":
        return
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _wav_header(data_bytes: int, sample_rate: int, num_channels: int) -> bytes:
    """PCM16; a recording beyond 4 GB is capped in the header only, players read on."""
    size = min(data_bytes, WAV_MAX_BYTES)
    frame_bytes = 2 * num_channels
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        b"RIFF",
        size + WAV_HEADER_BYTES - 8,
        b"WAVE",
        b"fmt ",
        16,
        1,
        num_channels,
        sample_rate,
        sample_rate * frame_bytes,
        frame_bytes,
        16,
        b"data",
        size,
    )
