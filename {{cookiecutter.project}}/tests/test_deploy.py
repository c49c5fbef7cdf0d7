"""What goes to Pipecat Cloud: a bot that starts there, with its secrets and without yours."""

from pathlib import Path

import pytest
from machine import A_KEY, KEYS

import services
from deploy import check as deploy
from deploy.__main__ import main

SECRET = [
    *(".env", ".env.local", "prod.env", ".envrc", "server.pem", "server.key", "a.p12", "a.pfx"),
    *("id_rsa", "id_ed25519", "google-credentials.json", ".netrc", ".aws/credentials"),
    *(".ssh/config", ".git/config", "calls/abc/chunk-00000.pcm", "calls/abc/call.json"),
    *("recordings/call.webm", "call.wav", "call.mp3", "call.flac", "call.pcm", "bot.log"),
]
DEVELOPMENT = [
    *("rehearsal/x.py", "tests/test_x.py", "telephony/tests/test_x.py", "evals/x.yaml"),
    *("deploy/x.py", ".venv/lib/x.py"),
    *("__pycache__/bot.pyc", "roark/__pycache__/call.pyc", ".github/workflows/ci.yml"),
]


@pytest.mark.slow
def test_a_project_that_can_be_deployed_passes(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything, including the import of bot.py from the image's files alone."""
    assert main(["check"], project) == 0, capsys.readouterr().out
    assert "pipecat cloud deploy --yes" in capsys.readouterr().out


@pytest.mark.slow
def test_a_missing_key_fails_and_a_language_without_phrases_is_minded(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """readyz() is asked with exactly what the secret set would hold, and what it doubts is said.

    The bot would apologise in English. So is a model or a voice that cannot speak the language.
    """
    env = project / ".env"
    env.write_text(env.read_text().replace(f"{A_KEY}={KEYS[A_KEY]}\n", "LANGUAGE=tr\n"))
    assert main(["check"], project) == 1
    report = capsys.readouterr().out
    assert A_KEY in report
    assert "mind: LANGUAGE is tr, but conversation/phrases/ has no tr.toml" in report
    monkeypatch.setenv("LANGUAGE", "tr")
    for name in ("WHISPER_MODEL", "PIPER_VOICE", "DEEPGRAM_TTS_VOICE"):
        monkeypatch.delenv(name, raising=False)
    for doubt in services.language_doubts():
        assert f"mind: {doubt}" in report


def test_the_image_holds_what_bot_py_needs(project: Path, tmp_path: Path) -> None:
    """Every module that is imported, also inside functions; nothing for development."""
    context, app = tmp_path / "context", tmp_path / "app"
    deploy.unpack(deploy.pack_context(project), context)
    deploy.lay_out_image(context, app, project / "Dockerfile")
    image = {path.name for path in app.iterdir()}
    assert deploy.needed(project) <= image
    assert {"services.py", "prompt.md", "roark"} <= deploy.needed(project)
    assert not image & (deploy.DEVELOPMENT | {".env", "Dockerfile"})


def test_what_is_uploaded_holds_no_secret_no_call_and_nothing_for_development(
    project: Path,
) -> None:
    """At any depth."""
    planted = {*SECRET, *(f"roark/{name}" for name in SECRET), *DEVELOPMENT}
    for name in planted:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("secret")
    assert not planted & {*deploy.context_names(project)}
