"""Pages about calls: right, whole, safe with any text, and a player that works in a browser."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
import wave
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from roark import report
from roark.call import CallRecord
from roark.folder import Folder, Lock
from roark.report import index_page, sound

START = 1_795_269_909_000_000_000
RATE = 16000
# (who, text, first ms, last ms): the sound is a tone exactly there.
CONVERSATION = (
    ("assistant", "Hello, how can I help?", 500, 1500),
    ("user", "Is Dr. Alvarez in today?", 2000, 3000),
    ("assistant", "She is, until four.", 4000, 5000),
    ("user", "Thank you, goodbye.", 5500, 6500),
)
LENGTH_MS = 8000
HOSTILE = (
    "</script><script>window.harmed = true</script>",
    '"><img src=x onerror="window.harmed = true"> \' ` ${window.harmed = true} {{ x }}',
    "<!-- ]]> --!> <style>* { display: none }</style> &lt;b&gt; &amp;",
    "\u202eesrever \u2066 \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u202a",
    "\U0001f9b7\U0001f468\u200d\U0001f469\u200d\U0001f467 Z\u0351\u036b\u0343algo",
    "A" * 10_000,
)


def event(name: str, at_ms: float, /, **fields: Any) -> dict[str, Any]:
    return {"event": name, "at": START + int(at_ms * 1e6), **fields}


def events(conversation=CONVERSATION, *more: dict[str, Any]) -> list[dict[str, Any]]:
    """What an observer writes down of a call."""
    happened = [
        event("call", 0, call_id="call#1", agent_id="maple", agent_name="Maple Dental"),
        event("started", 0),
        event("anchor", 0, ms=0.0),
        event("chunk", LENGTH_MS, index=0, ms=LENGTH_MS, sample_rate=RATE, num_channels=2),
    ]
    for number, (role, text, start, end) in enumerate(conversation):
        if role == "user":
            happened += [
                event("vad", start + 100, edge="start", secs=0.1),
                event("vad", end + 100, edge="stop", secs=0.1),
                event("transcript", end + 200, text=text),
                event("user-turn", end + 300, edge="stop"),
                event("metric", end + 600, kind="ttfb", service="llm", model="m", value=0.3),
                event("metric", end + 700, kind="ttfb", service="tts", model="v", value=0.1),
            ]
        else:
            context = f"c{number}"
            happened += [
                event("say", start - 10, context=context, segment=1, text=text),
                event("voiced", start - 10, context=context, segment=1, seconds=1.0),
                event("voice-done", start - 10, context=context),
                event("bot", start, edge="start"),
                event("bot", end, edge="stop"),
            ]
    return sorted([*happened, *more], key=lambda one: one["at"])


ENDED = (
    event("ending", LENGTH_MS, reason="client-disconnected"),
    event("ended", LENGTH_MS),
)


def samples(conversation=CONVERSATION, rate: int = RATE) -> np.ndarray:
    """A recording: caller left, bot right, a tone while somebody speaks, else silence."""
    time = np.arange(LENGTH_MS * rate // 1000) / rate
    sides = np.zeros((len(time), 2))
    for role, _, start, end in conversation:
        spoken = (time >= start / 1000) & (time < end / 1000)
        sides[spoken, int(role == "assistant")] = 0.5 * np.sin(2 * np.pi * 440 * time[spoken])
    return np.round(sides * 32767).astype("<i2")


def write_recording(folder: Path, pcm: np.ndarray, rate: int = RATE) -> None:
    with wave.open(str(folder / "recording.wav"), "wb") as wav:
        wav.setnchannels(pcm.shape[1])
        wav.setsampwidth(2)
        wav.setframerate(rate)
        wav.writeframes(pcm.tobytes())


def write_record(folder: Path, happened: list[dict[str, Any]]) -> None:
    (folder / "call.json").write_text(json.dumps(CallRecord.replay(happened).as_dict()))


def write_journal(folder: Path, happened: list[dict[str, Any]]) -> None:
    (folder / "journal.jsonl").write_text("".join(json.dumps(one) + "\n" for one in happened))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a call, empty."""
    path = tmp_path / "calls" / "20261121T140509-call-1-9c41d07b"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def call(folder: Path) -> Path:
    """The folder of a finished call with its recording."""
    write_record(folder, events(CONVERSATION, *ENDED))
    write_recording(folder, samples())
    return folder


class Page(HTMLParser):
    """A page as a browser takes it apart: its text, its scripts, its tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._raw = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._raw = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._raw = ""

    def handle_data(self, data):
        if self._raw == "script":
            self.scripts[-1] += data
        elif not self._raw:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What an index shows of each call."""
        return self.data["calls"]

    def wave(self, side: int) -> np.ndarray:
        """The drawn peaks of a side, 0 to 255."""
        packed = base64.b64decode(self.data["waves"][side])
        return np.frombuffer(zlib.decompress(packed), np.uint8)

    @property
    def sound(self) -> np.ndarray:
        """The samples in the page, one column per side."""
        packed = zlib.decompress(base64.b64decode(self.scripts[1]))
        level = (np.frombuffer(packed, np.uint8).astype(float) - 128) / 127
        linear = np.sign(level) * (256 ** np.abs(level) - 1) / 255 * 32767
        return linear.reshape(self.data["sound"]["sides"], -1).T


def test_a_page_tells_who_said_what_when_and_how_the_call_ended(call: Path):
    page = Page(report.write_report(call))
    assert "Call with Maple Dental" in page.text
    assert "21 November 2026, 14:05 UTC" in page.text
    assert "client-disconnected The caller hung up or the connection was lost." in page.text
    for _, text, *_ in CONVERSATION:
        assert text in page.text
    places = [attrs["data-ms"] for tag, attrs in page.tags if attrs.get("class") == "said"]
    assert places == ["500", "2000", "4000", "5500"]


