"""What operators and machines ask: is it alive, is it ready, how is it doing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from gateway.api.parts import PartsHere
from vidgen.artifacts import ArtifactStore

router = APIRouter(tags=["operations"])

READY_WAIT_S = 3.0
KEEP_S = 1.0

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


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def healthz() -> Health:
    """Alive: the process answers, whatever it can reach."""
    return Health()


@router.head("/readyz", include_in_schema=False)
@router.get(
    "/readyz", response_model=Readiness, responses={503: {"model": Readiness, "description": "Not ready: see which."}}
)
async def readyz(request: Request, parts: PartsHere) -> Response:
    """Ready: the bus and the object store can be reached, and the process is not about to leave."""
    bus, (store, _) = await asyncio.gather(_reach(parts.jobs.ready()), _store_reach(request))
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
async def metrics(request: Request, parts: PartsHere) -> Response:
    """Figures in Prometheus' text format."""
    _, (store, seconds) = await asyncio.gather(parts.fleet.refresh(parts.metrics), _store_reach(request))
    parts.metrics.store(store == "ok", seconds)
    body, content_type = await asyncio.to_thread(parts.metrics.render)
    return Response(body, headers={"Content-Type": content_type})


class StoreReach:
    """Whether the object store answers, and how quickly: asked once a second, whoever wants to know it."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store, self._lock = store, asyncio.Lock()
        self._told: tuple[Reach, float] = "unreachable", 0.0
        self._until = float("-inf")

    async def look(self) -> tuple[Reach, float]:
        """The answer, no older than a second, and the seconds that it took."""
        async with self._lock:
            begun = time.monotonic()
            if begun >= self._until:
                reach = await _reach(self._store.ready())
                self._told = reach, time.monotonic() - begun
                self._until = time.monotonic() + KEEP_S
        return self._told


async def _store_reach(request: Request) -> tuple[Reach, float]:
    reach: StoreReach = request.app.state.store_reach
    return await reach.look()


async def _reach(answer: Awaitable[bool]) -> Reach:
    try:
        async with asyncio.timeout(READY_WAIT_S):
            return "ok" if await answer else "unreachable"
    except TimeoutError:
        return "unreachable"
