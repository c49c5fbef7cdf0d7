"""Runs the default bot on an emulated arm64 Linux: does it import, and does a call go through?

The nearest one gets to Pipecat Cloud's arm64 without an arm64 machine or Docker: a Debian userland
for arm64 in a folder, run through QEMU's user emulation, with the project's dependencies as their
aarch64 wheels. Only the bot is emulated; providers, caller and Roark are the rehearsal's, on this
machine. Root, Debian, network and some ten minutes are needed, so it is no part of the tests:

    sudo .venv/bin/python benchmarks/arm64.py FOLDER

FOLDER is kept and used again. It differs from the image in two ways: Debian 12 and its Python 3.11
instead of Debian 13 and 3.12, because bootstrapping Debian 13 under emulation takes far longer.

Seen on 2026-11-21 (x86-64, two busy cores, QEMU 7.2): bot.py, aiortc, PyAV, opencv, onnxruntime,
numba and Silero import and load; a phone call through the base image's contract was greeted,
heard, answered and delivered to Roark complete. daily-python 0.36 does not import, for want of
GCC 14's libgcc, which Debian 13 and the image have; the phone call did not need it.
"""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = "python3,python3-venv,ca-certificates,libstdc++6"
PATIENCE_SECONDS = 180.0
"""For what takes a second or two when it is not emulated."""
FRAME_SECONDS = 0.2
"""Time between two 20 ms pieces of the caller's audio: emulated, voice detection is slower than
real time, so the caller speaks in slow motion. What counts samples does not notice."""


def run(*command: str | Path) -> None:
    """Run a command as a considerate neighbour."""
    print("+", *command, flush=True)
    subprocess.run(["nice", *command], check=True)


def bootstrap(userland: Path) -> None:
    """Make the arm64 userland, unless the folder has one."""
    if not shutil.which("debootstrap") or not shutil.which("qemu-aarch64-static"):
        run("apt-get", "install", "-y", "-qq", "debootstrap", "qemu-user-static", "binfmt-support")
    if not Path("/proc/sys/fs/binfmt_misc/register").exists():
        run("mount", "binfmt_misc", "-t", "binfmt_misc", "/proc/sys/fs/binfmt_misc")
    run("update-binfmts", "--enable", "qemu-aarch64")
    if (userland / "usr/bin/python3").exists() and not (userland / "debootstrap").exists():
        return
    options = ["--arch=arm64", "--foreign", "--variant=minbase", f"--include={PACKAGES}"]
    run("debootstrap", *options, "bookworm", userland)
    run("chroot", userland, "/debootstrap/debootstrap", "--second-stage")


def install(userland: Path) -> None:
    """Bake the default project into the userland's /app and install its aarch64 wheels."""
    clone, baked, app = (userland / name for name in ("clone", "baked", "app"))
    for folder in (clone, baked, app):
        shutil.rmtree(folder, ignore_errors=True)
    # What is committed: a working copy may hold compiled files that do not render.
    run("git", "clone", "-q", "--depth", "1", ROOT.as_uri(), clone)
    run(sys.executable, "-m", "cookiecutter", "--no-input", "--output-dir", baked, clone)
    shutil.move(next(baked.iterdir()), app)
    run(
        *("uv", "pip", "install", "--quiet", "--target", userland / "opt/site"),
        *("--python-platform", "aarch64-manylinux_2_36", "--python-version", "3.11"),
        *("--requirements", app / "pyproject.toml"),
    )


def emulated(userland: Path, *command: str) -> list[str]:
    """Return the command line that runs a command in the userland's /app."""
    inside = 'cd /app && PYTHONPATH=/app:/opt/site exec "$@"'
    return ["nice", "chroot", str(userland), "/bin/sh", "-c", inside, "sh", *command]


def report(userland: Path, what: str, code: str) -> None:
    """Run Python under emulation and print how it went and how long it took."""
    started = time.monotonic()
    done = subprocess.run(
        emulated(userland, "python3", "-c", code), capture_output=True, text=True, check=False
    )
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    verdict = "ok" if done.returncode == 0 else "FAILS"
    print(
        f"{what:44} {verdict:5} {time.monotonic() - started:6.1f} s  {lines[-1] if lines else ''}"
    )


async def call(userland: Path) -> None:
    """Place one scripted call on the emulated bot, through the base image's contract."""
    sys.path.insert(0, str(userland / "app"))
    from rehearsal.callers.twilio import TwilioCaller
    from rehearsal.engines.scripted import ScriptedEngine
    from rehearsal.providers.all import serve
    from rehearsal.providers.roark import RoarkReceiver

    class SlowCaller(TwilioCaller):
        async def _microphone(self) -> AsyncIterator[bytes | None]:
            async for frame in super()._microphone():
                yield frame
                await asyncio.sleep(FRAME_SECONDS)

    async with serve(ScriptedEngine()) as providers, RoarkReceiver() as roark:
        keys: Mapping[str, str] = {"ROARK_BASE_URL": roark.url, "ROARK_API_KEY": "rehearsal"}
        process = await asyncio.create_subprocess_exec(
            *emulated(userland, "python3", "-m", "rehearsal.host.base_image"),
            env=os.environ | providers.environment | keys,
            stdout=asyncio.subprocess.PIPE,
            stderr=(log := open(userland / "bot.log", "wb")),
        )
        try:
            assert process.stdout
            started = time.monotonic()
            line = await asyncio.wait_for(process.stdout.readline(), PATIENCE_SECONDS)
            url = line.decode().strip()
            print(f"{'the server listens after':44}       {time.monotonic() - started:6.1f} s")
            caller = SlowCaller(url.replace("http", "ws", 1) + "/ws")
            started = time.monotonic()
            async with caller:
                heard = await caller.hear(within=PATIENCE_SECONDS)
                print(f"{'the greeting is heard after':44}       {heard.start - started:6.1f} s")
                await caller.hear_out(quiet=10, within=PATIENCE_SECONDS)
                said = b""
                async for piece in ScriptedEngine().speak("can you hear me at all", 8000):
                    said += piece.pcm
                asked = await caller.say(said, 8000)
                answer = await caller.hear(within=PATIENCE_SECONDS)
                print(f"{'an answer is heard after':44}       {answer.start - asked.end:6.1f} s")
                await caller.hear_out(quiet=10, within=PATIENCE_SECONDS)
            (call_id,) = roark.calls
            received = await roark.complete(call_id, timeout=PATIENCE_SECONDS)
            seconds = len(received.recording) / 4 / 8000
            print(f"Roark has the call: {len(received.chunks)} chunks, {seconds:.1f} s of audio")
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            log.close()


def main() -> None:
    """Bootstrap, install, import, call; print what was seen."""
    userland = Path(sys.argv[1]).resolve()
    bootstrap(userland)
    install(userland)
    report(
        userland, "machine", "import platform; print(platform.machine(), platform.python_version())"
    )
    report(userland, "import bot", "import bot")
    for name in ("daily", "aiortc", "av", "onnxruntime"):
        report(userland, f"import {name}", f"import {name}")
    silero = "from pipecat.audio.vad.silero import SileroVADAnalyzer as V; V(sample_rate=8000)"
    report(userland, "Silero loads", silero)
    asyncio.run(call(userland))


if __name__ == "__main__":
    main()
