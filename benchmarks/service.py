"""A GPU service with a holding engine: `python benchmarks/service.py edit|i2v`, shaped by BENCH_* variables."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from engines import HoldingEngine, Shape
from vidgen import service

if __name__ == "__main__":
    stage = sys.argv[1]
    assert stage in ("edit", "i2v")
    sys.exit(service.run(stage, lambda _settings, _choice: HoldingEngine(stage, Shape.from_environment())))
