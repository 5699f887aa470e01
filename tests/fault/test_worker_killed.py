"""Workers are killed at random moments: fetching, at each step, encoding, between store, publish and ack."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from tests.fault.ledger import Ledger
from tests.fault.nursery import Child
from tests.fault.system import Lab, System
from tests.fault.worker import entries

from vidgen import contracts

# Longer than a machine stalls; what was handed to a worker that had not yet said so waits for it to run out.
LEASE = {"VIDGEN_ACK_WAIT": "15"}
MOMENTS = ("fetching", "at a step", "encoding or storing", "told")
MANY = 200  # kills that strike each of them


async def campaign(lab: Lab, *, kills: int, jobs: int) -> str:
    async with lab.system(workers=3, env=LEASE) as system:
        victims = []
        for number in range(kills):
            share = jobs * (number + 1) // kills - len(system.asked)
            beginning = asyncio.create_task(system.at_work())
            await system.submit(share)
            victim = await beginning
            # What is drawn: a moment in the life of a task, one in five at its very beginning, which is short.
            await asyncio.sleep(max(0.0, lab.chance.uniform(-0.07, 0.25)))
            await system.kill(victim)
            victims.append(victim)
        ends = await Ledger(system).audit()
        # What lost its worker three times is given up: nobody can tell bad luck from a task that kills.
        assert ends["completed"] + ends["failed"] == jobs
        failed = {e.job_id: e.error.code for e in system.events if isinstance(e, contracts.JobFailed)}
        assert set(failed.values()) <= {"attempts_exhausted"}
        starts = Counter(e.job_id for e in system.events if isinstance(e, contracts.StageStarted))
        assert all(starts[job_id] >= 3 for job_id in failed)
        struck = moments(system, victims)
        assert kills < MANY or struck.keys() == {*MOMENTS}, struck
        reused = sum(e.reused for e in system.events if isinstance(e, contracts.StageCompleted))
        return f"{kills} kills ({dict(struck)}), {reused} results found again, {jobs} jobs: {dict(ends)}"


def moments(system: System, victims: Sequence[Child]) -> Counter[str]:
    """Where each worker was as it was killed, as far as its engine's journal and the log tell."""
    last = {entry.pid: entry for entry in entries(system.journals)}
    told = {(e.worker, e.job_id, e.stage) for e in system.events if isinstance(e, contracts.StageCompleted)}
    begun = {e.worker: (e.worker, e.job_id, e.stage) for e in system.events if isinstance(e, contracts.StageStarted)}
    jobs = {asked.seed: asked.job_id for asked in system.asked.values()}
    struck: Counter[str] = Counter()
    for victim in victims:
        entry, name = last.get(victim.pid), system.id_of(victim.name)
        done = (name, jobs[entry.seed], entry.stage) if entry is not None else None
        if entry is not None and entry.what != "done":
            struck["at a step"] += 1
        elif done is not None and done not in told:
            struck["encoding or storing"] += 1
        else:  # with what it had told behind it, a worker may have the next one in hand
            struck["told" if done == begun[name] else "fetching"] += 1
    return struck


async def test_workers_are_killed_at_any_moment_and_each_job_ends_once(lab: Lab) -> None:
    await campaign(lab, kills=5, jobs=15)
