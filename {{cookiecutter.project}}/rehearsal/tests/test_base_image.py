"""The bot under Pipecat Cloud's base image: what its server calls, cancels, swallows and drains."""

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from loguru import logger
from pipecatcloud.agent import DailySessionArguments

import bot
import config
from deploy import check as deploy
from rehearsal.callers.loopback_ice import keep_ice_on_loopback
from rehearsal.callers.twilio import TwilioCaller
from rehearsal.callers.webrtc import WebRTCCaller
from rehearsal.engines.scripted import ScriptedEngine
from rehearsal.host.base_image import BaseImage, Session, serve
from rehearsal.providers.all import serve as serve_providers
from rehearsal.providers.roark import ReceivedCall, RoarkReceiver

PROJECT = Path(bot.__file__).parent
SECONDS = 30.0
"""What a call may take on a busy machine before its test gives up."""


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What was logged at INFO and above, with the session id in front."""
    lines: list[str] = []
    sink = logger.add(lines.append, level="INFO", format="{extra[session_id]} {level} {message}")
    logger.configure(extra={"session_id": "NONE"})
    yield lines
    logger.remove(sink)


@pytest.fixture
async def roark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[RoarkReceiver]:
    """A Roark and providers on this machine, and the environment that points the bot there."""
    keep_ice_on_loopback()
    async with (
        serve_providers(ScriptedEngine()) as providers,
        RoarkReceiver() as receiver,
    ):
        # As in the image, ENV is not set.
        monkeypatch.delenv("ENV", raising=False)
        environment = providers.environment | {
            "ROARK_BASE_URL": receiver.url,
            "ROARK_API_KEY": "rehearsal",
            "CALLS_DIR": str(tmp_path / "calls"),
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield receiver


@pytest.fixture
def image() -> BaseImage:
    """The image with this project's bot in it."""
    return BaseImage(bot)


def websocket_url(http_url: str) -> str:
    """Return where Twilio's stream connects."""
    return http_url.replace("http", "ws", 1) + "/ws"


async def over(image: BaseImage, number: int = 0) -> Session:
    """Wait for bot() to return from its n-th session."""
    session = image.sessions[number]
    await asyncio.wait_for(session.returned.wait(), SECONDS)
    return session


def the_call(roark: RoarkReceiver) -> ReceivedCall:
    """Return the one call that Roark has received."""
    (call,) = roark.calls.values()
    return call


