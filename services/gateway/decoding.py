"""Images are decoded so many pixels at a time, by a few processes: one of some KB may take a dozen bytes a pixel."""

from __future__ import annotations

import asyncio
import os
import queue
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from gateway.decoder import Decoder
from gateway.line import Line
from vidgen import artifacts, images
from vidgen.contracts import DEFAULT_TENANT

T = TypeVar("T")

# Of 35 MB each, and 0.2 s of CPU to start. With one, nobody could ask for the size of a small image while a
# large one is decoded.
FEWEST, MOST = 2, 4


class Decoders:
    """A few decoders, each lent to one thread at a time: the one used last first, so none is started for nothing."""

    def __init__(self, make: Callable[[], Decoder] = Decoder) -> None:
        self.count = max(FEWEST, min(MOST, os.cpu_count() or 1))
        self._idle: queue.LifoQueue[Decoder] = queue.LifoQueue()
        for _ in range(self.count):
            self._idle.put(make())

    def start(self) -> None:
        """Let the fewest begin before anybody waits for them."""
        for decoder in list(self._idle.queue)[-FEWEST:]:
            decoder.start()

    def use(self, work: Callable[[Decoder], T]) -> T:
        """What `work` makes with a decoder; waits until one is free."""
        decoder = self._idle.get()
        try:
            return work(decoder)
        finally:
            self._idle.put(decoder)


class Decoding:
    """Looks at images, in other processes; at the same time at no more pixels than the largest one may have."""

    def __init__(self, most: int = images.MAX_PIXELS, decoders: Decoders | None = None) -> None:
        self._decoders = decoders or Decoders()
        self._pixels, self._threads = Line(most), Line(self._decoders.count)

    async def over(self, path: Path, work: Callable[[Decoder, Path], T], tenant: str = DEFAULT_TENANT) -> T:
        """What `work` makes of a tenant's image with a decoder, in a thread.

        Raises as `Decoder.inspect` does, and StoreError `local_file` where the disk fails.
        """
        async with self._pixels.room(tenant, self._lent(lambda decoder: decoder.pixels(path), tenant)):
            return await self._lent(lambda decoder: work(decoder, path), tenant)

    async def _lent(self, work: Callable[[Decoder], T], tenant: str) -> T:
        async with self._threads.room(tenant):  # the threads are everybody's: none of them should wait for a decoder
            try:
                return await asyncio.to_thread(self._decoders.use, work)
            except OSError as exc:  # the disk, not the image
                raise artifacts.local_file(exc) from exc
