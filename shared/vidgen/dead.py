"""Dead letters: what was given up, with its reason and its original bytes, so that all of it can be replayed."""

from __future__ import annotations

import base64
from datetime import UTC, datetime

from vidgen import contracts, topology
from vidgen.bus import Bus

KEEP_BYTES = 128 << 10  # as base64 this fits into a message; no request and no task is as large


def letter(
    payload: bytes,
    subject: str,
    error: contracts.JobError,
    *,
    job_id: str | None,
    stage: contracts.Stage | None = None,
    at: datetime | None = None,
) -> contracts.DeadLetter:
    """A dead letter holding `payload` as it was; of one that nothing valid could be as large as, the beginning."""
    return contracts.DeadLetter(
        job_id=job_id, stage=stage, subject=subject, error=error,
        payload=base64.b64encode(payload[:KEEP_BYTES]).decode(), at=at or datetime.now(UTC),
    )  # fmt: skip


async def publish(bus: Bus, dead: contracts.DeadLetter, *, message_id: str) -> None:
    """Keep a dead letter; twice under one id is once."""
    await bus.publish(topology.subject_of_dead(dead.stage, dead.job_id), dead.to_bytes(), message_id=message_id)
