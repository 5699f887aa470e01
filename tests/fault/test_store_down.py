"""The S3 server is killed under load, and comes back on its data: nothing fails, nothing is done twice."""

from __future__ import annotations

import asyncio

from tests.fault.ledger import Ledger
from tests.fault.system import Lab

from vidgen.local import S3Server


async def campaign(lab: Lab, *, outages: tuple[float, ...], jobs: int) -> str:
    folder = lab.folder / "s3"
    folder.mkdir()
    store = S3Server(folder)  # its own: other tests go on
    await store.start()
    try:
        async with lab.system(workers=2, s3=store) as system:
            for number, seconds in enumerate(outages):
                share = jobs * (number + 1) // len(outages) - len(system.asked)
                beginning = asyncio.create_task(system.at_work())
                await system.submit(share)
                await beginning
                await store.kill()
                await asyncio.sleep(seconds)
                await store.start()
            ends = await Ledger(system).audit()
            assert ends == {"completed": jobs}
            assert system.tries() == {1}
            return f"away for {outages} s, {jobs} jobs: {dict(ends)}"
    finally:
        await store.kill()


async def test_the_store_is_away_and_each_job_completes_without_a_second_try(lab: Lab) -> None:
    await campaign(lab, outages=(1.0,), jobs=8)
