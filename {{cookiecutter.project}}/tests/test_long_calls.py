"""What keeps a long call good: an old conversation is summarised, and only speech is spoken."""

import asyncio
from pathlib import Path

import pytest
from harness import SECONDS, Harness, run_harness

import services
from rehearsal.engines.scripted import Script

pytestmark = pytest.mark.anyio


@pytest.fixture
async def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The bot and its world."""
    async with run_harness(monkeypatch, tmp_path) as harness:
        yield harness


@pytest.mark.slow
async def test_an_old_conversation_is_summarised_while_the_call_goes_on(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.engine.script = Script.parse(
        {
            "greeting": "Hello, this is a greeting with a good many words in it.",
            "hears": ["First question.", "Second question.", "Third question."],
            "answers": [{"says": "Here is an answer with a good many words in it."}],
        }
    )
    monkeypatch.setenv("CONTEXT_TOKENS", "60")
    monkeypatch.setattr(services, "KEPT_MESSAGES", 2)

    def last_asked() -> str:
        """What the LLM was last told; summaries are asked for too, with a prompt of their own."""
        prompt = harness.engine.asked[0][0]
        *_, last = (messages for messages in harness.engine.asked if messages[0] == prompt)
        return " ".join(str(message["content"]) for message in last)

    async with harness.caller("twilio") as caller:
        await caller.hear(within=SECONDS)
        await caller.hear_out(quiet=0.4, within=SECONDS)
        # A busy machine may write the summary while one more question is asked, or two.
        async with asyncio.timeout(2 * SECONDS):
            while "Third question." not in last_asked() or "First question." in last_asked():
                said = await harness.say(caller)
                await caller.hear(since=said.end, within=SECONDS)
                await caller.hear_out(quiet=0.4, within=SECONDS)
    await harness.over()
    assert "Conversation summary" in last_asked()


@pytest.mark.slow
async def test_a_summary_that_fails_does_not_disturb_the_call(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.engine.script = Script.parse(
        {"greeting": "Hello, this is a greeting.", "answers": [{"says": "Here is an answer."}]}
    )
    monkeypatch.setenv("CONTEXT_TOKENS", "20")
    monkeypatch.setattr(services, "KEPT_MESSAGES", 1)
    monkeypatch.setattr(services, "SUMMARY_TIMEOUT_SECONDS", 0.1)
    async with harness.caller("twilio") as caller:
        await caller.hear(within=SECONDS)
        await caller.hear_out(quiet=0.4, within=SECONDS)
        for _ in range(2):
            said = await harness.say(caller)
            harness.server("llm").faults.slow_s = 0.3
            await caller.hear(since=said.end, within=SECONDS)
            await caller.hear_out(quiet=0.4, within=SECONDS)
    await harness.over()
    assert any("summarization" in error["message"] for error in harness.record["errors"])
    assert harness.received.ended
    spoken = [turn["content"] for turn in harness.received.ended["transcript"]]
    assert spoken.count("Here is an answer.") == 2
    assert len(spoken) == 5


@pytest.mark.slow
async def test_what_is_meant_for_eyes_does_not_reach_the_voice(harness: Harness) -> None:
    harness.engine.script = Script.parse(
        {
            "greeting": "# Hours\n\nWe are **open** today.\n- See [our page](https://a.example/b) "
            "or https://www.shop.example/opening?day=1#top. It is ~~no~~ **$4,000.50** 😀 now."
        }
    )
    async with harness.caller("twilio") as caller:
        # On a busy machine there are pauses between the sentences.
        await harness.hear_said(caller, "It is no four thousand dollars, fifty cents now.")
    await harness.over()
    spoken = " ".join(harness.spoken)
    assert not set(spoken) & set("#*[]()_/")
    assert "open today." in spoken
    assert "our page" in spoken and "shop.example." in spoken
    assert "It is no four thousand dollars, fifty cents now." in spoken
    assert harness.received.ended
    # The record has what was said; the LLM's memory is Pipecat's, and has what it wrote.
    (said,) = [turn["content"] for turn in harness.received.ended["transcript"]]
    assert said.endswith("It is no four thousand dollars, fifty cents now.")
