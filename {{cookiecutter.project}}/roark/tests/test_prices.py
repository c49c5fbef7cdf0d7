"""What a call costs, by the prices of a file."""

import pytest
from loguru import logger

from roark.call import CallRecord
from roark.prices import prices_in

PRICES = """
currency = "EUR"
prompt_tokens_per_million = 2
cached_tokens_per_million = 0.5
completion_tokens_per_million = 8.0
tts_characters_per_million = 30
stt_per_hour = 0.36
call_per_hour = 0.6
"""
USAGE = {
    "prompt_tokens": 2000,
    "cached_tokens": 1000,
    "completion_tokens": 100,
    "tts_characters": 500,
    "stt_seconds": 60,
}


def test_a_call_costs_what_its_parts_cost(tmp_path):
    (tmp_path / "prices.toml").write_text(PRICES)
    record = CallRecord()
    record.apply({"event": "call", "at": 1, "call_id": "c", "agent_id": "a"})
    record.apply({"event": "prices", "at": 1, "values": prices_in(tmp_path / "prices.toml")})
    record.apply({"event": "started", "at": 1})
    for kind, value in USAGE.items():
        record.apply({"event": "metric", "at": 2, "kind": kind, "service": "x", "value": value})
    record.close("agent-ended", at=1 + 120 * 10**9)
    assert record.as_dict()["cost"] == {
        "currency": "EUR",
        "llm": 0.0033,
        "tts": 0.015,
        "stt": 0.006,
        "call": 0.02,
        "total": 0.0443,
    }
    assert "cost" not in record.call_ended()


def test_without_prices_nothing_is_said_of_cost():
    assert prices_in(None) is None
    assert "cost" not in CallRecord().as_dict()


@pytest.mark.parametrize(
    "text",
    [
        "=",
        "tokens = 3",
        "stt_per_hour = 'x'",
        "stt_per_hour = true",
        "call_per_hour = -1",
        "call_per_hour = nan",
        "currency = 1",
    ],
)
def test_a_file_that_is_wrong_is_named_once_and_costs_no_call(tmp_path, text):
    path = tmp_path / "prices.toml"
    path.write_text(text)
    said: list[str] = []
    sink = logger.add(said.append, format="{message}")
    assert prices_in(path) is None
    logger.remove(sink)
    assert len(said) == 1
    assert str(path) in said[0]
