"""Ears, brain and voice: the three services a call runs on. Swap one here and nowhere else.

Each factory imports its service when a call needs it. Every base URL can be pointed elsewhere by
environment: at a proxy, at a region, or at the rehearsal on this machine.
"""

from typing import TYPE_CHECKING, Any

from config import setting

if TYPE_CHECKING:
    from pipecat.services.llm_service import LLMService
    from pipecat.services.stt_service import STTService
    from pipecat.services.tts_service import TTSService

# A tool that has not answered by then is reported to the LLM as timed out. Pipecat's own default
# is to wait for ever, with the caller in silence.
TOOL_TIMEOUT_SECONDS = 10.0


def create_stt() -> "STTService":
    """Deepgram: speech to text."""
    from pipecat.services.deepgram.stt import DeepgramSTTService

    return DeepgramSTTService(
        api_key=setting("DEEPGRAM_API_KEY"),
        base_url=setting("DEEPGRAM_BASE_URL"),
        settings=DeepgramSTTService.Settings(
            model=setting("DEEPGRAM_MODEL", "nova-3-general"),
            language=setting("DEEPGRAM_LANGUAGE", "en"),
        ),
    )


def create_llm(instructions: str) -> "LLMService[Any]":
    """OpenAI: what to say next.

    Args:
        instructions: The system prompt, from prompt.md.
    """
    from pipecat.services.openai.llm import OpenAILLMService

    return OpenAILLMService(
        api_key=setting("OPENAI_API_KEY"),
        # Given in full, for the SDK takes a blank OPENAI_BASE_URL at its word.
        base_url=setting("OPENAI_BASE_URL", "https://api.openai.com/v1"),
        function_call_timeout_secs=TOOL_TIMEOUT_SECONDS,
        settings=OpenAILLMService.Settings(
            model=setting("OPENAI_MODEL", "gpt-4.1"),
            system_instruction=instructions,
        ),
    )


def create_tts() -> "TTSService":
    """Cartesia: text to speech."""
    from pipecat.services.cartesia.tts import CartesiaTTSService

    return CartesiaTTSService(
        api_key=setting("CARTESIA_API_KEY"),
        url=setting("CARTESIA_BASE_URL", "wss://api.cartesia.ai/tts/websocket"),
        settings=CartesiaTTSService.Settings(
            model=setting("CARTESIA_MODEL", "sonic-3.6"),
            # Cartesia has no default voice; this is the one Pipecat's own examples use.
            voice=setting("CARTESIA_VOICE_ID", "86e30c1d-714b-4074-a1f2-1cb6b552fb49"),
        ),
    )
