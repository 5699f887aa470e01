"""All workers leave in the middle of denoising: new ones go on from the checkpoints, and no step is done twice."""

from __future__ import annotations

import asyncio
import signal

from tests.fault.ledger import Ledger
from tests.fault.system import Lab, System
from tests.fault.worker import entries

from vidgen import contracts

STEPS = 40


def step_of(system: System) -> int:
    """How far the furthest task is that a worker is at. The engines say so themselves: events may come late."""
    alive = {worker.pid for worker in system.of("worker")}
    last = {entry.pid: entry for entry in entries(system.journals) if entry.pid in alive}
    return max((entry.step for entry in last.values() if entry.what == "step"), default=0)


async def campaign(lab: Lab, *, rounds: int) -> str:
    env = {"VIDGEN_CHECKPOINT_OVER_S": "0"}
    async with lab.system(workers=2, env=env, pace_s=0.05) as system:
        jobs = 2 * rounds
        await system.submit(jobs, steps=STEPS, stages=["i2v"])
        for _ in range(rounds):
            step = lab.chance.randint(4, 16)
            await system.until(lambda step=step: step_of(system) >= step)
            await asyncio.gather(*(system.kill(worker, signal.SIGTERM) for worker in system.of("worker")))
        ends = await Ledger(system).audit()
        assert ends == {"completed": jobs}
        # One that began only just now, before it could hear of a signal, may end by it.
        badly = [child for child in system.dead if child.ended not in ((0,) if child.url else (0, -signal.SIGTERM))]
        assert not badly, f"{badly[0].name} ended with {badly[0].ended}:\n{badly[0].log.read_text()[-4000:]}"
        resumed = sum(entry.what == "started" and entry.step > 0 for entry in entries(system.journals))
        assert resumed >= 1
        steps = [(entry.seed, entry.step) for entry in entries(system.journals) if entry.what == "step"]
        assert len(steps) == len(set(steps)) == STEPS * jobs
        released = system.said(contracts.StageReleased)
        return (
            f"{rounds} rounds, {released} handed back, {resumed} resumed, no step of {len(steps)} twice: {dict(ends)}"
        )


async def test_workers_that_are_told_to_leave_lose_no_step(lab: Lab) -> None:
    await campaign(lab, rounds=2)
