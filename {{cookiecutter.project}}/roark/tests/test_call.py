"""What is said of a call, decided from events alone."""

import random
from typing import Any

import pytest

from roark.call import CallRecord, Rank
from roark.speech import Piece, join

START = 1_790_000_000_000_000_000


def ms(offset: float) -> int:
    """Epoch ns of a moment `offset` ms into the call."""
    return START + int(offset * 1e6)


def event(name: str, at_ms: float, /, **fields: Any) -> dict[str, Any]:
    return {"event": name, "at": ms(at_ms), **fields}


OPENING = [
    event("call", 0, call_id="call-1", agent_id="agent", agent_name="Ada"),
    event("started", 0),
    event("anchor", 0, ms=0.0),
]
CHUNK = event("chunk", 3500, index=0, ms=3000.0, sample_rate=8000, num_channels=2)


def user(start: float, stop: float, *texts: str, decided: float | None = None) -> list[dict]:
    """A user turn between two instants of the audio, with the detector's delays."""
    decided = stop + 300 if decided is None else decided
    return [
        event("vad", start + 200, edge="start", secs=0.2),
        event("user-turn", start + 200, edge="start"),
        event("vad", stop + 200, edge="stop", secs=0.2),
        *(event("transcript", stop + 250, text=text) for text in texts),
        event("user-turn", decided, edge="stop"),
    ]


def spoken(start: float, *words: tuple[str, float], context: str = "c") -> list[dict]:
    """Words of a voice with timestamps: each is (text, ms into the speech)."""
    return [
        event("say", start - 50, context=context, segment=1, text=" ".join(w for w, _ in words)),
        event("bot", start, edge="start"),
        *(
            event("words", start, context=context, segment=1, text=text, due=ms(start + at))
            for text, at in words
        ),
        event("voiced", start + 10, context=context, seconds=words[-1][1] / 1000 + 0.5),
        event("voice-done", start + 10, context=context),
    ]


def record_of(*events: dict, end: float = 20_000, recorded: bool = True) -> CallRecord:
    middle = [*OPENING, *([CHUNK] if recorded else [])]
    record = CallRecord.replay([*middle, *events])
    record.close("client-disconnected", at=ms(end))
    return record


def texts(record: CallRecord) -> list[tuple[str, str]]:
    return [(turn["role"], turn["text"]) for turn in record.as_dict()["turns"]]


def test_a_greeting_is_the_first_turn_and_the_agent_spoke_first():
    record = record_of(
        *spoken(500, ("Hello", 0), ("there.", 300)),
        event("bot", 1300, edge="stop"),
        *user(2000, 3000, "I want a table."),
    )
    assert texts(record) == [("assistant", "Hello there."), ("user", "I want a table.")]
    assert record.call_ended()["agentSpokeFirst"] is True


def test_edges_are_corrected_for_the_delays_of_the_voice_detector():
    body = record_of(*user(2000, 3000, "Hi.")).call_ended()
    [turn] = body["transcript"]
    assert (turn["audioOffsetMs"], turn["endAudioOffsetMs"]) == (2000, 3000)


def test_a_detector_that_is_told_late_is_corrected_by_the_turn_it_caused():
    record = record_of(
        event("user-turn", 2200, edge="start"),
        event("vad", 2500, edge="start", secs=0.2),
        event("vad", 3200, edge="stop", secs=0.2),
        event("transcript", 3300, text="Hi."),
    )
    assert record.as_dict()["turns"][0]["start_ms"] == 2000


def test_edges_near_the_audios_own_are_the_audios():
    record = record_of(
        *user(2000, 3000, "Hi."),
        event("sound", 3500, role="user", start_ms=1930.0, end_ms=3080.0),
    )
    [turn] = record.as_dict()["turns"]
    assert (turn["start_ms"], turn["end_ms"]) == (1930, 3080)


def test_a_detector_that_a_busy_machine_held_up_is_set_right_by_the_audio():
    record = record_of(
        *user(2700, 3900, "Hi."),
        event("sound", 3500, role="user", start_ms=2000.0, end_ms=3200.0),
    )
    [turn] = record.as_dict()["turns"]
    assert (turn["start_ms"], turn["end_ms"]) == (2000, 3200)


def test_a_word_too_short_for_the_detector_ends_where_its_sound_ends():
    record = record_of(
        event("user-turn", 2060, edge="start"),
        event("sound", 2900, role="user", start_ms=2000.0, end_ms=2150.0),
        event("transcript", 3300, text="Fine.", spaced=False),
        event("user-turn", 3450, edge="stop"),
    )
    [turn] = record.as_dict()["turns"]
    assert (turn["start_ms"], turn["end_ms"]) == (2000, 2150)


def test_noise_far_from_the_detectors_edges_moves_nothing():
    record = record_of(
        *user(2000, 3000, "Hi."),
        event("sound", 9000, role="user", start_ms=400.0, end_ms=9000.0),
    )
    [turn] = record.as_dict()["turns"]
    assert (turn["start_ms"], turn["end_ms"]) == (2000, 3000)


def test_a_bot_turn_runs_from_its_first_to_its_last_audible_sample():
    record = record_of(
        *spoken(500, ("Hello", 0), ("there.", 700)),
        event("bot", 2300, edge="stop"),
        event("sound", 1500, role="assistant", start_ms=640.0, end_ms=1000.0),
        event("sound", 2500, role="assistant", start_ms=1300.0, end_ms=1710.0),
    )
    [turn] = record.as_dict()["turns"]
    assert (turn["start_ms"], turn["end_ms"]) == (640, 1710)


