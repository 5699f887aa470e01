"""Blocking calls in the threads of the event loop's own executor, for where there are many of them.

`asyncio.to_thread` makes two futures for each call, one of them with locks, for threads that nobody waits in. Here a
thread takes one call after another, and stays a moment for the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import queue
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

AT_ONCE = 32  # threads; the executor may have fewer
STAYS_S = 0.1  # how long one waits for its next call: a loop that ends waits for it
IN_A_ROW = 100  # calls of one thread, which then takes what else the executor was given meanwhile


async def run(work: Callable[..., T], *given: Any) -> T:
    """What a blocking call gives, made in a thread and in the caller's context, as `asyncio.to_thread` makes it.

    A call that is cancelled before its thread has come to it is not made.
    """
    loop = asyncio.get_running_loop()
    calls = _of_loops.get(loop)
    if calls is None:
        calls = _of_loops[loop] = _Calls()
    answer: asyncio.Future[T] = loop.create_future()
    calls.begin(loop, _Call(answer, contextvars.copy_context(), work, given))
    return await answer


@dataclass(frozen=True, slots=True)
class _Call:
    answer: asyncio.Future[Any]
    context: contextvars.Context
    work: Callable[..., Any]
    given: tuple[Any, ...]


class _Calls:
    """Those of one loop: all but `_work_off` is done in it."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._under_way = self._threads = 0

    def begin(self, loop: asyncio.AbstractEventLoop, call: _Call) -> None:
        self._under_way += 1
        try:
            self._attend(loop)
        except RuntimeError:  # the loop is about to end
            self._under_way -= 1
            raise
        self._waiting.put(call)

    def _attend(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._threads < min(self._under_way, AT_ONCE):
            working = loop.run_in_executor(None, self._work_off, loop)
            self._threads += 1
            working.add_done_callback(lambda _: self._left(loop))

    def _left(self, loop: asyncio.AbstractEventLoop) -> None:
        self._threads -= 1
        with contextlib.suppress(RuntimeError):
            self._attend(loop)  # a call may have come in the moment in which it left

    def _work_off(self, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(queue.Empty, RuntimeError):  # RuntimeError: the loop is closed, and nobody waits
            for _ in range(IN_A_ROW):
                self._make(loop, self._waiting.get(timeout=STAYS_S))

    def _make(self, loop: asyncio.AbstractEventLoop, call: _Call) -> None:
        result, fault = None, None
        if not call.answer.cancelled():
            try:
                result = call.context.run(call.work, *call.given)
            except BaseException as exc:  # whatever it is, it is the caller's
                fault = exc
        loop.call_soon_threadsafe(self._tell, call.answer, result, fault)
        del fault  # or it would be in a circle with this frame

    def _tell(self, answer: asyncio.Future[Any], result: Any, fault: BaseException | None) -> None:
        self._under_way -= 1
        if answer.done():
            return
        if fault is None:
            answer.set_result(result)
        else:
            answer.set_exception(fault)


_of_loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Calls] = weakref.WeakKeyDictionary()
