"""Room for the frames of Python's functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# In words of eight bytes. So large a frame, and a little, makes CPython take a chunk of 1 MiB, of which it leaves half.
OWN = 1 << 16


def roomy(work: Callable[P, T]) -> Callable[P, T]:
    """The same, but that all it calls, however deep, finds room for its frames; work that runs long wants that.

    CPython keeps the frames of a thread in chunks of 16 KiB. It maps one when a call needs it, and unmaps it when that
    call returns: a loop that calls across such an edge does so each time round, which took a tenth of a start.
    """

    def call(*given: P.args, **more: P.kwargs) -> T:
        return work(*given, **more)

    call.__code__ = call.__code__.replace(co_stacksize=OWN)
    return call