def test_speeches_without_a_pause_between_keep_their_own_edges():
    record = record_of(
        *spoken(1000, ("One", 0), ("moment.", 200), context="a"),
        *spoken(1010, ("Done.", 900), context="b"),
        event("bot", 1800, edge="stop"),
        event("bot", 1850, edge="start"),
        event("bot", 2500, edge="stop"),
        event("sound", 3000, role="assistant", start_ms=1040.0, end_ms=2470.0),
    )
    edges = [(turn["start_ms"], turn["end_ms"]) for turn in record.as_dict()["turns"]]
    assert edges == [(1040, 1800), (1850, 2470)]


def test_finals_of_one_turn_are_joined_with_single_spaces():
    assert texts(record_of(*user(0, 1000, "One,", " two ", "three."))) == [
        ("user", "One, two three.")
    ]


def test_a_speech_with_its_own_spacing_is_parted_from_the_one_before():
    words = [("Okay.", False), ("Your plan", True), (" is", True), (", well,", True), ("here.", 0)]
    assert join([Piece(text, bool(spaced)) for text, spaced in words]) == (
        "Okay. Your plan is, well, here."
    )
    assert join([Piece("はい。"), Piece("予約", True)]) == "はい。予約"
    assert join([Piece("Hel", True), Piece("lo", True)]) == "Hello"


@pytest.mark.parametrize(
    ("sentence", "heard"),
    [
        ("ご予約は明日の七時でよろしいですか", "ご予約は明日の七"),
        ("Pizza は 八時にお持ちします", "Pizza は"),
        ("ราคาหนึ่งร้อยบาทค่ะ", "ราคาหนึ่ง"),
        ("전화번호를 말씀해 주세요", "전화번호를"),
    ],
)
def test_an_interrupted_voice_without_spaces_between_words_is_cut_by_characters(sentence, heard):
    record = record_of(
        event("say", 900, context="c", segment=7, text=sentence),
        event("bot", 1000, edge="start"),
        event("voiced", 1050, context="c", seconds=4.0),
        event("words", 1050, context="c", segment=7, text=sentence),
        event("interruption", 3000),
    )
    [turn] = record.as_dict()["turns"]
    assert (turn["text"], turn["estimated_cut"]) == (heard, True)


def test_two_user_turns_without_a_reply_between_stay_two():
    record = record_of(*user(0, 1000, "One."), *user(3000, 4000, "Two."))
    assert texts(record) == [("user", "One."), ("user", "Two.")]


def test_a_pause_within_a_turn_does_not_split_it():
    record = record_of(
        event("vad", 200, edge="start", secs=0.2),
        event("user-turn", 200, edge="start"),
        event("vad", 1200, edge="stop", secs=0.2),
        event("transcript", 1300, text="I would"),
        event("vad", 1900, edge="start", secs=0.2),
        event("vad", 3200, edge="stop", secs=0.2),
        event("transcript", 3300, text="like tea."),
        event("user-turn", 3400, edge="stop"),
    )
    [turn] = record.as_dict()["turns"]
    assert (turn["text"], turn["start_ms"], turn["end_ms"]) == ("I would like tea.", 0, 3000)


def test_a_transcript_that_comes_after_the_bot_started_joins_the_turn_it_belongs_to():
    record = record_of(
        *user(0, 1000, "I want"),
        *spoken(1600, ("Sure.", 0)),
        event("transcript", 1900, text="a pizza."),
        event("bot", 2400, edge="stop"),
    )
    assert texts(record) == [("user", "I want a pizza."), ("assistant", "Sure.")]


def test_a_transcript_too_soon_for_the_speech_under_way_belongs_to_the_turn_before():
    record = record_of(
        *user(0, 1000, "I want"),
        *spoken(1600, ("Sure.", 0)),
        event("vad", 2200, edge="start", secs=0.1),
        event("user-turn", 2200, edge="start"),
        event("transcript", 2210, text="a pizza."),
        event("transcript", 3200, text="Wait."),
    )
    assert texts(record)[0] == ("user", "I want a pizza.")
    assert texts(record)[-1] == ("user", "Wait.")


def keyed(at: float, text: str) -> list[dict]:
    """Keys as Pipecat tells them: an interruption, the text, then the turn that it begins."""
    return [
        event("interruption", at - 200),
        event("typed", at, text=text, via="keys", since=ms(at - 200)),
        event("user-turn", at + 5, edge="start"),
        event("user-turn", at + 10, edge="stop"),
    ]


def answered(at: float, text: str, context: str) -> list[dict]:
    return [*spoken(at, (text, 0), context=context), event("bot", at + 1000, edge="stop")]


def test_keys_pressed_after_an_answer_are_a_turn_of_their_own():
    record = record_of(
        *keyed(1000, "DTMF: 1#"),
        *answered(1500, "One.", "a"),
        *keyed(3000, "DTMF: 22#"),
        *answered(3500, "Two.", "b"),
        *keyed(5000, "DTMF: 333#"),
    )
    assert texts(record) == [
        ("user", "DTMF: 1#"),
        ("assistant", "One."),
        ("user", "DTMF: 22#"),
        ("assistant", "Two."),
        ("user", "DTMF: 333#"),
    ]
    turns = record.as_dict()["turns"]
    assert [turn["via"] for turn in turns[:2]] == ["keys", "voice"]
    assert turns[3]["latency"]["total_ms"] == 500


def test_the_groups_of_one_number_are_one_turn():
    record = record_of(
        *keyed(1000, "DTMF: 4111"), *keyed(4000, "DTMF: 1111"), *answered(9000, "Thanks.", "a")
    )
    assert texts(record) == [("user", "DTMF: 4111 DTMF: 1111"), ("assistant", "Thanks.")]


