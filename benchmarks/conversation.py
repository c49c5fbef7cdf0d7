"""How the two bots take turns with people: with pauses, numbers, coughs, noise and echo.

    python -m benchmarks.conversation --subject ours --transport twilio --rows "no pause,0.6 s"

A person-like caller says human recordings, whose words and times are known, to our bot and to the
one that `pipecat init` writes, at the same time and on the same providers. The recogniser is one
that knows the words and is as late as it is told to be; the LLM names in each answer the request
that it answers, so that from what was audible at the caller's end it can be told what of the
caller's words the bot had when it spoke. With `--ear local` a small recogniser hears in its place:
a check that what is found does not hang on words that come as they are told to.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from difflib import SequenceMatcher
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zlib import crc32

import numpy as np
import soxr
from conversation.floor import spoken_words
from loguru import logger
from numpy.typing import NDArray
from rehearsal.callers.caller import Caller, Utterance
from rehearsal.engines.engine import Recogniser, Speech, TextDelta, ToolCall, Word
from rehearsal.engines.language_model import ScriptedAnswerer
from rehearsal.engines.local import LocalEngine
from rehearsal.engines.scripted import ScriptedEngine
from rehearsal.providers.all import Providers, serve
from rehearsal.providers.cartesia import CartesiaServer
from rehearsal.providers.roark import RoarkReceiver

from benchmarks.images import default_project
from benchmarks.known_words import (
    RECOGNISER_HZ,
    KnownWordsEngine,
    KnownWordsRecogniser,
    Phrase,
    joined,
)
from benchmarks.material import DIGITS, SPELLED, in_groups, recordings, synthetic
from benchmarks.person import (
    Echo,
    Person,
    Said,
    Saying,
    babble,
    rms,
    white_noise,
    without_words,
)
from benchmarks.speed import (
    OURS,
    SCAFFOLD,
    TRANSPORTS,
    Bot,
    Running,
    environment_of,
    our_bot,
    p95,
    running,
    scaffolds_bot,
)

PATIENT_SECONDS = 1.0
PATIENT = f"{OURS}, PATIENCE_SECONDS={PATIENT_SECONDS:g}"
SURE = f"{OURS}, SPECULATE=no"
FLUX = f"{OURS}, Deepgram Flux"
BOTH = {"ours": OURS, "scaffold": SCAFFOLD}
SUBJECTS = {**BOTH, "patient": PATIENT, "sure": SURE, "flux": FLUX}
SETTINGS = {PATIENT: {"PATIENCE_SECONDS": str(PATIENT_SECONDS)}, SURE: {"SPECULATE": "no"}}

FINAL_SECONDS, LLM_SECONDS, VOICE_SECONDS = 0.1, 0.45, 0.15
"""What the providers take: the last words, the first token and the first sound."""
BOTH_AT_ONCE_SECONDS = 0.5
LATE_SECONDS = 2.0
"""An answer that comes later than this, without what the providers take, is late."""

SECONDS = 30.0
"""What a greeting may take on a busy machine."""
AT_ONCE = 2
"""Calls at a time: more of them, with the bots, are too many for two cores."""

BEGIN, END, MARK_SECONDS, MARK_RMS = "Answer", "Endof", 0.45, 3000.0
MIDDLE = "that has been noted and will be taken care of"
HEARD_SHARE = 0.5
"""So many of a phrase's words a small recogniser has right, of 1, where it heard the phrase."""
UNHEARD_SECONDS = 0.2
"""The fading end of an answer, without which it is whole all the same."""
VOICE_HZ = 16000


@dataclass(frozen=True)
class Request:
    """One time that the LLM was asked.

    Attributes:
        at: When, seconds on `time.monotonic`.
        asked: What the caller said since the bot's last answer, as the LLM was told.
        name: The first word of the answer, which tells it from all others.
    """

    at: float
    asked: str
    name: str

    @property
    def end(self) -> str:
        """The answer's last word, as unique."""
        return f"{self.name.replace(BEGIN, END)}."


