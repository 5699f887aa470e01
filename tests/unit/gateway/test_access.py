"""Who may do what, route by route: a tenant its own, the operator everything, and who has no key nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs
from tests.access import bearer, key_for, revoke
from tests.gateways import BOUND, EDIT, Call, Gateway, completed, now, picture, put

from gateway import keyring, quotas
from gateway.api import door
from gateway.keyring import Keyring, UnknownKeyError
from vidgen import contracts, dead, errors, keys, topology
from vidgen.contracts import Job
from vidgen.settings import GatewaySettings
from vidgen.testing import MemoryBus, MemoryStore

KEY = "uploads/acme/photo.png"
NEW = {"references": [KEY], "edit": EDIT}
J = "/v1/jobs/{job_id}"


@dataclass(frozen=True)
class Row:
    """What a route answers to the tenant whose things it is about, to another tenant, and to the operator."""

    owner: int
    other: int
    admin: int
    body: Any = None


ROWS = {
    "POST /v1/jobs": Row(202, 422, 202, NEW),  # the reference is acme's
    "GET /v1/jobs": Row(200, 200, 200),
    f"GET {J}": Row(200, 404, 200),
    f"GET {J}/events": Row(200, 404, 200),
    f"POST {J}/cancel": Row(200, 404, 200),
    f"POST {J}/retry": Row(409, 404, 409),  # it is completed
    f"POST {J}/approve": Row(409, 404, 409, {"candidate": 0}),
    f"GET {J}/artifacts/{{name}}": Row(307, 404, 307),
    f"GET {J}/references/{{index}}": Row(307, 404, 307),
    "POST /v1/uploads": Row(201, 201, 201, {"content_type": "image/png", "size": 100}),
    "POST /v1/estimate": Row(200, 200, 200, {"edit": EDIT}),
    "GET /v1/options": Row(200, 200, 200),
    "GET /v1/workers": Row(200, 200, 200),
    "GET /v1/dead": Row(403, 403, 200),
    "GET /v1/dead/{seq}": Row(403, 403, 200),
    "DELETE /v1/dead/{seq}": Row(403, 403, 204),
    "POST /v1/dead/{seq}/replay": Row(403, 403, 422),  # what it holds does not validate
    "GET /v1/session": Row(200, 200, 200),
    "POST /v1/session": Row(200, 200, 200),
    "DELETE /v1/session": Row(204, 204, 204),
}
OPEN = {"GET /healthz", "GET /readyz", "GET /metrics"}


async def with_keys(**settings: Any) -> Gateway:
    """A gateway that asks for keys, with a job of the tenant acme that is done, and a dead letter."""
    store = MemoryStore()
    await put(store, KEY, picture())
    gateway = await Gateway.open(MemoryBus(), store, auth="on", **settings)
    await a_job(gateway, "j1")
    error = contracts.JobError(code="invalid_request", message="it is wrong")
    await dead.publish(
        gateway.parts.bus, dead.letter(b"{}", "vidgen.requests.acme", error, job_id="j2"), message_id="letter"
    )
    return gateway


async def a_job(gateway: Gateway, job_id: str, tenant: str = "acme") -> Job:
    request = contracts.VideoRequest.model_validate(NEW)
    job, _ = await gateway.parts.intake.submit(request, job_id, tenant)
    await gateway.tell(completed(job))
    for stream, pattern in topology.tasks_of(tenant):  # as if a worker had taken and settled it
        await gateway.parts.bus.purge(stream, pattern)
    return job


def routes(gateway: Gateway) -> set[str]:
    paths = gateway.app.openapi()["paths"]
    return {f"{method.upper()} {path}" for path, operations in paths.items() for method in operations}


async def ask(gateway: Gateway, route: str, key: str | None, row: Row | None = None) -> httpx.Response:
    method, path = route.split(" ")
    path = path.format(job_id="j1", name="edit-0.png", index=0, seq=1)
    body = {"json": row.body} if row is not None and row.body is not None else {}
    return await gateway.client.request(method, path, headers=bearer(key) if key else {}, **body)


async def test_every_route_has_its_row() -> None:
    gateway = await with_keys()
    assert routes(gateway) == {*ROWS, *OPEN}


@pytest.mark.parametrize("route", ROWS)
async def test_who_may(route: str) -> None:
    row = ROWS[route]
    for who, expected in {"owner": row.owner, "other": row.other, "admin": row.admin}.items():
        gateway = await with_keys()
        tenant = {"owner": "acme", "other": "umbrella", "admin": "default"}[who]
        key = await key_for(gateway.parts.bus, tenant, admin=who == "admin")

        answer = await ask(gateway, route, key, row)

        assert answer.status_code == expected, f"{who}: {answer.text}"


@pytest.mark.parametrize("route", ROWS)
async def test_nobody_comes_in_without_a_key_that_is_good(route: str) -> None:
    gateway = await with_keys()
    bus = gateway.parts.bus
    revoked, expired = await key_for(bus, "acme"), await key_for(bus, "acme", expired=True)
    await revoke(bus, revoked)
    stranger = keys.issue("acme", now())[1]
    swapped = f"vg_{keys.id_of(await key_for(bus, 'acme'))}_{'A' * 43}"
    wrong = {
        None: "no_key", "": "no_key", "vg_": "unknown_key", stranger: "unknown_key", swapped: "unknown_key",
        revoked: "key_revoked", expired: "key_expired",
    }  # fmt: skip
    for key, code in wrong.items():
        answer = await ask(gateway, route, key, ROWS[route])
        assert (answer.status_code, answer.json()["code"]) == (401, code), f"{key!r}"
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")


@pytest.mark.parametrize("route", sorted(OPEN))
async def test_machines_ask_how_a_gateway_is_without_a_key(route: str) -> None:
    assert (await ask(await with_keys(), route, None)).status_code == 200


@pytest.mark.parametrize("address", ["/", "/web/main.js", "/docs", "/openapi.json"])
async def test_the_page_and_the_documentation_are_open_and_all_else_is_closed(address: str) -> None:
    gateway = await with_keys()
    assert (await gateway.client.get(address)).status_code == 200
    assert (await gateway.client.get("/v2/anything")).status_code == 401
    assert (await gateway.client.get("/web/../v1/jobs")).status_code == 401
    assert (await gateway.client.get("/v1/web/")).status_code == 401


async def test_the_documentation_tells_of_keys_on_every_closed_route_and_on_no_other() -> None:
    schema = (await with_keys()).app.openapi()
    assert set(schema["components"]["securitySchemes"]) == {"key", "session"}
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            closed = f"{method.upper()} {path}" in ROWS
            assert ("security" in operation) is closed
            assert ({"401", "403", "429"} <= set(operation["responses"])) is closed


async def test_a_job_of_another_tenant_is_answered_as_one_that_is_not_there() -> None:
    gateway = await with_keys()
    key = await key_for(gateway.parts.bus, "umbrella")
    there = await gateway.client.get("/v1/jobs/j1", headers=bearer(key))
    missing = await gateway.client.get("/v1/jobs/j9", headers=bearer(key))
    assert there.text.replace("j1", "j9") == missing.text


async def test_each_sees_its_own_jobs_in_the_list_and_the_operator_all() -> None:
    gateway = await with_keys()
    await put(gateway.parts.store, "uploads/x.png", picture())
    for number in range(3):
        await a_job(gateway, f"acme-{number}")
        request = contracts.VideoRequest.model_validate({"references": ["uploads/x.png"], "edit": EDIT})
        await gateway.parts.intake.submit(request, f"own-{number}", "default")

    async def listed(tenant: str, query: str = "", admin: bool = False) -> list[str]:
        key = await key_for(gateway.parts.bus, tenant, admin=admin)
        answer = await gateway.client.get(f"/v1/jobs?{query}", headers=bearer(key))
        return [job["id"] for job in answer.json()["jobs"]]

    assert await listed("acme", "limit=3") == ["acme-2", "acme-1", "acme-0"]
    assert await listed("umbrella") == []
    assert await listed("default") == ["own-2", "own-1", "own-0"]
    assert len(await listed("default", admin=True)) == 7
    assert await listed("default", "tenant=acme&limit=2", admin=True) == ["acme-2", "acme-1"]


async def test_a_tenants_pages_stay_the_same_while_others_jobs_come() -> None:
    gateway = await with_keys()
    headers = bearer(await key_for(gateway.parts.bus, "acme"))
    await a_job(gateway, "j2")
    first = (await gateway.client.get("/v1/jobs?limit=1", headers=headers)).json()
    await put(gateway.parts.store, "uploads/umbrella/x.png", picture())
    request = contracts.VideoRequest.model_validate({"references": ["uploads/umbrella/x.png"], "edit": EDIT})
    await gateway.parts.intake.submit(request, "j3", "umbrella")

    second = (await gateway.client.get(f"/v1/jobs?limit=1&cursor={first['next_cursor']}", headers=headers)).json()

    assert [page["jobs"][0]["id"] for page in (first, second)] == ["j2", "j1"]
    assert second["next_cursor"] is None


async def test_a_tenant_may_not_ask_for_the_jobs_of_another() -> None:
    gateway = await with_keys()
    answer = await gateway.client.get(
        "/v1/jobs?tenant=acme", headers=bearer(await key_for(gateway.parts.bus, "umbrella"))
    )
    assert (answer.status_code, answer.json()["code"]) == (403, "not_the_operator")


async def test_the_id_of_another_tenants_job_is_refused_and_nothing_is_published() -> None:
    gateway = await with_keys()
    await put(gateway.parts.store, "uploads/umbrella/x.png", picture())
    before = await gateway.count(topology.REQUESTS)
    body = {"job_id": "j1", "references": ["uploads/umbrella/x.png"], "edit": EDIT}

    answer = await gateway.client.post(
        "/v1/jobs", json=body, headers=bearer(await key_for(gateway.parts.bus, "umbrella"))
    )

    assert (answer.status_code, answer.json()["code"]) == (409, "job_id_taken")
    assert await gateway.count(topology.REQUESTS) == before
    assert (await gateway.parts.jobs.get("j1")).tenant == "acme"


async def test_the_same_idempotency_key_of_two_tenants_is_two_jobs() -> None:
    gateway = await with_keys()
    await put(gateway.parts.store, "uploads/umbrella/x.png", picture())
    found = []
    for tenant, reference in (("acme", KEY), ("umbrella", "uploads/umbrella/x.png"), ("acme", KEY)):
        headers = bearer(await key_for(gateway.parts.bus, tenant)) | {"Idempotency-Key": "order-1"}
        answer = await gateway.client.post("/v1/jobs", json={"references": [reference], "edit": EDIT}, headers=headers)
        found.append((answer.status_code, answer.json()["id"]))
    assert [status for status, _ in found] == [202, 202, 200]
    assert found[0][1] == found[2][1] != found[1][1]


async def test_uploads_and_forms_lie_under_the_tenants_own_prefix() -> None:
    gateway = await with_keys()
    headers = bearer(await key_for(gateway.parts.bus, "umbrella"))
    slot = await gateway.client.post("/v1/uploads", json={"content_type": "image/png", "size": 100}, headers=headers)
    form = await gateway.post_form([picture()], {"edit": EDIT}, **headers)
    assert slot.json()["key"].startswith("uploads/umbrella/")
    assert form.json()["tenant"] == "umbrella"
    assert all(key.startswith("uploads/umbrella/") for key in form.json()["request"]["references"])


@pytest.mark.parametrize("key", [KEY, "jobs/j1/edit-0.png", "uploads/umbrella/../acme/photo.png", "uploads/umbrella"])
async def test_a_request_may_not_start_from_what_is_anothers(key: str) -> None:
    gateway = await with_keys()
    body = {"references": [key], "edit": EDIT, "job_id": "mine"}
    answer = await gateway.client.post(
        "/v1/jobs", json=body, headers=bearer(await key_for(gateway.parts.bus, "umbrella"))
    )
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "references.0"


async def test_a_replayed_request_is_its_tenants_and_may_start_from_nothing_else() -> None:
    gateway = await with_keys()
    await put(gateway.parts.store, "uploads/x.png", picture())
    error = contracts.JobError(code="undigested", message="the gateway could not process this message")
    for number, reference in enumerate((KEY, "uploads/x.png", "uploads/umbrella/x.png")):
        body = json.dumps(NEW | {"references": [reference], "job_id": "given"}).encode()
        letter = dead.letter(body, "vidgen.requests.acme", error, job_id=None)
        await dead.publish(gateway.parts.bus, letter, message_id=f"letter-{number}")
    headers = bearer(await key_for(gateway.parts.bus, admin=True))

    own, *others = [await gateway.client.post(f"/v1/dead/{seq}/replay", headers=headers) for seq in (2, 3, 4)]

    assert (own.status_code, own.json()["tenant"]) == (202, "acme")
    assert [(answer.status_code, answer.json()["errors"][0]["field"]) for answer in others] == [
        (422, "references.0"), (422, "references.0")
    ]  # fmt: skip


async def test_workers_show_a_tenant_its_own_jobs_alone() -> None:
    gateway = await with_keys()
    await a_job(gateway, "theirs", "acme")
    worker = contracts.WorkerInfo(
        id="w1", stage="edit", state="busy", engine="preview", model="none", device="cpu", running=("theirs", "gone"),
        generating="theirs", version="1", host="h", started_at=now(), at=now(),
    )  # fmt: skip
    await gateway.parts.bus.records(topology.WORKERS_BUCKET).put("edit.w1", worker.to_bytes())
    shown: dict[str, Any] = {}
    for tenant, admin in (("acme", False), ("umbrella", False), ("default", True)):
        answer = await gateway.client.get(
            "/v1/workers", headers=bearer(await key_for(gateway.parts.bus, tenant, admin=admin))
        )
        told = answer.json()["workers"][0]
        shown[tenant] = told["running"], told.get("generating")
        if tenant == "umbrella":
            assert "theirs" not in answer.text
    assert shown == {"acme": (["theirs"], "theirs"), "umbrella": ([], None), "default": (["theirs", "gone"], "theirs")}


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_revoked_key_opens_a_replica_for_no_longer_than_it_keeps_one() -> None:
    bus, at = MemoryBus(), 0.0
    replicas = [Keyring(bus, clock=lambda: at) for _ in range(2)]
    key = await key_for(bus, "acme")
    assert {(await replica.identify(key)).tenant for replica in replicas} == {"acme"}
    await revoke(bus, key)

    at += keyring.KEEP_S

    for replica in replicas:
        with pytest.raises(UnknownKeyError) as caught:
            await replica.identify(key)
        assert caught.value.code == "key_revoked"


async def test_a_key_of_another_version_opens_nothing_and_is_told_of_once() -> None:
    bus, at = MemoryBus(), 0.0
    ring = Keyring(bus, clock=lambda: at)
    text = await key_for(bus, "acme")
    caller = await ring.identify(text)
    assert caller.key_id is not None
    await bus.records(topology.KEYS_BUCKET).put(caller.key_id, b'{"schema_version": 2}')

    with capture_logs() as logs:
        for _ in range(2):
            at += keyring.KEEP_S
            with pytest.raises(UnknownKeyError):
                await ring.identify(text)

    assert [(entry["_event"], entry["key"]) for entry in logs] == [("key_unreadable", caller.key_id)]


async def test_many_unknown_keys_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "KEPT", 3)
    ring = Keyring(MemoryBus())
    for _ in range(10):
        with pytest.raises(UnknownKeyError):
            await ring.identify(keys.issue("acme", now())[1])
    assert len(ring._kept) == 3


async def test_a_bus_that_is_away_lets_nobody_in() -> None:
    gateway = await with_keys()
    key = await key_for(gateway.parts.bus, "acme")
    assert isinstance(gateway.parts.bus, MemoryBus)
    gateway.parts.bus.down = True
    answer = await gateway.client.get("/v1/options", headers=bearer(key))
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")


async def test_a_key_is_never_stored() -> None:
    gateway = await with_keys()
    key = await key_for(gateway.parts.bus, "acme")
    for record in (await gateway.parts.bus.records(topology.KEYS_BUCKET).all()).values():
        assert key.encode() not in record
        assert key.rsplit("_", 1)[-1].encode() not in record


@pytest.mark.parametrize(
    ("host", "auth", "asked"),
    [
        ("127.0.0.1", "auto", False), ("::1", "auto", False), ("localhost", "auto", False), ("127.0.0.1", "on", True),
        ("0.0.0.0", "auto", True), ("10.1.2.3", "auto", True), ("gateway.local", "auto", True), ("::", "on", True),
    ],
)  # fmt: skip
def test_keys_are_asked_for_wherever_others_reach_the_gateway(host: str, auth: Any, asked: bool) -> None:
    assert GatewaySettings(http_host=host, auth=auth).asks_for_keys is asked


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_a_gateway_that_others_reach_does_not_start_without_keys(host: str) -> None:
    with pytest.raises(errors.FatalError, match="vidgen keys create --admin") as caught:
        _ = GatewaySettings(http_host=host, auth="off").asks_for_keys
    assert caught.value.code == "settings"


# ── the session of the page ──────────────────────────────────────────────────────────────────────────────────────


async def signed_in(gateway: Gateway, tenant: str = "acme") -> str:
    key = await key_for(gateway.parts.bus, tenant)
    answer = await gateway.client.post("/v1/session", headers=bearer(key))
    assert answer.status_code == 200
    return answer.headers["set-cookie"]


async def test_a_session_is_made_of_a_key_and_of_nothing_else_that_comes_with_one() -> None:
    """The password for a proxy, which a browser sends along, was kept in the session's place, as if it were the key."""
    gateway = await with_keys()
    session = {"Cookie": f"{door.COOKIE}={await key_for(gateway.parts.bus)}", "Sec-Fetch-Site": "same-origin"}
    told = await gateway.client.post("/v1/session", headers=session | {"Authorization": "Basic YTpi"})
    assert (told.status_code, told.json()["code"]) == (403, "no_key")
    assert "set-cookie" not in told.headers


