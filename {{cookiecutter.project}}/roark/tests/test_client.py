"""Roark's wire contract, one attempt at a time."""

import asyncio
import logging
import socket
import ssl
import threading
import time
from contextvars import Context
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from aiohttp import web

from rehearsal.providers.roark import RoarkReceiver
from roark.client import Backoff, Rejected, RoarkClient, Unreachable, retry_after, tls_context

KEY = "rk_live_8d1f"
STARTED = (
    b'{"event":"call-started","pipecatCallId":"a#1",'
    b'"eventTimestamp":"2026-11-21T12:00:00+00:00","agentId":"agent"}'
)


@pytest.fixture
async def client(roark):
    client = RoarkClient(api_key=KEY, base_url=roark.url + "/")
    yield client
    await client.close()


@pytest.mark.anyio
@pytest.mark.parametrize("wrap_data", [True, False])
async def test_a_chunk_goes_where_roark_says_with_and_without_the_data_wrapper(wrap_data):
    async with RoarkReceiver(wrap_data=wrap_data) as roark:
        client = RoarkClient(api_key=KEY, base_url=roark.url)
        await client.send_event(STARTED, idempotency_key="1")
        url = await client.upload_url("a#1", 0, idempotency_key="2")
        await client.put_chunk(url, b"\x01\x02\x03\x04")
        await client.close()
    assert roark.calls["a#1"].chunks == {0: b"\x01\x02\x03\x04"}
    assert roark.problems == []


@pytest.mark.anyio
async def test_an_event_arrives_as_the_bytes_it_is(client, roark):
    await client.send_event(STARTED, idempotency_key="the key")
    (request,) = roark.requests
    assert (request.body, request.idempotency_key) == (STARTED, "the key")


@pytest.mark.anyio
async def test_a_refusal_carries_status_and_roarks_text_but_no_key_and_no_url():
    async def refuse(request: web.Request) -> web.Response:
        text = f"bad key {KEY}\nsee https://roark.ai/x?token=1"
        return web.json_response({"error": {"message": text}}, status=422)

    async with _server(refuse) as url:
        client = RoarkClient(api_key=KEY, base_url=url)
        with pytest.raises(Rejected) as refusal:
            await client.send_event(STARTED, idempotency_key="1")
        await client.close()
    assert str(refusal.value) == "422 bad key [key] see [url]"


@pytest.mark.anyio
async def test_a_refusal_of_storage_is_named_by_its_code_alone():
    async def refuse(request: web.Request) -> web.Response:
        text = (
            "<Error><Code>SignatureDoesNotMatch</Code><StringToSign>s3cr3t</StringToSign></Error>"
        )
        return web.Response(status=403, text=text)

    async with _server(refuse) as url:
        client = RoarkClient(api_key=KEY)
        with pytest.raises(Rejected) as refusal:
            await client.put_chunk(f"{url}/x?X-Amz-Signature=s3cr3t", b"1234")
        await client.close()
    assert str(refusal.value) == "403 SignatureDoesNotMatch"
    assert refusal.value.url_has_expired
    assert not refusal.value.is_about_us


@pytest.mark.anyio
async def test_the_key_does_not_follow_a_redirect():
    async def redirect(request: web.Request) -> web.Response:
        return web.Response(status=307, headers={"Location": "http://127.0.0.1:9/"})

    async with _server(redirect) as url:
        client = RoarkClient(api_key=KEY, base_url=url)
        with pytest.raises(Rejected) as refusal:
            await client.send_event(STARTED, idempotency_key="1")
        await client.close()
    assert (refusal.value.status, refusal.value.is_about_us) == (307, True)


@pytest.mark.anyio
async def test_httpx_logs_neither_key_nor_signed_url_of_ours_and_still_logs_others(
    client, roark, caplog
):
    caplog.set_level(logging.DEBUG)
    await client.send_event(STARTED, idempotency_key="1")
    url = await client.upload_url("a#1", 0, idempotency_key="2")
    await asyncio.create_task(client.put_chunk(url, b"1234"))
    assert KEY not in caplog.text
    assert "Signature" not in caplog.text

    def lines_of_httpx() -> list[logging.LogRecord]:
        return [line for line in caplog.records if line.name.startswith(("httpx", "httpcore"))]

    assert not lines_of_httpx()

    async def somebody_else() -> None:
        async with httpx.AsyncClient() as other:
            await other.get(f"{roark.url}/other")

    await asyncio.create_task(somebody_else(), context=Context())
    assert lines_of_httpx()


@pytest.mark.anyio
async def test_nobody_there_is_said_without_the_url():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        client = RoarkClient(api_key=KEY)
        with pytest.raises(Unreachable) as error:
            await client.put_chunk(f"http://127.0.0.1:{taken.getsockname()[1]}/?sig=s3cr3t", b"1")
        await client.close()
    assert str(error.value) == "Connection refused"


