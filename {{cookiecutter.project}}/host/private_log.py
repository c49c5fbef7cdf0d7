"""Keeps what callers say, keys and tokens out of the log, at every level.

Pipecat logs transcripts, prompts, tool arguments and request bodies, and Python logs exceptions
with whatever text is in them. So the line of a library loses the values that were filled into it
and keeps its own words, as they stand in its source:

    CartesiaTTSService#0: Generating TTS [Your code is 4711.]      as Pipecat writes it
    CartesiaTTSService#0: Generating TTS […]                       as it is logged

Names of processors and measured times stay. Of an exception its type and its place stay, not its
text. The lines of this project are logged as they are written: write none that says too much.

`LOG_EVERYTHING=1` switches this off, on a machine of your own. What was said in a call is in its
folder, see README.md.
"""

import ast
import linecache
import logging
import re
import textwrap
import traceback
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

from config import setting

if TYPE_CHECKING:
    from loguru import Record

HIDDEN = "…"
PROJECT = Path(__file__).resolve().parents[1]
# What Pipecat calls its objects, such as "DeepgramSTTService#0".
NAME = re.compile(r"[A-Za-z_]\w*#\d+(::[\w#]+)*")
# Tokens that Pipecat's server takes as part of an address, and queries, in uvicorn's lines.
ADDRESS = re.compile(r"(/ws(?:-client)?/|\?)[^\s\"']+")
# No statement that logs is longer.
STATEMENT_LINES = 20


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
    if not is_ours(path):
        record["message"] = _words_of(path, record["line"], record["message"])
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
            self.args = _each(self.args, _without_tokens)
        elif not is_ours(self.pathname):
            self.msg = _words_of(self.pathname, self.lineno, str(self.msg))
            self.args = () if self.msg == HIDDEN else _each(self.args, _only_numbers)
        if self.exc_info and (error := self.exc_info[1]):
            self.exc_text, self.exc_info = _places(error), None


def _is_off() -> bool:
    # Asked for each line: .env is read after this module.
    return setting("LOG_EVERYTHING") == "1"


def _words_of(path: str, line: int, message: str) -> str:
    """Return the words that the source puts into this message, and … for the rest."""
    template = _template(path, line)
    found = template.fullmatch(message) if template else None
    if not found:
        return HIDDEN
    text, at = "", 0
    for name, value in found.groupdict().items():
        stays = name.startswith("number") or NAME.fullmatch(value)
        text += message[at : found.start(name)] + (value if stays else HIDDEN)
        at = found.end(name)
    return text + message[at:]


@cache
def _template(path: str, line: int) -> re.Pattern[str] | None:
    """Return the form of the messages that the statement at this line logs, values as groups."""
    source = linecache.getlines(path)[line - 1 : line - 1 + STATEMENT_LINES]
    for end in range(1, len(source) + 1):
        try:
            tree = ast.parse(textwrap.dedent("".join(source[:end])))
        except SyntaxError:
            continue
        match tree.body:
            case [ast.Expr(ast.Call(args=[ast.JoinedStr(values=parts), *_]))]:
                pattern = "".join(_pattern(part, index) for index, part in enumerate(parts))
                return re.compile(pattern, re.DOTALL)
            case [ast.Expr(ast.Call(args=[ast.Constant(value=str(text)), *_]))]:
                return re.compile(re.escape(text))
        break
    return None


def _pattern(part: ast.expr, index: int) -> str:
    match part:
        case ast.Constant(value=str(text)):
            return re.escape(text)
        # Only of a measured number are the digits counted: {seconds:.3f}.
        case ast.FormattedValue(format_spec=ast.JoinedStr(values=[ast.Constant(value=str(spec))])):
            return rf"(?P<number{index}>-?[\d.]+)" if spec.endswith("f") else f"(?P<v{index}>.*?)"
    return f"(?P<v{index}>.*?)"


def _places(error: BaseException) -> str:
    """Return the traceback of an exception, and of those that led to it, without their texts."""
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    frames = "".join(traceback.format_tb(error.__traceback__))
    last = f"Traceback (most recent call last):\n{frames}{type(error).__name__}"
    return f"{_places(earlier)}\n\nwhich led to\n\n{last}" if earlier else last


def _each(arguments: Any, quiet: Any) -> Any:
    if isinstance(arguments, Mapping):
        return {name: quiet(value) for name, value in arguments.items()}
    return tuple(map(quiet, arguments or ()))


def _only_numbers(value: Any) -> Any:
    return value if isinstance(value, int | float) else HIDDEN


def _without_tokens(value: Any) -> Any:
    return ADDRESS.sub(rf"\1{HIDDEN}", value) if isinstance(value, str) else value
