"""Ten calls at once in one process of the bot: each is its own, in words and in sound.

The bot has a process of its own. Every caller says a name, and the bot says it back as its goodbye
and hangs up. What carries the name from one to the other is its sound: the caller's audio is told
apart at the recogniser, and the bot's at the caller and in the recording. On the way back it is the
argument of a tool, so that nothing of a call can be swapped for another's unnoticed: not what the
LLM is told, nor what a tool remembers.
"""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import RECORDS_AUDIO
from numpy.typing import NDArray
from rehearsal.callers.caller import Caller, Utterance
from rehearsal.callers.twilio import TwilioCaller
from rehearsal.callers.webrtc import WebRTCCaller
from rehearsal.engines.engine import Heard, Speech, TextDelta, ToolCall
from rehearsal.engines.scripted import Answer, Script, ScriptedEngine, ScriptedRecogniser
from rehearsal.host.bot_process import BotProcess, run_bot
from rehearsal.providers.all import serve
from rehearsal.providers.roark import ReceivedCall, RoarkReceiver
from rehearsal.providers.server import free_port

pytestmark = pytest.mark.anyio

NAMES = (
    "Alexandria Bartholomew Cassiopeia Demosthenes Evangeline Ferdinando Giuseppina Hildegarde "
    "Immaculata Jacqueline"
).split()
GREETING = "Hello."
SENTENCE = "Yes hello, this is {name} can you hear me?"
"""Silero hears one voice in it from end to end, after any silence; in a bare name it may not."""
SECONDS = 90.0
"""What anything may take on a busy machine before the test gives up."""
SLOWNESS = 2.0
"""Ten callers at their own pace are more than two cores carry beside other tests."""
DIALLING_SECONDS, SPEAKING_SECONDS = 0.3, 0.4
"""Between one caller and the next: some speak while others are silent, so that both show."""
HZ = 8000
LOUD_RMS = 1000.0
TONES_HZ = range(3100, 3600, 100)
"""Above the voice. Three of the five tell a name by its sound, through mu-law, Opus and gaps."""
CODES: dict[str, tuple[int, ...]] = dict(
    zip(NAMES, itertools.combinations(TONES_HZ, 3), strict=True)
)
SHORTEST_SECONDS = 0.2
CALLERS_TONE_PEAK, BOTS_TONE_PEAK = 400, 2000
"""Of 32767. In a louder tone Silero hears no voice; the bot's is heard by nobody but this test."""


def _with_tones(name: str, peak: int, pcm: bytes, sample_rate: int, first: int) -> bytes:
    """Lay the tones of `name` over a piece of its sound that begins at sample `first`."""
    samples = np.frombuffer(pcm, "<i2").astype(np.float64)
    at = (np.arange(len(samples)) + first) / sample_rate
    for hz in CODES[name]:
        samples += peak * np.sin(2 * np.pi * hz * at)
    return np.clip(samples, -32768, 32767).astype("<i2").tobytes()


