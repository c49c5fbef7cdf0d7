"""A harness for calls in tests: the project's bot in this process, and the world it talks to.

The bot runs under the base image's contract, on a real port; the providers, Roark and the callers
are the rehearsal's, on real sockets of 127.0.0.1.
"""

import asyncio
import json
import time
import wave
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from numpy.typing import NDArray

import bot
import services
from rehearsal import stand_ins
from rehearsal.callers.caller import Caller, Utterance
from rehearsal.callers.loopback_ice import keep_ice_on_loopback
from rehearsal.callers.twilio import TwilioCaller
from rehearsal.callers.webrtc import WebRTCCaller
from rehearsal.engines.engine import Speech, TextDelta, ToolCall
from rehearsal.engines.scripted import Script, ScriptedEngine, ScriptedRecogniser
from rehearsal.host.base_image import BaseImage, Session, serve
from rehearsal.providers.all import Providers, wire, wires
from rehearsal.providers.all import serve as serve_providers
from rehearsal.providers.roark import ReceivedCall, RoarkReceiver
from rehearsal.providers.server import HOST, ProviderServer

RECORDS_AUDIO = "roark.audio_processor" in Path(bot.__file__).read_text(encoding="utf-8")
SECONDS = 30.0
"""What anything may take on a busy machine before its test gives up."""
VOICE_HZ = 16000
NOT_SET = (
    *("TWILIO_ACCOUNT_SID", "TWILIO_AUTH_TOKEN", "MESSAGE_URL", "TRANSFER_TO"),
    *("GREETING", "TIMEZONE", "TRANSFER_ON_FAILURE", "SPECULATE", "PATIENCE_SECONDS"),
)
"""What a test of calls sets for itself, if it does, whatever the owner has."""


