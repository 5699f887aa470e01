"""One GPU for both stages: the plan, the turns and the workers of `vidgen worker`, over both models and a mixed queue.

Bus and store are those in memory: the seconds of a queue are the device's, and what is done beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import shutil
import statistics
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import models
import torch
from bench import (
    GIB,
    PROMPT,
    Bench,
    as_built,
    cap,
    engine_of,
    have_the_host_grow,
    in_fp8,
    left_gib,
    measured,
    peak,
    picture,
    rounded,
)

from vidgen import artifacts, contracts, device, gpu, profiles, topology, weights
from vidgen.accel import host, loader, residency
from vidgen.accel.engine import Layout
from vidgen.contracts import EditWork, Event, I2VWork, Stage, Task, Work
from vidgen.metrics import WorkerMetrics
from vidgen.settlement import Policy
from vidgen.testing import MemoryBus, MemoryStore
from vidgen.worker import Registration, Worker

STAGES: tuple[Stage, ...] = ("edit", "i2v")
MAKE: Mapping[Stage, Callable[..., Any]] = {"edit": models.qwen, "i2v": models.wan}
JOBS = 5
ACK_WAIT_S = 60.0
SIZES: tuple[int | None, ...] = (None, 80, 48, 24)  # GiB, each with no more room than the one before
# Bytes of the models' components as FP8 snapshots have them.
SNAPSHOTS: Mapping[Stage, Mapping[str, int]] = {
    "edit": {"transformer": 20 * GIB, "text_encoder": 31 * GIB // 2, "vae": GIB // 4},
    "i2v": {"transformer": 14 * GIB, "transformer_2": 14 * GIB, "text_encoder": 21 * GIB // 2, "vae": GIB // 4},
}

# Memory at full size (GiB; edit 54 in bf16 and 35 in FP8, i2v 64 and 39), on a host of 128:
#   all of an H200: both stay in bf16, 118 on the device; then the edit alone sleeps, 54 pinned.
#   80: turns in bf16. i2v is built, laid out and asleep (64 pinned) before the edit is built; both homes would be 118,
#       so `auto` puts the edit's on the disk, 54: where that has no room the section says so before it builds
#       anything, and `turns-80-fp8` has the turns that such a host can have.
#   48: turns in FP8. Built on the device in bf16 (the cap is lifted for that) and moved to the host, from where setup
#       quantises layer by layer through the device: 64 on the host at the most for i2v, then its home of 39 and the
#       edit's 54; in the end 74 pinned.
#   24: no turns, both stream from the host, side by side in pinned memory: 38 and the edit's 54 before it is quantised.
#       As FP8 snapshots: 73.


@dataclass(frozen=True)
class Span:
    """What an engine did on its device: `generate`, `sleep` or `wake`; GiB are those that it holds awake."""

    stage: Stage
    what: str
    seconds: float
    gib: float


def section(gib: int | None, wanted: str = "auto") -> Callable[[Bench, Path], None]:
    """A section: a GPU of which so much may be used, and the profile that is asked for."""

    def turns(bench: Bench, folder: Path) -> None:
        try:
            asyncio.run(_measured(bench, folder, gib, wanted))
        finally:
            cap(bench.device, None)

    return turns


def snapshots(*sizes: int | None) -> Callable[[Bench, Path], None]:
    """A section: GPUs of several sizes one after another, for FP8 snapshots of both models, laid out once."""

    def through(bench: Bench, folder: Path) -> None:
        try:
            asyncio.run(_through_sizes(bench, folder, sizes))
        finally:
            cap(bench.device, None)

    return through


async def _through_sizes(bench: Bench, folder: Path, sizes: Sequence[int | None]) -> None:
    spans: list[Span] = []
    pipes: dict[Stage, Any] = {}
    engines: dict[Stage, Any] = {}
    laid_out: tuple[profiles.Name, ...] = ()
    asleep = False
    if not bench.tiny:
        have_the_host_grow()
    with ThreadPoolExecutor(1, "device") as thread:
        for gib in sizes:
            name = f"FP8 snapshots, {gib or 'all'} GiB"
            cap(bench.device, gib)
            asked = {stage: _engine(bench, stage, gib, folder, spans, pipes) for stage in STAGES}
            plan = await _on(thread, functools.partial(device.share, asked, "auto"))
            bench.row("turns", f"{name}: plan", profiles=plan.profiles, takes_turns=plan.takes_turns)
            if plan.profiles != laid_out:
                cap(bench.device, None)
                if asleep:
                    await _on(thread, engines[STAGES[1]].wake)
                for stage, pipe in pipes.items():
                    as_built(pipe)
                    if plan.profiles[STAGES.index(stage)].startswith("offload"):
                        pipe.to("cpu")
                engines, laid_out, asleep = asked, plan.profiles, False
                gc.collect()
                loader.give_back(bench.device)  # the homes of those that slept
                for stage in reversed(STAGES):
                    cap(bench.device, gib)
                    free = left_gib()
                    phases = await _on(thread, engines[stage].setup)
                    told = engines[stage].info.profile
                    bench.row(
                        "turns", f"{name}: {stage} ready", profile=told, phases=rounded(phases), peak_gib=peak(),
                        host_taken_gib=free - left_gib(), host_left_gib=left_gib(),
                    )  # fmt: skip
                    if plan.profiles[STAGES.index(stage)].startswith("offload"):
                        await _on(thread, functools.partial(_alone, bench, stage, engines[stage], gib, folder))
            before = len(spans)
            if plan.takes_turns and not asleep:
                cap(bench.device, None)
                await _on(thread, engines[STAGES[1]].sleep)
                asleep = True
            cap(bench.device, gib)
            async with _Queue.of(bench, folder, engines, thread, takes_turns=plan.takes_turns) as queue:
                if gib in SIZES[:2]:  # compiles, and has each of them asleep once
                    await queue.through(["warm"])
                    await queue.turn_to(STAGES[0])
                peak()
                moved, begun = len(spans), time.perf_counter()
                await queue.through([f"job-{number}" for number in range(JOBS)])
                taken = time.perf_counter() - begun
                _tell_queue(bench, f"{name}: {JOBS} jobs", spans[moved:], taken)
                await queue.turn_to(STAGES[0])
            for stage in STAGES:
                mine = [span for span in spans[before:] if span.stage == stage]
                _tell_moves(bench, f"{name}: {stage}", mine, engines[stage])


async def _measured(bench: Bench, folder: Path, gib: int | None, wanted: str) -> None:
    name = "both" if gib is None else f"both on {gib} GiB"
    name += "" if wanted == "auto" else f", {wanted}"
    spans: list[Span] = []
    if not bench.tiny:
        have_the_host_grow()
    cap(bench.device, gib)
    engines = {stage: _engine(bench, stage, gib, folder, spans) for stage in STAGES}
    with ThreadPoolExecutor(1, "device") as thread:
        plan = await _on(thread, lambda: device.share(engines, wanted))
        _refuse_without_room(engines, plan, folder)
        bench.row(
            "turns", f"{name}: plan", profiles=plan.profiles, takes_turns=plan.takes_turns,
            host_gib=(host.host_memory() or 0) / GIB, disk_gib=shutil.disk_usage(folder).free / GIB,
        )  # fmt: skip
        for stage in reversed(STAGES):  # as the service does: so the first one ends awake
            phases = await _on(thread, engines[stage].setup)
            told = engines[stage].info.profile
            bench.row("turns", f"{name}: {stage} ready", profile=told, phases=rounded(phases), peak_gib=peak())
            if plan.takes_turns and stage != STAGES[0]:
                await _on(thread, engines[stage].sleep)
        async with _Queue.of(bench, folder, engines, thread, takes_turns=plan.takes_turns) as queue:
            await queue.through(["warm"])  # compiles, and has each of them asleep once
            await queue.turn_to(STAGES[0])
            peak()
            before, begun = len(spans), time.perf_counter()
            await queue.through([f"job-{number}" for number in range(JOBS)])
            taken = time.perf_counter() - begun
        _tell_queue(bench, f"{name}: {JOBS} jobs", spans[before:], taken)
        first = engines[STAGES[0]]
        if not plan.takes_turns and plan.profiles[0].startswith("resident"):
            for move in (first.sleep, first.wake, first.sleep, first.wake):
                await _on(thread, move)
    for stage in STAGES:
        _tell_moves(bench, f"{name}: {stage}", [span for span in spans if span.stage == stage], engines[stage])


# ── the engines ──────────────────────────────────────────────────────────────────────────────────────────────────


def _engine(
    bench: Bench, stage: Stage, gib: int | None, folder: Path, spans: list[Span], pipes: dict[Stage, Any] | None = None
) -> Any:
    """The service's engine, with random weights that are not made before its setup; it writes down what it does.

    With `pipes` they are those of an FP8 snapshot, and are there for the next engine of the stage.
    """
    shape = MAKE[stage](torch.device("meta"), bench.dtype, tiny=bench.tiny)
    base: Any = type(engine_of(stage, shape, Layout()))

    class Watched(base):
        def demand(self) -> profiles.Demand | None:
            if not bench.tiny:
                return base.demand(self)  # type: ignore[no-any-return]
            self._device = self._open_device()
            if pipes is not None:
                return profiles.Demand(stage, (gib or 140) * GIB, SNAPSHOTS[stage], base.WORK, stored_fp8=True)
            return profiles.Demand(stage, GIB + profiles.RESERVE, {"vae": GIB}, 0)  # there is room for one of two

        def _find(self) -> weights.Weights:
            return base._find(self) if pipes is None else replace(base._find(self), profile="fp8")

        def _sizes(self, found: weights.Weights) -> Mapping[str, int]:
            return base._sizes(self, found) if pipes is None else SNAPSHOTS[stage]

        def _load(self, found: Any, place: torch.device, dtypes: Any) -> Any:
            cap(bench.device, None)
            pipe = None if pipes is None else pipes.get(stage)
            if pipe is None:
                pipe = MAKE[stage](bench.device, bench.dtype, tiny=bench.tiny)
                if pipes is not None:
                    in_fp8(pipe, bench.device)
                    pipes[stage] = pipe
            pipe = pipe.to(place)
            gc.collect()
            cap(bench.device, gib)
            peak()  # of the random weights: a service reads its own
            return pipe

        def generate(self, inputs: Any, on_step: Any) -> Any:
            return self._watched("generate", lambda: base.generate(self, inputs, on_step))

        def sleep(self) -> None:
            self._watched("sleep", lambda: base.sleep(self))

        def wake(self) -> None:
            self._watched("wake", lambda: base.wake(self))

        def _watched(self, what: str, work: Callable[[], Any]) -> Any:
            held, begun = _held(self._pipe, bench.device), time.perf_counter()
            made = work()
            taken = time.perf_counter() - begun
            spans.append(Span(stage, what, taken, max(held, _held(self._pipe, bench.device)) / GIB))
            return made

    # Tiny, the disk is rehearsed too.
    sleep_in = "disk" if bench.tiny and stage == STAGES[0] else "auto"
    areas = {"reference_area": 64 * 64, "condition_area": 56 * 56} if bench.tiny and stage == "edit" else {}
    return Watched("random", layout=Layout(device=str(bench.device), sleep_in=sleep_in, work_dir=folder), **areas)


def _held(pipe: Any, place: torch.device) -> int:
    """The bytes of a pipeline's weights on the device, of each storage once."""
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers()) if tensor.device == place]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def _alone(bench: Bench, stage: Stage, engine: Any, gib: int | None, folder: Path) -> None:
    """A row of `run.py`'s cards: the other model is not in the way of one that streams."""
    source = folder / f"{stage}-alone.png"
    picture(*((64, 64) if bench.tiny else (1024, 1024) if stage == "edit" else (832, 480))).save(source)
    work = _work(stage, 0, tiny=bench.tiny)
    if stage == "edit" and not bench.tiny:
        work = work.model_copy(update={"width": 1024, "height": 1024})
    measured(bench, "cards", f"{stage} on {gib} GiB: 4 steps, CFG off", engine, work, source, brief=True)


