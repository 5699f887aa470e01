"""The real engines at full size, beside plain diffusers in the same process: seconds, phases, memory, error, ratio.

    python benchmarks/gpu/run.py [SECTION …] [--variants fp8] [--out results.jsonl] [--tiny]

Random weights of the true shape: speed and memory are theirs, quality is nobody's. Each section prints as it goes and
writes its rows to `--out`; a section that is there already is not run again.
"""

from __future__ import annotations

import abc
import argparse
import contextlib
import functools
import gc
import json
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from tests import checkpoints

from vidgen import native

native.load_ahead()  # as a service does, before anything imports torch
if "--tiny" in sys.argv:
    checkpoints.install_shim()  # before anything imports transformers
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # so little is computed that threads only wait for one another

import mixed
import models
import numpy as np
import snapshots
import structlog
import torch
import turns
from bench import (
    CEILINGS,
    GIB,
    PROMPT,
    Bench,
    Captured,
    Encoded,
    Final,
    Plain,
    as_built,
    cap,
    engine_of,
    error,
    have_the_host_grow,
    in_fp8,
    left_gib,
    measured,
    partner_engine,
    peak,
    phases,
    picture,
    profile_forward,
    rounded,
    seconds,
    sync,
    through,
)
from diffusers.hooks import HookRegistry

from vidgen import profiles, weights
from vidgen.accel import ahead, fp8, loader, stepcache
from vidgen.accel.engine import Layout
from vidgen.accel.guidance import Partner
from vidgen.contracts import EditWork, I2VWork
from vidgen.errors import Suspended

torch.set_grad_enabled(False)
CARDS = (80, 48, 24)  # GiB
STARTED = Path(__file__).with_name("started.py")


class Subject(abc.ABC):
    """A model that is measured: its pipeline, a picture for it, and how plain diffusers is called."""

    kind: str
    model: str
    pipe: Any

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.bench, self.folder = bench, folder
        kept = bench.kept.pop(self.model, None)
        bench.kept.clear()  # there is room for one model at a time
        begun = time.perf_counter()
        self.pipe = self.made() if kept is None else kept
        sync()
        if kept is None:
            bench.row(self.kind, "built", seconds=time.perf_counter() - begun, gib=peak())
        if bench.keep:
            bench.kept[self.model] = self.pipe
        self.source = folder / f"{self.kind}.png"
        self.picture = picture(*self.size)
        self.picture.save(self.source)

    @property
    @abc.abstractmethod
    def size(self) -> tuple[int, int]:
        """Width and height."""

    @abc.abstractmethod
    def made(self) -> Any:
        """The pipeline."""

    @abc.abstractmethod
    def call(self, steps: int, scale: float) -> None:
        """Plain diffusers, as its documentation has it."""

    @abc.abstractmethod
    def work(self, steps: int, scale: float) -> Any:
        """The same for the engine."""

    def engine(self, layout: Layout) -> Any:
        """Ours, set up."""
        engine = engine_of(self.kind, self.pipe, layout, **self.options())
        begun = time.perf_counter()
        engine.setup()
        self.ready_s = time.perf_counter() - begun
        for name, found in zip(("transformer", "transformer_2"), engine.verdicts, strict=False):
            self.bench.row(
                self.kind, f"trial of the {name}", narrow=len(found.narrow), layers=found.layers,
                forward_error=found.error, layer_error=max(found.layer_errors),
            )  # fmt: skip
        return engine

    def options(self) -> dict[str, Any]:
        return {}

    def plain(self, steps: int, scale: float, runs: int = 1) -> Plain:
        with Final(self.pipe) as final:
            taken = seconds(lambda: self.call(steps, scale), runs, warm=0)
        return Plain(taken, final.latents)

    def captured(self) -> Captured:
        """The inputs of one forward, and what plain diffusers makes of them."""
        captured = Captured(self.pipe)
        self.call(2, 1.0)
        captured.restore()
        return captured


