"""`python -m rehearsal` as a person starts it: calls, refusals, and nothing left running.

The slow ones start the real bot from a copy of the project in which a `.env` lies that would take
it out into the world.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import wave
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import av
import numpy as np
import pytest
from aiohttp import web
from harness import RECORDS_AUDIO

import config
import rehearsal
from rehearsal import stand_ins
from rehearsal.__main__ import _report, main
from rehearsal.call import Answered, conversation, recorded_voice, speculation, what_broke
from rehearsal.engines.scripted import ScriptedEngine
from rehearsal.host.bot_process import _harmless
from rehearsal.providers.all import serve, wire, wires
from rehearsal.providers.server import free_port

pytestmark = pytest.mark.anyio

PROJECT = Path(rehearsal.__file__).resolve().parent.parent
NOBODY_LISTENS = "127.0.0.1:9"
TEMPTING_ENV = f"""\
DEEPGRAM_API_KEY=real-key
DEEPGRAM_BASE_URL=ws://{NOBODY_LISTENS}
OPENAI_API_KEY=real-key
OPENAI_BASE_URL=http://{NOBODY_LISTENS}/v1
CARTESIA_API_KEY=real-key
CARTESIA_BASE_URL=ws://{NOBODY_LISTENS}
ROARK_API_KEY=real-key
ROARK_BASE_URL=http://{NOBODY_LISTENS}
CALLS_DIR=elsewhere
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project with a `.env` that points away from this machine's servers."""
    leave_out = shutil.ignore_patterns("tests", "evals", "calls", ".*", "__pycache__")
    copy = tmp_path / "project"
    shutil.copytree(PROJECT, copy, ignore=leave_out)
    (copy / ".env").write_text(TEMPTING_ENV, encoding="utf-8")
    return copy


