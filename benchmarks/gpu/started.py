"""The process that the sections `start` time: a service from its first line to an engine that is warm.

    started.py MODEL [--tiny]

It does what `edit-service` does before it connects to the bus, and prints the seconds of each phase.
"""

import sys
import time

BEGUN = time.perf_counter()

import asyncio
import gc
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]
os.environ |= {"VIDGEN_ENGINE": "real", "VIDGEN_EDIT_MODEL": sys.argv[1]}
if "--tiny" in sys.argv:
    from tests import checkpoints

    checkpoints.install_shim()
    os.environ |= {"VIDGEN_EDIT_REFERENCE_AREA": str(64 * 64), "VIDGEN_EDIT_CONDITION_AREA": str(56 * 56)}

from vidgen import native

native.load_ahead()

from edit_service.main import make_engine
from vidgen import service, telemetry
from vidgen.settings import WorkerSettings

core = time.perf_counter() - BEGUN
settings = WorkerSettings()
telemetry.configure(settings, "edit-service")
gc.disable()


async def load() -> dict[str, float]:
    made = service._Service({"edit": make_engine}, settings)
    with ThreadPoolExecutor(1, "device") as device_thread:
        loaded, _ = await made._load(device_thread)
    return dict(loaded["edit"].phases)


phases = asyncio.run(load())
print(json.dumps({"core": core, **phases, "ready": time.perf_counter() - BEGUN}), flush=True)
if "--leave" in sys.argv:
    os._exit(0)  # what an interpreter with torch in it takes to end is nobody's start
