"""The bus in memory, with JetStream's own manners (FACTS §4), its faults at a test's command."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from vidgen import errors, topology, tracing
from vidgen.bus import PULL_WAIT, Delivery, Depth, Feed, Held, Records, Stored, Supply
from vidgen.testing.clock import Clock, RealClock
from vidgen.testing.faults import Faults
from vidgen.testing.streams import MemoryBucket, MemoryConsumer, MemoryStream, matches

ANSWER_TIMEOUT = 1.0


class MemoryBus(Faults):
    """`vidgen.bus.Bus` for one event loop, with everything that the topology names in place.

    Time is the clock's: with a `FakeClock` nothing is redelivered, expires or gives up waiting until the test moves it.
    A stream keeps its messages and ids for ever; records do expire.
    """

    METHODS = frozenset({
        "publish", "pull", "last", "latest", "first", "count", "tail", "get", "delete", "purge", "follow", "signal",
        "listen", "depth", "listened", "ask", "held", "ack", "nak", "unsettled", "hand_back", "in_progress", "next",
        "records.get", "records.latest", "records.put", "records.all",
    })  # fmt: skip
    OUTAGE = errors.BusError

    def __init__(self, wanted: topology.Topology | None = None, *, clock: Clock | None = None) -> None:
        super().__init__()
        wanted = wanted or topology.Topology()
        self.clock = clock or RealClock()
        self._streams = {stream.name: MemoryStream(stream, self.clock) for stream in wanted.streams}
        self._consumers = {
            (consumer.stream, consumer.name): MemoryConsumer(
                consumer, wanted.ack_wait, self._streams[consumer.stream], self.clock, self._advise
            )
            for consumer in wanted.consumers
        }
        self._buckets = {bucket.name: MemoryBucket(bucket, self.clock) for bucket in wanted.buckets}
        self._listeners: list[MemoryListenFeed] = []
        self._changes: set[asyncio.Future[None]] = set()

    # ── for tests ────────────────────────────────────────────────────────────────────────────────────────────────

    def messages(self, stream: str, subject: str = ">") -> list[Stored]:
        """What a stream holds on a subject, oldest first."""
        return list(self._streams[stream].on(subject))

    def forget_ids(self, stream: str) -> None:
        """End the duplicate window: ids seen so far are new again."""
        self._streams[stream].ids.clear()

    def lose(self, stream: str) -> None:
        """Make a stream anew, as where its files are gone: it is empty, and begins at the first sequence."""
        self._streams[stream].lose()
        for (read, _), consumer in self._consumers.items():
            if read == stream:
                consumer.lose()

    def limit(self, stream: str, messages: int | None) -> None:
        """Let a stream hold so many messages and no more: QueueFullError where it discards new ones."""
        self._streams[stream].limit = messages

    @property
    def down(self) -> bool:
        return self._down

    @down.setter
    def down(self, value: bool) -> None:
        self._down = value
        self.changed()  # what waits notices at once

    # ── the seam ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def publish(
        self, subject: str, body: bytes, *, message_id: str, expect_last: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> int:  # fmt: skip
        async with self.call("publish"):
            stream = self._stream_of(subject)
            if stream is None:
                raise errors.BusError("the bus did not answer: no stream takes this subject")
            sent = {**tracing.carried(), **(headers or {})}
            self._pass_on(subject, body, sent)
            seq = stream.publish(subject, body, message_id, expect_last, sent)
            self.changed()
            return seq

    async def pull(self, consumer: topology.Consumer, wait: float = PULL_WAIT) -> Delivery | None:
        return await self.pull_unless(consumer, lambda: False, wait)

    async def pull_unless(
        self, consumer: topology.Consumer, over: Callable[[], bool], wait: float = PULL_WAIT
    ) -> Delivery | None:
        """As `pull`, and None once it is over."""
        async with self.call("pull"):
            state = self._consumer(consumer)
            until = self.clock.time() + wait
            while not over():
                if (taken := state.take()) is not None:
                    return MemoryDelivery(self, state, *taken)
                if self.clock.time() >= until:
                    return None
                due = state.next_due()
                await self.change(until if due is None else min(due, until))
            return None

    def supply(self, consumer: topology.Consumer, batch: int) -> Supply:
        return MemorySupply(self, consumer)

    async def unsettled(self, consumer: topology.Consumer) -> list[Stored]:
        async with self.call("unsettled"):
            return self._consumer(consumer).unsettled()

    async def hand_back(self, consumer: topology.Consumer, seq: int) -> None:
        async with self.call("hand_back"):
            self._consumer(consumer).nak(seq, 0.0)
            self.changed()

    async def last(self, stream: str, subject: str) -> Stored | None:
        async with self.call("last"):
            return next(reversed(list(self._stream(stream).on(subject))), None)

    async def latest(self, stream: str, subject: str) -> Stored | None:
        async with self.call("latest"):
            return next(reversed(list(self._stream(stream).on(subject))), None)

    async def first(self, stream: str, subject: str, after: int = 0) -> Stored | None:
        async with self.call("first"):
            return self._stream(stream).after(after, subject)

    async def count(self, stream: str, subject: str, after: int = 0) -> int:
        async with self.call("count"):
            return sum(message.seq > after for message in self._stream(stream).on(subject))

    async def tail(self, stream: str, before: int | None, limit: int, subject: str | None = None) -> list[Stored]:
        async with self.call("tail"):
            held = [m for m in self._stream(stream).on(subject or ">") if before is None or m.seq < before]
            return held[::-1][:limit]

    async def get(self, stream: str, seq: int) -> Stored | None:
        async with self.call("get"):
            return self._stream(stream).messages.get(seq)

    async def delete(self, stream: str, seq: int) -> bool:
        async with self.call("delete"):
            return self._stream(stream).remove(seq)

    async def purge(self, stream: str, subject: str) -> int:
        async with self.call("purge"):
            found = self._stream(stream)
            return sum(found.remove(message.seq) for message in list(found.on(subject)))

    async def follow(self, stream: str, subject: str, after: int = 0) -> Feed:
        async with self.call("follow"):
            return MemoryFollowFeed(self, self._stream(stream), subject, after)

    async def signal(self, subject: str, body: bytes) -> None:
        async with self.call("signal"):
            self._advise(subject, body)

    async def listen(self, subject: str) -> Feed:
        async with self.call("listen"):
            feed = MemoryListenFeed(self, subject)
            self._listeners.append(feed)
            return feed

    async def listened(self, subject: str) -> bool:
        async with self.call("listened"):
            return any(matches(feed.subject, subject) for feed in self._listeners)

    async def ask(self, subject: str, body: bytes) -> bytes | None:
        async with self.call("ask"):
            if not any(matches(feed.subject, subject) for feed in self._listeners):
                return None
            inbox = MemoryListenFeed(self, f"_INBOX.{self.calls['ask']}")
            self._listeners.append(inbox)
            self._pass_on(subject, body, None, inbox.subject)
            self.changed()
        try:
            answer = await inbox.next(ANSWER_TIMEOUT)
            return None if answer is None else answer.body
        finally:
            await inbox.close()

    async def depth(self, consumer: topology.Consumer) -> Depth:
        async with self.call("depth"):
            return self._consumer(consumer).depth()

    async def held(self, stream: str) -> Held:
        async with self.call("held"):
            bucket = self._buckets.get(stream.removeprefix("KV_"))
            return self._stream(stream).held() if bucket is None else bucket.held()

    def records(self, bucket: str) -> Records:
        return MemoryRecords(self, self._buckets[bucket])

    async def ready(self) -> bool:
        return not self.down

    # ── for the parts below ──────────────────────────────────────────────────────────────────────────────────────

    def changed(self) -> None:
        """Let those who wait look again."""
        for change in self._changes:
            if not change.done():
                change.set_result(None)

    async def change(self, until: float) -> None:
        """Wait for `changed`, at most until a time; raises BusError if the bus is down then."""
        change: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changes.add(change)
        try:
            await self.clock.wait(change, until)
        finally:
            self._changes.discard(change)
        if self.down:
            raise self._outage()

    def stop_listening(self, feed: MemoryListenFeed) -> None:
        if feed in self._listeners:
            self._listeners.remove(feed)

    def _stream_of(self, subject: str) -> MemoryStream | None:
        return next((stream for stream in self._streams.values() if stream.takes(subject)), None)

    def _stream(self, name: str) -> MemoryStream:
        if name not in self._streams:
            raise errors.BusError("the bus refused: stream not found")
        return self._streams[name]

    def _consumer(self, consumer: topology.Consumer) -> MemoryConsumer:
        found = self._consumers.get((consumer.stream, consumer.name))
        if found is None:
            raise errors.BusError("the consumer is not there: start a gateway, it creates what is missing")
        return found

    def _advise(self, subject: str, body: bytes) -> None:
        """Send a message without an id, as core NATS does: stored where a stream takes its subject."""
        self._pass_on(subject, body, None)
        stream = self._stream_of(subject)
        if stream is not None:
            stream.store(subject, body, {})
        self.changed()

    def _pass_on(self, subject: str, body: bytes, headers: dict[str, str] | None, reply: str = "") -> None:
        for feed in self._listeners:
            if matches(feed.subject, subject):
                feed.arrived.append(Stored(subject, body, 0, self.clock.now(), dict(headers or {}), reply))


class MemoryDelivery:
    def __init__(self, bus: MemoryBus, consumer: MemoryConsumer, stored: Stored, num_delivered: int) -> None:
        self._bus, self._consumer = bus, consumer
        self.subject, self.body, self.seq, self.at = stored.subject, stored.body, stored.seq, stored.at
        self.headers, self.num_delivered = dict(stored.headers), num_delivered
        self.settled = False

    async def ack(self, heard: bool = True) -> None:
        self.settled = True
        async with self._bus.call("ack"):
            self._consumer.ack(self.seq)
            self._bus.changed()

    async def nak(self, delay: float = 0.0) -> None:
        self.settled = True
        async with self._bus.call("nak"):
            self._consumer.nak(self.seq, delay)
            self._bus.changed()

    async def in_progress(self) -> None:
        async with self._bus.call("in_progress"):
            self._consumer.in_progress(self.seq)


class MemorySupply:
    """Takes each message when it is wanted: here nothing is gained by taking it before."""

    def __init__(self, bus: MemoryBus, consumer: topology.Consumer) -> None:
        self._bus, self._consumer, self._closed = bus, consumer, False

    async def next(self) -> Delivery | None:
        while not self._closed:
            if (taken := await self._bus.pull_unless(self._consumer, lambda: self._closed)) is not None:
                return taken
        return None

    async def close(self) -> None:
        self._closed = True
        self._bus.changed()


class MemoryFollowFeed:
    def __init__(self, bus: MemoryBus, stream: MemoryStream, subject: str, after: int) -> None:
        self._bus, self._stream, self._subject, self._seen = bus, stream, subject, after

    async def next(self, wait: float) -> Stored | None:
        async with self._bus.call("next"):
            until = self._bus.clock.time() + wait
            while (found := self._stream.after(self._seen, self._subject)) is None:
                if self._bus.clock.time() >= until:
                    return None
                await self._bus.change(until)
            self._seen = found.seq
            return found

    async def close(self) -> None: ...


class MemoryListenFeed:
    def __init__(self, bus: MemoryBus, subject: str) -> None:
        self._bus, self.subject = bus, subject
        self.arrived: deque[Stored] = deque()

    async def next(self, wait: float) -> Stored | None:
        async with self._bus.call("next"):
            until = self._bus.clock.time() + wait
            while not self.arrived:
                if self._bus.clock.time() >= until:
                    return None
                await self._bus.change(until)
            return self.arrived.popleft()

    async def close(self) -> None:
        self._bus.stop_listening(self)


class MemoryRecords:
    def __init__(self, bus: MemoryBus, bucket: MemoryBucket) -> None:
        self._bus, self._bucket = bus, bucket

    async def get(self, key: str) -> tuple[bytes, int] | None:
        async with self._bus.call("records.get"):
            found = self._bucket.get(key)
            return None if found is None else (found.value, found.revision)

    async def latest(self, key: str) -> tuple[bytes, int] | None:
        async with self._bus.call("records.latest"):
            found = self._bucket.get(key)
            return None if found is None else (found.value, found.revision)

    async def put(self, key: str, value: bytes, revision: int | None = None) -> int:
        async with self._bus.call("records.put"):
            return self._bucket.put(key, value, revision)

    async def all(self) -> dict[str, bytes]:
        async with self._bus.call("records.all"):
            return self._bucket.all()
