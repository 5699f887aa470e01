"""Ends jobs whose deadline passes while they wait: for a worker, for their turn, for a review.

What a worker is at, it ends itself at the next step; where it has died, its job waits as well. Deadlines are kept in
mind by the gateway that wrote the record last; those of tasks are looked up in their queues as well, at the start and
now and then, for a gateway may have died. As often each is looked at, for another gateway may have ended its job.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import pydantic
import structlog

from gateway import pipeline
from gateway.share import withdraw
from vidgen import attempts, contracts, dead, errors, eventlog, topology, tracing
from vidgen.bus import Bus, each
from vidgen.contracts import Job, StageRecord, StageState

if TYPE_CHECKING:
    from gateway.jobs import Jobs

log = structlog.get_logger(__name__)

SLACK = timedelta(seconds=2)  # behind the deadline: whoever is at the task says so himself
AGAIN = timedelta(seconds=30)  # between two looks at one that a worker is at, who may die: nobody may come after him
SWEEP_S = 600.0
ANYWAY = timedelta(seconds=SWEEP_S)  # until a job is looked at that is not due: of an end by another nobody tells
ENDED = 1000  # deadlines of jobs that have ended which may be kept in mind


class Due:
    """The deadlines of jobs, the next one first. Pure."""

    def __init__(self) -> None:
        self._next: list[tuple[datetime, str]] = []
        self._known: dict[str, datetime] = {}
        self.changed = asyncio.Event()

    def note(self, job: Job, now: datetime) -> None:
        """Take in a job as it is now."""
        if job.deadline_at is None:
            return
        if job.status.final:
            self._known.pop(job.id, None)
            self._tidy()
        else:
            self.at(job.id, _turn(job.deadline_at, now))

    def at(self, job_id: str, when: datetime) -> None:
        """Look at a job then."""
        if self._known.get(job_id) != when:
            self._known[job_id] = when
            heapq.heappush(self._next, (when, job_id))
            self.changed.set()

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._known

    def wait_s(self, now: datetime) -> float | None:
        """Seconds until the next job is due, None where there is none."""
        while self._next and self._known.get(self._next[0][1]) != self._next[0][0]:
            heapq.heappop(self._next)  # it ended, or was given more time
        return max(0.0, (self._next[0][0] - now).total_seconds()) if self._next else None

    def take(self, now: datetime) -> list[str]:
        """The jobs that are due; they are forgotten."""
        found = []
        while self.wait_s(now) == 0.0:
            _, job_id = heapq.heappop(self._next)
            del self._known[job_id]
            found.append(job_id)
        return found

    def _tidy(self) -> None:
        # Of a million jobs that end long before their deadlines not all are to be kept in mind until then.
        if len(self._next) > 2 * len(self._known) + ENDED:
            self._next = [(when, job_id) for job_id, when in self._known.items()]
            heapq.heapify(self._next)


def _turn(deadline_at: datetime, now: datetime) -> datetime:
    return min(deadline_at + SLACK, now + ANYWAY)


class Deadlines:
    """Gives up what is due. Each gateway does; what is done twice does no harm."""

    def __init__(self, bus: Bus, jobs: Jobs, clock: Callable[[], datetime]) -> None:
        self._bus, self._jobs, self._due, self._clock = bus, jobs, jobs.due, clock
        self._missed: set[str] = set()  # jobs that were begun, and that nobody was at when they were looked at

    async def run(self, stop: asyncio.Event) -> None:
        """Look until `stop`."""
        time = asyncio.get_running_loop().time
        stopping, sweep_at = asyncio.ensure_future(stop.wait()), time()
        try:
            while not stop.is_set():
                if time() >= sweep_at:
                    sweep_at = time() + SWEEP_S
                    await self.sweep()
                await self.look()
                self._due.changed.clear()
                due = self._due.wait_s(self._clock())
                wait = sweep_at - time() if due is None else min(due, sweep_at - time())
                changed = asyncio.ensure_future(self._due.changed.wait())
                try:
                    await asyncio.wait((changed, stopping), timeout=wait, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    changed.cancel()
        finally:
            stopping.cancel()

    async def sweep(self) -> None:
        """Take in the tasks that wait: another gateway let them in, or this one before it was started again."""
        try:
            for stream in (topology.TASKS, topology.HELD):
                async for message in each(self._bus, stream):
                    self._take_in(message.body)
        except errors.BusError as exc:
            log.warning(exc.message, _event="deadlines_unknown")

    def _take_in(self, body: bytes) -> None:
        try:
            task = contracts.Task.model_validate_json(body)
        except pydantic.ValidationError:  # of another version: its worker says so
            return
        if task.deadline_at is not None and task.job_id not in self._due:
            self._due.at(task.job_id, _turn(task.deadline_at, self._clock()))

    async def look(self) -> None:
        """End what is due and waits."""
        for job_id in self._due.take(self._clock()):
            try:
                await self._look_after(job_id)
            except errors.RetryableError as exc:
                log.warning(exc.message, _event="deadline_unknown", job=job_id)
                self._due.at(job_id, self._clock() + AGAIN)
            except Exception:  # a record of another version, say: one job must never stop the others
                log.exception("a deadline could not be looked after", _event="deadline_undigested", job=job_id)
        self._missed = {job_id for job_id in self._missed if job_id in self._due}  # the others ended meanwhile

    async def _look_after(self, job_id: str) -> None:
        missed = job_id in self._missed
        self._missed.discard(job_id)  # in a row, or not at all
        job = await self._jobs.find(job_id)
        if job is None or job.status.final or job.deadline_at is None:
            return
        if job.deadline_at + SLACK > self._clock():
            self._due.note(job, self._clock())
            return
        record = job.stage_record(job.stage) if job.stage is not None else None
        if record is None or (record.state is StageState.RUNNING and not await self._left(job, record, missed)):
            self._due.at(job_id, self._clock() + AGAIN)
            return
        task = pipeline.task_of(job, record)
        newest = await eventlog.newest(self._bus, job_id, task.run)
        if isinstance(attempts.judge(task, newest.event, eventlog.ANY_TRIES), attempts.Drop):
            # It ended, and its record does not know yet: no letter of it. What is due then is looked at again.
            self._due.at(job_id, self._clock() + AGAIN)
            return
        of = await self._jobs.trace_of(job_id)
        with tracing.span("give up", of=of, job_id=job_id, stage=record.stage, run=job.run):
            tracing.failed(errors.DeadlineError.code)
            await self._give_up(task)

    async def _left(self, job: Job, record: StageRecord, missed: bool) -> bool:
        """Whether nobody is at what was begun, twice in a row: once may be a reconnection, or the moment of its end."""
        worker = topology.subject_of_worker(record.stage, record.worker or "")
        if await self._bus.ask(worker, job.id.encode()) == eventlog.AT_IT:
            return False
        if not missed:
            self._missed.add(job.id)
        return missed

    async def _give_up(self, task: contracts.Task) -> None:
        """Fail the stage that is due, as a worker would that took its task now."""
        why = errors.DeadlineError()
        error = contracts.JobError(code=why.code, message=why.message, stage=task.stage)
        where = task.stage, task.lane, task.job_id, task.tenant
        letter = dead.letter(
            task.to_bytes(), topology.subject_of_task(*where), error, job_id=task.job_id, stage=task.stage
        )
        # The letter first: behind the event the job has ended, and nobody would look at it again.
        await dead.publish(self._bus, letter, message_id=f"{task.job_id}:{task.stage}:{task.run}:dead")
        await eventlog.give_up(self._bus, task, "gateway", error)
        # What is held first, as in a cancel: it is in the queue before it is no longer held.
        await withdraw(self._bus, topology.HELD, topology.subject_of_held(*where), task.run)
        await withdraw(self._bus, topology.TASKS, topology.subject_of_task(*where), task.run)
        self._jobs.share.freed(task.stage, task.lane, task.tenant)
        log.info("its deadline passed while it waited", _event="deadline_passed", job=task.job_id, stage=task.stage)
