"""The page of a call: who said what and when, what the caller waited for, and the sound."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from roark.folder import RECORDING
from roark.report import sound as recording
from roark.report.page import (
    brief,
    clock,
    data,
    facts,
    h,
    moment,
    page,
    pretty,
    seconds,
    shortened,
    text_span,
    tone,
)
from roark.report.reading import (
    PARTS,
    SIDES,
    Call,
    Row,
    end_ms,
    language,
    number_of,
    row_of,
    rows_of,
    start_ms,
    text_of,
)

NAMES = {"user": "Caller", "assistant": "Bot"}
LABELS = {colour: label for _, colour, label, _ in PARTS}
# A transcript longer than this has a line with the time every so often.
LONG_MS = 15 * 60_000
TIME_LINE_MS = 5 * 60_000


def render(call: Call) -> str:
    """The whole page."""
    length_ms = max(call.sound.length_ms if call.sound else call.duration_ms, 1.0)
    bucket_ms, waves = recording.waves(call.sound) if call.sound else (length_ms, [])
    rate = recording.embedded_rate(call.sound) if call.sound else None
    sound: Row | None = None
    if call.sound and rate:
        sound = {"rate": rate, "sides": call.sound.heard_sides}
    elif call.sound and (call.folder / RECORDING).exists():
        sound = {"file": RECORDING}
    content = {
        "name": call.folder.name,
        "length_ms": length_ms,
        "bucket_ms": bucket_ms,
        "waves": waves,
        "sound": sound,
        "turns": [
            {
                "side": SIDES.index(turn["role"]),
                "start_ms": start_ms(turn),
                "end_ms": end_ms(turn),
                "interrupted_ms": number_of(turn, "interrupted_ms"),
            }
            for turn in call.turns
        ],
        "waits": [
            {"from_ms": start_ms(turn) - total, "parts": call.parts(turn, total)}
            for turn, total in call.responses
        ],
        "marks": [
            {"at_ms": at, "bad": bool(tool.get("error")), "name": text_of(tool, "name")}
            for tool in call.tools
            if (at := number_of(tool, "at_ms")) is not None
        ]
        + [
            {"at_ms": at, "bad": True, "name": text_of(error, "message")}
            for at, error in call.errors
            if at is not None
        ],
    }
    packed = recording.packed(call.sound, rate) if call.sound and rate else ""
    body = f"""
<main>
{_head(call)}
{_player(call, sound, rate)}
<div class="columns">
<section aria-label="Transcript">
<p class="tools"><a class="small narrow" href="#beside">Waits and details</a>
<button class="small" id="copy">Copy</button>
<a class="small" id="download" href="#transcript">Download</a></p>
<ol class="transcript" id="transcript">
{_transcript(call)}
</ol>
</section>
<div class="beside" id="beside">
{_responses_card(call)}
{_usage_card(call)}
{_details_card(call)}
{_further_cards(call)}
</div>
</div>
{KEYS}
</main>
{data("call", content)}
<script type="application/octet-stream" id="sound">{packed}</script>
"""
    title = f"Call with {call.agent}" + (f", {moment(call.started_at)}" if call.started_at else "")
    return page(title, body, "call_page.js", "call")


def _head(call: Call) -> str:
    reason, sentence = call.ending
    about = []
    if call.started_at:
        about.append(
            f'<time datetime="{call.started_at.isoformat()}">{moment(call.started_at)}</time>'
        )
    if call.other_number:
        about.append(text_span(call.other_number))
    notices = "".join(f'<p class="notice" role="status">{h(said)}</p>' for said in call.notices)
    return f"""<header class="head">
