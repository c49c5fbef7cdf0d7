"""python -m roark: what is kept of calls, and getting the rest of it to Roark.

    python -m roark calls            every call in CALLS_DIR and what of it Roark does not have
    python -m roark deliver          deliver that now; exit 1 if anything is left, 2 without a key
    python -m roark report [CALL]    a page about a call (default: all of them, and their index);
                                     --watch keeps them up to date until Ctrl-C

Settings come from the environment or .env: CALLS_DIR, ROARK_API_KEY, ROARK_BASE_URL.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dotenv import find_dotenv, load_dotenv
from loguru import logger

from roark.catalog import Catalog, Entry, size_of
from roark.client import RoarkClient
from roark.destinations import from_environment
from roark.folder import Folder, begun_at, call_names, make_private, reason_of
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

    try:
        load_dotenv(find_dotenv(usecwd=True), encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        # Its text repeats what was read.
        print(
            f".env cannot be read ({type(error).__name__}): make it plain text in UTF-8.",
            file=sys.stderr,
        )
        return 2
    directory = Path(setting("CALLS_DIR") or "calls")
    if directory.exists() and not directory.is_dir():
        print(f"CALLS_DIR is the folder of calls, and {directory} is none.", file=sys.stderr)
        return 2
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
    catalog = Catalog(directory)
    rows: list[tuple[str, ...]] = [("STARTED", "LENGTH", "SIZE", "ENDED", "ROARK", "CALL")]
    undelivered = unreadable = 0
    names = call_names(directory, known=catalog.names)
    for name in names:
        # Whatever is wrong with one folder, the others are shown.
        try:
            call = catalog.look(name)
            rows.append(_row(name, call))
            undelivered += _is_due(call)
        except Exception as error:
            _name_unreadable(name, error)
            unreadable += 1
    catalog.save(names)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:<{width}}}" for width in widths)
    if len(rows) > 1:
        print("\n".join(form.format(*row).rstrip() for row in rows))
        print(f"{_count(len(rows) - 1, 'call')} in {directory}, {undelivered} undelivered.")
    else:
        print(f"No calls in {directory}.")
    return 1 if unreadable else 0


def deliver(directory: Path) -> int:
    """Delivers what earlier processes left, once, with a line per call."""
    api_key = setting("ROARK_API_KEY")
    destinations = from_environment()
    if not api_key and not destinations:
        print("ROARK_API_KEY is not set: there is nobody to deliver to.", file=sys.stderr)
        return 2
    base_url = setting("ROARK_BASE_URL")
    client = RoarkClient(api_key=api_key, base_url=base_url) if api_key else None
    outbox = Outbox(directory, client, destinations=destinations, delivers_leftovers=False)
    ours = [*([client.base_url] if client else []), *(to.address for to in destinations)]

    def progress(folder: Folder, flushed: Flushed | None) -> None:
        if flushed is None:
            outcome = "in use by another process"
        elif not folder.destinations:
            outcome = "kept only; it was made without a key"
        elif not set(folder.destinations) & set(ours):
            meant = ", ".join(folder.destinations)
            outcome = f"left: meant for {meant}, not for {', '.join(ours)}"
        elif flushed.left:
            outcome = f"{_count(flushed.left, 'request')} left, {flushed.delivered} delivered"
        else:
            outcome = f"delivered, {_count(flushed.delivered, 'request')}"
            if flushed.given_up:
                outcome += f", {flushed.given_up} given up"
        print(f"{folder.path.name}: {outcome}", flush=True)

    unreadable: dict[str, Exception] = {}
    try:
        outbox.deliver_leftovers(progress, unreadable.__setitem__).result()
    except KeyboardInterrupt:
        print("Stopped; what is left stays on disk.", file=sys.stderr)
    finally:
        outbox.close()
    left = 0
    catalog = Catalog(directory)
    for name in call_names(directory, known=catalog.names):
        try:
            left += _is_due(catalog.look(name))
        except Exception as error:
            unreadable[name] = error
    for name, error in unreadable.items():
        _name_unreadable(name, error)
    print(f"{_count(left, 'call')} left in {directory}." if left else "Nothing is left to deliver.")
    return 1 if left or unreadable else 0


def write_report(directory: Path, call: str | None, *, watch: bool) -> int:
    """Writes the page and prints where it is; with `watch` again whenever something is new."""
    # Brings numpy along, which nothing else here needs.
    from roark import report

    return report.main(directory, call, watch=watch)


def _name_unreadable(name: str, error: Exception) -> None:
    print(f"{name}: cannot be read, passed over: {reason_of(error)}", file=sys.stderr)


def _row(name: str, call: Entry | Folder) -> tuple[str, ...]:
    return (
        _started(name),
        _length(call.seconds),
        f"{(call.size if isinstance(call, Entry) else size_of(call.path)) / 1e6:.1f} MB",
        call.reason,
        _state(call),
        call.call_id,
    )


def _state(call: Entry | Folder) -> str:
    if isinstance(call, Folder):
        return "live" if call.lock.is_taken else "process died"
    if call.left:
        return ", ".join(f"{number} to deliver to {to}" for to, number in call.left.items())
    if not call.is_sent:
        return f"kept, {_count(call.lost, 'chunk')} lost" if call.lost else "kept"
    return f"delivered, {call.given_up} given up" if call.given_up else "delivered"


def _is_due(call: Entry | Folder) -> bool:
    """Whether somebody should have more of it; a call that lasts is not over."""
    if isinstance(call, Folder):
        return bool(call.destinations) and not call.lock.is_taken
    return bool(call.left)


def _started(name: str) -> str:
    return f"{begun_at(name).replace(tzinfo=None).isoformat(' ')} UTC"


def _length(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}" if seconds else "-"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


if __name__ == "__main__":
    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{message}", diagnose=False)
    sys.exit(main())
