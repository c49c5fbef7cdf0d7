"""The template where it lies: real code, in names and lines that any system can check out."""

import re
import tomllib
from pathlib import Path
from typing import Any

from baking import FOLDER, ROOT, tracked_files

# What `git clone` cannot write on Windows: these characters, these names, a final dot or space.
ILLEGAL_ON_WINDOWS = re.compile(
    r"[<>:\"|?*\\\x00-\x1f]|(^|/)(con|prn|aux|nul|com\d|lpt\d)(\.|/|$)|[. ](/|$)", re.IGNORECASE
)


def pyproject(folder: Path) -> dict[str, Any]:
    """Return a folder's pyproject.toml."""
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_tracked_name_can_be_checked_out_on_windows() -> None:
    names = tracked_files()

    assert not [name for name in names if ILLEGAL_ON_WINDOWS.search(name)]
    assert len({name.lower() for name in names}) == len(names)


def test_every_tracked_text_file_ends_its_lines_the_unix_way() -> None:
    for name in tracked_files():
        content = (ROOT / name).read_bytes()
        assert b"\0" in content or b"\r" not in content, name


def test_the_hooks_are_short_and_need_nothing_but_python() -> None:
    for hook in (ROOT / "hooks").glob("*.py"):
        source = hook.read_text(encoding="utf-8")
        imports = set(re.findall(r"^(?:import|from) (\w+)", source, flags=re.MULTILINE))
        assert len(source.splitlines()) <= 45
        assert imports <= {"contextlib", "fnmatch", "json", "os", "pathlib", "re", "shutil", "sys"}


def test_this_repository_tests_the_template_with_the_dependencies_it_ships() -> None:
    here, there = pyproject(ROOT), pyproject(ROOT / FOLDER)
    runtime = set(there["project"]["dependencies"])
    extras = {
        name for extra in there["project"]["optional-dependencies"].values() for name in extra
    }
    ours = set(here["project"]["dependencies"]) | set(here["dependency-groups"]["dev"])
    assert ours >= runtime | extras | set(there["dependency-groups"]["dev"])
    assert here["project"]["requires-python"] == there["project"]["requires-python"]
    for tool in ("line-length", "target-version"):
        assert here["tool"]["ruff"][tool] == there["tool"]["ruff"][tool]
    assert here["tool"]["ruff"]["lint"]["select"] == there["tool"]["ruff"]["lint"]["select"]


def test_double_braces_are_cookiecutters_alone() -> None:
    """The doubled braces of an f-string would be rendered: `\\d{{1,3}}` became `\\d(1, 3)`."""
    rendered = [ROOT / name for name in tracked_files() if name.count("/") == 1]
    rendered = [path for path in rendered if path.parent.name == FOLDER and path.suffix == ".py"]
    assert rendered
    for path in rendered:
        source = path.read_text(encoding="utf-8")
        assert all("cookiecutter." in braces for braces in re.findall(r"\{\{.*", source)), path


# Files that comments and documents of the project name, and that its owner makes or others have.
OTHERS_FILES = {
    *("a.toml", "dialogue.toml", "licences.md", "rime.py", "test_opening_hours.py"),
    *("benchmarks/README.md", "benchmarks/conversation.py", "pipecat/services/rime/tts.py"),
}
NAMED_FILE = re.compile(r"(?<![\w/.])(?:[\w-]+/)*[\w-]+\.(?:py|md|toml)\b")


def test_every_file_that_the_project_names_is_there() -> None:
    """In a comment too: `telemetry.py` long after it had become `host/telemetry.py`."""
    inside = [name.removeprefix(f"{FOLDER}/") for name in tracked_files() if FOLDER in name]
    sources = [
        name
        for name in inside
        if name.endswith((".py", ".md", ".toml", ".yml", ".example", "Dockerfile"))
        and "tests/" not in name
    ]
    assert "bot.py" in sources
    ends = {"/".join(Path(name).parts[at:]) for name in inside for at in range(name.count("/") + 1)}
    lost = [
        (name, named)
        for name in sources
        for named in NAMED_FILE.findall((ROOT / FOLDER / name).read_text(encoding="utf-8"))
        if named not in ends and not any(named.endswith(other) for other in OTHERS_FILES)
    ]
    assert not lost
    # Of what is installed a path is needed: nothing imports it from beside.
    toml = (ROOT / FOLDER / "pyproject.toml").read_text(encoding="utf-8")
    assert {named for named in NAMED_FILE.findall(toml) if named not in inside} == set()
