"""One attempt's hold on its job's log: claim a task, append what happens, learn at once of a newer attempt."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

import pydantic

from vidgen import attempts, contracts, errors, topology
from vidgen.bus import Bus, Stored
from vidgen.contracts import Event, Task

CLAIM_TRIES = 10
ANY_TRIES = 1 << 30
AT_IT = b"at it"  # what a worker answers who is asked for a job of which it has the task


class FencedError(errors.VidgenError):
    """A newer attempt holds this task."""

    code = "fenced"


class UnreadableError(errors.RetryableError):
    """The newest event of a job is of another version."""

    code = "unreadable_event"


@dataclass(frozen=True)
class Newest:
    """The newest event of a job, and where it stands in the log (0: there is none)."""

    event: contracts.AnyEvent | None
    seq: int


async def newest(bus: Bus, job_id: str, run: int = 0) -> Newest:
    """The newest event of a job that is of this run or a later one, and where its newest of all stands in the log.

    The end of a run is told when it is on record, and that may be after a retry was asked for and begun. Raises
    BusError and UnreadableError.
    """
    stored = await bus.last(topology.EVENTS, topology.subject_of_events(job_id))
    if stored is None:
        return Newest(None, 0)
    event = _event(job_id, stored)
    if event.run >= run:
        return Newest(event, stored.seq)
    found = None
    async for older in _log(bus, job_id, stored.seq):
        event = _event(job_id, older)
        found = event if event.run >= run else found
    return Newest(found, stored.seq)


async def _log(bus: Bus, job_id: str, before: int) -> AsyncIterator[Stored]:
    """A job's messages, oldest first, one by one: to ask for more of the log at once is no worker's right."""
    subject = topology.subject_of_events(job_id)
    stored = await bus.first(topology.EVENTS, subject)
    while stored is not None and stored.seq < before:
        yield stored
        stored = await bus.first(topology.EVENTS, subject, stored.seq)


def _event(job_id: str, stored: Stored) -> contracts.AnyEvent:
    try:
        return Event.validate_json(stored.body)
    except pydantic.ValidationError as exc:
        raise UnreadableError(
            f"the newest event of job {job_id} cannot be read: run gateway and workers of one version"
        ) from exc


async def current_run(bus: Bus, job_id: str) -> int:
    """The run that a job is in, which its newest event need not be of; raises as `newest` does."""
    seen = await newest(bus, job_id)
    run = seen.event.run if seen.event else 1
    async for older in _log(bus, job_id, seen.seq):
        with contextlib.suppress(UnreadableError):
            run = max(run, _event(job_id, older).run)
    return run


@dataclass
class Claim:
    """A task that this worker holds until somebody else appends to the job's log."""

    bus: Bus
    task: Task
    attempt: int
    tries: int
    worker: str
    seq: int
    checkpoint: contracts.Checkpoint | None = None
    preempted: int = 0
    alone: bool = False
    first: bool = False  # nobody has begun this run before, as the log proves
    started_at: datetime | None = None
    nonce: str = field(default_factory=lambda: f"{random.getrandbits(32):08x}")

    def stamp(self) -> dict[str, object]:
        """What every event of this attempt says."""
        return {
            "job_id": self.task.job_id, "run": self.task.run, "stage": self.task.stage, "attempt": self.attempt,
            "tries": self.tries, "worker": self.worker, "alone": self.alone, "at": datetime.now(UTC),
            "started_at": self.started_at,
        }  # fmt: skip

    def carried(self) -> dict[str, object]:
        """What goes from one attempt to the next."""
        return {"checkpoint": self.checkpoint, "preempted": self.preempted}

    def message_id(self, what: str) -> str:
        """Names one event of this attempt, of this process: two workers never share one."""
        return f"{self.task.job_id}:{self.task.stage}:{self.task.run}:{self.attempt}:{self.nonce}:{what}"

    async def append(self, event: contracts.AnyStageEvent) -> None:
        """Append an event of this attempt; raises FencedError, Cancelled (not for `stage_cancelled`) and BusError."""
        while True:
            try:
                self.seq = await self.bus.publish(
                    topology.subject_of_events(self.task.job_id), event.to_bytes(), expect_last=self.seq,
                    message_id=self.message_id(event.type),
                )  # fmt: skip
                return
            except errors.ConflictError:
                await self.check(stopping=isinstance(event, contracts.StageCancelled))

    async def check(self, *, stopping: bool = False) -> None:
        """Look at the log; raises FencedError or, unless `stopping`, Cancelled when this attempt must end."""
        seen = await newest(self.bus, self.task.job_id, self.task.run)
        standing = attempts.standing(self.task, self.attempt, seen.event)
        if standing == "fenced":
            raise FencedError
        if standing == "cancelled" and not stopping:
            raise errors.Cancelled
        self.seq = seen.seq


