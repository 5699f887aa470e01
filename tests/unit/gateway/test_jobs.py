"""The records: what a replica remembers of them, what begins a job's log, and what a task tells its worker."""

from __future__ import annotations

import asyncio
import gc
from datetime import timedelta
from unittest import mock
from unittest.mock import AsyncMock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.gateways import BOUND, EDIT, KEY, Gateway, completed, failed, now, started

from gateway import pipeline, plan
from gateway.jobs import JobNotFoundError, Jobs, parse_event
from gateway.share import FairShare, Place
from vidgen import contracts, errors, tenants, topology
from vidgen.bus import Stored
from vidgen.contracts import Job, JobStatus
from vidgen.testing import MemoryBus
from vidgen.testing.bus import MemoryRecords


def a_job(job_id: str = "j1", **request: object) -> Job:
    asked = contracts.VideoRequest.model_validate({"references": [KEY], "edit": EDIT} | request)
    work = plan.plan(asked.edit, asked.i2v, job_id, (64, 48))
    return pipeline.accept(asked, job_id, [KEY], work, now())


def log_of(bus: MemoryBus, job_id: str) -> list[str]:
    return [parse_event(stored.body).type for stored in bus.messages(topology.EVENTS, f"vidgen.events.{job_id}")]


def tasks(bus: MemoryBus) -> list[Stored]:
    return bus.messages(topology.TASKS)


async def test_two_replicas_move_one_job_on_in_turn_though_each_remembers_what_it_wrote() -> None:
    bus = MemoryBus()
    one, other = Jobs(bus), Jobs(bus)
    job, _ = await one.create(a_job(i2v={"prompt": "zoom"}))
    await other.apply(started(job))
    applied = await one.apply(completed(job))  # what it remembers is out of date by now
    assert applied is not None
    assert applied.job.stage == "i2v"
    edit = applied.job.stage_record("edit")
    assert edit is not None
    assert edit.started_at is not None
    assert edit.started_at < edit.completed_at
    again = await other.apply(completed(job))
    assert again is not None
    assert not again.changed
    assert again.job.stage == "i2v"


async def test_the_next_event_of_a_job_costs_no_read() -> None:
    bus = MemoryBus()
    jobs = Jobs(bus)
    job, _ = await jobs.create(a_job())
    before = bus.calls["records.get"]
    await jobs.apply(started(job))
    await jobs.apply(completed(job))
    assert (bus.calls["records.get"], bus.calls["first"]) == (before, 0)  # nor does its end, of its log


async def test_a_start_is_told_though_it_is_in_the_log_alone_and_no_record_is_written_for_it() -> None:
    bus = MemoryBus()
    one, other = Jobs(bus), Jobs(bus)
    job, _ = await one.create(a_job(i2v={"prompt": "zoom"}))
    begun = started(job)
    await bus.publish(topology.subject_of_events(job.id), begun.to_bytes(), message_id="s")
    writes = bus.calls["records.put"]
    assert await one.started(begun) is not None
    assert bus.calls["records.put"] == writes

    for jobs in (one, other):
        for told in (await jobs.find(job.id), await jobs.get(job.id), *(await jobs.list(None, None, 9)).jobs):
            assert told is not None
            assert (told.status, told.stage) == (JobStatus.IN_PROGRESS, "edit")
            edit = told.stage_record("edit")
            assert edit is not None
            assert (edit.state, edit.worker, edit.started_at) == ("running", "w1", begun.at)
        assert len((await jobs.list(JobStatus.IN_PROGRESS, None, 9)).jobs) == 1
        assert (await jobs.list(JobStatus.QUEUED, None, 9)).jobs == ()


async def test_a_replica_that_never_saw_the_start_knows_of_it_from_the_end() -> None:
    bus = MemoryBus()
    one, other = Jobs(bus), Jobs(bus)
    job, _ = await one.create(a_job())
    begun = started(job)
    await one.started(begun)
    ended = completed(job).model_copy(update={"started_at": begun.at})
    applied = await other.apply(ended)
    assert applied is not None
    edit = applied.job.stage_record("edit")
    assert edit is not None
    assert (edit.started_at, applied.job.status) == (begun.at, JobStatus.COMPLETED)


