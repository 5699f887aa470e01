"""Workers are killed at random moments: fetching, at each step, encoding, between store, publish and ack."""

from __future__ import annotations

import asyncio
from collections import Counter

from tests.fault.ledger import Ledger
from tests.fault.system import Lab

from vidgen import contracts

# Longer than a machine stalls; what was handed to a worker that had not yet said so waits for it to run out.
LEASE = {"VIDGEN_ACK_WAIT": "15"}


async def campaign(lab: Lab, *, kills: int, jobs: int) -> str:
    async with lab.system(workers=3, env=LEASE) as system:
        for number in range(kills):
            share = jobs * (number + 1) // kills - len(system.asked)
            beginning = asyncio.create_task(system.at_work())
            await system.submit(share)
            victim = await beginning
            await asyncio.sleep(lab.chance.uniform(0, 0.15))  # what is drawn: a moment in the life of a task
            await system.kill(victim)
        ends = await Ledger(system).audit()
        # What lost its worker three times is given up: nobody can tell bad luck from a task that kills.
        assert ends["completed"] + ends["failed"] == jobs
        failed = {e.job_id: e.error.code for e in system.events if isinstance(e, contracts.JobFailed)}
        assert set(failed.values()) <= {"attempts_exhausted"}
        starts = Counter(e.job_id for e in system.events if isinstance(e, contracts.StageStarted))
        assert all(starts[job_id] >= 3 for job_id in failed)
        return f"{kills} kills, {jobs} jobs: {dict(ends)}"


async def test_workers_are_killed_at_any_moment_and_each_job_ends_once(lab: Lab) -> None:
    await campaign(lab, kills=5, jobs=15)
