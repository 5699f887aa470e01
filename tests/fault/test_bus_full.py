"""The bus takes no more: 503 with Retry-After at the edge and nothing half accepted, or 202 and the job is done."""

from __future__ import annotations

import json
from typing import Any

import httpx
from tests.fault.ledger import Ledger
from tests.fault.system import PHOTO, Asked, Lab, System

from vidgen import topology


async def limit(system: System, stream: str, max_bytes: int) -> None:
    js = system.bus.jetstream
    config = (await js.stream_info(stream)).config
    await js.update_stream(config.evolve(max_bytes=max_bytes))


async def ask(system: System, seed: int, reference: str = PHOTO) -> httpx.Response:
    shape = {"steps": 2, "seed": seed, "width": 320, "height": 192}
    body: dict[str, Any] = {"references": [reference], "edit": {"prompt": "work", **shape}}
    async with httpx.AsyncClient(base_url=system.of("gateway")[0].url, timeout=60) as http:
        key = {"Idempotency-Key": f"{system.prefix}-{seed}"}
        return await http.post("/v1/jobs", content=json.dumps(body), headers=key | {"Content-Type": "application/json"})


async def let_in(system: System, seed: int) -> None:
    """The same request again, now that there is room: by its key it is the same job."""
    answer = await ask(system, seed)
    assert answer.status_code == 202, answer.text
    job_id = answer.json()["id"]
    system.asked[job_id] = Asked(job_id, seed, 2, ("edit",), "work")


async def campaign(lab: Lab, *, jobs: int) -> str:
    async with lab.system(workers=1) as system:
        for seed in range(1, jobs + 1):
            await limit(system, topology.REQUESTS, 1)
            answer = await ask(system, seed)
            assert answer.status_code == 503, answer.text
            assert answer.json()["code"] == "queue_full"
            assert int(answer.headers["retry-after"]) > 0
            for stream in (topology.REQUESTS, topology.TASKS, topology.HISTORY):  # nothing of it is anywhere
                assert (await system.bus.held(stream)).messages in (0, seed - 1)
            assert len(await system.bus.records(topology.JOBS_BUCKET).all()) == seed - 1
            await limit(system, topology.REQUESTS, 1 << 30)
            await let_in(system, seed)
            await system.until_ended()
        for seed in range(jobs + 1, 2 * jobs + 1):
            await limit(system, topology.TASKS, 1)
            await let_in(system, seed)  # on the bus already: what cannot be queued now is queued later
            await limit(system, topology.TASKS, 1 << 30)
        ends = await Ledger(system).audit()
        assert ends == {"completed": 2 * jobs}
        return f"{jobs} refused with 503 and then let in, {jobs} let in before there was room for tasks: {dict(ends)}"


async def test_a_full_bus_is_told_at_the_edge_and_nothing_is_half_accepted(lab: Lab) -> None:
    await campaign(lab, jobs=2)
