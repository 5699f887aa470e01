"""Every metric of the system, once: name, type, unit, meaning, labels. What is not here is not measured.

A job id is never a label. Workers expose `WORKER` on their own port, the gateway exposes `GATEWAY`; nothing is global.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from vidgen import bus, contracts, engine, reference, topology
from vidgen.contracts import LANES, STAGES, GpuFigures, Lane, Stage, Timings, WorkerInfo

Outcome = Literal[
    "completed", "reused", "rejected", "retried", "cancelled", "released", "fenced", "dead", "dropped", "elsewhere",
    "lost",
]  # fmt: skip
GatewayOutcome = Literal["completed", "reused", "failed", "retried", "cancelled", "released"]
RequestOutcome = Literal["accepted", "rejected", "duplicate"]
WebhookOutcome = Literal["delivered", "retried", "given_up"]
Direction = Literal["get", "put"]
Kept = Literal["uploads", "checkpoints", "artifacts"]
CheckpointOutcome = Literal["stored", "resumed", "refused", "failed"]
State = Literal["starting", "ready", "busy", "draining", "unhealthy"]

STATES: tuple[State, ...] = get_args(State)
PHASES = tuple(Timings.model_fields)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

MOMENTS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 30, 60)
PHASE_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600)
STAGE_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600, 900, 1800, 3600)
JOB_BUCKETS = (*STAGE_BUCKETS, 7200, 14400)


@dataclass(frozen=True)
class Label:
    """A label's name and, where they are known beforehand, its values."""

    name: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric:
    """One metric as it is exposed.

    A `snapshot` is written anew as a whole, so that what is gone vanishes; the others only accumulate or are set.
    """

    name: str
    type: Literal["counter", "gauge", "histogram"]
    unit: str
    help: str
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()
    snapshot: bool = False

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(label.name for label in self.labels)


STAGE = Label("stage", STAGES)
LANE = Label("lane", LANES)
PHASE = Label("phase", PHASES)
DIRECTION = Label("direction", get_args(Direction))
STATE = Label("state", STATES)
KIND = Label("kind", get_args(Kept))
GPU = (Label("gpu"), Label("gpu_uuid"), Label("gpu_name"))
ON_WORKER = (STAGE, Label("worker"), *GPU)
STAGE_OR_REQUEST = Label("stage", (*STAGES, "request"))
STAGE_REQUEST_OR_WEBHOOK = Label("stage", (*STAGES, "request", "webhook"))
STREAM = Label("stream")
CONSUMER = (STREAM, Label("consumer"))
RESULT_TYPES: Mapping[Stage, str] = {"edit": "image/png", "i2v": "video/mp4"}  # a clip's poster is none

