"""Calls somebody; the bot has to be running, for Twilio where that reaches it.

python -m telephony call +4930123456 --name Ann --reason "your appointment on Friday"
"""

import argparse
import asyncio
import signal
import sys
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from loguru import logger

import config

if TYPE_CHECKING:
    from telephony.errand import Errand

PROJECT = Path(__file__).resolve().parents[1]


async def call(options: argparse.Namespace) -> int:
    """Place one call and tell how it goes; returns the exit status, 1 for one not taken."""
    from telephony.errand import Errand, NotPlaced, usual_transport

    errand = Errand(
        callee_number=options.number, callee_name=options.name, call_reason=options.reason
    )
    try:
        if (options.transport or usual_transport()) == "daily":
            return await call_by_daily(errand, options)
        return await call_by_twilio(errand, options)
    except NotPlaced as refusal:
        print(f"Not called: {refusal}.", file=sys.stderr)
        return 2


async def call_by_daily(errand: "Errand", options: argparse.Namespace) -> int:
    """Have the bot called into a room, from where it dials; its record tells how that ended."""
    from telephony.daily_dialout import DailyOutbound

    daily = DailyOutbound(host=options.webhook_host, cloud_agent=options.agent)
    session = await daily.place(errand, digits=options.digits)
    print(f"The bot dials: session {session}. How it ends is in its record.", flush=True)
    return 0


async def call_by_twilio(errand: "Errand", options: argparse.Namespace) -> int:
    """Have Twilio call, and follow the call to its end."""
    from telephony.outbound import Outbound

    agent = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    outbound = Outbound(
        agent=agent["project"]["name"],
        host=options.webhook_host,
        cloud_agent=options.agent,
        tell=lambda text: print(text, flush=True),
    )
    sid = await outbound.place(errand, digits=options.digits)
    print(f"Twilio has the call: {sid}", flush=True)
    task = asyncio.current_task()
    assert task
    with suppress(NotImplementedError):
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        ending = await outbound.follow(sid, errand)
    except asyncio.CancelledError:
        return 1
    over = ending == "completed"
    its_record = over or outbound.server_is_told
    print("How it ended is in the bot's record." if its_record else f"Ending: {ending}", flush=True)
    return 0 if over else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m telephony", description="Calls out.")
    commands = parser.add_subparsers(dest="command", required=True)
    place = commands.add_parser("call", help="have the running bot call somebody")
    place.add_argument("number", help="in E.164 form, such as +4930123456")
    place.add_argument("--name", required=True, help="whom, as the bot may say it")
    place.add_argument("--reason", required=True, help="why, such as 'your appointment on Friday'")
    place.add_argument(
        "-t",
        "--transport",
        choices=("twilio", "daily"),
        help="who calls; daily where .env has its key and no TWILIO_ACCOUNT_SID",
    )
    place.add_argument(
        "--webhook-host", default="", metavar="HOST", help="the bot's public name, as for -x"
    )
    place.add_argument(
        "--agent", default="", metavar="AGENT.ORG", help="in its place, a bot at Pipecat Cloud"
    )
    place.add_argument(
        "--digits", default="", help="keys for a phone tree, pressed once it is answered; w waits"
    )
    options = parser.parse_args(arguments)
    config.read_env()
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    try:
        config.check_values()
    except RuntimeError as error:
        print(f"Not called: {error}.", file=sys.stderr)
        return 2
    return asyncio.run(call(options))


if __name__ == "__main__":
    sys.exit(main())