class Edit(Subject):
    """Qwen-Image-Edit-2511, a megapixel with one reference."""

    kind = model = "edit"

    @property
    def size(self) -> tuple[int, int]:
        return (64, 64) if self.bench.tiny else (1024, 1024)

    @property
    def small(self) -> tuple[int, int]:
        return (96, 64) if self.bench.tiny else (832, 480)

    def made(self) -> Any:
        if self.bench.tiny:
            from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

            module.VAE_IMAGE_SIZE, module.CONDITION_IMAGE_SIZE = 64 * 64, 56 * 56
        return models.qwen(self.bench.device, self.bench.dtype, tiny=self.bench.tiny)

    def options(self) -> dict[str, Any]:
        return {"reference_area": 64 * 64, "condition_area": 56 * 56} if self.bench.tiny else {}

    def call(self, steps: int, scale: float) -> None:
        more = {"negative_prompt": " "} if scale > 1 else {}
        self.pipe(
            image=[self.picture], prompt=PROMPT, num_inference_steps=steps, true_cfg_scale=scale, width=self.size[0],
            height=self.size[1], generator=torch.Generator("cpu").manual_seed(1), **more,
        )  # fmt: skip

    def work(self, steps: int, scale: float, **changes: Any) -> EditWork:
        width, height = self.size
        fields: dict[str, Any] = {
            "prompt": PROMPT, "user_prompt": PROMPT, "negative_prompt": " ", "steps": steps, "true_cfg_scale": scale,
            "guidance_scale": 1.0, "seed": 1, "width": width, "height": height, "candidates": 1,
        }  # fmt: skip
        return EditWork(**fields | changes)

    def draft(self) -> EditWork:
        """The edit of a 480p video at draft quality, as the gateway plans it."""
        width, height = self.small
        return self.work(4, 1.0, width=width, height=height, reference_area=width * height)


class Video(Subject):
    """Wan2.2-I2V-A14B, 81 frames of 832 × 480."""

    kind = model = "i2v"

    @property
    def size(self) -> tuple[int, int]:
        return (96, 64) if self.bench.tiny else (832, 480)

    @property
    def frames(self) -> int:
        return 9 if self.bench.tiny else 81

    def made(self) -> Any:
        return models.wan(self.bench.device, self.bench.dtype, tiny=self.bench.tiny)

    def call(self, steps: int, scale: float) -> None:
        self.pipe(
            image=self.picture, prompt=PROMPT, negative_prompt="", num_inference_steps=steps, guidance_scale=scale,
            width=self.size[0], height=self.size[1], num_frames=self.frames,
            generator=torch.Generator("cpu").manual_seed(1),
        )  # fmt: skip

    def work(self, steps: int, scale: float) -> I2VWork:
        return I2VWork(
            prompt=PROMPT, negative_prompt="", steps=steps, guidance_scale=scale, seed=1, num_frames=self.frames,
            fps=16, width=self.size[0], height=self.size[1],
        )  # fmt: skip


class Small5B(Video):
    """Wan2.2-TI2V-5B, 121 frames of 1280 × 704, its VAE in float32 as the service has it."""

    model = "5b"

    @property
    def size(self) -> tuple[int, int]:
        return (128, 64) if self.bench.tiny else (1280, 704)

    @property
    def frames(self) -> int:
        return 9 if self.bench.tiny else 121

    def made(self) -> Any:
        pipe = models.wan(self.bench.device, self.bench.dtype, small=True, tiny=self.bench.tiny)
        pipe.vae.float()
        return pipe


class SmallVideo(Video):
    """33 frames of 416 × 240."""

    @property
    def size(self) -> tuple[int, int]:
        return (96, 64) if self.bench.tiny else (416, 240)

    @property
    def frames(self) -> int:
        return 9 if self.bench.tiny else 33


