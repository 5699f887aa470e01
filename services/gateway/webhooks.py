"""Delivers webhooks: in order for each job, again and again with back-off, until taken or given up.

Replicas share the consumer. A webhook whose job has an older one in the stream waits, whoever has that one: the older
one is acknowledged, and gone, once it was taken or given up. How long to wait follows from a webhook's age, which the
stream keeps, so a gateway that dies forgets nothing.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import urlsplit

import pydantic
import structlog

from gateway.consumers import PAUSE_S
from gateway.jobs import now
from gateway.receivers import Allowed, Receivers
from vidgen import contracts, dead, errors, topology, tracing, webhooks
from vidgen.bus import Bus, Delivery
from vidgen.contracts import DEFAULT_TENANT
from vidgen.metrics import GatewayMetrics

log = structlog.get_logger(__name__)

SHARE = 8  # one receiver takes at most one in so many of the posts that a replica does at once
TENANTS_SHARE = 4  # and those of one tenant one in so many: it may name any number of receivers
SHORTEST_WAIT_S, LONGEST_WAIT_S = 0.2, 15.0
FIRST_GUESS_S, NEWEST = 0.1, 0.3  # how long a post takes, and how much the last one says of the next
GONE = 410
JITTER = 0.1


@dataclass
class _Queue:
    """One receiver, or one tenant's: how many are there, how long it takes, and until when others were told to wait."""

    busy: int = 0
    pace: float = FIRST_GUESS_S
    until: float = 0.0


class Places:
    """The places that each receiver, or each tenant, has; whoever finds none is told when its turn should come.

    Those who wait are strung out at the receiver's own pace: all of them at once, again and again, would take the loops
    that others need, and each a little longer than the last would leave a quick receiver idle.
    """

    def __init__(self, each: int, clock: Callable[[], float]) -> None:
        self._each, self._clock = each, clock
        self._queues: dict[str, _Queue] = {}

    def take(self, name: str) -> float:
        """Take a place: 0; else the seconds after which to come again."""
        wait = self.wait(name)
        if not wait:
            self._queues.setdefault(name, _Queue()).busy += 1
        return wait

    def wait(self, name: str) -> float:
        """0 where there is a place; else the seconds after which to come again."""
        queue, now = self._queues.get(name), self._clock()
        if queue is None or queue.busy < self._each:
            return 0.0
        queue.until = min(max(now, queue.until) + queue.pace / self._each, now + LONGEST_WAIT_S)
        return max(SHORTEST_WAIT_S, queue.until - now)

    def leave(self, name: str, seconds: float) -> None:
        """Give a place back, after so many seconds."""
        queue = self._queues[name]
        queue.busy -= 1
        queue.pace += NEWEST * (seconds - queue.pace)
        # Of all, for those who were told to wait may have gone to another replica.
        now = self._clock()
        for idle in [name for name, one in self._queues.items() if not one.busy and one.until <= now]:
            del self._queues[idle]


