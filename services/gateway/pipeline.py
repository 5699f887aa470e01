"""What happens to a job: `decide(job, event) -> (job, commands)`, pure; alone in knowing the order of stages.

A job is a fold over its events that does not mind their order or their number: each event is merged into the record of
its stage, and the job's state follows from the stages. A final state is final for its run. Commands follow from the
state alone (`demands`), so a gateway that died between writing the record and acting on it is made good by whoever sees
the event again; each command is idempotent on the bus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from vidgen import contracts, topology
from vidgen.contracts import Job, JobStatus, StageRecord, StageState

# How long a webhook is demanded again, and an end repeated unseen: the bus knows their ids for longer.
ANNOUNCED_S = topology.DUPLICATE_WINDOW / 2


@dataclass(frozen=True)
class PublishTask:
    """Put a task on its queue, under the id `<job>:<stage>:<run>`."""

    task: contracts.Task


@dataclass(frozen=True)
class WithdrawTask:
    """Take a task of `run` or of one before from its queue, and tell whoever runs it to stop."""

    stage: contracts.Stage
    lane: contracts.Lane
    tenant: str
    job_id: str
    run: int


@dataclass(frozen=True)
class PublishEvent:
    """Append a job's final event to its log, under the id `<job>:<run>:<type>`."""

    event: contracts.JobCompleted | contracts.JobFailed | contracts.JobCancelled


@dataclass(frozen=True)
class PublishWebhook:
    """Tell whoever the job's `webhook_url` names, under the webhook's own id."""

    webhook: contracts.Webhook


Command = PublishTask | WithdrawTask | PublishEvent | PublishWebhook


def accept(
    request: contracts.VideoRequest,
    job_id: str,
    inputs: Sequence[str],
    work: Sequence[contracts.Work],
    at: datetime,
    tenant: str = contracts.DEFAULT_TENANT,
) -> Job:
    """A new job with its first stage queued."""
    job = Job(
        id=job_id,
        tenant=tenant,
        request=request.model_copy(update={"job_id": job_id}),
        inputs=tuple(inputs),
        stages=tuple(StageRecord(stage=part.kind, work=part) for part in work),
        deadline_at=_deadline(request, at),
        created_at=at,
        updated_at=at,
    )
    return _settle(job, at)


def _deadline(request: contracts.VideoRequest | None, since: datetime) -> datetime | None:
    return since + timedelta(seconds=request.deadline_s) if request is not None and request.deadline_s else None


def reject(
    request: contracts.VideoRequest | None, job_id: str, errors: Sequence[contracts.FieldError], at: datetime,
    tenant: str = contracts.DEFAULT_TENANT,
) -> Job:  # fmt: skip
    """The record of a request that was turned away."""
    summary = "; ".join(f"{error.field}: {error.message}" for error in errors)
    error = contracts.JobError(code="rejected", message=summary, fields=tuple(errors))
    return Job(
        id=job_id, tenant=tenant, status=JobStatus.REJECTED, request=request, error=error,
        created_at=at, updated_at=at, completed_at=at,
    )  # fmt: skip


def decide(job: Job, event: contracts.AnyEvent) -> tuple[Job, tuple[Command, ...]]:
    """The job after `event`, and what its state demands of the bus."""
    after = fold(job, event)
    # A retry ends a state that a gateway may have died before telling of. Webhooks go first, so that what follows from
    # a task cannot be told before what led to it.
    ended = announcements(job, event.at) if after.run > job.run else ()
    return after, (*ended, *announcements(after, event.at), *demands(after))


def fold(job: Job, event: contracts.AnyEvent) -> Job:
    """The job after `event`: the record that `decide` gives."""
    after = _settle(_fold(job, event), event.at)
    return after if after == job else after.model_copy(update={"updated_at": max(job.updated_at, event.at)})