# ── sections ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def edit(bench: Bench, folder: Path) -> None:
    """Speed and error of each variant, at 4 and 8 steps, and the draft for a video."""
    subject = Edit(bench, folder)
    captured = subject.captured()
    given = captured.inputs[1]
    tokens, text = given["hidden_states"].shape[1], given["encoder_hidden_states"].shape[1]
    shape = models.qwen_shape(tokens, text)
    bench.row(
        "edit", "one forward", image_tokens=tokens, text_tokens=text,
        mask=given.get("encoder_hidden_states_mask") is not None, tflop=shape.flop / 1e12,
        floor_bf16_s=shape.flop / CEILINGS["bf16"],
    )  # fmt: skip
    vae = Encoded(subject.pipe, *subject.size, 1)
    bench.row("edit", "plain diffusers: VAE", **vae.seconds())
    peak()
    long, short = subject.plain(8, 4.0), subject.plain(4, 1.0, runs=2)
    bench.row("edit", "plain diffusers: 8 steps, CFG 4", plain_s=long.seconds, peak_gib=peak())
    bench.row("edit", "plain diffusers: 4 steps, CFG off", plain_s=short.seconds, forward_s=captured.forward_s(3))
    for label, layout in bench.layouts():
        engine = subject.engine(layout)
        bench.row("edit", f"{label}: ready", seconds=subject.ready_s, phases=rounded(engine.load_seconds))
        bench.row("edit", f"{label}: one forward", forward_s=captured.forward_s(3), error=captured.error())
        bench.row("edit", f"{label}: VAE", **vae.seconds(), **vae.errors())
        measured(bench, "edit", f"{label}: 4 steps, CFG off", engine, subject.work(4, 1.0), subject.source, short)
        if label.startswith("fp8"):
            measured(bench, "edit", f"{label}: 8 steps, CFG 4", engine, subject.work(8, 4.0), subject.source, long)
            measured(bench, "edit", f"{label}: draft for a 480p video", engine, subject.draft(), subject.source)
            profile_forward(bench, "edit", captured)


def candidates(bench: Bench, folder: Path) -> None:
    """Four candidates of one edit beside four edits."""
    subject = Edit(bench, folder)
    engine = subject.engine(Layout() if bench.tiny else Layout(profile="resident-fp8"))
    for count in (1, 4):
        work = subject.work(4, 1.0, candidates=count)
        measured(bench, "candidates", f"{count} of 4 steps, CFG off", engine, work, subject.source, brief=True)


def edit_behind_change(bench: Bench, folder: Path) -> None:
    """The first edits behind a change of models, and what recording their graphs anew takes of them."""
    subject = Edit(bench, folder)
    engine = subject.engine(Layout() if bench.tiny else Layout(profile="resident-fp8"))
    recorded: list[float] = []
    record = engine._graphs._record if engine._graphs is not None else None

    def timed(forward: Any) -> None:
        begun = time.perf_counter()
        record(forward)
        recorded.append(time.perf_counter() - begun)

    if record is not None:
        engine._graphs._record = timed
    for name in ("awake all along", "behind the first change", "behind the second"):
        if name != "awake all along":
            engine.sleep()
            engine.wake()
        for which in ("first", "second", "third"):
            recorded.clear()
            taken = through(engine, subject.work(4, 1.0), subject.source, folder)["generate"]
            bench.row(
                "change", f"{name}: {which} edit", generate_s=taken, recorded=len(recorded), recording_s=sum(recorded)
            )


def i2v(bench: Bench, folder: Path) -> None:
    """Speed and error of each variant at 4 steps."""
    subject = Video(bench, folder)
    shape = models.wan_shape(subject.frames, *reversed(subject.size))
    bench.row(
        "i2v", "one forward", tokens=shape.tokens, tflop=shape.flop / 1e12, floor_bf16_s=shape.flop / CEILINGS["bf16"]
    )
    captured = subject.captured()
    vae = Encoded(subject.pipe, *subject.size, subject.frames)
    bench.row("i2v", "plain diffusers: VAE", **vae.seconds())
    short = subject.plain(4, 1.0)
    bench.row(
        "i2v", "plain diffusers: 4 steps, CFG off", plain_s=short.seconds, peak_gib=peak(),
        forward_s=captured.forward_s(1),
    )  # fmt: skip
    for label, layout in bench.layouts():
        engine = subject.engine(layout)
        bench.row("i2v", f"{label}: ready", seconds=subject.ready_s, phases=rounded(engine.load_seconds))
        bench.row("i2v", f"{label}: one forward", forward_s=captured.forward_s(2), error=captured.error())
        bench.row("i2v", f"{label}: VAE", **vae.seconds(), **vae.errors())
        measured(bench, "i2v", f"{label}: 4 steps, CFG off", engine, subject.work(4, 1.0), subject.source, short)
        profile_forward(bench, "i2v", captured)


