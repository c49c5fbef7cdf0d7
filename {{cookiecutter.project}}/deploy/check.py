"""What would fail a deployment or the first call after it, each with its mend."""

import ast
import fnmatch
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dotenv import dotenv_values

from config import broken_line, required

AGENT_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# For this machine only. Uploaded, they would send the deployed bot to somebody's localhost.
LOCAL_NAMES = re.compile(r"ENV|PORT|HOST|CALLS_DIR|.*_BASE_URL")
SECRET_FILES = re.compile(
    r"\.env(\..*)?|.*\.env|.*\.(pem|key|p12|pfx|wav|mp3|flac|pcm|log)|id_(rsa|ed25519).*"
)
SECRET_FOLDERS = {"calls", "recordings", ".aws", ".ssh", ".git"}
DEVELOPMENT = {"rehearsal", "tests", "evals", "deploy", "preflight.py"}
# The server inside the base image is made of these: ours must not overwrite them.
BASE_IMAGE = re.compile(r"(app|waiting_server|pipecatcloud_system|feature_manager|pcc_\w+)\.py")
# With the image's digest beside it or without: DEPLOY.md, "The base image".
PINNED_TAG = r"\d+\.\d+\.\d+-py3\.\d+(@sha256:[0-9a-f]{64})?"
START_SECONDS = 60
ASK = """\
import asyncio, inspect, json, bot
assert inspect.iscoroutinefunction(bot.bot), "bot.py has no async def bot(runner_args)"
ready = getattr(bot, "readyz", lambda: True)()
ready = asyncio.run(ready) if inspect.isawaitable(ready) else ready
doubts = getattr(bot, "doubts", list)()
print(json.dumps({"ready": ready, "doubts": doubts}))
"""


@dataclass(frozen=True)
class Finding:
    """What is wrong and its mend; `fatal` when the deployment or the first call would fail.

    A blank mend is not said: `what` has it, or leaves it to the reader.
    """

    what: str
    mend: str
    fatal: bool = True


def read_deploy_file(project: Path) -> dict[str, object]:
    """Return pcc-deploy.toml as it is written; raises tomllib.TOMLDecodeError."""
    return tomllib.loads((project / "pcc-deploy.toml").read_text())


def load_as_pipecat_cloud(deploy_file: Path) -> object:
    """Load pcc-deploy.toml with the parser of `pipecat cloud deploy`; raises what that raises."""
    # pipecatcloud 1.4 has no public way to check a file; this is what its own command calls.
    import pipecatcloud.cli.config as config
    from pipecatcloud._utils.deploy_utils import load_deploy_config_file

    usual, config.deploy_config_path = config.deploy_config_path, str(deploy_file)
    try:
        return load_deploy_config_file()
    finally:
        config.deploy_config_path = usual


def pack_context(project: Path) -> bytes:
    """Return the tar.gz that `pipecat cloud deploy` would upload to be built."""
    # pipecatcloud 1.4: no public way either.
    from pipecatcloud._utils.build_utils import create_deterministic_tarball, get_exclusions

    return create_deterministic_tarball(str(project), get_exclusions(project)).tarball


def context_names(project: Path) -> list[str]:
    """Return the names of the files that would be uploaded to be built."""
    with tarfile.open(fileobj=io.BytesIO(pack_context(project))) as packed:
        return packed.getnames()


def unpack(context: bytes, folder: Path) -> None:
    """Lay a packed context out in a folder, as the builder does."""
    with tarfile.open(fileobj=io.BytesIO(context)) as packed:
        packed.extractall(folder, filter="data")


