"""What operators and machines ask: is it alive, is it ready, how is it doing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from gateway.api.parts import Parts, PartsHere

router = APIRouter(tags=["operations"])

READY_WAIT_S = 3.0

Reach = Literal["ok", "unreachable"]


class Health(BaseModel):
    """The process is alive."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Whether requests can be served, and by what they cannot."""

    status: Literal["ok", "unavailable", "stopping"]
    detail: str
    bus: Reach
    store: Reach


@router.get("/healthz")
async def healthz() -> Health:
    """Alive: the process answers, whatever it can reach."""
    return Health()


@router.get(
    "/readyz", response_model=Readiness, responses={503: {"model": Readiness, "description": "Not ready: see which."}}
)
async def readyz(parts: PartsHere) -> Response:
    """Ready: the bus and the object store can be reached, and the process is not about to leave."""
    bus, store = await asyncio.gather(_reach(parts.jobs.ready()), _reach(parts.store.ready()))
    lost = [name for name, reach in (("the bus", bus), ("the object store", store)) if reach != "ok"]
    if parts.stopping.is_set():
        found = Readiness(status="stopping", detail="this gateway is about to leave", bus=bus, store=store)
    elif lost:
        detail = f"{' and '.join(lost)} cannot be reached from the gateway"
        found = Readiness(status="unavailable", detail=detail, bus=bus, store=store)
    else:
        found = Readiness(status="ok", detail="ready for requests", bus=bus, store=store)
    return JSONResponse(found.model_dump(), 200 if found.status == "ok" else 503)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(parts: PartsHere) -> Response:
    """Figures in Prometheus' text format."""
    await asyncio.gather(parts.fleet.refresh(parts.metrics), _measure_store(parts))
    body, content_type = await asyncio.to_thread(parts.metrics.render)
    return Response(body, headers={"Content-Type": content_type})


async def _measure_store(parts: Parts) -> None:
    begun = time.monotonic()
    reach = await _reach(parts.store.ready())
    parts.metrics.store(reach == "ok", time.monotonic() - begun)


async def _reach(answer: Awaitable[bool]) -> Reach:
    try:
        async with asyncio.timeout(READY_WAIT_S):
            return "ok" if await answer else "unreachable"
    except TimeoutError:
        return "unreachable"