@pytest.mark.parametrize("begins_turn", [False, True])
def test_a_word_too_soft_for_the_detector_answers_the_question_before_it(begins_turn):
    record = record_of(
        *user(0, 1000, "I want a table."),
        *answered(1600, "For two?", "a"),
        event("transcript", 3200, text="Yes."),
        *([event("user-turn", 3201, edge="start")] if begins_turn else []),
    )
    assert [text for _, text in texts(record)] == ["I want a table.", "For two?", "Yes."]


def test_a_text_that_an_interim_announced_is_not_of_the_turn_before():
    record = record_of(
        *user(0, 1000, "I want a table."),
        *answered(1600, "For two?", "a"),
        event("user-turn", 3200, edge="start"),
        event("transcript", 3300, text="Yes."),
    )
    assert [text for _, text in texts(record)] == ["I want a table.", "For two?", "Yes."]


@pytest.mark.parametrize("final_ms", [1700, 2400, 3900])
def test_what_a_speech_to_speech_service_was_told_comes_before_its_answer(final_ms):
    events = [
        event("user-turn", 200, edge="start"),
        event("user-turn", 1200, edge="stop"),
        *answered(1600, "Sure.", "a"),
        event("transcript", final_ms, text="A pizza.", service="llm"),
    ]
    record = record_of(*sorted(events, key=lambda item: item["at"]))
    assert texts(record) == [("user", "A pizza."), ("assistant", "Sure.")]


def test_a_speech_to_speech_final_after_an_interruption_is_of_the_turn_before():
    record = record_of(
        event("user-turn", 200, edge="start"),
        event("user-turn", 1200, edge="stop"),
        event("bot", 1600, edge="start"),
        event("interruption", 2000),
        event("bot", 2010, edge="stop"),
        event("user-turn", 2000, edge="start"),
        event("transcript", 2600, text="A pizza.", service="llm"),
        event("user-turn", 3000, edge="stop"),
        event("transcript", 3500, text="No, wait.", service="llm"),
    )
    assert texts(record) == [("user", "A pizza."), ("user", "No, wait.")]


def test_typed_text_is_a_turn_with_its_answer_and_latency():
    record = record_of(
        *user(0, 1000, "Hello."),
        *answered(1600, "Hi.", "a"),
        event("typed", 4000, text="A table, please.", via="text"),
        *answered(4500, "Gladly.", "b"),
    )
    assert texts(record)[2:] == [("user", "A table, please."), ("assistant", "Gladly.")]
    assert record.as_dict()["turns"][3]["latency"]["total_ms"] == 500
    assert record.call_ended()["transcript"][2]["content"] == "A table, please."


def test_noise_that_nobody_understood_does_not_take_the_words_after_the_greeting():
    record = record_of(
        event("vad", 200, edge="start", secs=0.2),
        event("user-turn", 200, edge="start"),
        *answered(300, "Hello?", "a")[:-1],
        event("vad", 700, edge="stop", secs=0.2),
        event("bot", 1500, edge="stop"),
        event("vad", 2200, edge="start", secs=0.2),
        event("vad", 3200, edge="stop", secs=0.2),
        event("transcript", 3300, text="Hi."),
    )
    assert texts(record) == [("assistant", "Hello?"), ("user", "Hi.")]


@pytest.mark.parametrize("seed", range(30))
def test_whatever_comes_each_text_stands_once_and_after_what_it_answers(seed):
    """Callers speak, murmur, press keys and type; recognisers are quick or slow."""
    rng = random.Random(seed)
    events: list[dict] = []
    at = 1000.0
    said: list[tuple[str, str]] = []
    for number in range(6):
        text, kind = f"text{number}", rng.choice(["voice", "soft", "interim", "keys", "text"])
        said.append(("user", text))
        if kind == "voice":
            end = at + rng.uniform(400, 2000)
            # An end of turn that comes first, an answer under way: up to half a second late.
            release = end + rng.uniform(250, 600)
            events += [
                event("vad", at + 200, edge="start", secs=0.2),
                event("user-turn", at + 200, edge="start"),
                event("vad", end + 200, edge="stop", secs=0.2),
                event("user-turn", release, edge="stop"),
                event("transcript", rng.uniform(end + 100, release + 900), text=text),
            ]
            at = release
        elif kind in ("soft", "interim"):
            turn = at + 10 if kind == "soft" else at - 100
            events += [
                event("transcript", at, text=text),
                event("user-turn", turn, edge="start"),
                event("user-turn", at + 20, edge="stop"),
            ]
            at += 20
        else:
            events += [
                event("typed", at, text=text, via=kind),
                *([event("user-turn", at + 5, edge="start")] if rng.random() < 0.5 else []),
                *([event("user-turn", at + 10, edge="stop")] if rng.random() < 0.5 else []),
            ]
        begins = at + rng.uniform(500, 1500)
        ends = begins + rng.uniform(500, 3000)
        reply = f"reply{number}"
        said.append(("assistant", reply))
        events += [
            event("say", begins - 50, context=reply, segment=1, text=reply),
            event("bot", begins, edge="start"),
            event("words", begins, context=reply, segment=1, text=reply, due=ms(begins)),
            event("voice-done", begins + 10, context=reply),
            event("bot", ends, edge="stop"),
        ]
        at = ends + rng.uniform(600, 4000)
    record = record_of(*sorted(events, key=lambda item: item["at"]), end=at)
    assert texts(record) == said


@pytest.mark.parametrize("seed", range(30))
def test_in_any_order_no_text_is_lost_or_told_twice(seed):
    rng = random.Random(seed)
    items: list[dict] = []
    for number in range(8):
        items += [
            event("vad", 0, edge=rng.choice(["start", "stop"]), secs=0.2),
            event("user-turn", 0, edge=rng.choice(["start", "stop"])),
            event("bot", 0, edge=rng.choice(["start", "stop"])),
            event("transcript", 0, text=f"text{number}.", service=rng.choice(["llm", None])),
            event("typed", 0, text=f"typed{number}.", via=rng.choice(["keys", "text"])),
        ]
    rng.shuffle(items)
    for number, item in enumerate(items):
        item["at"] = ms(number * rng.choice([1, 100, 700]))
    whole = " ".join(text for _, text in texts(record_of(*items, end=100_000)))
    expected = [f"{kind}{number}." for number in range(8) for kind in ("text", "typed")]
    assert sorted(whole.split()) == sorted(expected)


