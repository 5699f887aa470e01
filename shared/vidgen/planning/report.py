"""What a run says: how long jobs waited and took, what the GPUs cost, how busy they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vidgen.contracts import LANES, Lane, Stage
from vidgen.planning.simulation import Job, Run


@dataclass(frozen=True)
class Spread:
    """Seconds, over the jobs of a lane."""

    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class LaneReport:
    """How long the jobs of a lane waited for GPUs, both stages together, and how long they took in all."""

    jobs: int
    waiting_s: Spread
    total_s: Spread


@dataclass(frozen=True)
class StageReport:
    """What a stage's GPUs did. Dollars are None where the GPU has no price; they count idle and starting GPUs too.

    `load` is the share of the planned time for which its tasks would keep the most replicas busy: over 1 a queue grows.
    """

    gpu: str
    tasks: int
    task_s: float
    gpu_hours: float
    utilisation: float
    load: float
    most_replicas: int
    dollars: float | None
    dollars_per_1000: float | None


@dataclass(frozen=True)
class Report:
    """All of it. `lasted_s` is the planned time, or longer where the last jobs took longer."""

    lasted_s: float
    lanes: Mapping[Lane, LaneReport]
    stages: Mapping[Stage, StageReport]


@dataclass(frozen=True)
class Serving:
    """What the simulation need not know of a stage: the GPU's name and price, and the most replicas allowed."""

    gpu: str
    dollars_per_hour: float | None
    most: int


def report(run: Run, serving: Mapping[Stage, Serving], horizon_s: float) -> Report:
    """Sum a run up; lanes and stages without work are left out."""
    lanes = {lane: [job for job in run.jobs if job.arrival.lane == lane] for lane in LANES}
    return Report(
        run.lasted_s,
        {lane: _lane(jobs) for lane, jobs in lanes.items() if jobs},
        {stage: _stage(run, stage, serving[stage], horizon_s) for stage, one in run.stages.items() if one.tasks},
    )


def _lane(jobs: Sequence[Job]) -> LaneReport:
    return LaneReport(len(jobs), _spread([job.waiting_s for job in jobs]), _spread([job.total_s for job in jobs]))


def _spread(seconds: Sequence[float]) -> Spread:
    p50, p95, p99 = (float(one) for one in np.percentile(seconds, (50, 95, 99)))
    return Spread(float(np.mean(seconds)), p50, p95, p99)


def _stage(run: Run, stage: Stage, serving: Serving, horizon_s: float) -> StageReport:
    one = run.stages[stage]
    hours = one.paid_s / 3600
    dollars = None if serving.dollars_per_hour is None else hours * serving.dollars_per_hour
    return StageReport(
        gpu=serving.gpu,
        tasks=one.tasks,
        task_s=one.busy_s / one.tasks,
        gpu_hours=hours,
        utilisation=one.busy_s / one.paid_s if one.paid_s else 0.0,
        load=one.busy_s / (serving.most * horizon_s) if horizon_s else 0.0,
        most_replicas=one.most_replicas,
        dollars=dollars,
        dollars_per_1000=None if dollars is None else dollars / one.tasks * 1000,
    )
