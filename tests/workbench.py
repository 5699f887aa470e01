"""What tests of the worker runtime stand at: a queue, a store with real images, and a journal of what was done."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from vidgen import contracts, gpu, topology
from vidgen.bus import Delivery, Feed
from vidgen.company import Company
from vidgen.contracts import Event, Lane, Stage, Task
from vidgen.engine import Engine
from vidgen.handler import Handler
from vidgen.metrics import Outcome, WorkerMetrics
from vidgen.scratch import TIDY_S
from vidgen.settlement import Policy
from vidgen.testing import Clock, FakeClock, MemoryBus, MemoryStore
from vidgen.turn import Turn

BOUND = 60.0  # how long to wait for what must come; nothing waits that long unless something is broken
USD_PER_HOUR = 3600.0  # a dollar a second


def photograph(size: tuple[int, int] = (32, 24)) -> bytes:
    """A small real JPEG."""
    data = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(data, "JPEG")
    return data.getvalue()


class LoopClock:
    """Moves the running event loop's own time: what waits for a time that has come by then goes on."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._real, self._ahead = loop.time, 0.0
        loop.time = lambda: self._real() + self._ahead  # type: ignore[method-assign]

    def advance(self, seconds: float) -> None:
        self._ahead += seconds

    def stop(self) -> None:
        """From now on it moves by `advance` alone: for what must not be late on a machine that stalls."""
        now = self._real()
        self._real = lambda: now


def one_thread() -> None:
    """Have all that the running loop gives to threads done by one, in order."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))


async def tidied(clock: LoopClock) -> None:
    """Let the time pass by which scratch folders that were left are emptied, in the thread of `one_thread`."""
    clock.advance(TIDY_S)
    await settled()
    await asyncio.to_thread(lambda: None)  # behind what that thread was given


async def settled() -> None:
    """Let everything that can go on in the event loop do so."""
    for _ in range(50):
        await asyncio.sleep(0)


class Journal:
    """What was done, in order; wakes those who wait for more."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self._more = asyncio.Event()

    def add(self, entry: str) -> None:
        self.entries.append(entry)
        self._more.set()

    async def until(self, true: Callable[[], bool], bound: float = BOUND) -> None:
        """Wait until `true()`, looking at each new entry."""
        async with asyncio.timeout(bound):
            while not true():
                self._more.clear()
                await self._more.wait()


class JournalBus(MemoryBus):
    """A MemoryBus that writes down each call that worked, publishes with what they say."""

    def __init__(self, journal: Journal, clock: Clock | None, ack_wait: float) -> None:
        super().__init__(topology.Topology(ack_wait=ack_wait), clock=clock)
        self.journal = journal

    async def publish(self, subject: str, body: bytes, **options: Any) -> int:
        seq = await super().publish(subject, body, **options)
        if subject.startswith("vidgen.events."):
            self.journal.add(Event.validate_json(body).type)
        return seq

    @contextlib.asynccontextmanager
    async def call(self, method: str) -> AsyncIterator[None]:
        async with super().call(method):
            yield
        self.journal.add(method)


class JournalStore(MemoryStore):
    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self.journal = journal

    async def put(self, key: str, path: Path, content_type: str, metadata: dict[str, str] | None = None) -> None:
        await super().put(key, path, content_type, metadata)
        self.journal.add(f"put {key}")


class JournalLock(asyncio.Lock):
    """The device; the journal says who waits for it."""

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self.journal = journal

    async def acquire(self) -> Any:
        self.journal.add("device wanted")
        return await super().acquire()


def work_of(stage: Stage, **given: Any) -> contracts.Work:
    if stage == "edit":
        edit: dict[str, Any] = {
            "prompt": "p", "user_prompt": "p", "negative_prompt": " ", "steps": 4, "true_cfg_scale": 1.0,
            "guidance_scale": 1.0, "seed": 7, "width": 64, "height": 64, "candidates": 1,
        }  # fmt: skip
        return contracts.EditWork(**edit | given)
    i2v: dict[str, Any] = {
        "prompt": "p", "negative_prompt": "", "steps": 3, "guidance_scale": 1.0, "seed": 7, "num_frames": 5, "fps": 8,
        "width": 64, "height": 64,
    }  # fmt: skip
    return contracts.I2VWork(**i2v | given)


def task_of(job: str = "j1", stage: Stage = "edit", lane: Lane = "interactive", **given: Any) -> Task:
    """A task of `job`; what is not a field of the task is one of its work."""
    own = {name: given.pop(name) for name in list(given) if name in Task.model_fields}
    fields: dict[str, Any] = {"inputs": (f"uploads/{job}.jpg",), "queued_at": datetime.now(UTC)}
    return Task(job_id=job, stage=stage, lane=lane, work=work_of(stage, **given), **fields | own)


