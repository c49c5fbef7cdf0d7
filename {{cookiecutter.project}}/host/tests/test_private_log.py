"""What callers say, keys and tokens do not reach the log, at any level, whatever fails."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from harness import RECORDS_AUDIO, server_of, skip_unless_scripted
from loguru import logger

import config
from host import private_log
from rehearsal.callers.caller import Caller
from rehearsal.callers.twilio import TwilioCaller
from rehearsal.callers.webrtc import WebRTCCaller
from rehearsal.engines.engine import ToolCall
from rehearsal.engines.scripted import Answer, Script, ScriptedEngine
from rehearsal.host.bot_process import BotProcess, run_bot
from rehearsal.providers.all import Providers
from rehearsal.providers.all import serve as serve_providers
from rehearsal.providers.roark import RoarkReceiver
from rehearsal.providers.server import free_port
from telephony.twilio_auth import Gate

SECONDS = 30.0
PUBLIC_HOST = "voice.example.org"
SERVICE_KEYS = {
    name: f"{name.lower()}-8f1c" for name in config.REQUIRED if name.endswith("_API_KEY")
}
KEYS = {
    **SERVICE_KEYS,
    "ROARK_API_KEY": "roark-key-8f1c",
    "TWILIO_ACCOUNT_SID": "ACtwilio8f1c",
    "TWILIO_AUTH_TOKEN": "twilio-token-8f1c",
}
# Words that occur nowhere else: heard, said, thought, typed, posted.
HEARD, GREETING, ANSWER, GOODBYE = "Xylophone", "Quincunx", "Zephyranth", "Obelisque"
TOOL_ARGUMENT, DIGITS, NUMBER = "Marzipan", "739164", "+15557650123"
START_BODY, PARAMETER, ERROR_TEXT = "Saltimbanco", "Pamplemousse", "Tangerine"
ROARKS_ERROR_TEXT = "rehearsed 422"
MESSAGE_TOKEN = "message-token-8f1c"

TALK = Script(
    greeting=f"{GREETING} to you.",
    hears=(f"My password is {HEARD}.", f"Goodbye, {HEARD}."),
    answers=(
        Answer(result="take_message", says=f"{ANSWER}, it is noted."),
        Answer(heard="Goodbye", calls=(ToolCall("end_call", {"goodbye": f"{GOODBYE} now."}),)),
        Answer(
            calls=(
                ToolCall("take_message", {"message": TOOL_ARGUMENT, "callback_number": "5550100"}),
            )
        ),
    ),
)


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What loguru and logging write while the log is quiet, and as it was before afterwards."""
    written: list[str] = []
    sink = logger.add(written.append, level="TRACE", format="{message}", diagnose=True)

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(self.format(record))

    handler = Handler()
    ordinary = logging.getLogRecordFactory()
    logging.getLogger().addHandler(handler)
    private_log.begin()
    yield written
    logging.getLogger().removeHandler(handler)
    logging.setLogRecordFactory(ordinary)
    logger.remove(sink)


@pytest.fixture
def library(tmp_path: Path) -> Callable[[str], None]:
    """Runs statements as if they were a library's: `name`, `text` and `seconds` are filled in."""

    def run(source: str) -> None:
        path = tmp_path / "library.py"
        path.write_text(source)
        known = {"name": "SomeService#3", "text": HEARD, "seconds": 0.25, "logger": logger}
        exec(compile(source, str(path), "exec"), known | {"logging": logging})

    return run


@pytest.mark.parametrize(
    "statement, logged",
    [
        ('logger.debug("Nothing to hide")', "Nothing to hide"),
        ('logger.debug(\n    "Nothing to hide"\n)', "Nothing to hide"),
        ('logger.debug(f"{name}: saying [{text}] now")', "SomeService#3 \u2026"),
        (
            'logger.error(f"{name} (/a/b.py:7): {text}")',
            "SomeService#3 (/a/b.py:7) \u2026",
        ),
        ('logger.trace(\n    f"{text} took "\n    f"{seconds:.3f}s"\n)', "\u2026"),
        ('logger.error(f"{name}: order#4711 {text}")', "SomeService#3 \u2026"),
        ("logger.info(text)", "\u2026"),
        ('logger.info("said " + text)', "\u2026"),
        ('logger.info("said {}", text)', "\u2026"),
        ('if text: logger.info(f"said {text}")', "\u2026"),
        ('logging.error("%s took %d ms: %s", name, 12, text)', "SomeService#3 \u2026"),
        ('logging.error(f"{name}: {text}")', "SomeService#3 \u2026"),
        ('logging.error("Nothing to hide")', "Nothing to hide"),
        ("logging.error(text)", "\u2026"),
    ],
)
def test_a_librarys_line_keeps_names_and_words_with_nothing_filled_in(
    statement: str, logged: str, lines: list[str], library: Callable[[str], None]
) -> None:
    library(statement)
    assert [line.rstrip("\n") for line in lines] == [logged]


