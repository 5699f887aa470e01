"""Submit, cancel, retry, approve and kill in random orders, against a model of what may become of each job.

The gateway's own consumers and the workers' own runtime, in one process on the doubles: a kill drops the objects
wherever they stand, and what they held comes back when time has passed. Left alone, every job ends, and once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.engines import Instant
from tests.fault.system import Lab
from tests.gateways import KEY, picture

from gateway.consumers import Consumers
from gateway.intake import Intake, parse
from gateway.jobs import Jobs, NotPossibleError
from gateway.quotas import Quotas
from vidgen import contracts, errors, gpu, topology
from vidgen.artifacts import artifact_key
from vidgen.contracts import Event, Job, JobStatus
from vidgen.metrics import GatewayMetrics, WorkerMetrics
from vidgen.settings import GatewaySettings
from vidgen.settlement import Policy
from vidgen.tenants import Tenants
from vidgen.testing import FakeClock, MemoryBus, MemoryStore
from vidgen.worker import Registration, Worker

SETTLE_ROUNDS = 400
STUCK_ROUNDS = 200
ACK_WAIT_S = 60.0
FAULTS = ("publish", "pull", "ack", "nak", "in_progress", "last", "records.get", "records.put")


class Floor:
    """Gateways and workers on one bus and one store; only the kill is not theirs."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.bus, self.store = MemoryBus(topology.Topology(ack_wait=ACK_WAIT_S), clock=self.clock), MemoryStore()
        self.store.add(KEY, picture(), "image/png")
        self.device_thread = ThreadPoolExecutor(2, "device")
        self.names = itertools.count(1)
        self.gateway: tuple[Jobs, asyncio.Task[None]] | None = None
        self.workers: dict[contracts.Stage, asyncio.Task[None]] = {}

    def jobs(self) -> Jobs:
        if self.gateway is None:
            jobs = Jobs(self.bus)
            quotas = Quotas(self.bus, Tenants(self.bus), GatewaySettings())
            intake = Intake(self.bus, self.store, jobs, quotas, 1 << 20)
            consumers = Consumers(self.bus, jobs, intake, GatewayMetrics(), concurrency=1)
            self.gateway = jobs, asyncio.ensure_future(consumers.run(asyncio.Event()))
        return self.gateway[0]

    def work(self, stage: contracts.Stage) -> None:
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

    async def kill(self, running: asyncio.Task[None]) -> None:
        """Drop it where it stands. Whatever it would still say on its way out, nobody hears."""
        down, self.bus.down = self.bus.down, True
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            async with asyncio.timeout(60):
                await running
        self.bus.down = down

    async def close(self) -> None:
        for running in (*self.workers.values(), *([self.gateway[1]] if self.gateway else [])):
            await self.kill(running)
        self.device_thread.shutdown()