def i2v_40_plain(bench: Bench, folder: Path) -> None:
    """40 steps with guidance in plain diffusers: minutes, so a section of its own; of fewer they are worked out."""
    subject = Video(bench, folder)
    subject.call(1, 1.0)
    taken = subject.plain(bench.long, 3.5).seconds
    found = {"plain_s": taken}
    if bench.long < 40:
        short = subject.plain(2, 3.5).seconds
        step = (taken - short) / (bench.long - 2)
        found |= {"steps": bench.long, "two_steps_s": short, "step_s": step, "forty_s": short + 38 * step}
    bench.row("i2v-40", "plain diffusers: 40 steps, CFG 3.5", **found)


def i2v_40(bench: Bench, folder: Path) -> None:
    """40 steps with guidance in ours: one in 3 of the middle, and every one (worked out where `--long` is less)."""
    subject = Video(bench, folder)
    layout = Layout() if bench.tiny else Layout(profile="resident-fp8")
    engine = subject.engine(replace(layout, step_cache=3))
    through(engine, subject.work(2, 3.5), subject.source, folder)  # compiles
    peak()
    cached = through(engine, subject.work(40, 3.5), subject.source, folder)["generate"]
    bench.row(
        "i2v-40", "40 steps, CFG 3.5, one step in 3", generate_s=cached, computed=sum(stepcache.computed(40, 3)),
        peak_gib=peak(),
    )  # fmt: skip
    for model in engine.transformers():
        HookRegistry.check_if_exists_or_initialize(model).remove_hook(stepcache.HOOK, recurse=False)
    exact = worked_out(bench, subject, subject.engine(layout), compiled=True)
    bench.row(
        "i2v-40", "40 steps, CFG 3.5, every step", **exact, ratio_of_cached=exact["forty_s"] / cached, peak_gib=peak()
    )


def worked_out(bench: Bench, subject: Video, engine: Any, *, compiled: bool = False) -> dict[str, float]:
    """What 40 steps take, of a run of `--long` steps and one of 2; of all 40 nothing has to be worked out."""
    if not compiled:
        through(engine, subject.work(2, 3.5), subject.source, subject.folder)
    if bench.long >= 40:
        taken = through(engine, subject.work(40, 3.5), subject.source, subject.folder)["generate"]
        return {"steps": 40, "generate_s": taken, "forty_s": taken}
    short = through(engine, subject.work(2, 3.5), subject.source, subject.folder)["generate"]
    taken = through(engine, subject.work(bench.long, 3.5), subject.source, subject.folder)["generate"]
    step = (taken - short) / (bench.long - 2)
    return {
        "steps": bench.long,
        "generate_s": taken,
        "two_steps_s": short,
        "step_s": step,
        "forty_s": short + 38 * step,
    }


def step_cache(bench: Bench, folder: Path) -> None:
    """The step cache in a small clip of 40 steps: its speed, and its error against every step computed."""
    subject = SmallVideo(bench, folder)
    layout = Layout() if bench.tiny else Layout(profile="resident-fp8")
    exact = None
    for every in (1, 2, 3, 4):
        engine = subject.engine(replace(layout, step_cache=every))
        through(engine, subject.work(2, 3.5), subject.source, folder)  # compiles
        with Final(subject.pipe) as final:
            taken = through(engine, subject.work(40, 3.5), subject.source, folder)["generate"]
        exact = exact or Plain(taken, final.latents)
        bench.row(
            "step-cache", f"416x240x33, 40 steps, CFG 3.5, one step in {every}", generate_s=taken,
            ratio=exact.seconds / taken, latents_error=error(final.latents, exact.latents),
            computed=sum(stepcache.computed(40, every)),
        )  # fmt: skip