<p class="muted"><a class="back" href="../index.html">&larr; All calls</a></p>
<p class="about-call muted">{"".join(f"<span>{fact}</span>" for fact in about)}</p>
<h1>Call with {text_span(call.agent)}</h1>
<p class="ending"><span class="badge {tone(reason)}">{h(reason)}</span>\
<span>{text_span(sentence)}</span></p>
{notices}
{facts(_facts(call))}
</header>"""


def _facts(call: Call) -> Iterator[tuple[str, str]]:
    yield "Duration", clock(call.duration_ms)
    by_bot = sum(turn["role"] == "assistant" for turn in call.turns)
    count = len(call.turns)
    yield "Turns", f"{count} <small>{count - by_bot} caller, {by_bot} bot</small>"
    if totals := [total for _, total in call.responses]:
        slowest = f"<small>slowest {seconds(max(totals))}</small>"
        yield "Typical response", f"{seconds(statistics.median(totals))} {slowest}"
    if cuts := sum(number_of(turn, "interrupted_ms") is not None for turn in call.turns):
        yield "Interruptions", str(cuts)
    if call.tools:
        failed = f" <small>{len(call.failed_tools)} failed</small>" if call.failed_tools else ""
        yield "Tools", f"{len(call.tools)}{failed}"
    if call.errors:
        yield "Errors", str(len(call.errors))


PLAYER = """<section class="card player" aria-label="Recording">
<div class="stage">
<div class="lanes" aria-hidden="true">
<span class="caller">Caller</span><i></i><span class="bot">Bot</span><i></i>
</div>
<div id="timeline" role="slider" tabindex="0" aria-label="Position in the call"
 aria-valuemin="0" aria-valuemax="{seconds}" aria-valuenow="0">
<canvas role="img" aria-label="The call over time: caller above, bot below"></canvas>
<div id="cursor"></div>
<div id="tip" hidden></div>
</div>
</div>
<div id="whole" aria-hidden="true" hidden><div id="part"></div></div>
<div class="controls">
<button id="play" aria-label="Play" disabled{hidden}>
<svg class="start" viewBox="0 0 16 16" aria-hidden="true"><path d="M3 1l12 7-12 7z"/></svg>
<svg class="pause" viewBox="0 0 16 16" aria-hidden="true"><path d="M2 1h4v14H2zM10 1h4v14h-4z"/>
</svg>
</button>
<span id="time" aria-hidden="true"></span>
<input type="search" id="search" placeholder="Search" autocomplete="off" spellcheck="false"
 aria-label="Search the transcript" aria-keyshortcuts="/">
