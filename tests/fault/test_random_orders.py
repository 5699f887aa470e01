"""Random orders of submit, cancel, retry, approve and kill, on the doubles, against the model of `orders.py`.

The gateway's own consumers and the workers' own runtime, in one process: a kill drops the objects wherever they stand,
and what they held comes back when time has passed. Any call of the bus may fail, before or behind its effect.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import structlog
from hypothesis import seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test
from tests.engines import Instant
from tests.fault.orders import Answer, Orders, Question, Way
from tests.fault.system import Lab
from tests.gateways import DECODERS, KEY, picture

from gateway.consumers import Consumers
from gateway.intake import Intake, parse
from gateway.jobs import Jobs, NotPossibleError
from gateway.quotas import Quotas
from vidgen import contracts, errors, gpu, topology
from vidgen.contracts import DEFAULT_TENANT, Event, Job, JobStatus, Stage
from vidgen.metrics import GatewayMetrics, WorkerMetrics
from vidgen.settings import GatewaySettings
from vidgen.settlement import Policy
from vidgen.tenants import Tenants
from vidgen.testing import FakeClock, MemoryBus, MemoryStore
from vidgen.worker import Registration, Worker

SETTLE_ROUNDS = 400
ACK_WAIT_S = 60.0
FAULTS = ("publish", "pull", "ack", "nak", "in_progress", "last", "records.get", "records.put")

T = TypeVar("T")


class Doubles:
    """Gateways and workers on one bus and one store; only the kill is not theirs."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.bus, self.store = MemoryBus(topology.Topology(ack_wait=ACK_WAIT_S), clock=self.clock), MemoryStore()
        self.store.add(KEY, picture(), "image/png")
        self.device_thread = ThreadPoolExecutor(2, "device")
        self.names, self.sent = itertools.count(1), itertools.count(1)
        self.gateway: tuple[Jobs, Intake, asyncio.Task[None]] | None = None
        self.workers: dict[Stage, asyncio.Task[None]] = {}

    # ── what the orders are told ─────────────────────────────────────────────────────────────────────────────────

    def request(self, stages: Sequence[Stage], review: bool) -> tuple[str, bytes]:
        job_id = f"job{next(self.names)}"
        parts: dict[str, Any] = {"edit": {"prompt": "x", "steps": 2}} if "edit" in stages else {}
        parts |= {"i2v": {"steps": 2}} if "i2v" in stages else {}
        return job_id, contracts.VideoRequest(references=(KEY,), job_id=job_id, review=review, **parts).to_bytes()

    async def submit(self, job_id: str, body: bytes, way: Way) -> bool:
        with contextlib.suppress(errors.RetryableError):
            if way == "http":
                await self.serving()[1].submit(parse(body), job_id, DEFAULT_TENANT)
            else:
                message_id = f"{job_id}:{next(self.sent)}"
                await self.bus.publish(topology.SUBJECT_REQUESTS, body, message_id=message_id)
            return True
        return False

    async def ask(self, what: Question, job_id: str) -> Answer:
        jobs = self.serving()[0]
        try:
            match what:
                case "cancel":
                    return await jobs.cancel(job_id)
                case "retry":
                    return await jobs.retry(job_id)
                case "approve":
                    return await jobs.approve(job_id, 0)
        except errors.NotFoundError:
            return "unknown"
        except NotPossibleError:
            return "refused"
        except errors.RetryableError:
            return None

    async def kill(self, what: Literal["worker", "gateway"], which: int) -> None:
        if what == "gateway" and self.gateway is not None:
            running, self.gateway = self.gateway[2], None
            await self._drop(running)
        elif what == "worker" and (stage := contracts.STAGES[which]) in self.workers:
            await self._drop(self.workers.pop(stage))

    async def turn(self) -> None:
        self.bus._ordered.clear()
        self.serving()
        for stage in contracts.STAGES:
            self.work(stage)
        await self.settle(40)
        self.clock.advance(ACK_WAIT_S / 4)

    async def records(self, job_ids: Sequence[str]) -> dict[str, Job]:
        held = self.bus._buckets[topology.JOBS_BUCKET].all()
        return {name: Job.model_validate_json(held[name]) for name in job_ids if name in held}

    async def log(self, job_id: str) -> list[contracts.AnyEvent]:
        messages = self.bus.messages(topology.EVENTS, topology.subject_of_events(job_id))
        return [Event.validate_json(message.body) for message in messages]

    async def left(self) -> dict[str, int]:
        found = {f"{c.stream}/{c.name}": (await self.bus.depth(c)).waiting for c in topology.CONSUMERS}
        found[topology.TASKS] = len(self.bus.messages(topology.TASKS))
        return {name: count for name, count in found.items() if count}

    # ── who works ────────────────────────────────────────────────────────────────────────────────────────────────

    def serving(self) -> tuple[Jobs, Intake]:
        if self.gateway is None:
            jobs = Jobs(self.bus)
            quotas = Quotas(self.bus, Tenants(self.bus), GatewaySettings())
            intake = Intake(self.bus, self.store, jobs, quotas, 1 << 20, decoders=DECODERS)
            consumers = Consumers(self.bus, jobs, intake, GatewayMetrics(), concurrency=1)
            self.gateway = jobs, intake, asyncio.ensure_future(consumers.run(asyncio.Event()))
        return self.gateway[:2]

    def work(self, stage: Stage) -> None:
        if stage not in self.workers or self.workers[stage].done():
            monitor = gpu.monitor("cpu")
            policy = Policy(f"w{next(self.names)}", stage, ACK_WAIT_S, backoff_base=0.0)
            worker = Worker(
                self.bus, self.store, Instant(), self.device_thread, monitor, WorkerMetrics(stage, monitor.read()),
                policy, Registration(heartbeat_s=1000.0),
            )  # fmt: skip
            self.workers[stage] = asyncio.ensure_future(worker.run())

    async def settle(self, rounds: int = SETTLE_ROUNDS) -> None:
        """Let everybody run for a while; their threads too."""
        for _ in range(rounds // 10):
            for _ in range(10):
                await asyncio.sleep(0)
            await asyncio.sleep(0.0005)
        while DECODERS._idle.qsize() < DECODERS.count:  # processes, which on a busy machine take longer than all turns
            await asyncio.sleep(0.0005)

    async def _drop(self, running: asyncio.Task[None]) -> None:
        """Whatever it would still say on its way out, nobody hears."""
        down, self.bus.down = self.bus.down, True
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            async with asyncio.timeout(60):
                await running
        self.bus.down = down

    async def close(self) -> None:
        for running in (*self.workers.values(), *([self.gateway[2]] if self.gateway else [])):
            await self._drop(running)
        self.device_thread.shutdown()


class OnDoubles(Orders):
    """Time passes, and work is done, when the order says so."""

    floor: Doubles

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self.logs = structlog.testing.capture_logs()
        self.logs.__enter__()
        super().__init__(self.run(self._opened()))

    async def _opened(self) -> Doubles:
        return Doubles()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    @rule(stage=st.sampled_from(["edit", "i2v"]), rounds=st.integers(1, 60))
    def workers_work(self, stage: Stage, rounds: int) -> None:
        async def work() -> None:
            self.floor.serving()
            self.floor.work(stage)
            await self.floor.settle(rounds)

        self.run(work())

    @rule(rounds=st.integers(1, 60))
    def gateways_work(self, rounds: int) -> None:
        async def work() -> None:
            self.floor.serving()
            await self.floor.settle(rounds)

        self.run(work())

    @rule(method=st.sampled_from(FAULTS), after=st.booleans())
    def a_call_fails(self, method: str, after: bool) -> None:
        self.blows += 1
        self.floor.bus.fail_next(method, after=after)

    @rule(seconds=st.sampled_from([1.0, ACK_WAIT_S + 1]))
    def time_passes(self, seconds: float) -> None:
        async def passes() -> None:
            self.floor.clock.advance(seconds)
            await self.floor.settle(10)

        self.blows += seconds > ACK_WAIT_S
        self.run(passes())

    async def _audit(self) -> None:
        await super()._audit()
        for job in (await self.floor.records(self.asked)).values():
            if job.status is JobStatus.COMPLETED:
                assert all(len(self.floor.store.objects[a.key]) == a.size for a in job.artifacts)

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            self.run(self.floor.close())
            self.logs.__exit__(None, None, None)
            self.runner.close()


async def campaign(lab: Lab, *, orders: int) -> str:
    """Many of them; in a thread, for each has an event loop of its own."""
    wanted = settings(settings.get_profile("default"), max_examples=orders, stateful_step_count=30, deadline=None)
    await asyncio.to_thread(run_state_machine_as_test, seed(lab.seed)(lambda: OnDoubles()), settings=wanted)
    return f"{orders} random orders of up to 30 steps"


TestRandomOrders = OnDoubles.TestCase
TestRandomOrders.settings = settings(max_examples=15, stateful_step_count=20)
