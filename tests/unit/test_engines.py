"""The zoo itself: each animal is an Engine, and the tame one makes what it says."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest
from PIL import Image
from tests import engines

from vidgen import errors
from vidgen.contracts import EditWork, I2VWork
from vidgen.engine import Engine

EDIT = EditWork(
    prompt="p", user_prompt="p", negative_prompt=" ", steps=4, true_cfg_scale=1, guidance_scale=1, seed=1,
    width=64, height=64, candidates=2,
)  # fmt: skip
I2V = I2VWork(
    prompt="p", negative_prompt="", steps=3, guidance_scale=1, seed=1, num_frames=5, fps=8, width=64, height=64
)


def run(engine: Engine, work: EditWork | I2VWork, folder: Path) -> tuple[list[tuple[int, int]], list[Path]]:
    steps: list[tuple[int, int]] = []
    engine.setup()
    made = engine.generate(engine.prepare(work, []), lambda step, of: steps.append((step, of)))
    return steps, [file.path for file in engine.finish(made.output, folder)]


def test_instant_walks_the_steps_and_writes_one_png_for_each_candidate(tmp_path: Path) -> None:
    steps, paths = run(engines.Instant(), EDIT, tmp_path)

    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [path.name for path in paths] == ["edit-0.png", "edit-1.png"]
    with Image.open(io.BytesIO(paths[0].read_bytes())) as image:
        image.load()
        assert image.size == (engines.SIDE, engines.SIDE)


def test_instant_writes_one_video(tmp_path: Path) -> None:
    assert [path.name for path in run(engines.Instant(), I2V, tmp_path)[1]] == ["video.mp4"]


def test_paced_holds_until_released_and_hears_a_cancel_meanwhile() -> None:
    engine = engines.Paced(released=threading.Event())

    def cancelled(step: int, steps: int) -> None:
        raise errors.Cancelled

    with pytest.raises(errors.Cancelled):
        engine.generate(EDIT, cancelled)
    assert engine.started.is_set()


def test_fails_once_fails_once(tmp_path: Path) -> None:
    engine = engines.FailsOnce()
    with pytest.raises(errors.RetryableError):
        run(engine, EDIT, tmp_path)

    assert run(engine, EDIT, tmp_path)[1]


@pytest.mark.parametrize(
    ("engine", "error"),
    [
        (engines.AlwaysRetryable(), errors.RetryableError),
        (engines.Rejects(), errors.RejectedError),
        (engines.FatalOnGenerate(), errors.FatalError),
        (engines.DiesInSetup(), errors.FatalError),
        (engines.Breaks(), ZeroDivisionError),
    ],
    ids=lambda value: getattr(type(value), "__name__", ""),
)
def test_each_misbehaves_as_its_name_says(engine: Engine, error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error):
        run(engine, EDIT, tmp_path)
