"""What is kept in the bucket, and for how long: everything older is deleted, unless somebody still waits for it.

The bus forgets by itself, by the ages in `vidgen.topology`. The bucket does not, so each gateway sweeps it; two that
sweep at once delete the same, and no more. Why not by the store's own lifecycle rules: decision 0015.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pydantic
import pydantic_core
import structlog

from gateway.jobs import Jobs, now
from vidgen import artifacts, errors, topology
from vidgen.artifacts import ArtifactStore, Stat
from vidgen.bus import Bus, each
from vidgen.metrics import GatewayMetrics, Kept
from vidgen.settings import GatewaySettings
from vidgen.waiting import told_within

log = structlog.get_logger(__name__)

SWEEP_EVERY_S = 6 * 3600.0
PAGE = 1000
WAITING = (topology.REQUESTS, topology.HELD, topology.TASKS)  # streams whose messages name, by key, what they wait for
FIELDS = ("references", "inputs")  # where they name it


@dataclass(frozen=True)
class Keep:
    """How long what lies in the bucket is kept; None: for ever."""

    uploads: timedelta | None = None
    checkpoints: timedelta | None = None
    artifacts: timedelta | None = None

    @classmethod
    def from_settings(cls, own: GatewaySettings) -> Keep:
        """What the settings say."""

        def age(days: float | str) -> timedelta | None:
            return None if isinstance(days, str) else timedelta(days=days)

        return cls(age(own.keep_uploads), age(own.keep_checkpoints), age(own.keep_artifacts))


class Sweeper:
    """Deletes what is older than it is to be kept; any number may sweep one bucket."""

    def __init__(
        self, bus: Bus, store: ArtifactStore, jobs: Jobs, keep: Keep, metrics: GatewayMetrics,
        clock: Callable[[], datetime] = now,
    ) -> None:  # fmt: skip
        self._bus, self._store, self._jobs = bus, store, jobs
        self._keep, self._metrics, self._clock = keep, metrics, clock

    async def run(self, stop: asyncio.Event, every_s: float = SWEEP_EVERY_S) -> None:
        """Sweep now and again until `stop`; replicas that start together do not sweep together."""
        pause = random.uniform(0, every_s)  # noqa: S311
        while not await told_within(stop, pause):
            try:
                await self.sweep()
            except errors.VidgenError as exc:
                log.warning(f"the bucket was not swept to its end: {exc.message}", _event="sweep_failed")
            except Exception:  # what is kept too long must not end a gateway
                log.exception("the bucket was not swept to its end", _event="sweep_failed")
            pause = every_s

    async def sweep(self) -> None:
        """Delete once all that has had its time; raises BusError and StoreError."""
        await self._sweep("uploads", artifacts.UPLOADS, self._keep.uploads, self._not_waited_for)
        await self._sweep("checkpoints", artifacts.CHECKPOINTS, self._keep.checkpoints, self._of_ended_jobs)
        await self._sweep("artifacts", artifacts.JOBS, self._keep.artifacts, self._of_ended_jobs)

    async def _sweep(
        self, kind: Kept, prefix: str, keep: timedelta | None,
        free: Callable[[list[Stat], datetime], Awaitable[list[Stat]]],
    ) -> None:  # fmt: skip
        if keep is None:
            return
        before, after, count, size = self._clock() - keep, "", 0, 0
        while page := await self._store.page(prefix, after, PAGE):
            after = page[-1].key
            old = [found for found in page if found.modified is not None and found.modified < before]
            if old and (gone := await free(old, before)):
                await self._store.remove([found.key for found in gone])
                count, size = count + len(gone), size + sum(found.size for found in gone)
                self._metrics.swept(kind, len(gone), sum(found.size for found in gone))
        if count:
            log.info(f"{kind} have had their time", _event="swept", kind=kind, objects=count, bytes=size)

    async def _not_waited_for(self, old: list[Stat], _before: datetime) -> list[Stat]:
        """Looked up just before they are deleted: a request that comes in this very moment finds its image gone."""
        waited_for: set[str] = set()
        for stream in WAITING:
            waited_for |= await self._keys_in(stream)
        return [found for found in old if found.key not in waited_for]

    async def _keys_in(self, stream: str) -> set[str]:
        return {key async for message in each(self._bus, stream) for key in _keys_of(message.body)}

    async def _of_ended_jobs(self, old: list[Stat], before: datetime) -> list[Stat]:
        """Those whose job ended long enough ago, or has no record any more."""
        ended = {job_id: await self._ended(job_id, before) for job_id in {_job_of(found) for found in old}}
        return [found for found in old if ended[_job_of(found)]]

    async def _ended(self, job_id: str, before: datetime) -> bool:
        try:
            job = await self._jobs.find(job_id)
        except errors.RejectedError:  # no job can be called so: somebody put it there by hand
            return True
        except pydantic.ValidationError:  # of another version, which knows when it has ended
            return False
        return job is None or (job.status.final and (job.completed_at or job.updated_at) < before)


def _job_of(found: Stat) -> str:
    return found.key.split("/")[1]


def _keys_of(body: bytes) -> Iterable[str]:
    """The keys that a request or a task names; none where it is neither, for nobody can work on it then."""
    try:
        message: Any = pydantic_core.from_json(body)
    except ValueError:
        return ()
    named = [message.get(name) for name in FIELDS] if isinstance(message, dict) else []
    return [key for keys in named if isinstance(keys, list) for key in keys if isinstance(key, str)]
