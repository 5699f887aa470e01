"""What every Bus promises: one suite for the double and for JetStream."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from tests.servers import connected_bus, running_nats
from tests.spans import traced, traceparent

from vidgen import errors, jetstream, topology, tracing
from vidgen.bus import Bus, Delivery, Stored, Supply, each
from vidgen.testing import MemoryBus
from vidgen.testing import bus as memory

QUEUE = topology.consumer_of("edit", "interactive")
OTHER_LANE = topology.consumer_of("edit", "batch")
EVENTS = topology.Consumer(topology.EVENTS, topology.GATEWAY)
ADVISORIES = topology.Consumer(topology.ADVISORIES, topology.GATEWAY)
BOUND = 60.0  # how long to wait for what must come; nothing waits that long unless something is broken
SHORT = topology.Topology(ack_wait=1.0)

OpenBus = Callable[[topology.Topology], Awaitable[Bus]]


@pytest.fixture(params=["memory", "jetstream"])
async def open_bus(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[OpenBus]:
    async with contextlib.AsyncExitStack() as stack:

        async def opened(wanted: topology.Topology) -> Bus:
            if request.param == "memory":
                return MemoryBus(wanted)
            server = await stack.enter_async_context(running_nats(tmp_path / "nats"))
            return await stack.enter_async_context(connected_bus(server, wanted))

        yield opened


@pytest.fixture
async def bus(open_bus: OpenBus) -> Bus:
    return await open_bus(topology.Topology())


@pytest.fixture
async def hasty_bus(open_bus: OpenBus) -> Bus:
    """A bus that redelivers after a second."""
    return await open_bus(SHORT)


def task(job: str, lane: str = "interactive") -> str:
    return f"vidgen.tasks.edit.{lane}.{job}"


def event(job: str) -> str:
    return topology.subject_of_events(job)


async def queued(bus: Bus, job: str = "j1") -> int:
    return await bus.publish(task(job), job.encode(), message_id=f"{job}:edit:1")


async def taken(bus: Bus, consumer: topology.Consumer = QUEUE, wait: float = BOUND) -> Delivery:
    delivery = await bus.pull(consumer, wait)
    assert delivery is not None
    return delivery


def later(seconds: float) -> Callable[[], bool]:
    """Whether so many seconds have passed; how many more a busy machine takes nobody asks."""
    clock = asyncio.get_running_loop().time
    until = clock() + seconds
    return lambda: clock() >= until


async def told(bus: Bus, job: str, count: int) -> list[int]:
    return [await bus.publish(event(job), b"%d" % n, message_id=f"{job}:{n}") for n in range(count)]


# ── publish ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_message_keeps_its_subject_body_headers_and_sequence(bus: Bus) -> None:
    seq = await bus.publish(task("j1"), b"body", message_id="a", headers={"traceparent": "00-1", "Status": "404"})

    delivery = await taken(bus)

    assert (delivery.subject, delivery.body, delivery.seq, delivery.num_delivered) == (task("j1"), b"body", seq, 1)
    assert delivery.headers["traceparent"] == "00-1"
    assert delivery.at.tzinfo is not None


async def test_a_second_publish_of_a_message_id_is_dropped_and_answers_as_the_first(bus: Bus) -> None:
    first = await bus.publish(event("j1"), b"once", message_id="a")
    await bus.publish(event("j1"), b"other", message_id="b")

    assert await bus.publish(event("j1"), b"twice", message_id="a") == first
    assert [message.body for message in await bus.tail(topology.EVENTS, None, 10)] == [b"other", b"once"]


async def test_a_message_id_is_known_across_the_subjects_of_a_stream_and_after_consumption(bus: Bus) -> None:
    seq = await queued(bus)
    await (await taken(bus)).ack()

    assert await bus.publish(task("other"), b"", message_id="j1:edit:1") == seq
    assert await bus.pull(QUEUE, 0) is None


async def test_two_tenants_requests_with_one_message_id_are_both_kept(bus: Bus) -> None:
    """Of a stream the server compares ids whatever the subject: it dropped the second one, and acknowledged it."""
    first = await bus.publish(topology.subject_of_requests("acme"), b"theirs", message_id="order-7")
    async with asyncio.timeout(BOUND):
        while (await bus.publish(topology.subject_of_requests("umbrella"), b"ours", message_id="order-7")) == first:
            pass  # for a moment it is dropped

    requests = topology.Consumer(topology.REQUESTS, topology.GATEWAY)
    assert [(await taken(bus, requests)).body for _ in range(2)] == [b"theirs", b"ours"]


async def test_message_ids_of_two_streams_are_apart(bus: Bus) -> None:
    await bus.publish(event("j1"), b"event", message_id="a")

    await bus.publish(task("j1"), b"task", message_id="a")

    assert (await taken(bus)).body == b"task"


async def test_an_expected_sequence_is_compared_with_the_newest_of_the_subject(bus: Bus) -> None:
    first = await bus.publish(event("j1"), b"1", message_id="1", expect_last=0)
    await bus.publish(event("other"), b"x", message_id="x", expect_last=0)
    second = await bus.publish(event("j1"), b"2", message_id="2", expect_last=first)

    for stale in (0, first, second + 5):
        with pytest.raises(errors.ConflictError) as caught:
            await bus.publish(event("j1"), b"3", message_id=f"3-{stale}", expect_last=stale)
        assert caught.value.code == "conflict"
    assert await bus.last(topology.EVENTS, event("j1")) is not None
    assert [message.body for message in await bus.tail(topology.EVENTS, None, 9)] == [b"2", b"x", b"1"]


async def test_a_publish_that_is_repeated_is_no_conflict_with_itself(bus: Bus) -> None:
    # The answer to the first was lost: the repeated one still expects what was newest before it.
    first = await bus.publish(event("j1"), b"1", message_id="1", expect_last=0)
    second = await bus.publish(event("j1"), b"2", message_id="2", expect_last=first)
    await bus.publish(event("j1"), b"3", message_id="3", expect_last=second)

    assert await bus.publish(event("j1"), b"2", message_id="2", expect_last=first) == second
    assert await bus.publish(event("j1"), b"1", message_id="1", expect_last=0) == first
    assert len(await bus.tail(topology.EVENTS, None, 9)) == 3


async def test_of_many_writers_with_one_expectation_one_wins(bus: Bus) -> None:
    answers = await asyncio.gather(
        *(bus.publish(event("j1"), b"", message_id=str(n), expect_last=0) for n in range(8)), return_exceptions=True
    )

    assert [answer for answer in answers if isinstance(answer, int)] == [1]
    assert sum(isinstance(answer, errors.ConflictError) for answer in answers) == 7


async def test_a_subject_that_takes_one_message_refuses_the_second_while_it_holds_the_first(bus: Bus) -> None:
    await queued(bus)

    for held in ("waiting", "taken"):
        with pytest.raises(errors.ConflictError) as caught:
            await bus.publish(task("j1"), b"again", message_id=f"while {held}")
        assert caught.value.code == "already_queued"
        delivery = await bus.pull(QUEUE, 0)

    assert delivery is None
    assert await bus.purge(topology.TASKS, task("j1")) == 1
    await bus.publish(task("j1"), b"again", message_id="after")


async def test_progress_keeps_the_newest_of_each_subject_only(bus: Bus) -> None:
    for job, step in (("a", 1), ("b", 1), ("a", 2)):
        await bus.publish(topology.subject_of_progress(job), b"%d" % step, message_id=f"{job}{step}")

    assert [message.body for message in await bus.tail(topology.PROGRESS, None, 9)] == [b"2", b"1"]


# ── pull, ack, nak, in_progress ──────────────────────────────────────────────────────────────────────────────────────


async def test_an_empty_queue_gives_nothing_at_once_or_after_the_wait(bus: Bus) -> None:
    assert await bus.pull(QUEUE, 0) is None
    least = later(0.2)
    assert await bus.pull(QUEUE, 0.2) is None
    assert least()


async def test_a_waiting_pull_gets_what_comes(bus: Bus) -> None:
    pull = asyncio.create_task(taken(bus))
    await asyncio.sleep(0)  # it runs

    await queued(bus)

    assert (await pull).subject == task("j1")


async def test_messages_come_in_order_to_the_consumer_of_their_lane(bus: Bus) -> None:
    for job in ("a", "b", "c"):
        await queued(bus, job)
    await bus.publish(task("z", "batch"), b"z", message_id="z")

    assert [(await taken(bus)).body for _ in range(3)] == [b"a", b"b", b"c"]
    assert (await taken(bus, OTHER_LANE)).body == b"z"


async def test_a_message_is_given_to_one_puller(bus: Bus) -> None:
    await queued(bus)

    first, second = await asyncio.gather(bus.pull(QUEUE, 0.3), bus.pull(QUEUE, 0.3))

    assert (first is None) != (second is None)


async def test_an_ack_removes_the_message_from_a_work_queue(bus: Bus) -> None:
    seq = await queued(bus)
    delivery = await taken(bus)
    assert await bus.get(topology.TASKS, seq) is not None

    await delivery.ack()

    assert await bus.get(topology.TASKS, seq) is None


async def test_an_ack_leaves_the_message_in_a_log(bus: Bus) -> None:
    (seq,) = await told(bus, "j1", 1)

    await (await taken(bus, EVENTS)).ack()

    assert await bus.get(topology.EVENTS, seq) is not None
    assert await bus.pull(EVENTS, 0) is None


async def test_a_nak_delivers_again_and_counts(bus: Bus) -> None:
    await queued(bus)
    await (await taken(bus)).nak()

    again = await taken(bus)

    assert (again.body, again.num_delivered) == (b"j1", 2)


async def test_a_nak_with_a_delay_delivers_again_only_then(bus: Bus) -> None:
    await queued(bus)
    delivery = await taken(bus)
    least = later(0.5)
    await delivery.nak(0.5)

    assert (await bus.depth(QUEUE)).waiting == 1
    assert (await taken(bus)).num_delivered == 2
    assert least()


async def test_what_is_not_settled_is_delivered_again_after_the_lease(hasty_bus: Bus) -> None:
    await queued(hasty_bus)
    least = later(SHORT.ack_wait)
    await taken(hasty_bus)

    assert (await taken(hasty_bus)).num_delivered == 2
    assert least()


async def test_in_progress_renews_the_lease(open_bus: OpenBus) -> None:
    bus = await open_bus(topology.Topology(ack_wait=5.0))  # the four seconds between are for a machine that stalls
    await queued(bus)
    delivery = await taken(bus)

    for _ in range(6):  # six seconds in all
        assert await bus.pull(QUEUE, 1) is None
        await delivery.in_progress()

    assert (await taken(bus)).num_delivered == 2


async def test_a_stale_ack_is_accepted_and_removes_the_message(hasty_bus: Bus) -> None:
    # There is no fencing (FACTS §4): whoever needs it compares attempts in the event log.
    seq = await queued(hasty_bus)
    stale = await taken(hasty_bus)
    again = await taken(hasty_bus)
    assert again.num_delivered == 2

    await stale.ack()

    assert await hasty_bus.get(topology.TASKS, seq) is None
    assert await hasty_bus.pull(QUEUE, 1.5) is None
    await again.ack()  # nobody minds


async def test_a_stale_nak_takes_the_message_from_its_holder(bus: Bus) -> None:
    await queued(bus)
    stale = await taken(bus)
    await stale.nak()
    assert (await taken(bus)).num_delivered == 2

    await stale.nak()

    assert (await taken(bus)).num_delivered == 3


async def test_settling_what_was_settled_is_harmless(bus: Bus) -> None:
    await queued(bus)
    delivery = await taken(bus)
    await delivery.ack()

    await delivery.in_progress()
    await delivery.nak()
    await delivery.ack()

    assert await bus.pull(QUEUE, 0) is None


async def test_a_cancelled_pull_takes_nothing_with_it(bus: Bus) -> None:
    # The lease here is a minute: had the cancelled pull kept the message, nobody would get it in time.
    pull = asyncio.create_task(bus.pull(QUEUE, BOUND))
    await bus.depth(QUEUE)  # a round trip later the server knows of the pull
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull

    await queued(bus)

    assert (await taken(bus)).body == b"j1"


@pytest.mark.parametrize("turns", range(1, 6))
async def test_a_pull_that_is_cancelled_while_a_message_comes_hands_it_back(bus: Bus, turns: int) -> None:
    await queued(bus)
    pull = asyncio.create_task(bus.pull(QUEUE, BOUND))
    for _ in range(turns):
        await asyncio.sleep(0)
    pull.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        delivery = await pull
        assert delivery is not None
        await delivery.nak()

    assert (await taken(bus)).body == b"j1"


async def supplied(supply: Supply) -> Delivery:
    async with asyncio.timeout(BOUND):
        delivery = await supply.next()
    assert delivery is not None
    return delivery


async def test_a_supply_gives_everything_in_order_what_was_there_and_what_comes(bus: Bus) -> None:
    supply = bus.supply(QUEUE, 4)
    for number in range(10):
        await queued(bus, f"a{number}")
    found = [(await supplied(supply)).body for _ in range(10)]
    waiting = asyncio.create_task(supplied(supply))
    await asyncio.sleep(0)
    await queued(bus, "b")

    assert found == [f"a{number}".encode() for number in range(10)]
    assert (await waiting).body == b"b"
    await supply.close()


async def test_a_supply_that_is_closed_ends_those_who_wait_and_keeps_nothing(bus: Bus) -> None:
    # The lease here is a minute: had it kept a message, nobody would get it in time.
    supply = bus.supply(QUEUE, 4)
    for number in range(6):
        await queued(bus, str(number))
    first = await supplied(supply)
    await first.ack()
    await supply.close()
    await supply.close()  # harmless

    assert await supply.next() is None
    assert {(await taken(bus)).body for _ in range(5)} == {b"1", b"2", b"3", b"4", b"5"}


async def test_several_wait_at_one_supply_and_all_end_with_it(bus: Bus) -> None:
    supply = bus.supply(QUEUE, 4)
    waiting = [asyncio.create_task(supply.next()) for _ in range(3)]
    await bus.depth(QUEUE)
    await supply.close()

    async with asyncio.timeout(BOUND):
        assert await asyncio.gather(*waiting) == [None, None, None]
    await queued(bus)
    assert (await taken(bus)).body == b"j1"


async def test_two_supplies_share_a_consumer(bus: Bus) -> None:
    one, other = bus.supply(QUEUE, 2), bus.supply(QUEUE, 2)
    pulls = [asyncio.create_task(supplied(supply)) for supply in (one, other)]
    await bus.depth(QUEUE)
    for number in range(8):
        await queued(bus, str(number))
    found = [await pull for pull in pulls]
    await asyncio.gather(one.close(), other.close())

    left = [await taken(bus) for _ in range(6)]
    assert len({delivery.body for delivery in (*found, *left)}) == 8


async def test_an_ack_that_nobody_waits_for_settles_too(bus: Bus) -> None:
    seq = await queued(bus)
    await (await taken(bus)).ack(heard=False)

    async with asyncio.timeout(BOUND):
        while await bus.get(topology.TASKS, seq) is not None:
            await asyncio.sleep(0.01)


async def test_the_latest_is_the_last_message_on_a_subject(bus: Bus) -> None:
    subject = topology.subject_of_events("j1")
    assert await bus.latest(topology.EVENTS, subject) is None
    await told(bus, "j1", 3)
    await told(bus, "j2", 1)

    latest = await bus.latest(topology.EVENTS, subject)

    assert latest == await bus.last(topology.EVENTS, subject)


async def test_a_message_delivered_too_often_stays_and_an_advisory_tells(open_bus: OpenBus) -> None:
    consumers = tuple(
        dataclasses.replace(consumer, max_deliver=2) if consumer.name == QUEUE.name else consumer
        for consumer in topology.CONSUMERS
    )
    bus = await open_bus(topology.Topology(consumers=consumers))
    seq = await queued(bus)
    for _ in range(2):
        last = await taken(bus)
        await last.nak()

    assert await bus.pull(QUEUE, 0.2) is None
    assert await bus.get(topology.TASKS, seq) is not None
    assert (await bus.depth(QUEUE)).waiting == 0
    await queued(bus, "another")
    await (await taken(bus)).ack()
    held = await queued(bus, "held")
    await taken(bus)
    depth = await bus.depth(QUEUE)  # of what was handed out only this tells the two apart
    assert (depth.ack_pending, depth.delivered) == (1, held)
    assert [stored.seq async for stored in each(bus, topology.TASKS, QUEUE.filter_subject or ">")] == [seq, held]
    advisory = await taken(bus, ADVISORIES)
    assert advisory.subject == f"$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.{topology.TASKS}.{QUEUE.name}"
    body = json.loads(advisory.body)
    wanted = {"stream": topology.TASKS, "consumer": QUEUE.name, "stream_seq": seq, "deliveries": 2}
    assert {name: body[name] for name in wanted} == wanted
    await advisory.ack()
    await last.ack()  # late, and accepted all the same
    assert await bus.get(topology.TASKS, seq) is None


async def test_depth_counts_what_waits_and_since_when(bus: Bus) -> None:
    empty = await bus.depth(QUEUE)
    assert (empty.waiting, empty.oldest_at, empty.oldest_pending_at, empty.delivered) == (0, None, None, 0)
    seqs = [await queued(bus, job) for job in ("a", "b", "c")]
    await bus.publish(task("z", "batch"), b"", message_id="z")

    first = await taken(bus)
    depth = await bus.depth(QUEUE)
    assert (depth.pending, depth.ack_pending, depth.redelivered, depth.waiting) == (2, 1, 0, 3)
    assert depth.delivered == seqs[0]
    oldest = await bus.get(topology.TASKS, seqs[0])
    assert oldest is not None
    second = await bus.get(topology.TASKS, seqs[1])
    assert second is not None
    assert (depth.oldest_at, depth.oldest_pending_at) == (oldest.at, second.at)

    await first.nak()
    await (await taken(bus)).in_progress()
    assert (await bus.depth(QUEUE)).redelivered == 1
    await first.ack()
    depth = await bus.depth(QUEUE)
    assert (depth.waiting, depth.redelivered) == (2, 0)
    assert depth.oldest_at == depth.oldest_pending_at == second.at

    for _ in range(2):
        await taken(bus)
    depth = await bus.depth(QUEUE)
    assert (depth.pending, depth.oldest_at, depth.oldest_pending_at) == (0, second.at, None)


async def test_a_stream_and_a_bucket_tell_what_they_hold_and_may_hold(bus: Bus) -> None:
    empty = await bus.held(topology.TASKS)
    assert (empty.messages, empty.bytes, empty.limit) == (0, 0, 1 << 30)
    await queued(bus, "a")
    await bus.publish(task("z", "batch"), b"x" * 1000, message_id="z")
    await bus.records(topology.JOBS_BUCKET).put("j1", b"x" * 500)

    tasks, records = await bus.held(topology.TASKS), await bus.held(f"KV_{topology.JOBS_BUCKET}")

    assert tasks.messages == 2
    assert tasks.bytes > 1000
    assert (records.messages, records.limit) == (1, None)
    assert records.bytes > 500


async def test_depth_of_a_log_counts_what_was_not_acked(bus: Bus) -> None:
    seqs = await told(bus, "j1", 3)
    await (await taken(bus, EVENTS)).ack()

    depth = await bus.depth(EVENTS)

    oldest = await bus.get(topology.EVENTS, seqs[1])
    assert oldest is not None
    assert (depth.waiting, depth.oldest_at) == (2, oldest.at)


async def test_a_consumer_that_nobody_created_is_an_error_that_says_so(bus: Bus) -> None:
    with pytest.raises(errors.BusError, match="start a gateway"):
        await bus.pull(topology.Consumer(topology.TASKS, "nobody"), 0)


async def test_what_is_published_in_a_span_carries_its_trace_to_whoever_reads_it(bus: Bus) -> None:
    parent = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=1"}
    feed = await bus.follow(topology.EVENTS, event("j1"))
    with traced() as seen:
        with tracing.span("a", of=parent):
            seq = await bus.publish(event("j1"), b"in", message_id="in", headers={"Mine": "1"})
            await bus.publish(task("j1"), b"in", message_id="in")
        wanted = {"traceparent": traceparent(seen.one("a")), "tracestate": "a=1"}
        await bus.publish(event("j2"), b"outside", message_id="outside")

    told = wanted | {"Mine": "1"}
    assert wanted.items() <= (await taken(bus)).headers.items()
    assert told.items() <= (await taken(bus, EVENTS)).headers.items()
    for found in (
        await bus.last(topology.EVENTS, event("j1")), await bus.get(topology.EVENTS, seq), await feed.next(BOUND),
        (await bus.tail(topology.EVENTS, seq + 1, 1))[0],
    ):  # fmt: skip
        assert found is not None
        assert told.items() <= found.headers.items()
    outside = await bus.last(topology.EVENTS, event("j2"))
    assert outside is not None
    assert "traceparent" not in outside.headers
    await feed.close()


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_last_is_the_newest_of_the_subject(bus: Bus) -> None:
    assert await bus.last(topology.EVENTS, event("j1")) is None
    await told(bus, "j1", 2)
    await told(bus, "j2", 1)

    found = await bus.last(topology.EVENTS, event("j1"))

    assert found is not None
    assert (found.subject, found.body, found.seq) == (event("j1"), b"1", 2)
    assert found.at.tzinfo is not None


async def test_the_first_and_the_number_of_messages_on_a_pattern(bus: Bus) -> None:
    for number in range(6):
        tenant = ("acme", "umbrella")[number % 2]
        subject = topology.subject_of_task("edit", "interactive", f"j{number}", tenant)
        assert await bus.publish(subject, b"%d" % number, message_id=f"m{number}") == number + 1
    acme = topology.subject_of_task("edit", "interactive", "*", "acme")

    first = await bus.first(topology.TASKS, acme)
    second = await bus.first(topology.TASKS, acme, 1)
    exact = await bus.first(topology.TASKS, topology.subject_of_task("edit", "interactive", "j5", "umbrella"), 2)

    assert [one.body if one else None for one in (first, second, exact)] == [b"0", b"2", b"5"]
    assert await bus.first(topology.TASKS, acme, 5) is None
    assert await bus.first(topology.HELD, "vidgen.held.>") is None
    assert [await bus.count(*place) for place in topology.tasks_of("acme")] == [3, 0]
    assert [await bus.count(topology.TASKS, acme, after) for after in (1, 2, 4, 5, 99)] == [2, 2, 1, 0, 0]
    assert await bus.count(topology.TASKS, topology.subject_of_task("edit", "interactive", "j0", "acme")) == 1
    delivery = await taken(bus)
    await delivery.ack()
    assert await bus.count(topology.TASKS, acme) == 2
    assert (await bus.depth(QUEUE)).delivered == 1


async def test_tail_of_a_pattern_pages_backwards_however_much_of_others_lies_between(bus: Bus) -> None:
    own = {1, 40, 41, 42, 43, 44, 150}
    for number in range(1, 161):
        subject = topology.subject_of_history(f"j{number}", "acme" if number in own else "umbrella")
        assert await bus.publish(subject, b"", message_id=f"m{number}") == number
    await bus.delete(topology.HISTORY, 42)
    pattern = topology.subject_of_history("*", "acme")

    async def page(before: int | None, limit: int) -> list[int]:
        return [message.seq for message in await bus.tail(topology.HISTORY, before, limit, pattern)]

    assert await page(None, 2) == [150, 44]
    assert await page(44, 2) == [43, 41]
    assert await page(41, 9) == [40, 1]
    assert await page(1, 2) == []
    assert await page(None, 100) == sorted(own - {42}, reverse=True)
    assert await bus.tail(topology.HISTORY, None, 3, topology.subject_of_history("*")) == []


async def test_tail_pages_backwards_over_what_was_deleted(bus: Bus) -> None:
    seqs = await told(bus, "j1", 9)
    for seq in seqs[2:7]:
        assert await bus.delete(topology.EVENTS, seq)

    assert [message.seq for message in await bus.tail(topology.EVENTS, None, 3)] == [9, 8, 2]
    assert [message.seq for message in await bus.tail(topology.EVENTS, 8, 3)] == [2, 1]
    assert await bus.tail(topology.EVENTS, 1, 3) == []
    assert await bus.tail(topology.HISTORY, None, 3) == []


async def test_get_and_delete_of_what_is_not_there(bus: Bus) -> None:
    (seq,) = await told(bus, "j1", 1)

    assert await bus.delete(topology.EVENTS, seq)
    for gone in (seq, seq + 40):
        assert await bus.get(topology.EVENTS, gone) is None
        assert not await bus.delete(topology.EVENTS, gone)


async def test_purge_removes_what_waits_on_one_subject(bus: Bus) -> None:
    await queued(bus, "a")
    await queued(bus, "b")

    assert await bus.purge(topology.TASKS, task("a")) == 1
    assert await bus.purge(topology.TASKS, task("a")) == 0
    assert (await taken(bus)).body == b"b"


async def test_a_purged_message_is_not_delivered_again(hasty_bus: Bus) -> None:
    await queued(hasty_bus)
    delivery = await taken(hasty_bus)
    await hasty_bus.purge(topology.TASKS, task("j1"))

    assert await hasty_bus.pull(QUEUE, 2.5) is None
    await delivery.ack()


async def test_a_stream_that_is_not_there_is_an_error(bus: Bus) -> None:
    for call in (bus.last("NONE", "a"), bus.get("NONE", 1), bus.purge("NONE", "a"), bus.tail("NONE", None, 1),
                 bus.first("NONE", "a"), bus.count("NONE", "a"), bus.delete("NONE", 1)):  # fmt: skip
        with pytest.raises(errors.BusError):
            await call


# ── feeds ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def bodies(feed: object, count: int) -> list[bytes]:
    found = [await feed.next(BOUND) for _ in range(count)]  # type: ignore[attr-defined]
    assert all(isinstance(message, Stored) for message in found)
    return [message.body for message in found]


async def test_follow_replays_and_goes_on_in_order(bus: Bus) -> None:
    await told(bus, "j1", 3)
    await told(bus, "other", 1)
    feed = await bus.follow(topology.EVENTS, event("j1"))

    assert await bodies(feed, 3) == [b"0", b"1", b"2"]
    assert await feed.next(0.1) is None
    waiting = asyncio.create_task(bodies(feed, 2))
    for n in (3, 4):
        await bus.publish(event("j1"), b"%d" % n, message_id=f"j1:{n}")
    assert await waiting == [b"3", b"4"]
    await feed.close()
    await feed.close()


async def test_follow_starts_past_a_sequence_and_tells_sequences(bus: Bus) -> None:
    seqs = await told(bus, "j1", 4)
    feed = await bus.follow(topology.EVENTS, event("j1"), after=seqs[1])

    found = [await feed.next(BOUND), await feed.next(BOUND)]

    assert [message.seq for message in found if message] == seqs[2:]
    assert await feed.next(0) is None
    await feed.close()


async def test_follow_of_a_pattern_has_every_subject(bus: Bus) -> None:
    await told(bus, "a", 1)
    feed = await bus.follow(topology.EVENTS, "vidgen.events.*")
    await told(bus, "b", 1)

    found = [await feed.next(BOUND), await feed.next(BOUND)]

    assert [message.subject for message in found if message] == [event("a"), event("b")]
    await feed.close()


async def test_a_cancelled_next_loses_nothing(bus: Bus) -> None:
    feed = await bus.follow(topology.EVENTS, event("j1"))
    for turns in range(6):
        waiting = asyncio.create_task(feed.next(BOUND))
        for _ in range(turns):
            await asyncio.sleep(0)
        await bus.publish(event("j1"), b"%d" % turns, message_id=f"j1:{turns}")
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            found = await waiting
            assert found is not None
            assert found.body == b"%d" % turns
            continue
        assert await bodies(feed, 1) == [b"%d" % turns]
    await feed.close()


async def test_listen_hears_signals_from_now_on(bus: Bus) -> None:
    await bus.signal(topology.subject_of_control("early"), b"missed")
    feed = await bus.listen(topology.SUBJECT_CONTROL_ALL)
    await bus.signal(topology.subject_of_control("j1"), b"cancel")
    await bus.signal("vidgen.elsewhere", b"")

    found = await feed.next(BOUND)

    assert found is not None
    assert (found.subject, found.body, found.seq) == (topology.subject_of_control("j1"), b"cancel", 0)
    assert await feed.next(0.1) is None
    await feed.close()


async def test_a_signal_on_a_streams_subject_is_stored(bus: Bus) -> None:
    subject = topology.subject_of_progress("j1")
    feed = await bus.follow(topology.PROGRESS, subject)

    await bus.signal(subject, b"1")

    assert await bodies(feed, 1) == [b"1"]
    found = await bus.last(topology.PROGRESS, subject)
    assert found is not None
    assert found.body == b"1"
    await feed.close()


# ── records ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_records_are_written_by_compare_and_set(bus: Bus) -> None:
    records = bus.records(topology.JOBS_BUCKET)
    assert await records.get("j1") is None
    assert await records.latest("j1") is None

    first = await records.put("j1", b"one", 0)
    assert await records.get("j1") == (b"one", first)
    for stale in (0, first + 7):
        with pytest.raises(errors.ConflictError):
            await records.put("j1", b"no", stale)
    second = await records.put("j1", b"two", first)
    assert second > first
    with pytest.raises(errors.ConflictError):
        await records.put("j1", b"no", first)
    assert await records.get("j1") == (b"two", second)
    assert await records.latest("j1") == (b"two", second)


async def test_a_record_that_must_be_at_a_revision_must_be_there(bus: Bus) -> None:
    with pytest.raises(errors.ConflictError):
        await bus.records(topology.JOBS_BUCKET).put("j1", b"no", 3)


async def test_a_record_is_written_whatever_is_there_without_a_revision(bus: Bus) -> None:
    records = bus.records(topology.JOBS_BUCKET)
    await records.put("j1", b"one")

    revision = await records.put("j1", b"two")

    assert await records.get("j1") == (b"two", revision)


async def test_all_has_every_live_record_of_its_bucket(bus: Bus) -> None:
    workers, jobs = bus.records(topology.WORKERS_BUCKET), bus.records(topology.JOBS_BUCKET)
    assert await workers.all() == {}
    await workers.put("edit.w-1", b"a")
    await workers.put("i2v.w-2", b"b")
    await workers.put("edit.w-1", b"c")
    await jobs.put("j1", b"job")

    assert await workers.all() == {"edit.w-1": b"c", "i2v.w-2": b"b"}


async def test_a_record_ends_with_the_buckets_ttl(open_bus: OpenBus) -> None:
    buckets = tuple(dataclasses.replace(bucket, ttl=1.0) for bucket in topology.BUCKETS)
    bus = await open_bus(topology.Topology(buckets=buckets))
    workers = bus.records(topology.WORKERS_BUCKET)
    await workers.put("edit.w", b"a")

    async with asyncio.timeout(BOUND):
        while await workers.all():
            await bus.pull(QUEUE, 0.2)  # passes the time

    assert await workers.get("edit.w") is None
    assert await workers.latest("edit.w") is None
    await workers.put("edit.w", b"b", 0)


async def test_ready_is_true_while_it_answers(bus: Bus) -> None:
    assert await bus.ready()


async def test_the_oldest_message_on_a_subject_is_found_as_long_as_it_is_there(bus: Bus) -> None:
    subject, other = topology.subject_of_webhook("j1"), topology.subject_of_webhook("j2")
    assert await bus.first(topology.WEBHOOKS, subject) is None
    for number, where in enumerate((other, subject, other, subject)):
        await bus.publish(where, b"%d" % number, message_id=f"w{number}")

    assert (await bus.first(topology.WEBHOOKS, subject)).body == b"1"
    await (await taken(bus, topology.GATEWAY_WEBHOOKS)).ack()
    await (await taken(bus, topology.GATEWAY_WEBHOOKS)).ack()
    assert (await bus.first(topology.WEBHOOKS, subject)).body == b"3"
    assert (await bus.first(topology.WEBHOOKS, other)).body == b"2"


# ── for those who died ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_was_handed_out_and_not_settled_is_told_and_can_be_handed_back_by_anybody(bus: Bus) -> None:
    for job in ("j1", "j2", "j3"):
        await queued(bus, job)
    first, second = await taken(bus), await taken(bus)
    await first.ack()

    assert [held.seq for held in await bus.unsettled(QUEUE)] == [second.seq]
    await bus.hand_back(QUEUE, second.seq)

    again = await taken(bus)
    assert (again.seq, again.num_delivered) == (second.seq, 2)
    await again.ack()
    assert await bus.unsettled(QUEUE) == []


async def test_what_nobody_was_given_yet_is_not_among_what_was_not_settled(bus: Bus) -> None:
    for job in ("j1", "j2", "j3"):
        await queued(bus, job)
    first, second = await taken(bus), await taken(bus)
    await second.ack()

    assert [held.seq for held in await bus.unsettled(QUEUE)] == [first.seq]


async def test_whether_anybody_listens_is_known_at_once(bus: Bus) -> None:
    subject = topology.subject_of_worker("edit", "w1")
    assert not await bus.listened(subject)

    feed = await bus.listen(subject)
    assert await bus.listened(subject)

    await feed.close()
    assert not await bus.listened(subject)


async def test_whoever_listens_can_be_asked_and_nobody_is_waited_for_who_is_not_there(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = topology.subject_of_worker("edit", "w1")
    assert await bus.ask(subject, b"j1") is None

    feed = await bus.listen(subject)
    for module in (jetstream, memory):
        monkeypatch.setattr(module, "ANSWER_TIMEOUT", BOUND)
    asking = asyncio.create_task(bus.ask(subject, b"j1"))
    asked = await feed.next(BOUND)
    assert asked is not None
    assert (asked.body, asking.done()) == (b"j1", False)
    await bus.signal(asked.reply, b"at it")
    assert await asking == b"at it"

    for module in (jetstream, memory):
        monkeypatch.setattr(module, "ANSWER_TIMEOUT", 0.2)
    assert await bus.ask(subject, b"j2") is None  # it says nothing
    assert (await feed.next(BOUND)).body == b"j2"
    await feed.close()
    assert await bus.ask(subject, b"j1") is None
