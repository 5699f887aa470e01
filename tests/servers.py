"""Starts real servers for tests. One that is not installed skips at home and fails in CI."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from vidgen import bus, topology
from vidgen.local import LocalError, NatsServer


@contextlib.contextmanager
def skipped_at_home() -> Iterator[None]:
    try:
        yield
    except LocalError as exc:
        if exc.code != "not_installed" or os.environ.get("CI"):
            raise
        pytest.skip(exc.message)


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
) -> AsyncIterator[bus.JetStreamBus]:
    """A connection to a server with the topology in place; it reconnects without waiting."""
    async with bus.connect(server.url, name, reconnect_time_wait=0.05) as connected:
        await bus.bootstrap(connected, wanted or topology.Topology())
        yield connected
