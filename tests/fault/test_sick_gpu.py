"""A worker that fails whatever it touches, beside a healthy one, comes back sick each time it is started again."""

from __future__ import annotations

from tests.fault.ledger import Ledger
from tests.fault.system import Lab

from vidgen import contracts, topology


async def campaign(lab: Lab, *, jobs: int) -> str:
    async with lab.system(workers=1, pace_s=0.03) as system:
        sick = system.start("worker", FAULT_SICK="1")
        await sick.until_ready()
        await system.submit(jobs)
        ends = await Ledger(system).audit()
        assert ends == {"completed": jobs}
        left = [child.ended for child in system.dead]
        assert set(left) == {1}
        released = system.said(contracts.StageReleased)
        assert released >= 1
        assert system.tries() == {1}
        assert (await system.bus.held(topology.DEAD)).messages == 0
        return f"it left {len(left)} times, {released} tasks handed back, {jobs} jobs: {dict(ends)}"


async def test_a_sick_worker_leaves_and_costs_no_task_a_try(lab: Lab) -> None:
    await campaign(lab, jobs=12)
