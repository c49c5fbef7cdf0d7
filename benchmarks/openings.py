"""Who picked up: ours, Pipecat's VoicemailDetector and Twilio's documented rule, same openings.

The openings are spoken by Piper's voice in telephone quality, with pauses, beeps and tones. Silero
tells when there is a voice; the words are known, and come as a recogniser sends them: 0.4 s after
each word what is heard so far, 0.3 s after the voice fell silent the whole. Pipecat's detector is
the real class, in real time; in place of an LLM it asks the same word lists as ours, so that what
is compared is when and how it decides. Twilio's own model cannot be run here: "the rule of Twilio's
defaults" is what the documents of MachineDetection say (speech of 2.4 s is a machine's, 1.2 s of
silence after a shorter one a person's, 5 s of silence from the start nobody's).
"""

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from conversation.opening import LEAVE_MESSAGE, Listener, Tones, Who
from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.audio.vad.vad_analyzer import VADState
from pipecat.classifiers.base_classifier import BaseClassifier, ChoiceResult
from pipecat.extensions.voicemail.voicemail_detector import VoicemailDetector
from pipecat.frames.frames import (
    Frame,
    TranscriptionFrame,
    UserStartedSpeakingFrame,
    UserStoppedSpeakingFrame,
)
from pipecat.tests.utils import SleepFrame, run_test
from rehearsal.dial import beep
from rehearsal.engines.language_model import ScriptedAnswerer
from rehearsal.engines.local import LocalEngine

# Twilio's model runs at Twilio alone: what its documents say of it, in the columns of the table.
# https://www.twilio.com/docs/voice/answering-machine-detection has the seconds,
# https://www.twilio.com/docs/api/voice/answering-machine-detection, of the first engine, the 94 %.
DOCUMENTED = (
    "| Twilio's `MachineDetection`: not measured, it runs at Twilio alone; what it documents | "
    "all calls of a sample: 94 of 100 | no verdict of its own | one after 2.4 s of speech, or at "
    "the beep | fax; silence: `unknown` after 5 s | - | 1.2 |"
)
HZ = 8000
FRAME_SECONDS = 0.02
VAD_START, VAD_STOP = 0.2, 0.2
INTERIM_SECONDS, FINAL_SECONDS = 0.4, 0.3
# What comes after the opening: a machine records, a person waits.
AFTER_SECONDS = 11.0
Piece = str | float | tuple[float, float]
# What is said (text), how long it is quiet (seconds), which tone for how long (Hz, seconds).
OPENINGS: list[tuple[Who, Sequence[Piece]]] = [
    (Who.PERSON, [0.4, "Hello?"]),
    (Who.PERSON, [0.8, "Hi."]),
    (Who.PERSON, [0.3, "Yes?"]),
    (Who.PERSON, [1.5, "Hello, hello?"]),
    (Who.PERSON, [0.5, "Anna speaking."]),
    (Who.PERSON, [0.5, "Hello, this is Anna."]),
    (Who.PERSON, [0.5, "Good morning, Miller and Sons, Petra speaking. How can I help you?"]),
    (Who.PERSON, [0.7, "Hold on a second.", 0.9, "Yes, who is this?"]),
    (Who.PERSON, [0.6, "Hello?", 1.6, "Hello? Is anybody there?"]),
    (Who.PERSON, [0.5, "You have reached the Miller household, this is Tom."]),
    (Who.PERSON, [3.0, "Hello?"]),
    (Who.PERSON, [0.5, "What do you want? I am in the middle of something right now."]),
    (Who.SCREENING, [0.6, "May I ask who is calling, please?"]),
    (
        Who.SCREENING,
        [
            0.8,
            "Hi. If you record your name and reason for calling,",
            0.3,
            "I will see if this person is available.",
        ],
    ),
    (
        Who.SCREENING,
        [
            0.8,
            "The person you are calling is using a screening service. Go ahead and say your name "
            "and why you are calling.",
        ],
    ),
    (
        Who.SCREENING,
        [0.8, "Please say your name after the tone, and we will try to connect you.", (800, 0.3)],
    ),
    (
        Who.VOICEMAIL,
        [
            1.0,
            "Hi, this is Bob. I can't come to the phone right now. Leave a message after the beep.",
            0.6,
            (1000, 0.5),
        ],
    ),
    (
        Who.VOICEMAIL,
        [
            1.2,
            "You have reached the voicemail box of five five five, zero one two three. "
            "At the tone, please record your message.",
            0.8,
            (1400, 0.3),
        ],
    ),
    (
        Who.VOICEMAIL,
        [
            1.0,
            "The person you are trying to reach is not available. Please leave your message after "
            "the tone. When you have finished, hang up or press one for more options.",
            0.5,
            (440, 0.4),
        ],
    ),
    (Who.VOICEMAIL, [0.8, "Hi, this is Bob.", 1.5, "Leave me a message.", 0.7, (1000, 0.4)]),
    (Who.VOICEMAIL, [0.8, "Hey, it's Bob. You know what to do.", 1.0, (1000, 0.4)]),
    (Who.VOICEMAIL, [0.8, "Hello?", 1.4, "Just kidding, leave a message.", 0.6, (950, 0.3)]),
    (Who.VOICEMAIL, [1.0, "The mailbox is full and cannot accept any messages. Goodbye."]),
    (
        Who.VOICEMAIL,
        [1.0, "We are closed. Please leave your name, your number, and the reason for your call."],
    ),
    (Who.MENU, [0.8, "Thank you for calling. For sales, press one. For support, press two."]),
    (
        Who.MENU,
        [
            0.8,
            "Welcome to Miller and Sons. Your call may be recorded. If you know the extension, "
            "dial it now. To hear the main menu, press star.",
        ],
    ),
    (Who.MENU, [0.5, "If this is an emergency, press nine."]),
    (Who.FAX, [0.8, (2100, 3.0)]),
    (Who.NOBODY, []),
    (Who.NOBODY, ["noise"]),
]
# What is done about each.
TALK, MESSAGE, HANG_UP = "talk", "leave the message", "hang up"
DOES = {
    Who.PERSON: TALK,
    Who.SCREENING: TALK,
    Who.VOICEMAIL: MESSAGE,
    Who.MENU: HANG_UP,
    Who.FAX: HANG_UP,
    Who.NOBODY: HANG_UP,
}


