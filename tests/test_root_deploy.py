"""Deploying straight from this repository, and what every answer's project would deploy."""

import itertools
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from baking import FOLDER, ROOT, Bake, BakedProject, CommandLine, succeed
from deploy import check as deploy

# num2words 0.5 needs docopt 0.6.2, which is a source package: one Python file, built anywhere.
SOURCE_ONLY = ["docopt"]


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions, spacing made even."""
    return [(word, " ".join(rest.split())) for word, rest in deploy.instructions(dockerfile)]


def image_python(project: BakedProject) -> str:
    """Return the Python of the base image, such as 3.12."""
    found = re.search(r"(?m)^FROM .*-py(\d+\.\d+)(?:@\S+)?$", project.read("Dockerfile"))
    assert found
    return found[1]


def test_the_deploy_file_is_that_of_the_default_project(default_project: BakedProject) -> None:
    """To the byte."""
    assert (ROOT / "pcc-deploy.toml").read_bytes() == default_project.read_bytes("pcc-deploy.toml")


def test_the_image_is_built_as_the_default_projects_is(default_project: BakedProject) -> None:
    """Its last stage is the project's Dockerfile, taken from the stage that baked it."""
    ours = instructions(ROOT / "Dockerfile")
    starts = [index for index, (word, _) in enumerate(ours) if word == "FROM"]
    assert len(starts) == 2
    baked = [
        (word, rest.replace("--from=bake ", "").replace("/bot/", ""))
        for word, rest in ours[starts[1] :]
    ]
    assert baked == instructions(default_project.path / "Dockerfile")


def test_the_first_stage_bakes_the_same_project_from_what_is_uploaded(
    template: Path, default_project: BakedProject, command_line: CommandLine, tmp_path: Path
) -> None:
    """Run here what it runs there: the upload unpacked, cookiecutter at the version it pins."""
    stage = instructions(ROOT / "Dockerfile")
    pinned = next(rest for word, rest in stage if word == "RUN" and "pip install" in rest)
    locked = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    version = next(p["version"] for p in locked if p["name"] == "cookiecutter")
    assert f'"cookiecutter=={version}"' in pinned
    assert ("COPY", ". /template/") in stage
    bake = "cookiecutter --no-input --output-dir /baked /template"
    assert ("RUN", f"{bake} && mv /baked/* /bot && rm /bot/preflight.py") in stage

    context, output = tmp_path / "template", tmp_path / "baked"
    output.mkdir()
    deploy.unpack(deploy.pack_context(template), context)
    succeed(command_line("--no-input", "--output-dir", output, context))
    (baked,) = output.iterdir()
    (baked / "preflight.py").unlink()
    app = tmp_path / "app"
    deploy.lay_out_image(baked, app, default_project.path / "Dockerfile")
    for path in app.rglob("*"):
        if path.is_file():
            name = path.relative_to(app).as_posix()
            assert path.read_bytes() == default_project.read_bytes(name), name


NEVER_UPLOADED = {
    *(".env", ".env.local", "key.pem", "tls/server.key", ".git/config", ".venv/x"),
    *(f"{FOLDER}/.env", f"{FOLDER}/calls/x/chunk-00000.pcm", f"{FOLDER}/key.pem"),
    *(f"{FOLDER}/rehearsal/human.wav", f"{FOLDER}/tests/test_x.py", "tests/test_x.py"),
    *(f"{FOLDER}/roark/tests/test_x.py", f"{FOLDER}/roark/.env"),
}


def test_the_upload_from_this_repository_holds_no_secret_no_call_and_no_tests(
    template: Path, tmp_path: Path
) -> None:
    """Its .dockerignore replaces the builder's own list too."""
    clone = Path(shutil.copytree(template, tmp_path / "clone"))
    for name in NEVER_UPLOADED:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text("secret")
    assert not NEVER_UPLOADED & {*deploy.context_names(clone)}


def every_answer() -> list[dict[str, Any]]:
    """Each region, transport and recording at least once, the others cycling along."""
    regions = ["us-west", "us-east", "eu-central", "ap-south"]
    transports = itertools.cycle(["webrtc", "daily", "twilio"])
    record = itertools.cycle([True, False])
    return [
        {"region": region, "transport": next(transports), "record_audio": next(record)}
        for region in regions
    ]


@pytest.mark.parametrize("answers", every_answer(), ids=lambda a: "-".join(map(str, a.values())))
def test_every_answer_can_be_deployed(bake: Bake, answers: dict[str, Any]) -> None:
    """Settings as answered and taken by the platform's parser; nothing in the image's way."""
    project = bake(project="a1-b2", **answers).path
    assert deploy.load_as_pipecat_cloud(project / "pcc-deploy.toml")
    settings = deploy.read_deploy_file(project)
    assert settings["agent_name"] == "a1-b2"
    assert settings["secret_set"] == "a1-b2-secrets"
    assert settings["region"] == answers["region"]
    assert settings["architecture"] == "arm64"
    for check in (deploy.check_deploy_file, deploy.check_dockerfile, deploy.check_context):
        assert not [finding for finding in check(project) if finding.fatal]


def test_every_region_asked_for_has_an_answer_here(form: dict[str, Any]) -> None:
    """A new region of the form has to pass the test above."""
    assert form["region"] == [answers["region"] for answers in every_answer()]


def assert_actions_are_pinned(workflow: dict[Any, Any]) -> None:
    for job in workflow["jobs"].values():
        for used in [step["uses"] for step in job["steps"] if "uses" in step]:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", used), "a tag can be moved"


