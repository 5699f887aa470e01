"""Progress of one attempt: real steps, seconds per step and ETA, on `vidgen.progress.<job>`, at most five a second.

Nothing is told of an attempt that is over before anybody could have read it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal

from vidgen import contracts, errors, topology
from vidgen.bus import Bus
from vidgen.engine import OnStep
from vidgen.eta import PROGRESS_PER_SECOND, Pace, StepClock
from vidgen.eventlog import Claim
from vidgen.metrics import WorkerMetrics

Phase = Literal["preparing", "denoising", "finishing"]
Stepped = Callable[[float, float | None], None]

SOON_S = 1 / PROGRESS_PER_SECOND  # what an attempt is on by then is the first that is told


class Reporter:
    """Tells where an attempt is. Nobody waits for it, and it may fail: progress is worth no retry."""

    def __init__(self, bus: Bus, held: Claim, metrics: WorkerMetrics, finishing_s: float) -> None:
        self._bus, self._held, self._metrics = bus, held, metrics
        self._finishing_s = finishing_s
        self._clock = StepClock(finishing_s=finishing_s)
        self._pace = Pace()
        self._step, self._steps = 0, held.task.work.steps
        self._begun = self._counted_to = time.monotonic()
        self._sending: set[asyncio.Task[None]] = set()
        self._phase: Phase = "preparing"
        self._tells = False
        self._begins = asyncio.get_running_loop().call_later(SOON_S, self._begin)

    @property
    def seconds_per_step(self) -> float | None:
        return self._clock.seconds_per_step

    @property
    def counted_s(self) -> float:
        """Seconds of generating that `stepped` was told of so far."""
        return self._counted_to - self._begun

    def phase(self, phase: Phase) -> None:
        """Say that a phase begins."""
        self._send(phase)

    def close(self) -> None:
        """Say no more: the attempt is over, though its engine may still be at a step."""
        self._begins.cancel()
        self._tells = False

    def _begin(self) -> None:
        self._tells = True
        self._send(self._phase)

    def on_step(self, check: OnStep, stepped: Stepped, done: int = 0) -> OnStep:
        """What the engine calls after each step, in its own thread; `check` raises to end the attempt there.

        `stepped` hears, in the event loop, of the seconds since it was last told and of those left to the last step.
        An engine that goes on where another one stopped begins behind step `done`.
        """
        loop = asyncio.get_running_loop()
        self._begun = self._counted_to = time.monotonic()
        self._clock = StepClock(self._begun, finishing_s=self._finishing_s, done=done)
        self._step = done

        def on_step(step: int, steps: int) -> None:
            at = time.monotonic()
            try:
                check(step, steps)
            finally:  # behind it: what follows from this step's duration holds from the next one on
                loop.call_soon_threadsafe(self._stepped, step, steps, at, stepped)

        return on_step

    def _stepped(self, step: int, steps: int, at: float, stepped: Stepped) -> None:
        step = min(step, steps)
        if step < 1 or (step, steps) == (self._step, self._steps):  # an engine that lies, or says a step twice
            return
        if step <= self._step:  # one that begins again: what it knew of its steps was of another way to run them
            self._clock = StepClock(at, finishing_s=self._finishing_s, done=step)
        seconds = self._clock.step(step, steps, at)
        self._step, self._steps = step, steps
        self._metrics.step(seconds, self._clock.seconds_per_step)
        eta_s = self._clock.eta_s()
        stepped(at - self._counted_to, None if eta_s is None else eta_s - self._finishing_s)
        self._counted_to = at
        if not self._tells or self._pace.allows(at, last=step >= steps):
            self._send("denoising")

    def _send(self, phase: Phase) -> None:
        self._phase = phase
        if not self._tells:
            return
        task = self._held.task
        now = time.monotonic()
        per_step = self._clock.seconds_per_step
        progress = contracts.Progress(
            job_id=task.job_id, stage=task.stage, run=task.run, attempt=self._held.attempt, phase=phase,
            step=self._step, steps=self._steps, seconds_per_step=per_step,
            eta_s=self._finishing_s if phase == "finishing" else self._clock.eta_s(now),
            worker=self._held.worker, at=datetime.now(UTC),
        )  # fmt: skip
        sending = asyncio.ensure_future(self._signal(progress))
        self._sending.add(sending)
        sending.add_done_callback(self._sending.discard)

    async def _signal(self, progress: contracts.Progress) -> None:
        with contextlib.suppress(errors.BusError):
            await self._bus.signal(topology.subject_of_progress(progress.job_id), progress.to_bytes())
