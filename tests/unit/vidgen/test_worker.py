"""The runtime around the handler: lanes, overlap, just in time, drain, registry, and what stops a worker."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from tests import engines
from tests.workbench import BOUND, Bench, LoopClock, one_thread, settled, tidied

from vidgen import errors, eventlog, topology
from vidgen.bus import Delivery
from vidgen.company import Company
from vidgen.contracts import Checkpoint, GpuFigures, Work, WorkerInfo
from vidgen.testing import FakeClock
from vidgen.turn import Phase
from vidgen.watchdog import Patience, Watch, Watchdog
from vidgen.worker import LanePuller, Registration, Worker


class Shop:
    """A worker over a bench; `start` runs it."""

    def __init__(
        self, engine: engines.Gated, *, grace_s: float = 600.0, heartbeat_s: float = 3.0, clock: FakeClock | None = None
    ) -> None:
        self.engine = engine
        self.bench = Bench(engine, clock=clock)
        bench = self.bench
        self.worker = Worker(
            bench.bus, bench.store, engine, bench.device_thread, bench.monitor, bench.metrics, bench.policy,
            Registration(heartbeat_s=heartbeat_s, grace_s=grace_s, load_seconds=1.5),
        )  # fmt: skip
        self.running: asyncio.Task[None] | None = None

    async def queue(self, number: int, **given: Any) -> None:
        """A task of job `j<number>` whose seed is its number."""
        await self.bench.queue(job=f"j{number}", seed=number, **given)

    def start(self) -> None:
        self.running = asyncio.create_task(self.worker.run())

    async def left(self) -> None:
        """Wait until the worker has left; raises what it raised."""
        assert self.running is not None
        await asyncio.wait_for(asyncio.shield(self.running), BOUND)

    async def until(self, entry: str, count: int = 1) -> None:
        """Wait until the journal has an entry so many times, or the worker died."""
        entries = self.bench.journal.entries
        await self.bench.journal.until(lambda: entries.count(entry) >= count)

    async def registered(self) -> WorkerInfo:
        async with asyncio.timeout(BOUND):  # a busy machine may begin the first task before the entry is written
            while not (records := await self.bench.bus.records(topology.WORKERS_BUCKET).all()):
                await asyncio.sleep(0)
        [record] = records.values()
        return WorkerInfo.model_validate_json(record)

    async def close(self) -> None:
        self.engine.open_all()
        if self.running is not None:
            self.running.cancel()
            with contextlib.suppress(asyncio.CancelledError, errors.VidgenError):
                await self.running
        self.bench.close()


@contextlib.asynccontextmanager
async def open_shop(engine: engines.Gated | None = None, **given: Any) -> AsyncIterator[Shop]:
    shop = Shop(engine or engines.Gated(), **given)
    try:
        yield shop
    finally:
        await shop.close()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Unconfigured, structlog draws each traceback with all its locals: seconds on a busy machine."""
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
async def loop_clock() -> LoopClock:
    return LoopClock()


async def reached(*gates: engines.Gate) -> None:
    for gate in gates:
        assert await asyncio.to_thread(gate.reached.wait, BOUND)


# ── overlap ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_one_task_is_prepared_and_one_finished_while_one_is_on_the_device() -> None:
    async with open_shop() as shop:
        gates = [shop.engine.hold("finish", 1), shop.engine.hold("generate", 2, 2), shop.engine.hold("prepare", 3)]
        for number in (1, 2, 3):
            await shop.queue(number)
        shop.start()

        await reached(*gates)  # all three at once: none is open yet

        shop.engine.open_all()
        await shop.until("stage_completed", 3)


async def test_only_one_task_is_on_the_device() -> None:
    async with open_shop() as shop:
        first = shop.engine.hold("generate", 1, 2)
        second = shop.engine.hold("prepare", 2)
        await shop.queue(1)
        await shop.queue(2)
        shop.start()
        await reached(first, second)
        second.open()
        await settled()

        assert shop.engine.generated == [1]

        first.open()
        await shop.until("stage_completed", 2)
        assert shop.engine.generated == [1, 2]


async def test_no_more_than_four_tasks_are_held_however_slow_the_store_is() -> None:
    async with open_shop() as shop:
        finishing = [shop.engine.hold("finish", number) for number in (1, 2, 3)]
        generating = shop.engine.hold("generate", 4, 2)
        for number in range(1, 7):
            await shop.queue(number)
        shop.start()
        await reached(*finishing, generating)
        await settled()

        assert shop.bench.journal.entries.count("stage_started") == 4

        shop.engine.open_all()
        await shop.until("stage_completed", 6)


async def test_the_next_task_is_not_taken_while_nobody_knows_how_long_this_one_takes() -> None:
    async with open_shop() as shop:
        first_step = shop.engine.hold("generate", 1, 1)
        await shop.queue(1)
        await shop.queue(2)
        shop.start()
        await reached(first_step)
        await settled()

        assert shop.bench.journal.entries.count("stage_started") == 1

        first_step.open()
        await shop.until("stage_completed", 2)


