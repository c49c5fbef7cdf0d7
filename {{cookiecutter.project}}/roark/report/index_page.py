"""The index of all calls: one row of facts per call, shown by index_page.js."""

from __future__ import annotations

import hashlib
import json
from itertools import accumulate, takewhile
from pathlib import Path

from roark.folder import DELIVERY, RECORD, Folder, reason_of
from roark.report.page import SOURCES, data, h, page
from roark.report.reading import SIDES, Call, Files, Row, end_ms, start_ms, text_of

# What was said can be searched in the newest calls, as far as it fits into this.
WORDS_CHARACTERS = 4_000_000
# The course of a conversation is drawn in so many steps.
STRIP_STEPS = 150

UNREADABLE = "cannot be read"
UNDELIVERED = "undelivered"

DATA = "calls"
DATA_BEGINS = f'<script type="application/json" id="{DATA}">'
MADE_BY_US = (".html", ".tmp")


class KnownIndex:
    """The index on disk: it is its own memory of the calls that have not changed."""

    def __init__(
        self, page: str, rows: list[Row], *, watched: bool = False, searched: int = 0
    ) -> None:
        self.page = page
        self._all = rows
        self._rows = {row["folder"]: row for row in rows}
        self._watched = watched
        self._searched = searched

    @classmethod
    def of(cls, index: Path) -> KnownIndex:
        """As it lies there; without a row where it was not written by this version of the code."""
        try:
            page = index.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return cls("", [])
        try:
            content = page.rpartition(DATA_BEGINS)[2].partition("</script>")[0]
            written = json.loads(content)
            if written["code"] == _code():
                rows, searched = written["calls"], written["searched"]
                return cls(page, rows, watched=written["watched"], searched=searched)
        except (ValueError, TypeError, KeyError):
            pass
        return cls(page, [])

    def settled(self, name: str, seen: int) -> Row | None:
        """What is known of a call that is over, and where nothing is left to deliver.

        Nothing comes to it but as a new file, which its folder's own time `seen` (ns) tells.
        """
        known = self._rows.get(name)
        return known if known and known["seen"] == seen else None

    def row(self, folder: Path, files: Files, seen: int) -> Row:
        """What the index shows of a call, read anew only if its folder has changed."""
        stamp = _stamp(files)
        row = self._rows.get(folder.name)
        if not row or row["stamp"] != stamp or RECORD not in files:
            row = index_row(Call.read(folder, with_sound=False)) | {"stamp": stamp}
        is_settled = RECORD in files and row["roark"] not in (UNDELIVERED, UNREADABLE, "")
        return row | {"seen": seen if is_settled else 0}

    def shows(self, rows: list[Row], *, watched: bool) -> bool:
        """Whether the page shows just these."""
        are_same = bool(self.page) and rows == self._all and watched == self._watched
        return are_same and self._searched == _searched(rows)


def index_row(call: Call) -> Row:
    """What the index shows of a call and searches in."""
    reason, sentence = call.ending
    state, damage = _delivery(call.folder)
    return {
        "folder": call.folder.name,
        "started": call.started_at.timestamp() * 1000 if call.started_at else None,
        "agent": call.agent,
        "number": call.other_number,
        "id": text_of(call.record, "call_id"),
        "length_ms": call.duration_ms,
        "turns": len(call.turns),
        "waits": [round(total) for _, total in call.responses],
        "cuts": sum(turn.get("interrupted_ms") is not None for turn in call.turns),
        "tools": len(call.tools),
        "failed": len(call.failed_tools),
        "errors": len(call.errors),
        "ending": reason,
        "sentence": sentence,
        "roark": state,
        **({"damage": damage} if damage else {}),
        "strip": [_strip(call, side) for side in SIDES],
        "words": " \u2013 ".join(
            [text_of(turn, "text") for turn in call.turns]
            + sorted({text_of(tool, "name") for tool in call.tools})
        ),
    }


def render(rows: list[Row], unreadable: list[tuple[str, str]], *, watched: bool) -> str:
    """The page of all calls, whose rows are given newest first."""
    searched = _searched(rows)
    shown = rows[:searched] + [row | {"words": None} for row in rows[searched:]]
    notices = "".join(
        f'<p class="notice" role="status">{h(name)} cannot be read: {h(why)}.</p>'
        for name, why in unreadable[:5]
    )
    if len(unreadable) > 5:
        notices += f'<p class="notice">So it is with {len(unreadable) - 5} more.</p>'
    content = {"code": _code(), "watched": watched, "searched": searched, "calls": shown}
    return page(
        "Calls", BODY.format(notices=notices, data=data(DATA, content)), "index_page.js", "index"
    )


