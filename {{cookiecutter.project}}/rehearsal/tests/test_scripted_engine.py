"""The scripted engine: what it hears, answers and says is what was written down."""

import tomllib
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.audio.vad.vad_analyzer import VADState

from rehearsal.engines import scripted as script_module
from rehearsal.engines.engine import TextDelta, ToolCall
from rehearsal.engines.scripted import Answer, Script, ScriptedEngine

pytestmark = pytest.mark.anyio

CLINIC = """
greeting = "This is the clinic."
hears = ["Please cancel it.", "Thank you."]

[[answers]]
heard = "Cancel"
says = "One moment."
calls = [{ name = "cancel", arguments = { id = 7 } }, { name = "notify" }]

[[answers]]
result = "cancel"
says = "It is cancelled."

[[answers]]
told = "still there"
says = "Are you still there?"

[[answers]]
says = "First."

[[answers]]
says = "Second and later."
"""

TOOL_MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "Please cancel it."},
    {"role": "assistant", "tool_calls": [{"id": "call_1", "function": {"name": "cancel"}}]},
    {"role": "tool", "tool_call_id": "call_1", "content": '"done"'},
]
GREETED = {"role": "assistant", "content": "This is the clinic."}
AGAIN = {"role": "developer", "content": "Say it again."}


def user(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text} for text in texts]


async def said(messages: list[dict[str, Any]], script: Script | None = None) -> str:
    script = script or Script.parse(tomllib.loads(CLINIC))
    pieces = [piece async for piece in ScriptedEngine(script).think(messages, [])]
    return "".join(piece.text for piece in pieces if isinstance(piece, TextDelta))


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "This is the clinic."),
        ([{"role": "system", "content": "Be kind."}], "This is the clinic."),
        ([*user("Hi."), {"role": "developer", "content": "Greet."}], "This is the clinic."),
        ([{"role": "developer", "content": "Ask: still there?"}], "Are you still there?"),
        ([GREETED, *user("Hi."), AGAIN], "First."),
        # Nothing is done twice.
        ([GREETED, *user("Cancel it."), AGAIN], "This is the clinic."),
        (user("Could you CANCEL?"), "One moment."),
        (TOOL_MESSAGES, "It is cancelled."),
        (user("Hi."), "First."),
        (user("Hi.", "Ho."), "Second and later."),
        (user("Hi.", "Ho.", "Hm."), "Second and later."),
        ([{"role": "user", "content": [{"type": "text", "text": "cancel"}]}], "One moment."),
    ],
)
async def test_an_answer_depends_on_how_the_conversation_ends(
    messages: list[dict[str, Any]], expected: str
) -> None:
    assert await said(messages) == expected


async def test_calls_in_one_answer_are_made_together() -> None:
    script = Script.parse(tomllib.loads(CLINIC))
    pieces = [piece async for piece in ScriptedEngine(script).think(user("Cancel."), [])]
    assert pieces[-2:] == [ToolCall("cancel", {"id": 7}), ToolCall("notify")]


async def test_without_a_script_any_speech_is_one_sentence_that_is_answered() -> None:
    engine = ScriptedEngine()
    recogniser = engine.listen(8000)
    for _ in range(2):
        async for speech in engine.speak("Whatever was said", 8000):
            await recogniser.feed(speech.pcm)
        (heard,) = await recogniser.finalize()
        assert heard.text == "Can you hear me?"
    assert (
        await said(user("Can you hear me?"), Script())
        == "Yes, I can hear you. Is there anything else?"
    )
    assert "not a language model" in await said([], Script())


async def test_speech_ends_by_itself_after_a_second_of_silence() -> None:
    recogniser = ScriptedEngine().listen(8000)
    async for speech in ScriptedEngine().speak("Hello there", 8000):
        await recogniser.feed(speech.pcm)
    (guess,) = await recogniser.feed(b"\0\0" * 7000)
    assert guess.text == "Can you hear me?" and not guess.is_final
    (heard,) = await recogniser.feed(b"\0\0" * 1500)
    assert heard.is_final
    assert await recogniser.finalize() == []


async def test_a_click_is_not_speech() -> None:
    recogniser = ScriptedEngine().listen(8000)
    assert await recogniser.feed(b"\xff\x3f" * 160 + b"\0\0" * 800) == []
    assert await recogniser.finalize() == []


async def test_pieces_of_any_size_are_heard_alike() -> None:
    pcm = b"".join([speech.pcm async for speech in ScriptedEngine().speak("A few words", 16000)])
    whole, bytewise = ScriptedEngine().listen(16000), ScriptedEngine().listen(16000)
    await whole.feed(pcm)
    for at in range(0, len(pcm), 333):
        await bytewise.feed(pcm[at : at + 333])
    assert await whole.finalize() == await bytewise.finalize()


