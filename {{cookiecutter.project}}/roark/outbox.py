"""The outbox promises: what it accepted is delivered, or still on disk in a form that will be.

    outbox = outbox_for(Path("calls"), api_key=key)      # one per process and directory
    call = outbox.open(call_id)
    call.started(body); call.journal(event); call.chunk(0, pcm, 24000, 2); call.ended(body, record)
    await call.flush(20)

Write first, send second. Both happen in one thread of its own with its own event loop: a call's
event loop never waits for a disk, a socket or a TLS handshake, and delivery does not end with it.
The methods of a call hand over and return; they never raise.

Without a key the same folders are kept and nothing is sent. What a process leaves behind is
delivered by the next one with the same directory, or by `python -m roark deliver`, but only to
the address it was meant for: a rehearsed call never reaches the real Roark.

Memory: at most `memory_bytes` accepted and not yet on disk (more is dropped, counted and said;
only a disk that is full or hangs gets there), plus (UPLOADS_AT_ONCE + LEFTOVER_UPLOADS_AT_ONCE) x
the largest chunk on its way to Roark.
Disk: `disk_bytes` and `disk_days` bound the directory; the oldest delivered or kept calls go
first, undelivered ones only for want of space, and never silently.
"""

import asyncio
import atexit
import os
import random
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from loguru import logger

from roark.call import CallRecord
from roark.catalog import Catalog, size_of
from roark.client import Backoff, RoarkClient
from roark.delivery import Delivery, where
from roark.destinations import Destination, PostRoute, RoarkRoute, Route, from_environment
from roark.folder import (
    ENDED,
    Folder,
    as_json,
    call_names,
    folder_name,
    make_private,
    reason_of,
)

FLUSH_SECONDS = 20.0
MEMORY_BYTES = 64_000_000
DISK_BYTES = 5_000_000_000
DISK_DAYS = 30.0
# All live calls together; and, apart from them, what earlier processes left.
UPLOADS_AT_ONCE = 4
LEFTOVER_UPLOADS_AT_ONCE = 2
# Attempts per request for calls that earlier processes left; then the next call has its turn.
LEFTOVER_ATTEMPTS = 4
# Left calls wait until the first moments of a new one are over.
LEFTOVERS_AFTER_SECONDS = 2.0
LEFTOVERS_PAUSE_SECONDS = 300.0
# A round over the directory ends when this many calls in a row found nobody at the other end.
MAX_UNREACHABLE_IN_A_ROW = 3
TRIM_EVERY_SECONDS = 600.0
# Old calls whose folders are looked at before live ones have their turn; each takes some 3 us.
GLANCES_AT_ONCE = 100
MAX_SAID = 1000
# What is in the journal survives a killed process at once, and a power cut after this long.
JOURNAL_SYNC_SECONDS = 1.0
DRAIN_SECONDS = 2.0
# A flush that is so late is waited for no longer: the disk hangs.
HUNG_DISK_SECONDS = 1.0

Reconstruct = Callable[[list[dict[str, Any]], int], tuple[dict[str, Any], dict[str, Any], Any]]


@dataclass(frozen=True, slots=True)
class Flushed:
    """How many requests (call-started, chunks, call-ended) came to which end.

    Parameters:
        delivered: Taken by Roark.
        left: Not yet; on disk for later, or, where the disk does not take it, in memory for as
            long as the process lives.
        given_up: Refused for good by Roark, or lost when memory and disk were full.
    """

    delivered: int
    left: int
    given_up: int


