"""A signal ends the calls in progress and then does what it did before."""

import asyncio
import os
import signal

import pytest

import shutdown

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def development_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipecat's development server says that it is one."""
    monkeypatch.setenv("ENV", "local")


async def test_a_signal_ends_every_call_and_still_reaches_the_server() -> None:
    reached: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: reached.append(number))
    try:
        first, second = asyncio.Event(), asyncio.Event()
        with (
            shutdown.ends_call(lambda _name: first.set()),
            shutdown.ends_call(lambda _name: second.set()),
        ):
            os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(5):
                await first.wait()
                await second.wait()
        assert reached == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_after_the_last_call_the_signals_belong_to_the_server_again() -> None:
    before = {number: signal.getsignal(number) for number in shutdown.SIGNALS}
    with shutdown.ends_call(lambda _name: None):
        assert {signal.getsignal(number) for number in shutdown.SIGNALS}.isdisjoint(before.values())
    assert {number: signal.getsignal(number) for number in shutdown.SIGNALS} == before


async def test_a_call_that_is_over_is_not_ended_again() -> None:
    ended: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    try:
        with shutdown.ends_call(lambda _name: None):
            with shutdown.ends_call(ended.append):
                pass
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0)
        assert ended == []
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_in_the_cloud_a_signal_lets_the_call_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENV")
    drains: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: drains.append(number))
    try:
        ended: list[str] = []
        with shutdown.ends_call(ended.append):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0)
        assert drains == [signal.SIGTERM]
        assert ended == []
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_without_any_handler_a_signal_ends_the_call_and_not_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ENV")
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        ended = asyncio.Event()
        with shutdown.ends_call(lambda _name: ended.set()):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(ended.wait(), 5)
    finally:
        signal.signal(signal.SIGTERM, before)
