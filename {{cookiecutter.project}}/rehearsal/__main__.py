"""`python -m rehearsal`: talk to the bot, or have it called, with no account and no key.

    python -m rehearsal                                          talk to it in a browser
    python -m rehearsal call -t twilio                           a recorded human calls it
    python -m rehearsal call -t webrtc --say "Good morning."     the engine's voice calls it
    python -m rehearsal call --engine scripted --script a.toml   a whole dialogue, as written down
    python -m rehearsal call --latencies llm=450,tts=150,stt=100 services as slow as the cloud's
    python -m rehearsal call --transfer busy                     handed over to a colleague
    python -m rehearsal dial --callee voicemail                  it calls somebody
    python -m rehearsal providers --engine scripted              the servers alone

Everything listens on 127.0.0.1. Calls are kept under CALLS_DIR (default: calls/).
"""

import argparse
import asyncio
import json
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from loguru import logger

from config import DEFAULT_LANGUAGE
from rehearsal import stand_ins
from rehearsal.call import (
    HUMAN_VOICE,
    Answered,
    NoAnswer,
    Voice,
    conversation,
    kept_at,
    recorded_voice,
    speculation,
    spoken_voice,
    talk,
    what_broke,
    without_words,
)
from rehearsal.dial import CALLEES, NUMBER, greeting_to_callees, who_is_called, words
from rehearsal.dial import ENVIRONMENT as DIAL_ENVIRONMENT
from rehearsal.engines import weights
from rehearsal.engines.delayed import DelayedEngine, Latencies
from rehearsal.engines.engine import Engine
from rehearsal.engines.language_model import choose_answerer
from rehearsal.engines.local import LocalEngine, LocalEngineError
from rehearsal.engines.scripted import Script, ScriptedEngine
from rehearsal.host.bot_process import (
    BotFailed,
    BotProcess,
    run_bot,
    run_command,
    user_settings,
)
from rehearsal.providers.all import Providers, serve
from rehearsal.providers.roark import RoarkReceiver
from rehearsal.providers.server import HOST, free_port
from rehearsal.providers.twilio_rest import TwilioServer
from rehearsal.transfer import ENVIRONMENT, OUTCOMES, Dialogue, be_handed_over, script

BROWSER_PORT = 7860
DELIVERY_SECONDS = 15.0
LOCAL_LEAD_SECONDS = 2.0
"""How far speech runs ahead of its playing: time for Piper to make the next sentence."""

