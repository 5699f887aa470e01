"""The bus on NATS JetStream. No nats-py exception passes it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nats.errors
import nats.js.errors as js_errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext, api

from vidgen import errors, permissions, topology, tracing
from vidgen.bus import PULL_WAIT, Delivery, Depth, Feed, Held, Records, Stored, Supply
from vidgen.inboxes import PullInbox, Requester, Sink

log = logging.getLogger("vidgen.bus")

PUBLISH_PATIENCE = 20.0  # a leader change in R3 takes 5–8 s (FACTS §4)
REQUEST_TIMEOUT = 5.0
READY_TIMEOUT = 2.0
FIRST_CONNECT_ATTEMPTS = 2  # beyond the first one, a second apart
FIRST_CONNECT_LIMIT = 30.0  # for all of them: a TLS handshake that fails may leave nats-py waiting for ever
LISTENED_TIMEOUT = 1.0  # for an answer that nobody gives: that nobody is there, the server says at once
FEED_MEMORY = 60.0  # seconds that the server keeps the place of a feed nobody reads
RECORDS_AT_ONCE = 64
NOT_SECURE = "the bus speaks no TLS, and the settings want it"
SUPPLY_WAIT = 30.0  # seconds that a pull for several messages stays open
ASK_AGAIN = 0.5  # seconds after a pull that the bus did not answer
LAST_CALL = 0.1  # seconds that a pull which was given up still listens

WRONG_LAST_SEQUENCE = frozenset({10071, 10164})  # alone · in a cluster
SEQUENCE_NOT_FOUND = frozenset({10037, 10043, 10057})  # never was · deleted · past the end
STORE_FAILED = 10077
KEY = re.compile(r"(?!\.)[-/_=.a-zA-Z0-9]+(?<!\.)")
ADDED_BY_SERVER = frozenset({"Nats-Stream", "Nats-Subject", "Nats-Sequence", "Nats-Time-Stamp"})  # to a direct get
FULL_CODES = frozenset({10023, 10028, 10047, STORE_FAILED})


class _ConsumerGoneError(errors.BusError):
    """The consumer is not there."""


@contextlib.contextmanager
def cancellable() -> Iterator[None]:
    """Let a cancel through that comes in the same moment as the answer.

    nats-py waits with `asyncio.wait_for`, which before Python 3.12 swallows such a cancel: a loop would go on for ever.
    """
    task = asyncio.current_task()
    before = 0 if task is None else task.cancelling()
    try:
        yield
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError


@contextlib.contextmanager
def translated() -> Iterator[None]:
    try:
        with cancellable():
            yield
    except js_errors.APIError as exc:
        raise _from_api(exc) from exc
    except nats.errors.MaxPayloadError as exc:
        raise errors.RejectedError(
            "the message is larger than the bus takes: send object keys, not contents", code="too_large"
        ) from exc
    except (nats.errors.BadSubjectError, nats.errors.BadHeaderError, js_errors.InvalidKeyError) as exc:
        raise errors.RejectedError(
            "the bus takes no such name: use letters, digits, - and _ only", code="bad_name"
        ) from exc
    except (nats.errors.Error, js_errors.Error, TimeoutError, OSError) as exc:
        raise errors.BusError(f"the bus did not answer: {type(exc).__name__}") from exc


def _from_api(exc: js_errors.APIError) -> errors.VidgenError:
    # nats-py leaves these unset on some of its own errors.
    code, text = getattr(exc, "err_code", None), getattr(exc, "description", None) or type(exc).__name__
    if code in WRONG_LAST_SEQUENCE or isinstance(exc, js_errors.KeyWrongLastSequenceError):
        return errors.ConflictError()
    if code == STORE_FAILED and "per subject" in text:
        return errors.ConflictError("a message already waits on this subject", code="already_queued")
    if code in FULL_CODES:
        return errors.QueueFullError(f"the bus is full: {text}")
    return errors.BusError(f"the bus refused: {text}")


def _headers(found: Mapping[Any, Any] | None) -> dict[str, str]:
    return {str(name): str(value) for name, value in (found or {}).items()}


class JetStreamDelivery:
    def __init__(self, client: Client, msg: Msg) -> None:
        meta = msg.metadata
        self._client, self._msg = client, msg
        self.subject, self.body = msg.subject, msg.data
        self.seq, self.num_delivered = meta.sequence.stream, meta.num_delivered
        self.at = meta.timestamp
        self.headers = _headers(msg.headers)
        self.settled = False

    async def ack(self, heard: bool = True) -> None:
        self.settled = True
        if heard:
            await self._settle(b"+ACK")
        else:
            with translated():
                await self._client.publish(self._msg.reply, b"+ACK")

    async def nak(self, delay: float = 0.0) -> None:
        self.settled = True
        await self._settle(b"-NAK" + (json.dumps({"delay": int(delay * 1e9)}).encode() if delay else b""))

    async def in_progress(self) -> None:
        await self._settle(b"+WPI")

    async def _settle(self, verb: bytes) -> None:
        with translated():
            await self._client.request(self._msg.reply, verb, timeout=REQUEST_TIMEOUT)


class JetStreamSupply:
    """One subscription for all pulls, and one pull for several messages: taken singly, each would cost both anew."""

    def __init__(self, bus: JetStreamBus, consumer: topology.Consumer, batch: int) -> None:
        self._bus, self._consumer, self._batch = bus, consumer, batch
        self._ready: asyncio.Queue[Msg | errors.BusError | None] = asyncio.Queue()
        self._number = 0  # of the pull that is open
        self._owed = 0  # messages that it may still bring
        self._room, self._over = asyncio.Event(), asyncio.Event()  # of the open pull
        self._asking: asyncio.Task[None] | None = None
        self._closed = False

    async def next(self) -> Delivery | None:
        if self._asking is None and not self._closed:
            self._asking = asyncio.create_task(self._keep_asking())
        found = await self._ready.get()
        if found is None:
            self._ready.put_nowait(None)  # for the next one who waits
            return None
        self._look_for_room()
        if isinstance(found, errors.BusError):
            raise found
        return JetStreamDelivery(self._bus.client, found)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        came = [self._ready.get_nowait() for _ in range(self._ready.qsize())]
        self._ready.put_nowait(None)
        for msg in came:
            if isinstance(msg, Msg):
                await self._hand_back(msg)
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)

    def _look_for_room(self) -> None:
        if self._owed <= 0:
            self._over.set()
            if self._ready.qsize() <= self._batch // 2:
                self._room.set()

    async def _keep_asking(self) -> None:
        inbox = self._bus.client.new_inbox()
        subscription: Subscription | None = None
        try:
            while True:
                try:
                    with translated():
                        if subscription is None:
                            subscription = await self._bus.client.subscribe(
                                f"{inbox}.*",
                                future=Sink(self._arrived),  # type: ignore[arg-type]
                            )
                        await self._ask(inbox)
                    await self._until_room()
                except Exception as exc:  # those who wait must hear of it, whatever it is
                    self._owed = 0
                    self._ready.put_nowait(
                        exc if isinstance(exc, errors.BusError) else errors.BusError(f"a pull failed: {exc!r}")
                    )
                    await asyncio.sleep(ASK_AGAIN)
        finally:
            if subscription is not None:
                await asyncio.shield(self._leave(subscription))

    async def _ask(self, inbox: str) -> None:
        self._number += 1
        self._owed = self._batch - self._ready.qsize()
        self._room.clear()
        self._over.clear()
        ask = json.dumps({"batch": self._owed, "expires": int(SUPPLY_WAIT * 1e9)}).encode()
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._consumer.stream}.{self._consumer.name}"
        await self._bus.client.publish(subject, ask, reply=f"{inbox}.{self._number}")

    async def _until_room(self) -> None:
        """Wait until more may be asked for; raises BusError when nothing is to come of what was asked."""
        room = asyncio.ensure_future(self._room.wait())
        try:
            while not room.done():
                if self._owed <= 0:  # it is over, and who takes is slow
                    await room
                    return
                either: set[asyncio.Future[Any]] = {room, self._bus._lost}
                limit = SUPPLY_WAIT + REQUEST_TIMEOUT
                await asyncio.wait(either, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
                if self._owed > 0 and not room.done():
                    raise errors.BusError("the bus did not answer a pull")
        finally:
            room.cancel()

    def _arrived(self, msg: Msg) -> None:
        if msg.reply:  # what can be acked is a message, whatever headers its publisher gave it
            self._owed -= 1
            if self._closed:
                self._bus._on_the_side(self._hand_back(msg))
            else:
                self._ready.put_nowait(msg)
        elif msg.subject.rsplit(".", 1)[-1] == str(self._number):  # not of a pull that was given up
            self._owed = 0
            try:
                self._bus._message(msg)
            except errors.BusError as exc:
                if not self._closed:
                    self._ready.put_nowait(exc)
        self._look_for_room()

    async def _hand_back(self, msg: Msg) -> None:
        with contextlib.suppress(nats.errors.Error, OSError):
            await self._bus.client.publish(msg.reply, b"-NAK")

    async def _leave(self, subscription: Subscription) -> None:
        # As where a single pull is given up: what is there to be taken is given the time to come.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_CALL):
                await self._over.wait()
        with contextlib.suppress(nats.errors.Error, TimeoutError, OSError):
            await subscription.drain()  # type: ignore[no-untyped-call]


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
        return Stored(msg.subject, msg.data, 0, datetime.now(UTC), _headers(msg.headers))

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
            except _ConsumerGoneError:  # it expired, or the server restarted
                self._consumer = None
                if clock() >= until:
                    return None
                continue
            except BaseException:
                # A message may be on its way to nobody, and this consumer will not send it again.
                self._consumer = None
                raise
            if msg is None:
                return None
            meta = msg.metadata
            self._delivered += 1
            if meta.sequence.consumer != self._delivered:  # one was lost on the way
                self._consumer = None
                continue
            self._seen = meta.sequence.stream
            return Stored(msg.subject, msg.data, self._seen, meta.timestamp, _headers(msg.headers))

    async def close(self) -> None:
        if self._consumer is not None:
            consumer, self._consumer = self._consumer, None
            with contextlib.suppress(nats.errors.Error, js_errors.Error, TimeoutError), cancellable():
                await self._bus.jetstream.delete_consumer(self._stream, consumer)


class JetStreamRecords:
    """A bucket by its stream: nats-py's `KeyValue` takes longer, and asks for the state, which not all may read."""

    def __init__(self, bus: JetStreamBus, bucket: str) -> None:
        self._bus, self._bucket = bus, bucket
        self._stream, self._prefix = f"KV_{bucket}", f"$KV.{bucket}."

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        with translated():
            try:
                yield
            except nats.errors.NoRespondersError as exc:
                raise errors.BusError(
                    f"the bucket {self._bucket} is not there: start a gateway, it creates what is missing"
                ) from exc

    async def get(self, key: str) -> tuple[bytes, int] | None:
        with self._translated():
            found = await self._find(key)
        return None if found is None or found[0] is None else (found[0], found[1])

    async def _find(self, key: str) -> tuple[bytes | None, int] | None:
        """Value and revision; a key that was deleted, or expired with a marker, has a revision and no value."""
        msg = await self._bus.direct(self._stream, f"{self._prefix}{_checked(key)}")
        if msg is None:
            return None
        told = msg.headers or {}
        ended = told.get("KV-Operation") in ("DEL", "PURGE") or "Nats-Marker-Reason" in told
        return None if ended else msg.data, int(told["Nats-Sequence"])

    async def put(self, key: str, value: bytes, revision: int | None = None) -> int:
        subject = f"{self._prefix}{_checked(key)}"
        with self._translated():
            if revision != 0:
                return await self._write(subject, value, revision)
            try:
                return await self._write(subject, value, 0)
            except errors.ConflictError:
                found = await self._find(key)
                if found is None or found[0] is not None:
                    raise
                return await self._write(subject, value, found[1])  # it is there no longer, but for its marker

    async def _write(self, subject: str, value: bytes, revision: int | None) -> int:
        try:
            return (await self._bus.store(subject, value, _expecting(revision)))[0]
        except js_errors.APIError as exc:
            raise _from_api(exc) from exc

    async def all(self) -> dict[str, bytes]:
        prefix = self._prefix
        with translated():
            state = (await self._bus.jetstream.stream_info(self._stream, subjects_filter=f"{prefix}>")).state
        keys = sorted(subject.removeprefix(prefix) for subject in state.subjects or {})
        found: dict[str, bytes] = {}
        for start in range(0, len(keys), RECORDS_AT_ONCE):
            some = keys[start : start + RECORDS_AT_ONCE]
            for key, record in zip(some, await asyncio.gather(*map(self.get, some)), strict=True):
                if record is not None:  # None: it expired in between
                    found[key] = record[0]
        return found


