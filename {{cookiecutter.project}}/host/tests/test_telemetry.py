"""Traces and error reports: what a collector and Sentry on this machine receive of whole calls."""

import asyncio
import gzip
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from harness import classes, run_harness, server_of, skip_unless_scripted
from loguru import logger

from host import metrics, telemetry
from rehearsal.callers.twilio import TwilioCaller
from rehearsal.engines.scripted import Answer, Script, ScriptedEngine
from rehearsal.host.bot_process import PROJECT, run_bot
from rehearsal.providers.all import Providers
from rehearsal.providers.all import serve as serve_providers
from rehearsal.providers.roark import RoarkReceiver
from rehearsal.providers.server import free_port

SECONDS = 30.0
HEARD, ANSWER, SETTING = "Xylophone", "Zephyranth", "Saltimbanco"
TALK = Script(
    greeting="Hello there.", hears=(f"My word is {HEARD}.",), answers=(Answer(says=ANSWER),)
)

BREAKS = """
import asyncio
import config
from host import telemetry

async def call():
    async with telemetry.of_call("a-call", service="a-bot"):
        config.seconds("MAX_CALL_SECONDS", 0.0)

asyncio.run(call())
"""


class Receiver:
    """An HTTP server of this machine that keeps what is posted to it.

    Attributes:
        posts: Path and body, unpacked, of each request so far.
    """

    def __init__(self) -> None:
        self.posts: list[tuple[str, bytes]] = []
        self.port = 0
        self._changed = asyncio.Condition()

    async def take(self, request: web.Request) -> web.Response:
        """Keep a request. Sentry wants JSON back, a collector nothing."""
        body = await request.read()
        if body.startswith(b"\x1f\x8b"):
            body = gzip.decompress(body)
        self.posts.append((request.path, body))
        async with self._changed:
            self._changed.notify_all()
        return web.json_response({})

    async def until(self, arrived: Callable[[], object]) -> None:
        """Wait until `arrived()`, looked at after each request."""
        async with asyncio.timeout(SECONDS), self._changed:
            await self._changed.wait_for(arrived)


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    """Run a receiver on a free port."""
    receiver = Receiver()
    # Else aiohttp unpacks bodies itself, and only those it knows how to.
    app = web.Application(client_max_size=2**24)
    app.router.add_post("/{path:.*}", receiver.take)
    runner = web.AppRunner(app, auto_decompress=False)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    receiver.port = runner.addresses[0][1]
    try:
        yield receiver
    finally:
        await runner.cleanup()


async def call(url: str, engine: ScriptedEngine) -> None:
    """Say one thing, hear the answer and hang up; the bot may hang up first."""
    voice = b"".join([piece.pcm async for piece in engine.speak("some words to say", 16000)])
    try:
        async with TwilioCaller(url.replace("http", "ws", 1) + "/ws") as caller:
            await caller.hear(within=SECONDS)
            await caller.hear_out(quiet=0.5, within=SECONDS)
            said = await caller.say(voice, 16000)
            await caller.hear(since=said.end, within=SECONDS)
            await caller.hear_out(quiet=0.5, within=SECONDS)
    except OSError:
        pass


@asynccontextmanager
async def running_bot(
    settings: dict[str, str], tmp_path: Path, engine: ScriptedEngine
) -> AsyncIterator[tuple[str, Providers, RoarkReceiver]]:
    """`python bot.py` with these settings, in a process of its own."""
    skip_unless_scripted()
    async with serve_providers(engine) as providers, RoarkReceiver() as roark:
        world = {
            **providers.environment,
            **settings,
            "ROARK_BASE_URL": roark.url,
            "ROARK_API_KEY": "rehearsal",
            "CALLS_DIR": str(tmp_path / "calls"),
        }
        async with run_bot("twilio", free_port(), world) as bot:
            yield bot.url, providers, roark


