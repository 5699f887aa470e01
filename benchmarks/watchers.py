"""Who looks on while jobs come and run: `python benchmarks/watchers.py` reads what to do as JSON, watches until EOF.

Each line that follows says how many of the jobs are there by now.

Readers follow one job after another, by server-sent events or, where a server has none, by asking once a second; a
prober asks for jobs at a fixed rate, and its times are what is reported. A process of its own, so that what it measures
is not how busy the benchmark is.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import uvloop

from lean import Connection

POLL_S = 1.0


class Watch:
    def __init__(self, asked: dict[str, Any]) -> None:
        self._url, self._ids = asked["url"], asked["ids"]
        self._readers, self._sse, self._rate = asked["readers"], asked["sse"], asked["rate"]
        self._known = 1
        self._chance = random.Random(0)
        self._times: list[tuple[float, float]] = []
        self._told = self._broken = self._refused = 0

    async def run(self) -> dict[str, Any]:
        reading = self._follow if self._sse else self._poll
        tasks = [asyncio.create_task(self._come(number, reading)) for number in range(self._readers)]
        tasks.append(asyncio.create_task(self._probe()))
        while line := await asyncio.to_thread(sys.stdin.readline):
            self._known = int(line)
        for task in tasks:
            task.cancel()
        for end in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(end, Exception):
                raise end
        return {"times": self._times, "told": self._told, "broken": self._broken, "refused": self._refused}

    def _any(self) -> str:
        return self._ids[self._chance.randrange(self._known)]

    async def _come(self, number: int, reading: Callable[[], Awaitable[None]]) -> None:
        """One reader after another, as the jobs come: at once, all would follow the first jobs, and leave together."""
        while self._known * self._readers < number * len(self._ids):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await reading()

    async def _follow(self) -> None:
        while True:
            connection = Connection(self._url)
            try:
                async for line in connection.stream(f"/v1/jobs/{self._any()}/events"):
                    self._told += line.startswith(b"event:")
            except (AssertionError, OSError, asyncio.IncompleteReadError):
                self._broken += 1  # not there yet, or cut off
                await asyncio.sleep(0.2)

    async def _poll(self) -> None:
        async with Connection(self._url) as connection:
            while True:
                status, _ = await connection.call("GET", f"/v1/jobs/{self._any()}")
                self._told += status == 200
                self._refused += status != 200
                await asyncio.sleep(POLL_S)

    async def _probe(self) -> None:
        """At a fixed rate, whatever the answers take: what a slow answer holds up is counted too."""
        free: list[Connection] = []
        async with asyncio.TaskGroup() as group:
            due = time.perf_counter()
            while True:
                due += 1 / self._rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                group.create_task(self._ask(free, due))

    async def _ask(self, free: list[Connection], due: float) -> None:
        connection = free.pop() if free else Connection(self._url)
        status, _ = await connection.call("GET", f"/v1/jobs/{self._any()}")
        self._refused += status != 200
        self._times.append((time.time(), time.perf_counter() - due))
        free.append(connection)


def quantile(times: list[float], share: float) -> float:
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


def summary(times: list[float]) -> str:
    if not times:
        return "no answers"
    middle, last = statistics.median(times), quantile(times, 0.99)
    return f"p50 {middle * 1e3:7.1f} ms   p99 {last * 1e3:7.1f} ms   ({len(times)} answers)"


if __name__ == "__main__":
    asked = json.loads(sys.stdin.readline())
    print(json.dumps(uvloop.run(Watch(asked).run())))
