"""Who has picked up, told from what is said, when, and from tones."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conversation import phrases
from conversation.floor import Floor
from conversation.opening import Listener, Opening, Tones, Who
from rehearsal.call import without_words, words_file
from rehearsal.dial import beep, words
from rehearsal.engines.scripted import ScriptedEngine
from telephony.errand import Errand

pytestmark = pytest.mark.anyio


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def listen(*events: tuple[float, str, str]) -> tuple[Listener, list[tuple[float, Who]]]:
    """Play (seconds, what, words) to a listener; return it and its verdicts with their times."""
    clock = Clock()
    listener = Listener(clock=clock)
    verdicts: list[tuple[float, Who]] = []
    waiting = list(events)
    for tick in range(400):
        clock.now = tick / 10
        while waiting and waiting[0][0] <= clock.now:
            _, what, words = waiting.pop(0)
            match what:
                case "begins":
                    listener.speech_began()
                case "ends":
                    listener.speech_ended()
                case "beep":
                    listener.tone_ended(1000.0, 0.4)
                case _:
                    listener.words(words, is_final=True)
        who = listener.look()
        if who and (not verdicts or verdicts[-1][1] is not who):
            verdicts.append((clock.now, who))
    return listener, verdicts


def spoken(begin: float, end: float, words: str) -> list[tuple[float, str, str]]:
    return [(begin, "begins", ""), (end, "ends", ""), (end + 0.3, "words", words)]


@pytest.mark.parametrize(
    ("words", "seconds", "who"),
    [
        ("Hello?", 0.5, Who.PERSON),
        ("Good morning, Miller and Sons, this is Petra speaking, how may I help?", 4.0, Who.PERSON),
        ("May I ask who's calling?", 1.5, Who.SCREENING),
        ("If you record your name and reason for calling, I'll see.", 4.0, Who.SCREENING),
        ("For sales, press one.", 2.0, Who.MENU),
        ("Leave your name and the reason for your call after the tone.", 4.0, Who.VOICEMAIL),
        ("Bitte hinterlassen Sie eine Nachricht nach dem Signalton.", 4.0, Who.VOICEMAIL),
        ("もしもし", 0.5, Who.PERSON),
    ],
)
def test_people_and_machines_are_told_apart_by_what_they_say(
    words: str, seconds: float, who: Who
) -> None:
    _, verdicts = listen(*spoken(0.5, 0.5 + seconds, words))
    assert [one for _, one in verdicts] == [who]
    assert verdicts[0][0] <= 0.5 + seconds + 1.3


@pytest.mark.parametrize("file", sorted(phrases.FOLDER.glob("*.toml")), ids=lambda file: file.stem)
def test_in_each_language_a_rehearsed_callee_says_what_gives_them_away(file: Path) -> None:
    assert words_file("dial", f"{file.stem}-XX").name == f"dial.{file.stem}.toml"
    assert not without_words("dial", f"{file.stem}-XX")
    assert "dial.tr.toml is missing beside rehearsal/dial.en.toml" in without_words("dial", "tr")
    said = words(file.stem)
    for kind, who in (
        ("person", Who.PERSON),
        ("voicemail", Who.VOICEMAIL),
        ("screening", Who.SCREENING),
    ):
        _, verdicts = listen(*spoken(0.5, 2.0, said.of(kind)[0]))
        assert [one for _, one in verdicts] == [who], kind


def test_a_person_is_answered_soon_and_a_greeting_with_a_pause_is_still_a_voicemails() -> None:
    _, verdicts = listen(*spoken(0.5, 1.0, "Hello?"))
    assert verdicts == [(pytest.approx(1.45, abs=0.06), Who.PERSON)]
    # A word that is recognised before there is a voice is not the end of it.
    _, verdicts = listen((0.7, "words", "Hello?"), (1.2, "begins", ""), (1.6, "ends", ""))
    assert verdicts == [(pytest.approx(2.05, abs=0.06), Who.PERSON)]
    first = spoken(0.5, 1.5, "Hi, this is Bob.")
    _, verdicts = listen(*first, *spoken(3.0, 5.0, "Leave me a message."))
    assert [who for _, who in verdicts] == [Who.PERSON, Who.VOICEMAIL]


def test_a_screening_that_beeps_for_the_name_is_answered_and_may_end_at_a_voicemail() -> None:
    asks = [*spoken(0.5, 3.0, "Say your name after the tone."), (3.1, "beep", "")]
    _, verdicts = listen(*asks)
    assert [who for _, who in verdicts] == [Who.SCREENING]
    _, verdicts = listen(*asks, *spoken(9.0, 11.0, "Leave a message."))
    assert [who for _, who in verdicts] == [Who.SCREENING, Who.VOICEMAIL]


def test_the_message_waits_for_the_beep_or_for_a_silence_where_none_comes() -> None:
    greeting = spoken(0.5, 5.0, "Leave a message.")
    listener, _ = listen(*greeting)
    assert listener.wants_message
    clock = Clock()
    listener = Listener(clock=clock)
    listener.words("Leave a message.", is_final=True)
    listener.look()
    clock.now = 1.0
    assert not listener.wants_message
    listener.tone_ended(1000.0, 0.4)
    assert listener.wants_message


def test_silence_is_nobody_and_the_bot_begins_after_two_seconds() -> None:
    clock = Clock()
    listener = Listener(clock=clock)
    clock.now = 1.9
    assert not listener.is_quiet_from_the_start
    clock.now = 2.0
    assert listener.is_quiet_from_the_start
    _, verdicts = listen()
    assert verdicts == [(10.0, Who.NOBODY)]
    listener.is_spoken_to, clock.now = True, 11.0
    assert listener.look() is None
    listener.is_spoken_to = False
    assert listener.look() is Who.NOBODY


async def test_a_beep_and_a_fax_are_heard_and_no_voice_is_taken_for_one() -> None:
    def who(pcm: bytes) -> Who | None:
        listener = Listener(clock=Clock())
        Tones(listener).feed(pcm + bytes(3200), 8000)
        return listener.look()

    pieces = [piece.pcm async for piece in ScriptedEngine().speak("Ohm " * 9, 8000)]
    noise = np.random.default_rng(1).normal(0, 3000, 16000).astype("<i2").tobytes()
    assert who(beep()) is Who.VOICEMAIL
    assert who(beep(2100, 1.2)) is Who.FAX
    assert who(b"".join(pieces)) is who(noise) is who(beep(seconds=0.06)) is None


async def test_they_have_declined_unless_they_said_more_than_their_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where its last words, or the end of its turn, come as late as the verdict or later."""
    monkeypatch.setenv("CALL_GREETING", "Hello.")
    said: list[object] = []

    async def say(frame: object) -> None:
        said.append(frame)

    async def end(*_: str) -> None: ...

    looks: list[Callable[[], None]] = []
    worker: Any = SimpleNamespace(queue_frame=say)
    ending: Any = SimpleNamespace(has_begun=False, now=end)
    recovery: Any = SimpleNamespace(look=looks.append)
    for ends_late, has_words in ((False, True), (True, True), (True, False)):
        floor = Floor()
        opening = Opening(Errand(callee_number="", callee_name="", call_reason=""), floor)
        opening.picked_up(worker, ending, recovery)
        listener, look = opening.gate.listener, looks[-1]
        assert listener
        floor.turn_began()
        listener.words("Please say your name", is_final=False)
        opening.gate.seconds = 2.0
        if not ends_late:
            floor.turn_ended()
        look()
        await asyncio.sleep(0)
        listener.words("Please say your name.", is_final=True)
        assert listener.word_count <= opening.ears.answered_words, "they would cut the greeting"
        if ends_late:
            floor.turn_ended()
        if has_words:
            floor.caller_took_turn()
        for _ in range(3):
            look()
        assert opening.how_it_ended()[0] == "declined"
        floor.turn_began()
        floor.turn_ended()
        floor.caller_took_turn()
        look()
        assert opening.how_it_ended() == ("client-disconnected", "the callee hung up")
    assert len(said) == 3
