"""What a request would take, and where a task is in its queue: from what recent jobs took and how full the queues are.

`estimate` is pure. Nothing is guessed: a stage that no recent job went through on the engines of now is unknown.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from gateway.fleet import Fleet
from gateway.jobs import Jobs
from vidgen import contracts, topology
from vidgen.bus import Bus, Depth
from vidgen.contracts import Estimate, I2VWork, Lane, QueuePlace, Stage, StageEstimate, StageRecord, StageState, Work

KEEP_RECORDS_S = 5.0  # that long what recent jobs took is not read again
KEEP_FLEET_S = 1.0  # and queues and workers
PLACES_KEPT = 10_000  # tasks whose place in the stream is kept in mind, some 200 bytes each
HELD = 0  # instead of a place: held back by its tenant's limit
LOOK_BACK = 40  # jobs
ALIKE = 5  # tasks of which the median is taken
SAME = 0.02  # what differs by less is of the same size
SERVING = ("ready", "busy")

Depths = Mapping[tuple[Stage, Lane], Depth]


@dataclass(frozen=True)
class Known:
    """What there is to go by: finished stages, newest first, the queues, and each stage's workers and their engines."""

    records: Sequence[StageRecord]
    depths: Depths
    workers: Mapping[Stage, int]
    engines: Mapping[Stage, frozenset[str]]

    def of(self, stage: Stage) -> list[StageRecord]:
        """The stages done by the engines that serve now."""
        return [record for record in self.records if record.stage == stage and record.engine in self.engines[stage]]

    def held(self, stage: Stage) -> int:
        """Tasks that the stage's workers have."""
        return sum(depth.ack_pending for (of, _), depth in self.depths.items() if of == stage)

    def pending(self, stage: Stage, lane: Lane) -> int:
        """Tasks that would be taken before a new one of this lane."""
        lanes = contracts.LANES if lane == "batch" else (lane,)
        return sum(self.depths[stage, one].pending for one in lanes)

    def usual_s(self, stage: Stage) -> float | None:
        """Seconds that a task has taken lately."""
        lately = [_seconds(record) for record in self.of(stage)[:ALIKE]]
        return median(lately) if lately else None


def estimate(work: Sequence[Work], lane: Lane, known: Known) -> Estimate:
    """What the work would take if it were queued now."""
    stages: list[StageEstimate] = []
    begins: float | None = 0.0  # when the next stage may begin
    coming = 0.0  # tasks that reach the next stage's queue before this job does
    for part in work:
        stage = part.kind
        told = _stage(part, known)
        clear = _clear_s(stage, known.pending(stage, lane) + coming, known)
        wait = None if clear is None or begins is None else max(0.0, clear - begins)
        ahead = known.pending(stage, lane) + known.held(stage)
        stages.append(told.model_copy(update={"wait_s": wait, "ahead": ahead}))
        begins = None if wait is None or begins is None or told.seconds is None else begins + wait + told.seconds
        coming = float(ahead)
    return Estimate(
        stages=tuple(stages),
        wait_s=stages[0].wait_s,
        seconds=begins,
        gpu_seconds=_sum([stage.gpu_seconds for stage in stages]),
        cost_usd=_sum([stage.cost_usd for stage in stages]),
    )


def load_of(work: Work) -> float:
    """How much one denoising step of the work is, to compare it with others."""
    if isinstance(work, I2VWork):
        return work.width * work.height * work.num_frames * (2 if work.guidance_scale > 1 else 1)
    return work.width * work.height * work.candidates * (2 if work.true_cfg_scale > 1 else 1)


def _stage(work: Work, known: Known) -> StageEstimate:
    bare = StageEstimate(stage=work.kind, basis="unknown", steps=work.steps, workers=known.workers[work.kind], ahead=0)
    asked = load_of(work)
    # A stable sort: among the equally distant the newest stay in front.
    near = sorted(known.of(work.kind), key=lambda record: round(abs(math.log(load_of(record.work) / asked)) / SAME))
    if not near:
        return bare
    alike = near[:ALIKE]
    ratios = [asked / load_of(record.work) for record in alike]
    per_step = median(r.timings.denoise / r.work.steps * ratio for r, ratio in zip(alike, ratios, strict=True))
    decode = median(record.timings.decode * ratio for record, ratio in zip(alike, ratios, strict=True))
    around = median(_around(record) * ratio for record, ratio in zip(alike, ratios, strict=True))
    gpu_seconds = per_step * work.steps + decode
    price = next((record.cost_usd / record.gpu_seconds for record in near if record.cost_usd > 0), None)
    return bare.model_copy(
        update={
            "basis": "measured" if all(abs(math.log(ratio)) <= SAME for ratio in ratios) else "scaled",
            "seconds_per_step": per_step,
            "seconds": gpu_seconds + around,
            "gpu_seconds": gpu_seconds,
            "cost_usd": None if price is None else price * gpu_seconds,
        }
    )


