"""Roark's wire contract: three requests, each tried once. When to try again is outbox.py's matter.

Building a client costs nothing: the connections are opened by the loop that sends, with one TLS
context for the whole process, which is made there as well. That loop is the outbox's, not a call's.
httpx is loaded when it is first used: `import bot` does not wait for it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
import ssl
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx

BASE_URL = "https://api.roark.ai"
AUDIO = "audio/pcm"

# The first attempt of a request may take this long, each further one twice as long as the one
# before: a hang costs little, and a slow line still gets its chunk through.
ATTEMPT_SECONDS = 8.0
MAX_ATTEMPT_SECONDS = 64.0
MAX_ERROR_CHARS = 200

# 4xx that are about the moment, not about what was sent.
TRANSIENT = frozenset({408, 425, 429})
# Answers that are about the key or the address, not about what was sent: the next process, with
# another key perhaps, may have more luck.
TURNED_AWAY = frozenset({401, 402, 403, *range(300, 400)})


class Unreachable(Exception):
    """No answer, or one that cannot be read; the text says why and holds no URL."""


class Rejected(Exception):
    """An answer that is not 2xx; `message` is its own text without key or URL."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        retry_after_s: float | None = None,
        by_storage: bool = False,
    ) -> None:
        super().__init__(f"{status} {message}".strip())
        self.status = status
        self.message = message
        self.retry_after_s = retry_after_s
        self.by_storage = by_storage

    @property
    def is_transient(self) -> bool:
        """Whether the same request may be answered differently in a while."""
        return self.status in TRANSIENT or self.status >= 500

    @property
    def is_about_us(self) -> bool:
        """Whether the key or the address was refused, rather than what was sent."""
        return not self.by_storage and self.status in TURNED_AWAY

    @property
    def url_has_expired(self) -> bool:
        """Whether storage wants a newer upload URL than the one it was given."""
        return self.by_storage and (self.status == 403 or self.message == "ExpiredToken")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """How long to wait before trying again: full jitter, Retry-After as a floor.

    Parameters:
        base_s: Upper limit of the first wait; doubles with every failure.
        cap_s: Upper limit of any wait that Roark did not ask for.
        retry_after_cap_s: A longer Retry-After counts as this many seconds.
    """

    base_s: float = 0.5
    cap_s: float = 8.0
    retry_after_cap_s: float = 30.0
    jitter: Callable[[], float] = field(default=random.random)

    def seconds(self, failures: int, retry_after_s: float | None = None) -> float:
        """The wait after the `failures`-th failure in a row (1 is the first)."""
        ceiling = min(self.cap_s, self.base_s * 2.0 ** min(failures - 1, 30))
        wait = ceiling * self.jitter()
        if retry_after_s is not None:
            wait = max(wait, min(retry_after_s, self.retry_after_cap_s))
        return wait


class RoarkClient:
    """One attempt per call; raises `Unreachable` or `Rejected`. Belongs to one event loop."""

    def __init__(self, *, api_key: str, base_url: str | None = None) -> None:
        self.base_url = (base_url or BASE_URL).rstrip("/")
        self._api_key = api_key
        self._http = HttpClient()

    async def send_event(self, body: bytes, *, idempotency_key: str, attempt: int = 1) -> None:
        """Posts call-started or call-ended, as the bytes they are."""
        await self._post("/v1/integrations/pipecat", body, idempotency_key, attempt)

    async def upload_url(
        self, call_id: str, index: int, *, idempotency_key: str, attempt: int = 1
    ) -> str:
        """Asks where to put a chunk."""
        question = {"pipecatCallId": call_id, "chunkIndex": index, "contentType": AUDIO}
        body = json.dumps(question, separators=(",", ":")).encode()
        path = "/v1/integrations/pipecat/chunk-upload-url"
        answer = await self._post(path, body, idempotency_key, attempt)
        try:
            message = json.loads(answer)
            url = message.get("data", message)["uploadUrl"]
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            raise Unreachable("the answer holds no uploadUrl") from None
        if not isinstance(url, str):
            raise Unreachable("the answer holds no uploadUrl")
        return url

    async def put_chunk(self, url: str, pcm: bytes, *, attempt: int = 1) -> None:
        """Stores a chunk. No key goes along: storage refuses headers it did not sign."""
        response = await self._http.send("PUT", url, pcm, {"Content-Type": AUDIO}, attempt)
        if not response.is_success:
            raise Rejected(
                response.status_code,
                _storage_code(response.content),
                retry_after_s=retry_after(response.headers.get("Retry-After")),
                by_storage=True,
            )

    async def close(self) -> None:
        """Closes the connections; the next request opens new ones."""
        await self._http.close()

    async def _post(self, path: str, body: bytes, idempotency_key: str, attempt: int) -> bytes:
        headers = {
            "x-roark-api-key": self._api_key,
            "Authorization": f"Bearer {self._api_key}",
            "Content-Type": "application/json",
            "Idempotency-Key": idempotency_key,
        }
        response = await self._http.send("POST", self.base_url + path, body, headers, attempt)
        if not response.is_success:
            raise Rejected(
                response.status_code,
                error_text(response.content, secret=self._api_key),
                retry_after_s=retry_after(response.headers.get("Retry-After")),
            )
        return response.content