<span id="found" role="status"></span>
<button class="small" id="before" aria-label="The match before" hidden>\u2191</button>
<button class="small" id="after" aria-label="The next match" hidden>\u2193</button>
<span class="spread"></span>
<button id="speed" class="small" aria-label="Speed" disabled{hidden}>1\u00d7</button>
<button id="wider" class="small" aria-label="Show more of the call">\u2212</button>
<button id="closer" class="small" aria-label="Show less of the call, larger">+</button>
<button id="all" class="small" aria-label="Show the whole call">All</button>
<span id="note" role="status">{note}</span>
</div>
<audio id="recording" preload="auto"></audio>
</section>"""
KEYS = """<p class="muted keys"><kbd>space</kbd> plays, <kbd>\u2190</kbd> <kbd>\u2192</kbd> seek,
<kbd>shift</kbd> with them by turn, <kbd>+</kbd> <kbd>\u2212</kbd> zoom, <kbd>/</kbd> searches.
All times are UTC.</p>"""


def _player(call: Call, sound: Row | None, rate: int | None) -> str:
    if sound is None:
        note = "There is no recording of this call."
    elif rate is None:
        note = f"Too long to be inside this page: it is played from {RECORDING} beside it."
    elif call.sound and rate < call.sound.rate:
        note = f"In this page at {rate / 1000:g} kHz."
    else:
        note = ""
    length_ms = call.sound.length_ms if call.sound else call.duration_ms
    hidden = "" if sound else " hidden"
    return PLAYER.format(note=note, seconds=round(length_ms / 1000), hidden=hidden)


def _transcript(call: Call) -> str:
    speakers = {text_of(turn, "user_id") for turn in call.turns if turn["role"] == "user"}
    entries = [(start_ms(turn), _turn(call, turn, len(speakers) > 1)) for turn in call.turns]
    entries += [(number_of(tool, "at_ms") or 0.0, _tool(tool)) for tool in call.tools]
    entries += [
        (
            number_of(node, "at_ms") or 0.0,
            f'<li class="node">{text_span(text_of(node, "name"))}</li>',
        )
        for node in rows_of(call.record, "nodes")
    ]
    entries += [
        (at if at is not None else math.inf, _error(at, error)) for at, error in call.errors
    ]
    if call.duration_ms >= LONG_MS:
        times = range(TIME_LINE_MS, int(call.duration_ms), TIME_LINE_MS)
        entries += [(ms, f'<li class="node"><span>{clock(ms)}</span></li>') for ms in times]
    if not entries:
        return '<li class="muted">Nothing was said.</li>'
    return "\n".join(entry for _, entry in sorted(entries, key=lambda entry: entry[0]))


def _turn(call: Call, turn: Row, several_speakers: bool) -> str:
    role, start = turn["role"], start_ms(turn)
    side = "bot" if role == "assistant" else "caller"
    classes = ["turn", side]
    about = []
    if several_speakers and text_of(turn, "user_id"):
        about.append(f"<span>{text_span(text_of(turn, 'user_id'))}</span>")
    if via := VIA.get(text_of(turn, "via")):
        about.append(f"<span>{via}</span>")
    total = number_of(row_of(turn, "latency"), "total_ms")
    if total is not None and role == "assistant":
        about.append(
            f'<details class="waited"><summary>after {seconds(total)}</summary>'
            f"{_breakdown(call, turn, total)}</details>"
            if total > 0
            else "<span>before the caller had finished</span>"
        )
    cut = number_of(turn, "interrupted_ms")
    if cut is not None:
        classes.append("cut")
        about.append(f'<span class="wrong">interrupted at {clock(cut)}</span>')
    if turn.get("estimated_cut"):
        classes.append("estimated")
        about.append("<span>text estimated: the voice does not say when its words are heard</span>")
    if known := "".join(f"<dt>{h(name)}</dt><dd>{value}</dd>" for name, value in _known(turn)):
        about.append(
            f'<details class="known"><summary>details</summary><dl class="pairs">{known}</dl>'
            "</details>"
        )
    lang = f' lang="{language(turn)}"' if language(turn) else ""
    name = NAMES[role]
    return f"""<li class="{" ".join(classes)}">
<div class="said" data-ms="{start:.0f}"{lang}><p dir="auto">{h(text_of(turn, "text"))}</p></div>
<div class="about"><button data-ms="{start:.0f}" aria-label="{name}, play from {clock(start)}">\
<span class="who">{name}</span> {clock(start)}</button>{"".join(about)}</div>
</li>"""


VIA = {"keys": "pressed on the telephone", "text": "typed"}
TURN_ENDS = {"turn-model": "decided by the turn model", "timeout": "decided by time"}


def _known(turn: Row) -> Iterator[tuple[str, str]]:
    """(name, value) of what else is known of a turn."""
    index = number_of(turn, "index")
    if index is not None:
        yield "Turn", f"{index:.0f}"
    if cause := text_of(turn, "end_cause"):
        yield "Its end", h(TURN_ENDS.get(cause, cause))
    if (probability := number_of(turn, "end_probability")) is not None:
        yield "Turn model", f"{probability:.0%} sure of the end"
    if (ms := number_of(turn, "stt_ttfb_ms")) is not None:
        yield "Recogniser's first byte", seconds(ms)
    for name, label in (("language", "Language"), ("node", "Flow node"), ("user_id", "Speaker")):
        if value := text_of(turn, name):
            yield label, text_span(value)
    if words := rows_of(turn, "words"):
        yield "Words with a time", str(len(words))


def _breakdown(call: Call, turn: Row, total: float) -> str:
    """Where the time went, in words."""
    parts = [f"{LABELS[colour]} {seconds(ms)}" for colour, ms in call.parts(turn, total)]
    if saved := number_of(row_of(turn, "latency"), "llm_saved_ms"):
        parts.append(f"{seconds(saved)} saved: the LLM had begun in the pause")
    return ", ".join(parts)


def _tool(tool: Row) -> str:
    error, duration = text_of(tool, "error"), number_of(tool, "duration_ms")
    took = f", {seconds(duration)}" if duration is not None else ""
    status = ": ".join(filter(None, (text_of(tool, "status"), text_of(tool, "status_detail"))))
    look = "wrong" if error else "muted"
    result = text_of(tool, "result")
    parts = [("Arguments", pretty(text_of(tool, "arguments")))]
    parts += [("Update", pretty(text_of(update, "content"))) for update in rows_of(tool, "updates")]
    parts += [("Error", error)] if error else []
    parts += [("Result", pretty(result))] if result and result != error else []
    shown = "".join(f'<h3>{name}</h3><pre dir="auto">{h(content)}</pre>' for name, content in parts)
    failure = f'<span class="brief wrong" dir="auto">{h(shortened(error))}</span>' if error else ""
    return f"""<li class="aside tool"><details class="{"failed" if error else ""}">
