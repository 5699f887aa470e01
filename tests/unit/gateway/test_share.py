"""A fair share: nobody waits behind all of another tenant's tasks, and nothing is lost, doubled or left behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from tests.gateways import BOUND, EDIT, KEY, Gateway, completed, now, picture, put, started

from gateway.deadlines import Deadlines
from gateway.share import FairShare, Place, withdraw
from vidgen import contracts, errors, tenants, topology
from vidgen.bus import Delivery, Stored
from vidgen.contracts import EditWork, Task
from vidgen.tenants import Tenants
from vidgen.testing import MemoryBus, MemoryStore

WORK = EditWork(
    prompt="x", user_prompt="x", negative_prompt=" ", steps=4, true_cfg_scale=1, guidance_scale=1, seed=5, width=64,
    height=64, candidates=1,
)  # fmt: skip
QUEUE = topology.consumer_of("edit", "interactive")


def task(job_id: str, tenant: str = "default", run: int = 1) -> Task:
    return Task(
        job_id=job_id, tenant=tenant, stage="edit", lane="interactive", run=run, inputs=(KEY,), work=WORK,
        queued_at=now(),
    )  # fmt: skip


class Lane:
    """One lane, the gateways that fill it, and a worker that takes one task after the other."""

    def __init__(self, waiting: int = 3, gateways: int = 1) -> None:
        self.bus = MemoryBus()
        self.shares = [FairShare(self.bus, Tenants(self.bus), waiting) for _ in range(gateways)]

    async def know(self, *names: str, **limits: Any) -> None:
        for name in names:
            await tenants.change(self.bus.records(topology.TENANTS_BUCKET), name, limits)

    async def queue(self, job_id: str, tenant: str, by: int = 0) -> None:
        await self.shares[by].queue(task(job_id, tenant), f"{job_id}:edit:1", {topology.HEADER_LOG_SEQ: "7"})
        await self.fill(tenant, by)

    async def fill(self, tenant: str, by: int = 0) -> None:
        await self.shares[by].fill(Place("edit", "interactive", tenant))

    async def take(self, by: int = 0) -> Delivery | None:
        """What a worker takes next; the gateway hears that it started."""
        delivery = await self.bus.pull(QUEUE, 0)
        if delivery is not None:
            await self.fill(Task.model_validate_json(delivery.body).tenant, by)
        return delivery

    async def drain(self) -> list[Task]:
        """Every task, in the order in which they are taken."""
        order = []
        while (delivery := await self.take()) is not None:
            order.append(Task.model_validate_json(delivery.body))
            await delivery.ack()
        return order

    def count(self, stream: str) -> int:
        return len(self.bus.messages(stream))

    def by_tenant(self, stream: str) -> Counter[str]:
        return Counter(message.subject.split(".")[4] for message in self.bus.messages(stream))


async def test_one_job_beside_a_thousand_of_another_tenant_waits_for_a_few_of_them() -> None:
    lane = Lane(waiting=8)
    await lane.know("acme", "umbrella")
    for number in range(1000):
        await lane.queue(f"a{number}", "acme")
    for _ in range(5):
        taken = await lane.take()
        assert taken is not None
        await taken.ack()
    await lane.queue("b0", "umbrella")

    order = [one.job_id for one in await lane.drain()]

    assert order.index("b0") <= 8
    assert [job for job in order if job != "b0"] == [f"a{number}" for number in range(5, 1000)]


jobs_of = st.lists(st.sampled_from(["default", "acme", "umbrella", "initech"]), min_size=1, max_size=60)


@settings(max_examples=60)
@given(jobs_of, st.integers(1, 5), st.integers(1, 3), st.randoms(use_true_random=False))
def test_every_task_is_taken_once_in_its_tenants_order_and_soon(
    arrivals: list[str], waiting: int, gateways: int, chance: Any
) -> None:
    async def run() -> None:
        lane = Lane(waiting, gateways)
        await lane.know("acme", "umbrella", "initech")
        taken: list[Task] = []
        for number, tenant in enumerate(arrivals):
            await lane.queue(f"j{number}", tenant, by=chance.randrange(gateways))
            queued, held = lane.by_tenant(topology.TASKS), lane.by_tenant(topology.HELD)
            # So whoever comes new stands behind no more than that of each other one; and nobody is held without need.
            assert max(queued.values()) <= waiting
            assert all(queued[one] == waiting for one in held)
            if chance.random() < 0.3 and (delivery := await lane.take(chance.randrange(gateways))) is not None:
                taken.append(Task.model_validate_json(delivery.body))
                await delivery.ack()
        taken += await lane.drain()

        assert sorted(one.job_id for one in taken) == sorted(f"j{number}" for number in range(len(arrivals)))
        for tenant in set(arrivals):
            own = [int(one.job_id[1:]) for one in taken if one.tenant == tenant]
            assert own == sorted(own)
        assert (lane.count(topology.TASKS), lane.count(topology.HELD)) == (0, 0)

    asyncio.run(run())


async def test_alone_the_operators_tasks_are_queued_at_once_and_nothing_is_held() -> None:
    lane = Lane(waiting=2)
    for number in range(20):
        await lane.shares[0].queue(task(f"j{number}"), f"j{number}:edit:1", None)
    assert (lane.count(topology.TASKS), lane.count(topology.HELD)) == (20, 0)
    assert lane.bus.calls["first"] == lane.bus.calls["count"] == 0


async def test_tasks_that_run_do_not_take_the_place_of_those_that_wait() -> None:
    lane = Lane(waiting=2)
    await lane.know("acme")
    for number in range(10):
        await lane.queue(f"j{number}", "acme")
    running = [await lane.take() for _ in range(6)]
    assert all(running)
    assert lane.count(topology.TASKS) == 6 + 2


async def test_a_larger_share_lets_more_wait() -> None:
    lane = Lane(waiting=2)
    await lane.know("acme", share=6)
    for number in range(10):
        await lane.queue(f"j{number}", "acme")
    assert lane.count(topology.TASKS) == 6


async def test_a_task_that_moves_up_is_the_same_message() -> None:
    lane = Lane(waiting=1)
    await lane.know("acme")
    await lane.queue("j1", "acme")
    [message] = lane.bus.messages(topology.TASKS)
    assert message.subject == topology.subject_of_task("edit", "interactive", "j1", "acme")
    assert (message.headers["Nats-Msg-Id"], message.headers[topology.HEADER_LOG_SEQ]) == ("j1:edit:1", "7")
    assert Task.model_validate_json(message.body).job_id == "j1"


async def test_a_gateway_that_died_between_queueing_and_forgetting_leaves_one_task() -> None:
    lane = Lane(waiting=5)
    await lane.know("acme")
    lane.bus.fail_next("delete")
    with pytest.raises(errors.BusError):
        await lane.queue("j1", "acme")
    assert (lane.count(topology.TASKS), lane.count(topology.HELD)) == (1, 1)

    await lane.fill("acme")  # another gateway's sweep

    assert (lane.count(topology.TASKS), lane.count(topology.HELD)) == (1, 0)


async def test_a_task_that_is_queued_already_is_not_held_for_ever() -> None:
    lane = Lane(waiting=5)
    await lane.know("acme")
    await lane.queue("j1", "acme")
    lane.bus.forget_ids(topology.TASKS)
    lane.bus.forget_ids(topology.HELD)
    await lane.queue("j1", "acme")
    assert (lane.count(topology.TASKS), lane.count(topology.HELD)) == (1, 0)


async def test_what_was_held_moves_up_where_shares_were_switched_off() -> None:
    lane = Lane(waiting=1)
    await lane.know("acme")
    for number in range(5):
        await lane.queue(f"j{number}", "acme")
    await FairShare(lane.bus, Tenants(lane.bus), waiting=0).fill(Place("edit", "interactive", "acme"))
    assert (lane.count(topology.TASKS), lane.count(topology.HELD)) == (5, 0)


async def moved_up(lane: Lane, running: asyncio.Task[None], stop: asyncio.Event) -> bool:
    """Whether a task comes from the queue; then those who move them up are told to end, and do."""
    async with asyncio.timeout(BOUND):
        delivery = await lane.bus.pull(QUEUE, BOUND)
    stop.set()
    await running
    return delivery is not None


async def test_a_sweep_finds_what_nobody_told_of() -> None:
    lane = Lane(waiting=4)
    await lane.know("acme")
    await lane.shares[0].queue(task("j1", "acme"), "j1:edit:1", None)  # and that gateway died
    other, stop = FairShare(lane.bus, Tenants(lane.bus), 4, sweep_s=0.01), asyncio.Event()
    running = asyncio.create_task(other.run(stop))
    assert await moved_up(lane, running, stop)


class Looks(asyncio.Event):
    """An event that counts how often somebody looks whether it is set."""

    count = 0

    def is_set(self) -> bool:
        self.count += 1
        return super().is_set()


async def test_what_was_told_once_wakes_it_once() -> None:
    lane = Lane(waiting=4)
    await lane.know("acme")
    share, stop = FairShare(lane.bus, Tenants(lane.bus), 4, sweep_s=10 * BOUND), Looks()
    running = asyncio.create_task(share.run(stop))
    await share.queue(task("j1", "acme"), "j1:edit:1", None)
    async with asyncio.timeout(BOUND):
        assert await lane.bus.pull(QUEUE, BOUND) is not None
    for _ in range(500):
        await asyncio.sleep(0)
    stop.set()
    await running

    assert stop.count < 10


async def test_an_outage_only_delays_what_is_held() -> None:
    lane = Lane(waiting=4)
    await lane.know("acme")
    share, stop = FairShare(lane.bus, Tenants(lane.bus), 4, sweep_s=0.01), asyncio.Event()
    lane.bus.fail_next("first", times=3)
    running = asyncio.create_task(share.run(stop))
    await share.queue(task("j1", "acme"), "j1:edit:1", None)
    assert await moved_up(lane, running, stop)


async def test_a_tenant_of_another_version_ends_no_gateway_and_its_tasks_move_up() -> None:
    """One such entry ended every gateway, and each one again at its start."""
    lane = Lane(waiting=4)
    await lane.bus.records(topology.TENANTS_BUCKET).put("acme", b'{"id":"acme","colour":"red"}')
    await lane.shares[0].queue(task("j1", "acme"), "j1:edit:1", None)
    share, stop = FairShare(lane.bus, Tenants(lane.bus), 4, sweep_s=0.01), asyncio.Event()
    running = asyncio.create_task(share.run(stop))
    assert await moved_up(lane, running, stop)


@pytest.mark.parametrize("unreadable", ["held", "queued", "both"])
async def test_a_task_of_another_version_waits_for_the_queued_one_and_stops_nobody(unreadable: str) -> None:
    """It ended every gateway, and each one again at its start."""
    lane = Lane(waiting=4)
    await lane.know("acme")
    newer = task("j1", "acme", run=2).to_bytes().replace(b"{", b'{"colour":"red",', 1)
    queued = newer if unreadable != "held" else task("j1", "acme").to_bytes()
    held = newer if unreadable != "queued" else task("j1", "acme", run=2).to_bytes()
    where = "edit", "interactive", "j1", "acme"
    await lane.bus.publish(topology.subject_of_task(*where), queued, message_id="j1:edit:1")
    await lane.bus.publish(topology.subject_of_held(*where), held, message_id="j1:edit:2")

    with capture_logs() as logs:
        for number in range(2, 5):
            await lane.queue(f"j{number}", "acme")

    assert [entry["_event"] for entry in logs] == ["held_unreadable"]
    assert [message.body for message in lane.bus.messages(topology.HELD)] == [held]
    taken = [await lane.bus.pull(QUEUE, 0) for _ in range(4)]
    assert [one.subject.rsplit(".", 1)[-1] for one in taken if one is not None] == ["j1", "j2", "j3", "j4"]
    assert taken[0] is not None
    await taken[0].ack()
    await lane.fill("acme")  # the next sweep
    last = await lane.bus.pull(QUEUE, 0)
    assert last is not None
    assert last.body == held
    assert lane.count(topology.HELD) == 0


@pytest.mark.parametrize("tenant", ["default", "acme"])
async def test_a_task_of_a_retry_is_not_lost_where_that_of_the_run_before_leaves_in_the_same_moment(
    tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one in the way was asked for when it had gone, and the new one was taken for it: the job waited for ever."""
    lane = Lane(waiting=4)
    if tenant != "default":  # else it goes into the queue at once
        await lane.know(tenant)
    await lane.queue("j1", tenant)
    older = await lane.bus.pull(QUEUE, 0)
    assert older is not None
    last = lane.bus.last

    async def leaves(stream: str, subject: str) -> Stored | None:
        await older.ack()
        return await last(stream, subject)

    monkeypatch.setattr(lane.bus, "last", leaves)
    await lane.shares[0].queue(task("j1", tenant, run=2), "j1:edit:2", None)
    await lane.fill(tenant)

    assert [one.run for one in await lane.drain()] == [2]
    assert lane.count(topology.HELD) == 0