async def test_the_start_of_a_stage_that_the_record_does_not_know_yet_changes_nothing_of_what_is_told() -> None:
    bus = MemoryBus()
    jobs = Jobs(bus)
    job, _ = await jobs.create(a_job(i2v={"prompt": "zoom"}))
    begun = started(job, "i2v")
    await bus.publish(topology.subject_of_events(job.id), begun.to_bytes(), message_id="s")
    told = await jobs.find(job.id)
    assert told == job


async def test_what_is_in_the_log_and_cannot_be_read_is_passed_over() -> None:
    bus = MemoryBus()
    jobs = Jobs(bus)
    job, _ = await jobs.create(a_job())
    await bus.publish(topology.subject_of_events(job.id), b'{"type":"of another version"}', message_id="x")
    assert await jobs.find(job.id) == job


class Beside(MemoryBus):
    """The same bus by another connection; `gate` holds up what asks for the newest on a subject."""

    def __init__(self, other: MemoryBus) -> None:
        super().__init__()
        self._streams, self._buckets = other._streams, other._buckets
        self.gate = asyncio.Event()
        self.gate.set()

    async def latest(self, stream: str, subject: str) -> Stored | None:
        found = await super().latest(stream, subject)
        await self.gate.wait()
        return found


async def test_who_only_looks_does_so_by_the_connection_for_that() -> None:
    bus = MemoryBus()
    looks = Beside(bus)
    jobs = Jobs(bus, looks=looks)
    job, _ = await jobs.create(a_job())
    before = dict(bus.calls)
    for told in (await jobs.find(job.id), await jobs.get(job.id), *(await jobs.list(None, None, 9)).jobs):
        assert told == job
    assert dict(bus.calls) == before
    assert await jobs.ready()


async def test_a_look_waits_for_nothing_that_its_record_makes_needless() -> None:
    bus = MemoryBus()
    looks = Beside(bus)
    jobs = Jobs(bus, looks=looks)
    job, _ = await jobs.create(a_job())
    looks.gate.clear()
    looking = asyncio.create_task(jobs.get(job.id))
    async with asyncio.timeout(BOUND):
        while not (looks.calls["records.latest"] and looks.calls["latest"]):  # both are asked before one has answered
            await asyncio.sleep(0)
    assert not looking.done()  # of a job that waits or runs the log may tell more
    looks.gate.set()
    assert await looking == job

    await jobs.apply(completed(job))
    looks.gate.clear()
    async with asyncio.timeout(BOUND):
        assert (await jobs.get(job.id)).status is JobStatus.COMPLETED
        with pytest.raises(JobNotFoundError):
            await jobs.get("nobody")


async def test_what_else_was_asked_for_may_fail_where_it_is_not_needed_and_only_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bus = MemoryBus()
    jobs = Jobs(bus)
    job, _ = await jobs.create(a_job())
    bus.fail_next("latest")
    with pytest.raises(errors.BusError):
        await jobs.get(job.id)
    await jobs.apply(completed(job))
    bus.fail_next("latest")
    assert (await jobs.get(job.id)).status is JobStatus.COMPLETED
    for _ in range(5):
        await asyncio.sleep(0)
    gc.collect()
    assert not caplog.records  # nor does asyncio say that nobody heard of it


async def test_a_record_that_is_newer_than_the_event_read_beside_it_is_told_as_it_is() -> None:
    """Both are read at once, so the start of a run may come with the record of the next."""
    bus = MemoryBus()
    jobs = Jobs(bus)
    job, _ = await jobs.create(a_job())
    begun = started(job)
    await bus.publish(topology.subject_of_events(job.id), begun.to_bytes(), message_id="s")
    error = contracts.JobError(code="broken", message="it broke")
    failed = contracts.StageFailed(
        job_id=job.id, run=1, at=now(), stage="edit", attempt=1, tries=1, worker="w1", error=error, final=True
    )
    await jobs.apply(failed)
    await jobs.apply(contracts.RetryRequested(job_id=job.id, run=2, at=now()))
    told = await jobs.get(job.id)
    assert (told.run, told.status) == (2, JobStatus.QUEUED)


async def test_what_was_read_for_a_start_is_remembered_for_the_end() -> None:
    bus = MemoryBus()
    one, other = Jobs(bus), Jobs(bus)
    job, _ = await one.create(a_job())
    await other.started(started(job))
    before = bus.calls["records.get"]
    applied = await other.apply(completed(job))
    assert applied is not None
    assert applied.changed
    assert bus.calls["records.get"] == before


