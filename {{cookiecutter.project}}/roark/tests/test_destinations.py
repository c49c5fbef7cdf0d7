"""Other destinations than Roark keep the same promise, and none waits for another."""

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from aiohttp import web

from roark.__main__ import main
from roark.client import Backoff, RoarkClient
from roark.destinations import (
    Destination,
    Tuner,
    Webhook,
    from_environment,
    public_address,
    tuner_payload,
)
from roark.folder import Folder, call_folders
from roark.outbox import Flushed, Outbox
from roark.tests.test_folder import leave_dead
from roark.tests.test_outbox import CALL, call_ended, hold, until

SECRET = "a secret of one's own"
RECORD = {
    "version": 1,
    "call_id": CALL,
    "started_at": "2026-11-21T12:00:00.000+00:00",
    "ended_at": "2026-11-21T12:00:09.000+00:00",
    "duration_ms": 9000.0,
    "ending": {"reason": "client-disconnected", "detail": ""},
    "turns": [],
    "tools": [],
}


@dataclass
class Arrived:
    """A request as it came, and whether it was taken."""

    headers: dict[str, str]
    query: str
    body: bytes
    status: int


@dataclass
class Receiver:
    """A web server that takes posts; `answers` are for the next requests, then it says 200.

    An answer is a status, "hang", or "cut" (the body is taken, the answer is lost).
    """

    answers: list[int | str] = field(default_factory=list)
    always: int | str = 200
    arrived: list[Arrived] = field(default_factory=list)
    url: str = ""
    _going: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def taken(self) -> list[Arrived]:
        return [request for request in self.arrived if request.status == 200]

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        answer = self.answers.pop(0) if self.answers else self.always
        status = answer if isinstance(answer, int) else 0
        self.arrived.append(Arrived(dict(request.headers), request.query_string, body, status))
        if answer == "hang":
            await self._going.wait()
        if not isinstance(answer, int):
            assert request.transport is not None
            request.transport.abort()
            return web.Response(status=500)
        return web.Response(status=answer, text="what the caller said: https://x/?token=1")

    async def serve(self) -> AsyncIterator["Receiver"]:
        app = web.Application()
        app.router.add_post("/{any:.*}", self.take)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hooks/s3cr3t-path?token=s3cr3t"
        yield self
        self._going.set()
        await runner.cleanup()


@pytest.fixture
async def receiver(anyio_backend):
    async for receiver in Receiver().serve():
        yield receiver


@pytest.fixture
async def open_outbox(anyio_backend, tmp_path):
    """Makes outboxes on one directory, each as the one of a new process."""
    opened: list[Outbox] = []

    async def quick(seconds: float) -> None:
        await asyncio.sleep(0.001)

    def make(url: str | None, *destinations: Destination, **settings: Any) -> Outbox:
        client = RoarkClient(api_key="k", base_url=url) if url else None
        outbox = Outbox(
            tmp_path / "calls",
            client,
            destinations=destinations,
            backoff=Backoff(jitter=lambda: 1.0),
            sleep=quick,
            **{"delivers_leftovers": False, **settings},
        )
        opened.append(outbox)
        return outbox

    yield make
    for outbox in opened:
        await asyncio.to_thread(outbox.close)


def webhook_of(receiver: Receiver) -> Destination:
    return Webhook(receiver.url, secret=SECRET)


def tuner_of(receiver: Receiver) -> Destination:
    base = receiver.url.split("/hooks")[0]
    return Tuner(api_key="tk_1", workspace_id=7, agent_id="front desk", base_url=base)


KINDS: dict[str, Callable[[Receiver], Destination]] = {"webhook": webhook_of, "tuner": tuner_of}


def hold_call(outbox: Outbox, call_id: str = CALL) -> Any:
    call = hold(outbox, call_id, chunks=2, ends=False)
    call.ended(call_ended(call_id), {**RECORD, "call_id": call_id})
    return call


@pytest.mark.anyio
async def test_a_webhook_gets_call_json_signed_over_timestamp_and_body(receiver, open_outbox):
    call = hold_call(open_outbox(None, Webhook(receiver.url, secret=SECRET)))
    assert await call.flush(10) == Flushed(delivered=1, left=0, given_up=0)
    (request,) = receiver.taken
    assert request.body == (call.path / "call.json").read_bytes()
    assert request.headers["Content-Type"] == "application/json"
    assert request.query == "token=s3cr3t"
    timestamp = request.headers["Webhook-Timestamp"]
    assert abs(int(timestamp) - time.time()) < 30
    expected = hmac.new(SECRET.encode(), timestamp.encode() + b"." + request.body, hashlib.sha256)
    assert request.headers["Webhook-Signature"] == f"v1={expected.hexdigest()}"


