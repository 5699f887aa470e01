"""A worker is cut off from the bus for longer than its lease: another one takes its task, then it comes back."""

from __future__ import annotations

from tests.fault.ledger import Ledger
from tests.fault.nursery import Child
from tests.fault.proxy import Proxy
from tests.fault.system import Lab

from vidgen import contracts

LEASE = {"VIDGEN_ACK_WAIT": "5"}


async def campaign(lab: Lab, *, cuts: int) -> str:
    async with (
        lab.nats() as nats,
        Proxy("127.0.0.1", nats.port) as proxy,
        lab.system(workers=0, nats=nats, env=LEASE, pace_s=0.1) as system,
    ):
        cut_off = system.start("worker", VIDGEN_NATS_URL=f"nats://127.0.0.1:{proxy.port}")
        await cut_off.until_ready()
        for _ in range(cuts):
            # Long enough for the old attempt to be under way when it is back: it comes to its end, too late.
            [job] = await system.submit(steps=40, stages=["edit"])
            await system.until(lambda job=job: system.said(contracts.StageStarted, job) == 1)
            proxy.cut()
            other = system.start("worker")
            await system.until(lambda job=job: system.said(contracts.StageStarted, job) == 2)
            if lab.chance.random() < 0.5:
                await system.until_ended([job])
            proxy.heal()
            await system.until_ended([job])
            system.restarts = False
            await system.kill(other)
            system.restarts = True
        ends = await Ledger(system, overtaken={system.id_of(cut_off.name)}).audit()
        assert ends == {"completed": cuts}
        await system.until(lambda: _outcomes(cut_off).count("fenced") == cuts)
        return f"{cuts} cuts: {dict(ends)}, the old attempt {_outcomes(cut_off)}"


def _outcomes(worker: Child) -> list[str]:
    return [record["outcome"] for record in worker.records() if record.get("event") == "task"]


async def test_a_worker_that_was_cut_off_settles_nothing_when_it_is_back(lab: Lab) -> None:
    await campaign(lab, cuts=1)