@pytest.mark.parametrize("log", ["logger.exception", "logging.exception"])
def test_an_exception_is_logged_with_its_place_and_without_its_text(
    log: str, lines: list[str], library: Callable[[str], None]
) -> None:
    library(
        "def fail(secret):\n"
        "    try:\n"
        "        int(secret)\n"
        "    except ValueError as error:\n"
        "        raise RuntimeError(secret) from error\n"
        "try:\n"
        "    fail(text)\n"
        "except RuntimeError:\n"
        f'    {log}("It broke")\n'
    )
    (line,) = lines
    assert HEARD not in line
    assert line.startswith("It broke\nTraceback")
    assert "ValueError\n" in line and line.rstrip().endswith("RuntimeError")
    assert 'library.py", line 5, in fail' in line


@pytest.mark.parametrize("log", ["logger.error", "logging.error"])
def test_a_line_about_an_exception_says_of_which_type(
    log: str, lines: list[str], library: Callable[[str], None]
) -> None:
    broken = f"{log}(f'{{name}}: broken ({{error}})')"
    library(f"try:\n    int(text)\nexcept ValueError as error:\n    {broken}\n")
    assert [line.rstrip() for line in lines] == ["SomeService#3 \u2026 ValueError"]


def test_the_projects_own_lines_are_logged_as_they_are_written(lines: list[str]) -> None:
    logger.warning(f"Call {HEARD} is 3 s old")
    logging.warning("Call %s", HEARD)
    assert [line.rstrip() for line in lines] == [f"Call {HEARD} is 3 s old", f"Call {HEARD}"]


