"""The whole system as a user has it: the embedded stack, real servers, real processes, the preview engines."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.servers import finished, running_stack, skipped_at_home

from vidgen import jetstream, topology, video
from vidgen.client import AsyncClient
from vidgen.contracts import EditParams, I2VParams, Job, JobStatus, Progress, Stage, VideoRequest
from vidgen.jetstream import JetStreamBus
from vidgen.local import Stack
from vidgen.local.stack import NICE

PHOTO = Path(__file__).parents[2] / "examples" / "portrait.jpg"
PACE = 0.05
BOUND = 180.0  # seconds to wait for what must come, on a busy machine
SMALL = {"width": 320, "height": 192}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    env = {"VIDGEN_ENGINE": "preview", "VIDGEN_PREVIEW_SECONDS_PER_STEP": str(PACE), "VIDGEN_GPU_USD_PER_HOUR": "3.6"}
    with running_stack(tmp_path_factory.mktemp("stack"), env) as stack:
        yield stack
        # Each service came with an identity of its own, and none asked the bus for more than that may.
        assert "Violation" not in stack.nats.process.log.read_text()


def edit(steps: int = 2, **more: object) -> EditParams:
    return EditParams.model_validate({"prompt": "golden hour, warm light", "steps": steps, "seed": 7} | SMALL | more)


def i2v(steps: int = 2, **more: object) -> I2VParams:
    wanted = {"prompt": "slow zoom in", "steps": steps, "seed": 7, "num_frames": 9, "fps": 8}
    return I2VParams.model_validate(wanted | SMALL | more)


def request(**parts: object) -> VideoRequest:
    return VideoRequest.model_validate({"references": ("uploads/from-the-form",)} | parts)


@contextlib.contextmanager
def still(stack: Stack, *stages: Stage) -> Iterator[None]:
    """The workers of these stages stand still, as long as the block takes on whatever machine."""
    names = {f"{stage}-service" for stage in stages}
    held = [service for service in stack.services if service.name in names]
    for service in held:
        service.process.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for service in held:
            service.process.signal(signal.SIGCONT)


async def until_step(client: AsyncClient, job: Job, stage: str) -> Progress:
    async with asyncio.timeout(BOUND):
        async for update in client.watch(job.id):
            if isinstance(update, Progress) and update.stage == stage and update.step > 0:
                return update
    raise AssertionError(f"{stage} never made a step")


async def newest_step(bus: JetStreamBus, job: Job) -> int:
    """How far the job's worker said last that it is."""
    told = await bus.last(topology.PROGRESS, topology.subject_of_progress(job.id))
    assert told is not None
    return Progress.model_validate_json(told.body).step


async def charged(client: AsyncClient, job: Job) -> Job:
    """The job once its video stage's log told when the device was free again, and what that cost."""
    async with asyncio.timeout(BOUND):
        while not (job := await client.get(job.id)).stages[1].charged:
            await asyncio.sleep(0.05)
    return job


