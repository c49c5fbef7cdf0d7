"""How the image is made, what is uploaded, and what `python -m deploy` says of a mistake."""

import ast
import importlib.metadata
import re
import shutil
import stat
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from machine import A_KEY, KEYS
from packaging.requirements import Requirement
from typer.main import get_command

from deploy import check as deploy
from deploy.__main__ import main, twiml
from deploy.pin import pin

PROJECT = Path(deploy.__file__).resolve().parents[1]


def edit(path: Path, old: str, new: str) -> None:
    """Replace the one `old` in a file."""
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} in {path.name}"
    path.write_text(text.replace(old, new))


class TestDeployFile:
    """pcc-deploy.toml."""

    def test_the_platforms_own_parser_takes_it(self) -> None:
        """Unknown keys are errors there."""
        assert deploy.load_as_pipecat_cloud(PROJECT / "pcc-deploy.toml")

    def test_what_is_commented_out_is_taken_too(self, project: Path) -> None:
        """The image of one's own and Krisp are a matter of deleting `# `."""
        path = project / "pcc-deploy.toml"
        path.write_text(re.sub(r"(?m)^# (?=\w+ = |\[)", "", path.read_text()))
        settings = deploy.read_deploy_file(project)
        assert {"image", "image_credentials", "krisp_viva"} <= set(settings)
        assert deploy.load_as_pipecat_cloud(path)

    def test_it_says_what_would_otherwise_be_left_to_defaults(self) -> None:
        """Architecture, session limit, websocket token and scaling are decided, not inherited."""
        settings = deploy.read_deploy_file(PROJECT)
        assert settings["architecture"] == "arm64"
        assert settings["websocket_auth"] == "token"
        assert settings["scaling"] == {"min_agents": 0, "max_agents": 10}
        limit = settings["max_session_duration"]
        assert isinstance(limit, int) and 60 <= limit <= 14400


DIGEST = f"sha256:{'0af' * 21}0"


