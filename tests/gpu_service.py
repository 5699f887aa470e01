"""A GPU service on the preview engine, on the GPUs of `tests.nvml`: `python -m tests.gpu_service STAGE`.

edit has the first GPU, i2v the second. An edit with the seed `REFUSED` is refused.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import cast

from tests.nvml import FakeNvml

from edit_service.engine.preview import Inputs, PreviewEditEngine
from i2v_service.main import make_engine as make_i2v_engine
from vidgen import choice, errors, service
from vidgen.contracts import STAGES, Stage, Work
from vidgen.engine import Engine
from vidgen.settings import WorkerSettings

REFUSED = 13


class Choosy(PreviewEditEngine):
    def prepare(self, work: Work, files: Sequence[Path]) -> Inputs:
        if work.seed == REFUSED:
            raise errors.RejectedError("the image cannot be read: send a PNG or a JPEG", code="bad_image")
        return super().prepare(work, files)


def make_edit_engine(settings: WorkerSettings, _chosen: choice.Choice) -> Engine:
    return Choosy(settings.preview_seconds_per_step)


if __name__ == "__main__":
    stage = cast(Stage, sys.argv[1])
    sys.modules["pynvml"] = cast(ModuleType, FakeNvml())
    os.environ["CUDA_VISIBLE_DEVICES"] = str(STAGES.index(stage))
    sys.exit(service.run(stage, make_edit_engine if stage == "edit" else make_i2v_engine))