class RandomOrders(RuleBasedStateMachine):
    """What a user and fate may do; the model knows which ends each run of a job may have."""

    @initialize()
    def begin(self) -> None:
        self.runner = asyncio.Runner()
        self.logs = structlog.testing.capture_logs()
        self.logs.__enter__()
        self.floor: Floor = self.run(self.opened())
        self.asked: list[str] = []  # what is drawn must not depend on which of the bus's calls happened to fail
        self.submitted: dict[str, bool] = {}  # what the bus took, by id: whether it waits for a review
        self.cancelled: set[tuple[str, int]] = set()
        self.ends: dict[tuple[str, int], JobStatus] = {}

    async def opened(self) -> Floor:
        return Floor()

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    async def _user(self, ask: Any) -> Any:
        """What a user asks of a gateway that may be dead, or of a bus that may not answer."""
        with contextlib.suppress(errors.RetryableError, NotPossibleError):
            return await ask

    @rule(edit=st.booleans(), i2v=st.booleans(), review=st.booleans(), copies=st.integers(1, 3))
    def submit(self, edit: bool, i2v: bool, review: bool, copies: int) -> None:
        job_id = f"job{len(self.asked) + 1}"
        self.asked.append(job_id)
        parts: dict[str, Any] = {"edit": {"prompt": "x", "steps": 2}} if edit or not i2v else {}
        parts |= {"i2v": {"steps": 2}} if i2v else {}
        review = review and len(parts) == 2
        request = parse(contracts.VideoRequest(references=(KEY,), job_id=job_id, review=review, **parts).to_bytes())

        async def publish() -> None:
            for copy in range(copies):
                with contextlib.suppress(errors.BusError):
                    message_id = f"{job_id}:{copy}"
                    await self.floor.bus.publish(topology.SUBJECT_REQUESTS, request.to_bytes(), message_id=message_id)
                    self.submitted[job_id] = review

        self.run(publish())

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), what=st.sampled_from(["cancel", "retry", "approve"]))
    def ask(self, data: st.DataObject, what: str) -> None:
        job_id = data.draw(st.sampled_from(self.asked))

        async def asked() -> None:
            jobs = self.floor.jobs()
            with contextlib.suppress(errors.NotFoundError):  # not let in yet
                before = await jobs.get(job_id)
                if what == "cancel":
                    self.cancelled.add((job_id, before.run))
                    await jobs.cancel(job_id)
                elif what == "retry":
                    await jobs.retry(job_id)
                else:
                    await jobs.approve(job_id, 0)

        self.run(self._user(asked()))

    @rule(stage=st.sampled_from(["edit", "i2v"]), rounds=st.integers(1, 60))
    def workers_work(self, stage: contracts.Stage, rounds: int) -> None:
        async def work() -> None:
            self.floor.jobs()
            self.floor.work(stage)
            await self.floor.settle(rounds)

        self.run(work())

    @rule(rounds=st.integers(1, 60))
    def gateways_work(self, rounds: int) -> None:
        async def work() -> None:
            self.floor.jobs()
            await self.floor.settle(rounds)

        self.run(work())

    @precondition(lambda self: self.floor.gateway)
    @rule()
    def kill_the_gateway(self) -> None:
        _, running = self.floor.gateway or (None, None)
        assert running is not None
        self.floor.gateway = None
        self.run(self.floor.kill(running))

    @precondition(lambda self: self.floor.workers)
    @rule(data=st.data())
    def kill_a_worker(self, data: st.DataObject) -> None:
        stage = data.draw(st.sampled_from(sorted(self.floor.workers)))
        self.run(self.floor.kill(self.floor.workers.pop(stage)))

    @rule(method=st.sampled_from(FAULTS), after=st.booleans())
    def a_call_fails(self, method: str, after: bool) -> None:
        self.floor.bus.fail_next(method, after=after)

    @rule(seconds=st.sampled_from([1.0, ACK_WAIT_S + 1]))
    def time_passes(self, seconds: float) -> None:
        async def passes() -> None:
            self.floor.clock.advance(seconds)
            await self.floor.settle(10)

        self.run(passes())

    @invariant()
    def no_end_is_taken_back(self) -> None:
        for job in self.records():
            if job.status.final:
                assert self.ends.setdefault((job.id, job.run), job.status) is job.status

    def records(self) -> list[Job]:
        if not hasattr(self, "floor"):
            return []
        held = self.floor.bus._buckets[topology.JOBS_BUCKET].all()
        return [Job.model_validate_json(value) for value in held.values()]

    def teardown(self) -> None:
        if not hasattr(self, "floor"):
            return
        try:
            self.run(self._left_alone())
            self._audit()
        finally:
            self.run(self.floor.close())
            self.logs.__exit__(None, None, None)
            self.runner.close()

    async def _left_alone(self) -> None:
        """With healthy workers and gateways everything comes to its end."""
        self.floor.bus._ordered.clear()
        for _ in range(STUCK_ROUNDS):
            jobs = self.floor.jobs()
            for stage in contracts.STAGES:
                self.floor.work(stage)
            await self.floor.settle(40)
            for job in self.records():
                if job.status is JobStatus.AWAITING_REVIEW:
                    await jobs.approve(job.id, 0)
            records = self.records()
            left = [depth for consumer in topology.CONSUMERS if (depth := await self.floor.bus.depth(consumer)).waiting]
            # A request whose answer was lost may have been stored all the same.
            if (
                self.submitted.keys() <= {job.id for job in records}
                and all(j.status.final for j in records)
                and not left
            ):
                return
            self.floor.clock.advance(ACK_WAIT_S / 4)
        raise AssertionError(f"stuck: {[(job.id, job.status) for job in self.records()]}, {left}")

    def _audit(self) -> None:
        assert self.floor.bus.messages(topology.TASKS) == []
        for job in self.records():
            log = [
                Event.validate_json(m.body) for m in self.floor.bus.messages(topology.EVENTS, f"vidgen.events.{job.id}")
            ]
            finals = [
                e for e in log if isinstance(e, contracts.JobCompleted | contracts.JobFailed | contracts.JobCancelled)
            ]
            assert Counter(event.run for event in finals).most_common(1)[0][1] == 1, [e.type for e in log]
            assert finals[-1].type == job.status.value
            if job.status is JobStatus.CANCELLED:
                assert (job.id, job.run) in self.cancelled
            if job.status is JobStatus.COMPLETED:
                assert [a.key for a in job.artifacts] == [
                    artifact_key(job.id, name)
                    for stage, name in (("edit", "edit-0.png"), ("i2v", "video.mp4")) if job.stage_record(stage)
                ]  # fmt: skip
                assert all(len(self.floor.store.objects[a.key]) == a.size for a in job.artifacts)
            assert job.status is not JobStatus.REJECTED


async def campaign(lab: Lab, *, orders: int) -> str:
    """Many of them; in a thread, for each has an event loop of its own."""
    wanted = settings(settings.get_profile("default"), max_examples=orders, stateful_step_count=30, deadline=None)
    await asyncio.to_thread(run_state_machine_as_test, RandomOrders, settings=wanted)
    return f"{orders} random orders of up to 30 steps"


TestRandomOrders = RandomOrders.TestCase
TestRandomOrders.settings = settings(max_examples=15, stateful_step_count=20)
