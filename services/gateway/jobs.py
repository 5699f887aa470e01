"""The job records: read, list, and move on by compare-and-set; carries out what the pipeline demands of the bus."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

import pydantic
import structlog

from gateway import pipeline
from gateway.deadlines import Due
from gateway.share import FairShare, withdraw
from vidgen import contracts, errors, topology, tracing
from vidgen.bus import Bus
from vidgen.contracts import Event, Job, JobStatus, StageState
from vidgen.tenants import Tenants

log = structlog.get_logger(__name__)

MOVING = (JobStatus.QUEUED, JobStatus.IN_PROGRESS)
CAS_TRIES = 20
REMEMBERED = 1000  # records that a replica keeps in mind of jobs that have not ended, 9 KB each
SCAN_LIMIT = 2000  # records that one page of a filtered list may look at
WEBHOOKS_ANYWAY = 100  # of a tenant that may wait however full their stream is; of the largest they are 25 MB
BEHIND_S = 4.0  # how long a record that is behind its log is waited for: less than a gateway that leaves gives HTTP
LOOK_S = 0.05  # between two looks at such a record: whichever replica writes it, nobody is told


class JobNotFoundError(errors.NotFoundError):
    """There is no such job."""

    code = "job_not_found"


def no_such_job(job_id: str) -> JobNotFoundError:
    """The same words for a job that is not there and for one that is another tenant's."""
    return JobNotFoundError(f"there is no job {job_id}: it never was, or its record has expired")


class JobIdTakenError(errors.ConflictError):
    """The id is that of another tenant's job."""

    code = "job_id_taken"

    def __init__(self, job_id: str, why: str = "is taken") -> None:
        super().__init__(f"the id {job_id} {why}: choose another one, or send none")


class NotPossibleError(errors.ConflictError):
    """The job's state does not allow that."""

    code = "not_possible"


class BehindError(NotPossibleError):
    """By its log the job will allow that; its record does not know of it yet."""

    code = "record_behind"


@dataclass(frozen=True)
class JobPage:
    """Jobs, newest first, and where the next page starts; how many were looked at for it."""

    jobs: tuple[Job, ...]
    next_cursor: str | None
    looked_at: int


@dataclass(frozen=True)
class Applied:
    """A job after an event, and whether the event changed it."""

    job: Job
    changed: bool


def now() -> datetime:
    return datetime.now(UTC)