def i2v_two(bench: Bench, folder: Path) -> None:
    """40 steps with guidance on one GPU and on two; of a shorter run the rest of the 40 are worked out."""
    subject = Video(bench, folder)
    one = Layout(device=str(bench.device)) if bench.tiny else Layout(profile="resident-fp8", device=str(bench.device))
    other = replace(one, device="cpu" if bench.tiny else "cuda:1")
    alone = None
    for devices in (1, 2):
        engine = engine_of("i2v", subject.pipe, one)
        if devices == 2:
            # It finds this folder's modules by what this process has on its path.
            shim = [str(checkpoints.SHIM)] if bench.tiny else []
            os.environ["PYTHONPATH"] = os.pathsep.join([*shim, *sys.path])
            engine._partner = Partner(functools.partial(partner_engine, bench.tiny, other), other.device)
        engine.setup()
        with Final(subject.pipe) as final:
            found = worked_out(bench, subject, engine)
        alone = alone or Plain(found["forty_s"], final.latents)
        bench.row(
            "i2v-2", f"40 steps, CFG 3.5, {devices} GPU", **found, ratio=alone.seconds / found["forty_s"],
            latents_error=error(final.latents, alone.latents),
        )  # fmt: skip
    engine._partner.close()


def ti2v_5b(bench: Bench, folder: Path) -> None:
    """The small video model at its own size, 4 steps: in bf16, as `auto` has it where there is room, and in FP8.

    And in FP8 with a VAE in bf16, as `VIDGEN_DTYPE=bfloat16` has it, which its makers keep in float32.
    """
    subject = Small5B(bench, folder)
    captured = subject.captured()
    vae = Encoded(subject.pipe, *subject.size, 9 if bench.tiny else 17)
    peak()
    with phases(subject.pipe) as spent:
        short = subject.plain(4, 1.0)
    bench.row(
        "5b", "plain diffusers: 4 steps, CFG off", plain_s=short.seconds, peak_gib=peak(),
        forward_s=spent["transformer"] / spent["transformer calls"], text_s=spent["text"],
        vae_encode_s=spent["vae encode"], vae_decode_s=spent["vae decode"],
    )  # fmt: skip
    for label, profile in (("bf16", "resident-bf16"), ("fp8", "resident-fp8"), ("fp8, VAE in bf16", "resident-fp8")):
        if not re.search(bench.variants, label):
            continue
        if label.endswith("VAE in bf16"):
            subject.pipe.vae.to(torch.bfloat16)
        engine = subject.engine(Layout() if bench.tiny else Layout(profile=profile))
        bench.row("5b", f"{label}: ready", seconds=subject.ready_s, phases=rounded(engine.load_seconds))
        bench.row("5b", f"{label}: one forward", forward_s=captured.forward_s(2), error=captured.error())
        bench.row("5b", f"{label}: VAE, 17 frames", **vae.errors())
        work = subject.work(4, 1.0)
        measured(bench, "5b", f"{label}: 4 steps, CFG off", engine, work, subject.source, short, brief=True)


def resumed(bench: Bench, folder: Path, *, kind: type[Subject]) -> None:
    """A run that is left in the middle and gone on with, beside one that is not: the pixels are to be the same."""
    subject = kind(bench, folder)
    engine = subject.engine(Layout() if bench.tiny else Layout(profile="resident-fp8"))
    inputs = engine.prepare(subject.work(6, 3.0), [subject.source])
    whole = engine.generate(inputs, lambda step, steps: None)
    left = Suspended(3, 6)

    def leave(step: int, steps: int) -> None:
        if step == left.step:
            raise left

    with contextlib.suppress(Suspended):
        engine.generate(inputs, leave)
    again = engine.resume(inputs, lambda step, steps: None, left.state)
    pixels = [getattr(made.output, "pixels", getattr(made.output, "frames", None)) for made in (whole, again)]
    bench.row(
        "resume", f"{subject.kind}: 6 steps, left behind the third", same=bool(np.array_equal(*pixels)),
        state_mib=len(left.state or b"") / 2**20, whole_s=whole.denoise_s, rest_s=again.denoise_s,
    )  # fmt: skip


def card(kind: type[Subject], gib: int) -> Callable[[Bench, Path], None]:
    """A section: one model on a GPU of which so much may be used; the profile that is chosen, its speed, its peak."""

    def section(bench: Bench, folder: Path) -> None:
        subject = kind(bench, folder)
        with on_card(bench, subject, gib) as engine:
            name = f"{subject.kind} on {gib} GiB"
            work = subject.work(4, 1.0)
            measured(bench, "cards", f"{name}: 4 steps, CFG off", engine, work, subject.source, brief=True)
            if isinstance(subject, Edit):
                for label, other in (("draft", subject.draft()), ("8 steps, CFG 4", subject.work(8, 4.0))):
                    measured(bench, "cards", f"{name}: {label}", engine, other, subject.source, brief=True)
            for stream in engine._streamed():
                stream.hold(room=0)
            if engine._room:
                measured(bench, "cards", f"{name}: 4 steps, no block stays", engine, work, subject.source, brief=True)

    return section