class Registry(BaseHTTPRequestHandler):
    """Tells the digest of the base image's list to whoever brings a token, which anybody gets."""

    def do_HEAD(self) -> None:
        """Answer for a manifest."""
        if self.headers["Authorization"] != "Bearer anybody":
            self.send_response(401)
            host = f"http://{self.headers['Host']}"
            challenge = f'Bearer realm="{host}/token",service="here",scope="pull"'
            self.send_header("WWW-Authenticate", challenge)
        elif self.path.startswith("/v2/dailyco/pipecat-base/manifests/"):
            self.send_response(200)
            is_list = "image.index" in self.headers["Accept"]
            self.send_header("Docker-Content-Digest", DIGEST if is_list else "of one platform")
        else:
            self.send_response(404)
        self.end_headers()

    def do_GET(self) -> None:
        """Give out a token."""
        assert self.path == "/token?service=here&scope=pull"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"token": "anybody"}')

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def registry() -> Iterator[str]:
    """The address of a registry on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class TestDockerfile:
    """The image's files and how its dependencies are installed."""

    def test_the_base_image_is_pinned_with_its_python(self) -> None:
        """`latest` changes under a running bot."""
        (image,) = [
            rest for word, rest in deploy.instructions(PROJECT / "Dockerfile") if word == "FROM"
        ]
        assert re.fullmatch(f"dailyco/pipecat-base:{deploy.PINNED_TAG}", image)

    def test_the_registry_is_asked_for_the_digest_that_pins_the_base_image(
        self, project: Path, registry: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A tag alone is minded; a digest that is cut short is no pin."""
        file = project / "Dockerfile"
        (minded,) = deploy.check_dockerfile(project)
        assert not minded.fatal and "deploy pin" in minded.mend
        assert pin(file, registry + "/not-there") == 1
        assert "docker buildx imagetools inspect" in capsys.readouterr().err
        for _ in range(2):
            assert pin(file, registry) == 0
            assert capsys.readouterr().out.endswith(f"@{DIGEST}\n")
            assert file.read_text().count(DIGEST) == 1
        assert not list(deploy.check_dockerfile(project))
        edit(file, DIGEST, "sha256:0af")
        assert [finding.fatal for finding in deploy.check_dockerfile(project)] == [True]

    def test_what_the_base_image_owns_is_left_alone(self) -> None:
        """Its server is started by its own CMD as its own user."""
        words = {word for word, _ in deploy.instructions(PROJECT / "Dockerfile")}
        assert words == {"FROM", "ENV", "COPY", "RUN"}

    def test_dependencies_come_before_what_changes_every_day(self) -> None:
        """Editing prompt.md must not install a gigabyte again."""
        steps = [
            rest for word, rest in deploy.instructions(PROJECT / "Dockerfile") if word != "ENV"
        ]
        order = [
            next(i for i, step in enumerate(steps) if part in step)
            for part in ("uv.loc[k]", "uv sync", "*.py")
        ]
        assert order == sorted(order)

    def test_what_a_first_call_needs_is_compiled_in_the_image(self, project: Path) -> None:
        """And not while the first caller waits. The line is run by a real shell."""
        steps = [
            rest for word, rest in deploy.instructions(PROJECT / "Dockerfile") if word == "RUN"
        ]
        if not (compiling := [step for step in steps if "readyz" in step]):
            pytest.skip("a service in the bot's own process would download its weights")
        subprocess.run(
            ["/bin/sh", "-ec", compiling[0]],
            cwd=project,
            env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
            check=True,
        )
        assert list(project.glob("conversation/__pycache__/warm_up.*.pyc"))

    @pytest.mark.parametrize("locked", [True, False], ids=["with-lock", "without-lock"])
    def test_dependencies_install_with_and_without_a_lock(
        self, tmp_path: Path, locked: bool
    ) -> None:
        """The line is run by a real shell, with programs that write down how they were called.

        In the same line debug symbols are taken out: the layer would keep them.
        """
        (line,) = [
            rest for word, rest in deploy.instructions(PROJECT / "Dockerfile") if "uv sync" in rest
        ]
        command = re.sub(r"^--mount=\S+\s*", "", line).replace(
            "/var/lib/apt", str(tmp_path / "apt")
        )
        for name in ("uv", "apt-get", "strip"):
            program = tmp_path / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(f'#!/bin/sh\necho "$@" >> calls-of-{name}\n')
            program.chmod(0o755)
        library = tmp_path / ".venv/lib/with-symbols.cpython-312.so"
        library.parent.mkdir(parents=True)
        library.touch()
        if locked:
            (tmp_path / "uv.lock").touch()
        shell = subprocess.run(
            ["/bin/sh", "-ec", command],
            cwd=tmp_path,
            env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        )
        expected = "sync --locked --no-install-project --no-dev"
        called = (tmp_path / "calls-of-uv").read_text().strip()
        assert called == (expected if locked else expected.replace("--locked ", ""))
        assert ("uv lock" in shell.stderr) is not locked
        stripped = (tmp_path / "calls-of-strip").read_text()
        assert str(library.relative_to(tmp_path)) in stripped
        told = (tmp_path / "calls-of-apt-get").read_text()
        assert told.index("install") < told.index("purge"), "the tool is not left in the image"

    def test_the_dependencies_hold_what_the_images_server_needs(self) -> None:
        """`uv sync` removes from the image whatever the project does not depend on."""
        pyproject = tomllib.loads((PROJECT / "pyproject.toml").read_text())
        waiting = [Requirement(text) for text in pyproject["project"]["dependencies"]]
        overrides = map(Requirement, pyproject["tool"]["uv"]["override-dependencies"])
        left_out = {override.name for override in overrides}
        found = set[str]()
        while waiting:
            wanted = waiting.pop()
            name = re.sub("[-_.]+", "-", wanted.name).lower()
            if (key := f"{name}[{','.join(sorted(wanted.extras))}]") in found:
                continue
            found |= {key, name}
            if name in left_out:
                continue
            for text in importlib.metadata.requires(name) or ():
                needs = Requirement(text)
                extras = [{"extra": extra} for extra in wanted.extras] or [{"extra": ""}]
                if needs.marker is None or any(needs.marker.evaluate(extra) for extra in extras):
                    waiting.append(needs)
        assert {"pipecat-ai", "pipecatcloud", "fastapi", "uvicorn", "websockets"} <= found
        assert {"aiohttp", "loguru", "aiortc", "daily-python"} <= found

    def test_the_image_holds_no_deployment_errands(self) -> None:
        """Nothing that runs imports deploy."""
        for path in [PROJECT / name for name in deploy.needed(PROJECT) if name.endswith(".py")]:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    assert "deploy" not in [alias.name for alias in node.names]


class TestBuildContext:
    """What `pipecat cloud deploy` uploads, packed by its own code."""

    def test_it_leaves_out_what_the_builders_own_list_leaves_out(self, project: Path) -> None:
        """Our .dockerignore replaces that list, so it has to be at least as long."""
        from pipecatcloud._utils.build_utils import DEFAULT_EXCLUSIONS

        planted = {pattern.replace("*", "x") for pattern in DEFAULT_EXCLUSIONS}
        for name in planted - {path.name for path in project.iterdir()}:
            (project / name).write_text("")
        assert not planted & set(deploy.context_names(project))

    def test_it_holds_what_the_image_is_made_of_and_nothing_that_leaks(self, project: Path) -> None:
        """Whatever else lies here: a LICENSE or a Makefile harms nobody."""
        for name in ("LICENSE", "CLAUDE.md", "Makefile", "compose.yaml"):
            (project / name).touch()
        (project / "uv.lock").touch()
        tops = {name.partition("/")[0] for name in deploy.context_names(project)}
        assert deploy.needed(project) | {"Dockerfile", "pyproject.toml", "uv.lock"} <= tops
        found = [*deploy.check_context(project), *deploy.check_dockerfile(project)]
        assert not [f"{finding.what}: {finding.mend}" for finding in found if finding.fatal]

    def test_docker_leaves_secrets_out_of_subfolders_too(self) -> None:
        """For Docker a bare name is the top folder only: each needs its `**/` twin."""
        text = (PROJECT / ".dockerignore").read_text()
        secret = text[text.index("# Secrets") : text.index("# Development")]
        lines = {line for line in secret.splitlines() if line and not line.startswith("#")}
        bare = {line for line in lines if not line.startswith("**/")}
        assert {f"**/{name}" for name in bare} == lines - bare
        assert "!" not in text.replace("`!`", "")


class TestSecrets:
    """env.example is the list of what the deployed bot gets."""

    def test_the_list_holds_nothing_that_belongs_to_one_machine(self) -> None:
        """ENV=local or a base URL in the cloud would break every call there."""
        names = set(deploy.dotenv_values(PROJECT / "env.example"))
        assert set(KEYS) | {"ROARK_API_KEY", "DAILY_API_KEY", "TWILIO_AUTH_TOKEN"} <= names
        assert not list(filter(deploy.LOCAL_NAMES.fullmatch, names))

    def test_only_listed_names_with_a_value_are_uploaded(self, project: Path) -> None:
        """Blank lines, local settings and strangers stay here."""
        env = project / ".env"
        env.write_text(
            env.read_text() + "ROARK_API_KEY=\nENV=local\nCALLS_DIR=/tmp/x\n"
            "OPENAI_BASE_URL=http://127.0.0.1:1/v1\nSOMEBODY_ELSES=1\n"
        )
        (project / "env.example").write_text(
            (PROJECT / "env.example").read_text() + "ENV=\nOPENAI_BASE_URL=\n"
        )
        assert deploy.secrets(project, env) == KEYS

    def test_one_command_uploads_them_by_a_file_nobody_else_can_read(
        self,
        project: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """`pipecat` is played by a script that keeps what it was given."""
        seen = tmp_path / "seen"
        seen.mkdir()
        pipecat = tmp_path / "bin" / "pipecat"
        pipecat.parent.mkdir()
        pipecat.write_text(
            f'#!/bin/sh\necho "$@" > {seen}/arguments\ncat "$6" > {seen}/file\n'
            f'stat -c %a "$(dirname "$6")" > {seen}/mode\n'
        )
        pipecat.chmod(0o755)
        monkeypatch.setenv("PATH", f"{pipecat.parent}:/usr/bin:/bin")
        assert main(["secrets"], project) == 0
        arguments = (seen / "arguments").read_text().split()
        assert arguments[:5] == ["cloud", "secrets", "set", "keys", "--file"]
        assert arguments[6:] == ["--region", "us-east", "--skip"]
        assert not Path(arguments[5]).exists()
        assert stat.S_IMODE(int((seen / "mode").read_text(), 8)) == 0o700
        lines = (seen / "file").read_text().splitlines()
        assert lines == [f'{name}="{value}"' for name, value in KEYS.items()]
        printed = "".join(capfd.readouterr())
        assert A_KEY in printed and KEYS[A_KEY] not in printed


class TestTwiml:
    """The TwiML for Twilio's console."""

    @pytest.mark.parametrize(
        ("region", "host"),
        [("us-west", "api.pipecat.daily.co"), ("eu-central", "eu-central.api.pipecat.daily.co")],
    )
    def test_it_names_the_region_and_the_agent(self, region: str, host: str) -> None:
        """The agent goes into a parameter, for Twilio drops query strings."""
        stream = ElementTree.fromstring(twiml("my-bot", "acme", region)).find(".//Stream")
        assert stream is not None
        assert stream.get("url") == f"wss://{host}/ws/twilio"
        parameters = {p.get("name"): p.get("value") for p in stream.findall("Parameter")}
        caller = "{" + "{From}" + "}"
        assert parameters == {"_pipecatCloudServiceHost": "my-bot.acme", "from_number": caller}

    def test_it_alone_is_on_stdout_to_be_pasted(
        self, project: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """What to do with it goes to stderr."""
        assert main(["twiml", "acme"], project) == 0
        printed = capsys.readouterr()
        assert printed.out == twiml("my-bot", "acme", "us-east")
        assert "TwiML Bin" in printed.err


def changed(name: str, old: str, new: str) -> Callable[[Path], None]:
    """Return a breakage: the one `old` of a file becomes `new`."""
    return lambda project: edit(project / name, old, new)


BREAKAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a key is misspelt": (
        changed("pcc-deploy.toml", "agent_profile =", "agent_profil ="),
        "Unexpected keys in config file: {'agent_profil'}",
        "correct it in pcc-deploy.toml",
    ),
    "the file is no TOML": (
        changed("pcc-deploy.toml", 'agent_name = "my-bot"', 'agent_name = "my-bot'),
        "Illegal character",
        "correct it in pcc-deploy.toml",
    ),
    "an agent name the platform refuses": (
        changed("pcc-deploy.toml", "my-bot", "My Bot"),
        "'My Bot' is not lower-case letters",
        "rename the agent",
    ),
    "the wrong architecture": (
        changed("pcc-deploy.toml", '"arm64"', '"amd64"'),
        "Daily's regions run arm64 only",
        'set architecture = "arm64"',
    ),
    "a mutable image of one's own": (
        changed("pcc-deploy.toml", "[scaling]", 'image = "me/bot:latest"\n[scaling]'),
        "a mutable tag",
        "under its own tag",
    ),
    "a mutable base image": (
        changed("Dockerfile", "pipecat-base:0.2.3-py3.12", "pipecat-base:latest"),
        "the tag is mutable",
        "pin both",
    ),
    "a package that is not copied": (
        lambda project: (
            (project / "crm").mkdir(),
            (project / "crm" / "__init__.py").touch(),
            (project / "tools.py").open("a").write("\n\ndef look_up():\n    import crm\n"),
        ),
        "bot.py needs crm, which does not get into the image",
        "add: COPY crm/ crm/",
    ),
    "a module of the base image's name": (
        lambda project: (project / "app.py").touch(),
        "app.py would overwrite the base image's own",
        "give it another name",
    ),
    "an entry point of one's own": (
        lambda project: (project / "Dockerfile").open("a").write('CMD ["python", "bot.py"]\n'),
        "the base image owns it",
        "delete the CMD line",
    ),
    "a secret in the context": (
        lambda project: (project / ".dockerignore").write_text("tests\nrehearsal\n"),
        ".env would be uploaded",
        "add .env to .dockerignore",
    ),
    "a module that is ignored": (
        lambda project: (project / ".dockerignore").open("a").write("tools.py\n"),
        "bot.py needs tools.py, which does not get into the image",
        "take it out of .dockerignore",
    ),
    "a stale lock": (
        lambda project: (project / "uv.lock").write_text('version = 1\nrequires-python = ">=3.11"'),
        "does not fit pyproject.toml",
        "uv lock",
    ),
    "no Dockerfile": (
        lambda project: (project / "Dockerfile").unlink(),
        "Dockerfile not found",
        "put it back",
    ),
    "a .env of another encoding": (
        lambda project: (project / ".env").write_text("A_KEY=x", encoding="utf-16"),
        "a file is no plain text in UTF-8",
        "most likely it is .env",
    ),
    "no .env": (
        lambda project: (project / ".env").unlink(),
        ".env does not exist",
        "cp env.example .env",
    ),
    "a quotation mark in .env is not closed": (
        lambda project: (project / ".env").write_text('\nOPENAI_API_KEY="sk\n'),
        "FAILS: .env, line 2 cannot be read",
        "mend: make it NAME=value, with an end to what is in quotation marks",
    ),
    "a line of tools.py is no Python": (
        lambda project: (project / "tools.py").write_text("def y(): ...\ndef x(:\n"),
        "Dockerfile       FAILS: tools.py, line 2: invalid syntax",
        "mend: correct it there",
    ),
    "a module of a package is no Python": (
        lambda project: (project / "conversation" / "clock.py").write_text("\nx = (\n"),
        f"FAILS: {Path('conversation', 'clock.py')}, line 2: '(' was never closed",
        "mend: correct it there",
    ),
    "tools.py is not in UTF-8": (
        lambda project: (project / "tools.py").write_bytes("x = 'Größe'\n".encode("latin-1")),
        "FAILS: tools.py",
        "mend: correct it there",
    ),
    "tools.py holds a NUL": (
        lambda project: (project / "tools.py").write_bytes(b"x = 1\0\n"),
        "FAILS: tools.py: source code string cannot contain null bytes",
        "mend: correct it there",
    ),
}


