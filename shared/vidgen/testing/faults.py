"""Faults that a test orders from a double: an outage, one failing call, an answer that got lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict, deque
from collections.abc import AsyncIterator
from typing import ClassVar

from vidgen import errors


class Faults:
    """Mixed into a double. `METHODS` are the names that `fail_next` takes."""

    METHODS: ClassVar[frozenset[str]]
    OUTAGE: ClassVar[type[errors.RetryableError]]

    def __init__(self) -> None:
        self._down = False
        self._ordered: dict[str, deque[tuple[Exception, bool]]] = defaultdict(deque)
        self.calls: dict[str, int] = defaultdict(int)

    @property
    def down(self) -> bool:
        """While True every call fails as it would in an outage; what is stored stays."""
        return self._down

    @down.setter
    def down(self, value: bool) -> None:
        self._down = value

    def fail_next(self, method: str, error: Exception | None = None, *, times: int = 1, after: bool = False) -> None:
        """The next `times` calls of `method` raise `error` (the seam's outage error by default).

        With `after` the call does its work first: what the caller sees when an answer is lost on the way.
        """
        if method not in self.METHODS:
            raise ValueError(f"no method {method!r} to fail: use one of {', '.join(sorted(self.METHODS))}")
        self._ordered[method].extend([(error or self._outage(), after)] * times)

    def _outage(self) -> Exception:
        return self.OUTAGE("the double was told to fail")

    @contextlib.asynccontextmanager
    async def call(self, method: str) -> AsyncIterator[None]:
        self.calls[method] += 1
        await asyncio.sleep(0)  # as a real call would, let others run
        if self._down:
            raise self._outage()
        fault = self._ordered[method].popleft() if self._ordered[method] else None
        if fault is not None and not fault[1]:
            raise fault[0]
        yield
        if fault is not None:
            raise fault[0]
