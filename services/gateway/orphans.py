"""Hands out again what a dead worker held, in seconds: its leases would run for a minute.

A worker is dead when its entry in the registry is no longer renewed and nobody listens on its subject. The kernel
closes the connections of a process that ends, so that is known at once; a worker that merely stalls is still connected.
Where this is wrong all the same, the fence holds: the task is computed once too often, and has one effect.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Mapping

import structlog

from gateway.fleet import Fleet
from gateway.jobs import now
from vidgen import contracts, errors, eventlog, topology
from vidgen.bus import Bus, Stored
from vidgen.contracts import LANES, Stage, WorkerInfo
from vidgen.metrics import GatewayMetrics

log = structlog.get_logger(__name__)

LOOK_S = 1.0
EXCUSES = 3  # of one task: then it may be the one that kills, though it never was on the device

_Place = tuple[Stage, int, int]  # a task by its sequence, where its job's log stands at that


class Orphans:
    """Looks after the tasks of workers that died. Each replica does; what is done twice does no harm."""

    def __init__(
        self, bus: Bus, fleet: Fleet, metrics: GatewayMetrics, silence_s: float, *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._bus, self._fleet, self._metrics = bus, fleet, metrics
        self._silence_s, self._clock = silence_s, clock
        # By the change of an entry and our own clock: the clocks of two machines may differ.
        self._heard: dict[tuple[Stage, str], tuple[WorkerInfo, float]] = {}
        self._missed: set[tuple[Stage, str]] = set()  # not there at the last look
        self._unclaimed: dict[_Place, float] = {}  # in nobody's hands, since when
        self._on_device: dict[str, str | None] = {}  # of dead workers
        self._handed: dict[_Place, float] = {}  # when; whoever took it then may have died as well

    async def run(self, stop: asyncio.Event) -> None:
        """Look until `stop`."""
        while not stop.is_set():
            try:
                await self.look()
            except errors.VidgenError as exc:
                log.warning(exc.message, _event="orphans_unknown")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await stop.wait()

    async def look(self) -> None:
        """Hand out again what is held by whoever was silent for long enough and is not there, twice in a row."""
        workers = {(worker.stage, worker.id): worker for worker in await self._fleet.workers()}
        missed, self._missed = self._missed, await self._missing(workers)
        dead = missed & self._missed  # once may be a reconnection
        seen, self._unclaimed = self._unclaimed, {}
        if not dead:
            self._handed.clear()
        running = {job for name, worker in workers.items() if name not in dead for job in worker.running}
        # One process may serve both stages, with one device.
        self._on_device = {name: workers[of, name].generating for of, name in dead if workers[of, name].generating}
        for stage in {stage for stage, _ in dead}:
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

    async def _look_after(
        self, consumer: topology.Consumer, task: Stored, stage: Stage, dead: Collection[str], alive: Collection[str],
        seen: Mapping[_Place, float],
    ) -> None:  # fmt: skip
        at, job_id = self._clock(), _job_of(task)
        newest = await eventlog.newest(self._bus, job_id)
        event = newest.event if isinstance(newest.event, contracts.StageEvent) and newest.event.stage == stage else None
        place = stage, task.seq, newest.seq
        waits = isinstance(event, contracts.StageFailed | contracts.StageReleased)
        holder = None if event is None or waits else event.worker
        if holder in alive:
            return
        if holder not in dead:
            # Taken by one who died before saying so, or just now by one who is alive: a later look tells.
            self._unclaimed[place] = seen.get(place, at)
            back_off = event.retry_in_s or 0.0 if isinstance(event, contracts.StageFailed) else 0.0
            if place not in seen or at - seen[place] < (self._silence_s if holder else back_off):
                return
        if at - self._handed.get(place, at - self._silence_s) < self._silence_s:
            return
        self._handed[place] = at
        if holder in dead and self._on_device.get(holder or "", job_id) != job_id:
            await self._excuse(newest)
        await self._bus.hand_back(consumer, task.seq)
        self._metrics.handed_back(stage)
        log.warning("a worker died: its task is handed out again", _event="orphan", job=job_id, stage=stage)

    async def _excuse(self, begun: eventlog.Newest) -> None:
        """The one on the device is likely to have killed the process: for those beside it the try does not count."""
        if isinstance(begun.event, contracts.StageStarted) and begun.event.attempt - begun.event.tries < EXCUSES:
            stamp = begun.event.model_dump(include=set(contracts.StageReleased.model_fields) - {"type", "tries", "at"})
            excused = contracts.StageReleased.model_validate(
                stamp | {"tries": begun.event.tries - 1, "at": now(), "started_at": begun.event.at}
            )
            with contextlib.suppress(errors.ConflictError):  # somebody has gone on with it
                await self._bus.publish(
                    topology.subject_of_events(excused.job_id), excused.to_bytes(), expect_last=begun.seq,
                    message_id=f"{excused.job_id}:{excused.stage}:{excused.run}:{excused.attempt}:excused",
                )  # fmt: skip


def _job_of(task: Stored) -> str:
    return task.subject.rsplit(".", 1)[-1]
