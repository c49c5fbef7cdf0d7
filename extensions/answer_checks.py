"""Says in one sentence which answer this template cannot take, as soon as it is given.

cookiecutter 2.7 drops a mistyped question without a word, and takes the default in place of a bad
choice in a configuration file with a warning only. It asks everything before a hook may refuse a
name, and logs a traceback behind that. This extension (`_extensions` in cookiecutter.json) refuses
all of these itself, and hands the hooks what an answer is held against and which files belong to
others.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from difflib import SequenceMatcher, get_close_matches
from functools import cache
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
HOOK_OPENING = '"""A hook of this template:'
YES_OR_NO = {*YesNoPrompt.yes_choices, *YesNoPrompt.no_choices}


class AnswerChecks(Extension):
    """Checks what the command line brings, and gives hooks `choices()` and `taken_names()`."""

    # After VerbatimAnswers, which would take what is added here for an answer.
    priority = 200

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        # cookiecutter renders hooks in the template's folder, whichever version that is by then.
        environment.globals["choices"] = lambda: choices(questions(Path()))
        environment.globals["taken_names"] = lambda: taken_names(Path())
        environment.globals["others"] = others
        environment.globals["check_text"] = check_text
        if sentence := mistake(given_answers(), questions(TEMPLATE)):
            raise FailedHookException(sentence)

    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        """Have the text answers looked at whenever cookiecutter renders the next question."""
        if name is not None or source.startswith(HOOK_OPENING):
            return source
        return "{{ check_text(cookiecutter) }}" + source


def check_text(answers: Any) -> str:
    """Return nothing. Raises FailedHookException for a project or purpose that no bot can have."""
    if answers and "project" in answers and is_the_command():
        project, purpose = answers["project"], answers.get("purpose", "not asked yet")
        if sentence := pre_gen_refusal()(project, purpose):
            raise FailedHookException(sentence)
    return ""


@cache
def pre_gen_refusal() -> Callable[[str, str], str | None]:
    """Return the rules of hooks/pre_gen_project.py, where alone they stand."""
    hook = (TEMPLATE / "hooks" / "pre_gen_project.py").read_text(encoding="utf-8")
    knows = json.dumps([{}, {}, taken_names(TEMPLATE)])
    namespace: dict[str, Any] = {"__name__": "pre_gen_project"}
    exec(re.sub(r"^\{\{.*\}\}$", lambda _: knows, hook, flags=re.MULTILINE), namespace)
    return namespace["refusal"]


def is_the_command() -> bool:
    """Whether the cookiecutter command is what runs, and not cruft, say."""
    context = click.get_current_context(silent=True)
    return context is not None and context.command is cookiecutter_command


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


@cache
def given_answers() -> list[tuple[str, Any]]:
    """Return what the cookiecutter command was given; nothing where it is not what runs.

    Kept: the hooks run in other folders, from which a relative path leads nowhere.
    ~/.cookiecutterrc is left alone: it may hold answers to other templates.
    """
    if not is_the_command():
        return []
    options = click.get_current_context().params
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
