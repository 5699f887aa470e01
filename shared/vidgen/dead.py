"""Dead letters: what was given up, with its reason and its original bytes, so that all of it can be replayed."""

from __future__ import annotations

import base64
import re
from datetime import UTC, datetime

from vidgen import contracts, telemetry, topology
from vidgen.bus import Bus

KEEP_BYTES = 128 << 10  # as base64 this fits into a message; no request and no task is as large

# What clients put into URLs although they must not. A JSON text may escape its slashes.
USERINFO = re.compile(rb'(:(?:\\?/){2})[^/\s?#"\\]*@')
SIGNED = re.compile(telemetry.SIGNED.pattern.encode(), re.I)
RECEIVER_QUERY = re.compile(rb'("webhook_url"\s*:\s*"[^"?#]*)[?#][^"]*')
MASK = rb"\1***"


def letter(
    payload: bytes,
    subject: str,
    error: contracts.JobError,
    *,
    job_id: str | None,
    stage: contracts.Stage | None = None,
    at: datetime | None = None,
) -> contracts.DeadLetter:
    """A dead letter holding `payload` as it was, but for credentials in URLs.

    Of one that nothing valid could be as large as, the beginning.
    """
    kept = RECEIVER_QUERY.sub(MASK, SIGNED.sub(MASK, USERINFO.sub(MASK + b"@", payload)))[:KEEP_BYTES]
    return contracts.DeadLetter(
        job_id=job_id, stage=stage, subject=subject, error=error,
        payload=base64.b64encode(kept).decode(), at=at or datetime.now(UTC),
    )  # fmt: skip


async def publish(bus: Bus, dead: contracts.DeadLetter, *, message_id: str, subject: str | None = None) -> None:
    """Keep a dead letter; twice under one id is once. Without a `subject` it is that of its stage, or of requests."""
    home = subject or topology.subject_of_dead(dead.stage, dead.job_id)
    await bus.publish(home, dead.to_bytes(), message_id=message_id)
