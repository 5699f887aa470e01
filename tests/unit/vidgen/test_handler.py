"""One task from taken to settled: each way in which it can end, and what is told of it."""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
from tests import engines
from tests.workbench import BOUND, Bench, LoopClock, one_thread, settled, task_of, tidied

from vidgen import artifacts, checkpoints, contracts, errors, eventlog, results, topology
from vidgen.contracts import MAX_REFERENCES
from vidgen.engine import Engine, Finished
from vidgen.eta import Pace
from vidgen.metrics import Outcome
from vidgen.testing import FakeClock, MemoryStore
from vidgen.turn import Reason, Turn

MakeBench = Callable[..., Bench]


@pytest.fixture
def bench_of() -> Iterator[MakeBench]:
    made: list[Bench] = []

    def make(engine: Engine | None = None, **given: Any) -> Bench:
        made.append(Bench(engine or engines.Instant(), **given))
        return made[-1]

    yield make
    for bench in made:
        if isinstance(bench.engine, engines.Gated):
            bench.engine.open_all()
        bench.close()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Unconfigured, structlog draws each traceback with all its locals: seconds on a busy machine."""
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
async def loop_clock() -> LoopClock:
    return LoopClock()


async def reached(gate: engines.Gate) -> None:
    assert await asyncio.to_thread(gate.reached.wait, BOUND)


async def ended(running: asyncio.Task[Any]) -> Any:
    return await asyncio.wait_for(running, BOUND)


async def at_its_finish(bench_of: MakeBench) -> tuple[Bench, engines.Gate, Turn, asyncio.Task[Outcome]]:
    """A task whose result is made, and not written yet."""
    engine = engines.Gated()
    gate = engine.hold("finish")
    bench = bench_of(engine)
    await bench.queue()
    turn = bench.turn()
    running = await bench.begin(turn)
    await reached(gate)
    return bench, gate, turn, running


# ── done ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("stage", "name"), [("edit", "edit-0.png"), ("i2v", "video.mp4")])
async def test_a_task_is_settled_by_its_artifact_its_event_and_its_ack(
    bench_of: MakeBench, stage: str, name: str
) -> None:
    bench = bench_of(stage=stage)
    await bench.queue()

    assert await bench.run() == "completed"

    assert bench.types() == ["stage_started", "stage_completed"]
    begun, event = bench.events()
    assert event.started_at == begun.at
    assert (event.attempt, event.tries, event.reused, event.seed, event.worker) == (1, 1, False, 7, "w1")
    [artifact] = event.artifacts
    assert (artifact.key, artifact.size) == (f"jobs/j1/{name}", len(bench.store.objects[f"jobs/j1/{name}"]))
    assert bench.queued() == 0
    assert bench.metric("vidgen_worker_tasks_total", outcome="completed") == 1


async def test_the_artifact_is_stored_before_the_event_is_told_and_the_task_acked_last(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.queue(candidates=2)

    await bench.run()

    effects = [entry for entry in bench.journal.entries if entry == "ack" or entry.startswith(("put", "stage"))]
    assert effects == [
        "stage_started", "put jobs/j1/edit-1.png", "put jobs/j1/edit-0.png", "stage_completed", "ack",
    ]  # fmt: skip


async def test_the_engine_gets_the_inputs_in_their_order(bench_of: MakeBench) -> None:
    class Reads(engines.Instant):
        def prepare(self, work: contracts.Work, files: Any) -> Any:
            self.seen = [Path(file).read_bytes() for file in files]
            return work

    bench = bench_of(Reads())
    keys = tuple(f"uploads/{n}.jpg" for n in range(MAX_REFERENCES))
    await bench.queue(task_of(inputs=keys))
    for key in keys:
        bench.store.add(key, key.encode())

    await bench.run()

    assert bench.engine.seen == [key.encode() for key in keys]  # type: ignore[attr-defined]


async def test_the_event_says_what_the_gpu_did_and_what_it_cost(bench_of: MakeBench) -> None:
    bench = bench_of(engines.Paced(0.05))
    await bench.queue()

    await bench.run()

    event = bench.events()[-1]
    assert event.gpu_seconds >= 0.05
    assert event.cost_usd == pytest.approx(event.gpu_seconds)  # a dollar a second
    assert 0 < event.timings.denoise <= event.gpu_seconds
    assert event.gpu_seconds == pytest.approx(bench.handler.busy_seconds)
    assert bench.metric("vidgen_worker_gpu_busy_seconds_total") == pytest.approx(event.gpu_seconds)


async def test_busy_seconds_grow_with_each_step_while_a_task_runs(bench_of: MakeBench) -> None:
    engine = engines.Gated()
    gate = engine.hold("generate", step=3)
    bench = bench_of(engine)
    await bench.queue()

    running = await bench.begin()
    await reached(gate)
    await settled()

    assert bench.handler.busy_seconds > 0
    assert bench.metric("vidgen_worker_gpu_busy_seconds_total") == pytest.approx(bench.handler.busy_seconds)
    assert bench.metric("vidgen_worker_steps_total") == 2
    gate.open()
    assert await ended(running) == "completed"


async def test_what_the_engine_logs_names_the_job(bench_of: MakeBench) -> None:
    class Logs(engines.Instant):
        def step(self, step: int, steps: int, on_step: Any) -> None:
            self.bound = structlog.contextvars.get_contextvars()
            on_step(step, steps)

    bench = bench_of(Logs())
    await bench.queue()

    await bench.run()

    assert bench.engine.bound == {"job": "j1", "stage": "edit", "attempt": 1}  # type: ignore[attr-defined]


async def test_there_is_one_outcome_record_for_a_task(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.queue()

    with structlog.testing.capture_logs() as logs:
        await bench.run()

    [record] = [entry for entry in logs if entry.get("_event") == "task"]
    assert (record["outcome"], record["lane"], record["deliveries"]) == ("completed", "interactive", 1)


# ── again ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_result_that_is_stored_is_used_and_not_computed_again(bench_of: MakeBench) -> None:
    bench = bench_of()
    task = await bench.queue(candidates=2)
    await bench.run()
    first = bench.events()[-1]
    bench.use(second := engines.Instant())
    await bench.queue(task.model_copy(update={"run": 2}))

    assert await bench.run() == "reused"

    assert second.calls == []
    event = bench.events()[-1]
    assert event.reused
    assert event.artifacts == first.artifacts
    assert (event.gpu_seconds, event.cost_usd) == (0, 0)


async def test_a_stored_result_is_used_even_where_its_inputs_are_gone(bench_of: MakeBench) -> None:
    bench = bench_of()
    task = await bench.queue()
    await bench.run()
    await bench.queue(task.model_copy(update={"run": 2}))
    del bench.store.objects["uploads/j1.jpg"]

    assert await bench.run() == "reused"


async def test_a_first_attempt_does_not_ask_the_store_for_a_result(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.accept()
    await bench.queue_where_the_log_stands()

    assert await bench.run() == "completed"

    assert bench.store.calls["stat"] == 0


async def test_a_result_is_found_where_the_log_went_on_though_the_task_says_otherwise(
    bench_of: MakeBench, tmp_path: Path
) -> None:
    # A bus that was killed may forget that it has delivered the task before; the log does not.
    clock = FakeClock()
    engine = engines.Instant()
    bench = bench_of(engine, clock=clock)
    await bench.accept()
    task = await bench.queue_where_the_log_stands()
    [queued] = bench.bus.messages(topology.TASKS)
    files = engine.finish(task.work, tmp_path)
    await results.keep(bench.store, task, results.made(task, files, engine.info))
    await bench.start_elsewhere(1, worker=bench.policy.worker_id)

    assert queued.headers[topology.HEADER_LOG_SEQ] == "1"
    assert await bench.run() == "reused"

    assert "generate" not in engine.calls


@pytest.mark.parametrize("how", ["delivered again", "another run"])
async def test_a_result_is_looked_for_where_it_may_be(bench_of: MakeBench, how: str) -> None:
    bench = bench_of(clock=FakeClock())
    await bench.accept()
    await bench.queue_where_the_log_stands(run=2 if how == "another run" else 1)
    if how == "delivered again":
        await (await bench.take()).nak()

    assert await bench.run() == "completed"

    assert bench.store.calls["stat"] == 1


async def test_a_passing_fault_hands_the_task_back_with_a_wait_and_then_it_succeeds(bench_of: MakeBench) -> None:
    clock = FakeClock()
    bench = bench_of(engines.FailsOnce(2), clock=clock)
    await bench.queue()
    queue = topology.consumer_of("edit", "interactive")

    assert await bench.run() == "retried"
    assert await bench.bus.pull(queue, wait=0) is None
    clock.advance(1)
    assert await bench.run() == "retried"
    clock.advance(1)
    assert await bench.bus.pull(queue, wait=0) is None  # the wait has doubled
    clock.advance(1)
    assert await bench.run() == "completed"

    failures = [event for event in bench.events() if event.type == "stage_failed"]
    assert [(e.attempt, e.tries, e.final, e.retry_in_s, e.error.code) for e in failures] == [
        (1, 1, False, 1.0, "out_of_memory"), (2, 2, False, 2.0, "out_of_memory")
    ]  # fmt: skip
    assert (bench.events()[-1].attempt, bench.events()[-1].tries) == (3, 3)
    assert bench.dead() == []
    assert bench.metric("vidgen_worker_redeliveries_total") == 2


async def test_a_bug_in_an_engine_is_a_passing_fault(bench_of: MakeBench) -> None:
    bench = bench_of(engines.Breaks())
    await bench.queue()

    assert await bench.run() == "retried"

    assert bench.events()[-1].error.code == "unexpected"
    assert "ZeroDivisionError" in bench.events()[-1].error.message


@pytest.mark.parametrize("phase", ["prepare", "generate", "finish"])
async def test_an_engine_that_looks_for_what_is_not_there_ends_its_task(bench_of: MakeBench, phase: str) -> None:
    """Python's futures take no StopIteration: the task waited for ever, and the next ones behind it."""
    engine: Any = engines.Instant()
    setattr(engine, phase, lambda *given: next(iter(())))
    bench = bench_of(engine)
    await bench.queue()

    async with asyncio.timeout(BOUND):
        assert await bench.run() == "retried"

    assert bench.events()[-1].error.code == "unexpected"