@pytest.mark.parametrize(
    "path", ["/ws/{token}", "/ws-client/{token}", "/ws?token={token}", "/a?x=1&token={token}"]
)
def test_tokens_in_addresses_do_not_reach_the_access_log(
    path: str, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    access = logging.getLogger("uvicorn.access")
    # A server that was configured in this process has given them handlers of their own.
    for logs in (access, logging.getLogger("uvicorn")):
        monkeypatch.setattr(logs, "handlers", [])
        monkeypatch.setattr(logs, "propagate", True)
    access.warning('%s - "%s %s HTTP/1.1" %d', "127.0.0.1", "GET", path.format(token=HEARD), 200)
    assert HEARD not in lines[0]
    assert lines[0].startswith('127.0.0.1 - "GET /') and lines[0].endswith('" 200')


def test_everything_is_logged_where_that_is_asked_for(
    lines: list[str], library: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOG_EVERYTHING", "1")
    library('logger.debug(f"saying {text}")')
    assert lines == [f"saying {HEARD}\n"]


async def prepare(bot: BotProcess, transport: str) -> tuple[Caller, str]:
    """Ask for a call as its transport does; return the caller, and the token it was given."""
    async with aiohttp.ClientSession() as http:
        body = {"transport": transport, "body": {"password": START_BODY}}
        async with http.post(f"{bot.url}/start", json=body):
            pass
        async with http.post(f"{bot.url}/start", data=f"{{not json: {START_BODY}"):
            pass
        async with http.post(f"{bot.url}/api/offer", json={"sdp": 1, "x": START_BODY}):
            pass
        async with http.get(f"{bot.url}/status?token={START_BODY}"):
            pass
        if transport == "webrtc":
            return WebRTCCaller(bot.url), ""
        caller = TwilioCaller(
            bot.url.replace("http", "ws", 1) + "/ws", parameters={"note": PARAMETER}
        )
        # A handshake that Pipecat cannot read, and complains of.
        async with http.ws_connect(caller._url) as socket:
            await socket.send_json({"event": "connected"})
            start = {"streamSid": "MZ1", "callSid": {"note": PARAMETER}}
            await socket.send_json({"event": "start", "streamSid": "MZ1", "start": start})
            await socket.receive(SECONDS)
        form = {"CallSid": caller.call_sid, "From": NUMBER, "To": "+15550199"}
        signature = Gate(KEYS["TWILIO_AUTH_TOKEN"]).signature(
            f"https://{PUBLIC_HOST}/", list(form.items())
        )
        headers = {"X-Twilio-Signature": signature.decode()}
        async with http.post(bot.url, data=form, headers=headers) as answer:
            token = (await answer.text()).partition('gate_token" value="')[2].partition('"')[0]
    assert token
    caller._parameters |= {"gate_token": token, "from_number": NUMBER}
    return caller, token


async def talk(bot: BotProcess, transport: str, engine: ScriptedEngine) -> str:
    """Say two things and press keys, for as long as the bot stays on the line."""
    caller, token = await prepare(bot, transport)
    voice = b"".join([piece.pcm async for piece in engine.speak("some words to say", 16000)])
    try:
        async with caller:
            await caller.hear(within=SECONDS)
            await caller.hear_out(quiet=0.5, within=SECONDS)
            if isinstance(caller, TwilioCaller):
                for digit in f"{DIGITS}#":
                    await caller.press(digit)
                await caller.hear_out(quiet=1.0, within=SECONDS)
            for _ in range(2):
                said = await caller.say(voice, 16000)
                await caller.hear(since=said.end, within=SECONDS)
                await caller.hear_out(quiet=0.5, within=SECONDS)
    except OSError:
        pass  # The bot hung up, as bots do when a provider fails.
    return token


def let_providers_fail(providers: Providers, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request of each kind fails in the middle of it all, with a text that tells too much."""
    server_of(providers, "llm").faults.rate_limited = 1
    providers.twilio.faults.server_errors = 1
    for server in providers.servers:
        said = f"{ERROR_TEXT}: {server.name}-key-8f1c said {HEARD}"
        error = {"error": {"message": said}, "message": said, "err_msg": said, "title": said}
        monkeypatch.setattr(server, "error", lambda _status, error=error: error)


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.parametrize(
    "transport, broken_kinds, everything",
    [("twilio", ("stt", "llm", "tts"), ""), ("webrtc", ("llm",), ""), ("twilio", (), "1")],
    ids=["twilio", "webrtc", "twilio-everything"],
)
async def test_the_log_of_faulty_calls_holds_no_key_no_token_and_no_word_of_theirs(
    transport: str,
    broken_kinds: tuple[str, ...],
    everything: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At TRACE. With LOG_EVERYTHING it does hold them: the search can find."""
    skip_unless_scripted()
    engine = ScriptedEngine(TALK)
    async with serve_providers(engine) as providers, RoarkReceiver() as roark:
        let_providers_fail(providers, monkeypatch)
        roark.fail("put", status=403, times=1)
        # It says why, and might repeat what was sent.
        roark.fail("call-ended", status=422, times=1)
        roark.fail("call-ended", status=401)
        world: dict[str, Any] = {
            **providers.environment,
            **KEYS,
            "ROARK_BASE_URL": roark.url,
            "CALLS_DIR": str(tmp_path / "calls"),
            # Nobody listens there.
            "MESSAGE_URL": f"http://127.0.0.1:{free_port()}/take?token={MESSAGE_TOKEN}",
            "LOG_EVERYTHING": everything,
        }
        options = ["-v"] + (["-x", PUBLIC_HOST] if transport == "twilio" else [])
        async with run_bot(transport, free_port(), world, options=options) as bot:
            tokens = [await talk(bot, transport, engine)]
            for kind in broken_kinds:
                broken = server_of(providers, kind)
                broken.faults.wrong_key = True
                tokens.append(await talk(bot, transport, engine))
                broken.faults.wrong_key = False
            await bot.stop()
            log = bot.log.read_text(encoding="utf-8")

    refused = {403, 422} if RECORDS_AUDIO else {422}
    failed = {429}
    if broken_kinds:
        refused, failed = refused | {401}, failed | {401}
    assert {request.status for request in roark.requests} >= refused
    assert {request.status for request in providers.log.requests} >= failed
    texts = {HEARD, GREETING, ANSWER, GOODBYE, TOOL_ARGUMENT, START_BODY, ERROR_TEXT}
    texts |= {ROARKS_ERROR_TEXT, MESSAGE_TOKEN, "X-Amz-Signature", *roark._urls}
    if transport == "twilio":
        texts |= {PARAMETER, DIGITS, NUMBER, NUMBER[1:], *tokens}
    found = {text for text in texts | set(KEYS.values()) if text in log}
    if everything:
        # A server for phone calls has no /start.
        assert found >= {HEARD, GREETING, ANSWER, TOOL_ARGUMENT, PARAMETER, tokens[0]}
    else:
        assert not found, f"{sorted(found)}, for example in: {example(log, found)}"


def example(log: str, found: set[str]) -> str:
    """The first line of the log with one of these."""
    return next(line for line in log.splitlines() if any(text in line for text in found))[:600]
