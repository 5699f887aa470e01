"""One task, from taken to settled: claim → fetch → prepare → generate → finish → store → publish → ack.

Settled in this order: artifact stored, event published, task acked. A crash between any two of them leads to a
redelivery that finds the artifact, or the event, and does not compute again.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pydantic
import structlog

from vidgen import attempts, contracts, dead, errors, eventlog, results
from vidgen.artifacts import ArtifactStore, check_key
from vidgen.bus import Bus, Delivery
from vidgen.contracts import Task, Timings
from vidgen.engine import Engine, Finished
from vidgen.eta import Recent
from vidgen.eventlog import Claim, FencedError
from vidgen.metrics import WorkerMetrics
from vidgen.progress import Reporter

log = structlog.get_logger(__name__)

Outcome = Literal[
    "completed", "reused", "failed", "rejected", "retried", "cancelled", "released", "fenced", "dead", "dropped", "lost"
]
MAX_INPUT_BYTES = 64 << 20


@dataclass(frozen=True)
class Policy:
    """What the runtime was told: limits, back-off and price."""

    worker_id: str
    stage: contracts.Stage
    ack_wait: float
    max_attempts: int = 3
    backoff_base: float = 1.0
    backoff_limit: float = 60.0
    gpu_usd_per_hour: float = 0.0
    work_dir: Path | None = None


@dataclass
class Stop:
    """Why a running task is to end early; read by the engine's thread at each step."""

    reason: Literal["cancelled", "fenced", "released"] | None = None
    since: float = 0.0
    raised: asyncio.Event = field(default_factory=asyncio.Event)

    def now(self, reason: Literal["cancelled", "fenced", "released"]) -> None:
        """Ask for the end; the first reason stays."""
        if self.reason is None:
            self.since = time.monotonic()
            self.reason = reason
            self.raised.set()

    def check(self) -> None:
        """Raise Cancelled if the end was asked for."""
        if self.reason is not None:
            raise errors.Cancelled


@dataclass
class Turn:
    """A task's way through the runtime: it waits for the device, and says when the next task may be prepared."""

    device: asyncio.Lock
    stop: Stop
    phase: Literal["preparing", "generating", "finishing"] = "preparing"

    def begins(self, expected_s: float | None) -> None:
        """The device is taken, for `expected_s` seconds if that is known."""

    def ends(self) -> None:
        """The device is free."""


@dataclass
class _Clocks:
    """Seconds per phase of one attempt."""

    queued: float = 0.0
    prepare: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    encode: float = 0.0
    store: float = 0.0
    device: float = 0.0

    @contextlib.contextmanager
    def timed(self, phase: str) -> Any:
        begun = time.monotonic()
        try:
            yield
        finally:
            setattr(self, phase, getattr(self, phase) + time.monotonic() - begun)

    def timings(self) -> Timings:
        return Timings(
            queued=self.queued, prepare=self.prepare, denoise=self.denoise, decode=self.decode,
            encode=self.encode, store=self.store,
        )  # fmt: skip


