"""What comes from a consumer on JetStream: a message to settle, and several with one pull."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from vidgen import errors, topology
from vidgen.bus import Delivery
from vidgen.inboxes import LAST_CALL, REQUEST_TIMEOUT, Sink
from vidgen.natserrors import headers_of, translated
from vidgen.waiting import told_within

if TYPE_CHECKING:
    from vidgen.jetstream import JetStreamBus

SUPPLY_WAIT = 30.0  # seconds that a pull for several messages stays open
ASK_AGAIN = 0.5  # seconds after a pull that the bus did not answer


class JetStreamDelivery:
    def __init__(self, client: Client, msg: Msg) -> None:
        meta = msg.metadata
        self._client, self._msg = client, msg
        self.subject, self.body = msg.subject, msg.data
        self.seq, self.num_delivered = meta.sequence.stream, meta.num_delivered
        self.at = meta.timestamp
        self.headers = headers_of(msg.headers)
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
                either: set[asyncio.Future[Any]] = {room, self._bus.lost}
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
                self._bus.on_the_side(self._hand_back(msg))
            else:
                self._ready.put_nowait(msg)
        elif msg.subject.rsplit(".", 1)[-1] == str(self._number):  # not of a pull that was given up
            self._owed = 0
            try:
                self._bus.message_of(msg)
            except errors.BusError as exc:
                if not self._closed:
                    self._ready.put_nowait(exc)
        self._look_for_room()

    async def _hand_back(self, msg: Msg) -> None:
        with contextlib.suppress(nats.errors.Error, OSError):
            await self._bus.client.publish(msg.reply, b"-NAK")

    async def _leave(self, subscription: Subscription) -> None:
        # As where a single pull is given up: what is there to be taken is given the time to come.
        await told_within(self._over, LAST_CALL)
        with contextlib.suppress(nats.errors.Error, TimeoutError, OSError):
            await subscription.drain()  # type: ignore[no-untyped-call]
