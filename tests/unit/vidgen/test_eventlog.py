"""Claims: a fresh task is claimed by one write, and whoever knows too little looks again."""

from __future__ import annotations

import asyncio

import pytest
from tests.workbench import task_of

from vidgen import attempts, contracts, eventlog, topology
from vidgen.bus import Stored
from vidgen.contracts import Task
from vidgen.testing import MemoryBus

TASK = task_of("j1")
LOG = topology.subject_of_events("j1")
ERROR = contracts.JobError(code="x", message="x", stage="edit", retryable=True)


async def accepted(bus: MemoryBus) -> int:
    event = contracts.Accepted(job_id="j1", at=TASK.queued_at)
    return await bus.publish(LOG, event.to_bytes(), message_id="accepted")


async def claim(
    bus: MemoryBus, task: Task = TASK, worker: str = "w1", seq: int | None = None, deliveries: int = 1
) -> eventlog.Claim | attempts.Drop | attempts.Exhausted | attempts.Leave:
    return await eventlog.claim(bus, task, worker, 3, engine="e", model="m", deliveries=deliveries, queued_at_seq=seq)


async def test_a_fresh_task_is_claimed_without_a_look_at_the_log() -> None:
    bus = MemoryBus()
    held = await claim(bus, seq=await accepted(bus))
    assert isinstance(held, eventlog.Claim)
    assert (held.attempt, held.tries) == (1, 1)
    assert bus.calls["last"] == 0


async def test_of_two_that_know_the_same_place_one_gets_the_first_attempt_and_one_nothing() -> None:
    bus = MemoryBus()
    seq = await accepted(bus)
    first = await claim(bus, seq=seq)
    assert isinstance(first, eventlog.Claim)
    assert await claim(bus, worker="w2", seq=seq) == attempts.Leave()
    await first.check()


async def test_a_last_try_that_runs_elsewhere_is_not_given_up() -> None:
    bus = MemoryBus()
    await accepted(bus)
    started = contracts.StageStarted(
        job_id="j1", at=TASK.queued_at, stage="edit", attempt=3, tries=3, worker="w1", engine="e", model="m", alone=True
    )
    await bus.publish(LOG, started.to_bytes(), message_id="third")
    assert await claim(bus, worker="w2") == attempts.Leave()
    assert isinstance(await claim(bus, worker="w2", deliveries=2), attempts.Exhausted)


@pytest.mark.parametrize(
    ("answer", "worker", "deliveries", "outlook"),
    [
        (eventlog.AT_IT, "w2", 2, "elsewhere"), (b"no", "w2", 2, "alone"), (None, "w2", 2, "alone"),
        (None, "w2", 1, "elsewhere"), (eventlog.AT_IT, "w1", 2, "alone"),
    ],
)  # fmt: skip
async def test_a_lease_that_ran_out_under_a_worker_that_is_well_gives_its_task_to_nobody_else(
    answer: bytes | None, worker: str, deliveries: int, outlook: str
) -> None:
    """The bus counts leases by its wall clock: a step forwards by an hour ended them all, and had tasks run twice."""
    bus = MemoryBus()
    await claim(bus, seq=await accepted(bus))

    async def answered() -> None:
        feed = await bus.listen(topology.subject_of_worker("edit", "w1"))
        while (asked := await feed.next(60)) is not None:
            assert asked.body == b"j1"
            await bus.signal(asked.reply, answer or b"")

    holder = asyncio.create_task(answered()) if answer is not None else None
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert await eventlog.outlook(bus, TASK, worker, 3, deliveries) == outlook
    # And so it is where it has waited since to be alone.
    held = await claim(bus, worker=worker, deliveries=deliveries)
    assert (held == attempts.Leave()) is (outlook == "elsewhere")
    if holder is not None:
        holder.cancel()
        await asyncio.wait([holder])


@pytest.mark.parametrize(("worker", "deliveries"), [("w2", 2), ("w1", 1)])
async def test_who_has_a_task_for_the_second_time_or_began_it_before_gets_the_second_attempt(
    worker: str, deliveries: int
) -> None:
    bus = MemoryBus()
    seq = await accepted(bus)
    first = await claim(bus, seq=seq)
    second = await claim(bus, worker=worker, seq=seq, deliveries=deliveries)
    assert isinstance(first, eventlog.Claim)
    assert isinstance(second, eventlog.Claim)
    assert (first.attempt, second.attempt) == (1, 2)
    with pytest.raises(eventlog.FencedError):
        await first.check()