BODY = """
<main>
<header class="head">
<h1>Calls</h1>
<p class="muted" id="looked"></p>
{notices}
<dl class="facts" id="totals" aria-live="polite"></dl>
</header>
<form class="card filters" id="filters" role="search" aria-label="Calls">
<label class="grow">Search<input type="search" id="search" autocomplete="off" spellcheck="false"
 placeholder="words, number, id, 2026-11-21" aria-keyshortcuts="/"></label>
<label>Ending<select id="ending"></select></label>
<label id="agents" hidden>Agent<select id="agent"></select></label>
<label>Answers<select id="slow">
<option value="">any</option>
<option value="1000">one over 1 s</option>
<option value="2000">one over 2 s</option>
<option value="3000">one over 3 s</option>
<option value="5000">one over 5 s</option>
</select></label>
<fieldset><legend class="hidden-text">Only calls with</legend>
<label class="check"><input type="checkbox" id="failed">Tool failed</label>
<label class="check"><input type="checkbox" id="errors">Error</label>
<label class="check"><input type="checkbox" id="undelivered">Undelivered</label>
</fieldset>
<label class="narrow">Sort<select id="sort"></select></label>
<button type="reset" class="small" id="clear" disabled>Clear</button>
</form>
<div class="card"><table id="table"><thead><tr></tr></thead></table>
<p class="muted empty" id="empty" hidden></p></div>
<nav class="pages" id="pages" aria-label="Pages" hidden>
<button class="small" id="previous">\u2190 Previous</button>
<span id="range"></span>
<button class="small" id="next">Next \u2192</button>
</nav>
<p class="muted keys"><kbd>/</kbd> searches, <kbd>j</kbd> <kbd>k</kbd> go from call to call,
<kbd>enter</kbd> opens, <kbd>esc</kbd> clears. All times are UTC.</p>
<noscript><p class="notice">The list needs JavaScript. The page of each call is in its folder.</p>
</noscript>
</main>
{data}
"""


def _searched(rows: list[Row]) -> int:
    """In how many calls, from the newest on, what was said can be searched."""
    # Of a call whose words did not fit once they are not at hand.
    with_words = takewhile(lambda row: row["words"] is not None, rows)
    sizes = accumulate(len(row["words"]) for row in with_words)
    return sum(size <= WORDS_CHARACTERS for size in sizes)


def _code() -> str:
    """Changes with the code that makes the rows."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _stamp(files: Files) -> str:
    """Changes with anything in a folder that is not ours."""
    theirs = sorted(item for item in files.items() if not item[0].endswith(MADE_BY_US))
    return hashlib.sha256(repr(theirs).encode()).hexdigest()[:16]


def _strip(call: Call, side: str) -> list[int]:
    """When a side speaks: first step, number of steps, and so on; what touches is one stretch."""
    step = max(call.duration_ms, 1.0) / STRIP_STEPS
    stretches: list[list[int]] = []
    for turn in call.turns:
        if turn["role"] == side:
            first = min(int(start_ms(turn) / step), STRIP_STEPS - 1)
            end = max(min(round(end_ms(turn) / step), STRIP_STEPS), first + 1)
            if stretches and first <= stretches[-1][1]:
                stretches[-1][1] = max(stretches[-1][1], end)
            else:
                stretches.append([first, end])
    return [value for first, end in stretches for value in (first, end - first)]


def _delivery(folder: Path) -> tuple[str, str]:
    """Whether the call is where it is to go, in a few words, and why that cannot be told if so."""
    if not (folder / DELIVERY).exists():
        return "", ""
    # Whatever is wrong with it: what was said in the call is still worth showing.
    try:
        kept = Folder.load(folder)
    except Exception as error:
        return UNREADABLE, reason_of(error)
    if not kept.destinations:
        return "kept here", ""
    if kept.steps_left or kept.ended is None:
        return UNDELIVERED, ""
    if kept.steps_given_up:
        return f"{len(kept.steps_given_up)} given up", ""
    return "delivered", ""
