"""What a caller hears when a provider fails: how long nothing, and what the record says of it.

    uv run python -m benchmarks stalls                # everything: a quarter of an hour
    uv run python -m benchmarks.stalls --keep FILE    # goes on where it was broken off

Every call is held in real time by a caller who behaves as people do: they wait for a greeting, ask,
wait for the answer, ask again when they are asked to, and give up after a while. Silence is the
time in which nobody makes a sound. The bots run in processes of their own, several calls at once;
what is timed are limits of seconds, which a busy machine hardly moves.
"""

import argparse
import asyncio
import json
import pickle
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
    Running,
    environment_of,
    our_bot,
    running,
    scaffolds_bot,
)

WORLDS = {OURS: 3, SCAFFOLD: 6}
"""So many calls at once, each with providers and a process of its own. Those of the scaffold's bot
are mostly silence."""
TRANSPORTS = {OURS: ("twilio", "webrtc"), SCAFFOLD: ("twilio",)}
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


GOES_ON = {
    *((kind, name) for kind in SERVICES for name in ("3 s slow", "cut", "half a message")),
    # What was said of an answer is heard, and the next one is begun.
    ("tts", "stalls after its first words"),
}
"""Where the call is no worse for it than a moment, and ends when the caller hangs up."""


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
    until = time.monotonic() + CALL_SECONDS
    while time.monotonic() < until:
        new = set(world.calls_dir.glob("*/call.json")) - known
        if new and _closed(new):
            (record,) = new
            ending = json.loads(record.read_text(encoding="utf-8"))["ending"]
            return f"{ending['reason']}: {ending['detail']}"
        await asyncio.sleep(0.1)
    return "no record"


def _closed(records: set[Path]) -> bool:
    return all(json.loads(r.read_text(encoding="utf-8")).get("ending") for r in records)


def is_right(kind: str, name: str, ending: str) -> bool:
    """Whether the record says what was to blame."""
    if (kind, name) in GOES_ON:
        return ending.startswith("client-disconnected")
    return ending.startswith(f"error: {SERVICES[kind]}")


CASES = [(kind, name) for kind in SERVICES for name in (*BEFORE, *DURING)]
Found = dict[tuple[str, str], dict[tuple[str, str], Silence]]
"""Case -> (bot, transport) -> what the call was like."""


async def measure(
    found: Found | None = None,
    cases: list[tuple[str, str]] = CASES,
    transports: Mapping[str, tuple[str, ...]] = TRANSPORTS,
    keep: Callable[[Found], None] = lambda _found: None,
) -> Found:
    """Hold every call that is not in `found`, one bot's after the other's; `keep` after each."""
    found = found or {}
    speech = b"".join(
        [piece.pcm async for piece in ScriptedEngine().speak("Can you hear me?", VOICE_HZ)]
    )
    with TemporaryDirectory(prefix="stalls-") as folder:
        for bot, lines in transports.items():
            queue = [
                (case, line)
                for case in cases
                for line in lines
                if (bot, line) not in found.setdefault(case, {})
            ]
            async with asyncio.TaskGroup() as group:
                for number in range(min(WORLDS[bot], len(queue))):
                    place = Path(folder) / f"{lines[0]} {len(lines)} {number}"
                    group.create_task(_hold_all(bot, queue, place, speech, found, keep))
    return found


async def _hold_all(
    name: str,
    queue: list[tuple[tuple[str, str], str]],
    folder: Path,
    speech: bytes,
    found: Found,
    keep: Callable[[Found], None],
) -> None:
    """Take calls from the queue until there is none left."""
    folder.mkdir()
    engine = Heard()
    async with serve(engine) as providers, RoarkReceiver() as roark:
        environment = environment_of(providers, roark, folder)
        bot = our_bot(folder) if name == OURS else scaffolds_bot(folder, environment)
        async with running(bot, environment) as process:
            world = World(providers, engine, folder / "calls", {name: process})
            while queue:
                case, line = queue.pop(0)
                here = await hold(world, name, line, *case, speech)
                found[case][name, line] = here
                keep(found)
                print(f"  {case}, {name}, {line}: {here}", flush=True)


def report() -> str:
    """Measure, and return the section for README.md."""
    return table(asyncio.run(measure()))


def table(found: Found) -> str:
    """Return what `measure` found as a table."""
    lines = [
        "| service | fault | phone: first sound | longest silence | browser: first sound "
        "| longest silence | the record says | scaffold, phone: longest silence |",
        "|---|---|---|---|---|---|---|---|",
    ]
    wrong: list[str] = []
    for (kind, name), calls in found.items():
        cells: list[str] = []
        ours = [calls[OURS, transport] for transport in TRANSPORTS[OURS]]
        for call in ours:
            cells += [_seconds(call.first_sound), _seconds(call.longest)]
        endings = dict.fromkeys(call.ending for call in ours)
        wrong += [f"{kind.upper()} {name}" for end in endings if not is_right(kind, name, end)]
        peer = calls[SCAFFOLD, "twilio"]
        cells += ["; ".join(endings), f"{_seconds(peer.longest)}, {peer.ending}"]
        lines.append(f"| {kind.upper()} | {name} | {' | '.join(cells)} |")
    longest = {
        bot: [calls[at].longest for calls in found.values() for at in calls if at[0] == bot]
        for bot in TRANSPORTS
    }
    return "\n".join(
        [
            *lines,
            "",
            f"Seconds. The longest silence of ours was {max(longest[OURS]):.1f}; goal: at most "
            f"{GOAL_SECONDS:g} in every row. The scaffold's caller was in silence for longer than "
            f"that in {sum(s > GOAL_SECONDS for s in longest[SCAFFOLD])} of "
            f"{len(longest[SCAFFOLD])} rows, and hung up after {GIVES_UP_SECONDS:g}. The wrong "
            f"reason stood in the record of: {', '.join(wrong) or 'none'}.",
        ]
    )


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f}"


def main() -> None:
    """Measure what the kept file lacks, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, required=True, help="a file for what was measured")
    file: Path = parser.parse_args().keep
    found: Found = pickle.loads(file.read_bytes()) if file.exists() else {}
    found = asyncio.run(measure(found, keep=lambda f: _write(file, f)))
    print(table(found))


def _write(file: Path, found: Found) -> None:
    file.write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main()