async def test_a_session_is_a_cookie_that_no_script_and_no_other_page_can_use() -> None:
    gateway = await with_keys()
    cookie = await signed_in(gateway)
    assert cookie.startswith(f"{door.COOKIE}=vg_")
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    told = await gateway.client.get("/v1/session")
    assert told.json() == {"tenant": "acme", "admin": False, "name": "", "keys": True}
    assert (await gateway.client.get("/v1/jobs/j1")).status_code == 200


async def test_the_cookie_is_secure_where_the_page_is() -> None:
    gateway = await with_keys()
    key = await key_for(gateway.parts.bus)
    direct = await gateway.client.post("https://gateway.localhost/v1/session", headers=bearer(key))
    # Behind a proxy that has the certificate: the browser says how the page was loaded.
    proxied = await gateway.client.post("/v1/session", headers=bearer(key) | {"Origin": "https://gateway.localhost"})
    broken = await gateway.client.post("/v1/session", headers=bearer(key) | {"Origin": "https://["})
    for answer in (direct, proxied, broken):
        assert "Secure" in answer.headers["set-cookie"].split("; ")


OWN: list[dict[str, str]] = [{"Sec-Fetch-Site": "same-origin"}, {"Origin": "http://gateway.localhost"}]
FOREIGN: list[dict[str, str]] = [
    {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "none"},
    {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": "http://gateway.localhost:81"},
    {"Origin": "http://gateway.localhost.evil.example"}, {"Origin": "http://["},
]  # fmt: skip


@pytest.mark.parametrize("sent", [*FOREIGN, {}], ids=str)
async def test_a_session_changes_nothing_for_another_page(sent: dict[str, str]) -> None:
    gateway = await with_keys()
    await signed_in(gateway)
    for method, path in (("POST", "/v1/jobs/j1/cancel"), ("DELETE", "/v1/session"), ("POST", "/v1/session")):
        answer = await gateway.client.request(method, path, headers=sent)
        assert (answer.status_code, answer.json()["code"]) == (403, "another_page")


@pytest.mark.parametrize("sent", OWN, ids=str)
async def test_the_gateways_own_page_may_act_and_sign_out(sent: dict[str, str]) -> None:
    gateway = await with_keys()
    await signed_in(gateway)
    assert (await gateway.client.post("/v1/jobs/j1/cancel", headers=sent)).status_code == 200
    assert (await gateway.client.delete("/v1/session", headers=sent)).status_code == 204
    assert (await gateway.client.get("/v1/jobs/j1")).status_code == 401


@pytest.mark.parametrize("sent", FOREIGN, ids=str)
async def test_a_gateway_without_keys_obeys_no_other_page_either(sent: dict[str, str]) -> None:
    gateway = await Gateway.open()
    job = await gateway.submit()
    assert (await gateway.client.post(f"/v1/jobs/{job.id}/cancel", headers=sent)).status_code == 403
    assert (await gateway.client.post(f"/v1/jobs/{job.id}/cancel")).status_code == 200  # no browser sent that


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", "10.0.0.1", "[", "a b"]
)
async def test_a_gateway_without_keys_answers_to_no_name_that_points_here_from_elsewhere(host: str) -> None:
    """DNS rebinding: to the browser the gateway is then the page's own site, so its headers say nothing against it."""
    gateway = await Gateway.open()
    job = await gateway.submit()
    own = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    for method, path in (("GET", "/v1/jobs"), ("POST", f"/v1/jobs/{job.id}/cancel"), ("GET", "/v1/session")):
        answer = await gateway.client.request(method, path, headers=own)
        assert (answer.status_code, answer.json()["code"]) == (403, "another_host")
    assert (await gateway.client.get("/healthz", headers=own)).status_code == 200


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8080", "127.0.0.1:8080", "127.0.0.2", "[::1]:8080", "a.localhost."]
)
async def test_a_gateway_without_keys_answers_to_every_name_of_this_machine(host: str) -> None:
    gateway = await Gateway.open()
    assert (await gateway.client.get("/v1/jobs", headers={"Host": host})).status_code == 200


