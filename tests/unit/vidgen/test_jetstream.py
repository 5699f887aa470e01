"""What the adapter does without a server: a cancel gets through it whatever the client library makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import nats.errors
import pytest

from vidgen import errors, jetstream

BOUND = 60.0


class Library:
    """Waits as nats-py does, and is answered when told."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def next_msg(self, timeout: float) -> Any:
        return await asyncio.wait_for(self.answer, timeout)


async def ask(library: Library) -> None:
    with jetstream.translated():
        await library.next_msg(BOUND)


async def listen(library: Library) -> None:
    await jetstream.ListenFeed(library).next(BOUND)  # type: ignore[arg-type]


async def cancelled_with(answer: Callable[[Library], None], call: Callable[[Library], Awaitable[None]]) -> bool:
    """Whether a call ends as cancelled where its answer comes in the same moment."""
    library = Library()
    calling = asyncio.ensure_future(call(library))
    await asyncio.sleep(0)
    answer(library)
    calling.cancel()
    await asyncio.wait([calling])
    return calling.cancelled()


@pytest.mark.parametrize("call", [ask, listen])
async def test_a_cancel_that_comes_with_the_answer_is_not_lost(call: Callable[[Library], Awaitable[None]]) -> None:
    assert await cancelled_with(lambda library: library.answer.set_result(None), call)


@pytest.mark.parametrize("call", [ask, listen])
async def test_nor_is_one_that_comes_with_a_fault(call: Callable[[Library], Awaitable[None]]) -> None:
    assert await cancelled_with(lambda library: library.answer.set_exception(nats.errors.ConnectionClosedError()), call)


async def test_a_limit_of_time_that_passes_with_the_answer_is_a_timeout() -> None:
    library = Library()

    async def limited() -> None:
        async with asyncio.timeout(0):
            asyncio.get_running_loop().call_soon(library.answer.set_result, None)
            await ask(library)

    with pytest.raises(TimeoutError):
        await limited()


async def test_who_was_cancelled_before_may_still_use_the_bus_to_tidy_up() -> None:
    library, told = Library(), []

    async def leaves() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await ask(library)
            told.append("tidied up")
            raise

    leaving = asyncio.ensure_future(leaves())
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.sleep(0)
    library.answer.set_result(None)
    await asyncio.wait([leaving])

    assert leaving.cancelled()
    assert told == ["tidied up"]


async def test_what_nobody_cancelled_is_translated_as_ever() -> None:
    library = Library()
    library.answer.set_exception(nats.errors.TimeoutError())
    with pytest.raises(errors.BusError):
        await ask(library)
