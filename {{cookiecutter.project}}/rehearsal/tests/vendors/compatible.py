"""The vendor behind rehearsal/providers/openai.py."""

from contextlib import AsyncExitStack
from typing import Any

from pipecat.services.llm_service import LLMService

from rehearsal.providers.openai import OpenAIServer
from rehearsal.tests.language_model_wire import KEY, PROMPT, LanguageModel


def create(url: str, closing: AsyncExitStack) -> LLMService[Any]:
    from pipecat.services.openai.llm import OpenAILLMService

    class Closed(OpenAILLMService):
        def create_client(self, *args: Any, **kwargs: Any) -> Any:
            client = super().create_client(*args, **kwargs)
            closing.push_async_callback(client.close)
            return client

    llm = Closed(
        api_key=KEY,
        base_url=f"{url}/v1",
        settings=OpenAILLMService.Settings(model="any", system_instruction=PROMPT),
    )
    llm.supports_developer_role = False
    return llm


VENDOR = LanguageModel(server=OpenAIServer, create=create)