class TestCheck:
    """`python -m deploy check`."""

    @pytest.mark.parametrize("breakage", BREAKAGES)
    def test_it_names_what_would_fail_and_the_mend(
        self,
        project: Path,
        breakage: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Each by a copy of this project that is broken in one place."""
        if breakage == "a stale lock" and not shutil.which("uv"):
            pytest.skip("uv is what tells whether its lock is stale")
        break_it, what, mend = BREAKAGES[breakage]
        break_it(project)
        # The import of bot.py takes seconds and has tests of its own.
        monkeypatch.setattr(deploy, "ASK", 'print(\'{"ready": true, "doubts": []}\')')
        assert main(["check"], project) == 1
        report = capsys.readouterr().out
        assert what in report and mend in report

    def test_a_doubt_of_the_bots_is_said_without_another_mend_than_its_own(
        self,
        project: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The next line is about something else."""
        told = '{"ready": true, "doubts": ["no voice: set PIPER_VOICE"]}'
        monkeypatch.setattr(deploy, "ASK", f"print({told!r})")
        assert main(["check"], project) == 0
        lines = capsys.readouterr().out.splitlines()
        at = lines.index(f"{'start-up':16} mind: no voice: set PIPER_VOICE")
        assert "mend:" not in lines[at + 1]


COMMAND = re.compile(r"pipecat cloud (?=[a-z])([^`\"\n#]+)")


@pytest.mark.parametrize(
    "command",
    sorted(
        {
            command.strip()
            for name in (
                "DEPLOY.md",
                "deploy/__main__.py",
                "pcc-deploy.toml",
                ".github/workflows/ci.yml",
            )
            if (PROJECT / name).exists()
            for command in COMMAND.findall((PROJECT / name).read_text())
        }
    ),
)
def test_every_documented_command_exists(command: str) -> None:
    """Group, command and options, in the tool as it is installed here."""
    (plugin,) = importlib.metadata.entry_points(group="pipecat_cli.extensions", name="cloud")
    found: Any = get_command(plugin.load())
    words = command.split()
    while hasattr(found, "commands"):
        found = found.commands[words.pop(0)]
    known = {option for parameter in found.params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known


def test_the_errands_run_as_a_module() -> None:
    """The documented command is the real one."""
    command = [sys.executable, "-B", "-m", "deploy", "--help"]
    shown = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert "python -m deploy" in shown.stdout