def _refuse_without_room(engines: Mapping[Stage, Any], plan: profiles.Plan, folder: Path) -> None:
    """Raise before anything is built where the homes of those that are to sleep will not find room."""
    free, disk = host.host_memory(), shutil.disk_usage(folder).free
    if not plan.takes_turns or free is None:
        return
    wanted = dict(zip(engines, plan.profiles, strict=True))
    for stage in reversed(STAGES):
        size = engines[stage].demand().held()[wanted[stage]]
        if residency.home_for("auto", size, free) == "memory":
            free -= size
        elif size > disk:
            raise RuntimeError(
                f"{stage} takes {size / GIB:.0f} GiB asleep, the host has {free / GIB:.0f} and the disk "
                f"{disk / GIB:.0f}: use a larger host, or the section of the same GPU in FP8"
            )
        else:
            disk -= size


async def _on(thread: ThreadPoolExecutor, work: Callable[[], Any]) -> Any:
    return await asyncio.get_running_loop().run_in_executor(thread, work)


# ── the queue ────────────────────────────────────────────────────────────────────────────────────────────────────


class _Queue:
    """The workers of both stages, and what the gateway does for them: an edit's frame starts the clip."""

    def __init__(self, bench: Bench, devices: Mapping[Stage, device.Device], picture_file: Path) -> None:
        self._bench, self._devices, self._picture = bench, devices, picture_file.read_bytes()
        self._bus, self._store = MemoryBus(topology.Topology(ack_wait=ACK_WAIT_S)), MemoryStore()
        self._running: list[asyncio.Task[None]] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def of(
        cls, bench: Bench, folder: Path, engines: Mapping[Stage, Any], thread: ThreadPoolExecutor, *, takes_turns: bool
    ) -> AsyncIterator[_Queue]:
        devices = device.views(engines, STAGES[0], thread, lambda stage, seconds: None, takes_turns=takes_turns)
        source = folder / "source.png"
        picture(*((64, 64) if bench.tiny else (1344, 768))).save(source)
        queue = cls(bench, devices, source)
        workers = [queue._worker(stage, engines[stage], thread) for stage in STAGES]
        queue._running = [asyncio.create_task(worker.run()) for worker in workers]
        try:
            yield queue
        finally:
            for worker in workers:
                worker.drain()
            await asyncio.gather(*queue._running)

    def _worker(self, stage: Stage, engine: Any, thread: ThreadPoolExecutor) -> Worker:
        policy = Policy(
            worker_id="bench", stage=stage, ack_wait=ACK_WAIT_S, max_attempts=1, gpu_usd_per_hour=0.0
        )  # fmt: skip
        return Worker(
            self._bus, self._store, engine, thread, gpu.monitor("cpu"), WorkerMetrics(stage), policy, Registration(),
            self._devices[stage],
        )  # fmt: skip

    async def through(self, jobs: Sequence[str]) -> None:
        """Queue jobs at once and wait until all have their clip; raises where one has not."""
        feed = await self._bus.follow(topology.EVENTS, "vidgen.events.*")
        for number, job in enumerate(jobs):
            self._store.add(f"uploads/{job}.png", self._picture, "image/png")
            await self._publish("edit", job, f"uploads/{job}.png", number)
        left = {job: number for number, job in enumerate(jobs)}
        while left:
            stored = await feed.next(1.0)
            for died in (one for one in self._running if one.done()):
                died.result()
            event = Event.validate_json(stored.body) if stored is not None else None
            if isinstance(event, contracts.StageFailed):
                raise RuntimeError(f"{event.stage} of {event.job_id} failed: {event.error}")
            if not isinstance(event, contracts.StageCompleted) or event.job_id not in left:
                continue
            if event.stage == "edit":
                frame = artifacts.artifact_key(event.job_id, "edit-0.png")
                await self._publish("i2v", event.job_id, frame, left[event.job_id])
            else:
                del left[event.job_id]

    async def turn_to(self, stage: Stage) -> None:
        """Have a stage's engine awake."""
        await self._devices[stage].acquire()
        self._devices[stage].release()

    async def _publish(self, stage: Stage, job: str, key: str, seed: int) -> None:
        task = Task(
            job_id=job, stage=stage, lane="interactive", inputs=(key,), queued_at=datetime.now(UTC),
            work=_work(stage, seed, tiny=self._bench.tiny),
        )  # fmt: skip
        subject = topology.subject_of_task(stage, task.lane, job)
        await self._bus.publish(subject, task.to_bytes(), message_id=f"{job}:{stage}")