class ListenedTo(ScriptedEngine):
    """A scripted engine that remembers what the bot's services asked of it.

    Attributes:
        asked: The conversations to answer, each a list of messages as OpenAI writes them.
        spoken: The texts to say, in order.
        hears_at_hz: The sample rates of the recognisers, one for each connection.
        speaks_at_hz: The sample rates of the texts to say.
    """

    def __init__(self) -> None:
        """Play the default script."""
        super().__init__(Script())
        self.asked: list[list[dict[str, Any]]] = []
        self.spoken: list[str] = []
        self.hears_at_hz: list[int] = []
        self.speaks_at_hz: list[int] = []

    def listen(self, sample_rate: int) -> ScriptedRecogniser:
        """Return a recogniser at the beginning of the script."""
        self.hears_at_hz.append(sample_rate)
        return super().listen(sample_rate)

    def think(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> AsyncIterator[TextDelta | ToolCall]:
        """Give the script's answer, word by word."""
        self.asked.append(messages)
        return super().think(messages, tools)

    def speak(self, text: str, sample_rate: int) -> AsyncIterator[Speech]:
        """Say `text`, as the script's voice does."""
        self.spoken.append(text)
        self.speaks_at_hz.append(sample_rate)
        return super().speak(text, sample_rate)


@cache
def classes() -> dict[str, str]:
    """The names of the classes that calls run on, for "stt", "llm" and "tts".

    Those that services.py builds; what has no server in the rehearsal has another stand in.
    """
    instead = {kind: own.speaks_to[0] for kind, own in stand_ins.missing().items() if own}
    return {kind: stand_ins.built(kind) for kind in stand_ins.KINDS} | instead


def server_of(providers: Providers, kind: str) -> ProviderServer:
    """Return the server behind the bot's "stt", "llm" or "tts"; skip where there is none."""
    name = classes()[kind]
    if name not in providers.by_service:
        pytest.skip(f"{name} asks no server")
    return providers.by_service[name]


def skip_unless_scripted() -> None:
    """Skip the test where a script cannot say what the bot hears, or no call can be held."""
    if alone := [kind for kind, own in stand_ins.missing().items() if own is None]:
        pytest.skip(f"the rehearsal has no server for {stand_ins.built(alone[0])}")
    if not any(classes()["stt"] in wire(name).speaks_to for name in wires()):
        pytest.skip(f"{classes()['stt']} hears what is said, not what a script says")


def skip_where_the_recogniser_ends_turns() -> None:
    """Skip a test of the pauses of turn_end.py, which then have no part in a call."""
    if classes()["stt"] == "DeepgramFluxSTTService":
        pytest.skip("the recogniser decides when the caller's turn begins and ends")


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the factories of services for which the rehearsal has no server."""
    for name, factory in stand_ins.replacements().items():
        monkeypatch.setattr(services, name, factory)


def turns_of(call: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Who spoke, one after the other, and the entries of the transcript in which they did.

    What a busy machine broke up with a pause is one turn.
    """
    by_role = groupby(call["transcript"], key=itemgetter("role"))
    return [(role, list(entries)) for role, entries in by_role]


@dataclass
class Harness:
    """The running bot and its world.

    Attributes:
        url: The bot's address.
        calls_dir: Where its calls are kept.
    """

    url: str
    calls_dir: Path
    image: BaseImage
    engine: ListenedTo
    providers: Providers
    roark: RoarkReceiver

    def server(self, kind: str) -> ProviderServer:
        """Return the server behind the bot's "stt", "llm" or "tts"; skip where there is none."""
        return server_of(self.providers, kind)

    @property
    def spoken(self) -> list[str]:
        """The texts the bot's voice was asked to say; skips where no server is asked."""
        self.server("tts")
        return self.engine.spoken

    def caller(self, transport: str, **options: Any) -> Caller:
        """Return a caller on "twilio" or "webrtc", not yet connected."""
        if transport == "twilio":
            phone = TwilioCaller(self.url.replace("http", "ws", 1) + "/ws", **options)
            self.providers.twilio.phones[phone.call_sid] = phone
            return phone
        return WebRTCCaller(self.url, **options)

    async def say(self, caller: Caller, words: str = "whatever the script hears") -> Utterance:
        """Let the caller speak; what is heard of it is the script's business."""
        pieces = [piece.pcm async for piece in ScriptedEngine().speak(words, VOICE_HZ)]
        return await caller.say(b"".join(pieces), VOICE_HZ)

    async def hear_greeting(self, caller: Caller) -> None:
        """Wait until the bot has greeted and is silent."""
        await caller.hear(within=SECONDS)
        await caller.hear_out(quiet=0.5, within=SECONDS)

    async def ask(self, caller: Caller, words: str = "whatever the script hears") -> Utterance:
        """Let the caller speak, and the bot answer to its end; returns what was said."""
        said = await self.say(caller, words)
        await caller.hear(since=said.end, within=SECONDS)
        await caller.hear_out(quiet=0.5, within=SECONDS)
        return said

    async def hear_said(self, caller: Caller, sentence: str) -> None:
        """Wait until the bot was given `sentence` to say, said it and fell silent."""
        await self.providers.log.until(
            lambda: sentence in [text.strip() for text in self.spoken], within_s=SECONDS
        )
        given_at = time.monotonic()
        async with asyncio.timeout(SECONDS):
            while not any(heard.end > given_at for heard in caller.heard.utterances):
                await asyncio.sleep(0.02)
        await caller.hear_out(quiet=1.0, within=SECONDS)

    async def over(self, number: int = 0) -> Session:
        """Wait until `bot()` has returned from its n-th session."""

        async def returned() -> Session:
            while len(self.image.sessions) <= number:
                await asyncio.sleep(0.01)
            await self.image.sessions[number].returned.wait()
            return self.image.sessions[number]

        return await asyncio.wait_for(returned(), SECONDS)

    @property
    def received(self) -> ReceivedCall:
        """The one call that Roark has heard of."""
        (call,) = self.roark.calls.values()
        return call

    @property
    def folder(self) -> Path:
        """Where the one call is kept on disk."""
        (record,) = self.calls_dir.glob("*/call.json")
        return record.parent

    @property
    def record(self) -> dict[str, Any]:
        """The call record of the one call, as it is on disk."""
        return json.loads((self.folder / "call.json").read_text(encoding="utf-8"))

    def recording(self) -> tuple[NDArray[np.int16], int]:
        """The WAV on disk: samples of shape (n, 2), caller left and bot right, and their rate."""
        with wave.open(str(self.folder / "recording.wav")) as file:
            assert file.getnchannels() == 2
            pcm = file.readframes(file.getnframes())
            return np.frombuffer(pcm, dtype="<i2").reshape(-1, 2), file.getframerate()


@asynccontextmanager
async def serve_app(app: Any, port: int) -> AsyncIterator[None]:
    """Serve an ASGI application on 127.0.0.1."""
    server = uvicorn.Server(uvicorn.Config(app, HOST, port, log_level="warning"))
    serving = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(SECONDS):
            while not server.started:
                await asyncio.sleep(0.02)
        yield
    finally:
        server.should_exit = True
        await serving


@asynccontextmanager
async def run_harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Harness]:
    """Start everything, and point the bot's environment at it."""
    skip_unless_scripted()
    keep_ice_on_loopback()
    engine = ListenedTo()
    calls_dir = tmp_path / "calls"
    async with serve_providers(engine) as providers, RoarkReceiver() as roark:
        # As in the image, ENV is not set.
        monkeypatch.delenv("ENV", raising=False)
        for name in NOT_SET:
            monkeypatch.delenv(name, raising=False)
        world = {
            **providers.environment,
            "ROARK_BASE_URL": roark.url,
            "ROARK_API_KEY": "rehearsal",
            "CALLS_DIR": str(calls_dir),
            # The machine may be busy; how long a caller is kept waiting is test_recovery's.
            "ANSWER_SECONDS": str(SECONDS),
        }
        for name, value in world.items():
            monkeypatch.setenv(name, value)
        stand_in(monkeypatch)
        # The platform sends no caller before.
        assert bot.readyz()["ready"]
        image = BaseImage(bot)
        async with serve(image) as url:
            yield Harness(url, calls_dir, image, engine, providers, roark)
