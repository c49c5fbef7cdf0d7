"""The bot does not begin to speak before the client can play it, nor while the caller sounds.

A pause may be taken for the end of a turn, and the answer be ready when the caller goes on. Whether
that is a word or a cough is known half a second later; people wait for it before they speak.
"""

import asyncio
from contextlib import suppress

from pipecat.frames.frames import (
    BotStoppedSpeakingFrame,
    Frame,
    InterruptionFrame,
    TTSAudioRawFrame,
    TTSTextFrame,
)
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor

from conversation.floor import Floor

# Speech has taken the turn by then, and its interruption has dropped the answer. What still makes a
# sound is no speech: a street, a television.
LONGEST_HOLD_SECONDS = 1.0
LOOK_EVERY_SECONDS = 0.02


class Hold(FrameProcessor):
    """Holds an answer's first sound, and all behind it; to be placed before the transport's output.

    An interruption drops what is held, as whatever else is on its way.
    """

    def __init__(self, floor: Floor, client_ready: asyncio.Event) -> None:
        """Ask `floor` who makes a sound; hold the first of all until `client_ready` is set."""
        super().__init__()
        self._floor = floor
        self._client_ready = client_ready
        self._has_begun = False

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Pass everything on; the first sound when the caller is silent."""
        await super().process_frame(frame, direction)
        match frame:
            # Its first word may come before its sound, and would be taken for heard.
            case TTSAudioRawFrame() | TTSTextFrame() if not self._has_begun:
                await self._client_ready.wait()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._silence(), LONGEST_HOLD_SECONDS)
                self._has_begun = True
            case BotStoppedSpeakingFrame() | InterruptionFrame():
                self._has_begun = False
            case _:
                pass
        await self.push_frame(frame, direction)

    async def _silence(self) -> None:
        floor = self._floor
        # A greeting is not held: it answers the "hello?" that it begins into.
        while floor.caller_sounds and not (floor.is_greeting or floor.may_be_echo):
            await asyncio.sleep(LOOK_EVERY_SECONDS)
