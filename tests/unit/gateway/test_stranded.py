"""Tasks whose deliveries ran out and of which nobody told: they are found, and no other is touched."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from tests.gateways import BOUND, Gateway, completed, started

from gateway.stranded import Stranded
from vidgen import contracts, errors, eventlog, topology
from vidgen.bus import Delivery
from vidgen.contracts import Job
from vidgen.testing import MemoryBus

QUEUE = topology.consumer_of("edit", "interactive")
TOPOLOGY = topology.Topology(
    consumers=tuple(replace(one, max_deliver=2) if one.name == QUEUE.name else one for one in topology.CONSUMERS)
)


class Shore:
    """A gateway without consumers, so that no advisory is ever read, and a queue whose tasks run out soon."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway, self.bus, self.share = gateway, gateway.parts.bus, gateway.parts.jobs.share
        self.stranded = Stranded(self.bus, self.share)

    async def taken(self) -> Delivery:
        delivery = await self.bus.pull(QUEUE, 0)
        assert delivery is not None
        return delivery

    async def run_out(self) -> Job:
        """A job whose task was handed out as often as it may be."""
        job = await self.gateway.submit()
        for _ in range(2):
            await (await self.taken()).nak()
        assert await self.bus.pull(QUEUE, 0) is None
        return job

    @contextlib.asynccontextmanager
    async def worker(self, name: str, at: Job) -> AsyncIterator[None]:
        """A worker that is at one job, and says so."""
        asked = await self.bus.listen(topology.subject_of_worker("edit", name))

        async def answer() -> None:
            while (heard := await asked.next(BOUND)) is not None:
                await self.bus.signal(heard.reply, eventlog.AT_IT if heard.body == at.id.encode() else b"no")

        answering = asyncio.create_task(answer())
        yield
        answering.cancel()

    async def queued(self) -> list[int]:
        """The tasks in the queue, once those that are held have moved up."""
        stop = asyncio.Event()
        moving = asyncio.create_task(self.share.run(stop))
        async with asyncio.timeout(BOUND):
            while await self.gateway.count(topology.HELD):
                await asyncio.sleep(0)
        stop.set()
        await moving
        return sorted(stored.seq for stored in await self.bus.tail(topology.TASKS, None, 9))


@pytest.fixture
async def shore() -> Shore:
    return Shore(await Gateway.open(MemoryBus(TOPOLOGY)))


async def test_a_task_whose_deliveries_ran_out_is_queued_anew_though_no_advisory_came(shore: Shore) -> None:
    job = await shore.run_out()
    waiting = await shore.gateway.submit()
    [before, beside] = await shore.queued()

    await shore.stranded.sweep()
    assert await shore.queued() == [before, beside]  # it may just have been taken
    await shore.stranded.sweep()

    [of_other, again] = await shore.queued()
    assert of_other == beside
    assert again > beside
    assert {(await shore.taken()).subject.rsplit(".", 1)[-1] for _ in range(2)} == {job.id, waiting.id}


async def test_one_that_was_begun_is_queued_anew_and_its_log_counts_the_tries(shore: Shore) -> None:
    job = await shore.gateway.submit()
    await (await shore.taken()).nak()
    await shore.gateway.tell(started(job))
    await (await shore.taken()).nak()
    assert await shore.bus.pull(QUEUE, 0) is None

    for _ in range(2):
        await shore.stranded.sweep()

    await shore.queued()
    again = await shore.taken()
    task = contracts.Task.model_validate_json(again.body)
    claim = await eventlog.claim(shore.bus, task, "w2", 3, engine="preview", model="none", deliveries=2)
    assert isinstance(claim, eventlog.Claim)
    assert claim.attempt == 2


async def test_one_that_ended_leaves_the_queue(shore: Shore) -> None:
    job = await shore.run_out()
    await shore.gateway.tell(completed(job))

    for _ in range(2):
        await shore.stranded.sweep()

    assert await shore.queued() == []


async def test_a_task_that_moves_on_or_is_in_hands_stays_beside_one_that_is_stranded(shore: Shore) -> None:
    held, moving = [await shore.gateway.submit() for _ in range(2)]
    for _ in range(2):
        await shore.taken()
    await shore.gateway.tell(started(held))
    seqs = await shore.queued()
    await shore.run_out()
    async with shore.worker("w1", held):
        await shore.stranded.sweep()
        await shore.gateway.tell(started(moving))
        await shore.stranded.sweep()

    assert [seq for seq in await shore.queued() if seq in seqs] == seqs


async def test_a_queue_in_which_none_is_stranded_is_left_alone(shore: Shore) -> None:
    await shore.gateway.submit()
    await shore.gateway.submit()
    await shore.taken()
    before = await shore.queued()

    for _ in range(3):
        await shore.stranded.sweep()

    assert await shore.queued() == before


async def test_a_log_of_another_version_keeps_its_own_task_where_it_is_and_no_other(shore: Shore) -> None:
    other = await shore.run_out()
    job = await shore.run_out()
    [left, _] = await shore.queued()
    await shore.bus.publish(topology.subject_of_events(other.id), b'{"type": "of_tomorrow"}', message_id="tomorrow")

    for _ in range(2):
        await shore.stranded.sweep()

    [first, again] = await shore.queued()
    assert first == left
    assert (await shore.taken()).subject.endswith(job.id)
    assert again > left


async def test_an_advisory_of_a_task_that_is_gone_is_no_news(shore: Shore) -> None:
    await shore.run_out()
    await shore.bus.purge(topology.TASKS, ">")
    advisory = await shore.bus.pull(topology.Consumer(topology.ADVISORIES, topology.GATEWAY), 0)
    assert advisory is not None

    await shore.stranded.on_advisory(advisory)

    assert await shore.queued() == []
    assert await shore.gateway.count(topology.DEAD) == 0


async def test_a_sweep_that_the_bus_does_not_answer_is_not_the_last(shore: Shore) -> None:
    stop = asyncio.Event()
    shore.bus.fail_next("depth", errors.BusError("the bus is away"))
    running = asyncio.create_task(shore.stranded.run(stop))
    async with asyncio.timeout(BOUND):
        while not shore.bus.calls["depth"]:
            await asyncio.sleep(0)
    assert not running.done()
    stop.set()
    await running
