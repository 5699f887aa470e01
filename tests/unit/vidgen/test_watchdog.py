"""Silence is judged by what was measured for tasks of that size, and a process that stood still was not silent."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests import engines
from tests.workbench import BOUND, Bench, one_thread, work_of

from vidgen import errors
from vidgen.turn import Phase
from vidgen.watchdog import Patience, Watch, Watchdog, bytes_read, over_setup

LOOK_S = 0.01


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def done() -> str:
    return "done"


async def looks(clock: Clock, watch: Watch, each_s: float) -> None:
    """Let time pass, look by look, until the watch loses patience."""
    watched = asyncio.ensure_future(watch.over(asyncio.Event().wait()))
    async with asyncio.timeout(BOUND):
        while not watched.done():
            clock.now += each_s
            await asyncio.sleep(LOOK_S)
    watched.result()


async def learnt(dog: Watchdog, clock: Clock, silence_s: float) -> None:
    """One task of the usual size, whose longest silence was this."""
    watch = dog.watch(work_of("edit"))
    clock.now += silence_s
    watch.heard(1)
    assert await watch.over(done()) == "done"


async def test_the_first_task_of_a_size_is_borne_for_longest() -> None:
    clock = Clock()
    dog = Watchdog(Patience(factor=10, least_s=60, first_s=900), look_s=LOOK_S, clock=clock)
    await learnt(dog, clock, 20.0)

    assert dog.watch(work_of("edit")).bears_s == 200
    assert dog.watch(work_of("edit", width=128)).bears_s == 900
    assert dog.watch(work_of("i2v")).bears_s == 900
    assert dog.watch(work_of("edit"), "finishing").bears_s == 900


async def test_short_silences_are_borne_for_the_least() -> None:
    clock = Clock()
    dog = Watchdog(Patience(factor=10, least_s=60, first_s=900), look_s=LOOK_S, clock=clock)
    await learnt(dog, clock, 0.5)

    assert dog.watch(work_of("edit")).bears_s == 60


async def test_an_engine_that_begins_again_with_less_memory_is_borne_as_at_first() -> None:
    clock = Clock()
    dog = Watchdog(Patience(factor=10, least_s=60, first_s=900), look_s=LOOK_S, clock=clock)
    await learnt(dog, clock, 0.5)
    watch = dog.watch(work_of("edit"))
    watch.heard(3)
    watch.heard(1)

    assert watch.bears_s == 900


async def test_it_is_so_from_the_moment_at_which_it_begins_again_and_later_tasks_are_not() -> None:
    clock = Clock()
    dog = Watchdog(Patience(factor=10, least_s=60, first_s=900), look_s=LOOK_S, clock=clock)
    await learnt(dog, clock, 0.5)
    watch = dog.watch(work_of("edit"))
    assert watch.bears_s == 60
    watch.heard(0)  # before a step was done
    assert watch.bears_s == 900
    clock.now += 500
    assert await watch.over(done()) == "done"
    assert dog.watch(work_of("edit")).bears_s == 60


async def test_the_silence_behind_the_last_step_counts_as_well() -> None:
    clock = Clock()
    dog = Watchdog(Patience(factor=10, least_s=60, first_s=900), look_s=LOOK_S, clock=clock)
    watch = dog.watch(work_of("edit"))
    watch.heard(1)
    clock.now += 30
    assert await watch.over(done()) == "done"
    assert dog.watch(work_of("edit")).bears_s == 300


async def test_silence_beyond_that_is_a_hang() -> None:
    clock = Clock()
    dog = Watchdog(Patience(factor=10, least_s=5 * LOOK_S, first_s=10 * LOOK_S), look_s=LOOK_S, clock=clock)

    with pytest.raises(errors.HungError, match="behind step 0"):
        await looks(clock, dog.watch(work_of("edit")), LOOK_S)


async def test_who_is_cancelled_over_an_engine_that_hangs_is_cancelled() -> None:
    dog = Watchdog(Patience(least_s=0.0, first_s=0.0), look_s=LOOK_S)
    begun = asyncio.Event()

    async def watches() -> None:
        begun.set()
        await dog.watch(work_of("edit")).over(asyncio.Event().wait())

    watching = asyncio.create_task(watches())
    await begun.wait()
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching


async def test_who_is_cancelled_in_the_moment_in_which_a_hang_is_noticed_is_cancelled() -> None:
    watching: asyncio.Task[None] | None = None

    def clock() -> float:
        if watching is not None and not watching.cancelling():
            watching.cancel()
        return asyncio.get_running_loop().time()

    async def watches() -> None:
        dog = Watchdog(Patience(least_s=0.0, first_s=0.0), look_s=LOOK_S, clock=clock)
        await dog.watch(work_of("edit")).over(asyncio.Event().wait())

    task = asyncio.create_task(watches())
    await asyncio.sleep(0)
    watching = task
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_process_that_stood_still_was_not_silent() -> None:
    """After a SIGSTOP, or on a machine that slept, the clock jumps while the engine could not have said anything."""
    clock = Clock()
    dog = Watchdog(Patience(least_s=1000 * LOOK_S, first_s=1000 * LOOK_S), look_s=LOOK_S, clock=clock)
    release = asyncio.Event()
    watched = asyncio.ensure_future(dog.watch(work_of("edit")).over(release.wait()))
    for _ in range(3):
        clock.now += 1e6
        await asyncio.sleep(2 * LOOK_S)

    release.set()
    assert await watched


async def test_without_a_factor_an_engine_is_waited_for() -> None:
    assert Watchdog(Patience(factor=0)).watch(work_of("edit")).bears_s == float("inf")


@pytest.mark.parametrize("phase", ["preparing", "generating", "finishing"])
async def test_a_task_at_which_the_engine_hangs_is_charged_a_try_and_free_at_once(phase: Phase) -> None:
    engine = engines.Hangs(phase)
    bench = Bench(engine)
    bench.use(engine)
    # Time passes from where it hangs on: on a busy machine what comes before takes longer than is borne here.
    clock = asyncio.get_running_loop().time
    patience = Patience(least_s=LOOK_S, first_s=LOOK_S)
    bench.handler._watchdog = Watchdog(
        patience, look_s=LOOK_S, clock=lambda: clock() if engine.started.is_set() else 0.0
    )
    try:
        await bench.queue()
        with pytest.raises(errors.HungError, match=phase):
            await bench.run()

        failed = bench.events()[-1]
        assert (failed.type, failed.error.code, failed.final, failed.tries) == ("stage_failed", "engine_hung", False, 1)
        assert bench.metric("vidgen_worker_tasks_total", outcome="retried") == 1
        assert bench.queued() == 1
    finally:
        engine.released.set()
        bench.close()


@pytest.mark.parametrize("phase", ["preparing", "finishing"])
async def test_an_engine_that_was_not_asked_yet_does_not_hang(phase: Phase) -> None:
    """Uploads to a slow store had all threads: the engine was taken for one that hangs, and its worker left."""
    clock, over = Clock(), threading.Event()
    one_thread()
    bench = Bench(engines.Gated())
    gate = bench.engine.hold("generate")  # type: ignore[attr-defined]
    bench.handler._watchdog = Watchdog(Patience(least_s=LOOK_S, first_s=LOOK_S), look_s=LOOK_S, clock=clock)
    fetch = bench.store.fetch

    async def and_uploads(key: str, path: Path, limit: int | None = None) -> int:
        size = await fetch(key, path, limit)
        if phase == "preparing":
            asyncio.get_running_loop().run_in_executor(None, over.wait, BOUND)
        return size

    bench.store.fetch = and_uploads  # type: ignore[method-assign]
    try:
        await bench.queue()
        running = await bench.begin()
        if phase == "finishing":
            async with asyncio.timeout(BOUND):
                while not gate.reached.is_set():
                    await asyncio.sleep(0)
                asyncio.get_running_loop().run_in_executor(None, over.wait, BOUND)
                gate.open()
                while bench.device.locked():
                    await asyncio.sleep(0)
        gate.open()
        for _ in range(20):
            clock.now += 1.0
            await asyncio.sleep(LOOK_S)
        over.set()

        assert await asyncio.wait_for(running, BOUND) == "completed"
    finally:
        over.set()
        gate.open()
        bench.close()


async def load(clock: Clock, each_s: float, mib: Callable[[], int], patience: Patience) -> None:
    """Let time pass, look by look, over an engine that is never set up."""
    setup = over_setup(
        asyncio.Event().wait(), patience, look_s=LOOK_S, clock=clock, read=lambda: (mib() << 20) + 100
    )  # fmt: skip
    watched = asyncio.ensure_future(setup)
    try:
        async with asyncio.timeout(BOUND):
            while not watched.done() and clock.now < 10_000:
                clock.now += each_s
                await asyncio.sleep(LOOK_S)
    finally:
        watched.cancel()
        await asyncio.wait([watched])
    if not watched.cancelled():
        watched.result()


async def test_a_setup_that_reads_nothing_and_is_not_done_hangs() -> None:
    clock = Clock()
    with pytest.raises(errors.HungError, match="read nothing") as caught:
        await load(clock, 0.9 * LOOK_S * 2, lambda: 1, Patience(first_s=0.9))
    assert caught.value.code == "setup_hung"


async def test_a_setup_is_waited_for_while_it_reads_however_slowly_and_where_nothing_is_watched() -> None:
    clock = Clock()
    await load(clock, 200.0, lambda: int(clock.now), Patience(first_s=0.05))
    assert clock.now >= 10_000
    clock = Clock()
    await load(clock, 200.0, lambda: 1, Patience(factor=0, first_s=0.05))
    assert clock.now >= 10_000


async def test_a_setup_gives_what_it_made_and_passes_on_what_it_raised() -> None:
    assert await over_setup(done(), Patience()) == "done"

    async def fails() -> None:
        raise errors.FatalError("no weights", code="setup_failed")

    with pytest.raises(errors.FatalError, match="no weights"):
        await over_setup(fails(), Patience())


def test_what_a_process_reads_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"w" * (3 << 20))
    before = bytes_read()
    path.read_bytes()
    assert bytes_read() - before >= 3 << 20
