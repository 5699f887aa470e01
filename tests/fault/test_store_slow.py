"""The way to the store carries one megabyte a second."""

from __future__ import annotations

from collections import Counter
from urllib.parse import urlsplit

from tests.fault.ledger import Ledger
from tests.fault.proxy import HttpProxy
from tests.fault.system import Lab


async def campaign(lab: Lab, *, jobs: int, size: int) -> str:
    store = urlsplit(lab.s3.endpoint)
    async with HttpProxy(store.hostname or "", store.port or 0, lab.seed) as proxy:
        proxy.bytes_per_s = 1e6
        env = {"FAULT_PAD": str(size)}
        async with lab.system(workers=2, env=env, s3_endpoint=f"http://127.0.0.1:{proxy.port}") as system:
            await system.submit(jobs)
            ends = await Ledger(system, pad=size).audit()
            assert ends == {"completed": jobs}
            assert proxy.stored == system.artifacts() == Counter(proxy.stored.keys())  # each with its manifest, once
            told = f"1 MB/s, files of {size / 1e6} MB, {proxy.stored.total()} uploads of as many artifacts"
            return f"{told}, {jobs} jobs: {dict(ends)}"


async def test_a_slow_store_delays_and_harms_nothing(lab: Lab) -> None:
    await campaign(lab, jobs=4, size=400_000)
