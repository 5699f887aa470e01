"""What the routes work with, made once by the composition root."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Annotated

from fastapi import Depends, Request

from gateway.fleet import Fleet
from gateway.forecast import Forecast
from gateway.intake import Intake
from gateway.jobs import JobNotFoundError, Jobs, no_such_job
from gateway.keyring import Caller, Keyring
from gateway.quotas import Quotas
from vidgen.artifacts import ArtifactStore
from vidgen.bus import Bus
from vidgen.contracts import Job
from vidgen.metrics import GatewayMetrics
from vidgen.settings import GatewaySettings

JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Parts:
    """The parts of a gateway; `stopping` is set when the process is about to leave."""

    settings: GatewaySettings
    bus: Bus
    store: ArtifactStore
    jobs: Jobs
    intake: Intake
    fleet: Fleet
    forecast: Forecast
    metrics: GatewayMetrics
    keyring: Keyring
    quotas: Quotas
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def link_life(self) -> timedelta:
        """How long a presigned URL is good for."""
        return timedelta(minutes=self.settings.presign_minutes)


# Coroutines, though they wait for nothing: FastAPI would call a plain function in a thread, for each request.
async def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


async def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller  # the door put it there; who has not come through it has none
    return caller


PartsHere = Annotated[Parts, Depends(_parts)]
CallerHere = Annotated[Caller, Depends(_caller)]


async def _job_id(job_id: str) -> str:
    # Nothing else may become part of a subject or a key; such a job cannot be, so 404 tells the truth.
    if not JOB_ID.fullmatch(job_id):
        raise JobNotFoundError("there is no such job: an id has letters, digits, - and _ only, at most 64")
    return job_id


JobIdHere = Annotated[str, Depends(_job_id)]


async def seen(job_id: str, jobs: Jobs, caller: Caller) -> Job:
    """A job, as far as a caller may see it; raises JobNotFoundError."""
    job = await jobs.get(job_id)
    if not caller.sees(job.tenant):
        raise no_such_job(job_id)
    return job


async def _job(job_id: JobIdHere, parts: PartsHere, caller: CallerHere) -> Job:
    return await seen(job_id, parts.jobs, caller)


JobHere = Annotated[Job, Depends(_job)]
