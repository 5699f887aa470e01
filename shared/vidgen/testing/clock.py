"""The time that the doubles live by: the real one, or one that a test moves."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Protocol

START = datetime(2026, 1, 1, tzinfo=UTC)


class Clock(Protocol):
    def time(self) -> float:
        """Seconds from some beginning."""

    def now(self) -> datetime: ...

    async def wait(self, event: asyncio.Future[None], until: float) -> None:
        """Return once `event` is done or `time()` has reached `until`."""


class RealClock:
    def time(self) -> float:
        return time.monotonic()

    def now(self) -> datetime:
        return datetime.now(UTC)

    async def wait(self, event: asyncio.Future[None], until: float) -> None:
        await asyncio.wait({event}, timeout=max(0.0, until - self.time()))


class FakeClock:
    """Stands still until `advance`; whoever waits for a time that has come by then goes on."""

    def __init__(self, start: datetime = START) -> None:
        self._start, self._elapsed = start, 0.0
        self._ticks: set[asyncio.Future[None]] = set()

    def time(self) -> float:
        return self._elapsed

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self._elapsed)

    def advance(self, seconds: float) -> None:
        self._elapsed += seconds
        for tick in self._ticks:
            if not tick.done():
                tick.set_result(None)

    async def sleep(self, seconds: float) -> None:
        """What `asyncio.sleep` is to the real clock."""
        await self.wait(asyncio.get_running_loop().create_future(), self._elapsed + seconds)

    async def wait(self, event: asyncio.Future[None], until: float) -> None:
        while not event.done() and self._elapsed < until:
            tick: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._ticks.add(tick)
            try:
                await asyncio.wait({event, tick}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._ticks.discard(tick)
