"""The loopback Roark notices what breaks the contract, and fails on demand."""

import asyncio
import time
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest
from yarl import URL

from rehearsal.providers.roark import RoarkReceiver

EVENTS = "/v1/integrations/pipecat"
AUTH = {"x-roark-api-key": "k", "authorization": "Bearer k"}
MOMENT = "2026-11-21T12:00:00+00:00"
STARTED = {
    "event": "call-started",
    "pipecatCallId": "a",
    "eventTimestamp": MOMENT,
    "agentId": "agent",
}
ENDED = {
    "event": "call-ended",
    "pipecatCallId": "a",
    "eventTimestamp": MOMENT,
    "callStartedAt": None,
    "callEndedAt": MOMENT,
    "callEndedReason": "agent-ended",
}


@pytest.fixture
async def roark(anyio_backend):
    async with RoarkReceiver() as receiver:
        yield receiver


@pytest.fixture
async def http(anyio_backend):
    async with aiohttp.ClientSession() as session:
        yield session


async def post(http, roark, message: Any, **headers: str) -> int:
    async with http.post(roark.url + EVENTS, json=message, headers={**AUTH, **headers}) as answer:
        return answer.status


async def upload_url(http, roark, index: int) -> str:
    question = {"pipecatCallId": "a", "chunkIndex": index, "contentType": "audio/pcm"}
    url = f"{roark.url}{EVENTS}/chunk-upload-url"
    async with http.post(url, json=question, headers=AUTH) as answer:
        return (await answer.json())["data"]["uploadUrl"]


async def put(http, url: str, **headers: str) -> int:
    headers = {"content-type": "audio/pcm", **headers}
    async with http.put(URL(url, encoded=True), data=b"1234", headers=headers) as answer:
        return answer.status


@pytest.mark.anyio
async def test_a_call_by_the_contract_is_whole_and_without_problems(roark, http):
    assert await post(http, roark, STARTED) == 200
    for index in range(2):
        assert await put(http, await upload_url(http, roark, index)) == 200
    assert not roark.calls["a"].whole
    assert await post(http, roark, ENDED) == 200
    call = await roark.complete("a")
    assert call.recording == b"12341234"
    assert roark.problems == []


@pytest.mark.parametrize(
    ("message", "headers", "problem"),
    [
        (STARTED, {"x-roark-api-key": ""}, "call-started: x-roark-api-key is missing"),
        (STARTED, {"authorization": "k"}, "authorization is not the same key"),
        ({**STARTED, "agentName": None}, {}, "agentName is null"),
        ({**STARTED, "agent_name": "x"}, {}, "agent_name unknown"),
        ({key: STARTED[key] for key in STARTED if key != "agentId"}, {}, "agentId missing"),
        ({**STARTED, "eventTimestamp": "2026-11-21T12:00:00"}, {}, "not ISO 8601 with an offset"),
        ({**ENDED, "transcript": []}, {}, "transcript is empty instead of left out"),
        ({**ENDED, "recordingSampleRate": 8000}, {}, "one of the two recording fields"),
        (
            {**ENDED, "toolCalls": [{"kind": "tool_call", "arguments": {}}]},
            {},
            "its content is not a string",
        ),
    ],
)
@pytest.mark.anyio
async def test_a_breach_of_the_contract_is_noted(message, headers, problem, roark, http):
    assert await post(http, roark, message, **headers) == 200
    assert any(problem in noted for noted in roark.problems), roark.problems


@pytest.mark.anyio
async def test_a_key_in_an_upload_is_noted(roark, http):
    url = await upload_url(http, roark, 0)
    await put(http, url, authorization="Bearer k")
    assert roark.problems == ["put: carries authorization"]


@pytest.mark.anyio
async def test_a_signed_url_that_was_quoted_anew_is_noted(roark, http):
    url = await upload_url(http, roark, 0)
    async with http.put(url, data=b"1", headers={"content-type": "audio/pcm"}):
        pass
    assert roark.problems == ["put: the signed URL was not used as it was given"]


