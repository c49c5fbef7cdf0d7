"""The scripted engine: what is heard, answered and said is written down beforehand.

No model, no weights, the same every time, in milliseconds; every test uses it. A script is a TOML
file, because Python reads TOML without a dependency and people write it without escaping:

    greeting = "Hello, this is the clinic."
    hears = ["Please cancel my appointment.", "Thank you."]

    [[answers]]
    heard = "cancel"                    # the caller's last words contain this
    calls = [{ name = "cancel_appointment", arguments = { id = 7 } }]

    [[answers]]
    result = "cancel_appointment"       # this tool has just returned
    says = "It is cancelled."

    [[answers]]
    told = "still there"                # the bot's last instruction contains this
    says = "Are you still there?"

    [[answers]]                         # no condition: the n-th of these answers the n-th thing
    says = "Goodbye."                   # the caller says, the last one all that follow

Several `calls` in one answer are parallel calls. To any other instruction the bot says again what
it had to say to the caller's last words, or, if there were none, `greeting`.
"""

import json
import tomllib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, cast
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from rehearsal.engines.engine import Heard, Speech, TextDelta, ToolCall, Word


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: when to give it (at most one condition), what to say, which tools to call."""

    says: str = ""
    calls: tuple[ToolCall, ...] = ()
    heard: str | None = None
    result: str | None = None
    told: str | None = None


@dataclass(frozen=True, slots=True)
class Script:
    """What happens in a rehearsed call. The default takes any speech for one sentence.

    Attributes:
        greeting: What the bot says when it is told to begin.
        hears: What the caller is heard to say, one entry for every stretch of speech; the last
            entry stands for all speech after it.
        answers: Tried in order; the first whose condition holds is given.
    """

    greeting: str = "Hello. A script answers you, not a language model. What can I do for you?"
    hears: tuple[str, ...] = ("Can you hear me?",)
    answers: tuple[Answer, ...] = (Answer(says="Yes, I can hear you. Is there anything else?"),)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a script from a TOML file.

        Raises:
            ValueError: The file is no script; the text says which key is wrong.
        """
        try:
            return cls.parse(tomllib.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def parse(cls, table: Mapping[str, Any]) -> Self:
        """Read a script from a parsed TOML document; see the module for its form."""
        known = _known(table, cls, "a script")
        if "hears" in known:
            known["hears"] = _all(known["hears"], str, 'hears is a list of texts in quotes: ["a"]')
        if "answers" in known:
            answers = _all(known["answers"], dict, "answers is a list: write [[answers]] over each")
            known["answers"] = tuple(_answer(entry) for entry in answers)
        return cls(**known)


def _answer(table: Mapping[str, Any]) -> Answer:
    known = _known(table, Answer, "an answer")
    calls = _all(known.get("calls", []), dict, 'calls is a list of tables: [{ name = "look_up" }]')
    known["calls"] = tuple(map(_call, calls))
    if sum(condition in known for condition in ("heard", "result", "told")) > 1:
        raise ValueError("an answer has one of heard, result, told, or none of them")
    return Answer(**known)


def _call(table: Mapping[str, Any]) -> ToolCall:
    known = _known(table, ToolCall, "a call")
    if "name" not in known:
        raise ValueError("a call has the name of a tool")
    if not isinstance(known.get("arguments", {}), dict):
        raise ValueError("arguments is a table such as { id = 7 }")
    try:
        json.dumps(known)
    except TypeError:
        raise ValueError("arguments are sent as JSON, which has no dates: put quotes") from None
    return ToolCall(**known)


def _known(table: Mapping[str, Any], kind: type, what: str) -> dict[str, Any]:
    allowed = [item.name for item in fields(kind)]
    if unknown := sorted(set(table) - set(allowed)):
        raise ValueError(f"{what} has {', '.join(allowed)}; not {', '.join(unknown)}")
    for name in (item.name for item in fields(kind) if item.type in (str, str | None)):
        if not isinstance(table.get(name, ""), str):
            raise ValueError(f"{name} is a text in quotes, not {table[name]}")
    return dict(table)


def _all(value: Any, kind: type, form: str) -> tuple[Any, ...]:
    if not (isinstance(value, list) and all(isinstance(one, kind) for one in cast(Any, value))):
        raise ValueError(form)
    return tuple(cast(Any, value))


class ScriptedEngine:
    """Plays a script: recognisers that notice speech by loudness, answers by rule, a humming voice.

    It keeps no state between requests, so that one engine serves any number of calls.
    """

    name = "scripted"

    def __init__(self, script: Script | None = None) -> None:
        """Play `script`, or the default one."""
        self.script = script or Script()

    def listen(self, sample_rate: int) -> "ScriptedRecogniser":
        """Return a recogniser at the beginning of the script."""
        return ScriptedRecogniser(self.script.hears, sample_rate)

    async def think(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> AsyncIterator[TextDelta | ToolCall]:
        """Give the script's answer, word by word."""
        answer = self._answer(messages)
        for index, word in enumerate(answer.says.split()):
            yield TextDelta(f" {word}" if index else word)
        for call in answer.calls:
            yield call

    async def speak(self, text: str, sample_rate: int) -> AsyncIterator[Speech]:
        """Say `text`, one vowel-like sound per word with silence between."""
        begin = 0
        for text_of_word in text.split():
            voiced = _voice(text_of_word, sample_rate)
            pause = np.zeros(round(_PAUSE_SECONDS * sample_rate), dtype="<i2")
            end = begin + len(voiced)
            word = Word(text_of_word, begin / sample_rate, end / sample_rate)
            yield Speech(voiced.tobytes() + pause.tobytes(), (word,))
            begin = end + len(pause)

    async def aclose(self) -> None:
        """Nothing to give back."""

    def _answer(self, messages: list[dict[str, Any]]) -> Answer:
        said = [_text(message) for message in messages if message["role"] == "user"]
        has_greeted = any(message["role"] == "assistant" for message in messages)
        last = messages[-1] if messages else {"role": "system"}
        match last["role"]:
            case "tool":
                names = _tools_that_returned(messages)
                for answer in self.script.answers:
                    if answer.result in names:
                        return answer
                return Answer(says="Done.")
            case "user":
                return self._answer_to(said)
            case _:
                told = _text(last).lower()
                for answer in self.script.answers:
                    if answer.told is not None and answer.told.lower() in told:
                        return answer
                if said and has_greeted and not (again := self._answer_to(said)).calls:
                    return again
                return Answer(says=self.script.greeting)

    def _answer_to(self, said: list[str]) -> Answer:
        heard = said[-1].lower()
        for answer in self.script.answers:
            if answer.heard is not None and answer.heard.lower() in heard:
                return answer
        in_order = [a for a in self.script.answers if a.heard is a.result is a.told is None]
        if in_order:
            return in_order[min(len(said), len(in_order)) - 1]
        return Answer(says="The script has no answer to that.")


def _text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", "") for part in content)


def _tools_that_returned(messages: list[dict[str, Any]]) -> set[str]:
    """Return the names of the tools whose results end the conversation."""
    names = {
        call["id"]: call["function"]["name"]
        for message in messages
        for call in message.get("tool_calls") or ()
    }
    returned: set[str] = set()
    for message in reversed(messages):
        if message["role"] != "tool":
            break
        returned.add(names.get(message["tool_call_id"], ""))
    return returned


_WINDOW_SECONDS = 0.01
# Root mean square of PCM16 above which a window is loud: -41 dBFS.
_LOUD_RMS = 300.0
_SPEECH_WINDOWS = 5
_SILENCE_WINDOWS = 100
_INTERIM_WINDOWS = 10


class ScriptedRecogniser:
    """Notices that somebody spoke, when and for how long; the words come from the script.

    A stretch of speech is heard as an interim result when it begins and, whole, a moment after it
    has ended; and as a final one when the client says that it ended (`finalize`), or after a second
    of silence.
    """

    def __init__(self, hears: tuple[str, ...], sample_rate: int) -> None:
        """Start at the beginning of `hears`, for audio of `sample_rate` Hz."""
        self._hears = hears
        self._window_bytes = 2 * round(_WINDOW_SECONDS * sample_rate)
        self._rest = b""
        self._stretches = 0
        self._windows = 0
        self._loud: list[int] = []

    async def feed(self, pcm: bytes) -> list[Heard]:
        """Listen to the next piece of audio."""
        pcm = self._rest + pcm
        whole = len(pcm) - len(pcm) % self._window_bytes
        self._rest = pcm[whole:]
        samples = np.frombuffer(pcm[:whole], dtype="<i2").astype(np.float32)
        windows = samples.reshape(-1, self._window_bytes // 2)
        heard: list[Heard] = []
        for rms in np.sqrt(np.mean(windows**2, axis=1)):
            if rms >= _LOUD_RMS:
                self._loud.append(self._windows)
                if len(self._loud) == _SPEECH_WINDOWS:
                    heard.append(self._heard(is_final=False, words=1))
            elif self._loud:
                silent = self._windows - self._loud[-1]
                if silent == _INTERIM_WINDOWS and len(self._loud) >= _SPEECH_WINDOWS:
                    heard.append(self._heard(is_final=False))
                elif silent >= _SILENCE_WINDOWS:
                    heard += await self.finalize()
            self._windows += 1
        return heard

    async def finalize(self) -> list[Heard]:
        """Return the words for the stretch of speech that ended, if there was one."""
        heard = [self._heard(is_final=True)] if len(self._loud) >= _SPEECH_WINDOWS else []
        self._stretches += len(heard)
        self._loud = []
        return heard

    def _heard(self, *, is_final: bool, words: int | None = None) -> Heard:
        text = self._hears[min(self._stretches, len(self._hears) - 1)] if self._hears else ""
        first, last = self._loud[0], self._loud[-1] + 1
        return Heard(
            text=text if words is None else " ".join(text.split()[:words]),
            is_final=is_final,
            start_s=first * _WINDOW_SECONDS,
            duration_s=(last - first) * _WINDOW_SECONDS,
        )


# Vowels as formants in Hz: center, width, gain. A word slides from one to another while its pitch
# falls: of the voices tried, the one Silero most steadily takes for speech at 8 and 16 kHz, so
# that a scripted caller can use it too.
_VOWELS = (
    ((500, 100, 1.0), (1800, 150, 0.5), (2500, 200, 0.3)),
    ((700, 130, 1.0), (1200, 150, 0.6), (2600, 200, 0.25)),
    ((450, 100, 1.0), (800, 120, 0.6), (2600, 250, 0.1)),
    ((300, 80, 1.0), (2200, 150, 0.4), (3000, 200, 0.3)),
    ((320, 80, 1.0), (900, 120, 0.4), (2300, 200, 0.1)),
)
_LOWEST_PITCH_HZ, _PITCHES_HZ, _PITCH_FALL, _HIGHEST_HZ = 110, 40, 0.3, 3000
_LETTER_SECONDS, _SHORTEST_WORD_SECONDS, _PAUSE_SECONDS = 0.03, 0.08, 0.04
_EDGE_SECONDS = 0.01
_PEAK = 12000


def _voice(word: str, sample_rate: int) -> NDArray[np.int16]:
    """Return a word's sound: as long as the word, with sharp edges, other for other words."""
    samples = round(max(_LETTER_SECONDS * len(word), _SHORTEST_WORD_SECONDS) * sample_rate)
    t = np.arange(samples) / sample_rate
    done = np.arange(samples) / samples
    variant = crc32(word.encode())
    pitch = _LOWEST_PITCH_HZ + variant % _PITCHES_HZ
    phase = 2 * np.pi * np.cumsum(pitch * (1 + _PITCH_FALL * (0.5 - done))) / sample_rate
    numbers = np.arange(1, _HIGHEST_HZ // pitch + 1)
    harmonics = np.sin(np.outer(numbers, phase))
    first, last = (_VOWELS[variant // by % len(_VOWELS)] for by in (1, 7))
    sound = (1 - done) * (_gains(first, numbers * pitch) @ harmonics)
    sound += done * (_gains(last, numbers * pitch) @ harmonics)
    edges = np.minimum(1.0, (np.minimum(t, t[::-1]) + 1 / sample_rate) / _EDGE_SECONDS)
    return (_PEAK * edges * sound / np.abs(sound).max()).astype("<i2")


def _gains(
    vowel: tuple[tuple[float, float, float], ...], frequencies: NDArray[np.int_]
) -> NDArray[np.float64]:
    formants = [
        gain * np.exp(-(((frequencies - center) / width) ** 2)) for center, width, gain in vowel
    ]
    return np.sum(formants, axis=0)
