"""Keeps cookiecutter from rendering what a user answers.

cookiecutter 2.7 treats an answer given on the command line, in a configuration file or through
its API as a Jinja template: a purpose with `{{` in it is evaluated, or ends in a traceback. This
extension (`_extensions` in cookiecutter.json) makes every answer text and nothing but text.
"""

import re

from jinja2 import Environment
from jinja2.ext import Extension

# Sources that reach Jinja without a file name: answers, paths, and these two of the template.
FOLDER = "{{cookiecutter.project}}"
HOOK_OPENING = '"""A hook of this template:'


class VerbatimAnswers(Extension):
    """Turns each nameless source that is not the template's own into a literal."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        environment.filters["folder"] = folder

    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        """Return `source`, or a template that renders to exactly `source` if it is an answer."""
        if name is not None or source.startswith(HOOK_OPENING):
            return source
        # JSON read as YAML leaves the two halves of an emoji apart; joined, a file can hold it.
        rendered = ascii(source.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass"))
        if source == FOLDER:
            # cookiecutter sets _template once the form is answered; before, this is an answer too.
            rendered = f"cookiecutter.project|folder if '_template' in cookiecutter else {rendered}"
        return "{{ " + rendered + " }}"


def folder(project: str) -> str:
    """Return a folder name for any text, so that the hook, not the disk, refuses a bad one.

    A good project name is its own folder. Anything else (a path, nothing, a whole novel) becomes
    one folder in the output directory, which cookiecutter removes again after the refusal.
    """
    return re.sub("[^a-z0-9-]", "-", project)[:64] or "-"
