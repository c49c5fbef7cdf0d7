"""What a caller hears when a provider fails: how long nothing, and what the record says of it.

    uv run python -m benchmarks stalls

Every call is held in real time by a caller who behaves as people do: they wait for a greeting, ask,
wait for the answer, ask again when they are asked to, and give up after a while. Silence is the
time in which nobody makes a sound. The bots run in processes of their own, several calls at once;
what is timed are limits of seconds, which a busy machine hardly moves.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rehearsal.callers.caller import Caller
from rehearsal.engines.engine import Speech
from rehearsal.engines.scripted import Answer, Script, ScriptedEngine
from rehearsal.providers.all import Providers, serve
from rehearsal.providers.faults import ALWAYS, Faults
from rehearsal.providers.roark import RoarkReceiver
from rehearsal.providers.server import ProviderServer

from benchmarks.speed import (
    OURS,
    SCAFFOLD,
    VOICE_HZ,
    Bot,
    Running,
    environment_of,
    our_bot,
    running,
    scaffolds_bot,
)

WORLDS = 3
"""So many calls at once, each with providers and processes of its own."""
GIVES_UP_SECONDS = 30.0
"""After so much silence the caller hangs up."""
CALL_SECONDS = 75.0
THINKS_SECONDS = 1.0
"""How long the bot has to be silent for the caller to take it for the end of what it says."""
QUESTIONS = 2
GOAL_SECONDS = 9.0

SERVICES = {"stt": "DeepgramSTTService", "llm": "OpenAILLMService", "tts": "CartesiaTTSService"}
ANSWERS = (
    "Yes, I can hear you very well indeed, and what would you like to know?",
    "We are open from nine to five, every day of the week.",
)
SCRIPT = Script(
    greeting="Hello there.",
    hears=("Can you hear me?", "When are you open?"),
    answers=(
        Answer(told="did not reach", says=ANSWERS[0]),
        Answer(told="could not be recognised", says="Could you say that again?"),
        Answer(told="still there", says="Are you still there?"),
        Answer(told="does not answer", says="Goodbye."),
        *(Answer(says=answer) for answer in ANSWERS),
    ),
)
PATIENCE = "One moment, please."
"""The caller goes on waiting after that."""

Fault = Callable[[ProviderServer], Awaitable[None] | None]


def switched(**switches: Any) -> Fault:
    """Return what turns these switches of a provider."""

    def turn(server: ProviderServer) -> None:
        for name, value in switches.items():
            setattr(server.faults, name, value)

    return turn


BEFORE: dict[str, Fault] = {
    "refused": lambda server: server.refuse(),
    "hangs at the handshake": switched(hang_handshake=True),
    "401": switched(wrong_key=True),
    "429": switched(rate_limited=ALWAYS),
    "500": switched(server_errors=ALWAYS),
    "3 s slow": switched(slow_s=3.0),
}
"""Faults that are there when the call begins."""
DURING: dict[str, Fault] = {
    "cut": switched(cuts=1),
    "cut every time": switched(cuts=ALWAYS),
    "hangs": switched(hang=True),
    "stalls after its first words": switched(stalls=ALWAYS),
    "garbage": switched(garbage=ALWAYS),
    "half a message": switched(halves=1),
}
"""Faults that come when the caller has heard the greeting."""


class Heard(ScriptedEngine):
    """A scripted engine that remembers what it was asked to say.

    Attributes:
        spoken: The texts, in order.
    """

    def __init__(self) -> None:
        super().__init__(SCRIPT)
        self.spoken: list[str] = []

    def speak(self, text: str, sample_rate: int) -> AsyncIterator[Speech]:
        """Say `text`, as the script's voice does."""
        self.spoken.append(text.strip())
        return super().speak(text, sample_rate)


@dataclass
class Silence:
    """What one call was like. Seconds; None where it never came.

    Parameters:
        first_sound: From the open line to the first sound of the bot.
        longest: The longest time in which nobody made a sound.
        ending: What the record says of its end; for a bot without a record, who ended it.
    """

    first_sound: float | None = None
    longest: float = 0.0
    ending: str = ""


