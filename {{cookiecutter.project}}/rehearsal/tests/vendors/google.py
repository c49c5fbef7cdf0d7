"""The vendor behind rehearsal/providers/google.py."""

from contextlib import AsyncExitStack
from typing import Any

from pipecat.services.llm_service import LLMService

from rehearsal.providers.google import GoogleServer
from rehearsal.tests.language_model_wire import KEY, PROMPT, LanguageModel


def create(url: str, _closing: AsyncExitStack) -> LLMService[Any]:
    from google.genai.types import HttpOptions, HttpRetryOptions
    from pipecat.services.google.llm import GoogleLLMService

    retries = HttpRetryOptions(attempts=3, initial_delay=0.5, max_delay=1.0, jitter=0.25)
    return GoogleLLMService(
        api_key=KEY,
        http_options=HttpOptions(base_url=url, retry_options=retries),
        settings=GoogleLLMService.Settings(system_instruction=PROMPT),
    )


VENDOR = LanguageModel(server=GoogleServer, create=create, refuses_a_key_with=400)