class CallFolder:
    """One call's way into the outbox. Every method may be called from any thread or loop."""

    def __init__(self, outbox: "Outbox", folder: Folder) -> None:
        self._outbox = outbox
        self._folder = folder
        self._has_lost = False

    @property
    def call_id(self) -> str:
        """The call's id, as Roark knows it."""
        return self._folder.call_id

    @property
    def path(self) -> Path:
        """Where the call is kept. Nothing may be there yet."""
        return self._folder.path

    def started(self, body: dict[str, Any]) -> None:
        """Accepts the body of call-started."""
        self._hand_over(self._folder.keep_started, as_json(body))

    def journal(self, event: dict[str, Any]) -> None:
        """Accepts an event; from its events a killed call is closed."""
        line = as_json(event) + b"\n"
        if self._reserve(len(line)):
            self._outbox.hand_over_event(self._folder, line)

    def chunk(self, index: int, pcm: bytes, sample_rate: int, num_channels: int) -> None:
        """Accepts a chunk of the recording (PCM16LE, interleaved); indexes count from 0.

        A chunk that comes after `ended` still belongs to the call.
        """
        size = len(pcm)
        if self._reserve(size):
            self._hand_over(
                self._folder.keep_chunk, index, bytes(pcm), sample_rate, num_channels, reserved=size
            )
        else:
            self._hand_over(self._folder.lose_chunk, index, size)

    def ended(self, body: dict[str, Any], record: dict[str, Any]) -> None:
        """Accepts the body of call-ended and the call record; closes the call.

        The recording fields of `body` are made true of what was delivered before it is sent.
        """
        self._hand_over(lambda: self._folder.keep_ended(as_json(body), as_json(record)))

    async def flush(self, timeout: float = FLUSH_SECONDS) -> Flushed:
        """Waits until all that was accepted is settled, at most `timeout` seconds.

        May be called again, and cancelled: the delivery goes on in its thread, and a process that
        exits normally waits for it until the deadline. What is left then is on disk.
        """
        deadline = time.monotonic() + timeout
        waiter: Future[Flushed] = Future()
        self._outbox.flush(self._folder, deadline, waiter)
        # The thread answers at the deadline, unless the disk hangs. What that has not taken is in
        # no number.
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout + HUNG_DISK_SECONDS):
                return await asyncio.shield(asyncio.wrap_future(waiter))
        logger.error(f"Roark: call {self.call_id}: {self.path.parent} does not answer")
        return self._outbox.result(self._folder)

    def _hand_over(self, action: Callable[..., None], *args: Any, reserved: int = 0) -> None:
        self._outbox.hand_over(self._folder, action, *args, reserved=reserved)

    def _reserve(self, size: int) -> bool:
        if self._outbox.memory.reserve(size):
            return True
        if not self._has_lost:
            self._has_lost = True
            logger.error(
                f"Roark: call {self.call_id}: {self._outbox.memory.limit} bytes wait for "
                f"{self.path.parent} already; audio is being dropped"
            )
        return False