def test_an_interrupted_turn_ends_with_the_last_word_heard():
    record = record_of(
        *spoken(1000, ("We", 0), ("are", 300), ("open", 600), ("until", 900), ("nine.", 1200)),
        event("interruption", 1700),
        event("bot", 1710, edge="stop"),
    )
    [turn] = record.as_dict()["turns"]
    assert turn["text"] == "We are open"
    assert turn["interrupted_ms"] == 1700
    assert turn["estimated_cut"] is False


def test_words_that_an_interruption_overtook_are_not_heard_later():
    record = record_of(
        *spoken(1000, ("We", 0), ("are", 300), ("open.", 900), context="a")[:-1],
        event("interruption", 1500),
        event("words", 1501, context="a", segment=1, text="today.", due=ms(2500)),
        event("bot", 1510, edge="stop"),
        *spoken(4000, ("Yes?", 0), context="b"),
        event("bot", 4600, edge="stop"),
    )
    assert texts(record) == [("assistant", "We are"), ("assistant", "Yes?")]


@pytest.mark.parametrize("is_made", [True, False])
def test_speech_that_an_interruption_met_on_its_way_is_heard_as_far_as_it_was_played(is_made):
    overtaken = spoken(1020, ("We", 0), ("are", 300), ("open.", 900), context="a")
    record = record_of(
        event("interruption", 1000),
        *(overtaken if is_made else overtaken[:-1]),
        event("bot", 1040, edge="stop"),
        *spoken(1200, ("One", 0), ("moment.", 300), context="b"),
        event("bot", 2000, edge="stop"),
    )
    assert texts(record) == [("assistant", "We"), ("assistant", "One moment.")]


def test_speech_that_an_interruption_met_before_it_began_to_play_is_not_heard():
    made = [e for e in spoken(1020, ("We", 0), ("are", 300), context="a") if e["event"] != "bot"]
    voiced = event("voice", 1180, context="b")
    begins, *rest = spoken(1200, ("One", 0), ("moment.", 300), context="b")
    record = record_of(
        event("interruption", 1000),
        *made[:-1],
        *(begins, voiced, *rest),
        event("bot", 2000, edge="stop"),
    )
    assert texts(record) == [("assistant", "One moment.")]


def test_an_answer_right_after_an_interruption_is_heard_whole():
    record = record_of(
        event("interruption", 1000),
        *spoken(1050, ("Yes.", 0), context="a"),
        event("bot", 1450, edge="stop"),
    )
    assert texts(record) == [("assistant", "Yes.")]


def test_speech_that_cannot_be_interrupted_is_heard_whole():
    record = record_of(
        event("say", 950, context="c", segment=1, text="This call is recorded.", keep=True),
        event("bot", 1000, edge="start"),
        event("words", 1000, context="c", segment=1, text="This call is recorded.", keep=True),
        event("voice-done", 1000, context="c"),
        event("interruption", 1300),
        event("bot", 2600, edge="stop"),
    )
    [turn] = record.as_dict()["turns"]
    assert (turn["text"], turn["interrupted_ms"]) == ("This call is recorded.", None)


def test_words_of_an_interrupted_answer_do_not_reach_the_next_one():
    record = record_of(
        *spoken(1000, ("We", 0), ("are", 300), ("open.", 900), context="a"),
        event("interruption", 1500),
        event("bot", 1510, edge="stop"),
        *spoken(4000, ("Yes?", 0), context="b"),
        event("bot", 4600, edge="stop"),
    )
    assert texts(record) == [("assistant", "We are"), ("assistant", "Yes?")]


@pytest.mark.parametrize(
    ("heard_ms", "expected"),
    [
        (100, None),
        (1000, "one two three"),
        (1990, "one two three four five six seven"),
        (2100, "all"),
    ],
)
def test_without_word_timestamps_the_cut_is_estimated_from_the_audio_played(heard_ms, expected):
    sentence = "one two three four five six seven"
    record = record_of(
        event("say", 900, context="c", segment=7, text=sentence),
        event("bot", 1000, edge="start"),
        event("voiced", 1050, context="c", seconds=2.0),
        event("words", 1050, context="c", segment=7, text=sentence),
        event("interruption", 1000 + heard_ms),
    )
    turns = record.as_dict()["turns"]
    if expected is None:
        assert turns == []
    elif expected == "all":
        assert (turns[0]["text"], turns[0]["estimated_cut"]) == (sentence, False)
    else:
        assert turns[0]["estimated_cut"] is True
        assert sentence.startswith(turns[0]["text"])
        assert abs(len(turns[0]["text"]) / len(sentence) - heard_ms / 2000) < 0.2


def test_the_second_sentence_is_cut_after_the_first_was_heard_whole():
    record = record_of(
        event("say", 900, context="c", segment=1, text="We are open today."),
        event("bot", 1000, edge="start"),
        event("voiced", 1050, context="c", seconds=1.0),
        event("words", 1050, context="c", segment=1, text="We are open today."),
        event("say", 1060, context="c", segment=2, text="Come in any time you like."),
        event("voiced", 1100, context="c", seconds=1.0),
        event("words", 1100, context="c", segment=2, text="Come in any time you like."),
        event("interruption", 2500),
    )
    [turn] = record.as_dict()["turns"]
    assert turn["text"].startswith("We are open today. Come in")
    assert not turn["text"].endswith("like.")


