"""The gateway's loops: they stop at once, one bad message stops nothing, and what happened is counted once."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from tests.gateways import BOUND, EDIT, KEY, Gateway, completed, failed, picture, put, started

from gateway import consumers
from gateway.consumers import Consumers
from vidgen import contracts, dead, topology
from vidgen.bus import Delivery
from vidgen.contracts import Job, JobStatus
from vidgen.testing import FakeClock, MemoryBus, MemoryStore


class Loops:
    """A gateway whose consumers run."""

    def __init__(self, gateway: Gateway) -> None:
        parts = gateway.parts
        self.gateway, self.bus, self.stop = gateway, parts.bus, asyncio.Event()
        own = Consumers(parts.bus, parts.jobs, parts.intake, parts.metrics, concurrency=2)
        self.running = asyncio.create_task(own.run(self.stop))

    async def until_told(self, job_id: str, kind: str) -> None:
        feed = await self.bus.follow(topology.EVENTS, topology.subject_of_events(job_id))
        async with asyncio.timeout(BOUND):
            while (message := await feed.next(BOUND)) is not None:
                if f'"type":"{kind}"'.encode() in message.body:
                    return

    async def end(self) -> None:
        self.stop.set()
        async with asyncio.timeout(BOUND):
            await self.running


@pytest.fixture
async def loops() -> AsyncIterator[Loops]:
    opened = Loops(await Gateway.open())
    yield opened
    await opened.end()


async def say(loops: Loops, event: contracts.AnyEvent) -> None:
    await loops.bus.publish(
        topology.subject_of_events(event.job_id), event.to_bytes(), message_id=f"{event.job_id}:{event.type}"
    )


async def test_they_end_at_once_though_nothing_comes() -> None:
    gateway = await Gateway.open(MemoryBus(clock=FakeClock()))  # on which no pull comes to its end by itself
    loops = Loops(gateway)
    async with asyncio.timeout(BOUND):
        while loops.bus.calls["pull"] < 5:  # two for requests, two for events, one for advisories
            await asyncio.sleep(0)
    await loops.end()


async def test_a_request_goes_through_to_a_completed_job_and_is_counted_once(loops: Loops) -> None:
    job = await loops.gateway.submit()
    await say(loops, completed(job))
    await loops.until_told(job.id, "completed")
    await loops.end()
    text = loops.gateway.parts.metrics.render()[0].decode()
    assert 'vidgen_requests_total{outcome="accepted"} 1.0' in text
    assert (await loops.gateway.parts.jobs.get(job.id)).status is contracts.JobStatus.COMPLETED


async def test_what_is_in_a_log_that_was_made_anew_is_not_taken_for_what_was_in_it_before(loops: Loops) -> None:
    text = 'vidgen_requests_total{outcome="accepted"}'
    for count in (1, 2):
        job = await loops.gateway.submit()
        async with asyncio.timeout(BOUND):
            while f"{text} {count}.0" not in loops.gateway.parts.metrics.render()[0].decode():
                await asyncio.sleep(0)
        assert [one.seq for one in loops.bus.messages(topology.EVENTS, topology.subject_of_events(job.id))] == [1]
        loops.bus.lose(topology.EVENTS)


async def test_an_end_is_counted_though_the_record_that_is_read_is_behind_it(
    loops: Loops, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With three nodes a record may be read from one that is behind: the end of a job was not counted then."""
    monkeypatch.setattr("gateway.consumers.HAND_BACK_S", 0.0)
    job = await loops.gateway.submit()
    jobs, behind = loops.gateway.parts.jobs, [job]
    ended = jobs.ended

    async def stale(job_id: str) -> Job | None:
        found = await ended(job_id)
        return behind.pop() if behind and found is not None and found.status.final else found

    monkeypatch.setattr(jobs, "ended", stale)
    await say(loops, completed(job))
    await loops.until_told(job.id, "completed")

    counted = b'vidgen_jobs_total{status="completed"} 1.0'
    async with asyncio.timeout(BOUND):
        while counted not in loops.gateway.parts.metrics.render()[0]:
            await asyncio.sleep(0)
    assert behind == []