@dataclass
class Bench:
    """A handler with its doubles. The bus's time stands still where `clock` is a FakeClock."""

    engine: Engine
    stage: Stage = "edit"
    clock: FakeClock | None = None
    ack_wait: float = 60.0
    max_attempts: int = 3
    worker_id: str = "w1"
    journal: Journal = field(default_factory=Journal)

    def __post_init__(self) -> None:
        self.bus = JournalBus(self.journal, self.clock, self.ack_wait)
        self.store = JournalStore(self.journal)
        self.monitor = gpu.monitor("cpu")
        self.metrics = WorkerMetrics(self.stage, self.monitor.read())
        self.device = JournalLock(self.journal)
        self.device_thread = ThreadPoolExecutor(1, "device")
        self.policy = Policy(
            worker_id=self.worker_id, stage=self.stage, ack_wait=self.ack_wait, max_attempts=self.max_attempts,
            gpu_usd_per_hour=USD_PER_HOUR,
        )  # fmt: skip
        self.use(self.engine)

    def use(self, engine: Engine) -> None:
        """Go on with another worker's engine: same bus, same store."""
        self.engine, self.company = engine, Company()
        self.handler = Handler(
            self.bus, self.store, engine, self.device_thread, self.metrics, self.policy, self.company
        )

    async def queue(self, task: Task | None = None, **given: Any) -> Task:
        """Store a task's inputs and put it on its queue."""
        task = task or task_of(stage=self.stage, **given)
        for key in task.inputs:
            if key.startswith("uploads/"):
                self.store.add(key, photograph(), "image/jpeg")
        await self.publish(task.lane, task.job_id, task.to_bytes(), f"{task.job_id}:{task.stage}:{task.run}")
        return task

    async def queue_where_the_log_stands(self, **given: Any) -> Task:
        """As a gateway does: the task says where its job's log stands."""
        task = task_of(stage=self.stage, **given)
        newest = await self.bus.last(topology.EVENTS, topology.subject_of_events(task.job_id))
        self.store.add(task.inputs[0], photograph(), "image/jpeg")
        await self.bus.publish(
            topology.subject_of_task(self.stage, task.lane, task.job_id), task.to_bytes(),
            message_id=f"{task.job_id}:{task.stage}:{task.run}",
            headers={topology.HEADER_LOG_SEQ: str(newest.seq if newest else 0)},
        )  # fmt: skip
        return task

    async def publish(self, lane: Lane, job: str, body: bytes, message_id: str = "any") -> None:
        await self.bus.publish(topology.subject_of_task(self.stage, lane, job), body, message_id=message_id)

    async def take(self, lane: Lane = "interactive", wait: float = 0) -> Delivery:
        delivery = await self.bus.pull(topology.consumer_of(self.stage, lane), wait)
        assert delivery is not None
        return delivery

    async def run(self, turn: Turn | None = None) -> Outcome:
        """Take the next task and see it through."""
        return await self.handler.handle(await self.take(), turn or self.turn())

    async def begin(self, turn: Turn | None = None) -> asyncio.Task[Outcome]:
        """Take the next task and leave it under way."""
        return asyncio.create_task(self.handler.handle(await self.take(), turn or self.turn()))

    def turn(self) -> Turn:
        return Turn(self.device)

    async def say(self, event: contracts.AnyEvent) -> None:
        """Append to a job's log, as somebody else would."""
        subject = topology.subject_of_events(event.job_id)
        await self.bus.publish(subject, event.to_bytes(), message_id=f"test:{len(self.journal.entries)}")

    async def accept(self, job: str = "j1") -> None:
        await self.say(contracts.Accepted(job_id=job, at=datetime.now(UTC)))

    async def cancel(self, job: str = "j1", run: int = 1, at: datetime | None = None) -> None:
        await self.say(contracts.CancelRequested(job_id=job, run=run, at=at or datetime.now(UTC)))

    async def start_elsewhere(
        self, attempt: int, tries: int | None = None, job: str = "j1", *, alone: bool = False, worker: str = "another",
        run: int = 1,
    ) -> None:  # fmt: skip
        await self.say(
            contracts.StageStarted(
                job_id=job, at=datetime.now(UTC), stage=self.stage, attempt=attempt, tries=tries or attempt,
                run=run, worker=worker, engine="e", model="m", alone=alone,
            )
        )  # fmt: skip

    def events(self, job: str = "j1") -> list[Any]:
        return [Event.validate_json(m.body) for m in self.bus.messages(topology.EVENTS, f"vidgen.events.{job}")]

    def types(self, job: str = "j1") -> list[str]:
        return [event.type for event in self.events(job)]

    def dead(self) -> list[contracts.DeadLetter]:
        return [contracts.DeadLetter.model_validate_json(m.body) for m in self.bus.messages(topology.DEAD)]

    def queued(self) -> int:
        """Tasks that are not settled."""
        return len(self.bus.messages(topology.TASKS))

    async def hear_progress(self) -> Callable[[], list[contracts.Progress]]:
        """From now on: what is said of progress."""
        feed: Any = await self.bus.listen("vidgen.progress.*")
        return lambda: [contracts.Progress.model_validate_json(m.body) for m in feed.arrived]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's series that have these labels."""
        return sum(sample.value for sample in samples(self.metrics, name) if labels.items() <= sample.labels.items())

    async def until_it_waits(self) -> None:
        """Wait until a task waits for the device, which the caller holds."""
        await self.journal.until(lambda: self.journal.entries.count("device wanted") == 2)

    def close(self) -> None:
        self.device_thread.shutdown()


def samples(metrics: WorkerMetrics, name: str) -> Iterator[Any]:
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        yield from (sample for sample in family.samples if sample.name == name)


async def next_of(feed: Feed) -> bytes:
    found = await feed.next(BOUND)
    assert found is not None
    return found.body