async def test_an_engine_that_wrote_nothing_stores_nothing(bench_of: MakeBench) -> None:
    bench = bench_of(engines.WritesNothing())
    await bench.queue()

    assert await bench.run() == "retried"

    assert not [key for key in bench.store.objects if key.startswith("jobs/")]


async def test_an_attempt_that_failed_is_charged_for_its_gpu_seconds(bench_of: MakeBench) -> None:
    class FailsLate(engines.Gated):
        def generate(self, inputs: Any, on_step: Any) -> Any:
            super().generate(inputs, on_step)
            raise errors.RetryableError("out of memory in the decoder")

    bench = bench_of(FailsLate())
    await bench.queue()

    await bench.run()

    event = bench.events()[-1]
    assert event.type == "stage_failed"
    assert event.gpu_seconds > 0
    assert event.cost_usd == pytest.approx(event.gpu_seconds)


# ── given up ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_fault_that_does_not_pass_ends_as_a_dead_letter_with_the_task_as_it_was(bench_of: MakeBench) -> None:
    clock = FakeClock()
    bench = bench_of(engines.AlwaysRetryable(), clock=clock)
    task = await bench.queue()
    outcomes = []
    for _ in range(3):
        outcomes.append(await bench.run())
        clock.advance(60)

    assert outcomes == ["retried", "retried", "dead"]
    [letter] = bench.dead()
    assert base64.b64decode(letter.payload) == task.to_bytes()
    assert (letter.job_id, letter.stage, letter.error.code) == ("j1", "edit", "out_of_memory")
    assert letter.subject == topology.subject_of_task("edit", "interactive", "j1")
    assert (bench.events()[-1].final, bench.events()[-1].error.retryable) == (True, True)
    assert bench.queued() == 0
    assert bench.metric("vidgen_worker_dead_letters_total") == 1


@pytest.mark.parametrize("ends", ["stage_cancelled", "rejected", "exhausted"])
async def test_an_end_is_in_the_log_before_its_task_leaves_the_queue(bench_of: MakeBench, ends: str) -> None:
    """Whoever dies in between leaves a task that comes again, and not a job that waits for ever."""
    bench = bench_of(engine := engines.Gated() if ends == "stage_cancelled" else engines.Rejects())
    await bench.queue()
    if isinstance(engine, engines.Gated):
        gate = engine.hold("generate", step=2)
        running = await bench.begin(turn := bench.turn())
        await reached(gate)
        await bench.cancel()
        turn.look.set()
        await asyncio.wait_for(turn.stop.raised.wait(), BOUND)
        gate.open()
        await ended(running)
    else:
        for attempt in (1, 2, 3) if ends == "exhausted" else ():
            await bench.start_elsewhere(attempt, alone=True, worker=bench.policy.worker_id)
        await bench.run()

    told = bench.journal.entries
    last = max(number for number, entry in enumerate(told) if entry.startswith("stage_"))
    assert last < told.index("ack")
    if ends == "rejected":  # and its letter before that: it could not be written any more behind an end
        assert told[told.index("stage_started") + 1 : last - 1].count("publish") == 1


async def test_a_task_that_can_never_succeed_is_given_up_at_once(bench_of: MakeBench) -> None:
    bench = bench_of(engines.Rejects())
    await bench.queue()

    assert await bench.run() == "rejected"

    event = bench.events()[-1]
    assert (event.final, event.error.code, event.error.retryable) == (True, "bad_image", False)
    assert bench.dead()[0].error.message == "the image cannot be read: send a PNG or a JPEG"
    assert bench.queued() == 0


async def test_a_task_that_killed_its_worker_each_time_is_given_up_before_it_runs_again(bench_of: MakeBench) -> None:
    bench = bench_of()
    task = await bench.queue()
    for attempt in (1, 2, 3):
        await bench.start_elsewhere(attempt, alone=True, worker=bench.policy.worker_id)

    assert await bench.run() == "dead"

    assert isinstance(bench.engine, engines.Instant)
    assert bench.engine.calls == []
    event = bench.events()[-1]
    assert (event.type, event.final, event.attempt, event.tries) == ("stage_failed", True, 4, 3)
    assert event.error.code == "attempts_exhausted"
    assert base64.b64decode(bench.dead()[0].payload) == task.to_bytes()
    assert bench.queued() == 0


