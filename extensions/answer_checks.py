"""Says in one sentence which given answer this template cannot take, before anything is asked.

cookiecutter 2.7 drops a mistyped question without a word, and takes the default in place of a bad
choice in a configuration file with a warning only. This extension (`_extensions` in
cookiecutter.json) refuses both, and hands the hooks what an answer is held against and which files
belong to others.
"""

import json
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any

import click
from cookiecutter.cli import main as cookiecutter_command
from cookiecutter.config import get_user_config
from cookiecutter.exceptions import FailedHookException
from jinja2 import Environment
from jinja2.ext import Extension

try:
    from cookiecutter.prompt import YesNoPrompt
except ImportError:
    # cookiecutter shows this text after "Unable to load extension: ".
    raise ImportError("this template needs cookiecutter 2.5 or newer") from None

TEMPLATE = Path(__file__).parents[1]
YES_OR_NO = {*YesNoPrompt.yes_choices, *YesNoPrompt.no_choices}


class AnswerChecks(Extension):
    """Checks what the command line brings, and gives hooks `choices()` and `taken_names()`."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        # cookiecutter renders hooks in the template's folder, whichever version that is by then.
        environment.globals["choices"] = lambda: choices(questions(Path()))
        environment.globals["taken_names"] = lambda: taken_names(Path())
        environment.globals["others"] = others
        if sentence := mistake(given_answers(), questions(TEMPLATE)):
            raise FailedHookException(sentence)


def questions(template: Path) -> dict[str, Any]:
    """Return what is asked, with the default or all choices of each."""
    form = json.loads((template / "cookiecutter.json").read_text(encoding="utf-8"))
    return {name: default for name, default in form.items() if not name.startswith("_")}


def choices(asked: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the allowed answers to each question that does not take any text."""
    booleans = {name: [True, False] for name in asked if isinstance(asked[name], bool)}
    return booleans | {name: asked[name] for name in asked if isinstance(asked[name], list)}


def others(answers: Mapping[str, Any]) -> list[str]:
    """Return the files that belong to other answers, by the table in cookiecutter.json."""
    chosen = {f"{question}={answer}" for question, answer in answers.items()}
    return [name for name, owners in answers["_belongs"].items() if not chosen & set(owners)]


def taken_names(template: Path) -> list[str]:
    """Return the names that no project may have: modules, packages and devices."""
    return (template / "extensions" / "taken_names.txt").read_text(encoding="utf-8").split()


def given_answers() -> list[tuple[str, Any]]:
    """Return what the cookiecutter command was given; nothing where it is not what runs.

    ~/.cookiecutterrc is left alone: it may hold answers to other templates.
    """
    context = click.get_current_context(silent=True)
    if context is None or context.command is not cookiecutter_command:
        return []
    options = context.params
    given = [*(options["extra_context"] or {}).items()]
    if options["config_file"]:
        config = get_user_config(options["config_file"], options["default_config"])
        # Such a file is often shared: what is no question here may be another template's.
        shared = (config["default_context"] or {}).items()
        asked = questions(TEMPLATE)
        given += ((name, answer) for name, answer in shared if name in asked or meant(name, asked))
    if options["replay_file"]:
        replay = json.loads(Path(options["replay_file"]).read_text(encoding="utf-8"))
        given += ((k, v) for k, v in replay["cookiecutter"].items() if not k.startswith("_"))
    return given


def meant(name: str, asked: Iterable[str]) -> str | None:
    """Return the question that `name` looks like a typo of."""
    # Two letters swapped in `stt` leave less of it alike than two in `transport`.
    near = get_close_matches(name, asked, n=1, cutoff=0.65)
    ratio = SequenceMatcher(None, name, near[0]).ratio() if near else 0.0
    return near[0] if near and (ratio >= 0.75 or len(near[0]) == 3) else None


def mistake(given: Iterable[tuple[str, Any]], asked: dict[str, Any]) -> str | None:
    """Return the sentence about the first answer that cannot be taken; None if all can."""
    for name, answer in given:
        if name not in asked:
            near = meant(name, asked)
            hint = f"; did you mean {near!r}?" if near else "."
            return f"{name!r} is no question of this template ({', '.join(asked)}){hint}"
        allowed = choices(asked).get(name)
        if allowed is None or answer in allowed:
            continue
        if allowed == [True, False] and str(answer).strip().lower() in YES_OR_NO:
            continue
        return f"{name}: {answer!r} is none of {', '.join(map(str, allowed))}."
    return None
