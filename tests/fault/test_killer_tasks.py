"""Tasks that take their process with them: given up after three tries alone, in seconds; no other task is harmed."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from tests.fault import memory
from tests.fault.ledger import Ledger
from tests.fault.system import Lab

from vidgen import contracts

# Nothing can come back by its lease within the bound of a test: what does was handed out again for its worker died.
LEASE = {"VIDGEN_ACK_WAIT": "900"}
# In the midst of its steps; before anybody can know that it is on the device; and while others are on it.
KERNELS = ("oom", "oom prepared", "oom finished")
WAYS = ("exit", "segv", "exit begun", "oom", "exit prepared", "exit finished")


async def campaign(
    lab: Lab, *, killers: int, jobs: int, ways: Sequence[str] = WAYS, env: Mapping[str, str] | None = None
) -> str:
    async with lab.system(workers=2, env=LEASE | dict(env or {})) as system:
        since = asyncio.get_running_loop().time()
        deadly = []
        for number in range(killers):
            deadly += await system.submit(stages=["edit"], told=ways[number % len(ways)])
            await system.submit(jobs * (number + 1) // killers - (len(system.asked) - len(deadly)))
        await system.until_ended(deadly)
        took = asyncio.get_running_loop().time() - since
        ends = await Ledger(system).audit()
        failed = {e.job_id: e.error.code for e in system.events if isinstance(e, contracts.JobFailed)}
        assert failed == {job.job_id: "attempts_exhausted" for job in deadly}
        assert ends == {"completed": jobs, "failed": killers}
        begun = [event for event in system.events if isinstance(event, contracts.StageStarted)]
        beside, alone = (Counter(e.job_id for e in begun if e.alone is way) for way in (False, True))
        assert {(beside[job_id], alone[job_id]) for job_id in failed} == {(1, 3)}
        assert {e.tries for e in begun if e.job_id not in failed} == {1}
        return f"{killers} killers among {jobs} jobs: all given up within {took:.0f} s: {dict(ends)}"


async def campaign_of_the_kernel(lab: Lab, *, killers: int, jobs: int) -> str:
    """Each worker is in a control group of its own, as in a container, and the kernel ends it."""
    with contextlib.ExitStack() as held:
        try:
            folder = held.enter_context(memory.groups())
        except OSError as exc:
            pytest.skip(f"no process's memory can be limited here: {exc}")
        told = await campaign(lab, killers=killers, jobs=jobs, ways=KERNELS, env={"FAULT_MEMORY": str(folder)})
        ended = memory.killed(folder)
        assert ended == 4 * killers  # each once beside others, and three times alone
        return f"{ended} workers ended by the kernel, {told}"


@pytest.mark.skipif("FAULT_GROUPS" not in os.environ, reason="makes control groups: FAULT_GROUPS=1")
async def test_tasks_whose_workers_the_kernel_ends_for_want_of_memory_are_given_up_as_well(lab: Lab) -> None:
    await campaign_of_the_kernel(lab, killers=2, jobs=4)


async def test_tasks_that_kill_their_workers_are_given_up_in_seconds_and_harm_no_other(lab: Lab) -> None:
    await campaign(lab, killers=6, jobs=6)
