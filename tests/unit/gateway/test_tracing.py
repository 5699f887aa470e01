"""A job's trace through the gateway: where it begins, and that whatever moves the job on later stays in it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from opentelemetry.trace import StatusCode
from tests.gateways import BOUND, EDIT, KEY, Gateway, completed, failed, started
from tests.spans import Traced, id_of, parent_of, said, trace_of, traced, traceparent

from gateway.consumers import Consumers
from gateway.deadlines import Deadlines
from vidgen import contracts, topology, tracing
from vidgen.contracts import Job, JobStatus

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
I2V = {"prompt": "slow zoom in"}


@pytest.fixture
def seen() -> Iterator[Traced]:
    with traced() as found:
        yield found


@pytest.fixture
async def gateway(seen: Traced) -> AsyncIterator[Gateway]:
    """A gateway whose consumers run."""
    opened = await Gateway.open()
    parts, stop = opened.parts, asyncio.Event()
    running = asyncio.create_task(
        Consumers(parts.bus, parts.jobs, parts.intake, parts.metrics, concurrency=2).run(stop)
    )
    yield opened
    stop.set()
    async with asyncio.timeout(BOUND):
        await running


async def until(gateway: Gateway, job_id: str, *statuses: JobStatus) -> Job:
    """The job, once it has come that far and the gateway has nothing left to do."""
    bus: Any = gateway.parts.bus
    consumers = [consumer for consumer in topology.CONSUMERS if consumer.name == topology.GATEWAY]
    async with asyncio.timeout(BOUND):
        while True:
            job = await gateway.parts.jobs.find(job_id)
            idle = not sum([(await bus.depth(consumer)).waiting for consumer in consumers])
            if idle and job is not None and job.status in statuses:
                return job
            await bus.change(bus.clock.time() + 0.1)


async def work(gateway: Gateway, job: Job, event: contracts.AnyStageEvent, *statuses: JobStatus) -> Job:
    """What a worker says in the span of its task; the job after that."""
    task = await gateway.parts.bus.last(topology.TASKS, topology.subject_of_task(event.stage, "interactive", job.id))
    assert task is not None
    with tracing.span(event.stage, of=task.headers, job_id=job.id):
        await gateway.parts.bus.publish(
            topology.subject_of_events(job.id), event.to_bytes(), message_id=f"{job.id}:{event.stage}:{event.type}"
        )
    await gateway.parts.bus.delete(topology.TASKS, task.seq)
    return await until(gateway, job.id, *statuses)


async def sent(gateway: Gateway, stage: contracts.Stage, job: Job) -> str:
    """The context that a stage's task carries."""
    task = await gateway.parts.bus.last(topology.TASKS, topology.subject_of_task(stage, "interactive", job.id))
    assert task is not None
    return task.headers["traceparent"]


async def test_one_trace_leads_from_the_request_by_http_to_the_end(gateway: Gateway, seen: Traced) -> None:
    answer = await gateway.client.post(
        "/v1/jobs", json={"references": [KEY], "edit": EDIT, "i2v": I2V}, headers=HEADERS
    )
    job = await until(gateway, answer.json()["id"], JobStatus.QUEUED)
    asked, taken = seen.one("POST /v1/jobs"), seen.one("request")
    assert (trace_of(asked), parent_of(asked), parent_of(taken)) == (TRACE, PARENT, id_of(asked))
    assert parent_of(seen.one("intake")) == id_of(asked)
    assert said(asked) == {
        "job_id": job.id, "http.request.method": "POST", "http.route": "/v1/jobs", "http.response.status_code": 202,
    }  # fmt: skip
    assert await sent(gateway, "edit", job) == traceparent(asked)

    job = await work(gateway, job, completed(job), JobStatus.IN_PROGRESS)

    decided = seen.one("decide stage_completed")
    assert parent_of(decided) == id_of(seen.one("edit"))
    assert await sent(gateway, "i2v", job) == traceparent(decided)

    done = completed(job, "i2v", names=["video.mp4"], content_type="video/mp4")
    await work(gateway, job, done, JobStatus.COMPLETED)

    assert {trace_of(span) for span in seen.spans()} == {TRACE}
    assert {said(span)["job_id"] for span in seen.spans()} == {job.id}


async def test_a_message_that_carries_a_trace_goes_on_in_it(gateway: Gateway, seen: Traced) -> None:
    body = json.dumps({"job_id": "j1", "references": [KEY], "edit": EDIT}).encode()
    await gateway.parts.bus.publish(topology.SUBJECT_REQUESTS, body, message_id="a", headers=HEADERS)

    job = await until(gateway, "j1", JobStatus.QUEUED)

    request = seen.one("request")
    assert (trace_of(request), parent_of(request), said(request)["job_id"]) == (TRACE, PARENT, "j1")
    assert await sent(gateway, "edit", job) == traceparent(request)


async def test_a_message_without_one_begins_a_trace(gateway: Gateway, seen: Traced) -> None:
    body = json.dumps({"job_id": "j1", "references": [KEY], "edit": EDIT}).encode()
    await gateway.parts.bus.publish(topology.SUBJECT_REQUESTS, body, message_id="a")

    job = await until(gateway, "j1", JobStatus.QUEUED)

    request = seen.one("request")
    assert request.parent is None
    assert await sent(gateway, "edit", job) == traceparent(request)