async def test_a_job_that_has_ended_is_remembered_until_it_is_counted() -> None:
    bus = MemoryBus()
    jobs = Jobs(bus)
    job, _ = await jobs.create(a_job())
    await jobs.apply(completed(job))
    before = bus.calls["records.get"], bus.calls["records.latest"]
    counted = await jobs.ended(job.id)
    assert counted is not None
    assert counted.status is JobStatus.COMPLETED
    assert (bus.calls["records.get"], bus.calls["records.latest"]) == before
    assert await jobs.ended(job.id) == counted  # the same event once more: now it is read
    assert (bus.calls["records.get"], bus.calls["records.latest"]) != before
    assert not jobs._written


async def test_an_event_moves_its_job_on_though_the_node_that_is_read_does_not_have_the_record_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Of a bus of several nodes one that was started anew answers before it has everything.
    bus = MemoryBus()
    job, _ = await Jobs(bus).create(a_job())
    monkeypatch.setattr(MemoryRecords, "get", AsyncMock(return_value=None))

    applied = await Jobs(bus).apply(completed(job))

    assert applied is not None
    assert (applied.changed, applied.job.status) == (True, JobStatus.COMPLETED)
    assert await Jobs(bus).apply(completed(job.model_copy(update={"id": "unknown"}))) is None


async def test_what_is_asked_of_a_job_counts_though_the_node_that_is_read_is_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bus = MemoryBus()
    job, _ = await Jobs(bus).create(a_job(i2v={"prompt": "zoom"}, review=True))
    before = await bus.records(topology.JOBS_BUCKET).get(job.id)
    await Jobs(bus).apply(completed(job))
    with monkeypatch.context() as behind:
        behind.setattr(MemoryRecords, "get", AsyncMock(return_value=before))
        approved = await Jobs(bus).approve(job.id, 0)
    assert (approved.approved, approved.stage) == (0, "i2v")

    before = await bus.records(topology.JOBS_BUCKET).get(job.id)
    await Jobs(bus).cancel(job.id)
    with monkeypatch.context() as behind:
        behind.setattr(MemoryRecords, "get", AsyncMock(return_value=before))
        again = await Jobs(bus).retry(job.id)
    assert (again.run, again.status) == (2, JobStatus.IN_PROGRESS)


async def test_only_so_many_records_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.jobs.REMEMBERED", 10)
    bus = MemoryBus()
    jobs = Jobs(bus)
    first, _ = await jobs.create(a_job("first"))
    for number in range(10):
        await jobs.create(a_job(f"j{number}"))
    before = bus.calls["records.get"]
    applied = await jobs.apply(started(first))
    assert applied is not None
    assert applied.changed
    assert bus.calls["records.get"] == before + 1


