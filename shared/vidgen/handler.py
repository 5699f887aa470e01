"""One task, from taken to settled: claim → fetch → prepare → generate → finish → store → publish → ack.

Settled in this order: artifact stored, event published, task acked. A crash between any two of them leads to a
redelivery that finds the artifact, or the event, and does not compute again.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import re
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
import structlog

from vidgen import attempts, checkpoints, contracts, dead, errors, eventlog, results, topology, tracing
from vidgen.artifacts import ArtifactStore, check_key
from vidgen.bus import Bus, Delivery
from vidgen.contracts import Task, Timings
from vidgen.device import Device
from vidgen.engine import Engine, Finished, Generated, OnStep, Resumable
from vidgen.eta import Recent
from vidgen.eventlog import Claim, FencedError
from vidgen.metrics import WorkerMetrics
from vidgen.progress import Reporter

log = structlog.get_logger(__name__)

T = TypeVar("T")

Outcome = Literal[
    "completed", "reused", "rejected", "retried", "cancelled", "released", "fenced", "dead", "dropped", "lost"
]
MAX_INPUT_BYTES = 64 << 20
HAND_BACK_S = 2.0  # what a worker that leaves in a hurry takes to hand a task back
KEEP_S = 15.0  # what storing a checkpoint may take: the machine may be gone soon after
SUBJECT = re.compile(r"vidgen\.tasks\.\w+\.(?P<lane>interactive|batch)\.(?:[a-z0-9-]+\.)?(?P<job>[^.]+)")
JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


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
    checkpoint_over_s: float | None = 20.0  # None: a task is never handed back in its middle


Reason = Literal["cancelled", "fenced", "released", "drained", "preempted"]
# What hands a task back with its state; a cancel or a newer attempt may still come over it.
SUSPENDING: tuple[Reason, ...] = ("drained", "preempted")


@dataclass
class Stop:
    """Why a running task is to end early; read by the engine's thread at each step.

    Where it is drained or preempted an engine that is Resumable leaves its state, for the next attempt.
    """

    reason: Reason | None = None
    since: float = 0.0
    asked_at: datetime | None = None
    raised: asyncio.Event = field(default_factory=asyncio.Event)

    def now(self, reason: Reason, asked_at: datetime | None = None) -> None:
        """Ask for the end; the first reason stays. `asked_at` is when somebody wished it."""
        if self.reason is None or (self.reason in SUSPENDING and reason in ("cancelled", "fenced")):
            self.since, self.asked_at = time.monotonic(), asked_at
            self.reason = reason
            self.raised.set()

    def check(self) -> None:
        """Raise Cancelled if the end was asked for."""
        if self.reason is not None:
            raise errors.Cancelled

    def check_step(self, step: int, steps: int) -> None:
        """Raise after a step if the end was asked for: Suspended where the state is wanted, else Cancelled."""
        if self.reason not in SUSPENDING:
            self.check()
        elif step < steps:  # behind the last step finishing is quicker
            raise errors.Suspended(step, steps)


@dataclass(eq=False)  # a turn is itself: kept in sets
class Turn:
    """A task's way through the runtime: it waits for the device, and says when the next task may be prepared.

    `look` asks for a look at the job's log now: somebody says that the job was cancelled.
    """

    device: Device
    stop: Stop = field(default_factory=Stop)
    look: asyncio.Event = field(default_factory=asyncio.Event)
    phase: Literal["preparing", "generating", "finishing"] = "preparing"
    preempted: int = 0
    _frees_at: float | None = None

    def frees_in(self, seconds: float) -> None:
        """The device is likely to be free in `seconds`; told anew with each step."""
        self._frees_at = asyncio.get_running_loop().time() + seconds

    @property
    def left_s(self) -> float | None:
        """Seconds until the device is likely to be free, None while nobody knows."""
        return None if self._frees_at is None else max(0.0, self._frees_at - asyncio.get_running_loop().time())

    def ends(self) -> None:
        """The device is free."""

    def lost(self) -> None:
        """The device is lost: no task should be taken for it any more, not even this one, which is handed back."""


@dataclass
class _Clocks:
    """Seconds per phase of one attempt; each phase is a span as well."""

    queued: float = 0.0
    prepare: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    encode: float = 0.0
    store: float = 0.0
    device: float = 0.0

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        begun = time.monotonic()
        with tracing.span(phase):
            try:
                yield
            finally:
                setattr(self, phase, getattr(self, phase) + time.monotonic() - begun)

    def timings(self) -> Timings:
        return Timings(
            queued=self.queued, prepare=self.prepare, denoise=self.denoise, decode=self.decode,
            encode=self.encode, store=self.store,
        )  # fmt: skip


@dataclass(frozen=True)
class _Gathered:
    """What a task starts from: its inputs as files or, where it was done before, its result."""

    folder: Path
    files: list[Path]
    result: results.Result | None


class Handler:
    """Handles the tasks of one stage with one engine; several may be under way, one at a time on the device."""

    def __init__(
        self, bus: Bus, store: ArtifactStore, engine: Engine, device_thread: Executor, metrics: WorkerMetrics,
        policy: Policy,
    ) -> None:  # fmt: skip
        self._bus, self._store, self._engine = bus, store, engine
        self._device_thread, self._metrics, self._policy = device_thread, metrics, policy
        self._resumable: Resumable | None = None
        if isinstance(engine, Resumable) and policy.checkpoint_over_s is not None:
            self._resumable = engine
        self._pace: float | None = None  # seconds per step of the newest task
        self._decoding, self._finishing = Recent(), Recent()
        self._busy_seconds = 0.0
        self._device_lost = False

    @property
    def seconds_per_step(self) -> float | None:
        return self._pace

    @property
    def suspends(self) -> bool:
        """Whether a task can be handed back in the middle of its denoising, for another worker to go on."""
        return self._resumable is not None

    @property
    def after_device_s(self) -> float:
        """Seconds that a task is likely to take behind the device: to be encoded and stored."""
        return max(0.0, (self._finishing.value or 0.0) - (self._decoding.value or 0.0))

    @property
    def busy_seconds(self) -> float:
        """Seconds for which the device was held, up to the newest step."""
        return self._busy_seconds

    async def handle(self, delivery: Delivery, turn: Turn) -> Outcome:
        """See a task through to its settlement; raises FatalError when this worker must leave (the task is back)."""
        with tracing.span(
            self._policy.stage, of=delivery.headers, kind="consumer", job_id=delivery.subject.rsplit(".", 1)[-1],
            stage=self._policy.stage, deliveries=delivery.num_delivered,
        ):  # fmt: skip
            outcome = await self._settle(delivery, turn)
            tracing.about(outcome=outcome)
        return outcome

    async def _settle(self, delivery: Delivery, turn: Turn) -> Outcome:
        if delivery.num_delivered > 1:
            self._metrics.redelivered()
        try:
            task = Task.model_validate_json(delivery.body)
        except pydantic.ValidationError as exc:
            return await self._unreadable(delivery, exc)
        tracing.about(run=task.run, lane=task.lane)
        clocks = _Clocks(queued=max(0.0, (datetime.now(UTC) - task.queued_at).total_seconds()))
        fatal: errors.FatalError | None = None
        with structlog.contextvars.bound_contextvars(job=task.job_id, stage=task.stage):
            try:
                outcome = await self._attempt(delivery, task, turn, clocks)
            except errors.FatalError as exc:
                outcome, fatal = "released", exc
            except errors.BusError as exc:
                # Not settled: the lease runs out and the task comes again, to find what is stored.
                tracing.failed(exc.code)
                log.warning(exc.message, _event="settle_failed")
                outcome = "lost"
            except Exception:
                # One task must not take the others of this worker with it; how often it comes again is limited.
                tracing.failed("unexpected")
                log.exception("the task could not be settled", _event="settle_unexpected")
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
        with contextlib.ExitStack() as scratch:
            # While the claim is under way: looking and fetching leave no trace if it is not won.
            gathering = asyncio.ensure_future(self._gather(task, scratch, clocks))
            try:
                return await self._hold(delivery, task, turn, clocks, gathering)
            finally:
                await asyncio.gather(gathering, return_exceptions=True)

    async def _hold(
        self, delivery: Delivery, task: Task, turn: Turn, clocks: _Clocks, gathering: asyncio.Future[_Gathered]
    ) -> Outcome:
        info = self._engine.info
        held = await eventlog.claim(
            self._bus, task, self._policy.worker_id, self._policy.max_attempts,
            engine=info.name, model=info.model, deliveries=delivery.num_delivered, queued_at_seq=_log_seq(delivery),
        )  # fmt: skip
        if isinstance(held, attempts.Drop):
            await delivery.ack()
            return "dropped"
        if isinstance(held, attempts.Exhausted):
            return await self._exhausted(delivery, task, held)
        turn.preempted = held.preempted
        tracing.about(
            attempt=held.attempt, tries=held.tries, engine=info.name,
            checkpoint_step=held.checkpoint.step if held.checkpoint else None,
        )  # fmt: skip
        if held.attempt == 1:  # where the time between two attempts went, the spans of both tell
            queued_at = task.queued_at.timestamp()
            tracing.took(
                "queued", queued_at, queued_at + clocks.queued, of=delivery.headers,
                job_id=task.job_id, stage=task.stage, run=task.run, attempt=1,
            )  # fmt: skip
        with structlog.contextvars.bound_contextvars(attempt=held.attempt):
            try:
                async with self._lease(delivery, held, turn):
                    return await self._run(delivery, held, turn, clocks, gathering)
            except FencedError:
                # A newer attempt holds the task: neither ack nor nak may come from here any more.
                return "fenced"
            except errors.Cancelled:
                return await self._stopped(delivery, held, turn.stop, clocks)
            except asyncio.CancelledError:
                # The whole worker leaves in a hurry: the engine ends at its next step, the task is free now.
                turn.stop.now("released")
                with contextlib.suppress(errors.VidgenError, TimeoutError):
                    async with asyncio.timeout(HAND_BACK_S):
                        await self._release(delivery, held, clocks)
                raise
            except errors.RejectedError as exc:
                return await self._fail(delivery, held, clocks, exc, retryable=False)
            except errors.FatalError as exc:
                log.exception(exc.message, _event="worker_unhealthy", code=exc.code)
                with contextlib.suppress(errors.VidgenError):
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

    async def _gather(self, task: Task, scratch: contextlib.ExitStack, clocks: _Clocks) -> _Gathered:
        """The stored result of this very task, else its inputs in a folder of its own that goes with `scratch`."""
        with clocks.timed("prepare"):
            folder = Path(
                scratch.enter_context(
                    tempfile.TemporaryDirectory(
                        prefix="vidgen-task-", dir=self._policy.work_dir, ignore_cleanup_errors=True
                    )
                )
            )
            found, files = await asyncio.gather(
                results.find(self._store, task), self._fetch(task, folder), return_exceptions=True
            )
        if isinstance(found, BaseException):
            raise found
        if isinstance(files, BaseException):
            if found is None:  # of no matter where there is a result
                raise files
            files = []
        return _Gathered(folder, files, found)

    async def _run(
        self, delivery: Delivery, held: Claim, turn: Turn, clocks: _Clocks, gathering: asyncio.Future[_Gathered]
    ) -> Outcome:
        task = held.task
        _check_deadline(task)
        reporter = Reporter(self._bus, held, self._metrics, self._finishing.value or 0.0)
        reporter.phase("preparing")
        gathered = await asyncio.shield(gathering)
        result = gathered.result
        if result is None:
            try:
                finished = await self._compute(held, gathered, turn, clocks, reporter)
            except errors.Suspended as exc:  # here the lease is still renewed
                if turn.stop.reason in SUSPENDING:
                    await self._keep_state(held, gathered.folder, exc, turn.stop)
                raise
            with clocks.timed("store"):
                result = await self._keep(task, finished)
            self._finishing.add(clocks.decode + clocks.encode + clocks.store)
        event = contracts.StageCompleted.model_validate(
            held.stamp()
            | {
                "engine": result.engine, "model": result.model, "revision": result.revision, "seed": result.seed,
                "steps": result.steps, "artifacts": result.artifacts, "timings": clocks.timings(),
                "reused": gathered.result is not None, "gpu_seconds": clocks.device, "cost_usd": self._cost(clocks),
            }
        )  # fmt: skip
        await held.append(event)
        await delivery.ack()
        log.debug("artifacts stored", _event="stored", count=len(result.artifacts), engine=result.engine)
        return "completed" if gathered.result is None else "reused"

    async def _compute(
        self, held: Claim, gathered: _Gathered, turn: Turn, clocks: _Clocks, reporter: Reporter
    ) -> tuple[Finished, ...]:
        task = held.task
        with clocks.timed("prepare"):
            inputs = await asyncio.to_thread(self._engine.prepare, task.work, gathered.files)
            begun = await self._begun_elsewhere(held, gathered.folder)
        decoding = self._decoding.value or 0.0

        def stepped(seconds: float, left_s: float | None) -> None:
            self._count_busy(seconds)
            if left_s is not None:
                turn.frees_in(left_s + decoding)

        async with _device(turn, clocks):
            if self._device_lost:  # while this task waited for it
                turn.stop.now("released")
                turn.stop.check()
            if self._pace is not None:
                done = begun.step if begun else 0
                turn.frees_in(self._pace * (task.work.steps - done) + decoding)

            def on_step(done: int) -> OnStep:
                return reporter.on_step(lambda step, steps: _may_go_on(task, turn.stop, step, steps), stepped, done)

            try:
                with clocks.timed("device"):
                    generated = await self._generate(inputs, on_step, begun)
                    _trace_generated(generated, time.time())
                self._metrics.memory_rungs(generated.rungs)
            except errors.VidgenError as exc:
                self._metrics.memory_rungs(exc.rungs)
                if isinstance(exc, errors.FatalError):
                    self._device_lost = True
                    turn.lost()
                raise
            finally:
                self._count_busy(clocks.device - reporter.counted_s)
                self._pace = reporter.seconds_per_step or self._pace
        self._decoding.add(generated.decode_s)
        clocks.denoise, clocks.decode = generated.denoise_s, generated.decode_s
        reporter.phase("finishing")
        with clocks.timed("encode"):
            out = gathered.folder / "out"
            out.mkdir()
            return await asyncio.to_thread(self._engine.finish, generated.output, out)

    async def _generate(
        self, inputs: Any, on_step: Callable[[int], OnStep], begun: checkpoints.Found | None
    ) -> Generated:
        """Go on from what was begun elsewhere, or from the first step; `on_step` takes the steps that are done."""
        if begun is not None and self._resumable is not None:
            outcome: Literal["resumed", "refused"] = "resumed"
            try:
                return await self._on_device(self._resumable.resume, inputs, on_step(begun.step), begun.state)
            except checkpoints.UnusableError as exc:
                outcome = "refused"
                log.warning(f"{exc.message}: the task starts over", _event="checkpoint_refused")
            finally:
                self._metrics.checkpoint(outcome)
        return await self._on_device(self._engine.generate, inputs, on_step(0))

    async def _on_device(self, work: Callable[..., T], *given: Any) -> T:
        context = contextvars.copy_context()  # so that what the engine logs names the job
        return await asyncio.get_running_loop().run_in_executor(self._device_thread, lambda: context.run(work, *given))

    async def _begun_elsewhere(self, held: Claim, folder: Path) -> checkpoints.Found | None:
        """What an earlier attempt left of this task, None if there is nothing or it cannot be used."""
        if held.checkpoint is None or self._resumable is None:
            return None
        begun = time.monotonic()
        try:
            found = await checkpoints.fetch(self._store, held.task, held.checkpoint, self._engine.info, folder)
        except checkpoints.UnusableError as exc:
            self._metrics.checkpoint("refused")
            log.warning(f"{exc.message}: the task starts over", _event="checkpoint_refused")
            return None
        except errors.VidgenError as exc:
            self._metrics.checkpoint("failed")
            log.warning(f"{exc.message}: the task starts over", _event="checkpoint_failed")
            return None
        self._metrics.artifact_moved("get", len(found.state), time.monotonic() - begun)
        log.info(f"the task goes on behind step {found.step}", _event="checkpoint_found", step=found.step)
        return found

    async def _keep_state(self, held: Claim, folder: Path, suspended: errors.Suspended, stop: Stop) -> None:
        """Store what the engine left, so that the next attempt goes on from there; without it, from where this began.

        The event that hands the task back names it, and the log takes that event from the holder alone.
        """
        held.preempted += stop.reason == "preempted"
        try:
            async with asyncio.timeout(KEEP_S):
                held.checkpoint = await checkpoints.keep(
                    self._store, held.task, held.attempt, self._engine.info, suspended, folder
                )
        except (errors.VidgenError, TimeoutError) as exc:
            self._metrics.checkpoint("failed")
            reason = exc.message if isinstance(exc, errors.VidgenError) else f"it took longer than {KEEP_S:.0f} s"
            log.warning(f"the task is handed back without its state: {reason}", _event="checkpoint_failed")
        else:
            self._metrics.checkpoint("stored")
            log.info(
                f"the task's state is kept behind step {suspended.step}", _event="checkpoint_stored",
                step=suspended.step, reason=stop.reason,
            )  # fmt: skip

    async def _fetch(self, task: Task, folder: Path) -> list[Path]:
        paths = [folder / f"input-{index}" for index in range(len(task.inputs))]
        for key in task.inputs:
            check_key(key, task.job_id, task.tenant)
        begun = time.monotonic()
        await _all_of(
            *(self._store.fetch(key, path, MAX_INPUT_BYTES) for key, path in zip(task.inputs, paths, strict=True))
        )
        self._metrics.artifact_moved("get", sum(path.stat().st_size for path in paths), time.monotonic() - begun)
        return paths

    async def _keep(self, task: Task, finished: tuple[Finished, ...]) -> results.Result:
        begun = time.monotonic()
        result = await results.keep(self._store, task, finished, self._engine.info)
        self._metrics.artifact_moved("put", sum(made.size for made in result.artifacts), time.monotonic() - begun)
        return result

    def _count_busy(self, seconds: float) -> None:
        self._busy_seconds += max(0.0, seconds)
        self._metrics.gpu_busy(seconds)

    def _cost(self, clocks: _Clocks) -> float:
        return clocks.device / 3600 * self._policy.gpu_usd_per_hour

    # ── how a task ends otherwise ────────────────────────────────────────────────────────────────────────────────

    async def _stopped(self, delivery: Delivery, held: Claim, stop: Stop, clocks: _Clocks) -> Outcome:
        if stop.reason == "fenced":
            return "fenced"
        try:
            if stop.reason == "released" or stop.reason in SUSPENDING:
                return await self._release(delivery, held, clocks)
        except FencedError:
            return "fenced"
        except errors.Cancelled:
            pass
        return await self._cancelled(delivery, held, clocks, stop)

    async def _cancelled(self, delivery: Delivery, held: Claim, clocks: _Clocks, stop: Stop | None = None) -> Outcome:
        latency = None
        if stop is not None and stop.reason == "cancelled":
            heard = time.monotonic() - stop.since
            self._metrics.cancelled_after(heard)
            asked = (datetime.now(UTC) - stop.asked_at).total_seconds() if stop.asked_at else 0.0
            latency = max(heard, asked)  # the clocks of two machines may differ
        event = contracts.StageCancelled.model_validate(
            held.stamp() | self._spent(clocks) | {"cancel_latency_s": latency}
        )
        try:
            await held.append(event)
        except FencedError:
            return "fenced"
        await delivery.ack()
        return "cancelled"

    async def _release(self, delivery: Delivery, held: Claim, clocks: _Clocks) -> Outcome:
        # Not held against the task: the next attempt has the same number of tries.
        stamp = held.stamp() | held.carried() | {"tries": held.tries - 1}
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
        tracing.failed(exc.code)
        log.warning(exc.message, _event="task_failed", code=exc.code, final=final, retry_in_s=wait)
        event = contracts.StageFailed.model_validate(
            held.stamp() | self._spent(clocks) | {"error": error, "final": final, "retry_in_s": None if final else wait}
        )
        try:
            if final:
                await held.check()  # what a newer attempt holds is not to be given up
                await self._bury(delivery, error, task.job_id, f"{task.job_id}:{task.stage}:{task.run}:dead")
            await held.append(event)
        except FencedError:
            return "fenced"
        except errors.Cancelled:
            return await self._cancelled(delivery, held, clocks)
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
        tracing.failed(error.code)
        await self._bury(delivery, error, task.job_id, f"{task.job_id}:{task.stage}:{task.run}:dead")
        await eventlog.give_up(self._bus, task, self._policy.worker_id, error)
        await delivery.ack()
        log.error(error.message, _event="attempts_exhausted")
        return "dead"

    async def _unreadable(self, delivery: Delivery, exc: pydantic.ValidationError) -> Outcome:
        """A task of another version: its job ends all the same, and is named by the subject."""
        error = contracts.JobError(
            code="unreadable_task", stage=self._policy.stage, fields=contracts.field_errors(exc),
            message="the worker cannot read its task: run gateway and workers of one version, then retry the job",
        )  # fmt: skip
        tracing.failed(error.code)
        found = SUBJECT.fullmatch(delivery.subject)
        job_id = found["job"] if found and JOB_ID.fullmatch(found["job"]) else None
        try:
            await self._bury(delivery, error, job_id, f"unreadable:{delivery.seq}")
            if job_id is not None:
                run = await eventlog.current_run(self._bus, job_id)
                names: dict[str, Any] = {"job_id": job_id, "stage": self._policy.stage, "run": run}
                await eventlog.give_up(self._bus, Task.model_construct(**names), self._policy.worker_id, error)
            await delivery.ack()
            outcome: Outcome = "dead"
        except errors.VidgenError as fault:
            log.warning(fault.message, _event="settle_failed")
            outcome = "lost"
        lane: contracts.Lane = "batch" if found and found["lane"] == "batch" else "interactive"
        self._metrics.task_settled(lane, outcome)
        log.error(
            f"task {outcome}: it cannot be read", _event="task", outcome=outcome, lane=lane, job=job_id,
            stage=self._policy.stage, deliveries=delivery.num_delivered, code=error.code,
        )  # fmt: skip
        return outcome

    async def _bury(self, delivery: Delivery, error: contracts.JobError, job_id: str | None, message_id: str) -> None:
        letter = dead.letter(delivery.body, delivery.subject, error, job_id=job_id, stage=self._policy.stage)
        await dead.publish(self._bus, letter, message_id=message_id)
        self._metrics.dead_lettered()

    def _spent(self, clocks: _Clocks) -> dict[str, float]:
        return {"gpu_seconds": clocks.device, "cost_usd": self._cost(clocks)}

    @contextlib.asynccontextmanager
    async def _lease(self, delivery: Delivery, held: Claim, turn: Turn) -> AsyncIterator[None]:
        """Keep the task while the block runs: heartbeats at a quarter of `ack_wait`, each with a look at the log."""
        beats = asyncio.create_task(self._beat(delivery, held, turn), name=f"lease-{held.task.job_id}")
        try:
            yield
        finally:
            beats.cancel()
            await asyncio.wait([beats])

    async def _beat(self, delivery: Delivery, held: Claim, turn: Turn) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._policy.ack_wait / 4):
                    await turn.look.wait()
            turn.look.clear()
            try:
                await delivery.in_progress()
                seen = await eventlog.newest(self._bus, held.task.job_id)
            except errors.RetryableError as exc:
                self._metrics.heartbeat_failed()
                log.warning(exc.message, _event="heartbeat_failed")
                continue
            # The log has the truth: a signal may come too late and mean the run before, or be missed.
            standing = attempts.standing(held.task, held.attempt, seen.event)
            if standing != "mine":
                turn.stop.now(standing, seen.event.at if seen.event else None)


async def _all_of(*works: Awaitable[T]) -> list[T]:
    """Let all come to their ends, then raise the first failure: none goes on behind the caller's back."""
    found = await asyncio.gather(*works, return_exceptions=True)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return [each for each in found if not isinstance(each, BaseException)]