KEPT = {
    "recording.wav": "Recording (left the caller, right the bot)",
    "call.json": "Record",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 1 (the bot failed), 2 (bad arguments)."""
    options = _parser().parse_args(arguments)
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    commands = {
        None: _talk_to_it,
        "call": _call_it,
        "dial": _have_it_call,
        "providers": _serve_providers,
    }
    try:
        return asyncio.run(_until_interrupted(commands[options.command](options)))
    except BotFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    except (LocalEngineError, OSError, ValueError) as refusal:
        print(f"rehearsal: {refusal}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rehearsal",
        description="Rehearse with the bot of this project: no account, no key, this machine only.",
    )
    parser.add_argument("--port", type=_port, help=f"of the browser page ({BROWSER_PORT})")
    _add_engine(parser, "local")
    commands = parser.add_subparsers(dest="command", metavar="call | dial | providers")

    call = commands.add_parser("call", help="place one call by itself and report it")
    call.add_argument("-t", "--transport", choices=("twilio", "webrtc"))
    voice = call.add_mutually_exclusive_group()
    voice.add_argument(
        "--say", metavar="TEXT", action="append", help="what the engine's voice says; repeatable"
    )
    voice.add_argument(
        "--wav", metavar="FILE", type=Path, action="append", help="a recording to say; repeatable"
    )
    call.add_argument(
        "--transfer",
        metavar="|".join(OUTCOMES),
        choices=tuple(OUTCOMES),
        nargs="?",
        const="busy",
        help="by telephone, let the caller be handed over to a colleague, who answers or not",
    )
    call.add_argument(
        "--latencies",
        metavar="llm=450,tts=150,stt=100",
        type=_latencies,
        help="let the services take as long as in the cloud, in milliseconds",
    )
    dial = commands.add_parser("dial", help="have the bot call somebody")
    dial.add_argument("--callee", choices=CALLEES, default="person")
    _add_engine(dial, "local")
    providers = commands.add_parser("providers", help="run the loopback servers alone")
    providers.add_argument("--port", type=_port, default=0, help="of the first server; any if 0")
    _add_engine(call, "local")
    _add_engine(providers, "scripted")
    return parser


def _add_engine(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--engine", choices=("local", "scripted"), default=default)
    parser.add_argument("--script", metavar="FILE", type=Path, help="what the scripted one plays")


def _latencies(text: str) -> Latencies:
    try:
        return Latencies.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _port(text: str) -> int:
    port = int(text) if text.isdecimal() else -1
    if not 0 <= port < 65536:
        raise argparse.ArgumentTypeError(f"{text} is not a port")
    return port


async def _until_interrupted(command: Coroutine[None, None, int]) -> int:
    """Run a command; the first SIGINT or SIGTERM ends it in order, further ones change nothing."""
    task = asyncio.create_task(command)
    interrupted = asyncio.Event()

    def interrupt() -> None:
        if not interrupted.is_set():
            interrupted.set()
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        # Windows has no signal handlers in asyncio; there Ctrl-C cancels by itself.
        with suppress(NotImplementedError):
            loop.add_signal_handler(number, interrupt)
    try:
        return await task
    except asyncio.CancelledError:
        print("The rehearsal is over.", file=sys.stderr)
        return 0


async def _talk_to_it(options: argparse.Namespace) -> int:
    wanted = BROWSER_PORT if options.port is None else options.port
    port = free_port(wanted)
    if wanted not in (0, port):
        print(f"Port {wanted} is in use; taking {port}.")
    async with _engine(options) as engine, _world(engine, "webrtc", port) as world:
        _tell(f"Talk to your bot: http://localhost:{port}")
        _tell(f"Calls are kept in {_shown(world.calls_dir)}; the bot's log is {world.bot.log}")
        _tell("Ctrl-C ends the rehearsal.")
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(world.bot.wait_until_gone())
            tasks.create_task(_announce_calls(world))
    return 0


async def _announce_calls(world: "_World") -> None:
    """Print every call that arrives at Roark."""
    announced: set[str] = set()

    def arrived() -> list[str]:
        calls = world.roark.calls.values()
        return [call.call_id for call in calls if call.whole and call.call_id not in announced]

    while True:
        await world.roark.until(arrived, timeout=float("inf"))
        for call_id in arrived():
            announced.add(call_id)
            _report(world, call_id)


async def _hand_over(options: argparse.Namespace) -> int:
    """Place a call that is handed over, in LANGUAGE; by telephone, in words of its own."""
    not_heeded = {
        "-t webrtc": options.transport == "webrtc",
        "--say": options.say,
        "--wav": options.wav,
        "--script": options.script,
        "--latencies": options.latencies,
    }
    if given := [option for option, is_given in not_heeded.items() if is_given]:
        raise ValueError(
            "--transfer is a telephone call with words and times of its own: leave out "
            f"{', '.join(given)}."
        )
    language = _language()
    words = script(language)
    port = free_port()
    async with _engine(options, by_script=True) as voice:
        _tell("What is heard and thought is by script, rehearsal/transfer.*.toml.")
        if missing := without_words("transfer", language):
            _tell(missing)
        engine = Dialogue(words, voice)
        voices = await _spoken(engine, words.hears)
        public = ("-x", f"{HOST}:{port}")
        async with _world(engine, "twilio", port, ENVIRONMENT, public) as world:
            try:
                answers = await be_handed_over(
                    world.bot, world.twilio, options.transfer, voices, _tell
                )
            except NoAnswer as failure:
                raise BotFailed(f"{failure}\n{world.bot.tail()}") from failure
        broken = [said for one in world.roark.calls for said in _report(world, one, answers)]
    return 1 if broken else 0


async def _call_it(options: argparse.Namespace) -> int:
    if options.transfer:
        return await _hand_over(options)
    transport = options.transport or "webrtc"
    recorded = [recorded_voice(path) for path in options.wav or ()]
    async with _engine(options) as engine:
        voices = recorded or await _voices(options, engine)
        served = DelayedEngine(engine, options.latencies) if options.latencies else engine
        async with _world(served, transport, free_port()) as world:
            try:
                answers = await talk(transport, world.bot, voices, _tell)
            except NoAnswer as failure:
                raise BotFailed(f"{failure}\n{world.bot.tail()}") from failure
            await _delivered(world)
        # The bot has ended by now, and what it kept is complete.
        broken = [
            said for call_id in world.roark.calls for said in _report(world, call_id, answers)
        ]
    return 1 if broken else 0


async def _delivered(world: "_World") -> None:
    """Wait until a call has arrived at Roark as a whole; not for ever."""
    with suppress(TimeoutError):
        await world.roark.until(
            lambda: any(call.whole for call in world.roark.calls.values()),
            timeout=DELIVERY_SECONDS,
        )


async def _have_it_call(options: argparse.Namespace) -> int:
    """Have the bot call one of CALLEES, in LANGUAGE, with the command that its owner has."""
    said, callee = words(_language()), options.callee
    port = free_port()
    async with _engine(options, by_script=True) as engine:
        if missing := without_words("dial", _language()):
            _tell(missing)
        voices = await _spoken(engine, said.of(callee))
        hears_by_itself = isinstance(engine, LocalEngine) and _is_english()
        behind = engine if hears_by_itself else Dialogue(said.script(callee), engine)
        public = f"{HOST}:{port}"
        settings = {**DIAL_ENVIRONMENT, **greeting_to_callees()}
        async with _world(behind, "twilio", port, settings, ("-x", public)) as world:
            world.twilio.callees[NUMBER] = who_is_called(callee, voices, _tell)
            command = ["call", NUMBER, "--name", "Anna", "--reason", said.reason]
            _tell(f"python -m telephony {shlex.join(command)} --webhook-host {public}")
            await run_command(
                "telephony/__main__.py",
                [*command, "--webhook-host", public],
                world.environment,
                _tell,
            )
            # Twilio may be telling the bot how it ended.
            await _delivered(world)
        for call_id in world.roark.calls:
            _report(world, call_id)
        return 0 if world.roark.calls else 1


async def _voices(options: argparse.Namespace, engine: Engine) -> list[Voice]:
    """Return what the caller says: the words given, all that a script hears, or the recording."""
    words: Sequence[str] = options.say or ()
    if not words and options.script and isinstance(engine, ScriptedEngine):
        words = engine.script.hears
    return [await spoken_voice(engine, text) for text in words] or [recorded_voice(HUMAN_VOICE)]


async def _spoken(engine: Engine, texts: Sequence[str]) -> list[Voice]:
    """Let the engine say each of them; whoever is told of it is told the words."""
    return [replace(await spoken_voice(engine, text), source=text) for text in texts]


async def _serve_providers(options: argparse.Namespace) -> int:
    async with _engine(options) as engine, _providers(engine, options.port) as providers:
        next_port = free_port(providers.servers[-1].port + 1) if options.port else 0
        async with RoarkReceiver(port=next_port) as roark:
            for name, value in {**providers.environment, **_at_roark(roark)}.items():
                _tell(f"{name}={value}")
            await asyncio.Event().wait()
    return 0


@dataclass(frozen=True, slots=True)
class _World:
    """A bot between a loopback Roark and, unseen here, its providers."""

    bot: BotProcess
    roark: RoarkReceiver
    twilio: TwilioServer
    calls_dir: Path
    environment: Mapping[str, str]


@asynccontextmanager
async def _engine(options: argparse.Namespace, *, by_script: bool = False) -> AsyncIterator[Engine]:
    """What hears, thinks and speaks; `by_script`: what is heard is known beforehand."""
    engine: Engine
    if options.script and options.engine != "scripted":
        raise ValueError("--script is played by the scripted engine: add --engine scripted.")
    if options.engine == "scripted":
        engine = ScriptedEngine(Script.load(options.script) if options.script else None)
    else:
        answerer = await choose_answerer(user_settings())
        voice = user_settings().get("REHEARSAL_VOICE", "").strip()
        engine = await LocalEngine.load(answerer, Path(voice) if voice else None)
        _tell(f"Moonshine hears and Piper speaks for the providers; {answerer.description} thinks.")
        if by_script:
            engine.read_as(_language().partition("-")[0].lower())
        if by_script and not _is_english():
            _tell("The installed voice is English, with an accent; REHEARSAL_VOICE takes another.")
        elif not _is_english():
            _tell("Both know English only: rehearse LANGUAGE with --engine scripted --script FILE.")
    try:
        yield engine
    finally:
        await engine.aclose()


@asynccontextmanager
async def _providers(engine: Engine, port: int = 0) -> AsyncIterator[Providers]:
    async with serve(engine, port=port) as providers:
        if engine.name == LocalEngine.name:
            for voice in providers.voices:
                voice.lead_s = LOCAL_LEAD_SECONDS
        yield providers


@asynccontextmanager
async def _world(
    engine: Engine,
    transport: str,
    port: int,
    settings: Mapping[str, str] | None = None,
    arguments: Sequence[str] = (),
) -> AsyncIterator[_World]:
    calls_dir = Path(os.environ.get("CALLS_DIR", "").strip() or "calls").resolve()
    async with _providers(engine) as providers, RoarkReceiver() as roark:
        environment = {
            **_installed_weights(),
            **providers.environment,
            **_at_roark(roark),
            "CALLS_DIR": str(calls_dir),
            **(settings or {}),
        }
        if settings:
            environment["TWILIO_AUTH_TOKEN"] = providers.twilio.auth_token
        for sentence in stand_ins.sentences():
            _tell(sentence)
        _tell("Starting the bot.")
        async with run_bot(transport, port, environment, arguments) as bot:
            yield _World(bot, roark, providers.twilio, calls_dir, environment)


def _installed_weights() -> dict[str, str]:
    """Return where a service in the bot's own process finds weights without downloading any.

    What the user has set stays. They are for English only.
    """
    own = {name for name, value in user_settings().items() if value.strip()}
    found = weights.environment() if _is_english() else {}
    return {name: value for name, value in found.items() if name not in own}


def _is_english() -> bool:
    return _language().lower().startswith("en")


def _language() -> str:
    return user_settings().get("LANGUAGE", "").strip() or DEFAULT_LANGUAGE


def _at_roark(roark: RoarkReceiver) -> dict[str, str]:
    return {"ROARK_API_KEY": "rehearsal", "ROARK_BASE_URL": roark.url}


def _report(world: _World, call_id: str, answers: Sequence[Answered] = ()) -> list[str]:
    """Print a call: what was said, what Roark has of it, where it is kept; return what broke."""
    call = world.roark.calls[call_id]
    folder = kept_at(world.calls_dir, call_id)
    broken: list[str] = []
    _tell("")
    if folder is not None and (folder / "call.json").exists():
        record = json.loads((folder / "call.json").read_bytes())
        where = "in the recording" if record["recording"] else "since the call began"
        if said := conversation(record, answers):
            _tell(f"The conversation, by the time {where}:")
        for line in said:
            _tell(line)
        _tell(f"Ending: {record['ending']['reason']} ({record['ending']['detail']})")
        if saved := speculation(record):
            _tell(saved)
        broken = what_broke(record)
    else:
        broken.append(f"No record of it in {_shown(world.calls_dir)}: can it be written there?")
    has = ["call-started"] * (call.started is not None)
    has += [f"{len(call.chunks)} chunks of audio"] * bool(call.chunks)
    has += ["call-ended"] * (call.ended is not None)
    _tell(f"Roark, on this machine, has: {', '.join(has)}")
    for name, what in KEPT.items():
        if folder is not None and (folder / name).exists():
            _tell(f"{what}: {_shown(folder / name)}")
    for sentence in broken:
        print(sentence, file=sys.stderr, flush=True)
    return broken


def _shown(path: Path) -> str:
    with suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def _tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
