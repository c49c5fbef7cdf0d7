"""What the first caller would wait for, done before there is one.

A call imports the services it needs when it needs them, which keeps `import bot` quick. The first
call would pay for that with a second or two of silence.
"""

import gc
from functools import cache

from loguru import logger

import services
import transports
from conversation import outcome, phrases, turns
from conversation.floor import Floor
from roark import client
from telephony import transfer


@cache
def once() -> None:
    """Build what a call is made of and throw it away; of a process's calls only the first works.

    Raises:
        Exception: A setting makes no sense, or one of the services cannot be built; no call could
            be answered.
    """
    transfer.people()
    transfer.failover()
    for doubt in (*phrases.doubts(), *outcome.doubts()):
        logger.warning(f"{doubt[0].upper()}{doubt[1:]}")
    recogniser = services.create_stt()
    services.create_llm("")
    services.create_tts()
    services.memory_params()
    turns.params(Floor(), recogniser)
    transports.warm_up()
    client.warm_up()
    # All this stays: the collection after each call need not look at it (10 instead of 140 ms).
    gc.collect()
    gc.freeze()
