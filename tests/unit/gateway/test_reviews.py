"""Several people look at one job's candidates: the first who approves one is who is told so, and is in its log.

Who follows a job may ask something of it as soon as its log tells that it may be asked.
"""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from tests.gateways import BOUND, EDIT, Gateway, completed, failed, now

from gateway.jobs import Jobs, NotPossibleError, parse_event
from vidgen import contracts, errors, tenants, topology
from vidgen.contracts import Job
from vidgen.testing import MemoryBus


async def waiting() -> tuple[Gateway, Job]:
    """A gateway with a job that waits for a review."""
    gateway = await Gateway.open()
    job = await gateway.submit(edit=EDIT | {"candidates": 2}, i2v={"prompt": "zoom"}, review=True)
    await gateway.tell(completed(job, names=("edit-0.png", "edit-1.png")))
    return gateway, job


async def approvals(bus: MemoryBus, job: Job) -> list[int]:
    """The candidates that the log names."""
    events = [parse_event(one.body) for one in bus.messages(topology.EVENTS, topology.subject_of_events(job.id))]
    return [event.candidate for event in events if isinstance(event, contracts.Approved)]


async def chosen(bus: MemoryBus, job: Job) -> tuple[int | None, str]:
    """The candidate that the record names, and the input of the video's task."""
    record = await Jobs(bus).get(job.id)
    (task,) = [json.loads(one.body) for one in bus.messages(topology.TASKS) if ".i2v." in one.subject]
    return record.approved, task["inputs"][0].rsplit("/", 1)[-1]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_of_two_who_approve_at_once_by_two_gateways_the_first_wins(order: tuple[int, int]) -> None:
    """The log kept the first, for both had one message id; the record took whichever came to it first."""
    gateway, job = await waiting()
    bus = gateway.parts.bus
    assert isinstance(bus, MemoryBus)
    both = [Jobs(bus), Jobs(bus)]
    found = await asyncio.gather(
        *(jobs.approve(job.id, candidate) for jobs, candidate in zip(both, order, strict=True)), return_exceptions=True
    )
    (logged,) = await approvals(bus, job)
    assert await chosen(bus, job) == (logged, f"edit-{logged}.png")
    for answer, candidate in zip(found, order, strict=True):
        if candidate == logged:
            assert isinstance(answer, Job)
            assert answer.approved == logged
        else:
            assert isinstance(answer, NotPossibleError)


class Dying(Jobs):
    """A gateway that is gone once it has told the log."""

    async def apply(self, *_: object) -> None:
        raise errors.BusError("gone")


async def test_what_a_gateway_logged_before_it_died_holds_against_who_comes_next() -> None:
    gateway, job = await waiting()
    bus = gateway.parts.bus
    assert isinstance(bus, MemoryBus)
    with pytest.raises(errors.BusError):
        await Dying(bus).approve(job.id, 1)
    refused = await gateway.client.post(f"/v1/jobs/{job.id}/approve", json={"candidate": 0})
    assert (refused.status_code, refused.json()["code"]) == (409, "not_possible")
    assert "candidate 1" in refused.json()["detail"]
    assert await approvals(bus, job) == [1]
    assert await chosen(bus, job) == (1, "edit-1.png")
    again = await gateway.client.post(f"/v1/jobs/{job.id}/approve", json={"candidate": 1})
    assert (again.status_code, again.json()["approved"]) == (200, 1)


async def test_the_same_candidate_twice_at_once_is_one_answer() -> None:
    gateway, job = await waiting()
    both = await asyncio.gather(*(Jobs(gateway.parts.bus).approve(job.id, 1) for _ in range(2)))
    assert [answer.approved for answer in both] == [1, 1]


async def test_who_approves_what_is_cancelled_meanwhile_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway, job = await waiting()
    jobs = Jobs(gateway.parts.bus)
    get = jobs.get

    async def a_moment_old(job_id: str) -> Job:
        found = await get(job_id)
        await gateway.parts.jobs.cancel(job_id)
        return found

    monkeypatch.setattr(jobs, "get", a_moment_old)
    with pytest.raises(NotPossibleError, match="cancelled"):
        await jobs.approve(job.id, 1)


async def log_only(gateway: Gateway, event: contracts.AnyEvent) -> int:
    """Log an event that no gateway goes through yet."""
    subject = topology.subject_of_events(event.job_id)
    return await gateway.parts.bus.publish(subject, event.to_bytes(), message_id=f"{event.run}:{event.type}")


