"""What must be true when everything is over, whatever was done to the system: one audit for every fault."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from prometheus_client.parser import text_string_to_metric_families
from tests.fault.system import BOUND_S, FINAL, POLL_S, Asked, System
from tests.fault.worker import PAD, entries, made_of

from vidgen import contracts, errors, results, topology
from vidgen.artifacts import job_prefix
from vidgen.contracts import STAGES, Event, Job

T = TypeVar("T")

EMPTY = (topology.REQUESTS, topology.TASKS, topology.ADVISORIES)
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
    exact: bool = True  # whether the bus lived too: else an event that a gateway counted may have come to it again
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
        }  # fmt: skip
        told: dict[str, float] = {}
        try:
            async with asyncio.timeout(10):  # what a gateway has just acked it may not have counted
                while (told := await self._counted(wanted)) != wanted:
                    if not self.exact and all(told[name] >= value for name, value in wanted.items()):
                        return
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            self.wrong.append(f"the metrics say {told}, the log {wanted}")

    async def _counted(self, names: Collection[str]) -> dict[str, float]:
        found = dict.fromkeys(names, 0.0)
        async with httpx.AsyncClient() as http:
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
                end = f" {sample.labels['status']}" if sample.name == "vidgen_jobs_total" else ""
                yield f"{sample.name}{end}", sample.value


def _story(events: list[Any]) -> str:
    """What a job's log says, in short."""
    names = ("type", "attempt", "worker", "deliveries")
    told = [[*(str(getattr(event, name, "")) for name in names), f"{event.at:%M:%S.%f}"] for event in events]
    return "its log: " + ", ".join(" ".join(part for part in parts if part) for parts in told)
