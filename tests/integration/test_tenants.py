"""Tenants on a real bus, with two gateways as processes: keys from the command line, and a fair share of the queue."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.access import bearer, key_for
from tests.gateways import picture, put
from tests.servers import connected_bus, running_gateways

from vidgen import contracts, topology
from vidgen.artifacts import S3Store
from vidgen.client import AsyncClient, GatewayError
from vidgen.contracts import EditParams, Task
from vidgen.jetstream import JetStreamBus
from vidgen.local import NatsServer, S3Server
from vidgen.local.stack import Service

BOUND_S = 180.0
WAITING = 2
PHOTOS = {tenant: f"uploads/{tenant}/photo.png" for tenant in ("acme", "umbrella")}


@pytest.fixture
async def gateways(nats_server: NatsServer, s3_server: S3Server, tmp_path: Path) -> AsyncIterator[list[Service]]:
    own = {"VIDGEN_AUTH": "on", "VIDGEN_TENANT_WAITING": str(WAITING), "VIDGEN_TENANT_RATE": "0"}
    async with running_gateways(2, nats_server, s3_server, tmp_path, **own) as replicas:
        yield replicas


@pytest.fixture
async def bus(nats_server: NatsServer, gateways: list[Service]) -> AsyncIterator[JetStreamBus]:
    async with connected_bus(nats_server) as connected:
        yield connected


async def vidgen(nats: NatsServer, *arguments: str) -> list[dict[str, Any]]:
    """Run the command line, as an operator does beside the bus; what it prints as JSON."""
    env = {**os.environ, "VIDGEN_NATS_URL": nats.url, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "vidgen.cli", *arguments, "--json", env=env,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode == 0, out + err
    return [json.loads(line) for line in out.splitlines()]


async def until_refused(url: str, key: str) -> str:
    """Wait until a gateway no longer takes a key; why it does not."""
    async with asyncio.timeout(BOUND_S), httpx.AsyncClient(base_url=url, headers=bearer(key), timeout=BOUND_S) as http:
        while (answer := await http.get("/v1/session")).status_code != 401:
            await asyncio.sleep(0.05)
        return str(answer.json()["code"])


async def test_a_gateway_that_others_would_reach_without_keys_ends_and_says_what_to_do() -> None:
    own = {"VIDGEN_HTTP_HOST": "0.0.0.0", "VIDGEN_HTTP_PORT": "0", "VIDGEN_AUTH": "off", "VIDGEN_LOG_FORMAT": "json"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway.main", env={**os.environ, **own, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode == 1
    assert b"vidgen keys create --admin" in out


async def test_keys_are_made_shown_once_and_ended_for_every_gateway(
    gateways: list[Service], nats_server: NatsServer, s3_store: S3Store, tmp_path: Path
) -> None:
    # Given an operator's key and one of a tenant, from the command line
    [admin] = await vidgen(nats_server, "keys", "create", "--admin", "--name", "me")
    [made] = await vidgen(nats_server, "keys", "create", "--tenant", "acme", "--expires", "90d")
    await vidgen(nats_server, "tenants", "set", "acme", "--jobs", "5", "--rate", "0")
    await put(s3_store, PHOTOS["acme"], picture())

    # Then both gateways know them, and a client sends a job, follows it and finds it again with the one key alone
    first, second = (replica.url for replica in gateways)
    async with AsyncClient(first, api_key=made["key"]) as client:
        key = await client.upload(picture())
        request = contracts.VideoRequest(references=(key,), edit=EditParams(prompt="x"))
        job = await client.submit(request)
    async with AsyncClient(second, api_key=made["key"]) as client:
        assert (await client.get(job.id)).tenant == "acme"
        await client.cancel(job.id)
        assert (await client.wait(job.id)).status == "cancelled"
        assert [one.id for one in (await client.list()).jobs] == [job.id]
        with pytest.raises(GatewayError) as caught:
            await client.dead_list()
        assert caught.value.code == "not_the_operator"
    async with AsyncClient(second, api_key=admin["key"]) as client:
        assert [one.id for one in (await client.list(tenant="acme")).jobs] == [job.id]
    with pytest.raises(GatewayError, match="send an API key"):
        async with AsyncClient(second) as client:
            await client.list()

    # And no secret is in the list, on the disk of the bus, or in a log
    listed = await vidgen(nats_server, "keys", "list")
    assert [(one["tenant"], one.get("name")) for one in listed] == [("default", "me"), ("acme", "")]
    secrets = [one["key"].split("_", 2)[2] for one in (admin, made)]
    texts = [json.dumps(listed).encode(), *(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())]
    assert any(b"vidgen_keys" in text for text in texts)
    assert not any(secret.encode() in text for secret in secrets for text in texts)

    # When one is revoked, then neither gateway takes it any more, and the other one still opens both
    await vidgen(nats_server, "keys", "revoke", made["id"])
    assert await asyncio.gather(*(until_refused(url, made["key"]) for url in (first, second))) == ["key_revoked"] * 2
    async with AsyncClient(first, api_key=admin["key"]) as client:
        assert (await client.get(job.id)).status == "cancelled"


async def test_one_job_of_a_tenant_does_not_wait_for_all_of_another_and_a_gateway_may_die_meanwhile(
    gateways: list[Service], bus: JetStreamBus, s3_store: S3Store
) -> None:
    # Given two tenants, one with many jobs, and the other with one more
    keys = {tenant: await key_for(bus, tenant) for tenant in PHOTOS}
    for key in PHOTOS.values():
        await put(s3_store, key, picture())

    async def submit(gateway: Service, tenant: str, job_id: str) -> None:
        request = contracts.VideoRequest(job_id=job_id, references=(PHOTOS[tenant],), edit=EditParams(prompt="x"))
        async with AsyncClient(gateway.url, api_key=keys[tenant]) as client:
            await client.submit(request)

    for number in range(12):
        await submit(gateways[number % 2], "acme", f"a{number:02}")
    await submit(gateways[1], "umbrella", "b")
    subject = topology.subject_of_task("edit", "interactive", "b", "umbrella")
    async with asyncio.timeout(BOUND_S):
        while await bus.last(topology.TASKS, subject) is None:
            await asyncio.sleep(0.02)

    # When a worker takes one task after the other, and one gateway dies
    order: list[Task] = []
    async with asyncio.timeout(BOUND_S):
        while len(order) < 13:
            delivery = await bus.pull(topology.consumer_of("edit", "interactive"), 1.0)
            if delivery is None:
                continue
            order.append(Task.model_validate_json(delivery.body))
            await start(bus, order[-1])
            await delivery.ack()
            if len(order) == 4:
                gateways[0].kill()

    # Then the one job came behind no more than its neighbour's share, and every other one once and in its order
    ids = [task.job_id for task in order]
    assert ids.index("b") <= WAITING
    assert [job_id for job_id in ids if job_id != "b"] == sorted(job_id for job_id in ids if job_id != "b")
    assert len(set(ids)) == 13
    async with asyncio.timeout(BOUND_S):  # what moved up is forgotten a moment after it was queued
        while (await bus.held(topology.HELD)).messages:
            await asyncio.sleep(0.02)


async def start(bus: JetStreamBus, task: Task) -> None:
    """Say what a worker says when it begins."""
    begun = contracts.StageStarted(
        job_id=task.job_id, run=1, at=task.queued_at, stage="edit", attempt=1, tries=1, worker="by-hand",
        engine="preview", model="none",
    )  # fmt: skip
    await bus.publish(topology.subject_of_events(task.job_id), begun.to_bytes(), message_id=f"{task.job_id}:started")
