"""Notices that an engine hangs: it is silent for much longer than it ever was over a task of that size.

What it does before and behind the device says nothing until it is done: its silence is the time that it takes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from vidgen import errors
from vidgen.contracts import Work
from vidgen.turn import Phase

LOOK_S = 1.0
SHAPE = ("kind", "width", "height", "num_frames", "candidates")

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long an engine may be silent: `factor` times the longest silence known, at least `least_s`.

    `first_s` where none is known, and where it begins again with less memory. With `factor` 0 for ever.
    """

    factor: float = 10.0
    least_s: float = 60.0
    first_s: float = 900.0


class Watchdog:
    """Watches one engine, and keeps in mind how silent it was over tasks of each size, in each of its phases."""

    def __init__(
        self, patience: Patience, *, look_s: float = LOOK_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._patience, self._look_s, self._clock = patience, look_s, clock
        self._known: dict[tuple[object, ...], float] = {}

    def watch(self, work: Work, phase: Phase = "generating") -> Watch:
        """A watch over one phase of a task."""
        shape = (phase, *(getattr(work, name, None) for name in SHAPE))
        return Watch(self._patience, self._known, shape, self._look_s, self._clock)


class Watch:
    """Over one phase of a task; `heard` is called in the engine's thread."""

    def __init__(
        self, patience: Patience, known: dict[tuple[object, ...], float], shape: tuple[object, ...], look_s: float,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._patience, self._known, self._shape = patience, known, shape
        self._look_s, self._clock = look_s, clock
        self._at, self._longest, self._step = clock(), 0.0, 0
        self._anew = False

    def heard(self, step: int) -> None:
        """The engine says that it is behind a step."""
        now = self._clock()
        self._longest, self._at = max(self._longest, now - self._at), now
        self._anew = self._anew or step < self._step
        self._step = step

    @property
    def bears_s(self) -> float:
        """Seconds of silence that are borne now."""
        known = self._known.get(self._shape)
        if self._patience.factor == 0:
            return float("inf")
        if known is None or self._anew:
            return max(self._patience.first_s, self._patience.least_s)
        return max(self._patience.least_s, self._patience.factor * known)

    async def over(self, work: Coroutine[Any, Any, T]) -> T:
        """What the engine makes; raises HungError where it is silent for too long, and leaves it to itself."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        before, hangs = task.cancelling(), False
        silent_s, looked_at, seen_at = 0.0, self._clock(), self._at
        again = loop.call_later(self._look_s, lambda: look())

        def look() -> None:
            nonlocal hangs, silent_s, looked_at, seen_at, again
            now = self._clock()
            # A process that was stopped, engine and all, did not stay silent: a look counts as one, however late.
            silent_s = silent_s + min(now - looked_at, 2 * self._look_s) if seen_at == self._at else 0.0
            looked_at, seen_at = now, self._at
            if silent_s > self.bears_s:
                hangs = task.cancel()
            else:
                again = loop.call_later(self._look_s, look)

        try:
            made = await work
        except asyncio.CancelledError:
            # As `asyncio.timeout` does it: where somebody else wants an end as well, it is that one's.
            if hangs and task.uncancel() <= before:
                raise errors.HungError(
                    f"the engine was silent for {silent_s:.0f} s while {self._shape[0]}, behind step {self._step}: it "
                    "hangs, or VIDGEN_HANG_* do not fit this model"
                ) from None
            raise
        finally:
            again.cancel()
        self.heard(self._step)
        self._known[self._shape] = max(self._longest, self._known.get(self._shape, 0.0))
        return made
