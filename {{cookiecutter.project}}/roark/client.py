"""Roark's wire contract: three requests, each tried once. When to try again is outbox.py's matter.

Building a client costs nothing: the session is made by the loop that sends, with the TLS context
that aiohttp made for the whole process when it was imported.
"""

import json
import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import aiohttp
from yarl import URL

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
        self._session: aiohttp.ClientSession | None = None

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
        except (ValueError, AttributeError, KeyError, TypeError):
            raise Unreachable("the answer holds no uploadUrl") from None
        if not isinstance(url, str):
            raise Unreachable("the answer holds no uploadUrl")
        return url

    async def put_chunk(self, url: str, pcm: bytes, *, attempt: int = 1) -> None:
        """Stores a chunk. No key goes along: storage refuses headers it did not sign."""
        try:
            # Signed as written: not to be decoded and encoded again.
            target = URL(url, encoded=True)
        except ValueError:
            raise Unreachable("the upload URL is not a URL") from None
        await self._send("PUT", target, pcm, {"Content-Type": AUDIO}, attempt)

    async def close(self) -> None:
        """Closes the connections; the next request opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _post(self, path: str, body: bytes, idempotency_key: str, attempt: int) -> bytes:
        headers = {
            "x-roark-api-key": self._api_key,
            "Authorization": f"Bearer {self._api_key}",
            "Content-Type": "application/json",
            "Idempotency-Key": idempotency_key,
        }
        return await self._send("POST", URL(self.base_url + path), body, headers, attempt)

    async def _send(
        self, method: str, url: URL, body: bytes, headers: dict[str, str], attempt: int
    ) -> bytes:
        seconds = min(MAX_ATTEMPT_SECONDS, ATTEMPT_SECONDS * 2.0 ** min(attempt - 1, 10))
        try:
            async with self._open_session().request(
                method,
                url,
                data=body,
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=seconds),
                # The key follows no redirect; a presigned URL carries none and may.
                allow_redirects=method == "PUT",
            ) as response:
                answer = await response.read()
                if response.status // 100 == 2:
                    return answer
                by_storage = method == "PUT"
                raise Rejected(
                    response.status,
                    _storage_code(answer) if by_storage else self._error_text(answer),
                    retry_after_s=retry_after(response.headers.get("Retry-After")),
                    by_storage=by_storage,
                )
        except TimeoutError:
            raise Unreachable(f"no answer in {seconds:g} s") from None
        except aiohttp.ClientConnectorError as error:
            number = error.os_error.errno or 0
            # Resolver errors are negative, and not in the table of the system.
            said = os.strerror(number) if number > 0 else error.os_error.strerror
            raise Unreachable(said or type(error).__name__) from None
        except (aiohttp.ClientError, OSError, ValueError, RuntimeError) as error:
            # The text of these may hold the URL.
            raise Unreachable(type(error).__name__) from None

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ttl_dns_cache=300, keepalive_timeout=60),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    def _error_text(self, answer: bytes) -> str:
        text = answer[:65536].decode("utf-8", "replace")
        try:
            message = json.loads(text)
            error = message.get("error", message.get("message", text))
            text = str(error.get("message", error) if isinstance(error, dict) else error)
        except (ValueError, AttributeError):
            pass
        text = re.sub(r"https?://\S+", "[url]", text.replace(self._api_key, "[key]"))
        return " ".join(text.split())[:MAX_ERROR_CHARS]


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