class Started:
    """A running `python -m rehearsal`; its output is read line by line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []

    async def line(self, pattern: str, within: float = 60.0) -> re.Match[str]:
        """Wait for a line of its output; return the match."""
        assert self.process.stdout is not None
        async with asyncio.timeout(within):
            while text := (await self.process.stdout.readline()).decode():
                self.lines.append(text)
                if match := re.search(pattern, text):
                    return match
        raise AssertionError(f"it ended without {pattern!r}: {''.join(self.lines)}")

    async def finish(self, within: float = 90.0) -> int:
        """Wait for its end; return the status."""
        assert self.process.stdout is not None
        async with asyncio.timeout(within):
            self.lines += (await self.process.stdout.read()).decode().splitlines(keepends=True)
            return await self.process.wait()

    @property
    def output(self) -> str:
        return "".join(self.lines)


@asynccontextmanager
async def started(
    *arguments: str, project: Path = PROJECT, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Started]:
    """Start `python -m rehearsal`, with nothing of this machine's keys; kill it in the end."""
    clean = {name: value for name, value in os.environ.items() if "_KEY" not in name}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "rehearsal", *arguments),
        cwd=project,
        env={**clean, **(environment or {})},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield Started(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def run(*arguments: str, project: Path = PROJECT, **environment: str) -> tuple[int, str]:
    async with started(*arguments, project=project, environment=environment) as rehearsal:
        return await rehearsal.finish(), rehearsal.output


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def until_silent(port: int, within: float = 30.0) -> None:
    """Wait until nobody listens on `port`."""
    async with asyncio.timeout(within):
        while is_listening(port):
            await asyncio.sleep(0.05)


async def page_at(url: str) -> str:
    async with aiohttp.ClientSession(raise_for_status=True) as http, http.get(url) as response:
        return await response.text()


def write_wav(path: Path, *, channels: int = 1, samples: int = 1600) -> Path:
    with wave.open(str(path), "wb") as recording:
        recording.setnchannels(channels)
        recording.setsampwidth(2)
        recording.setframerate(8000)
        recording.writeframes(bytes(2 * channels * samples))
    return path


REFUSED = {
    ("call", "--wav", "missing.wav"): "missing.wav cannot be read: No such file or directory.",
    ("call", "--wav", "text.wav"): "text.wav is no recording that can be read",
    ("call", "--wav", "none.wav"): "none.wav is no recording that can be read",
    ("call", "--wav", "empty.wav"): "empty.wav holds no sound.",
    ("call", "--engine", "scripted", "--say", " "): "There is nothing to say in ' '.",
    ("providers", "--script", "missing.toml"): (
        "missing.toml cannot be read: No such file or directory."
    ),
    ("providers", "--script", "."): ". cannot be read: Is a directory.",
    ("call", "--script", "bad.toml"): "add --engine scripted.",
    ("call", "-t", "webrtc", "--transfer", "busy"): (
        "a telephone call with words and times of its own: leave out -t webrtc."
    ),
    ("call", "--transfer", "busy", "--say", "Hi.", "--latencies", "llm=9"): (
        "leave out --say, --latencies."
    ),
    ("call", "--transfer", "--engine", "scripted", "--script", "a.toml", "--wav", "a.wav"): (
        "leave out --wav, --script."
    ),
    ("providers", "--script", "bad.toml"): "a script has greeting, hears, answers; not gretting",
    ("call", "--engine", "scripted", "--script", "types.toml"): "types.toml: hears is a list",
}
# All in one process: each would load Pipecat.
REFUSE_EACH = """\
import json, sys
from rehearsal.__main__ import main
for arguments in json.loads(sys.argv[1]):
    print(main(arguments), file=sys.stderr)
"""


def test_what_cannot_be_used_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("not a sound")
    (tmp_path / "bad.toml").write_text('gretting = "Hello"')
    (tmp_path / "types.toml").write_text('hears = ["Hello", 3]')
    write_wav(tmp_path / "empty.wav", samples=0)
    zero_hz = bytearray(write_wav(tmp_path / "none.wav").read_bytes())
    zero_hz[24:28] = bytes(4)
    (tmp_path / "none.wav").write_bytes(zero_hz)
    done = subprocess.run(
        [sys.executable, "-c", REFUSE_EACH, json.dumps(list(REFUSED))],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = done.stderr.splitlines()
    assert (done.returncode, done.stdout, said[1::2]) == (0, "", ["2"] * len(REFUSED)), done
    for sentence, complaint in zip(said[::2], REFUSED.values(), strict=True):
        assert sentence.startswith("rehearsal: ") and complaint in sentence


def test_a_call_that_ended_in_an_error_is_a_failed_rehearsal() -> None:
    ending = {"reason": "error", "detail": "OpenAILLMService: unknown"}
    assert what_broke({"tools": [], "ending": ending}) == [
        "The call ended in an error: OpenAILLMService: unknown"
    ]
    assert what_broke({"tools": [], "ending": {**ending, "reason": "client-disconnected"}}) == []


def test_a_call_that_was_not_kept_is_a_failed_rehearsal(tmp_path: Path) -> None:
    """What its tools did and how it ended nobody can say."""
    call = SimpleNamespace(started={}, chunks=[], ended={})
    world = SimpleNamespace(roark=SimpleNamespace(calls={"a call": call}), calls_dir=tmp_path)
    (said,) = _report(cast(Any, world), "a call")
    assert said.startswith("No record of it in ")


def test_an_unknown_line_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["call", "-t", "carrier-pigeon"])
    assert "invalid choice: 'carrier-pigeon'" in capsys.readouterr().err


async def test_the_servers_alone_print_what_points_a_bot_at_them() -> None:
    async with started("providers") as servers:
        base_url = await servers.line(r"^ROARK_BASE_URL=http://127\.0\.0\.1:(\d+)$")
        names = [line.split("=")[0] for line in servers.lines]
        assert {"DEEPGRAM_BASE_URL", "OPENAI_BASE_URL", "CARTESIA_BASE_URL"} < set(names)
        assert {*config.REQUIRED, "ROARK_API_KEY"} < set(names)
        assert is_listening(int(base_url[1]))
        servers.process.send_signal(signal.SIGTERM)
        assert await servers.finish() == 0
    assert "Traceback" not in servers.output


async def test_the_servers_take_the_ports_they_are_told() -> None:
    port = free_port()
    async with started("providers", "--port", str(port)) as servers:
        await servers.line(rf"^DEEPGRAM_BASE_URL=ws://127\.0\.0\.1:{port}$")
        status, output = await run("providers", "--port", str(port))
    assert status == 2
    assert f"port {port}" in output and output.count("\n") == 1


def test_a_busy_port_is_stepped_over() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        taken = busy.getsockname()[1]
        assert free_port(taken) > taken


def test_a_free_port_is_none_that_a_connection_is_given_before_it_is_bound() -> None:
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if not given.exists():
        pytest.skip("this system does not tell which ports it gives to connections")
    assert 1024 < free_port() < int(given.read_text().split()[0])


@pytest.mark.parametrize("channels", [1, 2])
def test_a_recording_is_said_at_its_own_rate_in_mono(tmp_path: Path, channels: int) -> None:
    voice = recorded_voice(write_wav(tmp_path / "short.wav", channels=channels))
    assert (voice.sample_rate, voice.seconds) == (8000, 0.2)


def test_a_wav_of_extensible_format_is_a_recording_too(tmp_path: Path) -> None:
    plain = write_wav(tmp_path / "plain.wav").read_bytes()
    guid = bytes.fromhex("0100000000001000800000aa00389b71")
    form = b"\xfe\xff" + plain[22:36] + (22).to_bytes(2, "little") + b"\x10\0\4\0\0\0" + guid
    chunk = b"fmt " + len(form).to_bytes(4, "little") + form
    path = tmp_path / "extensible.wav"
    path.write_bytes(b"RIFF" + (4 + len(chunk) + 3208).to_bytes(4, "little") + b"WAVE" + chunk)
    with path.open("ab") as file:
        file.write(plain[36:])
    assert recorded_voice(path).seconds == 0.2


@pytest.mark.parametrize("name", ["talk.mp3", "talk.ogg", "talk.m4a"])
def test_a_compressed_recording_is_one_too(tmp_path: Path, name: str) -> None:
    codec = {"talk.mp3": "mp3", "talk.ogg": "libopus", "talk.m4a": "aac"}[name]
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=16000)
        assert isinstance(stream, av.AudioStream)
        stream.layout = "mono"
        tone = (8000 * np.sin(np.arange(16000) / 10)).astype("<i2").reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
        frame.sample_rate = 16000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    voice = recorded_voice(tmp_path / name)
    assert voice.sample_rate in (16000, 48000)
    assert voice.seconds == pytest.approx(1.0, abs=0.15)