def _expecting(revision: int | None) -> dict[str, str]:
    return {} if revision is None else {"Nats-Expected-Last-Subject-Sequence": str(revision)}


def _checked(key: str) -> str:
    if not KEY.fullmatch(key):
        raise errors.RejectedError("the bus takes no such name: use letters, digits, - and _ only", code="bad_name")
    return key


class JetStreamBus:
    """The bus on NATS JetStream, over one connection."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._js = client.jetstream(timeout=REQUEST_TIMEOUT)
        self._records: dict[str, JetStreamRecords] = {}
        self._inboxes: list[PullInbox] = []  # of pulls that came to their end
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._side_tasks: set[asyncio.Task[None]] = set()

    @property
    def client(self) -> Client:
        return self._client

    @property
    def jetstream(self) -> JetStreamContext:
        return self._js

    def connection_lost(self) -> None:
        """End the pulls that wait: the server that knew of them is gone."""
        lost, self._lost = self._lost, asyncio.get_running_loop().create_future()
        lost.set_result(None)

    async def settle(self) -> None:
        """Wait for the hand-backs of cancelled pulls, before the connection is closed."""
        while self._side_tasks:
            await asyncio.wait(self._side_tasks)

    async def publish(
        self, subject: str, body: bytes, *, message_id: str, expect_last: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> int:  # fmt: skip
        sent = {**tracing.carried(), **(headers or {}), "Nats-Msg-Id": message_id, **_expecting(expect_last)}
        loop = asyncio.get_running_loop()
        give_up, pause = loop.time() + PUBLISH_PATIENCE, 0.05
        while True:
            try:
                with translated():
                    return (await self.store(subject, body, sent))[0]
            except errors.QueueFullError:
                raise
            except errors.ConflictError:
                if expect_last is not None and (seq := await self._stored_as(subject, message_id)):
                    return seq
                raise
            except errors.BusError:
                # The publish may be stored all the same: only the same message id makes trying again harmless.
                if loop.time() + pause > give_up or self._client.is_closed:
                    raise
                await asyncio.sleep(pause)
                pause = min(1.0, pause * 2)

    async def store(self, subject: str, body: bytes, headers: dict[str, str]) -> tuple[int, bool]:
        """Publish as nats-py's JetStream does, without its classes: the sequence, and whether it was there before."""
        answer = await self._client.request(subject, body, timeout=REQUEST_TIMEOUT, headers=headers)
        told = json.loads(answer.data)
        if "error" in told:
            raise js_errors.APIError.from_error(told["error"])
        return int(told["seq"]), bool(told.get("duplicate"))

    async def direct(self, stream: str, subject: str) -> Msg | None:
        """The newest message on a subject, from whichever node has it."""
        msg = await self._client.request(f"$JS.API.DIRECT.GET.{stream}.{subject}", b"", timeout=REQUEST_TIMEOUT)
        told = msg.headers or {}
        if "Nats-Sequence" in told:  # which a message has that is one, whatever else its publisher gave it
            return msg
        if told.get("Status") == "404":
            return None
        raise errors.BusError(f"the bus did not say: {told.get('Status', '')} {told.get('Description', '')}")

    async def _stored_as(self, subject: str, message_id: str) -> int | None:
        # The server compares sequences before it looks for duplicates, so a publish that is repeated because its
        # answer was lost looks like a conflict with itself. Sent again under a condition that no stream fulfils,
        # the message is answered as a duplicate if it is one, and cannot be stored if it is not.
        impossible = {"Nats-Msg-Id": message_id, "Nats-Expected-Last-Msg-Id": secrets.token_hex(16)}
        try:
            with cancellable():
                seq, known = await self.store(subject, b"", impossible)
        except (nats.errors.Error, js_errors.Error, TimeoutError, OSError):
            return None
        return seq if known else None

    async def pull(self, consumer: topology.Consumer, wait: float = PULL_WAIT) -> Delivery | None:
        msg = await self.take(consumer.stream, consumer.name, wait)
        return None if msg is None else JetStreamDelivery(self._client, msg)

    async def take(self, stream: str, consumer: str, wait: float, *, acked: bool = True) -> Msg | None:
        """One message from a pull consumer, as nats-py has it; `acked` is whether that consumer waits for acks."""
        ask: dict[str, Any] = {"batch": 1}
        ask |= {"expires": int(wait * 1e9)} if wait >= 0.001 else {"no_wait": True}
        inbox = self._inboxes.pop() if self._inboxes else PullInbox(self._client)
        try:
            with translated():
                await inbox.ask(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}", json.dumps(ask).encode())
            either: set[asyncio.Future[Any]] = {inbox.arrived, self._lost}
            await asyncio.wait(either, timeout=wait + REQUEST_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            self._on_the_side(self._hand_back(inbox, acked))
            raise
        if not inbox.arrived.done():
            self._on_the_side(self._hand_back(inbox, acked))
            raise errors.BusError("the bus did not answer a pull")
        self._inboxes.append(inbox)
        return self._message(inbox.arrived.result())

    def _message(self, msg: Msg) -> Msg | None:
        if msg.reply:  # what can be acked is a message, whatever headers its publisher gave it
            return msg
        status, text = (msg.headers or {}).get("Status"), (msg.headers or {}).get("Description", "")
        if status in ("404", "408"):  # nothing there · the wait is over
            return None
        if status == "503" or (status == "409" and "deleted" in text.lower()):
            raise _ConsumerGoneError("the consumer is not there: start a gateway, it creates what is missing")
        raise errors.BusError(f"the bus gave no message: {status} {text}".rstrip())

    async def _hand_back(self, inbox: PullInbox, acked: bool) -> None:
        """Give up a pull: what is already on its way goes back into the queue now, not after `ack_wait`."""
        # A message that the server sends just as nobody listens any more waits for its lease to run out, so what was
        # there to be taken is given the time to come.
        await asyncio.wait([inbox.arrived], timeout=LAST_CALL)
        with contextlib.suppress(nats.errors.Error, TimeoutError, OSError):
            await inbox.close()
        if not inbox.arrived.done():
            inbox.arrived.cancel()
        elif inbox.arrived.result().reply and acked:
            with contextlib.suppress(nats.errors.Error, TimeoutError, OSError):
                await self._client.publish(inbox.arrived.result().reply, b"-NAK")

    def _on_the_side(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._side_tasks.add(task)
        task.add_done_callback(self._side_tasks.discard)

    def supply(self, consumer: topology.Consumer, batch: int) -> Supply:
        return JetStreamSupply(self, consumer, batch)

    async def unsettled(self, consumer: topology.Consumer) -> list[Stored]:
        with translated():
            info = await self._js.consumer_info(consumer.stream, consumer.name)
        at = info.ack_floor.stream_seq if info.ack_floor else 0
        last = info.delivered.stream_seq if info.delivered else 0
        found: list[Stored] = []
        while at < last and (stored := await self._next(consumer, at)) is not None and stored.seq <= last:
            found.append(stored)
            at = stored.seq
        return found

    async def hand_back(self, consumer: topology.Consumer, seq: int) -> None:
        with translated():
            info = await self._js.consumer_info(consumer.stream, consumer.name)
            # The server goes by the stream's sequence; of the consumer's it only asks that it was given out.
            place = info.delivered.consumer_seq if info.delivered else 0
            reply = f"$JS.ACK.{consumer.stream}.{consumer.name}.1.{seq}.{place}.{time.time_ns()}.0"
            await self._client.request(reply, b"-NAK", timeout=REQUEST_TIMEOUT)

    async def last(self, stream: str, subject: str) -> Stored | None:
        return await self._get(stream, subject=subject)

    async def latest(self, stream: str, subject: str) -> Stored | None:
        with translated():
            msg = await self.direct(stream, subject)
        if msg is None:
            return None
        told = _headers(msg.headers)
        at = datetime.fromisoformat(told["Nats-Time-Stamp"])
        own = {name: value for name, value in told.items() if name not in ADDED_BY_SERVER}
        return Stored(told["Nats-Subject"], msg.data, int(told["Nats-Sequence"]), at, own)

    async def get(self, stream: str, seq: int) -> Stored | None:
        return await self._get(stream, seq=seq)

    async def _get(self, stream: str, **query: Any) -> Stored | None:
        with translated():
            try:
                raw = await self._js.get_msg(stream, **query)
            except js_errors.APIError as exc:
                if exc.err_code in SEQUENCE_NOT_FOUND:
                    return None
                raise
        at = raw.time if isinstance(raw.time, datetime) else datetime.now(UTC)
        return Stored(raw.subject or "", raw.data or b"", raw.seq or 0, at, _headers(raw.headers))

    async def first(self, stream: str, subject: str, after: int = 0) -> Stored | None:
        return await self._get(stream, seq=after + 1, subject=subject, next=True)

    async def count(self, stream: str, subject: str, after: int = 0) -> int:
        # A batch of one comes with the number of those behind it; what else is sent for it is let go.
        ask = json.dumps({"seq": after + 1, "batch": 1, "next_by_subj": subject}).encode()
        with translated():
            answer = await self._client.request(f"$JS.API.DIRECT.GET.{stream}", ask, timeout=REQUEST_TIMEOUT)
        told = answer.headers or {}
        if told.get("Status") == "404":
            return 0
        if "Nats-Num-Pending" not in told:
            raise errors.BusError(f"the bus did not count: {told.get('Status', '')} {told.get('Description', '')}")
        return 1 + int(told["Nats-Num-Pending"])

    async def tail(self, stream: str, before: int | None, limit: int, subject: str | None = None) -> list[Stored]:
        with translated():
            state = (await self._js.stream_info(stream)).state
        at = min(state.last_seq, before - 1 if before is not None else state.last_seq)
        found: list[Stored] = []
        width = limit
        while at >= max(1, state.first_seq) and len(found) < limit:
            low = max(state.first_seq, at - width + 1, 1)
            if subject is None:
                read = await asyncio.gather(*(self.get(stream, seq) for seq in range(low, at + 1)))
                some = [message for message in read if message is not None]
            else:
                some = await self._between(stream, subject, low, at, limit)
                # Long stretches without any are crossed in ever longer strides; in a dense one they are short again.
                if len(some) > limit:
                    width = max(limit, width // 4)
                    continue
                width *= 2
            found += reversed(some)
            at = low - 1
        return found[:limit]

    async def _between(self, stream: str, subject: str, low: int, high: int, limit: int) -> list[Stored]:
        """The messages on a subject with sequences from `low` to `high`, oldest first, until one more than `limit`."""
        found: list[Stored] = []
        message = await self.first(stream, subject, low - 1)
        while message is not None and message.seq <= high and len(found) <= limit:
            found.append(message)
            message = await self.first(stream, subject, message.seq)
        return found

    async def delete(self, stream: str, seq: int) -> bool:
        with translated():
            try:
                return await self._js.delete_msg(stream, seq)
            except js_errors.APIError as exc:
                if exc.err_code in SEQUENCE_NOT_FOUND:
                    return False
                raise

    async def purge(self, stream: str, subject: str) -> int:
        with translated():
            answer = await self._client.request(
                f"$JS.API.STREAM.PURGE.{stream}", json.dumps({"filter": subject}).encode(), timeout=REQUEST_TIMEOUT
            )
            told = json.loads(answer.data)
            if "error" in told:
                raise js_errors.APIError.from_error(told["error"])
        return int(told["purged"])

    async def follow(self, stream: str, subject: str, after: int = 0) -> Feed:
        feed = FollowFeed(self, stream, subject, after)
        await feed.open()
        return feed

    async def signal(self, subject: str, body: bytes) -> None:
        with translated():
            await self._client.publish(subject, body)

    async def listen(self, subject: str) -> Feed:
        with translated():
            subscription = await self._client.subscribe(subject)
            await self._client.flush(timeout=int(REQUEST_TIMEOUT))
        return ListenFeed(subscription)

    async def listened(self, subject: str) -> bool:
        try:
            with cancellable():
                await self._client.request(subject, b"", timeout=LISTENED_TIMEOUT)
        except nats.errors.NoRespondersError:
            return False
        except (nats.errors.Error, TimeoutError, OSError):
            pass
        return True

    async def require(self, consumer: topology.Consumer) -> None:
        """Raise BusError unless the consumer is there; asks for less than `depth`, which reads the stream."""
        with translated():
            await self._js.consumer_info(consumer.stream, consumer.name)

    async def depth(self, consumer: topology.Consumer) -> Depth:
        with translated():
            info = await self._js.consumer_info(consumer.stream, consumer.name)
        pending, ack_pending = info.num_pending or 0, info.num_ack_pending or 0
        floor = info.ack_floor.stream_seq if info.ack_floor else 0
        given = info.delivered.stream_seq if info.delivered else 0
        oldest = await self._time_of_next(consumer, floor) if pending + ack_pending else None
        oldest_pending = oldest
        if pending and ack_pending:
            oldest_pending = await self._time_of_next(consumer, given)
        if not pending:
            oldest_pending = None
        return Depth(pending, ack_pending, info.num_redelivered or 0, oldest, oldest_pending, given)

    async def _time_of_next(self, consumer: topology.Consumer, seq: int) -> datetime | None:
        """When the first message of a consumer behind `seq` was stored."""
        found = await self._next(consumer, seq)
        return found.at if found else None

    async def _next(self, consumer: topology.Consumer, seq: int) -> Stored | None:
        return await self._get(consumer.stream, seq=seq + 1, subject=consumer.filter_subject or ">", next=True)

    async def held(self, stream: str) -> Held:
        with translated():
            info = await self._js.stream_info(stream)
        limit = info.config.max_bytes or -1
        return Held(info.state.messages, info.state.bytes, limit if limit > 0 else None)

    def records(self, bucket: str) -> Records:
        return self._records.setdefault(bucket, JetStreamRecords(self, bucket))

    async def ready(self) -> bool:
        if not self._client.is_connected:
            return False
        try:
            with translated():
                async with asyncio.timeout(READY_TIMEOUT):
                    await self._js.stream_info(topology.REQUESTS)
        except errors.VidgenError:
            return False
        return True


@contextlib.asynccontextmanager
async def connect(
    url: str, name: str, *, on_denied: Callable[[str], None] | None = None, **options: Any
) -> AsyncIterator[JetStreamBus]:
    """A bus on a live connection that reconnects for ever, drained at the end.

    Raises BusError if no server lets us in within a few seconds, FatalError `settings` for credentials that cannot be
    read. `options` are those of `nats.connect`.
    `on_denied` hears of a permission that this identity lacks: a configuration error that shows as time-outs only.
    """

    _check_credentials(options.get("user_credentials"))
    made: JetStreamBus | None = None
    last_error = ""
    heard: dict[str, None] = {}
    secure = "tls" in options or url.startswith("tls://")

    async def failed(exc: Exception) -> None:
        nonlocal last_error
        text = str(exc) or type(exc).__name__
        if text != last_error:  # once for an outage, not once for each attempt to reconnect
            log.warning("bus: %s", text)
        last_error = text
        if made is None:
            heard.setdefault(text)  # the last attempt may end in a broken pipe where the first one was told why
        if on_denied is not None and "permissions violation" in last_error.lower():
            on_denied(last_error)

    async def lost() -> None:
        if made is not None:
            made.connection_lost()

    async def back() -> None:
        nonlocal last_error
        last_error = ""
        if secure and not _is_secure(client) and on_denied is not None:
            on_denied(NOT_SECURE)
        log.info("bus: connected again")

    settings: dict[str, Any] = {
        "name": name, "error_cb": failed, "disconnected_cb": lost, "reconnected_cb": back, "ping_interval": 10,
        "max_outstanding_pings": 2, "max_reconnect_attempts": FIRST_CONNECT_ATTEMPTS, "reconnect_time_wait": 1,
        "connect_timeout": 5, "inbox_prefix": f"{permissions.INBOX}{name}".encode(),
    }  # fmt: skip
    try:
        async with asyncio.timeout(FIRST_CONNECT_LIMIT):
            client = Requester()
            await client.connect(url, **(settings | options))
    except (nats.errors.Error, TimeoutError, OSError) as exc:
        why = "; ".join(heard) or exc
        raise errors.BusError(
            f"no NATS server lets us in at {_without_credentials(url)}: {why}; start one, or correct VIDGEN_NATS_URL"
        ) from exc
    if secure and not _is_secure(client):
        await client.close()
        raise errors.FatalError(f"{_without_credentials(url)}: {NOT_SECURE}", code="settings")
    client.options["max_reconnect_attempts"] = -1  # from here on for ever; for ever from the start would hang
    made = JetStreamBus(client)
    try:
        yield made
    finally:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(5):
                await _leave(made)
        if not client.is_closed:
            with contextlib.suppress(OSError):  # with no server there, its last flush fails
                await client.close()


def _is_secure(client: Client) -> bool:
    # nats-py goes on in the clear, whatever it was given, with a server that does not ask for TLS.
    return bool(client._server_info.get("tls_required"))


async def _leave(bus: JetStreamBus) -> None:
    await bus.settle()
    await bus.client.drain()


def _check_credentials(path: str | None) -> None:
    # nats-py reads the file only when a server asks, and tries for ever what it cannot read then.
    if path is None:
        return
    try:
        Path(path).read_bytes()
    except OSError as exc:
        raise errors.FatalError(
            f"the NATS credentials file {path} cannot be read ({exc.strerror}): correct VIDGEN_NATS_CREDS",
            code="settings",
        ) from exc


def _without_credentials(url: str) -> str:
    return url.rsplit("@", 1)[-1].split("://", 1)[-1]