def instructions(dockerfile: Path) -> Iterator[tuple[str, str]]:
    """Yield (instruction, arguments) of a Dockerfile, comments dropped, continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if not re.match(r"\s*#", line)]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            yield word.upper(), rest.strip()


def copied(dockerfile: Path) -> list[tuple[list[str], str]]:
    """Return the sources and destination of each COPY from the build context."""
    copies = [shlex.split(rest) for word, rest in instructions(dockerfile) if word == "COPY"]
    plain = [words for words in copies if not any(word.startswith("--from") for word in words)]
    return [(words[:-1], words[-1]) for words in plain]


def lay_out_image(context: Path, app: Path, dockerfile: Path) -> None:
    """Do what the Dockerfile's COPY lines do: `app` becomes the image's /app, without its server.

    Raises FileNotFoundError for a source that is not in the context.
    """
    for sources, destination in copied(dockerfile):
        for source in sources:
            found = sorted(context.glob(source.rstrip("/")))
            if not found and not re.search(r"[*?[]", source):
                raise FileNotFoundError(source)
            for path in found:
                inside = app / destination / (path.name if path.is_file() else "")
                inside.parent.mkdir(parents=True, exist_ok=True)
                if path.is_file():
                    shutil.copy(path, inside)
                else:
                    shutil.copytree(path, inside, dirs_exist_ok=True)


@cache
def mentioned(source: bytes, name: str) -> frozenset[str]:
    """Return what Python source names: imported modules as file and folder, file-like strings.

    Raises SyntaxError, in a sentence about the file `name`.
    """
    found = set[str]()
    for node in ast.walk(_parsed(source, name)):
        match node:
            case ast.Import(names=names):
                modules = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), level=0):
                modules = [module]
            case ast.Constant(value=str(text)) if re.fullmatch(r"[\w-]+\.(?!py$)\w+", text):
                found.add(text)
                continue
            case _:
                continue
        for top in (module.partition(".")[0] for module in modules):
            found |= {f"{top}.py", top}
    return frozenset(found)


def _parsed(source: bytes, name: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError) as error:  # The second, in Python 3.11, for a NUL byte.
        line = getattr(error, "lineno", None)
        place = f"{name}, line {line}" if line else name
        raise SyntaxError(f"{place}: {getattr(error, 'msg', error)}") from error


def modules_of(package: Path) -> list[Path]:
    """Return the modules of a package, without its own tests."""
    return [path for path in package.rglob("*.py") if "tests" not in path.parts]


def needed(project: Path) -> set[str]:
    """Return the files and packages of the project that bot.py needs when it runs.

    Follows imports wherever they stand, also those inside functions, and takes a string that is
    exactly the name of a file beside bot.py, such as "prompt.md", for a file that is read.
    """
    found, waiting = set[str](), ["bot.py"]
    while waiting:
        found.add(name := waiting.pop())
        path = project / name
        sources = [path] if path.suffix == ".py" else modules_of(path)
        for source in sources:
            for other in mentioned(source.read_bytes(), str(source.relative_to(project))):
                if other not in found and (project / other).exists():
                    waiting.append(other)
    return found


def secrets(project: Path, env_file: Path) -> dict[str, str]:
    """Return what belongs in the secret set: the names of env.example that have a value."""
    names = set(dotenv_values(project / "env.example"))
    values = dotenv_values(env_file, interpolate=False, encoding="utf-8-sig")
    return {
        name: value.strip()
        for name, value in values.items()
        if name in names and not LOCAL_NAMES.fullmatch(name) and value and value.strip()
    }


def check_deploy_file(project: Path) -> Iterator[Finding]:
    """Check pcc-deploy.toml: the platform's own parser, then what that lets through."""
    try:
        settings = read_deploy_file(project)
        load_as_pipecat_cloud(project / "pcc-deploy.toml")
    except Exception as error:
        yield Finding(str(error) or repr(error), "correct it in pcc-deploy.toml")
        return
    name, image = str(settings.get("agent_name", "")), str(settings.get("image", ""))
    if not AGENT_NAME.fullmatch(name):
        yield Finding(
            f"agent_name {name!r} is not lower-case letters, digits and inner hyphens, up to 63",
            "rename the agent in pcc-deploy.toml",
        )
    if "secret_set" not in settings:
        yield Finding("no secret_set: the bot would have no keys", 'add secret_set = "…-secrets"')
    if settings.get("architecture", "arm64") != "arm64":
        yield Finding(
            f"architecture {settings['architecture']!r}: Daily's regions run arm64 only",
            'set architecture = "arm64"',
        )
    if image and image.rpartition(":")[2] == "latest":
        yield Finding(
            "image ends in :latest, a mutable tag: agents that are warm keep the old image",
            "push each build under its own tag and name that",
        )
    if image and "image_credentials" not in settings:
        yield Finding(
            "an image without image_credentials: the deployment asks for --no-credentials",
            "name the pull secret, or deploy with --no-credentials if the image is public",
            fatal=False,
        )


