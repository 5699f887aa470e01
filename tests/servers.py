"""Starts real servers, and whole systems, for tests. A server that is not installed skips at home and fails in CI."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest

from vidgen import bootstrap, jetstream, topology
from vidgen.client import AsyncClient
from vidgen.contracts import STAGES, Job, Stage
from vidgen.jetstream import JetStreamBus
from vidgen.local import LocalError, NatsServer, S3Server, Stack
from vidgen.local.stack import Service


@contextlib.contextmanager
def skipped_at_home() -> Iterator[None]:
    try:
        yield
    except LocalError as exc:
        if exc.code != "not_installed" or os.environ.get("CI"):
            raise
        pytest.skip(exc.message)


@contextlib.contextmanager
def held_ports(ports: Sequence[int]) -> Iterator[list[int]]:
    """Ports of the loopback interface for servers that must be told theirs, 0 for one that nobody has.

    They stay bound, so that nobody who wants just any port is given one of them; who names one may listen there.
    """
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in ports]
        for one, port in zip(sockets, ports, strict=True):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("127.0.0.1", port))
        yield [one.getsockname()[1] for one in sockets]


@contextlib.asynccontextmanager
async def running_nats(folder: Path) -> AsyncIterator[NatsServer]:
    """A fresh nats-server: it starts in milliseconds, so every test has its own."""
    server = NatsServer(folder, sync_always=False)  # the tests kill processes, they do not cut the power
    with skipped_at_home():
        await server.start()
    try:
        yield server
    finally:
        await server.kill()


@contextlib.asynccontextmanager
async def connected_bus(
    server: NatsServer, wanted: topology.Topology | None = None, name: str = "test"
) -> AsyncIterator[JetStreamBus]:
    """A connection to a server with the topology in place; it reconnects without waiting."""
    async with jetstream.connect(server.url, name, reconnect_time_wait=0.05) as connected:
        await bootstrap.ensure(connected, wanted or topology.Topology())
        yield connected


@contextlib.asynccontextmanager
async def running_gateways(
    count: int, nats: NatsServer, s3: S3Server, folder: Path, **settings: str
) -> AsyncIterator[list[Service]]:
    """Replicas of the gateway, as processes."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("VIDGEN_")} | {
        "PYTHONPATH": os.pathsep.join(sys.path), "VIDGEN_NATS_URL": nats.url, "VIDGEN_S3_ENDPOINT": s3.endpoint,
        "VIDGEN_S3_ACCESS_KEY": s3.access_key, "VIDGEN_S3_SECRET_KEY": s3.secret_key, "VIDGEN_S3_BUCKET": s3.bucket,
        "VIDGEN_HTTP_PORT": "0", "VIDGEN_LOG_FORMAT": "json", **settings,
    }  # fmt: skip
    replicas = [Service(f"gateway-{n}", "gateway.main", folder, env) for n in range(count)]
    try:
        await asyncio.gather(*(replica.start() for replica in replicas))
        yield replicas
    finally:
        for replica in replicas:
            replica.kill()


@contextlib.contextmanager
def running_stack(
    folder: Path, env: dict[str, str], stages: Sequence[Stage] = STAGES, kind: type[Stack] = Stack
) -> Iterator[Stack]:
    """The whole system: servers, gateway and the services of these stages as processes."""
    stack = kind(folder, env=env, stages=stages, ephemeral=True)
    with asyncio.Runner() as runner:
        with skipped_at_home():
            runner.run(stack.start())
        try:
            yield stack
        finally:
            runner.run(stack.stop())


async def finished(client: AsyncClient, job: Job, bound: float = 300.0) -> Job:
    """The job at its end."""
    async with asyncio.timeout(bound):
        async for update in client.watch(job.id):
            if isinstance(update, Job):
                return update
    raise AssertionError("the stream ended without the job")
