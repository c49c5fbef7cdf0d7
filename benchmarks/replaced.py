"""Three processes behind the proxy of DEPLOY.md: one is replaced in the middle of fifteen calls.

    uv run python -m benchmarks replaced

The Caddyfile is the one in the document, on other ports and without TLS. Every call comes as Twilio
sends it: a signed request for its TwiML, then a stream with the token out of it, each through the
proxy, so that one process checks what another one signed. Then strangers send bodies that never
end, through the proxy, too. Needs `caddy`, a package of Debian.
"""

import asyncio
import os
import re
import shutil
import signal
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import aiohttp
from rehearsal.callers.twilio import TwilioCaller
from rehearsal.engines.scripted import Answer, Script, ScriptedEngine
from rehearsal.host.bot_process import BotFailed, BotProcess, run_bot
from rehearsal.providers.all import serve
from rehearsal.providers.roark import RoarkReceiver
from rehearsal.providers.server import free_port
from telephony.twilio_auth import Gate

from benchmarks import PROJECT
from benchmarks.speed import VOICE_HZ

PROCESSES, CALLS = 3, 15
LINES = CALLS // PROCESSES
"""MAX_CALLS of a process: with fifteen calls all are full."""
SLOWNESS = 4.0
"""The callers' sound takes four times its time: as much to do as from four calls in real time. In
real time fifteen calls that say nothing took 1.9 of two cores (the three processes 0.5 each,
callers and providers 0.3, Caddy 0.1), and where something else ran, too, the sound of all came
later and later."""
SLOW_BODIES = 600
SLOW_SECONDS = 15.0
"""The proxy gives up after ten."""
HOST, AUTH_TOKEN = "voice.example.org", "an-auth-token-of-twilio"
SECONDS = 30.0
ANSWER_SECONDS = 15.0
HEALTH_SECONDS = 2.5
"""Caddy asks each process every second."""
SCRIPT = Script(
    greeting="Hello there.",
    hears=("Can you hear me?",) * 3,
    answers=(Answer(says="Yes, loud and clear."),),
)
SLOW_BODY = (
    f"POST / HTTP/1.1\r\nHost: {HOST}\r\nX-Twilio-Signature: x\r\nContent-Length: 500\r\n\r\nabc"
).encode()


@dataclass
class Replaced:
    """What happened.

    Parameters:
        held: Calls that were greeted.
        cut: Calls that were over before their caller hung up.
        refused: Calls that were told that all lines are busy, or got no answer.
        drained: How long the old process stayed, seconds.
        asked: Questions asked while it was draining and after.
        answered: How long each of them waited for its answer, seconds.
        whole: Calls that Roark has whole.
        closed: How long the slowest of the slow bodies was let wait, seconds.
        descriptors: The most that one process had open meanwhile.
        greeted_beside: How long a new caller waited for the greeting meanwhile, seconds.
    """

    held: int = 0
    cut: int = 0
    refused: int = 0
    drained: float = 0.0
    asked: int = 0
    answered: list[float] = field(default_factory=list[float])
    whole: int = 0
    closed: float = 0.0
    descriptors: int = 0
    greeted_beside: float = 0.0


