"""Requests come one to five times; events come again and out of order to gateways that stood still in between."""

from __future__ import annotations

import asyncio
import signal

from tests.fault.ledger import Ledger
from tests.fault.system import Lab

LEASE = {"VIDGEN_ACK_WAIT": "2"}
STILL_S = 3.0  # longer than the lease: what a gateway holds meanwhile goes to the other one, and then it acts on it too


async def campaign(lab: Lab, *, jobs: int, stops: int) -> str:
    copies = 0

    def number() -> int:
        nonlocal copies
        drawn = lab.chance.randint(1, 5)
        copies += drawn
        return drawn

    async with lab.system(gateways=2, workers=2, env=LEASE, pace_s=0.05) as system:
        for stop in range(stops):
            share = jobs * (stop + 1) // stops - len(system.asked)
            asking = asyncio.create_task(system.submit(share, copies=number))
            await asyncio.sleep(lab.chance.uniform(0, 0.5))
            still = lab.chance.choice(system.of("gateway"))
            still.signal(signal.SIGSTOP)
            await asyncio.sleep(STILL_S)
            still.signal(signal.SIGCONT)
            await asking
        workers = {system.id_of(worker.name) for worker in system.of("worker")}  # their leases are as short
        ends = await Ledger(system, overtaken=workers, exact=False).audit()
        assert ends == {"completed": jobs}
        return f"{jobs} requests published {copies} times, {stops} stops of {STILL_S} s: {dict(ends)}"


async def test_what_comes_twice_and_out_of_order_is_one_job(lab: Lab) -> None:
    await campaign(lab, jobs=8, stops=1)