def check_dockerfile(project: Path) -> Iterator[Finding]:
    """Check the base image, the architecture, what is copied, and what the base image owns."""
    dockerfile = project / "Dockerfile"
    for word, rest in instructions(dockerfile):
        if word == "FROM":
            tag = rest.split()[-1].partition(":")[2]
            if not re.fullmatch(PINNED_TAG, tag):
                yield Finding(
                    f"FROM {rest}: the tag is mutable or leaves the Python open",
                    "pin both, as in dailyco/pipecat-base:0.2.3-py3.12",
                )
            elif "@" not in tag:
                yield Finding(
                    f"FROM {rest}: its owner can move the tag to another image",
                    "python -m deploy pin, which writes its digest beside it",
                    fatal=False,
                )
            if "amd64" in rest:
                yield Finding(f"FROM {rest}: the wrong architecture", "drop --platform")
        if word in {"CMD", "ENTRYPOINT", "USER"}:
            yield Finding(f"{word} {rest}: the base image owns it", f"delete the {word} line")
    context = {name.partition("/")[0] for name in context_names(project)}
    sources = [source.rstrip("/") for sources, _ in copied(dockerfile) for source in sources]
    in_image = {name for source in sources for name in fnmatch.filter(context, source)}
    for name in sorted(needed(project) - in_image):
        line = f"COPY {name}/ {name}/" if (project / name).is_dir() else f"COPY {name} ./"
        mend = f"add: {line}" if name in context else "take it out of .dockerignore"
        yield Finding(f"bot.py needs {name}, which does not get into the image", mend)
    for name in sorted(in_image & DEVELOPMENT):
        yield Finding(f"{name} is for development and is copied", "add it to .dockerignore")
    for name in sorted(filter(BASE_IMAGE.fullmatch, in_image)):
        yield Finding(f"{name} would overwrite the base image's own", "give it another name")


def check_context(project: Path) -> Iterator[Finding]:
    """Look into the build context for what must not leave this machine."""
    for path in map(Path, context_names(project)):
        if SECRET_FILES.fullmatch(path.name) or SECRET_FOLDERS & set(path.parts):
            yield Finding(f"{path} would be uploaded", f"add {path.name} to .dockerignore")


def check_lock(project: Path) -> Iterator[Finding]:
    """Check that uv.lock is there and belongs to this pyproject.toml."""
    if not (project / "uv.lock").exists():
        yield Finding(
            "there is none: the image will hold the newest versions of the day it is built",
            "uv lock, and commit uv.lock",
            fatal=False,
        )
        return
    if not shutil.which("uv"):
        yield Finding("not checked: uv is not installed", "pip install uv", fatal=False)
        return
    # Offline, a lock that does not fit cannot be resolved again: the answer is quick either way.
    command = ["uv", "lock", "--check", "--offline", "--project", str(project)]
    if subprocess.run(command, capture_output=True, timeout=START_SECONDS).returncode:
        yield Finding("does not fit pyproject.toml; the build would stop at it", "uv lock")


