"""Which attempts are under way in one process at the same time: any number together, or a single one alone.

A process that ends without a word tells nothing of which of its tasks ended it, unless there was but one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(eq=False)
class Place:
    """An attempt's place; `granted` is done once it is there."""

    alone: bool
    granted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Company:
    """The attempts of one process, of all its stages. First come, first served: who must be alone is not passed by."""

    def __init__(self) -> None:
        self._present: set[Place] = set()
        self._waiting: deque[Place] = deque()
        self._drains: list[Callable[[], None]] = []

    def join(self, drain: Callable[[], None]) -> None:
        """Have a worker of this process drain with the others where one is unfit."""
        self._drains.append(drain)

    def unfit(self) -> None:
        """One of the workers must leave, and this process: none takes more tasks, or the device that it gives up."""
        for drain in self._drains:
            drain()

    def enter(self, *, alone: bool) -> Place:
        """A place, granted at once where that can be. Whatever becomes of it, `leave` it."""
        place = Place(alone)
        self._waiting.append(place)
        self._admit()
        return place

    def leave(self, place: Place) -> None:
        """Give a place up, or the wait for it."""
        if place in self._present:
            self._present.remove(place)
        else:
            self._waiting.remove(place)
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._has_room_for(self._waiting[0]):
            place = self._waiting.popleft()
            self._present.add(place)
            place.granted.set_result(None)

    def _has_room_for(self, place: Place) -> bool:
        return not self._present or not (place.alone or any(other.alone for other in self._present))
