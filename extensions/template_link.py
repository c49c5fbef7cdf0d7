"""Links a generated project to this template, so that `cruft update` can bring later versions.

cookiecutter keeps neither the commit a project was made from nor the answers in the project. This
extension (`_extensions` in cookiecutter.json) finds both, and hooks/post_gen_project.py writes them
as the `.cruft.json` that `cruft create` would have written. git itself is not called.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment
from jinja2.ext import Extension


class TemplateLink(Extension):
    """Gives hooks the function `link(cookiecutter)`."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        # cookiecutter renders hooks in the template's folder.
        environment.globals["link"] = lambda answers: link(Path.cwd(), answers)


def link(template: Path, answers: Mapping[str, Any]) -> str | None:
    """Return the text of `.cruft.json`; None if the template is not a clone."""
    commit = checked_out(template / ".git")
    if commit is None:
        return None
    asked = {name: answer for name, answer in answers.items() if not name.startswith("_")}
    contents = {
        "template": origin(template / ".git") or str(template),
        "commit": commit,
        "checkout": answers.get("_checkout"),
        "context": {"cookiecutter": asked},
        "directory": None,
    }
    return json.dumps(contents, indent=2) + "\n"


def checked_out(git: Path) -> str | None:
    """Return the commit a clone is at; None where there is none, or none that is found here."""
    found = read(git / "HEAD").strip()
    if found.startswith("ref: "):
        branch = found.removeprefix("ref: ")
        packed = re.search(rf"^(\w+) {re.escape(branch)}$", read(git / "packed-refs"), re.MULTILINE)
        found = read(git / branch).strip() or (packed[1] if packed else "")
    return found if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", found) else None


def origin(git: Path) -> str | None:
    """Return the address a clone was made from, without a password; None if it has none.

    This is where `gh:owner/name` has become an address that git knows.
    """
    section = re.search(r'^\[remote "origin"\]\n((?:\s.*\n?)*)', read(git / "config"), re.MULTILINE)
    url = section and re.search(r"^\s*url\s*=\s*(.*\S)", section[1], re.MULTILINE)
    return re.sub(r"^(https?://)[^/@]*@", r"\1", url[1]) if url else None


def read(file: Path) -> str:
    """Return a file's text; nothing if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
