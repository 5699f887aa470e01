"""The process that the section `start` times, with what a service has in it: `started.py FOLDER [--tiny]`."""

import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]
begun = time.perf_counter()
if "--tiny" in sys.argv:
    from tests import checkpoints

    checkpoints.install_shim()

import json

from edit_service.engine.qwen import QwenEditEngine

imported = time.perf_counter() - begun
areas = {"reference_area": 64 * 64, "condition_area": 56 * 56} if "--tiny" in sys.argv else {}
print(json.dumps({"imports": imported, **QwenEditEngine(sys.argv[1], **areas).setup()}))