def _clear_s(stage: Stage, pending: float, known: Known) -> float | None:
    """Seconds until a worker is free for a task that `pending` others come before; None where that is not known."""
    workers, held = known.workers[stage], known.held(stage)
    if not workers:
        return None
    if not pending and held < workers:
        return 0.0
    usual = known.usual_s(stage)
    return None if usual is None else usual * (pending + min(held, workers) / 2) / workers


def _seconds(record: StageRecord) -> float:
    return record.timings.denoise + record.timings.decode + _around(record)


def _around(record: StageRecord) -> float:
    """What is done on the CPU."""
    return record.timings.prepare + record.timings.encode + record.timings.store


def _sum(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


class Forecast:
    """Reads what an estimate goes by from the records and the fleet; many who ask at once cost as one."""

    def __init__(self, bus: Bus, jobs: Jobs, fleet: Fleet, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._bus, self._jobs, self._fleet, self._clock = bus, jobs, fleet, clock
        self._lock = asyncio.Lock()
        self._records: list[StageRecord] = []
        self._records_until = self._known_until = -math.inf
        self._newest: Known | None = None
        self._places: OrderedDict[tuple[str, int, Stage], int] = OrderedDict()  # where tasks lie in their stream

    async def estimate(self, work: Sequence[Work], lane: Lane) -> Estimate:
        """What the work would take if it were queued now. Raises BusError."""
        return estimate(work, lane, await self._known())

    async def place(self, job: contracts.Job) -> QueuePlace | None:
        """Where the job's task is in its queue, or None where none waits. Raises BusError."""
        record = job.stage_record(job.stage) if job.stage and not job.status.final else None
        if record is None or record.state is not StageState.QUEUED:
            return None
        stage: Stage = record.stage
        lane: Lane = job.request.lane if job.request else "interactive"
        known = await self._known()
        depth = known.depths[stage, lane]
        seq = await self._seq(job, stage, lane, depth.delivered)
        if seq is None:
            return None
        # Of what lies between the two places some belongs to other lanes, and what is held may pass others that are:
        # hence at most that many.
        ahead = depth.pending if seq == HELD else min(depth.pending, seq - depth.delivered)
        ahead = max(0, ahead - 1)
        if lane == "batch":
            ahead += known.depths[stage, "interactive"].pending
        return QueuePlace(
            job_id=job.id, stage=stage, ahead=ahead, workers=known.workers[stage], wait_s=_clear_s(stage, ahead, known)
        )

    async def _seq(self, job: contracts.Job, stage: Stage, lane: Lane, delivered: int) -> int | None:
        """Where the job's task lies in its stream, or HELD, or None where there is none."""
        # What waits stays where it is, so whoever watches a long queue need not ask for it again and again.
        key = job.id, job.run, stage
        seq = self._places.pop(key, HELD)
        if seq <= delivered:  # not known, or gone: given out, or queued anew
            where = stage, lane, job.id, job.tenant
            if await self._bus.last(topology.HELD, topology.subject_of_held(*where)) is not None:
                return HELD
            task = await self._bus.last(topology.TASKS, topology.subject_of_task(*where))
            if task is None:
                return None
            seq = task.seq
        self._places[key] = seq
        if len(self._places) > PLACES_KEPT:
            self._places.popitem(last=False)
        return seq

    async def _known(self) -> Known:
        async with self._lock:
            if self._newest is None or self._clock() >= self._known_until:
                depths, alive = await asyncio.gather(self._fleet.depths(), self._fleet.workers())
                self._newest = Known(
                    await self._recent(),
                    depths,
                    {stage: sum(w.stage == stage and w.state in SERVING for w in alive) for stage in contracts.STAGES},
                    {stage: frozenset(w.engine for w in alive if w.stage == stage) for stage in contracts.STAGES},
                )
                self._known_until = self._clock() + KEEP_FLEET_S
            return self._newest

    async def _recent(self) -> list[StageRecord]:
        if self._clock() >= self._records_until:
            page = await self._jobs.list(None, None, LOOK_BACK)
            done = [stage for job in page.jobs for stage in job.stages if _tells(stage)]
            # In a rush of new jobs none of the newest may be done: what was known still holds.
            new = {record.stage for record in done}
            self._records = [*done, *(record for record in self._records if record.stage not in new)]
            self._records_until = self._clock() + KEEP_RECORDS_S
        return self._records


def _tells(record: StageRecord) -> bool:
    """Whether a stage says how long its like takes: not one whose result was there already, nor one resumed."""
    return record.state is StageState.COMPLETED and record.timings.denoise > 0 and record.in_one_go
