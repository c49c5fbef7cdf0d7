"""Traces and error reports of a call, where the environment asks for them; imported only then.

With `OTEL_EXPORTER_OTLP_ENDPOINT` every call is a trace (conversation, turns, STT, LLM, TTS with
their times), sent by OTLP over HTTP; `conversation.id` is the id under which Roark has the call.
The standard OTEL_... variables apply. Pipecat writes what was said and the prompt into the spans:
send them only where the calls themselves may go.

With `SENTRY_DSN` an exception that ends a call, and each ERROR line of this project, go to Sentry
with the id of the call. What was said does not: exceptions go without their texts and without the
values of variables.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING

from loguru import logger

from config import setting
from host import private_log

if TYPE_CHECKING:
    from loguru import Message, Record
    from sentry_sdk.types import Event, Hint

# What a call may wait at its end for what is still to be sent. A collector that does not answer
# costs this; what it does not take by then is sent later, or lost with the process.
FLUSH_SECONDS = 5.0


@asynccontextmanager
async def of_call(call_id: str, *, service: str) -> AsyncIterator[None]:
    """Watch the call that is held in this context; at its end, wait until all is sent.

    Args:
        call_id: The id of the call everywhere else.
        service: The name of the bot, unless OTEL_SERVICE_NAME is set.
    """
    send_spans, send_events = _start_tracing(service), _start_error_reports()
    with logger.contextualize(call=call_id):
        try:
            yield
        except Exception as error:
            if send_events:
                _report(error, call_id)
            raise
        finally:
            await _within_flush_seconds(send_spans, send_events)


@cache
def _start_tracing(service: str) -> Callable[[], object] | None:
    """Once per process: send spans. Returns what sends those that wait, blocking."""
    if not setting("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return None
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from pipecat.utils.tracing.setup import setup_tracing
    except ImportError:
        logger.error(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, but tracing is not installed and stays off: "
            "uv sync --extra tracing"
        )
        return None
    setup_tracing(setting("OTEL_SERVICE_NAME", service), exporter=OTLPSpanExporter())
    provider = trace.get_tracer_provider()
    return provider.force_flush if isinstance(provider, TracerProvider) else None


@cache
def _start_error_reports() -> Callable[[], object] | None:
    """Once per process: send errors. Returns what sends those that wait, blocking."""
    if not setting("SENTRY_DSN"):
        return None
    try:
        import sentry_sdk
    except ImportError:
        logger.error(
            "SENTRY_DSN is set, but Sentry is not installed and stays off: uv sync --extra sentry"
        )
        return None
    try:
        sentry_sdk.init(
            dsn=setting("SENTRY_DSN"),
            # The integrations collect what passes by: prompts, requests, log lines of libraries.
            default_integrations=False,
            auto_enabling_integrations=False,
            include_local_variables=False,
            max_breadcrumbs=0,
            before_send=_without_texts,
        )
    except ValueError:
        logger.error("SENTRY_DSN is not the DSN of a Sentry project: Sentry stays off")
        return None
    logger.add(_report_line, level="ERROR", format="{message}", filter=_is_a_line_of_ours)
    return lambda: sentry_sdk.flush(FLUSH_SECONDS)


def _report(error: Exception, call_id: str) -> None:
    import sentry_sdk

    with sentry_sdk.new_scope() as scope:
        scope.set_tag("call", call_id)
        sentry_sdk.capture_exception(error)


def _report_line(line: "Message") -> None:
    import sentry_sdk

    with sentry_sdk.new_scope() as scope:
        scope.set_tag("call", line.record["extra"].get("call", ""))
        # The rest, if there is one, is the place of an exception.
        sentry_sdk.capture_message(line.record["message"].partition("\n")[0], level="error")


def _is_a_line_of_ours(record: "Record") -> bool:
    return private_log.is_ours(record["file"].path)


def _without_texts(event: "Event", _hint: "Hint") -> "Event":
    for error in event.get("exception", {}).get("values", ()):
        error["value"] = ""
    return event


async def _within_flush_seconds(*sends: Callable[[], object] | None) -> None:
    # In threads that nobody waits for: these calls block, and their own timeouts are longer.
    loop = asyncio.get_running_loop()
    all_sent = [asyncio.Event() for send in sends if send]

    def run(send: Callable[[], object], sent: asyncio.Event) -> None:
        with suppress(Exception):
            send()
        with suppress(RuntimeError):  # The loop is closed: too late to say so.
            loop.call_soon_threadsafe(sent.set)

    for send, sent in zip(filter(None, sends), all_sent, strict=True):
        threading.Thread(target=run, args=(send, sent), daemon=True).start()
    with suppress(TimeoutError):
        async with asyncio.timeout(FLUSH_SECONDS):
            for sent in all_sent:
                await sent.wait()
