"""A hook of this template: sweeps what came from a developer's working copy, says what is next."""

import os
import shutil
import sys
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

UNWANTED = (
    *("__pycache__", "*.pyc", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".coverage"),
    *(".env", ".env.*", ".venv", "calls", ".DS_Store"),
)

for here, folders, files in os.walk("."):
    names = {name for name in folders + files if any(fnmatch(name, glob) for glob in UNWANTED)}
    folders[:] = sorted(set(folders) - names)
    for path in [Path(here, name) for name in names]:
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