async def test_of_a_queue_that_is_longer_than_what_is_remembered_no_more_than_the_excess_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With what had ended in the way each job was gone from memory when its turn came, and was read once more."""
    monkeypatch.setattr("gateway.jobs.REMEMBERED", 10)
    bus = MemoryBus()
    jobs = Jobs(bus)
    queued = [(await jobs.create(a_job(f"j{number}")))[0] for number in range(15)]
    before = bus.calls["records.get"]
    for job in queued:
        await jobs.started(started(job))
        await jobs.apply(completed(job))
        await jobs.ended(job.id)
    assert bus.calls["records.get"] - before == 6  # five, and the one that made way for the first of them


async def test_a_rejection_is_logged_though_a_good_request_with_its_id_began_the_log() -> None:
    bus = MemoryBus()
    jobs = Jobs(bus)
    bad = pipeline.reject(None, "j1", [contracts.FieldError(field="edit", message="missing")], now())
    await bus.records(topology.JOBS_BUCKET).put("j1", bad.to_bytes(), revision=0)
    job, new = await jobs.create(a_job("j1"))  # both came at once: this one lost the record
    assert (job.status, new) == (JobStatus.REJECTED, False)
    await jobs.enter(job, job.tenant)
    assert log_of(bus, "j1") == ["accepted", "rejected"]
    assert tasks(bus) == []


async def test_a_rejection_that_comes_again_when_the_bus_has_forgotten_it_is_told_once() -> None:
    bus = MemoryBus()
    jobs = Jobs(bus)
    bad = pipeline.reject(None, "j1", [contracts.FieldError(field="edit", message="missing")], now())
    await jobs.create(bad)
    bus.forget_ids(topology.EVENTS)
    await jobs.enter(bad, bad.tenant)
    assert log_of(bus, "j1") == ["rejected"]


@pytest.mark.parametrize("lost", [True, False])
async def test_a_creation_that_was_interrupted_is_made_good_by_the_next(lost: bool) -> None:
    bus = MemoryBus()
    jobs = Jobs(bus)
    bus.fail_next("records.put", after=lost)
    with pytest.raises(bus.OUTAGE):
        await jobs.create(a_job())
    job, new = await Jobs(bus).create(a_job())
    assert (job.status, new) == (JobStatus.QUEUED, not lost)
    assert log_of(bus, "j1") == ["accepted"]
    assert len(tasks(bus)) == len(bus.messages(topology.HISTORY)) == 1


@pytest.mark.parametrize("aged", [False, True])
async def test_the_end_of_a_job_is_told_once_though_its_request_comes_again_when_the_bus_has_forgotten_it(
    aged: bool,
) -> None:
    bus = MemoryBus()
    gateway = await Gateway.open(bus)
    job = await gateway.submit("j1")
    ended = completed(job).model_copy(update={"at": now() - timedelta(hours=2)})
    await gateway.tell(ended)
    told = ["accepted", "stage_completed", "completed"]
    assert log_of(bus, "j1") == told
    bus.forget_ids(topology.EVENTS)
    if aged:
        await bus.purge(topology.EVENTS, topology.subject_of_events("j1"))

    again = await gateway.client.post("/v1/jobs", json={"references": [KEY], "edit": EDIT, "job_id": "j1"})
    assert (again.status_code, again.json()["status"]) == (200, "completed")
    await gateway.parts.jobs.apply(ended)  # as whoever takes it does whose gateway died before it was acknowledged

    assert log_of(bus, "j1") == ([] if aged else told)


async def test_an_end_that_is_owed_for_long_is_told() -> None:
    bus = MemoryBus()
    gateway = await Gateway.open(bus)
    job = await gateway.submit("j1")
    ended = completed(job).model_copy(update={"at": now() - timedelta(hours=2)})
    bus.fail_next("publish")
    with pytest.raises(errors.BusError):
        await gateway.parts.jobs.apply(ended)
    assert log_of(bus, "j1") == ["accepted"]

    await gateway.parts.jobs.apply(ended)

    assert log_of(bus, "j1") == ["accepted", "completed"]


async def test_an_end_that_is_owed_for_long_is_not_taken_for_that_of_a_run_before() -> None:
    bus = MemoryBus()
    gateway = await Gateway.open(bus)
    job = await gateway.submit("j1")
    await gateway.tell(failed(job))
    again = await gateway.parts.jobs.retry("j1")
    ended = failed(again).model_copy(update={"at": now() - timedelta(hours=2)})
    bus.fail_next("publish")
    with pytest.raises(errors.BusError):
        await gateway.parts.jobs.apply(ended)

    await gateway.parts.jobs.apply(ended)

    assert log_of(bus, "j1") == ["accepted", "stage_failed", "failed", "retry_requested", "failed"]


async def test_who_runs_a_job_hears_of_its_cancel_when_its_log_tells() -> None:
    bus = MemoryBus()
    jobs = Jobs(bus)
    await jobs.create(a_job())
    feed = await bus.listen(topology.subject_of_control("j1"))

    async def heard() -> list[str]:
        assert await feed.next(BOUND) is not None
        return log_of(bus, "j1")

    hearing = asyncio.create_task(heard())
    await jobs.cancel("j1")

    assert (await hearing)[:2] == ["accepted", "cancel_requested"]
    await feed.close()


@pytest.mark.parametrize("waiting", [0, 8])
async def test_a_retry_is_queued_though_the_task_of_the_run_before_was_never_withdrawn(waiting: int) -> None:
    # Found by random orders: a gateway that died behind the record of a cancel left the old task in the queue, and it
    # was taken for the new one; then it was dropped as overtaken, and the job waited for ever.
    bus = MemoryBus()
    await tenants.change(bus.records(topology.TENANTS_BUCKET), "acme", {})
    share = FairShare(bus, tenants.Tenants(bus), waiting)
    jobs = Jobs(bus, share)
    job, _ = await jobs.create(a_job())
    await settle(share, job)
    [first] = tasks(bus)
    bus.fail_next("last")
    with pytest.raises(errors.BusError):
        await jobs.cancel(job.id)
    assert tasks(bus) == [first]

    await jobs.retry(job.id)
    await settle(share, job)

    assert [contracts.Task.model_validate_json(stored.body).run for stored in tasks(bus)] == [2]
    assert bus.messages(topology.HELD) == []


async def settle(share: FairShare, job: Job) -> None:
    """Move up what is held of a job's tenant."""
    await share.fill(Place("edit", "interactive", job.tenant))


