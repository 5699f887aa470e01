"""The object store in memory."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path

from vidgen import errors
from vidgen.artifacts import CHUNK, LINK_LIFE, Shown, Stat, local_file, missing, too_large
from vidgen.testing.clock import Clock, RealClock
from vidgen.testing.faults import Faults


class MemoryStore(Faults):
    """`vidgen.artifacts.ArtifactStore` in a dictionary; `objects` is what is stored."""

    METHODS = frozenset({"put", "fetch", "stat", "read", "page", "remove"})
    OUTAGE = errors.StoreError

    def __init__(self, bucket: str = "vidgen", *, clock: Clock | None = None) -> None:
        super().__init__()
        self.bucket = bucket
        self.objects: dict[str, bytes] = {}
        self._stats: dict[str, Stat] = {}
        self._clock = clock or RealClock()

    def add(self, key: str, data: bytes, content_type: str = "application/octet-stream", **metadata: str) -> None:
        """Store bytes directly, as somebody with a presigned URL would."""
        self.objects[key] = data
        tag = hashlib.sha256(data).hexdigest()
        self._stats[key] = Stat(key, len(data), content_type, self._clock.now(), metadata, tag)

    async def put(self, key: str, path: Path, content_type: str, metadata: dict[str, str] | None = None) -> None:
        async with self.call("put"):
            try:
                data = await asyncio.to_thread(path.read_bytes)
            except OSError as exc:
                raise local_file(exc) from exc
            self.add(key, data, content_type, **(metadata or {}))

    async def fetch(self, key: str, path: Path, limit: int | None = None) -> int:
        async with self.call("fetch"):
            data = self._found(key)
            if limit is not None and len(data) > limit:
                raise too_large(len(data), limit)
            try:
                path.parent.mkdir(0o700, exist_ok=True)
                return await asyncio.to_thread(path.write_bytes, data)
            except OSError as exc:
                raise local_file(exc) from exc

    async def stat(self, key: str) -> Stat | None:
        async with self.call("stat"):
            return self._stats.get(key)

    async def read(self, key: str, start: int = 0, length: int = 0) -> AsyncIterator[bytes]:
        async with self.call("read"):
            data = self._found(key)
        data = data[start : start + length if length else None]
        for at in range(0, len(data), CHUNK):
            if self.down:
                raise self._outage()
            yield data[at : at + CHUNK]

    async def url(self, key: str, *, expires: timedelta = LINK_LIFE, shown: Shown | None = None) -> str:
        as_what = f"&shown={shown.content_type}&disposition={shown.disposition}" if shown else ""
        return f"memory://{self.bucket}/{key}?method=GET&expires={expires.total_seconds():.0f}{as_what}"

    async def upload_url(self, key: str, content_type: str, size: int, *, expires: timedelta = LINK_LIFE) -> str:
        return f"memory://{self.bucket}/{key}?method=PUT&expires={expires.total_seconds():.0f}&size={size}"

    async def page(self, prefix: str, after: str = "", limit: int = 1000) -> list[Stat]:
        async with self.call("page"):
            keys = sorted(key for key in self.objects if key.startswith(prefix) and key > after)
            return [self._stats[key] for key in keys[:limit]]

    async def remove(self, keys: Sequence[str]) -> None:
        async with self.call("remove"):
            for key in keys:
                self.objects.pop(key, None)
                self._stats.pop(key, None)

    async def ready(self) -> bool:
        return not self.down

    async def require(self) -> None:
        if self.down:
            raise self._outage()

    def _found(self, key: str) -> bytes:
        if key not in self.objects:
            raise missing(key)
        return self.objects[key]
