"""A Roark on this machine: the three routes of its wire contract, and every way they can fail.

    async with RoarkReceiver() as roark:
        roark.fail("put", status=500, chunks={3, 4}, times=2)
        ...                                     # a call reports to roark.url
        call = await roark.complete(call_id)    # call.started, call.chunks, call.ended

What breaks the contract (a header missing, a null, an unknown field) is collected in `problems`
and answered as if it were right: the test says what it expects, the call goes on.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import format_datetime
from types import TracebackType
from typing import Any, Literal, Self
from uuid import uuid4

from aiohttp import web

Step = Literal["call-started", "chunk-url", "put", "call-ended"]

MAX_BODY_BYTES = 64 * 1024 * 1024

# Fields per message: (required, optional).
EVENT_FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "call-started": (
        {"event", "pipecatCallId", "eventTimestamp", "agentId"},
        {"agentName", "agentPrompt"},
    ),
    "call-ended": (
        {
            "event",
            "pipecatCallId",
            "eventTimestamp",
            "callStartedAt",
            "callEndedAt",
            "callEndedReason",
        },
        {
            "agentSpokeFirst",
            "recordingSampleRate",
            "recordingNumChannels",
            "transcript",
            "toolCalls",
        },
    ),
}
CHUNK_URL_FIELDS = {"pipecatCallId", "chunkIndex", "contentType"}
TURN_FIELDS: tuple[set[str], set[str]] = (
    {"role", "content", "timestamp", "endTimestamp"},
    {"audioOffsetMs", "endAudioOffsetMs", "userId", "language"},
)
TOOL_FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "tool_call": (
        {"kind", "toolCallId", "name", "arguments", "timestamp"},
        {"audioOffsetMs"},
    ),
    "tool_result": ({"kind", "toolCallId", "content", "timestamp"}, {"audioOffsetMs"}),
}


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it arrived: `status` is what was answered, 0 when nothing was."""

    step: Step
    call_id: str
    chunk: int | None
    body: bytes
    idempotency_key: str | None
    status: int
    stored: bool


@dataclass(slots=True)
class ReceivedCall:
    """What Roark has of one call."""

    call_id: str
    started: dict[str, Any] | None = None
    chunks: dict[int, bytes] = field(default_factory=dict)
    ended: dict[str, Any] | None = None
    requests: list[Request] = field(default_factory=list)

    @property
    def recording(self) -> bytes:
        """The chunks joined in index order, as Roark joins them: PCM16LE, left user, right bot."""
        return b"".join(self.chunks[index] for index in sorted(self.chunks))

    @property
    def whole(self) -> bool:
        """Started, ended, and no chunk missing from 0 to the last."""
        indexes_are_gapless = sorted(self.chunks) == list(range(len(self.chunks)))
        return self.started is not None and self.ended is not None and indexes_are_gapless

    @property
    def stored(self) -> Counter[str]:
        """How often each thing was stored: `call-started`, `put 3`, `call-ended`."""
        return Counter(
            request.step if request.chunk is None else f"{request.step} {request.chunk}"
            for request in self.requests
            if request.stored
        )


@dataclass(slots=True)
class Fault:
    """What happens to the next `times` matching requests; see `RoarkReceiver.fail`."""

    step: Step | None
    status: int | None
    times: int | None
    retry_after: str | None
    chunks: frozenset[int] | None
    hang: bool
    slow_s: float
    cut: bool
    after_storing: bool
    held: asyncio.Event | None

    def takes(self, step: Step | None, chunk: int | None) -> bool:
        """Whether this request is one of those meant; counts it when it is."""
        if self.times == 0 or (self.step is not None and self.step != step):
            return False
        if self.chunks is not None and chunk not in self.chunks:
            return False
        if self.times is not None:
            self.times -= 1
        return True


