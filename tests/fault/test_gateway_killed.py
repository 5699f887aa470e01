"""Gateways are killed while they let requests in, decide, and write records; there are two of them."""

from __future__ import annotations

import asyncio

from tests.fault.ledger import Ledger
from tests.fault.system import Lab

LEASE = {"VIDGEN_ACK_WAIT": "10"}  # what a dead gateway held comes back when it has run out


async def campaign(lab: Lab, *, kills: int, jobs: int) -> str:
    async with lab.system(gateways=2, workers=1, env=LEASE) as system:
        for number in range(kills):
            share = jobs * (number + 1) // kills - len(system.asked)
            asking = asyncio.create_task(system.submit(share))
            await asyncio.sleep(lab.chance.uniform(0, 0.2))
            ready = [gateway for gateway in system.of("gateway") if gateway.url]
            await system.kill(lab.chance.choice(ready))
            await asking
            await system.until(lambda: any(gateway.url for gateway in system.of("gateway")))
        ends = await Ledger(system, counters=False).audit()
        assert ends == {"completed": jobs}
        return f"{kills} kills, {jobs} jobs: {dict(ends)}"


async def test_gateways_are_killed_at_any_moment_and_each_job_completes_once(lab: Lab) -> None:
    await campaign(lab, kills=3, jobs=12)
