"""What every page is made of: its frame, and text from outside put where it can do no harm."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from roark.folder import open_private
from roark.report.reading import BAD_ENDINGS, GOOD_ENDINGS

SOURCES = tuple(path for path in Path(__file__).parent.iterdir() if path.is_file())


def page(title: str, body: str, script: str, css_class: str) -> str:
    """A whole page; its policy lets nothing run but `script`, the name of a file here."""
    code = _asset(script)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "media-src blob: file: 'self'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{h(title)}</title>
<style>
{_asset("page.css")}</style>
</head>
<body class="{css_class}">{body}<script>{code}</script>
</body>
</html>
"""


def write(path: Path, text: str) -> None:
    """Put a page in its place, whole, for nobody but its owner to read."""
    unfinished = path.with_name(f".{path.name}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with os.fdopen(open_private(unfinished, flags), "wb") as file:
        file.write(text.encode("utf-8", "replace"))
    os.replace(unfinished, path)


def data(name: str, value: Any) -> str:
    """JSON in the page, for its script."""
    content = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{content}</script>'


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


# Text


def h(text: str) -> str:
    """Text as HTML text or attribute; control characters, which HTML cannot hold, are left out."""
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "", text))


def text_span(text: str) -> str:
    """Text of unknown direction within a line of ours."""
    return f"<bdi>{h(text)}</bdi>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """The large figures of a page's head: (name, HTML)."""
    shown = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{shown}</dl>'


def tone(reason: str) -> str:
    """The colour of an ending's badge."""
    return "good" if reason in GOOD_ENDINGS else "bad" if reason in BAD_ENDINGS else ""


def pretty(text: str) -> str:
    """JSON with its lines broken, anything else as it is."""
    with suppress(ValueError, RecursionError):
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    return text


def brief(arguments: str) -> str:
    """A tool's arguments as they are written in a call, shortened."""
    with suppress(ValueError, RecursionError):
        values = json.loads(arguments)
        if isinstance(values, dict):
            pairs = [f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in values.items()]
            return shortened(f"({', '.join(pairs)})")
    return shortened(f"({arguments})")


def shortened(text: str, length: int = 120) -> str:
    """The beginning of a text."""
    return text if len(text) <= length else text[: length - 1] + "\u2026"


def clock(ms: float) -> str:
    """4:05 or 1:04:05."""
    seconds = int(max(ms, 0) // 1000)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"


def seconds(ms: float) -> str:
    """840 ms or 1.24 s."""
    return f"{ms / 1000:.2f} s" if ms >= 1000 else f"{ms:.0f} ms"


def moment(at: datetime) -> str:
    """21 November 2026, 14:05 UTC; all times of the pages are UTC."""
    return f"{at.astimezone(UTC):%d %B %Y, %H:%M} UTC".lstrip("0")
