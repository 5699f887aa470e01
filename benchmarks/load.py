"""Ten thousand jobs at once: what goes in, what gets through, and how soon the gateway answers meanwhile.

    python benchmarks/load.py [--jobs 10000] [--readers 50] [--workers 20] [--processes 2]
                              [--split] [--rounds 1] [--nice-peers 0]
                              [--peers celery celery-threads taskiq taskiq-nats]

Real nats-server (synced), real S3 server, gateway and workers as processes on this machine, engines of zero cost.
Beside it, in the same run, the same jobs by others: an object in S3, two stages, an object out, the status by HTTP.
With several rounds all take turns, in one order and then the other: a machine is not as fast at all times.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

sys.path.insert(0, str(Path(__file__).parent))

import nats
import uvloop
from nats.aio.client import Client
from PIL import Image

from lean import Connection
from overhead import System, environment
from vidgen import topology
from vidgen.local import NatsServer, S3Server
from vidgen.local.process import Process
from vidgen.local.stack import NICE, Service
from watchers import quantile, summary

HERE = Path(__file__).parent
# Tasks' temporary files, of all sides: on a disk making a file may take longer behind thousands that were just removed,
# so each run would slow down the next.
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
KEY = "uploads/bench/reference.png"
PROBES_PER_S = 20.0
SENDERS = 16
SAMPLE_S = 0.2
WARM_SHARE = 0.2  # of the jobs: caches fill and imports happen, so memory is looked at behind them
STALL_S = 120.0
# A side's server is asked how much it holds (but for taskiq on JetStream, whose workers say a word on a subject that
# nothing stores): hearing of each event cost 2 % of the machine. What is done twice counts as more, so at the end each
# job is asked for.
EVENTS_OF_A_JOB = 5  # behind `accepted`: started and completed, of two stages; completed
RESULTS_OF_A_JOB = 2  # beside a few keys of its own: a job or two too early, in Redis's favour


class Side(Protocol):
    """A system under load."""

    name: str
    url: str
    sse: bool
    folders: dict[str, Path]  # what its servers keep
    pids: dict[str, list[int]]  # of its processes, by what they are

    def body(self, job_id: str) -> bytes: ...

    def workers(self, count: int, processes: int) -> contextlib.AbstractAsyncContextManager[float]:
        """Workers for the block, all of them up; the CPU seconds that it took to start them."""
        ...

    async def done(self) -> int:
        """Jobs that have come to their end so far."""
        ...

    async def completed(self, job_id: str, connection: Connection) -> bool: ...


@dataclass
class Figures:
    """What one side did."""

    name: str
    requests_per_s: float = 0.0
    jobs_per_s: float = 0.0
    probes: dict[str, list[float]] = field(default_factory=dict)
    told: int = 0
    refused: int = 0
    memory: list[tuple[int, float]] = field(default_factory=list)  # jobs done, MB
    disk: dict[str, float] = field(default_factory=dict)  # MB per 1,000 jobs
    cpu: dict[str, dict[str, float]] = field(default_factory=dict)  # seconds per 1,000 jobs, without the workers' start
    asked: int = 0  # of all jobs, at the end
    completed: int = 0  # as it was told of them

    def slope(self) -> float:
        """MB per 1,000 jobs done, by least squares behind the warm-up."""
        last = self.memory[-1][0] if self.memory else 0
        points = [(done / 1000, size) for done, size in self.memory if done >= WARM_SHARE * last]
        middle_x, middle_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
        spread = sum((x - middle_x) ** 2 for x, _ in points)
        return sum((x - middle_x) * (y - middle_y) for x, y in points) / spread if spread else 0.0

    def show(self) -> None:
        print(f"\n{self.name}")
        print(f"  requests per second in:   {self.requests_per_s:8.1f}")
        print(f"  jobs per second through:  {self.jobs_per_s:8.1f}")
        for phase, times in self.probes.items():
            print(f"  GET /v1/jobs/{{id}}, {phase + ':':9} {summary(times)}")
        jobs = self.memory[-1][0]
        quarters = [next(size for done, size in self.memory if done >= jobs * part / 4) for part in range(5)]
        print(
            f"  memory of the gateway: {quarters[0]:.1f} MB at the start, {quarters[-1]:.1f} at the end, by quarters"
            f" {' '.join(f'{size:.1f}' for size in quarters[1:])};"
            f" {self.slope():+.3f} MB per 1,000 jobs behind the first {WARM_SHARE:.0%}"
        )
        print("  disk per 1,000 jobs: " + ", ".join(f"{name} {size:.2f} MB" for name, size in self.disk.items()))
        for phase, used in self.cpu.items():
            parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in used.items())
            print(f"  CPU seconds per 1,000 jobs, {phase + ':':9} {parts}; {sum(used.values()):.1f} in all")
        print(
            f"  told to readers: {self.told:,} events or answers; looks that were refused: {self.refused}; jobs told"
            f" as completed: {self.completed:,} of {self.asked:,}", flush=True
        )  # fmt: skip


class Vidgen:
    """This project."""

    name, sse = "vidgen", True

    def __init__(self, system: System, gateways: list[Service], client: Client) -> None:
        self._system, self._log = system, client.jetstream()
        self.url = gateways[0].url
        self.folders = {"bus": system.nats.folder / "data", "S3": system.s3.folder / "data"}
        self.pids = {"gateway": [one.pid for one in gateways], "bus": [system.nats.pid], "S3": [system.s3.pid]}

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls, folder: Path, s3: S3Server, roles: Sequence[str]) -> AsyncIterator[Vidgen]:
        bus = NatsServer(folder / "nats")
        bus.process.nice = NICE  # as `vidgen up` starts its servers, and workers
        async with bus:
            system = System(folder, bus, s3)
            gateways = [
                Service(f"gateway-{number}", "gateway.main", folder, {**system.env, "VIDGEN_GATEWAY_ROLES": role})
                for number, role in enumerate(roles)
            ]
            try:
                for gateway in gateways:
                    await gateway.start()
                client = await nats.connect(bus.url)
                yield cls(system, gateways, client)
                await client.close()
            finally:
                for gateway in gateways:
                    await gateway.terminate()

    def body(self, job_id: str) -> bytes:
        asked = {"job_id": job_id, "references": [KEY], "edit": {"prompt": "x", "steps": 2},
                 "i2v": {"prompt": "x", "steps": 1}}  # fmt: skip
        return json.dumps(asked).encode()

    @contextlib.asynccontextmanager
    async def workers(self, count: int, processes: int) -> AsyncIterator[float]:
        edits, i2vs = _shares(count - count // 2, processes), _shares(count // 2, processes)
        commands = [
            [sys.executable, str(HERE / "workers.py"), str(edit), str(i2v)]
            for edit, i2v in zip(edits, reversed(i2vs), strict=True)
        ]
        env = {**self._system.env, "VIDGEN_NICE": str(NICE)}
        async with _children(commands, env, self._system.folder / "workers") as started:
            self.pids["workers"] = list(started)
            yield sum(started.values())

    async def done(self) -> int:
        events, accepted = await asyncio.gather(*map(self._log.stream_info, (topology.EVENTS, topology.HISTORY)))
        return (events.state.messages - accepted.state.messages) // EVENTS_OF_A_JOB

    async def completed(self, job_id: str, connection: Connection) -> bool:
        status, body = await connection.call("GET", f"/v1/jobs/{job_id}")
        return status == 200 and json.loads(body)["status"] == "completed"


class Peer:
    """Celery or taskiq with Redis or NATS, and FastAPI before it: `benchmarks/peers.py` is all of it."""

    sse = False

    def __init__(
        self, kind: str, server: Redis | Nats, api: Service, env: dict[str, str], folder: Path, s3: S3Server,
        nice: int,
    ) -> None:  # fmt: skip
        self._nice = nice
        self.name, self._kind, self._server, self._env, self._folder = PEERS[kind], kind, server, env, folder
        self.url = api.url
        self.folders = {server.name: server.data, "S3": s3.folder / "data"}
        self.pids = {"gateway": [api.pid], server.name: [server.pid], "S3": [s3.pid]}

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls, kind: str, folder: Path, s3: S3Server, nice: int) -> AsyncIterator[Peer]:
        server = Nats(folder / "nats") if kind == "taskiq-nats" else Redis(folder / "redis")
        server.process.nice = nice
        async with server:
            python_path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
            env = {
                **os.environ, "PYTHONPATH": python_path, "BENCH_SERVER": server.url, "BENCH_PEER": kind,
                "BENCH_S3": f"{s3.endpoint} {s3.access_key} {s3.secret_key} {s3.bucket}",
            }  # fmt: skip
            api = PeerApi("peer-api", "peers", folder, env)
            try:
                await api.start()
                yield cls(kind, server, api, env, folder, s3, nice)
            finally:
                await api.terminate()

    def body(self, job_id: str) -> bytes:
        return json.dumps(
            {"job_id": job_id, "references": [KEY], "edit": {"prompt": "x"}, "i2v": {"prompt": "x"}}
        ).encode()

    @contextlib.asynccontextmanager
    async def workers(self, count: int, processes: int) -> AsyncIterator[float]:
        if self._kind.startswith("celery"):
            quiet = ["--loglevel=WARNING", "--without-gossip", "--without-mingle", "--without-heartbeat"]
            celery = [sys.executable, "-m", "celery", "-A", "peers:app", "worker", *quiet]
            if self._kind == "celery":  # its own pool, which is its default: a process for each worker
                commands = [[*celery, f"--concurrency={count}"]]
            else:
                commands = [
                    [*celery, "--pool=threads", f"--concurrency={share}", f"--hostname={number}@%h"]
                    for number, share in enumerate(_shares(count, processes))
                ]
        else:
            commands = [
                [sys.executable, "-m", "taskiq", "worker", "peers:broker", "--workers=1",
                 f"--max-async-tasks={share}", "--max-prefetch=1", "--ack-type=when_saved", "--log-level=WARNING"]
                for share in _shares(count, processes)
            ]  # fmt: skip
        async with _children(commands, self._env, self._folder / "workers", self._nice) as started:
            self.pids["workers"] = list(started)
            yield sum(started.values())

    async def done(self) -> int:
        return await self._server.done()

    async def completed(self, job_id: str, connection: Connection) -> bool:
        status, body = await connection.call("GET", f"/v1/jobs/{job_id}")
        return status == 200 and json.loads(body)["status"] == "completed"


PEERS = {
    "celery": "Celery + Redis", "celery-threads": "Celery, in threads, + Redis", "taskiq": "taskiq + Redis Streams",
    "taskiq-nats": "taskiq + JetStream",
}  # fmt: skip


class PeerApi(Service):
    """`python -m peers`, which writes its URL as our services do, and has no probe of its own."""

    async def until_ready(self, limit: float = 60.0) -> None:
        async with asyncio.timeout(limit):
            while not self._read_url():
                self.process.check()
                await asyncio.sleep(0.05)


class Redis:
    """A redis-server on loopback that syncs each write before it answers, as our bus does."""

    name = "Redis"

    def __init__(self, folder: Path) -> None:
        self.folder = self.data = folder
        self._socket = folder / "redis.sock"
        self.process = Process("redis-server", folder / "log")

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        return self.process.pid

    async def __aenter__(self) -> Redis:
        self.folder.mkdir(parents=True)
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        if program is None:
            raise SystemExit("the peers need redis-server: apt-get install redis-server")
        self.process.start([
            program, "--port", "0", "--unixsocket", str(self._socket), "--dir", str(self.folder), "--save", "",
            "--appendonly", "yes", "--appendfsync", "always",
        ])  # fmt: skip
        while not self._socket.exists():
            self.process.check()
            await asyncio.sleep(0.05)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.process.stop(10)

    async def done(self) -> int:
        return await asyncio.to_thread(self._count)

    def _count(self) -> int:
        import redis

        with redis.Redis(unix_socket_path=str(self._socket)) as client:
            return int(client.dbsize()) // RESULTS_OF_A_JOB


class Nats:
    """The very nats-server that ours has, for others; a job's end is heard on a subject that costs it no write."""

    name = "bus"

    def __init__(self, folder: Path) -> None:
        self._server = NatsServer(folder)
        self.process = self._server.process
        self.data = folder / "data"
        self._stack = contextlib.AsyncExitStack()
        self._done = 0

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def pid(self) -> int:
        return self._server.pid

    async def __aenter__(self) -> Nats:
        await self._stack.enter_async_context(self._server)
        client = await nats.connect(self.url)
        self._stack.push_async_callback(client.close)
        await client.subscribe("bench.done", cb=self._heard)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def _heard(self, _: object) -> None:
        self._done += 1

    async def done(self) -> int:
        return self._done