def check_secrets(project: Path, env_file: Path) -> Iterator[Finding]:
    """Check which names would be uploaded, and which would not."""
    listed = set(dotenv_values(project / "env.example"))
    for name in required(project / "services.py"):
        if name not in listed:
            yield Finding(
                f"services.py reads {name}, which is not in env.example: it is not uploaded",
                f"a line {name}= in env.example",
            )
    for name in sorted(filter(LOCAL_NAMES.fullmatch, listed)):
        yield Finding(f"env.example lists {name}, which is for one machine", "take it out")
    if not env_file.exists():
        yield Finding(f"{env_file.name} does not exist", "cp env.example .env, and fill it in")
        return
    if line := broken_line(env_file.read_text(encoding="utf-8-sig")):
        yield Finding(
            f"{env_file.name}, line {line} cannot be read",
            "make it NAME=value, with an end to what is in quotation marks",
        )
    for name in sorted(set(dotenv_values(env_file, encoding="utf-8-sig")) - listed):
        if not LOCAL_NAMES.fullmatch(name):
            yield Finding(
                f"{name} is in {env_file.name} but not in env.example: it is not uploaded",
                "list it in env.example if the deployed bot needs it",
                fatal=False,
            )


def check_start(project: Path, env_file: Path) -> Iterator[Finding]:
    """Lay out the image from the build context, import bot there and ask it whether it is ready."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT") if name in os.environ}
    with tempfile.TemporaryDirectory() as folder:
        context, app = Path(folder, "context"), Path(folder, "app")
        app.mkdir()
        unpack(pack_context(project), context)
        try:
            lay_out_image(context, app, project / "Dockerfile")
        except FileNotFoundError as error:
            yield Finding(
                f"the Dockerfile copies {error}, which is not in the build context",
                "create it, or take it out of .dockerignore",
            )
            return
        try:
            answer = subprocess.run(
                [sys.executable, "-B", "-c", ASK],
                cwd=app,
                env=kept | secrets(project, env_file),
                capture_output=True,
                text=True,
                timeout=START_SECONDS,
            )
        except subprocess.TimeoutExpired:
            yield Finding(f"import bot took over {START_SECONDS} s", "keep work out of imports")
            return
    if answer.returncode:
        last = answer.stderr.strip().splitlines()[-1:] or [f"status {answer.returncode}"]
        yield Finding(
            f"bot.py would not start there: {last[0]}",
            "see the whole of it: python -c 'import bot; bot.readyz()'",
        )
        return
    told = json.loads(answer.stdout.splitlines()[-1])
    ready = told["ready"]
    for doubt in told["doubts"]:
        yield Finding(doubt, "", fatal=False)
    if not (ready if isinstance(ready, bool) else ready.get("ready")):
        yield Finding(f"readyz() says {json.dumps(ready)}", f"fill it in in {env_file.name}")


def check(project: Path, env_file: Path) -> bool:
    """Print every finding with its mend; True if a deployment would go through."""
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "pcc-deploy.toml": lambda: check_deploy_file(project),
        "Dockerfile": lambda: check_dockerfile(project),
        "build context": lambda: check_context(project),
        "uv.lock": lambda: check_lock(project),
        "secrets": lambda: check_secrets(project, env_file),
        "start-up": lambda: check_start(project, env_file),
    }
    good, started = True, time.monotonic()
    for subject, run in checks.items():
        try:
            findings = list(run())
        except FileNotFoundError as error:
            findings = [Finding(str(error), "put it back")]
        except SyntaxError as error:
            findings = [Finding(str(error), "correct it there")]
        except UnicodeDecodeError as error:
            what = f"a file is no plain text in UTF-8 ({error.reason})"
            findings = [Finding(what, f"save it anew; most likely it is {env_file.name}")]
        except ValueError as error:  # pipecatcloud: the context is too large.
            findings = [Finding(str(error), "add what is large to .dockerignore")]
        if not findings:
            print(f"{subject:16} ok")
        for finding in findings:
            print(f"{subject:16} {'FAILS' if finding.fatal else 'mind'}: {finding.what}")
            if finding.mend:
                print(f"{'':16}   mend: {finding.mend}")
        good &= not any(finding.fatal for finding in findings)
    next_step = "pipecat cloud deploy --yes" if good else "mend what fails"
    print(f"Checked in {time.monotonic() - started:.1f} s. Next: {next_step}")
    return good