WORKER = (
    Metric(
        "vidgen_worker_tasks_total", "counter", "tasks",
        "Tasks settled. retried: handed back with back-off; released: handed back unharmed by a drain or to make way; "
        "fenced: a newer attempt held the task; rejected: it can never succeed; dead: its attempts were used up; "
        "dropped: it was settled or cancelled already; elsewhere: it ran at another worker; lost: the bus went away "
        "before it was settled.",
        (STAGE, LANE, Label("outcome", get_args(Outcome))),
    ),
    Metric(
        "vidgen_worker_stage_seconds", "histogram", "seconds", "Work on one completed task, without its time in the "
        "queue.", (STAGE,), STAGE_BUCKETS,
    ),
    Metric(
        "vidgen_worker_phase_seconds", "histogram", "seconds", "One phase of one completed task.", (STAGE, PHASE),
        PHASE_BUCKETS,
    ),
    Metric("vidgen_worker_steps_total", "counter", "steps", "Denoising steps done.", (STAGE,)),
    Metric(
        "vidgen_worker_seconds_per_step", "gauge", "seconds", "Seconds per denoising step, as the ETA uses them.",
        (STAGE,),
    ),
    Metric("vidgen_worker_step_seconds", "histogram", "seconds", "One denoising step.", (STAGE,), STEP_BUCKETS),
    Metric(
        "vidgen_worker_gpu_busy_seconds_total", "counter", "seconds", "Seconds in which the engine generated.",
        (STAGE, *GPU),
    ),
    Metric(
        "vidgen_worker_gpu_utilization_ratio", "gauge", "ratio", "Share of the last sample in which the device worked.",
        (STAGE, *GPU), snapshot=True,
    ),
    Metric(
        "vidgen_worker_gpu_memory_used_bytes", "gauge", "bytes", "Memory in use on the device.", (STAGE, *GPU),
        snapshot=True,
    ),
    Metric(
        "vidgen_worker_gpu_memory_total_bytes", "gauge", "bytes", "Memory of the device.", (STAGE, *GPU), snapshot=True
    ),
    Metric("vidgen_worker_gpu_power_watts", "gauge", "watts", "Power drawn.", (STAGE, *GPU), snapshot=True),
    Metric(
        "vidgen_worker_gpu_temperature_celsius", "gauge", "celsius", "Temperature.", (STAGE, *GPU), snapshot=True
    ),
    Metric(
        "vidgen_worker_model_load_seconds", "gauge", "seconds",
        "The last model load, by phase; `total` is all of it. `read` overlaps others, `build` is part of `weights`.",
        (STAGE, Label("phase")),
    ),
    Metric(
        "vidgen_worker_redeliveries_total", "counter", "deliveries", "Tasks pulled that had been delivered before.",
        (STAGE,),
    ),
    Metric("vidgen_worker_dead_letters_total", "counter", "tasks", "Tasks given up and dead-lettered.", (STAGE,)),
    Metric(
        "vidgen_worker_cancel_latency_seconds", "histogram", "seconds", "From hearing of a cancel to the freed GPU.",
        (STAGE,), MOMENTS,
    ),
    Metric(
        "vidgen_worker_artifact_bytes_total", "counter", "bytes", "Bytes moved from and to the object store.",
        (STAGE, DIRECTION),
    ),
    Metric(
        "vidgen_worker_artifact_seconds", "histogram", "seconds", "One transfer from or to the object store.",
        (STAGE, DIRECTION), MOMENTS,
    ),
    Metric(
        "vidgen_worker_checkpoints_total", "counter", "checkpoints",
        "Checkpoints of tasks in the middle of their denoising. stored: the task was handed back with it; resumed: a "
        "task went on from it; refused: it was made by or for something else, or damaged, and the task started over; "
        "failed: it could not be made, stored or fetched.",
        (STAGE, Label("outcome", get_args(CheckpointOutcome))),
    ),
    Metric(
        "vidgen_worker_memory_rungs_total", "counter", "tasks",
        "Tasks for which the device's memory ran out and that were tried again with less. one_by_one: candidates one "
        "after another; vae_tiling: the VAE in tiles; offload: the weights streamed from the host's memory. A task "
        "counts at each rung that it took, whether or not it was the last that it needed.",
        (STAGE, Label("rung", get_args(engine.Rung))),
    ),
    Metric(
        "vidgen_worker_heartbeats_failed_total", "counter", "heartbeats",
        "Renewals of a task's lease or of the registry entry that the bus did not answer.", (STAGE,),
    ),
    Metric(
        "vidgen_worker_switch_seconds", "histogram", "seconds",
        "One change of models on a device on which they take turns: until this stage's was awake.", (STAGE,),
        PHASE_BUCKETS,
    ),
    Metric("vidgen_worker_state", "gauge", "boolean", "1 for the state that the worker is in.", (STAGE, STATE)),
    Metric(
        "vidgen_worker_info", "gauge", "boolean", "Always 1: what this worker runs.",
        (STAGE, *map(Label, ("engine", "model", "revision", "profile", "device"))), snapshot=True,
    ),
)  # fmt: skip