class Jobs:
    """The records of all jobs, on the bus; any number of gateways may share them."""

    def __init__(self, bus: Bus, share: FairShare | None = None, looks: Bus | None = None) -> None:
        """`looks` is the bus for those who only want to know: on a connection of its own, nothing is in their way."""
        self._bus, self._looks = bus, looks or bus
        self.share = share or FairShare(bus, Tenants(bus), waiting=0)
        self._records = bus.records(topology.JOBS_BUCKET)
        self.due = Due()
        # What this replica wrote or read last, and at which revision, with the start of a task that has come since.
        # Another may have written since: only a write that succeeds proves that it was the newest.
        self._written: OrderedDict[str, tuple[Job, int]] = OrderedDict()

    async def ready(self) -> bool:
        """Whether the bus can be reached, by each of its connections."""
        return all(await asyncio.gather(*(bus.ready() for bus in {self._bus, self._looks})))

    async def find(self, job_id: str) -> Job | None:
        """A job as its record and its log tell, without the progress of the moment."""
        job = await self._look(job_id)
        if job is None or job.status not in MOVING:
            return job  # its log cannot tell more
        return _with_start(job, await self._newest_event(job_id))

    async def get(self, job_id: str) -> Job:
        """A job with its newest progress; raises JobNotFoundError."""
        # Both at once, for on a busy machine it is the way there and back that takes long. An event that is older than
        # the record changes nothing: a fold does not mind the order.
        log_read = asyncio.create_task(self._newest_event(job_id))
        try:
            job = await self._look(job_id)
            if job is None:
                raise no_such_job(job_id)
            if job.status in MOVING:
                job = _with_start(job, await log_read)
        finally:
            if not log_read.cancel():
                log_read.exception()  # it came to an end unasked: how does not matter
        stage = job.stage_record(job.stage) if job.stage and job.status is JobStatus.IN_PROGRESS else None
        if stage is None or stage.state is not StageState.RUNNING:
            return job  # nobody is at what is due, so nobody tells how far it is
        progress = await self._newest_progress(job_id)
        # What an attempt told that has handed its task back is no news of the one that will go on.
        told = (progress.stage, progress.run, progress.attempt) if progress is not None else None
        current = told == (job.stage, job.run, stage.attempt)
        return job.model_copy(update={"progress": progress}) if current else job

    async def as_told(self, job_id: str) -> Job:
        """A job by its record and the newest event of its log, which who follows it may have heard of before.

        Raises JobNotFoundError.
        """
        # The event first: what came before it is in a record that is read behind it.
        event = await self._newest_event(job_id)
        job = await self._look(job_id)
        if job is None:
            raise no_such_job(job_id)
        return job if event is None else pipeline.fold(job, event)

    async def caught_up(self, job: Job, allows: Callable[[Job], bool]) -> Job:
        """A job whose record allows something, once it does, where the newest event of its log says that it will.

        Who follows a job asks as soon as the log tells, and a busy gateway has not written the record by then. The job
        as it is where the log does not say so either; raises JobNotFoundError, and BehindError after a few seconds.
        """
        clock = asyncio.get_running_loop().time
        until = clock() + BEHIND_S
        while not allows(job):
            # The event first: a record that is read behind it, and knows of it and of more, is told as it is.
            event = await self._newest_event(job.id)
            job = await self.get(job.id)
            if allows(job) or event is None or not allows(pipeline.fold(job, event)):
                break
            if clock() >= until:
                raise BehindError(f"job {job.id} will allow that, but its record is behind its log: ask again soon")
            await asyncio.sleep(LOOK_S)
        return job

    async def _look(self, job_id: str) -> Job | None:
        found = await self._looks.records(topology.JOBS_BUCKET).latest(job_id)
        return Job.model_validate_json(found[0]) if found else None

    async def _newest_progress(self, job_id: str) -> contracts.Progress | None:
        stored = await self._looks.latest(topology.PROGRESS, topology.subject_of_progress(job_id))
        return parse_progress(stored.body) if stored is not None else None

    async def _newest_event(self, job_id: str) -> contracts.AnyEvent | None:
        stored = await self._looks.latest(topology.EVENTS, topology.subject_of_events(job_id))
        try:
            return parse_event(stored.body) if stored is not None else None
        except pydantic.ValidationError:  # of another version
            return None

    async def ended(self, job_id: str) -> Job | None:
        """The record of a job whose log has come to an end: as this replica wrote it last, if that was the end.

        It keeps it in mind no longer: the room is for those that wait, and are not to be read again for their start.
        """
        written = self._written.get(job_id)
        if written is None or not written[0].status.final:
            return await self.find(job_id)
        del self._written[job_id]
        return written[0]

    async def create(self, job: Job) -> tuple[Job, bool]:
        """Write a new record, put it into the history and act on it; False where the job was there already.

        Raises JobIdTakenError where it is another tenant's.
        """
        # Both at once: until the record is there nobody acts on the log, and a request that comes again finds it begun.
        created, logged = await asyncio.gather(
            self._write(job, revision=0), self._log_accepted(job), return_exceptions=True
        )
        if isinstance(created, errors.ConflictError):
            existing = await self.find(job.id)
            if existing is None:
                raise created
            await self.enter(existing, job.tenant)
            return existing, False
        if isinstance(created, BaseException):
            raise created
        if isinstance(logged, BaseException):
            raise logged
        await self._act(job, logged)
        return job, True

    async def enter(self, job: Job, tenant: str) -> None:
        """What the bus must hold of a job that was let in; harmless to repeat, so a crash half-way is made good.

        Raises JobIdTakenError where it is not this tenant's.
        """
        if job.tenant != tenant:
            raise JobIdTakenError(job.id)
        # The log begins before anybody can be told to work on the job.
        await self._act(job, await self._log_accepted(job))

    async def _act(self, job: Job, logged: int | None) -> None:
        if job.status is JobStatus.REJECTED:
            await self._log_rejected(job)
        # A place in the list says nothing of the task, so neither waits for the other.
        await asyncio.gather(
            self._execute((*pipeline.announcements(job, now()), *pipeline.demands(job)), logged),
            self._record_history(job),
        )

    async def _record_history(self, job: Job) -> None:
        with contextlib.suppress(errors.ConflictError):  # it is in the history: one message per subject, for ever
            await self._bus.publish(topology.subject_of_history(job.id, job.tenant), b"", message_id=job.id)

    async def _log_accepted(self, job: Job) -> int | None:
        """Begin the log of a job, unless it has begun; where it begins now."""
        if not job.status.final:  # what has ended has begun, though its log may have had its time
            with contextlib.suppress(errors.ConflictError):
                return await self._log_first(contracts.Accepted(job_id=job.id, at=job.created_at), after=0)
        return None

    async def _log_rejected(self, job: Job) -> None:
        rejected = contracts.Rejected(job_id=job.id, at=job.created_at, errors=job.error.fields if job.error else ())
        try:
            await self._log_first(rejected, after=0)
        except errors.ConflictError:
            # Of two requests with one id that came at once, the other, good one began the log and lost the record.
            begun = await self._bus.last(topology.EVENTS, topology.subject_of_events(job.id))
            if begun is not None and isinstance(parse_event(begun.body), contracts.Accepted):
                await self._log_first(rejected, after=begun.seq)

    async def _log_first(self, event: contracts.Accepted | contracts.Rejected, after: int) -> int:
        return await self._bus.publish(
            topology.subject_of_events(event.job_id), event.to_bytes(),
            message_id=f"{event.job_id}:{event.type}", expect_last=after,
        )  # fmt: skip

    async def apply(self, event: contracts.AnyEvent, seq: int | None = None) -> Applied | None:
        """Move a job on by an event and act on its state; None for a job that has no record (any more).

        `seq` is where the event stands in the log.
        """
        doubted = False
        for attempt in range(CAS_TRIES):
            written = self._written.pop(event.job_id, None)
            found = written or await self._read(event.job_id, surely=doubted)
            if found is None:
                return None
            job, revision = found
            after, commands = pipeline.decide(job, event)
            changed = after != job
            if not changed and (written is not None or not doubted):
                doubted = True  # it may be out of date: only the newest record may say that the event is no news
                continue
            if changed:
                try:
                    await self._write(after, revision)
                except errors.ConflictError:  # another replica moved it: decide again on what it wrote
                    if written is None:
                        await asyncio.sleep(random.uniform(0, 0.002 * 2 ** min(attempt, 6)))  # noqa: S311
                    continue
            # After an event of its own stage a task would not be at its first attempt.
            opens = not isinstance(event, contracts.StageEvent) or isinstance(event, contracts.StageCompleted)
            await self._execute(commands, seq if opens else None)
            return Applied(after, changed)
        raise errors.BusError(f"job {event.job_id} is being written by too many at once")

    async def started(self, event: contracts.StageStarted) -> Job | None:
        """A worker has taken a task of a job: the next of its tenant's may move up; None where there is no such job.

        Nothing is written: that it was taken is in the log, and demands nothing (decision 0018).
        """
        kept = self._written.pop(event.job_id, None)
        found = kept or await self._read(event.job_id)
        if found is None:
            return None
        job, revision = pipeline.fold(found[0], event), found[1]
        if job.id not in self._written:  # what was written meanwhile is newer
            self._keep(job, revision)
        self.share.freed(event.stage, pipeline.lane_of(job), job.tenant)
        return job

    async def _read(self, job_id: str, *, surely: bool = False) -> tuple[Job, int] | None:
        # A node that catches up may not have it yet: what happened to the job must not be passed over for that.
        found = (None if surely else await self._records.get(job_id)) or await self._records.latest(job_id)
        return (Job.model_validate_json(found[0]), found[1]) if found else None

    async def _write(self, job: Job, revision: int) -> None:
        self._keep(job, await self._records.put(job.id, job.to_bytes(), revision=revision))
        self.due.note(job, now())

    def _keep(self, job: Job, revision: int) -> None:
        self._written[job.id] = job, revision
        if len(self._written) > REMEMBERED:
            self._written.popitem(last=False)

    async def request(self, event: contracts.CancelRequested | contracts.RetryRequested | contracts.Approved) -> Job:
        """Log what somebody asked of a job, and apply it at once; raises JobNotFoundError."""
        tracing.about(job_id=event.job_id)
        with tracing.span(event.type, of=await self.trace_of(event.job_id), job_id=event.job_id, run=event.run):
            # The log first: from here on every replica, and every worker, knows.
            seq = await self._publish_event(event)
            # Of two approvals at once, which have one message id, the log keeps the first, and so must the record.
            logged = await self._bus.get(topology.EVENTS, seq) if isinstance(event, contracts.Approved) else None
            applied = await self.apply(parse_event(logged.body) if logged else event, seq)
        if applied is None:
            raise JobNotFoundError
        return applied.job

    async def trace_of(self, job_id: str) -> dict[str, str]:
        """The headers with which a job's trace goes on: what is asked of a job is not a part of who asks."""
        newest = await self._bus.last(topology.EVENTS, topology.subject_of_events(job_id)) if tracing.on() else None
        return newest.headers if newest else {}

    async def cancel(self, job_id: str) -> Job:
        """Stop a job, queued or running; a job that has ended stays as it is."""
        job = await self.get(job_id)
        if job.status.final:
            return job
        if job.updated_at == job.created_at:
            # Its record may be there before its log is; nothing must come into that log before `accepted`.
            await self._log_accepted(job)
        return await self.request(contracts.CancelRequested(job_id=job_id, run=job.run, at=now()))

    async def retry(self, job_id: str) -> Job:
        """Run a failed or cancelled job again from where it stopped; raises NotPossibleError."""
        job = await self.caught_up(await self.get(job_id), pipeline.may_retry)
        if not pipeline.may_retry(job):
            raise NotPossibleError(f"job {job_id} is {job.status}: only failed and cancelled jobs can be retried")
        return await self.request(contracts.RetryRequested(job_id=job_id, run=job.run + 1, at=now()))

    async def approve(self, job_id: str, candidate: int) -> Job:
        """Let a reviewed job go on with one of its candidates; raises NotPossibleError, RejectedError.

        Of several who choose at once, the first in the job's log is the one who chose.
        """
        job = await self.caught_up(await self.get(job_id), pipeline.may_approve)
        if job.approved is not None and job.approved == candidate:
            return job
        if not pipeline.may_approve(job):
            raise NotPossibleError(f"job {job_id} is {job.status}: it does not wait for a review")
        edit = job.stage_record("edit")
        count = len(edit.artifacts) if edit else 0
        if not 0 <= candidate < count:
            raise errors.RejectedError(f"choose a candidate from 0 to {count - 1}", field="candidate")
        job = await self.request(contracts.Approved(job_id=job_id, run=job.run, at=now(), candidate=candidate))
        if job.approved is None:
            raise NotPossibleError(f"job {job_id} is {job.status}: it does not wait for a review any more")
        if job.approved != candidate:
            raise NotPossibleError(f"job {job_id} goes on with candidate {job.approved}: somebody else was first")
        return job

    async def list(
        self, status: JobStatus | None, cursor: str | None, limit: int, tenant: str | None = None
    ) -> JobPage:
        """A page of a tenant's jobs, or of all (None), newest first; what it costs does not grow with the history."""
        before = _parse_cursor(cursor)
        subject = None if tenant is None else topology.subject_of_history("*", tenant)
        found: list[Job] = []
        scanned = 0
        while True:
            batch = await self._looks.tail(topology.HISTORY, before, limit + 1, subject)
            # All at once: on a busy machine it is the way to the bus and back that takes long.
            looks = (self._find_readable(entry.subject.rsplit(".", 1)[-1]) for entry in batch)
            for position, (entry, job) in enumerate(zip(batch, await asyncio.gather(*looks), strict=True)):
                if job is not None and (status is None or job.status is status):
                    found.append(job)
                before = entry.seq
                if len(found) == limit:
                    more = position + 1 < len(batch) or len(batch) > limit
                    return JobPage(tuple(found), str(before) if more else None, scanned + len(batch))
            scanned += len(batch)
            if len(batch) <= limit:
                return JobPage(tuple(found), None, scanned)
            if scanned >= SCAN_LIMIT:
                return JobPage(tuple(found), str(before), scanned)

    async def _find_readable(self, job_id: str) -> Job | None:
        try:
            return await self.find(job_id)
        except pydantic.ValidationError:  # of another version: it is to hide no other
            log.warning("a record cannot be read: is it of another version?", _event="record_unreadable", job=job_id)
            return None

    async def _execute(self, commands: Iterable[pipeline.Command], seq: int | None) -> None:
        """Carry out commands; each may be repeated. `seq` is the place in the log of the event that led to them."""
        for command in commands:
            match command:
                case pipeline.PublishTask(task):
                    await self._publish_task(task, seq)
                case pipeline.WithdrawTask():
                    await self._bus.signal(topology.subject_of_control(command.job_id), b"cancel")
                    await self._withdraw_task(command)
                case pipeline.PublishEvent(event):
                    if not await self._is_logged(event):
                        await self._publish_event(event)
                case pipeline.PublishWebhook(webhook):
                    await self._publish_webhook(webhook)

    async def _publish_event(self, event: contracts.AnyEvent) -> int:
        return await self._bus.publish(
            topology.subject_of_events(event.job_id), event.to_bytes(),
            message_id=f"{event.job_id}:{event.run}:{event.type}",
        )  # fmt: skip

    async def _is_logged(self, event: contracts.AnyEvent) -> bool:
        """Whether an end that the bus may have forgotten by its id is in the log, or the log has had its time."""
        if (now() - event.at).total_seconds() < pipeline.ANNOUNCED_S:
            return False  # a repetition is dropped
        subject = topology.subject_of_events(event.job_id)
        stored = found = await self._bus.first(topology.EVENTS, subject)
        while stored is not None:
            with contextlib.suppress(pydantic.ValidationError):  # of another version
                logged = parse_event(stored.body)
                if (logged.type, logged.run) == (event.type, event.run):
                    return True
            stored = await self._bus.first(topology.EVENTS, subject, stored.seq)
        return found is None

    async def _publish_webhook(self, webhook: contracts.Webhook) -> None:
        tenant = webhook.data.tenant
        try:
            await self._leave_room_for_others(tenant)
            subject = topology.subject_of_webhook(webhook.data.id, tenant)
            await self._bus.publish(subject, webhook.to_bytes(), message_id=webhook.id)
        except errors.QueueFullError as exc:
            # Receivers that are away must not stop the jobs. The job's next event demands it again.
            log.warning(exc.message, _event="webhook_not_queued", job=webhook.data.id, webhook=webhook.id)

    async def _leave_room_for_others(self, tenant: str) -> None:
        """Raise QueueFullError where a tenant's webhooks would take the second half of their stream, too.

        Those of receivers that do not answer stay there for a day, and of the largest a thousand fill it.
        """
        if tenant == contracts.DEFAULT_TENANT:  # the operator's own has no limits
            return
        own = topology.subject_of_webhook("*", tenant)
        if await self._bus.count(topology.WEBHOOKS, own) < WEBHOOKS_ANYWAY:
            return
        held = await self._bus.held(topology.WEBHOOKS)
        if held.limit is not None and 2 * held.bytes >= held.limit:
            raise errors.QueueFullError(f"the tenant {tenant} has too many webhooks that nobody takes")

    async def _withdraw_task(self, command: pipeline.WithdrawTask) -> None:
        where = command.stage, command.lane, command.job_id
        # What is held first: it is in the queue before it is no longer held.
        await withdraw(self._bus, topology.HELD, topology.subject_of_held(*where, command.tenant), command.run)
        await withdraw(self._bus, topology.TASKS, topology.subject_of_task(*where, command.tenant), command.run)
        if command.tenant == contracts.DEFAULT_TENANT:
            await withdraw(self._bus, topology.TASKS, topology.subject_of_older_task(*where), command.run)
        self.share.freed(command.stage, command.lane, command.tenant)

    async def _publish_task(self, task: contracts.Task, seq: int | None) -> None:
        # Saves the worker a look at the log: if nothing came after this, nobody has begun the task.
        headers = {topology.HEADER_LOG_SEQ: str(seq)} if seq else None
        try:
            await self.share.queue(task, f"{task.job_id}:{task.stage}:{task.run}", headers)
        except errors.ConflictError:
            # A copy is queued or running: it is this one, published by a gateway that died before it could say so.
            log.info("the task is queued already", _event="task_already_queued", job=task.job_id, stage=task.stage)


def _with_start(job: Job, newest: contracts.AnyEvent | None) -> Job:
    """A job that moves with the start of its task, which is in its log alone (decision 0018)."""
    # Where anything else is the newest, it is in the record, or the record that was read is a moment old.
    if isinstance(newest, contracts.StageStarted) and newest.stage == job.stage:
        return pipeline.fold(job, newest)
    return job


def _parse_cursor(cursor: str | None) -> int | None:
    if cursor is None:
        return None
    if not cursor.isdecimal() or len(cursor) > 18:
        raise errors.RejectedError("use the next_cursor of the page before, as it came", field="cursor")
    return int(cursor)


def parse_progress(body: bytes) -> contracts.Progress | None:
    """Progress as a worker told it; None for what this version cannot read."""
    try:
        return contracts.Progress.model_validate_json(body)
    except pydantic.ValidationError:
        return None


def parse_event(body: bytes) -> contracts.AnyEvent:
    """An event as the log has it; raises pydantic's ValidationError."""
    return Event.validate_json(body)
