"""The NATS server is killed and started again on its data, while publishers go on until they are acknowledged."""

from __future__ import annotations

import asyncio

from tests.fault.ledger import Ledger
from tests.fault.system import Lab


async def campaign(lab: Lab, *, kills: int, jobs: int, lease_s: int = 60) -> str:
    """What was on its way as the bus died comes back when its lease has run out."""
    async with lab.system(workers=2, env={"VIDGEN_ACK_WAIT": str(lease_s)}) as system:
        for number in range(kills):
            share = jobs * (number + 1) // kills - len(system.asked)
            asking = asyncio.create_task(system.submit(share))
            await asyncio.sleep(lab.chance.uniform(0, 0.3))
            await system.nats.kill()
            await asyncio.sleep(lab.chance.uniform(0, 0.5))
            await system.nats.start()
            await asking
        ends = await Ledger(system).audit()
        assert ends == {"completed": jobs}
        return f"{kills} kills, {len(system.asked)} acknowledged requests, 0 lost: {dict(ends)}"


async def test_the_bus_is_killed_and_no_acknowledged_request_is_lost(lab: Lab) -> None:
    await campaign(lab, kills=2, jobs=12, lease_s=10)