async def looked_twice(gateway: Gateway, asking: asyncio.Task[httpx.Response]) -> None:
    """Wait until who asks has found the record behind, and looks again."""
    bus = gateway.parts.bus
    assert isinstance(bus, MemoryBus)
    before = bus.calls["records.latest"]
    async with asyncio.timeout(BOUND):
        while bus.calls["records.latest"] < before + 4:
            assert not asking.done(), asking.result().text
            await asyncio.sleep(0.01)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.jobs.BEHIND_S", BOUND)


@pytest.mark.usefixtures("patient")
async def test_who_approves_as_soon_as_the_log_tells_of_the_frame_is_heard_when_the_record_knows_of_it() -> None:
    """Who follows the job hears of its frame before a busy gateway has written its record: it got 409."""
    gateway = await Gateway.open()
    job = await gateway.submit(edit=EDIT | {"candidates": 2}, i2v={"prompt": "zoom"}, review=True)
    event = completed(job, names=("edit-0.png", "edit-1.png"))
    seq = await log_only(gateway, event)
    asking = asyncio.create_task(gateway.client.post(f"/v1/jobs/{job.id}/approve", json={"candidate": 1}))
    await looked_twice(gateway, asking)
    assert (await Jobs(gateway.parts.bus).get(job.id)).stage == "edit"  # that is for whoever consumes the log

    await Jobs(gateway.parts.bus).apply(event, seq)  # another replica

    answer = await asking
    assert (answer.status_code, answer.json()["approved"]) == (200, 1)
    again = await gateway.client.post(f"/v1/jobs/{job.id}/approve", json={"candidate": 1})
    other = await gateway.client.post(f"/v1/jobs/{job.id}/approve", json={"candidate": 0})
    assert [(one.status_code, one.json().get("code")) for one in (again, other)] == [(200, None), (409, "not_possible")]


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("end", ["failed", "cancelled"])
async def test_who_retries_as_soon_as_the_log_tells_of_the_end_is_heard_when_the_record_knows_of_it(end: str) -> None:
    gateway = await Gateway.open()
    job = await gateway.submit()
    cancel = contracts.CancelRequested(job_id=job.id, run=1, at=now())
    event = failed(job) if end == "failed" else cancel
    await log_only(gateway, event)
    asking = asyncio.create_task(gateway.client.post(f"/v1/jobs/{job.id}/retry"))
    await looked_twice(gateway, asking)

    await Jobs(gateway.parts.bus).apply(event)

    answer = await asking
    assert (answer.status_code, answer.json()["run"]) == (200, 2)


@pytest.mark.usefixtures("patient")
async def test_who_waits_for_the_record_is_told_what_became_of_the_job_meanwhile() -> None:
    gateway = await Gateway.open()
    job = await gateway.submit(i2v={"prompt": "zoom"}, review=True)
    event = completed(job)
    await log_only(gateway, event)
    asking = asyncio.create_task(gateway.client.post(f"/v1/jobs/{job.id}/approve", json={}))
    await looked_twice(gateway, asking)

    await Jobs(gateway.parts.bus).cancel(job.id)

    answer = await asking
    assert (answer.status_code, answer.json()["code"]) == (409, "not_possible")
    assert "is cancelled" in answer.json()["detail"]


@pytest.mark.usefixtures("patient")
async def test_who_waited_for_the_record_needs_room_like_everybody() -> None:
    gateway = await Gateway.open()
    await tenants.change(gateway.parts.bus.records(topology.TENANTS_BUCKET), contracts.DEFAULT_TENANT, {"jobs": 1})
    job = await gateway.submit(i2v={"prompt": "zoom"}, review=True)
    for place in topology.tasks_of(job.tenant):
        await gateway.parts.bus.purge(*place)  # as its worker does behind the event
    event = completed(job)
    await log_only(gateway, event)
    await gateway.submit()
    asking = asyncio.create_task(gateway.client.post(f"/v1/jobs/{job.id}/approve", json={}))
    await looked_twice(gateway, asking)

    await Jobs(gateway.parts.bus).apply(event)

    answer = await asking
    assert (answer.status_code, answer.json()["code"]) == (429, "too_many_jobs")


async def test_a_record_that_stays_behind_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.jobs.BEHIND_S", 0.0)
    gateway = await Gateway.open()
    job = await gateway.submit(i2v={"prompt": "zoom"}, review=True)
    early = await gateway.client.post(f"/v1/jobs/{job.id}/approve", json={})
    assert (early.status_code, early.json()["code"]) == (409, "not_possible")
    await log_only(gateway, completed(job))
    late = await gateway.client.post(f"/v1/jobs/{job.id}/approve", json={})
    assert (late.status_code, late.json()["code"]) == (409, "record_behind")
    bus = gateway.parts.bus
    assert isinstance(bus, MemoryBus)
    assert await approvals(bus, job) == []
