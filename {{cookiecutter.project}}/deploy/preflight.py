"""Opens each service once, with your keys, and says which of them would fail a caller.

    python -m preflight

The LLM is asked for one word and the voice says it, which costs next to nothing.
"""

import asyncio
import re
import sys
from textwrap import shorten
from typing import TYPE_CHECKING

from loguru import logger
from pipecat.frames.frames import ErrorFrame, Frame, LLMContextFrame, LLMTextFrame, TTSAudioRawFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.workers.runner import WorkerRunner

import config
import services

if TYPE_CHECKING:
    from loguru import Message

TIMEOUT_SECONDS = 20.0
REFUSAL_SECONDS = 1.0
# Why a service closed its socket Pipecat says nowhere else than in its log.
CLOSED = re.compile(r"(\S+) connection closed, but with an error: received (.+?); then sent")


async def check() -> dict[str, str]:
    """Return, for each service, what is wrong with it; "" if nothing is."""
    stt = services.create_stt()
    llm = services.create_llm("You are being tested.")
    tts = services.create_tts()
    worker = PipelineWorker(Pipeline([stt, llm, tts]), enable_rtvi=False)
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    works: set[FrameProcessor] = set()
    errors: dict[FrameProcessor, str] = {}
    closed: dict[str, str] = {}

    def note(message: "Message") -> None:
        if found := CLOSED.match(message.record["message"]):
            closed.setdefault(found[1], found[2])

    @worker.event_handler("on_pipeline_started")
    async def on_pipeline_started(_worker, _frame):
        # The recogniser has connected by then; the other two have to show what they can do. Some
        # let everybody in and say a moment later that the key is wrong.
        await asyncio.sleep(REFUSAL_SECONDS)
        if stt not in errors:
            works.add(stt)
            await finish_if_known()

    @worker.event_handler("on_pipeline_error")
    async def on_pipeline_error(_worker, frame: ErrorFrame):
        if frame.processor:
            category = frame.category.value if frame.category else "error"
            problem = closed.get(str(frame.processor)) or f"{category}: {frame.error}"
            errors.setdefault(frame.processor, shorten(problem, 120))
            works.discard(frame.processor)
            await finish_if_known()

    @llm.event_handler("on_before_push_frame")
    @tts.event_handler("on_before_push_frame")
    async def on_before_push_frame(service: FrameProcessor, frame: Frame):
        if isinstance(frame, LLMTextFrame if service is llm else TTSAudioRawFrame):
            works.add(service)
            await finish_if_known()

    async def finish_if_known() -> None:
        known = works | errors.keys()
        # Without an answer of the LLM the voice has nothing to say.
        if {stt, llm} <= known and (tts in known or llm in errors):
            await runner.cancel()

    context = LLMContext([{"role": "user", "content": "Say yes."}])
    await worker.queue_frame(LLMContextFrame(context))
    sink = logger.add(note, level="WARNING")
    try:
        await asyncio.wait_for(runner.run(), TIMEOUT_SECONDS)
    except TimeoutError:
        pass
    finally:
        logger.remove(sink)
    silent = "was not tried" if llm in errors else f"no answer in {TIMEOUT_SECONDS:g} s"
    return {
        type(service).__name__: "" if service in works else errors.get(service, silent)
        for service in (stt, llm, tts)
    }


def main() -> None:
    """Print one line per service; exit with status 1 if one of them fails."""
    config.exit_without_keys()
    logger.remove()
    results = asyncio.run(check())
    for service, problem in results.items():
        print(f"{service:24} {problem or 'works'}")
    sys.exit(1 if any(results.values()) else 0)


if __name__ == "__main__":
    main()