class Outbox:
    """The calls of one directory and their delivery; see the module's docstring.

    Args:
        directory: Where the call folders are; made when the first call needs it.
        client: How to reach Roark; None sends it nothing.
        destinations: Who else gets each call when it is closed. Without any, calls are kept.
        memory_bytes, disk_bytes, disk_days: The bounds.
        delivers_leftovers: Whether calls that earlier processes left are looked after.
        backoff, sleep: How long to wait between attempts, and how.
        reconstruct: (events, time of the last of them in epoch ns) of a call whose process died,
            to its call-started body, call-ended body and record.
    """

    def __init__(
        self,
        directory: Path,
        client: RoarkClient | None = None,
        *,
        destinations: Sequence[Destination] = (),
        memory_bytes: int = MEMORY_BYTES,
        disk_bytes: int = DISK_BYTES,
        disk_days: float = DISK_DAYS,
        delivers_leftovers: bool = True,
        leftovers_after_s: float = LEFTOVERS_AFTER_SECONDS,
        backoff: Backoff | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        reconstruct: Reconstruct | None = None,
    ) -> None:
        self.directory = directory.absolute()
        self.client = client
        self._routes: list[Route] = [RoarkRoute(client)] if client else []
        self._routes += map(PostRoute, destinations)
        self._posts = {route.name: route.address for route in destinations}
        self.memory = _Memory(memory_bytes)
        self._backoff = backoff or Backoff()
        self._sleep = sleep
        self._disk_bytes = disk_bytes
        self._disk_days = disk_days
        self._leftovers_after_s = leftovers_after_s
        self._reconstruct = reconstruct or replay
        # Each destination has its own: none waits for another.
        names = [route.name for route in self._routes]
        self._uploads = {name: asyncio.Semaphore(UPLOADS_AT_ONCE) for name in names}
        self._leftover_uploads = {
            name: asyncio.Semaphore(LEFTOVER_UPLOADS_AT_ONCE) for name in names
        }
        self._deliveries: dict[Path, dict[str, Delivery]] = {}
        self._claimed: dict[Path, tuple[Folder, int]] = {}
        self._turned_away: set[tuple[Path, str]] = set()
        self._known: Catalog | None = None
        self._something_is_left = asyncio.Event()
        self._trimmed_at = 0.0
        self._held: dict[Path, int] = {}
        self._in_memory: dict[Path, Folder] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._flushes: set[asyncio.Task[None]] = set()
        self._flushed: WeakKeyDictionary[Folder, Flushed] = WeakKeyDictionary()
        self._last_deadline = 0.0
        self._syncing: set[Path] = set()
        self._said: set[str] = set()
        self._posted: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._is_woken = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="roark-outbox", daemon=True)
        self._thread.start()
        atexit.register(self.close)
        self._post(self._make_private)
        if delivers_leftovers:
            self._post(self._look_after_leftovers)

    # From the calls' side: any thread, never waiting

    def open(self, call_id: str) -> CallFolder:
        """A folder for a new call."""
        destination = self.client.base_url if self.client else None
        path = self.directory / folder_name(call_id, datetime.now(UTC))
        folder = Folder(path, call_id=call_id, destination=destination, posts=self._posts)
        self.hand_over(folder, folder.create)
        return CallFolder(self, folder)

    def hand_over(
        self, folder: Folder, action: Callable[..., Any], *args: Any, reserved: int = 0
    ) -> None:
        """Runs a write in the outbox's thread, after those handed over before."""
        self._post(self._keep, folder, action, args, reserved)

    def hand_over_event(self, folder: Folder, line: bytes) -> None:
        """Appends to a call's journal in the outbox's thread, after what was handed over before."""
        self._post(self._keep_events, folder, line)

    def flush(self, folder: Folder, deadline: float, waiter: "Future[Flushed]") -> None:
        """Answers `waiter` when the call is settled, or at the deadline (monotonic seconds)."""
        self._post(self._start_flush, folder, deadline, waiter)

    def result(self, folder: Folder) -> Flushed:
        """How far the delivery of a call is."""
        return Flushed(
            delivered=len(folder.delivered),
            left=len(folder.steps_left),
            given_up=len(folder.steps_given_up),
        )

    def close(self) -> None:
        """Ends the thread; flushes that are under way have until their deadlines."""
        atexit.unregister(self.close)
        if self._loop.is_closed():
            return
        patience = max(0.0, self._last_deadline - time.monotonic()) + DRAIN_SECONDS
        # TimeoutError: the disk hangs.
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(patience)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(DRAIN_SECONDS)

    def deliver_leftovers(
        self,
        progress: Callable[[Folder, Flushed | None], None],
        unreadable: Callable[[str, Exception], None] = lambda *_: None,
    ) -> "Future[bool]":
        """Tries once to deliver every call on disk; `progress` hears of each (None: in use).

        `unreadable` hears the names of folders that could not be read. The result says whether
        something is left that may go later.
        """
        return asyncio.run_coroutine_threadsafe(
            self._deliver_each(progress, unreadable), self._loop
        )

    # In the outbox's thread

    def _make_private(self) -> None:
        if found := make_private(self.directory):
            logger.warning(f"Roark: {found}")

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _post(self, action: Callable[..., Any], *args: Any) -> None:
        self._posted.append((action, args))
        # To wake the loop is a system call, half of what an event costs: a burst does it once.
        if not self._is_woken:
            self._is_woken = True
            # The loop is closed only when the process, or a test, is ending.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._take_posted)

    def _take_posted(self) -> None:
        # First of all, so that whatever is posted from here on wakes the loop again.
        self._is_woken = False
        while self._posted:
            action, args = self._posted.popleft()
            if action == self._keep_events:
                # Events of one call that come close together share one write.
                folder, lines = args[0], [args[1]]
                while self._posted and self._posted[0][0] == action:
                    if self._posted[0][1][0] is not folder:
                        break
                    lines.append(self._posted.popleft()[1][1])
                args = (folder, lines)
            self._loop.call_soon(action, *args)

    def _keep_events(self, folder: Folder, lines: Sequence[bytes]) -> None:
        self._keep(folder, folder.keep_events, (lines,), sum(map(len, lines)))

    def _keep(
        self, folder: Folder, action: Callable[..., Any], args: tuple[Any, ...], reserved: int
    ) -> None:
        try:
            action(*args)
        except Exception as error:
            logger.error(f"Roark: call {folder.call_id}: could not be kept: {where(error)}")
        self._look_after_disk(folder, reserved)
        if folder.is_journal_dirty:
            self._sync_soon(folder)
        if any(self._is_to_go(folder, route) for route in self._routes):
            self._deliver(folder)
        else:
            self._let_go_if_over(folder)

    def _look_after_disk(self, folder: Folder, reserved: int = 0) -> None:
        """Something was written, or could not be."""
        self._account(folder, reserved)
        self._say_disk_error(folder)

    def _account(self, folder: Folder, reserved: int = 0) -> None:
        """Keeps the memory bound right: what was queued is on disk now, or held."""
        held = sum(map(len, folder.held.values()))
        self.memory.release(reserved - held + self._held.get(folder.path, 0))
        self._held[folder.path] = held
        if not held:
            del self._held[folder.path]
        if folder.only_in_memory:
            self._in_memory[folder.path] = folder
        else:
            self._in_memory.pop(folder.path, None)

    def _say_disk_error(self, folder: Folder) -> None:
        if folder.disk_error is not None:
            reason = folder.disk_error.strerror or type(folder.disk_error).__name__
            folder.disk_error = None
            consequence = (
                "calls are delivered from memory, and lost if this process ends before they are"
                if self._routes
                else "calls are not kept"
            )
            self._say_once(f"cannot write to {self.directory}: {reason}; {consequence}")

    def _say_once(self, message: str) -> None:
        """Logs an error that would otherwise be said for every request."""
        if message not in self._said:
            if len(self._said) >= MAX_SAID:
                self._said.clear()
            self._said.add(message)
            logger.error(f"Roark: {message}")

    def _sync_soon(self, folder: Folder) -> None:
        """Has the journal synced; events that come close together share one sync."""

        def sync() -> None:
            self._syncing.discard(folder.path)
            folder.sync_journal()

        if folder.path not in self._syncing:
            self._syncing.add(folder.path)
            self._loop.call_later(JOURNAL_SYNC_SECONDS, sync)

    def _is_to_go(self, folder: Folder, route: Route) -> bool:
        return route.has_left(folder) and (folder.path, route.name) not in self._turned_away

    def _deliver(self, folder: Folder) -> None:
        """Has the call's deliveries look again, or starts them."""
        running = self._deliveries.setdefault(folder.path, {})
        if not running and not folder.is_in_memory and not folder.lock.acquire():
            # A chunk came after all was over, and somebody else looks after the call now.
            del self._deliveries[folder.path]
            self._something_is_left.set()
            return
        for delivery in running.values():
            delivery.look_again()
        for route in self._routes:
            if route.name not in running and self._is_to_go(folder, route):
                delivery = self._delivery(folder, route, slots=self._uploads[route.name])
                running[route.name] = delivery
                self._start(delivery, route)

    def _start(self, delivery: Delivery, route: Route) -> None:
        task = self._loop.create_task(delivery.run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: self._delivery_ended(delivery, route))

    def _delivery(
        self,
        folder: Folder,
        route: Route,
        *,
        slots: asyncio.Semaphore,
        max_attempts: int | None = None,
    ) -> Delivery:
        return route.delivery(
            folder,
            slots=slots,
            backoff=self._backoff,
            sleep=self._sleep,
            complain=self._say_once,
            on_attempt=self._look_after_disk,
            max_attempts=max_attempts,
        )

    def _delivery_ended(self, delivery: Delivery, route: Route) -> None:
        folder = delivery.folder
        running = self._deliveries[folder.path]
        del running[route.name]
        if not running:
            del self._deliveries[folder.path]
        if delivery.was_turned_away:
            self._turned_away.add((folder.path, route.name))
        self._let_go_if_over(folder)

    def _let_go_if_over(self, folder: Folder) -> None:
        """Frees the folder's lock: never while the call lasts or is only in memory."""
        self._account(folder)
        if folder.ended is None or folder.is_in_memory or folder.path in self._deliveries:
            return
        self._remember(folder)
        folder.release()
        if not folder.is_finished:
            self._something_is_left.set()

    @property
    def _catalog(self) -> Catalog:
        if self._known is None:
            self._known = Catalog(self.directory)
        return self._known

    def _remember(self, folder: Folder) -> None:
        # Nobody need read it again; a disk that does not take the line costs the next one time.
        with suppress(OSError):
            self._catalog.learn(folder)
            self._catalog.save()

    def _start_flush(self, folder: Folder, deadline: float, waiter: "Future[Flushed]") -> None:
        task = self._loop.create_task(self._flush(folder, deadline, waiter))
        self._flushes.add(task)
        task.add_done_callback(self._flushes.discard)

    async def _flush(self, folder: Folder, deadline: float, waiter: "Future[Flushed]") -> None:
        began = time.monotonic()
        self._last_deadline = max(self._last_deadline, deadline)
        deliveries = list(self._deliveries.get(folder.path, {}).values())
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline - time.monotonic()):
                for delivery in deliveries:
                    await delivery.settled.wait()
        for delivery in deliveries:
            # What is nowhere but in memory is tried as long as the process lives.
            delivery.is_overdue = not delivery.settled.is_set() and not folder.is_in_memory
        folder.settle_disk()
        folder.sync_journal()
        self._account(folder)
        result = self.result(folder)
        self._log_flush(folder, result, time.monotonic() - began)
        if not waiter.done():
            waiter.set_result(result)

    def _log_flush(self, folder: Folder, result: Flushed, seconds: float) -> None:
        if self._flushed.get(folder) == result:
            return
        self._flushed[folder] = result
        call = f"Roark: call {folder.call_id}"
        kept = f"{folder.recording_seconds:.1f} s of audio in {folder.path}"
        if folder.only_in_memory:
            logger.error(
                f"{call}: {result.delivered} requests delivered, {result.left} left; "
                f"{_listed(folder)} only in memory, and lost when this process ends, unless the "
                f"disk takes them or Roark does; {kept}"
            )
        elif not self._routes:
            logger.info(f"{call}: kept, {kept}")
        elif result.left:
            logger.warning(
                f"{call}: {result.delivered} requests delivered, {result.left} left after "
                f"{seconds:.1f} s for the next process or `python -m roark deliver`; {kept}"
            )
        else:
            logger.info(
                f"{call}: {result.delivered} requests delivered in {seconds:.1f} s, "
                f"{result.given_up} given up; {kept}"
            )

    async def _stop(self) -> None:
        if self._flushes:
            logger.info("Roark: waiting for the calls that are being delivered")
            await asyncio.gather(*self._flushes)
        current = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not current]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for folder in list(self._in_memory.values()):
            folder.settle_disk()
            if folder.only_in_memory:
                logger.error(
                    f"Roark: call {folder.call_id}: {_listed(folder)} lost: neither "
                    f"{self.directory} nor Roark took them while this process lived"
                )
        for running in self._deliveries.values():
            for delivery in running.values():
                delivery.folder.release()
        for route in self._routes:
            await route.close()

    # What earlier processes left

    def _look_after_leftovers(self) -> None:
        task = self._loop.create_task(self._deliver_leftovers())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _deliver_leftovers(self) -> None:
        """Rounds over the directory, one call at a time, with longer pauses while nothing goes."""
        await asyncio.sleep(self._leftovers_after_s)
        fruitless = 0
        while True:
            self._something_is_left.clear()
            try:
                is_anything_left = await self._deliver_each()
                await self._trim()
            except Exception as error:
                self._say_once(f"the calls that were left: {where(error)}")
                is_anything_left = True
            if is_anything_left:
                fruitless += 1
                longest = min(LEFTOVERS_PAUSE_SECONDS, 5.0 * 2.0 ** min(fruitless, 9))
                await self._sleep(random.uniform(1.0, longest))
                continue
            fruitless = 0
            with suppress(TimeoutError):
                async with asyncio.timeout(TRIM_EVERY_SECONDS):
                    await self._something_is_left.wait()

    async def _deliver_each(
        self,
        progress: Callable[[Folder, Flushed | None], None] | None = None,
        unreadable: Callable[[str, Exception], None] = lambda *_: None,
    ) -> bool:
        """One round for each destination; says whether something is left that may go later."""
        names = call_names(self.directory, known=self._catalog.names)
        self._turned_away = {(path, name) for path, name in self._turned_away if path.exists()}
        unsettled = [name async for name in _in_turns(names) if not self._catalog.settled(name)]
        # Without a destination there is still to be closed whose process died.
        rounds = [
            self._round(route, unsettled, progress, unreadable) for route in self._routes or [None]
        ]
        is_anything_left = any(await asyncio.gather(*rounds))
        self._catalog.save(names)
        return is_anything_left

    async def _round(
        self,
        route: Route | None,
        names: list[str],
        progress: Callable[[Folder, Flushed | None], None] | None,
        unreadable: Callable[[str, Exception], None],
    ) -> bool:
        to, addresses = (route.name, {route.address}) if route else ("", set[str]())
        # The first one tells of calls that are for nobody here.
        tells_all = progress is not None and (not self._routes or route is self._routes[0])
        is_anything_left = False
        unreachable_in_a_row = 0
        async for name in _in_turns(names):
            path = self.directory / name
            if path in self._deliveries or (path, to) in self._turned_away:
                continue
            entry = self._catalog.entry(name)
            if entry and not (entry.left if tells_all else addresses & entry.left.keys()):
                continue
            await asyncio.sleep(0)
            # Whatever is wrong with one folder, the others have their turn.
            try:
                folder = self._claim(path)
                if folder is None:
                    if tells_all and progress:
                        progress(Folder.load(path), None)
                    continue
                try:
                    was_finished = folder.is_finished
                    delivery = None if was_finished else await self._deliver_left(folder, route)
                finally:
                    self._unclaim(folder)
                if was_finished:
                    continue
                if progress and (tells_all or delivery):
                    progress(folder, self.result(folder))
            except Exception as error:
                self._say_once(f"{name} is passed over: {reason_of(error)}")
                unreadable(name, error)
                continue
            if delivery is None or route is None:
                continue
            is_anything_left |= route.has_left(folder) and not delivery.was_turned_away
            unreachable_in_a_row = unreachable_in_a_row + 1 if delivery.was_unreachable else 0
            if unreachable_in_a_row == MAX_UNREACHABLE_IN_A_ROW:
                break
        return is_anything_left

    def _claim(self, path: Path) -> Folder | None:
        """A folder and its lock, which the rounds of several destinations share."""
        folder, users = self._claimed.get(path) or (Folder.claim(path), 0)
        if folder is not None:
            self._claimed[path] = (folder, users + 1)
        return folder

    def _unclaim(self, folder: Folder) -> None:
        _, users = self._claimed.pop(folder.path)
        if users > 1:
            self._claimed[folder.path] = (folder, users - 1)
            return
        if folder.path.exists():
            self._catalog.learn(folder)
        folder.release()

    async def _deliver_left(self, folder: Folder, route: Route | None) -> Delivery | None:
        """Closes a call whose process died; delivers it when it is meant for this destination."""
        if folder.is_empty:
            # Its process died before it had said anything.
            folder.remove()
            return None
        if folder.ended is None:
            self._close_dead(folder)
        folder.settle_disk()
        self._say_disk_error(folder)
        if route is None or not route.has_left(folder):
            return None
        delivery = self._delivery(
            folder,
            route,
            slots=self._leftover_uploads[route.name],
            max_attempts=LEFTOVER_ATTEMPTS,
        )
        await delivery.run()
        if delivery.was_turned_away:
            self._turned_away.add((folder.path, route.name))
        if not folder.steps_left:
            logger.info(f"Roark: call {folder.call_id}: what was left of it is delivered")
        return delivery

    def _close_dead(self, folder: Folder) -> None:
        """Says of a call what its journal holds, and that its process died."""
        at = folder.begun_at
        started = None
        try:
            events = folder.journal()
            # Not a file's time: a report, a copy, a torn last line are newer than the call.
            at = max(at, last_moment(events) or at)
            started, ended, record = self._reconstruct(events, int(at.timestamp() * 1e9))
        except Exception as error:
            logger.error(f"Roark: call {folder.call_id}: its journal: {where(error)}")
            ended = record = {
                "event": ENDED,
                "eventTimestamp": at.isoformat(),
                "callStartedAt": None,
                "callEndedAt": at.isoformat(),
                "callEndedReason": "process-died",
            }
        # Whatever the journal lacks, the id is known.
        if folder.started is None and started is not None:
            folder.keep_started(as_json({**started, "pipecatCallId": folder.call_id}))
        folder.keep_ended(as_json({**ended, "pipecatCallId": folder.call_id}), as_json(record))
        logger.warning(f"Roark: call {folder.call_id}: its process died; closed from its journal")

    async def _trim(self) -> None:
        """Keeps the directory within its bounds."""
        if self._trimmed_at and time.monotonic() - self._trimmed_at < TRIM_EVERY_SECONDS:
            return
        self._trimmed_at = time.monotonic()
        too_old = time.time() - self._disk_days * 86400
        sizes: dict[str, int] = {}
        finished: list[str] = []
        unfinished: list[str] = []
        async for name in _in_turns(call_names(self.directory, known=self._catalog.names)):
            # What cannot be read is named by the round over what is left, and never removed.
            with suppress(Exception):
                call = self._catalog.settled(name) or self._catalog.look(name)
                if isinstance(call, Folder) or call.left:
                    unfinished.append(name)
                elif call.closed_at < too_old and self._remove(name):
                    continue
                else:
                    finished.append(name)
                sizes[name] = size_of(call.path) if isinstance(call, Folder) else call.size
        self._catalog.save()
        excess = sum(sizes.values()) - self._disk_bytes
        for name in [*finished, *unfinished]:
            if excess <= 0:
                return
            if self._remove(name):
                excess -= sizes[name]
                if name in unfinished:
                    logger.error(f"Roark: no room for {name}: removed before it was delivered")

    def _remove(self, name: str) -> bool:
        folder = Folder.claim(self.directory / name)
        if folder is not None:
            folder.remove()
        return folder is not None


