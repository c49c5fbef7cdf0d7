"""What Tuner gets from our outbox, beside what its published SDK sends of the same call."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tuner_pipecat_sdk", reason="the dependency group bench is missing")
# These need the published package.
from roark.destinations import tuner_payload
from roark.folder import call_folders
from tuner_pipecat_sdk.models import CallPayload, DisconnectReason, TranscriptMetadata

from benchmarks.calls import SECONDS, caller, host, talk, world
from benchmarks.subjects import OURS, TUNER

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

# Theirs is of the moment in which its observer was told, ours of the audio: never later by more.
NEAR_MS = 1500
# The SDK does not know them unless it is told; ours reads them from the call.
ONLY_OURS = {"disconnection_reason", "sip_call_id", "recipient"}


async def test_every_field_is_as_the_sdk_sends_it_of_the_same_call(tmp_path: Path) -> None:
    async with world(tmp_path) as around:
        async with host(around, observers=(OURS, TUNER)) as bot:
            line = caller(bot, "twilio")
            async with line:
                await talk(line, around, ("What do I owe you?",))
            await bot.measured(within=SECONDS)
        (theirs,) = around.tuner.calls
        (path,) = call_folders(around.calls_dir)
    record = json.loads((path / "call.json").read_bytes())
    ours = tuner_payload(record)

    # It is what the SDK's own model takes, and nothing of it is lost on the way.
    assert CallPayload.model_validate(ours).to_dict() == ours
    assert ours.keys() - theirs.keys() <= ONLY_OURS
    assert theirs.keys() - ours.keys() == set()
    for name in ("recording_url", "call_status"):
        assert ours[name] == theirs[name], name
    # Theirs begins when the observer is made, ours with the pipeline: the same end, and between
    # them the same offset for every row.
    assert abs(ours["end_timestamp"] - theirs["end_timestamp"]) <= NEAR_MS / 1000 + 1
    offset_ms = theirs["duration_ms"] - ours["duration_ms"]
    assert ours["disconnection_reason"] in {reason.value for reason in DisconnectReason}
    assert ours["call_type"] == "phone_call" and theirs["call_type"] == "web_call"
    # Further values of a call belong beside these two: the SDK's extra_metadata.
    about, published_about = (payload["general_meta_data_raw"] for payload in (ours, theirs))
    for name in ("ai_models", "usage_token"):
        assert _shape(about[name]) == _shape(published_about[name])
    usage = ("llm_token", "tts_character_count")
    for name in usage:
        mine, published = (
            payload["general_meta_data_raw"]["usage_token"].get(name) for payload in (ours, theirs)
        )
        assert mine == published, name

    mine, published = (payload["transcript_with_tool_calls"] for payload in (ours, theirs))
    assert [_said(row) for row in mine] == [_said(row) for row in published]
    starts_ms = {turn["text"]: round(turn["start_ms"]) for turn in record["turns"]}
    for row, other in zip(mine, published, strict=True):
        assert row.keys() == other.keys(), row
        assert row["start_ms"] + offset_ms <= other["start_ms"] + NEAR_MS, (row, other)
        # Of a tool's row the text is the call.
        assert row["start_ms"] == starts_ms.pop(row.get("text"), row["start_ms"])
        assert row.get("tool", {}).keys() == other.get("tool", {}).keys()
        for name in ("name", "request_id", "params", "result"):
            assert row.get("tool", {}).get(name) == other.get("tool", {}).get(name)
        assert row["metadata"]["interrupted"] == other["metadata"]["interrupted"]
        known = {*TranscriptMetadata.model_fields, "id", "turn_index", "node", "interrupted_at_ms"}
        assert row["metadata"].keys() <= known
        missing = other["metadata"].keys() - row["metadata"].keys()
        # A greeting answers nobody, so our record has no waits for it.
        waits = {"llm_node_ttft", "tts_node_ttfb"} if row is mine[0] else set[str]()
        assert missing <= {"fragments", *waits}, (row, other)
        for name in ("eou_reason", "eou_confidence"):
            assert row["metadata"].get(name) == other["metadata"].get(name), (row, other)
        if "fragments" not in other["metadata"]:
            heard, published_heard = (
                turn["metadata"].get("stt_node_ttfb", 0) for turn in (row, other)
            )
            assert abs(heard - published_heard) <= 1, (row, other)
    assert not starts_ms


def _said(row: dict[str, Any]) -> tuple[str, str | None]:
    return row["role"], row.get("text")


def _shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _shape(inner) for name, inner in value.items()}
    return type(value).__name__
