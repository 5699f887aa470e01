"""An id that stands for a key can be computed by who guesses the key and its tenant: it is of no use to him."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.access import bearer, key_for
from tests.gateways import EDIT, Gateway, picture, put

from gateway.intake import id_from_key
from vidgen import errors, topology
from vidgen.bus import Delivery
from vidgen.contracts import DEFAULT_TENANT, Job, JobStatus
from vidgen.testing import MemoryBus, MemoryStore

GUESSED = "order-1"
RIVAL = "umbrella"
REFERENCES = {"acme": "uploads/acme/x.png", DEFAULT_TENANT: "uploads/x.png", RIVAL: "uploads/umbrella/x.png"}


async def opened(bus: MemoryBus | None = None) -> Gateway:
    """A gateway that asks for keys, with a photograph of each tenant's."""
    store = MemoryStore()
    for key in REFERENCES.values():
        await put(store, key, picture())
    return await Gateway.open(bus or MemoryBus(), store, auth="on")


async def headers(gateway: Gateway, tenant: str, key: str | None = None) -> dict[str, str]:
    """Those of a tenant who sends an `Idempotency-Key`."""
    return bearer(await key_for(gateway.parts.bus, tenant)) | ({"Idempotency-Key": key} if key else {})


def asked(tenant: str, **more: Any) -> dict[str, Any]:
    return {"references": [REFERENCES[tenant]], "edit": EDIT} | more


async def delivered(gateway: Gateway) -> Delivery:
    """What is next on the requests' stream."""
    found = await gateway.parts.bus.pull(topology.Consumer(topology.REQUESTS, topology.GATEWAY), 10)
    assert found is not None
    return found


async def is_still_the_owners(gateway: Gateway, tenant: str) -> None:
    own = await headers(gateway, tenant, GUESSED)
    found = [await gateway.client.post("/v1/jobs", json=asked(tenant), headers=own) for _ in range(2)]
    assert [answer.status_code for answer in found] == [202, 200]
    assert {answer.json()["id"] for answer in found} == {id_from_key(GUESSED, tenant)}


@pytest.mark.parametrize("tenant", ["acme", DEFAULT_TENANT])
@pytest.mark.parametrize("key", [None, GUESSED])
async def test_nobody_takes_it_by_http_before_its_owner_comes(tenant: str, key: str | None) -> None:
    """He had it, and the owner, who had sent a key and no id, was told to choose another one."""
    gateway = await opened()
    claim = asked(RIVAL, job_id=id_from_key(GUESSED, tenant))
    refused = await gateway.client.post("/v1/jobs", json=claim, headers=await headers(gateway, RIVAL, key))
    assert (refused.status_code, refused.json()["code"]) == (409, "job_id_taken")
    assert "version 5" in refused.json()["detail"]
    await is_still_the_owners(gateway, tenant)


@pytest.mark.parametrize("tenant", ["acme", DEFAULT_TENANT])
@pytest.mark.parametrize("key", [None, GUESSED, "\0", "no hex"])
@pytest.mark.parametrize("valid", [True, False])
async def test_nobody_takes_it_on_the_bus_either_not_even_with_a_request_that_is_none(
    tenant: str, key: str | None, valid: bool
) -> None:
    gateway = await opened()
    claimed = id_from_key(GUESSED, tenant)
    claim = asked(RIVAL, job_id=claimed) if valid else {"job_id": claimed}
    told = {} if key is None else {topology.HEADER_KEY: key if key == "no hex" else key.encode().hex()}
    subject = topology.subject_of_requests(RIVAL)
    await gateway.parts.bus.publish(subject, json.dumps(claim).encode(), message_id="m", headers=told)
    delivery = await delivered(gateway)
    turned_away = await gateway.parts.intake.handle(delivery)
    await delivery.ack()
    assert (turned_away.status, turned_away.tenant) == (JobStatus.REJECTED, RIVAL)
    assert turned_away.id != claimed
    assert await gateway.parts.bus.last(topology.EVENTS, topology.subject_of_events(claimed)) is None
    await is_still_the_owners(gateway, tenant)


async def test_who_computes_the_id_of_anothers_job_neither_sees_nor_changes_it() -> None:
    gateway = await opened()
    await is_still_the_owners(gateway, "acme")
    job_id, rival = id_from_key(GUESSED, "acme"), await headers(gateway, RIVAL)
    for way in ("", "/events", "/artifacts/edit-0.png", "/references/0"):
        assert (await gateway.client.get(f"/v1/jobs/{job_id}{way}", headers=rival)).status_code == 404
    for what in ("cancel", "retry", "approve"):
        assert (await gateway.client.post(f"/v1/jobs/{job_id}/{what}", json={}, headers=rival)).status_code == 404
    assert (await gateway.parts.jobs.get(job_id)).status is JobStatus.QUEUED


@pytest.mark.parametrize("key", [GUESSED, "ключ 7"])
async def test_what_one_gateway_let_in_with_a_key_another_one_enters(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    gateway = await opened()

    async def dies(*_: object) -> None:
        raise errors.BusError("gone")

    monkeypatch.setattr(gateway.parts.jobs, "create", dies)
    own = {name: value.encode() for name, value in (await headers(gateway, "acme", key)).items()}
    let_in = await gateway.client.post("/v1/jobs", json=asked("acme"), headers=own)
    assert let_in.status_code == 202
    other = await opened(gateway.parts.bus)  # type: ignore[arg-type]
    entered = await other.parts.intake.handle(await delivered(gateway))
    assert (entered.id, entered.status) == (let_in.json()["id"], JobStatus.QUEUED)
    again = await other.client.post("/v1/jobs", json=asked("acme"), headers=own)
    assert (again.status_code, Job.model_validate_json(again.content).id) == (200, entered.id)


async def test_a_key_of_a_message_is_one_job_by_http_and_on_the_bus() -> None:
    gateway = await opened()
    await is_still_the_owners(gateway, "acme")
    (await delivered(gateway)).body  # noqa: B018  the one that came by HTTP
    subject = topology.subject_of_requests("acme")
    await gateway.parts.bus.publish(subject, json.dumps(asked("acme")).encode(), message_id=GUESSED)
    job = await gateway.parts.intake.handle(await delivered(gateway))
    assert job.id == id_from_key(GUESSED, "acme")
