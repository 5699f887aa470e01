"""Progress of one attempt: real steps, seconds per step and ETA, on `vidgen.progress.<job>`, at most five a second."""

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
from vidgen.eta import Pace, StepClock
from vidgen.eventlog import Claim
from vidgen.metrics import WorkerMetrics

Phase = Literal["preparing", "denoising", "finishing"]


class Reporter:
    """Tells where an attempt is. Nobody waits for it, and it may fail: progress is worth no retry."""

    def __init__(self, bus: Bus, held: Claim, metrics: WorkerMetrics, finishing_s: float) -> None:
        self._bus, self._held, self._metrics = bus, held, metrics
        self._finishing_s = finishing_s
        self._clock = StepClock(finishing_s=finishing_s)
        self._pace = Pace()
        self._step, self._steps = 0, held.task.work.steps
        self._sending: set[asyncio.Task[None]] = set()

    @property
    def seconds_per_step(self) -> float | None:
        return self._clock.seconds_per_step

    def phase(self, phase: Phase) -> None:
        """Say that a phase begins."""
        self._send(phase)

    def on_step(self, check: Callable[[], None]) -> OnStep:
        """What the engine calls after each step, in its own thread; `check` raises to end the attempt there."""
        loop, begun = asyncio.get_running_loop(), time.monotonic()
        self._clock = StepClock(begun, finishing_s=self._finishing_s)

        def stepped(step: int, steps: int) -> None:
            loop.call_soon_threadsafe(self._stepped, step, steps, time.monotonic())
            check()

        return stepped

    def _stepped(self, step: int, steps: int, at: float) -> None:
        seconds = self._clock.step(step, steps, at)
        self._step, self._steps = max(step, self._step), steps
        self._metrics.step(seconds, self._clock.seconds_per_step)
        if self._pace.allows(at, last=step >= steps):
            self._send("denoising")

    def _send(self, phase: Phase) -> None:
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
