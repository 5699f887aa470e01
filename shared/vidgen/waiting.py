"""Waiting that has an end."""

from __future__ import annotations

import asyncio
import contextlib


async def told_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait until an event is set, but no longer than that; whether it is."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
