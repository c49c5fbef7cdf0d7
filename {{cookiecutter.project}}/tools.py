"""What the LLM may do besides talking.

A tool is an async function: its name, its docstring and its typed arguments are what the LLM
sees. To add one, write it and put it into `offered()`.
"""

import asyncio
import ssl
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

from loguru import logger
from pipecat.adapters.llm.schemas.direct_function import DirectFunction, tool_options
from pipecat.adapters.llm.schemas.tools_schema import ToolsSchema
from pipecat.frames.frames import FunctionCallResultProperties, TTSSpeakFrame
from pipecat.services.llm_service import FunctionCallParams

from config import setting
from conversation import phrases
from conversation.endings import Ending
from telephony.transfer import NotTransferred, Transfer, ending_of, people

# Shorter than services.TOOL_TIMEOUT_SECONDS, so that the LLM hears what went wrong.
MESSAGE_SECONDS = 5.0
# Together with transfer.REQUEST_SECONDS too: what the caller is told before they are handed over.
ANNOUNCEMENT_SECONDS = 5.0


@dataclass
class CallState:
    """What the tools of one call remember. Reached as `params.app_resources`.

    Parameters:
        read_back: The message last read back to the caller, as (message, callback number).
        read_back_after: How many times the caller had spoken by then.
        ending: Ends the call.
        transfer: Hands the call over to a person; None where the line cannot.
    """

    read_back: tuple[str, str] | None = None
    read_back_after: int = 0
    ending: Ending | None = None
    transfer: Transfer | None = None


def offered() -> ToolsSchema:
    """The tools of a call: those to which somebody or something belongs only where it is there."""
    tools: list[DirectFunction] = [end_call]
    if setting("MESSAGE_URL"):
        tools.append(take_message)
    if people():
        tools.append(transfer_call)
    return ToolsSchema(tools)


@cache
def _tls_context() -> ssl.SSLContext:
    """Made once and in a thread: reading all certificates would hold up every call for 100 ms."""
    import httpx

    return httpx.create_ssl_context()


async def end_call(params: FunctionCallParams, goodbye: str):
    """End the call. Use it when the caller says goodbye or has nothing more to ask.

    Args:
        goodbye: The last sentence the caller hears, for example "Goodbye, and have a nice day."
    """
    await params.result_callback(
        {"status": "ending"}, properties=FunctionCallResultProperties(run_llm=False)
    )
    call: CallState = params.app_resources
    if call.ending:
        # An LLM that has said goodbye in the same answer does not say it twice.
        words = [] if call.ending.floor.has_text else [TTSSpeakFrame(goodbye)]
        call.ending.after(*words, reason="agent-ended", detail="the LLM called end_call")


# Cancelled by a caller who speaks: until Twilio is asked they may take it back. What it was asked
# for goes on, and telephony/transfer.py sees to the line.
async def transfer_call(params: FunctionCallParams, name: str, summary: str):
    """Hand the caller over to a person, after they have agreed to it.

    Args:
        name: Who, by one of the names in your instructions.
        summary: What the caller has told you, in one or two sentences. If nobody answers, it is
            all that you will remember of the call.
    """
    call: CallState = params.app_resources
    if call.transfer is None:
        await params.result_callback(
            {
                "error": "This caller is not on a phone line that can be handed over. Say so, and "
                "what you can do instead."
            }
        )
        return
    if name not in people():
        names = ", ".join(people())
        await params.result_callback({"error": f"There is no {name!r}. There is: {names}."})
        return
    # Not into the context, where it would come after what this tool returns.
    announcement = TTSSpeakFrame(phrases.spoken().transferring, append_to_context=False)
    await params.pipeline_worker.queue_frame(announcement)
    with suppress(TimeoutError):
        flushed = params.pipeline_worker.flush_pipeline(ANNOUNCEMENT_SECONDS)
        await asyncio.wait_for(flushed, ANNOUNCEMENT_SECONDS)
    try:
        await call.transfer.to(name, summary)
    except NotTransferred as reason:
        await params.result_callback(
            {"error": f"Not handed over: {reason}. Apologise, and say what you can do instead."}
        )
        return
    await params.result_callback(
        {"status": "handed over"}, properties=FunctionCallResultProperties(run_llm=False)
    )
    if call.ending:
        await call.ending.now(*ending_of(name))


# What cannot be undone is not cancelled by a caller who speaks meanwhile, and so not done twice.
@tool_options(cancel_on_interruption=False)
async def take_message(params: FunctionCallParams, message: str, callback_number: str):
    """Take a message for the team. Call it once to get the text to read back to the caller, and
    once more with the same arguments after the caller has agreed to it.

    Args:
        message: What the caller wants to tell the team, in one or two sentences.
        callback_number: The number to call back, digits only.
    """
    # Here, not above: it would be a tenth of `import bot`. warm_up.py has loaded it by now.
    import httpx

    state: CallState = params.app_resources
    times_spoken = sum(
        isinstance(entry, dict) and entry.get("role") == "user"
        for entry in params.context.get_messages()
    )
    # An LLM that is sure of itself would skip the question, so the caller must really have spoken
    # between hearing the message and its being sent.
    if state.read_back != (message, callback_number) or times_spoken <= state.read_back_after:
        state.read_back, state.read_back_after = (message, callback_number), times_spoken
        await params.result_callback(
            {"status": "not sent yet", "do": "read the message and number back, ask if it is right"}
        )
        return
    state.read_back = None
    try:
        tls = await asyncio.to_thread(_tls_context)
        # The timeout of httpx is for each step; this one is for the whole.
        async with asyncio.timeout(MESSAGE_SECONDS), httpx.AsyncClient(verify=tls) as http:
            response = await http.post(
                setting("MESSAGE_URL"),
                json={"message": message, "callback_number": callback_number},
            )
            response.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
        logger.warning(f"take_message failed: {type(error).__name__}")
        await params.result_callback(
            {"error": "The message could not be saved. Apologise and ask them to call again later."}
        )
        return
    await params.result_callback({"status": "sent"})
