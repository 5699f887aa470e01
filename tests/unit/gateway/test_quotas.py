"""A tenant's rate holds over all replicas, however its requests are spread, and none waits for another replica."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest
from tests.gateways import BOUND

from gateway import quotas
from gateway.quotas import LimitError, Quotas
from vidgen import topology
from vidgen.settings import GatewaySettings
from vidgen.tenants import Tenants
from vidgen.testing import FakeClock, MemoryBus

RATE, BURST = 20.0, 10
STEP_S = 0.5


class Replicas:
    """Gateways on one bus; all have one clock, which moves only when it is told to."""

    def __init__(self, count: int, burst: int = BURST) -> None:
        self.clock, self.bus = FakeClock(), MemoryBus()
        own = GatewaySettings(tenant_rate=RATE, tenant_burst=burst)
        self.quotas = [Quotas(self.bus, Tenants(self.bus), own, clock=self.clock.time) for _ in range(count)]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        stop = asyncio.Event()
        running = [asyncio.create_task(one.run(stop)) for one in self.quotas]
        async with asyncio.timeout(BOUND):
            while len(self.bus._listeners) < len(self.quotas):
                await asyncio.sleep(0.001)
        yield
        stop.set()
        async with asyncio.timeout(BOUND):
            await asyncio.gather(*running)

    async def told(self) -> None:
        """Until what was let in has been told and heard."""
        async with asyncio.timeout(BOUND):
            while any(one._used for one in self.quotas) or any(feed.arrived for feed in self.bus._listeners):
                await asyncio.sleep(0.001)
        for _ in range(20):  # what was heard last is counted
            await asyncio.sleep(0)

    async def let_in(self, asked: Sequence[int]) -> list[int]:
        """How many of these requests each replica lets in at this moment."""
        found = []
        for one, requests in zip(self.quotas, asked, strict=True):
            count = 0
            for _ in range(requests):
                with contextlib.suppress(LimitError):
                    await one.admit("acme")
                    count += 1
            found.append(count)
        return found

    async def flood(self, asked: Sequence[int], seconds: float) -> int:
        """How many of a flood are let in, in all."""
        total = 0
        for _ in range(round(seconds / STEP_S)):
            total += sum(await self.let_in(asked))
            await self.told()
            self.clock.advance(STEP_S)
        return total


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "TELL_S", 0.005)


@pytest.mark.parametrize("asked", [(50, 50, 50), (100, 20, 0), (0, 0, 100)])
async def test_a_flood_gets_its_rate_over_all_replicas_together(asked: Sequence[int]) -> None:
    replicas = Replicas(3)
    async with replicas.running():
        total = await replicas.flood(asked, 20)
    least = RATE * 20 - BURST - RATE  # it may be waiting for what it had too much
    assert least <= total <= RATE * 20 + BURST * 3


async def test_alone_with_one_replica_a_tenant_has_all_of_its_rate_there() -> None:
    replicas = Replicas(3)
    async with replicas.running():
        assert await replicas.let_in((BURST + 5, 0, 0)) == [BURST, 0, 0]
        await replicas.told()
        assert await replicas.let_in((0, 5, 5)) == [0, 0, 0]
        replicas.clock.advance(0.1)
        assert await replicas.let_in((5, 0, 0)) == [2, 0, 0]


async def test_what_one_request_cost_beyond_itself_is_known_to_all_replicas() -> None:
    replicas = Replicas(2)
    async with replicas.running():
        assert await replicas.let_in((1, 0)) == [1, 0]
        await replicas.quotas[0].charge("acme", 5)
        await replicas.told()
        assert await replicas.let_in((0, BURST)) == [0, BURST - 6]


async def test_with_no_burst_at_all_requests_come_one_by_one() -> None:
    replicas = Replicas(1, burst=0)
    async with replicas.running():
        assert await replicas.let_in((2,)) == [1]
        replicas.clock.advance(1 / RATE)
        assert await replicas.let_in((2,)) == [1]


async def test_a_tenant_that_was_silent_for_long_may_send_a_burst_and_no_more() -> None:
    replicas = Replicas(1)
    async with replicas.running():
        assert await replicas.let_in((1,)) == [1]
        replicas.clock.advance(86400)
        assert await replicas.let_in((BURST * 3,)) == [BURST]


async def test_requests_beyond_all_replicas_bursts_are_told_when_to_come_again() -> None:
    replicas = Replicas(2)
    async with replicas.running():
        assert await replicas.let_in((BURST, BURST)) == [BURST, BURST]
        await replicas.told()
        with pytest.raises(LimitError) as caught:
            await replicas.quotas[0].admit("acme")
    assert caught.value.retry_after_s == 1


async def test_a_bus_that_is_away_or_says_nonsense_leaves_each_replica_its_own_count() -> None:
    replicas = Replicas(2)
    async with replicas.running():
        await replicas.bus.signal(topology.SUBJECT_USAGE, b'{"gateway": "x", "requests": {"acme": -1}}')
        await replicas.let_in((1, 1))
        await replicas.told()
        replicas.bus.down = True
        await replicas.let_in((1, 1))
        await replicas.told()
        replicas.bus.down = False
        async with asyncio.timeout(BOUND):
            while len(replicas.bus._listeners) < 2:
                await asyncio.sleep(0.001)
        assert await replicas.let_in((4, 0)) == [4, 0]
        await replicas.told()
        assert await replicas.let_in((0, BURST)) == [0, BURST - 3 - 4]


async def test_a_replica_that_ends_listens_no_more() -> None:
    replicas = Replicas(2)
    async with replicas.running():
        pass
    assert replicas.bus._listeners == []


async def test_nothing_is_said_where_nothing_was_used_and_of_who_has_no_limit() -> None:
    replicas = Replicas(1)
    async with replicas.running():
        for _ in range(3):
            await replicas.quotas[0].admit("default")
        await replicas.told()
        assert replicas.bus.calls["signal"] == 0
