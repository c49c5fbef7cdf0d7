"""What the bot reads from its environment (`.env` on your machine, a secret set in the cloud)."""

import math
import os
import re
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

HERE = Path(__file__).parent
SERVICES = HERE / "services.py"
# Where to get what it needs.
FROM_WHERE = {
    # <% if "deepgram" in cookiecutter.stt + cookiecutter.tts %>
    "DEEPGRAM_API_KEY": "Deepgram (https://console.deepgram.com)",
    # <% endif %>
    # <% if cookiecutter.stt == "assemblyai" %>
    "ASSEMBLYAI_API_KEY": "AssemblyAI (https://www.assemblyai.com/app/api-keys)",
    # <% endif %>
    # <% if "openai" in (cookiecutter.stt, cookiecutter.llm) %>
    "OPENAI_API_KEY": "OpenAI (https://platform.openai.com/api-keys)",
    # <% endif %>
    # <% if cookiecutter.llm == "anthropic" %>
    "ANTHROPIC_API_KEY": "Anthropic (https://platform.claude.com/settings/keys)",
    # <% endif %>
    # <% if cookiecutter.llm == "google" %>
    "GOOGLE_API_KEY": "Google Gemini (https://aistudio.google.com/apikey)",
    # <% endif %>
    # <% if cookiecutter.llm == "compatible" %>
    "LLM_URL": "the language model's server, such as http://localhost:11434/v1",
    "LLM_MODEL": "the model's name on that server",
    # <% endif %>
    # <% if cookiecutter.tts == "cartesia" %>
    "CARTESIA_API_KEY": "Cartesia (https://play.cartesia.ai/keys)",
    # <% endif %>
    # <% if cookiecutter.tts == "elevenlabs" %>
    "ELEVENLABS_API_KEY": "ElevenLabs (https://elevenlabs.io/app/settings/api-keys)",
    "ELEVENLABS_VOICE_ID": "the voice it speaks with (https://elevenlabs.io/app/voice-library)",
    # <% endif %>
}

# What it is told in words. Without the others it calls nobody, and leaves no message.
PROMPT = "prompt.md"
TEXTS = (PROMPT, "outbound.md", "voicemail.md")

# What services.py reads without a default: setting("NAME"), os.getenv("NAME"), os.environ["NAME"].
READ = re.compile(
    r"""\b(?:(?:setting|getenv|environ\.get)\(\s*"(\w+)",?\s*\)|environ\[\s*"(\w+)"\s*\])"""
)


def required(services: Path) -> dict[str, str]:
    """Each variable without which a services.py can build no service, with what it is."""
    lines = services.read_text(encoding="utf-8").splitlines()
    found = READ.findall("\n".join(line for line in lines if not line.lstrip().startswith("#")))
    names = dict.fromkeys(plain or subscript for plain, subscript in found)
    return {name: FROM_WHERE.get(name, "what a service in services.py reads") for name in names}


# If any of these is missing, no call can be held.
REQUIRED = required(SERVICES)

# What is a number where it is set: a slip is said before there is a call to fail for it.
SECONDS = (
    *("MAX_CALL_SECONDS", "SILENCE_SECONDS", "ANSWER_SECONDS", "PATIENCE_SECONDS"),
    *("DRAIN_SECONDS", "ROARK_FLUSH_SECONDS"),
)
NUMBERS = ("CALLS_MAX_MB", "CALLS_MAX_DAYS")
WHOLE_NUMBERS = ("MAX_CALLS", "MAX_CALLS_PER_CALLER", "CONTEXT_TOKENS")
SWITCHES = ("PROTECT_GREETING", "SPECULATE", "TRANSFER_ASK")
# What is pasted, of the services and of your own tools, and of what it consists.
PASTED = re.compile(r"[A-Z0-9_]+_(API_KEY|AUTH_TOKEN|ACCOUNT_SID|VOICE_ID)")
KEY = re.compile(r"[!#-&(-~]+")
ON, OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off")

# What is spoken in calls, where LANGUAGE does not say.
# <% if cookiecutter.language != "en" %>
DEFAULT_LANGUAGE = "{{ cookiecutter.language }}"
# <% endif %>
# <% if cookiecutter.language == "en" %>
DEFAULT_LANGUAGE = "en"
# <% endif %>


def setting(name: str, default: str = "") -> str:
    """The variable `name`, or `default` where it is unset or blank."""
    return os.environ.get(name, "").strip() or default


def seconds(name: str, default: float) -> float:
    """The variable `name` as a number of seconds, or `default` where it is unset or blank.

    Raises:
        RuntimeError: It is no number, or less than 0.
    """
    return _number(name, default, "a number of seconds")


def whole_number(name: str, default: int) -> int:
    """The variable `name`, or `default` where it is unset or blank.

    Raises:
        RuntimeError: It is no whole number.
    """
    value = setting(name, str(default))
    if not value.isdecimal():
        raise RuntimeError(f"{name} is a whole number, 0 for no limit, not {value!r}")
    return int(value)


def _number(name: str, default: float, what: str = "a number") -> float:
    value = setting(name, str(default))
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise RuntimeError(f"{name} is {what}, 0 or more, not {value!r}")
    return number