def turn_of(role: str, text: str, start_ms: float) -> dict[str, Any]:
    began = datetime.fromtimestamp(1000 + start_ms / 1000, UTC)
    return {"role": role, "text": text, "start_ms": start_ms, "started_at": began.isoformat()}


def test_the_conversation_shows_each_measured_time_at_its_answer_and_the_tools_between() -> None:
    """Also where several things were said before the answer that was measured."""
    tool = {"name": "look_up", "arguments": '{"id": 7}', "at_ms": 5200, "error": None}
    record = {
        "turns": [
            turn_of("assistant", "Hello.", 40),
            turn_of("user", "Hi.", 2500),
            turn_of("assistant", "Yes?", 3500),
            turn_of("user", "Look it up.", 4500),
            turn_of("assistant", "It is blue.", 6000),
        ],
        "tools": [{**tool, "status": "completed", "result": '{"colour": "blue"}'}],
    }
    latency = {"parts": {"pause_ms": 200, "llm_ms": 460, "line_ms": 50}, "llm_saved_ms": 310}
    record["turns"][4]["latency"] = latency
    assert conversation(record, [Answered(1006.2, 1.234)]) == [
        "   0.04 s  bot     Hello.",
        "   2.50 s  caller  Hi.",
        "   3.50 s  bot     Yes?",
        "   4.50 s  caller  Look it up.",
        '   5.20 s  tool    look_up {"id": 7} completed: {"colour": "blue"}',
        "   6.00 s  bot     It is blue.  [after 1.23 s]\n"
        "                   pause 0.20, LLM 0.46 (0.31 saved), line 0.57",
    ]
    record["usage"] = {"llm_requests": 3, "llm_requests_withdrawn": 1}
    assert speculation(record) == (
        "Answers begun in the caller's pause saved 0.31 s, in 1 of 1 turns; requests to the LLM "
        "that were withdrawn: 1 of 3."
    )
    assert speculation({"turns": record["turns"][:4]}) == ""


