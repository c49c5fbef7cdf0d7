"""A signal ends the calls in progress and then does what it did before."""

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from host import shutdown

pytestmark = pytest.mark.anyio


class Call:
    """Notes the signals that ended it."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.ended = asyncio.Event()

    async def end(self, name: str) -> None:
        self.names.append(name)
        self.ended.set()


@pytest.fixture(autouse=True)
def development_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipecat's development server says that it is one."""
    monkeypatch.setenv("ENV", "local")


async def test_a_signal_ends_every_call_and_still_reaches_the_server() -> None:
    reached: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: reached.append(number))
    try:
        first, second = Call(), Call()
        with shutdown.ends_call(first.end), shutdown.ends_call(second.end):
            os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(30):
                await first.ended.wait()
                await second.ended.wait()
        assert first.names == second.names == ["SIGTERM"]
        assert reached == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_after_the_last_call_the_signals_belong_to_the_server_again() -> None:
    before = {number: signal.getsignal(number) for number in shutdown.SIGNALS}
    with shutdown.ends_call(Call().end):
        assert {signal.getsignal(number) for number in shutdown.SIGNALS}.isdisjoint(before.values())
    assert {number: signal.getsignal(number) for number in shutdown.SIGNALS} == before


async def test_a_call_that_is_over_is_not_ended_again() -> None:
    over = Call()
    before = signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    try:
        with shutdown.ends_call(Call().end):
            with shutdown.ends_call(over.end):
                pass
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0)
        assert over.names == []
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_in_the_cloud_a_signal_lets_the_call_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENV")
    drains: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: drains.append(number))
    try:
        call = Call()
        with shutdown.ends_call(call.end):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0)
        assert drains == [signal.SIGTERM]
        assert call.names == []
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_without_any_handler_a_signal_ends_the_call_and_not_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ENV")
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        call = Call()
        with shutdown.ends_call(call.end):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(call.ended.wait(), 5)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The signals that reached the server; it drains for a minute."""
    monkeypatch.setenv("DRAIN_SECONDS", "60")
    numbers: list[int] = []

    def server(number: int, _frame: object) -> None:
        numbers.append(number)

    before = {number: signal.signal(number, server) for number in shutdown.SIGNALS}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


async def turn_of_the_loop() -> None:
    """Let what was handed over from a signal handler run."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_draining_lets_calls_go_on_and_the_process_goes_after_the_last(
    reached: list[int],
) -> None:
    first, second = Call(), Call()
    with shutdown.ends_call(first.end):
        with shutdown.ends_call(second.end):
            os.kill(os.getpid(), signal.SIGTERM)
            await turn_of_the_loop()
            assert shutdown.is_draining()
        assert reached == [], "a call is left"
    assert first.names == second.names == []
    assert reached == [signal.SIGTERM]
    assert not shutdown.is_draining()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_them_now(reached: list[int], second: signal.Signals) -> None:
    call = Call()
    with shutdown.ends_call(call.end):
        os.kill(os.getpid(), signal.SIGTERM)
        await turn_of_the_loop()
        os.kill(os.getpid(), second)
        await asyncio.wait_for(call.ended.wait(), 5)
        assert reached == [second]
    assert call.names == [second.name]
    assert reached == [second], "not told twice"


async def test_draining_has_a_limit(reached: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAIN_SECONDS", "0.05")
    call = Call()
    with shutdown.ends_call(call.end):
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(call.ended.wait(), 5)
    assert reached == [signal.SIGTERM]


async def test_new_calls_are_taken_until_a_proxy_has_noticed(
    reached: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with shutdown.ends_call(Call().end):
        os.kill(os.getpid(), signal.SIGTERM)
        await turn_of_the_loop()
        assert not shutdown.takes_no_calls()
        monkeypatch.setattr(shutdown, "NOTICE_SECONDS", -1.0)
        assert shutdown.takes_no_calls()


async def test_a_signal_does_not_miss_a_call_whose_pipeline_is_being_built(
    reached: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAIN_SECONDS", "0")
    call = Call()
    with shutdown.waits_for_call():
        os.kill(os.getpid(), signal.SIGTERM)
        assert reached == [signal.SIGTERM]
        with shutdown.ends_call(call.end):
            await asyncio.wait_for(call.ended.wait(), 5)
    assert call.names == ["SIGTERM"]


@pytest.mark.parametrize("step", ["getsignal", "signal"])
@pytest.mark.parametrize("moment", ["first call", "last call"])
async def test_a_signal_in_the_very_moment_in_which_handlers_change_is_not_lost(
    reached: list[int], monkeypatch: pytest.MonkeyPatch, moment: str, step: str
) -> None:
    """Whoever ends a bot as soon as its call is delivered meets that moment."""
    monkeypatch.setenv("DRAIN_SECONDS", "0")
    change = getattr(signal, step)

    def a_signal_comes(*arguments: Any) -> Any:
        monkeypatch.setattr(signal, step, change)
        changed = change(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        return changed

    if moment == "first call":
        monkeypatch.setattr(signal, step, a_signal_comes)
    with shutdown.waits_for_call():
        if moment == "last call":
            monkeypatch.setattr(signal, step, a_signal_comes)
    assert getattr(signal, step) is change
    assert reached == [signal.SIGTERM]

    another = Call()
    with shutdown.ends_call(another.end):
        await turn_of_the_loop()
    assert another.names == [], "it was about the calls before"
