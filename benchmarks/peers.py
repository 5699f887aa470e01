"""The same jobs by others, with what makes them durable turned on; FastAPI is before Celery or taskiq.

`python -m peers` is the HTTP side; `peers:app` and `peers:broker` are what their own workers load. A task fetches its
object from S3, makes a file as `HoldingEngine` does, stores it, and hands its key to the next one. Its end is
acknowledged late, so a worker that dies loses nothing; what that does not give them (a fence, one effect, cancel,
progress, a log of what happened) they are not asked for here.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from minio import Minio
from pydantic import BaseModel

from vidgen import topology

KIND, SERVER = os.environ.get("BENCH_PEER", ""), os.environ.get("BENCH_SERVER", "")
DAY = 86400
FILES = {"edit": ("edit-0.png", "image/png"), "i2v": ("video.mp4", "video/mp4")}


class Part(BaseModel):
    prompt: str


class Request(BaseModel):
    job_id: str
    references: list[str]
    edit: Part
    i2v: Part


def stage(name: str, job_id: str, key: str) -> str:
    """One stage's work: object in, object out."""
    from engines import HoldingEngine, Shape

    store, bucket = client()
    engine = HoldingEngine(name, Shape())  # type: ignore[arg-type]
    engine.setup()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "input")
        store.fget_object(bucket, key, str(source))
        generated = engine.generate(engine.prepare(None, [source]), lambda _step, _steps: None)  # type: ignore[arg-type]
        made = engine.finish(generated.output, Path(folder))[0]
        store.fput_object(bucket, f"jobs/{job_id}/{made.path.name}", str(made.path), content_type=made.content_type)
    return f"jobs/{job_id}/{made.path.name}"


def ready() -> None:
    """A worker is up, with all that a task needs imported: from here on its CPU seconds are those of the jobs."""
    import engines  # noqa: F401

    client()
    Path(os.environ["VIDGEN_READY_FILE"]).write_text("ready")


_client: list[tuple[Minio, str]] = []


def client() -> tuple[Minio, str]:
    if not _client:
        endpoint, access, secret, bucket = os.environ["BENCH_S3"].split()
        _client.append(
            (Minio(endpoint.removeprefix("http://"), access, secret, secure=False, region="us-east-1"), bucket)
        )
    return _client[0]


if KIND.startswith("celery"):
    import celery

    app = celery.Celery(
        "peers", broker=SERVER.replace("unix://", "redis+socket://"),
        backend=SERVER.replace("unix://", "redis+socket://"),
    )  # fmt: skip
    app.conf.update(
        task_acks_late=True, task_reject_on_worker_lost=True, worker_prefetch_multiplier=1, result_expires=DAY,
        broker_transport_options={"visibility_timeout": 3600}, broker_connection_retry_on_startup=True,
    )  # fmt: skip

    @celery.signals.worker_init.connect
    def imported(**_: object) -> None:
        """Before its pool is forked: or each of twenty processes would import the same at its first task."""
        import engines  # noqa: F401

    @celery.signals.worker_ready.connect
    def up(**_: object) -> None:
        ready()

    @app.task(name="edit")
    def edit(key: str, job_id: str) -> str:
        return stage("edit", job_id, key)

    @app.task(name="i2v")
    def i2v(key: str, job_id: str) -> str:
        return stage("i2v", job_id, key)

    def submit(request: Request) -> None:
        chain = edit.s(request.references[0], request.job_id).set(task_id=f"{request.job_id}-edit")
        (chain | i2v.s(request.job_id).set(task_id=request.job_id)).apply_async()

    def status(job_id: str) -> str:
        found = app.AsyncResult(job_id)
        if found.state == "SUCCESS":
            return "completed"
        return "in_progress" if app.AsyncResult(f"{job_id}-edit").state == "SUCCESS" else "queued"


if KIND.startswith("taskiq"):
    import taskiq

    broker: Any
    if KIND == "taskiq":
        import taskiq_redis

        broker = taskiq_redis.RedisStreamBroker(
            SERVER, consumer_id="0", xread_count=1, idle_timeout=3600_000
        ).with_result_backend(taskiq_redis.RedisAsyncResultBackend(SERVER, result_ex_time=DAY))

    else:
        import nats.js.api
        import taskiq_nats

        broker = taskiq_nats.PullBasedJetStreamBroker(
            SERVER,
            stream_config=nats.js.api.StreamConfig(retention=nats.js.api.RetentionPolicy.WORK_QUEUE),
            consumer_config=nats.js.api.ConsumerConfig(durable_name="taskiq_durable", ack_wait=3600),
        ).with_result_backend(taskiq_nats.NATSObjectStoreResultBackend(SERVER))

    @broker.on_event(taskiq.TaskiqEvents.WORKER_STARTUP)
    async def up(_: object) -> None:
        await asyncio.to_thread(ready)

    @broker.task(task_name="edit")
    async def edit(key: str, job_id: str) -> str:
        made = await asyncio.to_thread(stage, "edit", job_id, key)
        await i2v.kicker().with_task_id(job_id).kiq(made, job_id)
        return made

    @broker.task(task_name="i2v")
    async def i2v(key: str, job_id: str) -> str:
        made = await asyncio.to_thread(stage, "i2v", job_id, key)
        if KIND == "taskiq-nats":  # on Redis the results are counted
            await broker.client.publish("bench.done")
        return made

    async def submit(request: Request) -> None:
        await edit.kicker().with_task_id(f"{request.job_id}-edit").kiq(request.references[0], request.job_id)

    async def status(job_id: str) -> str:
        if await broker.result_backend.is_result_ready(job_id):
            return "completed"
        return "in_progress" if await broker.result_backend.is_result_ready(f"{job_id}-edit") else "queued"


async def allow_looks() -> None:
    """Take as many consumers of the stream of results as ours takes of its events: a look at a result opens one.

    It stays for 5 s, and behind a thousand of them, which is what the server takes of any, a look is answered with an
    error. The library has no setting for it.
    """
    streams = broker.result_backend.nats_jetstream
    found = (await streams.stream_info(f"OBJ_{broker.result_backend.bucket_name}")).config
    limit = next(one.max_consumers for one in topology.STREAMS if one.name == topology.EVENTS)
    await streams.update_stream(found.evolve(max_consumers=limit))


def api() -> FastAPI:
    """The HTTP side. Celery's calls block, so FastAPI runs them in its threads, as its users do."""
    made = FastAPI()

    async def called(function: Any, *given: Any) -> Any:
        return await (function(*given) if KIND.startswith("taskiq") else asyncio.to_thread(function, *given))

    @made.post("/v1/jobs", status_code=202)
    async def post(request: Request) -> dict[str, str]:
        await called(submit, request)
        return {"job_id": request.job_id, "status": "queued"}

    @made.get("/v1/jobs/{job_id}")
    async def get(job_id: str) -> dict[str, str]:
        if not job_id.isalnum():
            raise HTTPException(404)
        return {"job_id": job_id, "status": await called(status, job_id)}

    return made


class _Server(uvicorn.Server):
    async def startup(self, sockets: Any = None) -> None:
        if KIND.startswith("taskiq"):
            await broker.startup()
        if KIND == "taskiq-nats":
            await allow_looks()
        await super().startup(sockets)
        port = self.servers[0].sockets[0].getsockname()[1]
        Path(os.environ["VIDGEN_READY_FILE"]).write_text(f"http://127.0.0.1:{port}\n")  # noqa: ASYNC240


if __name__ == "__main__":
    _Server(uvicorn.Config(api(), port=0, log_level="warning")).run()