async def outlook(
    bus: Bus, task: Task, worker: str, max_attempts: int, deliveries: int
) -> Literal["free", "alone", "elsewhere"]:
    """Whether a task that was just taken runs at another worker, or must be alone in its process; as `newest` raises.

    A lease may have run out under a worker that is well: the bus counts it by its clock, which may step, and knows
    nothing of renewals that it did not hear. So whoever began the task is asked.
    """
    event = (await newest(bus, task.job_id, task.run)).event
    verdict = attempts.judge(task, event, max_attempts)
    if isinstance(verdict, attempts.Drop):
        return "free"
    if verdict.attempt > 1 and await _is_elsewhere(bus, event, worker, deliveries):
        return "elsewhere"
    return "alone" if verdict.alone else "free"


async def _is_elsewhere(bus: Bus, newest: contracts.AnyEvent | None, worker: str, deliveries: int) -> bool:
    """Whether another worker has it: at a first delivery the log is believed, at a later one that worker is asked.

    A bus that was killed may forget that it gave a task away, and gives it for the first time once more: behind its
    start, when who has it may not be back yet to be asked. What that worker says of it, by the message, settles it here
    as well; if it has died, the lease runs out or the gateway hands the task out again: for the second time.
    """
    if not isinstance(newest, contracts.StageStarted) or newest.worker == worker:
        return False
    subject = topology.subject_of_worker(newest.stage, newest.worker)
    return deliveries == 1 or await bus.ask(subject, newest.job_id.encode()) == AT_IT


async def claim(
    bus: Bus, task: Task, worker: str, max_attempts: int, *, engine: str, model: str, deliveries: int,
    alone: bool = False, queued_at_seq: int | None = None,
) -> Claim | attempts.Drop | attempts.Exhausted | attempts.Leave:  # fmt: skip
    """Start an attempt, or learn that there is none to start. Two workers with the same task: one of them wins.

    The start is in the log before this returns, so a task that kills its process is counted all the same.
    `alone` says whether it is so in its process, as `outlook` wished. `queued_at_seq` is where the log stood when
    the task was queued: if it stands there still, nobody has begun.
    """
    for number in range(CLAIM_TRIES):
        known = queued_at_seq or None if number == 0 else None
        seen = Newest(None, known) if known else await newest(bus, task.job_id, task.run)
        verdict = attempts.judge(task, seen.event, max_attempts)
        if isinstance(verdict, attempts.Drop):
            return verdict
        # First of all: its last try may be the one that is under way. Once more, though `outlook` looked: since then
        # this one may have waited to be alone, and another may have begun.
        if verdict.attempt > 1 and await _is_elsewhere(bus, seen.event, worker, deliveries):
            return attempts.Leave()
        if isinstance(verdict, attempts.Exhausted):
            return verdict
        held = Claim(
            bus, task, verdict.attempt, verdict.tries, worker, seen.seq, verdict.checkpoint, verdict.preempted, alone,
            first=known is not None,
        )  # fmt: skip
        queued = (datetime.now(UTC) - task.queued_at).total_seconds()
        started = contracts.StageStarted.model_validate(
            held.stamp() | held.carried()
            | {"engine": engine, "model": model, "queued_s": max(0.0, queued), "deliveries": deliveries}
        )  # fmt: skip
        try:
            held.seq = await bus.publish(
                topology.subject_of_events(task.job_id), started.to_bytes(), expect_last=seen.seq,
                message_id=held.message_id(started.type),
            )  # fmt: skip
        except errors.ConflictError:
            continue
        held.started_at = started.at
        return held
    raise errors.BusError(f"the log of job {task.job_id} is being written by too many at once")


async def give_up(bus: Bus, task: Task, worker: str, error: contracts.JobError) -> None:
    """Append the final failure of a task that is not run, unless its log has come to an end meanwhile."""
    while True:
        seen = await newest(bus, task.job_id, task.run)
        verdict = attempts.judge(task, seen.event, ANY_TRIES)
        if isinstance(verdict, attempts.Drop):
            return
        held = Claim(bus, task, verdict.attempt, verdict.tries - 1, worker, seen.seq)
        failed = contracts.StageFailed.model_validate(held.stamp() | {"error": error, "final": True})
        try:
            await bus.publish(
                topology.subject_of_events(task.job_id), failed.to_bytes(), expect_last=seen.seq,
                message_id=held.message_id(failed.type),
            )  # fmt: skip
        except errors.ConflictError:
            continue
        return
