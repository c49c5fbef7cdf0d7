"""Starts the project's bot the way `python bot.py` does, but cut off from the world.

    python -m rehearsal.host.launch_bot bot.py -t webrtc --port 7860

Four things keep the bot on this machine without its being told: `.env`, which would bring the
real keys and addresses back over the rehearsal's environment, is not read; a service that has no
server here is replaced by one that has (`--stand-in` before the file); WebRTC offers 127.0.0.1
alone; and when the rehearsal dies, however it dies, the bot ends too. Its server gets one page
more, /rehearsal, for talking to it in a browser without any part loaded from elsewhere.
"""

import faulthandler
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

import dotenv

STAND_IN = "--stand-in"


def main() -> None:
    """Run the bot file named by the first argument, with the others as its own."""
    # Of a bot that does not end the rehearsal asks by SIGABRT what it is doing.
    faulthandler.enable()
    threading.Thread(target=_end_with_the_rehearsal, daemon=True).start()
    # Pipecat's runner imports this name and calls it with override=True.
    dotenv.load_dotenv = _read_no_env_file
    sys.argv = sys.argv[1:]
    if sys.argv[0] == STAND_IN:
        sys.argv = sys.argv[1:]
        _stand_in()
    if "webrtc" in sys.argv:
        from rehearsal.callers.loopback_ice import keep_ice_on_loopback

        keep_ice_on_loopback()
        _serve_page()
    runpy.run_path(sys.argv[0], run_name="__main__")


def _stand_in() -> None:
    import services
    from rehearsal import stand_ins

    for name, factory in stand_ins.replacements().items():
        setattr(services, name, factory)


def _serve_page() -> None:
    """Add a page beside Pipecat's own (/client), which loads a script from the internet."""
    from fastapi.responses import FileResponse
    from pipecat.runner.run import app

    # Routes added first answer first: without this one, `/` leads to Pipecat's page.
    @app.get("/", include_in_schema=False)
    @app.get("/rehearsal", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(Path(__file__).with_name("page.html"))


def _end_with_the_rehearsal() -> None:
    """Wait until the pipe from the rehearsal breaks, then ask this process to end."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _read_no_env_file(*_args: object, **_kwargs: object) -> bool:
    return False


if __name__ == "__main__":
    main()
