"""Who waits for room gets it by turns of tenants: one may ask for any amount, and nobody waits behind all of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable


class _Place:
    """One place in the line, from before anybody knows how much room it wants."""

    def __init__(self) -> None:
        self.size = 0
        self.granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Line:
    """Room for so much at once, for each tenant in the order of asking: what is large is not passed by for ever."""

    def __init__(self, most: int) -> None:
        self._most = self.left = most
        self._waiting: OrderedDict[str, deque[_Place]] = OrderedDict()  # by tenant; whose turn it is comes first

    @contextlib.asynccontextmanager
    async def room(self, tenant: str, size: Awaitable[int] | None = None) -> AsyncIterator[None]:
        """Room of a size, else of 1, for the block; what is larger than all the room there is has it alone."""
        place = _Place()
        self._waiting.setdefault(tenant, deque()).append(place)
        try:
            place.size = 1 if size is None else min(self._most, await size)
            self._admit()
            await place.granted
            yield
        finally:
            if place in self._waiting.get(tenant, ()):
                self._remove(tenant, place)
            elif place.granted.done() and not place.granted.cancelled():
                self.left += place.size
            self._admit()

    def _admit(self) -> None:
        while self._waiting:
            tenant, own = next(iter(self._waiting.items()))
            place = own[0]
            if not 0 < place.size <= self.left:
                return
            self._waiting.move_to_end(tenant)
            self._remove(tenant, place)
            if not place.granted.cancelled():
                self.left -= place.size
                place.granted.set_result(None)

    def _remove(self, tenant: str, place: _Place) -> None:
        own = self._waiting[tenant]
        own.remove(place)
        if not own:
            del self._waiting[tenant]
