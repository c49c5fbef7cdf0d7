"""A service that the rehearsal has a server for, in place of one that it has none for.

The bot then runs with that factory of services.py replaced; nothing else changes. The factories are
read for this, not run, for they may want packages and keys.
"""

import ast
import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from os import environ
from pathlib import Path
from typing import Any

import config
from rehearsal.providers.all import wire, wires
from rehearsal.providers.server import EngineServer

KINDS = ("stt", "llm", "tts")
# In the bot's own process; they ask no server.
IN_PROCESS = {"PiperTTSService", "WhisperSTTService"}
BUILDS = re.compile(r"\b([A-Z]\w*Service)\(")


def factories(services: Path = config.SERVICES) -> dict[str, str]:
    """Return the source of each factory, by its kind ("stt", "llm", "tts"), without comments."""
    return dict(_factories(services.read_text(encoding="utf-8")))


@cache
def _factories(source: str) -> dict[str, str]:
    lines = [line for line in source.splitlines() if not line.lstrip().startswith("#")]
    functions = [
        node for node in ast.parse("\n".join(lines)).body if isinstance(node, ast.FunctionDef)
    ]
    return {
        kind: "\n".join(lines[function.lineno - 1 : function.end_lineno])
        for kind in KINDS
        for function in functions
        if function.name == f"create_{kind}"
    }


def built(kind: str, services: Path = config.SERVICES) -> str:
    """Return the name of the class that a factory builds, as far as it can be read there."""
    found = BUILDS.search(factories(services).get(kind, ""))
    return found[1] if found else f"what create_{kind}() builds"


def missing(services: Path = config.SERVICES) -> dict[str, type[EngineServer] | None]:
    """Return the kinds of service that no server here speaks to, each with a wire to stand in."""
    here = [wire(name) for name in wires()]
    of_kind = {kind: [own for own in here if own.kind == kind and own.module] for kind in KINDS}
    return {
        kind: next(iter(of_kind[kind]), None)
        for kind, source in factories(services).items()
        if not _has_server(source, here)
    }


def sentences(services: Path = config.SERVICES) -> list[str]:
    """Say which service is replaced by which, a line for each.

    Raises:
        ValueError: For one of them there is nothing to stand in.
    """
    lines: list[str] = []
    for kind, own in missing(services).items():
        sentence = f"The rehearsal has no server for {built(kind, services)}"
        if own is None:
            raise ValueError(f"{sentence}, nor another {kind} to stand in; see rehearsal/README.md")
        lines.append(f"{sentence}: {own.speaks_to[0]} stands in for it.")
    return lines


def replacements(services: Path = config.SERVICES) -> dict[str, Callable[..., Any]]:
    """Return the factories to replace, by their names in services.py."""
    return {f"create_{kind}": factory_for(own) for kind, own in missing(services).items() if own}


def _has_server(source: str, here: list[type[EngineServer]]) -> bool:
    """Whether every class built is spoken to, at an address that the environment may change."""
    speaking = {name: own for own in here for name in own.speaks_to}
    names = set(BUILDS.findall(source))
    return bool(names) and all(
        name in IN_PROCESS
        or (name in speaking and any(url in source for url in speaking[name].url_variables))
        for name in names
    )


def factory_for(own: type[EngineServer]) -> Callable[..., Any]:
    """Return a factory that builds Pipecat's class for a server here."""
    kind = own.kind

    def create(instructions: str = "") -> Any:
        import services

        try:
            service = getattr(import_module(own.module), own.speaks_to[0])
        except ImportError as error:
            raise RuntimeError(
                f"{own.speaks_to[0]} is to stand in and its package is not installed: keep "
                f"pipecat-ai[{own.module.split('.')[2]}] in the dev group of pyproject.toml"
            ) from error
        settings: dict[str, dict[str, Any]] = {
            "stt": {"language": config.language()},
            "llm": {"system_instruction": instructions},
            "tts": {"voice": "rehearsal", "language": config.language()},
        }
        options: dict[str, dict[str, Any]] = {
            "stt": {},
            "llm": {"function_call_timeout_secs": services.TOOL_TIMEOUT_SECONDS},
            "tts": {"text_transforms": [("*", services.as_spoken)]},
        }
        if own.url_argument:
            options[kind][own.url_argument] = environ[own.url_variables[0]]
        return service(
            api_key="rehearsal", settings=service.Settings(**settings[kind]), **options[kind]
        )

    return create