def mix(kind: type[Subject], gib: int) -> Callable[[Bench, Path], None]:
    """A section: whatever comes, for `--minutes`, on a GPU of which so much may be used."""

    def section(bench: Bench, folder: Path) -> None:
        subject = kind(bench, folder)
        with on_card(bench, subject, gib) as engine:
            mixed.traffic(bench, subject.kind, engine, subject.work(4, 1.0), folder)

    return section


@contextlib.contextmanager
def on_card(bench: Bench, subject: Subject, gib: int) -> Iterator[Any]:
    """Ours on a GPU of which so much may be used, in the profile that is chosen there.

    What is laid out in FP8 there is in FP8 before, as an FP8 snapshot is; what streams, on the host.
    """
    engine = engine_of(subject.kind, subject.pipe, Layout())
    profile = profiles.NAMES[CARDS.index(gib)] if bench.tiny else engine.profile_on(gib * GIB)
    if profile.endswith("fp8"):
        in_fp8(subject.pipe, bench.device)
    if profile.startswith("offload") and not bench.tiny:
        have_the_host_grow()
    free = left_gib()
    if profile.startswith("offload"):
        as_built(subject.pipe)
        subject.pipe.to("cpu")
    gc.collect()
    cap(bench.device, gib)
    try:
        engine = subject.engine(Layout())
        bench.row(
            "cards", f"{subject.kind} on {gib} GiB: ready", seconds=subject.ready_s,
            phases=rounded(engine.load_seconds), host_taken_gib=free - left_gib(), host_left_gib=left_gib(),
        )  # fmt: skip
        yield engine
    finally:
        cap(bench.device, None)


def start(bench: Bench, folder: Path, *, stage: str = "edit", in_fp8: bool = False) -> None:
    """From process start to an engine that is warm, from a model on this disk: as it lies in the page cache, and cold.

    Before that the files are read to the device, with nothing beside it. The second start finds what the first one
    compiled and kept. Dropping the page cache of a file needs no rights. The raw rate is that of reading the same files
    into memory, just before and in the same state.
    """
    section = ("start" if stage == "edit" else f"start-{stage}") + ("-fp8" if in_fp8 else "")
    model = folder / "model"
    shape = (models.qwen if stage == "edit" else models.wan)(torch.device("meta"), torch.bfloat16, tiny=bench.tiny)
    begun = time.perf_counter()
    size = snapshots.write(shape, model, in_fp8=in_fp8, least=16 if bench.tiny else fp8.LEAST_FEATURES)
    bench.row(section, "written", seconds=time.perf_counter() - begun, gib=size / GIB)
    for _ in range(2):  # the first has the memory to get
        begun = time.perf_counter()
        loader.read(weights.in_reading_order(model), bench.device)
        taken = time.perf_counter() - begun
        bench.row(section, "read, nothing beside it, page cache", seconds=taken, read_gib_per_s=size / GIB / taken)
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    begun = time.perf_counter()
    for name in ("first start, page cache", "second start, page cache", "third start, page cache", "cold disk"):
        cold = "cold" in name
        if cold:
            drop(model)
        raw = raw_rate(model)
        if cold:
            drop(model)
        begun = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, str(STARTED), stage, str(model), "--leave", *(["--tiny"] if bench.tiny else [])],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={"VIDGEN_COMPILE_CACHE": str(folder / "compiled")} | os.environ,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            assert process.stderr is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith('{"core"'):
                    break
            taken = time.perf_counter() - begun
            said = process.stderr.read()
        if process.returncode:
            raise RuntimeError("".join([*lines, said])[-2000:])
        found, processor, told = (json.loads(line) for line in lines[-3:])
        rates = {"read_gib_per_s": size / GIB / told["read"]}
        bench.row(
            section, name, process_s=taken, **rates, raw_gib_per_s=raw, compiled=found["compiled"],
            phases=rounded(told), **processor,
        )  # fmt: skip


