"""A bus of three nodes: one is killed and comes back, leaders change, and nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import nats.errors
import pytest
from tests.fault.ledger import Ledger
from tests.fault.nursery import BOUND_S
from tests.fault.system import Lab
from tests.servers import held_ports

from vidgen import bootstrap, errors, jetstream, topology
from vidgen.local import NatsServer
from vidgen.local.process import POLL
from vidgen.local.servers import program


class Node(NatsServer):
    """One of three servers that keep every stream threefold; known to the others by `routes`."""

    def __init__(self, folder: Path, name: str, route: int, routes: list[int]) -> None:
        super().__init__(folder, sync_always=False)
        self._name, self._route, self._routes = name, route, routes

    def _config(self) -> str:
        urls = ", ".join(f"nats://127.0.0.1:{port}" for port in self._routes)
        own = f"name: fault\n listen: 127.0.0.1:{self._route}\n routes: [{urls}]\n"
        return f"server_name: {self._name}\ncluster {{ {own} }}\n" + super()._config()

    async def start(self) -> None:
        """As a node: ready when it listens, for the others may be missing until JetStream can answer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob("nats-server_*.ports"):
            stale.unlink()
        config = self.folder / "nats.conf"
        config.write_text(self._config())
        self.process.start([program("nats-server"), "-c", str(config)])
        async with asyncio.timeout(BOUND_S):
            while not self._read_ports():
                self.process.check()
                await asyncio.sleep(POLL)


@contextlib.asynccontextmanager
async def cluster(folder: Path) -> AsyncIterator[list[Node]]:
    with held_ports([0] * 3) as ports:
        nodes = [Node(folder / f"node-{n}", f"node-{n}", port, ports) for n, port in enumerate(ports)]
        try:
            await asyncio.gather(*(node.start() for node in nodes))
            yield nodes
        finally:
            for node in nodes:
                await node.kill()


async def campaign(lab: Lab, *, kills: int, stepdowns: int, jobs: int) -> str:
    async with cluster(lab.folder) as nodes:
        env = {"VIDGEN_STREAM_REPLICAS": "3"}
        async with lab.system(workers=2, nats=nodes[0], env=env) as system:
            moments = ["kill"] * kills + ["stepdown"] * stepdowns
            lab.chance.shuffle(moments)
            for number, moment in enumerate(moments):
                share = jobs * (number + 1) // len(moments) - len(system.asked)
                asking = asyncio.create_task(system.submit(share))
                await asyncio.sleep(lab.chance.uniform(0, 0.5))
                if moment == "kill":
                    node = lab.chance.choice(nodes)
                    await node.kill()
                    await asking
                    await node.start()
                else:
                    for stream in (topology.REQUESTS, topology.TASKS, topology.EVENTS, f"KV_{topology.JOBS_BUCKET}"):
                        with contextlib.suppress(nats.errors.Error, TimeoutError):
                            await system.bus.client.request(f"$JS.API.STREAM.LEADER.STEPDOWN.{stream}", b"", timeout=5)
                    await asking
            ends = await Ledger(system).audit()
            assert ends == {"completed": jobs}
            return f"{kills} nodes killed, {stepdowns} leader changes, {jobs} jobs: {json.dumps(dict(ends))}"


async def test_a_node_dies_and_leaders_change_and_nothing_is_lost(lab: Lab) -> None:
    await campaign(lab, kills=1, stepdowns=1, jobs=8)


async def test_a_conflict_stops_no_stream(tmp_path: Path) -> None:
    # Asked by `Nats-Expected-Last-Msg-Id` whether it was one with itself, every node stopped the stream for good.
    async with cluster(tmp_path) as nodes, asyncio.timeout(BOUND_S), jetstream.connect(nodes[0].url, "test") as bus:
        while True:  # the nodes have yet to find one another
            try:
                await bootstrap.ensure(bus, topology.Topology(replicas=3))
                break
            except errors.BusError:
                await asyncio.sleep(POLL)
        subject = topology.subject_of_events("j1")
        assert await bus.publish(subject, b"1", message_id="1", expect_last=0) == 1
        with pytest.raises(errors.ConflictError):
            await bus.publish(subject, b"another", message_id="2", expect_last=0)
        assert await bus.publish(subject, b"1", message_id="1", expect_last=0) == 1
        assert await bus.publish(subject, b"2", message_id="3", expect_last=1) == 2
