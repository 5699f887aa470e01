"""Does `vidgen plan` foretell what the system does, and what queueing theory says?

    python benchmarks/plan.py [--jobs 40] [--workers 2] [--edit 1.0] [--i2v 3.0] [--theory N] [--subjects N]

The system: real nats-server (synced), real S3 server, gateway and workers as processes on this machine, engines that
hold a pretended GPU for a set time. One list of jobs, in both lanes and of all kinds, is sent to it at its times and
simulated. The simulation is told what a task had the GPU for on average, as the events of the run say it (a busy
machine holds longer than it was asked to), and what a stage takes beside the GPU, measured before, one job at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import sys
import tempfile
import time
import urllib.request
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import nats as nats_client
import numpy as np
import uvloop
from PIL import Image

from engines import Shape
from overhead import FRAME_BYTES, VIDEO_BYTES, Finals, System, environment
from vidgen import jetstream, topology
from vidgen.contracts import STAGES, EditParams, Event, I2VParams, Stage, StageCompleted, VideoRequest
from vidgen.jetstream import JetStreamBus
from vidgen.local import NatsServer, S3Server
from vidgen.local.stack import Service
from vidgen.planning import arrivals
from vidgen.planning.arrivals import Arrival
from vidgen.planning.scaling import Scaling
from vidgen.planning.simulation import Policy, Served, simulate

KEY = "uploads/bench/reference.png"
STEPS = 10
MIX: dict[arrivals.Kind, float] = {"both": 0.6, "edit": 0.2, "i2v": 0.2}


def theory(jobs: int) -> None:
    """M/M/4: simulated and by Erlang C."""
    servers, seconds, load = 4, 10.0, 0.7
    per_s = load * servers / seconds
    coming = arrivals.poisson(per_s * 3600, jobs / per_s / 3600, mix={"edit": 1.0}, seed=1)
    serving = {"edit": Served(seconds, Scaling(floor=servers, most=servers))}
    run = simulate(coming, serving, Policy(vary="exponential", lead_s=0.0), seed=1)  # type: ignore[arg-type]
    taken = run.stages["edit"].busy_s / len(coming)
    offered = len(coming) / coming[-1].at * taken
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = offered * blocked / (number + offered * blocked)
    waits = blocked / (1 - offered / servers * (1 - blocked))
    told = waits * taken / (servers - offered)
    found = statistics.fmean(job.waiting_s for job in run.jobs)
    print(f"\ntheory: M/M/{servers} at {load:.0%}, {len(coming):,} jobs")
    print(f"  mean wait   simulated {found:.3f} s   Erlang C {told:.3f} s   ratio {found / told:.4f} (goal within 3 %)")


def a_request(arrival: Arrival) -> VideoRequest:
    edit = EditParams(prompt="x", steps=STEPS) if "edit" in arrival.stages else None
    i2v = I2VParams(prompt="x", steps=STEPS) if "i2v" in arrival.stages else None
    return VideoRequest(job_id=uuid.uuid4().hex, references=(KEY,), edit=edit, i2v=i2v, lane=arrival.lane)


class Charged:
    """What each stage's tasks had the GPU for, as their events tell it."""

    def __init__(self, connected: JetStreamBus) -> None:
        self._bus = connected
        self.seconds: dict[Stage, list[float]] = {"edit": [], "i2v": []}

    async def watch(self) -> None:
        feed = await self._bus.listen("vidgen.events.*")
        while True:
            message = await feed.next(wait=5)
            if message is None:
                continue
            event = Event.validate_json(message.body)
            if isinstance(event, StageCompleted):
                self.seconds[event.stage].append(event.gpu_seconds)

    def clear(self) -> None:
        for seconds in self.seconds.values():
            seconds.clear()


async def send(connected: JetStreamBus, finals: Finals, arrival: Arrival) -> float:
    """Seconds from publish to `completed`."""
    request = a_request(arrival)
    begun = time.perf_counter()
    await connected.publish(topology.SUBJECT_REQUESTS, request.to_bytes(), message_id=str(request.job_id))
    return await finals.wait_for(str(request.job_id)) - begun


async def beside(connected: JetStreamBus, finals: Finals, charged: Charged, stage: Stage) -> float:
    """What a task takes beside the GPU: the median of jobs that come one at a time."""
    alone = [await send(connected, finals, Arrival(0.0, "interactive", stage)) for _ in range(6)]
    return max(0.0, statistics.median(alone[1:]) - statistics.median(charged.seconds[stage]))


async def played(connected: JetStreamBus, finals: Finals, coming: list[Arrival]) -> list[float]:
    """Seconds that each job took, sent at its time."""
    begun = time.perf_counter()

    async def one(arrival: Arrival) -> float:
        await asyncio.sleep(max(0.0, begun + arrival.at - time.perf_counter()))
        return await send(connected, finals, arrival)

    return list(await asyncio.gather(*(one(arrival) for arrival in coming)))