GATEWAY = (
    Metric("vidgen_gateway_bus_up", "gauge", "boolean", "Whether the bus answered the last reading of queues and "
           "fleet; at 0 those are the last known."),
    Metric("vidgen_gateway_bus_seconds", "gauge", "seconds", "How long the bus took to answer all of that reading."),
    Metric("vidgen_gateway_store_up", "gauge", "boolean", "Whether the object store answered and has the bucket."),
    Metric("vidgen_gateway_store_seconds", "gauge", "seconds", "How long the object store took to answer that."),
    Metric(
        "vidgen_queue_depth", "gauge", "tasks", "Tasks waiting in a lane.", (STAGE, LANE), snapshot=True
    ),
    Metric(
        "vidgen_queue_ack_pending", "gauge", "tasks", "Tasks that workers hold.", (STAGE, LANE), snapshot=True
    ),
    Metric(
        "vidgen_queue_oldest_age_seconds", "gauge", "seconds", "Age of the oldest task waiting or held; 0: none.",
        (STAGE, LANE), snapshot=True,
    ),
    Metric(
        "vidgen_queue_oldest_waiting_seconds", "gauge", "seconds",
        "Age of the oldest task that no worker was given yet; 0: none.", (STAGE, LANE), snapshot=True,
    ),
    Metric(
        "vidgen_consumer_pending_messages", "gauge", "messages", "Messages that a consumer has not been given yet.",
        CONSUMER, snapshot=True,
    ),
    Metric(
        "vidgen_consumer_ack_pending_messages", "gauge", "messages",
        "Messages given to a consumer and not acked: in work, or waiting to be given again.", CONSUMER, snapshot=True,
    ),
    Metric(
        "vidgen_consumer_redelivered_messages", "gauge", "messages",
        "Messages not acked that were given more than once.", CONSUMER, snapshot=True,
    ),
    Metric(
        "vidgen_stream_messages", "gauge", "messages", "Messages that a stream holds; `KV_…` are the buckets.",
        (STREAM,), snapshot=True,
    ),
    Metric("vidgen_stream_bytes", "gauge", "bytes", "Bytes that a stream holds.", (STREAM,), snapshot=True),
    Metric(
        "vidgen_stream_limit_bytes", "gauge", "bytes",
        "Bytes that a stream may hold; without a series only the server's storage limits it.", (STREAM,), snapshot=True,
    ),
    Metric(
        "vidgen_requests_total", "counter", "requests", "Requests by what became of them at intake.",
        (Label("outcome", get_args(RequestOutcome)),),
    ),
    Metric(
        "vidgen_jobs_total", "counter", "jobs", "Jobs that reached a final status.",
        (Label("status", tuple(sorted(contracts.FINAL))),),
    ),
    Metric(
        "vidgen_job_seconds", "histogram", "seconds", "A job from its acceptance to its final status.",
        (Label("status", tuple(sorted(contracts.FINAL))),), JOB_BUCKETS,
    ),
    Metric(
        "vidgen_tasks_total", "counter", "tasks", "Attempts by their end, from the event log. failed: given up; "
        "retried: waits to be tried again; reused: the artifact was there already.",
        (STAGE, LANE, Label("outcome", get_args(GatewayOutcome))),
    ),
    Metric(
        "vidgen_stage_seconds", "histogram", "seconds", "Work of one completed stage, without its time in the queue.",
        (STAGE,), STAGE_BUCKETS,
    ),
    Metric(
        "vidgen_phase_seconds", "histogram", "seconds", "One phase of one completed stage.", (STAGE, PHASE),
        PHASE_BUCKETS,
    ),
    Metric("vidgen_steps_total", "counter", "steps", "Denoising steps of completed stages.", (STAGE,)),
    Metric(
        "vidgen_seconds_per_step", "histogram", "seconds", "Mean seconds per step of one completed stage.", (STAGE,),
        STEP_BUCKETS,
    ),
    Metric(
        "vidgen_gpu_seconds_total", "counter", "seconds", "GPU seconds charged to jobs, wasted attempts included.",
        (STAGE,),
    ),
    Metric("vidgen_cost_dollars_total", "counter", "dollars", "What those GPU seconds cost.", (STAGE,)),
    Metric(
        "vidgen_results_total", "counter", "files", "Edited images (each candidate is one) and clips made.", (STAGE,)
    ),
    Metric(
        "vidgen_errors_total", "counter", "errors",
        "Attempts that failed, whether or not they are tried again, and requests that did not validate.",
        (STAGE_OR_REQUEST, Label("code")),
    ),
    Metric(
        "vidgen_dead_letters_total", "counter", "messages",
        "Tasks and webhooks given up, and requests that did not validate.", (STAGE_REQUEST_OR_WEBHOOK,),
    ),
    Metric(
        "vidgen_webhooks_total", "counter", "tries",
        "Tries to deliver a webhook. retried: it failed and waits for the next one; given_up: it failed for the last "
        "time, and is a dead letter.",
        (Label("outcome", get_args(WebhookOutcome)),),
    ),
    Metric(
        "vidgen_webhook_seconds", "histogram", "seconds", "One try to deliver a webhook, answered or not.", (), MOMENTS
    ),
    Metric(
        "vidgen_redeliveries_total", "counter", "deliveries", "Starts of a task that had been delivered before.",
        (STAGE,),
    ),
    Metric(
        "vidgen_orphans_total", "counter", "tasks", "Tasks of workers that died, handed out again before their leases "
        "ran out.", (STAGE,),
    ),
    Metric(
        "vidgen_cancel_latency_seconds", "histogram", "seconds", "From the request to cancel to the freed GPU.",
        (STAGE,), MOMENTS,
    ),
    Metric("vidgen_artifact_bytes_total", "counter", "bytes", "Bytes of the artifacts that stages made.", (STAGE,)),
    Metric(
        "vidgen_swept_objects_total", "counter", "objects", "Objects deleted from the bucket because their time was "
        "over.", (KIND,),
    ),
    Metric("vidgen_swept_bytes_total", "counter", "bytes", "Bytes of those objects.", (KIND,)),
    Metric(
        "vidgen_http_requests_total", "counter", "requests", "HTTP requests by route template.",
        (Label("route"), Label("method"), Label("status")),
    ),
    Metric(
        "vidgen_http_request_seconds", "histogram", "seconds", "HTTP requests until the response began.",
        (Label("route"), Label("method")), MOMENTS,
    ),
    Metric(
        "vidgen_fleet_workers", "gauge", "workers", "Workers alive, from their heartbeats.", (STAGE, STATE),
        snapshot=True,
    ),
    Metric(
        "vidgen_fleet_info", "gauge", "boolean", "Always 1: what a worker is, and does now.",
        (*ON_WORKER, *map(Label, ("engine", "model", "profile", "host")), STATE), snapshot=True,
    ),
    Metric("vidgen_fleet_tasks_running", "gauge", "tasks", "Tasks that a worker holds.", ON_WORKER, snapshot=True),
    Metric(
        "vidgen_fleet_gpu_utilization_ratio", "gauge", "ratio",
        "Share of the last sample in which a worker's device worked.", ON_WORKER, snapshot=True,
    ),
    Metric(
        "vidgen_fleet_gpu_memory_used_bytes", "gauge", "bytes", "Memory in use on a worker's device.", ON_WORKER,
        snapshot=True,
    ),
    Metric(
        "vidgen_fleet_gpu_memory_total_bytes", "gauge", "bytes", "Memory of a worker's device.", ON_WORKER,
        snapshot=True,
    ),
    Metric(
        "vidgen_fleet_gpu_power_watts", "gauge", "watts", "Power that a worker's device draws.", ON_WORKER,
        snapshot=True,
    ),
    Metric(
        "vidgen_fleet_gpu_temperature_celsius", "gauge", "celsius", "Temperature of a worker's device.", ON_WORKER,
        snapshot=True,
    ),
    Metric(
        "vidgen_fleet_gpu_busy_seconds_total", "counter", "seconds", "Seconds in which a worker's engine generated.",
        ON_WORKER, snapshot=True,
    ),
    Metric(
        "vidgen_fleet_seconds_per_step", "gauge", "seconds", "A worker's seconds per denoising step.", ON_WORKER,
        snapshot=True,
    ),
    Metric(
        "vidgen_fleet_model_load_seconds", "gauge", "seconds", "How long a worker took to load its model.", ON_WORKER,
        snapshot=True,
    ),
)  # fmt: skip


