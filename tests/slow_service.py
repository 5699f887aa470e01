"""i2v-service as it is, but where a prompt says slowly no step is done in a moment: `python -m tests.slow_service`."""

from __future__ import annotations

import sys
import time
from typing import Any

from i2v_service import main
from vidgen import choice, service
from vidgen.engine import OnStep
from vidgen.settings import WorkerSettings

STEP_S = 0.05


def make_engine(settings: WorkerSettings, chosen: choice.Choice) -> Any:
    engine: Any = main.make_engine(settings, chosen)
    resume = engine.resume

    def resumed(inputs: Any, on_step: OnStep, state: bytes | None) -> Any:
        def slow(step: int, steps: int) -> None:
            time.sleep(STEP_S)
            on_step(step, steps)

        return resume(inputs, slow if inputs.work.prompt == "slowly" else on_step, state)

    engine.resume = resumed
    return engine


if __name__ == "__main__":
    sys.exit(service.run("i2v", make_engine))