async def test_a_cancel_leaves_a_task_of_another_version_to_its_worker() -> None:
    lane = Lane()
    subject = topology.subject_of_task("edit", "interactive", "j1", "acme")
    await lane.bus.publish(subject, b'{"job_id":"j1","colour":"red"}', message_id="j1:edit:1")
    assert not await withdraw(lane.bus, topology.TASKS, subject, 1)
    assert lane.count(topology.TASKS) == 1


# ── with the jobs ────────────────────────────────────────────────────────────────────────────────────────────────


async def shared(waiting: int = 1) -> Gateway:
    store = MemoryStore()
    for prefix in ("", "acme/"):
        await put(store, f"uploads/{prefix}photo.png", picture())
    bus = MemoryBus()
    await tenants.change(bus.records(topology.TENANTS_BUCKET), "acme", {})
    gateway = await Gateway.open(bus, store, tenant_waiting=waiting)
    gateway.parts.jobs.share = FairShare(bus, Tenants(bus), waiting, sweep_s=10 * BOUND)
    return gateway


@contextlib.asynccontextmanager
async def filling(gateway: Gateway) -> AsyncIterator[None]:
    """The gateway moves tasks up by what it is told: the sweep at its beginning is over, and the next one far."""
    bus, stop, before = gateway.parts.bus, asyncio.Event(), {"": 0}
    running = asyncio.create_task(gateway.parts.jobs.share.run(stop))
    assert isinstance(bus, MemoryBus)
    while dict(bus.calls) != before:
        before = dict(bus.calls)
        for _ in range(50):
            await asyncio.sleep(0)
    yield
    stop.set()
    await running


