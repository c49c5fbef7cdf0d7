"""How one call gets to Roark: in order, as often as it takes, and saying nothing false.

call-started goes first and never behind audio; then the chunks, a few at once, each on its own;
call-ended when all of them are there or given up. What is refused for good (most 4xx) is given up
and said once; what may go later is tried again; a refused key ends the delivery, and the call
waits on disk for the right one.
"""

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from loguru import logger

from roark.client import Backoff, Rejected, RoarkClient, Unreachable
from roark.folder import ENDED, STARTED, Folder, chunk_step

# Chunks of one call that are on their way or waiting for their next attempt.
UPLOADS_BEGUN = 8
# A fresh upload URL that storage refuses this often in a row will not be taken later either.
MAX_UPLOAD_URLS = 4


class NotNow(Exception):
    """This delivery stops here; what is left stays on disk."""


def where(error: BaseException) -> str:
    """What went wrong and where; a traceback may show keys and what callers said."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}"


class Delivery:
    """Brings one call to one destination.

    A live call is tried until its flush is overdue, others `max_attempts` times per request.
    """

    def __init__(
        self,
        folder: Folder,
        *,
        slots: asyncio.Semaphore,
        backoff: Backoff,
        sleep: Callable[[float], Awaitable[None]],
        complain: Callable[[str], None],
        on_attempt: Callable[[Folder], None],
        max_attempts: int | None = None,
    ) -> None:
        self.folder = folder
        self.settled = asyncio.Event()
        self.is_overdue = False
        self.was_turned_away = False
        self.was_unreachable = False
        self._slots = slots
        self._backoff = backoff
        self._sleep = sleep
        self._complain = complain
        self._on_attempt = on_attempt
        self._max_attempts = max_attempts
        self._changed = asyncio.Event()
        self._is_stopping = False

    def look_again(self) -> None:
        """The folder holds something new."""
        if not self._is_stopping:
            self.settled.clear()
        self._changed.set()

    async def run(self) -> None:
        """Returns when the call is delivered, or when what is left of it has to wait."""
        try:
            while await self._advance():
                await self._changed.wait()
        except NotNow:
            pass
        except Exception as error:
            logger.error(f"Roark: call {self.folder.call_id}: its delivery: {where(error)}")
        finally:
            self._is_stopping = True
            self._stop()
            self.settled.set()

    async def _advance(self) -> bool:
        """Does what can be done now; False when there is nothing more to wait for."""
        raise NotImplementedError

    def _stop(self) -> None:
        """Lets go of what is under way."""

    async def _until_settled(self, step: str, attempt: Callable[[int], Awaitable[None]]) -> None:
        """Repeats an attempt until Roark has the step or never will; else raises NotNow."""
        folder, failures = self.folder, 0
        while not folder.is_settled(step):
            retry_after_s = None
            try:
                await attempt(failures + 1)
            except FileNotFoundError:
                self._give_up(step, "its file is gone")
            except Rejected as error:
                if error.is_about_us:
                    self.was_turned_away = True
                    self._complain(
                        f"{self._whom(step)}turned away: {error}. Calls stay in "
                        f"{folder.path.parent}; when the key and the address are right, the next "
                        "process or `python -m roark deliver` delivers them"
                    )
                    raise NotNow from None
                if error.is_transient:
                    retry_after_s = error.retry_after_s
                    failures += 1
                else:
                    self._give_up(step, str(error.status), error.message)
            except (Unreachable, OSError) as error:
                failures += 1
                if self._must_stop(failures):
                    self.was_unreachable = isinstance(error, Unreachable)
            else:
                folder.note_delivered(step)
            self._on_attempt(folder)
            if not folder.is_settled(step):
                if self._must_stop(failures):
                    raise NotNow
                await self._sleep(self._backoff.seconds(failures, retry_after_s))

    def _whom(self, step: str) -> str:
        """The destination, where it is not Roark, as the beginning of a sentence."""
        return f"{step} at {self.folder.posts[step]}: " if step in self.folder.posts else ""

    def _must_stop(self, failures: int) -> bool:
        if self.is_overdue or self.was_turned_away or self.was_unreachable:
            return True
        return self._max_attempts is not None and failures >= self._max_attempts

    def _give_up(self, step: str, reason: str, said: str = "") -> None:
        # What Roark says about a message may repeat words of it: kept with the call, not logged.
        self.folder.note_given_up(step, f"{reason} {said}".strip())
        what = "audio" if step.startswith("chunk-") else step
        self._complain(f"call {self.folder.call_id}: {what} is given up: {reason}")


class RoarkDelivery(Delivery):
    """Brings one call to Roark: call-started, the chunks, and when all are settled call-ended."""

    def __init__(self, folder: Folder, client: RoarkClient, **how: Any) -> None:
        super().__init__(folder, **how)
        self._client = client
        self._uploads: dict[int, asyncio.Task[None]] = {}

    def _stop(self) -> None:
        for upload in self._uploads.values():
            upload.cancel()

    async def _advance(self) -> bool:
        folder = self.folder
        self._changed.clear()
        if folder.started is not None and not folder.is_settled(STARTED):
            await self._send(STARTED, folder.started)
        if not self._is_stopping and (folder.started is not None or folder.ended is not None):
            for index in folder.waiting_chunks:
                if index not in self._uploads and len(self._uploads) < UPLOADS_BEGUN:
                    self._begin_upload(index)
        if self._uploads:
            return True
        if self._is_stopping:
            return False
        if folder.ended is not None and folder.roark_steps_left == [ENDED]:
            await self._send(ENDED, folder.final_ending())
        if folder.roark_steps_left:
            return True
        self.settled.set()
        return folder.ended is None

    def _begin_upload(self, index: int) -> None:
        def end(task: asyncio.Task[None]) -> None:
            del self._uploads[index]
            error = None if task.cancelled() else task.exception()
            if error is not None:
                self._is_stopping = True
                if not isinstance(error, NotNow):
                    logger.error(f"Roark: {chunk_step(index)}: {where(error)}")
            self._changed.set()

        upload = asyncio.get_running_loop().create_task(self._upload(index))
        self._uploads[index] = upload
        upload.add_done_callback(end)

    async def _send(self, step: str, body: bytes) -> None:
        key = self.folder.idempotency_key(step)

        async def attempt(number: int) -> None:
            await self._client.send_event(body, idempotency_key=key, attempt=number)

        await self._until_settled(step, attempt)

    async def _upload(self, index: int) -> None:
        client, folder, step = self._client, self.folder, chunk_step(index)
        url: str | None = None
        urls = 0

        async def attempt(number: int) -> None:
            nonlocal url, urls
            async with self._slots:
                if self.was_unreachable or self.was_turned_away:
                    raise NotNow
                if url is None:
                    # A new key: under the old one Roark may answer with the old URL.
                    key = folder.idempotency_key(f"{step} url {urls}")
                    url = await client.upload_url(
                        folder.call_id, index, idempotency_key=key, attempt=number
                    )
                    urls += 1
                try:
                    await client.put_chunk(url, folder.read_chunk(index), attempt=number)
                except Rejected as error:
                    if error.url_has_expired and urls < MAX_UPLOAD_URLS:
                        url = None
                        raise Unreachable("the upload URL has expired") from None
                    raise

        await self._until_settled(step, attempt)


class PostDelivery(Delivery):
    """Brings a closed call to a destination that gets it in one request."""

    def __init__(
        self, folder: Folder, name: str, send: Callable[..., Awaitable[None]], **how: Any
    ) -> None:
        super().__init__(folder, **how)
        self._name = name
        self._send = send

    async def _advance(self) -> bool:
        key = self.folder.idempotency_key(self._name)

        async def attempt(number: int) -> None:
            async with self._slots:
                await self._send(self.folder.read_record(), idempotency_key=key, attempt=number)

        await self._until_settled(self._name, attempt)
        return False
