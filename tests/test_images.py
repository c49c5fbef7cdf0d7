"""The generated Dockerfile built by a real builder, and a phone call with what came out."""

import asyncio
import os
from pathlib import Path

import pytest

from benchmarks import images

# Four minutes and Debian's mirrors are too much for every run: what can be seen of the Dockerfile
# without a builder is in the project's test_deploy.
ASKED_FOR = "BUILD_IMAGES"
WHY_NOT = images.missing() if os.environ.get(ASKED_FOR) else f"takes minutes: set {ASKED_FOR}=1"


@pytest.mark.slow
@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_the_images_are_small_hold_a_call_and_nothing_that_must_not_be_there(
    template: Path, tmp_path: Path
) -> None:
    """All installed, phone only; every compiled library loads after `strip`. Four minutes."""
    (tmp_path / "clone").symlink_to(template)
    store = images.Store(tmp_path / "store")
    store.folder.mkdir()
    store.make_base()
    for name, project, most_mb in (
        ("default", images.default_project(tmp_path), 450),
        ("phone-only", images.phone_only(tmp_path), 300),
    ):
        built = images.Built(name, store.build(name, images.lock(project)))
        asyncio.run(images.look(store, built, images.OURS, starts=1))
        assert built.venv <= most_mb
        assert built.libraries > 50
        assert built.intruders == []
        assert built.greeted, "nobody was greeted"


def test_what_must_not_be_in_an_image_is_noticed_by_its_name_and_by_what_it_holds(
    tmp_path: Path,
) -> None:
    """Anywhere in the application, but not in its packages, which have tests of their own."""
    for name in ("app/.venv/lib/tests/x.py", "app/roark/tests/x.py", "app/.env", "app/bot.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "app/renamed.txt").write_text(images.MARKER)
    assert images.intruders(tmp_path) == ["app/.env", "app/renamed.txt", "app/roark/tests"]
