"""What the generated code imports is declared in its pyproject.toml, by name or by its carrier."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from typing import Any

import pytest
from baking import Bake

# Not by a name of their own: part of what is declared, and exchanged only with it.
CARRIED = {
    "aioice": "pipecat-ai[webrtc]",
    "aiortc": "pipecat-ai[webrtc]",
    "anthropic": "pipecat-ai[anthropic]",
    "anyio": "httpx",
    "av": "pipecat-ai[webrtc]",
    "fastapi": "pipecat-ai[runner]",
    "google": "pipecat-ai[google]",
    "opentelemetry": "opentelemetry-exporter-otlp-proto-http",
    "packaging": "pytest",
    "piper": "pipecat-ai[piper]",
    "prometheus_client": "prometheus-client",
    "sentry_sdk": "pipecat-ai[sentry]",
    "starlette": "pipecat-ai[runner]",
    "typer": "pipecatcloud",
    "uvicorn": "pipecat-ai[runner]",
    "yaml": "pipecat-ai[runner]",
    "yarl": "aiohttp",
}


@pytest.mark.parametrize(
    "answers",
    [{}, {"stt": "local", "llm": "google", "tts": "local"}, {"llm": "anthropic", "stt": "openai"}],
    ids=["default", "local", "anthropic"],
)
def test_every_import_of_the_generated_code_is_declared(
    bake: Bake, answers: dict[str, Any]
) -> None:
    project = bake(**answers).path
    table = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
    declared = {
        carrier
        for text in [
            *table["project"]["dependencies"],
            *(
                text
                for texts in table["project"]["optional-dependencies"].values()
                for text in texts
            ),
            *table["dependency-groups"]["dev"],
        ]
        for carrier in carriers(text)
    }
    folders = [project, project / "tests"]
    own = {path.stem for folder in folders for path in folder.iterdir()}
    by_module = packages_distributions()

    undeclared = dict[str, str]()
    for path in project.rglob("*.py"):
        for module in imported(path.read_text(encoding="utf-8")) - own - sys.stdlib_module_names:
            names = {CARRIED.get(module, ""), *(name.lower() for name in by_module.get(module, []))}
            if not names & declared:
                undeclared[module] = str(path.relative_to(project))

    assert not undeclared


def carriers(requirement: str) -> set[str]:
    """Return a requirement's name, and `name[extra]` for each of its extras."""
    match = re.match(r"([\w.-]+)(?:\[([^\]]+)\])?", requirement)
    assert match
    return {match[1]} | {f"{match[1]}[{extra}]" for extra in (match[2] or "").split(",")}


def imported(source: str) -> set[str]:
    """Return the top names of the modules that a file imports."""
    names = set[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}
