"""One task, from taken to settled: claim → fetch → prepare → generate → finish → store → publish → ack.

Settled in this order: artifact stored, event published, task acked. A crash between any two of them leads to a
redelivery that finds the artifact, or the event, and does not compute again.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
import structlog

from vidgen import attempts, checkpoints, contracts, errors, eventlog, results, topology, tracing
from vidgen.artifacts import ArtifactStore, check_key
from vidgen.bus import Bus, Delivery
from vidgen.company import Company, Place
from vidgen.contracts import Task
from vidgen.engine import Engine, Generated, OnStep, Resumable, in_thread
from vidgen.eta import Recent
from vidgen.eventlog import Claim, FencedError
from vidgen.metrics import Outcome, WorkerMetrics
from vidgen.progress import Reporter
from vidgen.scratch import Scratch
from vidgen.settlement import Policy, Settlement
from vidgen.turn import REASONS, SUSPENDING, UNWANTED, Clocks, Reason, Stop, Turn
from vidgen.waiting import told_within
from vidgen.watchdog import Watchdog

log = structlog.get_logger(__name__)

T = TypeVar("T")

MAX_INPUT_BYTES = 64 << 20
HAND_BACK_S = 5.0  # what a worker that leaves in a hurry takes to hand a task back
STORE_S = 2.0  # what one that leaves still gives the store to take a result
SURE_S = 1.0  # for so long a task is held without a look; a gateway takes a worker for dead behind several seconds
BUS_PAUSE_S = 1.0
DISK_FAILS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})
KEEP_S = 15.0  # what storing a checkpoint may take: the machine may be gone soon after


@dataclass(frozen=True)
class _Gathered:
    """What a task starts from: its inputs as files or, where it was done before, its result.

    `looked` is whether the store was asked for one.
    """

    folder: Path
    files: list[Path]
    looked: bool
    result: results.Result | None


class Handler:
    """Handles the tasks of one stage with one engine; several may be under way, one at a time on the device."""

    def __init__(
        self, bus: Bus, store: ArtifactStore, engine: Engine, device_thread: Executor, metrics: WorkerMetrics,
        policy: Policy, company: Company,
    ) -> None:  # fmt: skip
        self._bus, self._store, self._engine, self._company = bus, store, engine, company
        self._device_thread, self._metrics, self._policy = device_thread, metrics, policy
        self._settlement = Settlement(bus, metrics, policy)
        self._resumable: Resumable | None = None
        if isinstance(engine, Resumable) and policy.checkpoint_over_s is not None:
            self._resumable = engine
        self._pace: float | None = None  # seconds per step of the newest task
        self._decoding, self._finishing = Recent(), Recent()
        self._busy_seconds = 0.0
        self._watchdog = Watchdog(policy.hang)
        self._scratch = Scratch(policy.work_dir)

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
            return await self._settlement.unreadable(delivery, exc)
        tracing.about(run=task.run, lane=task.lane)
        clocks = Clocks(queued=max(0.0, (datetime.now(UTC) - task.queued_at).total_seconds()))
        with structlog.contextvars.bound_contextvars(job=task.job_id, stage=task.stage):
            try:
                outcome = await self._attempt(delivery, task, turn, clocks)
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
        if turn.fatal is not None:
            raise turn.fatal
        return outcome

    async def _attempt(self, delivery: Delivery, task: Task, turn: Turn, clocks: Clocks) -> Outcome:
        alone = False
        if _log_seq(delivery) is None:
            worker, number = self._policy.worker_id, delivery.num_delivered
            outlook = await eventlog.outlook(self._bus, task, worker, self._policy.max_attempts, number)
            if outlook == "elsewhere":
                return _left(delivery)
            alone = outlook == "alone"
        place = self._company.enter(alone=alone)
        try:
            if not place.granted.done() and not await self._granted(place, delivery, turn):
                await delivery.nak()  # nothing of it was begun
                return "released"
            if alone:
                log.info("it runs alone here: an attempt ended without a word", _event="alone")
            turn.alone = alone
            return await self._begin(delivery, task, turn, clocks)
        finally:
            self._company.leave(place)

    async def _granted(self, place: Place, delivery: Delivery, turn: Turn) -> bool:
        """Wait for those who are in the way to leave, keeping the task; False where it must leave before that."""
        raised = asyncio.ensure_future(turn.stop.raised.wait())
        try:
            while not place.granted.done() and turn.stop.reason is None:
                waited: list[asyncio.Future[Any]] = [place.granted, raised]
                await asyncio.wait(waited, timeout=self._policy.ack_wait / 4, return_when=asyncio.FIRST_COMPLETED)
                with contextlib.suppress(errors.RetryableError):  # the claim will tell
                    await delivery.in_progress()
        except asyncio.CancelledError:  # the whole worker leaves in a hurry
            await _in_a_hurry(delivery.nak())
            raise
        finally:
            raised.cancel()
        return turn.stop.reason is None

    async def _begin(self, delivery: Delivery, task: Task, turn: Turn, clocks: Clocks) -> Outcome:
        room = self._scratch.room()
        # While the claim is under way: looking and fetching leave no trace if it is not won.
        gathering = asyncio.ensure_future(self._gather(delivery, task, room, clocks))
        outcome: Outcome | None = None
        try:
            outcome = await self._hold(delivery, task, turn, clocks, gathering)
            return outcome
        finally:
            if not gathering.done():  # a store that is away may take minutes
                gathering.cancel()
                await asyncio.wait([gathering])
            if not gathering.cancelled():
                gathering.exception()  # nobody may have needed it
            # Where it ended otherwise a thread of its engine may still be about to write there.
            self._scratch.leave(room, again=outcome == "completed")

    async def _hold(
        self, delivery: Delivery, task: Task, turn: Turn, clocks: Clocks, gathering: asyncio.Future[_Gathered]
    ) -> Outcome:
        info = self._engine.info
        held = await eventlog.claim(
            self._bus, task, self._policy.worker_id, self._policy.max_attempts,
            engine=info.name, model=info.model, deliveries=delivery.num_delivered, alone=turn.alone,
            queued_at_seq=_log_seq(delivery),
        )  # fmt: skip
        if isinstance(held, attempts.Drop):
            await delivery.ack()
            return "dropped"
        if isinstance(held, attempts.Exhausted):
            return await self._settlement.exhausted(delivery, task, held)
        if isinstance(held, attempts.Leave):
            return _left(delivery)
        turn.preempted = held.preempted
        tracing.about(
            attempt=held.attempt, tries=held.tries, alone=held.alone or None, engine=info.name,
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
                reporter = Reporter(self._bus, held, self._metrics, self._finishing.value or 0.0)
                with contextlib.closing(reporter):
                    async with (
                        self._lease(delivery, held, turn), _disk_told_apart(self._scratch),
                        _refusal_told_apart(self._store),
                    ):  # fmt: skip
                        return await self._run(delivery, held, turn, clocks, gathering, reporter)
            except FencedError:
                # A newer attempt holds the task: neither ack nor nak may come from here any more.
                return "fenced"
            except errors.Cancelled:
                return await self._settlement.stopped(delivery, held, turn.stop, clocks)
            except asyncio.CancelledError:
                # The whole worker leaves in a hurry: the engine ends at its next step, the task is free now.
                turn.stop.now("released")
                await _in_a_hurry(self._settlement.release(delivery, held, clocks))
                raise
            except errors.RejectedError as exc:
                return await self._settlement.fail(delivery, held, clocks, exc, retryable=False)
            except errors.FatalError as exc:
                log.exception(exc.message, _event="worker_unhealthy", code=exc.code)
                turn.fatal = exc
                return await self._settlement.unfit(delivery, held, clocks, exc)
            except errors.BusError:
                raise
            except errors.RetryableError as exc:
                return await self._settlement.fail(delivery, held, clocks, exc, retryable=True)
            except Exception as exc:
                log.exception("the task failed unexpectedly", _event="task_unexpected")
                unexpected = errors.RetryableError(f"unexpected {type(exc).__name__}", code="unexpected")
                return await self._settlement.fail(delivery, held, clocks, unexpected, retryable=True)

    async def _gather(self, delivery: Delivery, task: Task, folder: Path, clocks: Clocks) -> _Gathered:
        """The inputs of a task in a folder of its own, else its stored result.

        A result is looked for where the delivery does not say that this is the first attempt of all.
        """
        look = task.run > 1 or _log_seq(delivery) is None
        with clocks.timed("prepare"):
            if not look:
                return _Gathered(folder, await self._fetch(task, folder), False, None)
            found, files = await asyncio.gather(
                results.find(self._store, task), self._fetch(task, folder), return_exceptions=True
            )
        if isinstance(found, BaseException):
            raise found
        if isinstance(files, BaseException):
            if found is None:  # of no matter where there is a result
                raise files
            files = []
        return _Gathered(folder, files, True, found)

    async def _run(
        self, delivery: Delivery, held: Claim, turn: Turn, clocks: Clocks, gathering: asyncio.Future[_Gathered],
        reporter: Reporter,
    ) -> Outcome:  # fmt: skip
        task = held.task
        _check_deadline(task)
        reporter.phase("preparing")
        gathered = await _unless(turn.stop, asyncio.shield(gathering))
        result = gathered.result
        if not (gathered.looked or held.first):
            with clocks.timed("prepare"):
                result = await _unless(turn.stop, results.find(self._store, task))
        reused = result is not None
        if result is None:
            try:
                made = await self._compute(held, gathered, turn, clocks, reporter)
            except errors.Suspended as exc:  # here the lease is still renewed
                if turn.stop.reason in SUSPENDING:
                    await self._keep_state(held, gathered.folder, exc, turn.stop)
                raise
            with clocks.timed("store"):
                result = await _unless(turn.stop, self._stored(held, turn, made), UNWANTED, ("released",))
            self._finishing.add(clocks.decode + clocks.encode + clocks.store)
        event = contracts.StageCompleted.model_validate(
            held.stamp()
            | self._settlement.spent(clocks)
            | {
                "engine": result.engine, "model": result.model, "revision": result.revision, "seed": result.seed,
                "steps": result.steps, "artifacts": result.artifacts, "timings": clocks.timings(),
                "reused": reused,
            }
        )  # fmt: skip
        await held.append(event)
        await delivery.ack(heard=False)  # the log says that it is done: where this is lost, it is dropped next time
        log.debug("artifacts stored", _event="stored", count=len(result.artifacts), engine=result.engine)
        return "reused" if reused else "completed"

    async def _compute(
        self, held: Claim, gathered: _Gathered, turn: Turn, clocks: Clocks, reporter: Reporter
    ) -> results.Made:
        task = held.task
        with clocks.timed("prepare"):
            preparing = self._watchdog.watch(task.work, "preparing")
            inputs = await preparing.over_thread(self._engine.prepare, task.work, gathered.files)
            begun = await _unless(turn.stop, self._begun_elsewhere(held, gathered.folder), ("released", *UNWANTED))
        decoding = self._decoding.value or 0.0

        def stepped(seconds: float, left_s: float | None) -> None:
            self._count_busy(seconds)
            if left_s is not None:
                turn.frees_in(left_s + decoding)

        async with _device(turn, clocks):
            done = begun.step if begun else 0
            if self._pace is not None and done < task.work.steps:  # candidates may have more, all together
                turn.frees_in(self._pace * (task.work.steps - done) + decoding)

            watch = self._watchdog.watch(task.work)

            def may_go_on(step: int, steps: int) -> None:
                watch.heard(step)
                _may_go_on(task, turn.stop, step, steps)

            def on_step(done: int) -> OnStep:
                return reporter.on_step(may_go_on, stepped, done)

            try:
                with clocks.timed("device"):
                    generated = await watch.over(self._generate(inputs, on_step, begun))
                    _trace_generated(generated, clocks.now())
                self._metrics.memory_rungs(generated.rungs)
            except errors.VidgenError as exc:
                self._metrics.memory_rungs(exc.rungs)
                if isinstance(exc, errors.FatalError):
                    turn.lost()
                raise
            finally:
                self._count_busy(clocks.device - reporter.counted_s)
                self._pace = reporter.seconds_per_step or self._pace
        self._decoding.add(generated.decode_s)
        clocks.denoise, clocks.decode = generated.denoise_s, generated.decode_s
        reporter.phase("finishing")
        with clocks.timed("encode"):
            finishing = self._watchdog.watch(task.work, "finishing")
            return await finishing.over_thread(self._finish, task, generated.output, gathered.folder)

    def _finish(self, task: Task, output: Any, folder: Path) -> results.Made:
        return results.made(task, self._engine.finish(output, folder), self._engine.info)

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
        work = in_thread(work)
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
        sizes = await _all_of(
            *(self._store.fetch(key, path, MAX_INPUT_BYTES) for key, path in zip(task.inputs, paths, strict=True))
        )
        self._metrics.artifact_moved("get", sum(sizes), time.monotonic() - begun)
        return paths

    async def _stored(self, held: Claim, turn: Turn, made: results.Made) -> results.Result:
        """The result in the store, unless a newer attempt has the task: other GPUs make other bytes."""
        await self._be_sure(held, turn)
        return await self._keep(held.task, made)

    async def _be_sure(self, held: Claim, turn: Turn) -> None:
        """See that the task is still held here; who was silent for seconds may have been taken for dead.

        A bus that is away is waited for: it may have given the task to another one before.
        """
        while asyncio.get_running_loop().time() - turn.sure_at > SURE_S:
            try:
                await held.check()
            except errors.BusError as exc:
                log.warning(exc.message, _event="store_waits_for_bus")
                await asyncio.sleep(BUS_PAUSE_S)
            else:
                return

    async def _keep(self, task: Task, made: results.Made) -> results.Result:
        begun = time.monotonic()
        result = await results.keep(self._store, task, made)
        self._metrics.artifact_moved("put", sum(one.size for one in result.artifacts), time.monotonic() - begun)
        return result

    def _count_busy(self, seconds: float) -> None:
        self._busy_seconds += max(0.0, seconds)
        self._metrics.gpu_busy(seconds)

    @contextlib.asynccontextmanager
    async def _lease(self, delivery: Delivery, held: Claim, turn: Turn) -> AsyncIterator[None]:
        """Keep the task while the block runs: heartbeats at a quarter of `ack_wait`, each with a look at the log."""
        turn.sure_at = asyncio.get_running_loop().time()
        beats = asyncio.create_task(self._beat(delivery, held, turn), name=f"lease-{held.task.job_id}")
        try:
            yield
        finally:
            beats.cancel()
            await asyncio.wait([beats])

    async def _beat(self, delivery: Delivery, held: Claim, turn: Turn) -> None:
        while True:
            await told_within(turn.look, self._policy.ack_wait / 4)
            turn.look.clear()
            try:
                await delivery.in_progress()
                seen = await eventlog.newest(self._bus, held.task.job_id, held.task.run)
            except errors.RetryableError as exc:
                self._metrics.heartbeat_failed()
                log.warning(exc.message, _event="heartbeat_failed")
                continue
            # The log has the truth: a signal may come too late and mean the run before, or be missed.
            standing = attempts.standing(held.task, held.attempt, seen.event)
            if standing == "mine":
                turn.sure_at = asyncio.get_running_loop().time()
                continue
            turn.stop.now(standing, seen.event.at if seen.event else None)
            if standing == "fenced":
                return  # another one's lease is not to be renewed from here


@contextlib.asynccontextmanager
async def _disk_told_apart(scratch: Scratch) -> AsyncIterator[None]:
    """FatalError where it was this machine's disk: another worker may do the task, and this one can do none.

    Where the tasks themselves fill it, it is theirs: they would end one worker after the other.
    """
    try:
        yield
    except Exception as exc:
        found = (one for one in _causes(exc) if isinstance(one, OSError) and one.errno in DISK_FAILS)
        cause = next(found, None)
        if cause is None or await asyncio.to_thread(scratch.fills_its_disk):
            raise
        raise errors.FatalError(
            f"this worker's disk fails ({cause.strerror}): make room in VIDGEN_WORK_DIR, or mend it", code="disk_failed"
        ) from exc


@contextlib.asynccontextmanager
async def _refusal_told_apart(store: ArtifactStore) -> AsyncIterator[None]:
    """FatalError where the store refuses this worker whatever it asks for.

    It would fail one task after another, and be free at once for the next.
    """
    try:
        yield
    except errors.StoreRefusedError as exc:
        try:
            await store.require()
        except errors.StoreRefusedError:
            raise errors.FatalError(exc.message, code=exc.code) from exc
        except errors.StoreError:  # nobody knows
            pass
        raise


def _causes(exc: BaseException) -> Iterator[BaseException]:
    """An exception and what it came of; each once, for one may be said to have come of itself."""
    seen: set[int] = set()
    cause: BaseException | None = exc
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__


async def _unless(
    stop: Stop, work: Awaitable[T], reasons: Sequence[Reason] = REASONS, soon: Sequence[Reason] = ()
) -> T:
    """What comes of it; Cancelled, and it is let go of, where the end is asked for by one of the reasons.

    By one of those that want it `soon` a moment later. A store that is away may take minutes.
    """
    doing = asyncio.ensure_future(work)

    def look() -> None:
        if stop.reason in reasons:
            doing.cancel()
        elif stop.reason in soon:
            loop = asyncio.get_running_loop()
            late = loop.call_later(STORE_S, doing.cancel)
            doing.add_done_callback(lambda _: late.cancel())

    stop.wake = look
    try:
        look()
        await asyncio.wait([doing])
    finally:
        stop.wake = None
        doing.cancel()
    if doing.cancelled():
        raise errors.Cancelled
    return doing.result()


async def _in_a_hurry(hand_back: Awaitable[object]) -> None:
    with contextlib.suppress(errors.VidgenError, TimeoutError):
        async with asyncio.timeout(HAND_BACK_S):
            await hand_back


async def _all_of(*works: Awaitable[T]) -> list[T]:
    """Let all come to their ends, then raise the first failure: none goes on behind the caller's back."""
    if len(works) == 1:
        return [await works[0]]
    found = await asyncio.gather(*works, return_exceptions=True)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return [each for each in found if not isinstance(each, BaseException)]


