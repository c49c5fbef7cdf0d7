"""What a second of a talking call costs with another Python, or without uvloop.

    python -m benchmarks pythons

As cpu.py measures it, ours alone, the variants by turns. uv makes an environment for each Python,
of the same locked packages; interpreters that this machine has not are downloaded by it. Without
uvloop: uvicorn, which Pipecat's runner serves with, takes it where it can be imported.
"""

import asyncio
import os
import shutil
import statistics
import subprocess
import sys
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.cpu import ROUNDS, TURN_SECONDS, Spent, talk
from benchmarks.speed import (
    REPOSITORY,
    TRANSPORTS,
    Bot,
    Speech,
    greeting_of,
    our_bot,
    running,
    world,
)

OWN = f"{sys.version_info[0]}.{sys.version_info[1]}"
OTHERS = ("3.12", "3.13")
WITHOUT_UVLOOP = "without uvloop"


def interpreter(version: str, folder: Path) -> str:
    """Return a Python of that version that has this repository's packages.

    Raises:
        subprocess.CalledProcessError: uv has no such interpreter, or a package has no wheel for it.
    """
    environment = os.environ | {"UV_PROJECT_ENVIRONMENT": str(folder / version)}
    command = ("uv", "sync", "--quiet", "--frozen", "--python", version)
    subprocess.run(command, check=True, cwd=REPOSITORY, env=environment)
    return str(folder / version / "bin" / "python")


def variants(folder: Path) -> dict[str, Bot]:
    """Lay out our bot in `folder`, once for each variant."""
    ours = our_bot(folder)
    plain = folder / "plain"
    shutil.copytree(ours.folder, plain)
    # The bot's folder comes first on its path.
    (plain / "uvloop.py").write_text('raise ImportError("not in this run")\n', encoding="utf-8")
    others = {version: replace(ours, python=interpreter(version, folder)) for version in OTHERS}
    return {OWN: ours, f"{OWN} {WITHOUT_UVLOOP}": replace(ours, folder=plain), **others}


async def measure() -> dict[tuple[str, str], Spent]:
    """Return (transport, variant) -> what its calls cost."""
    found: dict[tuple[str, str], Spent] = {}
    with TemporaryDirectory(prefix="pythons-") as name:
        async with AsyncExitStack() as stack:
            environment = await stack.enter_async_context(world(Path(name)))
            speech = await Speech.make()
            hosts = {
                variant: await stack.enter_async_context(running(bot, environment))
                for variant, bot in variants(Path(name)).items()
            }
            for transport in TRANSPORTS:
                for host in hosts.values():
                    # The first call of each kind finds the process cold.
                    async with host.caller(transport) as caller:
                        await greeting_of(caller)
                for _ in range(ROUNDS):
                    for variant, host in hosts.items():
                        spent = found.setdefault((transport, variant), Spent())
                        in_all, loop = await talk(host, transport, speech)
                        spent.all.append(in_all)
                        spent.loop.append(loop)
    return found


def report() -> str:
    """Measure, and return the section for README.md."""
    lines = [
        f"| line | Python | a second of a call takes | beside {OWN} | of it the loop's thread |",
        "|---|---|---|---|---|",
    ]
    found = asyncio.run(measure())
    for (transport, variant), spent in found.items():
        own = statistics.median(found[transport, OWN].all)
        in_all, loop = statistics.median(spent.all), statistics.median(spent.loop)
        spread = f"{1000 * min(spent.all):.0f} to {1000 * max(spent.all):.0f}"
        lines.append(
            f"| {transport} | {variant} | {1000 * in_all:.0f} ms ({spread}) | {in_all / own:.2f}x "
            f"| {1000 * loop:.0f} ms |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"Processor time of ours, medians of {ROUNDS} calls by turns, one call at a time, a "
            f"question every {TURN_SECONDS:g} s, services that answer at once.",
        ]
    )


if __name__ == "__main__":
    print(report())
