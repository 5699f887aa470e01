"""The life of a GPU service: probes first, then the model, then the bus; drain on SIGTERM; leave when sick.

It serves one stage, or several in one process: then one connection, one device thread and one set of probes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import structlog
import uvloop

from vidgen import (
    choice,
    device,
    errors,
    garbage,
    gpu,
    imports,
    jetstream,
    metrics,
    pagecache,
    probes,
    telemetry,
    topology,
    tracing,
    weights,
)
from vidgen.artifacts import S3Store
from vidgen.company import Company
from vidgen.contracts import LANES, Stage
from vidgen.engine import Engine, Sleeper, in_thread
from vidgen.jetstream import JetStreamBus
from vidgen.metrics import WorkerMetrics
from vidgen.patience import PatientStore
from vidgen.scratch import Scratch
from vidgen.settings import WorkerSettings, read
from vidgen.settlement import Policy
from vidgen.waiting import told_within
from vidgen.watchdog import Patience, over_setup
from vidgen.worker import Registration, Worker

log = structlog.get_logger(__name__)

START_PATIENCE_S = 120.0
START_PAUSE_S = 0.25
LEAVE_S = 6.0  # what a second signal leaves to hand the tasks back, each of which has five

T = TypeVar("T")

MakeEngine = Callable[[WorkerSettings, choice.Choice], Engine]


def give_way(by: int) -> None:
    """Let others go first on this machine's processors, by so much as `nice` counts it; 0 changes nothing.

    For the threads that this one starts from here on, too.
    """
    if not by:
        return
    os.nice(by)
    # To be woken is no reason to interrupt others, for Linux, where it is a batch. It shares the processor with many:
    # each interrupts the other with each answer, and what each had in the caches is gone.
    if sys.platform == "linux" and os.sched_getscheduler(0) == os.SCHED_OTHER:
        with contextlib.suppress(OSError):  # a sandbox may not let it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def run(stage: Stage, make_engine: MakeEngine) -> int:
    """Serve `stage` until told to stop; the exit code: 0 drained, 1 could not start or became sick."""
    return run_stages({stage: make_engine}, f"{stage}-service")


def run_stages(makers: Mapping[Stage, MakeEngine], service: str) -> int:
    """Serve some stages in this process, as `run` serves one; the logs name the `service`.

    Where the models take turns on the device, the first stage's is awake at the start.
    """
    try:
        settings = read(WorkerSettings)
    except errors.FatalError as exc:
        sys.stderr.write(f"{exc.message}\n")
        return 1
    telemetry.configure(settings, service)
    give_way(settings.nice)
    # What is made until the tasks come stays: with torch a million objects, which the collector would look through
    # again and again. It took a quarter of the imports' time.
    gc.disable()
    code = 0
    serving: _Service | None = None
    try:
        with tracing.running(settings.traces_url, service, settings.worker_id), without_peft(settings, makers):
            serving = _Service(makers, settings)
            uvloop.run(serving.run())
    except errors.VidgenError as exc:
        log.error(exc.message, _event="left", code=exc.code, exc_info=exc.__cause__)
        code = 1
    except Exception:
        if serving is None or not serving.hangs:
            raise
        log.exception("the service broke", _event="left")
        code = 1
    finally:
        gc.enable()
    if serving is not None and serving.hangs:
        os._exit(code)  # an interpreter that ends waits for its threads, and one of them may never end
    return code


@contextlib.contextmanager
def without_peft(settings: WorkerSettings, stages: Iterable[Stage]) -> Iterator[None]:
    """Within it peft passes for not installed, unless it is imported already or a stage has a LoRA.

    To the engines' packages it is one of choice, which they import whenever it is there, and use for LoRAs alone.
    """
    loras = {"edit": (settings.edit_lora,), "i2v": (settings.i2v_lora, settings.i2v_lora_2)}
    if "peft" in sys.modules or any(lora for stage in stages for lora in loras[stage]):
        yield
        return
    sys.modules["peft"] = None  # type: ignore[assignment]  # Python's own way to say so
    try:
        yield
    finally:
        del sys.modules["peft"]


@dataclass(frozen=True)
class _Loaded:
    """An engine, the seconds that it took so far to have it, and those of each phase."""

    engine: Engine
    seconds: float
    phases: Mapping[str, float]


class _Service:
    def __init__(self, makers: Mapping[Stage, MakeEngine], settings: WorkerSettings) -> None:
        self._makers, self._settings = makers, settings
        self._stages = tuple(makers)
        self._monitor = gpu.monitor(*settings.devices(self._stages))
        gpus = self._monitor.read()
        self._metrics = {
            stage: WorkerMetrics(stage, gpus, tells_figures=stage == self._stages[0]) for stage in self._stages
        }
        self._stop = asyncio.Event()
        self._patience = Patience(settings.hang_factor, settings.hang_least_s, settings.hang_first_s)
        self._waits_for = "its model"
        self._workers: list[Worker] = []
        self._bus: JetStreamBus | None = None
        self._serving: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self.hangs = False  # behind `run`: a thread is at something still

    async def run(self) -> None:
        self._take_signals()
        settings, loop = self._settings, asyncio.get_running_loop()
        threads, device_thread = ThreadPoolExecutor(thread_name_prefix="asyncio"), ThreadPoolExecutor(1, "device")
        loop.set_default_executor(threads)
        await asyncio.to_thread(_try_out, settings.work_dir)
        gpus = ",".join("cpu" if gpu.uuid == "cpu" else str(gpu.index) for gpu in self._monitor.read())
        structlog.contextvars.bind_contextvars(worker=settings.worker_id, gpu=gpus)
        probing = probes.serve(
            settings.metrics_host, settings.metrics_port, healthy=self._healthy, ready=self._ready,
            metrics=lambda: metrics.exposition(list(self._metrics.values())),
        )  # fmt: skip
        async with probing as url:
            bears_s = settings.hang_least_s
            try:
                loaded, takes_turns = await over_setup(self._load(device_thread), self._patience)
                await self._serve(loaded, takes_turns, device_thread, url)
            except errors.HungError:
                bears_s = 0.0  # it was waited for
                raise
            finally:
                # Whatever the reason is to leave, an engine may hang beside it, or at its step for long. The loop waits
                # at its end for the threads of its executor: it gets another one, which the probes have meanwhile.
                loop.set_default_executor(ThreadPoolExecutor(1))
                self.hangs = not await _ended(bears_s, device_thread, threads)

    async def _load(self, device_thread: ThreadPoolExecutor) -> tuple[dict[Stage, _Loaded], bool]:
        """The engines, set up, and whether they take turns; then all but the first stage's are asleep."""
        kept = contextlib.ExitStack()
        # In threads: a volume may be slow, or not answer, and the probes are to.
        keeping = imports.kept(self._settings.compile_cache, "-".join(self._stages))
        refused = await asyncio.to_thread(kept.enter_context, keeping)
        if refused is not None:
            log.warning(f"{refused}: what imports work out is not kept", _event="imports_not_kept")
        try:
            return await self._load_all(device_thread)
        finally:
            await asyncio.to_thread(kept.close)

    async def _load_all(self, device_thread: ThreadPoolExecutor) -> tuple[dict[Stage, _Loaded], bool]:
        made = {stage: await self._make(stage) for stage in self._stages}
        engines = {stage: one.engine for stage, one in made.items()}
        plan = await _on(device_thread, lambda: device.share(engines, self._settings.profile))
        loaded = {}
        # The last one first: so the first one ends awake, and there is never more than one on the device.
        for stage in reversed(self._stages):
            loaded[stage] = await self._set_up(stage, made[stage], device_thread)
            engine = made[stage].engine
            if plan is not None and plan.takes_turns and stage != self._stages[0] and isinstance(engine, Sleeper):
                await _on(device_thread, engine.sleep)
        return loaded, plan is not None and plan.takes_turns

    async def _make(self, stage: Stage) -> _Loaded:
        begun = time.monotonic()
        self._waits_for = f"the packages of its {stage} engine: they are being imported"
        model, revision = self._settings.model_of(stage)
        gpus = gpu.visible()
        reason = await asyncio.to_thread(weights.why_not, model, revision, gpu=bool(gpus))
        chosen = choice.choose(stage, self._settings, gpus=gpus, reason=reason)
        chosen = replace(chosen, alone=len(self._stages) == 1)
        log.info(chosen.reason, _event="engine_chosen", stage=stage, kind=chosen.kind)
        if chosen.kind == "real" and (missing := weights.not_installed()) is not None:
            raise errors.FatalError(missing, code="not_installed")
        if chosen.kind == "real" and self._settings.verify_weights == "full":
            await asyncio.to_thread(weights.require, model, revision, check="full")
            log.info("the weights are those of their manifest", _event="weights_verified")
        importing = time.monotonic()
        # In a thread: the packages of a real engine take seconds, and the probes are to answer meanwhile.
        files = self._files(stage) if chosen.kind == "real" and reason is None else []
        with _ending_the_start(), pagecache.filling(files):
            engine = await asyncio.to_thread(in_thread(self._makers[stage]), self._settings, chosen)
        return _Loaded(engine, time.monotonic() - begun, {"imports": time.monotonic() - importing})

    def _files(self, stage: Stage) -> Sequence[Path]:
        """The weights of a model that is there, as its loader will read them."""
        found = weights.locate(*self._settings.model_of(stage))
        return [] if found is None else weights.in_reading_order(found.folder)

    async def _set_up(self, stage: Stage, made: _Loaded, device_thread: ThreadPoolExecutor) -> _Loaded:
        begun = time.monotonic()
        self._waits_for = f"its {stage} engine: the model is being loaded and warmed up"
        engine = made.engine
        phases = await _on(device_thread, engine.setup)
        seconds = made.seconds + time.monotonic() - begun
        phases = {**made.phases, **phases, "total": seconds}
        self._metrics[stage].describe(engine.info)
        self._metrics[stage].model_loaded(phases)
        log.info(
            "the engine is set up", _event="engine_ready", stage=stage, engine=engine.info.name,
            **{f"{name}_s": round(value, 3) for name, value in phases.items()},
        )  # fmt: skip
        return _Loaded(engine, seconds, phases)

    async def _serve(
        self, loaded: Mapping[Stage, _Loaded], takes_turns: bool, device_thread: ThreadPoolExecutor, url: str
    ) -> None:
        settings = self._settings
        denied = asyncio.get_running_loop().create_future()

        def on_denied(text: str) -> None:
            if not denied.done():
                denied.set_result(text)

        async with contextlib.AsyncExitStack() as stack:
            connected = self._bus = await self._connect(stack, on_denied)
            if connected is None:
                return
            store = S3Store.from_settings(settings)
            await self._wait_for_queues(connected)
            await self._wait_for_store(store)
            devices = device.views(
                {stage: one.engine for stage, one in loaded.items()}, self._stages[0], device_thread,
                lambda stage, seconds: self._metrics[stage].switched(seconds), takes_turns=takes_turns,
                bears_s=settings.hang_first_s if settings.hang_factor else None,
            )  # fmt: skip
            company, patient = Company(), PatientStore(store, settings.store_patience_s)
            self._workers = [
                Worker(
                    connected, patient, loaded[stage].engine, device_thread, self._monitor, self._metrics[stage],
                    self._policy(stage), Registration(settings.heartbeat_s, settings.grace_s, loaded[stage].seconds),
                    devices[stage], company,
                )
                for stage in self._stages
            ]  # fmt: skip
            if self._stop.is_set():
                return
            garbage.collect_rarely()
            gc.enable()
            probes.write_ready_file(settings.ready_file, url)
            log.info("ready for tasks", _event="ready", url=url)
            serving = self._serving = asyncio.create_task(_run_all(self._workers), name="workers")
            await asyncio.wait([serving, denied], return_when=asyncio.FIRST_COMPLETED)
            if denied.done() and not serving.done():
                serving.cancel()
                await asyncio.wait([serving])
                raise errors.FatalError(
                    f"the bus denies this worker something that it needs: {denied.result()}", code="bus_denied"
                )
            await serving
        log.info("drained", _event="drained")

    def _policy(self, stage: Stage) -> Policy:
        settings = self._settings
        return Policy(
            worker_id=settings.worker_id, stage=stage, ack_wait=settings.ack_wait,
            max_attempts=settings.max_attempts, backoff_base=settings.backoff_base,
            backoff_limit=settings.backoff_limit, gpu_usd_per_hour=settings.gpu_usd_per_hour,
            work_dir=settings.work_dir,
            checkpoint_over_s=settings.checkpoint_over_s if settings.checkpoint == "auto" else None,
            hang=self._patience,
        )  # fmt: skip

    async def _connect(self, stack: contextlib.AsyncExitStack, on_denied: Callable[[str], None]) -> JetStreamBus | None:
        """The bus, None when told to stop: a model takes minutes to load, so a bus that is late is waited for."""
        settings = self._settings
        name = "-".join((*self._stages, settings.worker_id))
        give_up, self._waits_for = time.monotonic() + START_PATIENCE_S, "the bus"
        while not self._stop.is_set():
            connection = jetstream.connect(settings.nats_url, name, on_denied=on_denied, **settings.nats_options())
            try:
                return await stack.enter_async_context(connection)
            except errors.BusError as exc:
                if time.monotonic() > give_up:
                    raise
                log.warning(exc.message, _event="not_there_yet")
            await told_within(self._stop, START_PAUSE_S)
        return None

    async def _wait_for_queues(self, connected: JetStreamBus) -> None:
        """The gateway makes the queues, and sets them anew; a worker only binds, and waits for them."""
        give_up, self._waits_for = time.monotonic() + START_PATIENCE_S, "its queues: the gateway makes them"
        while not self._stop.is_set():
            try:
                for stage, lane in itertools.product(self._stages, LANES):
                    await connected.require(topology.consumer_of(stage, lane), self._settings.ack_wait)
            except errors.FatalError as exc:  # a gateway that is just starting may set it
                if time.monotonic() > give_up:
                    raise
                self._wait(f"its queues: {exc.message}")
            except errors.BusError as exc:
                if time.monotonic() > give_up:
                    stages = " and ".join(self._stages)
                    raise errors.FatalError(
                        f"the queues of {stages} are not there: start the gateway first ({exc.message})",
                        code="queues_missing",
                    ) from exc
                self._wait(f"its queues, which the gateway makes: {exc.message}")
            else:
                return
            await told_within(self._stop, START_PAUSE_S)

    async def _wait_for_store(self, store: S3Store) -> None:
        """A worker whom the store refuses would be free at once for each task, and fail them all.

        One that is away is waited for, as it is where a task needs it.
        """
        give_up, self._waits_for = time.monotonic() + START_PATIENCE_S, "the object store"
        while not self._stop.is_set():
            try:
                await store.require()
            except errors.StoreError as exc:
                if isinstance(exc, errors.StoreRefusedError) and time.monotonic() > give_up:
                    raise errors.FatalError(exc.message, code=exc.code) from exc
                self._wait(f"the object store: {exc.message}")
            else:
                return
            await told_within(self._stop, START_PAUSE_S)

    def _wait(self, what: str) -> None:
        """Have the probes say what is waited for, and the log once."""
        if what != self._waits_for:
            self._waits_for = what
            log.warning(f"this worker waits for {what}", _event="not_there_yet")

    def _take_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            if self._leaving is not None or self._serving is None:
                os._exit(128 + number)
            log.warning("leaving now: what runs is handed back", _event="killed")
            self._leaving = asyncio.get_running_loop().create_task(self._leave(128 + number))
            return
        log.info("draining: no new task is taken, what runs is finished or handed back", _event="draining")
        self._stop.set()
        for worker in self._workers:
            worker.drain()

    async def _leave(self, code: int) -> None:
        """Hand back what is held and go, without waiting for the engine's step to end."""
        if self._serving is not None and self._bus is not None:
            self._serving.cancel()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LEAVE_S):
                    await asyncio.wait([self._serving])
                    # A pull that was given up still listens for a moment: the bus may have given it what was just
                    # handed back, and it hands that back, too.
                    await self._bus.settle()
        os._exit(code)

    def _healthy(self) -> bool:
        return all(worker.healthy for worker in self._workers)

    def _ready(self) -> tuple[bool, str]:
        if not self._workers:
            return False, f"the worker waits for {self._waits_for}"
        states = [worker.state for worker in self._workers]
        return all(state in ("ready", "busy") for state in states), f"the worker is {' and '.join(states)}"


