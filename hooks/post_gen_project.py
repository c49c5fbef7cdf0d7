"""A hook of this template: sweeps what is of other answers or of a developer, says what is next."""

import json
import os
import shutil
import sys
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

OTHERS, BY_CRUFT, LINK = json.loads(
    r"""
{{ [others(cookiecutter), "_commit" in cookiecutter, link(cookiecutter)] | tojson }}
"""
)
for name in OTHERS:
    Path(name).unlink(missing_ok=True)
# What the project's git will not see is no part of the project: keys, calls, caches, environments.
LINES = Path(".gitignore").read_text(encoding="utf-8").splitlines()
IGNORED = [line.rstrip("/") for line in LINES if not line.startswith("#")]
for here, folders, files in os.walk("."):
    names = {name for name in folders + files if any(fnmatch(name, glob) for glob in IGNORED)}
    folders[:] = sorted(set(folders) - names)
    for path in [Path(here, name) for name in names]:
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            path.unlink(missing_ok=True)
        if path.exists():  # Only said: a hook that fails takes the whole project with it.
            print(f"Could not remove {path}, which is not part of the project.", file=sys.stderr)
if BY_CRUFT:  # It links the project itself, and its updates generate aside.
    sys.exit()
if LINK:
    Path(".cruft.json").write_text(LINK, encoding="utf-8")
else:
    print("\nThe template is no git clone: the project is not linked to its later versions.")
print(f"""
A voice bot. Rehearse a call with it first: no account, no key.

    cd {Path.cwd().name}
    uv sync --extra local
    uv run python -m rehearsal
""")
