"""Answers over subscriptions that stay: nats-py's own `request` takes a queue, a task and two random names for each.

nats-py puts a message for a subscription that has a future straight into it, from its reading loop. A `Sink` passes for
one that is never done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

REQUEST_TIMEOUT = 5.0
LAST_CALL = 0.1  # seconds that a pull which was given up still listens
NO_RESPONDERS = "503"


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

    def _answered(self, msg: Msg) -> None:
        answer = self._answers.get(msg.subject)
        if answer is not None and not answer.done():
            answer.set_result(msg)


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
