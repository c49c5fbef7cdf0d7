"""Keeps what callers say, keys and tokens out of the log, at every level.

Pipecat logs transcripts, prompts, tool arguments and request bodies, and Python logs exceptions
with whatever text is in them. So of a library's line stay its level and its place, the processors
it names and the type of the exception it is about; its words only where nothing was filled in:

    …cartesia.tts:run_tts:712 - CartesiaTTSService#0: Generating TTS [Your code is 4711.]
    …cartesia.tts:run_tts:712 - CartesiaTTSService#0 …

Of an exception its type and its places stay, not its text. The lines of this project are logged as
they are written: write none that says too much.

`LOG_EVERYTHING=1` switches this off, on a machine of your own. What was said in a call is in its
folder, see README.md.
"""

import linecache
import logging
import re
import sys
import traceback
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

from config import setting

if TYPE_CHECKING:
    from loguru import Record

HIDDEN = "…"
PROJECT = Path(__file__).resolve().parents[1]
# What Pipecat calls its objects, such as "DeepgramSTTService#0", and the place of an error.
NAME = re.compile(r"\b[A-Z]\w*[A-Z]\w*#\d+\b|\([^()\s]+\.py:\d+\)")
# What these of Pipecat's could not read is nobody's fault here.
READERS = {
    ("pipecat.runner.utils", "parse_telephony_websocket"),
    ("pipecat.runner.run", "start_agent"),
    ("pipecat.runner.run", "handle_dialin_webhook"),
    ("pipecat.runner.run", "proxy_request"),
    ("pipecat.transports.smallwebrtc.request_handler", "handle_web_request"),
    ("pipecat.transports.smallwebrtc.connection", "on_message"),
}
# Tokens that Pipecat's server takes as part of an address, and queries, in uvicorn's lines.
ADDRESS = re.compile(r"(/ws(?:-client)?/|\?)[^\s\"']+")


def begin() -> None:
    """From now on what this process logs, with loguru or with logging, is logged quietly."""
    # A patcher and a record factory see every line before any sink or handler does, also those
    # that the server around the bot installs afterwards.
    logger.configure(patcher=_hush)
    logging.setLogRecordFactory(_QuietRecord)


@cache
def is_ours(path: str) -> bool:
    """Whether the file is one of this project's."""
    # A script may have a relative path; code without a file, such as "<string>", has none.
    file = Path(path).resolve()
    return file.is_file() and file.is_relative_to(PROJECT) and "site-packages" not in file.parts


def _hush(record: "Record") -> None:
    if _is_off():
        return
    path = record["file"].path
    is_error = record["level"].name == "ERROR"
    if is_error and (record["name"], record["function"]) in READERS:
        warning = logger.level("WARNING")
        level = type(record["level"])
        record["level"] = level(warning.name, warning.no, warning.icon)  # type: ignore[call-arg]
    if not is_ours(path):
        record["message"] = _what_stays(path, record["line"], record["message"])
    if (error := record["exception"]) and error.value:
        record["message"] += "\n" + _places(error.value)
        record["exception"] = None


class _QuietRecord(logging.LogRecord):
    """A record of Python's own logging, which libraries and uvicorn use."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if _is_off():
            return
        if self.name.startswith("uvicorn"):
            # Its formatter takes the arguments one by one.
            self.args = tuple(map(_without_tokens, self.args)) if self.args else ()
        elif not is_ours(self.pathname):
            self.msg, self.args = _what_stays(self.pathname, self.lineno, self.getMessage()), ()
        if self.exc_info and (error := self.exc_info[1]):
            self.exc_text, self.exc_info = _places(error), None
            if self.name.startswith("uvicorn") and isinstance(error, UnicodeDecodeError):
                # A stranger's bytes.
                self.exc_text, self.levelno, self.levelname = None, logging.WARNING, "WARNING"


def _is_off() -> bool:
    # Asked for each line: .env is read after this module.
    return setting("LOG_EVERYTHING") == "1"


def _what_stays(path: str, line: int, message: str) -> str:
    """Return of a library's message what nobody has said: see above."""
    # The statement begins at this line; a text that stands there in quotes has nothing filled in.
    if f'"{message}"' in "".join(linecache.getlines(path)[line - 1 : line + 1]):
        return message
    about = sys.exc_info()[0]
    return " ".join([*NAME.findall(message), HIDDEN, *([about.__name__] if about else [])])


def _without_tokens(value: Any) -> Any:
    return ADDRESS.sub(rf"\1{HIDDEN}", value) if isinstance(value, str) else value


def _places(error: BaseException) -> str:
    """Return the traceback of an exception, and of those that led to it, without their texts."""
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    frames = "".join(traceback.format_tb(error.__traceback__))
    last = f"Traceback (most recent call last):\n{frames}{type(error).__name__}"
    return f"{_places(earlier)}\n\nwhich led to\n\n{last}" if earlier else last