def test_the_picture_has_the_turns_and_the_sound_where_they_are(call: Path):
    page = Page(report.write_report(call))
    data = page.data
    assert [(turn["side"], turn["start_ms"], turn["end_ms"]) for turn in data["turns"]] == [
        (1, 500, 1500),
        (0, 2000, 3000),
        (1, 4000, 5000),
        (0, 5500, 6500),
    ]
    assert data["length_ms"] == LENGTH_MS
    for side, role in enumerate(("user", "assistant")):
        drawn = page.wave(side)
        at = np.arange(len(drawn)) * data["bucket_ms"]
        spoken = np.zeros(len(drawn), bool)
        for who, _, start, end in CONVERSATION:
            spoken |= (who == role) & (at >= start) & (at < end)
        assert (drawn[spoken] > 200).all()
        assert (drawn[~spoken] == 0).all()


def test_the_sound_in_the_page_is_the_recording(call: Path):
    page = Page(report.write_report(call))
    heard, recorded = page.sound, samples().astype(float)
    assert page.data["sound"] == {"rate": RATE, "sides": 2}
    assert heard.shape == recorded.shape
    assert (heard[recorded == 0] == 0).all()
    noise = np.mean((heard - recorded) ** 2) / np.mean(recorded**2)
    assert 10 * np.log10(noise) < -30


@pytest.mark.parametrize(
    ("budget", "embedded"),
    [
        (10**9, {"rate": 24000, "sides": 2}),
        (200_000, {"rate": 12000, "sides": 2}),
        (130_000, {"rate": 8000, "sides": 2}),
        (100_000, {"file": "recording.wav"}),
    ],
)
def test_a_longer_call_is_in_the_page_at_a_lower_rate_or_played_from_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, budget: int, embedded: dict[str, Any]
):
    monkeypatch.setattr(sound, "SOUND_BYTES", budget)
    write_record(folder, events(CONVERSATION, *ENDED))
    write_recording(folder, samples(rate=48000), 48000)
    page = Page(report.write_report(folder))
    assert page.data["sound"] == embedded
    if "rate" in embedded:
        assert len(page.sound) == LENGTH_MS * embedded["rate"] // 1000
    else:
        assert page.scripts[1] == ""
        assert "played from recording.wav beside it" in page.text


def test_the_parts_of_a_wait_are_disjoint_and_add_up(folder: Path):
    tools = (
        event("tool", 3650, id="t", name="look_up", arguments='{"who":"Alvarez"}'),
        event("tool-result", 3850, id="t", content="in"),
    )
    write_record(folder, events(CONVERSATION, *tools, *ENDED))
    page = Page(report.write_report(folder))
    [wait] = page.data["waits"]
    assert wait["from_ms"] == 3000
    assert dict(wait["parts"]) == pytest.approx(
        {"pause": 100, "stt": 100, "turn": 100, "llm": 300}
        | {"tools": 200, "tts": 100, "rest": 100}
    )
    labels = [attrs["aria-label"] for _, attrs in page.tags if attrs.get("class") == "bar"]
    assert labels == [
        "Pause 100 ms, End of turn 100 ms, Transcript 100 ms, LLM 300 ms, Tools 200 ms, "
        "Voice 100 ms, Rest 100 ms"
    ]


def test_what_speculation_saved_and_cost_is_said_beside_the_times(folder: Path):
    begun = (
        event("request", 2900, kind="speculation"),
        event("asked", 2901),
        event("withdrawn", 2950),
        event("request", 3105, kind="speculation"),
        event("asked", 3106),
        event("metric", 3250, kind="ttfb", service="llm", model="m", value=0.14),
    )
    asked = [one for one in events(CONVERSATION, *begun, *ENDED) if one.get("value") != 0.3]
    write_record(folder, asked)
    page = Page(report.write_report(folder))
    assert "140 ms saved: the LLM had begun in the pause" in page.text
    assert (
        "saved 140 ms, in 1 of 1 turns. Requests to the LLM that were withdrawn: 1 of 2."
        in page.text
    )
    assert "LLM requests 2 of these withdrawn 1 of unknown usage 2" in page.text
    [wait] = page.data["waits"]
    assert "llm" not in dict(wait["parts"])


def test_of_a_record_without_the_parts_of_its_times_the_whole_is_shown(call: Path):
    record = json.loads((call / "call.json").read_text())
    for turn in record["turns"]:
        if turn["latency"]:
            turn["latency"] = {"total_ms": turn["latency"]["total_ms"], "parts": ["?"]}
    (call / "call.json").write_text(json.dumps(record))
    [wait] = Page(report.write_report(call)).data["waits"]
    assert dict(wait["parts"]) == {"rest": 1000}


def test_tools_errors_nodes_interruptions_and_usage_are_there(folder: Path):
    more = (
        event("node", 100, name="booking"),
        event("tool", 3100, id="a", name="find", arguments='{"day":"today"}'),
        event("tool-result", 3400, id="a", content='{"free":["11:40"]}'),
        event("tool", 3500, id="b", name="book", arguments="not json"),
        event("tool-result", 3600, id="b", content="", error="HTTP 503"),
        event("interruption", 4500),
        event("error", 6000, processor="Voice", message="out of credits", category="quota"),
        event("metric", 6100, kind="prompt_tokens", service="llm", model="gpt", value=1234),
        event("phone", 0, from_number="+1 555 0142"),
    )
    write_record(folder, events(CONVERSATION, *more, *ENDED))
    page = Page(report.write_report(folder))
    for expected in (
        "booking",
        'find (day="today") completed, 300 ms',
        '{ "free": [ "11:40" ] }',
        "book (not json) failed, 100 ms HTTP 503",
        "Error Voice, quota out of credits",
        "interrupted at 0:04",
        "text estimated",
        "Tokens read 1,234",
        "gpt",
        "From +1 555 0142",
    ):
        assert expected in page.text
    assert [mark["bad"] for mark in page.data["marks"]] == [False, True, True]