async def test_a_request_that_is_turned_away_says_so_by_its_code_alone(gateway: Gateway, seen: Traced) -> None:
    body = json.dumps({"job_id": "j1", "references": ["jobs/of-another/secret.png"], "edit": EDIT}).encode()
    await gateway.parts.bus.publish(topology.SUBJECT_REQUESTS, body, message_id="a", headers=HEADERS)

    await until(gateway, "j1", JobStatus.REJECTED)

    request = seen.one("request")
    assert (said(request)["error.type"], said(request)["job_id"]) == ("invalid_request", "j1")
    assert "secret" not in "".join(span.to_json() for span in seen.spans())


async def test_another_replica_goes_on_in_the_trace(gateway: Gateway, seen: Traced) -> None:
    """What carries a trace is the message: the replica that decides is not the one that let the request in."""
    bus: Any = gateway.parts.bus
    first = await Gateway.open(bus, gateway.parts.store)  # its consumers do not run
    job = await first.submit()

    await work(gateway, job, started(job), JobStatus.IN_PROGRESS)

    assert parent_of(seen.one("decide stage_started")) == id_of(seen.one("edit"))
    assert {trace_of(span) for span in seen.spans()} == {trace_of(seen.one("POST /v1/jobs"))}


@pytest.mark.parametrize("action", ["retry", "cancel"])
async def test_what_is_asked_of_a_job_later_happens_in_its_own_trace(
    action: str, gateway: Gateway, seen: Traced
) -> None:
    job = await gateway.submit()
    await until(gateway, job.id, JobStatus.QUEUED)
    if action == "retry":
        await work(gateway, job, failed(job), JobStatus.FAILED)

    assert (await gateway.client.post(f"/v1/jobs/{job.id}/{action}", headers=HEADERS)).status_code == 200
    await until(gateway, job.id, JobStatus.QUEUED if action == "retry" else JobStatus.CANCELLED)

    asked, done = seen.one(f"POST /v1/jobs/{{job_id}}/{action}"), seen.one(f"{action}_requested")
    assert (trace_of(asked), said(asked)["job_id"]) == (TRACE, job.id)
    assert trace_of(done) == trace_of(seen.one("POST /v1/jobs"))
    [link] = done.links
    assert link.context == asked.context
    if action == "retry":
        assert await sent(gateway, "edit", job) == traceparent(done)
        assert said(done)["run"] == 2


async def test_an_approval_lets_the_video_go_on_in_the_trace_of_the_edit(gateway: Gateway, seen: Traced) -> None:
    job = await gateway.submit(i2v=I2V, review=True)
    await until(gateway, job.id, JobStatus.QUEUED)
    await work(gateway, job, completed(job), JobStatus.AWAITING_REVIEW)

    assert (await gateway.client.post(f"/v1/jobs/{job.id}/approve", json={})).status_code == 200

    assert await sent(gateway, "i2v", job) == traceparent(seen.one("approved"))
    assert trace_of(seen.one("approved")) == trace_of(seen.one("POST /v1/jobs"))


async def test_a_task_whose_deliveries_ran_out_is_given_up_in_its_trace(gateway: Gateway, seen: Traced) -> None:
    job = await gateway.submit()
    await until(gateway, job.id, JobStatus.QUEUED)
    task = await gateway.parts.bus.last(topology.TASKS, topology.subject_of_task("edit", "interactive", job.id))
    assert task is not None
    subject = f"$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.{topology.TASKS}.edit-interactive"
    await gateway.parts.bus.signal(subject, json.dumps({"stream_seq": task.seq}).encode())

    await until(gateway, job.id, JobStatus.FAILED)

    given_up = seen.one("give up")
    assert (given_up.status.status_code, given_up.status.description) == (StatusCode.ERROR, "deliveries_exhausted")
    assert parent_of(given_up) == id_of(seen.one("POST /v1/jobs"))
    assert parent_of(seen.one("decide stage_failed")) == id_of(given_up)


async def test_a_task_that_waited_past_its_deadline_is_given_up_in_its_trace(gateway: Gateway, seen: Traced) -> None:
    job = await gateway.submit(deadline_s=60)
    await until(gateway, job.id, JobStatus.QUEUED)
    late = datetime.now(UTC) + timedelta(seconds=90)
    await Deadlines(gateway.parts.bus, gateway.parts.jobs, lambda: late).look()

    await until(gateway, job.id, JobStatus.FAILED)

    given_up = seen.one("give up")
    assert (given_up.status.status_code, given_up.status.description) == (StatusCode.ERROR, "deadline_exceeded")
    assert trace_of(given_up) == trace_of(seen.one("POST /v1/jobs"))
    assert parent_of(seen.one("decide stage_failed")) == id_of(given_up)


async def test_who_only_looks_leaves_no_trace(gateway: Gateway, seen: Traced) -> None:
    for path in ("/v1/jobs", "/v1/jobs/none", "/v1/workers", "/metrics", "/readyz"):
        await gateway.client.get(path, headers=HEADERS)
    await gateway.client.post("/v1/uploads", json={"content_type": "image/png", "size": 9})

    assert seen.spans() == []


async def test_a_request_that_is_refused_says_with_which_status(gateway: Gateway, seen: Traced) -> None:
    await gateway.client.post("/v1/jobs", json={})
    gateway.parts.bus.down = True  # type: ignore[attr-defined]
    await gateway.client.post("/v1/jobs", json={"references": [KEY], "edit": EDIT})
    gateway.parts.bus.down = False  # type: ignore[attr-defined]

    refused, lost = seen.all("POST /v1/jobs")
    assert (said(refused)["http.response.status_code"], refused.status.status_code) == (422, StatusCode.UNSET)
    assert (said(lost)["http.response.status_code"], lost.status.description) == (503, "503")