<summary><code>{h(text_of(tool, "name"))}</code>\
<code class="muted">{h(brief(text_of(tool, "arguments")))}</code>
<span class="{look}">{h(status)}{took}</span>{failure}</summary>
{shown}
</details></li>"""


def _error(at: float | None, error: Row) -> str:
    names = (text_of(error, name) for name in ("processor", "category"))
    origin = ", ".join(h(name) for name in names if name)
    when = f'<button class="when" data-ms="{max(at, 0):.0f}">{clock(at)}</button> ' if at else ""
    return f"""<li class="aside"><div class="failed">{when}<strong class="wrong">Error</strong>
<span class="muted">{origin}</span><p dir="auto">{h(text_of(error, "message"))}</p></div></li>"""


def _responses_card(call: Call) -> str:
    if not call.responses:
        return ""
    waits = [(turn, total, call.parts(turn, total)) for turn, total in call.responses]
    # The script can put them in the order of the call again.
    waits.sort(key=lambda wait: -wait[1])
    longest = max(sum(ms for _, ms in parts) for *_, parts in waits)
    used = {colour for *_, parts in waits for colour, _ in parts}
    legend = "".join(
        f'<li title="{h(meaning)}"><i class="part-{colour}"></i>{label}</li>'
        for _, colour, label, meaning in PARTS
        if colour in used
    )
    bars = []
    for turn, total, parts in waits:
        pieces = "".join(
            f'<i class="part-{colour}" style="width: {ms / longest * 100:.2f}%"'
            f' title="{LABELS[colour]} {seconds(ms)}"></i>'
            for colour, ms in parts
        )
        at = start_ms(turn)
        bars.append(
            f'<li><button class="when" data-ms="{at:.0f}"'
            f' aria-label="Play the response at {clock(at)}">{clock(at)}</button>'
            f'<div class="bar" role="img" aria-label="{_breakdown(call, turn, total)}">'
            f"{pieces}</div>"
            f"<output>{seconds(total)}</output></li>"
        )
    order = ORDER if len(bars) > 1 else ""
    return f"""<section class="card"><h2>How long the caller waited</h2>{order}
<ul class="legend">{legend}</ul>
<ol class="bars" id="waits">{"".join(bars)}</ol>{_speculation(call)}</section>"""


def _speculation(call: Call) -> str:
    """What it saved, and cost, that answers were begun before the caller's turn had ended."""
    usage = row_of(call.record, "usage")
    requests, withdrawn = (
        int(number_of(usage, name) or 0) for name in ("llm_requests", "llm_requests_withdrawn")
    )
    if not call.saved and not withdrawn:
        return ""
    return (
        f'<p class="muted small-print">Answers begun in the caller\'s pause saved '
        f"{seconds(sum(call.saved))}, in {len(call.saved)} of {len(call.responses)} turns. "
        f"Requests to the LLM that were withdrawn: {withdrawn} of {requests}.</p>"
    )


ORDER = """<div class="order" role="group" aria-label="Order">
<button class="small" id="slowest-first" aria-pressed="true">Slowest first</button>
<button class="small" id="as-they-came" aria-pressed="false">As they came</button>
</div>"""
USAGE = {
    "prompt_tokens": "Tokens read",
    "cached_tokens": "of these cached",
    "completion_tokens": "Tokens written",
    "llm_requests": "LLM requests",
    "llm_requests_withdrawn": "of these withdrawn",
    "llm_requests_without_usage": "of unknown usage",
    "tts_characters": "Characters spoken",
    "stt_seconds": "Seconds heard",
}
SERVICES = {"stt": "Speech to text", "llm": "LLM", "tts": "Text to speech"}