def test_what_the_record_has_beyond_that_is_shown_under_its_own_name(call: Path):
    record = json.loads((call / "call.json").read_text())
    record["direction"] = "outbound"
    record["phone"] = {"from_number": "+1 555 0199", "to_number": "+1 555 0142"}
    record["my_values"] = {"ticket": "<b>T-17</b>", "vip": True, "score": 0.5, "seen": ["a", "b"]}
    record["metadata"] = {"version": "41", "outcome": {"status": "booked", "by": None}}
    (call / "call.json").write_text(json.dumps(record))
    page = Page(report.write_report(call))
    assert "Direction outbound" in page.text
    assert 'My values Ticket <b>T-17</b> Vip true Score 0.5 Seen ["a", "b"]' in page.text
    assert "Metadata Version 41 Outcome status booked" in page.text
    assert "21 November 2026, 14:05 UTC +1 555 0142" in page.text


def test_what_is_known_of_a_turn_besides_its_text_is_behind_its_details(folder: Path):
    more = (
        event("typed", 6800, text="DTMF: 12#", via="keys"),
        event("tool", 6900, id="a", name="find", arguments="{}"),
        event("phone", 0, call_id="CA1", sip_headers={"X-Customer": "<7>"}),
    )
    write_record(folder, events(CONVERSATION, *more, *ENDED))
    record = json.loads((folder / "call.json").read_text())
    asked = next(turn for turn in record["turns"] if turn["role"] == "user")
    asked |= {"end_cause": "turn-model", "end_probability": 0.93, "stt_ttfb_ms": 120.0}
    asked |= {"language": "en-US", "words": [{"text": "Hello", "at_ms": 1.0}]}
    (folder / "call.json").write_text(json.dumps(record))
    page = Page(report.write_report(folder))
    for expected in (
        "Its end decided by the turn model Turn model 93% sure of the end",
        "Recogniser's first byte 120 ms Language en-US Words with a time 1",
        "DTMF: 12# Caller 0:06 pressed on the telephone",
        "find () unfinished: the call ended first (client-disconnected)",
        "Carrier's call id CA1 SIP X-Customer <7>",
    ):
        assert expected in page.text, page.text


def test_hostile_text_stays_text_wherever_it_stands(folder: Path):
    turns = tuple(
        ("user", text, 1000 * number, 1000 * number + 500) for number, text in enumerate(HOSTILE)
    )
    more = [event("call", 0, call_id=HOSTILE[1], agent_id=HOSTILE[0], agent_prompt=HOSTILE[2])]
    for number, text in enumerate(HOSTILE):
        more += [
            event("tool", 100, id=str(number), name=text, arguments=json.dumps({text: text})),
            event("tool-result", 200, id=str(number), content=text, error=text),
            event("error", 300, processor=text, message=text, category=text),
            event("node", 400 + number, name=text),
            event("phone", 500, from_number=text),
            event("metric", 600, kind=text, service=text, model=text, value=1),
        ]
    more += [event("ending", 7000, reason=HOSTILE[0], detail=HOSTILE[1]), event("ended", 7000)]
    write_record(folder, events(turns, *more))
    page = Page(report.write_report(folder))
    assert len(page.scripts) == 3
    assert not [tag for tag, _ in page.tags if tag in ("img", "b")]
    assert [tag for tag, _ in page.tags].count("style") == 1
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    for text in HOSTILE:
        assert page.texts.count(text) >= 5
    index = Page(report.write_index(folder.parent).index)
    assert len(index.scripts) == 2
    [row] = index.rows
    assert row["ending"] == HOSTILE[0] and all(text in row["words"] for text in HOSTILE)


def test_characters_that_no_page_can_hold_are_left_out(folder: Path):
    write_record(folder, events((("user", "a\x00b\x1b\ud800c", 100, 900),), *ENDED))
    assert "ab?c" in Page(report.write_report(folder)).text


def test_a_call_without_a_recording_has_all_the_rest(folder: Path):
    write_record(folder, events(CONVERSATION, *ENDED))
    page = Page(report.write_report(folder))
    assert "There is no recording of this call." in page.text
    assert page.data["sound"] is None
    assert len(page.data["turns"]) == 4


def test_a_call_whose_process_died_is_told_from_its_journal_and_its_chunks(folder: Path):
    write_journal(folder, events(CONVERSATION[:3]))
    with open(folder / "journal.jsonl", "a") as journal:
        journal.write('{"event":"trans')
    first, second = np.array_split(samples(), 2)
    (folder / "chunk-00000.pcm").write_bytes(first.tobytes())
    (folder / "chunk-00001.pcm").write_bytes(second.tobytes()[:-1])
    page = Page(report.write_report(folder))
    assert "process-died" in page.text
    assert "This call is not closed yet" in page.text
    assert "She is, until four." in page.text
    assert len(page.sound) == len(samples()) - 1


def test_a_call_that_goes_on_is_not_called_dead(folder: Path):
    write_journal(folder, events(CONVERSATION[:3]))
    lock = Lock(folder)
    assert lock.acquire()
    try:
        text = Page(report.write_report(folder)).text
    finally:
        lock.release()
    assert "This call is still going on" in text
    assert "process-died" not in text


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("call.json", b"", "This call is not closed yet"),
        ("call.json", b'{"turns": [{"ro', "This call is not closed yet"),
        ("call.json", b"[1, 2]", "This call is not closed yet"),
        ("call.json", b"{}", "Nothing was said."),
        ("call.json", b'{"turns": 3, "tools": [1], "ending": "x", "usage": []}', "Nothing was"),
        ("call.json", b'{"turns": [{"role": "user", "start_ms": NaN}]}', "Nothing was said."),
        ("call.json", b'{"started_at": "soon", "duration_ms": "long"}', "Nothing was said."),
        ("recording.wav", b"", "The recording cannot be read"),
        ("recording.wav", b"RIFF\x00\x00\x00\x00WAVEfmt ", "The recording cannot be read"),
        ("journal.jsonl", b'\x00\xff\n{"event":"call"}\n7\n', "Maple Dental"),
    ],
)
def test_a_damaged_file_costs_a_sentence_and_not_the_page(
    call: Path, name: str, content: bytes, sentence: str
):
    (call / name).write_bytes(content)
    assert sentence in Page(report.write_report(call)).text


