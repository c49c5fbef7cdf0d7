"""What the bot says as it stands, whatever becomes of the LLM: one file for each language.

For a further language copy `en.toml`, under the code of the language, and translate it.
"""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import config
import services

FOLDER = Path(__file__).parent
FALLBACK = "en"
WORDS = {"backchannels", "hellos", "farewells", "goes_on"}


@dataclass(frozen=True)
class Phrases:
    """The phrases of one language.

    Parameters:
        language: The language's English name, for the LLM.
        one_moment: Before the bot tries again what failed.
        apology: The last words of a call that cannot go on.
        transferring: Before the caller is handed over to a person.
        backchannels: The words, in lower case, of those who only say that they are listening.
        hellos: The words of those who only say that they are on the line.
        farewells: The words of those who return a goodbye and have nothing more to ask.
        goes_on: Words after which people mostly go on, after a pause too: number words, "and",
            articles, hesitation.
    """

    language: str
    one_moment: str
    apology: str
    transferring: str
    backchannels: frozenset[str]
    hellos: frozenset[str]
    farewells: frozenset[str]
    goes_on: frozenset[str] = frozenset()


def spoken() -> Phrases:
    """The phrases of LANGUAGE; in a language without a file they are English.

    Raises:
        RuntimeError: LANGUAGE is no code of a language.
    """
    return _of(config.language())


def recording_of(code: str) -> Path:
    """Where the apology in the language with this code is, or would be, recorded."""
    return FOLDER / f"{_base(code)}.au"


def spoken_with_recording() -> tuple[str, Path]:
    """The apology that is recorded, and its recording: in English where LANGUAGE has none."""
    code = config.language()
    if not (_file(code).exists() and recording_of(code).exists()):
        code = FALLBACK
    return _of(code).apology, recording_of(code)


def doubts() -> Iterator[str]:
    """Yield what does not go with LANGUAGE, in a sentence each; raises as `spoken` does."""
    code = config.language()
    if not _file(code).exists():
        yield (
            f"LANGUAGE is {code}, but conversation/phrases/ has no {_base(code)}.toml: what the "
            f"bot says when something fails is in {_of(code).language}"
        )
    elif not recording_of(code).exists():
        yield (
            f"LANGUAGE is {code}, but the apology for a broken voice is recorded in English: "
            "record it with python -m conversation.recorded"
        )
    yield from services.language_doubts()


def instruction() -> str:
    """What the prompt says of the language."""
    code = config.language()
    name = spoken().language if _file(code).exists() else f"the language with the code {code}"
    region = f" as in {code}" if "-" in code else ""
    return f"Speak {name}{region}, numbers, dates and times too."


@cache
def _of(code: str) -> Phrases:
    file = _file(code) if _file(code).exists() else FOLDER / f"{FALLBACK}.toml"
    try:
        table: dict[str, Any] = tomllib.loads(config.text(file))
        for kind in WORDS & table.keys():
            table[kind] = frozenset(table[kind].split())
        return Phrases(**table)
    except (ValueError, TypeError, AttributeError) as error:
        raise RuntimeError(f"conversation/phrases/{file.name}: {error}") from None


def _file(code: str) -> Path:
    return FOLDER / f"{_base(code)}.toml"


def _base(code: str) -> str:
    return code.partition("-")[0]
