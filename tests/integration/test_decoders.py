"""Images that end their decoders, given to a real gateway on a real bus and a real store: it is not ended by them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from PIL import Image
from tests import poison
from tests.servers import connected_bus, running_gateways

from vidgen import topology
from vidgen.artifacts import S3Store
from vidgen.client import AsyncClient, GatewayError
from vidgen.contracts import EditParams, JobStatus
from vidgen.jetstream import JetStreamBus
from vidgen.local import NatsServer, S3Server
from vidgen.local.stack import Service
from vidgen.settings import GatewaySettings

BOUND_S = 120.0
# What Python runs at each start, the decoder's among them.
HARMS_DECODERS = """
import sys
if "gateway.decoder" in sys.orig_argv:
    from tests import poison
    poison.images.inspect = poison.poisoned
"""


@pytest.fixture
async def gateway(nats_server: NatsServer, s3_server: S3Server, tmp_path: Path) -> AsyncIterator[Service]:
    (tmp_path / "sitecustomize.py").write_text(HARMS_DECODERS)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    async with running_gateways(1, nats_server, s3_server, tmp_path, PYTHONPATH=path) as [only]:
        yield only


@pytest.fixture
async def bus(nats_server: NatsServer, gateway: Service) -> AsyncIterator[JetStreamBus]:
    async with connected_bus(nats_server, topology.Topology()) as connected:
        yield connected


def image(folder: Path, colour: tuple[int, int, int]) -> Path:
    path = folder / f"{colour}.png"
    Image.new("RGB", (64, 48), colour).save(path)
    return path


async def rejected(client: AsyncClient, job_id: str) -> None:
    while True:
        with contextlib.suppress(GatewayError):  # it is not known yet
            if (await client.get(job_id)).status is JobStatus.REJECTED:
                return
        await asyncio.sleep(0.05)


def children(of: int) -> set[int]:
    """The processes that a process has started."""
    lists = Path(f"/proc/{of}/task").glob("*/children")
    return {int(pid) for one in lists for pid in one.read_text().split()}


async def test_a_gateway_outlives_images_that_end_their_decoders_by_both_doors(
    gateway: Service, bus: JetStreamBus, s3_server: S3Server, tmp_path: Path
) -> None:
    """One such upload ended the gateway, and one such request each gateway that it was given to."""
    own = GatewaySettings(
        s3_endpoint=s3_server.endpoint, s3_access_key=s3_server.access_key, s3_secret_key=s3_server.secret_key,
        s3_bucket=s3_server.bucket,
    )  # fmt: skip
    store = S3Store.from_settings(own)
    deadly = [poison.CRASHES, poison.ABORTS, poison.FILLS]
    for number, colour in enumerate(deadly):
        await store.put(f"uploads/{number}.png", image(tmp_path, colour), "image/png")
        asked = {"references": [f"uploads/{number}.png"], "edit": {"prompt": "x"}, "job_id": f"deadly-{number}"}
        await bus.publish("vidgen.requests", json.dumps(asked).encode(), message_id=f"m{number}")
    async with AsyncClient(gateway.url) as client, asyncio.timeout(BOUND_S):
        for colour in deadly:
            with pytest.raises(GatewayError) as refused:
                await client.submit(images=[image(tmp_path, colour)], edit=EditParams(prompt="x"))
            assert refused.value.status == 422
        let_in = await client.submit(images=[image(tmp_path, (9, 9, 9))], edit=EditParams(prompt="x"))
        assert let_in.status is JobStatus.QUEUED
        for number in range(len(deadly)):
            await rejected(client, f"deadly-{number}")
        # What was turned away is told before it is acked.
        while (await bus.depth(topology.Consumer(topology.REQUESTS, topology.GATEWAY))).waiting:
            await asyncio.sleep(0.05)
    assert gateway.running
    log = (tmp_path / "gateway-0.log").read_text()
    assert "undigested" not in log


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
async def test_decoders_leave_with_their_gateway_however_it_ends(
    gateway: Service, tmp_path: Path, end: signal.Signals
) -> None:
    async with AsyncClient(gateway.url) as client:
        await client.submit(images=[image(tmp_path, (9, 9, 9))], edit=EditParams(prompt="x"))
    decoders = [os.pidfd_open(pid) for pid in children(gateway.pid)]
    assert decoders
    gateway.process.signal(end)
    for decoder in decoders:
        left = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(decoder, lambda left=left: left.done() or left.set_result(None))
        await asyncio.wait_for(left, BOUND_S)
        asyncio.get_running_loop().remove_reader(decoder)
        os.close(decoder)
