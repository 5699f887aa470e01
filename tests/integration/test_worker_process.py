"""Workers as processes, on a real bus and a real store: killed, frozen, drained, dead before they began."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.servers import connected_bus
from tests.workbench import photograph, task_of

from vidgen import contracts, topology
from vidgen.artifacts import S3Store
from vidgen.contracts import Event, Task, WorkerInfo
from vidgen.jetstream import JetStreamBus
from vidgen.local import NatsServer, S3Server
from vidgen.local.stack import Service

BOUND_S = 180.0
# A lease lapses under a living worker whose machine stands still: it is short only where a test waits for that.
LEASE_S, SHORT_LEASE_S = 60.0, 5.0
QUEUE = topology.consumer_of("edit", "interactive")

pytestmark = pytest.mark.timeout(600)  # processes that start one after another, maybe on a busy machine


class Worker(Service):
    """A worker process with an engine from the zoo."""

    def __init__(self, name: str, engine: str, folder: Path, env: dict[str, str]) -> None:
        super().__init__(name, "tests.zoo_service", folder, env | {"VIDGEN_WORKER_ID": name})
        self.engine = engine

    def launch(self) -> None:
        env = {**self.env, "VIDGEN_READY_FILE": str(self._ready_file)}
        self.process.start([sys.executable, "-P", "-m", self.module, "edit", self.engine], env)

    async def ended(self) -> int | None:
        """Its exit code; None if it still runs."""
        return await self.process.wait(BOUND_S)

    def records(self) -> list[dict[str, Any]]:
        """What it logged."""
        lines = self.process.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def outcomes(self) -> list[str]:
        return [record["outcome"] for record in self.records() if record.get("event") == "task"]


class Floor:
    """Where the workers run: the bus, the store, and a file that lets held engines go on."""

    def __init__(
        self, bus: JetStreamBus, store: S3Store, nats: NatsServer, s3: S3Server, folder: Path, lease: float
    ) -> None:
        self.bus, self.store, self.folder = bus, store, folder
        self.job = f"j{secrets.token_hex(6)}"
        self._release = folder / "released"
        self.workers: list[Worker] = []
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("VIDGEN_")} | {
            "PYTHONPATH": os.pathsep.join(sys.path), "VIDGEN_NATS_URL": nats.url, "VIDGEN_S3_ENDPOINT": s3.endpoint,
            "VIDGEN_S3_ACCESS_KEY": s3.access_key, "VIDGEN_S3_SECRET_KEY": s3.secret_key,
            "VIDGEN_S3_BUCKET": s3.bucket, "VIDGEN_ENGINE": "preview", "VIDGEN_DEVICE": "cpu",
            "VIDGEN_LOG_FORMAT": "json", "VIDGEN_ACK_WAIT": str(lease), "VIDGEN_HEARTBEAT_S": "0.2",
            "ZOO_RELEASED": str(self._release),
        }  # fmt: skip

    def worker(self, engine: str) -> Worker:
        worker = Worker(f"w{len(self.workers) + 1}", engine, self.folder, self.env)
        self.workers.append(worker)
        return worker

    async def started(self, engine: str) -> Worker:
        worker = self.worker(engine)
        await worker.start(BOUND_S)
        return worker

    def release(self) -> None:
        self._release.touch()

    async def queue(self, job: str | None = None) -> Task:
        """Put a task on the queue; another one where `job` says so."""
        task = task_of(job or self.job)
        photo = self.folder / "photo.jpg"
        photo.write_bytes(photograph())
        await self.store.put(task.inputs[0], photo, "image/jpeg")
        subject = topology.subject_of_task("edit", "interactive", task.job_id)
        await self.bus.publish(subject, task.to_bytes(), message_id=f"{task.job_id}:edit:1")
        return task

    async def generating(self, worker: Worker) -> None:
        """Wait until a worker says that it is at a step of the task."""
        feed = await self.bus.follow(topology.PROGRESS, topology.subject_of_progress(self.job))
        async with asyncio.timeout(BOUND_S):
            while True:
                said = await feed.next(BOUND_S)
                assert said is not None
                progress = contracts.Progress.model_validate_json(said.body)
                if (progress.worker, progress.phase) == (worker.name, "denoising"):
                    return

    async def events(self, job: str | None = None) -> list[Any]:
        """What the job's log says by now."""
        feed = await self.bus.follow(topology.EVENTS, topology.subject_of_events(job or self.job))
        found = []
        while (stored := await feed.next(0.2)) is not None:
            found.append(Event.validate_json(stored.body))
        await feed.close()
        return found

    async def types(self, job: str | None = None) -> list[str]:
        return [event.type for event in await self.events(job)]

    async def until(self, kind: str, job: str | None = None) -> Any:
        """Wait for an event of a job."""
        feed = await self.bus.follow(topology.EVENTS, topology.subject_of_events(job or self.job))
        async with asyncio.timeout(BOUND_S):
            while True:
                stored = await feed.next(BOUND_S)
                assert stored is not None
                event = Event.validate_json(stored.body)
                if event.type == kind:
                    return event

    async def until_registered(self, worker: Worker, true: Callable[[WorkerInfo], bool]) -> None:
        """Wait until a worker's entry in the registry is as it should be."""
        feed = await self.bus.follow(
            f"KV_{topology.WORKERS_BUCKET}", f"$KV.{topology.WORKERS_BUCKET}.edit.{worker.name}"
        )
        async with asyncio.timeout(BOUND_S):
            while True:
                stored = await feed.next(BOUND_S)
                assert stored is not None
                if true(WorkerInfo.model_validate_json(stored.body)):
                    return


