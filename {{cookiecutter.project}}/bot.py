"""One call, from pick-up to hang-up.

    python bot.py                      a browser, at http://localhost:7860
    python bot.py -t daily             a Daily room
    python bot.py -t twilio -x HOST    a phone number; HOST is the public name of this server
    python -m rehearsal                no account, no key

Pipecat Cloud calls `bot()` for every session, as the commands above do.
"""

import asyncio
import sys
from contextlib import suppress
from pathlib import Path

from loguru import logger
from pipecat.frames.frames import Frame, TTSSpeakFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker, ProcessorUnusablePolicy
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
from pipecat.runner.types import RunnerArguments
from pipecat.workers.runner import WorkerRunner

import config
import services
import tools
import transports
from conversation import endings, phrases, recovery, silence, turns, warm_up
from conversation.caller_words import CallerWords
