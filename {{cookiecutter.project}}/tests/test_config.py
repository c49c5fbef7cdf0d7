"""What the bot says and does about its environment, and before its first caller."""

import json
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from dotenv import dotenv_values

import bot
import config
from conversation import phrases, warm_up

PROJECT = Path(config.__file__).parent
KEYS = tuple(config.REQUIRED)


def run_bot(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python bot.py` with only these variables and no .env."""
    return subprocess.run(
        [sys.executable, str(PROJECT / "bot.py"), *arguments],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "PYTHON_DOTENV_DISABLED": "1", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_without_keys_the_bot_names_each_and_the_rehearsal_and_exits_2(tmp_path: Path) -> None:
    done = run_bot(cwd=tmp_path)
    assert done.returncode == 2
    assert all(key in done.stderr for key in KEYS)
    assert "python -m rehearsal" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_blank_key_is_a_missing_key_and_a_present_one_is_not_named(tmp_path: Path) -> None:
    blank, *present = KEYS
    done = run_bot(cwd=tmp_path, **dict.fromkeys(present, "x"), **{blank: "  "})
    assert done.returncode == 2
    assert blank in done.stderr
    assert not any(key in done.stderr for key in present)


def test_help_needs_no_keys(tmp_path: Path) -> None:
    done = run_bot("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "--transport" in done.stdout


def test_a_blank_setting_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SETTING", "  ")
    assert config.setting("SOME_SETTING", "a default") == "a default"
    assert config.seconds("SOME_SETTING", 1.5) == 1.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SILENCE_SECONDS", "-1"),
        ("PATIENCE_SECONDS", "nan"),
        ("MAX_CALL_SECONDS", "1e400"),
        ("DRAIN_SECONDS", "five"),
        ("CALLS_MAX_MB", "-5"),
        ("CONTEXT_TOKENS", "abc"),
        ("MAX_CALLS", "1.5"),
        ("SPECULATE", "maybe"),
        ("TIMEZONE", "Mars"),
        ("CALL_HOURS", "20-08"),
        ("CALL_HOURS", "8 to 20"),
        ("CALL_PREFIXES", "0049"),
        ("CALL_FROM", "030123456"),
        ("TWILIO_STREAM_URL", "voice.example.org"),
        ("PRICES_FILE", "none.toml"),
    ],
)
def test_a_setting_that_is_not_what_it_has_to_be_is_said_before_a_call(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=rf"^{name} .*{value}"):
        warm_up.check_values()


def test_settings_as_they_should_be_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SPECULATE": "No",
        "CALL_HOURS": "08-24",
        "CALL_PREFIXES": " +4930, +1,",
        "CALL_FROM": "+4930123456",
        "TWILIO_STREAM_URL": "wss://eu-central.api.pipecat.daily.co/ws/twilio?serviceHost=a.b",
        "CARTESIA_API_KEY": " sk_car-0aZ=/+.$ ",
    }.items():
        monkeypatch.setenv(name, value)
    warm_up.check_values()


@pytest.mark.parametrize(
    "slip", ['"{}"', "{}'", "{}\u200b", "{}\n{}", "\ufeff{}", "Bearer {}", "“{}”"]
)
@pytest.mark.parametrize("name", [KEYS[0], "HOURS_API_KEY", "TWILIO_AUTH_TOKEN"])
def test_a_key_that_was_copied_with_something_else_is_named_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, name: str, slip: str
) -> None:
    monkeypatch.setenv(name, slip.format("k-4711", "k-4711"))
    with pytest.raises(RuntimeError, match=f"^{name} holds what no key does") as refused:
        config.check_values()
    assert "4711" not in str(refused.value)


def test_a_setting_that_makes_no_sense_ends_the_start_with_a_sentence(tmp_path: Path) -> None:
    done = run_bot(cwd=tmp_path, **dict.fromkeys(KEYS, "x"), TRANSFER_TO="rubbish")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("TRANSFER_TO is a list such as reception=+49")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", config.TEXTS)
def test_words_that_cannot_be_read_are_said_before_a_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setattr(config, "HERE", tmp_path)
    with pytest.raises(RuntimeError, match=r"^prompt\.md cannot be read \(FileNotFoundError\)"):
        config.check_values()
    (tmp_path / config.PROMPT).write_text("You are kind.")
    config.check_values()
    # As an editor on Windows may write it.
    (tmp_path / name).write_bytes("Frau Müller".encode("latin-1"))
    with pytest.raises(RuntimeError, match=f"^{name} cannot be read .* plain text in UTF-8$"):
        config.check_values()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("x = = 3", "Invalid value"), ("x = 3", "unexpected keyword"), ("backchannels = 3", "split")],
)
def test_phrases_that_cannot_be_read_are_said_before_a_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, complaint: str
) -> None:
    (tmp_path / "pt.toml").write_text(content)
    monkeypatch.setattr(phrases, "FOLDER", tmp_path)
    monkeypatch.setenv("LANGUAGE", "pt")
    with pytest.raises(RuntimeError, match=rf"^conversation/phrases/pt\.toml: .*{complaint}"):
        warm_up.check_values()


@pytest.mark.parametrize(
    "content", [b"OPENAI_API_KEY=\xff-secret\n", b"OPENAI_API_KEY=a\0secret\n"]
)
def test_an_env_file_that_is_no_text_is_refused_in_a_sentence_without_its_content(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / ".env").write_bytes(content)
    path = str(tmp_path / ".env")
    monkeypatch.setattr("dotenv.find_dotenv", lambda *_args, **_kwargs: path)
    with pytest.raises(SystemExit, match=r"^\.env cannot be read") as refused:
        config.exit_without_keys()
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "broken",
    [
        '{}="sk-secret',
        "{}='sk-secret",
        '{}="sk-secret" secret',
        "{} sk-secret",
        '{}="sk-secret\nLANGUAGE="en"',
    ],
)
def test_a_line_that_cannot_be_read_is_named_by_its_number_without_its_content(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str
) -> None:
    """Not as a key that is missing, though its owner sees it there."""
    path = str(tmp_path / ".env")
    Path(path).write_text(f"# Keys.\n\nTIMEZONE=UTC\n\n\n{broken.format(KEYS[0])}\n\nLANGUAGE=en\n")
    monkeypatch.setattr("dotenv.find_dotenv", lambda *_args, **_kwargs: path)
    # What is read is set for good; monkeypatch takes it back.
    monkeypatch.setenv("TIMEZONE", "")
    monkeypatch.setenv("LANGUAGE", "")
    with pytest.raises(SystemExit, match=r"^\.env, line 6 cannot be read: ") as refused:
        config.exit_without_keys()
    assert "secret" not in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("disabled", ["dotenv.load_dotenv", "PYTHON_DOTENV_DISABLED"])
def test_a_line_that_cannot_be_read_stops_nobody_who_reads_no_env_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, disabled: str
) -> None:
    """Such as a rehearsal."""
    (tmp_path / ".env").write_text('OPENAI_API_KEY="sk\n')
    monkeypatch.setattr("dotenv.find_dotenv", lambda *_args, **_kwargs: str(tmp_path / ".env"))
    if disabled.isupper():
        monkeypatch.setenv(disabled, "1")
    else:
        monkeypatch.setattr(disabled, lambda *_args, **_kwargs: False)
    config.read_env()


def test_the_quotation_marks_that_env_example_wants_are_wanted_by_python_dotenv() -> None:
    told = next(
        line.partition(": ")[2]
        for line in (PROJECT / "env.example").read_text(encoding="utf-8").splitlines()
        if "quotation marks" in line
    )
    assert config.broken_line(told) is None
    read = [dotenv_values(stream=StringIO(text)) for text in (told, told.replace('"', ""))]
    assert read == [{"GREETING": "We are the #1."}, {"GREETING": "We are the"}]


def test_the_mark_that_an_editor_puts_before_the_first_name_is_no_part_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text(f"{KEYS[0]}=of-the-file\n", encoding="utf-8-sig")
    path = str(tmp_path / ".env")
    monkeypatch.setattr("dotenv.find_dotenv", lambda *_args, **_kwargs: path)
    monkeypatch.setenv(KEYS[0], "")
    config.read_env()
    assert config.setting(KEYS[0]) == "of-the-file"


def test_a_session_without_keys_fails_with_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(RuntimeError, match=", ".join(KEYS)):
        config.require_keys()


def test_what_services_py_reads_without_a_default_is_required(tmp_path: Path) -> None:
    services = tmp_path / "services.py"
    services.write_text(
        'a = Service(key=setting("ONE_KEY"), url=setting("ONE_URL", "wss://one.example"))\n'
        'b = Service(os.getenv("TWO_KEY"), os.environ["THREE_KEY"], os.getenv("FOUR", "x"))\n'
        'c = setting(\n    "FIVE_ID",\n)\n'
        '    # d = Service(key=setting("OLD_KEY"))\n'
    )
    assert [*config.required(services)] == ["ONE_KEY", "TWO_KEY", "THREE_KEY", "FIVE_ID"]


def test_env_example_lists_every_required_variable_and_nothing_local() -> None:
    names = {
        line.partition("=")[0]
        for line in (PROJECT / "env.example").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    }
    assert set(config.REQUIRED) <= names
    local = {name for name in names if name == "ENV" or name.endswith(("_BASE_URL", "_DIR"))}
    assert local <= set(config.REQUIRED)


def test_of_an_error_that_is_not_ours_only_the_type_is_logged() -> None:
    """Parsers and validators repeat what they were given."""
    with pytest.raises(ValueError) as of_a_parser:
        json.loads('{"token": secret}')
    assert config.reason(of_a_parser.value) == "JSONDecodeError"
    assert config.reason(TimeoutError()) == "TimeoutError"
    assert config.reason(ValueError("/ws speaks Twilio")) == "/ws speaks Twilio"


BUILD = """
import sys
import bot
quick = set(sys.modules)
assert bot.readyz()["ready"]
ready = set(sys.modules)
import services
from conversation import turns
from conversation.floor import Floor
services.create_stt(), services.create_llm(""), services.create_tts(), turns.params(Floor())
print(*sorted(set(sys.modules) - ready))
print(*sorted(ready - quick))
"""


@pytest.mark.slow
def test_a_ready_bot_has_imported_what_its_first_call_needs(tmp_path: Path) -> None:
    keys = dict.fromkeys(config.REQUIRED, "key")
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD],
        cwd=tmp_path,
        env={**os.environ, **keys, "PYTHONPATH": str(Path(bot.__file__).parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    by_the_call, by_readiness = process.stdout.splitlines()
    assert by_the_call == ""
    # As against the quick import, which has none of it.
    assert any(name.startswith("pipecat.services.") for name in by_readiness.split())


def test_a_bot_without_keys_is_not_ready_and_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    missing, *present = config.REQUIRED
    for key in present:
        monkeypatch.setenv(key, "key")
    monkeypatch.setenv(missing, " ")
    assert bot.readyz() == {"ready": False, "missing": [missing]}
