"""What is roomy has its frames mapped once, however deep it calls."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from typing import TypeVar

import pytest

from vidgen.frames import roomy

if sys.platform != "win32":
    import resource

DEPTHS = range(1, 401)
CALLS = 2_000

T = TypeVar("T")


def small(a: int = 0, b: int = 0, c: int = 0, d: int = 0, e: int = 0, f: int = 0, g: int = 0, h: int = 0) -> None:
    """Takes a larger frame than `faults`: so at some depth the rest of a chunk is enough for the one alone."""
    _ = [a, b, c, d, e, f, g, h, a, b, c, d, e, f, g, h]


def faults(depth: int) -> int:
    """How often this thread's memory was mapped anew in a loop of calls, at this depth of others."""
    if depth:
        return faults(depth - 1)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(CALLS):
        small()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def most() -> int:
    return max(map(faults, DEPTHS))


def in_thread(work: Callable[[], T]) -> T:
    made: list[T] = []
    thread = threading.Thread(target=lambda: made.append(work()))
    thread.start()
    thread.join()
    return made[0]


@pytest.mark.skipif(sys.platform != "linux", reason="counts the page faults of a thread")
def test_no_call_maps_memory_anew_each_time_round() -> None:
    assert in_thread(most) > 0.9 * CALLS
    assert in_thread(roomy(most)) < 0.1 * CALLS


@pytest.mark.skipif(sys.platform != "linux", reason="counts the page faults of a thread")
def test_nor_does_it_where_what_is_roomy_calls_what_is() -> None:
    assert in_thread(roomy(roomy(most))) < 0.1 * CALLS


def test_what_is_given_and_what_comes_back_go_through() -> None:
    def work(first: int, /, second: int, *others: int, named: str, **more: str) -> tuple[object, ...]:
        return first, second, others, named, more

    assert roomy(work)(1, 2, 3, named="a", other="b") == (1, 2, (3,), "a", {"other": "b"})
    assert roomy(work)(1, second=2, named="a", work="b", given="c") == (1, 2, (), "a", {"work": "b", "given": "c"})
    assert roomy(max)([1, 3, 2]) == 3


def test_so_does_what_is_raised() -> None:
    def work() -> None:
        raise LookupError("none")

    with pytest.raises(LookupError, match="none") as raised:
        roomy(work)()
    assert [frame.name for frame in traceback.extract_tb(raised.tb)][1:] == ["call", "work"]


def test_two_of_them_do_not_get_in_each_others_way() -> None:
    first, second = roomy(lambda: 1), roomy(lambda: 2)
    assert (first(), second(), first()) == (1, 2, 1)


def test_it_may_call_as_deep_as_ever() -> None:
    def deep(left: int) -> int:
        return 1 + deep(left - 1) if left else 0

    assert in_thread(lambda: roomy(deep)(900)) == 900
    with pytest.raises(RecursionError):
        roomy(deep)(10 * sys.getrecursionlimit())
    assert roomy(deep)(100) == 100
