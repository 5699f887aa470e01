"""Dead letters: what was given up, with its reason and its original bytes, so that all of it can be replayed."""

from __future__ import annotations

import base64
import re
from datetime import UTC, datetime

from vidgen import contracts, telemetry, topology
from vidgen.bus import Bus

MESSAGE_BYTES = 256 << 10  # what the bus takes
HEADER_BYTES = 4 << 10  # of which the headers take less

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

    Of one that as base64 does not fit into a message (about 190,000 bytes do), the beginning.
    """
    masked = RECEIVER_QUERY.sub(MASK, SIGNED.sub(MASK, USERINFO.sub(MASK + b"@", payload)))
    empty = contracts.DeadLetter(
        job_id=job_id, stage=stage, subject=subject, error=error, payload="", at=at or datetime.now(UTC)
    )
    room = max(0, MESSAGE_BYTES - HEADER_BYTES - len(empty.to_bytes())) // 4 * 3
    return empty.model_copy(update={"payload": base64.b64encode(masked[:room]).decode()})


async def publish(bus: Bus, dead: contracts.DeadLetter, *, message_id: str, subject: str | None = None) -> None:
    """Keep a dead letter; twice under one id is once. Without a `subject` it is that of its stage, or of requests."""
    home = subject or topology.subject_of_dead(dead.stage, dead.job_id)
    await bus.publish(home, dead.to_bytes(), message_id=message_id)
