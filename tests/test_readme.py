"""The README's commands, followed literally on a machine that has Python and nothing else."""

import json
import os
import re
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
from baking import ROOT

SPOKEN = "he might even have been made amiable himself"


def shell_commands(readme: Path) -> list[str]:
    """The lines of the README's shell blocks that are to be typed."""
    blocks = re.findall(r"^```sh\n(.*?)^```", readme.read_text(encoding="utf-8"), re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line]


def fresh_environment(home: Path) -> dict[str, str]:
    """An empty home and no environment but the way to Python and to its package index."""
    ours = Path(sys.prefix, "bin")
    kept = r"SSL_CERT_.*|REQUESTS_CA_BUNDLE|PIP_.*|UV_INDEX.*|LANG"
    environment = {name: value for name, value in os.environ.items() if re.fullmatch(kept, name)}
    path = [entry for entry in os.environ["PATH"].split(os.pathsep) if Path(entry) != ours]
    return environment | {"PATH": os.pathsep.join(path), "HOME": str(home)}


def test_the_readme_has_the_two_commands_it_promises_and_ci_runs_the_second() -> None:
    _first, second = shell_commands(ROOT / "README.md")
    assert "-m rehearsal call" in _first
    typed_after_installing_uv = second.split("&&")[-1].strip()
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert typed_after_installing_uv in lines


@pytest.mark.slow
def test_the_first_command_ends_with_a_human_voice_heard_and_answered_on_both_transports(
    template: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    command = shell_commands(ROOT / "README.md")[0]

    done = subprocess.run(
        ["bash", "-c", command],
        cwd=template,
        env=fresh_environment(home),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    records = sorted((template.parent / "my-voice-bot" / "calls").glob("*/call.json"))
    assert len(records) == 2
    for path in records:
        turns = json.loads(path.read_text(encoding="utf-8"))["turns"]
        assert [turn["role"] for turn in turns] == ["assistant", "user", "assistant"]
        assert SPOKEN in turns[1]["text"].lower()
        assert SPOKEN in turns[2]["text"].lower()
        with wave.open(str(path.with_name("recording.wav"))) as recording:
            rate = recording.getframerate()
            pcm = recording.readframes(recording.getnframes())
        samples = np.frombuffer(pcm, dtype="<i2").reshape(-1, 2)
        for turn in turns:
            first, last = (int(turn[edge] * rate / 1000) for edge in ("start_ms", "end_ms"))
            loudness = np.abs(samples[first:last].astype(float)).mean(axis=0)
            speaker = 0 if turn["role"] == "user" else 1
            assert loudness[speaker] > 10 * loudness[1 - speaker]