def names() -> frozenset[str]:
    """Every metric's name as exposed: counters with `_total`, histograms without `_bucket`, `_sum` and `_count`."""
    return frozenset(metric.name for metric in (*WORKER, *GATEWAY))


class _Registry(CollectorRegistry):
    """A registry without the `_created` series, which nothing reads and which double every counter."""

    def collect(self) -> Iterator[Family]:
        for family in super().collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


class _Snapshots(Collector):
    """Families that are replaced as a whole: a scrape sees the old ones or the new ones, never half of each."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = {metric.name: metric for metric in metrics if metric.snapshot}
        self._families = {name: self._family(name) for name in self._metrics}

    def _family(self, name: str) -> GaugeMetricFamily | CounterMetricFamily:
        metric = self._metrics[name]
        kind = CounterMetricFamily if metric.type == "counter" else GaugeMetricFamily
        return kind(name, metric.help, labels=metric.label_names)

    def replace(self, figures: Iterable[tuple[str, Sequence[str], float | None]], only: str | tuple[str, ...]) -> None:
        """Put (name, label values, value) in place of what the metrics whose name starts with `only` had."""
        families = {name: self._family(name) for name in self._metrics if name.startswith(only)}
        for name, labels, value in figures:
            if value is not None:
                families[name].add_metric(labels, value)
        self._families = {**self._families, **families}

    def collect(self) -> Iterator[Family]:
        yield from self._families.values()


class _Merged:
    """The families of several registries as those of one, so that each is described once."""

    def __init__(self, registries: Iterable[CollectorRegistry]) -> None:
        self._registries = tuple(registries)

    def collect(self) -> Iterator[Family]:
        merged: dict[str, Family] = {}
        for registry in self._registries:
            for family in registry.collect():
                if family.name not in merged:
                    merged[family.name] = Family(family.name, family.documentation, family.type, family.unit)
                merged[family.name].samples.extend(family.samples)
        yield from merged.values()


def exposition(parts: Sequence[_Exposed]) -> tuple[bytes, str]:
    """One exposition of all that a process measures, and its content type; may be called from any thread."""
    return generate_latest(_Merged(part.registry for part in parts)), CONTENT_TYPE_LATEST


M = TypeVar("M", Counter, Gauge, Histogram)


class _Exposed:
    """The metrics of one process on a registry of their own."""

    def __init__(self, metrics: Sequence[Metric], **fixed: str) -> None:
        self.registry = _Registry()
        self._snapshots = _Snapshots(metrics)
        self.registry.register(self._snapshots)
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        self._children: dict[tuple[object, ...], Any] = {}
        self._fixed = fixed
        for metric in metrics:
            if not metric.snapshot:
                self._add(metric)

    def render(self) -> tuple[bytes, str]:
        """The exposition and its content type; may be called from any thread."""
        return exposition((self,))

    def _add(self, metric: Metric) -> None:
        if metric.type == "histogram":
            self._histograms[metric.name] = Histogram(
                metric.name, metric.help, metric.label_names, buckets=metric.buckets, registry=self.registry
            )
        elif metric.type == "gauge":
            self._gauges[metric.name] = Gauge(metric.name, metric.help, metric.label_names, registry=self.registry)
        else:
            counter = Counter(metric.name, metric.help, metric.label_names, registry=self.registry)
            self._counters[metric.name] = counter
            # A counter that starts at 1 has no increase for rate(): begin at 0 wherever the labels are known.
            values = [(self._fixed[la.name],) if la.name in self._fixed else la.values for la in metric.labels]
            for combination in product(*values):
                counter.labels(*combination)

    def _inc(self, name: str, amount: float = 1, **labels: str) -> None:
        self._child(self._counters, name, labels).inc(amount)

    def _set(self, name: str, value: float, **labels: str) -> None:
        self._child(self._gauges, name, labels).set(value)

    def _observe(self, name: str, seconds: float, **labels: str) -> None:
        self._child(self._histograms, name, labels).observe(max(0.0, seconds))

    def _child(self, families: Mapping[str, M], name: str, labels: Mapping[str, str]) -> M:
        # Finding one by its labels takes longer than counting.
        key = name, *labels.items()
        child: M | None = self._children.get(key)
        if child is None:
            labels = {**self._fixed, **labels}
            child = self._children[key] = families[name].labels(**labels) if labels else families[name]
        return child

    def _observe_timings(self, prefix: str, timings: Timings, **labels: str) -> None:
        phases = dict(timings)
        self._observe(f"{prefix}_stage_seconds", sum(phases.values()) - phases["queued"], **labels)
        for phase, seconds in phases.items():
            if seconds or phase != "load":  # a worker loads once, not per task
                self._observe(f"{prefix}_phase_seconds", seconds, phase=phase, **labels)


def _gpu_labels(gpu: GpuFigures) -> tuple[str, str, str]:
    return str(gpu.index), gpu.uuid, gpu.name


def _gpu_figures(
    prefix: str, labels: tuple[str, ...], gpu: GpuFigures
) -> Iterator[tuple[str, Sequence[str], float | None]]:
    where = (*labels, *_gpu_labels(gpu))
    yield f"{prefix}_gpu_utilization_ratio", where, gpu.utilization
    yield f"{prefix}_gpu_memory_used_bytes", where, gpu.memory_used
    yield f"{prefix}_gpu_memory_total_bytes", where, gpu.memory_total
    yield f"{prefix}_gpu_power_watts", where, gpu.power_watts
    yield f"{prefix}_gpu_temperature_celsius", where, gpu.temperature_celsius


class WorkerMetrics(_Exposed):
    """What one worker measures. `gpus` are the devices that it uses: GPU busy seconds are counted on them.

    Of several workers in one process only one `tells_figures` of the devices, so that a sum over the stages is true.
    """

    def __init__(self, stage: Stage, gpus: Sequence[GpuFigures] = (), *, tells_figures: bool = True) -> None:
        super().__init__(WORKER, stage=stage)
        self._stage, self._tells_figures = stage, tells_figures
        self._gpus = [dict(zip(("gpu", "gpu_uuid", "gpu_name"), _gpu_labels(gpu), strict=True)) for gpu in gpus]
        self.gpu_figures(gpus)
        self.gpu_busy(0)
        self.state("starting")

    def describe(self, info: engine.EngineInfo) -> None:
        """Say what runs here; replaces what was said before."""
        labels = (self._stage, info.name, info.model, info.revision or "", info.profile or "", info.device)
        self._snapshots.replace([("vidgen_worker_info", labels, 1)], only="vidgen_worker_info")

    def state(self, state: State) -> None:
        for name in STATES:
            self._set("vidgen_worker_state", name == state, state=name)

    def model_loaded(self, phases: Mapping[str, float]) -> None:
        """Seconds of each phase of a load, such as `imports`, `weights` and `warm_up`."""
        for phase, seconds in phases.items():
            self._set("vidgen_worker_model_load_seconds", seconds, phase=phase)

    def task_settled(self, lane: Lane, outcome: Outcome) -> None:
        """Call once per delivery, with how it ended."""
        self._inc("vidgen_worker_tasks_total", lane=lane, outcome=outcome)

    def task_timed(self, timings: Timings) -> None:
        """Call once per completed task."""
        self._observe_timings("vidgen_worker", timings)

    def step(self, seconds: float | None, seconds_per_step: float | None = None) -> None:
        """Count a denoising step, with its own duration and the smoothed one where they are known."""
        self._inc("vidgen_worker_steps_total")
        if seconds is not None:
            self._observe("vidgen_worker_step_seconds", seconds)
        if seconds_per_step is not None:
            self._set("vidgen_worker_seconds_per_step", seconds_per_step)

    def gpu_busy(self, seconds: float) -> None:
        """Add seconds in which the engine generated; call it per step, so that long tasks show while they run."""
        for labels in self._gpus:
            self._inc("vidgen_worker_gpu_busy_seconds_total", max(0.0, seconds), **labels)

    def gpu_figures(self, gpus: Sequence[GpuFigures]) -> None:
        """Replace the devices' figures; one that cannot be read has no series."""
        told = gpus if self._tells_figures else ()
        figures = (figure for gpu in told for figure in _gpu_figures("vidgen_worker", (self._stage,), gpu))
        self._snapshots.replace(figures, only="vidgen_worker_gpu_")

    def redelivered(self) -> None:
        self._inc("vidgen_worker_redeliveries_total")

    def dead_lettered(self) -> None:
        self._inc("vidgen_worker_dead_letters_total")

    def cancelled_after(self, seconds: float) -> None:
        self._observe("vidgen_worker_cancel_latency_seconds", seconds)

    def artifact_moved(self, direction: Direction, size: int, seconds: float) -> None:
        """`size` in bytes."""
        self._inc("vidgen_worker_artifact_bytes_total", size, direction=direction)
        self._observe("vidgen_worker_artifact_seconds", seconds, direction=direction)

    def checkpoint(self, outcome: CheckpointOutcome) -> None:
        self._inc("vidgen_worker_checkpoints_total", outcome=outcome)

    def switched(self, seconds: float) -> None:
        """This stage's model came to the device in another one's place."""
        self._observe("vidgen_worker_switch_seconds", seconds)

    def memory_rungs(self, rungs: Iterable[engine.Rung]) -> None:
        """Call once per try of a task at the device, with what it took to fit."""
        for rung in rungs:
            self._inc("vidgen_worker_memory_rungs_total", rung=rung)

    def heartbeat_failed(self) -> None:
        self._inc("vidgen_worker_heartbeats_failed_total")