def _usage_card(call: Call) -> str:
    usage = row_of(call.record, "usage")
    pairs = [
        (USAGE.get(name, name), f"{value:,.10g}")
        for name in [*USAGE, *sorted(usage.keys() - USAGE.keys())]
        if (value := number_of(usage, name)) is not None
    ]
    models = row_of(call.record, "models")
    for service in [*SERVICES, *sorted(models.keys() - SERVICES.keys())]:
        if isinstance(names := models.get(service), list):
            shown = ", ".join(map(str, names))
            pairs.append((SERVICES.get(service, service), text_span(shown)))
    return _pairs_card("Usage", pairs)


def _details_card(call: Call) -> str:
    phone = row_of(call.record, "phone")
    labels = {
        "from_number": "From",
        "to_number": "To",
        "call_id": "Carrier's call id",
        "stream_id": "Carrier's stream id",
        "call_domain": "Daily domain",
        "sip_call_id": "SIP call id",
    }
    pairs = [
        (label, text_span(text_of(phone, name)))
        for name, label in labels.items()
        if phone.get(name)
    ]
    pairs += [
        (f"SIP {name}", text_span(str(value)))
        for name, value in row_of(phone, "sip_headers").items()
    ]
    agent = row_of(call.record, "agent")
    pairs += [
        (label, text_span(value))
        for label, value in (
            ("Call id", text_of(call.record, "call_id")),
            ("Agent id", text_of(agent, "id")),
        )
        if value
    ]
    if call.sound:
        kilohertz = f"{call.sound.rate / 1000:g} kHz"
        sides = "stereo" if call.sound.sides > 1 else "mono"
        pairs.append(("Recording", f"{clock(call.sound.length_ms)}, {kilohertz}, {sides}"))
    pairs += _further(call.record)
    prompt = text_of(agent, "prompt")
    more = f'<details><summary>Prompt</summary><pre dir="auto">{h(prompt)}</pre></details>'
    return _pairs_card("Details", pairs, more if prompt else "")


# What the rest of the page shows, and what says nothing to a person.
SHOWN = {
    *("version", "call_id", "agent", "agent_spoke_first", "started_at", "ended_at", "duration_ms"),
    *("ending", "recording", "turns", "tools", "usage", "models", "phone", "errors", "nodes"),
}


def _further(record: Row) -> list[tuple[str, str]]:
    """(name, value) of what a record of a later version tells beyond that."""
    known = {name: value for name, value in record.items() if name not in SHOWN}
    return _values({name: value for name, value in known.items() if not isinstance(value, dict)})


def _further_cards(call: Call) -> str:
    """Further objects of the record, such as values that the bot has attached to the call."""
    cards = [
        _pairs_card(h(_label(name)), _values(value))
        for name, value in call.record.items()
        if name not in SHOWN and isinstance(value, dict)
    ]
    return "\n".join(cards)


def _values(record: Row, above: str = "") -> list[tuple[str, str]]:
    """(name, value) of everything in an object; what lies deeper has the names above in front."""
    pairs = []
    for name, value in record.items():
        label = _label(f"{above} {name}".strip())
        if isinstance(value, dict):
            pairs += _values(value, label)
        elif value not in (None, "", []):
            pairs.append((label, text_span(text_of(record, name))))
    return pairs


def _label(name: str) -> str:
    name = name.replace("_", " ")
    return name[:1].upper() + name[1:]


def _pairs_card(title: str, pairs: list[tuple[str, str]], more: str = "") -> str:
    if not pairs and not more:
        return ""
    shown = "".join(f"<dt>{h(name)}</dt><dd>{value}</dd>" for name, value in pairs)
    return f'<section class="card"><h2>{title}</h2><dl class="pairs">{shown}</dl>{more}</section>'
