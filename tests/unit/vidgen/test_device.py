"""One device for two stages: whose task is next, and what becomes of a switch that fails or is not wanted any more."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from tests import engines
from tests.spans import id_of, parent_of, traced
from tests.workbench import BOUND, Bench, settled

from vidgen import device, errors, profiles, tracing
from vidgen.contracts import Stage
from vidgen.device import HOLD_SWITCHES, LONGEST_HOLD_S, TakingTurns, next_stage, views
from vidgen.testing import FakeClock
from vidgen.turn import Turn

STAGES: tuple[Stage, ...] = get_args(Stage)
seconds = st.floats(min_value=0, max_value=1000)
stages = st.sampled_from(STAGES)


# ── whose task is next ───────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(stages, min_size=1), st.one_of(st.none(), stages), seconds, seconds)
def test_only_a_stage_that_waits_is_next(waiting: list[Stage], awake: Stage | None, held: float, switch: float) -> None:
    chosen = next_stage(waiting, awake, held, switch)

    assert chosen in waiting
    if len(set(waiting)) > 1 and awake is not None:
        assert (chosen == awake) == (held < min(HOLD_SWITCHES * switch, LONGEST_HOLD_S))


@dataclass(frozen=True)
class Span:
    """A task on the device, or the switch to a stage."""

    stage: Stage
    begin: float
    end: float
    is_switch: bool


def simulated(queue: Sequence[tuple[Stage, float]], switch: float) -> Iterator[Span]:
    """What happens on a device where all these tasks wait from the start."""
    waiting, now, since, awake, last = list(queue), 0.0, 0.0, STAGES[0], 0.0
    while waiting:
        stage = next_stage([each for each, _ in waiting], awake, now - since, last)
        if stage != awake:
            yield Span(stage, now, now + switch, is_switch=True)
            now += switch
            last, since, awake = switch, now, stage
        task = next(each for each in waiting if each[0] == stage)
        waiting.remove(task)
        yield Span(stage, now, now + task[1], is_switch=False)
        now += task[1]


queues = st.lists(st.tuples(stages, st.floats(min_value=0.1, max_value=60)), min_size=1, max_size=60)


@given(queues, st.floats(min_value=0.01, max_value=LONGEST_HOLD_S / HOLD_SWITCHES))
def test_switches_take_a_tenth_of_the_time(queue: list[tuple[Stage, float]], switch: float) -> None:
    spans = list(simulated(queue, switch))
    switching = sum(span.end - span.begin for span in spans if span.is_switch)

    # The first one comes at once, for nobody knows what it costs, and the last when a stage has no more tasks.
    assert switching <= spans[-1].end / 10 + 3 * switch


@given(queues, st.floats(min_value=0.01, max_value=60))
def test_no_stage_waits_longer_than_the_longest_hold_a_task_and_a_switch(
    queue: list[tuple[Stage, float]], switch: float
) -> None:
    longest = max(duration for _, duration in queue)
    lost_at = 0.0
    for span in simulated(queue, switch):
        if span.is_switch:
            assert span.begin - lost_at <= LONGEST_HOLD_S + longest + switch + 1e-6
            lost_at = span.begin


# ── the device ───────────────────────────────────────────────────────────────────────────────────────────────────


class Naps:
    """Writes down who sleeps and wakes; fails as told, and waits where a test closed the `door`."""

    def __init__(self, name: str, journal: list[str], clock: FakeClock) -> None:
        self.name, self.journal, self.clock = name, journal, clock
        self.faults: list[Exception] = []
        self.door = threading.Event()
        self.door.set()
        self.at_the_door = threading.Event()

    def demand(self) -> profiles.Demand | None:
        return None

    def settle_for(self, profile: profiles.Name, room: int) -> None:
        raise AssertionError(profile)

    def sleep(self) -> None:
        self.journal.append(f"{self.name} sleeps")

    def wake(self) -> None:
        self.at_the_door.set()
        assert self.door.wait(BOUND)
        if self.faults:
            raise self.faults.pop(0)
        self.clock.advance(2.0)
        self.journal.append(f"{self.name} wakes")


class House:
    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self.journal: list[str] = []
        self.clock = FakeClock()
        self.engines: dict[Stage, Naps] = {stage: Naps(stage, self.journal, self.clock) for stage in STAGES}
        self.switched: list[tuple[Stage, float]] = []
        self.shared = TakingTurns(
            self.engines, "edit", thread, lambda stage, seconds: self.switched.append((stage, seconds)), self.clock.time
        )

    async def use(self, stage: Stage, name: str = "") -> None:
        """Wait for the device, and give it back at once."""
        async with self.used(stage):
            self.journal.append(name or stage)

    @contextlib.asynccontextmanager
    async def used(self, stage: Stage) -> AsyncIterator[None]:
        mine = self.shared.of(stage)
        await asyncio.wait_for(mine.acquire(), BOUND)
        try:
            yield
        finally:
            mine.release()

    async def at_the_door(self, stage: Stage) -> None:
        assert await asyncio.to_thread(self.engines[stage].at_the_door.wait, BOUND)


@pytest.mark.parametrize("takes_turns", [True, False])
async def test_the_stage_that_is_awake_has_the_device_at_once_and_the_other_wakes_only_where_they_take_turns(
    takes_turns: bool,
) -> None:
    journal: list[str] = []
    with ThreadPoolExecutor(1) as thread:
        naps: Any = {stage: Naps(stage, journal, FakeClock()) for stage in STAGES}
        stages = views(naps, STAGES[1], thread, lambda stage, seconds: None, takes_turns=takes_turns)
        for stage in (STAGES[1], STAGES[0]):
            await asyncio.wait_for(stages[stage].acquire(), BOUND)
            stages[stage].release()
            journal.append(stage)
    first, other = STAGES[1], STAGES[0]
    assert journal == [first, *([f"{first} sleeps", f"{other} wakes"] if takes_turns else []), other]


def test_one_model_beside_a_preview_has_nobody_to_share_its_gpu_with() -> None:
    class Asks(Naps):
        def demand(self) -> profiles.Demand | None:
            return profiles.Demand("model", 80 << 30, {"transformer": 1 << 30}, 1 << 30)

    clock = FakeClock()
    both: Any = {"edit": Asks("edit", [], clock), "i2v": Naps("i2v", [], clock)}
    assert device.share(both, "auto") is None  # and it chooses its profile itself


@pytest.fixture
def thread() -> Any:
    with ThreadPoolExecutor(1, "device") as made:
        yield made


@pytest.fixture
async def house(thread: ThreadPoolExecutor) -> House:
    return House(thread)


async def test_the_stage_that_is_awake_waits_for_nobody_and_the_other_for_a_switch(house: House) -> None:
    await house.use("edit")
    await house.use("i2v")
    await house.use("i2v")
    await house.use("edit")

    assert house.journal == [
        "edit", "edit sleeps", "i2v wakes", "i2v", "i2v", "i2v sleeps", "edit wakes", "edit",
    ]  # fmt: skip
    assert house.switched == [("i2v", 2.0), ("edit", 2.0)]


async def test_the_task_for_which_an_engine_was_woken_has_that_in_its_trace(house: House) -> None:
    with traced() as seen:
        for stage in ("edit", "i2v", "i2v"):
            with tracing.span(f"a task of {stage}"):
                await house.use(stage)  # type: ignore[arg-type]

        woken, _ = seen.all("a task of i2v")
        assert parent_of(seen.one("load")) == id_of(woken)


async def test_a_switch_belongs_to_no_job() -> None:
    """What it logged named the task that had ended before it."""
    seen: list[dict[str, Any]] = []
    with ThreadPoolExecutor(1) as thread:
        naps = {stage: Naps(stage, [], FakeClock()) for stage in STAGES}
        shared = TakingTurns(naps, "edit", thread, lambda *_: seen.append(structlog.contextvars.get_contextvars()))
        with structlog.contextvars.bound_contextvars(job="j1"):
            await asyncio.wait_for(shared.of("i2v").acquire(), BOUND)
    assert seen == [{}]


async def test_a_stage_keeps_the_device_until_that_has_paid_for_the_switch(house: House) -> None:
    await house.use("i2v")  # so that it is known what a switch takes
    async with house.used("i2v"):
        waiting = [asyncio.create_task(house.use("edit", "edit 1"))]
        waiting += [asyncio.create_task(house.use("i2v", f"i2v {number}")) for number in (1, 2)]
        await settled()
        house.clock.advance(17.9)
    await asyncio.wait_for(asyncio.gather(*waiting), BOUND)
    assert house.journal[-5:] == ["i2v 1", "i2v 2", "i2v sleeps", "edit wakes", "edit 1"]

    async with house.used("edit"):
        waiting = [asyncio.create_task(house.use(stage)) for stage in ("edit", "i2v")]  # type: ignore[arg-type]
        await settled()
        house.clock.advance(18.0)
    await asyncio.wait_for(asyncio.gather(*waiting), BOUND)
    assert house.journal[-6:] == ["edit sleeps", "i2v wakes", "i2v", "i2v sleeps", "edit wakes", "edit"]


async def test_models_that_do_not_change_places_are_told_to_the_task_that_waits(house: House) -> None:
    house.shared._bears_s = 0.05
    house.engines["i2v"].door.clear()
    try:
        with pytest.raises(errors.SwitchHungError):
            await house.use("i2v")
    finally:
        house.engines["i2v"].door.set()


async def test_a_task_that_no_longer_waits_is_passed_over(house: House) -> None:
    async with house.used("edit"):
        gone, stays = (asyncio.create_task(house.use(stage)) for stage in ("i2v", "edit"))  # type: ignore[arg-type]
        await settled()
        gone.cancel()
        await settled()
    await asyncio.wait_for(stays, BOUND)

    assert house.journal == ["edit"]


async def test_a_task_that_goes_in_the_middle_of_a_switch_goes_at_once_and_the_next_has_the_device(
    house: House,
) -> None:
    house.engines["i2v"].door.clear()
    gone = asyncio.create_task(house.use("i2v"))
    await house.at_the_door("i2v")
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone  # while the engine still wakes
    waits = asyncio.create_task(house.use("edit"))
    await settled()
    assert not waits.done()

    house.engines["i2v"].door.set()
    await asyncio.wait_for(waits, BOUND)

    assert house.journal == ["edit sleeps", "i2v wakes", "i2v sleeps", "edit wakes", "edit"]


async def test_a_device_that_is_granted_in_the_moment_of_a_cancel_goes_to_the_next(house: House) -> None:
    mine = house.shared.of("edit")
    await mine.acquire()
    late = asyncio.create_task(mine.acquire())  # type: ignore[arg-type]
    await settled()
    mine.release()  # granted, but not told yet
    late.cancel()
    with pytest.raises(asyncio.CancelledError):
        await late

    await house.use("edit", "next")
    assert house.journal == ["next"]


async def test_an_engine_that_cannot_be_woken_costs_the_one_task_for_which_it_was_tried(house: House) -> None:
    house.engines["i2v"].faults = [errors.RetryableError("no memory", code="out_of_memory")]
    with pytest.raises(errors.RetryableError, match="no memory"):
        await house.use("i2v")

    await house.use("edit")
    await house.use("i2v")

    assert house.journal == ["edit sleeps", "edit wakes", "edit", "edit sleeps", "i2v wakes", "i2v"]


async def test_an_engine_that_can_never_be_woken_does_not_use_up_the_tries_of_all_its_tasks(house: House) -> None:
    """Its queue was emptied into the dead letters, one task after another, by a worker that found itself healthy."""
    no_room = errors.RetryableError("no memory", code="out_of_memory")
    house.engines["i2v"].faults = [no_room] * 5
    for _ in range(2):
        with pytest.raises(errors.RetryableError):
            await house.use("i2v")
    with pytest.raises(errors.FatalError, match="no memory, 3 times in a row") as caught:
        await house.use("i2v")
    assert caught.value.code == "out_of_memory"


async def test_a_switch_that_goes_well_forgives_those_before(house: House) -> None:
    no_room = errors.RetryableError("no memory", code="out_of_memory")
    for _ in range(3):
        house.engines["i2v"].faults = [no_room] * 2
        for _ in range(2):
            with pytest.raises(errors.RetryableError):
                await house.use("i2v")
        await house.use("edit")


async def test_what_goes_wrong_where_nobody_waits_any_more_is_in_the_log(house: House) -> None:
    house.engines["i2v"].faults = [errors.FatalError("the device is lost", code="cuda_error")]
    house.engines["i2v"].door.clear()
    gone = asyncio.create_task(house.use("i2v"))
    await house.at_the_door("i2v")
    gone.cancel()
    with structlog.testing.capture_logs() as logs:
        house.engines["i2v"].door.set()
        await house.use("edit")
    assert [entry["code"] for entry in logs if entry["_event"] == "switch_failed"] == ["cuda_error"]


async def test_what_no_engine_should_raise_is_fatal(house: House) -> None:
    house.engines["i2v"].faults = [ZeroDivisionError("a bug")]
    with pytest.raises(errors.FatalError, match="could not change places: ZeroDivisionError: a bug"):
        await house.use("i2v")


# ── as a task meets it ───────────────────────────────────────────────────────────────────────────────────────────


async def test_a_task_whose_engine_cannot_be_woken_is_tried_again_later(house: House) -> None:
    bench = Bench(engines.Instant(), stage="i2v")
    house.engines["i2v"].faults = [errors.RetryableError("no memory", code="out_of_memory")]
    await bench.queue()

    assert await bench.run(Turn(house.shared.of("i2v"))) == "retried"

    assert bench.events()[-1].error.code == "out_of_memory"
    assert "generate" not in bench.engine.calls  # type: ignore[attr-defined]
    await house.use("edit")  # nobody holds it
    bench.close()


async def test_a_task_whose_engine_is_lost_is_free_and_its_worker_leaves(house: House) -> None:
    bench = Bench(engines.Instant(), stage="i2v")
    house.engines["i2v"].faults = [errors.FatalError("the device is lost", code="cuda_error")]
    await bench.queue()

    with pytest.raises(errors.FatalError, match="the device is lost"):
        await bench.run(Turn(house.shared.of("i2v")))

    assert bench.types()[-1] == "stage_released"
    bench.close()


async def test_a_task_that_waits_for_a_switch_is_cancelled_at_once(house: House) -> None:
    bench = Bench(engines.Instant(), stage="i2v")
    house.engines["i2v"].door.clear()
    await bench.queue()
    turn = Turn(house.shared.of("i2v"))
    running = await bench.begin(turn)
    await house.at_the_door("i2v")

    await bench.cancel()
    turn.look.set()

    assert await asyncio.wait_for(running, BOUND) == "cancelled"
    house.engines["i2v"].door.set()
    await house.use("i2v")
    bench.close()