@pytest.mark.parametrize("is_made", [False, True])
def test_a_voice_that_tells_its_sentences_before_it_makes_them_is_cut_by_their_length(
    is_made: bool,
) -> None:
    first, second = "We are open all day today.", "Come in any time you like."
    record = record_of(
        event("say", 900, context="c", segment=1, text=first),
        event("words", 900, context="c", segment=1, text=first),
        event("voiced", 990, context="c", seconds=0.5),
        event("bot", 1000, edge="start"),
        event("say", 1010, context="c", segment=2, text=second),
        event("words", 1010, context="c", segment=2, text=second),
        event("voiced", 1100, context="c", seconds=3.5 if is_made else 2.3),
        *([event("voice-done", 1110, context="c")] if is_made else []),
        event("interruption", 4000 if is_made else 3600),
    )
    [turn] = record.as_dict()["turns"]
    assert turn["text"] == f"{first} Come in any"
    assert turn["estimated_cut"] is True


def test_speech_to_speech_deltas_keep_their_own_spacing():
    record = record_of(
        event("bot", 1000, edge="start"),
        *(event("words", 1000, context=None, text=t, spaced=True) for t in ("Hel", "lo", " you")),
        event("voice-done", 1500, context=None),
        event("bot", 2000, edge="stop"),
    )
    assert texts(record) == [("assistant", "Hello you")]


def test_without_an_output_transport_the_words_are_as_generated():
    record = record_of(
        event("voiced", 1000, context="a", seconds=0.5),
        event("words", 1000, context="a", text="Hello"),
        event("words", 1000, context="a", text="there."),
        *user(2000, 3000, "Hi."),
        recorded=False,
    )
    assert texts(record) == [("assistant", "Hello there."), ("user", "Hi.")]


GREETING = [
    event("say", 900, context="a", segment=1, text="Hello there."),
    event("voice", 1000, context="a"),
    event("voiced", 1000, context="a", seconds=2.0),
    event("words", 1000, context="a", segment=1, text="Hello there."),
    event("voice-done", 1000, context="a"),
]


@pytest.mark.parametrize(
    ("then", "heard"),
    [
        ([], []),
        ([event("interruption", 1500), *user(1400, 2200, "Hi.")], [("user", "Hi.")]),
        ([*user(1400, 2200, "Hi."), event("interruption", 2600)], [("user", "Hi.")]),
    ],
    ids=["hung up", "interrupted", "spoken before"],
)
def test_with_an_output_transport_what_was_made_and_never_played_was_not_said(then, heard):
    told = event("output", 0)
    record = record_of(told, *GREETING, *then, recorded=False)
    assert texts(record) == heard
    assert [turn["role"] for turn in record.call_ended().get("transcript", [])] == [
        role for role, _ in heard
    ]
    # A journal from before this event was written means what it meant.
    assert ("assistant", "Hello there.") in texts(record_of(*GREETING, *then, recorded=False))


def test_what_begins_to_play_when_the_caller_has_left_was_not_said():
    left = event("ending", 1500, reason="client-disconnected", rank=Rank.SAID)
    begins = event("bot", 1510, edge="start")
    assert texts(record_of(*GREETING, left, begins, end=1800)) == []
    # The other way round they have heard a part of it.
    begins = event("bot", 1490, edge="start")
    [(_, heard)] = texts(record_of(*GREETING, begins, left, end=2600))
    assert heard == "Hello"
    # Who asks the bot to leave stays on the line for what plays to its end.
    plays = [event("bot", 1510, edge="start"), event("bot", 3510, edge="stop")]
    assert texts(record_of(*GREETING, left, *plays)) == [("assistant", "Hello there.")]


def test_a_greeting_that_plays_after_the_caller_spoke_into_it_is_behind_their_words():
    record = record_of(
        event("output", 0),
        *GREETING,
        *user(1100, 1500, "Hi."),
        event("bot", 2000, edge="start"),
        event("bot", 4000, edge="stop"),
        recorded=False,
    )
    assert texts(record) == [("user", "Hi."), ("assistant", "Hello there.")]


def test_words_of_a_voice_that_made_no_sound_are_not_heard():
    """Pipecat takes them for spoken when it gives the voice up."""
    record = record_of(
        event("say", 900, context="a", segment=1, text="Hello there."),
        event("words", 1000, context="a", segment=1, text="Hello there."),
        event("interruption", 1100),
        *user(2000, 3000, "Hello?"),
    )
    assert texts(record) == [("user", "Hello?")]


def test_a_call_that_ends_while_the_bot_speaks_keeps_what_was_heard():
    record = record_of(*spoken(1000, ("We", 0), ("are", 300), ("open.", 900)), end=1500)
    assert texts(record) == [("assistant", "We are")]


def test_two_speeches_in_a_row_keep_their_own_words():
    record = record_of(
        *spoken(1000, ("One", 0), ("moment.", 200), context="a"),
        *spoken(1010, ("Done.", 900), context="b"),
        event("bot", 1800, edge="stop"),
        event("bot", 1850, edge="start"),
        event("bot", 2500, edge="stop"),
    )
    assert texts(record) == [("assistant", "One moment."), ("assistant", "Done.")]


def test_every_tool_call_is_told_once_with_its_result():
    call = event("tool", 1000, id="t1", name="book", arguments='{"seats":2}')
    result = event("tool-result", 1500, id="t1", name="book", content='{"ok":true}')
    body = record_of(call, call, result, result).call_ended()
    assert [(tool["kind"], tool["audioOffsetMs"]) for tool in body["toolCalls"]] == [
        ("tool_call", 1000),
        ("tool_result", 1500),
    ]
    assert body["toolCalls"][0]["arguments"] == '{"seats":2}'
    assert body["toolCalls"][1]["content"] == '{"ok":true}'