async def submitted(gateway: Gateway, job_id: str, **more: Any) -> contracts.Job:
    asked = {"references": ["uploads/acme/photo.png"], "edit": EDIT} | more
    request = contracts.VideoRequest.model_validate(asked)
    job, _ = await gateway.parts.intake.submit(request, job_id, "acme")
    await gateway.parts.jobs.share.fill(Place("edit", "interactive", "acme"))
    return job


async def test_a_held_job_that_is_cancelled_is_held_no_longer() -> None:
    gateway = await shared()
    await submitted(gateway, "j1")
    await submitted(gateway, "j2")
    assert await gateway.count(topology.HELD) == 1

    job = await gateway.parts.jobs.cancel("j2")

    assert job.status == "cancelled"
    assert (await gateway.count(topology.HELD), await gateway.count(topology.TASKS)) == (0, 1)


async def test_a_job_that_is_cancelled_makes_room_for_the_next() -> None:
    gateway = await shared()
    for job_id in ("j1", "j2"):
        await submitted(gateway, job_id)
    async with filling(gateway), asyncio.timeout(BOUND):
        await gateway.parts.jobs.cancel("j1")
        delivery = await gateway.parts.bus.pull(QUEUE, BOUND)
    assert delivery is not None
    assert delivery.subject.endswith(".j2")