class GatewayMetrics(_Exposed):
    """What one gateway measures: each replica counts the events that it applied, so sum over the replicas.

    Queues and fleet are the same on every replica: take the maximum.
    """

    def __init__(self) -> None:
        super().__init__(GATEWAY)

    def observe(self, event: contracts.AnyEvent, job: contracts.Job) -> None:
        """Count an event that was just applied to `job` for the first time; never for a duplicate or a fenced one."""
        match event:
            case contracts.Rejected():
                self.request_rejected()
                self.dead_lettered(None)
                self._inc("vidgen_errors_total", stage="request", code=job.error.code if job.error else "rejected")
            case contracts.StageStarted():
                if event.deliveries > 1:
                    self._inc("vidgen_redeliveries_total", stage=event.stage)
            case contracts.StageCompleted():
                self._ended(event, job, "reused" if event.reused else "completed")
                record = job.stage_record(event.stage)
                self._completed(event, whole=record is None or record.in_one_go)
            case contracts.StageFailed():
                self._ended(event, job, "failed" if event.final else "retried")
                self._inc("vidgen_errors_total", stage=event.stage, code=event.error.code)
                if event.final:
                    self.dead_lettered(event.stage)
            case contracts.StageReleased():
                self._ended(event, job, "released")
            case contracts.StageCancelled():
                self._ended(event, job, "cancelled")
                if event.cancel_latency_s is not None:
                    self._observe("vidgen_cancel_latency_seconds", event.cancel_latency_s, stage=event.stage)
            case _:
                pass  # the others say what was asked for, or sum up: `job_finished` counts the ends of jobs

    def job_finished(self, job: contracts.Job, end: contracts.AnyEnd) -> None:
        """Count the end of one of a job's runs, by what its log says: the record may be that of a later one."""
        self._inc("vidgen_jobs_total", status=end.type)
        self._observe("vidgen_job_seconds", (end.at - job.created_at).total_seconds(), status=end.type)

    def request_accepted(self) -> None:
        """A request that became a job."""
        self._inc("vidgen_requests_total", outcome="accepted")

    def request_rejected(self) -> None:
        """A request refused at the HTTP edge; one from the bus is counted by its `rejected` event."""
        self._inc("vidgen_requests_total", outcome="rejected")

    def request_duplicate(self) -> None:
        """A request whose job is known already."""
        self._inc("vidgen_requests_total", outcome="duplicate")

    def dead_lettered(self, stage: Stage | Literal["webhook"] | None) -> None:
        """A dead letter that no event stands for; final failures and rejections are counted by `observe`."""
        self._inc("vidgen_dead_letters_total", stage=stage or "request")

    def handed_back(self, stage: Stage) -> None:
        """A task of a worker that died was handed out again."""
        self._inc("vidgen_orphans_total", stage=stage)

    def swept(self, kind: Kept, count: int, size: int) -> None:
        """Objects that were deleted from the bucket, and their bytes."""
        self._inc("vidgen_swept_objects_total", count, kind=kind)
        self._inc("vidgen_swept_bytes_total", size, kind=kind)

    def webhook(self, outcome: WebhookOutcome) -> None:
        """Call once per try, with how it ended."""
        self._inc("vidgen_webhooks_total", outcome=outcome)

    def webhook_tried(self, seconds: float) -> None:
        self._observe("vidgen_webhook_seconds", seconds)

    def http_request(self, route: str | None, method: str, status: int, seconds: float) -> None:
        """`route` is the template (`/v1/jobs/{id}`), never the path; None where no route matched."""
        route, method = route or "unmatched", method if method in METHODS else "other"
        self._inc("vidgen_http_requests_total", route=route, method=method, status=str(status))
        self._observe("vidgen_http_request_seconds", seconds, route=route, method=method)

    def fleet(
        self, workers: Sequence[WorkerInfo], depths: Mapping[tuple[Stage, Lane], bus.Depth], now: datetime
    ) -> None:
        """Replace queues and fleet by what the bus just said."""
        self._set("vidgen_gateway_bus_up", 1)
        figures = [*_queue_figures(depths, now), *_fleet_figures(workers)]
        self._snapshots.replace(figures, only=("vidgen_queue_", "vidgen_fleet_"))

    def bus(
        self, consumers: Mapping[topology.Consumer, bus.Depth], streams: Mapping[str, bus.Held], seconds: float
    ) -> None:
        """Replace what waits on the bus and what it holds; `seconds` is how long it took to say all that."""
        self._set("vidgen_gateway_bus_seconds", seconds)
        figures = [*_consumer_figures(consumers), *_stream_figures(streams)]
        self._snapshots.replace(figures, only=("vidgen_consumer_", "vidgen_stream_"))

    def bus_down(self) -> None:
        """The bus did not answer: keep the last figures and say so."""
        self._set("vidgen_gateway_bus_up", 0)

    def store(self, up: bool, seconds: float) -> None:
        """Whether the object store answered, and how long that, or waiting for it, took."""
        self._set("vidgen_gateway_store_up", up)
        self._set("vidgen_gateway_store_seconds", seconds)

    def _ended(
        self,
        event: contracts.StageCompleted | contracts.StageFailed | contracts.StageReleased | contracts.StageCancelled,
        job: contracts.Job,
        outcome: GatewayOutcome,
    ) -> None:
        lane: Lane = job.request.lane if job.request else "interactive"
        self._inc("vidgen_tasks_total", stage=event.stage, lane=lane, outcome=outcome)
        self._inc("vidgen_gpu_seconds_total", max(0.0, event.gpu_seconds), stage=event.stage)
        self._inc("vidgen_cost_dollars_total", max(0.0, event.cost_usd), stage=event.stage)

    def _completed(self, event: contracts.StageCompleted, *, whole: bool) -> None:
        size = sum(artifact.size for artifact in event.artifacts)
        self._inc("vidgen_artifact_bytes_total", size, stage=event.stage)
        made = sum(artifact.content_type == RESULT_TYPES[event.stage] for artifact in event.artifacts)
        self._inc("vidgen_results_total", made, stage=event.stage)
        if event.reused:
            return  # nothing was computed: its timings would pull the histograms down
        self._inc("vidgen_steps_total", event.steps, stage=event.stage)
        self._observe_timings("vidgen", event.timings, stage=event.stage)
        if event.steps and whole:  # of one that went on from a checkpoint nobody says how many steps these seconds are
            self._observe("vidgen_seconds_per_step", event.timings.denoise / event.steps, stage=event.stage)