class RoarkReceiver:
    """Roark's endpoints on 127.0.0.1.

    Args:
        port: 0 takes a free one; `stop` and `start` keep it.
        api_key: The key to insist on (others get 401); None takes any.
        wrap_data: Whether the upload URL is answered inside `{"data": ...}`; both occur.
    """

    def __init__(
        self, *, port: int = 0, api_key: str | None = None, wrap_data: bool = True
    ) -> None:
        self.calls: dict[str, ReceivedCall] = {}
        self.requests: list[Request] = []
        self.problems: list[str] = []
        self.port = port
        self.uploads_at_once = 0
        self._api_key = api_key
        self._wrap_data = wrap_data
        self._faults: list[Fault] = []
        self._urls: dict[str, tuple[str, int]] = {}
        self._expired_urls: set[str] = set()
        self._bodies_by_key: dict[str, bytes] = {}
        self._uploading = 0
        self._changed = asyncio.Condition()
        self._stopping = asyncio.Event()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """What to set ROARK_BASE_URL to."""
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listens; after `stop`, on the same port again."""
        self._stopping.clear()
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_post("/v1/integrations/pipecat", self._event)
        app.router.add_post("/v1/integrations/pipecat/chunk-upload-url", self._chunk_url)
        app.router.add_put("/storage/{token}", self._put)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Refuses connections from now on, as a Roark that is down; what hangs is let go."""
        self._stopping.set()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def fail(
        self,
        step: Step | None = None,
        *,
        status: int | None = None,
        times: int | None = None,
        retry_after: float | str | datetime | None = None,
        chunks: Collection[int] | None = None,
        hang: bool = False,
        slow_s: float = 0.0,
        cut: bool = False,
        after_storing: bool = False,
        held: asyncio.Event | None = None,
    ) -> Fault:
        """Switches a fault on; the first switched on that matches a request decides.

        Args:
            step: The request that fails; None is every request.
            status: The answer instead of 200. 403 on `put` also expires that upload URL.
            times: How many requests; None is all of them until `heal`.
            retry_after: Sent as Retry-After: seconds, raw text, or an aware datetime (HTTP-date).
            chunks: Only requests for these chunk indexes.
            hang: No answer at all.
            slow_s: Seconds before the answer.
            cut: The connection is reset in the middle of the request body.
            after_storing: The request takes effect, only its answer is lost.
            held: No answer before this is set; no effect either if the client has gone by then.
        """
        if isinstance(retry_after, datetime):
            retry_after = format_datetime(retry_after, usegmt=True)
        fault = Fault(
            step=step,
            status=status,
            times=times,
            retry_after=None if retry_after is None else str(retry_after),
            chunks=None if chunks is None else frozenset(chunks),
            hang=hang,
            slow_s=slow_s,
            cut=cut,
            after_storing=after_storing,
            held=held,
        )
        self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """Switches every fault off; URLs that have expired stay expired."""
        self._faults.clear()

    async def complete(self, call_id: str, *, timeout: float = 30.0) -> ReceivedCall:
        """Waits until the call is whole; raises TimeoutError saying what is there instead."""
        call = self.call(call_id)
        await self.until(lambda: call.whole, timeout=timeout, what=f"{call_id} is whole")
        return call

    async def until(self, condition: Any, *, timeout: float = 30.0, what: str = "") -> None:
        """Waits for `condition()` to hold, looked at whenever a request was dealt with."""
        try:
            async with asyncio.timeout(timeout), self._changed:
                await self._changed.wait_for(condition)
        except TimeoutError:
            seen = "; ".join(f"{call.call_id}: {dict(call.stored)}" for call in self.calls.values())
            raise TimeoutError(f"not within {timeout:g} s: {what}. Stored: {seen}") from None

    def call(self, call_id: str) -> ReceivedCall:
        """The call of this id; empty when nothing of it has come yet."""
        return self.calls.setdefault(call_id, ReceivedCall(call_id))

    async def _event(self, request: web.Request) -> web.StreamResponse:
        body = await self._read(request, step=None)
        message = _json_object(body)
        if message is None or message.get("event") not in EVENT_FIELDS:
            self.problems.append(f"not a Roark event: {body[:80]!r}")
            return web.json_response({"error": "unknown event"}, status=400)
        step: Step = "call-started" if message["event"] == "call-started" else "call-ended"
        self._check_headers(request, step)
        self._check_event(step, message)

        def store(call: ReceivedCall) -> dict[str, Any]:
            if step == "call-started":
                call.started = self._once(call.started, message, f"{call.call_id} {step}")
            else:
                call.ended = self._once(call.ended, message, f"{call.call_id} {step}")
            return {"ok": True}

        return await self._answer(request, step, str(message["pipecatCallId"]), None, body, store)

    async def _chunk_url(self, request: web.Request) -> web.StreamResponse:
        body = await self._read(request, step="chunk-url")
        message = _json_object(body)
        if message is None or not isinstance(message.get("chunkIndex"), int):
            self.problems.append(f"not a request for an upload URL: {body[:80]!r}")
            return web.json_response({"error": "chunkIndex is missing"}, status=400)
        self._check_headers(request, "chunk-url")
        self._check_fields("chunk-url", message, CHUNK_URL_FIELDS, set())
        if message.get("contentType") != "audio/pcm":
            self.problems.append("chunk-url: contentType is not audio/pcm")
        call_id, index = str(message["pipecatCallId"]), int(message["chunkIndex"])

        def store(call: ReceivedCall) -> dict[str, Any]:
            token = uuid4().hex
            self._urls[token] = (call.call_id, index)
            # The quoting must survive: a signature that is decoded and encoded again is wrong.
            query = f"X-Amz-Signature={token}%2F%2B%3D&x-id=PutObject"
            answer: dict[str, Any] = {
                "uploadUrl": f"{self.url}/storage/{token}?{query}",
                "s3Key": f"pipecat/{token}",
                "chunkIndex": index,
                "expiresInSeconds": 900,
                "method": "PUT",
                "contentType": "audio/pcm",
            }
            return {"data": answer} if self._wrap_data else answer

        return await self._answer(request, "chunk-url", call_id, index, body, store)

    async def _put(self, request: web.Request) -> web.StreamResponse:
        token = request.match_info["token"]
        if token not in self._urls:
            return web.Response(status=403, text="<Error><Code>AccessDenied</Code></Error>")
        if not request.raw_path.endswith(f"?X-Amz-Signature={token}%2F%2B%3D&x-id=PutObject"):
            self.problems.append("put: the signed URL was not used as it was given")
        call_id, index = self._urls[token]
        for name in ("authorization", "x-roark-api-key", "cookie"):
            if name in request.headers:
                self.problems.append(f"put: carries {name}")
        if request.headers.get("content-type") != "audio/pcm":
            self.problems.append(f"put: content-type {request.headers.get('content-type')!r}")
        if token in self._expired_urls:
            return web.Response(status=403, text="<Error><Code>AccessDenied</Code></Error>")
        self._uploading += 1
        self.uploads_at_once = max(self.uploads_at_once, self._uploading)
        try:
            answer = await self._store_chunk(request, call_id, index)
        finally:
            self._uploading -= 1
        if answer.status == 403:
            self._expired_urls.add(token)
        return answer

    async def _store_chunk(
        self, request: web.Request, call_id: str, index: int
    ) -> web.StreamResponse:
        body = await self._read(request, step="put", chunk=index)

        def store(call: ReceivedCall) -> dict[str, Any]:
            call.chunks[index] = self._once(
                call.chunks.get(index), body, f"{call_id} chunk {index}"
            )
            return {}

        return await self._answer(request, "put", call_id, index, body, store)

    async def _read(
        self, request: web.Request, *, step: Step | None, chunk: int | None = None
    ) -> bytes:
        """The whole body, unless a fault cuts this request in the middle of it."""
        for fault in self._faults:
            cuts = step is not None and fault.cut and not fault.after_storing
            if cuts and fault.takes(step, chunk):
                await request.content.read(1024)
                self._reset(request)
        return await request.read()

    async def _answer(
        self,
        request: web.Request,
        step: Step,
        call_id: str,
        chunk: int | None,
        body: bytes,
        store: Any,
    ) -> web.StreamResponse:
        """Stores and answers, or does what the first matching fault says instead."""
        call = self.call(call_id)
        key = request.headers.get("idempotency-key")
        self._check_repeat(f"{call_id} {step}", key, body)
        fault = next((fault for fault in self._faults if fault.takes(step, chunk)), None)
        status = 200 if fault is None or fault.status is None else fault.status
        if self._api_key is not None and step != "put":
            if request.headers.get("x-roark-api-key") != self._api_key:
                status = 401
        lost = fault is not None and (fault.hang or fault.cut)
        if fault is not None and fault.slow_s:
            await self._wait(fault.slow_s)
        if fault is not None and fault.held is not None:
            await fault.held.wait()
            # By then this server knows who hung up meanwhile.
            await self._wait(0.1)
            lost = lost or request.transport is None or request.transport.is_closing()
        stores = (status < 300 and not lost) or (fault is not None and fault.after_storing)
        answer = store(call) if stores else {"error": f"rehearsed {status}"}
        arrived = Request(step, call_id, chunk, body, key, 0 if lost else status, stores)
        call.requests.append(arrived)
        self.requests.append(arrived)
        async with self._changed:
            self._changed.notify_all()
        if fault is not None and fault.hang:
            await self._wait(None)
        if fault is not None and (fault.cut or fault.hang):
            self._reset(request)
        headers = {"Retry-After": fault.retry_after} if fault and fault.retry_after else None
        if step == "put":
            return web.Response(status=status, headers=headers)
        return web.json_response(answer, status=status, headers=headers)

    async def _wait(self, seconds: float | None) -> None:
        """Waits, but not longer than this server lives."""
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass

    def _reset(self, request: web.Request) -> None:
        if request.transport is not None:
            request.transport.abort()
        raise web.HTTPServiceUnavailable(reason="never sent: the connection is gone")

    def _once(self, before: Any, now: Any, what: str) -> Any:
        if before is not None and before != now:
            self.problems.append(f"{what}: came twice with different content")
        return now

    def _check_repeat(self, what: str, key: str | None, body: bytes) -> None:
        if key is not None and self._bodies_by_key.setdefault(key, body) != body:
            self.problems.append(f"{what}: another body under the same Idempotency-Key")

    def _check_headers(self, request: web.Request, step: Step) -> None:
        key = request.headers.get("x-roark-api-key")
        if not key:
            self.problems.append(f"{step}: x-roark-api-key is missing")
        if request.headers.get("authorization") != f"Bearer {key}":
            self.problems.append(f"{step}: authorization is not the same key as a Bearer token")
        if request.content_type != "application/json":
            self.problems.append(f"{step}: content-type {request.content_type!r}")

    def _check_event(self, step: Step, message: dict[str, Any]) -> None:
        required, optional = EVENT_FIELDS[step]
        self._check_fields(step, message, required, optional, may_be_null="callStartedAt")
        for name in ("eventTimestamp", "callStartedAt", "callEndedAt"):
            self._check_time(step, name, message)
        if ("recordingSampleRate" in message) != ("recordingNumChannels" in message):
            self.problems.append(f"{step}: one of the two recording fields without the other")
        for name in ("transcript", "toolCalls"):
            if name in message and not message[name]:
                self.problems.append(f"{step}: {name} is empty instead of left out")
        for turn in message.get("transcript", []):
            self._check_fields("transcript", turn, *TURN_FIELDS)
            self._check_time("transcript", "timestamp", turn)
            self._check_time("transcript", "endTimestamp", turn)
        for tool in message.get("toolCalls", []):
            fields = TOOL_FIELDS.get(tool.get("kind"))
            if fields is None:
                self.problems.append(f"toolCalls: kind {tool.get('kind')!r}")
                continue
            self._check_fields(tool["kind"], tool, *fields)
            content = tool.get("arguments" if tool["kind"] == "tool_call" else "content")
            if not isinstance(content, str):
                self.problems.append(f"{tool['kind']}: its content is not a string")

    def _check_fields(
        self,
        what: str,
        message: dict[str, Any],
        required: set[str],
        optional: set[str],
        *,
        may_be_null: str | None = None,
    ) -> None:
        if missing := required - message.keys():
            self.problems.append(f"{what}: {', '.join(sorted(missing))} missing")
        if unknown := message.keys() - required - optional:
            self.problems.append(f"{what}: {', '.join(sorted(unknown))} unknown")
        for name, value in message.items():
            if value is None and name != may_be_null:
                self.problems.append(f"{what}: {name} is null")

    def _check_time(self, what: str, name: str, message: dict[str, Any]) -> None:
        value = message.get(name)
        if value is None:
            return
        try:
            has_offset = datetime.fromisoformat(value).utcoffset() is not None
        except (TypeError, ValueError):
            has_offset = False
        if not has_offset:
            self.problems.append(f"{what}: {name} {value!r} is not ISO 8601 with an offset")


def _json_object(body: bytes) -> dict[str, Any] | None:
    try:
        message = json.loads(body)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None
