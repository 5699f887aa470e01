"""All workers leave in the middle of denoising: new ones go on from the checkpoints, and no step is done twice."""

from __future__ import annotations

import asyncio
import signal

from tests.fault.ledger import Ledger
from tests.fault.system import Lab
from tests.fault.worker import entries

from vidgen import contracts


async def campaign(lab: Lab, *, rounds: int) -> str:
    env = {"VIDGEN_CHECKPOINT_OVER_S": "0"}
    async with lab.system(workers=2, env=env, pace_s=0.05) as system:
        jobs = 2 * rounds
        await system.submit(jobs, steps=30, stages=["i2v"])
        for _ in range(rounds):
            await system.at_work()
            await asyncio.sleep(lab.chance.uniform(0.2, 0.8))
            await asyncio.gather(*(system.kill(worker, signal.SIGTERM) for worker in system.of("worker")))
        ends = await Ledger(system).audit()
        assert ends == {"completed": jobs}
        assert {child.ended for child in system.dead} == {0}
        resumed = sum(entry.what == "started" and entry.step > 0 for entry in entries(system.journals))
        assert resumed >= 1
        steps = [(entry.seed, entry.step) for entry in entries(system.journals) if entry.what == "step"]
        assert len(steps) == len(set(steps)) == 30 * jobs
        released = system.said(contracts.StageReleased)
        return (
            f"{rounds} rounds, {released} handed back, {resumed} resumed, no step of {len(steps)} twice: {dict(ends)}"
        )


async def test_workers_that_are_told_to_leave_lose_no_step(lab: Lab) -> None:
    await campaign(lab, rounds=2)