class House:
    """The processes, by their ports, and the proxy before them."""

    def __init__(self, folder: Path, environment: dict[str, str], found: Replaced) -> None:
        self.front = free_port()
        self.ports = [free_port(self.front + 1 + 10 * number) for number in range(PROCESSES)]
        self.bots: dict[int, BotProcess] = {}
        self.found = found
        self.lines: list[TwilioCaller] = []
        self._folder = folder
        self._environment = environment
        self._gate = Gate(AUTH_TOKEN)

    async def start(self, port: int, stack: AsyncExitStack) -> None:
        """Start a process."""
        options = ("-x", HOST)
        running = run_bot("twilio", port, self._environment, options=options)
        self.bots[port] = await stack.enter_async_context(running)

    async def proxy(self, stack: AsyncExitStack) -> None:
        """Start Caddy."""
        told = (PROJECT / "DEPLOY.md").read_text(encoding="utf-8")
        found = re.search(r"```\n(# /etc/caddy/Caddyfile.*?)```", told, re.DOTALL)
        assert found
        here = f"http://127.0.0.1:{self.front}, http://{HOST}:{self.front} {{"
        upstream = " ".join(f"127.0.0.1:{port}" for port in self.ports)
        text = found[1].replace(f"{HOST} {{", here)
        text = text.replace("127.0.0.1:7861 127.0.0.1:7862", upstream)
        file = self._folder / "Caddyfile"
        file.write_text(text.replace("{\n", "{\n    admin off\n", 1), encoding="utf-8")
        caddy = await asyncio.create_subprocess_exec(
            *("caddy", "run", "--config", str(file), "--adapter", "caddyfile"),
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, "HOME": str(self._folder)},
        )

        async def stop() -> None:
            caddy.terminate()
            await caddy.wait()

        stack.push_async_callback(stop)
        await asyncio.sleep(HEALTH_SECONDS)

    async def calls_on(self) -> dict[int, int]:
        """How many calls each process has."""
        async with aiohttp.ClientSession() as http:
            answers = {port: await http.get(f"{bot.url}/status") for port, bot in self.bots.items()}
            return {port: (await answer.json())["calls"] for port, answer in answers.items()}

    async def call(self, number: int) -> TwilioCaller | None:
        """Call as Twilio does; None where there was no line."""
        address = f"http://127.0.0.1:{self.front}"
        line = TwilioCaller(f"ws://127.0.0.1:{self.front}/ws", from_number=f"+1555{number:07}")
        form = {"CallSid": line.call_sid, "From": line.from_number, "To": line.to_number}
        signature = self._gate.signature(f"https://{HOST}/", list(form.items())).decode()
        headers = {"Host": HOST, "X-Twilio-Signature": signature}
        async with (
            aiohttp.ClientSession() as twilio,
            twilio.post(address, data=form, headers=headers) as answer,
        ):
            streams = list(ElementTree.fromstring(await answer.text()).iter("Stream"))
        if not streams:
            self.found.refused += 1
            return None
        parameters = {each.get("name", ""): each.get("value", "") for each in streams[0]}
        call = TwilioCaller(
            f"ws://127.0.0.1:{self.front}/ws",
            from_number=line.from_number,
            parameters=parameters,
        )
        call.call_sid = line.call_sid
        call.slowness = SLOWNESS
        await call.dial()
        self.lines.append(call)
        await call.hear(within=SECONDS)
        self.found.held += 1
        return call


async def measure() -> Replaced:
    """Hold the calls, replace a process, and let strangers wait."""
    found = Replaced()
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="replaced-")))
        providers = await stack.enter_async_context(serve(ScriptedEngine(SCRIPT)))
        roark = await stack.enter_async_context(RoarkReceiver())
        environment = {
            **providers.environment,
            "ROARK_BASE_URL": roark.url,
            "ROARK_API_KEY": "key",
            "CALLS_DIR": str(folder / "calls"),
            "TWILIO_AUTH_TOKEN": AUTH_TOKEN,
            "MAX_CALLS": str(LINES),
            "DRAIN_SECONDS": "60",
            # Nobody is said goodbye to while others are being put through.
            "SILENCE_SECONDS": "0",
        }
        house = House(folder, environment, found)
        old = await stack.enter_async_context(AsyncExitStack())
        for port in house.ports:
            await house.start(port, old if port == house.ports[0] else stack)
        await house.proxy(stack)

        try:
            await _hold(house, old, stack)
        finally:
            # Or each process would wait for its calls first, and hide what went wrong.
            gone = [line.hang_up() for line in house.lines]
            await asyncio.gather(*gone, return_exceptions=True)
        await roark.until(
            lambda: sum(call.whole for call in roark.calls.values()) == found.held, timeout=SECONDS
        )
        found.whole = sum(call.whole for call in roark.calls.values())
    return found