@pytest.mark.parametrize("sample_rate", [8000, 16000, 24000])
async def test_words_sound_exactly_when_their_timestamps_say(sample_rate: int) -> None:
    speeches = [s async for s in ScriptedEngine().speak("Every word has its time", sample_rate)]
    pcm = np.frombuffer(b"".join(s.pcm for s in speeches), dtype=np.int16)
    words = [word for speech in speeches for word in speech.words]
    assert [word.text for word in words] == ["Every", "word", "has", "its", "time"]
    silent = np.ones(len(pcm), dtype=bool)
    for word in words:
        begin, end = round(word.start_s * sample_rate), round(word.end_s * sample_rate)
        silent[begin:end] = False
        near_edges = np.concatenate(
            [pcm[begin : begin + sample_rate // 100], pcm[end - sample_rate // 100 : end]]
        )
        assert np.abs(near_edges).max() > 300
    assert not pcm[silent].any()


@pytest.mark.parametrize("sample_rate", [8000, 16000])
@pytest.mark.parametrize(
    "text",
    [
        "Please cancel my appointment for tomorrow morning.",
        "Hello, can you hear me?",
        "I would like to book a table for two, please.",
        "Some words that are spoken",
        "Thank you, goodbye.",
        "a b c d e f g h",
    ],
)
async def test_a_voice_activity_detector_takes_the_voice_for_one_stretch_of_speech(
    sample_rate: int, text: str
) -> None:
    """So that a scripted caller can speak with it to a bot with its real detector."""
    spoken = b"".join([speech.pcm async for speech in ScriptedEngine().speak(text, sample_rate)])
    silence = b"\0" * sample_rate
    vad = SileroVADAnalyzer(sample_rate=sample_rate)
    vad.set_sample_rate(sample_rate)
    pcm, size = silence + spoken + silence, sample_rate // 50 * 2
    states = [await vad.analyze_audio(pcm[at : at + size]) for at in range(0, len(pcm), size)]
    settled = [state for state in states if state in (VADState.QUIET, VADState.SPEAKING)]
    assert [state for state, _ in groupby(settled)] == [
        VADState.QUIET,
        VADState.SPEAKING,
        VADState.QUIET,
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("hears = [", "at end of document"),
        ("greting = 'Hi'", "a script has greeting, hears, answers; not greting"),
        ("[[answers]]\nsay = 'Hi'", "an answer has says, calls, heard, result, told; not say"),
        ("[[answers]]\nheard = 'a'\ntold = 'b'", "one of heard, result, told"),
        ("[[answers]]\ncalls = [{ nam = 'x' }]", "a call has name, arguments; not nam"),
        ("[[answers]]\ncalls = [{ arguments = {} }]", "a call has the name of a tool"),
        ("hears = 'one'", "hears is a list of texts in quotes"),
        ("hears = ['Hello', 3]", "hears is a list of texts in quotes"),
        ("greeting = 5", "greeting is a text in quotes, not 5"),
        ("[[answers]]\nsays = 5", "says is a text in quotes, not 5"),
        ("[[answers]]\nheard = ['a']", "heard is a text in quotes, not"),
        ("[[answers]]\nresult = true", "result is a text in quotes"),
        ("[[answers]]\ntold = 2", "told is a text in quotes"),
        ("[answers]\nsays = 'Hi'", r"answers is a list: write \[\[answers\]\]"),
        ("answers = 'x'", "answers is a list"),
        ("answers = ['x']", "answers is a list"),
        ("[[answers]]\ncalls = 'x'", "calls is a list of tables"),
        ("[[answers]]\ncalls = { name = 'x' }", "calls is a list of tables"),
        ("[[answers]]\ncalls = ['x']", "calls is a list of tables"),
        ("[[answers]]\ncalls = [{ name = 7 }]", "name is a text in quotes, not 7"),
        ("[[answers]]\ncalls = [{ name = 'x', arguments = [7] }]", "arguments is a table such as"),
        (
            "[[answers]]\ncalls = [{ name = 'x', arguments = { day = 2026-05-01 } }]",
            "JSON, which has no dates",
        ),
    ],
)
def test_a_wrong_script_is_refused_by_name(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "script.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint) as refusal:
        Script.load(path)
    assert str(refusal.value).startswith(f"{path}: ")


def test_the_documented_script_is_one() -> None:
    lines = (script_module.__doc__ or "").splitlines()
    example = Script.parse(tomllib.loads("\n".join(x for x in lines if x.startswith("    "))))
    assert example.hears == ("Please cancel my appointment.", "Thank you.")
    assert [answer.says for answer in example.answers][-1] == "Goodbye."


def test_a_script_can_be_written_in_python_too(tmp_path: Path) -> None:
    path = tmp_path / "script.toml"
    path.write_text('hears = ["Hi."]\n[[answers]]\nsays = "Ho."\n', encoding="utf-8")
    assert Script.load(path) == Script(hears=("Hi.",), answers=(Answer(says="Ho."),))
