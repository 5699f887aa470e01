"""Gateways as processes, on a real bus and a real store: one dies and another goes on, and each leaves when told to."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import resource
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from tests.servers import connected_bus, running_gateways

from gateway import main
from vidgen import contracts, errors, topology
from vidgen.artifacts import artifact_key
from vidgen.client import AsyncClient, GatewayError
from vidgen.contracts import EditParams, I2VParams, Job, JobStatus, StageState
from vidgen.jetstream import JetStreamBus
from vidgen.local import NatsServer, S3Server
from vidgen.local.stack import Service
from vidgen.settings import GatewaySettings

BOUND_S = 180.0
ACK_WAIT_S = 2.0  # what a killed gateway held comes back soon


@pytest.fixture
async def gateway(nats_server: NatsServer, s3_server: S3Server, tmp_path: Path) -> AsyncIterator[Service]:
    async with running_gateways(1, nats_server, s3_server, tmp_path, VIDGEN_ACK_WAIT=str(ACK_WAIT_S)) as [only]:
        yield only


@pytest.fixture
async def gateways(nats_server: NatsServer, s3_server: S3Server, tmp_path: Path) -> AsyncIterator[list[Service]]:
    """Two replicas on one bus."""
    async with running_gateways(2, nats_server, s3_server, tmp_path, VIDGEN_ACK_WAIT=str(ACK_WAIT_S)) as replicas:
        yield replicas


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[JetStreamBus]:
    async with connected_bus(nats_server, topology.Topology(ack_wait=ACK_WAIT_S)) as connected:
        yield connected


def photo() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 48), "teal").save(out, "PNG")
    return out.getvalue()


async def tell(bus: JetStreamBus, job: Job, stage: contracts.Stage, *names: str) -> None:
    """Say what a worker would: begun, done, these are the files."""
    said: dict[str, Any] = {
        "job_id": job.id, "run": job.run, "at": job.created_at, "stage": stage, "attempt": 1, "tries": 1,
        "worker": "by-hand", "engine": "preview", "model": "none",
    }  # fmt: skip
    artifacts = tuple(
        contracts.Artifact(
            name=name, key=artifact_key(job.id, name), content_type="image/png", size=3, sha256="ab" * 32
        )
        for name in names
    )
    for event in (
        contracts.StageStarted(**said), contracts.StageCompleted(**said, seed=1, artifacts=artifacts)
    ):  # fmt: skip
        subject = topology.subject_of_events(job.id)
        await bus.publish(subject, event.to_bytes(), message_id=f"{job.id}:{stage}:{event.type}")


async def taken(bus: JetStreamBus, stage: contracts.Stage) -> contracts.Task:
    """The next task of a stage, taken from its queue."""
    async with asyncio.timeout(BOUND_S):
        while True:
            delivery = await bus.pull(topology.consumer_of(stage, "interactive"), 1.0)
            if delivery is not None:
                await delivery.ack()
                return contracts.Task.model_validate_json(delivery.body)


async def test_of_two_who_approve_at_once_by_two_gateways_the_first_in_the_log_is_who_chose(
    gateways: list[Service], bus: JetStreamBus
) -> None:
    first, second = gateways
    async with AsyncClient(first.url) as one, AsyncClient(second.url) as other:
        for turn in range(5):
            wanted = {"edit": EditParams(prompt="x", candidates=2), "i2v": I2VParams(prompt="zoom"), "review": True}
            job = await one.submit(images=[photo()], **wanted)
            await taken(bus, "edit")
            await tell(bus, job, "edit", "edit-0.png", "edit-1.png")
            async with asyncio.timeout(BOUND_S):
                while (await one.get(job.id)).status is not JobStatus.AWAITING_REVIEW:
                    await asyncio.sleep(0.05)
            askers = (one, other) if turn % 2 else (other, one)
            found = await asyncio.gather(
                *(client.approve(job.id, candidate) for candidate, client in enumerate(askers)), return_exceptions=True
            )
            told = [await bus.last(topology.EVENTS, topology.subject_of_events(job.id))]
            logged = [contracts.Event.validate_json(stored.body) for stored in told if stored is not None]
            chosen = [event.candidate for event in logged if isinstance(event, contracts.Approved)]
            assert chosen == [(await one.get(job.id)).approved]
            assert (await taken(bus, "i2v")).inputs == (artifact_key(job.id, f"edit-{chosen[0]}.png"),)
            (refused,) = [answer for answer in found if isinstance(answer, GatewayError)]
            assert refused.status == 409
            assert isinstance(found[chosen[0]], Job)


async def test_a_gateway_is_killed_in_the_middle_of_a_job_and_another_goes_on(
    gateways: list[Service], bus: JetStreamBus
) -> None:
    first, second = gateways
    async with AsyncClient(first.url) as client:
        job = await client.submit(images=[photo()], edit=EditParams(prompt="x"), i2v=I2VParams(prompt="zoom"))
    assert (await taken(bus, "edit")).job_id == job.id
    await tell(bus, job, "edit", "edit-0.png")

    first.process.signal(signal.SIGKILL)

    async with AsyncClient(second.url) as client:
        assert (await client.get(job.id)).id == job.id
        assert [one.id for one in (await client.list()).jobs] == [job.id]
        task = await taken(bus, "i2v")
        assert task.inputs == (artifact_key(job.id, "edit-0.png"),)
        await tell(bus, job, "i2v", "video.mp4")
        async with asyncio.timeout(BOUND_S):
            updates = [update async for update in client.watch(job.id)]

    told = [update.type for update in updates if isinstance(update, contracts.JobEvent)]
    assert told == ["accepted", *["stage_started", "stage_completed"] * 2, "completed"]
    last = updates[-1]
    assert isinstance(last, Job)
    assert last.status is JobStatus.COMPLETED
    assert [record.state for record in last.stages] == [StageState.COMPLETED] * 2
    assert [artifact.name for artifact in last.artifacts] == ["edit-0.png", "video.mp4"]


async def test_a_begun_task_gets_new_deliveries_where_it_had_all_of_them(gateway: Service, bus: JetStreamBus) -> None:
    queue = topology.consumer_of("edit", "interactive")
    async with AsyncClient(gateway.url) as client:
        job = await client.submit(images=[photo()], edit=EditParams(prompt="x"))
        begun = contracts.StageStarted(
            job_id=job.id, run=1, at=job.created_at, stage="edit", attempt=1, tries=1, worker="by-hand",
            engine="preview", model="none",
        )  # fmt: skip
        await bus.publish(topology.subject_of_events(job.id), begun.to_bytes(), message_id="begun")
        seqs: set[int] = set()
        async with asyncio.timeout(BOUND_S):
            while len(seqs) < 2:
                delivery = await bus.pull(queue, 1.0)
                if delivery is not None:
                    seqs.add(delivery.seq)
                    await delivery.nak()

        assert (await client.get(job.id)).status is JobStatus.IN_PROGRESS
        assert (await taken(bus, "edit")).job_id == job.id
        assert await bus.get(topology.TASKS, min(seqs)) is None
        async with asyncio.timeout(BOUND_S):  # what moved up is forgotten a moment after it was queued
            while await bus.tail(topology.HELD, None, 9):
                await asyncio.sleep(0.05)
        assert (await client.dead_list()).dead == ()


async def test_a_running_job_is_shown_and_cancelled_behind_a_restart_of_the_bus(
    gateway: Service, bus: JetStreamBus, nats_server: NatsServer
) -> None:
    async with AsyncClient(gateway.url) as client:
        job = await client.submit(images=[photo()], edit=EditParams(prompt="x"), i2v=I2VParams(prompt="zoom"))
        await tell(bus, job, "edit", "edit-0.png")
        async with asyncio.timeout(BOUND_S):
            while (await client.get(job.id)).status is not JobStatus.IN_PROGRESS:
                await asyncio.sleep(0.05)
        await nats_server.kill()
        await nats_server.start()
        async with asyncio.timeout(BOUND_S):
            while True:
                try:
                    assert (await client.get(job.id)).status is JobStatus.IN_PROGRESS
                    assert await client.workers() is not None
                    assert (await client.cancel(job.id)).status is JobStatus.CANCELLED
                    break
                except GatewayError:  # 503, until the gateway is connected again
                    await asyncio.sleep(0.1)


async def test_a_job_goes_through_where_one_gateway_answers_and_another_moves_it_on(
    nats_server: NatsServer, s3_server: S3Server, tmp_path: Path, bus: JetStreamBus
) -> None:
    own = {"VIDGEN_ACK_WAIT": str(ACK_WAIT_S)}
    one, other, moving = tmp_path / "api", tmp_path / "pipeline", {"VIDGEN_GATEWAY_ROLES": "pipeline"}
    async with (
        running_gateways(1, nats_server, s3_server, one, VIDGEN_GATEWAY_ROLES="api", **own) as [api],
        AsyncClient(api.url) as client,
    ):
        job = await client.submit(images=[photo()], edit=EditParams(prompt="x"), i2v=I2VParams(prompt="zoom"))
        assert (await taken(bus, "edit")).job_id == job.id
        asked = {"job_id": "by-the-bus", "references": list(job.inputs), "edit": {"prompt": "x"}}
        await bus.publish(topology.SUBJECT_REQUESTS, json.dumps(asked).encode(), message_id="by-the-bus")
        assert (await taken(bus, "edit")).job_id == "by-the-bus"
        await tell(bus, job, "edit", "edit-0.png")
        events = topology.Consumer(topology.EVENTS, topology.GATEWAY)
        assert (await bus.depth(events)).ack_pending == 0  # the one that answers takes no events
        async with running_gateways(1, nats_server, s3_server, other, **moving, **own) as [moves]:
            assert (await taken(bus, "i2v")).job_id == job.id
            await tell(bus, job, "i2v", "video.mp4")
            async with asyncio.timeout(BOUND_S):
                updates = [update async for update in client.watch(job.id)]
            assert isinstance(updates[-1], Job)
            assert updates[-1].status is JobStatus.COMPLETED
            assert (await client.get(job.id)).status is JobStatus.COMPLETED
            moves.process.signal(signal.SIGTERM)
            assert await moves.process.wait(BOUND_S) == 0


async def test_a_gateway_may_have_as_many_connections_as_the_machine_lets_it(
    nats_server: NatsServer, s3_server: S3Server, tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))  # as a shell has it
    try:
        async with running_gateways(1, nats_server, s3_server, tmp_path) as [only]:
            limits = Path(f"/proc/{only.process.pid}/limits").read_text()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    [files] = [line.split() for line in limits.splitlines() if line.startswith("Max open files")]
    assert int(files[3]) == min(hard, main.OPEN_FILES)


async def test_sigterm_ends_the_streams_and_leaves_with_zero(gateways: list[Service]) -> None:
    first, second = gateways
    async with httpx.AsyncClient(base_url=first.url, timeout=BOUND_S) as http, AsyncClient(second.url) as other:
        job = await other.submit(images=[photo()], edit=EditParams(prompt="x"))
        async with http.stream("GET", f"/v1/jobs/{job.id}/events") as answer:
            lines = answer.aiter_lines()
            async for line in lines:
                if line == "event: accepted":
                    break
            first.process.signal(signal.SIGTERM)
            assert "event: job" not in [line async for line in lines]  # it ended, the job did not
        assert await first.process.wait(BOUND_S) == 0
        await other.ready()


async def test_a_request_from_the_bus_is_answered_for_over_http(gateway: Service, bus: JetStreamBus) -> None:
    await bus.publish(topology.SUBJECT_REQUESTS, b"\xff not json", message_id="bad")
    await bus.publish(
        topology.SUBJECT_REQUESTS, json.dumps({"job_id": "mine", "references": ["x/y"]}).encode(), message_id="bad2"
    )
    feed = await bus.follow(topology.EVENTS, "vidgen.events.*")
    seen: set[str] = set()
    async with asyncio.timeout(BOUND_S):
        while len(seen) < 2:
            message = await feed.next(5)
            if message is not None:
                seen.add(contracts.Rejected.model_validate_json(message.body).job_id)
    await feed.close()

    async with AsyncClient(gateway.url) as client:
        async with asyncio.timeout(BOUND_S):
            # The list and the dead letters are written behind the event.
            while len(rejected := (await client.list(status="rejected")).jobs) < 2:
                await asyncio.sleep(0.05)
            while len(letters := (await client.dead_list()).dead) < 2:
                await asyncio.sleep(0.05)
        assert {job.id for job in rejected} == seen
        assert "mine" in seen
        assert {letter.job_id for letter in letters} == seen


async def test_a_body_that_is_too_large_is_refused_and_the_client_gets_to_read_why(gateway: Service) -> None:
    async with httpx.AsyncClient(base_url=gateway.url, timeout=BOUND_S) as http:
        files = {"image": b"\0" * (50 << 20), "request": b"{}"}
        answer = await http.post("/v1/jobs", files=files)
        assert answer.status_code == 413
        assert answer.json()["errors"][0]["field"] == "image.0"
        assert (await http.get("/healthz")).status_code == 200

    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 52428800\r\n"
        b"Expect: 100-continue\r\n\r\n"
    )
    async with asyncio.timeout(BOUND_S):
        assert b"413" in await reader.readline()  # and no byte of the body was sent
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def test_without_a_bus_the_gateway_gives_up_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "START_PATIENCE_S", 0.1)
    own = GatewaySettings(nats_url="nats://127.0.0.1:1")
    with pytest.raises(errors.FatalError, match="the bus was not there"):
        await main._Gateway(own).run()


async def test_without_a_store_the_gateway_gives_up_and_says_what_is_missing(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "START_PATIENCE_S", 0.1)
    own = GatewaySettings(
        nats_url=nats_server.url, s3_endpoint="http://127.0.0.1:1", s3_access_key="a", s3_secret_key="b"
    )
    with pytest.raises(errors.FatalError, match="the object store was not there"):
        await main._Gateway(own).run()


async def test_consumers_that_die_take_the_gateway_with_them(
    nats_server: NatsServer, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die(*_: object) -> None:
        raise RuntimeError("no more")

    monkeypatch.setattr(main.Consumers, "run", die)
    own = GatewaySettings(
        nats_url=nats_server.url, s3_endpoint=s3_server.endpoint, s3_access_key=s3_server.access_key,
        s3_secret_key=s3_server.secret_key, s3_bucket=s3_server.bucket, http_port=0,
    )  # fmt: skip
    with pytest.raises(errors.FatalError, match="the consumers died"):
        await main._Gateway(own).run()