async def test_a_task_of_a_later_run_is_nobody_elses() -> None:
    bus = MemoryBus()
    await claim(bus, seq=await accepted(bus))
    later = TASK.model_copy(update={"run": 2})
    assert await eventlog.outlook(bus, later, "w2", 3, 1) == "free"
    assert bus.calls["ask"] == 0


@pytest.mark.parametrize("late", [0, 1, 3])
async def test_the_end_of_a_run_that_is_told_late_changes_nothing_for_the_next_one(late: int) -> None:
    """A gateway puts it on record first: by the time it is in the log, a retry may have been asked for and begun."""
    bus = MemoryBus()
    seq, second = await accepted(bus), TASK.model_copy(update={"run": 2})
    first = await claim(bus, second, seq=seq)
    assert isinstance(first, eventlog.Claim)
    for number in range(late):
        end = contracts.JobCancelled(job_id="j1", run=1, at=TASK.queued_at)
        await bus.publish(LOG, end.to_bytes(), message_id=f"late {number}")
    await first.check()
    assert first.seq == seq + 1 + late

    assert await eventlog.outlook(bus, second, "w2", 3, 1) == "elsewhere"
    newer = await claim(bus, second, worker="w2", deliveries=2)
    assert isinstance(newer, eventlog.Claim)
    assert newer.attempt == 2
    for number in range(late):
        end = contracts.JobFailed(job_id="j1", run=1, at=TASK.queued_at, error=ERROR)
        await bus.publish(LOG, end.to_bytes(), message_id=f"later {number}")
    with pytest.raises(eventlog.FencedError):
        await first.check()
    done = contracts.StageFailed.model_validate(newer.stamp() | {"error": ERROR, "final": True})
    await bus.publish(LOG, done.to_bytes(), message_id="done")
    for number in range(late):
        end = contracts.JobCancelled(job_id="j1", run=1, at=TASK.queued_at)
        await bus.publish(LOG, end.to_bytes(), message_id=f"last {number}")
    await eventlog.give_up(bus, second, "w1", ERROR)
    assert len(bus.messages(topology.EVENTS)) == 4 + 3 * late  # it had come to its end


async def test_a_cancel_since_then_is_seen() -> None:
    bus = MemoryBus()
    seq = await accepted(bus)
    cancel = contracts.CancelRequested(job_id="j1", run=1, at=TASK.queued_at)
    await bus.publish(LOG, cancel.to_bytes(), message_id="cancel")
    assert await claim(bus, seq=seq) == attempts.Drop("cancelled")


async def test_a_place_that_never_was_is_no_harm() -> None:
    bus = MemoryBus()
    await accepted(bus)
    held = await claim(bus, seq=77)
    assert isinstance(held, eventlog.Claim)
    assert held.attempt == 1


async def test_a_task_is_given_up_though_its_log_moves_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    bus = MemoryBus()
    await accepted(bus)
    last, late = bus.last, [1, 2]

    async def moves(stream: str, subject: str) -> Stored | None:
        found = await last(stream, subject)
        if late:
            end = contracts.JobFailed(job_id="j1", run=1, at=TASK.queued_at, error=ERROR)
            await bus.publish(LOG, end.to_bytes(), message_id=f"late {late.pop()}")
        return found

    monkeypatch.setattr(bus, "last", moves)
    await eventlog.give_up(bus, TASK.model_copy(update={"run": 2}), "w1", ERROR)

    told = contracts.Event.validate_json(bus.messages(topology.EVENTS)[-1].body)
    assert isinstance(told, contracts.StageFailed)
    assert (told.run, told.final) == (2, True)


async def test_the_run_of_a_job_is_the_newest_whatever_is_told_late_of_those_before() -> None:
    bus = MemoryBus()
    await accepted(bus)
    for number, run in enumerate((2, 1, 1)):
        end = contracts.JobFailed(job_id="j1", run=run, at=TASK.queued_at, error=ERROR)
        await bus.publish(LOG, end.to_bytes(), message_id=str(number))
    assert await eventlog.current_run(bus, "j1") == 2