@dataclass
class Heard:
    """An opening as it comes down the line.

    Attributes:
        pcm: Mono PCM16.
        events: (seconds, what, text): "began", "ended" of a voice; "interim", "final" words.
        first_ended: When the voice first fell silent; 0.0 without one.
    """

    pcm: bytes
    events: list[tuple[float, str, str]]
    first_ended: float


async def heard(engine: LocalEngine, pieces: Sequence[Piece]) -> Heard:
    """Say an opening, and hear it as the bot does."""
    pcm = b""
    words: list[tuple[float, str]] = []
    for piece in pieces:
        begin = len(pcm) / 2 / HZ
        if piece == "noise":
            noise = np.random.default_rng(7).normal(0, 60, 10 * HZ)
            pcm += noise.astype("<i2").tobytes()
        elif isinstance(piece, str):
            async for speech in engine.speak(piece, HZ):
                pcm += speech.pcm
                words += [(begin + word.end_s, word.text) for word in speech.words]
        elif isinstance(piece, tuple):
            pcm += beep(*piece, sample_rate=HZ)
        else:
            pcm += bytes(2 * round(piece * HZ))
    pcm += bytes(2 * round(AFTER_SECONDS * HZ))
    vad = SileroVADAnalyzer(sample_rate=HZ)
    vad.set_sample_rate(HZ)
    events: list[tuple[float, str, str]] = []
    speaks, sent = False, 0
    size = 2 * round(FRAME_SECONDS * HZ)
    for number in range(len(pcm) // size):
        at = (number + 1) * FRAME_SECONDS
        state = await vad.analyze_audio(pcm[number * size : (number + 1) * size])
        if state is VADState.SPEAKING and not speaks:
            speaks = True
            events.append((at, "began", ""))
        elif state is VADState.QUIET and speaks:
            speaks = False
            events.append((at, "ended", ""))
            said = [text for end, text in words[sent:] if end <= at]
            sent += len(said)
            if said:
                events.append((at + FINAL_SECONDS, "final", " ".join(said)))
    finals = [at for at, what, _ in events if what == "final"]
    for index, (end, _) in enumerate(words):
        at = end + INTERIM_SECONDS
        since = max((one for one in finals if one <= at), default=0.0)
        now = [text for other, text in words[: index + 1] if other + INTERIM_SECONDS > since]
        events.append((at, "interim", " ".join(now)))
    ended = [at - VAD_STOP for at, what, _ in events if what == "ended"]
    return Heard(pcm, sorted(events), min(ended, default=0.0))


def ours(opening: Heard) -> tuple[str, float]:
    """What is done at last, and when that was decided."""
    now = 0.0
    listener = Listener(clock=lambda: now)
    tones = Tones(listener)
    waiting = list(opening.events)
    verdict: tuple[Who | None, float] = (None, 0.0)
    size = 2 * round(FRAME_SECONDS * HZ)
    for number in range(len(opening.pcm) // size):
        now = (number + 1) * FRAME_SECONDS
        tones.feed(opening.pcm[number * size : (number + 1) * size], HZ)
        while waiting and waiting[0][0] <= now:
            _, what, text = waiting.pop(0)
            match what:
                case "began":
                    listener.speech_began(VAD_START)
                case "ended":
                    listener.speech_ended(VAD_STOP)
                case _:
                    listener.words(text, is_final=what == "final")
        if number % 5 == 0 and (who := listener.look()) and who is not verdict[0]:
            verdict = who, now
    who, at = verdict
    return (DOES[who] if who else "nothing"), at


class Words(BaseClassifier):
    """Answers by the word lists of ours, at once."""

    async def _ask(self, state, questions, images=()):  # type: ignore[override]
        choice = "voicemail" if LEAVE_MESSAGE.search(str(state)) else "conversation"
        answer = ChoiceResult(choice=choice, probabilities={choice: 1.0}, confidence=1.0)
        return dict.fromkeys(questions, answer), None


async def pipecats(opening: Heard) -> tuple[str, float]:
    """The same of Pipecat's detector, in real time."""
    verdict: list[tuple[str, float]] = []
    detector = VoicemailDetector(classifier=Words(), voicemail_response_delay=0.0)
    loop = asyncio.get_running_loop()
    began: list[float] = []

    @detector.event_handler("on_conversation_detected")
    async def on_conversation_detected(_detector):
        verdict.append((TALK, loop.time() - began[0]))

    @detector.event_handler("on_voicemail_detected")
    async def on_voicemail_detected(_detector):
        verdict.append((MESSAGE, loop.time() - began[0]))

    frames: list[Frame] = []
    at = 0.0
    for when, what, text in opening.events:
        frame = {
            "began": UserStartedSpeakingFrame,
            "ended": UserStoppedSpeakingFrame,
            "final": lambda text=text: TranscriptionFrame(text, "", ""),
        }.get(what)
        if frame:
            frames += [SleepFrame(sleep=when - at), frame()]
            at = when
    frames.append(SleepFrame(sleep=AFTER_SECONDS))
    began.append(loop.time())
    await run_test(detector, frames_to_send=frames)
    return verdict[-1] if verdict else ("nothing", 0.0)


def twilios_rule(opening: Heard) -> tuple[str, float]:
    """The same by the documented defaults of Twilio's MachineDetection."""
    began = 0.0
    for at, what, _ in opening.events:
        if what == "began":
            began = began or at - VAD_START
            if began > 5.0:
                break
        elif what == "ended":
            ended = at - VAD_STOP
            goes_on = any(
                when - VAD_START < ended + 1.2
                for when, other, _ in opening.events
                if other == "began" and when > at
            )
            if ended - began >= 2.4:
                return MESSAGE, began + 2.4
            if not goes_on:
                return TALK, ended + 1.2
    return "nothing", 5.0


async def _measure() -> str:
    engine = await LocalEngine.load(ScriptedAnswerer())
    openings = [(who, await heard(engine, pieces)) for who, pieces in OPENINGS]
    await engine.aclose()
    results = {
        "ours": [ours(opening) for _, opening in openings],
        "Pipecat's VoicemailDetector": await asyncio.gather(
            *(pipecats(opening) for _, opening in openings)
        ),
        "the rule of Twilio's defaults": [twilios_rule(opening) for _, opening in openings],
    }
    kinds = [(Who.PERSON, "people"), (Who.SCREENING, "screening"), (Who.VOICEMAIL, "voicemail")]
    lines = [
        "| right in the end | " + " | ".join(f"{name}" for _, name in kinds) + " | menu, fax, "
        "silence | all | s after a person's first words |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, verdicts in results.items():
        of_kind: dict[Who, list[bool]] = {}
        late: list[float] = []
        for (who, opening), (does, at) in zip(openings, verdicts, strict=True):
            of_kind.setdefault(who, []).append(does == DOES[who])
            if who is Who.PERSON and does == TALK:
                late.append(at - opening.first_ended)
            if does != DOES[who]:
                print(f"{name}: {does!r} for {who}: {OPENINGS[openings.index((who, opening))][1]}")
        cells = [f"{sum(of_kind[who])} of {len(of_kind[who])}" for who, _ in kinds]
        rest = [right for who in (Who.MENU, Who.FAX, Who.NOBODY) for right in of_kind[who]]
        every = [right for rights in of_kind.values() for right in rights]
        cells += [f"{sum(rest)} of {len(rest)}", f"{sum(every)} of {len(every)}"]
        cells.append(f"{statistics.median(late):.1f} (at most {max(late):.1f})" if late else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, DOCUMENTED])


def report() -> str:
    """Measure; returns the table."""
    return asyncio.run(_measure())
