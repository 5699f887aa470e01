"""The workers alive."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from pydantic import BaseModel

from gateway.api import problems
from gateway.api.parts import CallerHere, PartsHere
from vidgen.contracts import WorkerInfo

router = APIRouter(prefix="/v1/workers", tags=["workers"])


class WorkerList(BaseModel):
    """Every worker that was heard of within the last seconds."""

    workers: tuple[WorkerInfo, ...]


@router.get("", response_model_exclude_none=True, responses=problems.responses(503))
async def list_workers(parts: PartsHere, caller: CallerHere) -> WorkerList:
    """The workers alive: stage, engine, model, device figures, and what runs of the caller's jobs."""
    found = await parts.fleet.workers()
    if caller.admin:
        return WorkerList(workers=tuple(found))
    running = sorted({job_id for worker in found for job_id in worker.running})
    jobs = await asyncio.gather(*map(parts.jobs.find, running))
    own = {job.id for job in jobs if job is not None and caller.sees(job.tenant)}
    return WorkerList(workers=tuple(_shown(worker, own) for worker in found))


def _shown(worker: WorkerInfo, own: set[str]) -> WorkerInfo:
    """A worker without the jobs of others."""
    running = tuple(job_id for job_id in worker.running if job_id in own)
    return worker.model_copy(
        update={"running": running, "generating": worker.generating if worker.generating in own else None}
    )
