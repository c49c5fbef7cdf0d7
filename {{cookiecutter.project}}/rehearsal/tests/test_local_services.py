"""Hearing and speaking on this machine: Whisper and Piper hold a call in the bot's own process.

For a project that chose both, where weights for them are installed; see weights.py.
"""

import asyncio
import os
import re
import time
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr
from harness import RECORDS_AUDIO, SECONDS, Harness, classes, run_harness

import services
from rehearsal.call import HUMAN_VOICE, recorded_voice
from rehearsal.callers.caller import Caller
from rehearsal.engines import weights
from rehearsal.engines.local import verify
from rehearsal.engines.scripted import Answer, Script

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

PACKAGE_OF = {
    "WhisperSTTService": weights.WHISPER_PACKAGE,
    "PiperTTSService": weights.VOICE_PACKAGE,
}
WHISPER_HZ = 16000
SAID = "he might even have been made amiable himself"
GREETING = "Good morning, this is the front desk."
ANSWER = "Thank you, I wrote it down."
LONG = "We are open on Monday, on Tuesday, on Wednesday, on Thursday, on Friday and on Saturday."


@pytest.fixture
async def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The bot and its world, of which only the answerer and Roark are servers."""
    skip_unless_local("WhisperSTTService", "PiperTTSService")
    # What is heard here is what is said.
    monkeypatch.setattr("harness.skip_unless_scripted", lambda: None)
    async with run_harness(monkeypatch, tmp_path) as harness:
        harness.engine.script = Script(greeting=GREETING, answers=(Answer(says=ANSWER),))
        yield harness


def skip_unless_local(*names: str) -> None:
    """Skip the test where the project chose other services, or has no weights for these."""
    for name in names:
        if name not in classes().values():
            pytest.skip(f"this project does not use {name}")
        if not (folder := weights.folder(PACKAGE_OF[name])):
            pytest.skip(f"no weights for {name}: install {PACKAGE_OF[name].replace('_', '-')}")
        verify(folder, weights.SHA256[PACKAGE_OF[name]])


def plain(text: str) -> str:
    return re.sub(r"[^a-z ]", "", text.lower()).strip()


def recognised(pcm: bytes, sample_rate: int) -> str:
    """What Whisper makes of mono PCM16."""
    samples = np.frombuffer(pcm, "<i2").astype(np.float32) / np.float32(32768)
    faster_whisper: Any = import_module("faster_whisper")
    model = faster_whisper.WhisperModel(os.environ["WHISPER_MODEL"], compute_type="int8")
    segments, _ = model.transcribe(soxr.resample(samples, sample_rate, WHISPER_HZ))
    return plain("".join(segment.text for segment in segments))


async def hear_out(caller: Caller, since: float = 0.0) -> None:
    await caller.hear(since=since, within=SECONDS)
    await caller.hear_out(quiet=1.0, within=SECONDS)


def texts(harness: Harness) -> list[tuple[str, str]]:
    assert harness.received.ended
    return [(turn["role"], turn["content"]) for turn in harness.received.ended["transcript"]]


async def test_a_human_is_understood_and_hears_words(harness: Harness) -> None:
    """On a phone, where less of a voice is left."""
    voice = recorded_voice(HUMAN_VOICE)
    async with harness.caller("twilio") as caller:
        await hear_out(caller)
        await caller.say(voice.pcm, voice.sample_rate)
        # Where the machine is busy the bot may ask again before Whisper has the words.
        async with asyncio.timeout(SECONDS):
            while harness.engine.asked[-1][-1]["role"] != "user":
                await asyncio.sleep(0.02)
        await hear_out(caller, since=time.monotonic())
    assert (await harness.over()).error is None

    (greeter, greeting), *rest, answer = texts(harness)
    assert (greeter, greeting) == ("assistant", GREETING)
    assert [plain(text) for role, text in rest if role == "user"] == [SAID], texts(harness)
    assert answer == ("assistant", ANSWER)
    assert plain(harness.engine.asked[-1][-1]["content"]) == SAID
    played = caller.heard
    understood = recognised(played.pcm(), played.sample_rate)
    assert understood.startswith(plain(GREETING)) and understood.endswith(plain(ANSWER))
    if RECORDS_AUDIO:
        recording, rate = harness.recording()
        assert rate == 8000
        assert recognised(recording[:, 0].tobytes(), rate) == SAID
    asked = {request.provider for request in harness.providers.log.requests}
    assert asked == {harness.server("llm").name}


async def test_of_an_interrupted_sentence_the_record_holds_what_was_heard(harness: Harness) -> None:
    harness.engine.script = Script(greeting=LONG, answers=(Answer(says=ANSWER),))
    voice = recorded_voice(HUMAN_VOICE)
    async with harness.caller("twilio") as caller:
        await caller.hear(within=SECONDS)
        said = await caller.say(voice.pcm, voice.sample_rate)
        await hear_out(caller, since=said.end)
    assert (await harness.over()).error is None

    (_, began), *_ = texts(harness)
    assert LONG.startswith(began)
    assert 0 < len(began) < len(LONG)


def test_whisper_is_loaded_once_for_all_calls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    skip_unless_local("WhisperSTTService")
    links = links_to(Path(os.environ["WHISPER_MODEL"]).iterdir(), tmp_path)
    monkeypatch.setenv("WHISPER_MODEL", str(tmp_path))
    services.create_stt()
    make_useless(links)
    services.create_stt()


def test_the_voice_is_loaded_once_for_all_calls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    skip_unless_local("PiperTTSService")
    voice = Path(os.environ["PIPER_VOICE"])
    links = links_to(voice.parent.glob(f"{voice.name}*"), tmp_path)
    monkeypatch.setenv("PIPER_VOICE", str(tmp_path / voice.name))
    services.create_tts()
    make_useless(links)
    services.create_tts()


def links_to(files: Iterable[Path], folder: Path) -> list[Path]:
    links: list[Path] = []
    for file in files:
        links.append(folder / file.name)
        links[-1].symlink_to(file)
    return links


def make_useless(links: list[Path]) -> None:
    """Leave empty files, from which nothing can be loaded."""
    for link in links:
        link.unlink()
        link.touch()
