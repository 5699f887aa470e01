"""The system without its computing: lanes, workers and the autoscaler as they are, tasks that only take time."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import simpy

from vidgen import worker
from vidgen.contracts import LANES, STAGES, Lane, Stage
from vidgen.planning import scaling
from vidgen.planning.arrivals import Arrival
from vidgen.planning.scaling import Scaling

SAMPLES = 600  # of queue and replicas over the planned time
CHECKPOINT_OVER_S = 20.0

Steps = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class Served:
    """How one stage is served: seconds a task holds a GPU on average, and seconds it takes before and behind it.

    `added_s` is to fetch and prepare, to encode and store, and for the gateway to say what is next. The GPU works on
    meanwhile.
    """

    seconds: float
    scaling: Scaling
    added_s: float = 0.0


@dataclass(frozen=True)
class Policy:
    """What the workers do, by default as `vidgen.worker` does it.

    `vary` is how the seconds of tasks are spread. `checkpoint_over_s` is VIDGEN_CHECKPOINT_OVER_S; with None, as with
    the preview engines, no batch task makes way in its middle.
    """

    vary: Literal["constant", "exponential"] = "constant"
    look_ahead: bool = True
    batch_share: int = worker.BATCH_SHARE
    lead_s: float = worker.LEAD_S
    idle_wait_s: float = worker.IDLE_WAIT_S
    checkpoint_over_s: float | None = CHECKPOINT_OVER_S


@dataclass(eq=False)
class Task:
    """One stage's work for one job, and what became of it."""

    job: Job
    stage: Stage
    seconds: float
    queued_at: float = 0.0
    started_at: float | None = None
    left_s: float = 0.0
    preempted: int = 0

    @property
    def lane(self) -> Lane:
        return self.job.arrival.lane


@dataclass(eq=False)
class Job:
    """A job's way; `done_at` is when its last artifact was stored."""

    arrival: Arrival
    tasks: list[Task] = field(default_factory=list)
    added_s: float = 0.0
    done_at: float = 0.0

    @property
    def total_s(self) -> float:
        return self.done_at - self.arrival.at

    @property
    def waiting_s(self) -> float:
        """What it would not have taken alone, with a GPU at hand."""
        return max(0.0, self.total_s - self.added_s - sum(task.seconds for task in self.tasks))


@dataclass(frozen=True)
class Sample:
    """How it stood: tasks that wait, tasks on a GPU, and replicas, per stage."""

    at: float
    waiting: Mapping[Stage, int]
    busy: Mapping[Stage, int]
    replicas: Mapping[Stage, int]


@dataclass(frozen=True)
class StageRun:
    """What a stage took: seconds of GPUs at work, seconds of GPUs that were there, and the most replicas at once."""

    tasks: int
    busy_s: float
    paid_s: float
    most_replicas: int


@dataclass(frozen=True)
class Run:
    """What came out. It lasts to the end of the planned time, or of the last job."""

    jobs: Sequence[Job]
    stages: Mapping[Stage, StageRun]
    samples: Sequence[Sample]
    lasted_s: float


def simulate(
    arrivals: Sequence[Arrival], served: Mapping[Stage, Served], policy: Policy | None = None,
    *, horizon_s: float = 0.0, seed: int = 0,
) -> Run:  # fmt: skip
    """Play `arrivals`, ordered by time, to the end of the last job; the same arguments give the same run.

    Every stage that a job needs must be in `served`, with at least one replica at most.
    """
    return _System(arrivals, served, policy or Policy(), horizon_s, seed).play()


class _System:
    """The gateway's part: jobs come, and a stage that is done asks for the next."""

    def __init__(
        self, arrivals: Sequence[Arrival], served: Mapping[Stage, Served], policy: Policy, horizon_s: float, seed: int
    ) -> None:
        self.env = simpy.Environment()
        self._draw = np.random.default_rng([seed, 1])
        self._served, self._policy = served, policy
        self._horizon_s = max(horizon_s, arrivals[-1].at if arrivals else 0.0)
        self.jobs = [Job(arrival) for arrival in arrivals]
        self._unfinished = len(self.jobs)
        self._all_done = self.env.event()
        self._samples: list[Sample] = []
        self.stages = {stage: _Stage(self, stage, served[stage], policy) for stage in STAGES if stage in served}

    def play(self) -> Run:
        before = None
        for stage in self.stages.values():
            stage.begin(before if self._policy.look_ahead else None)
            before = stage
        self.env.process(self._arrive())
        self.env.process(self._sample())
        if self.jobs:
            self.env.run(until=self._all_done)
        if self.env.now < self._horizon_s:
            self.env.run(until=self._horizon_s)
        return Run(self.jobs, {name: stage.run() for name, stage in self.stages.items()}, self._samples, self.env.now)

    def _arrive(self) -> Steps:
        for job in self.jobs:
            if job.arrival.at > self.env.now:
                yield self.env.timeout(job.arrival.at - self.env.now)
            self.go_on(job)

    def go_on(self, job: Job) -> None:
        """Queue the job's next task, or end it."""
        wanted = job.arrival.stages[len(job.tasks) :]
        if wanted:
            seconds = self._served[wanted[0]].seconds
            if self._policy.vary == "exponential":
                seconds = float(self._draw.exponential(seconds))
            task = Task(job, wanted[0], seconds, queued_at=self.env.now, left_s=seconds)
            job.tasks.append(task)
            self.stages[task.stage].queue(task)
            return
        job.done_at = self.env.now
        self._unfinished -= 1
        if not self._unfinished:
            self._all_done.succeed()

    def _sample(self) -> Steps:
        every = max(1.0, self._horizon_s / SAMPLES)
        while True:
            self._samples.append(
                Sample(
                    self.env.now,
                    {name: stage.waiting for name, stage in self.stages.items()},
                    {name: stage.busy for name, stage in self.stages.items()},
                    {name: stage.there() for name, stage in self.stages.items()},
                )
            )
            yield self.env.timeout(every)