async def test_with_keys_a_gateway_answers_to_any_name() -> None:
    gateway = await with_keys()
    headers = bearer(await key_for(gateway.parts.bus, "acme")) | {"Host": "vidgen.example"}
    assert (await gateway.client.get("/v1/jobs", headers=headers)).status_code == 200


async def test_a_key_opens_the_gateway_from_any_page() -> None:
    gateway = await with_keys()
    headers = bearer(await key_for(gateway.parts.bus, "acme")) | {"Origin": "https://app.example"}
    assert (await gateway.client.post("/v1/jobs/j1/cancel", headers=headers)).status_code == 200


async def test_a_session_of_a_revoked_key_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "KEEP_S", 0.0)
    gateway = await with_keys()
    cookie = await signed_in(gateway)
    await revoke(gateway.parts.bus, cookie.split(";")[0].split("=", 1)[1])
    assert (await gateway.client.get("/v1/session")).json()["code"] == "key_revoked"


async def test_events_end_when_their_key_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "KEEP_S", 0.0)
    monkeypatch.setattr(keyring, "LOOK_S", 0.01)
    gateway = await with_keys()
    request = contracts.VideoRequest.model_validate(NEW)
    await gateway.parts.intake.submit(request, "j5", "acme")
    key = await key_for(gateway.parts.bus, "acme")
    call = Call(gateway.app, "GET", "/v1/jobs/j5/events", bearer(key))
    assert (await call.next())["status"] == 200

    await revoke(gateway.parts.bus, key)

    await call.ended()


