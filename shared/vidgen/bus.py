"""The seam to the bus, and JetStream behind it. No nats-py exception passes it.

`vidgen.testing.MemoryBus` is the double; `tests/contract` runs one suite against both.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

import nats
import nats.errors
import nats.js.errors as js_errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext, api
from nats.js.kv import KeyValue

from vidgen import errors, topology

log = logging.getLogger(__name__)

PUBLISH_PATIENCE = 20.0  # a leader change in R3 takes 5–8 s (FACTS §4)
REQUEST_TIMEOUT = 5.0
PULL_WAIT = 4.0  # a restart of the server during a pull is noticed only at its end
WRONG_LAST_SEQUENCE = 10071
STORE_FAILED = 10077
FULL_CODES = frozenset({10023, 10047, STORE_FAILED})


@dataclass(frozen=True)
class Stored:
    """A message as a stream keeps it; `seq` is 0 where it came past on core NATS."""

    subject: str
    body: bytes
    seq: int
    at: datetime
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Depth:
    """How full a consumer's queue is."""

    pending: int
    ack_pending: int
    redelivered: int
    oldest_at: datetime | None

    @property
    def waiting(self) -> int:
        return self.pending + self.ack_pending


class Delivery(Protocol):
    """A message taken from a consumer, to be settled exactly once."""

    subject: str
    body: bytes
    seq: int
    at: datetime
    num_delivered: int
    headers: dict[str, str]

    async def ack(self) -> None:
        """Settle, and know that the server heard it; raises BusError."""

    async def nak(self, delay: float = 0.0) -> None:
        """Hand back, to be delivered again after `delay` seconds."""

    async def in_progress(self) -> None:
        """Renew the lease by `ack_wait`, and know that the server heard it; raises BusError."""


class Feed(Protocol):
    """Messages as they come."""

    async def next(self, wait: float) -> Stored | None:
        """The next one, or None when `wait` seconds brought none; raises BusError when the bus is lost."""

    async def close(self) -> None: ...


class Records(Protocol):
    """A KV bucket, written by compare-and-set."""

    async def get(self, key: str) -> tuple[bytes, int] | None:
        """Value and revision."""

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
        the subject takes one message and holds it.
        """  # fmt: skip

    async def pull(self, consumer: topology.Consumer, wait: float = PULL_WAIT) -> Delivery | None:
        """Take one message; with `wait` 0 only what is there now."""

    async def last(self, stream: str, subject: str) -> Stored | None:
        """The newest message on `subject`, read from the stream's leader."""

    async def tail(self, stream: str, before: int | None, limit: int) -> list[Stored]:
        """Up to `limit` messages, newest first, with sequences under `before` (None: from the end)."""

    async def get(self, stream: str, seq: int) -> Stored | None: ...

    async def delete(self, stream: str, seq: int) -> bool: ...

    async def purge(self, stream: str, subject: str) -> int:
        """Remove what waits on `subject`; the number removed."""

    async def follow(self, stream: str, subject: str, after: int = 0) -> Feed:
        """Everything on `subject` past sequence `after`, then what comes, in order and without gaps."""

    async def signal(self, subject: str, body: bytes) -> None:
        """Fire and forget, for whoever listens now; a stream on `subject` stores it."""

    async def listen(self, subject: str) -> Feed: ...

    async def depth(self, consumer: topology.Consumer) -> Depth: ...

    def records(self, bucket: str) -> Records: ...

    async def ready(self) -> bool:
        """Whether the bus answers now."""


@contextlib.contextmanager
def _translated() -> Any:
    try:
        yield
    except js_errors.APIError as exc:
        raise _from_api(exc) from exc
    except (nats.errors.Error, js_errors.Error, TimeoutError, OSError) as exc:
        raise errors.BusError(f"the bus did not answer: {type(exc).__name__}") from exc


def _from_api(exc: js_errors.APIError) -> errors.VidgenError:
    if exc.err_code == WRONG_LAST_SEQUENCE:
        return errors.ConflictError()
    if exc.err_code == STORE_FAILED and "per subject" in (exc.description or ""):
        return errors.ConflictError("a message already waits on this subject", code="already_queued")
    if exc.err_code in FULL_CODES:
        return errors.QueueFullError(f"the bus is full: {exc.description}")
    return errors.BusError(f"the bus refused: {exc.description}")


def _is_gone(exc: js_errors.APIError) -> bool:
    return exc.code == 404


