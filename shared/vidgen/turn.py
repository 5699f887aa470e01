"""A task's way through the runtime: its place at the device, how it is stopped, and what each phase took."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, get_args

from vidgen import errors, tracing
from vidgen.contracts import Timings
from vidgen.device import Device

Phase = Literal["preparing", "generating", "finishing"]
Reason = Literal["cancelled", "fenced", "released", "drained", "preempted"]
# What hands a task back with its state; a cancel or a newer attempt may still come over it.
SUSPENDING: tuple[Reason, ...] = ("drained", "preempted")
UNWANTED: tuple[Reason, ...] = ("cancelled", "fenced")  # nobody waits for a result from here any more
REASONS: tuple[Reason, ...] = get_args(Reason)


@dataclass
class Stop:
    """Why a running task is to end early; read by the engine's thread at each step.

    Where it is drained or preempted an engine that is Resumable leaves its state, for the next attempt. `wake` is
    called where something waits that is to be woken for it.
    """

    reason: Reason | None = None
    since: float = 0.0
    asked_at: datetime | None = None
    raised: asyncio.Event = field(default_factory=asyncio.Event)
    wake: Callable[[], object] | None = None

    def now(self, reason: Reason, asked_at: datetime | None = None) -> None:
        """Ask for the end; the first reason stays, unless it is one to leave later. `asked_at`: when it was wished."""
        if self.reason is None or (self.reason in SUSPENDING and reason not in SUSPENDING):
            self.since, self.asked_at = time.monotonic(), asked_at
            self.reason = reason
            self.raised.set()
            if self.wake is not None:
                self.wake()

    def check(self) -> None:
        """Raise Cancelled if the end was asked for."""
        if self.reason is not None:
            raise errors.Cancelled

    def check_step(self, step: int, steps: int) -> None:
        """Raise after a step if the end was asked for: Suspended where the state is wanted, else Cancelled."""
        if self.reason not in SUSPENDING:
            self.check()
        elif step < steps:  # behind the last step finishing is quicker
            raise errors.Suspended(step, steps)


@dataclass(eq=False)  # a turn is itself: kept in sets
class Turn:
    """A task's way through the runtime: it waits for the device, and says when the next task may be prepared.

    `look` asks for a look at the job's log now: somebody says that the job was cancelled.
    """

    device: Device
    stop: Stop = field(default_factory=Stop)
    look: asyncio.Event = field(default_factory=asyncio.Event)
    phase: Phase = "preparing"
    preempted: int = 0
    sure_at: float = 0.0  # when the task was known to be held here, by the loop's clock
    alone: bool = False  # no other task is to begin in this process before it has left
    fatal: errors.FatalError | None = None  # why this worker must leave
    _frees_at: float | None = None

    def frees_in(self, seconds: float) -> None:
        """The device is likely to be free in `seconds`; told anew with each step."""
        self._frees_at = asyncio.get_running_loop().time() + seconds

    @property
    def left_s(self) -> float | None:
        """Seconds until the device is likely to be free, None while nobody knows."""
        return None if self._frees_at is None else max(0.0, self._frees_at - asyncio.get_running_loop().time())

    def enters(self, phase: Phase) -> None:
        """The task is on."""
        self.phase = phase

    def ends(self) -> None:
        """The device is free."""

    def lost(self) -> None:
        """The device is lost: no task should be taken for it any more, not even this one, which is handed back."""


@dataclass
class Clocks:
    """Seconds per phase of one attempt; each phase is a span as well, of the same begin and end."""

    queued: float = 0.0
    prepare: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    encode: float = 0.0
    store: float = 0.0
    device: float = 0.0
    # Read once: what is set on the machine's clock meanwhile makes no phase longer, and none leaves the one around it.
    _epoch: float = field(default_factory=lambda: time.time() - time.monotonic())

    def now(self) -> float:
        """Seconds since the epoch, on this attempt's own clock."""
        return self._epoch + time.monotonic()

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        # One reading for both: a busy machine may stop the thread between two, for as long as a phase takes.
        lap = tracing.Lap(self.now())
        with tracing.timed(phase, lap):
            try:
                yield
            finally:
                lap.ended = self.now()
                setattr(self, phase, getattr(self, phase) + lap.ended - lap.begun)

    def timings(self) -> Timings:
        return Timings(
            queued=self.queued, prepare=self.prepare, denoise=self.denoise, decode=self.decode,
            encode=self.encode, store=self.store,
        )  # fmt: skip