async def test_a_photograph_becomes_an_edited_frame_and_a_video(
    client: AsyncClient, stack: Stack, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    with contextlib.ExitStack() as until_watched:
        until_watched.enter_context(still(stack, "edit"))  # progress is not kept for who comes too late
        job = await client.submit(request(edit=edit(steps=6), i2v=i2v(steps=6)), images=[PHOTO])
        assert job.status is JobStatus.QUEUED
        async with asyncio.timeout(BOUND):
            async for update in client.watch(job.id):
                until_watched.close()
                if isinstance(update, Progress):
                    seen.append(update)
                elif isinstance(update, Job):
                    job = update
    assert job.status is JobStatus.COMPLETED
    assert [artifact.name for artifact in job.artifacts] == ["edit-0.png", "video.mp4", "poster.jpg"]
    for stage in ("edit", "i2v"):
        steps = [p.step for p in seen if p.stage == stage]
        assert steps == sorted(steps)
        assert steps[-1] == 6
    assert all(p.eta_s is not None for p in seen if p.phase == "denoising" and p.step > 1)

    await client.download(job.id, "video.mp4", tmp_path / "video.mp4")
    facts = video.probe(tmp_path / "video.mp4")
    assert (facts.frames, facts.fps, facts.width, facts.height) == (9, 8, 320, 192)
    assert (facts.codec, facts.pix_fmt, facts.faststart) == ("h264", "yuv420p", True)
    assert facts.metadata["engine"] == "preview"

    for record in job.stages:
        assert (record.engine, record.seed) == ("preview", 7)
        assert record.timings.denoise >= 6 * PACE * 0.9
        assert record.gpu_seconds >= record.timings.denoise
        assert record.cost_usd == pytest.approx(record.gpu_seconds / 1000, rel=1e-6)
    assert job.gpu_seconds == pytest.approx(sum(record.gpu_seconds for record in job.stages))


async def test_each_artifact_is_what_its_manifest_says(client: AsyncClient, tmp_path: Path) -> None:
    job = await finished(client, await client.submit(request(edit=edit(), i2v=i2v()), images=[PHOTO]))
    for artifact in job.artifacts:
        path = tmp_path / artifact.name
        await client.download(job.id, artifact.name, path)
        assert path.stat().st_size == artifact.size
        assert hashlib.sha256(path.read_bytes()).hexdigest() == artifact.sha256


async def test_the_same_seed_gives_the_same_bytes(client: AsyncClient) -> None:
    first, second = [await client.submit(request(edit=edit(), i2v=i2v()), images=[PHOTO]) for _ in range(2)]
    first, second = await finished(client, first), await finished(client, second)
    assert first.id != second.id
    assert [a.sha256 for a in first.artifacts] == [a.sha256 for a in second.artifacts]


async def test_an_edit_alone_is_an_image_and_a_motion_alone_a_video(client: AsyncClient) -> None:
    image = await client.submit(request(edit=edit(style="film-noir")), images=[PHOTO])
    clip = await client.submit(request(i2v=i2v()), images=[PHOTO])
    assert [a.name for a in (await finished(client, image)).artifacts] == ["edit-0.png"]
    assert [a.name for a in (await finished(client, clip)).artifacts] == ["video.mp4", "poster.jpg"]


async def test_a_batch_job_is_done_too(client: AsyncClient) -> None:
    job = await finished(client, await client.submit(request(edit=edit(), lane="batch"), images=[PHOTO]))
    assert job.status is JobStatus.COMPLETED


async def test_the_same_id_twice_is_one_job(client: AsyncClient) -> None:
    first = await client.submit(request(edit=edit(), job_id="only-once"), images=[PHOTO])
    second = await client.submit(request(edit=edit(), job_id="only-once"), images=[PHOTO])
    assert first.id == second.id == "only-once"
    job = await finished(client, first)
    assert job.stages[0].attempt == 1


async def test_a_running_job_is_cancelled_within_a_step(client: AsyncClient, stack: Stack) -> None:
    job = await client.submit(request(edit=edit(), i2v=i2v(steps=100)), images=[PHOTO])
    await until_step(client, job, "i2v")
    async with jetstream.connect(stack.nats_url, "test") as bus:
        cancelled = await client.cancel(job.id)
        assert cancelled.status is JobStatus.CANCELLED
        step = await newest_step(bus, job)
        assert (await charged(client, job)).stages[1].gpu_seconds > 0
        assert await newest_step(bus, job) < min(100, step + 50)  # in steps: how long one takes, a machine decides


async def test_a_queued_job_is_cancelled_before_it_starts(client: AsyncClient, stack: Stack) -> None:
    running = await client.submit(request(edit=edit(steps=40)), images=[PHOTO])
    await until_step(client, running, "edit")
    with still(stack, "edit"):
        waiting = [await client.submit(request(edit=edit()), images=[PHOTO]) for _ in range(6)]
        last = await client.cancel(waiting[-1].id)
    assert last.status is JobStatus.CANCELLED
    assert (await finished(client, running)).status is JobStatus.COMPLETED
    for job in waiting[:-1]:
        assert (await finished(client, job)).status is JobStatus.COMPLETED
    assert (await client.get(waiting[-1].id)).artifacts == ()


async def test_a_retry_goes_on_where_the_job_stopped(client: AsyncClient) -> None:
    job = await client.submit(request(edit=edit(), i2v=i2v(steps=100)), images=[PHOTO])
    await until_step(client, job, "i2v")
    await client.cancel(job.id)
    await charged(client, job)
    await client.retry(job.id)
    done = await finished(client, job)
    assert done.status is JobStatus.COMPLETED
    assert done.run == 2
    assert done.stages[0].charged == ("1.1",)  # the edit was done once
    assert done.stages[1].charged == ("1.1", "2.1")


async def test_a_reviewed_job_waits_and_goes_on_with_the_chosen_candidate(client: AsyncClient) -> None:
    wanted = request(edit=edit(candidates=3), i2v=i2v(), review=True)
    job = await client.submit(wanted, images=[PHOTO])
    async with asyncio.timeout(BOUND):
        while job.status is not JobStatus.AWAITING_REVIEW:
            job = await client.get(job.id)
            await asyncio.sleep(0.05)
    assert [a.name for a in job.artifacts] == ["edit-0.png", "edit-1.png", "edit-2.png"]
    assert len({a.sha256 for a in job.artifacts}) == 3
    await client.approve(job.id, 2)
    done = await finished(client, job)
    assert done.status is JobStatus.COMPLETED
    assert done.approved == 2


async def test_the_fleet_and_the_metrics_show_what_ran(client: AsyncClient, stack: Stack) -> None:
    await finished(client, await client.submit(request(edit=edit(), i2v=i2v()), images=[PHOTO]))
    workers = {worker.stage: worker for worker in await client.workers()}
    assert set(workers) == {"edit", "i2v"}
    assert all(worker.device == "cpu" and worker.engine == "preview" for worker in workers.values())
    jobs, tasks = (
        'vidgen_jobs_total{status="completed"}',
        'vidgen_tasks_total{lane="interactive",outcome="completed",stage="i2v"}',
    )
    async with asyncio.timeout(BOUND), httpx.AsyncClient(base_url=stack.gateway_url, timeout=BOUND) as http:
        while True:
            text = (await http.get("/metrics")).text
            lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
            # A gateway counts what it has acked, and a busy bus may leave a scrape without its figures.
            if all(float(lines.get(name, 0)) >= 1 for name in (jobs, tasks, "vidgen_gateway_bus_up")):
                break
            await asyncio.sleep(0.1)
    assert float(lines['vidgen_queue_depth{lane="interactive",stage="edit"}']) == 0
    # Its newest heartbeat may be from while it worked.
    assert (
        sum(float(lines[f'vidgen_fleet_workers{{stage="edit",state="{state}"}}']) for state in ("ready", "busy")) == 1
    )
    assert float(lines['vidgen_gpu_seconds_total{stage="i2v"}']) > 0


async def test_workers_and_servers_let_the_gateway_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIDGEN_NICE")  # other tests have it
    async with Stack(tmp_path, env={"VIDGEN_ENGINE": "preview"}, ephemeral=True) as stack:
        pids = [*(service.pid for service in stack.services), stack.nats.pid, stack.s3.pid]
        gateway, *others = (os.getpriority(os.PRIO_PROCESS, pid) for pid in pids)
        policies = [os.sched_getscheduler(pid) for pid in pids]
    assert others == [gateway + NICE] * 4
    assert policies == [os.SCHED_OTHER] + [os.SCHED_BATCH] * 4, "who is woken interrupts nobody but the gateway does"


async def test_a_stack_that_is_killed_leaves_nothing_where_temporary_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each `vidgen run` left its gateway's scratch folder there, until another process of vidgen swept it away."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    async with Stack(tmp_path / "stack", env={"VIDGEN_ENGINE": "preview"}, ephemeral=True):
        pass
    assert [*temporary.iterdir()] == []


async def test_a_worker_that_is_killed_hands_its_task_to_the_next(tmp_path: Path) -> None:
    """Of two workers the one that generates dies: its task comes again when its lease has run out, and completes."""
    env = {"VIDGEN_ENGINE": "preview", "VIDGEN_PREVIEW_SECONDS_PER_STEP": "0.1", "VIDGEN_ACK_WAIT": "12"}
    stack = Stack(tmp_path, env=env, workers=2, ephemeral=True)
    with skipped_at_home():
        await stack.start()
    try:
        async with AsyncClient(stack.gateway_url) as client:
            job = await client.submit(request(edit=edit(steps=100)), images=[PHOTO])
            holder = (await until_step(client, job, "edit")).worker or ""
            victim = next(s for s in stack.services if f"-{s.pid}-" in holder)
            os.kill(victim.pid, signal.SIGKILL)
            done = await finished(client, job)
            assert done.status is JobStatus.COMPLETED
            assert done.stages[0].attempt == 2
            assert done.stages[0].worker != holder
    finally:
        await stack.stop()


async def test_what_cannot_be_read_is_buried_by_whoever_meets_it_and_can_be_dropped(
    stack: Stack, client: AsyncClient
) -> None:
    # Given a request and a task that nobody can read
    async with jetstream.connect(stack.nats_url, "test") as bus:
        await bus.publish(topology.SUBJECT_REQUESTS, b"nonsense", message_id="unreadable-request")
        subject = topology.subject_of_task("edit", "interactive", "unreadable")
        await bus.publish(subject, b"nonsense", message_id="unreadable-task")

    # When the gateway and the worker have met them
    async with asyncio.timeout(BOUND):
        while len(letters := (await client.dead_list()).dead) < 2:
            await asyncio.sleep(0.05)

    # Then both are kept with what they said, and go when they are dropped
    assert {(letter.stage, letter.error.code) for letter in letters} == {
        (None, "invalid_request"), ("edit", "unreadable_task"),
    }  # fmt: skip
    for letter in letters:
        await client.dead_drop(letter.seq)
    assert (await client.dead_list()).dead == ()