def test_a_recording_cut_in_the_middle_is_played_as_far_as_it_goes(call: Path):
    whole = (call / "recording.wav").read_bytes()
    (call / "recording.wav").write_bytes(whole[: len(whole) // 2 + 1])
    assert Page(report.write_report(call)).data["length_ms"] == pytest.approx(LENGTH_MS / 2, abs=1)


def test_the_index_lists_newest_first_with_what_roark_has(tmp_path: Path):
    states: dict[str, str] = {}
    all_states = ("kept here", "delivered", "undelivered", "1 given up", "undelivered")
    for day, state in enumerate(all_states, 11):
        path = tmp_path / f"202611{day}T140509-call-{day}-00000000"
        is_for_roark = state != "kept here" and day < 15
        kept = Folder(
            path,
            call_id=f"call-{day}",
            destination="https://api.roark.ai" if is_for_roark else None,
            posts={"webhook": "https://my.example/#0"} if day == 15 else None,
        )
        record = CallRecord.replay(events(CONVERSATION, *ENDED))
        kept.keep_started(json.dumps(record.call_started()).encode())
        kept.keep_ended(
            json.dumps(record.call_ended()).encode(), json.dumps(record.as_dict()).encode()
        )
        if state == "delivered":
            kept.note_delivered("call-started")
            kept.note_delivered("call-ended")
        if state == "1 given up":
            kept.note_delivered("call-started")
            kept.note_given_up("call-ended", "400")
        kept.release()
        states[path.name] = state
    (tmp_path / "notes").mkdir()
    rows = Page(report.write_index(tmp_path).index).rows
    assert [row["folder"] for row in rows] == sorted(states, reverse=True)
    assert all((tmp_path / row["folder"] / "report.html").exists() for row in rows)
    assert {row["folder"]: row["roark"] for row in rows} == states


def test_what_has_not_changed_is_neither_read_nor_written_again(
    call: Path, monkeypatch: pytest.MonkeyPatch
):
    later = call.with_name("20261122T140509-call-2-00000000")
    shutil.copytree(call, later)
    report.write_index(call.parent)
    written = {path: path.read_bytes() for path in call.parent.rglob("*.html")}
    assert len(written) == 3
    read: list[str] = []
    real = index_page.Call.read.__func__

    def read_call(cls: Any, folder: Path, **options: Any) -> Any:
        read.append(folder.name)
        return real(cls, folder, **options)

    monkeypatch.setattr(index_page.Call, "read", classmethod(read_call))
    for page in (call / "report.html", later / "report.html"):
        page.write_text("as it was")
    report.write_index(call.parent)
    assert read == []
    assert (call.parent / "index.html").read_bytes() == written[call.parent / "index.html"]
    # What Roark has of it is in the index, not on the page.
    Folder(call, call_id="call#1", destination="https://api.roark.ai").create()
    rows = Page(report.write_index(call.parent).index).rows
    assert [row["roark"] for row in rows] == ["", "undelivered"]
    assert read == [call.name]
    assert (call / "report.html").read_text() == "as it was"
    after = (call / "report.html").stat().st_mtime + 10
    os.utime(call / "call.json", (after, after))
    report.write_index(call.parent)
    assert "Maple Dental" in (call / "report.html").read_text()
    assert (later / "report.html").read_text() == "as it was"


def test_a_call_with_nothing_left_is_not_looked_into_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    record = CallRecord.replay(events(CONVERSATION, *ENDED))
    kept = Folder(folder, call_id="call#1")
    kept.keep_started(json.dumps(record.call_started()).encode())
    kept.keep_ended(json.dumps(record.call_ended()).encode(), json.dumps(record.as_dict()).encode())
    kept.release()
    index = report.write_index(folder.parent).index
    looked: list[Path] = []
    real = report.files_of

    def files_of(path: Path) -> report.Files:
        looked.append(path)
        return real(path)

    monkeypatch.setattr(report, "files_of", files_of)
    before = index.read_bytes()
    report.write_index(folder.parent)
    assert folder not in looked
    assert index.read_bytes() == before
    # A file that comes to it is seen.
    (folder / "chunk-00000.pcm").write_bytes(bytes(64))
    report.write_index(folder.parent)
    assert folder in looked


def test_what_was_said_is_in_the_index_of_the_newest_calls_as_far_as_it_fits(
    call: Path, monkeypatch: pytest.MonkeyPatch
):
    for day in (22, 23):
        shutil.copytree(call, call.with_name(f"202611{day}T140509-call-2-00000000"))
    size = len(Page(report.write_index(call.parent).index).rows[0]["words"])
    monkeypatch.setattr(index_page, "WORDS_CHARACTERS", 2 * size)
    for _ in range(2):
        index = Page(report.write_index(call.parent).index)
        assert [bool(row["words"]) for row in index.rows] == [True, True, False]
        assert index.data["searched"] == 2


def test_an_index_made_by_other_code_is_not_trusted(call: Path, monkeypatch: pytest.MonkeyPatch):
    index = report.write_index(call.parent).index
    index.write_text(index.read_text().replace("Maple Dental", "Maple Rental"))
    assert "Maple Rental" in report.write_index(call.parent).index.read_text()
    monkeypatch.setattr(index_page, "_code", lambda: "newer")
    assert "Maple Rental" not in report.write_index(call.parent).index.read_text()


def test_a_watched_directory_is_looked_at_again_until_ctrl_c(call: Path, capsys):
    def sleep(seconds: float) -> None:
        later = call.with_name("20261122T140509-call-2-00000000")
        if later.exists():
            raise KeyboardInterrupt
        shutil.copytree(call, later)

    assert report.main(call.parent, None, watch=True, sleep=sleep) == 0
    index = Page(call.parent / "index.html")
    assert len(index.rows) == 2
    assert index.data["watched"] is True


def test_the_page_of_a_call_that_goes_on_is_watched_once_a_minute(folder: Path):
    write_journal(folder, events(CONVERSATION[:3]))
    report.write_index(folder.parent, watched=True)
    page = folder / "report.html"
    page.write_text("as it was")
    report.write_index(folder.parent, watched=True)
    assert page.read_text() == "as it was"
    before = page.stat().st_mtime - 61
    os.utime(page, (before, before))
    report.write_index(folder.parent, watched=True)
    assert "Maple Dental" in page.read_text()
    page.write_text("as it was")
    report.write_index(folder.parent)
    assert "Maple Dental" in page.read_text()


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    "files",
    [
        {"journal.jsonl": DEEP},
        {"call.json": b"{}", "delivery.jsonl": DEEP},
        {"call.json": DEEP, "journal.jsonl": b'{"event": "anchor", "at": "soon"}\n' + DEEP},
        {"call.json": b'{"started_at": "0001-01-01T00:00:00+14:00"}'},
    ],
)
def test_a_folder_that_cannot_be_read_is_named_and_stops_no_other(
    call: Path, capsys, files: dict[str, bytes]
):
    bad = call.with_name("20261122T000000-bad-00000000")
    bad.mkdir()
    for name, content in files.items():
        (bad / name).write_bytes(content)
    shutil.copytree(call, call.with_name("20261123T000000-good-00000000"))
    assert report.main(call.parent, None) == 1
    said = capsys.readouterr()
    assert said.out.strip().endswith("index.html")
    [line] = said.err.splitlines()
    assert line.startswith(f"{bad.name}: cannot be read, passed over: ")
    index = Page(call.parent / "index.html")
    shown = [row["folder"] for row in index.rows if row["folder"] != bad.name]
    assert shown == ["20261123T000000-good-00000000", call.name]
    assert f"{bad.name} cannot be read" in index.text
    assert "Maple Dental" in Page(call / "report.html").text


def test_pages_are_for_their_owner_alone_whatever_the_umask(call: Path):
    umask = os.umask(0)
    try:
        report.write_index(call.parent)
        (call / "report.html").chmod(0o644)
        report.write_report(call)
    finally:
        os.umask(umask)
    pages = list(call.parent.rglob("*.html"))
    assert [page.stat().st_mode & 0o777 for page in pages] == [0o600, 0o600]


def test_all_times_are_utc(call: Path):
    record = json.loads((call / "call.json").read_text())
    record["started_at"] = "2026-11-22T01:05:09+11:00"
    (call / "call.json").write_text(json.dumps(record))
    assert "21 November 2026, 14:05 UTC" in Page(report.write_report(call)).text


def test_a_recording_of_any_length_and_rate_is_drawn_to_its_last_sample(tmp_path: Path):
    path = tmp_path / "recording.wav"
    whole = [frames for frames in range(10, 4000, 131)]
    for rate in (8000, 11025, 16000, 22050, 24000, 44100, 48000):
        for frames in [1, 259_040, *whole, *(n * rate // 100 for n in range(1, 60))]:
            pcm = np.zeros((frames, 2), "<i2")
            pcm[-1] = -32768
            write_recording(tmp_path, pcm, rate)
            recording = sound.Sound.of_wav(path)
            assert recording
            bucket_ms, packed = sound.waves(recording)
            for side in packed:
                drawn = np.frombuffer(zlib.decompress(base64.b64decode(side)), np.uint8)
                assert drawn[-1] == 255 and not drawn[:-1].any()
                assert (len(drawn) - 1) * bucket_ms < recording.length_ms
                assert len(drawn) * bucket_ms >= recording.length_ms - 1e-6


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells memory as Linux does")
def test_two_hours_of_call_take_little_memory_and_are_drawn_as_finely_as_a_short_one(call: Path):
    with wave.open(str(call / "recording.wav"), "wb") as wav:
        wav.setnchannels(2)
        wav.setsampwidth(2)
        wav.setframerate(16000)
        minute = np.random.default_rng(0).integers(-9000, 9000, (60 * 16000, 2), "<i2").tobytes()
        for _ in range(10):
            wav.writeframes(minute)
    # The rest is silence, which a disk need not store.
    os.truncate(call / "recording.wav", 44 + 120 * len(minute))
    code = (
        "import sys; from pathlib import Path; from roark.report import write_report;"
        "write_report(Path(sys.argv[1])); print(Path('/proc/self/status').read_text())"
    )
    root = Path(report.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(call)], cwd=root, capture_output=True, check=True
    )
    # The peak; ru_maxrss would begin with that of the process that runs the tests.
    peak = re.search(rb"VmHWM:\s+(\d+) kB", done.stdout)
    assert peak and int(peak.group(1)) / 1024 <= 150  # MB
    page = call / "report.html"
    assert page.stat().st_size < 8_000_000
    drawn = Page(page)
    assert drawn.data["length_ms"] == 120 * 60_000
    assert drawn.data["bucket_ms"] == 10
    assert len(drawn.wave(0)) == 720_000


def test_the_command_writes_a_page_by_part_of_its_name(call: Path, capsys):
    assert report.main(call.parent, "9c41") == 0
    assert capsys.readouterr().out.strip() == (call / "report.html").as_uri()
    assert report.main(call.parent, None) == 0
    assert capsys.readouterr().out.strip() == (call.parent / "index.html").as_uri()


@pytest.mark.parametrize(
    ("directory", "wanted", "sentence"),
    [
        ("calls", "nobody", "There is no call 'nobody' in"),
        ("calls", "2026", "'2026' is a part of 2 calls' names"),
        ("nowhere", None, "is not a directory"),
        ("nowhere", "2026", "There is no call '2026' in"),
    ],
)
def test_the_command_says_what_it_cannot_find_in_one_sentence(
    call: Path, capsys, directory: str, wanted: str | None, sentence: str
):
    shutil.copytree(call, call.with_name("20261122T140509-call-2-00000000"))
    assert report.main(call.parent.with_name(directory), wanted) == 1
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.splitlines()) == 1


# In a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMIUM_ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (uv pip install playwright)"
    )
    if not CHROMIUM:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


