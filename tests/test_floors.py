"""The floors of the generated project, held by import-linter (floors.importlinter beside this)."""

import shutil
import sys
from pathlib import Path

import pytest
from baking import FOLDER, ROOT, BakedProject, tracked_files

CONTRACT = Path(__file__).with_name("floors.importlinter")


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """The template's code without its tests; import-linter reads packages, so modules are some."""
    for name in map(Path, tracked_files(ROOT / FOLDER)):
        if name.suffix != ".py" or "tests" in name.parts:
            continue
        place = tmp_path / (name if len(name.parts) > 1 else Path(name.stem, "__init__.py"))
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / FOLDER / name, place)
    return tmp_path


def lint(house: Path) -> tuple[int, str]:
    """Return import-linter's exit status and what it says of the house."""
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = BakedProject(house).run(
        sys.executable, "-c", command, "--config", str(CONTRACT), "--no-cache"
    )
    return done.returncode, done.stdout + done.stderr


def test_a_room_imports_only_from_the_floors_below_it(house: Path) -> None:
    status, said = lint(house)
    assert status == 0, said


@pytest.mark.parametrize(
    ("module", "upwards"),
    [
        ("config", "import services"),
        ("services", "from conversation import turns"),
        ("telephony/twilio_auth.py", "from host import private_log"),
        ("transports", "from rehearsal.providers import deepgram"),
    ],
)
def test_an_import_that_runs_up_is_noticed(house: Path, module: str, upwards: str) -> None:
    path = house / (module if module.endswith(".py") else f"{module}/__init__.py")
    path.write_text(f"{upwards}\n{path.read_text(encoding='utf-8')}", encoding="utf-8")
    status, said = lint(house)
    assert status == 1 and "BROKEN" in said


def test_every_module_of_the_project_has_its_floor(house: Path) -> None:
    listed = CONTRACT.read_text(encoding="utf-8").split("root_packages =")[1].split("\n\n")[0]
    assert set(listed.split()) == {path.name for path in house.iterdir()}
