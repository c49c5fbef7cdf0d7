"""A rehearsed transfer: a caller who asks for a person, and what they hear when she is busy.

Everything goes by Twilio as it plays TwiML (`providers/twilio_rest.py`): the webhook, the stream,
the bot's new instructions, the call to the colleague, and the way back. Words are by script, for
whatever the language, no keyless language model hands a caller over.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress

import aiohttp

from rehearsal.call import (
    ANSWER_WAIT_SECONDS,
    GREETING_SECONDS,
    Answered,
    NoAnswer,
    Voice,
    words_file,
)
from rehearsal.callers.twilio import TwilioCaller
from rehearsal.engines.engine import Engine, Speech
from rehearsal.engines.scripted import Script, ScriptedEngine, ScriptedRecogniser
from rehearsal.host.bot_process import BotProcess
from rehearsal.providers.twilio_rest import Colleague, TwilioServer

# What `--transfer` takes, and what Twilio calls it.
OUTCOMES = {"answers": "completed", "busy": "busy", "no-answer": "no-answer"}
COLLEAGUE = "+4930123456"
RINGS_SECONDS = 1.0
TALKS_SECONDS = 3.0
# A bot that is silent for so long has finished.
QUIET_SECONDS = 1.5

ENVIRONMENT = {
    "TWILIO_ACCOUNT_SID": "AC" + "0" * 32,
    "TRANSFER_TO": f"anna={COLLEAGUE}",
    "TRANSFER_ON_FAILURE": "",
}
"""What the bot needs for it, besides the auth token of this Twilio."""


class Dialogue(ScriptedEngine):
    """A script that is spoken by another engine's voice.

    Attributes:
        voice: The engine that speaks.
    """

    def __init__(self, script: Script, voice: Engine) -> None:
        """Play `script`; takes over `voice`."""
        super().__init__(script)
        self.name = voice.name
        self.voice = voice
        self._ears = 0

    def listen(self, sample_rate: int) -> ScriptedRecogniser:
        """Return a recogniser; that of the next stream goes on behind what the last one heard."""
        hears = self.script.hears[self._ears :]
        self._ears = min(self._ears + 1, len(self.script.hears) - 1)
        return ScriptedRecogniser(hears, sample_rate)

    def speak(self, text: str, sample_rate: int) -> AsyncIterator[Speech]:
        """Say `text`."""
        return self.voice.speak(text, sample_rate)

    async def aclose(self) -> None:
        """Give back what the voice holds."""
        await self.voice.aclose()


def script(language: str) -> Script:
    """The words of the transfer, in English where there are none of this language."""
    return Script.load(words_file("transfer", language))


async def be_handed_over(
    bot: BotProcess,
    twilio: TwilioServer,
    does: str,
    voices: Sequence[Voice],
    tell: Callable[[str], None],
) -> list[Answered]:
    """Call the bot, ask for a person, and hear what comes of it.

    Args:
        bot: Started with `-x` and its own address.
        twilio: Plays its TwiML.
        does: What comes of calling the colleague, one of OUTCOMES.
        voices: What the caller says: that they want a person, and then to a bot that is back.
        tell: Is given the progress.

    Returns:
        The answers of the bot after it was back.

    Raises:
        NoAnswer: The bot did not take the call, hand it over, or come back.
    """
    asking, answering = voices
    talks = TALKS_SECONDS if does == "answers" else None
    twilio.colleagues[COLLEAGUE] = Colleague(OUTCOMES[does], RINGS_SECONDS, talks)
    caller = TwilioCaller(bot.url.replace("http", "ws", 1) + "/ws")
    answers: list[Answered] = []
    try:
        await twilio.ring(caller, bot.url.replace("http:", "https:", 1) + "/")
        tell("Twilio has fetched the bot's TwiML, and opens the stream.")
        await caller.hear(within=GREETING_SECONDS)
        await caller.hear_out(quiet=QUIET_SECONDS)
        tell(f"The caller asks for a person: {asking.source}")
        await caller.say(asking.pcm, asking.sample_rate)
        async with asyncio.timeout(ANSWER_WAIT_SECONDS):
            while not twilio.dialled:
                await asyncio.sleep(0.05)
        tell(f"Twilio dials anna at {COLLEAGUE}; it rings.")
        async with asyncio.timeout(ANSWER_WAIT_SECONDS):
            while twilio.children[caller.call_sid][0]["status"] == "ringing":
                await asyncio.sleep(0.05)
        if does == "answers":
            tell(f"She answers, and is told: {' '.join(twilio.whispered) or 'nothing'}")
            await asyncio.wait_for(caller.ended.wait(), ANSWER_WAIT_SECONDS)
            tell("They have talked; she hangs up, and Twilio ends the call.")
            return answers
        tell(f"Twilio tells the bot: {OUTCOMES[does]}. The caller is connected with it again.")
        since = time.monotonic()
        await caller.hear(since=since, within=ANSWER_WAIT_SECONDS)
        await caller.hear_out(quiet=QUIET_SECONDS)
        tell(f"The caller answers: {answering.source}")
        said = await caller.say(answering.pcm, answering.sample_rate)
        answer = await caller.hear(within=ANSWER_WAIT_SECONDS)
        at = time.time() - (time.monotonic() - answer.start)
        answers.append(Answered(at, answer.start - said.end))
        await caller.hear_out(quiet=QUIET_SECONDS)
        tell("The caller hangs up.")
        return answers
    except (aiohttp.ClientError, OSError) as error:
        raise NoAnswer(f"The transfer broke off: {error or type(error).__name__}.") from error
    finally:
        with suppress(aiohttp.ClientError, OSError):
            await caller.hang_up()