async def test_a_job_whose_deadline_passed_makes_room_for_the_next() -> None:
    gateway = await shared()
    late = await submitted(gateway, "j1", deadline_s=60)
    await submitted(gateway, "j2")
    deadlines = Deadlines(gateway.parts.bus, gateway.parts.jobs, lambda: late.created_at + timedelta(seconds=70))
    async with filling(gateway), asyncio.timeout(BOUND):
        await deadlines.look()
        delivery = await gateway.parts.bus.pull(QUEUE, BOUND)
    assert delivery is not None
    assert delivery.subject.endswith(".j2")


@pytest.mark.parametrize("held_by", ["itself", "another gateway"])
async def test_a_task_that_starts_lets_the_next_move_up(held_by: str) -> None:
    """Also what another one holds: it moves up at whichever hears of the start."""
    gateway = await shared()
    other = await Gateway.open(gateway.parts.bus, gateway.parts.store, tenant_waiting=1)
    holder = gateway if held_by == "itself" else other
    async with filling(gateway), asyncio.timeout(BOUND):
        jobs = [await submitted(holder, job_id) for job_id in ("j1", "j2")]
        taken = await gateway.parts.bus.pull(QUEUE, 0)
        await gateway.parts.jobs.started(started(jobs[0]))
        following = await gateway.parts.bus.pull(QUEUE, BOUND)
    assert taken is not None
    assert following is not None
    assert following.subject.endswith(".j2")