class Tab:
    """A page open in the browser; `complaints` and `requests` must stay as they should."""

    def __init__(self, browser: Any, path: Path, **context: Any) -> None:
        options = {"viewport": {"width": 1200, "height": 900}} | context
        self.page = browser.new_context(**options).new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def ready(self) -> "Tab":
        """Once there is something to play."""
        return self.until("!document.getElementById('play').disabled")

    def until(self, condition: str) -> "Tab":
        """Once a condition holds after the next picture.

        Playwright's own wait is refused by the page's policy.
        """
        self.page.evaluate(
            """condition => new Promise((done, fail) => {
              setTimeout(() => fail(new Error("not in 30 s: " + condition)), 30000);
              const look = () => CONDITION ? done() : requestAnimationFrame(look);
              requestAnimationFrame(look);
            })""".replace("CONDITION", condition),
            condition,
        )
        return self

    def now(self) -> float:
        return self.page.evaluate("document.getElementById('recording').currentTime")

    def cursor(self) -> float:
        box = self.page.locator("#cursor").bounding_box()
        line = self.page.locator("#timeline").bounding_box()
        return (box["x"] + box["width"] / 2 - line["x"]) / line["width"] * LENGTH_MS / 1000

    def ink(self, seconds: float, side: int) -> int:
        """How much of the speaker's colour there is at a moment in a lane, in pixels."""
        return self.page.evaluate(
            """([at, side]) => {
              const canvas = document.querySelector("#timeline canvas");
              const probe = document.createElement("canvas").getContext("2d");
              probe.fillStyle = getComputedStyle(document.documentElement)
                .getPropertyValue(side ? "--bot" : "--caller");
              probe.fillRect(0, 0, 1, 1);
              const [r, g, b] = probe.getImageData(0, 0, 1, 1).data;
              const [x, half] = [Math.round(at * canvas.width), Math.round(canvas.height * 0.44)];
              const lane = canvas.getContext("2d")
                .getImageData(x - 6, side ? half : 0, 12, half).data;
              let count = 0;
              for (let i = 0; i < lane.length; i += 4) {
                const off = Math.hypot(lane[i] - r, lane[i + 1] - g, lane[i + 2] - b);
                if (off < 12) count++;
              }
              return count;
            }""",
            [seconds * 1000 / LENGTH_MS, side],
        )


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Tab]]:
    """Opens a file in the browser; closed after the test."""
    tabs: list[Tab] = []

    def open_page(path: Path, **context: Any) -> Tab:
        tabs.append(Tab(browser, path, **context))
        return tabs[-1]

    yield open_page
    for tab in tabs:
        tab.page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_waveform_is_drawn_where_somebody_speaks(open_page, call: Path, scheme):
    tab = open_page(report.write_report(call), color_scheme=scheme).ready()
    assert tab.complaints == []
    for role, _, start, end in CONVERSATION:
        side = int(role == "assistant")
        middle = (start + end) / 2000
        assert tab.ink(middle, side) > 200
        assert tab.ink(middle, 1 - side) == 0
    assert tab.ink(7.5, 0) == tab.ink(7.5, 1) == 0