def demands(job: Job) -> tuple[Command, ...]:
    """What should be on the bus, given the state of a job. Doing it twice does no harm."""
    at = job.completed_at or job.updated_at
    match job.status:
        case JobStatus.COMPLETED:
            return (PublishEvent(contracts.JobCompleted(job_id=job.id, run=job.run, at=at)),)
        case JobStatus.FAILED if job.error is not None:
            return (PublishEvent(contracts.JobFailed(job_id=job.id, run=job.run, at=at, error=job.error)),)
        case JobStatus.CANCELLED:
            final = PublishEvent(contracts.JobCancelled(job_id=job.id, run=job.run, at=at))
            return (*(_withdrawal(job, job.stage) if job.stage else ()), final)
        case JobStatus.QUEUED | JobStatus.IN_PROGRESS:
            current = _current(job)
            if current is not None and current.state is StageState.QUEUED and current.tries == 0:
                return (PublishTask(task_of(job, current)),)
    return ()


def announcements(job: Job, at: datetime) -> tuple[PublishWebhook, ...]:
    """The webhooks that a job's state stands for, oldest first, as far as they are news at `at`.

    Like `demands` they follow from the state alone and may be repeated: their ids are those of what happened.
    """
    if job.request is None or job.request.webhook_url is None:
        return ()
    news = [
        (f"{job.id}:stage_completed:{record.stage}", "job.stage_completed", record.completed_at)
        for record in job.stages
        if record.state is StageState.COMPLETED
    ]
    if job.status.final:
        news.append((f"{job.id}:{job.run}:{job.status}", f"job.{job.status}", job.completed_at))
    elif job.status is JobStatus.AWAITING_REVIEW:
        news.append((f"{job.id}:{job.run}:{job.status}", f"job.{job.status}", job.updated_at))
    return tuple(
        PublishWebhook(contracts.Webhook.model_validate({"id": key, "type": kind, "timestamp": since, "data": job}))
        for key, kind, since in news
        if since is not None and (at - since).total_seconds() < ANNOUNCED_S
    )


def task_of(job: Job, record: StageRecord) -> contracts.Task:
    """The task of a queued stage. A video after an edit starts from the chosen candidate."""
    inputs = job.inputs
    edit = job.stage_record("edit")
    if record.stage == "i2v" and edit is not None:
        frames = [artifact.key for artifact in edit.artifacts if artifact.content_type == "image/png"]
        inputs = (frames[min(job.approved or 0, len(frames) - 1)],)
    return contracts.Task(
        job_id=job.id,
        tenant=job.tenant,
        stage=record.stage,
        lane=lane_of(job),
        run=job.run,
        inputs=inputs,
        work=record.work,
        queued_at=record.queued_at or job.updated_at,
        deadline_at=job.deadline_at,
    )


def may_retry(job: Job) -> bool:
    """Whether a retry would do anything."""
    return job.status in (JobStatus.FAILED, JobStatus.CANCELLED)


def may_approve(job: Job) -> bool:
    """Whether the job waits for a review."""
    return job.status is JobStatus.AWAITING_REVIEW


def _withdrawal(job: Job, stage: contracts.Stage) -> tuple[WithdrawTask, ...]:
    return (WithdrawTask(stage, lane_of(job), job.tenant, job.id, job.run),)


def lane_of(job: Job) -> contracts.Lane:
    """The lane that a job's tasks wait in."""
    return job.request.lane if job.request is not None else "interactive"


def _current(job: Job) -> StageRecord | None:
    return next((record for record in job.stages if record.state is not StageState.COMPLETED), None)


def _with_stage(job: Job, record: StageRecord) -> Job:
    return job.model_copy(update={"stages": tuple(record if r.stage == record.stage else r for r in job.stages)})


def _fold(job: Job, event: contracts.AnyEvent) -> Job:
    if isinstance(event, contracts.StageEvent):
        record = job.stage_record(event.stage)
        if record is None:
            return job
        charged = _with_stage(job, _charge(record, event))
        if event.run > job.run and may_retry(job):  # its retry_requested is still under way
            charged = _restart(charged, event.run, event.at)
        if event.run < charged.run or charged.status.final:
            return charged
        merged = charged.stage_record(event.stage)
        return _with_stage(charged, _merge(merged or record, event))
    match event:
        case contracts.CancelRequested() if event.run == job.run and not job.status.final:
            return job.model_copy(update={"status": JobStatus.CANCELLED, "completed_at": event.at})
        case contracts.RetryRequested() if event.run > job.run and may_retry(job):
            return _restart(job, event.run, event.at)
        case contracts.Approved() if job.status is JobStatus.AWAITING_REVIEW and event.run == job.run:
            return job.model_copy(update={"approved": event.candidate})
    return job


