"""The vendor behind rehearsal/providers/elevenlabs.py."""

from typing import Any

from pipecat.services.elevenlabs.tts import ElevenLabsTTSService
from pipecat.services.tts_service import TTSService

from rehearsal.providers.elevenlabs import ElevenLabsServer
from rehearsal.tests.voice_wire import KEY, Voice


def create(environment: dict[str, str], **options: Any) -> TTSService:
    return ElevenLabsTTSService(
        api_key=KEY,
        url=environment["ELEVENLABS_BASE_URL"],
        settings=ElevenLabsTTSService.Settings(voice="voice"),
        **options,
    )


VENDOR = Voice(server=ElevenLabsServer, create=create, times_words=True)