def test_a_click_on_a_turn_plays_from_there_and_the_cursor_moves(open_page, call: Path):
    tab = open_page(report.write_report(call)).ready()
    clicked_at = time.monotonic()
    tab.page.get_by_text("Is Dr. Alvarez in today?").click()
    assert 1.7 < tab.now() < 2.3 + time.monotonic() - clicked_at
    tab.until("document.querySelector('.turn.now')?.innerText.startsWith('Is Dr. Alvarez')")
    tab.until("document.getElementById('recording').currentTime > 2.5")
    tab.page.keyboard.press("Space")
    assert tab.page.evaluate("document.getElementById('recording').paused")
    assert tab.now() > 2.5
    # The line is drawn with the next picture.
    tab.until("true")
    assert tab.cursor() == pytest.approx(tab.now(), abs=0.1)
    assert tab.complaints == []


def test_the_keyboard_plays_pauses_and_seeks(open_page, call: Path):
    tab = open_page(report.write_report(call)).ready()
    tab.page.keyboard.press("ArrowRight")
    assert tab.now() == pytest.approx(5.0)
    tab.page.keyboard.press("ArrowLeft")
    assert tab.now() == pytest.approx(0.0)
    tab.page.keyboard.press("Shift+ArrowRight")
    tab.page.keyboard.press("Shift+ArrowRight")
    assert tab.now() == pytest.approx(2.0)
    assert tab.cursor() == pytest.approx(2.0, abs=0.05)
    tab.page.keyboard.press("Space")
    tab.until("document.getElementById('recording').currentTime > 2.2")
    tab.page.keyboard.press("Space")
    assert tab.page.evaluate("document.getElementById('recording').paused")
    tab.page.get_by_role("slider", name="Position in the call").focus()
    tab.page.keyboard.press("End")
    assert tab.page.get_by_role("slider").get_attribute("aria-valuetext") == "0:08 of 0:08"


def test_a_click_on_the_timeline_seeks_also_when_it_shows_a_part(open_page, call: Path):
    tab = open_page(report.write_report(call)).ready()
    box = tab.page.locator("#timeline").bounding_box()
    tab.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 20)
    assert tab.now() == pytest.approx(4.0, abs=0.05)
    tab.page.get_by_role("button", name="Show less of the call, larger").click()
    tab.page.mouse.click(box["x"] + box["width"] / 4, box["y"] + 20)
    assert tab.now() == pytest.approx(3.0, abs=0.05)
    assert tab.page.evaluate("document.getElementById('recording').paused")


