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
from gateway.jobs import JobNotFoundError, Jobs
from vidgen.artifacts import ArtifactStore
from vidgen.bus import Bus
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
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def link_life(self) -> timedelta:
        """How long a presigned URL is good for."""
        return timedelta(minutes=self.settings.presign_minutes)


def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


def _job_id(job_id: str) -> str:
    # Nothing else may become part of a subject or a key; such a job cannot be, so 404 tells the truth.
    if not JOB_ID.fullmatch(job_id):
        raise JobNotFoundError("there is no such job: an id has letters, digits, - and _ only, at most 64")
    return job_id


PartsHere = Annotated[Parts, Depends(_parts)]
JobIdHere = Annotated[str, Depends(_job_id)]