@pytest.mark.anyio
@pytest.mark.parametrize("answer", [b"", b"[]", b'{"data":null}', b'{"data":{"uploadUrl":1}}'])
async def test_an_answer_without_upload_url_counts_as_none(answer):
    async def say(request: web.Request) -> web.Response:
        return web.Response(body=answer)

    async with _server(say) as url:
        client = RoarkClient(api_key=KEY, base_url=url)
        with pytest.raises(Unreachable, match="no uploadUrl"):
            await client.upload_url("a", 0, idempotency_key="1")
        await client.close()


@pytest.mark.anyio
async def test_a_connection_cut_in_the_middle_of_a_body_counts_as_unreachable(client, roark):
    await client.send_event(STARTED, idempotency_key="1")
    url = await client.upload_url("a#1", 0, idempotency_key="2")
    roark.fail("put", cut=True)
    with pytest.raises(Unreachable):
        await client.put_chunk(url, bytes(400_000))
    roark.heal()
    await client.put_chunk(url, bytes(400_000))
    assert len(roark.calls["a#1"].recording) == 400_000


@pytest.mark.anyio
async def test_a_hang_ends_with_the_attempts_time(client, roark, monkeypatch):
    monkeypatch.setattr("roark.client.ATTEMPT_SECONDS", 0.05)
    roark.fail(hang=True)
    began = time.monotonic()
    with pytest.raises(Unreachable, match=r"no answer in 0\.2 s"):
        await client.send_event(STARTED, idempotency_key="1", attempt=3)
    # Without that time the next limit is MAX_ATTEMPT_SECONDS.
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("status", "is_transient", "is_about_us"),
    [
        (400, False, False),
        (401, False, True),
        (402, False, True),
        (403, False, True),
        (404, False, False),
        (408, True, False),
        (409, False, False),
        (413, False, False),
        (422, False, False),
        (425, True, False),
        (429, True, False),
        (500, True, False),
        (503, True, False),
        (301, False, True),
    ],
)
def test_a_status_says_whether_to_repeat(status, is_transient, is_about_us):
    rejected = Rejected(status, "")
    assert (rejected.is_transient, rejected.is_about_us) == (is_transient, is_about_us)


NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("7", 7.0),
        (" 0.5 ", 0.5),
        ("Sat, 21 Nov 2026 12:00:09 GMT", 9.0),
        ("Sat, 21 Nov 2026 11:59:09 GMT", 0.0),
        ("-3", None),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_or_nothing(header, seconds):
    assert retry_after(header, now=NOW) == seconds


def test_waits_are_drawn_from_a_doubling_range_that_is_capped():
    longest = Backoff(base_s=0.5, cap_s=8.0, jitter=lambda: 1.0)
    assert [longest.seconds(n) for n in range(1, 8)] == [0.5, 1, 2, 4, 8, 8, 8]
    assert Backoff(jitter=lambda: 0.0).seconds(5) == 0
    assert longest.seconds(10_000) == 8


def test_retry_after_is_the_least_wait_but_not_without_limit():
    backoff = Backoff(base_s=0.5, cap_s=8.0, retry_after_cap_s=30.0, jitter=lambda: 1.0)
    assert backoff.seconds(1, 3.0) == 3
    assert backoff.seconds(5, 3.0) == 8
    assert backoff.seconds(1, timedelta(days=1).total_seconds()) == 30


def test_a_client_costs_nothing_where_it_is_made_and_all_of_them_share_one_tls_context(monkeypatch):
    """Making one stalls the call 20 to 640 ms, which is what the published package does."""
    made: list[str] = []
    create = ssl.SSLContext.load_verify_locations

    def load(context: ssl.SSLContext, *arguments: Any, **named: Any) -> None:
        made.append(threading.current_thread().name)
        create(context, *arguments, **named)

    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", load)
    tls_context.cache_clear()

    async def ask(client: RoarkClient) -> None:
        with pytest.raises(Unreachable):
            await client.send_event(STARTED, idempotency_key="1")
        await client.close()

    clients = [RoarkClient(api_key=KEY, base_url="https://127.0.0.1:9") for _ in range(3)]
    assert made == []
    sender = threading.Thread(target=lambda: [asyncio.run(ask(c)) for c in clients], name="outbox")
    sender.start()
    sender.join(30)
    assert made == ["outbox"]


class _server:
    """A server on loopback that gives every request to one handler."""

    def __init__(self, handler) -> None:
        app = web.Application()
        app.router.add_route("*", "/{any:.*}", handler)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)

    async def __aenter__(self) -> str:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()