def _try_out(work_dir: Path | None) -> None:
    """Raise FatalError where nothing can be written there: a model takes minutes to load, and no task a moment."""
    try:
        Scratch(work_dir).close()
    except errors.StoreError as exc:
        where = f"VIDGEN_WORK_DIR={work_dir}" if work_dir is not None else "the folder for temporary files"
        raise errors.FatalError(f"{where} cannot be used: {exc.message}", code="settings") from exc


async def _ended(bears_s: float, *executors: ThreadPoolExecutor) -> bool:
    """Whether their threads are done within so many seconds; none takes anything more."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def wait() -> None:
        for executor in executors:
            executor.shutdown()
        with contextlib.suppress(RuntimeError):  # nobody waits any more
            loop.call_soon_threadsafe(ended.set_result, None)

    threading.Thread(target=wait, name="ended", daemon=True).start()
    await asyncio.wait([ended], timeout=bears_s)
    return ended.done()


async def _run_all(workers: Sequence[Worker]) -> None:
    """Run until all are drained; where one must leave, the others hand back at once what they hold."""
    running = [asyncio.create_task(worker.run(), name="worker") for worker in workers]
    try:
        await asyncio.gather(*running)
    finally:
        for one in running:
            one.cancel()
        await asyncio.wait(running)


async def _on(device_thread: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    """What the engines do on their device at the start; raises FatalError."""
    with _ending_the_start():
        return await asyncio.get_running_loop().run_in_executor(device_thread, in_thread(work))


@contextlib.contextmanager
def _ending_the_start() -> Iterator[None]:
    """Whatever an engine's libraries raise is a FatalError."""
    try:
        yield
    except errors.VidgenError:
        raise
    except Exception as exc:
        raise errors.FatalError(
            f"the engine could not be set up: {type(exc).__name__}: {exc}", code="setup_failed"
        ) from exc
