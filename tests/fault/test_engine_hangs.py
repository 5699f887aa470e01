"""An engine hangs: its worker is unhealthy and leaves, its task is handed on, and given up where every engine hangs."""

from __future__ import annotations

from tests.fault.ledger import Ledger
from tests.fault.system import Lab

from vidgen import contracts

WAYS = ("hang", "hang prepared", "hang finished")
QUICK = {"VIDGEN_HANG_FIRST_S": "3", "VIDGEN_HANG_LEAST_S": "3", "VIDGEN_ACK_WAIT": "900"}


async def campaign(lab: Lab, *, hangs: int, jobs: int) -> str:
    async with lab.system(workers=1, env=QUICK) as system:
        stuck = system.start("worker", FAULT_HANGS="1")
        await stuck.until_ready()
        # It comes back sound: nobody can tell whose fault a hang was, so three of them end a sound task, too.
        system.own_env[stuck.name].pop("FAULT_HANGS")
        poison = [
            job
            for number in range(hangs)
            for job in await system.submit(stages=["edit"], told=WAYS[number % len(WAYS)])
        ]
        await system.submit(jobs)
        await system.until_ended(poison)
        await system.until(lambda: stuck.ended is not None)
        ends = await Ledger(system).audit()
        assert ends == {"completed": jobs, "failed": hangs}
        codes = {event.error.code for event in system.events if isinstance(event, contracts.StageFailed)}
        assert codes == {"engine_hung"}
        assert stuck.ended == 1
        left = sum(child.role == "worker" for child in system.dead)
        return f"{left} workers hung and left, {jobs} jobs beside: {dict(ends)}"


async def test_a_worker_whose_engine_hangs_hands_its_task_on_and_leaves(lab: Lab) -> None:
    await campaign(lab, hangs=3, jobs=4)
