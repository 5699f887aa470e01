"""The workers alive."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

from gateway.api import problems
from gateway.api.parts import PartsHere
from vidgen.contracts import WorkerInfo

router = APIRouter(prefix="/v1/workers", tags=["workers"])


class WorkerList(BaseModel):
    """Every worker that was heard of within the last seconds."""

    workers: tuple[WorkerInfo, ...]


@router.get("", response_model_exclude_none=True, responses=problems.responses(503))
async def list_workers(parts: PartsHere) -> WorkerList:
    """The workers alive: stage, engine, model, device figures, and what runs."""
    return WorkerList(workers=tuple(await parts.fleet.workers()))
