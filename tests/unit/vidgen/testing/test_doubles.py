"""What the doubles can do that the real things cannot: stand still, fail on command, show what they hold."""

from __future__ import annotations

import asyncio
import dataclasses
from datetime import timedelta
from pathlib import Path

import pytest

from vidgen import errors, topology
from vidgen.artifacts import ArtifactStore
from vidgen.bus import Bus
from vidgen.testing import FakeClock, MemoryBus, MemoryStore
from vidgen.testing.clock import START

QUEUE = topology.consumer_of("edit", "interactive")
SUBJECT = topology.subject_of_task("edit", "interactive", "j1")
EVENT = topology.subject_of_events("j1")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def bus(clock: FakeClock) -> MemoryBus:
    return MemoryBus(clock=clock)


async def until_waiting() -> None:
    """Let every other task run until it waits for something."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_the_doubles_are_what_they_double(bus: MemoryBus) -> None:
    seam: Bus = bus
    store: ArtifactStore = MemoryStore()
    assert seam is bus
    assert store


# ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_fake_clock_moves_only_by_hand(clock: FakeClock) -> None:
    sleeper = asyncio.create_task(clock.sleep(10))
    await until_waiting()
    clock.advance(9.9)
    await until_waiting()
    assert not sleeper.done()

    clock.advance(0.2)
    await sleeper

    assert clock.now() == START + timedelta(seconds=10.1)


async def test_a_message_is_stamped_by_the_clock(bus: MemoryBus, clock: FakeClock) -> None:
    clock.advance(60)
    await bus.publish(SUBJECT, b"", message_id="a")

    assert bus.messages(topology.TASKS)[0].at == START + timedelta(seconds=60)


async def test_a_lease_ends_when_the_clock_says_so(bus: MemoryBus, clock: FakeClock) -> None:
    await bus.publish(SUBJECT, b"", message_id="a")
    first = await bus.pull(QUEUE, 0)
    assert first is not None
    clock.advance(topology.ACK_WAIT - 1)
    await first.in_progress()
    clock.advance(topology.ACK_WAIT - 1)
    assert await bus.pull(QUEUE, 0) is None

    clock.advance(1)
    second = await bus.pull(QUEUE, 0)

    assert second is not None
    assert second.num_delivered == 2


async def test_a_waiting_pull_wakes_for_a_message_a_redelivery_and_its_end(bus: MemoryBus, clock: FakeClock) -> None:
    pull = asyncio.create_task(bus.pull(QUEUE, 100))
    await until_waiting()
    await bus.publish(SUBJECT, b"", message_id="a")
    first = await pull
    assert first is not None

    await first.nak(30)
    pull = asyncio.create_task(bus.pull(QUEUE, 100))
    await until_waiting()
    clock.advance(30)
    second = await pull
    assert second is not None
    await second.ack()

    pull = asyncio.create_task(bus.pull(QUEUE, 100))
    await until_waiting()
    assert not pull.done()
    clock.advance(100)
    assert await pull is None


async def test_records_expire_by_the_clock(bus: MemoryBus, clock: FakeClock) -> None:
    workers = bus.records(topology.WORKERS_BUCKET)
    revision = await workers.put("edit.w", b"1")
    clock.advance(topology.WORKER_TTL - 1)
    await workers.put("edit.w", b"2", revision)
    clock.advance(topology.WORKER_TTL - 1)
    assert await workers.all() == {"edit.w": b"2"}

    clock.advance(1)

    assert await workers.all() == {}
    await workers.put("edit.w", b"3", 0)


async def test_exhaustion_is_told_when_somebody_pulls_and_only_once(clock: FakeClock) -> None:
    consumers = tuple(dataclasses.replace(consumer, max_deliver=1) for consumer in topology.CONSUMERS)
    bus = MemoryBus(topology.Topology(consumers=consumers), clock=clock)
    await bus.publish(SUBJECT, b"", message_id="a")
    assert await bus.pull(QUEUE, 0) is not None
    clock.advance(topology.ACK_WAIT)
    assert bus.messages(topology.ADVISORIES) == []

    assert await bus.pull(QUEUE, 0) is None
    assert await bus.pull(QUEUE, 0) is None

    assert len(bus.messages(topology.ADVISORIES)) == 1
    assert len(bus.messages(topology.TASKS)) == 1


async def test_a_consumer_hands_out_no_more_than_may_be_pending(clock: FakeClock) -> None:
    consumers = tuple(dataclasses.replace(consumer, max_ack_pending=1) for consumer in topology.CONSUMERS)
    bus = MemoryBus(topology.Topology(consumers=consumers), clock=clock)
    for job in ("a", "b"):
        await bus.publish(topology.subject_of_task("edit", "interactive", job), b"", message_id=job)
    first = await bus.pull(QUEUE, 0)
    assert first is not None
    assert await bus.pull(QUEUE, 0) is None

    await first.ack()

    assert await bus.pull(QUEUE, 0) is not None


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_ordered_fault_fails_one_call_and_does_nothing(bus: MemoryBus) -> None:
    bus.fail_next("publish")
    with pytest.raises(errors.BusError):
        await bus.publish(EVENT, b"", message_id="a")
    assert bus.messages(topology.EVENTS) == []

    assert await bus.publish(EVENT, b"", message_id="a") == 1
    assert bus.calls["publish"] == 2


async def test_a_lost_answer_leaves_its_work_done(bus: MemoryBus) -> None:
    bus.fail_next("publish", after=True)
    with pytest.raises(errors.BusError):
        await bus.publish(EVENT, b"", message_id="a", expect_last=0)

    assert await bus.publish(EVENT, b"", message_id="a", expect_last=0) == 1


async def test_faults_may_be_of_any_kind_and_several(bus: MemoryBus) -> None:
    bus.fail_next("records.put", errors.ConflictError(), times=2)
    records = bus.records(topology.JOBS_BUCKET)
    for _ in range(2):
        with pytest.raises(errors.ConflictError):
            await records.put("j1", b"")
    await records.put("j1", b"")


def test_a_fault_of_a_method_that_is_not_there_is_a_mistake(bus: MemoryBus) -> None:
    with pytest.raises(ValueError, match="publish"):
        bus.fail_next("publsh")


async def test_an_outage_fails_everything_and_ends_what_waits(bus: MemoryBus) -> None:
    await bus.publish(SUBJECT, b"kept", message_id="a")
    delivery = await bus.pull(QUEUE, 0)
    assert delivery is not None
    feed = await bus.listen(topology.SUBJECT_CONTROL_ALL)
    waiting = [asyncio.create_task(bus.pull(QUEUE, 100)), asyncio.create_task(feed.next(100))]
    await until_waiting()

    bus.down = True

    for call in (*waiting, delivery.ack(), bus.depth(QUEUE), bus.records(topology.JOBS_BUCKET).get("j1")):
        with pytest.raises(errors.BusError):
            await call
    assert not await bus.ready()
    bus.down = False
    assert await bus.ready()
    assert [message.body for message in bus.messages(topology.TASKS)] == [b"kept"]


async def test_a_full_stream_refuses_or_forgets_as_it_is_told_to(bus: MemoryBus) -> None:
    bus.limit(topology.REQUESTS, 1)
    await bus.publish(topology.SUBJECT_REQUESTS, b"", message_id="a")
    with pytest.raises(errors.QueueFullError):
        await bus.publish(topology.SUBJECT_REQUESTS, b"", message_id="b")
    assert await bus.publish(topology.SUBJECT_REQUESTS, b"", message_id="a") == 1

    bus.limit(topology.EVENTS, 1)
    for n in range(3):
        await bus.publish(EVENT, b"%d" % n, message_id=str(n))
    assert [message.body for message in bus.messages(topology.EVENTS)] == [b"2"]


async def test_ids_can_be_forgotten(bus: MemoryBus) -> None:
    await bus.publish(EVENT, b"", message_id="a")
    bus.forget_ids(topology.EVENTS)

    assert await bus.publish(EVENT, b"", message_id="a") == 2


# ── the store ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_store_shows_what_it_holds_and_takes_what_is_given(tmp_path: Path) -> None:
    store = MemoryStore()
    store.add("uploads/a.png", b"png", "image/png", engine="preview")

    await store.fetch("uploads/a.png", tmp_path / "a.png")
    found = await store.stat("uploads/a.png")

    assert (tmp_path / "a.png").read_bytes() == store.objects["uploads/a.png"] == b"png"
    assert found is not None
    assert found.metadata == {"engine": "preview"}
    assert await store.url("uploads/a.png") == "memory://vidgen/uploads/a.png?method=GET&expires=900"
    url = await store.upload_url("uploads/a.png", "image/png", 7)
    assert url == "memory://vidgen/uploads/a.png?method=PUT&expires=900&size=7"


async def test_the_store_fails_on_command(tmp_path: Path) -> None:
    store = MemoryStore()
    (tmp_path / "a").write_bytes(b"a")
    store.fail_next("put", after=True)
    with pytest.raises(errors.StoreError):
        await store.put("uploads/a", tmp_path / "a", "a/b")
    assert "uploads/a" in store.objects

    store.down = True
    for call in (store.put("uploads/a", tmp_path / "a", "a/b"), store.stat("uploads/a")):
        with pytest.raises(errors.StoreError):
            await call
    assert not await store.ready()
