"""Ears, brain and voice: the three services a call runs on. Swap one here and nowhere else.

Each factory imports its service when a call needs it. Every base URL can be pointed elsewhere by
environment: at a proxy, at a region, or at the rehearsal on this machine.
"""

# <% if false %>
# In the template each choice of the form stands here; only the last of each kind is in force.
# ruff: noqa: F811
# pyright: reportRedeclaration=false

# <% endif %>
import re
from typing import TYPE_CHECKING, Any

from config import setting

if TYPE_CHECKING:
    from pipecat.processors.aggregators.llm_response_universal import LLMAssistantAggregatorParams
    from pipecat.services.llm_service import LLMService
    from pipecat.services.stt_service import STTService
    from pipecat.services.tts_service import TTSService

# A tool that has not answered by then is reported to the LLM as timed out. Pipecat's own default
# is to wait for ever, with the caller in silence.
TOOL_TIMEOUT_SECONDS = 10.0
# A conversation this long, about a quarter of an hour, is summarised while it goes on; its last
# messages stay as they are. It keeps the LLM fast and cheap.
CONTEXT_TOKENS = 8000
SUMMARY_TOKENS = 2000
KEPT_MESSAGES = 10
SUMMARY_TIMEOUT_SECONDS = 30.0

LINK = re.compile(r"(?:https?://|www\.)(?:www\.)?([\w.-]*\w)(?:[/?#:](?:\S*[^\s.,;:!?)])?)?")


# <% if cookiecutter.stt == "deepgram" %>
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


# <% endif %>
# <% if cookiecutter.llm == "openai" %>
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


# <% endif %>
# <% if cookiecutter.tts == "cartesia" %>
def create_tts() -> "TTSService":
    """Cartesia: text to speech."""
    from pipecat.services.cartesia.tts import CartesiaTTSService
    from pipecat.utils.text.transforms import strip_markdown

    return CartesiaTTSService(
        api_key=setting("CARTESIA_API_KEY"),
        url=setting("CARTESIA_BASE_URL", "wss://api.cartesia.ai/tts/websocket"),
        settings=CartesiaTTSService.Settings(
            model=setting("CARTESIA_MODEL", "sonic-3.6"),
            # Cartesia has no default voice; this is the one Pipecat's own examples use.
            voice=setting("CARTESIA_VOICE_ID", "86e30c1d-714b-4074-a1f2-1cb6b552fb49"),
        ),
        # Models write for eyes now and then, whatever the prompt says.
        text_transforms=[("*", strip_markdown), ("*", name_links)],
    )


# <% endif %>
async def name_links(text: str, _type: object) -> str:
    """Leave of every web address its site's name: nobody wants to hear the rest."""
    return LINK.sub(r"\1", text)


def memory_params() -> "LLMAssistantAggregatorParams":
    """How much of a long call the LLM is told word by word."""
    from pipecat.processors.aggregators.llm_response_universal import LLMAssistantAggregatorParams
    from pipecat.utils.context.llm_context_summarization import (
        LLMAutoContextSummarizationConfig,
        LLMContextSummaryConfig,
    )

    return LLMAssistantAggregatorParams(
        enable_auto_context_summarization=True,
        auto_context_summarization_config=LLMAutoContextSummarizationConfig(
            max_context_tokens=int(setting("CONTEXT_TOKENS", str(CONTEXT_TOKENS))),
            max_unsummarized_messages=None,
            summary_config=LLMContextSummaryConfig(
                target_context_tokens=SUMMARY_TOKENS,
                min_messages_after_summary=KEPT_MESSAGES,
                summarization_timeout=SUMMARY_TIMEOUT_SECONDS,
            ),
        ),
    )
