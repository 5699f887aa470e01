"""Engines that cost nothing but what they are told to: they hold the "GPU" for a time and leave files of a size."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vidgen.contracts import Stage, Work
from vidgen.engine import EngineInfo, Finished, Generated, OnStep


@dataclass(frozen=True)
class Shape:
    """How long the device is held per task, in how many steps, and how large the artifact is."""

    hold_s: float = 0.0
    steps: int = 1
    artifact_bytes: int = 0

    @classmethod
    def from_environment(cls) -> Shape:
        return cls(
            float(os.environ.get("BENCH_HOLD_S", "0")),
            int(os.environ.get("BENCH_STEPS", "1")),
            int(os.environ.get("BENCH_ARTIFACT_BYTES", "0")),
        )


class HoldingEngine:
    """Waits instead of computing; its files are valid in the eyes of the next stage, padded to the asked size."""

    def __init__(self, stage: Stage, shape: Shape) -> None:
        self.info = EngineInfo(name="holding", model="none")
        self._stage, self._shape = stage, shape
        self._never = threading.Event()
        self._payload = b""

    def setup(self) -> dict[str, float]:
        if self._stage == "edit":
            buffer = io.BytesIO()
            Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(buffer, "PNG")
            self._payload = buffer.getvalue()
        # Random, so that nothing on the way can make it smaller.
        missing = max(0, self._shape.artifact_bytes - len(self._payload))
        self._payload += np.random.default_rng(0).bytes(missing)
        return {}

    def prepare(self, work: Work, files: Sequence[Path]) -> int:
        return sum(len(file.read_bytes()) for file in files)

    def generate(self, inputs: int, on_step: OnStep) -> Generated:
        begun = time.monotonic()
        for step in range(1, self._shape.steps + 1):
            if self._shape.hold_s:
                self._never.wait(begun + self._shape.hold_s * step / self._shape.steps - time.monotonic())
            on_step(step, self._shape.steps)
        return Generated(inputs, denoise_s=time.monotonic() - begun, decode_s=0.0)

    def finish(self, output: int, folder: Path) -> tuple[Finished, ...]:
        name, kind = ("edit-0.png", "image/png") if self._stage == "edit" else ("video.mp4", "video/mp4")
        path = folder / name
        path.write_bytes(self._payload)
        return (Finished(path, kind, 64, 64),)
