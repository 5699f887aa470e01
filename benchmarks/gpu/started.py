"""The process that the sections `start` time: a service from its first line to an engine that is warm.

    started.py edit|i2v MODEL [--tiny] [--tasks] [--leave]

It does what that service does before it connects to the bus, and prints the seconds of each phase. With `--tasks` an
edit service's first tasks follow, of kinds that the warm-up does not know: their seconds, and the files that Triton and
inductor put into their caches meanwhile. For that `TRITON_CACHE_DIR` and `TORCHINDUCTOR_CACHE_DIR` are to be set, to
new folders.
"""

import sys
import time

BEGUN = time.perf_counter()

import asyncio
import gc
import importlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
from vidgen import service, telemetry
from vidgen.settings import WorkerSettings

core = time.perf_counter() - BEGUN
settings = WorkerSettings()
telemetry.configure(settings, f"{STAGE}-service")
gc.disable()


async def load() -> service._Loaded:
    made = service._Service({STAGE: make_engine}, settings)
    with ThreadPoolExecutor(1, "device") as device_thread:
        loaded, _ = await made._load(device_thread)
    return loaded[STAGE]


def tell_of_tasks(engine: Any, tiny: bool) -> None:
    from PIL import Image

    from edit_service.engine import qwen

    folders = [Path(os.environ[name]) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")]

    def kept() -> int:
        return sum(path.is_file() for folder in folders for path in folder.rglob("*"))

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


loaded = asyncio.run(load())
print(json.dumps({"core": core, **loaded.phases, "ready": time.perf_counter() - BEGUN}), flush=True)
if "--tasks" in sys.argv:
    tell_of_tasks(loaded.engine, "--tiny" in sys.argv)
if "--leave" in sys.argv:
    os._exit(0)  # what an interpreter with torch in it takes to end is nobody's start