def test_the_workflows_run_everything_and_weekly_the_newest_pipecat() -> None:
    """Read as YAML: the commands are there, and the schedule."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    triggers = workflow[True]  # YAML 1.1 takes the key `on` for a boolean.
    assert triggers["schedule"]
    jobs = workflow["jobs"]
    commands = {
        name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()
    }
    assert ".ci/run" in commands["repository"]
    assert any("uv run pytest" in command for command in commands["answers"])
    assert any("--upgrade-package pipecat-ai" in command for command in commands["newest"])
    assert jobs["newest"]["if"] == "github.event_name != 'push'"
    assert_actions_are_pinned(workflow)


def test_a_projects_workflow_tests_every_push_and_deploys_only_when_told_to(
    default_project: BakedProject,
) -> None:
    """The deploy job is off until a repository variable says otherwise."""
    workflow = yaml.safe_load(default_project.read(".github/workflows/ci.yml"))
    commands = [step.get("run", "") for step in workflow["jobs"]["test"]["steps"]]
    assert [command for command in commands if command.startswith("uv run pytest")]
    assert [command for command in commands if "uv sync --locked" in command]
    assert "uv run ruff check ." in commands
    job = workflow["jobs"]["deploy"]
    assert job["if"].startswith("vars.DEPLOY == 'true' && ")
    assert job["needs"] == ["test", "licences"]
    deploys = [step.get("run", "") for step in job["steps"]]
    (checks,) = [command for command in deploys if "python -m deploy check" in command]
    assert deploys.index(checks) < deploys.index("pipecat cloud deploy --yes")
    (tool,) = [command for command in deploys if "uv tool install" in command]
    assert tool.count("==") == 2, "the tool that deploys is pinned"
    assert_actions_are_pinned(workflow)
    assert workflow["permissions"] == {"contents": "read"}


@pytest.mark.slow
def test_the_oldest_pipecatcloud_we_claim_takes_the_deploy_file(
    default_project: BakedProject, tmp_path: Path
) -> None:
    """The lower bound of pyproject.toml, installed for itself."""
    dependencies = tomllib.loads(default_project.read("pyproject.toml"))["project"]["dependencies"]
    bound = next(text for text in dependencies if text.startswith("pipecatcloud"))
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run(
        ["uv", "venv", "-q", "--python", sys.executable, python.parent.parent], check=True
    )
    install = ["uv", "pip", "install", "-q", "--resolution", "lowest-direct", bound]
    subprocess.run([*install, "--python", python], check=True)
    ask = (
        "import importlib.metadata, pipecatcloud.cli.config as config\n"
        "config.deploy_config_path = 'pcc-deploy.toml'\n"
        "from pipecatcloud._utils.deploy_utils import load_deploy_config_file\n"
        "print(importlib.metadata.version('pipecatcloud'), load_deploy_config_file().agent_name)\n"
    )
    answer = default_project.run(str(python), "-B", "-c", ask)
    succeed(answer)
    oldest = re.match(r"pipecatcloud>=([\d.]+)", bound)
    assert oldest
    version, name = answer.stdout.split()
    assert version.startswith(oldest[1]) and name == "my-voice-bot"


@pytest.mark.slow
def test_every_dependency_has_an_arm64_wheel_for_the_image(default_project: BakedProject) -> None:
    """Resolved for linux at the image's Python from wheels alone, none of them downloaded.

    manylinux_2_36 is Debian 12's C library; the image's Debian 13 runs those wheels too.
    """
    exceptions = [option for name in SOURCE_ONLY for option in ("--no-binary", name)]
    resolved = default_project.run(
        *("uv", "pip", "compile", "-q", "pyproject.toml", "--only-binary", ":all:", *exceptions),
        *("--python-platform", "aarch64-manylinux_2_36"),
        *("--python-version", image_python(default_project), "--no-header", "--no-annotate"),
    )
    succeed(resolved)
    names = {line.partition("==")[0] for line in resolved.stdout.splitlines()}
    assert {"pipecat-ai", "pipecatcloud", "daily-python", "aiortc", "onnxruntime"} <= names
    assert set(SOURCE_ONLY) <= names, "an exception that is needed no longer"


@pytest.mark.slow(seconds=50)
def test_ci_writes_what_the_image_holds_and_fails_at_a_licence_not_allowed(
    default_project: BakedProject, tmp_path: Path
) -> None:
    """The job's own commands, with the tools at the versions it pins."""
    project = BakedProject(Path(shutil.copytree(default_project.path, tmp_path / "bot")))
    job = yaml.safe_load(project.read(".github/workflows/ci.yml"))["jobs"]["licences"]
    *make, list_licences = [step["run"] for step in job["steps"] if "run" in step]
    environment = " ".join(f"{name}={value}" for name, value in job["env"].items())
    for command in (*make, list_licences):
        succeed(project.run("sh", "-ec", f"export {environment}\n{command}"))

    bill = json.loads(project.read("sbom.json"))
    held = {component["name"] for component in bill["components"]}
    assert bill["bomFormat"] == "CycloneDX"
    assert {"pipecat-ai", "onnxruntime", "num2words", "soxr", "av"} <= held
    assert not {"pytest", "numba", "opencv-python-headless"} & held, "the image holds none of it"
    rows = [line.split("|") for line in project.read("licences.md").splitlines()[2:]]
    licences = {row[1].strip(): row[3].strip() for row in rows}
    assert "LGPL" in licences["num2words"] and "LGPL" in licences["soxr"]

    stricter = project.read("pyproject.toml").replace(";LGPL;Lesser General", "")
    (project.path / "pyproject.toml").write_text(stricter)
    refused = project.run("sh", "-ec", list_licences)
    assert refused.returncode and "num2words" in refused.stderr + refused.stdout