def is_on(name: str, default: bool = False) -> bool:
    """Whether the variable `name` is 1, true, yes or on; `default` where it is unset or blank."""
    value = setting(name).lower()
    return value in ON if value else default


def language() -> str:
    """The language of calls, LANGUAGE: a code such as `de` or, with a region, `pt-BR`.

    Raises:
        RuntimeError: It is no such code.
    """
    from pipecat.transcriptions.language import Language

    value = setting("LANGUAGE", DEFAULT_LANGUAGE)
    name, _, region = value.replace("_", "-").partition("-")
    try:
        return Language(f"{name.lower()}-{region.upper()}" if region else name.lower()).value
    except ValueError:
        raise RuntimeError(
            f"LANGUAGE is the code of a language, such as en, de or pt-BR, not {value!r}"
        ) from None


def timezone() -> ZoneInfo:
    """The zone in which the bot tells the time, TIMEZONE; without it UTC.

    Raises:
        RuntimeError: There is no such zone.
    """
    name = setting("TIMEZONE", "UTC")
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise RuntimeError(f"TIMEZONE is a zone such as Europe/Berlin, not {name!r}") from None


def missing_keys() -> dict[str, str]:
    """Each required variable that is not set, with what it is."""
    return {name: purpose for name, purpose in REQUIRED.items() if not setting(name)}


def require_keys() -> None:
    """Raise RuntimeError, naming every required variable that is missing, or what one must be."""
    if missing := missing_keys():
        raise RuntimeError(f"not configured: {', '.join(missing)} missing; see env.example")
    check_values()


def text(file: Path) -> str:
    """What an owner has written for the bot in plain words.

    Raises:
        RuntimeError: It is not there or no text, in a sentence.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"{file.name} cannot be read ({type(error).__name__}): make it plain text in UTF-8"
        ) from None


def check_values() -> None:
    """Raise RuntimeError for the first setting or text that is not what it has to be."""
    for name in TEXTS:
        if (HERE / name).exists() or name == PROMPT:
            text(HERE / name)
    language()
    timezone()
    for name in SECONDS:
        seconds(name, 0.0)
    for name in NUMBERS:
        _number(name, 0.0)
    for name in WHOLE_NUMBERS:
        whole_number(name, 0)
    for name in SWITCHES:
        if setting(name, "0").lower() not in ON + OFF:
            raise RuntimeError(f"{name} is 1 or 0, not {setting(name)!r}")
    for name in filter(PASTED.fullmatch, os.environ):
        if setting(name) and not KEY.fullmatch(setting(name)):
            raise RuntimeError(
                f"{name} holds what no key does: a quotation mark, a blank, a second line or a "
                "character that cannot be seen; copy it anew"
            )


def reason(error: Exception) -> str:
    """What to log of `error`: the text of a plain one, which is ours; of others their type alone.

    The texts of parsers and validators repeat what they were given, tokens and numbers included.
    """
    is_plain = type(error) in (RuntimeError, ValueError) and str(error)
    return str(error) if is_plain else type(error).__name__


def read_env() -> None:
    """Read `.env` into the environment. What it says wins over the shell, as in Pipecat's runner.

    Raises:
        SystemExit: It is no text, or a line of it makes no sense, in a sentence.
    """
    from dotenv import find_dotenv, load_dotenv

    path = find_dotenv()
    try:
        # Editors on Windows put an invisible mark before the first name, which would be part of it.
        content = StringIO(Path(path).read_text(encoding="utf-8-sig") if path else "")
        load_dotenv(stream=content, override=True)
    except (OSError, ValueError) as error:
        # A parser's text repeats what it read.
        raise SystemExit(
            f".env cannot be read ({type(error).__name__}): make it plain text in UTF-8, as "
            "env.example is"
        ) from None
    # Of python-dotenv's own line the private log shows nothing. A rehearsal reads no .env.
    if content.tell() and (line := broken_line(content.getvalue())):
        raise SystemExit(
            f".env, line {line} cannot be read: it has to be NAME=value, and what is in quotation "
            "marks ends with the one it begins with"
        )


def broken_line(content: str) -> int | None:
    """The number of the first line of a `.env` that python-dotenv leaves out as unreadable."""
    from dotenv.parser import parse_stream

    for found in parse_stream(StringIO(content)):
        if found.error:
            # Its first line may be one of the blank ones before.
            statement = found.original.string
            return found.original.line + statement[: -len(statement.lstrip())].count("\n")
    return None


def exit_without_keys(*checks: Callable[[], None]) -> None:
    """Read `.env`; where a required variable is missing, say which and exit with status 2.

    Args:
        *checks: Raise RuntimeError for a setting that is not what it has to be; its text is said,
            and the status is 1.
    """
    read_env()
    try:
        for check in (check_values, *checks):
            check()
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
    missing = missing_keys()
    if not missing or {"-h", "--help"} & set(sys.argv):
        return
    lines = [f"  {name:19} {purpose}" for name, purpose in missing.items()]
    print(
        "This bot cannot take a call yet. Missing, in the environment or in .env:",
        *lines,
        "Copy env.example to .env and fill them in. To try the bot without any key:",
        "  python -m rehearsal",
        sep="\n",
        file=sys.stderr,
    )
    raise SystemExit(2)