def _charge(record: StageRecord, event: contracts.StageEvent) -> StageRecord:
    mark = f"{event.run}.{event.attempt}"
    if isinstance(event, contracts.StageStarted) or mark in record.charged:
        return record
    seconds, dollars = getattr(event, "gpu_seconds", 0.0), getattr(event, "cost_usd", 0.0)
    return record.model_copy(
        update={
            "charged": (*record.charged, mark),
            "gpu_seconds": record.gpu_seconds + seconds,
            "cost_usd": record.cost_usd + dollars,
        }
    )


def _merge(record: StageRecord, event: contracts.StageEvent) -> StageRecord:
    if record.state is StageState.COMPLETED:
        return record
    if isinstance(event, contracts.StageCompleted):
        # From whichever attempt: its key and its content are those of every other attempt.
        return record.model_copy(
            update={
                "state": StageState.COMPLETED, "attempt": max(record.attempt, event.attempt), "tries": event.tries,
                "completed_at": event.at, "worker": event.worker, "engine": event.engine, "model": event.model,
                "revision": event.revision, "seed": event.seed, "artifacts": event.artifacts,
                "timings": event.timings, "error": None,
                "started_at": record.started_at or event.started_at or event.at,
            }
        )  # fmt: skip
    if event.attempt < record.attempt or record.state is StageState.FAILED:
        return record  # an older attempt may not settle what a newer one holds
    update: dict[str, object] = {
        "attempt": event.attempt, "tries": event.tries, "worker": event.worker,
        "started_at": record.started_at or event.started_at,
    }  # fmt: skip
    match event:
        case contracts.StageStarted():
            if event.attempt == record.attempt:
                return record  # its end is known already
            update |= {
                "state": StageState.RUNNING, "engine": event.engine, "model": event.model,
                "started_at": record.started_at or event.at,
            }  # fmt: skip
        case contracts.StageFailed():
            update |= {"state": StageState.FAILED if event.final else StageState.QUEUED, "error": event.error}
            update |= {"completed_at": event.at} if event.final else {}
        case contracts.StageReleased():
            update |= {"state": StageState.QUEUED}
    return record.model_copy(update=update)


def _restart(job: Job, run: int, at: datetime) -> Job:
    """A new run from the stage that is not done; it has as much time again as the first one had."""
    stages = tuple(
        record if record.state is StageState.COMPLETED
        else record.model_copy(
            update={
                "state": StageState.PENDING, "attempt": 0, "tries": 0, "error": None, "queued_at": None,
                "started_at": None, "completed_at": None,
            }
        )
        for record in job.stages
    )  # fmt: skip
    return job.model_copy(
        update={
            "run": run, "status": JobStatus.QUEUED, "stages": stages, "error": None, "completed_at": None,
            "deadline_at": _deadline(job.request, at),
        }
    )  # fmt: skip


def _settle(job: Job, at: datetime) -> Job:
    artifacts = tuple(artifact for record in job.stages for artifact in record.artifacts)
    job = job.model_copy(
        update={
            "artifacts": artifacts,
            "gpu_seconds": sum(record.gpu_seconds for record in job.stages),
            "cost_usd": sum(record.cost_usd for record in job.stages),
        }
    )
    if job.status.final:
        return job
    current = _current(job)
    if current is None:
        return job.model_copy(update={"status": JobStatus.COMPLETED, "stage": None, "error": None, "completed_at": at})
    if current.state is StageState.FAILED:
        return job.model_copy(
            update={"status": JobStatus.FAILED, "stage": current.stage, "error": current.error, "completed_at": at}
        )
    if _awaits_review(job, current):
        return job.model_copy(update={"status": JobStatus.AWAITING_REVIEW, "stage": current.stage})
    if current.state is StageState.PENDING:
        job = _with_stage(job, current.model_copy(update={"state": StageState.QUEUED, "queued_at": at}))
    begun = any(record.tries > 0 for record in job.stages)
    return job.model_copy(
        update={"status": JobStatus.IN_PROGRESS if begun else JobStatus.QUEUED, "stage": current.stage}
    )


def _awaits_review(job: Job, current: StageRecord) -> bool:
    reviewed = job.request is not None and job.request.review and job.approved is None
    return reviewed and current.stage == "i2v" and job.stage_record("edit") is not None
