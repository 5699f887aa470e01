"""What travels on the bus and over HTTP: frozen, versioned, closed. Messages carry object keys, never bytes."""

from __future__ import annotations

import re
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

SCHEMA_VERSION = 1
MAX_REFERENCES = 3
MAX_SEED = 2**32 - 1
SIZE_MULTIPLE = 16  # both pipelines work in patches of 16 pixels
MIN_SIDE, MAX_SIDE = 64, 2048
MAX_FIELD_ERRORS, MAX_FIELD_NAME = 50, 120
DEFAULT_TENANT = "default"  # the operator's own: what no key and no subject names

JobId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
TenantId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]
# It becomes part of a subject on which others ask, and who asks where it may not leaves (`bus_denied`).
WorkerId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
# Left out where it is the operator's own, so that processes of the version before read those messages, too.
TenantOfRecord = Annotated[TenantId, Field(exclude_if=lambda tenant: tenant == DEFAULT_TENANT)]
ObjectKey = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_./-]{0,499}$")]
Prompt = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=4000),
    Field(json_schema_extra={"pattern": r"\S"}),
]  # fmt: skip
OptionalPrompt = Annotated[str, StringConstraints(max_length=4000)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Steps = Annotated[int, Field(ge=1, le=100)]
EditSteps = Annotated[int, Field(ge=2, le=100)]  # Qwen's schedule divides by steps - 1
Guidance = Annotated[float, Field(ge=0, le=20, allow_inf_nan=False)]
Side = Annotated[int, Field(ge=MIN_SIDE, le=MAX_SIDE)]


def _in_patches(side: int) -> int:
    if side % SIZE_MULTIPLE:
        near = max(MIN_SIDE, min(MAX_SIDE, round(side / SIZE_MULTIPLE) * SIZE_MULTIPLE))
        raise ValueError(f"must be a multiple of {SIZE_MULTIPLE}: use {near}")
    return side


def _four_k_and_one(frames: int) -> int:
    if frames % 4 != 1:
        below = frames - (frames - 1) % 4
        raise ValueError(f"must be 4k+1: use {below} or {below + 4}")
    return frames


# The plain URLs alone: no user, no password, no query, no fragment, nothing that two parsers could read in two ways.
RECEIVER = r"^https://([A-Za-z0-9][A-Za-z0-9.-]{0,252}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?(/[A-Za-z0-9._~!$&'()*+,;=:@%/-]*)?$"


def _receiver(url: str) -> str:
    if not url.lower().startswith("https://"):
        raise ValueError("must begin with https://: what is told of a job is not sent in the clear")
    if "@" in url.split("/")[2]:
        raise ValueError("leave user and password out: what is delivered is signed, verify that")
    if "?" in url or "#" in url:
        raise ValueError("leave out what is behind ? or #: tokens do not belong there, what is delivered is signed")
    try:
        good = re.fullmatch(RECEIVER, url) is not None and urlsplit(url).port != 0
    except ValueError:  # an address in brackets that is none, a port that is too high
        good = False
    if not good:
        raise ValueError("is no plain URL: write the host as a DNS name (in its xn-- form) and escape the path")
    return url


WebhookUrl = Annotated[
    str, StringConstraints(max_length=1000), AfterValidator(_receiver),
    Field(json_schema_extra={"format": "uri", "pattern": RECEIVER}),
]  # fmt: skip
AskedSide = Annotated[Side, AfterValidator(_in_patches), Field(json_schema_extra={"multipleOf": SIZE_MULTIPLE})]
# What a schema cannot say of these, and of fields that go together, it says in words.
Frames = Annotated[int, Field(ge=5, le=257, description="4k+1, such as 77 or 81."), AfterValidator(_four_k_and_one)]
LabelKey = Annotated[str, StringConstraints(min_length=1, max_length=63)]
LabelValue = Annotated[str, StringConstraints(max_length=256)]

Stage = Literal["edit", "i2v"]
Lane = Literal["interactive", "batch"]
Quality = Literal["draft", "standard", "high"]
STAGES: tuple[Stage, ...] = ("edit", "i2v")
LANES: tuple[Lane, ...] = ("interactive", "batch")

Background = Literal["studio", "beach", "city", "forest", "mountains", "night-sky", "office", "sunset"]
Style = Literal["cinematic", "film-noir", "golden-hour", "moonlight", "neon", "pencil", "sepia", "vivid", "watercolor"]
Viewpoint = Literal["front", "left", "right", "back", "above", "below", "close-up", "wide"]

WAN_NEGATIVE_PROMPT = (
    "overexposed, static, blurred details, subtitles, painting, still picture, overall gray, worst quality, "
    "low quality, JPEG artifacts, ugly, deformed, extra fingers, poorly drawn hands, poorly drawn face, "
    "disfigured limbs, fused fingers, cluttered background, walking backwards"
)


class Message(BaseModel):
    """A frozen message that refuses what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def to_bytes(self) -> bytes:
        """Compact JSON, without the fields that were left out."""
        return self.model_dump_json(exclude_none=True).encode()


class EditParams(Message):
    """How the reference is to be edited. What is None follows from `quality`."""

    prompt: Prompt
    negative_prompt: OptionalPrompt = " "
    quality: Quality = "standard"
    steps: EditSteps | None = None
    true_cfg_scale: Guidance | None = Field(None, description="Classifier-free guidance; 1 is off.")
    guidance_scale: Guidance = 1.0
    seed: Seed | None = None
    width: AskedSide | None = Field(None, description="Together with height: both or neither.")
    height: AskedSide | None = Field(None, description="Together with width: both or neither.")
    candidates: Annotated[int, Field(ge=1, le=4)] = 1
    background: Background | None = None
    style: Style | None = None
    viewpoint: Viewpoint | None = None

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if (self.width is None) != (self.height is None):
            raise ValueError("width and height go together: give both or neither")
        return self


class I2VParams(Message):
    """How the frame is to move. What is None follows from `quality`."""

    prompt: OptionalPrompt = ""
    negative_prompt: OptionalPrompt = WAN_NEGATIVE_PROMPT
    quality: Quality = "standard"
    steps: Steps | None = None
    guidance_scale: Guidance | None = Field(None, description="Classifier-free guidance; 1 is off.")
    guidance_scale_2: Guidance | None = Field(None, description="The same for Wan 2.2's low-noise expert.")
    seed: Seed | None = None
    num_frames: Frames = 81
    fps: Annotated[int, Field(ge=1, le=60)] = 16
    width: AskedSide = 832
    height: AskedSide = 480


class VideoRequest(Message):
    """What a client publishes on `vidgen.requests`: references, and an edit, a motion, or both."""

    schema_version: Literal[1] = 1
    job_id: JobId | None = None
    references: Annotated[tuple[ObjectKey, ...], Field(min_length=1, max_length=MAX_REFERENCES)] = Field(
        description="Keys under uploads/, a tenant's under uploads/<tenant>/; exactly one where there is no edit."
    )
    edit: EditParams | None = Field(None, description="At least one of edit and i2v is given.")
    i2v: I2VParams | None = Field(None, description="At least one of edit and i2v is given.")
    review: bool = Field(
        False,
        description="Wait for approval of the edited frame before the video is made; only where both edit and i2v are "
        "given.",
    )
    lane: Lane = "interactive"
    deadline_s: Annotated[float, Field(gt=0, le=7 * 86400, allow_inf_nan=False)] | None = None
    webhook_url: WebhookUrl | None = Field(
        None, description="Where changes of the job are told: an https URL without credentials and query."
    )
    labels: Annotated[dict[LabelKey, LabelValue], Field(max_length=16)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if self.edit is None and self.i2v is None:
            raise ValueError("give at least one of edit and i2v")
        if self.edit is None and len(self.references) > 1:
            raise ValueError("references: a video without an edit starts from exactly one image")
        return self


class FieldError(Message):
    """One thing that is wrong with a request: where, what, and what to do."""

    field: str
    message: str


# Where pydantic's own words would not help a person; filled in with the error's limits, never with what was sent.
REMEDIES = {
    "extra_forbidden": "unknown field: remove it",
    "missing": "is missing: give it",
    "too_long": "takes at most {max_length}: leave some out",
    "too_short": "needs at least {min_length}",
    "string_too_long": "takes at most {max_length} characters: shorten it",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "has characters that are not allowed: it must match {pattern}",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than_equal": "must be {le} or less",
    "literal_error": "must be {expected}",
}


def _remedy(error: ErrorDetails) -> str:
    if error["loc"] == ("schema_version",):
        return f"unknown schema version: this server speaks {SCHEMA_VERSION}"
    if error["type"] in REMEDIES:
        return REMEDIES[error["type"]].format(**error.get("ctx", {}))
    return error["msg"].removeprefix("Value error, ")


def field_errors(exc: ValidationError) -> tuple[FieldError, ...]:
    """Every wrong field of a validation error, dotted paths, never the offending value.

    Of a payload that is wrong in very many places the first ones only: the answer must fit into a message.
    """
    found = []
    wrong = exc.errors(include_url=False, include_input=False)
    # Where an item is wrong pydantic leaves it out, and then finds that there are too few.
    within = {error["loc"][:-1] for error in wrong}
    wrong = [error for error in wrong if error["type"] != "too_short" or error["loc"] not in within]
    for error in wrong[:MAX_FIELD_ERRORS]:
        path = ".".join(str(part) for part in error["loc"])[:MAX_FIELD_NAME] or "request"
        found.append(FieldError(field=path, message=_remedy(error)))
    if len(wrong) > MAX_FIELD_ERRORS:
        found.append(
            FieldError(field="request", message=f"and {len(wrong) - MAX_FIELD_ERRORS} more: correct these first")
        )
    return tuple(found)


# ── tasks ────────────────────────────────────────────────────────────────────────────────────────────────────────


class EditWork(Message):
    """One edit with everything decided."""

    kind: Literal["edit"] = "edit"
    prompt: str = Field(description="As the model reads it: presets and the identity sentence are in it.")
    user_prompt: str
    negative_prompt: str
    steps: Steps
    true_cfg_scale: float
    guidance_scale: float
    seed: Seed
    width: Side
    height: Side
    reference_area: int | None = Field(
        None, ge=4096, description="Pixels to which each reference is at most resized; None: the engine's own."
    )
    candidates: int
    background: Background | None = None
    style: Style | None = None
    viewpoint: Viewpoint | None = None


class I2VWork(Message):
    """One animation with everything decided."""

    kind: Literal["i2v"] = "i2v"
    prompt: str
    negative_prompt: str
    steps: Steps
    guidance_scale: float
    guidance_scale_2: float | None = None
    seed: Seed
    num_frames: int
    fps: int
    width: Side
    height: Side


Work = Annotated[EditWork | I2VWork, Field(discriminator="kind")]


class Task(Message):
    """One stage's work for one job, as a message on that stage's queue."""

    schema_version: Literal[1] = 1
    job_id: JobId
    tenant: TenantOfRecord = DEFAULT_TENANT
    stage: Stage
    lane: Lane
    run: int = Field(1, ge=1, description="Grows by one with each retry of the job.")
    inputs: tuple[ObjectKey, ...]
    work: Work
    queued_at: datetime
    deadline_at: datetime | None = None


class Artifact(Message):
    """A file in the object store."""

    name: str
    key: ObjectKey
    content_type: str
    size: int = Field(description="Bytes.")
    sha256: str
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    fps: int | None = None


class Timings(Message):
    """Seconds that a stage spent in each phase."""

    queued: float = 0.0
    load: float = 0.0
    prepare: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    encode: float = 0.0
    store: float = 0.0


class JobError(Message):
    """Why a job failed."""

    code: str
    message: str
    stage: Stage | None = None
    retryable: bool = False
    fields: tuple[FieldError, ...] = ()


class Progress(Message):
    """Where a stage is: published on `vidgen.progress.<job_id>`, at most five a second."""

    job_id: JobId
    stage: Stage
    run: int = 1
    attempt: int = 1
    phase: Literal["preparing", "denoising", "finishing"] = "denoising"
    step: int = 0
    steps: int = 0
    seconds_per_step: float | None = None
    eta_s: float | None = Field(None, description="Seconds until this stage is done, from measured steps.")
    worker: str | None = None
    at: datetime


# ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────


class JobEvent(Message):
    """What happened to a job."""

    schema_version: Literal[1] = 1
    job_id: JobId
    run: int = 1
    at: datetime


class StageEvent(JobEvent):
    """What happened to one attempt at a stage.

    (`run`, `attempt`) only ever grows and is the fence; `tries` counts the attempts that are held against the task.
    """

    stage: Stage
    attempt: int
    tries: int
    worker: WorkerId
    alone: bool = Field(
        False, description="No other task was in its process, for an attempt before had ended without a word."
    )
    started_at: datetime | None = Field(None, description="When the attempt began whose end this is.")


class Accepted(JobEvent):
    type: Literal["accepted"] = "accepted"


class Rejected(JobEvent):
    type: Literal["rejected"] = "rejected"
    errors: tuple[FieldError, ...]


class Checkpoint(Message):
    """Where a task can be gone on with: after `step` of `steps`, with what `attempt` stored."""

    attempt: int
    step: int
    steps: int


class StageStarted(StageEvent):
    type: Literal["stage_started"] = "stage_started"
    engine: str
    model: str
    queued_s: float = 0.0
    deliveries: int = 1
    checkpoint: Checkpoint | None = Field(None, description="What this attempt may go on from.")
    preempted: int = Field(0, description="How often the task has made way for an interactive one.")


class StageCompleted(StageEvent):
    type: Literal["stage_completed"] = "stage_completed"
    engine: str
    model: str
    revision: str | None = None
    seed: int
    steps: int = 0
    artifacts: tuple[Artifact, ...]
    timings: Timings = Timings()
    gpu_seconds: float = 0.0
    cost_usd: float = 0.0
    reused: bool = Field(False, description="The artifact was already there; nothing was computed.")


class StageFailed(StageEvent):
    type: Literal["stage_failed"] = "stage_failed"
    error: JobError
    final: bool = Field(description="False: the task waits to be tried again.")
    retry_in_s: float | None = None
    gpu_seconds: float = 0.0
    cost_usd: float = 0.0


class StageReleased(StageEvent):
    """Handed back unharmed (a drain, or to make way): not held against the task."""

    type: Literal["stage_released"] = "stage_released"
    gpu_seconds: float = 0.0
    cost_usd: float = 0.0
    checkpoint: Checkpoint | None = Field(None, description="What the next attempt may go on from.")
    preempted: int = Field(0, description="How often the task has made way for an interactive one, this time included.")


class StageCancelled(StageEvent):
    type: Literal["stage_cancelled"] = "stage_cancelled"
    gpu_seconds: float = 0.0
    cost_usd: float = 0.0
    cancel_latency_s: float | None = Field(None, description="From the request to the freed GPU.")


class CancelRequested(JobEvent):
    type: Literal["cancel_requested"] = "cancel_requested"


class RetryRequested(JobEvent):
    """`run` is the new run."""

    type: Literal["retry_requested"] = "retry_requested"


class Approved(JobEvent):
    type: Literal["approved"] = "approved"
    candidate: int = 0


class JobCompleted(JobEvent):
    type: Literal["completed"] = "completed"


class JobFailed(JobEvent):
    type: Literal["failed"] = "failed"
    error: JobError


class JobCancelled(JobEvent):
    type: Literal["cancelled"] = "cancelled"


AnyStageEvent = StageStarted | StageCompleted | StageFailed | StageReleased | StageCancelled
AnyEnd = JobCompleted | JobFailed | JobCancelled | Rejected
AnyEvent = (
    Accepted | Rejected | AnyStageEvent | CancelRequested | RetryRequested | Approved
    | JobCompleted | JobFailed | JobCancelled
)  # fmt: skip
Event: TypeAdapter[AnyEvent] = TypeAdapter(Annotated[AnyEvent, Field(discriminator="type")])


# ── records ──────────────────────────────────────────────────────────────────────────────────────────────────────


class JobStatus(StrEnum):
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    AWAITING_REVIEW = "awaiting_review"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REJECTED = "rejected"

    @property
    def final(self) -> bool:
        return self in FINAL


FINAL = frozenset({JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.REJECTED})


class StageState(StrEnum):
    PENDING = "pending"
    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


class StageRecord(Message):
    """What is known of one stage of a job."""

    stage: Stage
    state: StageState = StageState.PENDING
    work: Work
    attempt: int = 0
    tries: int = 0
    queued_at: datetime | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    worker: str | None = None
    engine: str | None = None
    model: str | None = None
    revision: str | None = None
    seed: int | None = None
    artifacts: tuple[Artifact, ...] = ()
    timings: Timings = Timings()
    gpu_seconds: float = 0.0
    cost_usd: float = 0.0
    error: JobError | None = None
    charged: tuple[str, ...] = Field((), description="The attempts (run.attempt) whose GPU seconds are in the sums.")

    @property
    def in_one_go(self) -> bool:
        """Whether a single attempt did all of it: else `timings` may tell of its last steps alone."""
        runs = [int(mark.partition(".")[0]) for mark in self.charged]
        return runs.count(max(runs, default=0)) <= 1


class Job(Message):
    """The durable record of one request, written by the gateway alone."""

    schema_version: Literal[1] = 1
    id: JobId
    tenant: TenantOfRecord = DEFAULT_TENANT
    status: JobStatus = JobStatus.QUEUED
    stage: Stage | None = None
    run: int = 1
    request: VideoRequest | None = Field(None, description="None only where a rejected payload could not be read.")
    inputs: tuple[ObjectKey, ...] = ()
    stages: tuple[StageRecord, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    progress: Progress | None = None
    approved: int | None = Field(None, description="The candidate that a review chose.")
    gpu_seconds: float = 0.0
    cost_usd: float = 0.0
    error: JobError | None = None
    deadline_at: datetime | None = None
    created_at: datetime
    updated_at: datetime
    completed_at: datetime | None = None

    def stage_record(self, stage: Stage) -> StageRecord | None:
        return next((record for record in self.stages if record.stage == stage), None)


WebhookType = Literal[
    "job.stage_completed", "job.awaiting_review", "job.completed", "job.failed", "job.cancelled", "job.rejected"
]  # fmt: skip


class Webhook(Message):
    """What is posted to a job's `webhook_url`, byte for byte as it waits in `VIDGEN_WEBHOOKS`."""

    id: str = Field(description="The same for each try to deliver it: also the header `webhook-id`.")
    type: WebhookType
    timestamp: datetime = Field(description="When it happened.")
    data: Job = Field(description="The job, as `GET /v1/jobs/{job_id}` showed it then.")


class DeadLetter(Message):
    """What was given up: why, and the original payload."""

    schema_version: Literal[1] = 1
    job_id: str | None = None
    stage: Stage | None = None
    subject: str
    error: JobError
    payload: str = Field(description="The original bytes, base64.")
    at: datetime


class GpuFigures(Message):
    """One device as NVML sees it; a worker without a GPU reports one device called `cpu`."""

    index: int
    uuid: str
    name: str
    utilization: float | None = Field(None, description="0 to 1.")
    memory_used: int | None = Field(None, description="Bytes.")
    memory_total: int | None = Field(None, description="Bytes.")
    power_watts: float | None = None
    temperature_celsius: float | None = None


class WorkerInfo(Message):
    """A worker alive, refreshed every few seconds in the `vidgen_workers` bucket."""

    id: WorkerId
    stage: Stage
    state: Literal["starting", "ready", "busy", "draining", "unhealthy"]
    engine: str
    model: str
    revision: str | None = None
    profile: str | None = None
    device: str
    gpus: tuple[GpuFigures, ...] = ()
    running: tuple[JobId, ...] = ()
    generating: JobId | None = Field(None, description="The one of them that is on the device.")
    seconds_per_step: float | None = None
    busy_seconds: float = 0.0
    tasks_done: int = 0
    load_seconds: float | None = None
    version: str
    host: str
    started_at: datetime
    at: datetime


# ── what is foretold ─────────────────────────────────────────────────────────────────────────────────────────────


class QueuePlace(Message):
    """Where a waiting task is in its queue, near enough: told to those who watch its job."""

    job_id: JobId
    stage: Stage
    ahead: int = Field(description="Tasks that come first; at most that many, where other lanes are busy too.")
    workers: int = Field(description="Workers that serve the stage now.")
    wait_s: float | None = Field(None, description="Seconds until it begins, from recent tasks; None: not known.")


class StageEstimate(Message):
    """What one stage of a request would take. What nothing is known of is None."""

    stage: Stage
    basis: Literal["measured", "scaled", "unknown"] = Field(
        description="measured: recent tasks of the same size; scaled: of another size; unknown: none on these engines."
    )
    steps: int
    seconds_per_step: float | None = None
    seconds: float | None = Field(None, description="On a worker, without waiting.")
    gpu_seconds: float | None = None
    cost_usd: float | None = Field(None, description="None too where the workers have no price.")
    workers: int = Field(description="Workers that serve the stage now.")
    ahead: int = Field(description="Tasks in its queue, and with its workers.")
    wait_s: float | None = None


class Estimate(Message):
    """What a request would take if it came now; None where nothing is known of one of its stages."""

    stages: tuple[StageEstimate, ...]
    wait_s: float | None = Field(None, description="Seconds until the first stage begins.")
    seconds: float | None = Field(None, description="Seconds until all is done, waiting included.")
    gpu_seconds: float | None = None
    cost_usd: float | None = None


def json_schemas() -> dict[str, dict[str, Any]]:
    """The JSON Schema of every public contract, by name."""
    models: dict[str, type[BaseModel]] = {
        "video-request": VideoRequest, "task": Task, "job": Job, "progress": Progress,
        "dead-letter": DeadLetter, "worker": WorkerInfo, "estimate": Estimate, "queue-place": QueuePlace,
        "webhook": Webhook,
    }  # fmt: skip
    schemas = {name: model.model_json_schema() for name, model in models.items()}
    schemas["event"] = Event.json_schema()
    return schemas
