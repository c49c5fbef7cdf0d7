"""The images, built from their Dockerfiles: how large, how soon ready, and does a call go through?

    python -m benchmarks images

On Debian, as root, with its packages buildah and mmdebstrap; no Docker, some ten minutes. Four are
built: of the default rendering, of one that only answers the phone (its pyproject.toml without
`daily` and `webrtc`), of this repository (its own Dockerfile), and of the bot that `pipecat init`
writes. In each the bot is started under the base image's contract (rehearsal/host/base_image.py,
which is mounted and not in the image) and takes a phone call from outside.

The base images are not pulled: the Debian release they are made of stands in for both, with its own
Python and without Pipecat Cloud's server. So an image is told less its base.
"""

import asyncio
import os
import platform
import shutil
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from rehearsal.engines.scripted import ScriptedEngine
from rehearsal.providers.all import Providers, serve
from rehearsal.providers.roark import RoarkReceiver

from benchmarks import PROJECT, REPOSITORY
from benchmarks.scaffold import generate
from benchmarks.speed import SCRIPT, Running, Speech, environment_of, greeting_of, until_ok

DEBIAN = "trixie"
MIRROR = f"deb http://deb.debian.org/debian {DEBIAN} main"
PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
BASE_IMAGES = (
    "docker.io/dailyco/pipecat-base:0.2.3-py3.12",
    "docker.io/dailyco/pipecat-base:latest",
    "docker.io/library/python:3.12-slim-trixie",
)
# A build behind a proxy with a certificate of its own needs the host's.
BASE = """\
FROM scratch
ADD rootfs.tar /
COPY certificates.crt /etc/ssl/certs/ca-certificates.crt
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt UV_SYSTEM_CERTS=1 PIP_BREAK_SYSTEM_PACKAGES=1 \
    VIRTUAL_ENV=/app/.venv PATH=/app/.venv/bin:/usr/local/bin:/usr/bin:/bin
WORKDIR /app
RUN pip install --no-cache-dir uv && uv venv /app/.venv
"""
# In namespaces of its own, so that what is mounted and what is started goes with the process.
INSIDE = """\
mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" && mount --bind "$1" "$0/mnt" || exit
root="$0"; shift
exec chroot "$root" /bin/sh -c 'cd /app && exec "$@"' sh "$@"
"""
INSIDE_ENVIRONMENT = {
    "PATH": "/app/.venv/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "CALLS_DIR": "/tmp/calls",
    "PYTHONPATH": "/mnt",
}
LOAD_EACH = """\
import ctypes, os, pathlib
files = [f for f in pathlib.Path("/app/.venv").rglob("*.so*") if f.is_file()]
for file in files:
    if not (child := os.fork()):
        ctypes.CDLL(str(file))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, file
print(len(files))
"""
STARTS = 3
SECONDS = 60.0
"""What anything may take on a busy machine before it counts as broken."""
MARKER = "planted-by-the-benchmark"
PLANTED = (".env", "calls/abc/call.json", "recordings/call.wav", "server.key", "bot.log")
FORBIDDEN = {
    *("rehearsal", "tests", "evals", "deploy", "preflight.py", ".git", ".github"),
    *(".env", "calls", "recordings", "server.key", "bot.log"),
}


def missing() -> str | None:
    """Return what this machine lacks to build images, or None."""
    lacking = [name for name in ("buildah", "mmdebstrap", "unshare") if not shutil.which(name)]
    if lacking:
        return f"needs {' and '.join(lacking)} (apt-get install buildah mmdebstrap)"
    return None if os.geteuid() == 0 else "needs root, to mount what was built"