def _work(stage: Stage, seed: int, *, tiny: bool) -> Work:
    """Four steps without guidance: an edit of a megapixel in the shape of the video, and 81 frames of 832 × 480."""
    steps = 2 if tiny else 4
    if stage == "edit":
        width, height = (64, 64) if tiny else (1344, 768)
        return EditWork(
            prompt=PROMPT, user_prompt=PROMPT, negative_prompt=" ", steps=steps, true_cfg_scale=1.0,
            guidance_scale=1.0, seed=seed, width=width, height=height, candidates=1,
        )  # fmt: skip
    width, height = (64, 64) if tiny else (832, 480)
    return I2VWork(
        prompt=PROMPT, negative_prompt="", steps=steps, guidance_scale=1.0, seed=seed,
        num_frames=5 if tiny else 81, fps=16, width=width, height=height,
    )  # fmt: skip


# ── the rows ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _tell_queue(bench: Bench, name: str, spans: Sequence[Span], taken: float) -> None:
    """The queue's seconds beside those of its tasks alone: for them two GPUs would be held."""
    tasks = [span for span in spans if span.what == "generate"]
    each = {stage: [span.seconds for span in tasks if span.stage == stage] for stage in STAGES}
    alone = sum(span.seconds for span in tasks)
    bench.row(
        "turns", name, seconds=taken, generate_s=alone, ratio=taken / alone, order=" ".join(s.stage for s in tasks),
        **{f"{stage}_s": statistics.median(seconds) for stage, seconds in each.items()},
        **{f"{stage}_all_s": [round(one, 2) for one in seconds] for stage, seconds in each.items()},
        switches=sum(span.what == "wake" for span in spans),
        moving_s=sum(span.seconds for span in spans if span.what != "generate"), peak_gib=peak(),
    )  # fmt: skip


def _tell_moves(bench: Bench, name: str, spans: Sequence[Span], engine: Any) -> None:
    """The first sleep, which copies, and the median of the later ones and of the wakings."""
    sleeps, wakes = ([span for span in spans if span.what == what] for what in ("sleep", "wake"))
    if not sleeps:
        return
    home = "disk" if isinstance(engine._residency._large, residency._OnDisk) else "memory"
    for told, some in (("first sleep", sleeps[:1]), ("later sleeps", sleeps[1:]), ("wakes", wakes)):
        if some:
            taken = statistics.median(span.seconds for span in some)
            bench.row(
                "turns", f"{name}: {told}", seconds=taken, gib=some[0].gib, gib_per_s=some[0].gib / taken,
                all_s=[round(span.seconds, 3) for span in some], home=home,
            )  # fmt: skip
