"""No secret leaves its setting: planted in every place that takes one, they are in no log, metric, record or answer.

A small real stack at the most talkative log level, with a bus, a store and a receiver of webhooks that fail.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import httpx
from tests.access import bearer, key_for, revoke
from tests.gateways import EDIT, picture
from tests.receivers import Post, Receiver, make_certificate, status
from tests.servers import skipped_at_home

from vidgen import credentials, jetstream, topology
from vidgen.jetstream import JetStreamBus
from vidgen.local import NatsServer, S3Server
from vidgen.local.stack import Service

BOUND_S = 120.0
USER = "vidgen-user"
BUS_PASSWORD, WRONG_PASSWORD = "Pl4nted-bus-password", "Pl4nted-wrong-password"
WEBHOOK_SECRET = "whsec_" + base64.b64encode(b"Pl4nted-webhook-secret-of-32-byt").decode()
BAD_WEBHOOK_SECRET = "whsec_Pl4nted!no!base64"
STORE_USERINFO, COLLECTOR_USERINFO = "Pl4nted-store-userinfo", "Pl4nted-collector-userinfo"
COLLECTOR_HEADER, BEARER, COOKIE = "Pl4nted-collector-header", "Pl4nted-bearer", "Pl4nted-cookie"
URL_PASSWORD, URL_TOKEN = "Pl4nted-url-password", "Pl4nted-url-token"
CREDENTIALS = "Pl4nted-credentials-file"
SEED, NO_SEED = credentials.make_seed(), "SUPl4nted-no-seed"


class GuardedNats(NatsServer):
    """A server that wants a password."""

    def _config(self) -> str:
        return super()._config() + f'authorization {{ user: "{USER}", password: "{BUS_PASSWORD}" }}\n'

    def url_with(self, password: str) -> str:
        return f"nats://{USER}:{password}@127.0.0.1:{self.port}"


async def logged(service: Service, word: str) -> None:
    """Wait until a service has said something."""
    log = service.folder / f"{service.name}.log"
    async with asyncio.timeout(BOUND_S):
        while word not in (log.read_text(errors="replace") if log.exists() else ""):
            await asyncio.sleep(0.05)


async def everything_on(bus: JetStreamBus) -> str:
    """Every message of every stream and bucket, its subject and headers, and what is in base64 in the clear too."""
    found = []
    for info in await bus.jetstream.streams_info():
        for seq in range(max(1, info.state.first_seq), info.state.last_seq + 1):
            stored = await bus.get(info.config.name, seq)
            if stored is None:
                continue
            body = stored.body.decode("utf-8", "replace")
            found.append(f"{stored.subject} {stored.headers} {body}")
            if stored.subject.startswith("vidgen.dead."):
                found.append(base64.b64decode(json.loads(body)["payload"]).decode("utf-8", "replace"))
    return "\n".join(found)


def forms_of(secret: str) -> Iterator[str]:
    """How a secret may be written."""
    yield from {secret, quote(secret, safe=""), json.dumps(secret)[1:-1], secret.removeprefix("whsec_")}
    yield base64.b64encode(secret.encode()).decode().rstrip("=")


async def test_planted_secrets_are_nowhere(tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path)
    nats, s3 = GuardedNats(tmp_path / "nats"), S3Server(tmp_path / "s3")
    with skipped_at_home():
        await nats.start()
        await s3.start()
    logs = tmp_path / "logs"
    logs.mkdir()
    said: list[str] = []

    async def refuse(post: Post) -> bytes:
        return status(500)

    def service(name: str, module: str, **env: str) -> Service:
        common = {name: value for name, value in os.environ.items() if not name.startswith(("VIDGEN_", "OTEL_"))} | {
            "PYTHONPATH": os.pathsep.join(sys.path), "VIDGEN_LOG_LEVEL": "debug", "VIDGEN_LOG_FORMAT": "json",
            "VIDGEN_NATS_URL": nats.url_with(BUS_PASSWORD), "VIDGEN_S3_ENDPOINT": s3.endpoint,
            "VIDGEN_S3_ACCESS_KEY": s3.access_key, "VIDGEN_S3_SECRET_KEY": s3.secret_key,
            "VIDGEN_S3_BUCKET": s3.bucket, "VIDGEN_HTTP_PORT": "0", "VIDGEN_ENGINE": "preview",
            "VIDGEN_WEBHOOK_SECRET": WEBHOOK_SECRET, "VIDGEN_WEBHOOK_ALLOW": "127.0.0.0/8",
            "VIDGEN_WEBHOOK_CA_FILE": str(certificate.file), "VIDGEN_BACKOFF_BASE": "0.1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{COLLECTOR_USERINFO}:x@127.0.0.1:9",
            "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer {COLLECTOR_HEADER}",
        }  # fmt: skip
        return Service(name, module, logs, common | env)

    gateway = service("gateway", "gateway.main")
    # It delivers no webhooks: that they fail is looked for in the log of the other one.
    keyed = service("keyed", "gateway.main", VIDGEN_AUTH="on", VIDGEN_GATEWAY_ROLES="api")
    worker = service("edit-service", "edit_service.main")
    kinds = "NATS USER JWT", "USER NKEY SEED"
    creds = "".join(f"-----BEGIN {kind}-----\n{CREDENTIALS}\n------END {kind}------\n" for kind in kinds)
    (tmp_path / "wrong.creds").write_text(creds)
    (tmp_path / "no.creds").write_text(CREDENTIALS)
    misled = [
        (service("wrong-password", "gateway.main", VIDGEN_NATS_URL=nats.url_with(WRONG_PASSWORD)), "not_there_yet"),
        (service("wrong-user", "gateway.main", VIDGEN_NATS_USER="x", VIDGEN_NATS_PASSWORD=WRONG_PASSWORD,
                 VIDGEN_NATS_URL=nats.url), "not_there_yet"),
        (service("wrong-creds", "gateway.main", VIDGEN_NATS_URL=nats.url,
                 VIDGEN_NATS_CREDS=str(tmp_path / "wrong.creds")), "not_there_yet"),
        (service("no-creds", "gateway.main", VIDGEN_NATS_URL=nats.url,
                 VIDGEN_NATS_CREDS=str(tmp_path / "no.creds")), "VIDGEN_NATS_CREDS"),
        (service("unknown-seed", "gateway.main", VIDGEN_NATS_URL=nats.url,
                 VIDGEN_NATS_NKEY_SEED=SEED), "not_there_yet"),
        (service("no-seed", "gateway.main", VIDGEN_NATS_NKEY_SEED=NO_SEED), "VIDGEN_NATS_NKEY_SEED"),
        (service("store-userinfo", "gateway.main",
                 VIDGEN_S3_ENDPOINT=f"http://key:{STORE_USERINFO}@127.0.0.1:9"), "VIDGEN_S3_ENDPOINT"),
        (service("wrong-secret", "gateway.main", VIDGEN_WEBHOOK_SECRET=BAD_WEBHOOK_SECRET), "VIDGEN_WEBHOOK_SECRET"),
        (service("wrong-key", "edit_service.main", VIDGEN_S3_SECRET_KEY=WRONG_PASSWORD), "VIDGEN_S3_SECRET_KEY"),
    ]  # fmt: skip

    try:
        async with Receiver(refuse).listening(certificate) as receiver:
            await asyncio.gather(gateway.start(), keyed.start(), worker.start())
            for one, _ in misled:
                one.launch()
            headers = {"Authorization": f"Bearer {BEARER}", "Cookie": f"session={COOKIE}"}
            async with (
                httpx.AsyncClient(base_url=gateway.url, headers=headers, timeout=60) as http,
                jetstream.connect(nats.url_with(BUS_PASSWORD), "test") as bus,
            ):

                async def ask(method: str, path: str, **options: Any) -> httpx.Response:
                    answer = await http.request(method, path, **options)
                    said.append(f"{answer.status_code} {answer.headers} {answer.text}")
                    return answer

                image = picture()
                asked = {"content_type": "image/png", "size": len(image)}
                slot = (await http.post("/v1/uploads", json=asked)).json()
                signature = parse_qs(urlsplit(slot["url"]).query)["X-Amz-Signature"][0]
                async with httpx.AsyncClient(timeout=BOUND_S) as store:
                    await store.put(slot["url"], headers=slot["headers"], content=image)
                good = {"references": [slot["key"]], "edit": EDIT, "webhook_url": receiver.url()}
                wrong = {
                    "password": good | {"webhook_url": f"https://me:{URL_PASSWORD}@hooks.example.com/"},
                    "token": good | {"webhook_url": f"https://hooks.example.com/?key={URL_TOKEN}"},
                    "presigned": good | {"references": [slot["url"]]},
                }
                # 1. What works, and what is refused, through both doors.
                job = (await ask("POST", "/v1/jobs", json=good)).json()
                for name, body in wrong.items():
                    assert (await ask("POST", "/v1/jobs", json=body)).status_code == 422
                    sent = json.dumps(body | {"job_id": name}).encode()
                    await bus.publish(topology.SUBJECT_REQUESTS, sent, message_id=name)
                await asyncio.gather(
                    logged(gateway, "webhook_failed"),
                    *(logged(one, word) for one, word in misled),
                )  # fmt: skip
                async with asyncio.timeout(BOUND_S):
                    while (await http.get("/v1/jobs/presigned")).status_code != 200:
                        await asyncio.sleep(0.05)
                for path in (
                    f"/v1/jobs/{job['id']}",
                    "/v1/jobs",
                    "/v1/dead",
                    "/v1/workers",
                    "/nowhere",
                    "/openapi.json",
                ):
                    await ask("GET", path)
                said.append(await everything_on(bus))
                # With a key, by each way in, and where it does not belong.
                key, revoked = await key_for(bus, "acme"), await key_for(bus, "acme")
                await revoke(bus, revoked)
                async with httpx.AsyncClient(base_url=keyed.url, timeout=BOUND_S) as http_keyed:
                    await http_keyed.post("/v1/session", headers=bearer(key))
                    calls: list[tuple[str, str, dict[str, str]]] = [
                        ("GET", "/v1/jobs", bearer(key)), ("GET", "/v1/session", {}),
                        ("GET", "/v1/jobs", bearer(revoked)), ("POST", f"/v1/jobs/{key}/cancel", bearer(key)),
                        ("GET", f"/v1/jobs?cursor={key}", bearer(key)), ("GET", f"/v1/jobs?key={key}", {}),
                        ("POST", "/v1/jobs", bearer(key) | {"Idempotency-Key": key}),
                    ]  # fmt: skip
                    answers = [await http_keyed.request(method, path, headers=sent) for method, path, sent in calls]
                    assert [answer.status_code for answer in answers] == [200, 200, 401, 404, 422, 200, 415]
                    said.append((await http_keyed.get("/metrics")).text)
                said.append(await everything_on(bus))
                # 2. The store is gone: at the edge, and for a worker that has a task.
                await s3.kill()
                assert (await ask("POST", "/v1/jobs", json=good | {"job_id": "storeless"})).status_code == 503
                await ask("GET", "/readyz")
                # 3. The bus is gone, and back.
                await nats.kill()
                assert (await ask("GET", "/readyz")).status_code == 503
                await logged(gateway, "bus_lost")
                await nats.start()
                await logged(gateway, "connected again")
                await asyncio.gather(ask("GET", "/metrics"), ask("GET", "/v1/jobs"))
                said.append((await http.get(f"{worker.url}/metrics")).text)
                said.append(await everything_on(bus))
            await asyncio.gather(gateway.terminate(20), keyed.terminate(20), worker.terminate(20))
    finally:
        for one in (gateway, keyed, worker, *(one for one, _ in misled)):
            one.kill()
        await nats.kill()
        await s3.kill()

    told = "\n".join([*said, *(log.read_text(errors="replace") for log in logs.glob("*.log"))])
    assert told.count(job["id"]) > 10  # the records, the log and the answers are in it
    for known in ("request_rejected", "webhook_failed", "bus_lost", "not_there_yet", "the object store did not answer"):
        assert known in told
    planted = {
        BUS_PASSWORD, WRONG_PASSWORD, WEBHOOK_SECRET, BAD_WEBHOOK_SECRET, STORE_USERINFO, COLLECTOR_USERINFO,
        COLLECTOR_HEADER, BEARER, COOKIE, URL_PASSWORD, URL_TOKEN, CREDENTIALS, SEED, NO_SEED, s3.secret_key, signature,
        key.split("_", 2)[2], revoked.split("_", 2)[2],  # which may have a _ in it
    }  # fmt: skip
    leaks = [(secret, told[max(0, at - 300) : at + 100]) for secret in planted for form in forms_of(secret)
             if (at := told.find(form)) >= 0]  # fmt: skip
    assert leaks == []
