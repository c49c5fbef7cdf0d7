"""A rehearsed call out: the bot calls somebody, or something, and a stand-in picks up or does not.

The command is the project's own, `python -m telephony call`. Twilio's REST API answers on this
machine (`providers/twilio_rest.py`), and who picks up connects with the bot as its TwiML says.
"""

import asyncio
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from dotenv import dotenv_values

from rehearsal.call import Voice, words_file
from rehearsal.callers.twilio import TwilioCaller
from rehearsal.engines.scripted import Answer, Script
from rehearsal.host.bot_process import PROJECT, user_settings
from rehearsal.providers.twilio_rest import Callee

CALLEES = ("person", "voicemail", "screening", "busy", "declined", "no-answer", "silent")
NUMBER, FROM_NUMBER = "+4930123456", "+4930654321"
# Long enough for who asks once a second to see it.
RINGS_SECONDS = 1.5
# From picking up to the first word; of a voicemail a little more.
HELLO_AFTER_SECONDS, GREETING_AFTER_SECONDS = 0.6, 1.0
BEEP_HZ, BEEP_SECONDS, BEEP_PEAK = 1000, 0.4, 9000
HEARS_SECONDS = 30.0
# A bot that is silent for so long has finished.
QUIET_SECONDS = 1.5
VOICE_HZ = 8000

ENVIRONMENT = {
    "TWILIO_ACCOUNT_SID": "AC" + "0" * 32,
    "CALL_FROM": FROM_NUMBER,
    "CALL_PREFIXES": NUMBER[:3],
    "CALL_HOURS": "00-24",
    "TRANSFER_TO": "",
    "TRANSFER_ON_FAILURE": "",
}
"""What calling out needs, besides the auth token of this Twilio."""


@dataclass(frozen=True, kw_only=True)
class Words:
    """What is said, in one language.

    Attributes:
        reason: What the call is about.
        person, voicemail, screening: What each of them says, one sentence after the other.
        answer: What the bot replies to a person, where a script thinks.
    """

    reason: str
    person: list[str]
    voicemail: list[str]
    screening: list[str]
    answer: str

    def of(self, callee: str) -> list[str]:
        """What this callee says; nothing of those who do not speak."""
        said = {"person": self.person, "voicemail": self.voicemail, "screening": self.screening}
        return said.get(callee, [])

    def script(self, callee: str) -> Script:
        """For a recogniser and a brain that know it all; what sounds after that has no words."""
        return Script(hears=(*self.of(callee), ""), answers=(Answer(says=self.answer),))


def words(language: str) -> Words:
    """The words of a language; English ones where there are none."""
    return Words(**tomllib.loads(words_file("dial", language).read_text(encoding="utf-8")))


def greeting_to_callees() -> dict[str, str]:
    """CALL_GREETING as it comes, where the user has not set one yet."""
    if user_settings().get("CALL_GREETING") is not None:
        return {}
    return {"CALL_GREETING": dotenv_values(PROJECT / "env.example").get("CALL_GREETING") or ""}


def who_is_called(
    kind: str, voices: list[Voice], tell: Callable[[str], None], *, rings_s: float = RINGS_SECONDS
) -> Callee:
    """One of CALLEES, who says `voices`; `tell` is given what happens at their end."""
    if kind in ("busy", "no-answer"):
        return Callee(does=kind, rings_s=rings_s)
    if kind == "declined":
        return Callee(does="busy", sip_code="603", rings_s=rings_s)
    phone = TwilioCaller("")

    async def talks() -> None:
        if kind != "silent":
            after = GREETING_AFTER_SECONDS if kind == "voicemail" else HELLO_AFTER_SECONDS
            await phone.say(bytes(2 * round(after * VOICE_HZ)), VOICE_HZ)
            # What breaks off here: the bot has hung up.
            with suppress(OSError):
                await _say(phone, kind, voices, tell)
        with suppress(TimeoutError):
            await asyncio.wait_for(phone.ended.wait(), HEARS_SECONDS)
        if not phone.ended.is_set():
            tell("They hang up.")
        await phone.hang_up()

    return Callee(phone, talks=talks, rings_s=rings_s)


async def _say(
    phone: TwilioCaller, kind: str, voices: list[Voice], tell: Callable[[str], None]
) -> None:
    for number, voice in enumerate(voices):
        said = await phone.say(voice.pcm, voice.sample_rate)
        if kind == "voicemail":
            await phone.say(beep(), VOICE_HZ)
            tell("The voicemail has said its greeting, and beeps.")
        else:
            tell(f"They have said: {voice.source}")
        heard = await phone.hear(within=HEARS_SECONDS)
        if kind != "voicemail":
            tell(f"The bot is heard after {heard.start - said.end:.2f} s.")
        until = await phone.hear_out(quiet=QUIET_SECONDS)
        if kind == "voicemail":
            tell(f"A message of {until - heard.start:.1f} s is left.")
        elif number == len(voices) - 1 and not phone.ended.is_set():
            tell("They hang up.")
            await phone.hang_up()


def beep(hz: float = BEEP_HZ, seconds: float = BEEP_SECONDS, sample_rate: int = VOICE_HZ) -> bytes:
    """A tone, mono PCM16."""
    t = np.arange(round(seconds * sample_rate)) / sample_rate
    return (BEEP_PEAK * np.sin(2 * np.pi * hz * t)).astype("<i2").tobytes()