@dataclass
class World:
    """Providers of its own, and the two bots that use them."""

    providers: Providers
    engine: Heard
    calls_dir: Path
    bots: Mapping[str, Running]

    async def mend(self) -> None:
        """Make every provider healthy again."""
        for server in self.providers.servers:
            server.faults.__dict__.update(vars(Faults()))
            await server.accept()
        self.engine.spoken.clear()


@dataclass
class Call:
    """One caller, and the silence they hear."""

    line: Caller
    engine: Heard
    speech: bytes
    opened: float = field(default_factory=time.monotonic)

    async def talk(self, break_it: Callable[[], Awaitable[None]]) -> None:
        """Hear the greeting, call `break_it`, ask until there is an answer; or give up."""
        asked = answered = 0
        while not self.line.ended.is_set() and answered < QUESTIONS:
            if not await self._hear_out():
                return
            last = self.engine.spoken[-1] if self.engine.spoken else ""
            if last == PATIENCE:
                # Whoever waits for more says nothing.
                if not await self._hears_more():
                    return
                continue
            answered += last in ANSWERS
            if asked == 0:
                await break_it()
            with suppress(ConnectionError):
                await self.line.say(self.speech, VOICE_HZ)
            asked += 1

    async def _hear_out(self) -> bool:
        """Wait until the bot has said something and is done; False if nothing comes of it."""
        return await self._hears_more() and await self._is_quiet()

    async def _hears_more(self) -> bool:
        heard = self.line.heard.utterances
        after = max([self.opened, *(said.end for said in self.line.sent)])
        before = len([u for u in heard if u.start > after])
        while not self.line.ended.is_set():
            now = time.monotonic()
            if len([u for u in self.line.heard.utterances if u.start > after]) > before:
                return True
            if before == 0 and any(u.end > after for u in self.line.heard.utterances):
                return True
            if now - self._last_sound() > GIVES_UP_SECONDS or now - self.opened > CALL_SECONDS:
                return False
            await asyncio.sleep(0.05)
        return False

    async def _is_quiet(self) -> bool:
        while not self.line.ended.is_set():
            if time.monotonic() - self._last_sound() > THINKS_SECONDS:
                return True
            await asyncio.sleep(0.05)
        return False

    def _last_sound(self) -> float:
        sounds = [*self.line.heard.utterances, *self.line.sent]
        return max([self.opened, *(sound.end for sound in sounds)])

    def silence(self, until: float) -> Silence:
        """What was heard between the open line and `until`."""
        heard, sent = self.line.heard.utterances, self.line.sent
        sounds = sorted([*heard, *sent], key=lambda sound: sound.start)
        found = Silence(first_sound=heard[0].start - self.opened if heard else None)
        at = self.opened
        for sound in sounds:
            found.longest = max(found.longest, sound.start - at)
            at = max(at, sound.end)
        found.longest = max(found.longest, until - at)
        return found


async def hold(
    world: World, bot: str, transport: str, kind: str, name: str, speech: bytes
) -> Silence:
    """Hold a call in which the service of this `kind` has the fault of this `name`."""
    server = world.providers.by_service[SERVICES[kind]]

    async def break_it() -> None:
        if name in DURING and (turning := DURING[name](server)):
            await turning

    await world.mend()
    if name in BEFORE and (turning := BEFORE[name](server)):
        await turning
    known = set(world.calls_dir.glob("*/call.json"))
    async with AsyncExitStack() as stack:
        line = world.bots[bot].caller(transport)
        try:
            await stack.enter_async_context(line)
        except OSError as error:
            return Silence(ending=f"no line: {type(error).__name__}")
        call = Call(line, world.engine, speech)
        await call.talk(break_it)
        ended_by_bot = line.ended.is_set()
        found = call.silence(time.monotonic())
    found.ending = "the bot hung up" if ended_by_bot else "the caller hung up"
    if bot != SCAFFOLD:
        found.ending = await _ending(world, known)
    return found


