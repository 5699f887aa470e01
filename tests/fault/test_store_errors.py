"""One call to the store in five goes wrong: refused with 503, cut off in its body, or its answer lost."""

from __future__ import annotations

from collections import Counter
from typing import Any
from urllib.parse import urlsplit

from tests.fault.ledger import Ledger
from tests.fault.proxy import HttpProxy
from tests.fault.system import Lab


async def campaign(lab: Lab, *, jobs: int, share: float = 0.2, **proxy_is: Any) -> str:
    store = urlsplit(lab.s3.endpoint)
    async with (
        HttpProxy(store.hostname or "", store.port or 0, lab.seed) as proxy,
        lab.system(workers=2, s3_endpoint=f"http://127.0.0.1:{proxy.port}") as system,
    ):
        proxy.failing = share
        for name, value in proxy_is.items():
            setattr(proxy, name, value)
        await system.submit(jobs)
        ends = await Ledger(system).audit()
        assert ends == {"completed": jobs}
        assert any(proxy.failed.values())
        assert proxy.stored == system.artifacts() == Counter(proxy.stored.keys())  # a second only where one was unheard
        told = f"{proxy.stored.total()} uploads answered, {proxy.unheard.total()} more of which the answer was lost"
        return f"{dict(proxy.failed)} calls, {told}, {jobs} jobs: {dict(ends)}"


async def test_a_store_that_fails_one_call_in_five_fails_no_job(lab: Lab) -> None:
    await campaign(lab, jobs=8)