async def _hold(house: House, old: AsyncExitStack, stack: AsyncExitStack) -> None:
    """Hold the calls; `old` is what ends the process that is replaced."""
    found = house.found
    speech = b"".join(
        [piece.pcm async for piece in ScriptedEngine().speak("Can you hear me?", VOICE_HZ)]
    )

    async def ask(line: TwilioCaller) -> None:
        found.asked += 1
        said = await line.say(speech, VOICE_HZ)
        with suppress(TimeoutError):
            answer = await line.hear(since=said.end, within=ANSWER_SECONDS)
            found.answered.append(answer.start - said.end)
            await line.hear_out()

    lines: dict[int, list[TwilioCaller]] = {port: [] for port in house.ports}
    before = await house.calls_on()
    for number in range(CALLS):
        if line := await house.call(number):
            now = await house.calls_on()
            lines[next(port for port in house.ports if now[port] > before[port])].append(line)
            before = now

    first, *others = house.ports
    began = time.monotonic()
    house.bots[first].send_signal(signal.SIGTERM)
    await asyncio.sleep(HEALTH_SECONDS)
    for line in lines[first]:
        await ask(line)
        await _hang_up(line, found)
    try:
        await asyncio.wait_for(house.bots[first].wait_until_gone(), SECONDS)
    except BotFailed:
        found.drained = time.monotonic() - began
    await old.aclose()
    await house.start(first, stack)
    await asyncio.sleep(HEALTH_SECONDS)
    lines[first] = [
        line for number in range(LINES) if (line := await house.call(CALLS + number)) is not None
    ]
    for port in house.ports:
        await asyncio.gather(*map(ask, lines[port]))
    for line in lines[others[0]]:
        await _hang_up(line, found)
    # Until the proxy has noticed that there are lines.
    await asyncio.sleep(HEALTH_SECONDS)
    await _slow_bodies(house, found)
    for port in (first, *others[1:]):
        for line in lines[port]:
            await _hang_up(line, found)


async def _hang_up(line: TwilioCaller, found: Replaced) -> None:
    found.cut += line.ended.is_set()
    await line.hang_up()


async def _slow_bodies(house: House, found: Replaced) -> None:
    """Let strangers send a few bytes and wait, and see how another caller fares."""

    async def wait() -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", house.front)
        writer.write(SLOW_BODY)
        began = time.monotonic()
        await asyncio.wait_for(reader.read(), SLOW_SECONDS)
        writer.close()
        return time.monotonic() - began

    waiting = [asyncio.create_task(wait()) for _ in range(SLOW_BODIES)]
    await asyncio.sleep(1)
    found.descriptors = max(len(os.listdir(f"/proc/{bot.pid}/fd")) for bot in house.bots.values())
    began = time.monotonic()
    line = await house.call(2 * CALLS)
    found.greeted_beside = time.monotonic() - began
    if line:
        await _hang_up(line, found)
    found.closed = max(await asyncio.gather(*waiting))


def report() -> str:
    """Measure, and return the section for README.md."""
    if not shutil.which("caddy"):
        raise SystemExit("replaced needs caddy: apt-get install caddy")
    found = asyncio.run(measure())
    answered = sorted(found.answered)
    rows = [
        ("calls held", f"{found.held}"),
        ("cut before their caller hung up", f"{found.cut}"),
        ("told that all lines are busy", f"{found.refused}"),
        ("the old process stayed", f"{found.drained:.1f} s, until its {LINES} calls were over"),
        (
            "questions asked meanwhile and after, answered",
            f"{found.asked}, {len(answered)}; median {answered[len(answered) // 2]:.2f} s, "
            f"slowest {answered[-1]:.2f} s",
        ),
        ("whole at Roark", f"{found.whole}"),
        (f"{SLOW_BODIES} bodies that never end: closed within", f"{found.closed:.1f} s"),
        ("meanwhile a new caller was greeted after", f"{found.greeted_beside:.2f} s"),
        ("descriptors of a process", f"{found.descriptors}"),
    ]
    return "\n".join(
        [
            f"| {PROCESSES} processes behind Caddy, {CALLS} calls, one process replaced | |",
            "|---|---|",
            *(f"| {what} | {value} |" for what, value in rows),
        ]
    )
