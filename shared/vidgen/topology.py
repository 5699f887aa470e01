"""Every name on the bus, once: streams, consumers, buckets, subjects. DESIGN §3 is this file in prose."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from vidgen.contracts import DEFAULT_TENANT, LANES, STAGES, Lane, Stage

REQUESTS = "VIDGEN_REQUESTS"
TASKS = "VIDGEN_TASKS"
HELD = "VIDGEN_HELD"
EVENTS = "VIDGEN_EVENTS"
PROGRESS = "VIDGEN_PROGRESS"
ADVISORIES = "VIDGEN_ADVISORIES"
DEAD = "VIDGEN_DEAD"
HISTORY = "VIDGEN_HISTORY"
WEBHOOKS = "VIDGEN_WEBHOOKS"

JOBS_BUCKET = "vidgen_jobs"
WORKERS_BUCKET = "vidgen_workers"
KEYS_BUCKET = "vidgen_keys"
TENANTS_BUCKET = "vidgen_tenants"

GATEWAY = "gateway"
DAY = 86400.0
ACK_WAIT = 60.0
TASK_DELIVERIES = 30  # where workers are killed by the dozen, a task goes through many hands before one can begin it
DUPLICATE_WINDOW = 3600.0
LEAST_WINDOW = 0.1  # that a server takes
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
    max_consumers: int | None = None  # None: as many as the server takes of any, which is a thousand


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
    """A KV bucket; `ttl` in seconds counts from the last write, 0: for ever."""

    name: str
    ttl: float
    storage: Literal["file", "memory"] = "file"


def subject_of_requests(tenant: str) -> str:
    return SUBJECT_REQUESTS if tenant == DEFAULT_TENANT else f"{SUBJECT_REQUESTS}.{tenant}"


def tenant_of_requests(subject: str) -> str:
    """Whose request came on a subject: what its publisher may publish on says so, not what it wrote."""
    return subject.removeprefix(SUBJECT_REQUESTS).removeprefix(".") or DEFAULT_TENANT


def subject_of_task(stage: Stage, lane: Lane, job_id: str, tenant: str = DEFAULT_TENANT) -> str:
    return f"vidgen.tasks.{stage}.{lane}.{tenant}.{job_id}"


def subject_of_older_task(stage: Stage, lane: Lane, job_id: str) -> str:
    """Where gateways queued a task before there were tenants: one may wait there still, and consumers take it."""
    return f"vidgen.tasks.{stage}.{lane}.{job_id}"


def subject_of_held(stage: Stage, lane: Lane, job_id: str, tenant: str = DEFAULT_TENANT) -> str:
    return f"vidgen.held.{stage}.{lane}.{tenant}.{job_id}"


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


def tasks_of(tenant: str) -> tuple[tuple[str, str], ...]:
    """Where the tasks of a tenant are until they are done, as stream and pattern."""
    return (TASKS, f"vidgen.tasks.*.*.{tenant}.*"), (HELD, f"vidgen.held.*.*.{tenant}.*")


def subject_of_history(job_id: str, tenant: str = DEFAULT_TENANT) -> str:
    """The operator's own jobs have no tenant in it, as before there were tenants."""
    return f"vidgen.history.{job_id}" if tenant == DEFAULT_TENANT else f"vidgen.history.{tenant}.{job_id}"


def subject_of_webhook(job_id: str, tenant: str = DEFAULT_TENANT) -> str:
    """The operator's own jobs have no tenant in it, as before tenants' webhooks were counted."""
    return f"vidgen.webhooks.{job_id}" if tenant == DEFAULT_TENANT else f"vidgen.webhooks.{tenant}.{job_id}"


def is_of_webhook(subject: str, job_id: str) -> bool:
    return subject.startswith("vidgen.webhooks.") and subject.rsplit(".", 1)[-1] == job_id


def consumer_of(stage: Stage, lane: Lane) -> Consumer:
    return Consumer(TASKS, f"{stage}-{lane}", f"vidgen.tasks.{stage}.{lane}.>", max_deliver=TASK_DELIVERIES)


def consumer_of_held(stage: Stage, lane: Lane) -> Consumer:
    """Nobody pulls from it: it lets the autoscaler, and the metrics, count what a lane holds back."""
    return Consumer(HELD, f"{stage}-{lane}", f"vidgen.held.{stage}.{lane}.>")


