"""python -m roark: what is kept of calls, and getting the rest of it to Roark.

    python -m roark calls            every call in CALLS_DIR and what of it Roark does not have
    python -m roark deliver          deliver that now; exit 1 if anything is left, 2 without a key
    python -m roark report [CALL]    a page about a call (default: all of them, and their index);
                                     --watch keeps them up to date until Ctrl-C

Settings come from the environment or .env: CALLS_DIR, ROARK_API_KEY, ROARK_BASE_URL.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from dotenv import find_dotenv, load_dotenv
from loguru import logger

from roark.client import RoarkClient
from roark.folder import Folder, call_folders, make_private, reason_of
from roark.outbox import Flushed, Outbox, setting


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m roark", description="What is kept of calls")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("calls", help="list the calls on disk and what is undelivered")
    commands.add_parser("deliver", help="deliver what is undelivered")
    report = commands.add_parser("report", help="write a page about a call, or about all")
    report.add_argument("call", nargs="?", help="a call's id or the name of its folder")
    report.add_argument("--watch", action="store_true", help="keep the pages up to date")
    chosen = parser.parse_args(arguments)

    load_dotenv(find_dotenv(usecwd=True))
    directory = Path(setting("CALLS_DIR") or "calls")
    if found := make_private(directory):
        print(found, file=sys.stderr)
    match chosen.command:
        case "calls":
            return list_calls(directory)
        case "deliver":
            return deliver(directory)
        case _:
            return write_report(directory, chosen.call, watch=chosen.watch)


def list_calls(directory: Path) -> int:
    """Prints one line per call, oldest first; exit status 1 if a folder could not be read."""
    rows = [("STARTED", "LENGTH", "SIZE", "ENDED", "ROARK", "CALL")]
    undelivered = unreadable = 0
    for path in call_folders(directory):
        # Whatever is wrong with one folder, the others are shown.
        try:
            folder = Folder.load(path)
            rows.append(_row(folder))
            undelivered += _is_due(folder)
        except Exception as error:
            _name_unreadable(path, error)
            unreadable += 1
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows if len(rows) > 1 else []:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    if len(rows) > 1:
        print(f"{_count(len(rows) - 1, 'call')} in {directory}, {undelivered} undelivered.")
    else:
        print(f"No calls in {directory}.")
    return 1 if unreadable else 0


def deliver(directory: Path) -> int:
    """Delivers what earlier processes left, once, with a line per call."""
    api_key = setting("ROARK_API_KEY")
    if not api_key:
        print("ROARK_API_KEY is not set: there is nobody to deliver to.", file=sys.stderr)
        return 2
    base_url = setting("ROARK_BASE_URL")
    client = RoarkClient(api_key=api_key, base_url=base_url)
    outbox = Outbox(directory, client, delivers_leftovers=False)

    def progress(folder: Folder, flushed: Flushed | None) -> None:
        if flushed is None:
            outcome = "in use by another process"
        elif folder.destination is None:
            outcome = "kept only; it was made without a key"
        elif folder.destination != client.base_url:
            outcome = f"left: meant for {folder.destination}, not for {client.base_url}"
        elif flushed.left:
            outcome = f"{_count(flushed.left, 'request')} left, {flushed.delivered} delivered"
        else:
            outcome = f"delivered, {_count(flushed.delivered, 'request')}"
            if flushed.given_up:
                outcome += f", {flushed.given_up} given up"
        print(f"{folder.path.name}: {outcome}", flush=True)

    unreadable: dict[Path, Exception] = {}
    try:
        outbox.deliver_leftovers(progress, unreadable.__setitem__).result()
    except KeyboardInterrupt:
        print("Stopped; what is left stays on disk.", file=sys.stderr)
    finally:
        outbox.close()
    left = 0
    for path in call_folders(directory):
        try:
            left += _is_due(Folder.load(path))
        except Exception as error:
            unreadable[path] = error
    for path, error in unreadable.items():
        _name_unreadable(path, error)
    print(f"{_count(left, 'call')} left in {directory}." if left else "Nothing is left to deliver.")
    return 1 if left or unreadable else 0


def write_report(directory: Path, call: str | None, *, watch: bool) -> int:
    """Writes the page and prints where it is; with `watch` again whenever something is new."""
    # Brings numpy along, which nothing else here needs.
    from roark import report

    return report.main(directory, call, watch=watch)


def _name_unreadable(path: Path, error: Exception) -> None:
    print(f"{path.name}: cannot be read, passed over: {reason_of(error)}", file=sys.stderr)


def _row(folder: Folder) -> tuple[str, str, str, str, str, str]:
    return (
        f"{folder.begun_at:%Y-%m-%d %H:%M:%S} UTC",
        _length(folder),
        f"{sum(file.stat().st_size for file in os.scandir(folder.path)) / 1e6:.1f} MB",
        _ending(folder),
        _state(folder),
        folder.call_id,
    )


def _is_due(folder: Folder) -> bool:
    """Whether Roark should have more of it; a call that lasts is not over."""
    if folder.ended is None:
        return folder.destination is not None and not folder.lock.is_taken
    return bool(folder.steps_left)


def _state(folder: Folder) -> str:
    if folder.ended is None:
        return "live" if folder.lock.is_taken else "process died"
    if folder.destination is None:
        return f"kept, {_count(lost, 'chunk')} lost" if (lost := len(folder.lost)) else "kept"
    if folder.steps_left:
        return f"{len(folder.steps_left)} to deliver to {folder.destination}"
    if folder.steps_given_up:
        return f"delivered, {len(folder.steps_given_up)} given up"
    return "delivered"


def _length(folder: Folder) -> str:
    seconds = folder.recording_seconds
    body = json.loads(folder.ended or b"{}")
    if not seconds and body.get("callStartedAt"):
        lasted = datetime.fromisoformat(body["callEndedAt"]) - datetime.fromisoformat(
            body["callStartedAt"]
        )
        seconds = lasted.total_seconds()
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}" if seconds else "-"


def _ending(folder: Folder) -> str:
    return json.loads(folder.ended or b"{}").get("callEndedReason", "-")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


if __name__ == "__main__":
    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{message}", diagnose=False)
    sys.exit(main())
