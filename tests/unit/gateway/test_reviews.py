"""Several people look at one job's candidates: the first who approves one is who is told so, and is in its log."""

from __future__ import annotations

import asyncio
import json

import pytest
from tests.gateways import EDIT, Gateway, completed

from gateway.jobs import Jobs, NotPossibleError, parse_event
from vidgen import contracts, errors, topology
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