@pytest.mark.parametrize(
    "built",
    [
        'GroqLLMService(api_key=setting("GROQ_API_KEY"))',
        # The class has a server, but nothing can point it there.
        'OpenAILLMService(base_url="https://api.groq.com/openai/v1")',
        "my_own()",
    ],
)
def test_a_service_without_a_server_here_is_named_with_what_stands_in(
    built: str, tmp_path: Path
) -> None:
    assert stand_ins.sentences() == []
    swapped = tmp_path / "services.py"
    before = '# return OpenAILLMService(base_url=setting("OPENAI_BASE_URL"))'
    swapped.write_text(f"def create_llm(instructions):\n    {before}\n    return {built}\n")
    named = built.partition("(")[0] if "Service" in built else "what create_llm() builds"
    own = next(wire(name) for name in wires() if wire(name).kind == "llm")
    assert stand_ins.sentences(swapped) == [
        f"The rehearsal has no server for {named}: {own.speaks_to[0]} stands in for it."
    ]


async def test_every_service_that_has_a_server_can_stand_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serve(ScriptedEngine()) as providers:
        for name, value in providers.environment.items():
            monkeypatch.setenv(name, value)
        for own in map(wire, wires()):
            instructions = ["Be kind."] * (own.kind == "llm")
            built = stand_ins.factory_for(own)(*instructions)
            assert type(built).__name__ in own.speaks_to


def test_where_nothing_can_stand_in_the_rehearsal_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stand_ins, "_has_server", lambda *_: False)
    monkeypatch.setattr(stand_ins, "wires", lambda: [])
    with pytest.raises(ValueError, match=r"no server for .*, nor another stt to stand in"):
        stand_ins.sentences()


def test_addresses_on_this_machine_are_left_to_the_rehearsed_bot_and_no_others() -> None:
    here = {"STOCK_URL": "http://127.0.0.1:8000/stock", "BOOKING_URL": "http://localhost/"}
    away = {
        "OTHER_URL": "https://example.org",
        "HTTP_PROXY": "http://127.0.0.1:3128",
        "PROXY_URL": "http://127.0.0.1:3128",
        "OTEL_EXPORTER_URL": "http://localhost:4318",
        "STOCK_KEY": "http://localhost/",
        "ODD_URL": "http://[",
    }
    assert _harmless({**here, **away}) == here


async def test_the_bot_reads_no_env_file_and_ends_with_its_rehearsal(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("OPENAI_API_KEY=real-key\n")
    (tmp_path / "bot.py").write_text(
        "import os, sys, time\n"
        "from dotenv import load_dotenv\n"
        "load_dotenv(override=True)\n"
        "print(__name__, sys.argv, os.environ['OPENAI_API_KEY'], flush=True)\n"
        "time.sleep(60)\n"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "rehearsal.host.launch_bot", "bot.py", "-t", "twilio"),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "OPENAI_API_KEY": "rehearsal"},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    async with asyncio.timeout(30):
        line = (await process.stdout.readline()).decode().strip()
        assert line == "__main__ ['bot.py', '-t', 'twilio'] rehearsal"
        process.stdin.close()
        assert await process.wait() == -signal.SIGTERM


def channels_of(path: Path) -> tuple[np.ndarray, np.ndarray, int]:
    with wave.open(str(path)) as recording:
        assert recording.getnchannels() == 2
        samples = np.frombuffer(recording.readframes(recording.getnframes()), "<i2")
        return samples[0::2], samples[1::2], recording.getframerate()


