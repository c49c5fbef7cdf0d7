"""The bot that `pipecat init` 1.14.0 writes, made anew for every run, and how it is run here.

    python -m benchmarks.scaffold bot FOLDER/server/bot.py -t twilio --port 7860
    cd FOLDER/server && python -m benchmarks.scaffold image

It runs as it was generated, in the environment ours runs in, but for where its services are: it
knows no setting for the addresses of Deepgram, Cartesia and Twilio's REST API, so the first two
classes get other defaults before it is run, and the third address is replaced in its file.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

PACKAGE = "pipecat-ai[cli]==1.14.0"
ANSWERS = {
    "--bot-type": "telephony",
    "--mode": "cascade",
    "--stt": "deepgram_stt",
    "--llm": "openai_llm",
    "--tts": "cartesia_tts",
}
TRANSPORTS = ("daily", "smallwebrtc", "twilio")
TWILIO_ADDRESS = "https://api.twilio.com"


def generate(folder: Path, twilio_url: str) -> Path:
    """Let `pipecat init` write a bot for the services and transports of ours; return its folder.

    Raises:
        subprocess.CalledProcessError: It did not.
    """
    options = [word for pair in ANSWERS.items() for word in pair]
    options += [word for transport in TRANSPORTS for word in ("-t", transport)]
    subprocess.run(
        ["uvx", "--from", PACKAGE, "pipecat", "init", str(folder), *options, "--no-context-hub"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    file = folder / "server" / "bot.py"
    source = file.read_text(encoding="utf-8")
    assert TWILIO_ADDRESS in source
    file.write_text(source.replace(TWILIO_ADDRESS, twilio_url), encoding="utf-8")
    return file.parent


def _point_services() -> None:
    from pipecat.serializers.twilio import TwilioFrameSerializer
    from pipecat.services.cartesia.tts import CartesiaTTSService
    from pipecat.services.deepgram.stt import DeepgramSTTService

    for service, name, variable in (
        (DeepgramSTTService, "base_url", "DEEPGRAM_BASE_URL"),
        (CartesiaTTSService, "url", "CARTESIA_BASE_URL"),
        (TwilioFrameSerializer, "base_url", "TWILIO_BASE_URL"),
    ):
        service.__init__ = _defaulting(service.__init__, name, os.environ[variable])


def _defaulting(constructor, name: str, value: str):
    @functools.wraps(constructor)
    def construct(self, *args, **kwargs):
        constructor(self, *args, **{name: value, **kwargs})

    return construct


def main() -> None:
    """Run the scaffold's bot, under Pipecat's runner or under the base image's contract."""
    _point_services()
    if sys.argv[1] == "image":
        from rehearsal.host.base_image import main as serve_image

        serve_image()
        return
    from rehearsal.host.launch_bot import main as launch

    sys.argv = sys.argv[1:]
    launch()


if __name__ == "__main__":
    main()
