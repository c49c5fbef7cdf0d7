"""The vendor behind rehearsal/providers/openai_stt.py."""

from pipecat.services.openai.stt import OpenAIRealtimeSTTService
from pipecat.services.stt_service import STTService
from pipecat.transcriptions.language import Language

from rehearsal.providers.openai_stt import OpenAIListenServer
from rehearsal.tests.recogniser_wire import KEY, Recogniser


def create(environment: dict[str, str]) -> STTService:
    return OpenAIRealtimeSTTService(
        api_key=KEY,
        base_url=environment["OPENAI_STT_BASE_URL"],
        settings=OpenAIRealtimeSTTService.Settings(language=Language.DE),
    )


VENDOR = Recogniser(
    server=OpenAIListenServer,
    create=create,
    asks_with="input_audio_buffer.commit",
    hears_at_hz=24000,
)
