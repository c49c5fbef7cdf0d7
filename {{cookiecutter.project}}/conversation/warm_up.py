"""What the first caller would wait for, done before there is one, and what is left of old calls.

A call imports the services it needs when it needs them, which keeps `import bot` quick. The first
call would pay for that with a second or two of silence.
"""

import gc
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from loguru import logger

import config
import services
import transports
from conversation import outcome, phrases, turns
from roark import client, prices
from roark.outbox import outbox_from_environment
from telephony import transfer


@cache
def once() -> None:
    """Build what a call is made of and throw away what loads at once; works the first time only.

    What a process that died has left of its calls is delivered from now on, beside the new ones.

    Raises:
        Exception: A setting makes no sense, or one of the services cannot be built; no call could
            be answered.
    """
    # What is built stays: to look through it for garbage on the way takes a tenth of the time. The
    # collection after each call need not look at it either (10 instead of 140 ms).
    gc.disable()
    try:
        _build()
    finally:
        gc.enable()
    gc.freeze()
    outbox_from_environment()


def check_values() -> None:
    """Raise RuntimeError for the first setting that is not what it has to be."""
    from telephony import errand

    config.check_values()
    phrases.spoken()
    transfer.check_values()
    errand.check_values()
    prices.read_prices(config.setting("PRICES_FILE"))


def _build() -> None:
    check_values()
    for doubt in (*phrases.doubts(), *outcome.doubts()):
        logger.warning(f"To mind: {doubt}")
    recogniser = services.create_stt()
    with ThreadPoolExecutor(1) as beside:
        # While this thread imports the rest, the models are loaded.
        loading = [beside.submit(turns.prepare, recogniser), beside.submit(client.warm_up)]
        services.create_llm("")
        services.create_tts()
        services.memory_params()
        transports.warm_up()
        for one in loading:
            one.result()
