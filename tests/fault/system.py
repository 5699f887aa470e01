"""The whole system as processes, with everything restarted that dies, as a deployment does; faults are done to it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import secrets
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fault.nursery import BOUND_S, Child, Nursery
from tests.servers import running_nats
from tests.workbench import photograph

from vidgen import contracts, errors, jetstream, topology
from vidgen.artifacts import S3Store
from vidgen.contracts import Event
from vidgen.jetstream import JetStreamBus
from vidgen.local import NatsServer, S3Server

PHOTO = "uploads/fault.jpg"
POLL_S = 0.05
FINAL = (contracts.JobCompleted, contracts.JobFailed, contracts.JobCancelled, contracts.Rejected)


@dataclass(frozen=True)
class Asked:
    """A request that the bus acknowledged."""

    job_id: str
    seed: int
    steps: int
    stages: tuple[contracts.Stage, ...]
    told: str


@dataclass
class System:
    """Gateways and workers on a bus and a store. Whoever dies is started again, under a new name."""

    nats: NatsServer
    s3: S3Server
    nursery: Nursery
    folder: Path
    env: Mapping[str, str] = field(default_factory=dict)
    nats_url: str = ""  # what the services are told, where that is a proxy
    s3_endpoint: str = ""
    pace_s: float = 0.01
    restarts: bool = True

    def __post_init__(self) -> None:
        self.prefix = f"f{secrets.token_hex(4)}"
        self.journals = self.folder / "journals"
        self.journals.mkdir(exist_ok=True)
        self.alive: list[Child] = []
        self.dead: list[Child] = []  # whoever ended, however
        self.own_env: dict[str, dict[str, str]] = {}
        self.asked: dict[str, Asked] = {}
        self.events: list[contracts.AnyEvent] = []
        self.ended: set[str] = set()
        self.store = S3Store(self.s3.endpoint, self.s3.access_key, self.s3.secret_key, self.s3.bucket)
        self._count, self._seeds = 0, itertools.count(1)

    # ── its processes ────────────────────────────────────────────────────────────────────────────────────────────

    def start(self, role: str, **env: str) -> Child:
        """Start a gateway or a worker; returns before it is ready."""
        self._count += 1
        name = f"{role}-{self._count}"
        given = {name: value for name, value in os.environ.items() if not name.startswith("VIDGEN_")} | {
            "VIDGEN_NATS_URL": self.nats_url or self.nats.url,
            "VIDGEN_S3_ENDPOINT": self.s3_endpoint or self.s3.endpoint,
            "VIDGEN_S3_ACCESS_KEY": self.s3.access_key, "VIDGEN_S3_SECRET_KEY": self.s3.secret_key,
            "VIDGEN_S3_BUCKET": self.s3.bucket, "VIDGEN_LOG_FORMAT": "json", "VIDGEN_HTTP_PORT": "0",
            "VIDGEN_DEVICE": "cpu", "VIDGEN_ENGINE": "preview", "VIDGEN_HEARTBEAT_S": "0.5",
            "VIDGEN_WORKER_SILENCE_S": "1", "VIDGEN_BACKOFF_BASE": "0.1", "VIDGEN_WORKER_ID": self.id_of(name),
            "FAULT_JOURNALS": str(self.journals), "FAULT_PACE": str(self.pace_s),
        }  # fmt: skip
        child = self.nursery.start(name, role, self.folder, {**given, **self.env, **env})
        self.alive.append(child)
        self.own_env[name] = env
        return child

    def id_of(self, name: str) -> str:
        """A worker's name on the bus."""
        return f"{self.prefix}-{name}"

    def of(self, role: str) -> list[Child]:
        return [child for child in self.alive if child.role == role]

    async def until_ready(self) -> None:
        for child in list(self.alive):
            await child.until_ready()

    async def kill(self, child: Child, number: int = signal.SIGKILL) -> None:
        """Signal a process and wait for its end; with `restarts` another one takes its place."""
        child.signal(number)
        await child.until_ended()
        self._bury(child)

    def _bury(self, child: Child) -> None:
        if child in self.alive:
            self.alive.remove(child)
            self.dead.append(child)
            if self.restarts:
                self.start(child.role, **self.own_env[child.name])

    async def _supervise(self) -> None:
        while True:
            for child in [child for child in self.alive if child.ended is not None]:
                self._bury(child)
            await asyncio.sleep(POLL_S)

    # ── its jobs ─────────────────────────────────────────────────────────────────────────────────────────────────

    def request(
        self, *, steps: int = 4, stages: Sequence[contracts.Stage] = ("edit", "i2v"), told: str = "work", **more: Any
    ) -> tuple[Asked, bytes]:
        """The next request, and its bytes; it is asked for once it is sent."""
        seed = next(self._seeds)
        asked = Asked(f"{self.prefix}-{seed}", seed, steps, tuple(stages), told)
        shape = {"steps": steps, "seed": seed, "width": 320, "height": 192}
        parts: dict[str, Any] = {"edit": {"prompt": told, **shape}} if "edit" in stages else {}
        parts |= {"i2v": {"prompt": "zoom", **shape, "num_frames": 5, "fps": 8}} if "i2v" in stages else {}
        return asked, json.dumps({"job_id": asked.job_id, "references": [PHOTO], **parts, **more}).encode()

    async def submit(
        self, count: int = 1, *, steps: int = 4, stages: Sequence[contracts.Stage] = ("edit", "i2v"),
        told: str = "work",
        copies: Callable[[], int] = lambda: 1, give_up_s: float = BOUND_S, **more: Any,
    ) -> list[Asked]:  # fmt: skip
        """Publish requests as any NATS client does, each until the bus acknowledged it; `copies` times each."""
        made = []
        for _ in range(count):
            asked, body = self.request(steps=steps, stages=stages, told=told, **more)
            for copy in range(copies()):
                await self._publish(body, f"{asked.job_id}:{copy}", give_up_s)
            self.asked[asked.job_id] = asked
            made.append(asked)
        return made

    async def _publish(self, body: bytes, message_id: str, give_up_s: float) -> None:
        async with asyncio.timeout(give_up_s):
            while True:
                try:
                    await self.bus.publish(topology.SUBJECT_REQUESTS, body, message_id=message_id)
                    return
                except errors.BusError:
                    await asyncio.sleep(POLL_S)

    async def until_ended(self, jobs: Sequence[Asked] | None = None, bound: float = BOUND_S) -> None:
        """Wait until each job has its final event."""
        wanted = set(self.asked if jobs is None else [job.job_id for job in jobs])
        try:
            async with asyncio.timeout(bound):
                while not wanted <= self.ended:
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            open_jobs = sorted(wanted - self.ended)
            last = {job: [e.type for e in self.events if e.job_id == job] for job in open_jobs[:5]}
            raise AssertionError(f"{len(open_jobs)} jobs did not end in {bound} s, as {last}") from None

    async def until(self, true: Callable[[], bool], bound: float = BOUND_S) -> None:
        """Wait until something is so; what the events say is looked at."""
        async with asyncio.timeout(bound):
            while not true():
                await asyncio.sleep(POLL_S)

    async def at_work(self, bound: float = BOUND_S) -> Child:
        """The worker that begins a task next."""
        place = len(self.events)
        async with asyncio.timeout(bound):
            while True:
                for event in self.events[place:]:
                    for child in self.of("worker"):
                        if isinstance(event, contracts.StageStarted) and event.worker == self.id_of(child.name):
                            return child
                await asyncio.sleep(0.005)

    def said(self, kind: type[contracts.AnyEvent], job: Asked | None = None) -> int:
        """How many events of a kind are in the logs by now."""
        return sum(isinstance(event, kind) and job in (None, self.asked.get(event.job_id)) for event in self.events)

    def artifacts(self) -> Counter[str]:
        """The keys of what the logs say was stored, as paths in the store."""
        completed = (event for event in self.events if isinstance(event, contracts.StageCompleted))
        return Counter(f"/{self.s3.bucket}/{artifact.key}" for event in completed for artifact in event.artifacts)

    def tries(self) -> set[int]:
        """Which tries tasks were at: {1} where none was charged for what was not its fault."""
        return {event.tries for event in self.events if isinstance(event, contracts.StageStarted)}

    async def _read_events(self) -> None:
        feed = None
        while True:
            try:
                feed = feed or await self.bus.follow(topology.EVENTS, "vidgen.events.*")
                stored = await feed.next(2.0)
            except errors.BusError:  # the stream may not be there yet
                await asyncio.sleep(POLL_S)
                continue
            if stored is not None:
                event = Event.validate_json(stored.body)
                self.events.append(event)
                if isinstance(event, FINAL):
                    self.ended.add(event.job_id)

    @contextlib.asynccontextmanager
    async def running(self, *, gateways: int = 1, workers: int = 2) -> AsyncIterator[System]:
        """Start everything, and end it."""
        photo = self.folder / "photo.jpg"
        photo.write_bytes(photograph())
        await self.store.put(PHOTO, photo, "image/jpeg")
        for role, count in (("gateway", gateways), ("worker", workers)):
            for _ in range(count):
                self.start(role)
        async with jetstream.connect(self.nats.url, "fault", reconnect_time_wait=0.05) as bus:
            self.bus: JetStreamBus = bus
            await self.until_ready()
            sides = [asyncio.create_task(work) for work in (self._supervise(), self._read_events())]
            try:
                yield self
            finally:
                for side in sides:
                    side.cancel()
                ends = await asyncio.gather(*sides, return_exceptions=True)
                assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends
                for child in self.alive:
                    child.signal(signal.SIGKILL)
                for child in self.alive:
                    await child.until_ended()


@dataclass
class Lab:
    """Where systems are built: a folder, the nursery, the store that all share. `chance` is drawn from a fixed seed."""

    nursery: Nursery
    s3: S3Server
    folder: Path
    seed: int = 1

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)

    @contextlib.asynccontextmanager
    async def nats(self) -> AsyncIterator[NatsServer]:
        async with running_nats(self.folder / "nats") as server:
            yield server

    @contextlib.asynccontextmanager
    async def system(
        self, *, gateways: int = 1, workers: int = 2, nats: NatsServer | None = None, **options: Any
    ) -> AsyncIterator[System]:
        """A system of its own, running."""
        async with contextlib.AsyncExitStack() as stack:
            bus = nats or await stack.enter_async_context(self.nats())
            made = System(bus, options.pop("s3", self.s3), self.nursery, self.folder, **options)
            yield await stack.enter_async_context(made.running(gateways=gateways, workers=workers))
