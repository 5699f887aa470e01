"""Every name on the bus, once: streams, consumers, buckets, subjects. DESIGN §3 is this file in prose."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from vidgen.contracts import LANES, STAGES, Lane, Stage

REQUESTS = "VIDGEN_REQUESTS"
TASKS = "VIDGEN_TASKS"
EVENTS = "VIDGEN_EVENTS"
PROGRESS = "VIDGEN_PROGRESS"
ADVISORIES = "VIDGEN_ADVISORIES"
DEAD = "VIDGEN_DEAD"
HISTORY = "VIDGEN_HISTORY"
WEBHOOKS = "VIDGEN_WEBHOOKS"

JOBS_BUCKET = "vidgen_jobs"
WORKERS_BUCKET = "vidgen_workers"

GATEWAY = "gateway"
DAY = 86400.0
ACK_WAIT = 60.0
DUPLICATE_WINDOW = 3600.0
WORKER_TTL = 20.0


@dataclass(frozen=True)
class Stream:
    """A stream's settings, in NATS' words; ages in seconds."""

    name: str
    subjects: tuple[str, ...]
    retention: Literal["limits", "workqueue"] = "limits"
    storage: Literal["file", "memory"] = "file"
    discard: Literal["old", "new"] = "old"
    max_age: float = 0.0
    max_bytes: int = -1
    max_msgs_per_subject: int = -1
    discard_new_per_subject: bool = False
    duplicate_window: float = DUPLICATE_WINDOW


@dataclass(frozen=True)
class Consumer:
    """A durable pull consumer; `max_deliver` is a backstop, attempts are counted by the event log."""

    stream: str
    name: str
    filter_subject: str | None = None
    ack_wait: float = ACK_WAIT
    max_deliver: int = -1
    max_ack_pending: int = 1000


@dataclass(frozen=True)
class Bucket:
    """A KV bucket; `ttl` in seconds counts from the last write."""

    name: str
    ttl: float
    storage: Literal["file", "memory"] = "file"


def subject_of_task(stage: Stage, lane: Lane, job_id: str) -> str:
    return f"vidgen.tasks.{stage}.{lane}.{job_id}"


def subject_of_events(job_id: str) -> str:
    return f"vidgen.events.{job_id}"


def subject_of_progress(job_id: str) -> str:
    return f"vidgen.progress.{job_id}"


def subject_of_control(job_id: str) -> str:
    return f"vidgen.control.{job_id}"


def subject_of_worker(stage: Stage, worker_id: str) -> str:
    """What a worker listens on while it lives: nobody sends anything there, but that it listens can be asked."""
    return f"vidgen.workers.{stage}.{worker_id}"


def subject_of_dead(stage: Stage | None, job_id: str | None) -> str:
    return "vidgen.dead.requests" if stage is None else f"vidgen.dead.{stage}.{job_id or 'unknown'}"


def subject_of_history(job_id: str) -> str:
    return f"vidgen.history.{job_id}"


def subject_of_webhook(job_id: str) -> str:
    return f"vidgen.webhooks.{job_id}"


def consumer_of(stage: Stage, lane: Lane) -> Consumer:
    return Consumer(TASKS, f"{stage}-{lane}", f"vidgen.tasks.{stage}.{lane}.>", max_deliver=10)


HEADER_LOG_SEQ = "Vidgen-Log-Seq"  # of a task: where the job's log stood when it was queued

SUBJECT_REQUESTS = "vidgen.requests"
DEAD_WEBHOOKS = "vidgen.dead.webhooks"
SUBJECT_CONTROL_ALL = "vidgen.control.*"

STREAMS = (
    Stream(REQUESTS, ("vidgen.requests", "vidgen.requests.*"), "workqueue", discard="new", max_bytes=1 << 30),
    Stream(
        TASKS, ("vidgen.tasks.*.*.*",), "workqueue", discard="new", max_bytes=1 << 30,
        max_msgs_per_subject=1, discard_new_per_subject=True,
    ),
    Stream(EVENTS, ("vidgen.events.*",), max_age=7 * DAY),
    Stream(PROGRESS, ("vidgen.progress.*",), storage="memory", max_age=3600, max_msgs_per_subject=1),
    Stream(
        ADVISORIES,
        (
            f"$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.{TASKS}.>",
            f"$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.{TASKS}.>",
        ),
        "workqueue",
        max_age=7 * DAY,
    ),
    Stream(DEAD, ("vidgen.dead.>",), max_age=30 * DAY),
    Stream(WEBHOOKS, ("vidgen.webhooks.*",), "workqueue", discard="new", max_age=7 * DAY, max_bytes=256 << 20),
    # One message per job ever accepted, in order: what `GET /v1/jobs` pages through (decision 0003).
    Stream(
        HISTORY, ("vidgen.history.*",), discard="new", max_age=30 * DAY,
        max_msgs_per_subject=1, discard_new_per_subject=True,
    ),
)  # fmt: skip

# What waits for its next try counts as unacknowledged, for a day where a receiver is away.
GATEWAY_WEBHOOKS = Consumer(WEBHOOKS, "gateway-webhooks", max_ack_pending=100_000)

CONSUMERS = (
    Consumer(REQUESTS, GATEWAY),
    Consumer(EVENTS, GATEWAY, max_ack_pending=5000),
    Consumer(ADVISORIES, GATEWAY),
    GATEWAY_WEBHOOKS,
    *(consumer_of(stage, lane) for stage in STAGES for lane in LANES),
)

BUCKETS = (
    Bucket(JOBS_BUCKET, ttl=30 * DAY),
    Bucket(WORKERS_BUCKET, ttl=WORKER_TTL, storage="memory"),
)


@dataclass(frozen=True)
class Topology:
    """All that the bootstrap creates; a test passes a smaller `ack_wait`."""

    replicas: int = 1
    ack_wait: float = ACK_WAIT
    streams: tuple[Stream, ...] = STREAMS
    consumers: tuple[Consumer, ...] = CONSUMERS
    buckets: tuple[Bucket, ...] = field(default=BUCKETS)

    def keeping(self, *, events: float, jobs: float, dead: float) -> Topology:
        """The same with these ages, in seconds: of the logs, of the records and the history, of dead letters."""
        ages = {EVENTS: events, HISTORY: jobs, DEAD: dead}
        streams = tuple(replace(one, max_age=ages.get(one.name, one.max_age)) for one in self.streams)
        buckets = tuple(replace(one, ttl=jobs) if one.name == JOBS_BUCKET else one for one in self.buckets)
        return replace(self, streams=streams, buckets=buckets)
