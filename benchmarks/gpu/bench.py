"""What every section of the GPU benchmark measures with: rows, clocks, errors, and our engines over random weights."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch
from PIL import Image

from vidgen import diffusion, profiles, weights
from vidgen.accel import blocks, fp8, graphs, host
from vidgen.accel.engine import Layout

PROMPT = "turn the car bright red, golden hour light"
CEILINGS = {"bf16": 799e12, "fp8": 1519e12}  # FLOP/s of a large product on one H200, docs/performance.md
BEGUN = time.perf_counter()
GIB = 1 << 30
HOST = 100 * GIB


@dataclass
class Bench:
    """Where the rows go, and what machine this is."""

    out: Path
    tiny: bool
    variants: str
    device: torch.device
    dtype: torch.dtype
    long: int = 40  # steps of a long run
    minutes: float = 3.0  # of whatever comes
    rows: list[dict[str, Any]] = field(default_factory=list)
    keep: bool = False  # a model for the next section
    kept: dict[str, Any] = field(default_factory=dict)  # the pipelines, by their models

    def layouts(self) -> list[tuple[str, Layout]]:
        """The variants to measure, in an order in which one pipeline can take them all."""
        found = [
            ("bf16, compiled", Layout(profile="resident-bf16", attention="torch")),
            ("fp8, compiled", Layout(profile="resident-fp8", attention="torch")),
        ]
        if importlib.util.find_spec("flash_attn_interface") is not None:
            flash = Layout(profile="resident-fp8", attention="flash3")
            narrow = replace(flash, attention="flash3-8bit")
            found += [
                ("fp8, FlashAttention 3, no graphs", replace(flash, cuda_graphs="off")),
                ("fp8, FlashAttention 3", flash),  # a video's blocks are compiled, an edit's are not
                ("fp8, FlashAttention 3, blocks compiled", replace(flash, compile="blocks")),
                ("fp8, FlashAttention 3, 8 bits by trial", replace(flash, attention="auto")),
                ("fp8, FlashAttention 3, 8 bits", narrow),
                ("fp8, FlashAttention 3, 8 bits, VAE compiled", replace(narrow, compile="full")),
            ]
        return [
            (label, Layout() if self.tiny else layout) for label, layout in found if re.search(self.variants, label)
        ]

    def row(self, section: str, name: str, **figures: Any) -> None:
        shown = "  ".join(f"{key} {_shown(value)}" for key, value in figures.items())
        print(f"[{time.perf_counter() - BEGUN:6.1f}] {section:6} {name:44} {shown}", flush=True)
        self.rows.append({"section": section, "name": name} | figures)
        with self.out.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cap(device: torch.device, gib: int | None) -> None:
    """Let this process have so much of the GPU's memory from now on; None: all of it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else min(1.0, gib * GIB / total), device)


def have_the_host_grow() -> None:
    """Use the host's memory once: virtual machines that are given it as they use it tell of too little before."""
    filled: list[torch.Tensor] = []
    while len(filled) < HOST // GIB and (host.host_memory() or 0) > 6 * GIB:
        filled.append(torch.ones(GIB, dtype=torch.uint8))


def left_gib() -> float:
    """GiB of the host's memory that may still be taken: what the driver pins no process says that it holds."""
    return (host.host_memory() or 0) / GIB


def peak() -> float:
    """GiB since the last call."""
    if not torch.cuda.is_available():
        return 0.0
    found = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return round(found, 2)


def retries() -> int:
    """How often the allocator had to give memory back, and wait for the device, before it found any."""
    return int(torch.cuda.memory_stats().get("num_alloc_retries", 0)) if torch.cuda.is_available() else 0


def seconds(work: Callable[[], Any], runs: int, warm: int = 1) -> float:
    """The median of `runs` calls after `warm` ones."""
    for _ in range(warm):
        work()
    found = []
    for _ in range(runs):
        sync()
        begun = time.perf_counter()
        work()
        sync()
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


@contextlib.contextmanager
def phases(pipe: Any) -> Iterator[dict[str, float]]:
    """Seconds in each component while the block runs, the device waited for at each border: slower by a little."""
    spent: dict[str, float] = {}
    restore: list[Callable[[], None]] = []

    def watch(owner: Any, method: str, name: str) -> None:
        original = getattr(owner, method)

        def timed(*args: Any, **options: Any) -> Any:
            sync()
            begun = time.perf_counter()
            made = original(*args, **options)
            sync()
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - begun
            spent[f"{name} calls"] = spent.get(f"{name} calls", 0) + 1
            return made

        setattr(owner, method, timed)
        restore.append(lambda: setattr(owner, method, original))

    watch(pipe.text_encoder, "forward", "text")
    watch(pipe.vae, "encode", "vae encode")
    watch(pipe.vae, "decode", "vae decode")
    for transformer in transformers_of(pipe):
        watch(transformer, "forward", "transformer")
    try:
        yield spent
    finally:
        for undo in restore:
            undo()


