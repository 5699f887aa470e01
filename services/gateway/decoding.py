"""Images are decoded so many pixels at a time: a file of some KB may take a dozen bytes for each of its pixels."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

from PIL import _imaging

from vidgen import images

T = TypeVar("T")

# Pillow takes its memory in blocks. Those above 32 MB glibc gives back at once; of smaller ones each thread that ever
# decoded a large image keeps some hundred MB.
BLOCK_BYTES = 64 << 20


class Decoding:
    """Looks at images, in threads; at the same time at no more pixels than the largest one may have."""

    def __init__(self, most: int = images.MAX_PIXELS) -> None:
        _imaging.set_block_size(BLOCK_BYTES)
        self._most = self._left = most
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def over(self, path: Path, work: Callable[[Path], T]) -> T:
        """What `work` makes of an image, in a thread; raises as `images.inspect` does."""
        async with self._room(path):
            return await asyncio.to_thread(work, path)

    @contextlib.asynccontextmanager
    async def _room(self, path: Path) -> AsyncIterator[None]:
        """Room for the pixels of an image, in the order of asking: a large one is not passed by for ever."""
        pixels = min(self._most, await asyncio.to_thread(images.pixels, path))
        place = pixels, asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._admit()
        try:
            await place[1]
            yield
        finally:
            if place in self._waiting:
                self._waiting.remove(place)
            elif place[1].done() and not place[1].cancelled():
                self._left += pixels
            self._admit()

    def _admit(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._left:
            pixels, granted = self._waiting.popleft()
            if not granted.cancelled():
                self._left -= pixels
                granted.set_result(None)