async def test_a_cancel_withdraws_a_task_that_the_version_before_queued() -> None:
    bus = MemoryBus()
    jobs = Jobs(bus)
    await jobs.create(a_job())
    [task] = tasks(bus)
    await bus.delete(topology.TASKS, task.seq)
    older = topology.subject_of_older_task("edit", "interactive", "j1")
    await bus.publish(older, task.body, message_id="older")

    await jobs.cancel("j1")

    assert not tasks(bus)


async def test_a_cancel_that_comes_before_the_log_has_begun_begins_it() -> None:
    # Found by random orders: the record was written, the log was not, and the cancel became the first thing in it.
    bus = MemoryBus()
    jobs, job = Jobs(bus), a_job()
    bus.fail_next("publish")
    with pytest.raises(errors.BusError):
        await jobs.create(job)
    assert await jobs.find(job.id)
    assert log_of(bus, job.id) == []

    await jobs.cancel(job.id)
    assert log_of(bus, job.id) == ["accepted", "cancel_requested", "cancelled"]


async def test_a_task_tells_where_the_log_stood_when_it_was_queued() -> None:
    bus = MemoryBus()
    gateway = await Gateway.open(bus)
    job = await gateway.submit(i2v={"prompt": "zoom"})
    begun = bus.messages(topology.EVENTS)[-1].seq
    assert tasks(bus)[-1].headers[topology.HEADER_LOG_SEQ] == str(begun)
    event = completed(job)
    seq = await bus.publish(topology.subject_of_events(job.id), event.to_bytes(), message_id="done")
    await gateway.parts.jobs.apply(event, seq)
    assert tasks(bus)[-1].headers[topology.HEADER_LOG_SEQ] == str(seq)


async def test_a_task_that_is_queued_again_after_a_try_tells_nothing() -> None:
    bus = MemoryBus()
    gateway = await Gateway.open(bus)
    job = await gateway.submit()
    await gateway.tell(started(job))
    await bus.purge(topology.TASKS, tasks(bus)[0].subject)
    bus.forget_ids(topology.TASKS)
    released = contracts.StageReleased(
        job_id=job.id, run=1, at=now() + timedelta(seconds=1), stage="edit", attempt=1, tries=0, worker="w1"
    )
    await gateway.parts.jobs.apply(released, 99)
    assert topology.HEADER_LOG_SEQ not in tasks(bus)[-1].headers


@settings(max_examples=50)
@given(st.lists(st.booleans(), max_size=9), st.integers(1, 4), st.integers(1, 6))
@example([True, True, False, False, True], 2, 6)  # a page that is full in the middle of the last look
def test_the_pages_of_a_filtered_list_have_each_job_once_and_each_looks_at_so_many(
    cancelled: list[bool], limit: int, looks: int
) -> None:
    async def run() -> None:
        jobs, found, cursor = Jobs(MemoryBus()), list[str](), None
        for number, ends in enumerate(cancelled):
            await jobs.create(a_job(f"j{number}"))
            if ends:
                await jobs.cancel(f"j{number}")
        while True:
            page = await jobs.list(JobStatus.CANCELLED, cursor, limit)
            assert len(page.jobs) <= limit
            assert page.looked_at <= looks + limit
            found += [job.id for job in page.jobs]
            if (cursor := page.next_cursor) is None:
                break
        assert found == [f"j{number}" for number, ends in reversed(list(enumerate(cancelled))) if ends]

    with mock.patch("gateway.jobs.SCAN_LIMIT", looks):
        asyncio.run(run())
