"""Health, metrics, workers, documentation, and what is said at addresses that are none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from tests.gateways import Gateway, now

from gateway.api import ops
from vidgen import contracts, topology
from vidgen.testing import MemoryBus, MemoryStore


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    opened = await Gateway.open()
    async with opened.client:
        yield opened


class LostBus(MemoryBus):
    async def ready(self) -> bool:
        return False


class CountingStore(MemoryStore):
    asked = 0

    async def ready(self) -> bool:
        self.asked += 1
        await asyncio.sleep(0)
        return await super().ready()


class LostStore(MemoryStore):
    async def ready(self) -> bool:
        return False


async def test_the_process_is_alive_and_ready(gateway: Gateway) -> None:
    alive, ready = await gateway.client.get("/healthz"), await gateway.client.get("/readyz")
    assert (alive.status_code, ready.status_code) == (200, 200)
    assert ready.json()["bus"] == ready.json()["store"] == "ok"


async def test_readiness_names_what_is_out_of_reach() -> None:
    gateway = await Gateway.open(bus=LostBus(), store=LostStore())
    alive, ready = await gateway.client.get("/healthz"), await gateway.client.get("/readyz")
    assert (alive.status_code, ready.status_code) == (200, 503)
    assert (ready.json()["bus"], ready.json()["store"]) == ("unreachable", "unreachable")
    assert "the bus and the object store" in ready.json()["detail"]


async def test_a_gateway_that_is_about_to_leave_is_not_ready(gateway: Gateway) -> None:
    gateway.parts.stopping.set()
    ready = await gateway.client.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (503, "stopping")


async def test_a_gateway_that_only_moves_jobs_on_answers_machines_and_nobody_else() -> None:
    gateway = await Gateway.open(gateway_roles="pipeline")
    async with gateway.client:
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await gateway.client.get(path)).status_code == 200
        for path in ("/v1/jobs", "/v1/workers", "/"):
            assert (await gateway.client.get(path)).status_code == 404


async def test_requests_are_measured_by_route_and_not_by_path(gateway: Gateway) -> None:
    await gateway.client.get("/v1/jobs/some-id")
    await gateway.client.get("/v1/jobs/some-id/artifacts/a.png")
    await gateway.client.get("/wp-admin/setup.php")
    text = (await gateway.client.get("/metrics")).text
    assert 'vidgen_http_requests_total{method="GET",route="/v1/jobs/{job_id}",status="404"} 1.0' in text
    assert 'route="/v1/jobs/{job_id}/artifacts/{name}"' in text
    assert 'route="unmatched"' in text
    assert "some-id" not in text
    assert "wp-admin" not in text


@pytest.mark.parametrize(("store", "up"), [(MemoryStore(), 1), (LostStore(), 0)])
async def test_a_scrape_says_whether_the_object_store_answers(store: MemoryStore, up: int) -> None:
    gateway = await Gateway.open(store=store)
    async with gateway.client:
        text = (await gateway.client.get("/metrics")).text
    assert f"vidgen_gateway_store_up {up}.0" in text


async def test_workers_alive_are_listed(gateway: Gateway) -> None:
    worker = contracts.WorkerInfo(
        id="w1", stage="edit", state="ready", engine="preview", model="none", device="cpu", version="0.1.0", host="h",
        started_at=now(), at=now(),
    )  # fmt: skip
    await gateway.parts.bus.records(topology.WORKERS_BUCKET).put("edit.w1", worker.to_bytes())
    listed = (await gateway.client.get("/v1/workers")).json()
    assert [contracts.WorkerInfo.model_validate(one) for one in listed["workers"]] == [worker]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/", 405, "method_not_allowed"), ("GET", "/v1/jobs/", 404, "no_such_address"),
        ("GET", "/v2/jobs", 404, "no_such_address"), ("DELETE", "/v1/jobs", 405, "method_not_allowed"),
        ("PUT", "/v1/jobs/x/cancel", 405, "method_not_allowed"),
    ],
)  # fmt: skip
async def test_an_address_or_method_that_is_none_is_a_problem_document(
    gateway: Gateway, method: str, path: str, status: int, code: str
) -> None:
    answer = await gateway.client.request(method, path)
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, answer.json()["status"], answer.json()["code"]) == (status, status, code)
    assert answer.json()["type"] == f"urn:vidgen:problem:{code}"
    assert answer.json()["title"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/jobs", "GET, POST"), ("HEAD", "/v1/jobs", "GET, POST"), ("POST", "/", "GET, HEAD"),
        ("POST", "/v1/dead/7", "DELETE, GET"), ("POST", "/v1/jobs/x/artifacts/a", "GET, HEAD"),
        ("PUT", "/v1/jobs/x/cancel", "POST"),
    ],
)  # fmt: skip
async def test_every_method_of_an_address_is_named(gateway: Gateway, method: str, path: str, allowed: str) -> None:
    answer = await gateway.client.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    assert method == "HEAD" or answer.json()["detail"] == f"use {allowed} at this address"


async def test_a_probe_may_ask_by_head(gateway: Gateway) -> None:
    for path in ("/healthz", "/readyz"):
        assert (await gateway.client.head(path)).status_code == 200


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for inner in node.values():
            yield from references(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from references(inner)


async def test_the_documentation_is_whole(gateway: Gateway) -> None:
    schema = (await gateway.client.get("/openapi.json")).json()
    components = schema["components"]["schemas"]
    missing = {one for one in references(schema) if one.rsplit("/", 1)[-1] not in components}
    assert not missing
    assert "HTTPValidationError" not in components
    assert (await gateway.client.get("/docs")).status_code == 200


async def test_every_error_is_documented_as_a_problem_document(gateway: Gateway) -> None:
    schema = (await gateway.client.get("/openapi.json")).json()
    for path, methods in schema["paths"].items():
        if not path.startswith("/v1/"):
            continue
        for method, operation in methods.items():
            errors = {status: one for status, one in operation["responses"].items() if int(status) >= 400}
            assert errors, f"{method} {path} documents no errors"
            for status, one in errors.items():
                assert list(one["content"]) == ["application/problem+json"], f"{method} {path} {status}"
    submit = schema["paths"]["/v1/jobs"]["post"]
    assert set(submit["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert {"200", "202", "400", "413", "415", "422", "503"} <= set(submit["responses"])


async def test_who_asks_whether_a_gateway_is_ready_does_not_ask_the_object_store_each_time() -> None:
    """These addresses are open to everybody, and what the store is asked takes the threads of those who are let in."""
    store = CountingStore()
    gateway = await Gateway.open(store=store)
    paths = ["/readyz", "/metrics"] * 20
    answers = await asyncio.gather(*(gateway.client.get(path) for path in paths))
    assert {answer.status_code for answer in answers} == {200}
    assert store.asked == 1


async def test_that_the_object_store_has_gone_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "KEEP_S", 0.0)
    store = CountingStore()
    gateway = await Gateway.open(store=store)
    assert (await gateway.client.get("/readyz")).status_code == 200
    store.down = True
    assert (await gateway.client.get("/readyz")).status_code == 503
