"""A hook of this template: sweeps what came from a developer's working copy, says what is next."""

import os
import shutil
import sys
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

FOLDERS = ("__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".venv", "calls")
FILES = (".env", ".env.*", "*.pyc", ".coverage", ".DS_Store")


def unwanted(names: list[str], patterns: tuple[str, ...]) -> set[str]:
    """Return the names that match one of the patterns."""
    return {name for name in names if any(fnmatch(name, pattern) for pattern in patterns)}


for here, folders, files in os.walk("."):
    swept = unwanted(folders, FOLDERS)
    folders[:] = sorted(set(folders) - swept)
    for path in [Path(here, name) for name in swept | unwanted(files, FILES)]:
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            path.unlink(missing_ok=True)
        if path.exists():  # Only said: a hook that fails takes the whole project with it.
            print(f"Could not remove {path}, which is not part of the project.", file=sys.stderr)

print(f"""
A voice bot. Rehearse a call with it first: no account, no key.

    cd {Path.cwd().name}
    uv sync --extra local
    uv run python -m rehearsal
""")
