"""Tasks of all sizes and kinds for some minutes: what one and the same takes then, and what memory is held.

A worker does this for weeks. Whatever it keeps of each size (graphs, programs, pieces of the allocator's memory) would
show as memory that grows, as seconds that do, or as tasks for which there is no memory any more.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from bench import GIB, PROMPT, Bench, left_gib, peak, picture, retries

from vidgen.contracts import MAX_SIDE, MIN_SIDE, SIZE_MULTIPLE
from vidgen.errors import RetryableError

LOOKS = 8
AREAS = {"edit": (17.0, 21.0), "i2v": (15.5, 19.0)}  # of a picture or frame, powers of two
TINY = (12.0, 13.0)


def traffic(bench: Bench, kind: str, engine: Any, same: Any, folder: Path) -> None:
    """Whatever comes, and between it the same task again and again."""
    draw = random.Random(1)
    pictures = [folder / f"reference-{number}.png" for number in range(3)]
    for path, size in zip(pictures, ((1024, 768), (640, 900), (1500, 500)), strict=True):
        picture(*((64, 48) if bench.tiny else size)).save(path)
    said: Counter[str] = Counter()
    _same(bench, engine, same, pictures, "the same task at first", 0, said)
    done, begun, looked = 0, time.perf_counter(), 0
    while looked < LOOKS:
        work = _drawn(draw, kind, same, tiny=bench.tiny)
        count = draw.choice((1, 1, 1, 2, 3)) if kind == "edit" else 1
        try:
            _one(engine, work, pictures[:count], said)
        except RetryableError as exc:
            said[exc.code] += 1
        done += 1
        if time.perf_counter() - begun >= (looked + 1) * bench.minutes * 60 / LOOKS:
            looked += 1
            _same(bench, engine, same, pictures, f"the same task behind {done} others", done, said)


def _one(engine: Any, work: Any, sources: list[Path], said: Counter[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        inputs = engine.prepare(work, sources)
        begun = time.perf_counter()
        made = engine.generate(inputs, lambda step, steps: None)
        taken = time.perf_counter() - begun
        said.update(made.rungs)
        engine.finish(made.output, Path(folder))
    return taken


def _same(bench: Bench, engine: Any, work: Any, pictures: list[Path], name: str, done: int, said: Counter[str]) -> None:
    taken = min(_one(engine, work, pictures[:1], Counter()) for _ in range(2))
    held: dict[str, float] = {}
    if torch.cuda.is_available():
        graphs = engine._graphs.held() / GIB if engine._graphs is not None else 0.0
        held = {
            "allocated_gib": torch.cuda.memory_allocated() / GIB, "reserved_gib": torch.cuda.memory_reserved() / GIB,
            "graphs_gib": graphs, "peak_gib": peak(), "allocator_retries": retries(),
        }  # fmt: skip
    bench.row(
        "mixed", name, tasks=done, generate_s=taken, **held, resident_gib=_resident_gib(), host_left_gib=left_gib(),
        without=dict(said),
    )  # fmt: skip


def _drawn(draw: random.Random, kind: str, like: Any, *, tiny: bool) -> Any:
    low, high = TINY if tiny else AREAS[kind]
    area, ratio = 2 ** draw.uniform(low, high), math.exp(draw.uniform(-0.7, 0.7))
    width, height = (_side(math.sqrt(area * part)) for part in (ratio, 1 / ratio))
    given: dict[str, Any] = {
        "width": width, "height": height, "seed": draw.randrange(1 << 30), "steps": draw.choice((2, 3, 4)),
        "prompt": PROMPT + " and a cat" * draw.randrange(100),
    }  # fmt: skip
    if kind == "i2v":
        given |= {
            "num_frames": 4 * draw.randrange(1, 3 if tiny else 31) + 1, "guidance_scale": draw.choice((1.0, 1.0, 3.5))
        }  # fmt: skip
    else:
        given |= {"true_cfg_scale": draw.choice((1.0, 1.0, 4.0)), "candidates": draw.choice((1, 1, 1, 1, 2, 4))}
        if draw.random() < 0.3:  # the draft of a video
            given |= {"reference_area": max(4096, width * height), "candidates": 1}
    return like.model_copy(update=given)


def _side(wanted: float) -> int:
    return max(MIN_SIDE, min(MAX_SIDE, round(wanted / SIZE_MULTIPLE) * SIZE_MULTIPLE))


def _resident_gib() -> float:
    told = Path("/proc/self/status").read_text(encoding="ascii")
    return int(told.split("VmRSS:")[1].split()[0]) / (1 << 20)
