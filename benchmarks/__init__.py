"""The observer measured beside its peers, in one run and on the same calls.

    uv run --group bench python -m benchmarks             # everything, and README.md's tables anew
    uv run --group bench python -m benchmarks frames stall

The peers are the published packages pipecat-roark and tuner-pipecat-sdk: a dependency group of
this repository, never a dependency of what it generates.
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = REPOSITORY / "{{cookiecutter.project}}"

# The template's files are imported where they lie.
sys.path.insert(0, str(PROJECT))
