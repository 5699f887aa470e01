"""The seam to the bus: what the services ask of it.

`vidgen.jetstream` is the real one, `vidgen.testing.MemoryBus` its double; `tests/contract` runs one suite against both.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from vidgen import topology

PULL_WAIT = 4.0


@dataclass(frozen=True)
class Stored:
    """A message as a stream keeps it; `seq` is 0 where it came past on core NATS.

    `reply` is where an answer is waited for: whoever was asked (`Bus.ask`) may `signal` there.
    """

    subject: str
    body: bytes
    seq: int
    at: datetime
    headers: dict[str, str] = field(default_factory=dict)
    reply: str = ""


@dataclass(frozen=True)
class Depth:
    """How full a consumer's queue is.

    `oldest_at` is the oldest message that waits or is held, `oldest_pending_at` the oldest that was never delivered;
    `delivered` is the sequence up to which messages were handed out.
    """

    pending: int
    ack_pending: int
    redelivered: int
    oldest_at: datetime | None
    oldest_pending_at: datetime | None = None
    delivered: int = 0

    @property
    def waiting(self) -> int:
        return self.pending + self.ack_pending


@dataclass(frozen=True)
class Held:
    """What a stream holds; `limit` is the bytes that it may hold, None where only the server's disk limits it."""

    messages: int
    bytes: int
    limit: int | None


class Delivery(Protocol):
    """A message taken from a consumer, to be settled exactly once."""

    subject: str
    body: bytes
    seq: int
    at: datetime
    num_delivered: int
    headers: dict[str, str]
    settled: bool  # or about to be: what comes from here on is another delivery

    async def ack(self, heard: bool = True) -> None:
        """Settle, and know that the server heard it; raises BusError.

        Without `heard` the server is told and not asked: what is lost on the way comes again.
        """

    async def nak(self, delay: float = 0.0) -> None:
        """Hand back, to be delivered again after `delay` seconds."""

    async def in_progress(self) -> None:
        """Renew the lease by `ack_wait`, and know that the server heard it; raises BusError."""


class Supply(Protocol):
    """What a consumer gives out, taken several at a time, for those who handle many at once."""

    async def next(self) -> Delivery | None:
        """The next message, however long it takes; None once closed.

        Raises BusError when the bus is lost; the next call goes on.
        """

    async def close(self) -> None:
        """Take no more: those who wait get None, and what came and nobody took is handed back."""


class Feed(Protocol):
    """Messages as they come."""

    async def next(self, wait: float) -> Stored | None:
        """The next one, or None when `wait` seconds brought none.

        Raises BusError when the bus is lost; a feed of `follow` goes on where it was at the next call.
        """

    async def close(self) -> None: ...


class Records(Protocol):
    """A KV bucket, written by compare-and-set."""

    async def get(self, key: str) -> tuple[bytes, int] | None:
        """Value and revision, from whichever node has it: on a bus of several they may be a moment old."""

    async def latest(self, key: str) -> tuple[bytes, int] | None:
        """As `get`, from the leader if it answers soon. Costs the bus more, and does not wait for what is written."""

    async def put(self, key: str, value: bytes, revision: int | None = None) -> int:
        """Write if the record is at `revision` (0: must not exist; None: whatever); raises ConflictError."""

    async def all(self) -> dict[str, bytes]:
        """Every live record: only for buckets that stay small."""


class Bus(Protocol):
    """Streams, consumers and records. Each method raises BusError when the bus does not answer."""

    async def publish(
        self,
        subject: str,
        body: bytes,
        *,
        message_id: str,
        expect_last: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> int:
        """Store, and return the sequence; a second publish of `message_id` is dropped and answers as the first.

        With `expect_last` it is stored only if that is the newest sequence on `subject` (0: none yet), else
        ConflictError. QueueFullError where a limit of the stream is reached; ConflictError `already_queued` where
        the subject takes one message and holds it. Inside a span its headers carry that span's trace.
        """  # fmt: skip

    async def pull(self, consumer: topology.Consumer, wait: float = PULL_WAIT) -> Delivery | None:
        """Take one message; with `wait` 0 only what is there now.

        A pull that is cancelled hands back what it was about to take.
        """

    def supply(self, consumer: topology.Consumer, batch: int) -> Supply:
        """A consumer's messages for as long as they are wanted, at most `batch` of them waiting to be taken."""

    async def unsettled(self, consumer: topology.Consumer) -> list[Stored]:
        """What a work queue's consumer handed out and nobody settled, oldest first; also what waits after a nak."""

    async def hand_back(self, consumer: topology.Consumer, seq: int) -> None:
        """What `nak` is to a delivery, for a message whose holder can no longer say so; it must be unsettled."""

    async def last(self, stream: str, subject: str) -> Stored | None:
        """The newest message on `subject`, read from the stream's leader."""

    async def latest(self, stream: str, subject: str) -> Stored | None:
        """As `last`; where the leader does not answer soon, from whichever node has it, maybe a moment old."""

    async def first(self, stream: str, subject: str, after: int = 0) -> Stored | None:
        """The oldest message past sequence `after` on a subject or a pattern."""

    async def count(self, stream: str, subject: str, after: int = 0) -> int:
        """How many messages past sequence `after` are on a subject or a pattern; one question, however many."""

    async def tail(self, stream: str, before: int | None, limit: int, subject: str | None = None) -> list[Stored]:
        """Up to `limit` messages, newest first, with sequences under `before` (None: from the end).

        With `subject`, a subject or a pattern, those on it alone, at a cost that hardly grows with what lies between.
        """

    async def get(self, stream: str, seq: int) -> Stored | None: ...

    async def delete(self, stream: str, seq: int) -> bool: ...

    async def purge(self, stream: str, subject: str) -> int:
        """Remove what waits on `subject`; the number removed."""

    async def follow(self, stream: str, subject: str, after: int = 0) -> Feed:
        """Everything on `subject` past sequence `after`, then what comes, in order and without gaps."""

    async def signal(self, subject: str, body: bytes) -> None:
        """Fire and forget, for whoever listens now; a stream on `subject` stores it."""

    async def listen(self, subject: str) -> Feed: ...

    async def listened(self, subject: str) -> bool:
        """Whether anybody listens on `subject` now; True where the bus cannot say."""

    async def ask(self, subject: str, body: bytes) -> bytes | None:
        """The answer of whoever listens on `subject`; None where nobody does, or says nothing for a second."""

    async def depth(self, consumer: topology.Consumer) -> Depth: ...

    async def held(self, stream: str) -> Held: ...

    def records(self, bucket: str) -> Records: ...

    async def ready(self) -> bool:
        """Whether the bus answers now."""


async def each(bus: Bus, stream: str, subject: str = ">") -> AsyncIterator[Stored]:
    """Everything that a stream holds on a subject or a pattern, oldest first, one question a message.

    Where one has waited for long, what came and went since costs nothing; `tail` would ask for all of that.
    """
    after = 0
    while (message := await bus.first(stream, subject, after)) is not None:
        yield message
        after = message.seq