@pytest.mark.parametrize(
    ("ending", "status", "content"),
    [
        ({"event": "tool-cancel", "id": "t1", "timed_out": True}, "timed-out", "timed out"),
        ({"event": "tool-cancel", "id": "t1", "timed_out": False}, "cancelled", "cancelled"),
        (
            {"event": "tool-result", "id": "t1", "content": "sorry", "error": "ValueError: no"},
            "failed",
            "ValueError: no",
        ),
    ],
)
def test_failed_and_cancelled_tools_appear_with_their_error(ending, status, content):
    record = record_of(
        event("tool", 1000, id="t1", name="book", arguments="{}"), ending | {"at": ms(1500)}
    )
    assert record.as_dict()["tools"][0]["status"] == status
    result = record.call_ended()["toolCalls"][1]
    assert (result["kind"], result["content"]) == ("tool_result", f'{{"error":"{content}"}}')


def test_an_intermediate_result_does_not_pass_for_the_final_one():
    record = record_of(
        event("tool", 1000, id="t1", name="search", arguments="{}"),
        event("tool-update", 1200, id="t1", content="half way"),
    )
    assert [tool["kind"] for tool in record.call_ended()["toolCalls"]] == ["tool_call"]
    assert record.as_dict()["tools"][0]["updates"] == [{"content": "half way", "at_ms": 1200.0}]


def test_a_tool_that_was_still_running_when_the_call_ended_is_unfinished_and_says_why():
    """The wire has no result of it; while the call goes on it is running."""
    tool = event("tool", 1000, id="t1", name="search", arguments="{}")
    record = record_of(tool)
    [shown] = record.as_dict()["tools"]
    assert (shown["status"], shown["error"]) == ("unfinished", None)
    assert shown["status_detail"] == "the call ended first (client-disconnected)"
    assert [tool["kind"] for tool in record.call_ended()["toolCalls"]] == ["tool_call"]
    [going_on] = CallRecord.replay([*OPENING, tool]).as_dict()["tools"]
    assert (going_on["status"], going_on["status_detail"]) == ("running", None)


def test_a_voice_with_word_times_has_them_in_the_record_as_far_as_they_were_heard():
    words = ("Your", 0), ("table", 400), ("is", 900), ("free.", 1200)
    heard = (event("interruption", 1600), event("bot", 1650, edge="stop"))
    [turn] = record_of(*spoken(500, *words), *heard).as_dict()["turns"]
    assert turn["words"] == [
        {"text": "Your", "at_ms": 500.0},
        {"text": "table", "at_ms": 900.0},
        {"text": "is", "at_ms": 1400.0},
    ]
    # The words of a redacted record would tell what was taken out of its text.
    redacting = CallRecord.replay(
        [*OPENING, CHUNK, *spoken(500, *words), *heard], redact=lambda text: "[gone]"
    )
    assert [(turn["text"], turn["words"]) for turn in redacting.as_dict()["turns"]] == [
        ("[gone]", [])
    ]


def test_latency_runs_from_the_callers_last_sound_to_the_bots_first_and_has_parts():
    record = record_of(
        *user(1000, 2000, "Hi.", decided=2400),
        event("metric", 2700, kind="ttfb", service="llm", value=0.3, model="gpt"),
        event("metric", 2900, kind="ttfb", service="tts", value=0.2, model="sonic"),
        *spoken(3000, ("Hello.", 0)),
        event("bot", 3600, edge="stop"),
    )
    latency = record.as_dict()["turns"][1]["latency"]
    assert latency == {
        "total_ms": 1000.0,
        "end_of_turn_ms": 400.0,
        "stt_ms": 250.0,
        "llm_ms": 300.0,
        "tts_ms": 200.0,
        "parts": {
            "pause_ms": 200.0,
            "verdict_ms": 150.0,
            "transcript_ms": 50.0,
            "llm_ms": 300.0,
            "voice_ms": 200.0,
            "rest_ms": 100.0,
        },
    }
    assert record.as_dict()["models"] == {"llm": ["gpt"], "tts": ["sonic"]}


def asked(at: float, *kinds: str) -> list[dict]:
    return [
        one
        for number, kind in enumerate(kinds)
        for one in (
            event("request", at + number, kind=kind),
            *([] if kind == "summary" else [event("asked", at + number)]),
        )
    ]


def first_token(at: float, seconds: float) -> dict:
    return event("metric", at, kind="ttfb", service="llm", value=seconds)


def voiced(at: float, context: str = "c") -> list[dict]:
    """An answer whose first sentence goes to the voice at `at`, and is heard 250 ms later."""
    return [
        event("voice", at + 150, context=context),
        event("metric", at + 150, kind="ttfb", service="tts", value=0.15),
        *spoken(at + 250, ("Hello.", 0), context=context),
        event("bot", at + 900, edge="stop"),
    ]


def timed(*happened: dict) -> tuple[dict, dict]:
    """(the caller's turn, latency of its answer) where each happens when it does."""
    ordered = sorted(happened, key=lambda one: one["at"])
    record = record_of(*ordered)
    assert (
        CallRecord.replay([*OPENING, CHUNK, *ordered]).as_dict()["usage"]
        == (record.as_dict()["usage"])
    )
    caller, answer = record.as_dict()["turns"][:2]
    assert sum(answer["latency"]["parts"].values()) == pytest.approx(answer["latency"]["total_ms"])
    return caller, answer["latency"]


