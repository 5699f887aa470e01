"""What must be true when everything is over, whatever was done to the system: one audit for every fault."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from prometheus_client.parser import text_string_to_metric_families
from tests.fault.nursery import Child
from tests.fault.system import BOUND_S, FINAL, POLL_S, Asked, System
from tests.fault.worker import PAD, entries, made_of

from vidgen import contracts, errors, results, topology
from vidgen.artifacts import job_prefix
from vidgen.contracts import STAGES, Event, Job

T = TypeVar("T")

EMPTY = (topology.REQUESTS, topology.TASKS, topology.ADVISORIES)
ENDED = (
    contracts.StageCompleted, contracts.StageFailed, contracts.StageReleased, contracts.StageCancelled,
)  # fmt: skip
SAID_AS = {"reused": "completed", "dead": "failed", "rejected": "failed"}  # a worker's outcomes, as events have them
AGAIN = "again"
KINDS = ("completed", "failed", "retried", "cancelled")  # `released` needs no event where nothing was begun
BY = {"vidgen_jobs_total": "status", "vidgen_tasks_total": "outcome"}  # the label by which a counter is compared
STATUS = {
    contracts.JobCompleted: "completed", contracts.JobFailed: "failed", contracts.JobCancelled: "cancelled",
    contracts.Rejected: "rejected",
}  # fmt: skip


@dataclass
class Ledger:
    """The books of a system. `overtaken` are workers that were cut off: they may have computed beside another one."""

    system: System
    overtaken: Collection[str] = ()
    pad: int = PAD
    counters: bool = True  # whether the gateways lived all the while, so that their counters tell of everything
    exact: bool = True  # whether no event came to two gateways: else both may have counted it
    wrong: list[str] = field(default_factory=list)

    async def audit(self) -> Counter[str]:
        """Check everything, and raise one AssertionError that names all that is wrong; the number of jobs by status."""
        await self.system.until_ended()
        await self._nothing_is_left()
        log = await patiently(self._log)
        records = {job_id: await patiently(lambda job_id=job_id: self._record(job_id)) for job_id in self.system.asked}
        ends = self._one_end_each(log, records)
        for asked in self.system.asked.values():
            await self._artifacts(asked, records[asked.job_id])
        self._computed_once(log, records)
        if self.counters:
            await self._metrics(log)
        await self._workers(log)
        assert not self.wrong, f"{len(self.wrong)} things are wrong:\n" + "\n".join(self.wrong[:30])
        return ends

    async def _nothing_is_left(self) -> None:
        """Queues come empty by themselves: nothing waits, nothing is held, nothing lies in a queue unseen."""
        try:
            async with asyncio.timeout(BOUND_S):
                while left := await patiently(self.left):
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            self.wrong.append(f"stuck: {left}")

    async def left(self) -> dict[str, int]:
        """What is in a queue, or in somebody's hands."""
        left = {name: (await self.system.bus.held(name)).messages for name in EMPTY}
        for consumer in topology.CONSUMERS:
            depth = await self.system.bus.depth(consumer)
            left[f"{consumer.stream}/{consumer.name}"] = depth.waiting
        return {name: count for name, count in left.items() if count}

    async def _log(self) -> dict[str, list[Any]]:
        """Every event of every job, read anew from the bus."""
        feed = await self.system.bus.follow(topology.EVENTS, "vidgen.events.*")
        found: dict[str, list[Any]] = defaultdict(list)
        last = (await self.system.bus.tail(topology.EVENTS, None, 1))[0].seq
        seq = 0
        while seq < last:
            stored = await feed.next(BOUND_S)
            assert stored is not None, "the log of events ended early"
            seq = stored.seq
            event = Event.validate_json(stored.body)
            found[event.job_id].append(event)
        await feed.close()
        return found

    async def _record(self, job_id: str) -> Job | None:
        found = await self.system.bus.records(topology.JOBS_BUCKET).get(job_id)
        return Job.model_validate_json(found[0]) if found else None

    def _one_end_each(self, log: dict[str, list[Any]], records: dict[str, Job | None]) -> Counter[str]:
        ends: Counter[str] = Counter()
        for job_id in log.keys() - self.system.asked.keys():
            self.wrong.append(f"{job_id}: nobody asked for it")
        for job_id, record in records.items():
            finals = [STATUS[type(event)] for event in log[job_id] if isinstance(event, FINAL)]
            runs = record.run if record else 1
            if record is None or not record.status.final:
                self.wrong.append(f"{job_id}: no final record: {record and record.status}")
            elif finals[-1:] != [record.status.value] or len(finals) > runs:
                self.wrong.append(f"{job_id}: the record says {record.status}, the log {finals}")
            if sum(isinstance(event, contracts.Accepted) for event in log[job_id]) > 1:
                self.wrong.append(f"{job_id}: accepted twice")
            ends.update(finals[-1:])
        return ends

    async def _artifacts(self, asked: Asked, record: Job | None) -> None:
        """Stored once, as record and manifest say, and with the bytes that an undisturbed run would have made."""
        if record is None:
            return
        known: set[str] = set()
        for stage in STAGES:
            part = record.stage_record(stage)
            if part is None or part.state is not contracts.StageState.COMPLETED:
                continue
            [artifact] = part.artifacts
            known.add(artifact.key)
            target = self.system.folder / "fetched"
            await self.system.store.fetch(artifact.key, target)
            data = target.read_bytes()
            told = (artifact.size, artifact.sha256)
            if told != (len(data), hashlib.sha256(data).hexdigest()):
                self.wrong.append(f"{artifact.key}: {len(data)} bytes are stored, the record says otherwise")
            if data != made_of(stage, asked.seed, asked.steps, self.pad):
                self.wrong.append(f"{artifact.key}: not what {asked.steps} steps in order make")
            stat = await self.system.store.stat(artifact.key)
            if stat is None or results.MANIFEST not in (stat.metadata or {}):
                self.wrong.append(f"{artifact.key}: stored without its manifest")
        stored = {found.key for found in await self.system.store.page(job_prefix(asked.job_id))}
        if record.status is contracts.JobStatus.COMPLETED and stored != known:
            self.wrong.append(f"{asked.job_id}: {sorted(stored)} are stored, its record knows {sorted(known)}")

    def _computed_once(self, log: dict[str, list[Any]], records: dict[str, Job | None]) -> None:
        """No task comes to its end twice but for a worker that died, or was cut off, before it could say so.

        A retry may compute again what was cancelled behind it: then once a run.
        """
        by_seed = {asked.seed: asked.job_id for asked in self.system.asked.values()}
        runs = {seed: record.run for seed, job_id in by_seed.items() if (record := records[job_id])}
        died = {child.pid for child in self.system.dead}
        done: dict[tuple[str, int], list[Any]] = defaultdict(list)
        for entry in entries(self.system.journals):
            if entry.what == "done":
                done[entry.stage, entry.seed].append(entry)
        for task, times in done.items():
            events = log[by_seed[task[1]]]
            told = {e.worker for e in events if isinstance(e, contracts.StageCompleted) and e.stage == task[0]}
            excused = [e for e in times if (e.pid in died or e.worker in self.overtaken) and e.worker not in told]
            if len(times) - len(excused) > runs.get(task[1], 1):
                workers = [entry.worker for entry in times]
                self.wrong.append(f"{task}: computed to its end by {workers}; {_story(events)}")

    async def _metrics(self, log: dict[str, list[Any]]) -> None:
        """What the gateways counted is what the logs say."""
        events = [event for found in log.values() for event in found]
        letters = await patiently(lambda: self.system.bus.held(topology.DEAD))
        wanted = {
            **{f"vidgen_jobs_total {end}": 0 for end in STATUS.values()},
            **Counter(f"vidgen_jobs_total {STATUS[type(event)]}" for event in events if isinstance(event, FINAL)),
            "vidgen_redeliveries_total": sum(
                isinstance(event, contracts.StageStarted) and event.deliveries > 1 for event in events
            ),
            "vidgen_dead_letters_total": letters.messages,
            "vidgen_requests_total": sum(isinstance(event, contracts.Accepted) for event in events),
            **{f"vidgen_tasks_total {end}": 0 for end in ("completed", "reused", "failed", "retried", "released")},
            **Counter(f"vidgen_tasks_total {_end(event)}" for event in events if isinstance(event, ENDED)),
        }  # fmt: skip
        told: dict[str, float] = {}
        try:
            async with asyncio.timeout(BOUND_S):  # what a gateway has just acked it may not have counted
                while (told := await self._counted(wanted)) != wanted:
                    if not self.exact and all(told[name] >= value for name, value in wanted.items()):
                        return
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            self.wrong.append(f"the metrics say {told}, the log {wanted}")

    async def _workers(self, log: dict[str, list[Any]]) -> None:
        """What each worker counted is what it logged, and what it logged is in the logs of the jobs.

        Of one that was killed its log is left, which may lack what it was about to write; of one that lost the bus at
        the end of a task, that end may be in the log all the same.
        """
        said: dict[str, Counter[str]] = defaultdict(Counter)
        for event in (event for found in log.values() for event in found if isinstance(event, ENDED)):
            said[event.worker][SAID_AS.get(_end(event), _end(event))] += 1
        for child in [child for child in [*self.system.alive, *self.system.dead] if child.role == "worker"]:
            outcomes = await self._settled(child)
            logged, told = Counter[str](), said[self.system.id_of(child.name)]
            for outcome, count in outcomes.items():
                logged[SAID_AS.get(outcome, outcome)] += count
            missing = [kind for kind in KINDS if logged[kind] > told[kind]]
            more = sum((told - logged).values())
            if missing or (child.ended is None and more > logged["lost"]):
                self.wrong.append(f"{child.name} logged {dict(logged)}, the jobs' logs say {dict(told)} of it")

    async def _settled(self, child: Child) -> Counter[str]:
        """A worker's tasks by outcome; where it lives, once its counters say what its log does."""
        logged, counted = _outcomes(child), Counter[str]()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BOUND_S), httpx.AsyncClient(timeout=BOUND_S) as http:
                while child.ended is None and (logged or child.url):  # else it has only just begun
                    with contextlib.suppress(httpx.HTTPError):  # it may be about to leave
                        counted = _counted_by((await http.get(f"{child.url}/metrics")).text)
                    logged = _outcomes(child)
                    if counted == logged:
                        break
                    await asyncio.sleep(POLL_S)
        if child.ended is None and counted != logged:
            self.wrong.append(f"{child.name} counts {dict(counted)}, its log says {dict(logged)}")
        return logged

    async def _counted(self, names: Collection[str]) -> dict[str, float]:
        found = dict.fromkeys(names, 0.0)
        async with httpx.AsyncClient(timeout=BOUND_S) as http:
            for gateway in self.system.of("gateway"):
                text = (await http.get(f"{gateway.url}/metrics")).text
                for name, value in _samples(text):
                    if name in found:
                        found[name] += value
        return found


