"""What is read of the bus as it comes: signals, and a stream in order."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import nats.errors
import nats.js.errors as js_errors
from nats.aio.subscription import Subscription
from nats.js import api

from vidgen import errors
from vidgen.bus import Stored
from vidgen.natserrors import ConsumerGoneError, cancellable, headers_of, translated

if TYPE_CHECKING:
    from vidgen.jetstream import JetStreamBus

FEED_MEMORY = 60.0  # seconds that the server keeps the place of a feed nobody reads


def _inbox(reply: str) -> str:
    """Where an answer may go: who answers may do so anywhere, and who asks could name what others alone may write."""
    return reply if reply.startswith("_INBOX") else ""


class ListenFeed:
    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription

    async def next(self, wait: float) -> Stored | None:
        try:
            with cancellable():
                msg = await self._subscription.next_msg(timeout=wait)
        except TimeoutError:
            return None
        except nats.errors.Error as exc:
            raise errors.BusError(f"the feed broke: {type(exc).__name__}") from exc
        return Stored(msg.subject, msg.data, 0, datetime.now(UTC), headers_of(msg.headers), _inbox(msg.reply))

    async def close(self) -> None:
        with contextlib.suppress(nats.errors.Error, TimeoutError):
            await self._subscription.unsubscribe()


class FollowFeed:
    """A stream read in order through a throw-away pull consumer.

    nats-py's own ordered consumer is a push consumer and breaks on servers with `js_ack_fc_v2` (FACTS §4). Here the
    place in the stream is ours: whatever goes wrong, the consumer is forgotten and a new one starts behind what was
    seen last, so nothing is left out and nothing comes twice.
    """

    def __init__(self, bus: JetStreamBus, stream: str, subject: str, after: int) -> None:
        self._bus, self._stream, self._subject = bus, stream, subject
        self._seen = after
        self._consumer: str | None = None
        self._delivered = 0

    async def open(self) -> None:
        config = api.ConsumerConfig(
            deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=self._seen + 1,
            filter_subject=self._subject, ack_policy=api.AckPolicy.NONE, mem_storage=True, num_replicas=1,
            inactive_threshold=FEED_MEMORY,
        )  # fmt: skip
        with translated():
            info = await self._bus.jetstream.add_consumer(self._stream, config)
        self._consumer, self._delivered = info.name, 0

    async def next(self, wait: float) -> Stored | None:
        clock = asyncio.get_running_loop().time
        until = clock() + wait
        while True:
            try:
                if self._consumer is None:
                    await self.open()
                wait_left = max(0.0, until - clock())
                msg = await self._bus.take(self._stream, self._consumer or "", wait_left, acked=False)
            except ConsumerGoneError:  # it expired, or the server restarted
                self._consumer = None
                if clock() >= until:
                    return None
                continue
            except BaseException:
                # A message may be on its way to nobody, and this consumer will not send it again.
                self._leave_consumer()
                raise
            if msg is None:
                return None
            meta = msg.metadata
            self._delivered += 1
            if meta.sequence.consumer != self._delivered:  # one was lost on the way
                self._leave_consumer()
                continue
            self._seen = meta.sequence.stream
            return Stored(msg.subject, msg.data, self._seen, meta.timestamp, headers_of(msg.headers))

    async def close(self) -> None:
        if self._consumer is not None:
            consumer, self._consumer = self._consumer, None
            await self._delete(consumer)

    def _leave_consumer(self) -> None:
        """Go on without it. It is deleted all the same: a server takes a thousand of a stream, and keeps it a while."""
        if self._consumer is not None:
            consumer, self._consumer = self._consumer, None
            self._bus.on_the_side(self._delete(consumer))

    async def _delete(self, consumer: str) -> None:
        with contextlib.suppress(nats.errors.Error, js_errors.Error, TimeoutError, OSError), cancellable():
            await self._bus.jetstream.delete_consumer(self._stream, consumer)
