"""Twilio's media stream, as strangers may send it."""

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import numpy as np
from loguru import logger
from pipecat.audio.utils import create_stream_resampler, pcm_to_ulaw
from pipecat.frames.frames import Frame
from pipecat.serializers.twilio import TwilioFrameSerializer

# Heard as "busy" in North America; elsewhere by its rhythm. Twilio's <Reject> needs a webhook.
BUSY_HZ, BUSY_SECONDS, BUSY_TIMES = (480, 620), 0.5, 4
TELEPHONE_HZ = 8000
# As which a message counts that is shorter, or no sound: Twilio's last twice as long.
MESSAGE_SECONDS = 0.01
# A line that has brought so many is none of Twilio's.
MAX_DROPPED = 10_000


async def play_busy_tone(send: Callable[[str], Awaitable[None]], stream_sid: str) -> None:
    """Let the caller at the other end of a media stream hear that the line is busy."""
    times = np.arange(round(BUSY_SECONDS * TELEPHONE_HZ)) / TELEPHONE_HZ
    tone = sum(np.sin(2 * np.pi * hz * times) for hz in BUSY_HZ) * 6000
    pcm = np.concatenate([tone, np.zeros_like(tone)] * BUSY_TIMES).astype("<i2").tobytes()
    resampler = create_stream_resampler()
    mulaw = await pcm_to_ulaw(pcm, TELEPHONE_HZ, TELEPHONE_HZ, resampler)
    media = {"payload": base64.b64encode(mulaw).decode()}
    await send(json.dumps({"event": "media", "streamSid": stream_sid, "media": media}))
    # Twilio plays it while the stream is open.
    await asyncio.sleep(2 * BUSY_TIMES * BUSY_SECONDS)


def _seconds(message: dict[str, Any]) -> float:
    sound = len(message["media"]["payload"]) * 3 / 4 if message["event"] == "media" else 0
    return max(sound / TELEPHONE_HZ, MESSAGE_SECONDS)


class MediaStreamSerializer(TwilioFrameSerializer):
    """Pipecat's serializer, for which a message that makes no sense is no reason to end the call.

    Nor is one too many; ten thousand are.

    Attributes:
        dropped: How many messages made no sense, or were more than a line brings.
    """

    def __init__(
        self,
        *args: Any,
        hang_up: Callable[[], Awaitable[None]],
        takes: Callable[[float], bool],
        **options: Any,
    ) -> None:
        """Take what Pipecat's serializer takes.

        Args:
            args: Of Pipecat's serializer.
            hang_up: Closes the stream. Twilio's `stop` says that the caller is gone; its socket may
                stay open.
            takes: Whether the line may bring so many seconds more.
            options: Of Pipecat's serializer.
        """
        super().__init__(*args, **options)
        self.dropped = 0
        self._hang_up = hang_up
        self._takes = takes
        self._hanging_up: asyncio.Future[None] | None = None

    @property
    def is_hopeless(self) -> bool:
        """Whether the call was ended for what its line brought."""
        return self.dropped >= MAX_DROPPED

    @property
    def can_hang_up(self) -> bool:
        """Whether the end of the pipeline hangs up on the caller; not once they are handed over."""
        return self._params.auto_hang_up

    @can_hang_up.setter
    def can_hang_up(self, wanted: bool) -> None:
        # Pipecat has no other way to change it later; the tests of a transfer fail where it moves.
        self._params.auto_hang_up = wanted

    async def deserialize(self, data: str | bytes) -> Frame | None:
        """Return the frame of a message; None where it has none, or cannot be understood."""
        try:
            message = json.loads(data)
            if message["event"] == "stop":
                self._hang_up_once()
            elif self._takes(_seconds(message)):
                return await super().deserialize(data)
            else:
                self._drop("too many")
        # Whatever a stranger's message does to a parser.
        except Exception as error:
            self._drop(type(error).__name__)
        return None

    def _drop(self, why: str) -> None:
        self.dropped += 1
        # The first, the tenth, the hundredth: nobody fills the log.
        if str(self.dropped).strip("0") == "1":
            logger.warning(
                f"Dropped a message of the media stream ({why}), number {self.dropped} of this call"
            )
        if self.is_hopeless:
            self._hang_up_once()

    def _hang_up_once(self) -> None:
        # Not awaited: closing waits for a peer that may not answer.
        self._hanging_up = self._hanging_up or asyncio.ensure_future(self._close())

    async def _close(self) -> None:
        # Twilio may have closed it first, as it does once a call has new instructions.
        with suppress(Exception):
            await self._hang_up()
