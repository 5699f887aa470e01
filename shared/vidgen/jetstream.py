"""The bus on NATS JetStream. No nats-py exception passes it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import datetime
from pathlib import Path
from typing import Any

import nats.errors
import nats.js.errors as js_errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from vidgen import errors, permissions, topology, tracing
from vidgen.bus import PULL_WAIT, Delivery, Depth, Feed, Held, Records, Stored, Supply
from vidgen.deliveries import JetStreamDelivery, JetStreamSupply
from vidgen.feeds import FollowFeed, ListenFeed
from vidgen.inboxes import JWT, LAST_CALL, REQUEST_TIMEOUT, PullInbox, Requester
from vidgen.natserrors import ConsumerGoneError, cancellable, expecting, headers_of, translated
from vidgen.records import JetStreamRecords

log = logging.getLogger("vidgen.bus")

PUBLISH_PATIENCE = 20.0  # a leader change in R3 takes 5–8 s (FACTS §4)
LEADER_PATIENCE = 0.5  # seconds; from then on any node may say what it has
READY_TIMEOUT = 2.0
FIRST_CONNECT_ATTEMPTS = 2  # beyond the first one, a second apart
FIRST_CONNECT_LIMIT = 30.0  # for all of them: a TLS handshake that fails may leave nats-py waiting for ever
LEAVE_LIMIT = 5.0
ANSWER_TIMEOUT = 1.0  # that nobody is there, the server says at once
NOT_SECURE = "the bus speaks no TLS, and the settings want it"
DENIED, LATE_ANSWER = "permissions violation", 'publish to "_inbox'  # as nats-py passes on what the server says

SEQUENCE_NOT_FOUND = frozenset({10037, 10043, 10057})  # never was · deleted · past the end
ADDED_BY_SERVER = frozenset({"Nats-Stream", "Nats-Subject", "Nats-Sequence", "Nats-Time-Stamp"})  # to a direct get


class JetStreamBus:
    """The bus on NATS JetStream, over one connection."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._js = client.jetstream(timeout=REQUEST_TIMEOUT)
        self._records: dict[str, JetStreamRecords] = {}
        self._inboxes: list[PullInbox] = []  # of pulls that came to their end
        self.back = asyncio.Event()  # behind a reconnection, until somebody has looked after what may be missing
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # done when the connection is
        self._side_tasks: set[asyncio.Task[None]] = set()

    @property
    def client(self) -> Client:
        return self._client

    @property
    def jetstream(self) -> JetStreamContext:
        return self._js

    def connection_lost(self) -> None:
        """End the pulls that wait: the server that knew of them is gone."""
        lost, self.lost = self.lost, asyncio.get_running_loop().create_future()
        lost.set_result(None)

    def connected_again(self) -> None:
        """Tell who waits for it that there is a server again, which may be another one."""
        self.back.set()

    async def settle(self) -> None:
        """Wait for the hand-backs of cancelled pulls, before the connection is closed."""
        while self._side_tasks:
            await asyncio.wait(self._side_tasks)

    async def publish(
        self, subject: str, body: bytes, *, message_id: str, expect_last: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> int:  # fmt: skip
        sent = {**tracing.carried(), **(headers or {}), "Nats-Msg-Id": message_id, **expecting(expect_last)}
        loop = asyncio.get_running_loop()
        give_up, pause = loop.time() + PUBLISH_PATIENCE, 0.05
        while True:
            try:
                return await self._store_once(subject, body, sent, expect_last)
            except errors.QueueFullError:
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

    async def _store_once(self, subject: str, body: bytes, headers: dict[str, str], expect_last: int | None) -> int:
        """The sequence of what is stored by this or was before; raises ConflictError, and BusError where in doubt."""
        try:
            with translated():
                return (await self.store(subject, body, headers))[0]
        except errors.ConflictError:
            if expect_last is None:
                raise
            # The server compares sequences before it looks for duplicates, so a publish that is repeated because its
            # answer was lost looks like a conflict with itself. What was stored behind `expect_last` is next to it.
            # That is read: a server of a cluster stores nothing more in a stream, for good, once
            # `Nats-Expected-Last-Msg-Id` does not hold there (nats-server 2.15.1), so it must not be asked in that way.
            found = await self.first(topology.stream_of(subject), subject, expect_last)
            if found is not None and found.headers.get("Nats-Msg-Id") == headers["Nats-Msg-Id"]:
                return found.seq
            raise

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
            either: set[asyncio.Future[Any]] = {inbox.arrived, self.lost}
            await asyncio.wait(either, timeout=wait + REQUEST_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            self.on_the_side(self._hand_back(inbox, acked))
            raise
        if not inbox.arrived.done():
            self.on_the_side(self._hand_back(inbox, acked))
            raise errors.BusError("the bus did not answer a pull")
        self._inboxes.append(inbox)
        return self.message_of(inbox.arrived.result())

    def message_of(self, msg: Msg) -> Msg | None:
        """What came of a pull: a message, None where there is none; raises BusError as the server tells it."""
        if msg.reply:  # what can be acked is a message, whatever headers its publisher gave it
            return msg
        status, text = (msg.headers or {}).get("Status"), (msg.headers or {}).get("Description", "")
        if status in ("404", "408"):  # nothing there · the wait is over
            return None
        if status == "503" or (status == "409" and "deleted" in text.lower()):
            raise ConsumerGoneError("the consumer is not there: start a gateway, it creates what is missing")
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

    def on_the_side(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something that nobody waits for, before the connection is closed."""
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
        return await self._get(stream, last_by_subj=subject)

    async def latest(self, stream: str, subject: str) -> Stored | None:
        with translated():
            return await self.newest(stream, subject)

    async def newest(self, stream: str, subject: str) -> Stored | None:
        """What `latest` gives; raises what nats-py does."""
        # A direct get waits for what the stream writes and syncs just then, this hardly does (decision 0019). But only
        # a leader answers, and while another is elected there is none.
        with contextlib.suppress(errors.BusError):
            return await self._get(stream, LEADER_PATIENCE, last_by_subj=subject)
        msg = await self.direct(stream, subject)
        if msg is None:
            return None
        told = headers_of(msg.headers)
        at = datetime.fromisoformat(told["Nats-Time-Stamp"])
        own = {name: value for name, value in told.items() if name not in ADDED_BY_SERVER}
        return Stored(told["Nats-Subject"], msg.data, int(told["Nats-Sequence"]), at, own)

    async def get(self, stream: str, seq: int) -> Stored | None:
        return await self._get(stream, seq=seq)

    async def _get(self, stream: str, patience: float | None = None, **query: Any) -> Stored | None:
        ask, limit = json.dumps(query).encode(), patience or REQUEST_TIMEOUT
        with translated():
            answer = await self._client.request(f"$JS.API.STREAM.MSG.GET.{stream}", ask, timeout=limit)
            told = json.loads(answer.data)
            if "error" in told:
                if told["error"].get("err_code") in SEQUENCE_NOT_FOUND:
                    return None
                raise js_errors.APIError.from_error(told["error"])
        found = told["message"]
        headers = _parsed(base64.b64decode(found.get("hdrs", "")))
        body = base64.b64decode(found.get("data", ""))
        return Stored(found["subject"], body, found["seq"], datetime.fromisoformat(found["time"]), headers)

    async def first(self, stream: str, subject: str, after: int = 0) -> Stored | None:
        return await self._get(stream, seq=after + 1, next_by_subj=subject)

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
            feed = ListenFeed(await self._client.subscribe(subject))
            try:
                await self._client.flush()
            except BaseException:
                await feed.close()
                raise
        return feed

    async def listened(self, subject: str) -> bool:
        try:
            with cancellable():
                await self._client.request(subject, b"", timeout=ANSWER_TIMEOUT)
        except nats.errors.NoRespondersError:
            return False
        except (nats.errors.Error, TimeoutError, OSError):
            pass
        return True

    async def ask(self, subject: str, body: bytes) -> bytes | None:
        with translated(), contextlib.suppress(nats.errors.NoRespondersError, TimeoutError):
            return bytes((await self._client.request(subject, body, timeout=ANSWER_TIMEOUT)).data)
        return None

    async def require(self, consumer: topology.Consumer, ack_wait: float) -> None:
        """Raise BusError unless the consumer is there; asks for less than `depth`, which reads the stream.

        FatalError `topology_mismatch` where its leases are shorter than `ack_wait`: they would be renewed too late.
        """
        with translated():
            info = await self._js.consumer_info(consumer.stream, consumer.name)
        told = info.config.ack_wait
        if told is not None and ack_wait > told + 0.001:  # a server counts in nanoseconds
            raise errors.FatalError(
                f"VIDGEN_ACK_WAIT is {ack_wait:g} s here and {told:g} s at the queue {consumer.name}, so leases would "
                "be renewed too late: give this worker what the gateways have",
                code="topology_mismatch",
            )

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
        return await self.first(consumer.stream, consumer.filter_subject or ">", seq)

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
        # What is published to an inbox is an answer. The right to it ends after seconds, and with the connection by
        # which it was asked for: a process that stood still meanwhile lacks nothing.
        said = last_error.lower()
        if on_denied is not None and DENIED in said and LATE_ANSWER not in said:
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
        if made is not None:
            made.connected_again()

    settings: dict[str, Any] = {
        "name": name, "error_cb": failed, "disconnected_cb": lost, "reconnected_cb": back, "ping_interval": 10,
        "max_outstanding_pings": 2, "max_reconnect_attempts": FIRST_CONNECT_ATTEMPTS, "reconnect_time_wait": 1,
        "connect_timeout": 5, "inbox_prefix": f"{permissions.INBOX}{name}".encode(),
    }  # fmt: skip
    client = Requester()
    try:
        async with asyncio.timeout(FIRST_CONNECT_LIMIT):
            try:
                await client.connect(url, **(settings | options))
            except BaseException:
                with contextlib.suppress(Exception):  # what it had begun is half open, and nobody else's
                    await _close(client)
                raise
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
            async with asyncio.timeout(LEAVE_LIMIT):
                await _leave(made)
        if not client.is_closed:
            with contextlib.suppress(OSError, RuntimeError):  # with no server there, its last flush fails
                await _close(client)


async def _close(client: Requester) -> None:
    client.cut_off()
    async with asyncio.timeout(LEAVE_LIMIT):
        await client.close()


def _parsed(headers: bytes) -> dict[str, str]:
    """Headers as they are stored: a line with the protocol's version, then one for each."""
    lines = (line.partition(":") for line in headers.decode(errors="replace").split("\r\n")[1:])
    return {name: value.strip() for name, colon, value in lines if colon}


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
        found = Path(path).read_bytes()
    except OSError as exc:
        raise errors.FatalError(
            f"the NATS credentials file {path} cannot be read ({exc.strerror}): correct VIDGEN_NATS_CREDS",
            code="settings",
        ) from exc
    if JWT.encode() not in found or b"BEGIN USER NKEY SEED" not in found:
        raise errors.FatalError(
            f"the NATS credentials file {path} has not both a user's JWT and its seed: correct VIDGEN_NATS_CREDS; "
            "a seed alone is for VIDGEN_NATS_NKEY_SEED",
            code="settings",
        )


def _without_credentials(url: str) -> str:
    return url.rsplit("@", 1)[-1].split("://", 1)[-1]
