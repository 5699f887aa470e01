"""The runtime that both GPU services share: pull by lane, three overlapped phases, drain, registry.

While the device generates task n, task n+1 is fetched and prepared and task n−1 is encoded and stored, so the device
never waits for the network or an encoder. The next task is taken just in time, not early: what one worker holds, an
idle one cannot have.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import structlog

import vidgen
from vidgen import errors, eventlog, topology
from vidgen.artifacts import ArtifactStore
from vidgen.bus import Bus, Delivery
from vidgen.company import Company
from vidgen.contracts import GpuFigures, Stage, WorkerInfo
from vidgen.device import Device
from vidgen.engine import Engine, GpuMonitor
from vidgen.handler import Handler
from vidgen.metrics import WorkerMetrics
from vidgen.settlement import JOB_ID, Policy
from vidgen.turn import Phase, Turn
from vidgen.waiting import told_within

log = structlog.get_logger(__name__)

State = Literal["starting", "ready", "busy", "draining", "unhealthy"]

IN_FLIGHT = 4  # one generating, one prepared, two being encoded and stored
LEAD_S = 3.0  # how long before the device is likely to be free the next task is taken
CANCEL_WAIT_S = 5.0
IDLE_WAIT_S = 0.5
MOMENT_S = 0.05  # how long the batch waits behind an interactive task for the next one
BUS_PAUSE_S = 0.5
GRACE_LOOK_S = 1.0  # between two looks, behind the grace period, at what still runs
BATCH_SHARE = 10  # at least one task in ten is a batch task while any waits
SOON_S = 1.0  # what is not urgent is told in the registry with what comes within that, in one
LOOK_S = 1.0  # how often a worker with a long batch task looks for an interactive one
MAX_PREEMPTIONS = 3  # of one task: then it runs to its end


@dataclass(frozen=True)
class Pulled:
    """A task just taken; `gives_way` where a later interactive task goes before it: a batch task out of turn."""

    delivery: Delivery
    gives_way: bool


class LanePuller:
    """Takes the next task of a stage: interactive first, batch when there is none, and one in ten from batch anyway."""

    def __init__(self, bus: Bus, stage: Stage) -> None:
        self._bus = bus
        self._interactive = topology.consumer_of(stage, "interactive")
        self._batch = topology.consumer_of(stage, "batch")
        self._since_batch = 0
        self._empty = False  # the interactive lane, a moment ago

    async def next(self, wait: float = IDLE_WAIT_S) -> Pulled | None:
        """The next task, None when `wait` seconds brought none; raises BusError."""
        if self._since_batch >= BATCH_SHARE - 1:
            if (delivery := await self._bus.pull(self._batch, wait=0)) is not None:
                return self._count(self._batch, delivery)
            self._since_batch = 0  # nothing was waiting there
        empty, self._empty = self._empty, False
        # Behind one another may follow: to wait for it for a moment costs less than a look into both lanes and then to
        # wait for it all the same.
        moment = min(MOMENT_S, wait) if self._since_batch else 0
        if not empty and (pulled := await self.interactive(moment)) is not None:
            return pulled
        if (delivery := await self._bus.pull(self._batch, wait=0)) is not None:
            return self._count(self._batch, delivery, gives_way=True)
        pulled = await self.interactive(wait)
        self._empty = pulled is None
        return pulled

    async def interactive(self, wait: float = 0) -> Pulled | None:
        """The next interactive task, None when `wait` seconds brought none; raises BusError."""
        delivery = await self._bus.pull(self._interactive, wait=wait)
        return self._count(self._interactive, delivery) if delivery is not None else None

    def _count(self, consumer: topology.Consumer, delivery: Delivery, *, gives_way: bool = False) -> Pulled:
        self._since_batch = 0 if consumer is self._batch else self._since_batch + 1
        return Pulled(delivery, gives_way)


@dataclass(eq=False)
class _JustInTimeTurn(Turn):
    """Lets the next task be taken shortly before this one leaves the device; at its end if nobody knows when."""

    job_id: str = ""
    gives_way: bool = False
    open_next: Callable[[], None] = lambda: None
    told: Callable[[_JustInTimeTurn], None] = lambda turn: None
    lose: Callable[[], None] = lambda: None
    changed: Callable[[], None] = lambda: None
    delivery: Delivery | None = None
    _timer: asyncio.TimerHandle | None = None
    _opened: bool = False

    def holds(self, seq: int) -> bool:
        """Whether this is the turn of the task with that sequence, and has neither lost nor settled it."""
        held = self.delivery
        return held is not None and held.seq == seq and not held.settled and self.stop.reason != "fenced"

    def enters(self, phase: Phase) -> None:
        super().enters(phase)
        self.changed()

    def frees_in(self, seconds: float) -> None:
        super().frees_in(seconds)
        self.told(self)
        self._stop_timer()
        if seconds <= LEAD_S:
            self._open()
        else:
            self._timer = asyncio.get_running_loop().call_later(seconds - LEAD_S, self._open)

    def ends(self) -> None:
        self._stop_timer()
        self._open()

    def lost(self) -> None:
        self.lose()

    def pass_on(self) -> Callable[[], None]:
        """What this turn would open, for the one that goes before it to open; nothing if it is open already."""
        self._stop_timer()
        open_next = (lambda: None) if self._opened else self.open_next
        self._opened = True
        return open_next

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _open(self) -> None:
        if not self._opened and not self.alone:
            self._opened = True
            self.open_next()


@dataclass(frozen=True)
class Registration:
    """How a worker shows itself: how often, and how long its model took to load."""

    heartbeat_s: float = 3.0
    grace_s: float = 600.0
    load_seconds: float | None = None


class _Figures:
    """The devices' figures, read in a thread of its own that nobody waits for: a driver that hangs ends no more."""

    def __init__(self, monitor: GpuMonitor) -> None:
        self._monitor = monitor
        self._newest: tuple[GpuFigures, ...] = ()
        self._reading: asyncio.Future[tuple[GpuFigures, ...]] | None = None

    async def within(self, seconds: float) -> tuple[GpuFigures, ...]:
        """Those of now; where the driver takes longer, the newest that are known."""
        if self._reading is None:
            loop = asyncio.get_running_loop()
            self._reading = loop.create_future()
            threading.Thread(target=self._read, args=(loop, self._reading), name="figures", daemon=True).start()
        await asyncio.wait([self._reading], timeout=seconds)
        if self._reading.done():
            self._newest, self._reading = self._reading.result(), None
        return self._newest

    def _read(self, loop: asyncio.AbstractEventLoop, reading: asyncio.Future[tuple[GpuFigures, ...]]) -> None:
        figures = self._monitor.read()
        with contextlib.suppress(RuntimeError):  # this process leaves
            loop.call_soon_threadsafe(reading.set_result, figures)


