"""The process that the sections `start` time: a service from its first line to an engine that is warm.

    started.py edit|i2v MODEL [--tiny] [--leave]

It does what that service does before it connects to the bus, and prints the seconds of each phase.
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


async def load() -> dict[str, float]:
    made = service._Service({STAGE: make_engine}, settings)
    with ThreadPoolExecutor(1, "device") as device_thread:
        loaded, _ = await made._load(device_thread)
    return dict(loaded[STAGE].phases)


phases = asyncio.run(load())
print(json.dumps({"core": core, **phases, "ready": time.perf_counter() - BEGUN}), flush=True)
if "--leave" in sys.argv:
    os._exit(0)  # what an interpreter with torch in it takes to end is nobody's start