@dataclass(eq=False)
class _Wait:
    """A worker that has asked for a task, and asks anew every `idle_wait_s`."""

    worker: _Worker
    since: float
    given: simpy.Event


class _Stage:
    """The two lanes of a stage, its workers, and what scales them."""

    def __init__(self, system: _System, name: Stage, served: Served, policy: Policy) -> None:
        self.env, self.system, self.name, self.served, self.policy = system.env, system, name, served, policy
        self.lanes: dict[Lane, deque[Task]] = {lane: deque() for lane in LANES}
        self.workers: list[_Worker] = []
        self._leaving: list[_Worker] = []
        self.unfinished = 0  # what KEDA counts: pending and ack-pending
        self.waiting = self.busy = 0  # for a GPU; on one
        self.stuck = self.env.event()  # an interactive task waits, and no worker asks for one
        self._waits: list[_Wait] = []
        self._looking = False
        self._tasks = self._most = 0
        self._busy_s = self._paid_s = 0.0

    def run(self) -> StageRun:
        paid = self._paid_s + sum(self.env.now - one.begun for one in self.workers)
        return StageRun(self._tasks, self._busy_s, paid, self._most)

    # ── tasks ────────────────────────────────────────────────────────────────────────────────────────────────────

    def queue(self, task: Task) -> None:
        self.unfinished += 1
        self.waiting += 1
        self._tasks += 1
        self.lanes[task.lane].append(task)
        self._offer(task.lane)

    def hand_back(self, task: Task) -> None:
        """What was handed back is delivered before what is new."""
        self.lanes[task.lane].appendleft(task)
        self._offer(task.lane)

    def _offer(self, lane: Lane) -> None:
        if lane == "batch":
            self._look()
        elif self._waits:
            # The server answers the request that it has had for longest.
            self._give(max(self._waits, key=self._asked_for), self.lanes["interactive"].popleft())
        else:
            self.stuck.succeed()
            self.stuck = self.env.event()

    def held(self) -> None:
        self.waiting -= 1
        self.busy += 1

    def freed(self, seconds: float) -> None:
        self.busy -= 1
        self._busy_s += seconds

    def settle(self, task: Task) -> None:
        self.unfinished -= 1
        self.system.go_on(task.job)

    def ask(self, by: _Worker) -> simpy.Event:
        """The event that brings this worker its task."""
        wait = _Wait(by, self.env.now, self.env.event())
        self._waits.append(wait)
        return wait.given

    def _give(self, wait: _Wait, task: Task) -> None:
        self._waits.remove(wait)
        wait.given.succeed(task)

    def _asked_for(self, wait: _Wait) -> float:
        return math.fmod(self.env.now - wait.since, self.policy.idle_wait_s)

    def _look(self) -> None:
        if not self._looking and self._waits:
            self._looking = True
            self.env.process(self._hand_to_the_idle())

    def _hand_to_the_idle(self) -> Steps:
        """A worker that waits has asked for an interactive task: it looks for a batch task when it asks anew."""
        while self.lanes["batch"] and self._waits:
            wait = max(self._waits, key=self._asked_for)
            yield self.env.timeout(self.policy.idle_wait_s - self._asked_for(wait))
            if self.lanes["batch"] and wait in self._waits:
                self._give(wait, self.lanes["batch"].popleft())
        self._looking = False

    def there(self) -> int:
        """Replicas, with those that only finish what they have."""
        self._leaving = [one for one in self._leaving if one.free_at > self.env.now]
        return len(self.workers) + len(self._leaving)

    # ── replicas ─────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, before: _Stage | None) -> None:
        self._scale(self.served.scaling.floor, warm=True)
        if not self.served.scaling.fixed:
            self.env.process(self._poll(before))
            self.env.process(self._sync(before))

    def _value(self, before: _Stage | None) -> int:
        return scaling.value(self.unfinished, before.unfinished if before else 0)

    def _poll(self, before: _Stage | None) -> Steps:
        active_at = 0.0
        while True:
            value = self._value(before)
            if value:
                active_at = self.env.now
            self._scale(self.served.scaling.polled(value, len(self.workers), self.env.now - active_at))
            yield self.env.timeout(self.served.scaling.polling_s)

    def _sync(self, before: _Stage | None) -> Steps:
        rule = self.served.scaling
        asked_at: deque[tuple[float, int]] = deque()
        ended_at = -math.inf
        while True:
            now, current = self.env.now, len(self.workers)
            asked = rule.asked(self._value(before), current)
            asked_at.append((now, asked))
            while asked_at[0][0] < now - rule.down_window_s:
                asked_at.popleft()
            lately = max(count for _, count in asked_at)
            wanted = rule.synced(asked, current, lately=lately, may_end=now - ended_at >= rule.down_every_s)
            ended_at = now if wanted < current else ended_at
            self._scale(wanted)
            yield self.env.timeout(scaling.HPA_SYNC_S)

    def _scale(self, wanted: int, *, warm: bool = False) -> None:
        while len(self.workers) < wanted:
            one = _Worker(self, 0.0 if warm else self.served.scaling.cold_start_s)
            self.workers.append(one)
            self.env.process(one.live())
        while len(self.workers) > wanted:
            one = min(reversed(self.workers), key=self._use)
            self.workers.remove(one)
            self._waits = [wait for wait in self._waits if wait.worker is not one]
            # It finishes what it has on its GPU.
            self._paid_s += max(one.free_at, self.env.now) - one.begun
            self._leaving.append(one)
        self._most = max(self._most, len(self.workers))

    def _use(self, one: _Worker) -> int:
        """Which ends first: one that starts, then an idle one, then the newest."""
        return 0 if one.starting else 1 if one.free_at <= self.env.now else 2


