"""What benchmarks/conversation.py says of an utterance follows from what was asked and heard."""

import pytest
from rehearsal.callers.twilio import TwilioCaller, from_mulaw, to_mulaw
from rehearsal.engines.engine import TextDelta, Word

from benchmarks.conversation import (
    Audible,
    Call,
    Request,
    Verdict,
    Witness,
    heard_answers,
    in_known_words,
    judge,
)
from benchmarks.known_words import Phrase
from benchmarks.person import Said, Saying

KINDS = ("cut_in", "half", "lost", "doubled", "late", "interrupted", "unasked")
FIRST, LAST = "thirty three", "ninety two"
BOTH = f"{FIRST} {LAST}"


def phrase(text: str) -> Phrase:
    return Phrase(b"", 8000, tuple(Word(word, 0.0, 0.1) for word in text.split()))


def judged(
    *heard: tuple[float, str], is_whole: bool = True, providers_s: float = 0.0
) -> tuple[set[str], Verdict]:
    """Judge an utterance of 10 s to 14 s; `heard` is when an answer began and to which request."""
    requests = [Request(at - 0.5, asked, f"Answer-{at}") for at, asked in heard]
    audible = [
        Audible(at, request, is_whole) for (at, _), request in zip(heard, requests, strict=True)
    ]
    saying = Saying((phrase(FIRST), phrase(LAST)), 0.6)
    said = [Said(saying, 10.0, 14.0), Said(Saying((phrase("bye"),)), 30.0, 31.0)]
    [verdict, _] = judge(Call(said, [], audible, requests, providers_s))
    return {kind for kind in KINDS if getattr(verdict, kind)}, verdict


def test_an_utterance_is_judged_by_what_was_asked_when_the_bot_became_audible() -> None:
    found, verdict = judged((15.0, BOTH))
    assert found == set()
    assert verdict.answered_after == 1.0 and verdict.requests == 1
    assert judged((12.0, FIRST), (15.0, BOTH))[0] == {"cut_in", "half"}
    # Asked with a half, and audible after the whole: the caller was not cut off, nor understood.
    assert judged((14.5, FIRST), (15.5, LAST))[0] == {"half"}
    assert judged((15.0, FIRST))[0] == {"half", "lost"}
    assert judged()[0] == {"lost"}
    assert judged((15.0, BOTH), (19.0, BOTH))[0] == {"doubled"}
    assert judged((16.3, BOTH))[0] == {"late"}
    assert judged((16.3, BOTH), providers_s=0.7)[0] == set()
    assert judged((15.0, BOTH), is_whole=False)[0] == {"interrupted"}
    # Its own words, or nothing at all.
    assert judged((15.0, BOTH), (20.0, "answer one that has been"))[0] == {"unasked"}


@pytest.mark.parametrize(
    ("heard", "known"),
    [
        ("Thirty three. Ninety two!", BOTH),
        ("Dirty three.", FIRST),
        ("ninety two", LAST),
        ("What?", ""),
    ],
)
def test_what_a_small_recogniser_hears_is_told_by_the_words_that_it_has_right(
    heard: str, known: str
) -> None:
    assert in_known_words(heard, (phrase(FIRST), phrase(LAST))) == known


@pytest.mark.anyio
async def test_answers_are_told_by_their_sound() -> None:
    """Whole, cut off after a second, and with a hole as a busy machine makes it."""
    engine, caller = Witness([], llm_s=0.0), TwilioCaller("ws://127.0.0.1:1/ws")
    second = 2 * caller.sample_rate
    for number in range(3):
        asked = [{"role": "user", "content": "What?"}]
        deltas = [delta async for delta in engine.think(asked, [])]
        text = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
        pcm = b"".join([piece.pcm async for piece in engine.speak(text, caller.sample_rate)])
        pcm = (pcm, pcm[:second], pcm[:second] + bytes(second) + pcm[second:])[number]
        caller.heard.add(from_mulaw(to_mulaw(pcm)), at=100.0 + 8 * number)
    heard = await heard_answers(engine, caller)
    assert [audible.request for audible in heard] == engine.requests
    assert [audible.is_whole for audible in heard] == [True, False, True]
    for number, audible in enumerate(heard):
        assert audible.start == pytest.approx(100.0 + 8 * number, abs=0.03)
