"""Waiting that has an end."""

from __future__ import annotations

import asyncio

import pytest

from vidgen.waiting import told_within

FOR_EVER = 3600.0


async def test_what_is_told_meanwhile_ends_the_waiting() -> None:
    event = asyncio.Event()
    waiting = asyncio.create_task(told_within(event, FOR_EVER))
    await asyncio.sleep(0)
    assert not waiting.done()
    event.set()
    async with asyncio.timeout(60):
        assert await waiting is True


async def test_its_time_ends_it_too_and_what_was_told_before_needs_none() -> None:
    event = asyncio.Event()
    assert await told_within(event, 0) is False
    event.set()
    assert await told_within(event, 0) is True


async def test_who_waits_can_be_cancelled() -> None:
    waiting = asyncio.create_task(told_within(asyncio.Event(), FOR_EVER))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
