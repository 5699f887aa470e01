"""What a JetStream server keeps: streams, consumers and buckets, without I/O and without waiting."""

from __future__ import annotations

import bisect
import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from vidgen import errors, topology
from vidgen.bus import Depth, Held, Stored
from vidgen.testing.clock import Clock


def matches(pattern: str, subject: str) -> bool:
    """Whether a subject falls under a pattern with NATS' wildcards `*` and `>`."""
    wanted, given = pattern.split("."), subject.split(".")
    for place, part in enumerate(wanted):
        if part == ">":
            return len(given) > place
        if place >= len(given) or part not in ("*", given[place]):
            return False
    return len(wanted) == len(given)


class MemoryStream:
    """One stream: its messages in order, the ids it has seen, the consumers that read it."""

    def __init__(self, config: topology.Stream, clock: Clock) -> None:
        self.config, self._clock = config, clock
        self.messages: dict[int, Stored] = {}
        self.ids: dict[str, tuple[int, datetime]] = {}
        self.limit: int | None = None
        self.last_seq = 0
        self._sequences: dict[str, list[int]] = {}

    def lose(self) -> None:
        self.messages.clear()
        self.ids.clear()
        self._sequences.clear()
        self.last_seq = 0

    def takes(self, subject: str) -> bool:
        return any(matches(pattern, subject) for pattern in self.config.subjects)

    def publish(self, subject: str, body: bytes, message_id: str, expect_last: int | None, sent: dict[str, str]) -> int:
        if message_id in self.ids:
            seq, at = self.ids[message_id]
            if self._clock.now() - at < timedelta(seconds=self.config.duplicate_window):
                return seq
        held = self._sequences.get(subject, [])
        if expect_last is not None and expect_last != (held[-1] if held else 0):
            raise errors.ConflictError()
        most = self.config.max_msgs_per_subject
        if self.config.discard_new_per_subject and 0 < most <= len(held):
            raise errors.ConflictError("a message already waits on this subject", code="already_queued")
        if self.limit is not None and len(self.messages) >= self.limit:
            if self.config.discard == "new":
                raise errors.QueueFullError("the bus is full: maximum messages exceeded")
            self.remove(next(iter(self.messages)))
        seq = self.store(subject, body, {**sent, "Nats-Msg-Id": message_id})
        self.ids[message_id] = seq, self._clock.now()
        return seq

    def store(self, subject: str, body: bytes, headers: dict[str, str]) -> int:
        self.last_seq += 1
        self.messages[self.last_seq] = Stored(subject, body, self.last_seq, self._clock.now(), headers)
        held = self._sequences.setdefault(subject, [])
        held.append(self.last_seq)
        if 0 < self.config.max_msgs_per_subject < len(held):
            self.remove(held[0])
        return self.last_seq

    def remove(self, seq: int) -> bool:
        found = self.messages.pop(seq, None)
        if found is None:
            return False
        self._sequences[found.subject].remove(seq)
        return True

    def on(self, pattern: str) -> Iterator[Stored]:
        """The messages on a subject or pattern, oldest first."""
        if pattern in self._sequences:
            yield from [self.messages[seq] for seq in self._sequences[pattern]]
        else:
            yield from [stored for stored in self.messages.values() if matches(pattern, stored.subject)]

    def held(self) -> Held:
        limit = self.config.max_bytes if self.config.max_bytes > 0 else None
        return Held(len(self.messages), sum(len(m.subject) + len(m.body) for m in self.messages.values()), limit)

    def after(self, seq: int, pattern: str) -> Stored | None:
        """The oldest message on `pattern` past `seq`."""
        if pattern in self._sequences:
            held = self._sequences[pattern]
            place = bisect.bisect_right(held, seq)
            return self.messages[held[place]] if place < len(held) else None
        if seq >= self.last_seq:
            return None
        return next((m for m in self.messages.values() if m.seq > seq and matches(pattern, m.subject)), None)