class JetStreamDelivery:
    def __init__(self, client: Client, msg: Msg) -> None:
        meta = msg.metadata
        self._client, self._msg = client, msg
        self.subject, self.body = msg.subject, msg.data
        self.seq, self.num_delivered = meta.sequence.stream, meta.num_delivered
        self.at = meta.timestamp
        self.headers = dict(msg.headers or {})

    async def ack(self) -> None:
        await self._settle(b"+ACK")

    async def nak(self, delay: float = 0.0) -> None:
        await self._settle(b"-NAK" + (json.dumps({"delay": int(delay * 1e9)}).encode() if delay else b""))

    async def in_progress(self) -> None:
        await self._settle(b"+WPI")

    async def _settle(self, verb: bytes) -> None:
        with _translated():
            await self._client.request(self._msg.reply, verb, timeout=REQUEST_TIMEOUT)


class SubscriptionFeed:
    def __init__(self, subscription: Any, *, stored: bool) -> None:
        self._subscription, self._stored = subscription, stored

    async def next(self, wait: float) -> Stored | None:
        try:
            msg = await self._subscription.next_msg(timeout=wait)
        except TimeoutError:
            return None
        except (nats.errors.Error, js_errors.Error) as exc:
            raise errors.BusError(f"the feed broke: {type(exc).__name__}") from exc
        if not self._stored:
            return Stored(msg.subject, msg.data, 0, datetime.now(UTC), dict(msg.headers or {}))
        meta = msg.metadata
        return Stored(msg.subject, msg.data, meta.sequence.stream, meta.timestamp, dict(msg.headers or {}))

    async def close(self) -> None:
        with contextlib.suppress(nats.errors.Error, js_errors.Error, TimeoutError):
            await self._subscription.unsubscribe()


class JetStreamRecords:
    def __init__(self, js: JetStreamContext, bucket: str) -> None:
        self._js, self._bucket = js, bucket
        self._kv: KeyValue | None = None

    async def _open(self) -> KeyValue:
        if self._kv is None:
            self._kv = await self._js.key_value(self._bucket)
        return self._kv

    async def get(self, key: str) -> tuple[bytes, int] | None:
        with _translated():
            try:
                entry = await (await self._open()).get(key)
            except js_errors.KeyNotFoundError:
                return None
        # A key that expired with a limit marker comes back without a value.
        return None if entry.value is None else (entry.value, entry.revision or 0)

    async def put(self, key: str, value: bytes, revision: int | None = None) -> int:
        with _translated():
            kv = await self._open()
            try:
                if revision is None:
                    return await kv.put(key, value)
                return await (kv.update(key, value, last=revision) if revision else kv.create(key, value))
            except js_errors.KeyWrongLastSequenceError as exc:
                raise errors.ConflictError from exc

    async def all(self) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        with _translated():
            watcher = await (await self._open()).watchall(ignore_deletes=True)
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT):
                    async for entry in watcher:
                        if entry is None:
                            break
                        if entry.value is not None:
                            found[entry.key] = entry.value
            finally:
                await watcher.stop()  # type: ignore[no-untyped-call]
        return found