@pytest.mark.anyio
async def test_tuner_gets_its_payload_where_its_sdk_sends_it(receiver, open_outbox):
    await hold_call(open_outbox(None, tuner_of(receiver))).flush(10)
    (request,) = receiver.taken
    assert request.headers["Authorization"] == "Bearer tk_1"
    assert request.query == "workspace_id=7&agent_remote_identifier=front desk"
    assert json.loads(request.body)["disconnection_reason"] == "user_hangup"


@pytest.mark.parametrize(
    ("version", "currency", "expected"),
    [
        ("41", "USD", {"agent_version": 41, "call_cost": 12.5}),
        # A commit, be it of digits alone, is no build number; a euro is no hundred cents.
        ("123456789012", "EUR", {}),
        ("v1.2", "USD", {"call_cost": 12.5}),
    ],
)
def test_tuner_gets_build_number_cost_and_sip_headers_where_the_call_has_them(
    version, currency, expected
):
    headers = {"X-Customer": "7"}
    more = {
        "metadata": {"version": version},
        "cost": {"currency": currency, "total": 0.125},
        "phone": {"call_id": "d", "sip_headers": headers},
    }
    payload = tuner_payload(RECORD | more)
    names = ("agent_version", "call_cost")
    assert {name: payload[name] for name in names if name in payload} == expected
    assert (payload["sip_call_id"], payload["sip_headers"]) == ("d", headers)


PASSING: dict[str, list[int | str]] = {
    "429 once": [429],
    "503 three times": [503, 503, 503],
    "408, 425, 500": [408, 425, 500],
    "a cut": ["cut"],
    "a hang": ["hang"],
}


@pytest.mark.anyio
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", PASSING)
async def test_a_fault_that_passes_costs_nothing(
    fault, kind, receiver, roark, open_outbox, monkeypatch
):
    if "hang" in PASSING[fault]:
        monkeypatch.setattr("roark.client.ATTEMPT_SECONDS", 0.4)
    receiver.answers = [*PASSING[fault]]
    call = hold_call(open_outbox(roark.url, KINDS[kind](receiver)))
    assert await call.flush(20) == Flushed(delivered=5, left=0, given_up=0)
    assert len(receiver.taken) == 1
    assert len({request.body for request in receiver.arrived}) == 1
    assert len({request.headers["Idempotency-Key"] for request in receiver.arrived}) == 1
    assert roark.calls[CALL].whole


LASTING: dict[str, int | str] = {"500 throughout": 500, "401": 401, "404": 404, "hangs": "hang"}


@pytest.mark.anyio
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", LASTING)
async def test_what_a_lasting_fault_leaves_is_delivered_by_the_next_process(
    fault, kind, receiver, roark, open_outbox
):
    receiver.always = LASTING[fault]
    first = open_outbox(roark.url, KINDS[kind](receiver))
    call = hold_call(first)
    # Roark has it all: it does not wait for the other. On a busy machine it takes its time.
    await roark.complete(CALL)
    async with asyncio.timeout(30):
        while (await call.flush(0.2)).left != 1:
            pass
    await asyncio.to_thread(first.close)
    tried = {request.headers["Idempotency-Key"] for request in receiver.arrived}
    receiver.always = 200
    second = open_outbox(roark.url, KINDS[kind](receiver))
    await asyncio.wrap_future(second.deliver_leftovers(lambda *_: None))
    (taken,) = receiver.taken
    assert {taken.headers["Idempotency-Key"]} == tried
    assert Folder.load(call.path).steps_left == []
    assert set(roark.calls[CALL].stored.values()) == {1}


@pytest.mark.anyio
async def test_a_slow_roark_does_not_hold_up_a_webhook(receiver, roark, open_outbox):
    roark.fail(hang=True)
    call = hold_call(open_outbox(roark.url, webhook_of(receiver)))
    flush = asyncio.create_task(call.flush(1.0))
    await until(lambda: len(receiver.taken) == 1)
    assert (await flush).left == 4


@pytest.mark.anyio
async def test_what_was_left_for_a_hanging_destination_does_not_hold_up_anothers(
    receiver, roark, open_outbox
):
    receiver.always = "hang"
    await roark.stop()
    first = open_outbox(roark.url, webhook_of(receiver))
    calls = [hold_call(first, f"call {number}") for number in range(6)]
    await asyncio.gather(*(call.flush(0.2) for call in calls))
    await asyncio.to_thread(first.close)
    await roark.start()
    open_outbox(roark.url, webhook_of(receiver), delivers_leftovers=True, leftovers_after_s=0.0)
    # One attempt that hangs takes 8 s.
    for call in calls:
        await roark.complete(call.call_id, timeout=7.0)
    assert receiver.taken == []


