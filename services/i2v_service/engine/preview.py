"""The i2v engine that needs no model: it moves a camera over the frame as the prompt says, on any CPU, and says so."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from i2v_service.engine import camera
from vidgen import errors, images, video
from vidgen.contracts import I2VWork, Work
from vidgen.engine import EngineInfo, Finished, Generated, OnStep

NAME = "preview"
OVERSAMPLED = 1.3  # the picture is kept this much larger than the video, so that moving in stays sharp
COLUMNS, ROWS = 16, 9  # of the grid that is moved; between its points Pillow interpolates
IN_MEMORY = 1 << 29  # bytes of frames; longer and larger videos wait for the encoder in a temporary file

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Inputs:
    """The picture, oversampled, at the video's aspect, and how near each part of it is taken to be."""

    work: I2VWork
    picture: Image.Image
    depth: camera.Grid


@dataclass(frozen=True)
class Output:
    frames: Frames
    work: I2VWork


class PreviewI2VEngine:
    """Zooms, pans, tilts, dollies, orbits or shakes over the first frame, eased, from rest to rest.

    The first frame is the picture itself, unless the move ends on it (a zoom out). Each step renders its share of the
    frames and takes at least `seconds_per_step`. The same work and file give the same bytes.
    """

    def __init__(self, seconds_per_step: float = 0.0) -> None:
        self.info = EngineInfo(name=NAME, model=NAME, revision=version("vidgen"), device="cpu")
        self._seconds_per_step = seconds_per_step
        self._pace = threading.Event()  # never set: waiting on it is a pause

    def setup(self) -> dict[str, float]:
        """Nothing to load."""
        return {}

    def prepare(self, work: Work, files: Sequence[Path]) -> Inputs:
        if not isinstance(work, I2VWork):
            raise errors.RejectedError(f"the i2v engine makes videos, not an {work.kind}: send it to its own stage")
        if len(files) != 1:
            raise errors.RejectedError("a video starts from exactly one image", field="references")
        picture = images.open_rgb(files[0])
        if _is_marked(files[0]):
            picture = _without_mark(picture)
        centre = images.subject_centre(picture, work.width, work.height)
        size = (round(work.width * OVERSAMPLED), round(work.height * OVERSAMPLED))
        return Inputs(work, images.fit(picture, *size, centre), _depth())

    def generate(self, inputs: Inputs, on_step: OnStep) -> Generated:
        work = inputs.work
        started = time.perf_counter()
        rng = np.random.default_rng(work.seed)
        aspect = work.width / work.height
        move = camera.move_of(work.prompt)
        path = camera.path(move, work.num_frames, work.fps, inputs.depth, aspect, rng)
        frames = _room_for((work.num_frames, work.height, work.width, 3))
        done = 0
        for step in range(1, work.steps + 1):
            due = time.perf_counter() + self._seconds_per_step
            share = work.num_frames * step // work.steps
            for index in range(done, share):
                frames[index] = np.asarray(_rendered(inputs, path[index]))
            done = share
            if (left := due - time.perf_counter()) > 0:
                self._pace.wait(left)
            on_step(step, work.steps)
        return Generated(Output(frames, work), time.perf_counter() - started, 0.0)

    def finish(self, output: Output, folder: Path) -> tuple[Finished, ...]:
        work = output.work
        film, poster = folder / "video.mp4", folder / "poster.jpg"
        tags = {"engine": NAME, "model": NAME, "seed": str(work.seed)}
        video.write_mp4(iter(output.frames), film, fps=work.fps, metadata=tags)
        Image.fromarray(np.ascontiguousarray(output.frames[0])).save(poster, format="JPEG", quality=90)
        return (
            Finished(film, "video/mp4", work.width, work.height, work.num_frames, work.fps),
            Finished(poster, "image/jpeg", work.width, work.height),
        )


def _rendered(inputs: Inputs, vertices: camera.Grid) -> Image.Image:
    """One frame: each cell of the grid looked up where the camera sees it."""
    work, picture = inputs.work, inputs.picture
    places = (vertices + 1) / 2 * (picture.width, picture.height)
    columns = np.rint(np.linspace(0, work.width, COLUMNS + 1)).astype(int).tolist()
    rows = np.rint(np.linspace(0, work.height, ROWS + 1)).astype(int).tolist()
    corners = places.tolist()
    mesh = [
        (
            (columns[i], rows[j], columns[i + 1], rows[j + 1]),
            (*corners[j][i], *corners[j + 1][i], *corners[j + 1][i + 1], *corners[j][i + 1]),
        )
        for j in range(ROWS)
        for i in range(COLUMNS)
    ]
    size = (work.width, work.height)
    frame = picture.transform(size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)
    images.mark(frame, NAME)
    return frame


def _depth() -> camera.Grid:
    """How near a picture's parts usually are: the subject in the middle and the ground before it; the rest is far."""
    y, x = np.mgrid[-1 : 1 : (ROWS + 1) * 1j, -1 : 1 : (COLUMNS + 1) * 1j]
    subject = np.exp(-(np.square(x / 0.55) + np.square((y - 0.15) / 0.9)))
    ground = np.clip((y - 0.2) / 0.8, 0, 1) ** 2
    return np.asarray(np.clip(0.9 * subject + 0.35 * ground, 0, 1), np.float64)


def _room_for(shape: tuple[int, ...]) -> Frames:
    size = int(np.prod(shape))
    if size <= IN_MEMORY:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile() as file:  # the mapping keeps it alive; it is gone with the last reference
        return np.memmap(file, np.uint8, "w+", shape=shape)


def _is_marked(path: Path) -> bool:
    """Whether the picture is a preview engine's own, with its label on it."""
    return images.read_text(path).get("engine") == NAME


def _without_mark(picture: Image.Image) -> Image.Image:
    """Leave out the strip that carries the label, or the video would show two."""
    kept = 1 - images.MARK_SHARE
    wide, tall = picture.width * kept, picture.height * kept
    left = round((picture.width - wide) / 2)
    return picture.crop((left, 0, left + round(wide), round(tall)))
