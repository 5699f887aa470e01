"""The real engines at full size, beside plain diffusers in the same process: seconds, phases, peak memory, ratio.

    python benchmarks/gpu/run.py edit|i2v|memory … [--out results.jsonl] [--tiny]

Random weights of the true shape: speed and memory are theirs, quality is nobody's. Each section prints as it goes and
writes its rows to `--out`; a section that is there already is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from tests import checkpoints

if "--tiny" in sys.argv:
    checkpoints.install_shim()  # before anything imports transformers

import models
import numpy as np
import torch
from PIL import Image

from vidgen import weights
from vidgen.accel.engine import Layout
from vidgen.contracts import EditWork, I2VWork

torch.set_grad_enabled(False)
PROMPT = "turn the car bright red, golden hour light"
CEILINGS = {"bf16": 799e12, "fp8": 1519e12}  # FLOP/s of a large product on one H200, docs/performance.md


@dataclass
class Bench:
    """Where the rows go, and what machine this is."""

    out: Path
    tiny: bool
    variants: str
    device: torch.device
    dtype: torch.dtype
    rows: list[dict[str, Any]] = field(default_factory=list)

    def layouts(self) -> list[tuple[str, Layout]]:
        """The variants to measure, in an order in which one pipeline can take them all."""
        found = [
            ("bf16, compiled", Layout(profile="resident-bf16", attention="torch")),
            ("fp8, compiled", Layout(profile="resident-fp8", attention="torch")),
        ]
        if importlib.util.find_spec("flash_attn_interface") is not None:
            found.append(("fp8, compiled, FlashAttention 3", Layout(profile="resident-fp8", attention="flash3")))
        return [(label, Layout() if self.tiny else layout) for label, layout in found if self.variants in label]

    def row(self, section: str, name: str, **figures: Any) -> None:
        shown = "  ".join(f"{key} {_shown(value)}" for key, value in figures.items())
        print(f"[{time.perf_counter() - BEGUN:6.1f}] {section:6} {name:44} {shown}", flush=True)
        self.rows.append({"section": section, "name": name} | figures)
        with self.out.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")


BEGUN = time.perf_counter()


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak() -> float:
    """GiB since the last call."""
    if not torch.cuda.is_available():
        return 0.0
    found = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return round(found, 2)


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
    for transformer in filter(None, (pipe.transformer, getattr(pipe, "transformer_2", None))):
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
        return _error(self.pipe.transformer(*args, **options)[0].float(), self.wanted)

    def forward_s(self, runs: int) -> float:
        args, options = self.inputs
        return seconds(lambda: self.pipe.transformer(*args, **options), runs)


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
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

    return Made("random", layout=layout, **options)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def through(engine: Any, work: Any, source: Path, folder: Path) -> dict[str, float]:
    """One task as the service runs it: prepare, generate, finish."""
    at = [time.perf_counter()]
    inputs = engine.prepare(work, [source])
    at.append(time.perf_counter())
    made = engine.generate(inputs, lambda step, steps: None)
    at.append(time.perf_counter())
    engine.finish(made.output, folder)
    at.append(time.perf_counter())
    return {"prepare": at[1] - at[0], "generate": at[2] - at[1], "finish": at[3] - at[2]}


def measured(bench: Bench, section: str, name: str, engine: Any, work: Any, source: Path, plain: float | None) -> None:
    """A row of the table: what the GPU is held for, and the ratio to plain diffusers doing the same."""
    with tempfile.TemporaryDirectory() as folder:
        first = through(engine, work, source, Path(folder))["generate"]
        peak()
        taken = [through(engine, work, source, Path(folder)) for _ in range(1 if first > 30 else 2)]
        most = peak()
        with phases(engine._pipe) as spent:
            through(engine, work, source, Path(folder))
    generate = min(one["generate"] for one in taken)
    per_forward = spent["transformer"] / spent["transformer calls"]
    bench.row(
        section, name, generate_s=generate, **({"plain_s": plain, "ratio": plain / generate} if plain else {}),
        first_s=first, forward_s=per_forward, text_s=spent["text"], vae_encode_s=spent["vae encode"],
        vae_decode_s=spent["vae decode"], prepare_s=taken[-1]["prepare"], finish_s=taken[-1]["finish"], peak_gib=most,
    )  # fmt: skip


def edit(bench: Bench) -> None:
    side = 64 if bench.tiny else 1024
    small = (96, 64) if bench.tiny else (832, 480)
    areas = {"reference_area": side * side, "condition_area": 56 * 56} if bench.tiny else {}

    def work(steps: int, scale: float, size: tuple[int, int]) -> EditWork:
        return EditWork(
            prompt=PROMPT, user_prompt=PROMPT, negative_prompt=" ", steps=steps, true_cfg_scale=scale,
            guidance_scale=1.0, seed=1, width=size[0], height=size[1], candidates=1,
        )  # fmt: skip

    begun = time.perf_counter()
    pipe = models.qwen(bench.device, bench.dtype, tiny=bench.tiny)
    sync()
    bench.row("edit", "built", seconds=time.perf_counter() - begun, gib=peak())
    source = picture(side, side)
    with tempfile.TemporaryDirectory() as name:
        path, path_small = Path(name, "a.png"), Path(name, "b.png")
        source.save(path)
        picture(*small).save(path_small)

        def plain(steps: int, scale: float) -> None:
            more = {"negative_prompt": " "} if scale > 1 else {}
            pipe(image=[source], prompt=PROMPT, num_inference_steps=steps, true_cfg_scale=scale, width=side,
                 height=side, generator=torch.Generator("cpu").manual_seed(1), **more)  # fmt: skip

        if bench.tiny:
            from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

            module.VAE_IMAGE_SIZE, module.CONDITION_IMAGE_SIZE = side * side, 56 * 56
        captured = Captured(pipe)
        plain(2, 1.0)
        captured.restore()
        seen = tuple(captured.inputs[1]["hidden_states"].shape)
        text = captured.inputs[1]["encoder_hidden_states"].shape[1]
        mask = captured.inputs[1].get("encoder_hidden_states_mask")
        shape = models.qwen_shape(seen[1], text)
        bench.row("edit", "one forward", image_tokens=seen[1], text_tokens=text, mask=mask is not None,
                  tflop=shape.flop / 1e12, floor_bf16_s=shape.flop / CEILINGS["bf16"])  # fmt: skip
        peak()
        long = seconds(lambda: plain(8, 4.0), 1, warm=0)
        short = seconds(lambda: plain(4, 1.0), 2, warm=0)
        bench.row("edit", "plain diffusers: 8 steps, CFG 4", plain_s=long, peak_gib=peak())
        bench.row("edit", "plain diffusers: 4 steps, CFG off", plain_s=short, forward_s=captured.forward_s(3))

        for label, layout in bench.layouts():
            engine = engine_of("edit", pipe, layout, **areas)
            begun = time.perf_counter()
            engine.setup()
            bench.row(
                "edit", f"{label}: ready", seconds=time.perf_counter() - begun, phases=_rounded(engine.load_seconds)
            )
            error = captured.error()
            bench.row("edit", f"{label}: one forward", forward_s=captured.forward_s(3), error=error)
            measured(bench, "edit", f"{label}: 4 steps, CFG off", engine, work(4, 1.0, (side, side)), path, short)
            if label.startswith("fp8"):
                measured(bench, "edit", f"{label}: 8 steps, CFG 4", engine, work(8, 4.0, (side, side)), path, long)
                profile_forward(bench, "edit", captured)
                from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

                module.VAE_IMAGE_SIZE = small[0] * small[1]
                measured(
                    bench, "edit", f"{label}: draft for a 480p video", engine, work(4, 1.0, small), path_small, None
                )


def i2v(bench: Bench) -> None:
    width, height, frames = (96, 64, 9) if bench.tiny else (832, 480, 81)
    begun = time.perf_counter()
    pipe = models.wan(bench.device, bench.dtype, tiny=bench.tiny)
    sync()
    bench.row("i2v", "built", seconds=time.perf_counter() - begun, gib=peak())
    shape = models.wan_shape(frames, height, width)
    bench.row(
        "i2v", "one forward", tokens=shape.tokens, tflop=shape.flop / 1e12, floor_bf16_s=shape.flop / CEILINGS["bf16"]
    )

    def work(steps: int, scale: float) -> I2VWork:
        return I2VWork(prompt=PROMPT, negative_prompt="", steps=steps, guidance_scale=scale, seed=1, num_frames=frames,
                       fps=16, width=width, height=height)  # fmt: skip

    start = picture(width, height)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "a.png")
        start.save(path)

        def plain(steps: int) -> None:
            pipe(image=start, prompt=PROMPT, num_inference_steps=steps, guidance_scale=1.0, width=width, height=height,
                 num_frames=frames, generator=torch.Generator("cpu").manual_seed(1))  # fmt: skip

        captured = Captured(pipe)
        first = seconds(lambda: plain(2), 1, warm=0)
        captured.restore()
        bench.row("i2v", "plain diffusers: first call, 2 steps", seconds=first)
        short = seconds(lambda: plain(4), 1, warm=0)
        bench.row(
            "i2v", "plain diffusers: 4 steps, CFG off", plain_s=short, peak_gib=peak(), forward_s=captured.forward_s(1)
        )
        for label, layout in bench.layouts():
            engine = engine_of("i2v", pipe, layout)
            begun = time.perf_counter()
            engine.setup()
            bench.row(
                "i2v", f"{label}: ready", seconds=time.perf_counter() - begun, phases=_rounded(engine.load_seconds)
            )
            bench.row("i2v", f"{label}: one forward", forward_s=captured.forward_s(2), error=captured.error())
            measured(bench, "i2v", f"{label}: 4 steps, CFG off", engine, work(4, 1.0), path, short)
            profile_forward(bench, "i2v", captured)


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


def _rounded(found: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in found.items()}


SECTIONS: dict[str, Callable[[Bench], None]] = {"edit": edit, "i2v": i2v}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="by default all")
    parser.add_argument("--out", type=Path, default=Path("gpu-results.jsonl"))
    parser.add_argument("--variants", default="", help="only those whose name has this in it")
    parser.add_argument("--tiny", action="store_true", help="rehearse with tiny models, on the CPU")
    options = parser.parse_args()
    device = torch.device("cpu" if options.tiny else "cuda:0")
    bench = Bench(
        options.out, options.tiny, options.variants, device, torch.float32 if options.tiny else torch.bfloat16
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
            SECTIONS[name](bench)
            bench.row(name, f"{name} done", device=gpu, torch=torch.__version__, diffusers=diffusers.__version__)
        except Exception as exc:  # one section must not cost the others
            traceback.print_exc()
            bench.row(name, f"{name} FAILED", error=f"{type(exc).__name__}: {exc}")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