@pytest.mark.parametrize("again", [{}, {"completed": 50.0}], ids=["running", "completed"])
async def test_an_end_that_is_looked_at_when_its_job_runs_anew_counts_as_what_it_was(again: dict[str, float]) -> None:
    """It counted as what the job was by then, with the seconds of that, and not at all while the job ran."""
    gateway = await Gateway.open()
    job = await gateway.submit()
    await gateway.tell(failed(job).model_copy(update={"at": job.created_at + timedelta(seconds=5)}))
    answer = await gateway.client.post(f"/v1/jobs/{job.id}/retry")
    second = Job.model_validate_json(answer.content)
    if again:
        await gateway.tell(completed(second).model_copy(update={"at": job.created_at + timedelta(seconds=50)}))

    loops = Loops(gateway)
    events = topology.Consumer(topology.EVENTS, topology.GATEWAY)
    async with asyncio.timeout(BOUND):
        while (await loops.bus.depth(events)).waiting:
            await asyncio.sleep(0)
    await loops.end()

    text = gateway.parts.metrics.render()[0].decode()
    found = re.findall(r'^vidgen_job_seconds_sum{status="(\w+)"} ([\d.]+)$', text, re.M)
    assert {status: float(seconds) for status, seconds in found if float(seconds)} == {"failed": 5.0, **again}
    counts = re.findall(r'^vidgen_jobs_total{status="(\w+)"} ([\d.]+)$', text, re.M)
    assert {status for status, count in counts if float(count)} == {"failed", *again}