async def patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """An answer of the bus, which may be choosing a leader."""
    async with asyncio.timeout(BOUND_S):
        while True:
            try:
                return await ask()
            except errors.BusError:
                await asyncio.sleep(POLL_S)


def _samples(text: str) -> Iterator[tuple[str, float]]:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get("outcome") != "duplicate":
                end = sample.labels.get(BY.get(sample.name, ""))
                yield f"{sample.name} {end}" if end else sample.name, sample.value


def _end(event: Any) -> str:
    """How a task ended, as the gateways count it."""
    match event:
        case contracts.StageCompleted():
            return "reused" if event.reused else "completed"
        case contracts.StageFailed():
            return "failed" if event.final else "retried"
        case contracts.StageReleased():
            return "released"
        case _:
            return "cancelled"


def _outcomes(child: Child) -> Counter[str]:
    """A worker's tasks by outcome, and the deliveries that were not the first, by its log."""
    tasks = [record for record in child.records() if record.get("event") == "task"]
    again = sum(record["deliveries"] > 1 for record in tasks)
    return +Counter({**Counter(record["outcome"] for record in tasks), AGAIN: again})


def _counted_by(text: str) -> Counter[str]:
    """The same by its counters."""
    counted = Counter[str]()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "vidgen_worker_tasks_total":
                counted[sample.labels["outcome"]] += int(sample.value)
            elif sample.name == "vidgen_worker_redeliveries_total":
                counted[AGAIN] += int(sample.value)
    return +counted


def _story(events: list[Any]) -> str:
    """What a job's log says, in short."""
    names = ("type", "attempt", "worker", "deliveries")
    told = [[*(str(getattr(event, name, "")) for name in names), f"{event.at:%M:%S.%f}"] for event in events]
    return "its log: " + ", ".join(" ".join(part for part in parts if part) for parts in told)