async def next_of(bus: Bus, consumer: topology.Consumer, stop: asyncio.Event) -> Delivery | None:
    """The next message, or None when told to stop: a cancelled pull hands back what it was about to take."""
    pulling = asyncio.ensure_future(bus.pull(consumer))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((pulling, stopping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        if not pulling.done():
            pulling.cancel()
            await asyncio.gather(pulling, return_exceptions=True)
    return None if pulling.cancelled() else pulling.result()


class Webhooks:
    """The loops that deliver; `run` ends when `stop` is set and what was taken is settled."""

    def __init__(
        self, bus: Bus, receivers: Receivers, secret: webhooks.Secret, metrics: GatewayMetrics, *,
        give_up_after: float, concurrency: int, renew_every: float, clock: Callable[[], datetime] = now,
    ) -> None:  # fmt: skip
        self._bus, self._receivers, self._secret, self._metrics = bus, receivers, secret, metrics
        self._give_up_after, self._concurrency, self._renew_every = give_up_after, concurrency, renew_every
        self._now = clock
        self._of_receivers = Places(max(1, concurrency // SHARE), time.monotonic)
        self._of_tenants = Places(max(1, concurrency // TENANTS_SHARE), time.monotonic)

    @property
    def allowed(self) -> Allowed:
        """Where webhooks may go."""
        return self._receivers.allowed

    async def run(self, stop: asyncio.Event) -> None:
        """Deliver until `stop`."""
        async with self._receivers, asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(self._deliver_all(stop))

    async def _deliver_all(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                delivery = await next_of(self._bus, topology.GATEWAY_WEBHOOKS, stop)
                if delivery is not None:
                    await self._settle(delivery)
            except errors.VidgenError as exc:
                log.warning(exc.message, _event="webhooks_interrupted")
                await asyncio.sleep(PAUSE_S)
            except Exception:  # one webhook must never stop the others; it comes again when its lease has run out
                log.exception("a webhook could not be delivered", _event="webhook_undigested")
                await asyncio.sleep(PAUSE_S)

    async def _settle(self, delivery: Delivery) -> None:
        first = await self._bus.first(topology.WEBHOOKS, delivery.subject)
        if first is None or first.seq > delivery.seq:
            await delivery.ack()  # it was settled while its lease ran out
            return
        try:
            webhook = contracts.Webhook.model_validate_json(delivery.body)
        except pydantic.ValidationError:
            unreadable = errors.RejectedError("this version does not know its form", code="webhook_unreadable")
            await self._give_up(delivery, unreadable)
            return
        host, tenant = urlsplit(_url_of(webhook)).netloc, webhook.data.tenant
        if first.seq < delivery.seq:
            # The longer the older one has been there, the longer it is likely to stay.
            age = (self._now() - first.at).total_seconds()
            await delivery.nak(min(LONGEST_WAIT_S, max(SHORTEST_WAIT_S, age / 4)))
        elif wait := self._take(host, tenant):
            await delivery.nak(wait)
        else:
            began = time.monotonic()
            try:
                await self._deliver(delivery, webhook)
            finally:
                self._leave(host, tenant, time.monotonic() - began)
                self._metrics.webhook_tried(time.monotonic() - began)

    def _take(self, host: str, tenant: str) -> float:
        """Take a place of the receiver's and of the tenant's: 0; else the seconds after which to come again."""
        if tenant == DEFAULT_TENANT:  # the operator's own has no limits
            return self._of_receivers.take(host)
        wait = self._of_tenants.wait(tenant) or self._of_receivers.take(host)
        return wait or self._of_tenants.take(tenant)

    def _leave(self, host: str, tenant: str, seconds: float) -> None:
        self._of_receivers.leave(host, seconds)
        if tenant != DEFAULT_TENANT:
            self._of_tenants.leave(tenant, seconds)

    async def _deliver(self, delivery: Delivery, webhook: contracts.Webhook) -> None:
        try:
            with tracing.span(f"webhook {webhook.type}", of=delivery.headers, job_id=webhook.data.id):
                await self._post(delivery, webhook)
        except errors.RejectedError as exc:
            await self._give_up(delivery, exc)
        except errors.RetryableError as exc:
            await self._put_off(delivery, exc)
        else:
            await delivery.ack()
            self._metrics.webhook("delivered")

    async def _post(self, delivery: Delivery, webhook: contracts.Webhook) -> None:
        """Raises RejectedError where it is of no use to try again, RetryableError where it may be."""
        headers = {
            "content-type": "application/json",
            "user-agent": "vidgen",
            **self._secret.of_tenant(webhook.data.tenant).sign(webhook.id, self._now(), delivery.body),
        }
        posting = asyncio.ensure_future(self._receivers.post(_url_of(webhook), delivery.body, headers))
        try:
            while not (await asyncio.wait({posting}, timeout=self._renew_every))[0]:
                await delivery.in_progress()  # else another replica would post it beside us, and go on to the next one
        finally:
            posting.cancel()
        status = posting.result()
        if status == GONE:
            raise errors.RejectedError("the receiver answered 410: it wants no more", code="webhook_gone")
        if not 200 <= status < 300:
            raise errors.RetryableError(f"the receiver answered {status}", code="webhook_failed")

    async def _put_off(self, delivery: Delivery, exc: errors.RetryableError) -> None:
        wait = webhooks.next_try((self._now() - delivery.at).total_seconds(), self._give_up_after)
        if wait is None:
            await self._give_up(delivery, exc)
            return
        log.info(exc.message, _event="webhook_failed", webhook=_id_of(delivery), code=exc.code, again_in_s=round(wait))
        # Spread, so that a receiver that comes back is not met by all of them in one moment.
        await delivery.nak(wait * random.uniform(1, 1 + JITTER))  # noqa: S311
        self._metrics.webhook("retried")

    async def _give_up(self, delivery: Delivery, exc: errors.VidgenError) -> None:
        error = contracts.JobError(code=exc.code, message=exc.message)
        letter = dead.letter(delivery.body, delivery.subject, error, job_id=delivery.subject.rsplit(".", 1)[-1])
        await dead.publish(self._bus, letter, message_id=f"webhook:{delivery.seq}", subject=topology.DEAD_WEBHOOKS)
        await delivery.ack()
        log.warning(exc.message, _event="webhook_given_up", webhook=_id_of(delivery), code=exc.code)
        self._metrics.webhook("given_up")
        self._metrics.dead_lettered("webhook")


def _url_of(webhook: contracts.Webhook) -> str:
    request = webhook.data.request
    return (request.webhook_url if request else None) or ""


def _id_of(delivery: Delivery) -> str:
    return delivery.headers.get("Nats-Msg-Id", delivery.subject)
