"""What the gateway takes from the bus: requests, events, advisories. Replicas share the durable consumers."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection
from datetime import datetime

import pydantic
import structlog

from gateway.intake import Intake
from gateway.jobs import Jobs, parse_event
from gateway.stranded import Stranded
from vidgen import contracts, dead, errors, topology, tracing
from vidgen.bus import Bus, Delivery, Supply
from vidgen.metrics import GatewayMetrics

log = structlog.get_logger(__name__)

HAND_BACK_S = 2.0
PAUSE_S = 0.5
GIVE_UP_AFTER = 20  # deliveries of a message that this gateway cannot digest
REMEMBERED = 10_000  # events that came last
OWN = contracts.Accepted | contracts.AnyEnd  # what gateways write themselves: nothing is to be done about them

# What comes in belongs to those who answer HTTP: what a replica lets in itself comes back to it, and is known there.
TAKEN_IN = (topology.REQUESTS,)
MOVING_ON = (topology.EVENTS, topology.ADVISORIES)
STREAMS = (*TAKEN_IN, *MOVING_ON)

Handler = Callable[[Delivery], Awaitable[None]]


class Consumers:
    """The loops that move jobs on; `run` ends when `stop` is set and what was taken is settled."""

    def __init__(
        self, bus: Bus, jobs: Jobs, intake: Intake, metrics: GatewayMetrics, concurrency: int,
        streams: Collection[str] = STREAMS,
    ) -> None:  # fmt: skip
        """`streams` are those that this replica consumes; others must see to the rest."""
        self._bus, self._jobs, self._intake, self._metrics = bus, jobs, intake, metrics
        self._concurrency, self._streams = concurrency, streams
        self._stranded = Stranded(bus, jobs.share)
        # Events that this replica has begun with, and whether it is done with them. One may come again: where its ack
        # was lost it was counted; where the bus failed in its middle it was not, and what it changes is found changed.
        # By their time, too, for a stream that is made anew begins at the first sequence.
        self._seen: OrderedDict[tuple[int, datetime], bool] = OrderedDict()

    async def run(self, stop: asyncio.Event) -> None:
        """Consume until `stop`."""
        by_stream = {consumer.stream: consumer for consumer in topology.CONSUMERS if consumer.name == topology.GATEWAY}
        async with asyncio.TaskGroup() as group:
            for stream, handle, at_once in (
                (topology.REQUESTS, self._on_request, self._concurrency),
                (topology.EVENTS, self._on_event, self._concurrency),
                (topology.ADVISORIES, self._stranded.on_advisory, 1),
            ):
                if stream in self._streams:
                    group.create_task(self._consume(by_stream[stream], handle, at_once, stop))
            if topology.ADVISORIES in self._streams:
                group.create_task(self._stranded.run(stop))
            group.create_task(self._jobs.share.run(stop))

    async def _consume(self, consumer: topology.Consumer, handle: Handler, at_once: int, stop: asyncio.Event) -> None:
        supply = self._bus.supply(consumer, at_once)
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(self._handle_all(supply, consumer, handle))
            try:
                await stop.wait()
            finally:
                await supply.close()

    async def _handle_all(self, supply: Supply, consumer: topology.Consumer, handle: Handler) -> None:
        while True:
            try:
                delivery = await supply.next()
            except errors.BusError as exc:
                log.warning(exc.message, _event="bus_lost", consumer=consumer.stream)
                await asyncio.sleep(PAUSE_S)
                continue
            if delivery is None:
                return
            await self._settle(consumer, handle, delivery)

    async def _settle(self, consumer: topology.Consumer, handle: Handler, delivery: Delivery) -> None:
        try:
            try:
                await handle(delivery)
            except errors.RetryableError as exc:
                log.warning(exc.message, _event="handed_back", stream=consumer.stream, seq=delivery.seq)
                await delivery.nak(HAND_BACK_S)
                return
            except Exception:  # one message must never stop the others
                log.exception(
                    "a message could not be digested", _event="undigested", stream=consumer.stream, seq=delivery.seq
                )
                if delivery.num_delivered < GIVE_UP_AFTER:
                    await delivery.nak(HAND_BACK_S * delivery.num_delivered)
                    return
                error = contracts.JobError(code="undigested", message="the gateway could not process this message")
                letter = dead.letter(delivery.body, delivery.subject, error, job_id=None)
                await dead.publish(self._bus, letter, message_id=f"undigested:{consumer.stream}:{delivery.seq}")
                self._metrics.dead_lettered(None)
            await delivery.ack(heard=False)  # whatever comes again is found done
        except errors.VidgenError as exc:
            log.warning(exc.message, _event="settle_failed", stream=consumer.stream, seq=delivery.seq)

    async def _on_request(self, delivery: Delivery) -> None:
        with tracing.span("request", of=delivery.headers, kind="consumer", deliveries=delivery.num_delivered):
            try:
                await self._intake.handle(delivery)
            except errors.RetryableError:
                raise
            except Exception:
                if delivery.num_delivered < GIVE_UP_AFTER:
                    raise
                log.exception("a request could not be digested", _event="undigested", seq=delivery.seq)
                await self._intake.give_up(delivery)

    async def _on_event(self, delivery: Delivery) -> None:
        try:
            event = parse_event(delivery.body)
        except pydantic.ValidationError:
            log.warning("an event that is none is passed over", _event="event_invalid", seq=delivery.seq)
            return
        mark = delivery.seq, delivery.at
        begun = mark in self._seen
        self._see(mark, done=self._seen.get(mark, False))
        if isinstance(event, OWN):
            if not self._seen[mark]:
                await self._count(event)
        else:
            job, changed = await self._move(event, delivery)
            if job is not None and (changed or begun) and not self._seen.get(mark):
                self._metrics.observe(event, job)
        self._see(mark, done=True)

    def _see(self, mark: tuple[int, datetime], *, done: bool) -> None:
        self._seen[mark] = done
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)

    async def _move(self, event: contracts.AnyEvent, delivery: Delivery) -> tuple[contracts.Job | None, bool]:
        """Move a job on; the job, None where there is no such one, and whether the event was news to it."""
        stage, attempt = getattr(event, "stage", None), getattr(event, "attempt", None)
        with tracing.span(
            f"decide {event.type}", of=delivery.headers, kind="consumer", job_id=event.job_id, run=event.run,
            stage=stage, attempt=attempt, deliveries=delivery.num_delivered,
        ):  # fmt: skip
            if isinstance(event, contracts.StageStarted):
                job, changed = await self._jobs.started(event), True
            else:
                applied = await self._jobs.apply(event, delivery.seq)
                job, changed = (applied.job, applied.changed) if applied is not None else (None, False)
        if job is None:
            log.warning("an event of an unknown job is passed over", _event="event_orphaned", job=event.job_id)
        return job, changed

    async def _count(self, event: contracts.Accepted | contracts.AnyEnd) -> None:
        """Measure what gateways say of a job: each such event is in the log once, whichever replica wrote it."""
        if isinstance(event, contracts.Accepted):  # its record may be a moment behind
            self._metrics.request_accepted()
            return
        job = await self._jobs.ended(event.job_id)
        if job is None:
            return
        if event.run == job.run and not job.status.final:
            # The record was written first; on a bus of several nodes the one that answers may not have it yet.
            raise errors.RetryableError(f"the record of job {event.job_id} is behind its log")
        self._metrics.observe(event, job)
        self._metrics.job_finished(job, event)
