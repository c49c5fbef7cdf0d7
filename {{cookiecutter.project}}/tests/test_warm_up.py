"""What is done before the first caller, so that nobody waits for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import bot
import config

BUILD = """
import sys
import bot
quick = set(sys.modules)
assert bot.readyz()["ready"]
ready = set(sys.modules)
import services
from conversation import turns
from conversation.floor import Floor
services.create_stt(), services.create_llm(""), services.create_tts(), turns.params(Floor())
print(*sorted(set(sys.modules) - ready))
print(*sorted(ready - quick))
"""


@pytest.mark.slow
def test_a_ready_bot_has_imported_what_its_first_call_needs(tmp_path: Path) -> None:
    keys = dict.fromkeys(config.REQUIRED, "key")
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD],
        cwd=tmp_path,
        env={**os.environ, **keys, "PYTHONPATH": str(Path(bot.__file__).parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    by_the_call, by_readiness = process.stdout.splitlines()
    assert by_the_call == ""
    # As against the quick import, which has none of it.
    assert any(name.startswith("pipecat.services.") for name in by_readiness.split())


def test_a_bot_without_keys_is_not_ready_and_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    missing, *present = config.REQUIRED
    for key in present:
        monkeypatch.setenv(key, "key")
    monkeypatch.setenv(missing, " ")
    assert bot.readyz() == {"ready": False, "missing": [missing]}