@pytest.mark.slow
async def test_a_call_is_answered_recorded_and_at_roark(project: Path) -> None:
    """From a browser; the dialogue below is held by phone."""
    calls = project / "kept"
    status, output = await run(
        *("call", "-t", "webrtc", "--engine", "scripted", "--say", "What are your opening hours?"),
        project=project,
        CALLS_DIR=str(calls),
    )
    assert status == 0, output
    assert re.search(r"caller  Can you hear me\?", output)
    assert re.search(
        r"bot     Yes, I can hear you\. .*\[after \d\.\d\d s\]\n +\w+ \d\.\d\d, .*line ", output
    )
    record = next(calls.glob("*/call.json"))
    turns = json.loads(record.read_bytes())["turns"]
    # A busy machine pauses between sentences, and makes two turns of a greeting.
    assert [role for role, _ in groupby(turn["role"] for turn in turns)] == [
        *("assistant", "user", "assistant")
    ]
    if not RECORDS_AUDIO:
        assert "has: call-started, call-ended" in output
        return
    assert re.search(r"has: call-started, \d+ chunks of audio, call-ended", output)
    assert f"kept/{record.parent.name}/recording.wav" in output
    left, right, rate = channels_of(record.with_name("recording.wav"))
    # The caller speaks between the bot's greeting and its answer: left loud, right silent there.
    loud_left, loud_right = (np.flatnonzero(np.abs(side) > 1000) / rate for side in (left, right))
    during = (loud_right > loud_left[0] + 0.2) & (loud_right < loud_left[-1] - 0.2)
    assert loud_right[0] < loud_left[0] < loud_left[-1] < loud_right[-1]
    assert not during.any()


DIALOGUE = """\
greeting = "Hello."
hears = ["Is it in stock?", "Buy it.", "Goodbye."]

[[answers]]
heard = "stock"
says = "It is. Shall I buy it?"

[[answers]]
heard = "buy it"
calls = [{ name = "buy", arguments = { id = 7 } }]

[[answers]]
result = "buy"
calls = [{ name = "send", arguments = {} }]

[[answers]]
result = "send"
says = "It is bought."

[[answers]]
heard = "goodbye"
calls = [{ name = "end_call", arguments = { goodbye = "Goodbye." } }]
"""
BUY = """

async def buy(params: FunctionCallParams, id: int):
    \"\"\"Buy something.

    Args:
        id: Its number.
    \"\"\"
    import httpx

    async with httpx.AsyncClient() as http:
        answer = await http.post(setting("STOCK_URL"), json={"id": id})
    await params.result_callback(answer.json())
"""


@pytest.mark.slow
async def test_a_dialogue_with_a_tool_of_ones_own_is_rehearsed_by_one_command(
    project: Path,
) -> None:
    """The tool asks a server on this machine. Another is called and not there: an error."""
    bought: list[Any] = []

    async def buy(request: web.Request) -> web.Response:
        bought.append(await request.json())
        return web.json_response({"order": "A-1"})

    app = web.Application()
    app.router.add_post("/buy", buy)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    (project / "dialogue.toml").write_text(DIALOGUE)
    tools = project / "tools.py"
    source = tools.read_text(encoding="utf-8")
    assert source.count("    if setting(") == 1
    offer = "    tools.append(buy)\n    if setting("
    tools.write_text(source.replace("    if setting(", offer) + BUY)
    try:
        status, output = await run(
            *("call", "-t", "twilio", "--engine", "scripted", "--script", "dialogue.toml"),
            project=project,
            STOCK_URL=f"http://127.0.0.1:{runner.addresses[0][1]}/buy",
            CALLS_DIR=str(project / "kept"),
        )
    finally:
        await runner.cleanup()
    assert status == 1, output
    assert bought == [{"id": 7}]
    assert re.search(r'tool    buy \{"id": ?7\} completed: .*A-1', output)
    assert re.search(r"bot     It is bought\. .*\[after", output)
    assert "The tool buy was called and failed: " not in output
    assert "The tool send was called and failed: " in output
    assert "The bot hangs up." in output