@pytest.mark.parametrize(
    ("method", "counted"),
    [
        ("ack", 'vidgen_redeliveries_total{stage="edit"}'),
        ("ack", 'vidgen_jobs_total{status="completed"}'),
        ("publish", 'vidgen_tasks_total{lane="interactive",outcome="completed",stage="edit"}'),
    ],
)
async def test_what_comes_again_behind_a_fault_of_the_bus_is_counted_once(
    method: str, counted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose ack was lost was counted twice; whose next task could not be queued at once was not counted at all."""
    monkeypatch.setattr("gateway.consumers.HAND_BACK_S", 0.0)
    loops = Loops(await Gateway.open(MemoryBus(topology.Topology(ack_wait=0.05))))
    events = next(one for one in topology.CONSUMERS if one.stream == topology.EVENTS and one.name == topology.GATEWAY)

    async def all_done() -> None:
        async with asyncio.timeout(BOUND):
            while (await loops.bus.depth(events)).waiting:
                await asyncio.sleep(0.01)

    job = await loops.gateway.submit(**({} if "jobs" in counted else {"i2v": {"prompt": "zoom"}}))
    await all_done()
    again = started(job).model_copy(update={"deliveries": 2})
    await say(loops, again if "redeliveries" in counted else completed(job))
    loops.bus.fail_next(method, times=2)  # of the event, and of the end that follows from it
    await all_done()
    await loops.end()

    assert f"{counted} 1.0" in loops.gateway.parts.metrics.render()[0].decode()
    assert loops.bus.calls[method] > 1


async def test_what_comes_again_to_another_replica_is_counted_by_the_first_alone() -> None:
    clock = FakeClock()
    one = Loops(await Gateway.open(MemoryBus(clock=clock)))
    counted = 'vidgen_tasks_total{lane="interactive",outcome="completed",stage="edit"}'
    queues = [one for one in topology.CONSUMERS if one.name == topology.GATEWAY]

    async def all_done() -> None:
        async with asyncio.timeout(BOUND):
            while any([(await one.bus.depth(queue)).waiting for queue in queues]):
                await asyncio.sleep(0)

    job = await one.gateway.submit(i2v={"prompt": "zoom"})
    await all_done()
    one.bus.fail_next("ack")
    await say(one, completed(job))
    async with asyncio.timeout(BOUND):
        while f"{counted} 1.0" not in one.gateway.parts.metrics.render()[0].decode():
            await asyncio.sleep(0)
    await one.end()
    clock.advance(600)
    other = Loops(await Gateway.open(one.bus, one.gateway.parts.store))
    await all_done()
    await other.end()

    texts = [loops.gateway.parts.metrics.render()[0].decode() for loops in (one, other)]
    assert [f"{counted} {count}" in text for count, text in zip(("1.0", "0.0"), texts, strict=True)] == [True, True]


async def test_a_request_that_waited_for_a_store_for_long_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumers, "GIVE_UP_AFTER", 2)
    monkeypatch.setattr(consumers, "HAND_BACK_S", 0.001)
    store = MemoryStore()
    await put(store, KEY, picture())
    loops = Loops(await Gateway.open(store=store))
    store.down = True
    good = contracts.VideoRequest(job_id="good", references=(KEY,), edit=contracts.EditParams(**EDIT))
    await loops.bus.publish(topology.SUBJECT_REQUESTS, good.to_bytes(), message_id="good")
    async with asyncio.timeout(BOUND):
        while store.calls["fetch"] < 4:
            await asyncio.sleep(0.001)
    store.down = False
    await loops.until_told("good", "accepted")
    await loops.end()


async def test_a_message_that_cannot_be_digested_does_not_stop_the_others(
    loops: Loops, monkeypatch: pytest.MonkeyPatch
) -> None:
    intake = loops.gateway.parts.intake
    handle = intake.handle

    async def choke(delivery: Delivery) -> Job:
        if delivery.body == b"poison":
            raise RuntimeError("cannot")
        return await handle(delivery)

    monkeypatch.setattr(intake, "handle", choke)
    await loops.bus.publish(topology.SUBJECT_REQUESTS, b"poison", message_id="poison")
    good = contracts.VideoRequest(job_id="good", references=(KEY,), edit=contracts.EditParams(**EDIT))
    await loops.bus.publish(topology.SUBJECT_REQUESTS, good.to_bytes(), message_id="good")
    await loops.until_told("good", "accepted")
    assert not loops.running.done()


async def test_a_message_that_cannot_be_digested_comes_again_later_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    loops = Loops(await Gateway.open(MemoryBus(clock=clock)))
    came: list[float] = []

    async def chokes(_delivery: Delivery) -> Job:
        came.append(clock.time())
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(loops.gateway.parts.intake, "handle", chokes)
    await loops.bus.publish(topology.SUBJECT_REQUESTS, b"{}", message_id="hard")
    for _ in range(13):
        for _ in range(100):
            await asyncio.sleep(0)
        clock.advance(1.0)
    await loops.end()

    assert came == [0, consumers.HAND_BACK_S, 3 * consumers.HAND_BACK_S, 6 * consumers.HAND_BACK_S]


async def test_a_message_that_can_never_be_digested_is_given_up_with_all_that_it_said(
    loops: Loops, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers, "GIVE_UP_AFTER", 3)
    monkeypatch.setattr(consumers, "HAND_BACK_S", 0.001)
    seen: list[int] = []

    async def chokes(delivery: Delivery) -> Job:
        seen.append(delivery.num_delivered)
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(loops.gateway.parts.intake, "handle", chokes)
    body = b'{"hard": "to swallow", "job_id": "hard"}'
    await loops.bus.publish("vidgen.requests.acme", body, message_id="hard")

    await loops.until_told("hard", "rejected")  # whoever waits for it hears of its end
    feed = await loops.bus.follow(topology.DEAD, "vidgen.dead.>")
    stored = await feed.next(BOUND)
    await loops.end()

    assert stored is not None
    letter = contracts.DeadLetter.model_validate_json(stored.body)
    assert (letter.error.code, letter.job_id, base64.b64decode(letter.payload)) == ("undigested", "hard", body)
    job = await loops.gateway.parts.jobs.get("hard")
    assert (job.status, job.tenant) == (contracts.JobStatus.REJECTED, "acme")
    assert seen == [1, 2, 3]
    assert await loops.bus.tail(topology.REQUESTS, None, 9) == []
    text = loops.gateway.parts.metrics.render()[0].decode()
    assert 'vidgen_dead_letters_total{stage="request"} 1.0' in text


async def test_a_message_that_cannot_even_be_turned_away_is_a_dead_letter(
    loops: Loops, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers, "GIVE_UP_AFTER", 2)
    monkeypatch.setattr(consumers, "HAND_BACK_S", 0.001)

    async def chokes(_delivery: Delivery) -> Job:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(loops.gateway.parts.intake, "handle", chokes)
    monkeypatch.setattr(loops.gateway.parts.intake, "give_up", chokes)
    await loops.bus.publish(topology.SUBJECT_REQUESTS, b"{}", message_id="hard")

    stored = await (await loops.bus.follow(topology.DEAD, "vidgen.dead.>")).next(BOUND)

    assert stored is not None
    assert contracts.DeadLetter.model_validate_json(stored.body).error.code == "undigested"


async def test_an_exhausted_task_fails_its_job_and_leaves_the_queue(loops: Loops) -> None:
    job = await loops.gateway.submit()
    [task] = await loops.bus.tail(topology.TASKS, None, 1)
    advisory = b'{"stream_seq": %d}' % task.seq
    await loops.bus.publish(
        f"$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.{topology.TASKS}.edit-interactive", advisory, message_id="advice"
    )
    await loops.until_told(job.id, "failed")
    await loops.end()
    assert await loops.gateway.count(topology.TASKS) == 0
    [letter] = await loops.bus.tail(topology.DEAD, None, 1)
    assert contracts.DeadLetter.model_validate_json(letter.body).error.code == "deliveries_exhausted"
    assert (await loops.gateway.client.post(f"/v1/dead/{letter.seq}/replay")).json()["run"] == 2


async def test_a_task_that_is_done_and_whose_deliveries_ran_out_is_no_dead_letter(loops: Loops) -> None:
    """Its last worker said that it was done, and was gone before the bus heard that the message was."""
    job = await loops.gateway.submit()
    [task] = await loops.bus.tail(topology.TASKS, None, 1)
    await say(loops, completed(job))
    await loops.until_told(job.id, "completed")
    advisory = b'{"stream_seq": %d}' % task.seq
    await loops.bus.publish(
        f"$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.{topology.TASKS}.edit-interactive", advisory, message_id="advice"
    )
    async with asyncio.timeout(BOUND):
        while await loops.gateway.count(topology.TASKS):
            await asyncio.sleep(0.01)

    assert await loops.gateway.count(topology.DEAD) == 0
    assert (await loops.gateway.parts.jobs.get(job.id)).status is JobStatus.COMPLETED


@pytest.mark.parametrize("dies", [None, "publish", "delete", "first"])
@pytest.mark.parametrize("late", [False, True], ids=["", "behind it the end of the run before"])
async def test_a_begun_task_whose_deliveries_ran_out_is_queued_anew_whatever_fails_meanwhile(
    loops: Loops, dies: str | None, late: bool
) -> None:
    job = await loops.gateway.submit()
    if late:
        await loops.gateway.client.post(f"/v1/jobs/{job.id}/cancel")
        answer = await loops.gateway.client.post(f"/v1/jobs/{job.id}/retry")
        job = contracts.Job.model_validate(answer.json())
    await say(loops, started(job))
    if late:
        await say(loops, contracts.JobCancelled(job_id=job.id, run=1, at=job.created_at))
    [task] = await loops.bus.tail(topology.TASKS, None, 1)
    advisory = b'{"stream_seq": %d}' % task.seq
    await loops.bus.publish(
        f"$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.{topology.TASKS}.edit-interactive", advisory, message_id="advice"
    )
    if dies is not None:
        loops.bus.fail_next(dies)
    async with asyncio.timeout(BOUND):
        while [held.seq for held in await loops.bus.tail(topology.TASKS, None, 9)] in ([task.seq], []):
            loops.gateway.parts.jobs.share.freed(job.stage or "edit", "interactive", job.tenant)
            await asyncio.sleep(0.01)
        while await loops.gateway.count(topology.HELD):  # it is forgotten a moment after it was queued
            await asyncio.sleep(0.01)

    [again] = await loops.bus.tail(topology.TASKS, None, 9)
    assert (again.subject, again.body) == (task.subject, task.body)
    assert topology.HEADER_REPLACES not in again.headers
    assert topology.HEADER_LOG_SEQ not in again.headers
    assert await loops.gateway.count(topology.DEAD) == 0
    assert not (await loops.gateway.parts.jobs.get(job.id)).status.final


@pytest.mark.parametrize("message", ["y", "y" * 100_000])
def test_a_letter_too_large_for_a_message_keeps_its_beginning(message: str) -> None:
    payload, error = b"abc" * (1 << 18), contracts.JobError(code="x", message=message)
    letter = dead.letter(payload, topology.SUBJECT_REQUESTS, error, job_id=None)
    assert payload.startswith(base64.b64decode(letter.payload))
    assert len(letter.to_bytes()) < 262_144
