"""What is known of a closed call is known once."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rehearsal.providers.roark import RoarkReceiver
from roark.__main__ import main
from roark.catalog import CATALOG, Catalog, Entry
from roark.client import RoarkClient
from roark.folder import Folder, call_folders
from roark.outbox import Outbox
from roark.tests.test_cli import leave
from roark.tests.test_outbox import hold

PROJECT = Path(__file__).parent.parent.parent


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the folders that were read, by anybody."""
    names: list[str] = []
    really_read = Folder._read

    def watched(folder: Folder) -> None:
        names.append(folder.path.name)
        really_read(folder)

    monkeypatch.setattr(Folder, "_read", watched)
    return names


@pytest.mark.anyio
async def test_a_call_that_was_delivered_is_never_read_again(calls_dir, read, capsys):
    """Not by the process that had it, nor by a later one, nor by its trimming, nor by `calls`."""
    async with RoarkReceiver() as roark:
        client = RoarkClient(api_key="k", base_url=roark.url)
        outbox = Outbox(calls_dir, client, delivers_leftovers=False)
        for call_id in ("first", "second"):
            assert (await hold(outbox, call_id).flush(20)).left == 0
        await asyncio.to_thread(outbox.close)
        outbox = Outbox(calls_dir, client, delivers_leftovers=False)
        await asyncio.wrap_future(outbox.deliver_leftovers(lambda *_: None))
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(outbox._trim(), outbox._loop))
        await asyncio.to_thread(outbox.close)
    assert await asyncio.to_thread(main, ["calls"]) == 0
    assert read == []
    lines = capsys.readouterr().out.splitlines()
    assert ["delivered" in line for line in lines[:3]] == [False, True, True]


@pytest.mark.anyio
async def test_a_folder_that_changed_is_read_again(calls_dir, read, capsys):
    (path,) = await leave(calls_dir, None, "kept")
    with open(path / "delivery.jsonl", "ab") as delivery:
        delivery.write(b'{"lost":1,"bytes":64000}\n')
    await asyncio.to_thread(main, ["calls"])
    assert "kept, 1 chunk lost" in capsys.readouterr().out
    await asyncio.to_thread(main, ["calls"])
    assert read == [path.name]


@pytest.mark.anyio
async def test_audio_that_came_late_is_seen_at_a_glance_and_a_page_changes_only_the_size(
    calls_dir, read
):
    (path,) = await leave(calls_dir, None, "kept")
    catalog = Catalog(calls_dir)
    before = catalog.settled(path.name)
    (path / "report.html").write_bytes(bytes(1_000_000))
    assert catalog.settled(path.name) is None
    after = catalog.entry(path.name)
    assert before is not None and after is not None
    assert after.size == before.size + 1_000_000
    assert catalog.settled(path.name) == after
    (path / "chunk-00001.pcm").write_bytes(bytes(64))
    assert catalog.settled(path.name) is None
    assert catalog.entry(path.name) is None
    assert read == []


@pytest.mark.anyio
@pytest.mark.parametrize("spoilt", [b"", b"not json\n[1]\n{}\n", None])
async def test_without_its_lines_everything_is_read_again_and_right(
    spoilt, calls_dir, read, capsys
):
    await leave(calls_dir, None, "kept")
    if spoilt is None:
        (calls_dir / CATALOG).unlink()
    else:
        (calls_dir / CATALOG).write_bytes(spoilt)
    assert await asyncio.to_thread(main, ["calls"]) == 0
    assert await asyncio.to_thread(main, ["calls"]) == 0
    assert capsys.readouterr().out.count("agent-ended") == 2
    assert len(read) == 1


@pytest.mark.anyio
async def test_what_a_process_learnt_before_it_ended_is_known_to_the_next(calls_dir, monkeypatch):
    monkeypatch.setattr("roark.catalog.UNSAVED_LINES", 2)
    paths = await leave(calls_dir, None, "first", "second", "third")
    (calls_dir / CATALOG).unlink()
    catalog = Catalog(calls_dir)
    for path in paths:
        catalog.look(path.name)
    known = [Catalog(calls_dir).settled(path.name) is not None for path in paths]
    assert known == [True, True, False]


@pytest.mark.anyio
async def test_what_went_is_forgotten_when_most_lines_are_outdated(calls_dir, monkeypatch):
    monkeypatch.setattr("roark.catalog.OUTDATED_LINES", 3)
    first, second = await leave(calls_dir, None, "first", "second")
    catalog = Catalog(calls_dir)
    for number in range(6):
        (second / "report.html").write_bytes(bytes(number))
        (second / f"{number}").touch()
        assert isinstance(catalog.look(second.name), Entry)
        catalog.save([second.name])
    lines = [json.loads(line) for line in (calls_dir / CATALOG).read_bytes().splitlines()]
    assert len(lines) < 6
    assert {line["name"] for line in lines} == {second.name}
    assert call_folders(calls_dir) == [first, second]


def test_the_command_does_not_load_pipecat():
    program = "import sys, roark.__main__; print('pipecat' in sys.modules, 'httpx' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]