@pytest.mark.slow
async def test_a_caller_is_handed_to_a_colleague_who_is_busy_and_comes_back_in_german(
    tmp_path: Path,
) -> None:
    """By the bot's own command line, with every request of Twilio's signed."""
    status, output = await run(
        *("call", "--transfer", "busy", "--engine", "scripted"),
        LANGUAGE="de",
        CALLS_DIR=str(tmp_path),
    )
    assert status == 0, output
    said = [line[11:].split("  [")[0].strip() for line in output.splitlines() if " s  " in line]
    assert [line for line in said if line.startswith(("bot", "caller"))] == [
        "bot     Guten Tag, was kann ich für Sie tun?",
        "caller  Ich möchte bitte mit einem Menschen sprechen.",
        "bot     Ich verbinde Sie. Einen Moment, bitte.",
        "bot     Bei Anna ist gerade besetzt. Soll ich ihr sagen, dass Sie den Termin am Dienstag "
        "verlegen möchten?",
        "caller  Richten Sie ihr das bitte aus.",
        "bot     Das richte ich ihr aus.",
    ]
    records = [json.loads(one.read_bytes()) for one in sorted(tmp_path.glob("*/call.json"))]
    assert [one["ending"]["reason"] for one in records] == ["transferred", "client-disconnected"]
    assert "Ending: transferred (handed over to anna)" in output
    assert records[1]["metadata"]["transfer_outcome"] == "busy"


@pytest.mark.slow
async def test_the_bot_calls_a_voicemail_by_one_command_in_german(project: Path) -> None:
    """By the owner's own command, through the gate, with the message of voicemail.md."""
    (project / "voicemail.md").write_text("Guten Tag {name}, es geht um: {reason}.", "utf-8")
    status, output = await run(
        *("dial", "--callee", "voicemail", "--engine", "scripted"),
        project=project,
        LANGUAGE="de",
        CALL_GREETING="Guten Tag.",
        CALLS_DIR=str(project / "kept"),
    )
    assert status == 0, output
    assert "Picked up." in output
    assert re.search(r"bot +Guten Tag Anna, es geht um: Ihr Termin am Freitag\.", output)
    assert "Ending: voicemail (the message of voicemail.md was left)" in output
    (record,) = [json.loads(one.read_bytes()) for one in project.glob("kept/*/call.json")]
    assert record["metadata"]["direction"] == "outbound"


@pytest.mark.slow
async def test_a_bot_that_never_answers_is_reported_with_the_end_of_its_log(project: Path) -> None:
    with (project / "tools.py").open("a") as file:
        file.write("\n\ndef offered():\n    raise LookupError\n")
    status, output = await run("call", "-t", "twilio", "--engine", "scripted", project=project)
    assert status == 1
    assert "The bot never answered: the bot ended the call without a word." in output
    assert "LookupError" in output


@pytest.mark.slow
async def test_a_bot_that_does_not_start_is_reported_with_the_end_of_its_log(project: Path) -> None:
    (project / "bot.py").write_text("raise SystemExit('no bot today')")
    status, output = await run("call", "-t", "twilio", "--engine", "scripted", project=project)
    assert status == 1
    assert "The bot ended with status 1." in output
    assert "no bot today" in output


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
async def test_nothing_is_left_running_when_a_rehearsal_ends(
    project: Path, how: signal.Signals
) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        taken = busy.getsockname()[1]
        async with started("--port", str(taken), "--engine", "scripted", project=project) as talk:
            port = int((await talk.line(r"http://localhost:(\d+)"))[1])
            assert f"Port {taken} is in use; taking {port}." in talk.output
            page = await page_at(f"http://127.0.0.1:{port}/")
            assert "Call the bot" in page and "://" not in page
            talk.process.send_signal(how)
            assert await talk.finish() == (0 if how is signal.SIGINT else -how)
        await until_silent(port)
    assert "Traceback" not in talk.output