class Worker:
    """One engine serving one stage. `run` returns once drained and raises FatalError when the worker is sick.

    `device` and `company` are what it shares with the other workers of its process, where there are any.
    """

    def __init__(
        self,
        bus: Bus,
        store: ArtifactStore,
        engine: Engine,
        device_thread: ThreadPoolExecutor,
        monitor: GpuMonitor,
        metrics: WorkerMetrics,
        policy: Policy,
        registration: Registration,
        device: Device | None = None,
        company: Company | None = None,
    ) -> None:
        self._bus, self._engine, self._figures, self._metrics = bus, engine, _Figures(monitor), metrics
        self._policy, self._registration = policy, registration
        self._company = company or Company()
        self._company.join(self.drain)
        self._handler = Handler(bus, store, engine, device_thread, metrics, policy, self._company)
        self._puller = LanePuller(bus, policy.stage)
        self._device = device or asyncio.Lock()
        self._places = asyncio.Semaphore(IN_FLIGHT)
        self._next = asyncio.Semaphore(1)
        self._turns: set[_JustInTimeTurn] = set()
        self._pulling: set[asyncio.Future[Pulled | None]] = set()
        self._draining = asyncio.Event()
        self._changed = asyncio.Event()  # the registry should know now
        self._soon: asyncio.TimerHandle | None = None  # or with what comes next
        self._fatal: errors.FatalError | None = None
        self._host = socket.gethostname()
        self._started_at = datetime.now(UTC)
        self._done = 0

    @property
    def healthy(self) -> bool:
        return self._fatal is None

    @property
    def state(self) -> State:
        if self._fatal is not None:
            return "unhealthy"
        if self._draining.is_set():
            return "draining"
        return "busy" if self._turns else "ready"

    def drain(self) -> None:
        """Take no more tasks, hand back what only waits; what runs is finished, or handed back if that takes long."""
        self._draining.set()
        for pulling in self._pulling:
            pulling.cancel()
        for turn in self._turns:
            if turn.phase == "preparing":
                turn.stop.now("released")
            self._leave_if_long(turn)

    def _leave_if_long(self, turn: _JustInTimeTurn) -> None:
        """While it drains: hand back in the middle what cannot be done soon; looked at again with each step."""
        left_s, over_s = turn.left_s, self._policy.checkpoint_over_s
        if not self._draining.is_set() or not self._handler.suspends or turn.phase != "generating":
            return
        if left_s is None or over_s is None:
            return
        if left_s + self._handler.after_device_s > min(over_s, self._registration.grace_s):
            turn.stop.now("drained")

    async def run(self) -> None:
        """Serve until drained; raises FatalError when this worker can no longer work.

        Then, and where this call is cancelled, its tasks are handed back at once.
        """
        ending = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as sides:
                sides.create_task(self._register(ending), name="registry")
                cancels = sides.create_task(self._hear_cancels(), name="cancels")
                presence = sides.create_task(self._be_there(), name="presence")
                sides.create_task(self._end_grace(ending), name="grace")
                try:
                    await self._serve()
                finally:
                    ending.set()
                    self._changed.set()
                    cancels.cancel()
                    presence.cancel()
        except ExceptionGroup as died:
            broken = errors.FatalError("a part of this worker died: the log says of what", code="worker_broken")
            raise self._unfit_by(broken) from died
        if self._fatal is not None:
            raise self._fatal

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            if self._handler.suspends:
                tasks.create_task(self._make_way(tasks), name="make-way")
            while not self._draining.is_set():
                await self._places.acquire()
                await self._next.acquire()
                pulled = None if self._draining.is_set() else await self._pull(self._puller.next)
                if pulled is None:
                    self._next.release()
                    self._places.release()
                    continue
                self._begin(tasks, pulled, self._next.release)

    def _begin(self, tasks: asyncio.TaskGroup, pulled: Pulled, open_next: Callable[[], None]) -> None:
        """See a task through that has a place."""
        delivery = pulled.delivery
        turn = _JustInTimeTurn(
            self._device, job_id=delivery.subject.rsplit(".", 1)[-1], gives_way=pulled.gives_way, open_next=open_next,
            told=self._leave_if_long, lose=self._company.unfit, changed=self._change_soon, delivery=delivery,
        )  # fmt: skip
        self._turns.add(turn)
        if delivery.num_delivered > 1:  # or a gateway hands it out once more, as long as the log names one who died
            self._changed.set()
        else:
            self._change_soon()
        tasks.create_task(self._see_through(delivery, turn), name=f"task-{delivery.seq}")

    def _change_soon(self) -> None:
        """Each entry is a synced write: a task that takes no time costs one, not one for each of its phases."""
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_later(SOON_S, self._changed.set)

    def _forget_soon(self) -> None:
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None

    async def _make_way(self, tasks: asyncio.TaskGroup) -> None:
        """While a batch task with much left to do runs: an interactive task that no other worker takes goes first.

        It is taken before the batch task is stopped, so one task never stops two; and only what nobody else waits for
        is taken, so an idle worker comes first.
        """
        while not self._draining.is_set():
            await told_within(self._draining, LOOK_S)
            turn = next((turn for turn in self._turns if self._gives_way(turn)), None)
            if turn is None or self._places.locked() or self._draining.is_set():
                continue
            await self._places.acquire()
            pulled = await self._pull(self._puller.interactive)
            if pulled is None:
                self._places.release()
                continue
            if self._gives_way(turn):
                turn.stop.now("preempted")
            self._begin(tasks, pulled, turn.pass_on())

    def _gives_way(self, turn: _JustInTimeTurn) -> bool:
        left_s, over_s = turn.left_s, self._policy.checkpoint_over_s
        return (
            turn.gives_way and turn.phase == "generating" and turn.stop.reason is None
            and turn.preempted < MAX_PREEMPTIONS
            and left_s is not None and over_s is not None and left_s > over_s
        )  # fmt: skip

    async def _pull(self, pull: Callable[[], Awaitable[Pulled | None]]) -> Pulled | None:
        """The next task, None where there is none or a drain begins; a cancelled pull hands back what it would take."""
        pulling = asyncio.ensure_future(pull())
        self._pulling.add(pulling)
        try:
            await asyncio.wait([pulling])
        finally:
            self._pulling.discard(pulling)
            if not pulling.done():
                pulling.cancel()
                await asyncio.wait([pulling])
        try:
            pulled = None if pulling.cancelled() else pulling.result()
            if pulled is not None and self._draining.is_set():
                await pulled.delivery.nak()  # both at once: nobody needs to hear of it
                return None
        except errors.BusError as exc:
            log.warning(exc.message, _event="bus_lost")
            await asyncio.sleep(BUS_PAUSE_S)
            return None
        if pulled is not None and any(turn.holds(pulled.delivery.seq) for turn in self._turns):
            # A bus that was killed may forget that it gave it to us. It goes by the message, not by the delivery: what
            # runs here renews its lease and settles it, and a second attempt would only overtake the first.
            log.warning("a task that runs here came again", _event="held_already", seq=pulled.delivery.seq)
            return None
        return pulled

    async def _see_through(self, delivery: Delivery, turn: _JustInTimeTurn) -> None:
        try:
            await self._handler.handle(delivery, turn)
            self._done += 1
        except errors.FatalError as exc:
            self._unfit_by(exc)
            self._company.unfit()
        finally:
            turn.alone = False
            turn.ends()
            self._turns.discard(turn)
            self._places.release()

    def _unfit_by(self, exc: errors.FatalError) -> errors.FatalError:
        """Why this worker must leave: the newest reason, but an engine that hangs before all others.

        A process in which a thread never ends has to leave in another way.
        """
        if not isinstance(self._fatal, errors.HungError):
            self._fatal = exc
        return self._fatal

    async def _hear_cancels(self) -> None:
        """Cancels on core NATS reach a running task within a step: it looks at the log, where the truth is."""
        while True:
            try:
                feed = await self._bus.listen(topology.SUBJECT_CONTROL_ALL)
                try:
                    while True:
                        heard = await feed.next(wait=CANCEL_WAIT_S)
                        job_id = heard.subject.rsplit(".", 1)[-1] if heard is not None else None
                        for turn in self._turns:
                            if turn.job_id == job_id:
                                turn.look.set()
                finally:
                    await feed.close()
            except errors.BusError as exc:
                # What is missed meanwhile stands in the log, and each heartbeat looks there.
                log.warning(exc.message, _event="bus_lost")
                await asyncio.sleep(BUS_PAUSE_S)

    async def _be_there(self) -> None:
        """Listen for as long as this process lives: where nobody does, a gateway hands out again what is held here.

        A worker that was given what this one began asks here whether it is still at it.
        """
        subject = topology.subject_of_worker(self._policy.stage, self._policy.worker_id)
        while True:
            try:
                feed = await self._bus.listen(subject)
                try:
                    while True:
                        heard = await feed.next(wait=CANCEL_WAIT_S)
                        if heard is not None and heard.reply and heard.body:
                            mine = {turn.job_id.encode() for turn in self._turns}
                            await self._bus.signal(heard.reply, eventlog.AT_IT if heard.body in mine else b"no")
                finally:
                    await feed.close()
            except errors.BusError as exc:
                log.warning(exc.message, _event="bus_lost")
                await asyncio.sleep(BUS_PAUSE_S)

    async def _end_grace(self, ending: asyncio.Event) -> None:
        """A drain that takes longer than the grace period hands back what still runs, at its next step.

        With its state where the engine can leave one.
        """
        draining = asyncio.ensure_future(self._draining.wait())
        ended = asyncio.ensure_future(ending.wait())
        try:
            await asyncio.wait([draining, ended], return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait([ended], timeout=self._registration.grace_s)
        finally:
            draining.cancel()
            ended.cancel()
        while not ending.is_set():  # what was at its last step is to be stored by now
            for turn in self._turns:
                turn.stop.now("drained" if self._handler.suspends and turn.phase == "generating" else "released")
            await told_within(ending, GRACE_LOOK_S)

    async def _register(self, ending: asyncio.Event) -> None:
        records = self._bus.records(topology.WORKERS_BUCKET)
        key = f"{self._policy.stage}.{self._policy.worker_id}"
        clock = asyncio.get_running_loop().time
        figures: tuple[GpuFigures, ...] = ()
        read_at = float("-inf")
        while True:
            last = ending.is_set()
            self._changed.clear()
            self._forget_soon()
            if clock() - read_at >= self._registration.heartbeat_s:  # a driver may take its time, and a change has none
                figures, read_at = await self._figures.within(self._registration.heartbeat_s / 3), clock()
                self._metrics.gpu_figures(figures)
            info = self._describe(figures)
            self._metrics.state(info.state)
            try:
                await records.put(key, info.to_bytes())
            except errors.BusError as exc:
                self._metrics.heartbeat_failed()
                log.warning(exc.message, _event="heartbeat_failed")
            if last:
                return
            await told_within(self._changed, self._registration.heartbeat_s)

    def _describe(self, gpus: tuple[GpuFigures, ...]) -> WorkerInfo:
        engine = self._engine.info
        return WorkerInfo(
            id=self._policy.worker_id,
            stage=self._policy.stage,
            state=self.state,
            engine=engine.name,
            model=engine.model,
            revision=engine.revision,
            profile=engine.profile,
            device=engine.device,
            gpus=gpus,
            # A task that cannot be read may have come under any name.
            running=tuple(turn.job_id for turn in self._turns if JOB_ID.fullmatch(turn.job_id)),
            generating=next((turn.job_id for turn in self._turns if turn.phase == "generating"), None),
            seconds_per_step=self._handler.seconds_per_step,
            busy_seconds=self._handler.busy_seconds,
            tasks_done=self._done,
            load_seconds=self._registration.load_seconds,
            version=vidgen.__version__,
            host=self._host,
            started_at=self._started_at,
            at=datetime.now(UTC),
        )