def test_a_page_asks_nobody_for_anything(open_page, call: Path):
    tab = open_page(report.write_report(call)).ready()
    index = open_page(report.write_index(call.parent).index)
    asked = [url for url in tab.requests + index.requests if not url.startswith("blob:")]
    assert asked == [(call / "report.html").as_uri(), (call.parent / "index.html").as_uri()]
    assert tab.complaints == index.complaints == []


def test_a_page_that_was_mailed_without_its_folder_still_plays(open_page, call: Path, tmp_path):
    mailed = shutil.copy(report.write_report(call), tmp_path / "mailed.html")
    tab = open_page(Path(mailed)).ready()
    tab.page.get_by_role("button", name="Play", exact=True).click()
    tab.until("document.getElementById('recording').currentTime > 0.1")


def test_a_long_call_plays_from_the_recording_beside_its_page(
    open_page, call: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sound, "SOUND_BYTES", 0)
    page = report.write_report(call)
    tab = open_page(page).ready()
    tab.page.get_by_text("She is, until four.").click()
    tab.until("document.getElementById('recording').currentTime > 4.1")
    assert tab.requests[1:] == [(call / "recording.wav").as_uri()]
    alone = open_page(Path(shutil.copy(page, tmp_path / "alone.html")))
    alone.page.get_by_text("recording.wav is not beside this page").wait_for()
    assert alone.page.get_by_role("button", name="Play", exact=True).is_disabled()


@pytest.mark.slow
def test_hostile_text_is_shown_and_never_run_nor_wider_than_a_phone(open_page, folder: Path):
    turns = tuple(
        ("user", text, 1000 * number, 1000 * number + 500) for number, text in enumerate(HOSTILE)
    )
    more = [event("error", 100, processor=text, message=text) for text in HOSTILE]
    more += [
        event("tool", 100, id=text, name=text, arguments=json.dumps({text: text}))
        for text in HOSTILE
    ]
    write_record(folder, events(turns, *more, *ENDED))
    phone = {"width": 390, "height": 844}
    for path in (report.write_report(folder), report.write_index(folder.parent).index):
        tab = open_page(path, viewport=phone)
        assert tab.page.evaluate("window.harmed") is None
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= phone["width"]
        assert tab.complaints == []
        if path.name == "report.html":
            said = tab.page.locator(".said p").all_text_contents()
            assert said == [turn[1].strip() for turn in turns]


def test_a_script_that_got_into_a_page_would_not_run(open_page, call: Path):
    page = report.write_report(call)
    text = page.read_text().replace("</main>", "<script>window.harmed = true</script></main>")
    page.write_text(text.replace("<main>", '<main><img src="x" onerror="window.harmed = true">'))
    tab = open_page(page).ready()
    assert tab.page.evaluate("window.harmed") is None
    assert any("Content Security Policy" in complaint for complaint in tab.complaints)


def test_everything_to_press_has_a_name(open_page, call: Path):
    tab = open_page(report.write_report(call)).ready()
    nameless = tab.page.evaluate(
        """[...document.querySelectorAll("button, a, summary, [role]")].filter((element) =>
             !(element.getAttribute("aria-label") || element.textContent).trim() &&
             element.getAttribute("role") !== "status").map((element) => element.outerHTML)"""
    )
    assert nameless == []


def test_without_a_recording_a_click_on_a_turn_moves_the_cursor(open_page, folder: Path):
    write_record(folder, events(CONVERSATION, *ENDED))
    tab = open_page(report.write_report(folder))
    tab.page.get_by_text("She is, until four.").click()
    length = CallRecord.replay(events(CONVERSATION, *ENDED)).as_dict()["duration_ms"]
    assert tab.cursor() * length / LENGTH_MS == pytest.approx(4.0, abs=0.05)
    assert tab.page.locator(".turn.now").count() == 1
    assert not tab.page.get_by_role("button", name="Play", exact=True).is_visible()
    assert tab.complaints == []