@pytest.fixture
def lease() -> float:
    """Seconds after which a task of a silent worker is free; a test that waits for that parametrizes it."""
    return LEASE_S


@pytest.fixture
async def floor(
    nats_server: NatsServer, s3_server: S3Server, s3_store: S3Store, tmp_path: Path, lease: float
) -> AsyncIterator[Floor]:
    async with connected_bus(nats_server, topology.Topology(ack_wait=lease)) as bus:
        made = Floor(bus, s3_store, nats_server, s3_server, tmp_path, lease)
        try:
            yield made
        finally:
            for worker in made.workers:
                with contextlib.suppress(ProcessLookupError):
                    worker.kill()


@pytest.mark.parametrize("lease", [SHORT_LEASE_S])
async def test_a_worker_is_killed_in_the_middle_of_a_task_and_another_completes_it_once(floor: Floor) -> None:
    scratch = floor.folder / "scratch"
    scratch.mkdir()
    floor.env["VIDGEN_WORK_DIR"] = str(scratch)
    first = await floor.started("Paced")
    await floor.queue()
    await floor.generating(first)
    left = [path for path in scratch.rglob("*") if path.is_file()]
    assert [path.name for path in left] == ["input-0"]

    first.process.signal(signal.SIGKILL)
    second = await floor.started("Instant")
    event = await floor.until("stage_completed")

    assert not left[0].exists()

    assert (event.worker, event.attempt, event.tries, event.alone) == (second.name, 2, 1, True)
    assert await floor.types() == ["stage_started", "stage_started", "stage_completed"]
    stat = await floor.store.stat(f"jobs/{floor.job}/edit-0.png")
    assert stat is not None
    assert stat.size == event.artifacts[0].size
    async with asyncio.timeout(BOUND_S):  # it is told before it is acked
        while (await floor.bus.depth(QUEUE)).waiting:
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("lease", [SHORT_LEASE_S])
async def test_a_worker_that_was_frozen_past_its_lease_settles_nothing_when_it_wakes(floor: Floor) -> None:
    first = await floor.started("Paced")
    await floor.queue()
    await floor.generating(first)

    first.process.signal(signal.SIGSTOP)
    second = await floor.started("Paced")
    await floor.generating(second)
    floor.release()
    event = await floor.until("stage_completed")
    first.process.signal(signal.SIGCONT)
    first.process.signal(signal.SIGTERM)

    assert await first.ended() == 0
    assert first.outcomes() == ["fenced"]
    assert event.worker == second.name
    assert await floor.types() == ["stage_started", "stage_started", "stage_completed"]


async def test_a_worker_that_is_told_to_stop_finishes_what_runs_and_takes_nothing_more(floor: Floor) -> None:
    worker = await floor.started("Paced")
    await floor.queue()
    await floor.generating(worker)

    worker.process.signal(signal.SIGTERM)
    await floor.until_registered(worker, lambda info: info.state == "draining")
    other = await floor.queue(f"{floor.job}-2")
    floor.release()

    assert await worker.ended() == 0
    assert await floor.types() == ["stage_started", "stage_completed"]
    assert await floor.types(other.job_id) == []
    assert (await floor.bus.depth(QUEUE)).pending == 1