HEADER_KEY = "Vidgen-Key"  # of a request whose job_id stands for a key: that key, its UTF-8 in hex
HEADER_LET_IN = "Vidgen-Let-In"  # of a request that found room at a gateway: it waits longer for room
HEADER_LOG_SEQ = "Vidgen-Log-Seq"  # of a task: where the job's log stood when it was queued
HEADER_REPLACES = "Vidgen-Replaces"  # of a held task: the one whose deliveries ran out, which goes before it is queued

SUBJECT_REQUESTS = "vidgen.requests"
DEAD_WEBHOOKS = "vidgen.dead.webhooks"
SUBJECT_CONTROL_ALL = "vidgen.control.*"
SUBJECT_USAGE = "vidgen.usage"  # what one gateway let in of each tenant's requests, for the others

STREAMS = (
    # A server compares ids over all subjects, so one tenant's request would be dropped for another's. The gateway tells
    # copies apart by the job's id.
    Stream(
        REQUESTS, ("vidgen.requests", "vidgen.requests.*"), "workqueue", discard="new", max_bytes=1 << 30,
        duplicate_window=LEAST_WINDOW,
    ),
    Stream(
        # `.>` takes what was queued before there were tenants, too.
        TASKS, ("vidgen.tasks.*.*.>",), "workqueue", discard="new", max_bytes=1 << 30,
        max_msgs_per_subject=1, discard_new_per_subject=True,
    ),
    # What waits behind a tenant's share of a lane's queue (decision 0012).
    Stream(
        HELD, ("vidgen.held.*.*.*.*",), discard="new", max_bytes=1 << 30,
        max_msgs_per_subject=1, discard_new_per_subject=True,
    ),
    Stream(EVENTS, ("vidgen.events.*",), max_age=7 * DAY, max_consumers=100_000),  # each open feed has one
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
    Stream(WEBHOOKS, ("vidgen.webhooks.>",), "workqueue", discard="new", max_age=7 * DAY, max_bytes=256 << 20),
    # One message per job ever accepted, in order: what `GET /v1/jobs` pages through (decision 0003).
    Stream(
        HISTORY, ("vidgen.history.>",), discard="new", max_age=30 * DAY,
        max_msgs_per_subject=1, discard_new_per_subject=True,
    ),
)  # fmt: skip

# What waits for its next try counts as unacknowledged, for a day where a receiver is away.
GATEWAY_WEBHOOKS = Consumer(WEBHOOKS, "gateway-webhooks", max_ack_pending=100_000)

REQUESTS_UNDER_WAY = 10_000  # those that wait for room are among them, and keep no other tenant's waiting
CONSUMERS = (
    Consumer(REQUESTS, GATEWAY, max_ack_pending=REQUESTS_UNDER_WAY),
    Consumer(EVENTS, GATEWAY, max_ack_pending=5000),
    Consumer(ADVISORIES, GATEWAY),
    GATEWAY_WEBHOOKS,
    *(consumer_of(stage, lane) for stage in STAGES for lane in LANES),
    *(consumer_of_held(stage, lane) for stage in STAGES for lane in LANES),
)

BUCKETS = (
    Bucket(JOBS_BUCKET, ttl=30 * DAY),
    Bucket(WORKERS_BUCKET, ttl=WORKER_TTL, storage="memory"),
    Bucket(KEYS_BUCKET, ttl=0),
    Bucket(TENANTS_BUCKET, ttl=0),
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


def covers(wider: str, subject: str) -> bool:
    """Whether every subject that falls under the pattern `subject` falls under `wider`, too."""
    parts, given = wider.split("."), subject.split(".")
    for place, part in enumerate(parts):
        if part == ">":
            return len(given) > place
        if place >= len(given) or given[place] == ">" or part not in ("*", given[place]):
            return False
    return len(parts) == len(given)


def stream_of(subject: str) -> str:
    """The stream that stores what is published on a subject; LookupError where none does."""
    for stream in STREAMS:
        if any(covers(pattern, subject) for pattern in stream.subjects):
            return stream.name
    raise LookupError(subject)