@pytest.mark.anyio
async def test_a_refused_call_is_given_up_and_said_without_its_words_or_the_urls_secrets(
    receiver, roark, open_outbox, log
):
    receiver.always = 422
    call = hold_call(open_outbox(roark.url, webhook_of(receiver)))
    assert await call.flush(10) == Flushed(delivered=4, left=0, given_up=1)
    assert sum("webhook is given up: 422" in line for line in log) == 1
    receiver.always = 403
    await hold_call(open_outbox(roark.url, webhook_of(receiver)), "another").flush(10)
    assert any("turned away: 403" in line for line in log)
    assert not [line for line in log if "s3cr3t" in line or SECRET in line]
    assert not [line for line in log if "what the caller said" in line and "given up" in line]
    assert b"s3cr3t" not in (call.path / "delivery.jsonl").read_bytes()


@pytest.mark.anyio
async def test_a_killed_call_reaches_every_destination(receiver, roark, open_outbox, tmp_path):
    address = public_address(receiver.url)
    now = datetime.now(UTC)
    folder = leave_dead(tmp_path / "calls", roark.url, now, now, posts={"webhook": address})
    outbox = open_outbox(roark.url, webhook_of(receiver))
    await asyncio.wrap_future(outbox.deliver_leftovers(lambda *_: None))
    assert json.loads(receiver.taken[0].body)["ending"]["reason"] == "process-died"
    assert roark.calls[folder.call_id].whole


@pytest.mark.anyio
async def test_a_call_goes_only_to_the_address_it_was_meant_for(receiver, open_outbox, tmp_path):
    first = open_outbox(None, Webhook("http://127.0.0.1:9/elsewhere"))
    await hold_call(first).flush(0.1)
    await hold_call(open_outbox(None), "kept").flush(1)
    await asyncio.to_thread(first.close)
    outbox = open_outbox(None, webhook_of(receiver))
    await asyncio.wrap_future(outbox.deliver_leftovers(lambda *_: None))
    assert receiver.arrived == []
    assert len(call_folders(tmp_path / "calls")) == 2


@pytest.mark.anyio
async def test_tuner_saying_that_it_has_the_call_is_taken_at_its_word(receiver, open_outbox):
    receiver.always = 409
    call = hold_call(open_outbox(None, tuner_of(receiver)))
    assert await call.flush(10) == Flushed(delivered=1, left=0, given_up=0)


@pytest.mark.anyio
async def test_deliver_and_calls_know_the_destinations_of_the_environment(
    receiver, tmp_path, monkeypatch, open_outbox, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CALLS_DIR", str(tmp_path / "calls"))
    for name in ("ROARK_API_KEY", "ROARK_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CALL_WEBHOOK_URL", receiver.url)
    receiver.always = 401
    first = open_outbox(None, *from_environment())
    await hold_call(first).flush(5)
    await asyncio.to_thread(first.close)
    assert await asyncio.to_thread(main, ["calls"]) == 0
    assert f"1 to deliver to {public_address(receiver.url)}" in capsys.readouterr().out
    receiver.always = 200
    assert await asyncio.to_thread(main, ["deliver"]) == 0
    assert "delivered, 1 request" in capsys.readouterr().out
    assert len(receiver.taken) == 1


@pytest.mark.parametrize(
    ("environment", "names", "said"),
    [
        ({}, [], None),
        ({"CALL_WEBHOOK_URL": "https://me.example/calls"}, ["webhook"], None),
        ({"CALL_WEBHOOK_URL": "me.example/calls"}, [], "not an http(s) address"),
        ({"CALL_WEBHOOK_URL": "http://[bad"}, [], "not an http(s) address"),
        ({"TUNER_API_KEY": "k"}, [], "TUNER_WORKSPACE_ID"),
        (
            {"TUNER_API_KEY": "k", "TUNER_WORKSPACE_ID": "one", "TUNER_AGENT_ID": "a"},
            [],
            "TUNER_WORKSPACE_ID (a number)",
        ),
        (
            {"TUNER_API_KEY": "k", "TUNER_WORKSPACE_ID": "7", "TUNER_AGENT_ID": "a"},
            ["tuner"],
            None,
        ),
    ],
)
def test_what_the_environment_names_is_used_and_what_it_half_names_is_said(
    environment, names, said, monkeypatch, log
):
    for name in (
        "CALL_WEBHOOK_URL",
        "CALL_WEBHOOK_SECRET",
        "TUNER_API_KEY",
        "TUNER_WORKSPACE_ID",
        "TUNER_AGENT_ID",
    ):
        monkeypatch.setenv(name, environment.get(name, ""))
    assert [destination.name for destination in from_environment()] == names
    assert [said in line for line in log] == ([True] if said else [])


def test_an_address_shows_the_server_and_nothing_secret():
    address = public_address("https://user:pw@hooks.example:8443/T0/B0/s3cr3t?token=s3cr3t")
    assert address.startswith("https://hooks.example:8443/#")
    assert "s3cr3t" not in address and "pw" not in address
    assert address == public_address("https://hooks.example:8443/T0/B0/s3cr3t?token=another")
    assert address != public_address("https://hooks.example:8443/T0/B0/another")