class HttpClient:
    """Requests that are tried once, each within a time that grows with its attempts.

    One for each destination: its connections are not another's to wait for.
    """

    def __init__(self) -> None:
        self._client: httpx.AsyncClient | None = None

    async def send(
        self, method: str, url: str, body: bytes, headers: dict[str, str], attempt: int
    ) -> httpx.Response:
        """The answer, whatever its status; raises `Unreachable` when there is none in time."""
        import httpx

        seconds = min(MAX_ATTEMPT_SECONDS, ATTEMPT_SECONDS * 2.0 ** min(attempt - 1, 10))
        if self._client is None:
            self._client = httpx.AsyncClient(
                verify=tls_context(),
                # The whole attempt has a limit, below; httpx's are for its parts.
                timeout=None,
                limits=httpx.Limits(keepalive_expiry=60.0),
            )
        _is_discreet.set(True)
        try:
            async with asyncio.timeout(seconds):
                return await self._client.request(
                    method,
                    url,
                    content=body,
                    headers=headers,
                    # A key follows no redirect; a presigned URL carries none and may.
                    follow_redirects=method == "PUT",
                )
        except TimeoutError:
            raise Unreachable(f"no answer in {seconds:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, RuntimeError) as error:
            # The text of these may hold the URL.
            raise Unreachable(_system_error(error) or type(error).__name__) from None

    async def close(self) -> None:
        """Closes the connections; the next request opens new ones."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()


class _Discretion(logging.Filter):
    """Keeps what httpx says of our requests out of every log: it says whole, signed URLs."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not _is_discreet.get()


_is_discreet: ContextVar[bool] = ContextVar("is_discreet", default=False)
# Filters are not inherited: each logger that speaks of a request has its own.
for _name in ("httpx", "httpcore.connection", "httpcore.http11", "httpcore.proxy"):
    logging.getLogger(_name).addFilter(_Discretion())


@cache
def warm_up() -> None:
    """Loads what the first request would; in a thread of its own that holds up a call by 40 ms."""

    async def load() -> None:
        import anyio
        import httpx

        async with httpx.AsyncClient(verify=tls_context()):
            # What httpx runs on is loaded when it first waits for something.
            await anyio.sleep(0)

    # Not in this thread, where a loop may be running.
    thread = threading.Thread(target=lambda: asyncio.run(load()), name="roark-warm-up")
    thread.start()
    thread.join()


@cache
def tls_context() -> ssl.SSLContext:
    """The process's TLS context for what is delivered: some 20 ms, so never on a call's loop."""
    import httpx

    return httpx.create_ssl_context()


def error_text(answer: bytes, *, secret: str) -> str:
    """What an answer says went wrong, short and without the key or a URL."""
    text = answer[:65536].decode("utf-8", "replace")
    try:
        message = json.loads(text)
        error = message.get("error", message.get("message", text))
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError, RecursionError):
        pass
    text = re.sub(r"https?://\S+", "[url]", text.replace(secret, "[key]") if secret else text)
    return " ".join(text.split())[:MAX_ERROR_CHARS]


def _system_error(error: BaseException | None) -> str | None:
    """The system's word for what made a connection fail, such as "Connection refused"."""
    while error is not None:
        # Resolver errors are negative, and not in the table of the system.
        if isinstance(error, OSError) and error.errno:
            return os.strerror(error.errno) if error.errno > 0 else error.strerror
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        else:
            error = error.__cause__ or error.__context__
    return None


def retry_after(value: str | None, *, now: datetime | None = None) -> float | None:
    """Reads a Retry-After header (seconds or an HTTP-date); None when it says nothing usable."""
    if value is None:
        return None
    if re.fullmatch(r"\s*\d{1,9}(\.\d*)?\s*", value):
        return float(value)
    try:
        until = parsedate_to_datetime(value)
    except ValueError:
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=UTC)
    return max(0.0, (until - (now or datetime.now(UTC))).total_seconds())


def _storage_code(answer: bytes) -> str:
    """The error code of an S3 answer; the rest of it may repeat the signature."""
    found = re.search(rb"<Code>(\w{1,60})</Code>", answer)
    return found.group(1).decode() if found else ""