def name_in(samples: NDArray[np.int16], sample_rate: int) -> str:
    """Return the name whose tones are the loudest in `samples`; "" if too little is to be heard."""
    piece = sample_rate // 50
    pieces = samples[: len(samples) // piece * piece].reshape(-1, piece).astype(np.float64)
    pieces = pieces[np.sqrt(np.mean(pieces**2, axis=1)) > LOUD_RMS]
    # Of so little the tones are not told from the voice.
    if len(pieces) < SHORTEST_SECONDS * sample_rate / piece:
        return ""
    # A piece of 20 ms has a bin every 50 Hz, so that each tone has its own.
    strength = np.abs(np.fft.rfft(pieces * np.hanning(piece), axis=1)).mean(axis=0)
    loudest = sorted(TONES_HZ, key=lambda hz: strength[hz // 50])[-3:]
    return next(name for name, code in CODES.items() if set(code) == set(loudest))


class NameRecogniser(ScriptedRecogniser):
    """Hears which name was said, once the bot says that the caller is done.

    That the caller is silent it does not tell by itself, as Deepgram would: the call's own voice
    detector has to.
    """

    def __init__(self, sample_rate: int) -> None:
        super().__init__(("Somebody",), sample_rate)
        self._sample_rate = sample_rate
        self._audio = bytearray()
        self._only_listens = False

    async def feed(self, pcm: bytes) -> list[Heard]:
        """Keep the audio for the moment when the speech is over."""
        self._audio += pcm
        self._only_listens = True
        heard = await super().feed(pcm)
        self._only_listens = False
        return heard

    async def finalize(self) -> list[Heard]:
        """Return the name instead of the script's words."""
        if self._only_listens:
            return []
        return [self._named(heard) for heard in await super().finalize()]

    def _named(self, heard: Heard) -> Heard:
        first = round(heard.start_s * self._sample_rate)
        last = first + round(heard.duration_s * self._sample_rate)
        samples = np.frombuffer(bytes(self._audio), "<i2")[first:last]
        return replace(heard, text=name_in(samples, self._sample_rate))


class NameEngine(ScriptedEngine):
    """Ends the call with the name that it heard.

    Attributes:
        conversations: The names in what the LLM was asked to answer, one set for every request.
    """

    def __init__(self) -> None:
        answers = (Answer(heard=n, calls=(ToolCall("end_call", {"goodbye": n}),)) for n in NAMES)
        super().__init__(Script(greeting=GREETING, answers=tuple(answers)))
        self.conversations: list[set[str]] = []

    def listen(self, sample_rate: int) -> NameRecogniser:
        """Return a recogniser for one call."""
        return NameRecogniser(sample_rate)

    def think(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> AsyncIterator[TextDelta | ToolCall]:
        """Answer, and note who was spoken of."""
        text = json.dumps(messages)
        self.conversations.append({name for name in NAMES if name in text})
        return super().think(messages, tools)

    async def speak(self, text: str, sample_rate: int) -> AsyncIterator[Speech]:
        """Say `text` with the tones of the name in it."""
        name = next((name for name in NAMES if name in text), None)
        peak = BOTS_TONE_PEAK if text == name else CALLERS_TONE_PEAK
        samples = 0
        async for piece in super().speak(text, sample_rate):
            sound = piece.pcm
            if name:
                sound = _with_tones(name, peak, sound, sample_rate, samples)
            samples += len(sound) // 2
            yield replace(piece, pcm=sound)


@dataclass
class Harness:
    """The running bot and its world."""

    bot: BotProcess
    roark: RoarkReceiver
    engine: NameEngine

    def caller(self, number: int) -> Caller:
        """One in three calls from a browser, which costs the machine as much as several phones."""
        if number % 3 == 2:
            return WebRTCCaller(self.bot.url)
        return TwilioCaller(self.bot.url.replace("http", "ws", 1) + "/ws")


@asynccontextmanager
async def run_harness(calls_dir: Path) -> AsyncIterator[Harness]:
    """Start everything."""
    engine = NameEngine()
    async with serve(engine) as providers, RoarkReceiver() as roark:
        environment = {
            **providers.environment,
            "ROARK_BASE_URL": roark.url,
            "ROARK_API_KEY": "rehearsal",
            "CALLS_DIR": str(calls_dir),
            # Those who wait for the others on the line are not to be asked whether they are there,
            # nor those whose words are late on a busy machine what they said.
            "SILENCE_SECONDS": "0",
            # Twice slower than life, on a busy machine: a bot that takes 8 s has not failed.
            "ANSWER_SECONDS": "60",
            # More than this machine can hold well, and all from one number.
            "MAX_CALLS": "0",
            "MAX_CALLS_PER_CALLER": "0",
        }
        async with run_bot("webrtc", free_port(), environment) as bot:
            yield Harness(bot, roark, engine)


@pytest.mark.slow(seconds=25)
async def test_ten_calls_at_once_are_each_their_own(tmp_path: Path) -> None:
    async with run_harness(tmp_path / "calls") as harness:
        everybody = asyncio.Barrier(len(NAMES))

        async def call(number: int, name: str) -> str:
            await asyncio.sleep(number * DIALLING_SECONDS)
            line = harness.caller(number)
            line.slowness = SLOWNESS
            async with line as caller:
                await caller.hear(within=SECONDS)
                await caller.hear_out(quiet=0.5, within=SECONDS)
                # Nobody speaks before all are on the line.
                await everybody.wait()
                await asyncio.sleep(number * SPEAKING_SECONDS)
                pieces = [p.pcm async for p in harness.engine.speak(SENTENCE.format(name=name), HZ)]
                said = await caller.say(b"".join(pieces), HZ)
                await caller.hear(since=said.end, within=SECONDS)
                await asyncio.wait_for(caller.ended.wait(), SECONDS)
                return name_in(*_heard_since(caller, said))

        # Where one call fails the others, who wait for it, are called off.
        async with asyncio.timeout(4 * SECONDS), asyncio.TaskGroup() as everyone:
            calls_held = [everyone.create_task(call(n, name)) for n, name in enumerate(NAMES)]
        assert [held.result() for held in calls_held] == NAMES
        assert max(map(len, harness.engine.conversations)) == 1

        calls = harness.roark.calls
        received = [await harness.roark.complete(each, timeout=SECONDS) for each in list(calls)]
        assert sorted(_name_on(each) for each in received) == NAMES
        if RECORDS_AUDIO:
            for each in received:
                name = _name_on(each)
                assert _names_in_recording(each) == {"user": name, "assistant": name}


def _heard_since(caller: Caller, said: Utterance) -> tuple[NDArray[np.int16], int]:
    samples = np.frombuffer(caller.heard.pcm(), "<i2")
    rate = caller.heard.sample_rate
    return samples[-round((caller.heard.end - said.end) * rate) :], rate


def _name_on(call: ReceivedCall) -> str:
    """The one name of a call's transcript: said by the caller, and said back."""
    assert call.whole and call.ended
    assert call.ended["callEndedReason"] == "agent-ended"
    said = {
        (entry["role"], word)
        for entry in call.ended["transcript"]
        for word in entry["content"].split()
    }
    # Where a machine stands still a sentence may be in two, and the bot ask for one of them again,
    # for which the script has the greeting. Nobody ever says another's name.
    names = said - {("assistant", GREETING)}
    (name,) = {word for _, word in names}
    assert names == {("user", name), ("assistant", name)}
    assert ("assistant", GREETING) in said
    return name


def _names_in_recording(call: ReceivedCall) -> dict[str, str]:
    """The name that is heard on each one's track."""
    assert call.ended
    tracks = np.frombuffer(call.recording, "<i2").reshape(-1, 2)
    rate = call.ended["recordingSampleRate"]
    return {role: name_in(tracks[:, n], rate) for n, role in enumerate(("user", "assistant"))}