@pytest.mark.parametrize("last_call", ["0.0", "1.5"])
async def test_a_worker_that_is_told_twice_leaves_now_and_its_task_is_free(
    floor: Floor, lease: float, last_call: str
) -> None:
    floor.env["ZOO_LAST_CALL"] = last_call
    worker = await floor.started("Paced")
    await floor.queue()
    await floor.generating(worker)

    worker.process.signal(signal.SIGTERM)
    await floor.until_registered(worker, lambda info: info.state == "draining")
    worker.process.signal(signal.SIGTERM)

    assert await worker.ended() == 128 + signal.SIGTERM
    assert await floor.types() == ["stage_started", "stage_released"]
    depth = await floor.bus.depth(QUEUE)
    assert depth.waiting == 1
    again = await floor.bus.pull(QUEUE, lease / 2)
    assert again is not None
    # The worker's own pull, which was given up, may be given it, and hands it back: with the long last call it is.
    assert again.num_delivered in (2, 3)


async def test_a_worker_whose_engine_cannot_be_set_up_says_why_and_takes_no_task(floor: Floor) -> None:
    await floor.queue()
    worker = floor.worker("DiesInSetup")
    worker.launch()

    assert await worker.ended() == 1

    [record] = [record for record in worker.records() if record.get("event") == "left"]
    assert record["message"] == "the weights are not there: set VIDGEN_EDIT_MODEL"
    assert record["code"] == "weights_missing"
    depth = await floor.bus.depth(QUEUE)
    assert (depth.pending, depth.ack_pending) == (1, 0)
    assert await floor.types() == []


async def test_a_worker_that_lost_its_device_leaves_and_another_does_its_task(floor: Floor) -> None:
    await floor.queue()
    sick = floor.worker("FatalOnGenerate")
    sick.launch()

    assert await sick.ended() == 1
    assert sick.records()[-1]["code"] == "device_lost"
    await floor.started("Instant")
    event = await floor.until("stage_completed")

    assert (event.attempt, event.tries) == (2, 1)


@pytest.mark.parametrize("lease", [SHORT_LEASE_S])
async def test_a_task_that_kills_its_worker_is_given_up_after_three_tries_and_harms_no_other(floor: Floor) -> None:
    task = await floor.queue()
    victims = [floor.worker("KillsItself") for _ in range(4)]
    for victim in victims:
        victim.launch()
    for victim in victims:  # one after another: each waits until the lease of the one before has run out
        assert await victim.ended() == -signal.SIGKILL
    other = await floor.queue(f"{floor.job}-2")
    healthy = await floor.started("Instant")
    await floor.until("stage_completed", other.job_id)

    failed = await floor.until("stage_failed")

    assert (failed.final, failed.error.code, failed.worker) == (True, "attempts_exhausted", healthy.name)
    assert (await floor.types()).count("stage_started") == 4
    letter = await floor.bus.last(topology.DEAD, topology.subject_of_dead("edit", task.job_id))
    assert letter is not None
    assert contracts.DeadLetter.model_validate_json(letter.body).error.code == "attempts_exhausted"
    assert healthy.running


async def test_a_worker_answers_for_itself_on_its_own_port(floor: Floor) -> None:
    worker = await floor.started("Instant")
    await floor.queue()
    await floor.until("stage_completed")

    async with httpx.AsyncClient(base_url=worker.url, timeout=BOUND_S) as client:
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200
        exposition = (await client.get("/metrics")).text
    assert 'vidgen_worker_steps_total{stage="edit"} 4.0' in exposition
    assert 'vidgen_worker_info{device="cpu",engine="instant"' in exposition

    worker.process.signal(signal.SIGTERM)
    assert await worker.ended() == 0
    assert worker.outcomes() == ["completed"]
    [record] = [record for record in worker.records() if record.get("event") == "task"]
    assert (record["job"], record["stage"], record["worker"], record["gpu"]) == (floor.job, "edit", "w1", "cpu")


async def test_a_worker_outlives_a_restart_of_the_bus(floor: Floor, nats_server: NatsServer) -> None:
    worker = await floor.started("Paced")
    await floor.queue()
    await floor.generating(worker)

    await nats_server.kill()
    await nats_server.start()
    floor.release()
    event = await floor.until("stage_completed")

    assert event.worker == worker.name
    assert (await floor.types()).count("stage_completed") == 1
    other = await floor.queue(f"{floor.job}-2")
    await floor.until("stage_completed", other.job_id)