class Witness(KnownWordsEngine):
    """Hears known words, answers with a name, and remembers what it was asked.

    Attributes:
        requests: Of the call that is up.
        ear: Hears in its place, and is wrong at times.
    """

    def __init__(
        self,
        phrases: Sequence[Phrase],
        *,
        llm_s: float = LLM_SECONDS,
        ear: LocalEngine | None = None,
    ) -> None:
        super().__init__(phrases)
        self._llm_s = llm_s
        self.requests: list[Request] = []
        self.ear = ear

    def listen(self, sample_rate: int) -> Recogniser:  # type: ignore[override]
        """Return a fresh recogniser for audio of `sample_rate` Hz."""
        return self.ear.listen(sample_rate) if self.ear else super().listen(sample_rate)

    async def think(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> AsyncIterator[TextDelta | ToolCall]:
        """Answer with a name of its own whatever is asked."""
        number = len(self.requests)
        # Letters only: figures may be spoken as words.
        letters = f"{chr(ord('a') + number // 26)}{chr(ord('a') + number % 26)}"
        request = Request(time.monotonic(), _asked(messages), f"{BEGIN}{letters}")
        self.requests.append(request)
        await asyncio.sleep(self._llm_s)
        for index, word in enumerate((request.name, *MIDDLE.split(), request.end)):
            yield TextDelta(f" {word}" if index else word)

    async def speak(self, text: str, sample_rate: int) -> AsyncGenerator[Speech]:
        """Say `text` as the scripted engine does, but for the marks: each has its own noise."""
        begin, pieces = 0.0, list[Speech]()
        for word in text.split():
            if is_mark(word):
                pieces.append(_mark(word, sample_rate, begin))
            else:
                # Not super(): the recognisers are to know whole pieces only, no single words.
                async for piece in ScriptedEngine.speak(self, word, sample_rate):
                    (spoken,) = piece.words
                    timed = Word(word, begin + spoken.start_s, begin + spoken.end_s)
                    pieces.append(Speech(piece.pcm, (timed,)))
            begin += len(pieces[-1].pcm) / 2 / sample_rate
        if self.hears_itself and pieces:
            self.phrases.append(joined(pieces, sample_rate))
        for piece in pieces:
            yield piece


def is_mark(word: str) -> bool:
    """Whether a word of an answer is its first or its last one."""
    return word.startswith((BEGIN, END))


def _mark(word: str, sample_rate: int, begin: float) -> Speech:
    """Return the sound of a mark, which is like no other; the same at every rate."""
    seed = crc32(word.rstrip(".,").encode())
    noise = np.random.default_rng(seed).normal(0.0, MARK_RMS, round(MARK_SECONDS * RECOGNISER_HZ))
    pcm = soxr.resample(noise, RECOGNISER_HZ, sample_rate).astype("<i2").tobytes()
    return Speech(pcm, (Word(word.rstrip(".,"), begin, begin + MARK_SECONDS),))


def _asked(messages: list[dict[str, Any]]) -> str:
    """Return what the caller said since the bot spoke last."""
    said: list[str] = []
    for message in reversed(messages):
        if message["role"] == "assistant":
            break
        if message["role"] == "user":
            said.insert(0, message["content"])
    return " ".join(" ".join(said).split())


@dataclass(frozen=True)
class Audible:
    """Something that the caller heard the bot say.

    Attributes:
        start: When it began, seconds on `time.monotonic`.
        request: What it answers.
        is_whole: Whether its last word was heard.
    """

    start: float
    request: Request
    is_whole: bool


@dataclass
class Call:
    """What is known of a call when it is over.

    Attributes:
        said: What the person said.
        sounds: What else they let be heard, beside it.
        audible: What they heard of answers, in order.
        requests: Every time the LLM was asked.
        providers_s: What the providers take of the time to an answer, seconds.
        hello: What they said into the greeting.
        spoken: When the bot was audible.
        is_verbatim: Whether the recogniser is never wrong.
    """

    said: list[Said]
    sounds: list[Said]
    audible: list[Audible]
    requests: list[Request]
    providers_s: float
    hello: Said | None = None
    spoken: Sequence[Utterance] = ()
    is_verbatim: bool = True

    def asked(self, request: Request, said: Said) -> str:
        """Return what of `said` was asked with `request`, as it was said."""
        phrases = said.saying.phrases
        return request.asked if self.is_verbatim else in_known_words(request.asked, phrases)


@dataclass
class Verdict:
    """What became of one utterance; times in seconds, None where there was no answer."""

    cut_in: bool = False
    half: bool = False
    lost: bool = False
    doubled: bool = False
    late: bool = False
    interrupted: bool = False
    unasked: bool = False
    answered_after: float | None = None
    reacted_after: float | None = None
    requests: int = 0
    story: str = ""


def in_known_words(heard: str, phrases: Sequence[Phrase]) -> str:
    """Return those of `phrases` that a recogniser which is wrong at times has heard, in order."""
    words = spoken_words(heard)
    found: list[tuple[int, str]] = []
    for phrase in phrases:
        known = phrase.text.lower().split()
        blocks = SequenceMatcher(None, words, known, autojunk=False).get_matching_blocks()
        if sum(block.size for block in blocks) >= HEARD_SHARE * len(known):
            found.append((blocks[0].a, phrase.text))
    return " ".join(text for _, text in sorted(found))


async def heard_answers(engine: Witness, caller: Caller) -> list[Audible]:
    """Tell by their sound which answers the caller heard."""
    marks = [mark for request in engine.requests for mark in (request.name, request.end)]
    phrases = [joined([_mark(mark, VOICE_HZ, 0.0)], VOICE_HZ) for mark in marks]
    recogniser = KnownWordsRecogniser(phrases, caller.sample_rate, final_s=0.0, pause_s=0.5)
    names = {request.name: request for request in engine.requests}
    found: list[Audible] = []
    heard: list[Word] = []
    second = 2 * caller.sample_rate
    pcm = caller.heard.pcm() + bytes(second)
    for at in range(0, len(pcm), second // 10):
        for result in await recogniser.feed(pcm[at : at + second // 10]):
            heard += result.words() if result.is_final else []
    for result in await recogniser.finalize():
        heard += result.words()
    for word in heard:
        if word.text in names:
            start = caller.heard.start + word.start_s
            found.append(Audible(start, names[word.text], is_whole=False))
        elif found and word.text == found[-1].request.end.rstrip("."):
            found[-1] = replace(found[-1], is_whole=True)
    # Through Opus the last word of one of two answers is not told; it was heard for as long.
    whole_s = await _answer_seconds() - UNHEARD_SECONDS
    for index, audible in enumerate(found):
        lasts = [u.end - audible.start for u in caller.heard.utterances if u.end > audible.start]
        found[index] = replace(
            audible, is_whole=audible.is_whole or min(lasts, default=0) >= whole_s
        )
    # Sound that was cut off before it could be told is the answer to the request before it.
    told = {audible.request.name for audible in found}
    for spoken in caller.heard.utterances:
        is_told = any(spoken.start - 0.1 <= a.start <= spoken.end + 0.1 for a in found)
        before = [request for request in engine.requests if request.at < spoken.start]
        # What goes on after a hole is no new answer.
        if not is_told and before and before[-1].name not in told:
            found.append(Audible(spoken.start, before[-1], is_whole=False))
    return sorted(found, key=lambda audible: audible.start)


async def _answer_seconds() -> float:
    """Return how long an answer lasts that nobody interrupts."""
    pieces = [
        piece for word in MIDDLE.split() async for piece in ScriptedEngine().speak(word, VOICE_HZ)
    ]
    return 2 * MARK_SECONDS + sum(len(piece.pcm) for piece in pieces) / 2 / VOICE_HZ


def judge(call: Call) -> list[Verdict]:
    """Say what became of each utterance."""
    ends = [said.start for said in call.said[1:]] + [float("inf")]
    verdicts = [_judge(call, said, end) for said, end in zip(call.said, ends, strict=True)]
    return [_judge_hello(call, call.hello), *verdicts] if call.hello else verdicts


def _judge_hello(call: Call, said: Said) -> Verdict:
    """Say whether a "hello?" at pick-up is greeted whole, and not talked over."""
    end = call.said[0].start if call.said else float("inf")
    here = [audible for audible in call.audible if audible.start < end]
    whole = [audible for audible in here if audible.is_whole]
    both_s = sum(
        max(0.0, min(said.end, spoken.end) - max(said.start, spoken.start))
        for spoken in call.spoken
    )
    verdict = Verdict(
        cut_in=both_s > BOTH_AT_ONCE_SECONDS,
        lost=not whole,
        doubled=len(whole) > 2,
        interrupted=len(whole) < len(here),
        answered_after=whole[0].start - said.end if whole else None,
        requests=sum(request.at < end for request in call.requests),
    )
    verdict.story = f"hello, both at once for {both_s:.2f} s; " + "; ".join(
        f"heard at {a.start - said.end:+.2f} {a.request.name}{'' if a.is_whole else ' CUT'}"
        for a in here
    )
    return verdict


def _judge(call: Call, said: Said, end: float) -> Verdict:
    words, last = said.saying.text, said.saying.phrases[-1].text
    here = [audible for audible in call.audible if said.start < audible.start < end]
    asked = [request for request in call.requests if said.start < request.at < end]
    answers = [a for a in here if call.asked(a.request, said).endswith(last)]
    half = [
        audible
        for audible in here
        if any(p.text in call.asked(audible.request, said) for p in said.saying.phrases)
        and not call.asked(audible.request, said).endswith(words)
    ]
    first = answers[0].start - said.end if answers else None
    sounds = [sound for sound in call.sounds if said.end < sound.end < end]
    reacted = [
        audible.start - sounds[0].end
        for audible in here
        if sounds and audible.start > sounds[0].end
    ]
    verdict = Verdict(
        cut_in=any(audible.start < said.end for audible in here),
        half=bool(half),
        lost=not answers,
        doubled=len(answers) > 1,
        late=first is not None and first > LATE_SECONDS + call.providers_s,
        interrupted=any(a.start > said.end and not a.is_whole for a in here),
        unasked=any(audible not in answers and audible not in half for audible in here),
        answered_after=first,
        reacted_after=reacted[0] if reacted else None,
        requests=len(asked),
    )
    story = [f"{words!r} {said.saying.pause_s:g} s, lasts {said.end - said.start:.2f}"]
    story += [f"asked at {r.at - said.end:+.2f} {r.asked!r}" for r in asked]
    story += [f"a sound ends at {sound.end - said.end:+.2f}" for sound in sounds]
    story += [
        f"heard at {a.start - said.end:+.2f} {a.request.name}{'' if a.is_whole else ' CUT'}"
        for a in here
    ]
    verdict.story = "; ".join(story)
    return verdict


class When(Enum):
    """When the person makes a sound beside what they say."""

    SILENCE = "while all are silent"
    THINKING = "while the bot thinks"
    SPEAKING = "while it speaks"
    PICK_UP = "at pick-up"


@dataclass(frozen=True)
class Row:
    """One kind of conversation.

    Attributes:
        name: For the table.
        sayings: What the person says in one call.
        final_s: How late the recogniser's last words are, seconds.
        sounds: What else they say: the first beside the first saying, and so on.
        when: When they do.
        after_s: So long after that moment began, seconds.
        surroundings: What the microphone picks up besides them.
    """

    name: str
    sayings: tuple[Saying, ...]
    final_s: float = FINAL_SECONDS
    sounds: tuple[Saying, ...] = ()
    when: When = When.SILENCE
    after_s: float = 0.0
    surroundings: Callable[[Caller, float, int], NDArray[np.float32]] | None = None

    async def hold(self, person: Person) -> None:
        """Have the conversation, after the greeting unless they speak into it."""
        if self.when is When.PICK_UP:
            await person.wait(self.after_s)
            await person.ask(self.sounds[0])
        else:
            await person.hear_answer()
        for number, saying in enumerate(self.sayings):
            said = await person.say(saying)
            if not self.sounds or self.when is When.PICK_UP:
                await person.hear_answer()
                continue
            sound = self.sounds[number % len(self.sounds)]
            if self.when is When.SILENCE:
                await person.hear_answer()
            if self.when is When.SPEAKING:
                with suppress(TimeoutError):
                    await person.caller.hear(since=said.end, within=person.patience_s)
            await person.wait(self.after_s)
            await person.ask(sound)


SENTENCES = (
    "john-dashwood",
    "not-ill-disposed",
    "cold-hearted",
    "more-respectable",
    "made-amiable",
    "go-forward",
    "do-something",
    "three-cards",
    "queen-of-clubs",
)


PAUSES_SECONDS = (0.3, 0.6, 1.0, 1.5)
GROUPS_SECONDS = (0.6, 1.0)
FINALS_SECONDS = (0.02, 0.4, 0.7)


def rows() -> dict[str, Row]:
    """Return all rows by name."""
    human = [recordings()[name] for name in SENTENCES]
    every = [phrase for phrases in human for phrase in phrases]
    loudness = rms(every)

    def paused(seconds: float, phrases: Sequence[tuple[Phrase, ...]] = human) -> tuple[Saying, ...]:
        return tuple(Saying(said, seconds) for said in phrases)

    def cough(seconds: float) -> Saying:
        return Saying((without_words(recordings()["more-respectable"][1], seconds),))

    few = paused(0.0, human[3:7])
    coughs = (cough(0.45), cough(0.6), cough(0.9))
    hello, mhm = Saying(synthetic("Hello?")), Saying(synthetic("Mhm."))
    digits = [recordings()["numbers"], recordings()["three-cards"], *map(in_groups, DIGITS)]
    spelled = [in_groups(letters) for letters in SPELLED]
    made = [Row("no pause", paused(0.0))]
    made += [Row(f"{seconds:g} s", paused(seconds)) for seconds in PAUSES_SECONDS]
    made += [
        Row(f"0.6 s (final {seconds:g} s)", paused(0.6), final_s=seconds)
        for seconds in FINALS_SECONDS
    ]
    made += [Row(f"digits {seconds:g} s", paused(seconds, digits)) for seconds in GROUPS_SECONDS]
    made += [Row(f"spelled {seconds:g} s", paused(seconds, spelled)) for seconds in GROUPS_SECONDS]
    made += [
        Row("cough in silence", few, when=When.SILENCE, after_s=1.0, sounds=coughs),
        Row("cough while it thinks", few, when=When.THINKING, after_s=0.7, sounds=coughs[:1]),
        Row("cough while it speaks", few, when=When.SPEAKING, after_s=0.5, sounds=coughs[:1]),
        Row("mhm while it speaks", few, when=When.SPEAKING, after_s=0.5, sounds=(mhm,)),
        Row("hello at 0.1 s", few[:1], when=When.PICK_UP, after_s=0.1, sounds=(hello,)),
        Row("hello at 1.6 s", few[:1], when=When.PICK_UP, after_s=1.6, sounds=(hello,)),
        Row("white noise -20 dB", few, surroundings=white_noise(loudness / 10)),
        Row("white noise -10 dB", few, surroundings=white_noise(loudness / 10**0.5)),
        Row("babble -20 dB", few, surroundings=babble(every, loudness / 10)),
        Row("babble -10 dB", few, surroundings=babble(every, loudness / 10**0.5)),
        Row("one voice -20 dB", few, surroundings=babble(every, loudness / 10, talkers=1)),
        Row("echo -30 dB", few, surroundings=Echo(30.0)),
        Row("echo -20 dB", few, surroundings=Echo(20.0)),
    ]
    return {row.name: row for row in made}


@dataclass
class Lane:
    """A bot with providers of its own, which holds one call at a time."""

    name: str
    engine: Witness
    providers: Providers
    host: Running
    known: list[Phrase]

    async def call(self, transport: str, row: Row) -> list[Verdict]:
        """Hold one call of a row and judge it."""
        self.engine.requests = []
        self.engine.final_s = row.final_s
        self.engine.phrases = self.known[:]
        self.engine.hears_itself = isinstance(row.surroundings, Echo)
        self.providers[CartesiaServer].faults.slow_s = VOICE_SECONDS
        async with self.host.caller(transport) as caller:
            caller.surroundings = row.surroundings
            person = Person(caller)
            with suppress(ConnectionError):
                await row.hold(person)
        audible = await heard_answers(self.engine, caller)
        providers_s = row.final_s + LLM_SECONDS + VOICE_SECONDS
        sounds = [said for said in person.said if said.saying in row.sounds]
        return judge(
            Call(
                said=[said for said in person.said if said not in sounds],
                sounds=sounds,
                audible=audible,
                requests=self.engine.requests,
                providers_s=providers_s,
                hello=sounds[0] if sounds and row.when is When.PICK_UP else None,
                spoken=caller.heard.utterances,
                is_verbatim=self.engine.ear is None,
            )
        )


@asynccontextmanager
async def lane(
    name: str, folder: Path, phrases: Sequence[Phrase], ear: LocalEngine | None
) -> AsyncIterator[Lane]:
    """Run a bot and what it needs."""
    engine = Witness(phrases, ear=ear)
    folder.mkdir()
    async with AsyncExitStack() as stack:
        providers = await stack.enter_async_context(serve(engine))
        roark = await stack.enter_async_context(RoarkReceiver())
        environment = environment_of(providers, roark, folder) | SETTINGS.get(name, {})
        bot = _bot(name, folder, environment)
        host = await stack.enter_async_context(running(bot, environment))
        yield Lane(name, engine, providers, host, list(phrases))


def _bot(name: str, folder: Path, environment: dict[str, str]) -> Bot:
    if name == SCAFFOLD:
        return scaffolds_bot(folder, environment)
    if name == FLUX:
        return our_bot(folder, default_project(folder, stt="deepgram-flux"))
    return our_bot(folder)


Found = dict[tuple[str, str, str], list[Verdict]]
"""Row, transport, bot -> what became of each utterance."""


async def measure(
    subjects: Sequence[str],
    transports: Sequence[str],
    chosen: Sequence[Row],
    calls: int,
    tell: Callable[[str], None] = lambda line: None,
    *,
    is_ear_local: bool = False,
) -> Found:
    """Hold `calls` calls of every row over every transport with every bot."""
    ear = await LocalEngine.load(ScriptedAnswerer()) if is_ear_local else None
    said = [saying for row in chosen for saying in (*row.sayings, *row.sounds)]
    phrases = list({phrase: None for saying in said for phrase in saying.phrases if phrase.words})
    found: Found = {}
    with TemporaryDirectory(prefix="conversation-") as temporary:
        async with AsyncExitStack() as stack:
            lanes: list[Lane] = []
            for number in range(max(AT_ONCE, len(subjects))):
                name = subjects[number % len(subjects)]
                folder = Path(temporary) / f"{number}"
                lanes.append(await stack.enter_async_context(lane(name, folder, phrases, ear)))
            jobs = {
                name: [(row, t) for row in chosen for t in transports for _ in range(calls)]
                for name in subjects
            }

            async def work(lane: Lane) -> None:
                while jobs[lane.name]:
                    row, transport = jobs[lane.name].pop(0)
                    verdicts = await lane.call(transport, row)
                    found.setdefault((row.name, transport, lane.name), []).extend(verdicts)
                    for verdict in verdicts:
                        tell(f"{lane.name} {transport} {row.name}: {verdict.story}")

            await asyncio.gather(*(work(lane) for lane in lanes))
    return found


HEADER = (
    "| row | line | bot | n | cut-ins | half | lost | doubled | late | interrupted | unasked "
    "| median | p95 | requests |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def table(found: Found) -> str:
    """Return the table of what was found: per hundred utterances, and milliseconds."""
    lines = [HEADER]
    for (row, transport, bot), verdicts in found.items():
        count = len(verdicts)

        def share(name: str, verdicts: list[Verdict] = verdicts, count: int = count) -> str:
            return f"{100 * sum(getattr(v, name) for v in verdicts) / count:.0f}"

        kinds = ("cut_in", "half", "lost", "doubled", "late", "interrupted", "unasked")
        times = [v.answered_after for v in verdicts if v.answered_after is not None]
        median = f"{statistics.median(times) * 1000:.0f}" if times else "-"
        worst = f"{p95(times) * 1000:.0f}" if len(times) > 1 else "-"
        requests = sum(v.requests for v in verdicts) / count
        lines.append(
            f"| {row} | {transport} | {bot} | {count} | "
            + " | ".join(share(kind) for kind in kinds)
            + f" | {median} | {worst} | {requests:.1f} |"
        )
    return "\n".join(lines)


def report() -> str:
    """Measure everything, and return the section for README.md."""
    subjects, chosen = list(BOTH.values()), list(rows().values())
    return table(asyncio.run(measure(subjects, TRANSPORTS, chosen, calls=1)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for and print the table; returns the exit status."""
    known = rows()
    parser = argparse.ArgumentParser(prog="python -m benchmarks conversation")
    parser.add_argument("--subject", choices=(*SUBJECTS, "both"), default="both")
    parser.add_argument("--transport", choices=(*TRANSPORTS, "both"), default="both")
    parser.add_argument("--rows", default=",".join(known), help="names, with commas between")
    parser.add_argument("--calls", type=int, default=1, help="per row, transport and bot")
    parser.add_argument("--stories", action="store_true", help="tell what became of each utterance")
    parser.add_argument(
        "--ear",
        choices=("known", "local"),
        default="known",
        help="local: a small recogniser, as a check; what it takes is not known beforehand",
    )
    parser.add_argument(
        "--keep", metavar="FILE", type=Path, help="add what is found to FILE; the table is of all"
    )
    options = parser.parse_args(arguments)
    names = [name.strip() for name in options.rows.split(",")]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no such row: {', '.join(unknown)}; there is {', '.join(known)}")
    subjects = list(BOTH) if options.subject == "both" else [options.subject]
    transports = TRANSPORTS if options.transport == "both" else (options.transport,)
    logger.remove()
    found = asyncio.run(
        measure(
            [SUBJECTS[name] for name in subjects],
            transports,
            [known[name] for name in names],
            options.calls,
            print if options.stories else lambda line: None,
            is_ear_local=options.ear == "local",
        )
    )
    print(table(_kept(options.keep, found) if options.keep else found))
    return 0


def _kept(file: Path, found: Found) -> Found:
    """Add to what is kept in a file, one utterance a line, and return all of it."""
    with file.open("a", encoding="utf-8") as kept:
        for (row, transport, bot), verdicts in found.items():
            for verdict in verdicts:
                line = {"row": row, "transport": transport, "bot": bot, **asdict(verdict)}
                kept.write(f"{json.dumps(line)}\n")
    both: Found = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        key = (entry.pop("row"), entry.pop("transport"), entry.pop("bot"))
        both.setdefault(key, []).append(Verdict(**entry))
    order = {name: number for number, name in enumerate(rows())}
    return dict(sorted(both.items(), key=lambda item: (order[item[0][0]], *item[0][1:])))


if __name__ == "__main__":
    sys.exit(main())
