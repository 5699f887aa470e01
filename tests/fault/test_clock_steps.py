"""Wall clocks step by an hour, forwards and back, differently on each process, while jobs run."""

from __future__ import annotations

import asyncio

from tests.fault.ledger import Ledger
from tests.fault.system import Lab

HOUR = 3600.0


async def campaign(lab: Lab, *, steps: int, jobs: int) -> str:
    clocks = [lab.folder / f"clock-{number}" for number in range(3)]
    async with lab.system(gateways=0, workers=0, pace_s=0.02) as system:
        for role, clock in zip(("gateway", "worker", "worker"), clocks, strict=True):
            system.start(role, FAULT_CLOCK=str(clock))
        await system.until_ready()
        for step in range(steps):
            await system.submit(jobs * (step + 1) // steps - len(system.asked), deadline_s=86400)
            for clock in clocks:
                clock.write_text(str(lab.chance.choice((-HOUR, 0.0, HOUR))))
            await asyncio.sleep(lab.chance.uniform(0.1, 0.5))
        ends = await Ledger(system).audit()
        assert ends == {"completed": jobs}
        timings = [e.timings for e in system.events if hasattr(e, "timings")]
        assert all(0 <= value < HOUR / 2 for told in timings for name, value in told if name != "queued")
        return f"{steps} steps of three clocks, {jobs} jobs: {dict(ends)}"


async def test_clocks_that_step_by_an_hour_lose_no_job_and_bend_no_duration(lab: Lab) -> None:
    await campaign(lab, steps=4, jobs=8)
