"""One device for several stages: whether all their models stay on it, else whose task is next and who is awake."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from vidgen import errors, profiles, tracing
from vidgen.contracts import Stage
from vidgen.engine import Engine, Sleeper, in_thread

log = structlog.get_logger(__name__)

HOLD_SWITCHES = 9.0  # so that switching takes a tenth of the time at the most
LONGEST_HOLD_S = 120.0
SWITCH_TRIES = 3  # for want of memory, one after another: then it is the worker, and not a task after the next one


class Device(Protocol):
    """What a task holds while it generates; an `asyncio.Lock` is one."""

    async def acquire(self) -> object:
        """Wait for the device; raises RetryableError or FatalError where it cannot be had."""

    def release(self) -> None:
        """Give it to the next one."""


def share(engines: Mapping[Stage, Engine], wanted: str) -> profiles.Plan | None:
    """How the engines share their GPU, and have them do so; None where there is nothing to share.

    Before they are set up, in the device's thread. `wanted` is `auto` or a profile's name; raises FatalError.
    """
    if len(engines) == 1:
        return None
    sleepers = [engine for engine in engines.values() if isinstance(engine, Sleeper)]
    asked = [(engine, demand) for engine in sleepers if (demand := engine.demand()) is not None]
    if len(asked) < 2:
        return None
    plan = profiles.share(wanted, [demand for _, demand in asked])
    for (engine, _), profile in zip(asked, plan.profiles, strict=True):
        engine.settle_for(profile, plan.room)
    how = "take turns on the GPU" if plan.takes_turns else "stay on the GPU together"
    log.info(f"the models {how}: {', '.join(plan.profiles)}", _event="gpu_shared", takes_turns=plan.takes_turns)
    return plan


def views(
    engines: Mapping[Stage, Engine],
    awake: Stage,
    device_thread: Executor,
    on_switch: Callable[[Stage, float], None],
    *,
    takes_turns: bool,
    bears_s: float | None = None,
) -> Mapping[Stage, Device]:
    """The one device as each stage has it: first come, first served where all the models stay on it.

    Where they take turns, `awake`, `on_switch` and `bears_s` are those of `TakingTurns`.
    """
    if not takes_turns:
        return dict.fromkeys(engines, asyncio.Lock())
    sleepers = {stage: engine for stage, engine in engines.items() if isinstance(engine, Sleeper)}
    shared = TakingTurns(sleepers, awake, device_thread, on_switch, bears_s=bears_s)
    return {stage: shared.of(stage) for stage in engines}


def next_stage(waiting: Sequence[Stage], awake: Stage | None, held_s: float, switch_s: float) -> Stage:
    """Whose task has the device next; pure.

    `waiting` are the stages of the tasks that wait, at least one, in the order in which they came; `held_s` the seconds
    since the stage that is awake has the device, `switch_s` those that the last switch took. It keeps the device while
    it has tasks, until that has paid for the switch; but not for long where another one waits.
    """
    others = [stage for stage in waiting if stage != awake]
    if awake is None or awake not in waiting:
        return others[0]
    over = held_s >= min(HOLD_SWITCHES * switch_s, LONGEST_HOLD_S)
    return others[0] if others and over else awake


_Load = tuple[float, float]  # when the engine began to be woken, and when it was; seconds since the epoch


@dataclass(eq=False)
class _Waiter:
    stage: Stage
    granted: asyncio.Future[_Load | None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class TakingTurns:
    """A device on which only one of the engines is awake at a time. Made and used in one event loop.

    `awake` is the stage whose engine is. `on_switch` is told each stage that was woken, and the seconds that it took.
    An engine that takes longer than `bears_s` to sleep or to wake hangs: SwitchHungError for the task that waits. What
    a task can be tried again for becomes a FatalError where it happens `SWITCH_TRIES` times without a switch between.
    """

    def __init__(
        self,
        engines: Mapping[Stage, Sleeper],
        awake: Stage,
        device_thread: Executor,
        on_switch: Callable[[Stage, float], None],
        clock: Callable[[], float] = time.monotonic,
        bears_s: float | None = None,
    ) -> None:
        self._engines, self._device_thread, self._on_switch, self._clock = engines, device_thread, on_switch, clock
        self._bears_s = bears_s
        self._awake: Stage | None = awake
        self._since, self._switch_s = clock(), 0.0
        self._waiting: list[_Waiter] = []
        self._taken = False
        self._switching: asyncio.Task[None] | None = None
        self._failed = 0  # switches, since one went well
        # A switch belongs to no job: what it logs must not name the one that happened to end before it.
        self._context = contextvars.copy_context()

    def of(self, stage: Stage) -> Device:
        """The device as the worker of one stage knows it."""
        return _View(self, stage)

    async def acquire(self, stage: Stage) -> None:
        """Wait until the device is free, it is this stage's turn and its engine is awake."""
        waiter = _Waiter(stage)
        self._waiting.append(waiter)
        self._advance()
        try:
            load = await waiter.granted
        except asyncio.CancelledError:
            # It may have been granted in the same moment.
            if not waiter.granted.cancelled() and waiter.granted.exception() is None:
                self.release()
            raise
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
        if load is not None:
            tracing.took("load", *load)

    def release(self) -> None:
        self._taken = False
        self._advance()

    def _advance(self, load: _Load | None = None) -> None:
        """Give the free device to whoever is next, after a switch where it takes one; `load` is the one behind it."""
        waiting = [waiter for waiter in self._waiting if not waiter.granted.done()]
        if self._taken or not waiting:
            return
        held_s = self._clock() - self._since
        stage = next_stage([waiter.stage for waiter in waiting], self._awake, held_s, self._switch_s)
        self._taken = True
        if stage == self._awake:
            self._first(stage).granted.set_result(load)
            return
        switching = self._switch(stage)
        self._switching = asyncio.get_running_loop().create_task(switching, name="switch", context=self._context)

    async def _switch(self, stage: Stage) -> None:
        """Put the one to sleep and wake the other; what goes wrong is told to the task for which it was done."""
        begun, at = self._clock(), time.time()
        fault: errors.VidgenError | None = None
        try:
            if self._awake is not None:
                await self._on_device(self._engines[self._awake].sleep)
                self._awake = None
            await self._on_device(self._engines[stage].wake)
        except errors.VidgenError as exc:
            fault = exc
        except Exception as exc:
            fault = errors.FatalError(
                f"the engines could not change places: {type(exc).__name__}: {exc}", code="setup_failed"
            )
            fault.__cause__ = exc
        self._failed = 0 if fault is None else self._failed + 1
        if isinstance(fault, errors.RetryableError) and self._failed >= SWITCH_TRIES:
            # Every task of the stage would be given up for it, one after another.
            last, fault = fault, errors.FatalError(f"{fault.message}, {self._failed} times in a row", code=fault.code)
            fault.__cause__ = last
        if fault is None:
            self._awake, self._since = stage, self._clock()
            self._switch_s = self._since - begun
            self._on_switch(stage, self._switch_s)
            log.info(f"{stage} has the device", _event="switched", awake=stage, seconds=round(self._switch_s, 3))
        elif any(waiter.stage == stage and not waiter.granted.done() for waiter in self._waiting):
            self._first(stage).granted.set_exception(fault)
        else:
            log.warning(fault.message, _event="switch_failed", stage=stage, code=fault.code)
        self._taken = False
        self._advance((at, time.time()) if fault is None else None)

    async def _on_device(self, work: Callable[[], None]) -> None:
        doing = asyncio.get_running_loop().run_in_executor(self._device_thread, in_thread(work))
        await asyncio.wait([doing], timeout=self._bears_s)
        if not doing.done():
            raise errors.SwitchHungError(f"the models did not change places within {self._bears_s:.0f} s")
        doing.result()

    def _first(self, stage: Stage) -> _Waiter:
        return next(waiter for waiter in self._waiting if waiter.stage == stage and not waiter.granted.done())


@dataclass(frozen=True)
class _View:
    shared: TakingTurns
    stage: Stage

    async def acquire(self) -> None:
        await self.shared.acquire(self.stage)

    def release(self) -> None:
        self.shared.release()