def spans_of(receiver: Receiver) -> list[dict[str, Any]]:
    """The spans that arrived: name, trace, parent, attributes and service."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[dict[str, Any]] = []
    for path, body in receiver.posts:
        assert path == "/v1/traces"
        for batch in ExportTraceServiceRequest.FromString(body).resource_spans:
            (service,) = [
                attribute.value.string_value
                for attribute in batch.resource.attributes
                if attribute.key == "service.name"
            ]
            spans += [
                {
                    "name": span.name,
                    "trace": span.trace_id,
                    "attributes": {item.key: item.value.string_value for item in span.attributes},
                    "service": service,
                }
                for scope in batch.scope_spans
                for span in scope.spans
            ]
    return spans


@pytest.mark.slow
@pytest.mark.anyio
async def test_each_call_is_a_trace_under_the_id_that_roark_has(tmp_path: Path) -> None:
    """Sent when the call ends: by itself the exporter would wait ten minutes here."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="uv sync --extra tracing")
    engine = ScriptedEngine(TALK)
    async with receiving() as collector:
        settings = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}",
            "OTEL_SERVICE_NAME": "front-desk",
            "OTEL_BSP_SCHEDULE_DELAY": "600000",
        }
        async with running_bot(settings, tmp_path, engine) as (url, _, roark):
            for number in (1, 2):
                await call(url, engine)
                await collector.until(
                    lambda number=number: (
                        number
                        == sum(span["name"] == "conversation" for span in spans_of(collector))
                    )
                )
            ids = set(roark.calls)
    spans = spans_of(collector)
    conversations = [span for span in spans if span["name"] == "conversation"]
    assert {span["attributes"]["conversation.id"] for span in conversations} == ids
    assert len(ids) == 2
    for conversation in conversations:
        names = {span["name"] for span in spans if span["trace"] == conversation["trace"]}
        assert names >= {"conversation", "turn", "stt", "llm", "tts"}
    assert {span["service"] for span in spans} == {"front-desk"}


def events_of(receiver: Receiver) -> list[dict[str, Any]]:
    """The events in the envelopes that arrived."""
    events: list[dict[str, Any]] = []
    for path, body in receiver.posts:
        assert path == "/api/1/envelope/"
        lines = body.split(b"\n")[1:]
        for head, item in zip(lines[::2], lines[1::2], strict=False):
            if json.loads(head)["type"] == "event":
                events.append(json.loads(item))
    return events


@pytest.mark.slow
@pytest.mark.anyio
async def test_sentry_hears_what_broke_in_which_call_and_no_word_of_it(tmp_path: Path) -> None:
    """A provider that refuses the key, then an exception whose text says too much."""
    pytest.importorskip("sentry_sdk", reason="uv sync --extra sentry")
    engine = ScriptedEngine(TALK)
    async with receiving() as sentry:
        dsn = {"SENTRY_DSN": f"http://public@127.0.0.1:{sentry.port}/1"}
        async with running_bot(dsn, tmp_path, engine) as (url, providers, roark):
            await call(url, engine)
            server_of(providers, "llm").faults.wrong_key = True
            await call(url, engine)
            await sentry.until(lambda: len(events_of(sentry)) >= 1)
            ids = list(roark.calls)
        (refused,) = events_of(sentry)
        assert f"{classes()['llm']}: authentication" in refused["message"]
        assert refused["tags"] == {"call": ids[1]}

        # A bot whose settings are checked has no such exception: its complaint repeats what it
        # read.
        broken = {**dsn, "MAX_CALL_SECONDS": SETTING, "PATH": os.environ["PATH"]}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", BREAKS), cwd=PROJECT, env=broken, stderr=asyncio.subprocess.PIPE
        )
        _, complaint = await process.communicate()
        assert SETTING in complaint.decode()
        await sentry.until(lambda: any("exception" in event for event in events_of(sentry)))
        (exception,) = [event for event in events_of(sentry) if "exception" in event]
        (error,) = exception["exception"]["values"]
        assert error["type"] == "RuntimeError"
        assert error["stacktrace"]["frames"][-1]["function"] == "_number"
        assert exception["tags"] == {"call": "a-call"}
    sent = b"".join(body for _, body in sentry.posts).decode()
    assert not [text for text in (HEARD, ANSWER, SETTING, "Hello there") if text in sent]


@pytest.mark.parametrize(
    "start, variable, module, extra",
    [
        (
            lambda: telemetry._start_tracing.__wrapped__("a-bot"),
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            "opentelemetry.exporter.otlp.proto.http.trace_exporter",
            "tracing",
        ),
        (telemetry._start_error_reports.__wrapped__, "SENTRY_DSN", "sentry_sdk", "sentry"),
    ],
)
def test_what_is_not_installed_is_said_in_one_sentence_and_the_call_goes_on(
    start: Callable[[], object],
    variable: str,
    module: str,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, "http://public@127.0.0.1:1/1")
    monkeypatch.setitem(sys.modules, module, None)
    lines: list[str] = []
    sink = logger.add(lines.append, format="{message}")
    try:
        assert start() is None
    finally:
        logger.remove(sink)
    (line,) = lines
    assert variable in line and f"uv sync --extra {extra}" in line


