"""The vendor behind rehearsal/providers/deepgram_tts.py."""

from typing import Any

from pipecat.services.deepgram.tts import DeepgramTTSService
from pipecat.services.tts_service import TTSService

from rehearsal.providers.deepgram_tts import DeepgramSpeakServer
from rehearsal.tests.voice_wire import KEY, Voice


def create(environment: dict[str, str], **options: Any) -> TTSService:
    return DeepgramTTSService(api_key=KEY, base_url=environment["DEEPGRAM_TTS_BASE_URL"], **options)


VENDOR = Voice(server=DeepgramSpeakServer, create=create, times_words=False)