class JetStreamBus:
    """The bus on NATS JetStream, over one connection."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._js = client.jetstream(timeout=REQUEST_TIMEOUT)
        self._records: dict[str, JetStreamRecords] = {}

    async def publish(
        self, subject: str, body: bytes, *, message_id: str, expect_last: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> int:  # fmt: skip
        sent = {**(headers or {}), "Nats-Msg-Id": message_id}
        if expect_last is not None:
            sent["Nats-Expected-Last-Subject-Sequence"] = str(expect_last)
        loop = asyncio.get_running_loop()
        give_up, pause = loop.time() + PUBLISH_PATIENCE, 0.05
        while True:
            try:
                with _translated():
                    ack = await self._js.publish(subject, body, timeout=REQUEST_TIMEOUT, headers=sent)
                return ack.seq
            except errors.QueueFullError:
                raise
            except errors.BusError:
                # The publish may be stored all the same: only the same message id makes trying again harmless.
                if loop.time() + pause > give_up or self._client.is_closed:
                    raise
                await asyncio.sleep(pause)
                pause = min(1.0, pause * 2)

    async def pull(self, consumer: topology.Consumer, wait: float = PULL_WAIT) -> Delivery | None:
        ask: dict[str, Any] = {"batch": 1}
        ask |= {"expires": int(wait * 1e9)} if wait else {"no_wait": True}
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{consumer.stream}.{consumer.name}"
        with _translated():
            msg = await self._client.request(
                subject, json.dumps(ask).encode(), timeout=wait + REQUEST_TIMEOUT, old_style=True
            )
        status = (msg.headers or {}).get("Status")
        if status is None:
            return JetStreamDelivery(self._client, msg)
        if status in ("404", "408", "409"):  # nothing there · the wait is over · the consumer moved
            return None
        raise errors.BusError(f"the bus did not give a message: status {status}")

    async def last(self, stream: str, subject: str) -> Stored | None:
        return await self._get(stream, subject=subject)

    async def get(self, stream: str, seq: int) -> Stored | None:
        return await self._get(stream, seq=seq)

    async def _get(self, stream: str, **query: Any) -> Stored | None:
        with _translated():
            try:
                raw = await self._js.get_msg(stream, **query)
            except js_errors.APIError as exc:
                if _is_gone(exc):
                    return None
                raise
        at = raw.time if isinstance(raw.time, datetime) else datetime.now(UTC)
        return Stored(raw.subject or "", raw.data or b"", raw.seq or 0, at, dict(raw.headers or {}))

    async def tail(self, stream: str, before: int | None, limit: int) -> list[Stored]:
        with _translated():
            state = (await self._js.stream_info(stream)).state
        at = min(state.last_seq, before - 1 if before is not None else state.last_seq)
        found: list[Stored] = []
        while at >= max(1, state.first_seq) and len(found) < limit:
            low = max(state.first_seq, at - limit + 1, 1)
            read = await asyncio.gather(*(self.get(stream, seq) for seq in range(at, low - 1, -1)))
            found += [message for message in read if message is not None]
            at = low - 1
        return found[:limit]

    async def delete(self, stream: str, seq: int) -> bool:
        with _translated():
            try:
                return await self._js.delete_msg(stream, seq)
            except js_errors.APIError as exc:
                if _is_gone(exc) or "no message found" in (exc.description or ""):
                    return False
                raise

    async def purge(self, stream: str, subject: str) -> int:
        with _translated():
            answer = await self._client.request(
                f"$JS.API.STREAM.PURGE.{stream}", json.dumps({"filter": subject}).encode(), timeout=REQUEST_TIMEOUT
            )
        return int(json.loads(answer.data).get("purged", 0))

    async def follow(self, stream: str, subject: str, after: int = 0) -> Feed:
        config = api.ConsumerConfig(
            deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=after + 1, inactive_threshold=30
        )
        with _translated():
            subscription = await self._js.subscribe(subject, stream=stream, ordered_consumer=True, config=config)
        return SubscriptionFeed(subscription, stored=True)

    async def signal(self, subject: str, body: bytes) -> None:
        with _translated():
            await self._client.publish(subject, body)

    async def listen(self, subject: str) -> Feed:
        with _translated():
            subscription = await self._client.subscribe(subject)
            await self._client.flush(timeout=int(REQUEST_TIMEOUT))
        return SubscriptionFeed(subscription, stored=False)

    async def depth(self, consumer: topology.Consumer) -> Depth:
        with _translated():
            info = await self._js.consumer_info(consumer.stream, consumer.name)
        pending, ack_pending = info.num_pending or 0, info.num_ack_pending or 0
        oldest = None
        if pending + ack_pending and consumer.filter_subject:
            first = await self._get(consumer.stream, seq=1, subject=consumer.filter_subject, next=True)
            oldest = first.at if first else None
        return Depth(pending, ack_pending, info.num_redelivered or 0, oldest)

    def records(self, bucket: str) -> Records:
        return self._records.setdefault(bucket, JetStreamRecords(self._js, bucket))

    async def ready(self) -> bool:
        try:
            with _translated():
                await self._js.stream_info(topology.REQUESTS)
        except errors.VidgenError:
            return False
        return True

    @property
    def client(self) -> Client:
        return self._client


@contextlib.asynccontextmanager
async def connect(
    url: str, name: str, *, on_denied: Callable[[str], None] | None = None, **options: Any
) -> AsyncIterator[JetStreamBus]:
    """A bus on a live connection that reconnects for ever, drained at the end; raises BusError if there is none now.

    `on_denied` hears of a permission that this identity lacks: a configuration error that shows as time-outs only.
    """

    async def failed(exc: Exception) -> None:
        text = str(exc)
        log.warning("bus: %s", text or type(exc).__name__)
        if on_denied is not None and "permissions violation" in text.lower():
            on_denied(text)

    try:
        client = await nats.connect(
            url, name=name, error_cb=failed, ping_interval=10, max_outstanding_pings=2, max_reconnect_attempts=-1,
            reconnect_time_wait=1, connect_timeout=5, allow_reconnect=True, inbox_prefix=f"_INBOX_{name}".encode(),
            **options,
        )  # fmt: skip
    except (nats.errors.Error, TimeoutError, OSError) as exc:
        raise errors.BusError(f"no NATS server answers at {_without_credentials(url)}: {exc}") from exc
    try:
        yield JetStreamBus(client)
    finally:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(client.drain(), 5)
        if not client.is_closed:
            await client.close()


def _without_credentials(url: str) -> str:
    return url.rsplit("@", 1)[-1]


async def bootstrap(bus: JetStreamBus, wanted: topology.Topology) -> None:
    """Create what is missing and check what is there; raises FatalError on a difference that may not be repaired."""
    js = bus.client.jetstream(timeout=REQUEST_TIMEOUT)
    for stream in wanted.streams:
        await _ensure_stream(js, stream, wanted.replicas)
    for consumer in wanted.consumers:
        await _ensure_consumer(js, consumer, wanted.ack_wait)
    for bucket in wanted.buckets:
        await _ensure_bucket(js, bucket, wanted.replicas)


async def _ensure_stream(js: JetStreamContext, stream: topology.Stream, replicas: int) -> None:
    config = api.StreamConfig(
        name=stream.name, subjects=list(stream.subjects), retention=api.RetentionPolicy(stream.retention),
        storage=api.StorageType(stream.storage), discard=api.DiscardPolicy(stream.discard), max_age=stream.max_age,
        max_bytes=stream.max_bytes, max_msgs_per_subject=stream.max_msgs_per_subject,
        discard_new_per_subject=stream.discard_new_per_subject, num_replicas=replicas, allow_direct=True,
        duplicate_window=min(stream.duplicate_window, stream.max_age or stream.duplicate_window),
    )  # fmt: skip
    with _translated():
        try:
            found = (await js.stream_info(stream.name)).config
        except js_errors.NotFoundError:
            await js.add_stream(config)
            return
    differ = [
        name for name in ("retention", "storage", "discard", "discard_new_per_subject", "max_msgs_per_subject")
        if getattr(found, name) != getattr(config, name) and (getattr(found, name) or getattr(config, name))
    ]  # fmt: skip
    if sorted(found.subjects or []) != sorted(config.subjects or []):
        differ.append("subjects")
    if differ:
        raise errors.FatalError(
            f"stream {stream.name} exists with another {', '.join(differ)}: drain it and delete it, or use another bus",
            code="topology_mismatch",
        )


async def _ensure_consumer(js: JetStreamContext, consumer: topology.Consumer, ack_wait: float) -> None:
    config = api.ConsumerConfig(
        durable_name=consumer.name, ack_policy=api.AckPolicy.EXPLICIT, ack_wait=ack_wait,
        max_deliver=consumer.max_deliver, max_ack_pending=consumer.max_ack_pending,
        filter_subject=consumer.filter_subject, max_waiting=2048,
    )  # fmt: skip
    with _translated():
        try:
            found = (await js.consumer_info(consumer.stream, consumer.name)).config
        except js_errors.NotFoundError:
            await js.add_consumer(consumer.stream, config)
            return
    if found.filter_subject != config.filter_subject or found.ack_policy != config.ack_policy:
        raise errors.FatalError(
            f"consumer {consumer.name} of {consumer.stream} exists with another filter or ack policy: delete it",
            code="topology_mismatch",
        )
    if (found.ack_wait, found.max_deliver, found.max_ack_pending) != (
        ack_wait,
        config.max_deliver,
        config.max_ack_pending,
    ):
        with _translated():  # these three may change under way
            await js.add_consumer(consumer.stream, config)


async def _ensure_bucket(js: JetStreamContext, bucket: topology.Bucket, replicas: int) -> None:
    with _translated():
        try:
            await js.key_value(bucket.name)
        except js_errors.NotFoundError:
            await js.create_key_value(
                api.KeyValueConfig(
                    bucket=bucket.name,
                    ttl=bucket.ttl,
                    history=1,
                    storage=api.StorageType(bucket.storage),
                    replicas=replicas,
                    direct=True,
                )
            )
