"""The process that the sections `start` time: a service from its first line to an engine that is warm.

    started.py edit|i2v MODEL [--tiny] [--tasks] [--turns] [--leave]

It does what that service does before it connects to the bus, and prints the profile, the most that the GPU held, the
files that Triton and inductor put into their caches, and the seconds of each phase. Before them come the processor's
seconds of each phase: those of the thread that goes through it, and those of the whole process meanwhile. With
`--tasks` an edit service's first tasks follow, of kinds that the warm-up does not know: their seconds, and such files.
For files to be counted, `VIDGEN_COMPILE_CACHE` is to be set, and new for a first start. With `--turns` an edit
service's model goes to sleep and wakes, twice: the seconds of each, whether an edit behind it is the one from before,
and the host's memory.
"""

import sys
import time

BEGUN = time.perf_counter()

import gc

gc.disable()  # as the service does, and as early

import asyncio
import importlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

sys.path[:0] = [str(Path(__file__).parents[2])]
STAGE = sys.argv[1]
os.environ |= {"VIDGEN_ENGINE": "real", f"VIDGEN_{STAGE.upper()}_MODEL": sys.argv[2]}
if "--tiny" in sys.argv:
    from tests import checkpoints

    checkpoints.install_shim()
    os.environ |= {"VIDGEN_EDIT_REFERENCE_AREA": str(64 * 64), "VIDGEN_EDIT_CONDITION_AREA": str(56 * 56)}

from vidgen import native

native.load_ahead()

make_engine = importlib.import_module(f"{STAGE}_service.main").make_engine
from vidgen import choice, service, telemetry
from vidgen.settings import WorkerSettings

T = TypeVar("T")
core = time.perf_counter() - BEGUN
settings = WorkerSettings()
# By phase: of the thread, of the process.
processor: dict[str, tuple[float, float]] = {"core": (time.thread_time(), time.process_time())}


def clocked(phase: str, work: Callable[[], T]) -> T:
    """Have some work done, and add up what it takes of the processor."""
    begun = time.thread_time(), time.process_time()
    try:
        return work()
    finally:
        own, whole = processor.get(phase, (0.0, 0.0))
        processor[phase] = own + time.thread_time() - begun[0], whole + time.process_time() - begun[1]


def make_clocked(settings: WorkerSettings, chosen: choice.Choice) -> Any:
    clocked("torch", lambda: importlib.import_module("torch"))  # what `make_engine` imports first
    engine: Any = clocked("imports", lambda: make_engine(settings, chosen))
    timed = engine._timed
    engine._timed = lambda phase, work: timed(phase, lambda: clocked(phase, work))
    return engine


def kept() -> int:
    """The files of what was compiled."""
    folder = settings.compile_cache
    return 0 if folder is None else sum(path.is_file() for path in folder.rglob("*"))


kept_before = kept()
telemetry.configure(settings, f"{STAGE}-service")


async def load() -> service._Loaded:
    made = service._Service({STAGE: make_clocked}, settings)
    with ThreadPoolExecutor(1, "device") as device_thread:
        loaded, _ = await made._load(device_thread)
    return loaded[STAGE]


def tell_of_tasks(engine: Any, tiny: bool) -> None:
    from PIL import Image

    from edit_service.engine import qwen

    draft = {"reference_area": 832 * 480}
    kinds: list[tuple[str, dict[str, Any], int]] = [
        ("a draft", {"width": 832, "height": 480} | draft, 1), ("a megapixel", {"width": 1344, "height": 768}, 1),
        ("four candidates", {"width": 1024, "height": 1024, "candidates": 4}, 1),
        ("guidance, 74 x 55 tokens", {"width": 1184, "height": 880, "steps": 8, "true_cfg_scale": 4.0}, 1),
        ("two references", {"width": 1024, "height": 1024}, 2),
        ("a draft, upright", {"width": 480, "height": 832} | draft, 1),
    ]  # fmt: skip
    for name, task, references in kinds:
        small = {"width": 64, "height": 64} if tiny else {}
        work = qwen.WARM_UP.model_copy(update={"steps": 4, "prompt": "a cat that sits upon a mat " * 3} | task | small)
        pictures = tuple(Image.effect_noise((900, 700), 64).convert("RGB") for _ in range(references))
        before, begun = kept(), time.perf_counter()
        engine.generate(engine._laid_out(work, pictures), lambda step, steps: None)
        print(
            json.dumps({"task": name, "seconds": time.perf_counter() - begun, "compiled": kept() - before}), flush=True
        )


def tell_of_turns(engine: Any, tiny: bool) -> None:
    from PIL import Image

    from edit_service.engine import qwen

    side = 64 if tiny else 1024
    work = qwen.WARM_UP.model_copy(update={"steps": 4, "width": side, "height": side})
    inputs = engine._laid_out(work, (Image.effect_noise((900, 700), 64).convert("RGB"),))

    def edited() -> Any:
        return engine.generate(inputs, lambda step, steps: None).output.pixels

    before = edited()
    for number in ("first", "second"):
        begun = time.perf_counter()
        engine.sleep()
        slept = time.perf_counter()
        left = left_gib()
        engine.wake()
        told = {"sleep": slept - begun, "wake": time.perf_counter() - slept, "host_left_asleep_gib": left}
        print(json.dumps({"turn": number, **told, "same": bool((edited() == before).all())}), flush=True)


def left_gib() -> float:
    """GiB of the host's memory that may still be taken."""
    from vidgen.accel import host

    return (host.host_memory() or 0) / (1 << 30)


def peak_gib() -> float:
    import torch

    return torch.cuda.max_memory_allocated() / (1 << 30) if torch.cuda.is_available() else 0.0


with service.without_peft(settings, [STAGE]):
    loaded = asyncio.run(load())
ready = time.perf_counter() - BEGUN
told = {"profile": loaded.engine.info.profile, "peak_gib": peak_gib(), "compiled": kept() - kept_before}
print(json.dumps({**told, "host_left_gib": left_gib()}), flush=True)
whole = time.process_time()
rounded = {phase: [round(seconds, 2) for seconds in both] for phase, both in processor.items()}
total = sum(own for own, _ in processor.values())
print(json.dumps({"processor": rounded, "threads": round(total, 2), "process": round(whole, 2)}), flush=True)
print(json.dumps({"core": core, **loaded.phases, "ready": ready}), flush=True)
if "--tasks" in sys.argv:
    tell_of_tasks(loaded.engine, "--tiny" in sys.argv)
if "--turns" in sys.argv:
    tell_of_turns(loaded.engine, "--tiny" in sys.argv)
if "--leave" in sys.argv:
    os._exit(0)  # what an interpreter with torch in it takes to end is nobody's start
