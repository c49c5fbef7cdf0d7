"""A stage for calls in tests: the project's bot in this process, and the world it talks to.

The bot runs under the base image's contract, on a real port; the providers, Roark and the callers
are the rehearsal's, on real sockets of 127.0.0.1.
"""

import asyncio
import json
import wave
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import bot
from rehearsal.base_image import BaseImage, Session, serve
from rehearsal.caller import Caller, Utterance
from rehearsal.loopback_ice import keep_ice_on_loopback
from rehearsal.providers import Providers
from rehearsal.providers import serve as serve_providers
from rehearsal.roark import ReceivedCall, RoarkReceiver
from rehearsal.script import Script, ScriptedEngine
from rehearsal.twilio_caller import TwilioCaller
from rehearsal.webrtc_caller import WebRTCCaller

RECORDS_AUDIO = "roark.audio_processor" in Path(bot.__file__).read_text(encoding="utf-8")
SECONDS = 30.0
"""What anything may take on a busy machine before its test gives up."""
VOICE_HZ = 16000


@dataclass
class Stage:
    """The running bot and its world.

    Attributes:
        url: The bot's address.
        calls_dir: Where its calls are kept.
    """

    url: str
    calls_dir: Path
    image: BaseImage
    engine: ScriptedEngine
    providers: Providers
    roark: RoarkReceiver

    def caller(self, transport: str, **options: Any) -> Caller:
        """Return a caller on "twilio" or "webrtc", not yet connected."""
        if transport == "twilio":
            return TwilioCaller(self.url.replace("http", "ws", 1) + "/ws", **options)
        return WebRTCCaller(self.url, **options)

    async def say(self, caller: Caller, words: str = "whatever the script hears") -> Utterance:
        """Let the caller speak; what is heard of it is the script's business."""
        pieces = [piece.pcm async for piece in self.engine.speak(words, VOICE_HZ)]
        return await caller.say(b"".join(pieces), VOICE_HZ)

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
async def set_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Stage]:
    """Start everything, and point the bot's environment at it."""
    keep_ice_on_loopback()
    engine = ScriptedEngine(Script())
    calls_dir = tmp_path / "calls"
    async with serve_providers(engine) as providers, RoarkReceiver() as roark:
        # As in the image, ENV is not set.
        monkeypatch.delenv("ENV", raising=False)
        for name in ("TWILIO_ACCOUNT_SID", "TWILIO_AUTH_TOKEN", "MESSAGE_URL"):
            monkeypatch.delenv(name, raising=False)
        world = {
            **providers.environment,
            "ROARK_BASE_URL": roark.url,
            "ROARK_API_KEY": "rehearsal",
            "CALLS_DIR": str(calls_dir),
        }
        for name, value in world.items():
            monkeypatch.setenv(name, value)
        image = BaseImage(bot)
        async with serve(image) as url:
            yield Stage(url, calls_dir, image, engine, providers, roark)
