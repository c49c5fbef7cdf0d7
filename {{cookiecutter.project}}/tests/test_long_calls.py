"""What keeps a long call good: an old conversation is summarised, and only speech is spoken."""

import asyncio
from pathlib import Path

import pytest

import services
from rehearsal.script import Script
from tests.stage import SECONDS, Stage, set_stage

pytestmark = pytest.mark.anyio


@pytest.fixture
async def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The bot and its world."""
    async with set_stage(monkeypatch, tmp_path) as stage:
        yield stage


@pytest.mark.slow
async def test_an_old_conversation_is_summarised_while_the_call_goes_on(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.engine.script = Script.parse(
        {
            "greeting": "Hello, this is a greeting with a good many words in it.",
            "hears": ["First question.", "Second question.", "Third question."],
            "answers": [{"says": "Here is an answer with a good many words in it."}],
        }
    )
    monkeypatch.setenv("CONTEXT_TOKENS", "60")
    monkeypatch.setattr(services, "KEPT_MESSAGES", 2)
    async with stage.caller("twilio") as caller:
        await caller.hear(within=SECONDS)
        await caller.hear_out(quiet=0.4, within=SECONDS)
        for _ in range(3):
            said = await stage.say(caller)
            await caller.hear(since=said.end, within=SECONDS)
            await caller.hear_out(quiet=0.4, within=SECONDS)
    await stage.over()
    # Summaries are asked for too, with a prompt of their own.
    prompt = stage.engine.asked[0][0]
    *_, last = (messages for messages in stage.engine.asked if messages[0] == prompt)
    said_so_far = " ".join(str(message["content"]) for message in last)
    assert "Conversation summary" in said_so_far
    assert "First question." not in said_so_far
    assert "Third question." in said_so_far


@pytest.mark.slow
async def test_a_summary_that_fails_does_not_disturb_the_call(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.engine.script = Script.parse(
        {"greeting": "Hello, this is a greeting.", "answers": [{"says": "Here is an answer."}]}
    )
    monkeypatch.setenv("CONTEXT_TOKENS", "20")
    monkeypatch.setattr(services, "KEPT_MESSAGES", 1)
    monkeypatch.setattr(services, "SUMMARY_TIMEOUT_SECONDS", 0.1)
    async with stage.caller("twilio") as caller:
        await caller.hear(within=SECONDS)
        await caller.hear_out(quiet=0.4, within=SECONDS)
        for _ in range(2):
            said = await stage.say(caller)
            stage.server("llm").faults.slow_s = 0.3
            await caller.hear(since=said.end, within=SECONDS)
            await caller.hear_out(quiet=0.4, within=SECONDS)
    await stage.over()
    assert any("summarization" in error["message"] for error in stage.record["errors"])
    assert stage.received.ended
    spoken = [turn["content"] for turn in stage.received.ended["transcript"]]
    assert spoken.count("Here is an answer.") == 2
    assert len(spoken) == 5


@pytest.mark.slow
async def test_what_is_meant_for_eyes_does_not_reach_the_voice(stage: Stage) -> None:
    stage.engine.script = Script.parse(
        {
            "greeting": "# Hours\n\nWe are **open** today.\n- See [our page](https://a.example/b) "
            "or https://www.shop.example/opening?day=1#top."
        }
    )
    async with stage.caller("twilio") as caller:
        await caller.hear(within=SECONDS)
        await caller.hear_out(quiet=0.5, within=SECONDS)
    await stage.over()
    spoken = " ".join(stage.spoken)
    assert not set(spoken) & set("#*[]()_/")
    assert "open today." in spoken
    assert "our page" in spoken and "shop.example." in spoken


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("See https://example.com.", "See example.com."),
        ("See http://www.example.com/a/b?c=d, please", "See example.com, please"),
        ("(www.example.co.uk)", "(example.co.uk)"),
        ("Version 1.2 of a.b is fine.", "Version 1.2 of a.b is fine."),
    ],
)
def test_of_a_link_its_site_is_spoken(written: str, spoken: str) -> None:
    assert asyncio.run(services.name_links(written, "sentence")) == spoken