async def test_without_keys_the_caller_is_the_operator_and_there_is_no_cookie() -> None:
    gateway = await Gateway.open()
    answer = await gateway.client.post("/v1/session")
    assert answer.json() == {"tenant": "default", "admin": True, "name": "", "keys": False}
    assert "set-cookie" not in answer.headers


# ── limits ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_more_requests_than_a_tenant_may_send_are_told_when_to_come_again() -> None:
    gateway = await with_keys(tenant_rate=0.5, tenant_burst=2)
    headers = bearer(await key_for(gateway.parts.bus, "acme"))
    answers = [await gateway.client.get("/v1/options", headers=headers) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[2].json()["code"] == "rate_limited"
    assert 1 <= int(answers[2].headers["Retry-After"]) <= 2
    other = bearer(await key_for(gateway.parts.bus, "umbrella"))
    assert (await gateway.client.get("/v1/options", headers=other)).status_code == 200
    own = bearer(await key_for(gateway.parts.bus))
    assert {(await gateway.client.get("/v1/options", headers=own)).status_code for _ in range(5)} == {200}


async def test_a_search_through_many_jobs_counts_as_many_requests() -> None:
    """Of 2,000 jobs, none of which fits, it takes the gateway for half a second."""
    gateway = await with_keys(tenant_rate=0.001, tenant_burst=5)
    for number in range(60):
        await a_job(gateway, f"h{number}")
    headers = bearer(await key_for(gateway.parts.bus, "acme"))
    answers = [
        await gateway.client.get(f"/v1/jobs?{query}", headers=headers)
        for query in ("limit=1", "status=failed&limit=1", "limit=1", "limit=1")
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert answers[1].json()["jobs"] == []


async def test_searches_of_a_tenant_that_come_at_once_hold_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty, which is the usual burst, kept a gateway from answering anybody for seconds at a time."""
    gateway, begun, most, go_on = await with_keys(), list[str](), 0, asyncio.Event()
    find, headers = gateway.parts.jobs.list, {}
    for tenant in ("acme", "umbrella"):
        headers[tenant] = bearer(await key_for(gateway.parts.bus, tenant))

    async def slow(status: Any, cursor: Any, limit: int, tenant: str | None = None) -> Any:
        nonlocal most
        begun.append(tenant or "")
        most = max(most, len(begun))
        await go_on.wait()
        return await find(status, cursor, limit, tenant)

    monkeypatch.setattr(gateway.parts.jobs, "list", slow)
    asked = [asyncio.create_task(gateway.client.get("/v1/jobs", headers=headers["acme"])) for _ in range(20)]
    async with asyncio.timeout(BOUND):
        while len(begun) < quotas.PAGES:
            await asyncio.sleep(0)
    asked.append(asyncio.create_task(gateway.client.get("/v1/jobs", headers=headers["umbrella"])))
    async with asyncio.timeout(BOUND):
        while "umbrella" not in gateway.parts.quotas.pages._waiting:
            await asyncio.sleep(0)
    assert most == quotas.PAGES
    go_on.set()
    assert {(await one).status_code for one in asked} == {200}
    assert begun.index("umbrella") <= quotas.PAGES + 1


async def test_a_tenants_open_feeds_are_counted_and_leave_room_for_others() -> None:
    gateway = await with_keys(tenant_open=2)
    await gateway.parts.intake.submit(contracts.VideoRequest.model_validate(NEW), "j5", "acme")
    headers = bearer(await key_for(gateway.parts.bus, "acme"))
    feeds = [Call(gateway.app, "GET", "/v1/jobs/j5/events", headers) for _ in range(2)]
    assert [(await feed.next())["status"] for feed in feeds] == [200, 200]

    one_more = await gateway.client.get("/v1/jobs/j5", headers=headers)
    assert (one_more.status_code, one_more.json()["code"]) == (429, "too_many_open")
    assert int(one_more.headers["Retry-After"]) > 0
    for other in (await key_for(gateway.parts.bus, "umbrella"), await key_for(gateway.parts.bus, admin=True)):
        assert (await gateway.client.get("/v1/options", headers=bearer(other))).status_code == 200

    await feeds[0].leave()
    assert (await gateway.client.get("/v1/jobs/j5", headers=headers)).status_code == 200
    await feeds[1].leave()
    assert not gateway.parts.quotas._open


async def test_a_tenants_forms_that_never_end_leave_room_on_the_disk_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twenty of them took the 2 GiB that a gateway has on Kubernetes, and the kubelet ended it."""
    monkeypatch.setattr("gateway.quotas.FORM_BYTES", 5 << 20)
    gateway, headers = await with_keys(max_upload_bytes=1 << 20), {}
    for tenant in ("acme", "umbrella", "default"):
        headers[tenant] = bearer(await key_for(gateway.parts.bus, tenant))
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        begun.set()
        await go_on.wait()
        yield b""

    form = {"Content-Type": "multipart/form-data; boundary=b"}
    for length in ({"Content-Length": str(3 << 20)}, {"Transfer-Encoding": "chunked"}):  # which may be of 4 MiB
        begun.clear()
        go_on.clear()
        never = asyncio.create_task(
            gateway.client.post("/v1/jobs", content=body(), headers=headers["acme"] | form | length)
        )
        await begun.wait()
        told = await gateway.client.post("/v1/jobs", content=b"x" * (5 << 19), headers=headers["acme"] | form)
        assert (told.status_code, told.json()["code"]) == (429, "too_many_open")
        for other in ("umbrella", "default"):
            told = await gateway.post_form([picture()], {"edit": EDIT}, **headers[other])
            assert told.status_code == 202, told.text
        go_on.set()
        assert (await never).status_code == 400
        assert (await gateway.post_form([picture()], {"edit": EDIT}, **headers["acme"])).status_code == 202
    assert not gateway.parts.quotas._form_bytes


async def test_more_unfinished_jobs_than_a_tenant_may_have_are_refused_until_one_is_done() -> None:
    gateway = await with_keys(tenant_jobs=2)
    headers = bearer(await key_for(gateway.parts.bus, "acme"))
    answers = [await gateway.client.post("/v1/jobs", json=NEW, headers=headers) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [202, 202, 429]
    assert answers[2].json()["code"] == "too_many_jobs"
    assert int(answers[2].headers["Retry-After"]) > 0

    await gateway.client.post(f"/v1/jobs/{answers[0].json()['id']}/cancel", headers=headers)

    assert (await gateway.client.post("/v1/jobs", json=NEW, headers=headers)).status_code == 202


async def test_a_retry_counts_as_a_job_that_is_not_done() -> None:
    gateway = await with_keys(tenant_jobs=1)
    headers = bearer(await key_for(gateway.parts.bus, "acme"))
    first = (await gateway.client.post("/v1/jobs", json=NEW, headers=headers)).json()["id"]
    await gateway.client.post(f"/v1/jobs/{first}/cancel", headers=headers)
    assert (await gateway.client.post("/v1/jobs", json=NEW, headers=headers)).status_code == 202
    assert (await gateway.client.post(f"/v1/jobs/{first}/retry", headers=headers)).status_code == 429


async def test_an_approval_counts_as_a_job_that_is_not_done() -> None:
    gateway = await with_keys(tenant_jobs=1)
    headers = bearer(await key_for(gateway.parts.bus, "acme"))
    reviewed = NEW | {"review": True, "i2v": {"prompt": "it moves"}}
    first = Job.model_validate_json((await gateway.client.post("/v1/jobs", json=reviewed, headers=headers)).content)
    for stream, pattern in topology.tasks_of("acme"):
        await gateway.parts.bus.purge(stream, pattern)
    await gateway.tell(completed(first))
    other = await gateway.client.post("/v1/jobs", json=NEW, headers=headers)
    assert other.status_code == 202

    refused = await gateway.client.post(f"/v1/jobs/{first.id}/approve", json={"candidate": 0}, headers=headers)
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_jobs")

    await gateway.client.post(f"/v1/jobs/{other.json()['id']}/cancel", headers=headers)
    let_on = await gateway.client.post(f"/v1/jobs/{first.id}/approve", json={"candidate": 0}, headers=headers)
    assert let_on.status_code == 200


async def test_who_asks_again_for_what_was_done_or_cannot_be_is_told_so_and_not_that_there_is_no_room() -> None:
    gateway = await with_keys(tenant_jobs=1)
    headers = bearer(await key_for(gateway.parts.bus, "acme"))
    reviewed = NEW | {"review": True, "i2v": {"prompt": "it moves"}}
    job = Job.model_validate_json((await gateway.client.post("/v1/jobs", json=reviewed, headers=headers)).content)
    for stream, pattern in topology.tasks_of("acme"):
        await gateway.parts.bus.purge(stream, pattern)
    await gateway.tell(completed(job))

    for _ in range(2):  # the first answer was lost on its way
        approved = await gateway.client.post(f"/v1/jobs/{job.id}/approve", json={"candidate": 0}, headers=headers)
        assert (approved.status_code, approved.json().get("approved")) == (200, 0)
    other = await gateway.client.post(f"/v1/jobs/{job.id}/approve", json={"candidate": 1}, headers=headers)
    again = await gateway.client.post(f"/v1/jobs/{job.id}/retry", headers=headers)
    assert [(one.status_code, one.json()["code"]) for one in (other, again)] == [(409, "not_possible")] * 2


async def test_many_at_once_get_no_more_room_than_there_is() -> None:
    gateway = await with_keys(tenant_jobs=3)
    headers = bearer(await key_for(gateway.parts.bus, "acme"))
    answers = await asyncio.gather(*(gateway.client.post("/v1/jobs", json=NEW, headers=headers) for _ in range(10)))
    let_in = sum(answer.status_code == 202 for answer in answers)
    assert 0 < let_in <= 3
    assert {answer.status_code for answer in answers} == {202, 429}


async def test_limits_that_were_set_for_a_tenant_take_the_place_of_the_usual_ones() -> None:
    told = (await with_keys()).parts
    await told.bus.records(topology.TENANTS_BUCKET).put("acme", b'{"id":"acme","jobs":0,"rate":0}')
    assert isinstance(told.bus, MemoryBus)
    gateway = await Gateway.open(told.bus, told.store, auth="on", tenant_jobs=1, tenant_rate=0.1, tenant_burst=1)
    headers = bearer(await key_for(gateway.parts.bus, "acme"))
    answers = [await gateway.client.post("/v1/jobs", json=NEW, headers=headers) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [202, 202, 202]
