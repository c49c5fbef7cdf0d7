"""What came of a call: outcome.json filled by the LLM when it is over, never at the call's cost."""

import asyncio
import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from harness import SECONDS, Harness, run_harness, serve_app
from pipecat.processors.aggregators.llm_context import LLMContext

from conversation import outcome
from host import shutdown
from rehearsal.engines.scripted import Answer, Script
from rehearsal.providers.server import HOST, free_port
from roark.report import write_report

pytestmark = pytest.mark.anyio

EXAMPLE = Path(outcome.__file__).parents[1] / "outcome.example.json"
FILLED = {"purpose": "question", "resolved": True, "callback_number": None}
SUMMARY = "They asked for the opening hours. They were told."
ANSWER = json.dumps({"summary": SUMMARY, "outcome": FILLED})
TALK = Script(
    greeting="Hello.",
    hears=("When are you open?",),
    answers=(Answer(heard="caller:", says=ANSWER), Answer(says="From eight to six.")),
)


@pytest.fixture
async def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The bot and its world, with the shipped example as its outcome.json."""
    monkeypatch.setattr(outcome, "SCHEMA_FILE", EXAMPLE)
    async with run_harness(monkeypatch, tmp_path) as harness:
        harness.engine.script = TALK
        yield harness


@pytest.mark.slow
async def test_what_came_of_a_call_is_in_its_record_its_report_the_webhook_and_not_in_its_length(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, port = FastAPI(), free_port()
    posted: list[dict[str, Any]] = []

    @app.post("/")
    async def take(record: dict[str, Any]) -> None:
        posted.append(record)

    monkeypatch.setenv("CALL_WEBHOOK_URL", f"http://{HOST}:{port}/")
    harness.server("llm").faults.slow_s = 0.5
    async with serve_app(app, port):
        async with harness.caller("twilio") as caller:
            await harness.hear_greeting(caller)
            await harness.say(caller)
            await harness.hear_said(caller, "From eight to six.")
            hung_up_at = time.time()
        await harness.over()

    for record in (harness.record, *posted):
        told = record["metadata"]
        assert (told["outcome"], told["summary"]) == (FILLED, SUMMARY)
    assert len(posted) == 1
    assert harness.received.whole
    asked = harness.engine.asked[-1][-1]["content"]
    assert "Caller: When are you open?" in asked and "Bot: From eight to six." in asked
    ended = datetime.fromisoformat(harness.record["ended_at"]).timestamp()
    assert ended - hung_up_at < 0.5, "the LLM's answer was taken for a part of the call"
    report = write_report(harness.folder).read_text(encoding="utf-8")
    assert SUMMARY in report and "Outcome purpose" in report and "Outcome resolved" in report


class Record:
    """What a call's record is told."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}

    def annotate(self, **values: Any) -> None:
        self.told |= values

    def stay_open(self) -> None: ...


def conversation() -> LLMContext:
    return LLMContext(
        [
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "When are you open?"},
        ]
    )


async def told_of(context: LLMContext) -> dict[str, Any]:
    record: Any = Record()
    await asyncio.wait_for(outcome.tell(record, context), SECONDS)
    return record.told


def answering(says: str) -> Script:
    return Script(answers=(Answer(heard="caller:", says=says),))


async def test_an_outcome_that_cannot_be_told_is_a_field_and_takes_no_longer_than_it_may(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In turn: between code fences, garbage, what is not allowed, refused, hanging, stopping."""
    harness.engine.script = answering(f"```json {ANSWER} ```")
    assert (await told_of(conversation()))["outcome"] == FILLED

    harness.engine.script = answering("I cannot say.")
    assert "no JSON" in (await told_of(conversation()))["outcome_error"]
    wrong = {"summary": SUMMARY, "outcome": {**FILLED, "purpose": "+4930123456"}}
    harness.engine.script = answering(json.dumps(wrong))
    error = (await told_of(conversation()))["outcome_error"]
    assert "outcome.purpose" in error and "+49" not in error

    faults = harness.server("llm").faults
    faults.wrong_key = True
    assert "refused" in (await told_of(conversation()))["outcome_error"]
    faults.wrong_key = False

    monkeypatch.setattr(outcome, "OUTCOME_SECONDS", 0.2)
    faults.hang = True
    asked_at = time.monotonic()
    assert "did not answer" in (await told_of(conversation()))["outcome_error"]
    assert time.monotonic() - asked_at < 5.0
    monkeypatch.setattr(shutdown, "is_draining", lambda: True)
    assert "about to stop" in (await told_of(conversation()))["outcome_error"]


async def test_nothing_is_asked_where_nobody_spoke_or_nothing_is_wanted(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert await told_of(LLMContext([{"role": "assistant", "content": "Hello."}])) == {}
    monkeypatch.setattr(outcome, "SCHEMA_FILE", tmp_path / "outcome.json")
    assert await told_of(conversation()) == {}
    assert not harness.engine.asked
    assert outcome.doubts() == []


@pytest.mark.parametrize(
    "written", ["", "[]", '{"type": "string"}', '{"type": "object", "required": 1}']
)
async def test_a_file_that_is_no_schema_is_doubted_before_and_named_after_a_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: str
) -> None:
    file = tmp_path / "outcome.json"
    file.write_text(written)
    monkeypatch.setattr(outcome, "SCHEMA_FILE", file)
    (doubt,) = outcome.doubts()
    assert doubt.startswith("outcome.json is") and doubt.endswith("calls have no outcome")
    assert "outcome.json is" in (await told_of(conversation()))["outcome_error"]