class MemoryConsumer:
    """A durable pull consumer with explicit acks, exactly as forgiving as JetStream's: there is no fencing."""

    def __init__(
        self, config: topology.Consumer, ack_wait: float, stream: MemoryStream, clock: Clock,
        advise: Callable[[str, bytes], None],
    ) -> None:  # fmt: skip
        self.config, self.ack_wait, self.stream = config, ack_wait, stream
        self._clock, self._advise = clock, advise
        self._filter = config.filter_subject or ">"
        self._cursor = 0
        self._due: dict[int, float] = {}  # what was delivered and is not settled, and when it is delivered again
        self._deliveries: dict[int, int] = {}

    def lose(self) -> None:
        self._due.clear()
        self._deliveries.clear()
        self._cursor = 0

    def take(self) -> tuple[Stored, int] | None:
        """The next message and how often it was delivered by now."""
        now = self._clock.time()
        self._forget_what_is_gone()
        for seq in [seq for seq, due in self._due.items() if due <= now]:
            if 0 < self.config.max_deliver <= self._deliveries[seq]:
                self._exhaust(seq)
                continue
            return self._deliver(seq, now)
        if 0 < self.config.max_ack_pending <= len(self._due):
            return None
        fresh = self.stream.after(self._cursor, self._filter)
        if fresh is None:
            return None
        self._cursor = fresh.seq
        return self._deliver(fresh.seq, now)

    def next_due(self) -> float | None:
        return min(self._due.values(), default=None)

    def ack(self, seq: int) -> None:
        self._due.pop(seq, None)
        self._deliveries.pop(seq, None)
        if self.stream.config.retention == "workqueue":
            self.stream.remove(seq)

    def nak(self, seq: int, delay: float) -> None:
        if seq in self._due:
            self._due[seq] = self._clock.time() + delay

    def in_progress(self, seq: int) -> None:
        if seq in self._due:
            self._due[seq] = self._clock.time() + self.ack_wait

    def unsettled(self) -> list[Stored]:
        self._forget_what_is_gone()
        return [self.stream.messages[seq] for seq in sorted(self._due)]

    def depth(self) -> Depth:
        self._forget_what_is_gone()
        fresh = [stored for stored in self.stream.on(self._filter) if stored.seq > self._cursor]
        waiting = sorted([*self._due, *(stored.seq for stored in fresh)])
        again = sum(count > 1 for count in self._deliveries.values())
        oldest = self.stream.messages[waiting[0]].at if waiting else None
        pending = fresh[0].at if fresh else None
        return Depth(len(fresh), len(self._due), again, oldest, pending, self._cursor)

    def _deliver(self, seq: int, now: float) -> tuple[Stored, int]:
        self._due[seq] = now + self.ack_wait
        self._deliveries[seq] = self._deliveries.get(seq, 0) + 1
        return self.stream.messages[seq], self._deliveries[seq]

    def _forget_what_is_gone(self) -> None:
        for seq in [seq for seq in self._deliveries if seq not in self.stream.messages]:
            self._due.pop(seq, None)
            del self._deliveries[seq]

    def _exhaust(self, seq: int) -> None:
        # As on the server: the message stays, nothing is pending, and one advisory is all that anybody hears of it.
        del self._due[seq]
        advisory = {
            "type": "io.nats.jetstream.advisory.v1.max_deliver", "id": secrets.token_hex(11),
            "timestamp": self._clock.now().isoformat(), "stream": self.config.stream, "consumer": self.config.name,
            "stream_seq": seq, "deliveries": self._deliveries[seq],
        }  # fmt: skip
        subject = f"$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.{self.config.stream}.{self.config.name}"
        self._advise(subject, json.dumps(advisory).encode())


@dataclass(frozen=True)
class Record:
    value: bytes
    revision: int
    expires: float


class MemoryBucket:
    """A KV bucket whose records end `ttl` seconds after their last write."""

    def __init__(self, config: topology.Bucket, clock: Clock) -> None:
        self.config, self._clock = config, clock
        self._records: dict[str, Record] = {}
        self._revision = 0

    def get(self, key: str) -> Record | None:
        found = self._records.get(key)
        if found is not None and found.expires <= self._clock.time():
            del self._records[key]
            return None
        return found

    def put(self, key: str, value: bytes, revision: int | None) -> int:
        found = self.get(key)
        if revision is not None and revision != (found.revision if found else 0):
            raise errors.ConflictError()
        self._revision += 1
        ttl = self.config.ttl or float("inf")
        self._records[key] = Record(value, self._revision, self._clock.time() + ttl)
        return self._revision

    def held(self) -> Held:
        records = self.all()
        return Held(len(records), sum(len(key) + len(value) for key, value in records.items()), None)

    def all(self) -> dict[str, bytes]:
        found = {key: self.get(key) for key in sorted(self._records)}
        return {key: record.value for key, record in found.items() if record is not None}
