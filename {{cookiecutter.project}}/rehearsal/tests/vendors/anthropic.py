"""The vendor behind rehearsal/providers/anthropic.py."""

from contextlib import AsyncExitStack
from typing import Any

from pipecat.services.llm_service import LLMService

from rehearsal.providers.anthropic import AnthropicServer
from rehearsal.tests.language_model_wire import KEY, PROMPT, LanguageModel


def create(
    url: str, closing: AsyncExitStack, *, calls_one_at_a_time: bool = True
) -> LLMService[Any]:
    from anthropic import APIRequest, AsyncAnthropic, AsyncAPIResponse, AsyncCallNext
    from pipecat.services.anthropic.llm import AnthropicLLMService

    async def one_call(request: APIRequest, call_next: AsyncCallNext) -> AsyncAPIResponse[Any]:
        body = request.json
        if isinstance(body, dict) and body.get("tools"):
            choice = {"type": "auto", "disable_parallel_tool_use": True}
            request = request.copy(body={**body, "tool_choice": choice})
        return await call_next(request)

    middleware = [one_call] if calls_one_at_a_time else []
    client = AsyncAnthropic(api_key=KEY, base_url=url, middleware=middleware)
    closing.push_async_callback(client.close)
    return AnthropicLLMService(
        api_key=KEY,
        client=client,
        settings=AnthropicLLMService.Settings(system_instruction=PROMPT),
    )


VENDOR = LanguageModel(server=AnthropicServer, create=create, calls_in_parallel=False)