async def _ending(world: World, known: set[Path]) -> str:
    async with asyncio.timeout(CALL_SECONDS):
        while not (new := set(world.calls_dir.glob("*/call.json")) - known) or not _closed(new):
            await asyncio.sleep(0.1)
    (record,) = new
    ending = json.loads(record.read_text(encoding="utf-8"))["ending"]
    return f"{ending['reason']}: {ending['detail']}"


def _closed(records: set[Path]) -> bool:
    return all(json.loads(r.read_text(encoding="utf-8")).get("ending") for r in records)


CASES = [(kind, name) for kind in SERVICES for name in (*BEFORE, *DURING)]


async def measure(
    cases: list[tuple[str, str]] = CASES,
    transports: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[tuple[str, str], dict[tuple[str, str], Silence]]:
    """Hold every call; returns case -> (bot, transport) -> what it was like."""
    found: dict[tuple[str, str], dict[tuple[str, str], Silence]] = {case: {} for case in cases}
    queue: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    for case in cases:
        queue.put_nowait(case)
    pieces = [piece.pcm async for piece in ScriptedEngine().speak("Can you hear me?", VOICE_HZ)]
    wanted = transports or {OURS: ("twilio", "webrtc"), SCAFFOLD: ("twilio",)}

    async def work(folder: Path) -> None:
        folder.mkdir()
        engine = Heard()
        async with AsyncExitStack() as stack:
            providers = await stack.enter_async_context(serve(engine))
            roark = await stack.enter_async_context(RoarkReceiver())
            environment = environment_of(providers, roark, folder)
            laid_out: list[Bot] = []
            if OURS in wanted:
                laid_out.append(our_bot(folder))
            if SCAFFOLD in wanted:
                laid_out.append(scaffolds_bot(folder, environment))
            bots = {
                bot.name: await stack.enter_async_context(running(bot, environment))
                for bot in laid_out
            }
            world = World(providers, engine, folder / "calls", bots)
            while not queue.empty():
                case = queue.get_nowait()
                for bot in bots:
                    for transport in wanted[bot]:
                        here = await hold(world, bot, transport, *case, b"".join(pieces))
                        found[case][bot, transport] = here
                        print(f"  {case}, {bot}, {transport}: {here}", flush=True)

    with TemporaryDirectory(prefix="stalls-") as folder:
        async with asyncio.TaskGroup() as group:
            for number in range(min(WORLDS, len(cases))):
                group.create_task(work(Path(folder) / str(number)))
    return found


def report() -> str:
    """Measure, and return the section for README.md."""
    return table(asyncio.run(measure()))


def table(found: Mapping[tuple[str, str], Mapping[tuple[str, str], Silence]]) -> str:
    """Return what `measure` found as a table."""
    lines = [
        "| service | fault | phone: first sound | longest silence | browser: first sound "
        "| longest silence | the record says | scaffold, phone: longest silence |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (kind, name), calls in found.items():
        cells: list[str] = []
        for transport in ("twilio", "webrtc"):
            call = calls[OURS, transport]
            cells += [_seconds(call.first_sound), _seconds(call.longest)]
        endings = dict.fromkeys(calls[OURS, t].ending for t in ("twilio", "webrtc"))
        peer = calls[SCAFFOLD, "twilio"]
        cells += ["; ".join(endings), f"{_seconds(peer.longest)}, {peer.ending}"]
        lines.append(f"| {kind.upper()} | {name} | {' | '.join(cells)} |")
    ours = [
        call.longest for calls in found.values() for (bot, _), call in calls.items() if bot == OURS
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"Seconds. The longest silence of ours was {max(ours):.1f}; goal: at most "
            f"{GOAL_SECONDS:g} in every row. A caller hangs up after {GIVES_UP_SECONDS:g}.",
        ]
    )


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    print(report())