class _Worker:
    """One replica with one GPU: it takes tasks by lane, the next one shortly before the GPU is free."""

    def __init__(self, stage: _Stage, cold_start_s: float) -> None:
        self.env, self.stage, self.policy = stage.env, stage, stage.policy
        self.begun, self._cold_start_s = stage.env.now, cold_start_s
        self.starting = True
        self.free_at = 0.0
        self._since_batch = 0

    def live(self) -> Steps:
        if self._cold_start_s:
            yield self.env.timeout(self._cold_start_s)
        self.starting = False
        while not self._ends():
            task, gives_way = yield from self._take()
            while task is not None:
                if self.free_at > self.env.now:
                    yield self.env.timeout(self.free_at - self.env.now)
                if self._ends():
                    self.stage.hand_back(task)
                    break
                task, gives_way = (yield from self._hold(task, gives_way)), False

    def _ends(self) -> bool:
        return self not in self.stage.workers

    def _take(self) -> Generator[simpy.Event, Any, tuple[Task | None, bool]]:
        """The next task, and whether a later interactive task may go before it; `LanePuller.next`."""
        owed = self._since_batch >= self.policy.batch_share - 1
        order: tuple[Lane, Lane] = ("batch", "interactive") if owed else ("interactive", "batch")
        for lane in order:
            if self.stage.lanes[lane]:
                return self._count(self.stage.lanes[lane].popleft()), lane == "batch" and not owed
            if owed:
                self._since_batch = 0
        task: Task = yield self.stage.ask(self)
        return self._count(task), task.lane == "batch"

    def _count(self, task: Task) -> Task:
        self._since_batch = 0 if task.lane == "batch" else self._since_batch + 1
        return task

    def _hold(self, task: Task, gives_way: bool) -> Generator[simpy.Event, Any, Task | None]:
        """Have the task on the GPU until the next may be taken; returns the one for which it made way, if any."""
        begun, end = self.env.now, self.env.now + task.left_s
        if task.started_at is None:
            task.started_at = begun
        self.stage.held()
        self.free_at = end
        if gives_way and self.policy.checkpoint_over_s is not None:
            first = yield from self._first(task, end - self.policy.checkpoint_over_s)
            if first is not None:
                self.stage.freed(self.env.now - begun)
                self.free_at = self.env.now
                task.left_s = end - self.env.now
                task.preempted += 1
                self.stage.waiting += 1
                self.stage.hand_back(task)
                return first
        self.env.process(self._finish(task, end, end - begun))
        yield self.env.timeout(max(0.0, end - self.policy.lead_s - self.env.now))
        return None

    def _first(self, task: Task, until: float) -> Generator[simpy.Event, Any, Task | None]:
        """An interactive task that nobody else takes before `until`; it is looked for once a second."""
        waiting = self.stage.lanes["interactive"]
        while task.preempted < worker.MAX_PREEMPTIONS and self.env.now < until:
            if not waiting:
                yield self.stage.stuck | self.env.timeout(until - self.env.now)
                continue
            yield self.env.timeout(worker.LOOK_S - math.fmod(self.env.now - self.begun, worker.LOOK_S))
            if waiting and self.env.now < until:
                return self._count(waiting.popleft())
        return None

    def _finish(self, task: Task, end: float, seconds: float) -> Steps:
        yield self.env.timeout(max(0.0, end - self.env.now))
        self.stage.freed(seconds)
        added = self.stage.served.added_s
        task.job.added_s += added
        if added:
            yield self.env.timeout(added)
        self.stage.settle(task)
