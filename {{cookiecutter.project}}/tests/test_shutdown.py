"""A signal ends the calls in progress and then does what it did before."""

import asyncio
import os
import signal

import pytest

import shutdown

pytestmark = pytest.mark.anyio


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
