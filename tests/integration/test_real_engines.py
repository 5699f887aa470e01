"""Both real pipelines through the whole system, on tiny random checkpoints and the CPU: photo to video by the bus."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.servers import finished, running_stack

from vidgen import video
from vidgen.client import AsyncClient
from vidgen.contracts import EditParams, I2VParams, Job, JobStatus, StageReleased, StageStarted, VideoRequest
from vidgen.local import Stack

ROOT = Path(__file__).parents[2]
PHOTO = ROOT / "examples" / "portrait.jpg"
SHIM = Path(__file__).parents[1] / "shim"
BOUND = 300.0

pytestmark = pytest.mark.timeout(900)  # importing diffusers takes minutes on a machine that is busy


class Slow(Stack):
    """Its tiny video model may be told to take its time: a hundred steps of it are over in a second."""

    def _kinds(self) -> Iterator[tuple[str, str, Sequence[str]]]:
        for name, module, arguments in super()._kinds():
            yield name, "tests.slow_service" if name == "i2v-service" else module, arguments


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both services keep for their next start."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path], compiled: Path) -> Iterator[Stack]:
    env = {
        "VIDGEN_COMPILE_CACHE": str(compiled),
        "VIDGEN_ENGINE": "real",
        "VIDGEN_DEVICE": "cpu",
        "VIDGEN_EDIT_MODEL": str(tiny_models["qwen-edit"]),
        "VIDGEN_EDIT_REFERENCE_AREA": str(64 * 64),
        "VIDGEN_EDIT_CONDITION_AREA": str(56 * 56),
        "VIDGEN_I2V_MODEL": str(tiny_models["wan2.2-a14b-i2v"]),
        "VIDGEN_CHECKPOINT_OVER_S": "0",  # nothing that these models do takes long
        "PYTHONPATH": os.pathsep.join([str(SHIM), str(ROOT), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    with running_stack(tmp_path_factory.mktemp("stack"), env, kind=Slow) as stack:
        yield stack


def a_request(**more: object) -> VideoRequest:
    size = {"width": 64, "height": 64}
    edit = EditParams.model_validate({"prompt": "make it blue", "steps": 3, "true_cfg_scale": 4.0, "seed": 5} | size)
    i2v = I2VParams.model_validate({"prompt": "a cat", "steps": 3, "seed": 5, "num_frames": 9, "fps": 8} | size)
    return VideoRequest.model_validate({"references": ("uploads/form",), "edit": edit, "i2v": i2v} | more)


async def test_a_photograph_goes_through_qwen_and_wan(client: AsyncClient, tmp_path: Path, compiled: Path) -> None:
    job = await finished(client, await client.submit(a_request(), images=[PHOTO]))
    assert job.status is JobStatus.COMPLETED, job.error
    edited, animated = job.stages
    assert (edited.engine, animated.engine) == ("qwen", "wan")
    assert (edited.seed, animated.seed) == (5, 5)
    assert edited.timings.denoise > 0
    assert animated.timings.decode > 0
    await client.download(job.id, "video.mp4", tmp_path / "video.mp4")
    facts = video.probe(tmp_path / "video.mp4")
    assert (facts.frames, facts.fps, facts.width, facts.height) == (9, 8, 64, 64)
    assert facts.metadata["engine"] == "wan"
    assert sorted(file.name.split("-")[1] for file in compiled.glob("imports-*.bin")) == ["edit", "i2v"]


async def test_three_references_and_two_candidates_are_one_task(client: AsyncClient) -> None:
    edit = EditParams(prompt="combine them", steps=2, seed=1, width=64, height=64, candidates=2)
    job = await finished(client, await client.submit(a_request(edit=edit, i2v=None), images=[PHOTO, PHOTO, PHOTO]))
    assert job.status is JobStatus.COMPLETED, job.error
    assert [made.name for made in job.artifacts] == ["edit-0.png", "edit-1.png"]


async def test_the_same_seed_gives_the_same_pixels_through_the_whole_system(client: AsyncClient) -> None:
    first, second = [await finished(client, await client.submit(a_request(), images=[PHOTO])) for _ in range(2)]
    assert [made.sha256 for made in first.artifacts] == [made.sha256 for made in second.artifacts]


async def test_a_cancel_stops_the_real_pipeline_and_leaves_it_usable(client: AsyncClient) -> None:
    long = EditParams(prompt="slowly", steps=100, seed=1, width=512, height=512)
    job = await client.submit(a_request(edit=long, i2v=None), images=[PHOTO])
    async with asyncio.timeout(BOUND):
        async for update in client.watch(job.id):
            if getattr(update, "step", 0) > 0:
                break
    assert (await client.cancel(job.id)).status is JobStatus.CANCELLED
    after = await finished(client, await client.submit(a_request(i2v=None), images=[PHOTO]))
    assert after.status is JobStatus.COMPLETED, after.error


async def test_a_worker_that_is_reclaimed_in_the_middle_leaves_its_steps_to_the_next(
    stack: Stack, client: AsyncClient
) -> None:
    long = I2VParams(prompt="slowly", steps=100, guidance_scale=3.0, seed=5, num_frames=9, width=128, height=128)
    request = a_request(edit=None, i2v=long)
    job = await client.submit(request, images=[PHOTO])
    async with asyncio.timeout(BOUND):
        async for update in client.watch(job.id):
            if getattr(update, "step", 0) > 0:
                break
    [worker] = [service for service in stack.services if service.name == "i2v-service"]
    worker.process.signal(signal.SIGTERM)
    assert await worker.process.wait(BOUND) == 0

    await worker.start(BOUND)  # another process
    updates = [update async for update in client.watch(job.id)]

    assert isinstance(updates[-1], Job)
    assert updates[-1].status is JobStatus.COMPLETED, updates[-1].error
    [released] = [update for update in updates if isinstance(update, StageReleased)]
    second = [update for update in updates if isinstance(update, StageStarted)][-1]
    assert released.checkpoint is not None
    assert 0 < released.checkpoint.step < 100
    assert (second.attempt, second.tries, second.checkpoint) == (2, 1, released.checkpoint)
    assert second.worker != released.worker
    whole = await finished(client, await client.submit(request, images=[PHOTO]))
    assert [made.sha256 for made in updates[-1].artifacts] == [made.sha256 for made in whole.artifacts]
