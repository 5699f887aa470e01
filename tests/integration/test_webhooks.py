"""Webhooks end to end: gateways as processes, a real bus, receivers over TLS; and the receivers that the docs show."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from tests.gateways import completed, picture, started
from tests.receivers import Post, Receiver, make_certificate, status
from tests.servers import connected_bus

from vidgen import topology, webhooks
from vidgen.client import AsyncClient
from vidgen.contracts import AnyEvent, EditParams, I2VParams, Webhook
from vidgen.jetstream import JetStreamBus
from vidgen.local import NatsServer, S3Server
from vidgen.local.stack import Service

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BOUND_S = 120.0
ACK_WAIT_S = 2.0  # what a killed gateway held comes back soon
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwMfKQ9r8GKYo="
OF_DEFAULT = webhooks.Secret.parse(SECRET).of_tenant("default")


async def tell(bus: JetStreamBus, *events: AnyEvent) -> None:
    """Say what a worker would."""
    for event in events:
        key = f"{event.job_id}:{event.type}:{event.stage}"
        await bus.publish(topology.subject_of_events(event.job_id), event.to_bytes(), message_id=key)


async def test_what_a_killed_gateway_was_telling_is_told_by_the_next_and_everything_in_order(
    nats_server: NatsServer, s3_server: S3Server, tmp_path: Path
) -> None:
    certificate = make_certificate(tmp_path)
    env = {name: value for name, value in os.environ.items() if not name.startswith("VIDGEN_")} | {
        "PYTHONPATH": os.pathsep.join(sys.path), "VIDGEN_NATS_URL": nats_server.url,
        "VIDGEN_S3_ENDPOINT": s3_server.endpoint, "VIDGEN_S3_ACCESS_KEY": s3_server.access_key,
        "VIDGEN_S3_SECRET_KEY": s3_server.secret_key, "VIDGEN_S3_BUCKET": s3_server.bucket, "VIDGEN_HTTP_PORT": "0",
        "VIDGEN_ACK_WAIT": str(ACK_WAIT_S), "VIDGEN_LOG_FORMAT": "json", "VIDGEN_WEBHOOK_SECRET": SECRET,
        "VIDGEN_WEBHOOK_ALLOW": "127.0.0.0/8", "VIDGEN_WEBHOOK_CA_FILE": str(certificate.file),
    }  # fmt: skip
    never = asyncio.Event()
    came: list[Post] = []

    async def answer(post: Post) -> bytes:
        came.append(post)
        if len(came) == 1:
            await never.wait()
        first_of_the_end = [one.event["type"] for one in came].count("job.completed") == 1
        return status(500 if first_of_the_end else 204)

    first, second = (Service(name, "gateway.main", tmp_path, env) for name in ("gateway-1", "gateway-2"))
    async with Receiver(answer).listening(certificate) as receiver:
        try:
            await first.start()
            async with (
                connected_bus(nats_server, topology.Topology(ack_wait=ACK_WAIT_S)) as bus,
                AsyncClient(first.url) as client,
            ):
                job = await client.submit(
                    images=[picture()], edit=EditParams(prompt="x"), i2v=I2VParams(), webhook_url=receiver.url()
                )
                await tell(bus, started(job), completed(job))
                await receiver.next()
                first.kill()
                await second.start()
                video = completed(job, "i2v", names=["video.mp4"], content_type="video/mp4")
                await tell(bus, started(job, "i2v"), video)
                posts = [await receiver.next() for _ in range(4)]
                async with asyncio.timeout(BOUND_S):
                    while await bus.first(topology.WEBHOOKS, topology.subject_of_webhook(job.id)) is not None:
                        await asyncio.sleep(0.05)
            async with AsyncClient(second.url) as client:
                shown = await client.get(job.id)
        finally:
            never.set()
            first.kill()
            second.kill()

    edit, i2v, end = f"{job.id}:stage_completed:edit", f"{job.id}:stage_completed:i2v", f"{job.id}:1:completed"
    assert [post.headers["webhook-id"] for post in came] == [edit, edit, i2v, end, end]
    assert [post.event["type"] for post in posts[-2:]] == ["job.completed", "job.completed"]
    assert Webhook.model_validate_json(posts[-1].body).data == shown
    for post in came:
        at = datetime.fromtimestamp(int(post.headers["webhook-timestamp"]), UTC)
        assert OF_DEFAULT.sign(post.headers["webhook-id"], at, post.body).items() <= post.headers.items()


# ── the receivers that docs/requests.md shows ────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def example(*command: str) -> AsyncIterator[tuple[asyncio.StreamReader, int]]:
    """What an example prints, and the port on which it listens."""
    env = {**os.environ, "WEBHOOK_SECRET": OF_DEFAULT.reveal()}
    process = await asyncio.create_subprocess_exec(*command, "0", env=env, stdout=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(BOUND_S):
            line = (await process.stdout.readline()).decode()
        yield process.stdout, int(line.removeprefix("listening on port "))
    finally:
        process.kill()
        await process.wait()


@pytest.mark.parametrize("name", ["receive.py", "receive.mjs"])
async def test_the_example_takes_what_is_signed_now_and_nothing_else(name: str) -> None:
    node = shutil.which("node")
    if name.endswith(".mjs") and node is None:
        assert "CI" not in os.environ, "node is missing"
        pytest.skip("node is missing here")
    program = node if name.endswith(".mjs") else sys.executable
    now = datetime.now(UTC)
    body = b'{"type": "job.completed", "data": {"id": "j1", "status": "completed"}}'
    good = OF_DEFAULT.sign("j1:1:completed", now, body)
    old = OF_DEFAULT.sign("j1:1:completed", now - timedelta(hours=1), body)
    other = webhooks.Secret.parse(SECRET).of_tenant("other").sign("j1:1:completed", now, body)
    both = good | {"webhook-signature": f"{other['webhook-signature']} {good['webhook-signature']}"}
    async with example(program, str(EXAMPLES / name)) as (printed, port), httpx.AsyncClient(timeout=BOUND_S) as client:
        answers = [
            (await client.post(f"http://127.0.0.1:{port}/", content=sent, headers=headers)).status_code
            for sent, headers in (
                (body, {}), (body, old), (body, other), (body + b" ", good), (body, good | {"webhook-id": "x"}),
                (body, good), (body, both),
            )
        ]  # fmt: skip
        async with asyncio.timeout(BOUND_S):
            line = await printed.readline()

    assert answers == [400, 400, 400, 400, 400, 204, 204]
    assert line == b"job.completed j1 completed\n"