@contextlib.asynccontextmanager
async def _device(turn: Turn, clocks: _Clocks) -> AsyncIterator[None]:
    """The device, or Cancelled if the end is asked for while waiting for it."""
    taken = asyncio.ensure_future(turn.device.acquire())
    raised = asyncio.ensure_future(turn.stop.raised.wait())
    try:
        with clocks.timed("queued"):
            await asyncio.wait([taken, raised], return_when=asyncio.FIRST_COMPLETED)
            turn.stop.check()
            taken.result()  # raises where the engine could not be woken
        turn.phase = "generating"
        yield
        turn.phase = "finishing"
    finally:
        raised.cancel()
        if not taken.done():
            taken.cancel()
            await asyncio.wait([taken])
        if not taken.cancelled() and taken.exception() is None:
            turn.device.release()
        turn.ends()


def _trace_generated(generated: Generated, ended: float) -> None:
    """The two phases on the device, of which only the seconds are known; they end with what the engine did."""
    decoding = ended - generated.decode_s
    tracing.took("denoise", decoding - generated.denoise_s, decoding)
    tracing.took("decode", decoding, ended)


def _log_seq(delivery: Delivery) -> int | None:
    told = delivery.headers.get(topology.HEADER_LOG_SEQ, "")
    return int(told) if delivery.num_delivered == 1 and told.isdecimal() else None


def _may_go_on(task: Task, stop: Stop, step: int, steps: int) -> None:
    stop.check_step(step, steps)
    _check_deadline(task)


def _check_deadline(task: Task) -> None:
    if task.deadline_at is not None and datetime.now(UTC) > task.deadline_at:
        raise errors.RejectedError(
            "the job's deadline_s passed before it was done: ask for more time or less work", code="deadline_exceeded"
        )