class Handler:
    """Handles the tasks of one stage with one engine; several may be under way, one at a time on the device."""

    def __init__(
        self, bus: Bus, store: ArtifactStore, engine: Engine, device_thread: Executor, metrics: WorkerMetrics,
        policy: Policy,
    ) -> None:  # fmt: skip
        self._bus, self._store, self._engine = bus, store, engine
        self._device_thread, self._metrics, self._policy = device_thread, metrics, policy
        self._pace: float | None = None  # seconds per step of the newest task
        self._finishing = Recent()
        self._busy_seconds = 0.0

    @property
    def seconds_per_step(self) -> float | None:
        return self._pace

    @property
    def busy_seconds(self) -> float:
        """Seconds for which the device was held."""
        return self._busy_seconds

    async def handle(self, delivery: Delivery, turn: Turn) -> Outcome:
        """See a task through to its settlement; raises FatalError when this worker must leave (the task is back)."""
        if delivery.num_delivered > 1:
            self._metrics.redelivered()
        try:
            task = Task.model_validate_json(delivery.body)
        except pydantic.ValidationError as exc:
            return await self._bury_unreadable(delivery, exc)
        clocks = _Clocks(queued=max(0.0, (datetime.now(UTC) - task.queued_at).total_seconds()))
        fatal: errors.FatalError | None = None
        with structlog.contextvars.bound_contextvars(job=task.job_id, stage=task.stage):
            try:
                outcome = await self._attempt(delivery, task, turn, clocks)
            except errors.FatalError as exc:
                outcome, fatal = "released", exc
            except errors.BusError as exc:
                # Not settled: the lease runs out and the task comes again, to find what is stored.
                log.warning(exc.message, _event="settle_failed")
                outcome = "lost"
            self._metrics.task_settled(task.lane, outcome)
            if outcome == "completed":
                self._metrics.task_timed(clocks.timings())
            log.info(
                f"task {outcome}", _event="task", outcome=outcome, lane=task.lane, run=task.run,
                deliveries=delivery.num_delivered, gpu_seconds=round(clocks.device, 3),
                **{f"{name}_s": round(value, 4) for name, value in clocks.timings()},
            )  # fmt: skip
        if fatal is not None:
            raise fatal
        return outcome

    async def _attempt(self, delivery: Delivery, task: Task, turn: Turn, clocks: _Clocks) -> Outcome:
        info = self._engine.info
        held = await eventlog.claim(
            self._bus, task, self._policy.worker_id, self._policy.max_attempts,
            engine=info.name, model=info.model, deliveries=delivery.num_delivered,
        )  # fmt: skip
        if isinstance(held, attempts.Drop):
            await delivery.ack()
            return "dropped"
        if isinstance(held, attempts.Exhausted):
            return await self._exhausted(delivery, task, held)
        with structlog.contextvars.bound_contextvars(attempt=held.attempt):
            try:
                async with self._lease(delivery, held, turn.stop):
                    return await self._run(delivery, held, turn, clocks)
            except FencedError:
                # A newer attempt holds the task: neither ack nor nak may come from here any more.
                return "fenced"
            except errors.Cancelled:
                return await self._stopped(delivery, held, turn.stop, clocks)
            except errors.RejectedError as exc:
                return await self._fail(delivery, held, clocks, exc, retryable=False)
            except errors.FatalError as exc:
                log.exception(exc.message, _event="worker_unhealthy", code=exc.code)
                with contextlib.suppress(FencedError, errors.Cancelled, errors.BusError):
                    await self._release(delivery, held, clocks)
                raise
            except errors.BusError:
                raise
            except errors.RetryableError as exc:
                return await self._fail(delivery, held, clocks, exc, retryable=True)
            except Exception as exc:
                log.exception("the task failed unexpectedly", _event="task_unexpected")
                unexpected = errors.RetryableError(f"unexpected {type(exc).__name__}", code="unexpected")
                return await self._fail(delivery, held, clocks, unexpected, retryable=True)

    async def _run(self, delivery: Delivery, held: Claim, turn: Turn, clocks: _Clocks) -> Outcome:
        task, info = held.task, self._engine.info
        _check_deadline(task)
        reporter = Reporter(self._bus, held, self._metrics, self._finishing.value or 0.0)
        with tempfile.TemporaryDirectory(prefix="vidgen-task-", dir=self._policy.work_dir) as name:
            folder = Path(name)
            with clocks.timed("prepare"):
                reporter.phase("preparing")
                found, files = await asyncio.gather(results.find(self._store, task), self._fetch(task, folder))
            reused = found is not None
            if found is None:
                finished = await self._compute(held, files, folder, turn, clocks, reporter)
                with clocks.timed("store"):
                    found = await self._keep(task, finished)
                self._finishing.add(clocks.decode + clocks.encode + clocks.store)
        event = contracts.StageCompleted.model_validate(
            held.stamp()
            | {
                "engine": found.engine, "model": found.model, "revision": found.revision, "seed": found.seed,
                "steps": found.steps, "artifacts": found.artifacts, "timings": clocks.timings(), "reused": reused,
                "gpu_seconds": clocks.device, "cost_usd": self._cost(clocks),
            }
        )  # fmt: skip
        # The same id from whichever attempt: the result is one, and so is the event.
        await held.append(event, message_id=f"{task.job_id}:{task.stage}:{task.run}:completed")
        await delivery.ack()
        log.debug("artifacts stored", _event="stored", count=len(found.artifacts), engine=info.name)
        return "reused" if reused else "completed"

    async def _compute(
        self, held: Claim, files: list[Path], folder: Path, turn: Turn, clocks: _Clocks, reporter: Reporter
    ) -> tuple[Finished, ...]:
        task, loop = held.task, asyncio.get_running_loop()
        with clocks.timed("prepare"):
            inputs = await asyncio.to_thread(self._engine.prepare, task.work, files)
        async with _device(turn):
            turn.begins(self._pace * task.work.steps if self._pace is not None else None)
            on_step = reporter.on_step(lambda: _may_go_on(task, turn.stop))
            try:
                with clocks.timed("device"):
                    generated = await loop.run_in_executor(self._device_thread, self._engine.generate, inputs, on_step)
            finally:
                self._busy_seconds += clocks.device
                self._metrics.gpu_busy(clocks.device)
                self._pace = reporter.seconds_per_step or self._pace
        clocks.denoise, clocks.decode = generated.denoise_s, generated.decode_s
        reporter.phase("finishing")
        with clocks.timed("encode"):
            out = folder / "out"
            out.mkdir()
            return await asyncio.to_thread(self._engine.finish, generated.output, out)

    async def _fetch(self, task: Task, folder: Path) -> list[Path]:
        paths = [folder / f"input-{index}" for index in range(len(task.inputs))]
        for key in task.inputs:
            check_key(key, task.job_id)
        begun = time.monotonic()
        await asyncio.gather(
            *(self._store.fetch(key, path, MAX_INPUT_BYTES) for key, path in zip(task.inputs, paths, strict=True))
        )
        self._metrics.artifact_moved("get", sum(path.stat().st_size for path in paths), time.monotonic() - begun)
        return paths

    async def _keep(self, task: Task, finished: tuple[Finished, ...]) -> results.Result:
        begun = time.monotonic()
        result = await results.keep(self._store, task, finished, self._engine.info)
        self._metrics.artifact_moved("put", sum(made.size for made in result.artifacts), time.monotonic() - begun)
        return result

    def _cost(self, clocks: _Clocks) -> float:
        return clocks.device / 3600 * self._policy.gpu_usd_per_hour

    # ── how a task ends otherwise ────────────────────────────────────────────────────────────────────────────────

    async def _stopped(self, delivery: Delivery, held: Claim, stop: Stop, clocks: _Clocks) -> Outcome:
        if stop.reason == "fenced":
            return "fenced"
        try:
            if stop.reason == "released":
                return await self._release(delivery, held, clocks)
            latency = time.monotonic() - stop.since if stop.since else None
            if latency is not None:
                self._metrics.cancelled_after(latency)
            event = contracts.StageCancelled.model_validate(
                held.stamp() | self._spent(clocks) | {"cancel_latency_s": latency}
            )
            await held.append(event)
            await delivery.ack()
        except FencedError:
            return "fenced"
        except errors.Cancelled:
            await delivery.ack()
        return "cancelled"

    async def _release(self, delivery: Delivery, held: Claim, clocks: _Clocks) -> Outcome:
        # Not held against the task: the next attempt has the same number of tries.
        stamp = held.stamp() | {"tries": held.tries - 1}
        await held.append(contracts.StageReleased.model_validate(stamp | self._spent(clocks)))
        await delivery.nak()
        return "released"

    async def _fail(
        self, delivery: Delivery, held: Claim, clocks: _Clocks, exc: errors.VidgenError, *, retryable: bool
    ) -> Outcome:
        task = held.task
        final = not retryable or held.tries >= self._policy.max_attempts
        wait = 0.0 if final else attempts.back_off(held.tries, self._policy.backoff_base, self._policy.backoff_limit)
        error = contracts.JobError(code=exc.code, message=exc.message, stage=task.stage, retryable=retryable)
        log.warning(exc.message, _event="task_failed", code=exc.code, final=final, retry_in_s=wait)
        event = contracts.StageFailed.model_validate(
            held.stamp() | self._spent(clocks) | {"error": error, "final": final, "retry_in_s": None if final else wait}
        )
        try:
            if final:
                await self._bury(delivery, task, error)
            await held.append(event)
        except FencedError:
            return "fenced"
        except errors.Cancelled:
            await delivery.ack()
            return "cancelled"
        if not final:
            await delivery.nak(wait)
            return "retried"
        await delivery.ack()
        return "dead" if retryable else "rejected"

    async def _exhausted(self, delivery: Delivery, task: Task, verdict: attempts.Exhausted) -> Outcome:
        """Too many attempts ended without a word: the task kills its process, so it is not run again."""
        error = contracts.JobError(
            code="attempts_exhausted", stage=task.stage, retryable=True,
            message=f"{verdict.tries - 1} attempts ended without a word, as if the task had killed its worker: "
            "look at the workers' logs, then retry the job",
        )  # fmt: skip
        seen = await eventlog.newest(self._bus, task.job_id)
        held = Claim(self._bus, task, verdict.attempt, verdict.tries, self._policy.worker_id, seen.seq)
        await self._bury(delivery, task, error)
        event = contracts.StageFailed.model_validate(held.stamp() | {"error": error, "final": True})
        with contextlib.suppress(FencedError, errors.Cancelled):
            await held.append(event)
        await delivery.ack()
        log.error(error.message, _event="attempts_exhausted")
        return "dead"

    async def _bury(self, delivery: Delivery, task: Task, error: contracts.JobError) -> None:
        letter = dead.letter(delivery.body, delivery.subject, error, job_id=task.job_id, stage=task.stage)
        await dead.publish(self._bus, letter, message_id=f"{task.job_id}:{task.stage}:{task.run}:dead")
        self._metrics.dead_lettered()

    async def _bury_unreadable(self, delivery: Delivery, exc: pydantic.ValidationError) -> Outcome:
        fields = contracts.field_errors(exc)
        error = contracts.JobError(
            code="unreadable_task", message="not a task of this version", stage=self._policy.stage, fields=fields
        )
        letter = dead.letter(delivery.body, delivery.subject, error, job_id=None, stage=self._policy.stage)
        try:
            await dead.publish(self._bus, letter, message_id=f"unreadable:{delivery.seq}")
            await delivery.ack()
        except errors.BusError:
            return "lost"
        self._metrics.dead_lettered()
        log.error("a task that is none was dead-lettered", _event="unreadable_task", seq=delivery.seq)
        return "dead"

    def _spent(self, clocks: _Clocks) -> dict[str, float]:
        return {"gpu_seconds": clocks.device, "cost_usd": self._cost(clocks)}

    @contextlib.asynccontextmanager
    async def _lease(self, delivery: Delivery, held: Claim, stop: Stop) -> AsyncIterator[None]:
        """Keep the task while the block runs: heartbeats at a quarter of `ack_wait`, each with a look at the log."""
        beats = asyncio.create_task(self._beat(delivery, held, stop), name=f"lease-{held.task.job_id}")
        try:
            yield
        finally:
            beats.cancel()
            await asyncio.wait([beats])

    async def _beat(self, delivery: Delivery, held: Claim, stop: Stop) -> None:
        while True:
            await asyncio.sleep(self._policy.ack_wait / 4)
            try:
                await delivery.in_progress()
                seen = await eventlog.newest(self._bus, held.task.job_id)
            except errors.BusError as exc:
                self._metrics.heartbeat_failed()
                log.warning(exc.message, _event="heartbeat_failed")
                continue
            # A cancel whose signal was missed, or a newer attempt: both stand in the log.
            standing = attempts.standing(held.task, held.attempt, seen.event)
            if standing != "mine":
                stop.now(standing)


@contextlib.asynccontextmanager
async def _device(turn: Turn) -> AsyncIterator[None]:
    """The device, or Cancelled if the end is asked for while waiting for it."""
    taken = asyncio.ensure_future(turn.device.acquire())
    raised = asyncio.ensure_future(turn.stop.raised.wait())
    try:
        await asyncio.wait([taken, raised], return_when=asyncio.FIRST_COMPLETED)
    finally:
        raised.cancel()
        if not taken.done():
            taken.cancel()
            await asyncio.wait([taken])
    got = not taken.cancelled()
    try:
        turn.stop.check()
        turn.phase = "generating"
        yield
        turn.phase = "finishing"
    finally:
        if got:
            turn.device.release()
        turn.ends()


def _may_go_on(task: Task, stop: Stop) -> None:
    stop.check()
    _check_deadline(task)


def _check_deadline(task: Task) -> None:
    if task.deadline_at is not None and datetime.now(UTC) > task.deadline_at:
        raise errors.RejectedError(
            "the job's deadline_s passed before it was done: ask for more time or less work", code="deadline_exceeded"
        )
