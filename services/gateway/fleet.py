"""The workers alive and how full their queues are, read from the bus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import structlog
from pydantic import ValidationError

from vidgen import errors, topology
from vidgen.bus import Bus, Depth, Held
from vidgen.contracts import LANES, STAGES, Lane, Stage, WorkerInfo
from vidgen.metrics import GatewayMetrics
from vidgen.topology import consumer_of, consumer_of_held

log = structlog.get_logger(__name__)

KEEP = 1.0
TIME_LIMIT = 2.0
ALL_STREAMS = (*(stream.name for stream in topology.STREAMS), *(f"KV_{bucket.name}" for bucket in topology.BUCKETS))

QUEUES = tuple(of(stage, lane) for stage in STAGES for lane in LANES for of in (consumer_of, consumer_of_held))


class Fleet:
    """Reads the worker registry and the task queues. Keeps figures for a second: many scrapers cost as one."""

    def __init__(
        self, bus: Bus, *, keep: float = KEEP, time_limit: float = TIME_LIMIT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._bus = bus
        self._keep, self._time_limit, self._clock = keep, time_limit, clock
        self._lock = asyncio.Lock()
        self._read_at: float | None = None

    async def workers(self) -> list[WorkerInfo]:
        """The workers alive, by stage and id; entries of another version are left out. Raises BusError."""
        entries = await self._bus.records(topology.WORKERS_BUCKET).all()
        found = [worker for key, value in entries.items() if (worker := _readable(key, value)) is not None]
        return sorted(found, key=lambda worker: (STAGES.index(worker.stage), worker.id))

    async def depths(self) -> dict[tuple[Stage, Lane], Depth]:
        """How full each lane of each stage is, what is held back for it included. Raises BusError."""
        return _by_lane(await self._waiting(QUEUES))

    async def _waiting(self, consumers: Sequence[topology.Consumer]) -> dict[topology.Consumer, Depth]:
        return dict(zip(consumers, await asyncio.gather(*map(self._bus.depth, consumers)), strict=True))

    async def streams(self) -> dict[str, Held]:
        """What every stream, and every bucket's, holds. Raises BusError."""
        held = await asyncio.gather(*(self._bus.held(name) for name in ALL_STREAMS))
        return dict(zip(ALL_STREAMS, held, strict=True))

    async def refresh(self, metrics: GatewayMetrics) -> None:
        """Bring the metrics up to date before a scrape; never raises, and never takes longer than the time limit."""
        async with self._lock:
            if self._read_at is not None and self._clock() - self._read_at < self._keep:
                return
            begun = self._clock()
            try:
                async with asyncio.timeout(self._time_limit), asyncio.TaskGroup() as group:
                    workers, streams = group.create_task(self.workers()), group.create_task(self.streams())
                    waiting = group.create_task(self._waiting(topology.CONSUMERS))
                metrics.fleet(workers.result(), _by_lane(waiting.result()), datetime.now(UTC))
                metrics.bus(waiting.result(), streams.result(), self._clock() - begun)
            except* (errors.VidgenError, TimeoutError) as failed:
                metrics.bus_down()
                log.warning(
                    "the bus did not say how queues and workers are",
                    _event="fleet_unknown",
                    errors=[repr(e) for e in failed.exceptions],
                )
            self._read_at = self._clock()


def _by_lane(waiting: Mapping[topology.Consumer, Depth]) -> dict[tuple[Stage, Lane], Depth]:
    return {
        (stage, lane): _with_held(waiting[consumer_of(stage, lane)], waiting[consumer_of_held(stage, lane)])
        for stage in STAGES for lane in LANES
    }  # fmt: skip


def _with_held(queued: Depth, held: Depth) -> Depth:
    """What waits in a lane, in its queue and behind it."""
    oldest = [at for at in (queued.oldest_pending_at, held.oldest_pending_at) if at is not None]
    waits = [at for at in (queued.oldest_at, held.oldest_at) if at is not None]
    return replace(
        queued, pending=queued.pending + held.pending, oldest_at=min(waits, default=None),
        oldest_pending_at=min(oldest, default=None),
    )  # fmt: skip


def _readable(key: str, value: bytes) -> WorkerInfo | None:
    try:
        return WorkerInfo.model_validate_json(value)
    except ValidationError:
        log.warning("a worker's entry cannot be read: is it of another version?", _event="worker_unreadable", key=key)
        return None