async def test_a_task_that_is_queued_anew_waits_for_no_sweep_where_nobody_shares() -> None:
    lane = Lane(waiting=0)
    await lane.queue("j1", "default")
    [spent] = lane.bus.messages(topology.TASKS)
    lane.shares = [FairShare(lane.bus, Tenants(lane.bus), 0, sweep_s=10 * BOUND)]
    stop = asyncio.Event()
    running = asyncio.create_task(lane.shares[0].run(stop))
    for _ in range(200):  # its first sweep is over
        await asyncio.sleep(0)
    await lane.shares[0].queue_again(task("j1"), spent)
    async with asyncio.timeout(BOUND):
        while [one.seq for one in lane.bus.messages(topology.TASKS)] in ([], [spent.seq]):
            await asyncio.sleep(0)
    stop.set()
    await running
    assert lane.count(topology.HELD) == 0


@pytest.mark.parametrize("waiting", [0, 3])
async def test_a_task_that_is_in_its_queue_stays_the_one_that_it_is_though_it_is_demanded_again(waiting: int) -> None:
    """A worker may be at it: one put in its place would be given to another."""
    lane = Lane(waiting)
    await lane.know("acme")
    await lane.queue("j1", "acme")
    before = lane.bus.messages(topology.TASKS)
    for stream in (topology.TASKS, topology.HELD):
        lane.bus.forget_ids(stream)

    with contextlib.suppress(errors.ConflictError):
        await lane.queue("j1", "acme")
    await lane.fill("acme")

    assert lane.bus.messages(topology.TASKS) == before


async def test_a_waiting_jobs_place_counts_what_is_held() -> None:
    gateway = await shared()
    jobs = [await submitted(gateway, job_id) for job_id in ("j1", "j2", "j3")]
    places = [await gateway.parts.forecast.place(job) for job in jobs]
    assert [place.ahead if place else None for place in places] == [0, 2, 2]


async def test_a_video_of_a_tenant_is_held_too_and_its_frame_is_its_own() -> None:
    gateway = await shared()
    request = contracts.VideoRequest.model_validate(
        {"references": ["uploads/acme/photo.png"], "edit": EDIT, "i2v": {"prompt": "zoom"}}
    )
    job, _ = await gateway.parts.intake.submit(request, "j1", "acme")
    await gateway.tell(completed(job))
    subjects = {message.subject for message in await gateway.parts.bus.tail(topology.HELD, None, 10)}
    assert topology.subject_of_held("i2v", "interactive", "j1", "acme") in subjects
