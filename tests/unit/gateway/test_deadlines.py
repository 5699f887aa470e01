"""A job whose deadline passes while it waits ends; one that a worker is at, or that has ended, is left alone."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any

import pytest
from tests.gateways import BOUND, Gateway, completed, failed, now, started

from gateway.deadlines import AGAIN, ANYWAY, ENDED, SLACK, Deadlines, Due
from gateway.share import Place
from vidgen import contracts, eventlog, tenants, topology
from vidgen.bus import Feed
from vidgen.contracts import Job, JobStatus
from vidgen.testing import MemoryBus


class Late:
    """A gateway that looks after deadlines, by a clock that is moved by hand."""

    def __init__(self, gateway: Gateway) -> None:
        assert isinstance(gateway.parts.bus, MemoryBus)
        self.gateway, self.bus, self.jobs = gateway, gateway.parts.bus, gateway.parts.jobs
        self.at = now()
        self.deadlines = Deadlines(self.bus, self.jobs, self.time)

    def time(self) -> datetime:
        return self.at

    async def after(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)
        await self.deadlines.look()
        await self.digested()

    async def digested(self) -> None:
        """Apply what was said of jobs, as the loops of a gateway would."""
        for stored in reversed(await self.bus.tail(topology.EVENTS, None, 100)):
            event = contracts.Event.validate_json(stored.body)
            if isinstance(event, contracts.StageEvent):
                await self.jobs.apply(event, stored.seq)

    async def of(self, job: Job) -> Job:
        return await self.jobs.get(job.id)


@pytest.fixture
async def late() -> Late:
    return Late(await Gateway.open())


async def test_a_job_that_no_worker_takes_ends_behind_its_deadline(late: Late) -> None:
    job = await late.gateway.submit(deadline_s=60)
    other = await late.gateway.submit(deadline_s=600)

    await late.after(61)  # whoever is at it has a moment to say so himself
    assert (await late.of(job)).status is JobStatus.QUEUED
    await late.after(SLACK.total_seconds() + 5)

    ended = await late.of(job)
    assert (ended.status, ended.error.code if ended.error else "") == (JobStatus.FAILED, "deadline_exceeded")
    assert (await late.of(other)).status is JobStatus.QUEUED
    [waits] = await late.bus.tail(topology.TASKS, None, 10)  # nobody is started for what is given up
    assert waits.subject.endswith(other.id)
    [letter] = await late.bus.tail(topology.DEAD, None, 10)
    assert contracts.DeadLetter.model_validate_json(letter.body).error.code == "deadline_exceeded"


async def test_nobody_looks_before_whoever_is_at_it_could_say_so(late: Late) -> None:
    job = await late.gateway.submit(deadline_s=60)
    assert job.deadline_at is not None
    assert late.jobs.due.wait_s(job.deadline_at) == SLACK.total_seconds()


async def test_a_retry_has_as_much_time_again(late: Late) -> None:
    job = await late.gateway.submit(deadline_s=60)
    await late.after(70)
    again = await late.jobs.retry(job.id)
    assert job.deadline_at is not None
    assert again.deadline_at is not None
    assert job.deadline_at < again.deadline_at <= now() + timedelta(seconds=60)
    [task] = await late.bus.tail(topology.TASKS, None, 10)
    assert contracts.Task.model_validate_json(task.body).deadline_at == again.deadline_at

    late.at = now() + timedelta(seconds=5)
    await late.after(0)
    assert (await late.of(job)).status is JobStatus.QUEUED
    await late.after(70)
    assert (await late.of(job)).status is JobStatus.FAILED


async def test_a_job_that_waits_for_a_review_ends_too(late: Late) -> None:
    job = await late.gateway.submit(i2v={"prompt": "zoom"}, review=True, deadline_s=60)
    await late.gateway.tell(started(job))
    await late.gateway.tell(completed(job))
    assert (await late.of(job)).status is JobStatus.AWAITING_REVIEW
    await late.after(70)
    ended = await late.of(job)
    assert (ended.status, ended.stage) == (JobStatus.FAILED, "i2v")
    assert [one.name for one in ended.artifacts] == ["edit-0.png"]


async def test_what_a_worker_is_at_is_left_to_it_and_looked_at_again(late: Late) -> None:
    job = await late.gateway.submit(deadline_s=60)
    await late.gateway.tell(started(job))
    await late.after(70)
    assert (await late.of(job)).status is JobStatus.IN_PROGRESS

    released = contracts.StageReleased.model_validate(
        started(job).model_dump(
            exclude={"type", "engine", "model", "queued_s", "deliveries", "checkpoint", "preempted"}
        )
    )
    await late.gateway.tell(released)
    await late.after(AGAIN.total_seconds())
    assert (await late.of(job)).status is JobStatus.FAILED


async def test_what_a_worker_was_at_that_died_ends_though_no_other_comes(late: Late) -> None:
    job, other = await late.gateway.submit(deadline_s=60), await late.gateway.submit(deadline_s=60)
    for one, worker in ((job, "w1"), (other, "w2")):
        await late.gateway.tell(started(one).model_copy(update={"worker": worker}))
    there = await late.bus.listen(topology.subject_of_worker("edit", "w2"))

    async def answer() -> None:
        while (heard := await there.next(BOUND)) is not None:
            await late.bus.signal(heard.reply, eventlog.AT_IT if heard.body == other.id.encode() else b"no")

    answering = asyncio.create_task(answer())
    await late.after(70)  # once may be a reconnection
    assert (await late.of(job)).status is JobStatus.IN_PROGRESS
    await late.after(AGAIN.total_seconds())
    answering.cancel()

    ended = await late.of(job)
    assert (ended.status, ended.error.code if ended.error else "") == (JobStatus.FAILED, "deadline_exceeded")
    assert (await late.of(other)).status is JobStatus.IN_PROGRESS
    [left] = await late.bus.tail(topology.TASKS, None, 10)
    assert left.subject.endswith(other.id)


async def test_a_worker_that_is_missed_now_and_then_is_not_taken_for_dead(late: Late) -> None:
    job = await late.gateway.submit(deadline_s=60)
    await late.gateway.tell(started(job))

    async def answer(feed: Feed) -> None:
        while (heard := await feed.next(BOUND)) is not None:
            await late.bus.signal(heard.reply, eventlog.AT_IT)

    await late.after(70)
    there = await late.bus.listen(topology.subject_of_worker("edit", "w1"))
    answering = asyncio.create_task(answer(there))
    await late.after(AGAIN.total_seconds())
    answering.cancel()
    await there.close()
    await late.after(AGAIN.total_seconds())
    assert (await late.of(job)).status is JobStatus.IN_PROGRESS
    await late.after(AGAIN.total_seconds())
    assert (await late.of(job)).status is JobStatus.FAILED


async def test_a_worker_is_not_missed_twice_at_once_though_its_task_is_found_again(late: Late) -> None:
    job = await late.gateway.submit(deadline_s=60)
    await late.gateway.tell(started(job))
    await late.after(70)
    await late.deadlines.sweep()
    await late.after(1)
    assert (await late.of(job)).status is JobStatus.IN_PROGRESS


async def test_who_was_missed_in_a_run_before_is_not_missed_in_this_one(late: Late) -> None:
    job = await late.gateway.submit(deadline_s=60)
    await late.gateway.tell(started(job))
    await late.after(70)
    await late.gateway.tell(failed(job))
    await late.after(1)
    again = await late.jobs.retry(job.id)
    await late.gateway.tell(started(again))
    await late.after(70)
    assert (await late.of(job)).status is JobStatus.IN_PROGRESS


async def test_what_is_held_behind_its_tenants_share_ends_too() -> None:
    bus = MemoryBus()
    await tenants.change(bus.records(topology.TENANTS_BUCKET), "acme", {})
    late = Late(await Gateway.open(bus, tenant_waiting=1))
    jobs = [await late.gateway.submit(deadline_s=60) for _ in range(3)]
    await late.jobs.share.fill(Place("edit", "interactive", "default"))
    assert (await late.gateway.count(topology.TASKS), await late.gateway.count(topology.HELD)) == (1, 2)

    await late.after(70)

    assert {(await late.of(job)).status for job in jobs} == {JobStatus.FAILED}
    assert (await late.gateway.count(topology.TASKS), await late.gateway.count(topology.HELD)) == (0, 0)


async def test_what_has_ended_stays_as_it_is(late: Late) -> None:
    done, broken = await late.gateway.submit(deadline_s=60), await late.gateway.submit(deadline_s=60)
    await late.gateway.tell(completed(done))
    await late.gateway.tell(failed(broken))
    await late.after(70)
    assert (await late.of(done)).status is JobStatus.COMPLETED
    assert (await late.of(broken)).error == failed(broken).error
    assert await late.bus.tail(topology.DEAD, None, 10) == []


@pytest.mark.parametrize("stages", [{}, {"i2v": {"prompt": "zoom"}}])
async def test_what_is_done_by_the_log_is_not_given_up_though_its_record_does_not_know_yet(
    late: Late, stages: dict[str, Any]
) -> None:
    """There was a dead letter of it, and its log and its record knew nothing of that."""
    job = await late.gateway.submit(deadline_s=60, **stages)
    await late.bus.publish(topology.subject_of_events(job.id), completed(job).to_bytes(), message_id="done")
    late.at += timedelta(seconds=70)
    await late.deadlines.look()  # before the consumer comes to the event
    assert await late.bus.tail(topology.DEAD, None, 10) == []

    await late.digested()
    assert (await late.of(job)).status is (JobStatus.IN_PROGRESS if stages else JobStatus.COMPLETED)
    await late.after(AGAIN.total_seconds())  # what is due now has its deadline behind it as well
    ended = await late.of(job)
    assert (ended.status, ended.stage) == ((JobStatus.FAILED, "i2v") if stages else (JobStatus.COMPLETED, None))
    assert len(await late.bus.tail(topology.DEAD, None, 10)) == len(stages)


async def test_what_another_gateway_moves_on_meanwhile_is_looked_at_again(late: Late) -> None:
    other = Late(await Gateway.open(late.bus, late.gateway.parts.store))
    job = await late.gateway.submit(deadline_s=60, i2v={"prompt": "zoom"})
    await late.bus.publish(topology.subject_of_events(job.id), completed(job).to_bytes(), message_id="done")
    late.at += timedelta(seconds=70)
    await late.deadlines.look()
    await other.digested()

    await late.after(AGAIN.total_seconds())

    ended = await late.of(job)
    assert (ended.status, ended.stage) == (JobStatus.FAILED, "i2v")


async def test_a_gateway_that_is_started_anew_finds_the_deadlines_of_what_waits(late: Late) -> None:
    jobs = [await late.gateway.submit(deadline_s=60) for _ in range(3)]
    fresh = Late(await Gateway.open(late.bus, late.gateway.parts.store))
    await fresh.deadlines.sweep()
    await fresh.after(70)
    assert {(await fresh.of(job)).status for job in jobs} == {JobStatus.FAILED}


async def test_a_bus_that_is_away_is_asked_again(late: Late) -> None:
    job = await late.gateway.submit(deadline_s=60)
    late.bus.fail_next("publish")
    await late.after(70)
    assert (await late.of(job)).status is JobStatus.QUEUED
    await late.after(AGAIN.total_seconds())
    assert (await late.of(job)).status is JobStatus.FAILED


async def test_a_record_that_cannot_be_read_holds_up_no_other(late: Late) -> None:
    odd, job = await late.gateway.submit(deadline_s=60), await late.gateway.submit(deadline_s=60)
    records = late.bus.records(topology.JOBS_BUCKET)
    found = await records.get(odd.id)
    assert found is not None
    await records.put(odd.id, b'{"of": "another version"}', revision=found[1])
    await late.after(70)
    assert (await late.of(job)).status is JobStatus.FAILED


async def test_it_runs_by_itself_until_it_is_told_to_stop(late: Late) -> None:
    stop = asyncio.Event()
    late.deadlines = Deadlines(late.bus, late.jobs, lambda: now() + SLACK)
    running = asyncio.create_task(late.deadlines.run(stop))
    job = await late.gateway.submit(deadline_s=0.05)
    feed = await late.bus.follow(topology.EVENTS, topology.subject_of_events(job.id))
    async with asyncio.timeout(BOUND):
        while True:
            told = await feed.next(BOUND)
            if told is not None and b"deadline_exceeded" in told.body:
                break
    stop.set()
    await asyncio.wait_for(running, BOUND)


async def test_it_rests_while_nothing_is_due(late: Late) -> None:
    stop, looks = asyncio.Event(), 0

    def time() -> datetime:
        nonlocal looks
        looks += 1
        return now()

    async def turns() -> int:
        for _ in range(200):
            await asyncio.sleep(0)
        return looks

    running = asyncio.create_task(Deadlines(late.bus, late.jobs, time).run(stop))
    await turns()
    await late.gateway.submit(deadline_s=60)
    assert await turns() == await turns()
    stop.set()
    await asyncio.wait_for(running, BOUND)


def test_deadlines_of_what_has_ended_are_not_kept_in_mind() -> None:
    due, at = Due(), now()
    job = Job(id="j", created_at=at, updated_at=at, deadline_at=at + timedelta(days=1))
    for number in range(3 * ENDED):
        one = job.model_copy(update={"id": f"j{number}"})
        due.note(one, at)
        due.note(one.model_copy(update={"status": JobStatus.COMPLETED}), at)
    assert len(due._next) <= ENDED + 1
    assert due.wait_s(at) is None


async def test_deadlines_of_what_another_gateway_ended_are_not_kept_in_mind_either(late: Late) -> None:
    """They were for as long as seven days: only who writes an end hears of it."""
    other = Late(await Gateway.open(late.bus, late.gateway.parts.store))
    review = await late.gateway.submit(i2v={"prompt": "zoom"}, review=True, deadline_s=86_400)
    await late.gateway.tell(started(review))
    await late.gateway.tell(completed(review))
    jobs = [await late.gateway.submit(deadline_s=86_400) for _ in range(5)]
    await other.deadlines.sweep()  # it knows of them by their tasks alone
    third = await Gateway.open(late.bus, late.gateway.parts.store)
    for job in jobs:
        await third.tell(completed(job))

    for one in (late, other):
        await one.after(ANYWAY.total_seconds() + 5)
        assert [job.id for job in (review, *jobs) if job.id in one.jobs.due] == [review.id]

    for seconds in (ANYWAY.total_seconds(), 86_400):  # what is left is looked at again, and is not forgotten
        assert (await late.of(review)).status is JobStatus.AWAITING_REVIEW
        await late.after(seconds)
    assert (await late.of(review)).status is JobStatus.FAILED


async def test_what_came_and_went_behind_a_task_that_waits_for_long_is_not_asked_for(late: Late) -> None:
    await late.gateway.submit(deadline_s=60)
    for _ in range(50):
        await late.gateway.submit()
    for gone in (await late.bus.tail(topology.TASKS, None, 100))[:50]:
        await late.bus.delete(topology.TASKS, gone.seq)
    before = dict(late.bus.calls)
    await late.deadlines.sweep()
    asked = {name: count - before.get(name, 0) for name, count in late.bus.calls.items() if count > before.get(name, 0)}
    assert asked == {"first": 3}
