"""Retention on the real servers, with short ages: what has had its time is gone, and only that."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from tests.gateways import now, picture
from tests.servers import connected_bus, running_nats

from gateway import pipeline
from gateway.jobs import Jobs
from gateway.retention import Keep, Sweeper
from vidgen import contracts, dead, topology
from vidgen.artifacts import S3Store, artifact_key
from vidgen.jetstream import JetStreamBus
from vidgen.local import S3Server
from vidgen.metrics import GatewayMetrics

BOUND = 60.0
AGED = (topology.EVENTS, topology.HISTORY, topology.DEAD, topology.PROGRESS, f"KV_{topology.JOBS_BUCKET}")


def short() -> topology.Topology:
    """What a gateway makes, with ages of a second."""
    wanted = topology.Topology().keeping(events=1, jobs=1, dead=1)
    streams = tuple(replace(one, max_age=1.0) if one.name == topology.PROGRESS else one for one in wanted.streams)
    return replace(wanted, streams=streams)


def a_job(job_id: str, reference: str) -> contracts.Job:
    asked = contracts.VideoRequest.model_validate({"references": [reference], "edit": {"prompt": "p"}})
    work = contracts.EditWork(
        prompt="p", user_prompt="p", negative_prompt=" ", steps=1, true_cfg_scale=1, guidance_scale=1, seed=1,
        width=64, height=64, candidates=1,
    )  # fmt: skip
    return pipeline.accept(asked, job_id, [reference], [work], now())


async def leave_traces(bus: JetStreamBus) -> None:
    """A job with its record, history and log; a step of progress; a dead letter."""
    job, _ = await Jobs(bus).create(a_job("job-1", "uploads/a.png"))
    told = contracts.Progress(job_id=job.id, stage="edit", run=1, step=1, steps=8, at=now())
    await bus.signal(topology.subject_of_progress(job.id), told.to_bytes())
    letter = dead.letter(b"{}", topology.SUBJECT_REQUESTS, contracts.JobError(code="c", message="m"), job_id=None)
    await dead.publish(bus, letter, message_id="letter")


async def counts(bus: JetStreamBus) -> list[int]:
    return [(await bus.held(stream)).messages for stream in AGED]


async def test_the_bus_forgets_by_the_ages_of_the_settings(tmp_path: Path) -> None:
    async with running_nats(tmp_path) as server, connected_bus(server) as bus:
        await leave_traces(bus)
        kept = await counts(bus)
        # The ages of a bus that is there already change with the next start of a gateway.
        async with connected_bus(server, short(), name="restarted"), asyncio.timeout(BOUND):
            while any(await counts(bus)):
                await asyncio.sleep(0.05)
        waiting = (await bus.held(topology.TASKS)).messages

        assert kept == [1, 1, 1, 1, 1]
        assert await Jobs(bus).find("job-1") is None
        assert waiting == 1  # what somebody waits for has no age


async def test_a_real_bucket_is_swept(tmp_path: Path, s3_server: S3Server) -> None:
    mark = secrets.token_hex(6)
    # A bucket of its own: what other tests keep in theirs is older than a second, too.
    s3_store = S3Store(s3_server.endpoint, s3_server.access_key, s3_server.secret_key, f"swept-{mark}")
    await s3_store.ensure_bucket()
    file = tmp_path / "picture.png"
    file.write_bytes(picture())
    used, unused = f"uploads/{mark}-used.png", f"uploads/{mark}-unused.png"
    open_job, gone_job = f"open-{mark}", f"gone-{mark}"
    keys = [used, unused, *(artifact_key(job, "edit-0.png") for job in (open_job, gone_job)),
            *(f"checkpoints/{job}/edit-1-1.safetensors" for job in (open_job, gone_job)),
            f"jobs/{mark} of nobody/notes.txt"]  # fmt: skip
    async with running_nats(tmp_path / "nats") as server, connected_bus(server) as bus:
        jobs = Jobs(bus)
        await jobs.create(a_job(open_job, used))
        for key in keys:
            await s3_store.put(key, file, "image/png")
        second = timedelta(seconds=1)
        keep, later = Keep(second, second, second), lambda: now() + 60 * second
        sweeper = Sweeper(bus, s3_store, jobs, keep, GatewayMetrics(), later)

        await sweeper.sweep()

        left = {key for key in keys if await s3_store.stat(key) is not None}
    assert left == {used, artifact_key(open_job, "edit-0.png"), f"checkpoints/{open_job}/edit-1-1.safetensors"}