async def _in_turns(names: Sequence[str]) -> AsyncIterator[str]:
    """One after the other; in between live calls have their turn."""
    for number, name in enumerate(names):
        if number % GLANCES_AT_ONCE == 0:
            await asyncio.sleep(0)
        yield name


def _listed(folder: Folder) -> str:
    """What of a call is only in memory, as the beginning of a sentence about it."""
    names = folder.only_in_memory
    chunks = [name for name in names if name.endswith(".pcm")]
    others = [name for name in names if name not in chunks]
    if chunks:
        others.insert(0, f"{len(chunks)} chunks of audio, {sum(map(len, folder.held.values()))} B,")
    return f"{' and '.join(others)} {'is' if len(names) == 1 else 'are'}"


class _Memory:
    """Counts bytes that are accepted and not yet on disk."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._used = 0
        self._lock = threading.Lock()

    def reserve(self, size: int) -> bool:
        """Whether there is room; takes it."""
        with self._lock:
            if self._used + size > self.limit:
                return False
            self._used += size
            return True

    def release(self, size: int) -> None:
        """Gives room back (or, negative, takes what is there already)."""
        with self._lock:
            self._used -= size


_outboxes: dict[tuple[int, Path, str | None, str | None, tuple[str, ...]], Outbox] = {}
_outboxes_lock = threading.Lock()


def outbox_for(
    directory: Path, *, api_key: str | None = None, base_url: str | None = None
) -> Outbox:
    """The outbox of this process for a directory and a Roark account; made at the first call.

    CALLS_MAX_MB and CALLS_MAX_DAYS bound the directory (default 5000 and 30). One directory
    belongs to one account: what is left there is delivered with whichever key comes next.
    """
    api_key = (api_key or "").strip() or None
    destinations = from_environment()
    addresses = tuple(destination.address for destination in destinations)
    identity = (os.getpid(), directory.absolute(), api_key, base_url, addresses)
    with _outboxes_lock:
        outbox = _outboxes.get(identity)
        if outbox is None:
            client = RoarkClient(api_key=api_key, base_url=base_url) if api_key else None
            outbox = _outboxes[identity] = Outbox(
                directory,
                client,
                destinations=destinations,
                disk_bytes=int(number_setting("CALLS_MAX_MB", DISK_BYTES / 1e6) * 1e6),
                disk_days=number_setting("CALLS_MAX_DAYS", DISK_DAYS),
            )
        return outbox


def outbox_from_environment() -> Outbox:
    """The outbox that calls will use (CALLS_DIR, ROARK_API_KEY, ROARK_BASE_URL).

    Called when a server starts, it delivers what the last one left before the first call comes.
    """
    return outbox_for(
        Path(setting("CALLS_DIR") or "calls"),
        api_key=setting("ROARK_API_KEY"),
        base_url=setting("ROARK_BASE_URL"),
    )


def setting(name: str) -> str | None:
    """An environment variable; a blank one counts as unset."""
    return os.environ.get(name, "").strip() or None


def replay(
    events: list[dict[str, Any]], at: int
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """call-started, call-ended and record of a call whose process died at `at` (epoch ns)."""
    record = CallRecord.replay(events)
    record.close("process-died", None, at)
    return record.call_started(), record.call_ended(), record.as_dict()


def last_moment(events: list[dict[str, Any]]) -> datetime | None:
    """When the last of a call's events happened; None when none of them says."""
    times = [at for event in events if isinstance(at := event.get("at"), int) and at > 0]
    return datetime.fromtimestamp(max(times) / 1e9, UTC) if times else None


def number_setting(name: str, default: float) -> float:
    """A number of 0 or more from the environment; `default` where it is unset or none."""
    try:
        number = float(setting(name) or default)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        logger.warning(f"Roark: {name} is not a number of 0 or more; {default:g} is used")
        return default
    return number
