"""A fair share of each lane's queue for each tenant: what is beyond it is held until the tenant's tasks start.

Why so: docs/decisions/0012-fair-share.md.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

import pydantic
import structlog

from vidgen import contracts, errors, topology
from vidgen.bus import Bus, Stored
from vidgen.contracts import LANES, STAGES, Lane, Stage
from vidgen.tenants import Tenants

log = structlog.get_logger(__name__)

SWEEP_S = 5.0
AT_ONCE = 16  # places that are looked at side by side
UNSHARED = 1000  # at a time, where what was held is held no longer


@dataclass(frozen=True)
class Place:
    """Where a tenant's tasks wait."""

    stage: Stage
    lane: Lane
    tenant: str

    @property
    def queued(self) -> str:
        return topology.subject_of_task(self.stage, self.lane, "*", self.tenant)

    @property
    def held(self) -> str:
        return topology.subject_of_held(self.stage, self.lane, "*", self.tenant)


class FairShare:
    """Puts tasks on their queues, at most `waiting` of a tenant in each lane; any number of gateways may do so.

    With `waiting` 0, or as long as there is no tenant but the operator's own, each goes there at once.
    """

    def __init__(self, bus: Bus, tenants: Tenants, waiting: int, *, sweep_s: float = SWEEP_S) -> None:
        self._bus, self._tenants, self._waiting, self._sweep_s = bus, tenants, waiting, sweep_s
        self._freed: set[Place] = set()
        self._wake = asyncio.Event()
        self._shared = False  # as far as this gateway knows
        self._passed_over: set[int] = set()  # held tasks of another version that wait for one in the queue

    async def queue(self, task: contracts.Task, message_id: str, headers: dict[str, str] | None) -> None:
        """Queue a task, or hold it until its tenant has room. Raises ConflictError `already_queued`, and BusError."""
        where = task.stage, task.lane, task.job_id, task.tenant
        if not self._waiting or not await self._tenants.several():
            await self._put(topology.TASKS, topology.subject_of_task(*where), task.to_bytes(), message_id, headers)
            return
        self._shared = True
        # All of them, so that none overtakes those that are held.
        await self._put(topology.HELD, topology.subject_of_held(*where), task.to_bytes(), message_id, headers)
        self.freed(task.stage, task.lane, task.tenant)

    async def queue_again(self, task: contracts.Task, spent: Stored) -> None:
        """Queue a task anew whose deliveries ran out, in its own place; harmless to repeat. Raises BusError.

        By way of what is held, so that it is never in neither: whoever dies on the way leaves it to the next sweep.
        """
        subject = topology.subject_of_held(task.stage, task.lane, task.job_id, task.tenant)
        with contextlib.suppress(errors.ConflictError):  # it is held already
            await self._bus.publish(
                subject, spent.body, message_id=f"{task.job_id}:{task.stage}:{task.run}:{spent.seq}",
                headers={topology.HEADER_REPLACES: str(spent.seq)},
            )  # fmt: skip
        self._shared = True
        self.freed(task.stage, task.lane, task.tenant)

    def freed(self, stage: Stage, lane: Lane, tenant: str) -> None:
        """Look soon whether more of a tenant's tasks may move up: one of them started or left."""
        if not self._shared:
            return
        self._freed.add(Place(stage, lane, tenant))
        self._wake.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Move tasks up until `stop`; now and then everywhere, for what another gateway did not come to."""
        clock = asyncio.get_running_loop().time
        stopping = asyncio.ensure_future(stop.wait())
        sweep_at = clock()
        try:
            while not stop.is_set():
                places = self._take_freed()
                if clock() >= sweep_at:
                    places |= await self._everywhere()
                    sweep_at = clock() + self._sweep_s
                await self._move(places)
                waking = asyncio.ensure_future(self._wake.wait())
                left = max(0.0, sweep_at - clock())
                try:
                    await asyncio.wait((waking, stopping), timeout=left, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    waking.cancel()
        finally:
            stopping.cancel()

    def _take_freed(self) -> set[Place]:
        self._wake.clear()
        places, self._freed = self._freed, set()
        return places

    async def _everywhere(self) -> set[Place]:
        try:
            holds = (await self._bus.held(topology.HELD)).messages > 0
            self._shared = holds or (self._waiting > 0 and await self._tenants.several())
            if not holds:
                return set()
            tenants = {*await self._tenants.all(), contracts.DEFAULT_TENANT}
        except errors.BusError:
            return set()  # who asks for the lanes says so aloud
        return {Place(stage, lane, tenant) for stage in STAGES for lane in LANES for tenant in tenants}

    async def _move(self, places: set[Place]) -> None:
        at_once = asyncio.Semaphore(AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for place in places:
                group.create_task(self._fill_or_wait(place, at_once))

    async def _fill_or_wait(self, place: Place, at_once: asyncio.Semaphore) -> None:
        try:
            async with at_once:
                await self.fill(place)
        except errors.BusError as exc:  # the next sweep comes to it
            log.warning(exc.message, _event="share_waits", stage=place.stage, lane=place.lane)

    async def fill(self, place: Place) -> None:
        """Move a tenant's oldest held tasks into the queue while fewer of its tasks wait there than may."""
        after = 0
        while (held := await self._bus.first(topology.HELD, place.held, after)) is not None:
            room = await self._room(place)
            if room <= 0:
                return
            while held is not None and room > 0:
                after = held.seq
                if not await self._queue_held(held, place):
                    held = await self._bus.first(topology.HELD, place.held, after)
                    continue
                room -= 1
                self._passed_over.discard(after)
                _, held = await asyncio.gather(
                    self._bus.delete(topology.HELD, after),
                    self._bus.first(topology.HELD, place.held, after),
                )

    async def _room(self, place: Place) -> int:
        """How many more may wait: those that a worker has taken are not among those that wait."""
        own = (await self._tenants.get(place.tenant)).share
        given = (await self._bus.depth(topology.consumer_of(place.stage, place.lane))).delivered
        return (own or self._waiting or UNSHARED) - await self._bus.count(topology.TASKS, place.queued, given)

    async def _queue_held(self, held: Stored, place: Place) -> bool:
        """Queue a held task, to be held no longer behind it. Whoever dies in between leaves it to the next, as it was.

        False where one is in the queue that may be another: it moves up at a sweep behind that.

        It keeps its message id and its place in the log: queued twice is once, and the fence knows what it knew.
        """
        job_id = held.subject.rsplit(".", 1)[-1]
        headers = {name: value for name, value in held.headers.items() if not name.startswith("Nats-")}
        subject = topology.subject_of_task(place.stage, place.lane, job_id, place.tenant)
        if (spent := headers.pop(topology.HEADER_REPLACES, None)) is not None:
            await self._bus.delete(topology.TASKS, int(spent))
        try:
            await self._put(topology.TASKS, subject, held.body, held.headers["Nats-Msg-Id"], headers)
        except errors.ConflictError:
            return await self._is_queued(held, subject)
        return True

    async def _is_queued(self, held: Stored, subject: str) -> bool:
        queued = await self._bus.last(topology.TASKS, subject)
        if queued is None:  # it left just now, and may have been one of a run before
            return False
        own, other = run_of(held.body), run_of(queued.body)
        if own is not None and other is not None:
            return other >= own
        if held.seq not in self._passed_over:
            log.warning(
                "a held task waits for one in the queue: is one of them of another version?", _event="held_unreadable",
                subject=held.subject, seq=held.seq,
            )  # fmt: skip
        self._passed_over.add(held.seq)
        return False

    async def _put(
        self, stream: str, subject: str, body: bytes, message_id: str, headers: dict[str, str] | None
    ) -> None:
        """Publish a task. In place of one of a run before: whoever cancelled that may have died before withdrawing it.

        Left there it would be taken for this one, and then be dropped. Raises ConflictError `already_queued` where it
        is this one.
        """
        while True:
            try:
                await self._bus.publish(subject, body, message_id=message_id, headers=headers)
            except errors.ConflictError:
                run = run_of(body)
                if run is None or not await withdraw(self._bus, stream, subject, run - 1):
                    raise
            else:
                return


async def withdraw(bus: Bus, stream: str, subject: str, run: int) -> bool:
    """Take a task of `run`, or of one before, from where it waits; whether there is none there now.

    One of another version stays: a worker that can read it will drop it, by the log.
    """
    # By its sequence: a purge of the subject could take the task of a retry that another replica just published.
    stored = await bus.last(stream, subject)
    if stored is None:
        return True
    found = run_of(stored.body)
    if found is None or found > run:
        return False
    await bus.delete(stream, stored.seq)
    return True


def run_of(body: bytes) -> int | None:
    """The run of a task; None for one of another version."""
    try:
        return contracts.Task.model_validate_json(body).run
    except pydantic.ValidationError:
        return None
