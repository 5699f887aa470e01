"""Hands out again what a dead worker held, in seconds: its leases would run for a minute.

A worker is dead when its entry in the registry is no longer renewed and nobody listens on its subject. The kernel
closes the connections of a process that ends, so that is known at once; a worker that merely stalls is still connected.
A bus that was started again has forgotten the registry: then it is enough that the log names one who is not there.
Where this is wrong all the same, the fence holds: the task is computed once too often, and has one effect.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping

import structlog

from gateway.fleet import Fleet
from gateway.share import run_of
from vidgen import contracts, errors, eventlog, topology
from vidgen.bus import Bus, Stored
from vidgen.contracts import LANES, STAGES, Stage, WorkerInfo
from vidgen.metrics import GatewayMetrics
from vidgen.waiting import told_within

log = structlog.get_logger(__name__)

LOOK_S = 1.0
SAID_S = 2.0  # what a worker that is there takes at most until its entry tells what it holds
BACK_S = 10.0  # and to be back on a bus that was away: an attempt that times out, a pause, and the next one

_Place = tuple[Stage, int, int]  # a task by its sequence, where its job's log stands at that


class Orphans:
    """Looks after the tasks of workers that died. Each replica does; what is done twice does no harm."""

    def __init__(
        self, bus: Bus, fleet: Fleet, metrics: GatewayMetrics, silence_s: float, lease_s: float, *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._bus, self._fleet, self._metrics = bus, fleet, metrics
        self._silence_s, self._lease_s, self._clock = silence_s, lease_s, clock
        # By the change of an entry and our own clock: the clocks of two machines may differ.
        self._heard: dict[tuple[Stage, str], tuple[WorkerInfo, float]] = {}
        self._missed: set[tuple[Stage, str]] = set()  # not there at the last look
        self._manned: dict[Stage, float] = {}  # since when there are workers in the registry
        self._unclaimed: dict[_Place, float] = {}  # in nobody's hands, since when
        self._handed: dict[_Place, float] = {}  # when; whoever took it then may have died as well
        self._unreadable: set[str] = set()  # jobs whose log is of another version, and was told of

    async def run(self, stop: asyncio.Event) -> None:
        """Look until `stop`."""
        while not stop.is_set():
            try:
                await self.look()
            except errors.VidgenError as exc:
                log.warning(exc.message, _event="orphans_unknown")
            await told_within(stop, LOOK_S)

    async def look(self) -> None:
        """Hand out again what is held by whoever was silent for long enough and is not there, twice in a row."""
        seen, self._unclaimed = self._unclaimed, {}  # at first: what the bus does not say now has to begin anew
        workers = {(worker.stage, worker.id): worker for worker in await self._fleet.workers()}
        missed, self._missed = self._missed, await self._missing(workers)
        dead = missed & self._missed  # once may be a reconnection
        stages = {stage for stage, _ in dead} | self._in_doubt({stage for stage, _ in workers})
        if not stages:
            self._handed.clear()
            self._unreadable.clear()
        running = {job for name, worker in workers.items() if name not in dead for job in worker.running}
        for stage in stages:
            gone = {name for of, name in dead if of == stage}
            alive = {name for of, name in workers if of == stage and name not in gone}
            for lane in LANES:
                consumer = topology.consumer_of(stage, lane)
                for task in await self._bus.unsettled(consumer):
                    if _job_of(task) not in running:
                        await self._look_after(consumer, task, stage, gone, alive, seen)

    async def _missing(self, workers: dict[tuple[Stage, str], WorkerInfo]) -> set[tuple[Stage, str]]:
        at, known = self._clock(), self._heard
        self._heard = {
            name: known[name] if name in known and known[name][0] == worker else (worker, at)
            for name, worker in workers.items()
        }
        silent = [name for name, (_, since) in self._heard.items() if at - since >= self._silence_s]
        return {name for name in silent if not await self._bus.listened(topology.subject_of_worker(*name))}

    def _in_doubt(self, manned: Collection[Stage]) -> set[Stage]:
        """The stages of which somebody may be forgotten: until a lease behind the first entry that there is.

        Then what the forgotten held has come again by itself. To read all tasks under way each second is not for ever.
        """
        at = self._clock()
        self._manned = {stage: self._manned.get(stage, at) for stage in manned}
        return {stage for stage in STAGES if at - self._manned.get(stage, at) < self._lease_s}

    async def _look_after(
        self, consumer: topology.Consumer, task: Stored, stage: Stage, dead: Collection[str], alive: Collection[str],
        seen: Mapping[_Place, float],
    ) -> None:  # fmt: skip
        at, job_id = self._clock(), _job_of(task)
        try:
            newest = await eventlog.newest(self._bus, job_id, run_of(task.body) or 0)
        except eventlog.UnreadableError as exc:  # this one waits for its lease, and it alone
            if job_id not in self._unreadable:
                log.warning(exc.message, _event="orphan_unknown", job=job_id)
            self._unreadable.add(job_id)
            return
        event = newest.event if isinstance(newest.event, contracts.StageEvent) and newest.event.stage == stage else None
        place = stage, task.seq, newest.seq
        waits = isinstance(event, contracts.StageFailed | contracts.StageReleased)
        holder = None if event is None or waits else event.worker
        if holder in alive:
            return
        if holder is None and not dead:
            return
        if holder not in dead:
            if holder is not None and await self._bus.listened(topology.subject_of_worker(stage, holder)):
                return  # connected again before it is registered again
            # Taken by one who died before saying so, or just now by one who is alive: a later look tells.
            self._unclaimed[place] = seen.get(place, at)
            back_off = event.retry_in_s or 0.0 if isinstance(event, contracts.StageFailed) else 0.0
            wait = max(self._silence_s, BACK_S) if holder else max(back_off, SAID_S)
            if place not in seen or at - seen[place] < wait:
                return
        if at - self._handed.get(place, at - self._silence_s) < self._silence_s:
            return
        self._handed[place] = at
        await self._bus.hand_back(consumer, task.seq)
        self._metrics.handed_back(stage)
        log.warning("a worker died: its task is handed out again", _event="orphan", job=job_id, stage=stage)


def _job_of(task: Stored) -> str:
    return task.subject.rsplit(".", 1)[-1]