class Captured:
    """The first inputs of a transformer, and what it made of them: to compare later layouts with."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.inputs, self.wanted = pipe, None, None
        original = pipe.transformer.forward

        def forward(*args: Any, **options: Any) -> Any:
            made = original(*args, **options)
            if self.inputs is None:
                self.inputs, self.wanted = (args, options), made[0].float().clone()
            return made

        pipe.transformer.forward = forward
        self.restore = lambda: setattr(pipe.transformer, "forward", original)

    def error(self) -> float:
        args, options = self.inputs
        return error(self.pipe.transformer(*args, **options)[0].float(), self.wanted)

    def forward_s(self, runs: int) -> float:
        args, options = self.inputs
        return seconds(lambda: self.pipe.transformer(*args, **options), runs)


class Encoded:
    """What stock diffusers' VAE makes of a picture that a clip begins with, and of latents: to compare ours with."""

    def __init__(self, pipe: Any, width: int, height: int, frames: int) -> None:
        self._vae = pipe.vae
        device, dtype = pipe.vae.device, pipe.vae.dtype
        draw = torch.Generator("cpu").manual_seed(3)
        self._picture = torch.zeros(1, 3, frames, height, width)
        self._picture[:, :, 0] = torch.rand(3, height, width, generator=draw) * 2 - 1
        across = pipe.vae_scale_factor if hasattr(pipe, "vae_scale_factor") else pipe.vae_scale_factor_spatial
        shape = (1, pipe.vae.config.z_dim, (frames - 1) // 4 + 1, height // across, width // across)
        self._latents = torch.randn(shape, generator=draw).to(device, dtype)
        self._picture = self._picture.to(device, dtype)
        self._wanted = self._made()

    def _made(self) -> tuple[torch.Tensor, torch.Tensor]:
        encoded = self._vae.encode(self._picture.to(self._vae.dtype)).latent_dist.mode()
        return encoded.float(), self._vae.decode(self._latents.to(self._vae.dtype), return_dict=False)[0].float()

    def errors(self) -> dict[str, float]:
        found = self._made()
        names = ("vae_encode_error", "vae_decode_error")
        return {name: error(*pair) for name, pair in zip(names, zip(found, self._wanted, strict=True), strict=True)}

    def seconds(self, runs: int = 2) -> dict[str, float]:
        return {
            "vae_encode_s": seconds(lambda: self._vae.encode(self._picture), runs),
            "vae_decode_s": seconds(lambda: self._vae.decode(self._latents), runs),
        }


class Final(contextlib.AbstractContextManager["Final"]):
    """The latents that a pipeline last handed to its VAE while the block ran: what all its steps came to."""

    def __init__(self, pipe: Any) -> None:
        self.latents = torch.empty(0)
        self._vae, self._decode = pipe.vae, pipe.vae.decode

    def __enter__(self) -> Final:
        def decode(z: torch.Tensor, *args: Any, **options: Any) -> Any:
            self.latents = z.float().clone()
            return self._decode(z, *args, **options)

        self._vae.decode = decode
        return self

    def __exit__(self, *exc: object) -> None:
        self._vae.decode = self._decode


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def engine_of(kind: str, pipe: Any, layout: Layout, **options: Any) -> Any:
    """The engine class that the service runs, with its weights made here instead of read from a disk."""
    from edit_service.engine.qwen import QwenEditEngine
    from i2v_service.engine.wan import WanI2VEngine

    base: Any = QwenEditEngine if kind == "edit" else WanI2VEngine

    class Made(base):
        def _find(self) -> weights.Weights:
            return weights.Weights(Path(), "random weights", None, 0)

        def _sizes(self, found: weights.Weights) -> dict[str, int]:
            parts = ("transformer", "transformer_2", "text_encoder", "vae")
            return {
                name: sum(p.numel() for p in getattr(pipe, name).parameters()) * 2
                for name in parts if getattr(pipe, name, None) is not None
            }  # fmt: skip

        def _load(self, found: weights.Weights, place: torch.device, dtypes: Any) -> Any:
            return pipe

        def profile_on(self, total: int) -> str:
            """What would be chosen for a GPU of so many bytes."""
            return profiles.choose("auto", total, self._sizes(self._find()), self.WORK)

    return Made("random", layout=layout, **options)


def in_fp8(pipe: Any, device: torch.device) -> None:
    """Have a pipeline's transformers as an FP8 snapshot has them, on the device."""
    for model in transformers_of(pipe):
        blocks.fuse_projections(model.to(device))
        fp8.quantise(model, arithmetic=fp8.has_arithmetic(device))
        gc.collect()
        diffusion.free(device)


def as_built(pipe: Any) -> None:
    """Take off what an engine that was resident had compiled and recorded."""
    for model in transformers_of(pipe):
        for module in model.modules():
            module._compiled_call_impl = None
        graphs.predict(None, model)
    graphs.encode(None, pipe.text_encoder)


def transformers_of(pipe: Any) -> list[Any]:
    return [model for model in (pipe.transformer, getattr(pipe, "transformer_2", None)) if model is not None]


def partner_engine(tiny: bool, layout: Layout) -> Any:
    """What a second process computes with on its device: the same random weights."""
    torch.set_grad_enabled(False)
    pipe = models.wan(torch.device(layout.device), torch.float32 if tiny else torch.bfloat16, tiny=tiny)
    return engine_of("i2v", pipe, layout)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def through(engine: Any, work: Any, source: Path, folder: Path) -> dict[str, float]:
    """One task as the service runs it: prepare, generate, finish."""
    getattr(engine, "_texts", {}).clear()  # every task has a text of its own here
    at = [time.perf_counter()]
    inputs = engine.prepare(work, [source])
    at.append(time.perf_counter())
    made = engine.generate(inputs, lambda step, steps: None)
    at.append(time.perf_counter())
    engine.finish(made.output, folder)
    at.append(time.perf_counter())
    return {"prepare": at[1] - at[0], "generate": at[2] - at[1], "finish": at[3] - at[2]}


@dataclass(frozen=True)
class Plain:
    """What plain diffusers took for a work, and the latents that it came to."""

    seconds: float
    latents: torch.Tensor


def measured(
    bench: Bench, section: str, name: str, engine: Any, work: Any, source: Path, plain: Plain | None = None, *,
    brief: bool = False,
) -> None:  # fmt: skip
    """A row of the table: what the GPU is held for, and speed and error against plain diffusers doing the same.

    `brief`: one run behind the first, the one whose phases are timed.
    """
    final = Final(engine._pipe)
    with tempfile.TemporaryDirectory() as folder, final:
        first = through(engine, work, source, Path(folder))["generate"]
        peak()
        before = retries()
        runs = 0 if brief else 1 if first > 30 else 2
        taken = [through(engine, work, source, Path(folder)) for _ in range(runs)]
        with phases(engine._pipe) as spent:
            last = through(engine, work, source, Path(folder))
        taken = taken or [last]
        most = peak()
        tight = retries() - before
    generate = min(one["generate"] for one in taken)
    # Between replays torch takes what graphs compute in for free, though nobody else can have it.
    graphs = engine._graphs.held() / GIB if engine._graphs is not None else 0.0
    compared: dict[str, float] = {}
    if plain is not None:
        compared = {
            "plain_s": plain.seconds, "ratio": plain.seconds / generate,
            "latents_error": error(final.latents, plain.latents),
        }  # fmt: skip
    bench.row(
        section, name, generate_s=generate, **compared, first_s=first,
        forward_s=spent["transformer"] / spent["transformer calls"], text_s=spent["text"],
        vae_encode_s=spent["vae encode"], vae_decode_s=spent["vae decode"], prepare_s=taken[-1]["prepare"],
        finish_s=taken[-1]["finish"], peak_gib=most + graphs, graphs_gib=graphs, profile=engine.info.profile,
        allocator_retries=tight,
    )  # fmt: skip


def profile_forward(bench: Bench, section: str, captured: Captured) -> None:
    """Where one forward's time goes on the GPU, by kernel."""
    if bench.tiny:
        return
    from torch.profiler import ProfilerActivity, profile

    args, options = captured.inputs
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        captured.pipe.transformer(*args, **options)
        sync()
    spent: dict[str, list[float]] = {}
    for event in profiled.key_averages():
        one = spent.setdefault(event.key[:90], [0.0, 0])
        one[0] += event.self_device_time_total / 1e3
        one[1] += event.count
    for name, (ms, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:16]:
        bench.row(section, f"kernel: {name}", ms=round(ms, 2), calls=count)


def rounded(found: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in found.items()}
