"""Looks after tasks whose deliveries ran out: each stays in its queue, and the bus never gives it out again.

One advisory tells of each. It is no acknowledged message: where the bus was killed just then, or its disk was full,
nobody is told, and what a queue holds is counted against what waits there and what is in hands.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

import pydantic
import structlog

from gateway.share import FairShare
from vidgen import attempts, contracts, dead, errors, eventlog, topology, tracing
from vidgen.bus import Bus, Delivery, Stored, each
from vidgen.contracts import LANES, STAGES
from vidgen.waiting import told_within

log = structlog.get_logger(__name__)

SWEEP_S = 600.0  # what stood still for that long is likely to be in nobody's hands; whoever has it is asked


class Stranded:
    """Queues them anew, or gives them up. Each replica does; what is done twice does no harm."""

    def __init__(self, bus: Bus, share: FairShare) -> None:
        self._bus, self._share = bus, share
        self._stood: dict[int, int] = {}  # where the log of a task's job was at the last sweep, by the task's sequence

    async def run(self, stop: asyncio.Event) -> None:
        """Sweep until `stop`."""
        while not stop.is_set():
            try:
                await self.sweep()
            except errors.VidgenError as exc:
                log.warning(exc.message, _event="stranded_unknown")
            await told_within(stop, SWEEP_S)

    async def on_advisory(self, delivery: Delivery) -> None:
        """Look after the task that the bus tells of.

        One that was begun lost its deliveries to others: to workers that were drained, or died with several tasks. It
        gets new ones; its tries are counted by its log. What nobody could ever begin is given up, aloud.
        """
        stored = await self._bus.get(topology.TASKS, int(json.loads(delivery.body)["stream_seq"]))
        if stored is None:
            return
        task = contracts.Task.model_validate_json(stored.body)
        newest = await eventlog.newest(self._bus, task.job_id, task.run)
        verdict = attempts.judge(task, newest.event, eventlog.ANY_TRIES)
        if isinstance(verdict, attempts.Run) and verdict.attempt == 1:
            await self._give_up(task, stored)
        else:
            await self._look_after(task, stored, verdict)

    async def sweep(self) -> None:
        """Look after what is stranded though nobody told of it.

        The bus does not say which: of those that stood still since the last sweep it is any that no worker is at. One
        that waits to be given out again loses its place in the queue by that, and nothing else.
        """
        stood, self._stood = self._stood, {}
        for stage in STAGES:
            for lane in LANES:
                for stored in await self._given(topology.consumer_of(stage, lane)):
                    await self._look_at(stored, stood)

    async def _given(self, consumer: topology.Consumer) -> list[Stored]:
        """What was handed out, where there is more of it than the consumer knows of: of what ran out it does not."""
        depth = await self._bus.depth(consumer)
        given = []
        async for stored in each(self._bus, consumer.stream, consumer.filter_subject or ">"):
            if stored.seq > depth.delivered:
                break
            given.append(stored)
        return given if len(given) > depth.ack_pending else []

    async def _look_at(self, stored: Stored, stood: Mapping[int, int]) -> None:
        try:
            task = contracts.Task.model_validate_json(stored.body)
            newest = await eventlog.newest(self._bus, task.job_id, task.run)
        except (pydantic.ValidationError, eventlog.UnreadableError):  # of another version: whoever takes it says so
            return
        self._stood[stored.seq] = newest.seq
        if stood.get(stored.seq) != newest.seq:
            return
        event = newest.event
        if isinstance(event, contracts.StageEvent) and event.stage == task.stage:
            worker = topology.subject_of_worker(event.stage, event.worker)
            if await self._bus.ask(worker, task.job_id.encode()) == eventlog.AT_IT:
                return
        await self._look_after(task, stored, attempts.judge(task, event, eventlog.ANY_TRIES))

    async def _look_after(self, task: contracts.Task, stored: Stored, verdict: attempts.Verdict) -> None:
        if isinstance(verdict, attempts.Drop):  # its last worker said how it ended, and died before it was acknowledged
            await self._bus.delete(topology.TASKS, stored.seq)
            return
        await self._share.queue_again(task, stored)
        log.warning("a task had many hands: it is queued anew", _event="requeued", job=task.job_id, stage=task.stage)

    async def _give_up(self, task: contracts.Task, stored: Stored) -> None:
        error = contracts.JobError(
            code="deliveries_exhausted", stage=task.stage, retryable=True,
            message="the task was handed out too often without an end: see the workers' logs, then retry the job",
        )  # fmt: skip
        letter = dead.letter(stored.body, stored.subject, error, job_id=task.job_id, stage=task.stage)
        with tracing.span(
            "give up", of=stored.headers, kind="consumer", job_id=task.job_id, stage=task.stage, run=task.run
        ):
            tracing.failed(error.code)
            await dead.publish(self._bus, letter, message_id=f"{task.job_id}:{task.stage}:{task.run}:dead")
            await eventlog.give_up(self._bus, task, "gateway", error)
            await self._bus.delete(topology.TASKS, stored.seq)
