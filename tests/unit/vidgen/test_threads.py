from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vidgen import threads

BOUND = 10.0


async def test_a_call_is_made_in_another_thread_and_in_the_callers_context() -> None:
    named: contextvars.ContextVar[str] = contextvars.ContextVar("named")
    named.set("the caller's")

    where, told = await threads.run(lambda: (threading.get_ident(), named.get()))

    assert where != threading.get_ident()
    assert told == "the caller's"


async def test_what_a_call_raises_is_the_callers() -> None:
    with pytest.raises(KeyError, match="x"):
        await threads.run({}.__getitem__, "x")


async def test_more_calls_than_threads_all_come_to_their_ends() -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))

    def call(number: int) -> int:
        time.sleep(0.001)
        return number

    found = await asyncio.gather(*(threads.run(call, number) for number in range(500)))

    assert found == list(range(500))


async def test_as_many_calls_run_side_by_side_as_the_executor_has_threads() -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(4))
    together = threading.Barrier(4, timeout=BOUND)

    await asyncio.gather(*(threads.run(together.wait) for _ in range(4)))


async def test_a_call_that_comes_when_its_thread_has_just_left_is_made() -> None:
    for _ in range(20):
        assert await asyncio.wait_for(threads.run(int, "1"), BOUND) == 1
        await asyncio.sleep(threads.STAYS_S)


async def test_a_call_that_is_cancelled_before_its_turn_is_not_made() -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    door = threading.Event()
    made: list[int] = []
    first = asyncio.create_task(threads.run(door.wait, BOUND))
    second = asyncio.create_task(threads.run(made.append, 2))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.wait([second])
    door.set()

    assert await first
    assert second.cancelled()
    await threads.run(made.append, 3)
    assert made == [3]


async def test_what_else_the_executor_was_given_has_its_turn_under_load() -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    busy = True

    async def keep_busy() -> None:
        while busy:
            await threads.run(int)

    loads = [asyncio.create_task(keep_busy()) for _ in range(4)]
    await threads.run(int)
    assert await asyncio.wait_for(asyncio.to_thread(int, "1"), BOUND) == 1
    busy = False
    await asyncio.gather(*loads)


def test_a_loop_that_ends_waits_for_no_thread_for_long() -> None:
    begun = time.monotonic()
    for _ in range(3):
        assert asyncio.run(threads.run(int, "1")) == 1

    assert time.monotonic() - begun < BOUND / 2
