"""The edit engine that needs no model: it grades the real photograph as the prompt says, on any CPU, and says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from edit_service.engine import grading, looks
from vidgen import errors, images
from vidgen.contracts import EditWork, Work
from vidgen.engine import EngineInfo, Finished, Generated, OnStep

NAME = "preview"


@dataclass(frozen=True)
class Inputs:
    """The reference at the output's size, and the pictures whose colours it takes on."""

    work: EditWork
    picture: Image.Image
    palette: tuple[Image.Image, ...]


@dataclass(frozen=True)
class Output:
    pictures: tuple[Image.Image, ...]
    seed: int


class PreviewEditEngine:
    """Applies the prompt's light, colour and styles to the first reference; further ones lend it their colours.

    The geometry stays: nothing is moved or turned, so a viewpoint has no effect. Each step takes at least
    `seconds_per_step`. The same work and files give the same bytes.
    """

    def __init__(self, seconds_per_step: float = 0.0) -> None:
        self.info = EngineInfo(name=NAME, model=NAME, revision=version("vidgen"), device="cpu")
        self._seconds_per_step = seconds_per_step
        self._pace = threading.Event()  # never set: waiting on it is a pause

    def setup(self) -> dict[str, float]:
        """Nothing to load."""
        return {}

    def prepare(self, work: Work, files: Sequence[Path]) -> Inputs:
        if not isinstance(work, EditWork):
            raise errors.RejectedError(f"the edit engine does edits, not {work.kind}: send it to its own stage")
        if not files:
            raise errors.RejectedError("an edit needs at least one reference image", field="references")
        first, *others = (images.open_rgb(path) for path in files)
        centre = images.subject_centre(first, work.width, work.height)
        picture = images.fit(first, work.width, work.height, centre)
        return Inputs(work, picture, tuple(others))

    def generate(self, inputs: Inputs, on_step: OnStep) -> Generated:
        work = inputs.work
        started = time.perf_counter()
        pictures: list[Image.Image] = []
        for step in range(1, work.steps + 1):
            due = time.perf_counter() + self._seconds_per_step
            while len(pictures) < work.candidates * step // work.steps:
                pictures.append(self._candidate(inputs, len(pictures)))
            if (left := due - time.perf_counter()) > 0:
                self._pace.wait(left)
            on_step(step, work.steps)
        return Generated(Output(tuple(pictures), work.seed), time.perf_counter() - started, 0.0)

    def finish(self, output: Output, folder: Path) -> tuple[Finished, ...]:
        done = []
        for index, picture in enumerate(output.pictures):
            path = folder / f"edit-{index}.png"
            marked = picture.copy()
            images.mark(marked, NAME)
            text = {"engine": NAME, "model": NAME, "seed": str(output.seed), "candidate": str(index)}
            images.write_png(marked, path, text)
            done.append(Finished(path, "image/png", marked.width, marked.height))
        return tuple(done)

    def _candidate(self, inputs: Inputs, index: int) -> Image.Image:
        rng = np.random.default_rng([inputs.work.seed, index])
        look = _varied(looks.look_of(inputs.work), rng)
        return grading.grade(inputs.picture, look, inputs.palette, rng)


def _varied(look: looks.Look, rng: np.random.Generator) -> looks.Look:
    """The same look as another photographer would take it: what the seed changes."""
    exposure, contrast, warmth, saturation = rng.uniform(-1, 1, 4)
    turn = rng.uniform(-18, 18)
    return replace(
        look,
        exposure=look.exposure + 0.1 * float(exposure),
        contrast=look.contrast + 0.06 * float(contrast),
        warmth=look.warmth + 0.06 * float(warmth),
        saturation=look.saturation + 0.05 * float(saturation),
        lights=tuple(replace(light, angle=light.angle + float(turn)) for light in look.lights),
    )