async def test_the_next_task_is_taken_just_before_a_long_one_ends(
    loop_clock: LoopClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("vidgen.progress.time", SimpleNamespace(monotonic=lambda: now))
    async with open_shop() as shop:
        steps = [shop.engine.hold("generate", 1, step) for step in (1, 2)]
        await shop.queue(1, steps=10)
        await shop.queue(2)
        shop.start()
        await reached(steps[0])
        now += 10  # ten seconds a step: nine are left
        steps[0].open()
        await reached(steps[1])
        await settled()

        loop_clock.advance(80)
        await settled()
        assert shop.bench.journal.entries.count("stage_started") == 1
        loop_clock.advance(8)
        await shop.until("stage_started", 2)

        shop.engine.open_all()
        await shop.until("stage_completed", 2)


async def test_the_next_task_is_taken_later_where_steps_become_slower(loop_clock: LoopClock, steady: Steady) -> None:
    async with open_shop() as shop:
        steps = [shop.engine.hold("generate", 1, step) for step in (1, 2, 3)]
        await shop.queue(1, steps=10)
        await shop.queue(2)
        shop.start()
        await reached(steps[0])
        await steady.passes(steps[0], steps[1])  # nine are left, of ten seconds each
        await steady.passes(steps[1], steps[2], seconds=100)

        loop_clock.advance(90)
        await settled()
        assert shop.bench.journal.entries.count("stage_started") == 1

        shop.engine.open_all()
        await shop.until("stage_completed", 2)


# ── lanes ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_somebody_waits_for_comes_before_the_batch() -> None:
    async with open_shop() as shop:
        for number in (1, 2):
            await shop.queue(number, lane="batch")
        for number in (3, 4):
            await shop.queue(number, lane="interactive")
        shop.start()

        await shop.until("stage_completed", 4)

        assert shop.engine.generated == [3, 4, 1, 2]


async def pulled(puller: LanePuller, count: int) -> list[str]:
    lanes = []
    for _ in range(count):
        found = await puller.next(wait=0)
        assert found is not None
        lanes.append(found.delivery.subject.split(".")[3])
        await found.delivery.ack()
    return lanes


async def test_one_task_in_ten_is_a_batch_task_while_interactive_ones_keep_coming() -> None:
    async with open_shop() as shop:
        for number in range(40):
            await shop.queue(number, lane="batch" if number < 5 else "interactive")

        lanes = await pulled(LanePuller(shop.bench.bus, "edit"), 30)

        for begin in range(21):
            assert lanes[begin : begin + 10].count("batch") == 1


async def test_a_batch_that_comes_late_waits_for_nine_at_most() -> None:
    async with open_shop() as shop:
        puller = LanePuller(shop.bench.bus, "edit")
        for number in range(60):
            await shop.queue(number)
        await pulled(puller, 25)
        await shop.queue(100, lane="batch")

        lanes = await pulled(puller, 10)
        assert "batch" in lanes
        assert lanes[0] == "interactive"  # while none waited there, none was owed


async def test_one_look_is_enough_where_one_task_follows_another() -> None:
    async with open_shop() as shop:
        puller = LanePuller(shop.bench.bus, "edit")
        await shop.queue(1)
        await pulled(puller, 1)
        before = shop.bench.bus.calls["pull"]
        following = asyncio.create_task(puller.next())
        await settled()
        await shop.queue(2)

        assert await following is not None
        assert shop.bench.bus.calls["pull"] == before + 1


async def test_who_waits_in_vain_looks_into_each_lane_once_a_round() -> None:
    async with open_shop() as shop:
        puller = LanePuller(shop.bench.bus, "edit")
        assert await puller.next(wait=0.01) is None
        before = shop.bench.bus.calls["pull"]

        assert await puller.next(wait=0.01) is None

        assert shop.bench.bus.calls["pull"] == before + 2


async def test_after_an_outage_what_somebody_waits_for_comes_before_the_batch_again() -> None:
    async with open_shop() as shop:
        puller = LanePuller(shop.bench.bus, "edit")
        assert await puller.next(wait=0.01) is None
        shop.bench.bus.fail_next("pull")
        with pytest.raises(errors.BusError):
            await puller.next(wait=0.01)
        await shop.queue(1, lane="batch")
        await shop.queue(2)

        assert await pulled(puller, 2) == ["interactive", "batch"]


async def test_an_empty_queue_gives_nothing() -> None:
    async with open_shop() as shop:
        assert await LanePuller(shop.bench.bus, "edit").next(wait=0) is None


# ── drain ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_drain_hands_back_what_waits_at_once_and_finishes_what_runs() -> None:
    async with open_shop() as shop:
        first = shop.engine.hold("generate", 1, 2)
        second = shop.engine.hold("prepare", 2)
        for number in (1, 2, 3):
            await shop.queue(number)
        shop.start()
        await reached(first, second)
        second.open()

        shop.worker.drain()
        await shop.until("stage_released")  # while the first one runs

        assert shop.bench.types("j2") == ["stage_started", "stage_released"]
        assert shop.bench.events("j2")[-1].tries == 0
        first.open()
        await shop.left()
        assert shop.bench.types("j1") == ["stage_started", "stage_completed"]
        assert shop.bench.types("j3") == []
        assert shop.bench.queued() == 2


async def test_a_drain_waits_for_what_is_being_stored_however_slow_the_store_is(loop_clock: LoopClock) -> None:
    async with open_shop() as shop:
        asked, stores, put = asyncio.Event(), asyncio.Event(), shop.bench.store.put

        async def slowly(*given: Any, **options: Any) -> None:
            asked.set()
            await stores.wait()
            await put(*given, **options)

        shop.bench.store.put = slowly  # type: ignore[method-assign]
        await shop.queue(1)
        shop.start()
        await asyncio.wait_for(asked.wait(), BOUND)
        shop.worker.drain()
        for _ in range(3):
            loop_clock.advance(30)
            await settled()
        stores.set()
        await shop.left()

        assert shop.bench.types("j1")[-1] == "stage_completed"


async def test_a_worker_that_holds_nothing_leaves_when_it_is_drained(loop_clock: LoopClock) -> None:
    async with open_shop() as shop:
        shop.start()
        await shop.until("records.put")
        shop.worker.drain()

        await shop.left()

        assert (await shop.registered()).state == "draining"


async def test_a_task_that_arrives_with_the_drain_is_handed_back_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_shop() as shop:
        await shop.queue(1)
        pull = shop.bench.bus.pull

        async def pull_and_drain(*args: Any, **given: Any) -> Delivery | None:
            delivery = await pull(*args, **given)
            asyncio.get_running_loop().call_soon(shop.worker.drain)  # before anybody hears of the delivery
            return delivery

        monkeypatch.setattr(shop.bench.bus, "pull", pull_and_drain)
        shop.start()
        await shop.left()
        monkeypatch.undo()

        assert shop.bench.types("j1") == []
        assert (await shop.bench.take()).num_delivered == 2


async def past_its_grace(shop: Shop, gate: engines.Gate, loop_clock: LoopClock) -> None:
    """Drain a worker while it is in a step, and let that end when its hundred seconds are over."""
    shop.start()
    await reached(gate)
    shop.worker.drain()
    await settled()
    loop_clock.advance(101)
    await settled()
    gate.open()


async def test_when_the_grace_is_over_what_still_runs_is_handed_back_at_its_next_step(loop_clock: LoopClock) -> None:
    async with open_shop(grace_s=100) as shop:
        gate = shop.engine.hold("generate", 1, 2)
        await shop.queue(1, steps=50)
        await past_its_grace(shop, gate, loop_clock)

        await shop.left()

        event = shop.bench.events("j1")[-1]
        assert (event.type, event.tries) == ("stage_released", 0)
        assert event.gpu_seconds > 0
        assert (await shop.bench.take()).num_delivered == 2


async def test_what_was_at_its_last_step_when_the_grace_was_over_waits_for_no_store_that_is_away(
    loop_clock: LoopClock,
) -> None:
    """A worker left behind the patience with the store, and the task was charged for it."""
    async with open_shop(engines.Resumes(), grace_s=100) as shop:
        gate = shop.engine.hold("generate", 1, 4)
        await shop.queue(1, steps=4)
        asked = asyncio.Event()

        async def put(*given: object, **options: object) -> None:
            asked.set()
            await asyncio.Event().wait()

        shop.bench.store.put = put  # type: ignore[method-assign]
        await past_its_grace(shop, gate, loop_clock)
        await asyncio.wait_for(asked.wait(), BOUND)
        for _ in range(2):
            loop_clock.advance(2.1)
            await settled()

        await shop.left()

        event = shop.bench.events("j1")[-1]
        assert (event.type, event.tries) == ("stage_released", 0)


# ── handed back in the middle ────────────────────────────────────────────────────────────────────────────────────


class Steady:
    """The time of steps: each takes ten seconds once the test lets it end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("vidgen.progress.time", SimpleNamespace(monotonic=lambda: self.now))

    async def passes(self, gate: engines.Gate, after: engines.Gate, seconds: float = 10) -> None:
        """Let the step at `gate` end, and wait until the one at `after` runs and the worker has heard."""
        self.now += seconds
        gate.open()
        await reached(after)
        await settled()


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> Steady:
    return Steady(monkeypatch)


async def test_a_drain_hands_back_in_the_middle_what_takes_long(steady: Steady) -> None:
    async with open_shop(engines.Resumes()) as shop:
        gates = [shop.engine.hold("generate", 1, step) for step in (1, 2)]
        await shop.queue(1, steps=10)
        shop.start()
        await reached(gates[0])
        await steady.passes(*gates)

        shop.worker.drain()
        gates[1].open()
        await shop.left()

        event = shop.bench.events("j1")[-1]
        assert (event.type, event.tries, event.preempted) == ("stage_released", 0, 0)
        assert event.checkpoint == Checkpoint(attempt=1, step=2, steps=10)
        assert (await shop.bench.take()).num_delivered == 2


async def test_a_drain_finishes_what_is_soon_done(steady: Steady) -> None:
    async with open_shop(engines.Resumes()) as shop:
        gates = [shop.engine.hold("generate", 1, step) for step in (1, 2)]
        await shop.queue(1, steps=2)
        shop.start()
        await reached(gates[0])
        await steady.passes(*gates)

        shop.worker.drain()
        gates[1].open()
        await shop.left()

        assert shop.bench.types("j1") == ["stage_started", "stage_completed"]


async def test_a_drain_hands_back_what_is_soon_off_the_device_and_takes_long_behind_it(
    steady: Steady, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vidgen.turn.time", SimpleNamespace(monotonic=lambda: steady.now, time=lambda: steady.now))
    async with open_shop(engines.Resumes()) as shop:
        encoding = shop.engine.hold("finish", 1)
        gates = [shop.engine.hold("generate", 2, step) for step in (1, 2)]
        await shop.queue(1, steps=1)
        await shop.queue(2, steps=3)
        shop.start()
        await reached(encoding)
        steady.now += 15
        encoding.open()
        await shop.until("ack", 1)
        await reached(gates[0])
        await steady.passes(*gates, seconds=8)

        shop.worker.drain()  # sixteen seconds are left on the device, fewer than twenty, and some fifteen behind it
        gates[1].open()
        await shop.left()

        assert shop.bench.types("j2")[-1] == "stage_released"


async def test_a_drain_before_the_first_step_decides_when_it_is_known_how_long_a_step_takes(steady: Steady) -> None:
    async with open_shop(engines.Resumes()) as shop:
        gates = [shop.engine.hold("generate", 1, step) for step in (1, 2)]
        await shop.queue(1, steps=10)
        shop.start()
        await reached(gates[0])

        shop.worker.drain()
        await steady.passes(*gates)
        gates[1].open()
        await shop.left()

        assert shop.bench.events("j1")[-1].checkpoint == Checkpoint(attempt=1, step=2, steps=10)


async def test_a_drain_hands_back_at_once_what_the_grace_period_is_too_short_for(steady: Steady) -> None:
    async with open_shop(engines.Resumes(), grace_s=5) as shop:
        gates = [shop.engine.hold("generate", 1, step) for step in (1, 2)]
        await shop.queue(1, steps=3)
        shop.start()
        await reached(gates[0])
        await steady.passes(*gates, seconds=8)  # sixteen are left: fewer than twenty, more than five

        shop.worker.drain()
        gates[1].open()
        await shop.left()

        assert shop.bench.events("j1")[-1].checkpoint == Checkpoint(attempt=1, step=2, steps=3)


async def test_when_the_grace_is_over_the_state_is_kept_where_it_can_be(loop_clock: LoopClock) -> None:
    async with open_shop(engines.Resumes(), grace_s=100) as shop:
        gate = shop.engine.hold("generate", 1, 1)
        await shop.queue(1, steps=50)
        await past_its_grace(shop, gate, loop_clock)

        await shop.left()

        assert shop.bench.events("j1")[-1].checkpoint == Checkpoint(attempt=1, step=1, steps=50)


# ── an interactive task goes before a long batch task ────────────────────────────────────────────────────────────


async def a_long_batch_task(shop: Shop, steady: Steady, steps: int = 10) -> engines.Gate:
    """Bring j1 of the batch lane to its second step, of ten seconds each; the gate at which it waits there."""
    gates = [shop.engine.hold("generate", 1, step) for step in (1, 2)]
    await shop.queue(1, lane="batch", steps=steps)
    if shop.running is None:
        shop.start()
    await reached(gates[0])
    await steady.passes(*gates)
    return gates[1]


async def looked(shop: Shop, loop_clock: LoopClock) -> None:
    """Let the worker look once for an interactive task."""
    loop_clock.advance(1.1)
    await settled()


async def test_an_interactive_task_goes_before_a_batch_task_that_takes_long(
    steady: Steady, loop_clock: LoopClock
) -> None:
    async with open_shop(engines.Resumes()) as shop:
        gate = await a_long_batch_task(shop, steady)
        await shop.queue(2)
        await looked(shop, loop_clock)
        gate.open()

        await shop.until("stage_completed", 2)

        assert shop.engine.generated == [1, 2, 1]
        released = shop.bench.events("j1")[1]
        assert (released.type, released.tries, released.preempted) == ("stage_released", 0, 1)
        assert released.checkpoint == Checkpoint(attempt=1, step=2, steps=10)
        assert shop.engine.made[-1] == "1: 1 2 3 4 5 6 7 8 9 10"
        assert shop.bench.events("j1")[-1].tries == 1
        await shop.until("ack", 2)
        assert shop.bench.queued() == 0


async def test_only_one_task_is_taken_ahead_of_the_device_after_one_made_way(
    steady: Steady, loop_clock: LoopClock
) -> None:
    async with open_shop(engines.Resumes()) as shop:
        gate = await a_long_batch_task(shop, steady)
        before = shop.engine.hold("generate", 2, 1)
        await shop.queue(2, steps=3)
        await shop.queue(3)
        await looked(shop, loop_clock)
        gate.open()
        await reached(before)
        await settled()

        assert shop.bench.types("j3") == []  # nobody knows yet how long j2 takes

        before.open()
        await shop.until("stage_completed", 3)
        assert shop.engine.generated == [1, 2, 3, 1]


async def test_a_batch_task_that_is_soon_done_makes_no_way(steady: Steady, loop_clock: LoopClock) -> None:
    async with open_shop(engines.Resumes()) as shop:
        gate = await a_long_batch_task(shop, steady, steps=2)
        await shop.queue(2)
        await looked(shop, loop_clock)
        gate.open()

        await shop.until("stage_completed", 2)

        assert shop.engine.generated == [1, 2]


async def test_an_interactive_task_makes_no_way(steady: Steady, loop_clock: LoopClock) -> None:
    async with open_shop(engines.Resumes()) as shop:
        gates = [shop.engine.hold("generate", 1, step) for step in (1, 2)]
        await shop.queue(1, steps=10)
        shop.start()
        await reached(gates[0])
        await steady.passes(*gates)
        await shop.queue(2)
        await looked(shop, loop_clock)
        gates[1].open()

        await shop.until("stage_completed", 2)

        assert shop.engine.generated == [1, 2]


async def test_a_batch_task_whose_turn_it_is_makes_no_way(steady: Steady, loop_clock: LoopClock) -> None:
    """The one in ten that goes before waiting interactive tasks would else never come to its end."""
    async with open_shop(engines.Resumes()) as shop:
        gates = [shop.engine.hold("generate", 19, step) for step in (1, 2)]
        for number in (*range(10, 19), 20):
            await shop.queue(number)
        await shop.queue(19, lane="batch", steps=10)
        shop.start()
        await reached(gates[0])
        await steady.passes(*gates)
        await looked(shop, loop_clock)
        gates[1].open()

        await shop.until("stage_completed", 11)

        assert shop.engine.generated[-2:] == [19, 20]


async def test_a_task_that_made_way_three_times_runs_to_its_end(steady: Steady, loop_clock: LoopClock) -> None:
    async with open_shop(engines.Resumes()) as shop:
        steps = [shop.engine.hold("generate", 1, step) for step in range(1, 9)]
        await shop.queue(1, lane="batch", steps=20)
        shop.start()
        await reached(steps[0])
        for number, (at, then) in enumerate(pairwise(steps), 2):
            await steady.passes(at, then)
            if number % 2:
                continue
            await shop.queue(number)
            await looked(shop, loop_clock)
        shop.engine.open_all()

        await shop.until("stage_completed", 5)

        assert shop.bench.events("j1")[-1].type == "stage_completed"
        assert max(event.preempted for event in shop.bench.events("j1")[:-1]) == 3
        assert shop.engine.generated == [1, 2, 1, 4, 1, 6, 1, 8]  # a fourth one waits


async def test_a_worker_whose_engine_cannot_go_on_lets_the_batch_task_run(
    steady: Steady, loop_clock: LoopClock
) -> None:
    async with open_shop() as shop:
        gate = await a_long_batch_task(shop, steady)
        await shop.queue(2)
        await looked(shop, loop_clock)
        gate.open()

        await shop.until("stage_completed", 2)

        assert shop.engine.generated == [1, 2]


# ── a sick worker ────────────────────────────────────────────────────────────────────────────────────────────────


class LosesItsDevice(engines.Gated):
    def generate(self, inputs: Any, on_step: Any) -> Any:
        super().generate(inputs, on_step)
        raise errors.FatalError("the device fell off the bus", code="device_lost")


async def test_a_worker_that_lost_its_device_hands_everything_back_and_leaves() -> None:
    async with open_shop(LosesItsDevice()) as shop:
        first = shop.engine.hold("generate", 1, 2)
        second = shop.engine.hold("prepare", 2)
        for number in (1, 2, 3):
            await shop.queue(number)
        shop.start()
        await reached(first, second)
        second.open()
        first.open()

        with pytest.raises(errors.FatalError, match="fell off the bus"):
            await shop.left()

        for job in ("j1", "j2"):
            assert shop.bench.events(job)[-1].type == "stage_released"
            assert shop.bench.events(job)[-1].tries == 0
        assert shop.engine.generated == [1]
        assert shop.bench.types("j3") == []  # not even taken, though the device was free for a moment
        assert shop.bench.queued() == 3
        assert not shop.worker.healthy
        assert (await shop.registered()).state == "unhealthy"


class HasNoMemory(engines.Gated):
    def prepare(self, work: Any, files: Any) -> Any:
        raise errors.FatalError("the machine has no memory left", code="no_memory")


async def test_a_worker_that_is_unfit_though_its_device_is_well_leaves_too() -> None:
    async with open_shop(HasNoMemory()) as shop:
        await shop.queue(1)
        shop.start()

        with pytest.raises(errors.FatalError, match="no memory left"):
            await shop.left()

        assert shop.bench.types("j1") == ["stage_started", "stage_released"]


async def test_where_one_stage_of_a_process_is_unfit_the_others_take_no_more_for_its_device() -> None:
    """They went on until its last task had ended: one had the device that was lost, or hung, and was charged for it."""
    async with open_shop(LosesItsDevice()) as shop:
        bench, other, company = shop.bench, engines.Gated(), Company()
        edit, i2v = (
            Worker(
                bench.bus, bench.store, engine, bench.device_thread, bench.monitor, bench.metrics,
                replace(bench.policy, stage=stage), Registration(), bench.device, company,
            )
            for stage, engine in (("edit", shop.engine), ("i2v", other))
        )  # fmt: skip
        gate = shop.engine.hold("generate", 1, 2)
        await shop.queue(1)
        shop.running = asyncio.create_task(edit.run())
        await reached(gate)
        bench.stage = "i2v"
        await shop.queue(2)
        beside = asyncio.create_task(i2v.run())
        await shop.until("device wanted", 2)
        await shop.queue(3)
        gate.open()

        with pytest.raises(errors.FatalError, match="fell off the bus"):
            await shop.left()
        await asyncio.wait_for(beside, BOUND)

        assert other.generated == []
        assert [(event.type, event.tries) for event in bench.events("j2")][1:] == [("stage_released", 0)]
        assert bench.types("j3") == []


class Impatient(Watchdog):
    """Over what comes behind the device alone."""

    def watch(self, work: Work, phase: Phase = "generating") -> Watch:
        patience = Patience(least_s=0.0, first_s=0.0) if phase == "finishing" else Patience()
        return Watchdog(patience, look_s=0.01).watch(work, phase)


async def test_a_worker_whose_engine_hangs_says_so_whatever_happens_behind_that() -> None:
    """As one that had only lost its device it left in order: it waited for the thread that hangs, for ever."""

    class LosesItLate(engines.Gated):
        def generate(self, inputs: Any, on_step: Any) -> Any:
            made = super().generate(inputs, on_step)
            if inputs.seed == 2:
                raise errors.FatalError("the device fell off the bus", code="device_lost")
            return made

    async with open_shop(LosesItLate()) as shop:
        hung, lost = shop.engine.hold("finish", 1), shop.engine.hold("generate", 2, 2)
        for number in (1, 2):
            await shop.queue(number)
        shop.worker._handler._watchdog = Impatient(Patience())
        shop.start()
        await reached(hung, lost)
        await shop.until("stage_failed")
        lost.open()

        with pytest.raises(errors.HungError):
            await shop.left()
        assert shop.bench.types("j2")[-1] == "stage_released"


async def test_a_part_that_dies_stops_the_worker_and_its_task_is_handed_back(loop_clock: LoopClock) -> None:
    async with open_shop() as shop:
        gate = shop.engine.hold("generate", 1, 2)
        await shop.queue(1, steps=50)
        shop.start()
        await reached(gate)
        shop.bench.bus.fail_next("records.put", RuntimeError("a bug"))
        loop_clock.advance(3.1)

        with pytest.raises(errors.FatalError) as caught:
            await shop.left()

        assert caught.value.code == "worker_broken"
        assert not shop.worker.healthy
        assert shop.bench.types("j1") == ["stage_started", "stage_released"]
        assert shop.bench.queued() == 1


async def test_a_worker_that_is_stopped_in_a_hurry_hands_everything_back() -> None:
    async with open_shop() as shop:
        first = shop.engine.hold("generate", 1, 2)
        second = shop.engine.hold("prepare", 2)
        await shop.queue(1)
        await shop.queue(2)
        shop.start()
        await reached(first, second)

        assert shop.running is not None
        shop.running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await shop.running

        for job in ("j1", "j2"):
            assert shop.bench.types(job) == ["stage_started", "stage_released"]
            assert (await shop.bench.take()).num_delivered == 2


@pytest.mark.parametrize("job", ["j9", "no$id", "x" * 200])
async def test_a_task_that_nobody_can_read_stops_neither_the_worker_nor_the_tasks_behind_it(
    job: str, loop_clock: LoopClock
) -> None:
    async with open_shop() as shop:
        await shop.bench.publish("interactive", job, b"\xff")
        await shop.queue(1)
        shop.start()

        await shop.until("stage_completed")
        loop_clock.advance(3.1)
        await shop.until("records.put", 2)

        assert shop.worker.healthy
        assert len(shop.bench.dead()) == 1


async def test_a_log_that_nobody_can_read_stops_only_its_own_task() -> None:
    async with open_shop() as shop:
        await shop.bench.bus.signal(topology.subject_of_events("j1"), b'{"type": "of the future"}')
        await shop.queue(1)
        await shop.queue(2)
        shop.start()

        await shop.until("stage_completed")

        assert shop.bench.types("j2") == ["stage_started", "stage_completed"]
        assert shop.worker.healthy


# ── cancel ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def stop_by_signal(shop: Shop, gate: engines.Gate) -> None:
    """Cancel j1 as a gateway does; then let the engine come to its next step."""
    await shop.bench.cancel("j1")
    await shop.bench.bus.signal(topology.subject_of_control("j1"), b"cancel")
    await shop.until("in_progress")  # it looks at the log
    await settled()
    gate.open()


async def test_a_signal_cancels_the_running_task_and_the_next_one_follows() -> None:
    async with open_shop() as shop:
        gate = shop.engine.hold("generate", 1, 2)
        await shop.queue(1, steps=50)
        await shop.queue(2)
        shop.start()
        await reached(gate)
        await shop.bench.bus.signal(topology.subject_of_control("another"), b"cancel")

        await stop_by_signal(shop, gate)
        await shop.until("stage_completed")

        assert shop.bench.types("j1") == ["stage_started", "cancel_requested", "stage_cancelled"]
        assert shop.bench.types("j2") == ["stage_started", "stage_completed"]


async def test_signals_are_heard_again_after_the_bus_refused_to_listen(loop_clock: LoopClock) -> None:
    async with open_shop() as shop:
        gate = shop.engine.hold("generate", 1, 2)
        shop.bench.bus.fail_next("listen", times=2)
        await shop.queue(1, steps=50)
        shop.start()
        await reached(gate)
        while "listen" not in shop.bench.journal.entries:
            loop_clock.advance(0.6)
            await settled()

        await stop_by_signal(shop, gate)
        await shop.until("stage_cancelled")


# ── the bus goes away and comes back ─────────────────────────────────────────────────────────────────────────────


async def test_a_worker_outlives_the_bus_and_goes_on_when_it_is_back(loop_clock: LoopClock) -> None:
    async with open_shop() as shop:
        await shop.queue(1)
        shop.start()
        await shop.until("stage_completed")

        shop.bench.bus.down = True
        asked = shop.bench.bus.calls["pull"]
        while shop.bench.bus.calls["pull"] < asked + 4 or shop.bench.bus.calls["records.put"] < 3:
            loop_clock.advance(3.1)
            await settled()
        shop.bench.bus.down = False
        await shop.queue(2)
        for _ in range(3):
            loop_clock.advance(0.6)
            await settled()

        await shop.until("stage_completed", 2)
        assert shop.worker.healthy


async def test_a_running_task_outlives_an_outage_of_the_bus(loop_clock: LoopClock) -> None:
    async with open_shop() as shop:
        gate = shop.engine.hold("generate", 1, 2)
        await shop.queue(1)
        shop.start()
        await reached(gate)
        shop.bench.bus.down = True
        loop_clock.advance(15.1)
        await settled()
        shop.bench.bus.down = False
        gate.open()

        await shop.until("stage_completed")

        assert shop.bench.types("j1") == ["stage_started", "stage_completed"]


# ── the registry ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_worker_shows_itself_with_its_figures_and_what_it_does(loop_clock: LoopClock) -> None:
    async with open_shop() as shop:
        gate = shop.engine.hold("generate", 1, 3)
        shop.start()
        await shop.until("records.put")

        info = await shop.registered()
        assert (info.id, info.stage, info.state, info.running) == ("w1", "edit", "ready", ())
        assert (info.engine, info.model, info.revision, info.device) == ("gated", "none", "1", "cpu")
        assert (info.load_seconds, info.tasks_done, info.seconds_per_step) == (1.5, 0, None)
        [figures] = info.gpus
        assert (figures.index, figures.uuid) == (0, "cpu")
        assert figures.memory_used

        await shop.queue(1)
        await reached(gate)
        await settled()
        loop_clock.advance(3.1)
        async with asyncio.timeout(BOUND):
            while not (info := await shop.registered()).busy_seconds:  # while it runs
                await asyncio.sleep(0)
        assert (info.state, info.running) == ("busy", ("j1",))

        shop.worker.drain()
        await settled()
        loop_clock.advance(3.1)
        async with asyncio.timeout(BOUND):
            while (await shop.registered()).state != "draining":
                await asyncio.sleep(0)

        gate.open()
        await shop.left()
        info = await shop.registered()
        assert (info.state, info.running, info.tasks_done) == ("draining", (), 1)
        assert info.seconds_per_step is not None
        assert shop.bench.metric("vidgen_worker_state", state="draining") == 1


async def test_a_driver_that_does_not_answer_keeps_no_worker_from_showing_itself_and_leaving(
    loop_clock: LoopClock,
) -> None:
    """NVML hangs with the GPU: such a worker was no longer seen, and never left."""
    asked, answered = threading.Event(), threading.Event()

    class Hangs:
        def read(self) -> tuple[GpuFigures, ...]:
            asked.set()
            answered.wait(engines.PATIENCE)
            return ()

    async with open_shop() as shop:
        shop.worker._figures._monitor = Hangs()
        shop.start()
        assert await asyncio.to_thread(asked.wait, BOUND)
        await settled()
        loop_clock.advance(3.1)
        await shop.until("records.put")

        shop.worker.drain()
        await settled()
        loop_clock.advance(3.1)
        try:
            await shop.left()
        finally:
            answered.set()

        assert (await shop.registered()).state == "draining"


async def test_a_registry_that_does_not_answer_does_not_stop_the_worker(loop_clock: LoopClock) -> None:
    async with open_shop() as shop:
        shop.bench.bus.fail_next("records.put")
        shop.start()
        while not shop.bench.metric("vidgen_worker_heartbeats_failed_total"):
            await settled()
        loop_clock.advance(3.1)
        await shop.until("records.put")

        await shop.queue(1)
        await shop.until("stage_completed")


# ── what came before ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_task_that_comes_again_while_it_runs_here_is_not_begun_a_second_time() -> None:
    """A bus that was killed and came back gave workers what they were running: they overtook themselves."""
    async with open_shop() as shop:
        gate = shop.engine.hold("generate", 1, 2)
        await shop.queue(1)
        shop.start()
        await reached(gate)
        [held] = await shop.bench.bus.unsettled(topology.consumer_of("edit", "interactive"))
        pulls = shop.bench.bus.calls["pull"]

        await shop.bench.bus.hand_back(topology.consumer_of("edit", "interactive"), held.seq)
        gate.open()
        await shop.until("stage_completed")

        assert shop.bench.bus.calls["pull"] > pulls
        assert shop.engine.generated == [1]
        assert shop.bench.types("j1").count("stage_started") == 1


async def test_what_follows_each_other_quickly_is_one_entry(
    loop_clock: LoopClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vidgen.worker.SOON_S", 300.0)
    async with open_shop(heartbeat_s=600.0) as shop:
        gate = shop.engine.hold("generate", 1, 2)
        shop.start()
        await shop.until("records.put")
        await shop.queue(1)
        await reached(gate)
        assert shop.bench.journal.entries.count("records.put") == 1
        loop_clock.advance(301)
        await shop.until("records.put", 2)
        assert (await shop.registered()).generating == "j1"

        gate.open()
        async with asyncio.timeout(BOUND):
            while shop.worker.state != "ready":
                await asyncio.sleep(0)
        assert shop.bench.journal.entries.count("records.put") == 2

        loop_clock.advance(301)
        await shop.until("records.put", 3)
        told = await shop.registered()
        assert (told.generating, told.running, told.tasks_done) == (None, (), 1)


async def test_the_last_that_a_worker_tells_is_that_it_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_shop() as shop:
        asked, answered, call = asyncio.Event(), asyncio.Event(), shop.bench.bus.call

        @contextlib.asynccontextmanager
        async def slow(method: str) -> AsyncIterator[None]:
            async with call(method):
                yield
            if method == "records.put":
                asked.set()
                await answered.wait()

        monkeypatch.setattr(shop.bench.bus, "call", slow)
        shop.start()
        await asyncio.wait_for(asked.wait(), BOUND)
        shop.worker.drain()
        await settled()
        answered.set()
        await shop.left()

        assert (await shop.registered()).state == "draining"


async def test_a_task_that_comes_again_is_told_in_the_registry_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidgen.worker.SOON_S", 300.0)
    async with open_shop(heartbeat_s=600.0) as shop:
        await shop.queue(1)
        held = await shop.bench.take()
        gate = shop.engine.hold("generate", 1, 2)
        shop.start()
        assert (await shop.registered()).running == ()
        await held.nak()
        await reached(gate)

        async with asyncio.timeout(BOUND):
            while (await shop.registered()).running != ("j1",):
                await asyncio.sleep(0)


async def test_a_task_that_was_handed_back_is_taken_again_though_who_did_is_not_through_yet(
    steady: Steady, loop_clock: LoopClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taken for one that still ran, and nobody began it until its lease ran out."""
    answered, asked = asyncio.Event(), []

    async with open_shop(engines.Resumes()) as shop:
        gate = await a_long_batch_task(shop, steady)
        call = shop.bench.bus.call

        @contextlib.asynccontextmanager
        async def slow(method: str) -> AsyncIterator[None]:
            async with call(method):
                yield
            if method == "nak":
                asked.append(method)
                await answered.wait()

        monkeypatch.setattr(shop.bench.bus, "call", slow)
        await shop.queue(2)
        await looked(shop, loop_clock)
        gate.open()

        await shop.until("stage_completed", 2)

        assert asked
        assert [event.type for event in shop.bench.events("j1")][-3:] == [
            "stage_released", "stage_started", "stage_completed"
        ]  # fmt: skip
        answered.set()


async def test_a_task_that_comes_back_while_an_overtaken_attempt_still_ends_is_begun(loop_clock: LoopClock) -> None:
    """It was taken for what runs here: nobody had it until its lease ran out, which the overtaken attempt renewed."""
    async with open_shop() as shop:
        finishing = shop.engine.hold("finish", 1)
        await shop.queue(1)
        shop.start()
        await reached(finishing)
        [turn] = shop.worker._turns
        await shop.bench.start_elsewhere(2, tries=1, job="j1")
        turn.look.set()
        await asyncio.wait_for(turn.stop.raised.wait(), BOUND)
        renewed = shop.bench.bus.calls["in_progress"]
        loop_clock.advance(15.1)
        await settled()
        assert shop.bench.bus.calls["in_progress"] == renewed

        [held] = await shop.bench.bus.unsettled(topology.consumer_of("edit", "interactive"))
        await shop.bench.bus.hand_back(topology.consumer_of("edit", "interactive"), held.seq)
        await shop.bench.journal.until(lambda: len(shop.worker._turns) == 2)
        finishing.open()
        await shop.until("stage_completed")

        assert shop.bench.events("j1")[-1].attempt == 3


async def test_a_task_gets_the_folder_of_one_that_is_done_empty_and_none_that_was_left_otherwise(
    loop_clock: LoopClock,
) -> None:
    class Looks(engines.Gated):
        """Says what it finds where it is to leave its files."""

        def __init__(self) -> None:
            super().__init__()
            self.found: list[tuple[Path, list[str]]] = []

        def finish(self, output: Any, folder: Path) -> Any:
            self.found.append((folder, sorted(path.name for path in folder.iterdir())))
            return super().finish(output, folder)

    engine = Looks()
    async with open_shop(engine) as shop:

        async def through(number: int) -> Path:
            await shop.queue(number)
            await shop.until("ack", number)
            folder, names = engine.found[-1]
            assert names == ["input-0"]
            return folder

        one_thread()
        shop.start()
        first = await through(1)
        await settled()
        await tidied(loop_clock)

        assert await through(2) == first
        assert await through(3) != first


async def test_a_worker_can_be_asked_for_and_tells_soon_what_it_holds() -> None:
    async with open_shop() as shop:
        first, second = shop.engine.hold("generate", 1, 2), shop.engine.hold("prepare", 2)
        await shop.queue(1)
        await shop.queue(2)
        shop.start()
        await reached(first, second)
        second.open()

        async with asyncio.timeout(BOUND):
            while set((await shop.registered()).running) != {"j1", "j2"}:
                await asyncio.sleep(0)

        assert await shop.bench.bus.listened(topology.subject_of_worker("edit", shop.bench.policy.worker_id))


async def test_a_worker_says_which_tasks_it_is_at() -> None:
    async with open_shop() as shop:
        held = shop.engine.hold("generate", 1)
        await shop.queue(1)
        shop.start()
        await reached(held)
        subject = topology.subject_of_worker("edit", shop.bench.policy.worker_id)
        assert await shop.bench.bus.ask(subject, b"j1") == eventlog.AT_IT
        assert await shop.bench.bus.ask(subject, b"j2") == b"no"
        answers = shop.bench.bus.calls["signal"]
        await shop.bench.bus.signal(subject, b"j1")  # whoever asked with an address that is none gets no answer
        await settled()
        assert shop.bench.bus.calls["signal"] == answers + 1

        held.open()
        await shop.until("stage_completed")
        async with asyncio.timeout(BOUND):
            while await shop.bench.bus.ask(subject, b"j1") != b"no":
                await asyncio.sleep(0)


async def test_while_a_task_is_alone_no_other_is_taken_and_once_it_has_left_the_next_one_is() -> None:
    async with open_shop() as shop:
        held, finishing = shop.engine.hold("generate", 1, 2), shop.engine.hold("finish", 1)
        await shop.queue(1)
        await shop.bench.start_elsewhere(1, job="j1", worker=shop.bench.policy.worker_id)
        await shop.queue(2)
        shop.start()
        await reached(held)
        held.open()
        await reached(finishing)
        await settled()
        assert shop.bench.bus.calls["pull"] == 1

        finishing.open()
        await shop.until("stage_completed", 2)

        assert shop.bench.events("j1")[-1].alone
        assert not shop.bench.events("j2")[-1].alone