@dataclass(frozen=True)
class Store:
    """Images and containers in a folder of their own, all gone with it."""

    folder: Path

    def buildah(self, *arguments: str | Path) -> str:
        """Run a command of buildah; return what it prints.

        Raises:
            RuntimeError: It failed; with the end of what it said.
        """
        places = ["--root", self.folder / "images", "--runroot", self.folder / "run"]
        done = subprocess.run(
            ["buildah", *places, "--storage-driver", "vfs", *arguments],
            env=os.environ | {"BUILDAH_ISOLATION": "chroot"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(
                f"buildah {arguments[0]}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
            )
        return done.stdout.strip()

    def make_base(self) -> None:
        """Make the image that stands in for those that Dockerfiles here begin with."""
        context = self.folder / "base"
        context.mkdir()
        options = ["--quiet", "--variant=minbase", f"--include={PACKAGES}"]
        subprocess.run(["mmdebstrap", *options, DEBIAN, context / "rootfs.tar", MIRROR], check=True)
        certificates = os.environ.get("SSL_CERT_FILE") or ssl.get_default_verify_paths().cafile
        shutil.copy(str(certificates), context / "certificates.crt")
        (context / "Dockerfile").write_text(BASE)
        tags = [word for name in BASE_IMAGES for word in ("--tag", name)]
        self.buildah("build", *tags, context)
        shutil.rmtree(context)

    def build(self, name: str, context: Path) -> float:
        """Build the Dockerfile of a folder; return the seconds it took."""
        began = time.monotonic()
        self.buildah("build", "--pull-never", "--tag", f"localhost/{name}", context)
        return time.monotonic() - began

    @contextmanager
    def mounted(self, image: str) -> Iterator[Path]:
        """Make a container of an image; yields its root, to be looked into and changed."""
        container = self.buildah("from", "--pull-never", image)
        try:
            yield Path(self.buildah("mount", container))
        finally:
            self.buildah("rm", container)


def megabytes(folder: Path, pattern: str = "*") -> float:
    """Return what the files in a folder hold, each once, in millions of bytes."""
    paths = (path for path in folder.rglob(pattern) if path.is_file() and not path.is_symlink())
    files = [path.lstat() for path in paths]
    return sum({file.st_ino: file.st_size for file in files}.values()) / 1e6


def intruders(root: Path) -> list[str]:
    """Return the paths below an image's /app that must not be there, or hold what was planted."""
    app = root / "app"
    found = list[str]()
    for folder, folders, files in os.walk(app):
        here = Path(folder)
        if here == app:
            folders.remove(".venv")
        for name in (*folders, *files):
            if name in FORBIDDEN:
                found.append(str((here / name).relative_to(root)))
        for name in files:
            if MARKER.encode() in (here / name).read_bytes():
                found.append(str((here / name).relative_to(root)))
    return sorted(set(found))


def default_project(folder: Path, **answers: str) -> Path:
    """Generate a project and lock it, with leftovers in it that no image may hold."""
    clone = folder / "clone"
    if not clone.exists():
        subprocess.run(
            ["git", "clone", "-q", "--depth", "1", REPOSITORY.as_uri(), clone], check=True
        )
    out = folder / "-".join(["project", *answers.values()])
    given = [f"{name}={answer}" for name, answer in answers.items()]
    command = [sys.executable, "-m", "cookiecutter", "--no-input", "-o", out, clone, *given]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (project,) = out.iterdir()
    for name in PLANTED:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(MARKER)
    return project


def phone_only(folder: Path) -> Path:
    """Generate a project and take out of it what only Daily and WebRTC need, as DEPLOY.md says."""
    project = default_project(folder, transport="twilio")
    file = project / "pyproject.toml"
    text = file.read_text()
    assert "[daily,runner,silero,webrtc]" in text
    file.write_text(text.replace("[daily,runner,silero,webrtc]", "[runner,silero]"))
    return project


def scaffolds_project(folder: Path) -> Path:
    """Let `pipecat init` write its bot and Dockerfile; two targets of mounts are spelled out."""
    project = generate(folder / "scaffold", "http://127.0.0.1:1")
    file = project / "Dockerfile"
    # Docker takes them relative to WORKDIR, Debian's buildah does not.
    file.write_text(file.read_text().replace("target=uv.lock", "target=/app/uv.lock"))
    file.write_text(file.read_text().replace("target=pyproject", "target=/app/pyproject"))
    return project


def lock(project: Path) -> Path:
    """Lock what a project depends on, as its owner does before building."""
    own = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    subprocess.run(["uv", "lock", "--quiet"], cwd=project, env=own, check=True)
    return project


@dataclass
class Built:
    """What was seen of one image; seconds and millions of bytes.

    Parameters:
        base: How much of the image is the stand-in's.
        libraries: Compiled libraries, every one of which was loaded; not tried with the scaffold's.
        ready: From the start of the process until `/readyz` says yes.
        greeted: From the start of the process to the first sound of the first caller's greeting.
    """

    name: str
    build: float
    venv: float = 0.0
    bytecode: float = 0.0
    whole: float = 0.0
    base: float = 0.0
    libraries: int = 0
    intruders: list[str] = field(default_factory=list[str])
    ready: list[float] = field(default_factory=list[float])
    greeted: list[float] = field(default_factory=list[float])


@contextmanager
def contract() -> Iterator[Path]:
    """Lay out what plays the base image's server, to be mounted."""
    with TemporaryDirectory(prefix="contract-") as name:
        skip = shutil.ignore_patterns("__pycache__", "tests")
        shutil.copytree(PROJECT / "rehearsal", Path(name, "rehearsal"), ignore=skip)
        package = Path(name, "benchmarks")
        package.mkdir()
        (package / "__init__.py").touch()
        shutil.copy(REPOSITORY / "benchmarks" / "scaffold.py", package)
        yield Path(name)


@asynccontextmanager
async def started(
    root: Path, environment: dict[str, str], *program: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a program in an image's /app until the context ends."""
    with contract() as mounted:
        process = await asyncio.create_subprocess_exec(
            *("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", INSIDE),
            *(str(root), str(mounted), *program),
            env=environment | INSIDE_ENVIRONMENT,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=(log := (root / "bot.log").open("ab")),
        )
        try:
            yield process
        finally:
            log.close()
            if process.returncode is None:
                process.kill()
            await process.wait()


async def call(
    root: Path, program: tuple[str, ...], providers: Providers, roark: RoarkReceiver
) -> tuple[float, float]:
    """Start the bot in an image and hold a phone call with it.

    Returns:
        Seconds from the start of the process until it is ready, and to its greeting's first sound.
    """
    environment = environment_of(providers, roark, root) | {"TWILIO_AUTH_TOKEN": ""}
    if "benchmarks.scaffold" in program:
        environment["TWILIO_AUTH_TOKEN"] = "token"
    speech = await Speech.make()
    began = time.monotonic()
    async with started(root, environment, "python", *program) as process:
        assert process.stdout
        url = (await asyncio.wait_for(process.stdout.readline(), SECONDS)).decode().strip()
        if not url:
            raise RuntimeError(f"no server: {(root / 'bot.log').read_text()[-3000:]}")
        await until_ok(process, f"{url}/readyz")
        ready = time.monotonic() - began
        async with Running(process, url).caller("twilio") as caller:
            dialled = time.monotonic()
            greeting = await greeting_of(caller)
            await speech.answer_to(caller, 0)
        if program == OURS:
            (call_id,) = roark.calls
            await roark.complete(call_id, timeout=SECONDS)
            roark.calls.clear()
    return ready, dialled - began + greeting


OURS = ("-m", "rehearsal.host.base_image")
SCAFFOLDS = ("-m", "benchmarks.scaffold", "image")


async def look(store: Store, built: Built, program: tuple[str, ...], starts: int) -> Built:
    """Look into a built image, load what is compiled in it, and call its bot."""
    with store.mounted(f"localhost/{built.name}") as root:
        built.venv = megabytes(root / "app/.venv")
        built.bytecode = megabytes(root / "app/.venv", "*.pyc")
        built.whole = megabytes(root)
        built.intruders = intruders(root)
        if program == OURS:
            async with started(root, {}, "python", "-c", LOAD_EACH) as process:
                told, _ = await process.communicate()
                if process.returncode:
                    raise RuntimeError((root / "bot.log").read_text()[-3000:])
                built.libraries = int(told)
        async with serve(ScriptedEngine(SCRIPT)) as providers, RoarkReceiver() as roark:
            for _ in range(starts):
                ready, greeted = await call(root, program, providers, roark)
                built.ready.append(ready)
                built.greeted.append(greeted)
    with store.mounted(BASE_IMAGES[0]) as root:
        built.base = megabytes(root)
    return built


def measure() -> list[Built]:
    """Build and look at all four."""
    if why := missing():
        raise SystemExit(f"python -m benchmarks images {why}")
    found = list[Built]()
    with TemporaryDirectory(prefix="images-") as name:
        folder = Path(name)
        store = Store(folder / "store")
        store.folder.mkdir()
        store.make_base()
        for image, context, program in (
            ("default", lock(default_project(folder)), OURS),
            ("phone-only", lock(phone_only(folder)), OURS),
            ("repository", folder / "clone", OURS),
            ("scaffold", lock(scaffolds_project(folder)), SCAFFOLDS),
        ):
            print(f"building {image} ...", flush=True)
            built = Built(image, store.build(image, context))
            found.append(asyncio.run(look(store, built, program, STARTS)))
            print(found[-1], flush=True)
    return found


def report() -> str:
    """Measure, and return the section for README.md."""
    names = {
        "default": "default rendering",
        "phone-only": "the same, phone only",
        "repository": "this repository's Dockerfile",
        "scaffold": "`pipecat init` 1.14.0",
    }
    lines = [
        "| image | `.venv` | of it bytecode | image less its base | until ready | until the first "
        "caller is greeted | libraries loaded | what must not be there |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for built in measure():
        median = statistics.median
        lines.append(
            f"| {names[built.name]} | {built.venv:.0f} MB | {built.bytecode:.0f} MB "
            f"| {built.whole - built.base:.0f} MB "
            f"| {median(built.ready):.2f} s | {median(built.greeted):.2f} s "
            f"| {built.libraries or 'not tried'} "
            f"| {', '.join(built.intruders) or 'nothing'} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"Millions of bytes, {platform.machine()}. Seconds from the start of the process, "
            f"medians of {STARTS}. Goal: `.venv` at most 450 MB, phone only 300 MB.",
        ]
    )


if __name__ == "__main__":
    print(report())