@contextlib.asynccontextmanager
async def _children(
    commands: list[list[str]], env: dict[str, str], folder: Path, nice: int = 0
) -> AsyncIterator[dict[int, float]]:
    """Processes that run for the block, all of them ready: the CPU seconds that each took for that, by its id."""
    folder.mkdir(exist_ok=True)  # noqa: ASYNC240
    processes = [Process(f"workers-{number}", folder / f"{number}.log") for number in range(len(commands))]
    marks = [folder / f"{number}.ready" for number in range(len(commands))]
    started: dict[int, float] = {}
    try:
        for process, command, mark in zip(processes, commands, marks, strict=True):
            process.nice = nice
            process.start(command, {**env, "VIDGEN_READY_FILE": str(mark), "TMPDIR": SCRATCH})
        while len(started) < len(processes):
            for process, mark in zip(processes, marks, strict=True):
                process.check()
                if process.pid not in started and mark.exists():
                    started[process.pid] = cpu_s([process.pid])
            await asyncio.sleep(0.02)
        yield started
    finally:
        await asyncio.gather(*(process.stop(20) for process in processes))


def _shares(count: int, parts: int) -> list[int]:
    return [count // parts + (number < count % parts) for number in range(parts)]


def memory_mb(pids: Sequence[int]) -> float:
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def cpu_s(pids: list[int]) -> float:
    """CPU seconds of processes and all that they started so far."""
    found, parents = 0.0, {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            parents[int(entry.name)] = (int(fields[1]), int(fields[11]) + int(fields[12]))
    for pid, (_, used) in parents.items():
        above = pid
        while above and above not in pids:
            above = parents.get(above, (0, 0))[0]
        found += used if above else 0
    return found / os.sysconf("SC_CLK_TCK")


def disk_mb(folder: Path) -> float:
    """What the files take on disk, in blocks: sparse and preallocated ones count as what they are."""
    return int(subprocess.run(["du", "-sk", folder], capture_output=True, check=True).stdout.split()[0]) / 1e3


async def submit(side: Side, ids: list[str], told: Callable[[int], None]) -> float:
    """Requests per second that are taken in, a few at a time."""
    waiting = iter(ids)
    taken = 0

    async def send() -> None:
        nonlocal taken
        async with Connection(side.url) as connection:
            for job_id in waiting:
                status, body = await connection.call("POST", "/v1/jobs", side.body(job_id))
                assert status in (200, 202), body
                taken += 1
                told(taken)

    begun = time.perf_counter()
    await asyncio.gather(*(send() for _ in range(SENDERS)))
    return len(ids) / (time.perf_counter() - begun)


async def drain(side: Side, jobs: int, memory: list[tuple[int, float]]) -> float:
    """Jobs per second from now, when all workers are up, until all are done."""
    moved = time.perf_counter()
    first = await side.done(), moved
    while True:
        done, at = await side.done(), time.perf_counter()
        if done > (memory[-1][0] if memory else 0):
            moved = at
        memory.append((done, memory_mb(side.pids["gateway"])))
        if done >= jobs:
            return (done - first[0]) / max(at - first[1], SAMPLE_S)
        if at - moved > STALL_S:
            raise SystemExit(f"{side.name} stands still at {done} of {jobs} jobs")
        await asyncio.sleep(SAMPLE_S)


async def measure(side: Side, options: argparse.Namespace) -> Figures:
    figures = Figures(side.name)
    ids = [uuid.uuid4().hex for _ in range(options.jobs)]
    before = {name: disk_mb(folder) for name, folder in side.folders.items()}
    spent = {name: cpu_s(pids) for name, pids in side.pids.items()}

    def used(phase: str) -> None:
        now = {name: cpu_s(pids) for name, pids in side.pids.items()}
        figures.cpu[phase] = {name: (now[name] - spent.get(name, 0.0)) / options.jobs * 1000 for name in now}
        spent.update(now)

    watcher = await asyncio.create_subprocess_exec(
        sys.executable, str(HERE / "watchers.py"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, limit=1 << 30
    )
    assert watcher.stdin is not None
    feed = watcher.stdin
    async with Connection(side.url) as connection:
        await connection.call("POST", "/v1/jobs", side.body(ids[0]))
    asked = {"url": side.url, "ids": ids, "readers": options.readers, "sse": side.sse, "rate": PROBES_PER_S}
    feed.write(json.dumps(asked).encode() + b"\n")
    figures.requests_per_s = await submit(
        side, ids[1:], lambda count: feed.write(b"%d\n" % count) if not count % 100 else None
    )
    feed.write(b"%d\n" % len(ids))
    used("filling")
    turned = time.time()
    async with side.workers(options.workers, options.processes) as started_s:
        spent["workers"] = started_s
        figures.jobs_per_s = await drain(side, options.jobs, figures.memory)
        feed.close()
        used("through")
        seen = json.loads((await watcher.communicate())[0])
    figures.told, figures.refused = seen["told"], seen["refused"]
    figures.probes = {
        "filling": [seconds for at, seconds in seen["times"] if at < turned],
        "through": [seconds for at, seconds in seen["times"] if at >= turned],
    }
    figures.disk = {n: (disk_mb(f) - before[n]) / options.jobs * 1000 for n, f in side.folders.items()}
    async with Connection(side.url) as connection:
        figures.asked = len(ids)
        figures.completed = sum([await side.completed(job_id, connection) for job_id in ids])
    return figures


@contextlib.asynccontextmanager
async def store(folder: Path, nice: int) -> AsyncIterator[S3Server]:
    """An S3 server of its own for each side, as nice as its workers, with the reference in it."""
    from vidgen.artifacts import S3Store

    reference = folder / "reference.png"
    Image.new("RGB", (64, 64), "teal").save(reference)
    s3 = S3Server(folder / "s3")
    s3.process.nice = nice
    async with s3:
        await S3Store(s3.endpoint, s3.access_key, s3.secret_key, s3.bucket).put(KEY, reference, "image/png")
        yield s3


def compare(done: dict[str, list[Figures]]) -> None:
    """Each side over its rounds, and ours to the others': the median of the rounds' ratios, and one p99 of them all."""
    ours = done["vidgen"]
    print()
    for rounds in done.values():
        times = through(rounds)
        print(f"{rounds[0].name}: jobs per second {' '.join(f'{one.jobs_per_s:.1f}' for one in rounds)};"
              f" GET, through: {summary(times)}")  # fmt: skip
        if rounds is not ours:
            pairs = list(zip(ours, rounds, strict=True))
            jobs = statistics.median(our.jobs_per_s / other.jobs_per_s for our, other in pairs)
            requests = statistics.median(our.requests_per_s / other.requests_per_s for our, other in pairs)
            last = quantile(through(ours), 0.99) / quantile(through(rounds), 0.99)
            print(
                f"  vidgen to it: jobs per second × {jobs:.2f}, requests per second × {requests:.2f}, p99 × {last:.2f}"
            )


def through(rounds: list[Figures]) -> list[float]:
    return [seconds for one in rounds for seconds in one.probes["through"]]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--readers", type=int, default=50)
    parser.add_argument("--workers", type=int, default=20, help="half of them for each stage")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that our workers, and others', share")
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1, help="how often each side has its turn")
    parser.add_argument("--split", action="store_true", help="one more gateway, which alone moves the jobs on")
    parser.add_argument(
        "--nice-peers", type=int, default=0, metavar="N", help="how nice the others' workers and S3 are"
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    options = parser.parse_args()
    print(environment())
    roles = ["api" if options.split else "api,pipeline"] * options.gateways + ["pipeline"] * options.split
    busy = " ".join(f"{one:.1f}" for one in os.getloadavg())
    print(f"load average {busy}; {options.jobs:,} jobs, {options.readers} readers, {options.workers} workers in"
          f" {options.processes} processes, ours and our servers at nice {NICE}, others' at {options.nice_peers},"
          f" gateways of ours: {' + '.join(roles)}", flush=True)  # fmt: skip
    done: dict[str, list[Figures]] = {kind: [] for kind in ("vidgen", *options.peers)}
    with tempfile.TemporaryDirectory(prefix="vidgen-load-") as name:
        for number in range(options.rounds):
            for kind in reversed(done) if number % 2 else done:
                folder = Path(name) / f"{kind}-{number}"
                folder.mkdir()
                async with store(folder, NICE if kind == "vidgen" else options.nice_peers) as s3:
                    if kind == "vidgen":
                        starting: contextlib.AbstractAsyncContextManager[Side] = Vidgen.start(folder, s3, roles)
                    else:
                        starting = Peer.start(kind, folder, s3, options.nice_peers)
                    async with starting as side:
                        done[kind].append(await measure(side, options))
                done[kind][-1].show()
    compare(done)
    print(f"load average at the end {' '.join(f'{one:.1f}' for one in os.getloadavg())}")


if __name__ == "__main__":
    uvloop.run(main())