@pytest.mark.anyio
@pytest.mark.parametrize("token", ["", "token"], ids=["no-credentials", "credentials"])
async def test_a_phone_call_is_delivered_before_bot_returns(
    image: BaseImage, roark: RoarkReceiver, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    """/ws: the platform takes the container back when bot() returns, so nothing may be left.

    Credentials let the bot hang up; they must not make it ask for what only TwiML of its own holds.
    """
    monkeypatch.setenv("TWILIO_ACCOUNT_SID", f"AC{token}")
    monkeypatch.setenv("TWILIO_AUTH_TOKEN", token)
    async with serve(image) as url:
        async with TwilioCaller(websocket_url(url)) as caller:
            await caller.hear(within=SECONDS)
        session = await over(image)
        # Not awaited: it has to be there now.
        assert session.error is None
        assert the_call(roark).whole
        assert the_call(roark).ended


@pytest.mark.anyio
async def test_a_browser_call_is_delivered_before_bot_returns(
    image: BaseImage, roark: RoarkReceiver
) -> None:
    """/api/offer: the session runs on in the background after the answer."""
    async with serve(image) as url:
        async with WebRTCCaller(url) as caller:
            await caller.hear(within=SECONDS)
        session = await over(image)
        assert session.error is None
        assert the_call(roark).whole


@pytest.mark.anyio
async def test_a_session_at_its_limit_is_cancelled_and_delivered(
    image: BaseImage, roark: RoarkReceiver
) -> None:
    """The platform cancels bot(); what was said until then arrives all the same."""
    headers = {
        "x-daily-session-id": "limited",
        "x-daily-transport-type": "webrtc",
        "x-pcc-max-session-seconds": "2",
    }
    async with serve(image) as url, aiohttp.ClientSession() as platform:
        start = asyncio.create_task(platform.post(f"{url}/bot", json={}, headers=headers))
        async with WebRTCCaller(url):
            session = await over(image)
        assert session.cancelled and session.error is None
        assert the_call(roark).whole
        assert (await start).status == 200


@pytest.mark.anyio
async def test_one_process_serves_many_sessions(image: BaseImage, roark: RoarkReceiver) -> None:
    """A warm container takes one call after the other; none knows of those before."""
    async with serve(image) as url:
        for number in range(3):
            async with TwilioCaller(websocket_url(url)) as caller:
                await caller.hear(within=SECONDS)
            assert (await over(image, number)).error is None
        async with WebRTCCaller(url) as browser:
            await browser.hear(within=SECONDS)
        await over(image, 3)
    assert len(roark.calls) == 4
    for call in roark.calls.values():
        assert call.whole
        assert call.stored["call-started"] == call.stored["call-ended"] == 1


@pytest.mark.anyio
async def test_a_session_without_a_transport_ends_in_one_clear_line(
    image: BaseImage, roark: RoarkReceiver, log: list[str]
) -> None:
    """POST /bot without room or offer: the image swallows the exception, so the bot must speak."""
    async with serve(image) as url, aiohttp.ClientSession() as platform:
        headers = {"x-daily-session-id": "no-transport"}
        async with platform.post(f"{url}/bot", json={}, headers=headers) as response:
            assert (response.status, await response.json()) == (200, {})
    ours = [line for line in log if "Exception running bot()" not in line]
    assert len(ours) == 1
    assert "no-transport WARNING" in ours[0]
    assert "without a transport" in ours[0]
    assert "Traceback" not in "".join(log)


@pytest.mark.anyio
async def test_a_session_with_a_daily_room_gets_as_far_as_joining(
    image: BaseImage, roark: RoarkReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """POST /bot with room headers: the room's address and token reach Daily's client."""
    transport = pytest.importorskip("pipecat.transports.daily.transport")
    joined = asyncio.get_running_loop().create_future()

    async def join(client: object) -> None:
        joined.set_result(client.room_url)  # type: ignore[attr-defined]
        raise ConnectionError("no room on this machine")

    # The last step before Daily's native library opens connections to the internet.
    monkeypatch.setattr(transport.DailyTransportClient, "join", join)
    headers = {
        "x-daily-session-id": "daily",
        "x-daily-room-url": "https://rehearsal.daily.co/room",
        "x-daily-room-token": "token",
        "x-pcc-max-session-seconds": "5",
    }
    async with serve(image) as url, aiohttp.ClientSession() as platform:
        started = asyncio.create_task(platform.post(f"{url}/bot", json={}, headers=headers))
        assert await asyncio.wait_for(joined, SECONDS) == headers["x-daily-room-url"]
        args = image.sessions[0].args
        assert isinstance(args, DailySessionArguments) and args.token == "token"
        assert (await started).status == 200


@pytest.mark.anyio
async def test_a_websocket_that_is_no_call_is_refused_in_one_line_and_the_next_call_works(
    image: BaseImage, roark: RoarkReceiver, log: list[str]
) -> None:
    async with serve(image) as url, aiohttp.ClientSession() as stranger:
        async with stranger.ws_connect(websocket_url(url)) as socket:
            await socket.send_json({"hello": "world"})
            await socket.send_json({"hello": "again"})
            await socket.receive(timeout=SECONDS)
        assert (await over(image, 0)).error is None
        assert sum("A call was refused" in line for line in log) == 1
        async with TwilioCaller(websocket_url(url)) as caller:
            await caller.hear(within=SECONDS)
        assert (await over(image, 1)).error is None


@pytest.mark.anyio
async def test_health_is_answered_and_readiness_is_the_bots_own(
    image: BaseImage, roark: RoarkReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/livez and /readyz; a bot without its keys is alive and not ready."""
    async with serve(image) as url, aiohttp.ClientSession() as platform:
        assert (await platform.get(f"{url}/livez")).status == 200
        assert (await platform.get(f"{url}/readyz")).status == 200
        needed = next(iter(config.REQUIRED))
        monkeypatch.delenv(needed)
        answer = await platform.get(f"{url}/readyz")
        assert answer.status == 503
        assert needed in await answer.text()


@asynccontextmanager
async def deployed(folder: Path) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """Run what the Dockerfile copies, and nothing else, in a process of its own; yield its URL."""
    context, app = folder / "context", folder / "app"
    app.mkdir()
    deploy.unpack(deploy.pack_context(PROJECT), context)
    deploy.lay_out_image(context, app, PROJECT / "Dockerfile")
    # The image's own files beside them, with what keeps WebRTC on this machine.
    harness = folder / "harness" / "rehearsal"
    harness.mkdir(parents=True)
    for name in ("__init__.py", "host/__init__.py", "host/base_image.py"):
        (harness / name).parent.mkdir(exist_ok=True)
        shutil.copy(PROJECT / "rehearsal" / name, harness / name)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "rehearsal.host.base_image"),
        cwd=app,
        env=os.environ | {"PYTHONPATH": str(harness.parent)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdout
        url = (await asyncio.wait_for(process.stdout.readline(), SECONDS)).decode().strip()
        yield url, process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_stopped_container_lets_the_call_finish_and_delivers_it(
    roark: RoarkReceiver, tmp_path: Path
) -> None:
    """SIGTERM: no new calls, the one in progress goes on until the caller hangs up, then exit."""
    async with deployed(tmp_path) as (url, process):
        async with TwilioCaller(websocket_url(url)) as caller:
            greeting = await caller.hear(within=SECONDS)
            await caller.hear_out()
            process.send_signal(signal.SIGTERM)
            await refuses_connections(url)
            assert not caller.ended.is_set()
            speech = b"".join(
                [piece.pcm async for piece in ScriptedEngine().speak("are you still there", 8000)]
            )
            said = await caller.say(speech, 8000)
            answer = await caller.hear(since=said.end, within=SECONDS)
            assert answer.start > said.end > greeting.end
        await asyncio.wait_for(process.wait(), SECONDS)
    assert the_call(roark).whole
    assert the_call(roark).ended


async def refuses_connections(url: str) -> None:
    """Wait until nobody listens there any more."""
    port = int(url.rpartition(":")[2])
    async with asyncio.timeout(SECONDS):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                return
            except ConnectionResetError:  # It stopped between two steps of this very handshake.
                continue
            writer.close()