# The index in a browser


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """The index of 250 calls of four days, every fifth failed, every tenth slow."""
    rows = []
    for number in range(250):
        failed = number % 5 == 0
        rows.append(
            {
                "folder": f"call-{number:03}",
                "started": (START // 10**6) - number * 20 * 60_000,
                "agent": "Maple Dental",
                "number": f"+1 555 {number:04} 000",
                "id": f"id#{number}",
                "length_ms": 60_000 + number,
                "turns": 5,
                "waits": [800, 4000 if number % 10 == 1 else 900],
                "cuts": 0,
                "tools": 1,
                "failed": int(number % 25 == 0),
                "errors": int(failed),
                "ending": "error" if failed else "agent-ended",
                "sentence": "",
                "roark": "delivered",
                "strip": [[0, 10], [12, 20]],
                "words": f"Hello \u2013 I am <b>caller</b> {number} of Lombard Street",
                "stamp": "",
            }
        )
    path = tmp_path / "index.html"
    path.write_text(index_page.render(rows, [], watched=False), encoding="utf-8")
    return path


def shown(tab: Tab) -> list[str | None]:
    links = tab.page.locator("td a")
    return [link.get_attribute("href").split("/")[0] for link in links.all()]


def total(tab: Tab, name: str) -> str:
    term = tab.page.locator("dt").get_by_text(name, exact=True)
    return term.locator("xpath=../dd").inner_text().strip()


def test_the_index_shows_days_totals_and_a_hundred_calls_at_a_time(open_page, index: Path):
    tab = open_page(index)
    assert tab.complaints == []
    assert shown(tab) == [f"call-{number:03}" for number in range(100)]
    assert total(tab, "Calls") == "250"
    assert total(tab, "Error rate") == "20 % 50 calls"
    assert total(tab, "Median response") == "850 ms"
    assert total(tab, "p95 response") == "1.05 s"
    days = tab.page.locator(".day th").all_inner_texts()
    assert days[0].startswith("Saturday, 21 November 2026")
    assert "43 calls \u00b7 21 % errors" in days[0]
    tab.page.get_by_role("button", name="Next").click()
    tab.page.get_by_role("button", name="Next").click()
    assert shown(tab) == [f"call-{number:03}" for number in range(200, 250)]
    assert tab.page.locator("#range").inner_text() == "201\u2013250 of 250"
    tab.page.reload()
    assert len(shown(tab)) == 50


def test_the_index_is_searched_filtered_and_sorted(open_page, index: Path):
    tab = open_page(index)
    tab.page.keyboard.press("/")
    tab.page.keyboard.type("lombard <b> 5550017")
    tab.page.keyboard.press("Enter")
    assert shown(tab) == ["call-017"]
    assert tab.page.locator("mark").inner_text() == "lombard".title()
    assert tab.page.evaluate("document.activeElement.getAttribute('href')").startswith("call-017")
    tab.page.get_by_role("button", name="Clear").click()
    tab.page.locator("#ending").select_option("error")
    assert total(tab, "Calls") == "50 of 250"
    tab.page.get_by_label("Tool failed").check()
    assert shown(tab) == [f"call-{number:03}" for number in range(0, 250, 25)]
    tab.page.reload()
    assert len(shown(tab)) == 10
    tab.page.get_by_role("button", name="Clear").click()
    tab.page.locator("#slow").select_option("3000")
    assert shown(tab) == [f"call-{number:03}" for number in range(1, 250, 10)]
    tab.page.get_by_role("button", name="Length").click()
    assert shown(tab)[0] == "call-241"
    assert tab.page.locator("th[aria-sort=descending]").inner_text().startswith("Length")
    assert tab.page.locator(".day").count() == 0
    tab.page.get_by_role("button", name="Length").click()
    assert shown(tab)[0] == "call-001"
    assert tab.complaints == []


def test_the_keys_go_from_call_to_call(open_page, index: Path):
    tab = open_page(index)
    for _ in range(3):
        tab.page.keyboard.press("j")
    tab.page.keyboard.press("k")
    assert tab.page.evaluate("document.activeElement.getAttribute('href')").startswith("call-001")


def test_a_call_is_opened_from_the_index_and_leads_back_to_it(open_page, call: Path):
    tab = open_page(report.write_index(call.parent).index)
    tab.page.keyboard.press("/")
    tab.page.keyboard.type("alvarez")
    tab.page.keyboard.press("Enter")
    # The whole row is the link.
    tab.page.locator("td.duration").click(force=True)
    assert tab.page.url == (call / "report.html").as_uri()
    tab.page.get_by_role("link", name="All calls").click()
    assert tab.page.url == f"{(call.parent / 'index.html').as_uri()}#search=alvarez"
    assert tab.page.locator("mark").inner_text() == "Alvarez"


def test_the_transcript_is_searched_copied_and_downloaded(open_page, call: Path):
    tab = open_page(report.write_report(call), permissions=["clipboard-read", "clipboard-write"])
    tab.page.keyboard.press("/")
    tab.page.keyboard.type("an")
    assert tab.page.locator("#found").inner_text() == "1 of 2"
    tab.page.keyboard.press("Enter")
    assert tab.page.locator(".match p").inner_text() == "Thank you, goodbye."
    tab.page.keyboard.press("Escape")
    assert tab.page.locator(".match").count() == 0
    with tab.page.expect_download() as waiting:
        tab.page.get_by_text("Download").click()
    assert waiting.value.suggested_filename == f"{call.name}.txt"
    text = Path(waiting.value.path()).read_text(encoding="utf-8")
    assert text.startswith("Call with Maple Dental\n21 November 2026, 14:05 UTC\n")
    for who, said, start, _ in CONVERSATION:
        name = "Bot" if who == "assistant" else "Caller"
        assert f"{name} 0:0{start // 1000}\n    {said}\n" in text
    tab.page.get_by_role("button", name="Copy").click()
    tab.page.get_by_role("button", name="Copied").wait_for()
    assert tab.page.evaluate("navigator.clipboard.readText()") == text
    assert tab.complaints == []


def test_waits_stand_slowest_first_or_as_they_came(open_page, folder: Path):
    conversation = (
        ("user", "One.", 1000, 1500),
        ("assistant", "First.", 2500, 3000),
        ("user", "Two.", 3500, 4000),
        ("assistant", "Second.", 6500, 7000),
    )
    write_record(folder, events(conversation, *ENDED))
    tab = open_page(report.write_report(folder), viewport={"width": 390, "height": 500})
    # On a phone they stand behind the transcript: far, where a call was long.
    tab.page.get_by_role("link", name="Waits and details").click()
    tab.until("document.querySelector('#beside').getBoundingClientRect().top < innerHeight / 2")
    waits = tab.page.locator("#waits output")
    assert waits.all_inner_texts() == ["2.50 s", "1.00 s"]
    tab.page.get_by_role("button", name="As they came").click()
    assert waits.all_inner_texts() == ["1.00 s", "2.50 s"]
    tab.page.get_by_text("after 2.50 s").click()
    assert "LLM 300 ms" in tab.page.locator(".waited[open]").inner_text()


def test_tools_that_would_cover_each_other_are_one_mark_until_the_view_is_near(
    open_page, folder: Path
):
    tools = [event("tool", 3000 + 20 * n, id=str(n), name="look_up") for n in range(12)]
    write_record(folder, events(CONVERSATION, *tools, *ENDED))
    write_recording(folder, samples())
    tab = open_page(report.write_report(folder)).ready()
    box = tab.page.locator("#timeline").bounding_box()
    # Between the lanes: 20 px of axis below, the strip in the middle of the rest.
    at = {"x": box["x"] + box["width"] * 3.1 / 8, "y": box["y"] + (box["height"] - 20) / 2}
    tab.page.mouse.move(**at)
    assert tab.page.locator("#tip").inner_text().endswith("12 \u00d7 look_up")
