"""One client's view of one job: the log replayed without a gap, progress as it comes, and the record at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import structlog

from gateway.forecast import Forecast
from gateway.jobs import Jobs, parse_event, parse_progress
from vidgen import contracts, errors, topology
from vidgen.bus import Bus, Feed, Stored
from vidgen.contracts import Job, JobStatus

log = structlog.get_logger(__name__)

KEEP_ALIVE_S = 10.0
PLACE_S = 2.0  # between two looks at the queue
READ_S = 5.0
PAUSE_S = 0.5
RECORD_PATIENCE_S = 5.0
RECORD_PAUSE_S = 0.05
BACKLOG = 64
ENDS = (contracts.JobCompleted, contracts.JobFailed, contracts.JobCancelled, contracts.Rejected)
KEEP_ALIVE = b": keep-alive\n\n"


def frame(event: str, data: bytes, seq: int | None = None) -> bytes:
    """A server-sent event; the data are JSON, and become one line."""
    place = b"" if seq is None else b"id: %d\n" % seq
    return b"%bevent: %b\ndata: %b\n\n" % (place, event.encode(), b" ".join(data.splitlines()))


class JobFeed:
    """What is to be told of a job, as frames. Opened by `open`, to be closed."""

    def __init__(
        self, jobs: Jobs, job: Job, log_feed: Feed, progress: Feed, after: int, newest: int, forecast: Forecast | None
    ) -> None:  # fmt: skip
        self._jobs, self._job_id, self._forecast = jobs, job.id, forecast
        self._waits = True  # as far as the log tells: no worker has begun the stage that is due
        self._place: contracts.QueuePlace | None = None
        self._waiting: Job | None = None  # as it was found in its queue; whatever ends that is in the log
        self._feeds = (log_feed, progress)
        self._queue: asyncio.Queue[Stored | None] = asyncio.Queue(BACKLOG)
        self._pumps: list[asyncio.Task[None]] = []
        self._seen, self._newest = after, newest
        self._run = job.run
        # The log, or the record, says that the newest run known has ended. The record is final a moment before the log,
        # which says so itself where anything of it is still to be told.
        self._ended = job.status.final and self._caught_up
        self._progress: bytes | None = job.progress.to_bytes() if job.progress else None

    @classmethod
    async def open(
        cls, bus: Bus, jobs: Jobs, job_id: str, after: int, stopping: asyncio.Event, forecast: Forecast | None = None,
        look: Callable[[], Awaitable[Job]] | None = None,
    ) -> JobFeed:  # fmt: skip
        """Begin to listen; raises JobNotFoundError and BusError. With `forecast` a waiting job's place is told too.

        `look` finds the job, and raises where it may not be seen.
        """
        # Progress is listened to before anything is read, and the place of the log's end is read before the log: what
        # happens meanwhile comes through one or the other.
        progress = await bus.listen(topology.subject_of_progress(job_id))
        try:
            subject = topology.subject_of_events(job_id)
            job = await (look() if look is not None else jobs.get(job_id))
            newest = await bus.last(topology.EVENTS, subject)
            log_feed = await bus.follow(topology.EVENTS, subject, after)
        except BaseException:
            await progress.close()
            raise
        feed = cls(jobs, job, log_feed, progress, after, newest.seq if newest else 0, forecast)
        feed._pumps = [
            *(asyncio.create_task(feed._pump(source)) for source in feed._feeds),
            asyncio.create_task(feed._watch(stopping)),
        ]
        return feed

    async def close(self) -> None:
        """Let go of the bus."""
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        await asyncio.gather(*(feed.close() for feed in self._feeds), return_exceptions=True)

    async def frames(self) -> AsyncIterator[bytes]:
        """The frames, until the job has ended or the process is about to."""
        yield b"retry: 2000\n\n"
        for start in self._when_caught_up():
            yield start
        silent_s = 0.0
        while True:
            if self._ended and self._caught_up and (job := await self._final_record()) is not None:
                yield frame("job", job.to_bytes())
                return
            pause = PLACE_S if self._forecast is not None and self._waits else KEEP_ALIVE_S
            try:
                async with asyncio.timeout(pause):
                    message = await self._queue.get()
            except TimeoutError:
                silent_s += pause
                if (place := await self._place_that_changed()) is not None:
                    silent_s = 0.0
                    yield frame("queue", place.to_bytes())
                elif silent_s >= KEEP_ALIVE_S:
                    silent_s = 0.0
                    yield KEEP_ALIVE
                    if not await self._goes_on():
                        return
                continue
            if message is None:
                return
            silent_s = 0.0
            for told in self._tell(message):
                yield told

    @property
    def _caught_up(self) -> bool:
        return self._seen >= self._newest

    def _tell(self, message: Stored) -> list[bytes]:
        if message.subject == topology.subject_of_progress(self._job_id):
            if parse_progress(message.body) is None:
                return []
            if self._caught_up:
                return [frame("progress", message.body)]
            self._progress = message.body  # it belongs behind what is being replayed
            return []
        behind = not self._caught_up
        self._seen = message.seq
        try:
            event = parse_event(message.body)
        except ValueError:
            log.warning("an event that is none is passed over", _event="event_invalid", seq=message.seq)
            return []
        if event.run >= self._run:
            self._ended = isinstance(event, ENDS) or (self._ended and event.run == self._run)
            self._run = event.run
            self._waits, self._place, self._waiting = not isinstance(event, contracts.StageStarted), None, None
        told = frame(event.type, message.body, message.seq)
        return [told, *self._when_caught_up()] if behind else [told]

    def _when_caught_up(self) -> list[bytes]:
        if not self._caught_up or self._ended or self._progress is None:
            return []
        progress, self._progress = self._progress, None
        return [frame("progress", progress)]

    async def _place_that_changed(self) -> contracts.QueuePlace | None:
        if self._forecast is None or not self._waits:
            return None
        before = self._place
        try:
            job = self._waiting or await self._jobs.find(self._job_id)
            self._place = await self._forecast.place(job) if job is not None else None
        except errors.BusError:
            return None
        self._waiting = job if self._place is not None else None
        # Its task may not be queued yet; one that waits for a person says in the log when it goes on.
        self._waits = job is not None and job.status in (JobStatus.QUEUED, JobStatus.IN_PROGRESS)
        return self._place if self._place != before else None

    async def _final_record(self) -> Job | None:
        """The record, once it says what the log says; None where the job goes on after all."""
        clock = asyncio.get_running_loop().time
        until = clock() + RECORD_PATIENCE_S
        while True:
            try:
                job = await self._jobs.find(self._job_id)
            except errors.BusError as exc:
                log.warning(exc.message, _event="bus_lost", job=self._job_id)
                job = None
            if job is not None and job.status.final and job.run >= self._run:
                return job
            if (job is not None and job.run > self._run) or clock() > until:
                self._ended = False  # a later run: its events are on their way
                return None
            await asyncio.sleep(RECORD_PAUSE_S)

    async def _goes_on(self) -> bool:
        """In a quiet moment: is the job still there, or did it end without the event that a dead gateway owes?"""
        try:
            job = await self._jobs.find(self._job_id)
        except errors.BusError:
            return True
        self._ended = job is not None and job.status.final and job.run >= self._run
        return job is not None

    async def _pump(self, feed: Feed) -> None:
        while True:
            try:
                message = await feed.next(READ_S)
            except errors.BusError as exc:
                log.warning(exc.message, _event="bus_lost", job=self._job_id)
                await asyncio.sleep(PAUSE_S)
                continue
            if message is not None:
                await self._queue.put(message)

    async def _watch(self, stopping: asyncio.Event) -> None:
        await stopping.wait()
        await self._queue.put(None)