def _queue_figures(
    depths: Mapping[tuple[Stage, Lane], bus.Depth], now: datetime
) -> Iterator[tuple[str, Sequence[str], float]]:
    for lane, depth in depths.items():
        yield "vidgen_queue_depth", lane, depth.pending
        yield "vidgen_queue_ack_pending", lane, depth.ack_pending
        yield "vidgen_queue_oldest_age_seconds", lane, _age(depth.oldest_at, now)
        yield "vidgen_queue_oldest_waiting_seconds", lane, _age(depth.oldest_pending_at, now)


def _age(since: datetime | None, now: datetime) -> float:
    return max(0.0, (now - since).total_seconds()) if since else 0.0


def _consumer_figures(
    consumers: Mapping[topology.Consumer, bus.Depth],
) -> Iterator[tuple[str, Sequence[str], float]]:
    for consumer, depth in consumers.items():
        where = (consumer.stream, consumer.name)
        yield "vidgen_consumer_pending_messages", where, depth.pending
        yield "vidgen_consumer_ack_pending_messages", where, depth.ack_pending
        yield "vidgen_consumer_redelivered_messages", where, depth.redelivered


def _stream_figures(streams: Mapping[str, bus.Held]) -> Iterator[tuple[str, Sequence[str], float | None]]:
    for name, held in streams.items():
        yield "vidgen_stream_messages", (name,), held.messages
        yield "vidgen_stream_bytes", (name,), held.bytes
        yield "vidgen_stream_limit_bytes", (name,), held.limit