def raw_rate(model: Path) -> float:
    """GiB/s of plain reads of a model's weights into memory, by as many threads as the loader has."""
    files = sorted(model.rglob("*.safetensors"))
    chunks = [(file, begin) for file in files for begin in range(0, file.stat().st_size, loader.CHUNK)]

    def work(own: list[tuple[Path, int]]) -> int:
        buffer, done = bytearray(loader.CHUNK), 0
        for file, begin in own:
            with file.open("rb", buffering=0) as opened:
                done += os.preadv(opened.fileno(), [buffer], begin)
        return done

    begun = time.perf_counter()
    with ThreadPoolExecutor(loader.THREADS) as pool:
        read = sum(pool.map(work, [chunks[number :: loader.THREADS] for number in range(loader.THREADS)]))
    return read / GIB / (time.perf_counter() - begun)


def drop(model: Path) -> None:
    """Have the files' pages out of memory."""
    for file in model.rglob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


SECTIONS: dict[str, Callable[[Bench, Path], None]] = {
    "edit": edit, "edit-behind-change": edit_behind_change, "i2v": i2v,
    "candidates": candidates, "i2v-40": i2v_40, "i2v-40-plain": i2v_40_plain,
    "step-cache": step_cache, "ti2v-5b": ti2v_5b, "start": start,
    **{f"resume-{kind.kind}": functools.partial(resumed, kind=kind) for kind in (Edit, SmallVideo)},
    "start-fp8": functools.partial(start, in_fp8=True), "start-i2v": functools.partial(start, stage="i2v"),
    "start-i2v-fp8": functools.partial(start, stage="i2v", in_fp8=True), "i2v-2": i2v_two,
    **{f"{kind.kind}-{gib}": card(kind, gib) for gib in CARDS for kind in (Edit, Video)},
    **{f"mixed-{kind.kind}-{gib}": mix(kind, gib) for gib in CARDS for kind in (Edit, Video)},
    "turns": turns.section(None), **{f"turns-{gib}": turns.section(gib) for gib in CARDS},
    "turns-80-fp8": turns.section(80, "resident-fp8"),
    "turns-fp8": turns.snapshots(*turns.SIZES), "turns-fp8-24": turns.snapshots(24),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; by default all")
    parser.add_argument("--out", type=Path, default=Path("gpu-results.jsonl"))
    parser.add_argument("--variants", default="", help="only those in whose name this regular expression is found")
    parser.add_argument("--minutes", type=float, default=3.0, help="of a `mixed` section")
    parser.add_argument("--long", type=int, default=40, help="steps of which the 40 of a long run are worked out")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="sections of one model that follow one another share it as "
        "it is then: plain diffusers must come first, then bf16, FP8, and what is offloaded",
    )
    parser.add_argument("--tiny", action="store_true", help="rehearse with tiny models, on the CPU")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    device = torch.device("cpu" if options.tiny else "cuda:0")
    if device.type == "cuda":
        ahead.open_device(device)  # as engines do
    bench = Bench(
        options.out,
        options.tiny,
        options.variants,
        device,
        torch.float32 if options.tiny else torch.bfloat16,
        options.long,
        minutes=options.minutes,
        keep=options.keep,
    )
    done = (
        {json.loads(line)["name"] for line in options.out.read_text().splitlines()} if options.out.exists() else set()
    )
    import diffusers

    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{gpu}, {platform.platform()}, torch {torch.__version__}, diffusers {diffusers.__version__}", flush=True)
    for name in options.sections or SECTIONS:
        if f"{name} done" in done:
            print(f"{name}: in {options.out} already", flush=True)
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                SECTIONS[name](bench, Path(folder))
            bench.row(name, f"{name} done", device=gpu, torch=torch.__version__, diffusers=diffusers.__version__)
        except Exception as exc:  # one section must not cost the others
            traceback.print_exc()
            bench.row(name, f"{name} FAILED", error=f"{type(exc).__name__}: {exc}")
        gc.collect()
        loader.give_back(device)
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