@pytest.mark.anyio
async def test_different_content_for_the_same_thing_is_noted(roark, http):
    await post(http, roark, STARTED)
    await post(http, roark, {**STARTED, "agentId": "other"})
    assert roark.problems == ["a call-started: came twice with different content"]
    assert roark.calls["a"].stored["call-started"] == 2


@pytest.mark.anyio
async def test_another_body_under_the_same_idempotency_key_is_noted(roark, http):
    await post(http, roark, STARTED, **{"idempotency-key": "1"})
    await post(http, roark, ENDED, **{"idempotency-key": "1"})
    assert "another body under the same Idempotency-Key" in roark.problems[0]


@pytest.mark.anyio
async def test_a_status_is_answered_as_often_as_was_asked_and_stores_nothing(roark, http):
    roark.fail("call-started", status=429, times=2, retry_after=7)
    statuses = [await post(http, roark, STARTED) for _ in range(3)]
    assert statuses == [429, 429, 200]
    assert [request.stored for request in roark.requests] == [False, False, True]


@pytest.mark.anyio
async def test_retry_after_can_be_a_date(roark, http):
    at = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
    roark.fail(status=503, retry_after=at)
    async with http.post(roark.url + EVENTS, json=STARTED, headers=AUTH) as answer:
        assert answer.headers["Retry-After"] == "Sat, 21 Nov 2026 12:00:00 GMT"


@pytest.mark.anyio
async def test_an_expired_url_stays_expired_and_a_new_one_works(roark, http):
    roark.fail("put", status=403, times=1)
    url = await upload_url(http, roark, 0)
    assert [await put(http, url), await put(http, url)] == [403, 403]
    assert await put(http, await upload_url(http, roark, 0)) == 200


@pytest.mark.anyio
@pytest.mark.parametrize("is_stored", [False, True])
async def test_a_cut_leaves_no_answer_whether_or_not_it_was_stored(is_stored, roark, http):
    roark.fail(cut=True, after_storing=is_stored)
    with pytest.raises(aiohttp.ClientError):
        await post(http, roark, STARTED)
    assert (roark.call("a").started is not None) == is_stored


@pytest.mark.anyio
async def test_a_hang_lasts_until_the_client_or_the_server_is_done(roark, http):
    roark.fail(hang=True)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await post(http, roark, STARTED)
    began = time.monotonic()
    await roark.stop()
    # aiohttp waits a minute for what is still asked.
    assert time.monotonic() - began < 20


@pytest.mark.anyio
async def test_stopped_it_refuses_connections_and_started_again_it_is_where_it_was(roark, http):
    url = roark.url
    await roark.stop()
    with pytest.raises(aiohttp.ClientConnectorError):
        await post(http, roark, STARTED)
    await roark.start()
    assert roark.url == url
    assert await post(http, roark, STARTED) == 200


@pytest.mark.anyio
async def test_a_wrong_key_is_refused_where_one_is_asked_for(http):
    async with RoarkReceiver(api_key="other") as roark:
        assert await post(http, roark, STARTED) == 401
        assert roark.call("a").started is None


@pytest.mark.anyio
async def test_waiting_for_a_call_that_never_comes_says_what_came_instead(roark, http):
    await post(http, roark, STARTED)
    with pytest.raises(TimeoutError, match=r"a is whole\. Stored: a: \{'call-started': 1\}"):
        await roark.complete("a", timeout=0.05)


@pytest.mark.anyio
async def test_it_listens_on_loopback_only(roark):
    assert roark.url.startswith("http://127.0.0.1:")


@pytest.mark.anyio
async def test_an_answer_that_is_held_has_no_effect_for_a_client_that_hung_up(roark, http):
    held = asyncio.Event()
    roark.fail(held=held)
    stays = asyncio.create_task(post(http, roark, STARTED))
    async with aiohttp.ClientSession() as hasty:
        with pytest.raises(TimeoutError):
            timeout = aiohttp.ClientTimeout(total=0.2)
            await hasty.post(roark.url + EVENTS, json=ENDED, headers=AUTH, timeout=timeout)
    held.set()
    assert await stays == 200
    await roark.until(lambda: len(roark.requests) == 2)
    assert roark.calls["a"].started == STARTED
    assert roark.calls["a"].ended is None
