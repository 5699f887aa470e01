"""Notices that an engine hangs: it is silent for much longer than it ever was over a task of that size.

What it does before and behind the device says nothing until it is done: its silence is the time that it takes. While it
is set up, what it reads tells that it goes on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vidgen import errors
from vidgen.contracts import Work
from vidgen.engine import in_thread
from vidgen.turn import Phase

LOOK_S = 1.0
IO = Path("/proc/self/io")
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
        told = vars(work)  # for what is not there, pydantic would write an error's text first
        shape = (phase, *(told.get(name) for name in SHAPE))
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
        self._waits = False  # for a thread

    def heard(self, step: int) -> None:
        """The engine says that it is behind a step, or with step 0 that it begins again."""
        now = self._clock()
        self._longest, self._at = max(self._longest, now - self._at), now
        self._anew = self._anew or step < max(1, self._step)
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

    async def over_thread(self, work: Callable[..., T], *given: Any) -> T:
        """`over` what the engine makes in a thread, from when there is one: others, such as uploads, may have them."""
        self._waits = True

        def begun() -> T:
            self._at, self._waits = self._clock(), False
            return in_thread(work)(*given)

        return await self.over(asyncio.to_thread(begun))

    def _sign(self) -> float:
        """Of life: another one is one."""
        return self._clock() if self._waits else self._at

    async def over(self, work: Coroutine[Any, Any, T]) -> T:
        """What the engine makes; raises HungError where it is silent for too long, and leaves it to itself."""
        try:
            made = await _heard_over(work, self._sign, lambda: self.bears_s, self._look_s, self._clock)
        except _SilentError as exc:
            raise errors.HungError(
                f"the engine was silent for {exc.silent_s:.0f} s while {self._shape[0]}, behind step {self._step}: it "
                "hangs, or VIDGEN_HANG_* do not fit this model"
            ) from None
        self._longest = max(self._longest, self._clock() - self._at)
        if self._anew:  # what it took with less memory tells nothing of the next task
            return made
        self._known[self._shape] = max(self._longest, self._known.get(self._shape, 0.0))
        return made


async def over_setup(
    work: Coroutine[Any, Any, T], patience: Patience, *, look_s: float = LOOK_S,
    clock: Callable[[], float] = time.monotonic, read: Callable[[], int] | None = None,
) -> T:  # fmt: skip
    """What comes of loading an engine; raises HungError where it takes longer than `first_s` without reading anything.

    However slow a disk is, it is waited for. `read` gives the bytes that were read so far, by default this process's.
    """
    told = read or bytes_read
    bears_s = patience.first_s if patience.factor else float("inf")
    try:
        # In whole MiB: what the probes cost is no progress.
        return await _heard_over(work, lambda: told() >> 20, lambda: bears_s, look_s, clock)
    except _SilentError as exc:
        raise errors.HungError(
            f"the engine is not set up, and has read nothing for {exc.silent_s:.0f} s: it hangs, or "
            "VIDGEN_HANG_FIRST_S is too short for what this model does between its files and its first task",
            code="setup_hung",
        ) from None


def bytes_read() -> int:
    """The bytes that this process has read so far, from files or by their pages; 0 where the system does not say."""
    try:
        told = dict(line.split(": ") for line in IO.read_text().splitlines())
        return int(told["rchar"]) + int(told["read_bytes"])
    except (OSError, KeyError, ValueError):
        return 0


class _SilentError(Exception):
    def __init__(self, silent_s: float) -> None:
        self.silent_s = silent_s


async def _heard_over(
    work: Coroutine[Any, Any, T], heard: Callable[[], object], bears_s: Callable[[], float], look_s: float,
    clock: Callable[[], float],
) -> T:  # fmt: skip
    """Await; raises _SilentError where what is `heard` stays the same for longer than is borne, and lets go of it."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    before, hangs = task.cancelling(), False
    silent_s, looked_at, last = 0.0, clock(), heard()
    again = loop.call_later(look_s, lambda: look())

    def look() -> None:
        nonlocal hangs, silent_s, looked_at, last, again
        now, newest = clock(), heard()
        # A process that was stopped, engine and all, did not stay silent: a look counts as one, however late.
        silent_s = silent_s + min(now - looked_at, 2 * look_s) if last == newest else 0.0
        looked_at, last = now, newest
        if silent_s > bears_s():
            hangs = task.cancel()
        else:
            again = loop.call_later(look_s, look)

    try:
        return await work
    except asyncio.CancelledError:
        # As `asyncio.timeout` does it: where somebody else wants an end as well, it is that one's.
        if hangs and task.uncancel() <= before:
            raise _SilentError(silent_s) from None
        raise
    finally:
        again.cancel()
