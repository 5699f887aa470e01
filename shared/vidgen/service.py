"""The life of a GPU service: probes first, then the model, then the bus; drain on SIGTERM; leave when sick."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import structlog
import uvloop

from vidgen import choice, errors, gpu, jetstream, probes, telemetry, topology, weights
from vidgen.artifacts import S3Store
from vidgen.contracts import LANES, Stage
from vidgen.engine import Engine
from vidgen.handler import Policy
from vidgen.jetstream import JetStreamBus
from vidgen.metrics import WorkerMetrics
from vidgen.settings import WorkerSettings, read
from vidgen.worker import Registration, Worker

log = structlog.get_logger(__name__)

START_PATIENCE_S = 120.0
START_PAUSE_S = 0.25
LEAVE_S = 2.0  # what a second signal leaves to hand the tasks back

MakeEngine = Callable[[WorkerSettings, choice.Choice], Engine]


def run(stage: Stage, make_engine: MakeEngine) -> int:
    """Serve `stage` until told to stop; the exit code: 0 drained, 1 could not start or became sick."""
    try:
        settings = read(WorkerSettings)
    except errors.FatalError as exc:
        sys.stderr.write(f"{exc.message}\n")
        return 1
    telemetry.configure(settings, f"{stage}-service")
    try:
        uvloop.run(_Service(stage, settings, make_engine).run())
    except errors.VidgenError as exc:
        log.error(exc.message, _event="left", code=exc.code, exc_info=exc.__cause__)
        return 1
    return 0


class _Service:
    def __init__(self, stage: Stage, settings: WorkerSettings, make_engine: MakeEngine) -> None:
        self._stage, self._settings, self._make_engine = stage, settings, make_engine
        self._monitor = gpu.monitor(settings.device)
        self._metrics = WorkerMetrics(stage, self._monitor.read())
        self._stop = asyncio.Event()
        self._worker: Worker | None = None
        self._serving: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None

    async def run(self) -> None:
        self._take_signals()
        settings = self._settings
        gpus = ",".join("cpu" if gpu.uuid == "cpu" else str(gpu.index) for gpu in self._monitor.read())
        structlog.contextvars.bind_contextvars(worker=settings.worker_id, gpu=gpus)
        probing = probes.serve(
            settings.metrics_host, settings.metrics_port, healthy=self._healthy, ready=self._ready,
            metrics=self._metrics.render,
        )  # fmt: skip
        async with probing as url:
            with ThreadPoolExecutor(1, "device") as device_thread:
                engine, load_seconds = await self._load(device_thread)
                await self._serve(engine, load_seconds, device_thread, url)

    async def _load(self, device_thread: ThreadPoolExecutor) -> tuple[Engine, float]:
        begun = time.monotonic()
        model, revision = self._settings.model_of(self._stage)
        gpus = gpu.visible()
        reason = await asyncio.to_thread(weights.why_not, model, revision, gpu=bool(gpus))
        chosen = choice.choose(self._stage, self._settings, gpus=gpus, reason=reason)
        log.info(chosen.reason, _event="engine_chosen", kind=chosen.kind)
        if chosen.kind == "real" and self._settings.verify_weights == "full":
            await asyncio.to_thread(weights.require, model, revision, check="full")
            log.info("the weights are those of their manifest", _event="weights_verified")
        importing = time.monotonic()
        engine = self._make_engine(self._settings, chosen)
        imported = time.monotonic() - importing
        try:
            phases = await asyncio.get_running_loop().run_in_executor(device_thread, engine.setup)
        except errors.VidgenError:
            raise
        except Exception as exc:  # whatever a model's libraries raise
            raise errors.FatalError(
                f"the engine could not be set up: {type(exc).__name__}: {exc}", code="setup_failed"
            ) from exc
        seconds = time.monotonic() - begun
        self._metrics.describe(engine.info)
        phases = {"imports": imported, **phases, "total": seconds}
        self._metrics.model_loaded(phases)
        log.info(
            "the engine is set up", _event="engine_ready", engine=engine.info.name,
            **{f"{name}_s": round(value, 3) for name, value in phases.items()},
        )  # fmt: skip
        return engine, seconds

    async def _serve(self, engine: Engine, load_seconds: float, device_thread: ThreadPoolExecutor, url: str) -> None:
        settings = self._settings
        denied = asyncio.get_running_loop().create_future()

        def on_denied(text: str) -> None:
            if not denied.done():
                denied.set_result(text)

        async with contextlib.AsyncExitStack() as stack:
            connected = await self._connect(stack, on_denied)
            if connected is None:
                return
            store = S3Store.from_settings(settings)
            await self._wait_for_queues(connected)
            worker = self._worker = Worker(
                connected, store, engine, device_thread, self._monitor, self._metrics,
                Policy(
                    worker_id=settings.worker_id, stage=self._stage, ack_wait=settings.ack_wait,
                    max_attempts=settings.max_attempts, backoff_base=settings.backoff_base,
                    backoff_limit=settings.backoff_limit, gpu_usd_per_hour=settings.gpu_usd_per_hour,
                    work_dir=settings.work_dir,
                    checkpoint_over_s=settings.checkpoint_over_s if settings.checkpoint == "auto" else None,
                ),
                Registration(settings.heartbeat_s, settings.grace_s, load_seconds),
            )  # fmt: skip
            if self._stop.is_set():
                return
            gc.freeze()  # what is loaded stays: with torch, the collector takes 0.1 s each time it looks at all of it
            probes.write_ready_file(settings.ready_file, url)
            log.info("ready for tasks", _event="ready", url=url)
            serving = self._serving = asyncio.create_task(worker.run(), name="worker")
            await asyncio.wait([serving, denied], return_when=asyncio.FIRST_COMPLETED)
            if denied.done() and not serving.done():
                serving.cancel()
                await asyncio.wait([serving])
                raise errors.FatalError(
                    f"the bus denies this worker something that it needs: {denied.result()}", code="bus_denied"
                )
            await serving
        log.info("drained", _event="drained")

    async def _connect(self, stack: contextlib.AsyncExitStack, on_denied: Callable[[str], None]) -> JetStreamBus | None:
        """The bus, None when told to stop: a model takes minutes to load, so a bus that is late is waited for."""
        settings = self._settings
        name = f"{self._stage}-{settings.worker_id}"
        give_up = time.monotonic() + START_PATIENCE_S
        while not self._stop.is_set():
            connection = jetstream.connect(settings.nats_url, name, on_denied=on_denied, **settings.nats_options())
            try:
                return await stack.enter_async_context(connection)
            except errors.BusError as exc:
                if time.monotonic() > give_up:
                    raise
                log.warning(exc.message, _event="not_there_yet")
            await self._pause()
        return None

    async def _pause(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), START_PAUSE_S)

    async def _wait_for_queues(self, connected: JetStreamBus) -> None:
        """The gateway makes the queues; a worker only binds, and waits for them."""
        give_up = time.monotonic() + START_PATIENCE_S
        while not self._stop.is_set():
            try:
                for lane in LANES:
                    await connected.depth(topology.consumer_of(self._stage, lane))
            except errors.BusError as exc:
                if time.monotonic() > give_up:
                    raise errors.FatalError(
                        f"the queues of {self._stage} are not there: start the gateway first ({exc.message})",
                        code="queues_missing",
                    ) from exc
            else:
                return
            await self._pause()

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
        if self._worker is not None:
            self._worker.drain()

    async def _leave(self, code: int) -> None:
        """Hand back what is held and go, without waiting for the engine's step to end."""
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait([self._serving], timeout=LEAVE_S)
        os._exit(code)

    def _healthy(self) -> bool:
        return self._worker is None or self._worker.healthy

    def _ready(self) -> tuple[bool, str]:
        if self._worker is None:
            return False, "the model is being loaded, or the bus is not there yet"
        return self._worker.state in ("ready", "busy"), f"the worker is {self._worker.state}"