@contextlib.asynccontextmanager
async def _device(turn: Turn, clocks: Clocks) -> AsyncIterator[None]:
    """The device, or Cancelled if the end is asked for while waiting for it."""
    taken = asyncio.ensure_future(turn.device.acquire())
    turn.stop.wake = taken.cancel
    try:
        with clocks.timed("queued"):
            turn.stop.check()
            await asyncio.wait([taken])
            turn.stop.check()
            taken.result()  # raises where the engine could not be woken
        turn.enters("generating")
        yield
        turn.enters("finishing")
    finally:
        turn.stop.wake = None
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


def _left(delivery: Delivery) -> Outcome:
    log.warning("a task that runs at another worker came here", _event="held_elsewhere", seq=delivery.seq)
    return "elsewhere"


def _log_seq(delivery: Delivery) -> int | None:
    told = delivery.headers.get(topology.HEADER_LOG_SEQ, "")
    return int(told) if delivery.num_delivered == 1 and told.isdecimal() else None


def _may_go_on(task: Task, stop: Stop, step: int, steps: int) -> None:
    stop.check_step(step, steps)
    _check_deadline(task)


def _check_deadline(task: Task) -> None:
    if task.deadline_at is not None and datetime.now(UTC) > task.deadline_at:
        raise errors.DeadlineError
