"""The tasks of a dead worker are handed out again; those of one that is there, or of another, are not."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from structlog.testing import capture_logs
from tests.gateways import Gateway, started

from gateway.orphans import BACK_S, SAID_S, Orphans
from vidgen import contracts, errors, topology
from vidgen.bus import Delivery
from vidgen.contracts import Job, Stage, WorkerInfo
from vidgen.testing import FakeClock, MemoryBus

SILENCE_S, LEASE_S = 6.0, 60.0
QUEUE = topology.consumer_of("edit", "interactive")


class Ward:
    """A gateway that looks after orphans, a job whose task a worker `w1` took, and time that is moved by hand."""

    def __init__(self, gateway: Gateway, clock: FakeClock) -> None:
        parts = gateway.parts
        assert isinstance(parts.bus, MemoryBus)
        self.gateway, self.bus, self.clock = gateway, parts.bus, clock
        self.orphans = Orphans(self.bus, parts.fleet, parts.metrics, SILENCE_S, LEASE_S, clock=clock.time)

    @classmethod
    async def open(cls) -> Ward:
        clock = FakeClock()
        return cls(await Gateway.open(MemoryBus(clock=clock)), clock)

    async def register(self, worker: str = "w1", stage: Stage = "edit", **given: Any) -> None:
        at = datetime.now(UTC)
        info = WorkerInfo(
            id=worker, stage=stage, state="busy", engine="preview", model="none", device="cpu", version="1", host="h",
            started_at=at, at=at, **given,
        )  # fmt: skip
        await self.bus.records(topology.WORKERS_BUCKET).put(f"{stage}.{worker}", info.to_bytes())

    async def taken(self) -> tuple[Job, Delivery]:
        job = await self.gateway.submit()
        delivery = await self.bus.pull(QUEUE, 0)
        assert delivery is not None
        return job, delivery

    async def looks(self, count: int = 2) -> None:
        """The first look, silence, and so many looks behind it."""
        await self.orphans.look()
        self.clock.advance(SILENCE_S)
        for _ in range(count):
            await self.orphans.look()

    async def again(self) -> Delivery | None:
        return await self.bus.pull(QUEUE, 0)

    async def newest(self, job: Job) -> contracts.AnyEvent:
        stored = await self.bus.last(topology.EVENTS, topology.subject_of_events(job.id))
        assert stored is not None
        return contracts.Event.validate_json(stored.body)


@pytest.fixture
async def ward() -> Ward:
    return await Ward.open()


async def test_a_task_that_a_dead_worker_began_is_handed_out_again(ward: Ward) -> None:
    job, _ = await ward.taken()
    await ward.gateway.tell(started(job))
    await ward.register(running=(job.id,))

    await ward.looks()

    again = await ward.again()
    assert again is not None
    assert again.num_delivered == 2
    assert isinstance(await ward.newest(job), contracts.StageStarted)
    assert b'vidgen_orphans_total{stage="edit"} 1.0' in ward.gateway.parts.metrics.render()[0]


async def test_a_log_of_another_version_keeps_its_own_task_waiting_and_no_other(ward: Ward) -> None:
    """All that workers died of waited for their leases then."""
    other, _ = await ward.taken()  # looked at first
    job, _ = await ward.taken()
    await ward.bus.publish(topology.subject_of_events(other.id), b'{"type": "of_tomorrow"}', message_id="tomorrow")
    await ward.gateway.tell(started(job))
    await ward.register(running=(other.id, job.id))

    with capture_logs() as logs:
        await ward.looks()

    again = await ward.again()
    assert again is not None
    assert again.subject.endswith(job.id)
    assert await ward.again() is None
    assert [entry["job"] for entry in logs if entry["_event"] == "orphan_unknown"] == [other.id]


async def test_one_that_had_not_said_so_yet_is_handed_out_again_too(ward: Ward) -> None:
    await ward.taken()
    await ward.register()

    await ward.looks()
    assert await ward.again() is None  # nobody says who has it: it may have been taken in this moment
    ward.clock.advance(SAID_S)
    await ward.orphans.look()

    assert await ward.again() is not None


async def test_a_worker_that_is_silent_but_there_keeps_its_task(ward: Ward) -> None:
    job, _ = await ward.taken()
    await ward.gateway.tell(started(job))
    await ward.register(running=(job.id,))
    await ward.bus.listen(topology.subject_of_worker("edit", "w1"))

    await ward.looks()

    assert await ward.again() is None


async def test_a_worker_that_is_missed_once_may_be_reconnecting(ward: Ward) -> None:
    job, _ = await ward.taken()
    await ward.gateway.tell(started(job))
    await ward.register(running=(job.id,))

    await ward.looks(1)

    assert await ward.again() is None


@pytest.mark.parametrize("late", [False, True], ids=["", "behind it the end of the run before"])
async def test_what_another_worker_holds_by_now_is_not_taken_from_it(ward: Ward, late: bool) -> None:
    job, delivery = await ward.taken()
    if late:
        await ward.gateway.client.post(f"/v1/jobs/{job.id}/cancel")
        await delivery.ack()
        answer = await ward.gateway.client.post(f"/v1/jobs/{job.id}/retry")
        job = Job.model_validate(answer.json())
        assert await ward.again() is not None
    await ward.gateway.tell(started(job).model_copy(update={"worker": "w2", "attempt": 2}))
    if late:
        await ward.gateway.tell(contracts.JobCancelled(job_id=job.id, run=1, at=job.created_at))
    await ward.register(running=(job.id,))
    await ward.register("w2")
    await ward.bus.listen(topology.subject_of_worker("edit", "w2"))

    await ward.looks()
    for _ in range(3):  # however long that goes on
        ward.clock.advance(SILENCE_S)
        await ward.orphans.look()

    assert await ward.again() is None


async def test_what_another_worker_has_taken_and_not_begun_is_not_taken_from_it(ward: Ward) -> None:
    """It waits there until those who run beside it are gone: its log says nothing of it yet."""
    job, _ = await ward.taken()
    await ward.register()
    await ward.register("w2", running=(job.id,))
    await ward.bus.listen(topology.subject_of_worker("edit", "w2"))

    await ward.looks()
    for _ in range(3):
        ward.clock.advance(SILENCE_S)
        await ward.orphans.look()

    assert await ward.again() is None


async def test_a_task_in_its_back_off_stays_there(ward: Ward) -> None:
    job, delivery = await ward.taken()
    error = contracts.JobError(code="out_of_memory", message="no room")
    stamp = started(job).model_dump(include={"job_id", "run", "at", "stage", "attempt", "tries", "worker"})
    await ward.gateway.tell(contracts.StageFailed(**stamp, error=error, final=False, retry_in_s=30.0))
    await delivery.nak(30.0)
    await ward.register()

    await ward.looks()

    assert await ward.again() is None


async def test_a_task_that_was_handed_back_to_one_who_died_with_it_is_not_forgotten(ward: Ward) -> None:
    """It was given back, given out, and its next worker died before its claim: its log said that it was free."""
    job, _ = await ward.taken()
    stamp = started(job).model_dump(include={"job_id", "run", "at", "stage", "attempt", "tries", "worker"})
    await ward.gateway.tell(contracts.StageReleased(**stamp))
    await ward.register()

    await ward.looks()
    ward.clock.advance(SAID_S)
    await ward.orphans.look()

    assert await ward.again() is not None


async def test_a_holder_of_whom_nothing_is_known_any_more_is_given_time(ward: Ward) -> None:
    job, _ = await ward.taken()
    await ward.gateway.tell(started(job).model_copy(update={"worker": "expired"}))
    await ward.register()

    await ward.orphans.look()
    assert await ward.again() is None
    ward.clock.advance(BACK_S - 1)
    await ward.orphans.look()
    assert await ward.again() is None
    ward.clock.advance(1)
    await ward.orphans.look()

    assert await ward.again() is not None


async def test_the_task_of_a_worker_that_the_bus_forgot_with_its_registry_is_handed_out_again(ward: Ward) -> None:
    """The whole of `vidgen up` was ended the hard way and started again: its task came back a minute later."""
    job, _ = await ward.taken()
    await ward.gateway.tell(started(job))
    await ward.register("w2")  # of the new start
    await ward.bus.listen(topology.subject_of_worker("edit", "w2"))

    await ward.looks()
    assert await ward.again() is None
    ward.clock.advance(BACK_S - SILENCE_S)
    await ward.orphans.look()
    await ward.orphans.look()
    assert await ward.again() is not None
    assert await ward.again() is None  # once


async def test_a_worker_that_comes_back_to_a_bus_that_forgot_it_keeps_its_task(ward: Ward) -> None:
    job, _ = await ward.taken()
    await ward.gateway.tell(started(job))

    for seconds in (BACK_S - 1, 2, BACK_S - 1):  # it is away, is back and not registered yet, is away again
        await ward.orphans.look()
        ward.clock.advance(seconds)
        there = await ward.bus.listen(topology.subject_of_worker("edit", "w1"))
        await ward.orphans.look()
        await there.close()

    assert await ward.again() is None


async def test_while_the_bus_is_away_nobody_is_missed(ward: Ward) -> None:
    job, _ = await ward.taken()
    await ward.gateway.tell(started(job))
    await ward.orphans.look()
    ward.bus.fail_next("records.all")
    ward.clock.advance(BACK_S)
    with pytest.raises(errors.BusError):
        await ward.orphans.look()

    await ward.orphans.look()
    assert await ward.again() is None
    ward.clock.advance(BACK_S)
    await ward.orphans.look()

    assert await ward.again() is not None


async def test_a_task_that_was_just_taken_is_nobodys_where_nobody_died(ward: Ward) -> None:
    await ward.taken()

    await ward.looks(3)
    ward.clock.advance(BACK_S)
    await ward.orphans.look()

    assert await ward.again() is None


async def test_tasks_are_not_read_for_ever_where_all_workers_are_known(ward: Ward) -> None:
    for stage in contracts.STAGES:
        await ward.bus.listen(topology.subject_of_worker(stage, "w1"))
    for _ in range(5):  # entries live for 20 s
        for stage in contracts.STAGES:
            await ward.register(stage=stage)
        await ward.orphans.look()
        ward.clock.advance(LEASE_S / 4)

    ward.bus.fail_next("unsettled")
    await ward.orphans.look()