def _fleet_figures(workers: Sequence[WorkerInfo]) -> Iterator[tuple[str, Sequence[str], float | None]]:
    for stage, state in product(STAGES, STATES):
        alive = sum(worker.stage == stage and worker.state == state for worker in workers)
        yield "vidgen_fleet_workers", (stage, state), alive
    told: set[tuple[str, str]] = set()
    for worker in sorted(workers, key=lambda worker: STAGES.index(worker.stage)):
        for gpu in worker.gpus:
            where = (worker.stage, worker.id, *_gpu_labels(gpu))
            if (worker.id, gpu.uuid) not in told:  # one process may serve both stages on it
                yield from _gpu_figures("vidgen_fleet", (worker.stage, worker.id), gpu)
            told.add((worker.id, gpu.uuid))
            what = (worker.engine, worker.model, worker.profile or "", worker.host, worker.state)
            yield "vidgen_fleet_info", (*where, *what), 1
            yield "vidgen_fleet_tasks_running", where, len(worker.running)
            yield "vidgen_fleet_gpu_busy_seconds_total", where, worker.busy_seconds
            yield "vidgen_fleet_seconds_per_step", where, worker.seconds_per_step
            yield "vidgen_fleet_model_load_seconds", where, worker.load_seconds


# ── the reference ────────────────────────────────────────────────────────────────────────────────────────────────

BEGIN, END = "<!-- metrics: begin (python -m vidgen.metrics FILE writes this) -->", "<!-- metrics: end -->"


def reference_table() -> str:
    """Both groups as markdown tables, for `docs/reference.md`."""
    parts = []
    for title, metrics in (("On each worker's own port", WORKER), ("On the gateway", GATEWAY)):
        parts += [f"**{title}**", "", "| metric | type | unit | labels | meaning |", "|---|---|---|---|---|"]
        parts += [_row(metric) for metric in metrics] + [""]
    return "\n".join(parts)


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label.name}`" for label in metric.labels) or "none"
    return f"| `{metric.name}` | {metric.type} | {metric.unit} | {labels} | {metric.help} |"


def write_reference(path: Path) -> None:
    """Put the tables between the two markers of a markdown file."""
    reference.put_between(path, BEGIN, END, reference_table())


if __name__ == "__main__":
    write_reference(Path(sys.argv[1]))
