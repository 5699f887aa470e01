"""Images are decoded so many pixels at a time, by a few processes: one of some KB may take a dozen bytes a pixel."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

from gateway.decoder import Decoder
from vidgen import artifacts, images

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


class _Place:
    """One image's place among those that wait, from before anybody knows how large it is."""

    def __init__(self) -> None:
        self.pixels = 0
        self.granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Decoding:
    """Looks at images, in other processes; at the same time at no more pixels than the largest one may have."""

    def __init__(self, most: int = images.MAX_PIXELS, decoders: Decoders | None = None) -> None:
        self._most = self._left = most
        self._decoders = decoders or Decoders()
        self._threads = asyncio.Semaphore(self._decoders.count)
        self._waiting: deque[_Place] = deque()

    async def over(self, path: Path, work: Callable[[Decoder, Path], T]) -> T:
        """What `work` makes of an image with a decoder, in a thread.

        Raises as `Decoder.inspect` does, and StoreError `local_file` where the disk fails.
        """
        async with self._room(path):
            return await self._lent(lambda decoder: work(decoder, path))

    async def _lent(self, work: Callable[[Decoder], T]) -> T:
        async with self._threads:  # the threads are everybody's: none of them should wait for a decoder
            try:
                return await asyncio.to_thread(self._decoders.use, work)
            except OSError as exc:  # the disk, not the image
                raise artifacts.local_file(exc) from exc

    @contextlib.asynccontextmanager
    async def _room(self, path: Path) -> AsyncIterator[None]:
        """Room for the pixels of an image, in the order of asking: a large one is not passed by for ever."""
        place = _Place()
        self._waiting.append(place)
        try:
            place.pixels = min(self._most, await self._lent(lambda decoder: decoder.pixels(path)))
            self._admit()
            await place.granted
            yield
        finally:
            if place in self._waiting:
                self._waiting.remove(place)
            elif place.granted.done() and not place.granted.cancelled():
                self._left += place.pixels
            self._admit()

    def _admit(self) -> None:
        while self._waiting and 0 < self._waiting[0].pixels <= self._left:
            place = self._waiting.popleft()
            if not place.granted.cancelled():
                self._left -= place.pixels
                place.granted.set_result(None)
