"""The vendor behind rehearsal/providers/assemblyai.py."""

from pipecat.services.assemblyai.stt import AssemblyAISTTService
from pipecat.services.stt_service import STTService
from pipecat.transcriptions.language import Language

from rehearsal.providers.assemblyai import AssemblyAIServer
from rehearsal.tests.recogniser_wire import KEY, Recogniser
from rehearsal.tests.service_pipeline import SAMPLE_RATE


def create(environment: dict[str, str]) -> STTService:
    return AssemblyAISTTService(
        api_key=KEY,
        api_endpoint_base_url=environment["ASSEMBLYAI_BASE_URL"],
        settings=AssemblyAISTTService.Settings(language_codes=[Language.DE]),
    )


VENDOR = Recogniser(
    server=AssemblyAIServer,
    create=create,
    asks_with="ForceEndpoint",
    hears_at_hz=SAMPLE_RATE,
    refuses_once_open=True,
    keeps_what_was_said=True,
)
