"""One process for both stages, as machines with one GPU have it: mixed queues, turns on the device, a kill, a drain."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.servers import finished, skipped_at_home

from vidgen.client import AsyncClient
from vidgen.contracts import EditParams, I2VParams, JobStatus, StageReleased, StageStarted, VideoRequest
from vidgen.local import Service, Stack

Stacked = TypeVar("Stacked", bound="OneGpu")

PHOTO = Path(__file__).parents[2] / "examples" / "portrait.jpg"
ROOT = Path(__file__).parents[2]
BOUND = 180.0
SMALL = {"width": 320, "height": 192}

pytestmark = pytest.mark.timeout(600)


class OneGpu(Stack):
    """A stack whose workers are one process, as if there were a GPU with weights; its engines are those of `kind`."""

    kind: tuple[str, Sequence[str]] = ("vidgen.cli", ("worker", "--stages", "edit,i2v"))
    one_gpu = True

    def _kinds(self) -> Iterator[tuple[str, str, Sequence[str]]]:
        yield "worker", *self.kind

    @property
    def worker(self) -> Service:
        [worker] = self.services[1:]
        return worker


class TakingTurns(OneGpu):
    kind = ("tests.zoo_service", ("edit,i2v", "Naps"))


class Held(OneGpu):
    """Its engines hold the device until the file `released` is there."""

    kind = ("tests.zoo_service", ("edit,i2v", "Paced"))


class Unfit(OneGpu):
    kind = ("tests.zoo_service", ("edit,i2v", "FullBesideAHang"))


async def running(stack: Stacked) -> AsyncIterator[Stacked]:
    with skipped_at_home():
        await stack.start()
    try:
        yield stack
    finally:
        await stack.stop()


ENV = {
    "VIDGEN_ENGINE": "preview", "VIDGEN_PREVIEW_SECONDS_PER_STEP": "0.05",
    "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
}  # fmt: skip


@pytest.fixture
def lease() -> float:
    """Seconds after which a task of a silent worker is free: long, since a busy machine is silent at times."""
    return 60.0


@pytest.fixture
async def stack(tmp_path: Path, lease: float) -> AsyncIterator[OneGpu]:
    async for started in running(OneGpu(tmp_path, env=ENV | {"VIDGEN_ACK_WAIT": str(lease)}, ephemeral=True)):
        yield started


@pytest.fixture
async def turns(tmp_path: Path) -> AsyncIterator[OneGpu]:
    async for started in running(TakingTurns(tmp_path, env=ENV, ephemeral=True)):
        yield started


@pytest.fixture
async def held(tmp_path: Path) -> AsyncIterator[Held]:
    env = ENV | {"ZOO_RELEASED": str(tmp_path / "released")}
    async for started in running(Held(tmp_path, env=env, ephemeral=True)):
        yield started


@pytest.fixture
async def unfit(tmp_path: Path) -> AsyncIterator[Unfit]:
    async for started in running(Unfit(tmp_path, env=ENV | {"VIDGEN_HANG_LEAST_S": "1"}, ephemeral=True)):
        yield started


def request(*, edit: bool = True, i2v: bool = True, steps: int = 2) -> VideoRequest:
    parts: dict[str, Any] = {"references": ("uploads/from-the-form",)}
    if edit:
        parts["edit"] = EditParams.model_validate({"prompt": "warm light", "steps": steps, "seed": 7} | SMALL)
    if i2v:
        frames = {"num_frames": 9, "fps": 8}
        parts["i2v"] = I2VParams.model_validate({"prompt": "zoom in", "steps": steps, "seed": 7} | SMALL | frames)
    return VideoRequest.model_validate(parts)


MIXED = [request(), request(i2v=False), request(edit=False), request(), request(edit=False)]


async def exposition(url: str) -> str:
    async with httpx.AsyncClient(timeout=BOUND) as http:
        return (await http.get(f"{url}/metrics")).text


def total(text: str, name: str, **labels: str) -> float:
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


async def test_one_process_serves_a_mixed_queue_of_both_stages_to_its_end(stack: OneGpu, client: AsyncClient) -> None:
    jobs = [await client.submit(wish, images=[PHOTO]) for wish in MIXED]
    ended = await asyncio.gather(*(finished(client, job, BOUND) for job in jobs))
    assert [job.status for job in ended] == [JobStatus.COMPLETED] * 5, [job.error for job in ended]

    alive = await client.workers()
    assert [(worker.stage, worker.engine) for worker in alive] == [("edit", "preview"), ("i2v", "preview")]
    assert len({worker.id for worker in alive}) == 1
    async with asyncio.timeout(BOUND):
        # The job is done a moment before its worker has counted that.
        while total(text := await exposition(stack.worker.url), "vidgen_worker_tasks_total", outcome="completed") < 7:
            await asyncio.sleep(0.05)
    described = [line for line in text.splitlines() if line.startswith("# HELP")]
    assert len(described) == len(set(described))
    for stage, count in (("edit", 3), ("i2v", 4)):
        assert total(text, "vidgen_worker_tasks_total", stage=stage, outcome="completed") == count
        assert total(text, "vidgen_worker_state", stage=stage) == 1
    assert total(text, "vidgen_worker_switch_seconds_count") == 0
    figures = [line for line in text.splitlines() if line.startswith("vidgen_worker_gpu_memory_total_bytes{")]
    assert len(figures) == 1


async def test_models_that_do_not_fit_together_take_turns_and_every_job_is_done(turns: OneGpu) -> None:
    async with AsyncClient(turns.gateway_url) as client:
        jobs = [await client.submit(wish, images=[PHOTO]) for wish in MIXED]
        ended = await asyncio.gather(*(finished(client, job, BOUND) for job in jobs))

    assert [job.status for job in ended] == [JobStatus.COMPLETED] * 5, [job.error for job in ended]
    text = await exposition(turns.worker.url)
    assert total(text, "vidgen_worker_switch_seconds_count", stage="i2v") >= 1
    assert total(text, "vidgen_worker_info", profile="resident-fp8") == 2
    assert "Traceback" not in turns.worker.process.log.read_text()


@pytest.mark.parametrize("lease", [15.0])
async def test_a_process_that_is_killed_in_a_task_of_one_stage_leaves_those_of_both_to_the_next(
    stack: OneGpu, client: AsyncClient
) -> None:
    long = await client.submit(request(steps=40), images=[PHOTO])
    other = await client.submit(request(edit=False, steps=40), images=[PHOTO])
    async with asyncio.timeout(BOUND):
        async for update in client.watch(long.id):
            if getattr(update, "step", 0) > 0:
                break

    stack.worker.process.kill()
    await stack.worker.start(BOUND)
    ended = await asyncio.gather(*(finished(client, job, BOUND) for job in (long, other)))

    assert [job.status for job in ended] == [JobStatus.COMPLETED] * 2, [job.error for job in ended]


async def test_a_drain_finishes_what_runs_and_hands_back_what_waits_in_both_stages(held: Held) -> None:
    async with AsyncClient(held.gateway_url) as client:
        runs = await client.submit(request(i2v=False), images=[PHOTO])
        async with asyncio.timeout(BOUND):
            async for update in client.watch(runs.id):
                if getattr(update, "step", 0) > 0:
                    break
        waits = await client.submit(request(edit=False), images=[PHOTO])
        async with asyncio.timeout(BOUND):
            async for update in client.watch(waits.id):
                if isinstance(update, StageStarted):
                    break  # claimed by the other stage, which waits for the device

        held.worker.process.signal(signal.SIGTERM)
        async with asyncio.timeout(BOUND):
            while {worker.state for worker in await client.workers()} != {"draining"}:
                await asyncio.sleep(0.05)
        (held.folder / "released").touch()
        assert await held.worker.process.wait(BOUND) == 0

        done = await finished(client, runs, BOUND)
        assert (done.status, done.stages[0].attempt) == (JobStatus.COMPLETED, 1), done.error
        await held.worker.start(BOUND)
        after = await finished(client, waits, BOUND)
        assert after.status is JobStatus.COMPLETED, after.error
        assert (after.stages[0].attempt, after.stages[0].tries) == (2, 1)


async def test_a_process_whose_disk_fails_leaves_though_an_engine_hangs_beside_and_charges_nobody(unfit: Unfit) -> None:
    """It waited for the thread that hangs, for ever."""
    async with AsyncClient(unfit.gateway_url) as client:
        edit = await client.submit(request(i2v=False), images=[PHOTO])
        async with asyncio.timeout(BOUND):
            async for update in client.watch(edit.id):
                if getattr(update, "phase", "") == "finishing":
                    break  # the device is the clip's
        clip = await client.submit(request(edit=False), images=[PHOTO])
        assert await unfit.worker.process.wait(BOUND) == 1

        for job in (edit, clip):
            async with asyncio.timeout(BOUND):
                async for update in client.watch(job.id):
                    if isinstance(update, StageReleased):
                        assert update.tries == 0
                        break
