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

from benchmarks.cpu import HOW, Spent, by_turns
from benchmarks.speed import (
    REPOSITORY,
    Bot,
    Speech,
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
    with TemporaryDirectory(prefix="pythons-") as name:
        async with AsyncExitStack() as stack:
            environment = await stack.enter_async_context(world(Path(name)))
            speech = await Speech.make()
            hosts = {
                variant: await stack.enter_async_context(running(bot, environment))
                for variant, bot in variants(Path(name)).items()
            }
            return await by_turns(hosts, speech)


def report() -> str:
    """Measure, and return the section for README.md."""
    lines = [
        f"| line | Python | a second of a call takes | beside {OWN} | of it the loop's thread |",
        "|---|---|---|---|---|",
    ]
    found = asyncio.run(measure())
    for (transport, variant), spent in found.items():
        beside = statistics.median(spent.all) / statistics.median(found[transport, OWN].all)
        lines.append(
            f"| {transport} | {variant} | {spent.in_all} | {beside:.2f}x | {spent.of_loop} |"
        )
    return "\n".join([*lines, "", f"Processor time of ours, {HOW}"])


if __name__ == "__main__":
    print(report())