async def index(folder: Path, subjects: int) -> None:
    """What nats-server needs in memory for a stream with one message a subject, as the records of jobs are."""
    async with NatsServer(folder / "subjects", sync_always=False) as nats:
        client = await nats_client.connect(nats.url)
        js = client.jetstream()
        await js.add_stream(name="SUBJECTS", subjects=["s.*"], max_msgs_per_subject=1)
        before = resident(nats.pid)
        for begin in range(0, subjects, 1000):
            names = [uuid.uuid4().hex for _ in range(begin, min(subjects, begin + 1000))]
            await asyncio.gather(*(js.publish(f"s.{name}", b"x" * 16, timeout=60) for name in names))
        grown = resident(nats.pid) - before
        await client.close()
    print(f"\nmemory of nats-server: {grown / subjects:.0f} bytes a subject, over {subjects:,} subjects")


def resident(pid: int) -> int:
    """Bytes of a process that are in memory (Linux)."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def kept(url: str, jobs: int) -> None:
    """What the bus keeps of a job, by stream: bytes and messages."""
    with urllib.request.urlopen(f"{url}/jsz?streams=true") as answer:
        accounts = json.load(answer)["account_details"]
    print(f"\nthe bus after {jobs} jobs, a job:")
    for stream in sorted(accounts[0]["stream_detail"], key=lambda one: str(one["name"])):
        state = stream["state"]
        written = state["last_seq"] / jobs
        print(f"  {stream['name']:20} written {written:6.1f} messages   kept {state['bytes'] / jobs:8.0f} bytes")


def compare(name: str, system: list[float], simulated: list[float]) -> None:
    for figure, of in (("mean", statistics.fmean), ("p95", lambda seconds: float(np.percentile(seconds, 95)))):
        there, told = of(system), of(simulated)
        print(f"  {name:11} {figure:4}  system {there:7.2f} s   simulated {told:7.2f} s   ratio {told / there:.3f}")


async def measure(system: System, connected: JetStreamBus, chosen: argparse.Namespace) -> None:
    finals, charged = Finals(system.nats.url), Charged(connected)
    watching = [asyncio.create_task(finals.watch()), asyncio.create_task(charged.watch())]
    shapes: dict[Stage, Shape] = {
        "edit": Shape(chosen.edit, STEPS, FRAME_BYTES),
        "i2v": Shape(chosen.i2v, STEPS, VIDEO_BYTES),
    }
    # So that the busier stage has the asked load.
    per_s = chosen.load * chosen.workers / max(0.8 * chosen.edit, 0.8 * chosen.i2v)
    hours = chosen.jobs / per_s / 3600
    coming = arrivals.poisson(per_s * 3600, hours, mix=MIX, batch_share=0.3, seed=chosen.seed)
    async with system.workers(chosen.workers, shapes):
        added = {stage: await beside(connected, finals, charged, stage) for stage in STAGES}
        charged.clear()
        took = await played(connected, finals, coming)
    for task in watching:
        task.cancel()
    await asyncio.wait(watching)

    scaling = Scaling(floor=chosen.workers, most=chosen.workers)
    held = {stage: statistics.fmean(charged.seconds[stage]) for stage in STAGES}
    served = {stage: Served(held[stage], scaling, added[stage]) for stage in STAGES}
    run = simulate(coming, served, Policy(checkpoint_over_s=None))
    told = [job.total_s for job in run.jobs]
    print(
        f"\nsystem: {len(coming)} jobs in {coming[-1].at:.0f} s, {chosen.workers} workers a stage, "
        f"edit {chosen.edit} s asked for and {held['edit']:.3f} s held, i2v {chosen.i2v} and {held['i2v']:.3f} s, "
        f"beside the GPU {added['edit']:.3f} and {added['i2v']:.3f} s"
    )
    compare("all jobs", took, told)
    for lane in ("interactive", "batch"):
        of_lane = [number for number, arrival in enumerate(coming) if arrival.lane == lane]
        if of_lane:
            compare(lane, [took[number] for number in of_lane], [told[number] for number in of_lane])
    largest = max(abs(math.log(one / other)) for one, other in zip(told, took, strict=True))
    print(f"  the job that differs most: by a factor of {math.exp(largest):.2f} (goal for means and p95: within 10 %)")
    if finals.failed:
        print(f"\n{finals.failed} jobs FAILED")
    kept(system.nats.monitor_url, len(finals.at))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=40, help="sent to the system; 0: none")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--edit", type=float, default=1.0, help="seconds an edit holds the GPU")
    parser.add_argument("--i2v", type=float, default=3.0, help="seconds a video holds the GPU")
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--theory", type=int, default=200_000, help="jobs of the comparison with theory; 0: none")
    parser.add_argument("--subjects", type=int, default=100_000, help="of the stream whose memory is measured; 0: none")
    chosen = parser.parse_args()
    print(environment(), flush=True)
    if chosen.theory:
        theory(chosen.theory)
    with tempfile.TemporaryDirectory(prefix="vidgen-bench-") as name:
        folder = Path(name)
        if chosen.subjects:
            await index(folder, chosen.subjects)
        reference = folder / "reference.png"
        Image.new("RGB", (64, 64), "teal").save(reference)
        if not chosen.jobs:
            return
        async with NatsServer(folder / "nats") as nats, S3Server(folder / "s3") as s3:
            system = System(folder, nats, s3)
            gateway = Service("gateway", "gateway.main", folder, system.env)
            await gateway.start()
            try:
                await system.store().put(KEY, reference, "image/png")
                async with jetstream.connect(nats.url, "bench") as connected:
                    await measure(system, connected, chosen)
            finally:
                await gateway.terminate()


if __name__ == "__main__":
    uvloop.run(main())