async def test_two_deaths_still_leave_a_third_try(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.queue()
    await bench.start_elsewhere(1, alone=True)
    await bench.start_elsewhere(2, alone=True, worker=bench.policy.worker_id)

    assert await bench.run() == "completed"


async def test_what_runs_at_another_worker_and_comes_as_if_it_never_had_is_left_alone(bench_of: MakeBench) -> None:
    """A bus that was killed may forget that it gave a task away; it goes by the message, so nobody may settle it."""
    engine = engines.Instant()
    bench = bench_of(engine, clock=FakeClock())
    await bench.accept()
    await bench.queue_where_the_log_stands()
    await bench.start_elsewhere(1)
    before = bench.types()

    assert await bench.run() == "elsewhere"

    assert (bench.types(), bench.queued()) == (before, 1)
    assert "generate" not in engine.calls
    assert (await bench.bus.depth(topology.consumer_of(bench.stage, "interactive"))).ack_pending == 1


async def test_what_comes_again_while_its_worker_says_that_it_is_at_it_is_left_alone_and_costs_no_try(
    bench_of: MakeBench,
) -> None:
    """The bus's clock stepped past a lease that is renewed all the while."""
    engine = engines.Instant()
    bench = bench_of(engine)
    await bench.queue()
    [waiting] = [await bench.take()]
    await waiting.nak()
    await bench.start_elsewhere(1, worker="w-busy")
    holder = await bench.bus.listen(topology.subject_of_worker(bench.stage, "w-busy"))
    before = bench.types()

    running = await bench.begin()
    asked = await holder.next(60)
    assert asked is not None
    await bench.bus.signal(asked.reply, eventlog.AT_IT)

    assert await ended(running) == "elsewhere"
    assert (bench.types(), bench.queued()) == (before, 1)
    assert engine.calls == []


async def test_deaths_beside_others_use_up_no_try_and_the_next_attempt_is_alone(bench_of: MakeBench) -> None:
    """A sound task beside those that kill was given up with them: the registry did not say in time who it was."""
    bench = bench_of()
    await bench.queue()
    for attempt in (1, 2, 3):
        await bench.start_elsewhere(attempt, tries=1, worker=bench.policy.worker_id)

    assert await bench.run() == "completed"

    assert [(e.attempt, e.tries, e.alone) for e in bench.events()[-2:]] == [(4, 1, True)] * 2


async def test_an_attempt_that_must_be_alone_waits_for_the_others_and_lets_none_by(bench_of: MakeBench) -> None:
    engine = engines.Gated()
    first = engine.hold("finish", 1)
    bench = bench_of(engine)
    for number in (1, 2, 3):
        await bench.queue(job=f"j{number}", seed=number)
    others = [await bench.begin()]
    await reached(first)
    await bench.start_elsewhere(1, job="j2", worker=bench.policy.worker_id)
    suspect, held = bench.turn(), engine.hold("finish", 2)
    waiting = await bench.begin(suspect)
    others.append(await bench.begin())
    await settled()
    assert engine.generated == [1]

    first.open()
    await reached(held)
    await settled()
    assert suspect.alone
    assert bench.types("j3") == []

    held.open()
    assert [await ended(one) for one in (waiting, *others)] == ["completed"] * 3
    assert engine.generated == [1, 2, 3]


async def test_a_task_that_waits_to_be_alone_is_kept_and_handed_back_unbegun_at_a_drain(bench_of: MakeBench) -> None:
    engine = engines.Gated()
    gate = engine.hold("finish", 1)
    bench = bench_of(engine, ack_wait=0.2)
    for number in (1, 2):
        await bench.queue(job=f"j{number}", seed=number)
    first = await bench.begin()
    await reached(gate)
    await bench.start_elsewhere(1, job="j2", worker=bench.policy.worker_id)
    turn = bench.turn()
    waiting = await bench.begin(turn)
    beats = bench.journal.entries.count("in_progress")
    await bench.journal.until(lambda: bench.journal.entries.count("in_progress") > beats + 4)

    turn.stop.now("released")

    assert await ended(waiting) == "released"
    assert bench.types("j2") == ["stage_started"]
    assert (await bench.take()).num_delivered == 2
    gate.open()
    assert await ended(first) == "completed"


async def test_a_task_that_waits_to_be_alone_is_handed_back_by_a_worker_that_leaves_in_a_hurry(
    bench_of: MakeBench,
) -> None:
    engine = engines.Gated()
    gate = engine.hold("finish", 1)
    bench = bench_of(engine)
    for number in (1, 2):
        await bench.queue(job=f"j{number}", seed=number)
    first = await bench.begin()
    await reached(gate)
    await bench.start_elsewhere(1, job="j2", worker=bench.policy.worker_id)
    waiting = await bench.begin()
    await settled()

    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ended(waiting)

    assert bench.types("j2") == ["stage_started"]
    assert (await bench.take()).num_delivered == 2
    gate.open()
    assert await ended(first) == "completed"


@pytest.mark.parametrize(
    ("key", "code"),
    [
        ("jobs/another/edit-0.png", "key_not_allowed"),
        ("uploads/../jobs/another/edit-0.png", "key_not_allowed"),
        ("secrets/a.png", "key_not_allowed"),
        ("uploads/missing.png", "not_found"),
    ],
)
async def test_an_input_that_may_not_be_read_or_is_not_there_ends_the_task(
    bench_of: MakeBench, key: str, code: str
) -> None:
    bench = bench_of()
    task = task_of(inputs=(key,))
    await bench.publish("interactive", "j1", task.to_bytes())

    assert await bench.run() == "rejected"

    assert bench.events()[-1].error.code == code
    assert isinstance(bench.engine, engines.Instant)
    assert bench.engine.calls == []


async def test_an_input_that_is_too_large_ends_the_task(bench_of: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidgen.handler.MAX_INPUT_BYTES", 100)
    bench = bench_of()
    await bench.queue()

    assert await bench.run() == "rejected"
    assert bench.events()[-1].error.code == "too_large"


async def test_a_task_whose_deadline_has_passed_is_not_begun(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.queue(deadline_at=datetime.now(UTC) - timedelta(seconds=1))

    assert await bench.run() == "rejected"

    assert bench.events()[-1].error.code == "deadline_exceeded"
    assert isinstance(bench.engine, engines.Instant)
    assert bench.engine.calls == []


async def test_a_deadline_that_passes_while_generating_ends_the_task_at_the_next_step(
    bench_of: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines.Gated()
    gate = engine.hold("generate", step=2)
    bench = bench_of(engine)
    await bench.queue(deadline_at=datetime.now(UTC) + timedelta(hours=1))
    running = await bench.begin()
    await reached(gate)

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(hours=2)

    monkeypatch.setattr("vidgen.handler.datetime", Later)
    gate.open()

    assert await ended(running) == "rejected"
    assert bench.events()[-1].error.code == "deadline_exceeded"
    assert bench.metric("vidgen_worker_steps_total") == 2
    assert "finish" not in engine.calls


# ── unreadable ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"[]", b'{"schema_version": 2}'], ids=repr)
async def test_a_task_that_cannot_be_read_becomes_a_dead_letter_and_ends_its_job(
    bench_of: MakeBench, body: bytes
) -> None:
    bench = bench_of()
    await bench.publish("batch", "j1", body)

    with structlog.testing.capture_logs() as logs:
        assert await bench.handler.handle(await bench.take("batch"), bench.turn()) == "dead"

    [letter] = bench.dead()
    assert base64.b64decode(letter.payload) == body
    assert (letter.error.code, letter.job_id, letter.stage) == ("unreadable_task", "j1", "edit")
    assert letter.error.fields
    [event] = bench.events()
    assert (event.type, event.final, event.error.code) == ("stage_failed", True, "unreadable_task")
    assert bench.queued() == 0
    assert bench.metric("vidgen_worker_tasks_total", lane="batch", outcome="dead") == 1
    assert [entry["outcome"] for entry in logs if entry.get("_event") == "task"] == ["dead"]


async def test_an_unreadable_task_ends_the_run_that_its_job_is_in(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.accept()
    await bench.start_elsewhere(1, run=2)
    await bench.publish("interactive", "j1", b"{}")

    assert await bench.handler.handle(await bench.take(), bench.turn()) == "dead"

    event = bench.events()[-1]
    assert (event.type, event.run, event.final) == ("stage_failed", 2, True)


async def test_an_unreadable_task_of_a_job_that_ended_says_nothing_more(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.cancel()
    await bench.publish("interactive", "j1", b"{}")

    assert await bench.run() == "dead"

    assert bench.types() == ["cancel_requested"]


async def test_an_unreadable_task_under_a_name_that_is_none_is_a_dead_letter_without_a_job(
    bench_of: MakeBench,
) -> None:
    bench = bench_of()
    await bench.publish("interactive", "no$id", b"{}")

    assert await bench.run() == "dead"

    assert bench.dead()[0].job_id is None
    assert bench.bus.messages(topology.DEAD)[0].subject == "vidgen.dead.edit.unknown"


async def test_an_unreadable_task_is_not_lost_when_the_bus_is(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.publish("interactive", "j1", b"{}")
    delivery = await bench.take()
    bench.bus.down = True

    assert await bench.handler.handle(delivery, bench.turn()) == "lost"

    bench.bus.down = False
    assert bench.queued() == 1


async def test_a_log_that_cannot_be_read_leaves_the_task_alone(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.queue()
    await bench.bus.signal(topology.subject_of_events("j1"), b'{"type": "of the future"}')

    assert await bench.run() == "lost"

    assert bench.queued() == 1


# ── a sick worker ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_lost_device_hands_the_task_back_unharmed_and_reaches_the_worker(bench_of: MakeBench) -> None:
    bench = bench_of(engines.FatalOnGenerate())
    await bench.queue()

    with pytest.raises(errors.FatalError, match="fell off the bus"):
        await bench.run()

    event = bench.events()[-1]
    assert (event.type, event.attempt, event.tries) == ("stage_released", 1, 0)
    assert (await bench.take()).num_delivered == 2  # at once
    assert bench.metric("vidgen_worker_tasks_total", outcome="released") == 1


async def test_a_task_given_back_by_a_sick_worker_has_all_its_tries(bench_of: MakeBench) -> None:
    bench = bench_of(engines.FatalOnGenerate())
    await bench.queue()
    with pytest.raises(errors.FatalError):
        await bench.run()

    bench.use(engines.Instant())

    assert await bench.run() == "completed"
    assert (bench.events()[-1].attempt, bench.events()[-1].tries) == (2, 1)


@pytest.mark.parametrize("engine", [engines.Instant, engines.AlwaysRetryable, engines.Rejects, engines.Breaks])
async def test_a_tasks_files_go_within_a_second_however_it_ends(
    bench_of: MakeBench, engine: Callable[[], Engine]
) -> None:
    one_thread()
    bench, clock = bench_of(engine()), LoopClock()
    await bench.queue()

    await bench.run()

    await tidied(clock)
    scratch = bench.handler._scratch
    assert [path for path in scratch.folder().rglob("*") if path.is_file()] == []
    assert scratch.room().exists() == (engine is engines.Instant)  # of another's a thread may still write there


class DiskFull(engines.Instant):
    """Its machine's disk has no room for what it made."""

    def finish(self, output: Any, folder: Path) -> tuple[Finished, ...]:
        raise OSError(errno.ENOSPC, "No space left on device")


class NoRoom(MemoryStore):
    """Its machine's disk has no room for an input."""

    async def fetch(self, key: str, path: Path, limit: int | None = None) -> int:
        full = OSError(errno.ENOSPC, "No space left on device")
        raise artifacts.local_file(full) from full


@pytest.mark.parametrize("where", ["fetching", "finishing"])
async def test_a_full_disk_is_the_workers_fault_and_costs_its_task_no_try(bench_of: MakeBench, where: str) -> None:
    """Such a worker is the quickest of all: as the tasks' own fault it would use up the tries of every one."""
    bench = bench_of(DiskFull() if where == "finishing" else engines.Instant())
    if where == "fetching":
        bench.handler._store = NoRoom()
    await bench.queue()

    with pytest.raises(errors.FatalError, match="No space left") as caught:
        await bench.run()

    assert caught.value.code == "disk_failed"
    assert (bench.events()[-1].type, bench.events()[-1].tries) == ("stage_released", 0)
    bench.use(engines.Instant())
    assert await bench.run() == "completed"


async def test_a_fault_that_is_its_own_cause_ends_its_task_and_not_the_event_loop(bench_of: MakeBench) -> None:
    """A process that computed half of each step was lost, and its error named itself as what it had come of."""

    class Loses(engines.Instant):
        def generate(self, inputs: Any, on_step: Any) -> Any:
            gone = errors.FatalError("the other device is gone", code="partner_lost")
            raise gone from gone

    bench = bench_of(Loses())
    await bench.queue()

    with pytest.raises(errors.FatalError, match="is gone"):
        await bench.run()
    assert bench.events()[-1].type == "stage_released"


async def test_a_task_that_is_too_large_for_the_disk_is_charged_and_ends(
    bench_of: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the disk's fault it would end one worker after the other, and never itself."""

    class TooLarge(DiskFull):
        def finish(self, output: Any, folder: Path) -> tuple[Finished, ...]:
            (folder / "video.mp4").write_bytes(b"x" * 100_000)
            return super().finish(output, folder)

    small = shutil.disk_usage("/")._replace(total=150_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: small)
    bench = bench_of(TooLarge(), max_attempts=1)
    await bench.queue()

    assert await bench.run() == "dead"
    assert bench.events()[-1].final


async def test_a_task_whose_model_could_not_be_woken_is_handed_back_with_all_its_tries(bench_of: MakeBench) -> None:
    bench = bench_of()

    async def hangs() -> Any:
        raise errors.SwitchHungError

    bench.device.acquire = hangs  # type: ignore[method-assign]
    await bench.queue()

    with pytest.raises(errors.HungError):
        await bench.run()

    assert (bench.events()[-1].type, bench.events()[-1].tries) == ("stage_released", 0)


async def test_a_worker_that_leaves_in_a_hurry_hands_its_task_back(bench_of: MakeBench) -> None:
    engine = engines.Gated()
    gate = engine.hold("generate", step=2)
    bench = bench_of(engine)
    await bench.queue()
    turn = bench.turn()
    running = await bench.begin(turn)
    await reached(gate)

    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ended(running)

    assert bench.types() == ["stage_started", "stage_released"]
    assert (await bench.take()).num_delivered == 2
    assert turn.stop.reason == "released"  # so that the engine's thread ends, too


# ── the fence ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("phase", ["generate", "finish"])
async def test_an_attempt_that_was_overtaken_says_and_settles_nothing(bench_of: MakeBench, phase: str) -> None:
    engine = engines.Gated()
    gate = engine.hold(phase)
    bench = bench_of(engine)
    await bench.queue()
    running = await bench.begin()
    await reached(gate)
    await bench.start_elsewhere(2)
    told = len(bench.events())
    gate.open()

    assert await ended(running) == "fenced"

    assert len(bench.events()) == told
    assert not {"ack", "nak"} & set(bench.journal.entries)
    assert bench.queued() == 1


@pytest.mark.parametrize(
    "engine", [engines.AlwaysRetryable(), engines.Rejects(), engines.FatalOnGenerate()], ids=lambda e: e.info.name
)
async def test_an_attempt_that_was_overtaken_cannot_fail_the_task(bench_of: MakeBench, engine: Engine) -> None:
    class Overtaken(engines.Gated):
        def prepare(self, work: contracts.Work, files: Any) -> Any:
            super().prepare(work, files)
            return engine.prepare(work, files)

        def generate(self, inputs: Any, on_step: Any) -> Any:
            return engine.generate(inputs, on_step)

    overtaken = Overtaken()
    gate = overtaken.hold("prepare")
    bench = bench_of(overtaken, max_attempts=1)
    await bench.queue()
    running = await bench.begin()
    await reached(gate)
    await bench.start_elsewhere(2)
    gate.open()

    if isinstance(engine, engines.FatalOnGenerate):
        with pytest.raises(errors.FatalError):
            await ended(running)
    else:
        assert await ended(running) == "fenced"

    assert bench.types() == ["stage_started", "stage_started"]
    assert bench.dead() == []
    assert not {"ack", "nak"} & set(bench.journal.entries)


@pytest.mark.parametrize("late", [False, True], ids=["", "behind it the end of the run before"])
async def test_the_heartbeat_finds_that_an_attempt_was_overtaken(
    bench_of: MakeBench, loop_clock: LoopClock, late: bool
) -> None:
    engine = engines.Gated()
    gate = engine.hold("generate", step=2)
    bench = bench_of(engine)
    await bench.queue(steps=100, run=2)
    turn = bench.turn()
    running = await bench.begin(turn)
    await reached(gate)
    await bench.start_elsewhere(2, run=2)
    if late:
        await bench.say(contracts.JobCancelled(job_id="j1", run=1, at=datetime.now(UTC)))

    loop_clock.advance(15.1)
    await asyncio.wait_for(turn.stop.raised.wait(), BOUND)
    gate.open()

    assert await ended(running) == "fenced"
    assert bench.metric("vidgen_worker_steps_total") == 2  # it stopped there


async def test_an_attempt_that_comes_to_its_end_after_a_newer_one_is_no_second_completion(bench_of: MakeBench) -> None:
    """As a worker does that was frozen past its lease and wakes when the task is done."""
    clock = FakeClock()
    engine = engines.Gated()
    gate = engine.hold("finish")
    bench = bench_of(engine, clock=clock)
    await bench.queue()
    frozen = await bench.begin()
    await reached(gate)
    clock.advance(61)
    bench.use(engines.Instant())
    assert await bench.run() == "completed"
    gate.open()

    assert await ended(frozen) == "fenced"

    assert bench.types() == ["stage_started", "stage_started", "stage_completed"]
    assert bench.journal.entries.count("ack") == 1


async def test_of_two_workers_with_the_same_task_one_wins(bench_of: MakeBench) -> None:
    clock = FakeClock()
    bench = bench_of(clock=clock, ack_wait=10)
    await bench.queue()
    first = await bench.take()
    clock.advance(11)
    second = await bench.take()

    outcomes = await asyncio.gather(
        bench.handler.handle(first, bench.turn()), bench.handler.handle(second, bench.turn())
    )

    assert "completed" in outcomes
    assert bench.types().count("stage_completed") == 1
    assert bench.queued() == 0


@pytest.mark.parametrize("silent_s", [0, 7, 61], ids=["and knows it", "before it was told", "while it stood still"])
async def test_an_attempt_that_was_overtaken_stores_nothing_over_what_the_newer_one_made(
    bench_of: MakeBench, loop_clock: LoopClock, silent_s: int
) -> None:
    """Two kinds of GPUs make other bytes: the record's checksum was of what no longer lay there."""
    bench, gate, turn, running = await at_its_finish(bench_of)
    [held] = await bench.bus.unsettled(topology.consumer_of("edit", "interactive"))
    await bench.bus.hand_back(topology.consumer_of("edit", "interactive"), held.seq)
    bench.use(engines.Instant(png=engines.PNG + b"of another GPU"))
    assert await bench.run() == "completed"
    if silent_s:
        bench.bus.fail_next("in_progress")
        loop_clock.advance(silent_s)
        await settled()
        assert turn.stop.reason is None
    else:
        turn.look.set()
        await asyncio.wait_for(turn.stop.raised.wait(), BOUND)
    gate.open()

    assert await ended(running) == "fenced"

    [artifact] = bench.events()[-1].artifacts
    assert hashlib.sha256(bench.store.objects[artifact.key]).hexdigest() == artifact.sha256


@pytest.mark.parametrize("before", [None, "drained", "preempted"])
async def test_who_waits_for_the_bus_with_what_was_made_leaves_when_it_is_told_to(
    bench_of: MakeBench, loop_clock: LoopClock, before: Reason | None
) -> None:
    bench, gate, turn, running = await at_its_finish(bench_of)
    bench.bus.down = True
    loop_clock.advance(61)
    looks = bench.bus.calls["last"]
    gate.open()
    async with asyncio.timeout(BOUND):
        while bench.bus.calls["last"] == looks:
            await asyncio.sleep(0)
    if before is not None:
        turn.stop.now(before)
    turn.stop.now("released")
    loop_clock.advance(2.1)

    assert await ended(running) == "lost"
    assert bench.store.calls["put"] == 0


@pytest.mark.parametrize("overtaken", [True, False])
async def test_what_was_made_while_the_bus_was_away_is_stored_once_it_is_known_whose_the_task_is(
    bench_of: MakeBench, loop_clock: LoopClock, overtaken: bool
) -> None:
    """It may be away for this worker alone, and have given the task to another one."""
    clock, engine = FakeClock(), engines.Gated()
    gate = engine.hold("finish")
    bench = bench_of(engine, clock=clock)
    await bench.queue()
    running = await bench.begin()
    await reached(gate)
    if overtaken:
        clock.advance(61)
        bench.use(engines.Instant(png=engines.PNG + b"of another GPU"))
        assert await bench.run() == "completed"
    bench.bus.down = True
    loop_clock.advance(61)
    looks, puts = bench.bus.calls["last"], bench.store.calls["put"]
    gate.open()
    for number in range(1, 4):
        async with asyncio.timeout(BOUND):
            while bench.bus.calls["last"] < looks + number:
                await asyncio.sleep(0)
        loop_clock.advance(1)
    assert bench.store.calls["put"] == puts

    bench.bus.down = False
    loop_clock.advance(1)

    assert await ended(running) == ("fenced" if overtaken else "completed")
    [artifact] = bench.events()[-1].artifacts
    assert hashlib.sha256(bench.store.objects[artifact.key]).hexdigest() == artifact.sha256


# ── cancel ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_cancel_stops_a_running_task_at_its_next_step(bench_of: MakeBench) -> None:
    engine = engines.Gated()
    gate = engine.hold("generate", step=2)
    bench = bench_of(engine)
    await bench.queue(steps=100)
    turn = bench.turn()
    running = await bench.begin(turn)
    await reached(gate)

    await bench.cancel(at=datetime.now(UTC) - timedelta(seconds=1))
    turn.look.set()
    await asyncio.wait_for(turn.stop.raised.wait(), BOUND)
    gate.open()

    assert await ended(running) == "cancelled"
    event = bench.events()[-1]
    assert event.type == "stage_cancelled"
    assert event.cancel_latency_s >= 1  # from the request on, not from when this worker heard of it
    assert event.gpu_seconds > 0
    assert bench.metric("vidgen_worker_steps_total") == 2
    assert bench.queued() == 0
    assert not bench.device.locked()
    assert bench.metric("vidgen_worker_cancel_latency_seconds_count") == 1


async def test_a_signal_that_means_the_run_before_stops_nothing(bench_of: MakeBench) -> None:
    """A gateway may repeat the signal of a cancel after the job was retried: the log has the truth."""
    engine = engines.Gated()
    gate = engine.hold("generate", step=2)
    bench = bench_of(engine)
    await bench.cancel(run=1)
    await bench.say(contracts.RetryRequested(job_id="j1", run=2, at=datetime.now(UTC)))
    await bench.queue(run=2)
    turn = bench.turn()
    running = await bench.begin(turn)
    await reached(gate)
    looked = bench.bus.calls["last"]

    turn.look.set()
    await bench.journal.until(lambda: bench.bus.calls["last"] > looked)
    await settled()
    gate.open()

    assert await ended(running) == "completed"


async def test_a_cancel_ends_a_task_that_waits_for_the_device(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.queue()
    turn = bench.turn()
    async with bench.device:
        running = await bench.begin(turn)
        await bench.until_it_waits()
        await bench.cancel()
        turn.look.set()

        assert await ended(running) == "cancelled"

    assert isinstance(bench.engine, engines.Instant)
    assert "generate" not in bench.engine.calls
    assert bench.types() == ["stage_started", "cancel_requested", "stage_cancelled"]
    assert bench.queued() == 0
    assert not bench.device.locked()


async def test_a_task_that_was_cancelled_before_it_began_is_dropped(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.queue()
    await bench.cancel()

    assert await bench.run() == "dropped"

    assert bench.types() == ["cancel_requested"]
    assert bench.queued() == 0


async def test_a_cancel_whose_signal_was_missed_is_found_by_the_heartbeat(
    bench_of: MakeBench, loop_clock: LoopClock
) -> None:
    engine = engines.Gated()
    gate = engine.hold("generate", step=1)
    bench = bench_of(engine)
    await bench.queue()
    turn = bench.turn()
    running = await bench.begin(turn)
    await reached(gate)
    await bench.cancel()

    loop_clock.advance(15.1)
    await asyncio.wait_for(turn.stop.raised.wait(), BOUND)
    gate.open()

    assert await ended(running) == "cancelled"


class Away:
    """A store that gives no answer to one of its calls, until the test is over."""

    def __init__(self, bench: Bench, method: str) -> None:
        self.asked = asyncio.Event()
        setattr(bench.store, method, self)

    async def __call__(self, *given: object, **options: object) -> None:
        self.asked.set()
        await asyncio.Event().wait()


async def begun_without(bench: Bench, method: str) -> tuple[Turn, asyncio.Task[Outcome]]:
    """A task that waits for what a store does not do."""
    await bench.queue()
    away, turn = Away(bench, method), bench.turn()
    running = await bench.begin(turn)
    await asyncio.wait_for(away.asked.wait(), BOUND)
    return turn, running


@pytest.mark.parametrize("method", ["fetch", "put"])
async def test_a_worker_that_the_store_takes_for_nobody_hands_its_task_back_unharmed_and_leaves(
    bench_of: MakeBench, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Its keys were taken away, say, while it ran: it failed one task after another, and was free for the next."""
    bench = bench_of()
    await bench.queue()
    bench.store.fail_next(method, errors.StoreRefusedError("the object store refused: InvalidAccessKeyId"))

    async def refused() -> None:
        raise errors.StoreRefusedError("the object store refused: InvalidAccessKeyId")

    monkeypatch.setattr(bench.store, "require", refused)
    with pytest.raises(errors.FatalError, match="InvalidAccessKeyId") as caught:
        await bench.run()
    assert caught.value.code == "store_refused"
    assert (bench.events()[-1].type, bench.events()[-1].tries) == ("stage_released", 0)


@pytest.mark.parametrize("away", [False, True])
async def test_a_store_that_refuses_one_task_alone_costs_that_task_a_try(
    bench_of: MakeBench, monkeypatch: pytest.MonkeyPatch, away: bool
) -> None:
    bench = bench_of()
    await bench.queue()

    async def asked() -> None:
        if away:
            raise errors.StoreError("it did not answer in time")

    monkeypatch.setattr(bench.store, "require", asked)
    bench.store.fail_next("fetch", errors.StoreRefusedError("the object store refused: AccessDenied"))
    assert await bench.run() == "retried"
    assert (bench.events()[-1].type, bench.events()[-1].error.code) == ("stage_failed", "store_refused")


@pytest.mark.parametrize("method", ["fetch", "put"])
async def test_a_cancel_does_not_wait_for_a_store_that_is_away(bench_of: MakeBench, method: str) -> None:
    bench = bench_of()
    turn, running = await begun_without(bench, method)

    await bench.cancel()
    turn.look.set()

    assert await ended(running) == "cancelled"
    assert bench.types() == ["stage_started", "cancel_requested", "stage_cancelled"]
    assert (bench.events()[-1].gpu_seconds > 0) == (method == "put")


async def test_nor_where_it_is_asked_for_what_an_attempt_before_has_stored(bench_of: MakeBench) -> None:
    bench = bench_of(clock=FakeClock())
    await bench.accept()
    await bench.queue_where_the_log_stands()
    await bench.start_elsewhere(1, worker=bench.policy.worker_id)
    away, turn = Away(bench, "stat"), bench.turn()
    running = await bench.begin(turn)
    await asyncio.wait_for(away.asked.wait(), BOUND)

    await bench.cancel()
    turn.look.set()

    assert await ended(running) == "cancelled"


async def test_a_cancel_that_comes_with_the_last_step_wins_over_the_result(bench_of: MakeBench) -> None:
    engine = engines.Gated()
    gate = engine.hold("finish")
    bench = bench_of(engine)
    await bench.queue()
    running = await bench.begin()
    await reached(gate)
    await bench.cancel()
    gate.open()

    assert await ended(running) == "cancelled"

    assert bench.types() == ["stage_started", "cancel_requested", "stage_cancelled"]
    assert bench.events()[-1].gpu_seconds > 0
    assert bench.queued() == 0


async def test_what_cannot_be_fetched_is_handed_back_at_once_when_it_is_told_to(bench_of: MakeBench) -> None:
    """For as long as a store was away a worker kept what it was to leave, and charged it a try in the end."""
    bench = bench_of()
    turn, running = await begun_without(bench, "fetch")
    await settled()

    turn.stop.now("released")

    assert await ended(running) == "released"
    assert (bench.events()[-1].type, bench.events()[-1].tries) == ("stage_released", 0)


@pytest.mark.parametrize("before", [None, "drained", "preempted"])
async def test_what_cannot_be_stored_is_handed_back_soon_when_it_is_told_to(
    bench_of: MakeBench, loop_clock: LoopClock, before: Reason | None
) -> None:
    bench = bench_of()
    turn, running = await begun_without(bench, "put")

    if before is not None:  # at its last step: it may take the grace period to be stored
        turn.stop.now(before)
        loop_clock.advance(20)
        await settled()
    turn.stop.now("released")
    await settled()
    assert bench.types() == ["stage_started"]  # a store that is well takes it in a moment
    loop_clock.advance(2.1)

    assert await ended(running) == "released"
    assert (bench.events()[-1].type, bench.events()[-1].tries) == ("stage_released", 0)


@pytest.mark.parametrize("most", [1, 3])
async def test_a_cancel_wins_over_a_failure(bench_of: MakeBench, most: int) -> None:
    class FailsLate(engines.Gated):
        def finish(self, output: Any, folder: Path) -> Any:
            super().finish(output, folder)
            raise errors.RetryableError("the disk is full")

    engine = FailsLate()
    gate = engine.hold("finish")
    bench = bench_of(engine, max_attempts=most)
    await bench.queue()
    running = await bench.begin()
    await reached(gate)
    await bench.cancel()
    gate.open()

    assert await ended(running) == "cancelled"

    assert bench.types() == ["stage_started", "cancel_requested", "stage_cancelled"]
    assert bench.events()[-1].gpu_seconds > 0
    assert bench.dead() == []
    assert bench.queued() == 0


# ── drain ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_task_that_waits_is_handed_back_unharmed_when_it_is_told_to(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.queue()
    turn = bench.turn()
    async with bench.device:
        running = await bench.begin(turn)
        await bench.until_it_waits()
        turn.stop.now("released")

        assert await ended(running) == "released"

    event = bench.events()[-1]
    assert (event.type, event.attempt, event.tries, event.gpu_seconds) == ("stage_released", 1, 0, 0)
    assert (await bench.take()).num_delivered == 2
    assert bench.dead() == []


async def test_the_first_reason_to_stop_stays() -> None:
    turn = Turn(asyncio.Lock())

    turn.stop.now("cancelled")
    turn.stop.now("released")

    assert turn.stop.reason == "cancelled"


@pytest.mark.parametrize("first", ["drained", "preempted"])
@pytest.mark.parametrize("then", ["released", "cancelled", "fenced"])
async def test_but_one_that_leaves_a_task_its_time_gives_way_to_one_that_does_not(first: Reason, then: Reason) -> None:
    turn = Turn(asyncio.Lock())
    turn.stop.now(first)
    turn.stop.now("preempted")
    assert turn.stop.reason == first
    turn.stop.now(then)
    assert turn.stop.reason == then


# ── store and bus go away ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["stat", "fetch", "put"])
async def test_a_store_that_does_not_answer_is_tried_again_later(bench_of: MakeBench, method: str) -> None:
    clock = FakeClock()
    bench = bench_of(clock=clock)
    await bench.queue()
    bench.store.fail_next(method)

    assert await bench.run() == "retried"
    assert bench.events()[-1].error.code == "store_unavailable"
    clock.advance(1)
    assert await bench.run() == "completed"


async def test_half_of_the_artifacts_are_no_result(bench_of: MakeBench) -> None:
    clock = FakeClock()
    engine = engines.Instant()
    bench = bench_of(engine, clock=clock)
    await bench.queue(candidates=3)
    bench.store.fail_next("put", after=True)  # the first is stored, and nobody knows

    assert await bench.run() == "retried"
    clock.advance(1)
    assert await bench.run() == "completed"

    assert engine.calls.count("generate") == 2


async def test_a_bus_that_is_gone_when_the_task_is_settled_loses_nothing(bench_of: MakeBench) -> None:
    clock = FakeClock()
    engine = engines.Gated()
    gate = engine.hold("finish")
    bench = bench_of(engine, clock=clock)
    await bench.queue()
    running = await bench.begin()
    await reached(gate)
    bench.bus.down = True
    gate.open()

    assert await ended(running) == "lost"

    bench.bus.down = False
    clock.advance(61)
    assert await bench.run() == "reused"
    assert engine.calls.count("generate") == 1
    assert bench.types() == ["stage_started", "stage_started", "stage_completed"]
    assert bench.queued() == 0


async def test_an_event_whose_answer_was_lost_is_not_told_twice(bench_of: MakeBench) -> None:
    clock = FakeClock()
    engine = engines.Gated()
    gate = engine.hold("finish")
    bench = bench_of(engine, clock=clock)
    await bench.queue()
    running = await bench.begin()
    await reached(gate)
    bench.bus.fail_next("publish", after=True)
    gate.open()

    assert await ended(running) == "lost"
    clock.advance(61)
    assert await bench.run() == "dropped"

    assert bench.types() == ["stage_started", "stage_completed"]
    assert bench.queued() == 0


async def test_an_ack_that_was_lost_runs_nothing_again(bench_of: MakeBench) -> None:
    clock = FakeClock()
    bench = bench_of(clock=clock)
    await bench.queue()
    bench.bus.fail_next("ack")

    assert await bench.run() == "lost"
    clock.advance(61)
    assert await bench.run() == "dropped"

    assert bench.types() == ["stage_started", "stage_completed"]
    assert bench.queued() == 0


async def test_a_nak_that_was_lost_only_makes_the_wait_longer(bench_of: MakeBench) -> None:
    clock = FakeClock()
    bench = bench_of(engines.FailsOnce(), clock=clock)
    await bench.queue()
    bench.bus.fail_next("nak")

    assert await bench.run() == "lost"
    clock.advance(61)
    assert await bench.run() == "completed"


async def test_a_task_is_not_begun_without_the_bus(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.queue()
    delivery = await bench.take()
    bench.bus.down = True

    assert await bench.handler.handle(delivery, bench.turn()) == "lost"

    assert isinstance(bench.engine, engines.Instant)
    assert bench.engine.calls == []


# ── the lease ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_lease_is_renewed_four_times_within_ack_wait(bench_of: MakeBench, loop_clock: LoopClock) -> None:
    engine = engines.Gated()
    gate = engine.hold("generate")
    bench = bench_of(engine, ack_wait=60)
    await bench.queue()
    loop_clock.stop()
    running = await bench.begin()
    await reached(gate)

    loop_clock.advance(14)
    await settled()
    assert bench.bus.calls["in_progress"] == 0
    for beats in (1, 2, 3, 4):
        loop_clock.advance(15)
        await bench.journal.until(lambda beats=beats: bench.journal.entries.count("in_progress") == beats)  # type: ignore[misc]
        await settled()
    gate.open()

    assert await ended(running) == "completed"


async def test_a_task_that_waits_for_the_device_keeps_its_lease(bench_of: MakeBench, loop_clock: LoopClock) -> None:
    bench = bench_of()
    await bench.queue()
    async with bench.device:
        running = await bench.begin()
        await bench.until_it_waits()
        await settled()
        loop_clock.advance(15.1)
        await bench.journal.until(lambda: "in_progress" in bench.journal.entries)

    assert await ended(running) == "completed"


async def test_a_heartbeat_that_failed_does_not_end_the_task_nor_the_next_heartbeat(
    bench_of: MakeBench, loop_clock: LoopClock
) -> None:
    engine = engines.Gated()
    gate = engine.hold("generate")
    bench = bench_of(engine)
    await bench.queue()
    running = await bench.begin()
    await reached(gate)
    bench.bus.fail_next("in_progress")

    loop_clock.advance(15.1)
    for _ in range(100):
        await settled()
        if bench.metric("vidgen_worker_heartbeats_failed_total"):
            break
    assert bench.metric("vidgen_worker_heartbeats_failed_total") == 1
    loop_clock.advance(15.1)
    await bench.journal.until(lambda: "in_progress" in bench.journal.entries)
    gate.open()

    assert await ended(running) == "completed"


async def test_nothing_renews_the_lease_of_a_task_that_is_done(bench_of: MakeBench, loop_clock: LoopClock) -> None:
    bench = bench_of()
    await bench.queue()
    await bench.run()

    loop_clock.advance(100)
    await settled()

    assert bench.bus.calls["in_progress"] == 0


# ── progress ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_progress_tells_the_first_and_the_last_step_and_at_most_five_a_second(
    bench_of: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vidgen.progress.SOON_S", 0.0)
    bench = bench_of(engines.Paced(0.5))
    await bench.queue(steps=100)
    heard = await bench.hear_progress()

    await bench.run()

    steps = [said for said in heard() if said.phase == "denoising"]
    assert (steps[0].step, steps[-1].step, steps[-1].steps) == (1, 100, 100)
    # By the engine's own time: a loop that is late tells of several steps in one moment.
    assert len(steps) <= 2 + 5 * bench.events()[-1].timings.denoise
    assert [said.step for said in steps] == sorted({said.step for said in steps})


async def test_of_a_task_that_takes_no_time_no_progress_is_told(
    bench_of: MakeBench, loop_clock: LoopClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vidgen.progress.SOON_S", 300.0)
    bench = bench_of()
    await bench.queue()
    heard = await bench.hear_progress()

    await bench.run()
    loop_clock.advance(301)
    await settled()

    assert heard() == []


async def test_an_engine_that_goes_on_behind_its_attempt_tells_no_progress(
    bench_of: MakeBench, loop_clock: LoopClock
) -> None:
    engine = engines.Gated()
    gate = engine.hold("generate", step=1)
    bench = bench_of(engine)
    await bench.queue()
    heard = await bench.hear_progress()
    running = await bench.begin()
    await reached(gate)
    running.cancel()
    await asyncio.wait([running], timeout=BOUND)
    before = heard()

    gate.open()
    await asyncio.wrap_future(bench.device_thread.submit(lambda: None))
    loop_clock.advance(10)
    await settled()

    assert heard() == before


async def test_progress_tells_each_phase_the_pace_and_what_is_left(bench_of: MakeBench, loop_clock: LoopClock) -> None:
    engine = engines.Gated()
    gates = [engine.hold("prepare"), engine.hold("generate", step=2), engine.hold("finish")]
    bench = bench_of(engine)
    await bench.queue()
    heard = await bench.hear_progress()

    running = await bench.begin()
    for gate in gates:
        await reached(gate)
        await settled()
        loop_clock.advance(0.3)
        await settled()
        gate.open()
    assert await ended(running) == "completed"

    said = heard()
    told = [(each.phase, each.step) for each in said]
    assert told[:2] + told[-2:] == [("preparing", 0), ("denoising", 1), ("denoising", 4), ("finishing", 4)]
    assert (said[0].eta_s, said[0].steps) == (None, 4)
    for each in said[1:]:
        assert each.seconds_per_step is not None
        assert each.eta_s is not None
        assert (each.job_id, each.stage, each.run, each.attempt, each.worker) == ("j1", "edit", 1, 1, "w1")


async def test_an_engine_that_lies_about_its_steps_makes_no_nonsense_of_the_progress(bench_of: MakeBench) -> None:
    bench = bench_of(engines.LiesAboutSteps())
    await bench.queue()
    heard = await bench.hear_progress()

    assert await bench.run() == "completed"

    for said in heard():
        assert 0 <= said.step <= said.steps == 4


async def test_progress_goes_back_with_an_engine_that_begins_again_and_counts_the_steps_of_its_new_way(
    bench_of: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vidgen.progress.SOON_S", 0.0)
    monkeypatch.setattr(Pace, "allows", lambda self, now, last=False: True)
    bench = bench_of(engines.ShortOfMemory())
    await bench.queue(candidates=2)
    heard = await bench.hear_progress()

    assert await bench.run() == "completed"

    said = [each for each in heard() if each.phase == "denoising"]
    assert [(each.step, each.steps) for each in said] == [*((k, 4) for k in (1, 2, 3)), *((k, 8) for k in range(1, 9))]
    # What the first try took says nothing about the second, of which no step was measured yet.
    assert (said[3].seconds_per_step, said[3].eta_s) == (None, None)
    assert None not in (said[4].seconds_per_step, said[4].eta_s)
    assert bench.metric("vidgen_worker_steps_total") == 11


async def test_a_task_that_took_less_memory_to_be_done_counts_at_each_rung(bench_of: MakeBench) -> None:
    bench = bench_of(engines.ShortOfMemory())
    await bench.queue()
    assert await bench.run() == "completed"
    assert bench.metric("vidgen_worker_memory_rungs_total") == 1
    assert bench.metric("vidgen_worker_memory_rungs_total", rung="one_by_one") == 1


async def test_a_task_for_which_no_rung_was_low_enough_counts_at_each_of_them(bench_of: MakeBench) -> None:
    fault = errors.RetryableError("no room", code="out_of_memory")
    fault.rungs = ("vae_tiling", "offload")
    bench = bench_of(engines.ShortOfMemory(fault))
    await bench.queue()
    assert await bench.run() == "retried"
    assert bench.metric("vidgen_worker_memory_rungs_total", rung="vae_tiling") == 1
    assert bench.metric("vidgen_worker_memory_rungs_total", rung="offload") == 1


async def test_progress_that_cannot_be_sent_does_no_harm(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.queue()
    bench.bus.fail_next("signal", times=100)

    assert await bench.run() == "completed"


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────

WHOLE = "7: 1 2 3 4"


async def left_behind_step_two(bench: Bench, reason: Reason = "drained") -> engines.Resumes:
    """Let a worker begin j1, of four steps, and hand it back behind the second."""
    engine = engines.Resumes()
    gate = engine.hold("generate", step=2)
    bench.use(engine)
    turn = bench.turn()
    running = await bench.begin(turn)
    await reached(gate)
    turn.stop.now(reason)
    gate.open()
    assert await ended(running) == "released"
    return engine


async def test_a_task_that_is_handed_back_in_the_middle_goes_on_there_on_another_worker(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.queue()
    first = await left_behind_step_two(bench)
    released = bench.events()[-1]
    assert (released.type, released.attempt, released.tries) == ("stage_released", 1, 0)
    assert released.checkpoint == contracts.Checkpoint(attempt=1, step=2, steps=4)
    assert released.gpu_seconds > 0
    assert "checkpoints/j1/edit-1-1.safetensors" in bench.store.objects

    second = engines.Resumes()
    bench.use(second)
    told = await bench.hear_progress()
    assert await bench.run() == "completed"

    assert (first.seen, second.seen) == ([1, 2], [3, 4])
    assert second.made == [WHOLE]
    started, completed = bench.events()[-2:]
    assert (started.attempt, started.tries, started.checkpoint) == (2, 1, released.checkpoint)
    assert (completed.steps, completed.reused) == (4, False)
    assert {(at.step, at.steps) for at in told() if at.phase == "denoising"} <= {(3, 4), (4, 4)}
    assert bench.metric("vidgen_worker_checkpoints_total", outcome="stored") == 1
    assert bench.metric("vidgen_worker_checkpoints_total", outcome="resumed") == 1
    assert bench.metric("vidgen_worker_steps_total") == 4


async def test_the_state_is_stored_before_the_log_says_so_and_the_task_is_handed_back_last(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.queue()
    await left_behind_step_two(bench)

    entries = bench.journal.entries
    order = [entries.index("put checkpoints/j1/edit-1-1.safetensors"), entries.index("stage_released")]
    assert [*order, entries.index("nak")] == sorted([*order, entries.index("nak")])


async def test_of_a_task_with_more_steps_than_one_candidate_has_nobody_knows_when_it_is_done(
    bench_of: MakeBench,
) -> None:
    """By the steps of one the device was free at once: the next task was taken while others idled."""
    bench = bench_of()
    await bench.queue()
    await left_behind_step_two(bench)
    [key] = [key for key in bench.store.objects if key.startswith("checkpoints/")]
    path = bench.handler._scratch.path()
    state = engines.safetensors({"step": "2", "made": "7: 1 2"})
    checkpoints.write(path, state, task_of(), bench.engine.info, 9, 16)
    bench.store.add(key, path.read_bytes())
    bench.use(second := engines.Resumes())
    bench.handler._pace = 1.0
    gate = second.hold("generate", step=3)
    turn = bench.turn()
    running = await bench.begin(turn)
    await reached(gate)
    assert turn.left_s is None
    gate.open()
    assert await ended(running) == "completed"


async def test_of_a_task_that_goes_on_only_the_steps_that_are_left_keep_the_device(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.queue()
    await left_behind_step_two(bench)
    bench.use(second := engines.Resumes())
    bench.handler._pace = 1000.0  # that no step has told of yet
    gate = second.hold("generate", step=3)
    turn = bench.turn()
    running = await bench.begin(turn)
    await reached(gate)
    assert turn.left_s == pytest.approx(2000, abs=BOUND)
    gate.open()
    assert await ended(running) == "completed"


async def test_a_first_attempt_asks_the_store_for_no_checkpoint(bench_of: MakeBench) -> None:
    bench = bench_of(engines.Resumes())
    await bench.queue()

    assert await bench.run() == "completed"

    assert bench.store.calls["fetch"] == 1  # its one input


async def test_a_task_may_be_handed_back_again_and_again(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.queue(steps=6)
    await left_behind_step_two(bench)
    second = engines.Resumes()
    gate = second.hold("generate", step=5)
    bench.use(second)
    turn = bench.turn()
    running = await bench.begin(turn)
    await reached(gate)
    turn.stop.now("preempted")
    gate.open()
    assert await ended(running) == "released"
    assert bench.events()[-1].checkpoint == contracts.Checkpoint(attempt=2, step=5, steps=6)
    assert bench.events()[-1].preempted == 1

    third = engines.Resumes()
    bench.use(third)
    assert await bench.run() == "completed"

    assert (second.seen, third.seen) == ([3, 4, 5], [6])
    assert third.made == ["7: 1 2 3 4 5 6"]
    assert bench.events()[-2].preempted == 1  # a drain does not count


async def test_a_worker_that_dies_behind_a_checkpoint_leaves_it_to_the_next(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.queue()
    await left_behind_step_two(bench)
    kept = bench.events()[-1].checkpoint
    await bench.say(
        contracts.StageStarted(
            job_id="j1", at=datetime.now(UTC), stage="edit", attempt=2, tries=1, worker="another", engine="e",
            model="m", checkpoint=kept,
        )
    )  # fmt: skip

    bench.use(engines.Resumes())
    assert await bench.run() == "completed"

    assert bench.engine.seen == [3, 4]  # type: ignore[attr-defined]
    assert bench.events()[-1].attempt == 3


class LosesItsDeviceAgain(engines.Resumes):
    def resume(self, inputs: Any, on_step: Any, state: bytes | None) -> Any:
        raise errors.FatalError("the device fell off the bus", code="device_lost")


async def test_a_sick_worker_hands_the_checkpoint_on_with_the_task(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.queue()
    await left_behind_step_two(bench)
    bench.use(LosesItsDeviceAgain())
    with pytest.raises(errors.FatalError):
        await bench.run()

    bench.use(engines.Resumes())
    assert await bench.run() == "completed"

    assert bench.engine.seen == [3, 4]  # type: ignore[attr-defined]


class FailsOnceWhereItGoesOn(engines.Resumes):
    def resume(self, inputs: Any, on_step: Any, state: bytes | None) -> Any:
        if state is not None:
            raise errors.RetryableError("out of memory", code="out_of_memory")
        return super().resume(inputs, on_step, state)


async def test_an_attempt_that_failed_is_followed_by_one_that_starts_over(bench_of: MakeBench) -> None:
    clock = FakeClock()
    bench = bench_of(clock=clock)
    await bench.queue()
    await left_behind_step_two(bench)
    bench.use(FailsOnceWhereItGoesOn())
    assert await bench.run() == "retried"
    clock.advance(1)

    assert await bench.run() == "completed"

    assert bench.engine.made == [WHOLE]  # type: ignore[attr-defined]
    assert bench.events()[-2].checkpoint is None


# ── checkpoints that are refused, or missing ─────────────────────────────────────────────────────────────────────


def another_model(bench: Bench) -> None:
    bench.engine.info = replace(bench.engine.info, model="another")


def another_profile(bench: Bench) -> None:
    bench.engine.info = replace(bench.engine.info, profile="resident-fp8")


def truncated(bench: Bench) -> None:
    [key] = [key for key in bench.store.objects if key.startswith("checkpoints/")]
    bench.store.add(key, bench.store.objects[key][:-1])


def of_another_schema(bench: Bench) -> None:
    [key] = [key for key in bench.store.objects if key.startswith("checkpoints/")]
    bench.store.add(key, bench.store.objects[key].replace(b'_version\\":2', b'_version\\":3'))


def not_for_the_engine(bench: Bench) -> None:
    """The header fits, but not what the engine finds behind it."""

    def resume(inputs: Any, on_step: Any, state: bytes | None) -> Any:
        if state is not None:
            raise checkpoints.UnusableError("nothing of this engine's is in the state")
        return engines.Resumes.resume(engine, inputs, on_step, None)

    engine: Any = bench.engine
    engine.resume = resume


def with_another_number(bench: Bench) -> None:
    """One digit of what the engine left, where no tensor lies."""
    [key] = [key for key in bench.store.objects if key.startswith("checkpoints/")]
    bench.store.add(key, bench.store.objects[key].replace(b'"step":"2"', b'"step":"3"'))


@pytest.mark.parametrize(
    "spoil", [another_model, another_profile, truncated, of_another_schema, not_for_the_engine, with_another_number]
)
async def test_a_checkpoint_that_does_not_fit_is_refused_and_the_task_starts_over(
    bench_of: MakeBench, spoil: Callable[[Bench], None]
) -> None:
    bench = bench_of()
    await bench.queue()
    await left_behind_step_two(bench)
    second = engines.Resumes()
    bench.use(second)
    spoil(bench)

    with structlog.testing.capture_logs() as logs:
        assert await bench.run() == "completed"

    assert second.made == [WHOLE]
    assert bench.events()[-1].tries == 1
    assert bench.metric("vidgen_worker_checkpoints_total", outcome="refused") == 1
    assert bench.metric("vidgen_worker_checkpoints_total", outcome="resumed") == 0
    assert "checkpoint_refused" in [entry.get("_event") for entry in logs]


def gone(bench: Bench) -> None:
    [key] = [key for key in bench.store.objects if key.startswith("checkpoints/")]
    del bench.store.objects[key]


def not_now(bench: Bench) -> None:
    fetch = bench.store.fetch

    async def fetch_inputs_only(key: str, path: Path, limit: int | None = None) -> int:
        if key.startswith("checkpoints/"):
            raise errors.StoreError("the object store did not answer")
        return await fetch(key, path, limit)

    bench.store.fetch = fetch_inputs_only  # type: ignore[method-assign]


@pytest.mark.parametrize("spoil", [gone, not_now])
async def test_a_checkpoint_that_cannot_be_fetched_costs_the_steps_and_nothing_more(
    bench_of: MakeBench, spoil: Callable[[Bench], None]
) -> None:
    bench = bench_of()
    await bench.queue()
    await left_behind_step_two(bench)
    second = engines.Resumes()
    bench.use(second)
    spoil(bench)

    assert await bench.run() == "completed"

    assert second.made == [WHOLE]
    assert bench.metric("vidgen_worker_checkpoints_total", outcome="failed") == 1


async def test_an_engine_that_cannot_go_on_ignores_the_checkpoint(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.queue()
    await left_behind_step_two(bench)
    bench.use(engines.Instant())

    assert await bench.run() == "completed"

    assert bench.store.calls["fetch"] == 2  # the input of each attempt


async def test_where_checkpoints_are_off_none_is_made_or_read(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.queue()
    await left_behind_step_two(bench)
    bench.policy = replace(bench.policy, checkpoint_over_s=None)
    second = engines.Resumes()
    bench.use(second)

    assert await bench.run() == "completed"

    assert not bench.handler.suspends
    assert second.made == [WHOLE]


@pytest.mark.parametrize("why", ["drained", "cancelled"])
async def test_nobody_who_is_to_leave_waits_for_a_checkpoint_that_cannot_be_fetched(
    bench_of: MakeBench, why: str
) -> None:
    bench = bench_of()
    await bench.queue()
    await left_behind_step_two(bench)
    kept = bench.events()[-1].checkpoint
    bench.use(engines.Resumes())
    fetch, asked = bench.store.fetch, asyncio.Event()

    async def fetch_inputs_only(key: str, path: Path, limit: int | None = None) -> int:
        if key.startswith("checkpoints/"):
            asked.set()
            await asyncio.Event().wait()
        return await fetch(key, path, limit)

    bench.store.fetch = fetch_inputs_only  # type: ignore[method-assign]
    turn = bench.turn()
    running = await bench.begin(turn)
    await asyncio.wait_for(asked.wait(), BOUND)

    if why == "cancelled":
        await bench.cancel()
        turn.look.set()
        assert await ended(running) == "cancelled"
    else:
        turn.stop.now("released")
        assert await ended(running) == "released"
        assert bench.events()[-1].checkpoint == kept


# ── checkpoints that cannot be stored, or come too late ──────────────────────────────────────────────────────────


async def test_where_the_state_cannot_be_stored_the_task_is_handed_back_without(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.queue()
    bench.store.fail_next("put")
    await left_behind_step_two(bench, "preempted")
    assert bench.events()[-1].checkpoint is None
    assert bench.events()[-1].preempted == 1
    assert bench.metric("vidgen_worker_checkpoints_total", outcome="failed") == 1

    second = engines.Resumes()
    bench.use(second)
    assert await bench.run() == "completed"

    assert second.made == [WHOLE]
    assert bench.events()[-1].tries == 1


async def test_where_a_later_state_cannot_be_stored_the_earlier_one_still_stands(bench_of: MakeBench) -> None:
    bench = bench_of()
    await bench.queue(steps=6)
    await left_behind_step_two(bench)
    engine = engines.Resumes()
    gate = engine.hold("generate", step=4)
    bench.use(engine)
    turn = bench.turn()
    running = await bench.begin(turn)
    await reached(gate)
    bench.store.fail_next("put")
    turn.stop.now("drained")
    gate.open()
    assert await ended(running) == "released"

    assert bench.events()[-1].checkpoint == contracts.Checkpoint(attempt=1, step=2, steps=6)


async def test_a_store_that_hangs_does_not_keep_the_task(bench_of: MakeBench, loop_clock: LoopClock) -> None:
    engine = engines.Resumes()
    gate = engine.hold("generate", step=2)
    bench = bench_of(engine)
    await bench.queue()
    asked = asyncio.Event()

    async def hang(*args: object, **given: object) -> None:
        asked.set()
        await asyncio.Event().wait()

    bench.store.put = hang  # type: ignore[assignment]
    turn = bench.turn()
    running = await bench.begin(turn)
    await reached(gate)
    turn.stop.now("drained")
    gate.open()
    await asyncio.wait_for(asked.wait(), BOUND)
    loop_clock.advance(16)

    assert await ended(running) == "released"
    assert bench.events()[-1].checkpoint is None


async def test_an_engine_that_leaves_nothing_is_handed_back_without(bench_of: MakeBench) -> None:
    engine = engines.Resumes(leaves=False)
    gate = engine.hold("generate", step=2)
    bench = bench_of(engine)
    await bench.queue()
    turn = bench.turn()
    running = await bench.begin(turn)
    await reached(gate)
    turn.stop.now("drained")
    gate.open()

    assert await ended(running) == "released"
    assert bench.events()[-1].checkpoint is None


async def test_behind_the_last_step_a_task_is_finished_and_not_handed_back(bench_of: MakeBench) -> None:
    engine = engines.Resumes()
    gate = engine.hold("generate", step=4)
    bench = bench_of(engine)
    await bench.queue()
    turn = bench.turn()
    running = await bench.begin(turn)
    await reached(gate)
    turn.stop.now("preempted")
    gate.open()

    assert await ended(running) == "completed"


async def test_a_cancel_comes_over_a_task_that_is_being_handed_back(bench_of: MakeBench) -> None:
    engine = engines.Resumes()
    gate = engine.hold("generate", step=2)
    bench = bench_of(engine)
    await bench.queue()
    turn = bench.turn()
    running = await bench.begin(turn)
    await reached(gate)
    turn.stop.now("preempted")
    await bench.cancel()
    turn.stop.now("cancelled")
    gate.open()

    assert await ended(running) == "cancelled"
    assert not [key for key in bench.store.objects if key.startswith("checkpoints/")]


async def test_an_attempt_that_was_overtaken_leaves_no_checkpoint_that_a_newer_one_reads(bench_of: MakeBench) -> None:
    engine = engines.Resumes()
    gate = engine.hold("generate", step=2)
    bench = bench_of(engine)
    await bench.queue()
    turn = bench.turn()
    running = await bench.begin(turn)
    await reached(gate)
    await bench.start_elsewhere(2)
    turn.stop.now("drained")
    gate.open()

    assert await ended(running) == "fenced"

    assert "checkpoints/j1/edit-1-1.safetensors" in bench.store.objects  # under its own name
    assert bench.events()[-1].checkpoint is None  # and nobody says so
    assert not {"ack", "nak"} & set(bench.journal.entries)
