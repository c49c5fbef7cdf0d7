"""A hook of this template: refuses what no working bot can be made of, before a file is written."""

import json
import os
import re
import sys

# A raw string keeps the JSON's backslashes; its own lines keep the JSON's quotes off the literal's.
ANSWERS, CHOICES, TAKEN_NAMES = json.loads(
    r"""
{{ [cookiecutter, choices(), taken_names()] | tojson }}
"""
)
MAX_PURPOSE_CHARACTERS = 4000
# C0 and C1 but the newline, overrides of the reading direction, halves of surrogate pairs.
CONTROL = "[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"


def refusal(project: str, purpose: str) -> str | None:
    """Return the sentence that says what is wrong with the answers; None if nothing is."""
    if not re.fullmatch("[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", project):
        return f"project: {project!a} must be 1 to 63 lowercase letters, digits and inner hyphens."
    module = re.sub("-+", "_", project)
    if module in sys.stdlib_module_names or module.replace("_", "-") in TAKEN_NAMES:
        return f"project: {project!a} is already a module, package or device; try '{project}-bot'."
    if not purpose.strip():
        return "purpose: say in a sentence who the bot is and what it does; it is blank."
    if len(purpose) > MAX_PURPOSE_CHARACTERS:
        return f"purpose: {len(purpose)} characters are too many; at most {MAX_PURPOSE_CHARACTERS}."
    if found := re.search(CONTROL, purpose):
        return f"purpose: U+{ord(found[0]):04X} is a control character; only newlines are allowed."
    for name, allowed in CHOICES.items():
        if ANSWERS[name] not in allowed:
            return f"{name}: {ANSWERS[name]!a} is none of {', '.join(map(str, allowed))}."
    return None


if __name__ == "__main__":  # extensions/answer_checks.py takes the rules alone.
    sentence = refusal(ANSWERS["project"], ANSWERS["purpose"])
    if not sentence and (left := set(os.listdir()) - {".git"}):
        full = f"the folder {ANSWERS['project']!a} is not empty ({min(left)!a} is in it)"
        sentence = f"project: {full}."
    sys.exit(sentence)