def test_a_wrong_dsn_is_said_in_one_sentence_and_the_call_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("sentry_sdk", reason="uv sync --extra sentry")
    monkeypatch.setenv("SENTRY_DSN", "no-dsn")
    lines: list[str] = []
    sink = logger.add(lines.append, format="{message}")
    try:
        assert telemetry._start_error_reports.__wrapped__() is None
    finally:
        logger.remove(sink)
    assert lines == ["SENTRY_DSN is not the DSN of a Sentry project: Sentry stays off\n"]


@pytest.mark.anyio
async def test_a_collector_that_hangs_holds_the_call_no_longer_than_agreed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(telemetry, "FLUSH_SECONDS", 0.1)
    let_go, sent = threading.Event(), threading.Event()

    def fail() -> None:
        sent.set()
        raise ConnectionError

    begun = time.monotonic()
    await telemetry._within_flush_seconds(let_go.wait, fail, None)
    assert 0.1 <= time.monotonic() - begun < SECONDS
    assert sent.is_set(), "one that hangs keeps another from being asked"
    let_go.set()


@pytest.mark.anyio
async def test_a_call_waits_for_what_can_be_sent() -> None:
    may_go, sent = threading.Event(), threading.Event()

    def send() -> None:
        may_go.wait()
        sent.set()

    asyncio.get_running_loop().call_later(0.05, may_go.set)
    await telemetry._within_flush_seconds(send)
    assert sent.is_set()


@pytest.mark.anyio
async def test_nothing_is_imported_where_nothing_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", " ")
    monkeypatch.delenv("SENTRY_DSN", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.setitem(sys.modules, "sentry_sdk", None)
    async with telemetry.of_call("a-call", service="a-bot"):
        pass


@pytest.mark.slow
@pytest.mark.anyio
async def test_prometheus_is_told_of_calls_endings_and_answers_on_loopback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("prometheus_client", reason="uv sync --extra metrics")
    async with run_harness(monkeypatch, tmp_path) as harness, aiohttp.ClientSession() as http:
        monkeypatch.setenv("METRICS_PORT", port := str(free_port()))
        stop = metrics.serve()
        try:
            async with harness.caller("twilio") as caller:
                await harness.hear_greeting(caller)
                said = await harness.say(caller)
                await caller.hear(since=said.end, within=SECONDS)
            await harness.over()
            async with http.get(f"http://127.0.0.1:{port}/metrics") as response:
                numbers = await response.text()
        finally:
            await asyncio.to_thread(stop)
    lines = dict(line.rsplit(" ", 1) for line in numbers.splitlines() if line[0] != "#")
    assert float(lines["bot_calls"]) == 0
    assert float(lines['bot_calls_ended_total{reason="client-disconnected"}']) == 1
    assert float(lines["bot_response_seconds_count"]) == 1
    assert 0 < float(lines["bot_response_seconds_sum"]) < SECONDS
    assert {"bot_calls_refused", "bot_calls_undelivered"} <= set(lines)


def test_a_port_for_prometheus_that_is_none_is_said_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("prometheus_client", reason="uv sync --extra metrics")
    for wrong in ("here", "70000"):
        monkeypatch.setenv("METRICS_PORT", wrong)
        said = f"^METRICS_PORT is a free port of this machine, which {wrong} is not$"
        with pytest.raises(SystemExit, match=said):
            metrics.serve()


def test_an_undelivered_call_is_counted_at_most_once_a_minute(tmp_path: Path) -> None:
    now = 0.0
    waiting = metrics.Undelivered(tmp_path, clock=lambda: now)
    assert waiting.count() == 0
    # A folder that cannot be read is one that nobody will have.
    (tmp_path / "20261126T000000Z-x" / "delivery.jsonl").mkdir(parents=True)
    assert waiting.count() == 0
    now = metrics.LOOK_SECONDS
    assert waiting.count() == 1