def test_what_comes_last_of_verdict_and_transcript_is_what_is_waited_for():
    turn = user(1000, 2000, "Hi.", decided=2445)
    late_words = [event("turn-guess", 2340, complete=True, probability=0.9), *asked(2444, "answer")]
    made = [first_token(2896, 0.45), *voiced(2950)]
    early = [one | {"at": ms(2440)} if one["event"] == "transcript" else one for one in turn]
    _, latency = timed(*early, *late_words, *made)
    assert latency["parts"] == {
        **{"pause_ms": 200.0, "verdict_ms": 145.0, "transcript_ms": 100.0, "llm_ms": 450.0},
        **{"voice_ms": 150.0, "line_ms": 100.0, "rest_ms": 55.0},
    }
    # The words are there first: they cost what they took, the verdict the rest.
    _, latency = timed(*turn, *late_words, *made)
    assert latency["parts"]["transcript_ms"] == 50 and latency["parts"]["verdict_ms"] == 195


def test_an_answer_begun_in_the_pause_takes_what_is_left_of_it_when_the_turn_ends():
    turn = user(1000, 2000, "Hi.", decided=2400)
    caller, latency = timed(
        *turn, *asked(2110, "speculation"), first_token(2560, 0.45), *voiced(2600)
    )
    assert (latency["llm_ms"], latency["llm_saved_ms"]) == (450, 290)
    assert latency["parts"]["llm_ms"] == 160
    assert caller["withdrawn_answers"] == 0
    # Its first token came before the turn had ended: nothing is waited for.
    _, latency = timed(*turn, *asked(2110, "speculation"), first_token(2310, 0.2), *voiced(2410))
    assert latency["llm_saved_ms"] == 200 and "llm_ms" not in latency["parts"]
    # One that was asked for at the end has saved nothing.
    _, latency = timed(*turn, *asked(2399, "answer"), first_token(2700, 0.3), *voiced(2710))
    assert "llm_saved_ms" not in latency


@pytest.mark.parametrize("gives_up", [[("withdrawn", 2300)], [], [("interruption", 2300)]])
def test_a_withdrawn_answer_is_counted_and_its_time_is_not_the_next_ones(gives_up):
    caller, latency = timed(
        *user(1000, 2000, "Hi, I am", "Bea.", decided=2700),
        *asked(2110, "speculation"),
        *(event(name, at) for name, at in gives_up),
        *asked(2350, "speculation"),
        # Its service tells when it gave up, which is no first token.
        first_token(2352, 0.24),
        first_token(2800, 0.45),
        *voiced(2850),
    )
    assert caller["withdrawn_answers"] == 1
    assert (latency["llm_ms"], latency["llm_saved_ms"]) == (450, 350)


def test_an_answer_that_wants_a_tool_as_the_turn_ends_is_withdrawn_and_asked_for_again():
    caller, latency = timed(
        *user(1000, 2000, "Cancel it.", decided=2400),
        *asked(2110, "speculation"),
        first_token(2395, 0.28),
        event("withdrawn", 2401),
        *asked(2402, "answer"),
        first_token(2700, 0.297),
        event("tool", 2720, id="t", name="cancel"),
        event("tool-result", 2820, id="t", content="done"),
        *asked(2821, "answer"),
        first_token(3121, 0.3),
        *voiced(3130),
    )
    assert caller["withdrawn_answers"] == 1
    assert "llm_saved_ms" not in latency
    assert latency["parts"]["llm_ms"] == pytest.approx(297 + 300, abs=3)
    assert latency["parts"]["tools_ms"] == 100


def test_requests_whose_usage_nobody_told_are_counted_and_not_priced():
    told = [
        event("metric", at, kind=kind, service="llm", value=value)
        for at in (2650, 3400)
        for kind, value in (("prompt_tokens", 1000), ("completion_tokens", 20))
    ]
    record = record_of(
        event("prices", 0, values={"prompt_tokens_per_million": 1.0}),
        *user(1000, 2000, "Hi, I am", "Bea.", decided=2700),
        *asked(2110, "speculation"),
        event("withdrawn", 2300),
        *asked(2350, "speculation"),
        # Made to its end, and withdrawn all the same: it was paid for.
        told[0],
        told[1],
        event("withdrawn", 2660),
        *asked(2701, "answer", "summary"),
        *told[2:],
    )
    kept = record.as_dict()
    assert kept["usage"] == {
        **{"prompt_tokens": 2000, "completion_tokens": 40, "llm_requests": 4},
        **{"llm_requests_withdrawn": 2, "llm_requests_without_usage": 2},
    }
    assert kept["cost"]["total"] == 0.002 and kept["cost"]["llm_requests_not_counted"] == 2


def test_a_request_that_is_held_back_on_its_way_to_the_llm_is_none():
    record = record_of(
        *user(1000, 2000, "Hello?", decided=2400),
        # As the opening of a call out holds them, until it is known who is there.
        event("request", 2110, kind="speculation"),
        event("withdrawn", 2300),
        event("request", 2401, kind="answer"),
        *asked(3000, "answer"),
    )
    assert record.as_dict()["usage"] == {"llm_requests": 1, "llm_requests_without_usage": 1}
    assert record.as_dict()["turns"][0]["withdrawn_answers"] == 0
    # Where speech goes to speech an LLM begins unasked.
    alone = record_of(event("asked", 1500), *user(1000, 2000, "Yes."))
    assert not alone.as_dict()["usage"]


def test_a_speech_that_waits_for_another_is_heard_when_its_turn_comes():
    record = record_of(
        *spoken(1000, ("One", 0), ("moment.", 200), context="a"),
        event("voice", 1100, context="b"),
        *spoken(1100, ("We", 0), ("are", 300), ("open.", 600), context="b")[0:1],
        *(
            event("words", 1100, context="b", segment=1, text=text, due=ms(1100 + at))
            for text, at in (("We", 0), ("are", 300), ("open.", 600))
        ),
        event("voiced", 1150, context="b", seconds=1.0),
        event("voice-done", 1150, context="b"),
        event("bot", 1800, edge="stop"),
        event("bot", 1810, edge="start"),
        event("interruption", 2200),
    )
    assert texts(record) == [("assistant", "One moment."), ("assistant", "We are")]


