"""How a task ends without a result: cancelled, handed back, failed, given up. First its event, then its ack or nak."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pydantic
import structlog

from vidgen import attempts, contracts, dead, errors, eventlog, tracing
from vidgen.bus import Bus, Delivery
from vidgen.contracts import Task
from vidgen.eventlog import Claim, FencedError
from vidgen.metrics import Outcome, WorkerMetrics
from vidgen.turn import SUSPENDING, Clocks, Stop
from vidgen.watchdog import Patience

log = structlog.get_logger(__name__)

SUBJECT = re.compile(r"vidgen\.tasks\.\w+\.(?P<lane>interactive|batch)\.(?:[a-z0-9-]+\.)?(?P<job>[^.]+)")
JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Policy:
    """What the runtime was told: limits, back-off and price."""

    worker_id: str
    stage: contracts.Stage
    ack_wait: float
    max_attempts: int = 3
    backoff_base: float = 1.0
    backoff_limit: float = 60.0
    gpu_usd_per_hour: float = 0.0
    work_dir: Path | None = None
    checkpoint_over_s: float | None = 20.0  # None: a task is never handed back in its middle
    hang: Patience = field(default_factory=Patience)


class Settlement:
    """Ends tasks of one worker; raises BusError where an end cannot be told, and then the task comes again."""

    def __init__(self, bus: Bus, metrics: WorkerMetrics, policy: Policy) -> None:
        self._bus, self._metrics, self._policy = bus, metrics, policy

    async def stopped(self, delivery: Delivery, held: Claim, stop: Stop, clocks: Clocks) -> Outcome:
        """End a task whose stop was asked for, as the reason wants it."""
        if stop.reason == "fenced":
            return "fenced"
        try:
            if stop.reason == "released" or stop.reason in SUSPENDING:
                return await self.release(delivery, held, clocks)
        except FencedError:
            return "fenced"
        except errors.Cancelled:
            pass
        return await self.cancelled(delivery, held, clocks, stop)

    async def cancelled(self, delivery: Delivery, held: Claim, clocks: Clocks, stop: Stop | None = None) -> Outcome:
        """Say that the task was cancelled and, where that stopped it, how long it took."""
        latency = None
        if stop is not None and stop.reason == "cancelled":
            heard = time.monotonic() - stop.since
            self._metrics.cancelled_after(heard)
            asked = (datetime.now(UTC) - stop.asked_at).total_seconds() if stop.asked_at else 0.0
            latency = max(heard, asked)  # the clocks of two machines may differ
        event = contracts.StageCancelled.model_validate(
            held.stamp() | self.spent(clocks) | {"cancel_latency_s": latency}
        )
        try:
            await held.append(event)
        except FencedError:
            return "fenced"
        await delivery.ack()
        return "cancelled"

    async def release(self, delivery: Delivery, held: Claim, clocks: Clocks) -> Outcome:
        """Hand a healthy task back at once; raises as `Claim.append` does."""
        # Not held against the task: the next attempt has the same number of tries.
        stamp = held.stamp() | held.carried() | {"tries": held.tries - 1}
        await held.append(contracts.StageReleased.model_validate(stamp | self.spent(clocks)))
        await delivery.nak()
        return "released"

    async def unfit(self, delivery: Delivery, held: Claim, clocks: Clocks, exc: errors.FatalError) -> Outcome:
        """Hand back what a worker holds that must leave: unharmed, but where engines hang it may be the task."""
        if isinstance(exc, errors.HungError) and not isinstance(exc, errors.SwitchHungError):
            return await self.fail(delivery, held, clocks, exc, retryable=True)
        try:
            return await self.release(delivery, held, clocks)
        except FencedError:
            return "fenced"
        except errors.Cancelled:
            return await self.cancelled(delivery, held, clocks)

    async def fail(
        self, delivery: Delivery, held: Claim, clocks: Clocks, exc: errors.VidgenError, *, retryable: bool
    ) -> Outcome:
        """Hand a task back for another try after a while; give it up where none is left or none would help."""
        task = held.task
        final = not retryable or held.tries >= self._policy.max_attempts
        wait = 0.0 if final else attempts.back_off(held.tries, self._policy.backoff_base, self._policy.backoff_limit)
        error = contracts.JobError(code=exc.code, message=exc.message, stage=task.stage, retryable=retryable)
        tracing.failed(exc.code)
        log.warning(exc.message, _event="task_failed", code=exc.code, final=final, retry_in_s=wait)
        event = contracts.StageFailed.model_validate(
            held.stamp() | self.spent(clocks) | {"error": error, "final": final, "retry_in_s": None if final else wait}
        )
        try:
            if final:
                await held.check()  # what a newer attempt holds is not to be given up
                await self._bury(delivery, error, task.job_id, f"{task.job_id}:{task.stage}:{task.run}:dead")
            await held.append(event)
        except FencedError:
            return "fenced"
        except errors.Cancelled:
            return await self.cancelled(delivery, held, clocks)
        if not final:
            await delivery.nak(wait)
            return "retried"
        await delivery.ack()
        return "dead" if retryable else "rejected"

    async def exhausted(self, delivery: Delivery, task: Task, verdict: attempts.Exhausted) -> Outcome:
        """Too many attempts ended without a word: the task kills its process, so it is not run again."""
        error = contracts.JobError(
            code="attempts_exhausted", stage=task.stage, retryable=True,
            message=f"{verdict.tries - 1} attempts ended without a word, as if the task had killed its worker: "
            "look at the workers' logs, then retry the job",
        )  # fmt: skip
        tracing.failed(error.code)
        await self._bury(delivery, error, task.job_id, f"{task.job_id}:{task.stage}:{task.run}:dead")
        await eventlog.give_up(self._bus, task, self._policy.worker_id, error)
        await delivery.ack()
        log.error(error.message, _event="attempts_exhausted")
        return "dead"

    async def unreadable(self, delivery: Delivery, exc: pydantic.ValidationError) -> Outcome:
        """A task of another version: its job ends all the same, and is named by the subject."""
        error = contracts.JobError(
            code="unreadable_task", stage=self._policy.stage, fields=contracts.field_errors(exc),
            message="the worker cannot read its task: run gateway and workers of one version, then retry the job",
        )  # fmt: skip
        tracing.failed(error.code)
        found = SUBJECT.fullmatch(delivery.subject)
        job_id = found["job"] if found and JOB_ID.fullmatch(found["job"]) else None
        try:
            await self._bury(delivery, error, job_id, f"unreadable:{delivery.seq}")
            if job_id is not None:
                run = await eventlog.current_run(self._bus, job_id)
                names: dict[str, Any] = {"job_id": job_id, "stage": self._policy.stage, "run": run}
                await eventlog.give_up(self._bus, Task.model_construct(**names), self._policy.worker_id, error)
            await delivery.ack()
            outcome: Outcome = "dead"
        except errors.VidgenError as fault:
            log.warning(fault.message, _event="settle_failed")
            outcome = "lost"
        lane: contracts.Lane = "batch" if found and found["lane"] == "batch" else "interactive"
        self._metrics.task_settled(lane, outcome)
        log.error(
            f"task {outcome}: it cannot be read", _event="task", outcome=outcome, lane=lane, job=job_id,
            stage=self._policy.stage, deliveries=delivery.num_delivered, code=error.code,
        )  # fmt: skip
        return outcome

    def spent(self, clocks: Clocks) -> dict[str, float]:
        """What an attempt has cost so far, as its last event says it."""
        return {"gpu_seconds": clocks.device, "cost_usd": clocks.device / 3600 * self._policy.gpu_usd_per_hour}

    async def _bury(self, delivery: Delivery, error: contracts.JobError, job_id: str | None, message_id: str) -> None:
        letter = dead.letter(delivery.body, delivery.subject, error, job_id=job_id, stage=self._policy.stage)
        await dead.publish(self._bus, letter, message_id=message_id)
        self._metrics.dead_lettered()
