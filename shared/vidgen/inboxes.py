"""Answers over subscriptions that stay: nats-py's own `request` takes a queue, a task and two random names for each.
What is published in one turn of the loop goes out in one write, without a task that is woken for it.

nats-py puts a message for a subscription that has a future straight into it, from its reading loop. A `Sink` passes for
one that is never done.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nats.errors
from nats.aio.client import Client, RawCredentials
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.protocol.parser import PERMISSIONS_ERR, STALE_CONNECTION

REQUEST_TIMEOUT = 5.0
LAST_CALL = 0.1  # seconds that a pull which was given up still listens
NO_RESPONDERS = "503"
JWT = "BEGIN NATS USER JWT"  # the line before it, in a credentials file
BACKLOG = 1 << 18  # bytes that go out before nats-py's own flusher looks whether the server takes them
BLANK = re.compile(r"[ \t\r\n]")
HEADER = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


class Sink:
    """What nats-py takes for the future of a subscription: each message goes to `take`, which must not raise."""

    def __init__(self, take: Callable[[Msg], None]) -> None:
        self.set_result = take

    def cancelled(self) -> bool:
        return False


class Requester(Client):
    """A nats-py client whose requests share one inbox."""

    def __init__(self) -> None:
        super().__init__()
        self._answers: dict[str, asyncio.Future[Msg]] = {}
        self._answers_at = ""
        self._asked = 0
        self._writes_soon = False
        self._unlooked = 0  # bytes written since the flusher looked last

    async def request(
        self, subject: str, payload: bytes = b"", timeout: float = 0.5, old_style: bool = False,
        headers: dict[str, Any] | None = None,
    ) -> Msg:  # fmt: skip
        if not self._answers_at:
            self._answers_at = self.new_inbox()
            await self.subscribe(f"{self._answers_at}.*", future=Sink(self._answered))  # type: ignore[arg-type]
        self._asked += 1
        inbox = f"{self._answers_at}.{self._asked}"
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Msg] = loop.create_future()
        self._answers[inbox] = answer
        limit = loop.call_later(timeout, _give_up, answer)
        try:
            await self.publish(subject, payload, reply=inbox, headers=headers)
            msg = await answer
        finally:
            limit.cancel()
            del self._answers[inbox]
        if msg.headers and msg.headers.get("Status") == NO_RESPONDERS:
            raise nats.errors.NoRespondersError
        return msg

    async def publish(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        # What is out of the ordinary nats-py does, or refuses.
        head = _head(headers) if headers else b""
        if (
            self._status != Client.CONNECTED or head is None or not subject or BLANK.search(subject)
            or BLANK.search(reply) or len(payload) + len(head) > self._max_payload
            or self._unlooked + self._pending_data_size > BACKLOG
        ):  # fmt: skip
            # A server counts headers too, and cuts off who sends more than it takes; nats-py counts the payload alone.
            if len(payload) + len(head or b"") > self._max_payload:
                raise nats.errors.MaxPayloadError
            self._unlooked = 0
            await super().publish(subject, payload, reply=reply, headers=headers)
            return
        if head:
            line = f"HPUB {subject} {reply} {len(head)} {len(head) + len(payload)}\r\n"
            command = b"".join((line.encode(), head, payload, b"\r\n"))
        else:
            command = b"".join((f"PUB {subject} {reply} {len(payload)}\r\n".encode(), payload, b"\r\n"))
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += len(payload)
        self._pending.append(command)
        self._pending_data_size += len(command)
        if not self._writes_soon:
            self._writes_soon = True
            asyncio.get_running_loop().call_soon(self._write_pending)

    async def flush(self, timeout: int = int(REQUEST_TIMEOUT)) -> None:
        # nats-py's PING overtakes what its flusher has not written yet: the PONG would say nothing of a SUB or UNSUB.
        self._write_pending()
        try:
            await super().flush(timeout)
        except RuntimeError as exc:  # uvloop's word for a connection that is gone, until the reading loop sees it, too
            raise ConnectionResetError(str(exc)) from exc

    def cut_off(self) -> None:
        """End the connection without what it has not taken, which a network that is gone never will."""
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    async def _attempt_reconnect(self) -> None:
        self.cut_off()  # nats-py closes it, and would wait until all is taken
        await super()._attempt_reconnect()

    async def _process_connect_init(self) -> None:
        # nats-py means to do so, but asks whether it is reconnecting when it says no longer so: half a message of the
        # connection before would go on with what comes over this one.
        self._ps.reset()
        try:
            await super()._process_connect_init()
        except BaseException:
            self.cut_off()  # else it is open for as long as nobody collects it
            raise

    # A credentials file is read anew for each connection, and somebody may be writing it.

    def _connect_command(self) -> bytes:
        try:
            return bytes(super()._connect_command())
        except (nats.errors.Error, OSError):
            raise
        except Exception as exc:  # by what is neither, nats-py's reconnection ends for good, and nobody hears of it
            what = f"the credentials are no good for now: {type(exc).__name__}"
            raise nats.errors.Error(what) from None  # what it read may be in the words of the first one

    def _read_creds_user_jwt(self, creds: str | RawCredentials | Path) -> bytearray:
        text = Path(str(creds)).read_text("utf-8")
        if JWT not in text:  # nats-py reads on behind the end, and the process does nothing else any more
            raise nats.errors.InvalidUserCredentialsError
        return bytearray(super()._read_creds_user_jwt(RawCredentials(text)))

    async def _process_err(self, err_msg: str) -> None:
        # At what a server says as it cuts a client off nats-py closes for good, and nobody hears of it.
        if STALE_CONNECTION in err_msg or PERMISSIONS_ERR in err_msg:
            await super()._process_err(err_msg)
            return
        error = nats.errors.Error("nats: " + err_msg.strip("'"))
        await self._error_cb(error)
        await self._process_op_err(error)

    # What the next three see nats-py has raise in its reading loop, which ends by that: the bus would be deaf until
    # three pings had had no answer.

    async def _process_pong(self) -> None:
        if self._pongs and self._pongs[0].done():  # of a flush that was given up
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    async def _process_headers(self, headers: bytes | None) -> dict[str, str] | None:
        try:
            return await super()._process_headers(headers)
        except (IndexError, UnicodeDecodeError):  # whoever may publish may write what is none
            return None

    def _build_message(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: dict[str, str] | None
    ) -> Msg:  # fmt: skip
        try:
            built: Msg = super()._build_message(sid, subject, reply, data, headers)
        except UnicodeDecodeError:
            built = super()._build_message(sid, _readable(subject), _readable(reply), data, headers)
        return built

    def _write_pending(self) -> None:
        self._writes_soon = False
        if self._status != Client.CONNECTED or not self._pending or self._transport is None:
            return  # it goes out with the next connection, or has gone
        try:
            self._transport.writelines(self._pending)
        except Exception:  # the flusher sees the same, and knows what to do about it
            if self._flush_queue is not None:
                self._flush_queue.put_nowait(asyncio.get_running_loop().create_future())
            return
        self._unlooked += self._pending_data_size
        self._pending, self._pending_data_size = [], 0

    def _answered(self, msg: Msg) -> None:
        answer = self._answers.get(msg.subject)
        if answer is not None and not answer.done():
            answer.set_result(msg)


def _head(headers: Mapping[str, str]) -> bytes | None:
    """Headers as they go over the wire, None for those that are not plain."""
    lines = ["NATS/1.0"]
    for name, value in headers.items():
        if not HEADER.fullmatch(name) or "\r" in value or "\n" in value:
            return None
        lines.append(f"{name}: {value.strip()}")
    return "\r\n".join([*lines, "", ""]).encode()


def _readable(text: bytes) -> bytes:
    return text.decode(errors="replace").encode()


def _give_up(answer: asyncio.Future[Msg]) -> None:
    if not answer.done():
        answer.set_exception(nats.errors.TimeoutError())


class PullInbox:
    """The subscription of one pull after another, one at a time.

    What is pulled comes under its own subject, so only the subscription tells whose it is.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._at = client.new_inbox()
        self._pulls = 0
        self._subscription: Subscription | None = None
        self.arrived: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()

    async def ask(self, subject: str, body: bytes) -> None:
        """Ask for one message; `arrived` will be it, or what the server says instead."""
        self.arrived = asyncio.get_running_loop().create_future()
        self._pulls += 1
        if self._subscription is None:
            sink = Sink(self._answered)
            self._subscription = await self._client.subscribe(f"{self._at}.*", future=sink)  # type: ignore[arg-type]
        await self._client.publish(subject, body, reply=f"{self._at}.{self._pulls}")

    async def close(self) -> None:
        """Take no more: behind this nothing comes, and a pull that still waits is given nothing."""
        if self._subscription is not None:
            await self._subscription.drain()  # type: ignore[no-untyped-call]

    def _answered(self, msg: Msg) -> None:
        # What the server says late of an earlier pull comes under that one's name.
        if not self.arrived.done() and (msg.reply or msg.subject == f"{self._at}.{self._pulls}"):
            self.arrived.set_result(msg)