def test_a_speech_that_waited_is_not_heard_while_the_one_before_is_interrupted():
    record = record_of(
        *spoken(1000, ("One", 0), ("moment.", 200), context="a"),
        *spoken(1010, ("We", 0), ("are", 100), context="b"),
        event("interruption", 1150),
    )
    assert texts(record) == [("assistant", "One")]


def test_a_murmur_while_the_bot_speaks_is_a_turn_of_its_own():
    record = record_of(
        *spoken(1000, ("We", 0), ("are", 300), ("open", 600), ("today.", 3000)),
        event("vad", 1700, edge="start", secs=0.2),
        event("vad", 2200, edge="stop", secs=0.2),
        event("transcript", 2300, text="Uh-huh."),
        event("bot", 4500, edge="stop"),
        *user(5000, 6000, "Thank you."),
    )
    assert texts(record) == [
        ("assistant", "We are open today."),
        ("user", "Uh-huh."),
        ("user", "Thank you."),
    ]


def test_usage_is_summed_over_the_call():
    record = record_of(
        *(event("metric", 10, kind="prompt_tokens", service="llm", value=v) for v in (10, 5)),
        event("metric", 10, kind="stt_seconds", service="stt", value=2.5),
    )
    assert record.as_dict()["usage"] == {"prompt_tokens": 15, "stt_seconds": 2.5}


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ([("client-disconnected", Rank.SAID), ("signal", Rank.SAID)], "client-disconnected"),
        ([("cancelled", Rank.FALLBACK), ("idle-timeout", Rank.ASSUMED)], "idle-timeout"),
        ([("client-disconnected", Rank.ASSUMED), ("agent-ended", Rank.SAID)], "agent-ended"),
        ([("a reason of my own", Rank.SAID)], "a reason of my own"),
        ([], "client-disconnected"),
    ],
)
def test_the_first_to_know_why_the_call_ends_is_believed(said, reason):
    endings = [event("ending", 10, reason=name, rank=int(rank)) for name, rank in said]
    assert record_of(*endings).call_ended()["callEndedReason"] == reason


def test_without_a_recording_nothing_is_said_of_one():
    body = record_of(*user(0, 1000, "Hi."), recorded=False).call_ended()
    assert not {"recordingSampleRate", "recordingNumChannels"} & body.keys()
    assert "audioOffsetMs" not in body["transcript"][0]


def test_optional_fields_are_left_out_and_never_null():
    record = CallRecord.replay([event("call", 0, call_id="x", agent_id="a")])
    record.close("error", at=ms(5))
    assert record.call_ended() == {
        "event": "call-ended",
        "pipecatCallId": "x",
        "eventTimestamp": "2026-09-21T14:13:20.005+00:00",
        "callStartedAt": None,
        "callEndedAt": "2026-09-21T14:13:20.005+00:00",
        "callEndedReason": "error",
    }


def test_a_replay_after_a_killed_process_says_what_was_known_so_far():
    events = [*OPENING, CHUNK, *user(0, 1000, "Hi."), *spoken(1500, ("He", 0), ("llo", 900))]
    live = CallRecord()
    for item in events:
        live.apply(item)
    replayed = CallRecord.replay(events)
    for record in (live, replayed):
        record.close("process-died", at=ms(2000))
    assert live.as_dict() == replayed.as_dict()
    assert live.call_ended() == replayed.call_ended()
    assert texts(replayed) == [("user", "Hi."), ("assistant", "He")]


def test_with_a_recorder_that_lost_audio_markers_follow_its_anchors():
    record = record_of(
        event("anchor", 10_000, ms=8000.0),
        *user(5000, 6000, "Hi."),
    )
    [turn] = record.as_dict()["turns"]
    assert (turn["start_ms"], turn["end_ms"]) == (4000.0, 4800.0)


def test_a_redacted_text_is_all_that_is_given_out():
    record = CallRecord(redact=lambda text: text.replace("4111", "[card]"))
    for item in [*OPENING, *user(0, 1000, "It is 4111.")]:
        record.apply(item)
    record.close("client-disconnected")
    assert "4111" not in str(record.as_dict()) + str(record.call_ended())
    assert record.unwritten_texts() == [(0, "It is [card].")]


def test_an_answer_is_kept_though_the_one_before_it_began_to_play_as_it_was_cut_off():
    """A late transcript brings both within 0.1 s, and the first one's sound was on its way."""
    record = record_of(
        *user(1000, 2000, decided=4500),
        event("request", 4510, kind="answer"),
        event("say", 4600, context="a", segment=1, text="Pardon?"),
        event("voice", 5500, context="a"),
        event("voiced", 5501, context="a", seconds=1.5),
        event("transcript", 5502, text="I want a table."),
        event("user-turn", 5510, edge="start"),
        event("interruption", 5511),
        event("user-turn", 5514, edge="stop"),
        event("request", 5518, kind="answer"),
        event("bot", 5530, edge="start"),
        event("say", 5545, context="b", segment=2, text="For how many?"),
        event("bot", 5565, edge="stop"),
        event("voice", 5980, context="b"),
        event("voiced", 5981, context="b", seconds=1.4),
        event("words", 5982, context="b", segment=2, text="For how many?"),
        event("voice-done", 5983, context="b"),
        event("bot", 5990, edge="start"),
        event("bot", 7500, edge="stop"),
    )
    assert texts(record) == [("user", "I want a table."), ("assistant", "For how many?")]
