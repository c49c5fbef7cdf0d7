"""`python -m roark`: what is on disk, and getting it to Roark."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from loguru import logger

from rehearsal.providers.roark import RoarkReceiver
from roark.__main__ import main
from roark.client import RoarkClient
from roark.outbox import Outbox

PROJECT = Path(__file__).parents[2]
MOMENT = "2026-11-21T12:00:00+00:00"


@pytest.fixture
def key(monkeypatch, roark) -> None:
    """A key, and the loopback Roark as the one it is for."""
    monkeypatch.setenv("ROARK_API_KEY", "k")
    monkeypatch.setenv("ROARK_BASE_URL", roark.url)


async def leave(
    calls_dir: Path, url: str | None, *call_ids: str, within: float = 0.2
) -> list[Path]:
    """Calls as a process leaves them that could not reach its Roark."""
    client = RoarkClient(api_key="k", base_url=url) if url else None
    outbox = Outbox(calls_dir, client, delivers_leftovers=False)
    paths = []
    for call_id in call_ids:
        call = outbox.open(call_id)
        started = {"event": "call-started", "pipecatCallId": call_id, "agentId": "a"}
        call.started({**started, "eventTimestamp": MOMENT})
        call.chunk(0, bytes(64_000), 8000, 2)
        ended = {"event": "call-ended", "pipecatCallId": call_id, "eventTimestamp": MOMENT}
        times = {"callStartedAt": MOMENT, "callEndedAt": MOMENT}
        call.ended({**ended, **times, "callEndedReason": "agent-ended"}, {})
        await call.flush(within)
        paths.append(call.path)
    outbox.close()
    return paths


async def run(*arguments: str) -> int:
    """The command, while the loopback Roark answers."""
    return await asyncio.to_thread(main, arguments)


@pytest.mark.anyio
async def test_calls_shows_what_is_kept_delivered_and_undelivered(roark, calls_dir, capsys):
    (there,) = await leave(calls_dir, roark.url, "there", within=20)
    await roark.stop()
    await leave(calls_dir, roark.url, "left")
    await leave(calls_dir, None, "kept")
    assert await run("calls") == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.split(r"\s{2,}", lines[0]) == ["STARTED", "LENGTH", "SIZE", "ENDED", "ROARK", "CALL"]
    rows = {line.split()[-1]: line for line in lines[1:-1]}
    assert re.search(r"0:02 +0\.1 MB +agent-ended +delivered +there", rows["there"])
    # As the folder's name says it, and the pages do.
    begun = datetime.strptime(there.name[:15], "%Y%m%dT%H%M%S")
    assert rows["there"].startswith(f"{begun} UTC ")
    assert "3 to deliver" in rows["left"]
    assert " kept " in rows["kept"]
    assert lines[-1] == f"3 calls in {calls_dir}, 1 undelivered."


@pytest.mark.anyio
async def test_no_calls_are_said_to_be_none(calls_dir, capsys):
    assert await run("calls") == 0
    assert capsys.readouterr().out == f"No calls in {calls_dir}.\n"


@pytest.mark.anyio
async def test_deliver_delivers_what_is_left_with_a_line_per_call(roark, calls_dir, key, capsys):
    await roark.stop()
    paths = await leave(calls_dir, roark.url, "first", "second")
    await roark.start()
    assert await run("deliver") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{paths[0].name}: delivered, 3 requests",
        f"{paths[1].name}: delivered, 3 requests",
        "Nothing is left to deliver.",
    ]
    assert roark.calls["first"].whole
    assert roark.calls["second"].whole
    assert await run("deliver") == 0
    assert capsys.readouterr().out == "Nothing is left to deliver.\n"


@pytest.mark.anyio
async def test_deliver_exits_1_when_something_is_left(roark, calls_dir, key, capsys, monkeypatch):
    monkeypatch.setattr("roark.outbox.LEFTOVER_ATTEMPTS", 1)
    await roark.stop()
    (path,) = await leave(calls_dir, roark.url, "first")
    await roark.start()
    roark.fail("put", status=500)
    assert await run("deliver") == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{path.name}: 2 requests left, 1 delivered",
        f"1 call left in {calls_dir}.",
    ]


@pytest.mark.anyio
async def test_deliver_names_calls_that_are_meant_for_another_roark(roark, calls_dir, key, capsys):
    (path,) = await leave(calls_dir, "http://127.0.0.1:9", "rehearsed")
    assert await run("deliver") == 1
    expected = f"{path.name}: left: meant for http://127.0.0.1:9, not for {roark.url}"
    assert capsys.readouterr().out.splitlines()[0] == expected
    assert roark.calls == {}


@pytest.mark.anyio
async def test_deliver_leaves_a_call_alone_that_lasts(roark, calls_dir, key, capsys):
    outbox = Outbox(calls_dir, RoarkClient(api_key="k", base_url=roark.url))
    call = outbox.open("live")
    call.chunk(0, bytes(64), 8000, 2)
    await call.flush(0.1)
    assert await run("deliver") == 0
    assert "live" in capsys.readouterr().out
    assert await run("calls") == 0
    assert re.search(r" live +live$", capsys.readouterr().out.splitlines()[1])
    outbox.close()


@pytest.mark.anyio
async def test_deliver_without_a_key_says_so_in_one_sentence(calls_dir, capsys):
    assert await run("deliver") == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "ROARK_API_KEY is not set: there is nobody to deliver to.\n"


@pytest.mark.anyio
async def test_a_wrong_key_is_said_once_with_roarks_words(calls_dir, monkeypatch):
    said: list[str] = []
    sink = logger.add(lambda line: said.append(str(line)), level="WARNING")
    async with RoarkReceiver(api_key="right") as roark:
        monkeypatch.setenv("ROARK_API_KEY", "wrong")
        monkeypatch.setenv("ROARK_BASE_URL", roark.url)
        await roark.stop()
        await leave(calls_dir, roark.url, "first", "second")
        await roark.start()
        assert await run("deliver") == 1
        assert sum("turned away: 401 rehearsed 401" in line for line in said) == 1
        logger.remove(sink)
        monkeypatch.setenv("ROARK_API_KEY", "right")
        assert await run("deliver") == 0


@pytest.mark.anyio
async def test_settings_may_come_from_a_dotenv_file(roark, calls_dir, monkeypatch):
    await roark.stop()
    await leave(calls_dir, roark.url, "first")
    await roark.start()
    # load_dotenv sets these for good; monkeypatch takes them back.
    monkeypatch.setenv("ROARK_API_KEY", "")
    monkeypatch.delenv("ROARK_API_KEY")
    monkeypatch.setenv("ROARK_BASE_URL", "")
    monkeypatch.delenv("ROARK_BASE_URL")
    Path(".env").write_text(f"ROARK_API_KEY=k\nROARK_BASE_URL={roark.url}\n")
    assert await run("deliver") == 0
    assert roark.calls["first"].whole


@pytest.mark.anyio
async def test_a_dotenv_file_that_is_no_text_is_refused_without_its_content(calls_dir, capsys):
    Path(".env").write_bytes(b"ROARK_API_KEY=\xff-secret\n")
    assert await run("calls") == 2
    said = capsys.readouterr().err
    assert said.startswith(".env cannot be read") and "secret" not in said


@pytest.mark.anyio
@pytest.mark.parametrize("command", ["calls", "deliver", "report"])
async def test_a_place_for_calls_that_is_no_folder_is_refused(calls_dir, capsys, command):
    calls_dir.write_text("")
    assert await run(command) == 2
    assert (
        capsys.readouterr().err == f"CALLS_DIR is the folder of calls, and {calls_dir} is none.\n"
    )


@pytest.mark.slow
def test_it_runs_as_a_module(tmp_path):
    shutil.copytree(PROJECT / "roark", tmp_path / "roark")
    result = subprocess.run(
        [sys.executable, "-m", "roark", "calls"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, "No calls in calls.\n")


@pytest.mark.anyio
async def test_a_folder_with_spoilt_files_is_still_listed(roark, calls_dir, capsys):
    (path,) = await leave(calls_dir, None, "kept")
    (path / "call-ended.json").write_bytes(b"{")
    with open(path / "delivery.jsonl", "ab") as delivery:
        delivery.write(json.dumps({"recorded": "x"}).encode() + b"\n[1]\nnot json")
    assert await run("calls") == 0
    assert "kept" in capsys.readouterr().out
