"""A store that is away for a while: what gets no answer is tried again, and nothing is computed twice for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import structlog

from vidgen import errors
from vidgen.artifacts import LINK_LIFE, ArtifactStore, Shown, Stat

log = structlog.get_logger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
# Else what was refused would be refused again. A clock that is wrong is set sooner or later, as a server is started.
AWAY = frozenset({errors.StoreError.code, "store_clock"})

T = TypeVar("T")


class PatientStore:
    """An ArtifactStore whose calls outlast an outage of `patience_s`. Keys are immutable, so each may be repeated."""

    def __init__(
        self, store: ArtifactStore, patience_s: float, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._store, self._patience_s, self._sleep, self._clock = store, patience_s, sleep, clock

    async def put(self, key: str, path: Path, content_type: str, metadata: dict[str, str] | None = None) -> None:
        await self._persist(lambda: self._store.put(key, path, content_type, metadata))

    async def fetch(self, key: str, path: Path, limit: int | None = None) -> int:
        return await self._persist(lambda: self._store.fetch(key, path, limit))

    async def stat(self, key: str) -> Stat | None:
        return await self._persist(lambda: self._store.stat(key))

    def read(self, key: str, start: int = 0, length: int = 0) -> AsyncIterator[bytes]:
        return self._store.read(key, start, length)

    async def url(self, key: str, *, expires: timedelta = LINK_LIFE, shown: Shown | None = None) -> str:
        return await self._store.url(key, expires=expires, shown=shown)

    async def upload_url(self, key: str, content_type: str, size: int, *, expires: timedelta = LINK_LIFE) -> str:
        return await self._store.upload_url(key, content_type, size, expires=expires)

    async def page(self, prefix: str, after: str = "", limit: int = 1000) -> list[Stat]:
        return await self._persist(lambda: self._store.page(prefix, after, limit))

    async def remove(self, keys: Sequence[str]) -> None:
        await self._persist(lambda: self._store.remove(keys))

    async def ready(self) -> bool:
        return await self._store.ready()

    async def require(self) -> None:
        await self._store.require()

    async def _persist(self, call: Callable[[], Awaitable[T]]) -> T:
        give_up, pause = self._clock() + self._patience_s, FIRST_PAUSE_S
        while True:
            try:
                return await call()
            except errors.StoreError as exc:
                if exc.code not in AWAY or self._clock() + pause > give_up:
                    raise
                log.warning(exc.message, _event="store_away", again_in_s=pause)
            await self._sleep(pause)
            pause = min(LONGEST_PAUSE_S, pause * 2)
