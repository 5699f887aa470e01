"""What `prepare` makes of the references is what the pipeline makes of them in its call, to the last bit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from vidgen.contracts import EditWork
from vidgen.errors import RejectedError, Suspended

if TYPE_CHECKING:
    from edit_service.engine.qwen import QwenEditEngine

pytestmark = pytest.mark.timeout(600)  # importing diffusers takes minutes on a machine that is busy


AREAS = {"reference_area": 96 * 96, "condition_area": 100 * 100}


def work(**changes: Any) -> EditWork:
    fields: dict[str, Any] = {
        "prompt": "make it blue", "user_prompt": "make it blue", "negative_prompt": "red", "steps": 2, "seed": 7,
        "true_cfg_scale": 1.0, "guidance_scale": 1.0, "width": 96, "height": 64, "candidates": 1,
    }  # fmt: skip
    return EditWork(**fields | changes)


def ignore(step: int, steps: int) -> None:
    pass


@pytest.fixture(scope="module")
def engine(make: Callable[..., QwenEditEngine]) -> QwenEditEngine:
    return make(**AREAS)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three of different shapes, the last one of the very size that the VAE gets."""
    folder = tmp_path_factory.mktemp("photos")
    shapes = ((90, 120, 3), (200, 70, 3), (96, 96, 3))
    for index, shape in enumerate(shapes):
        noise = np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    return [folder / f"{index}.png" for index in range(len(shapes))]


@contextmanager
def counted(engine: QwenEditEngine) -> Iterator[dict[str, int]]:
    """How often each of the stock processors works, and the vision tower."""
    seen = {"resize": 0, "preprocess": 0, "features": 0, "tower": 0}
    processor = engine._pipe.processor.image_processor
    with pytest.MonkeyPatch.context() as patch:

        def watch(owner: Any, name: str, told: str) -> None:
            stock = getattr(owner, name)

            def call(*args: Any, **options: Any) -> Any:
                seen[told] += 1
                return stock(*args, **options)

            patch.setattr(owner, name, call)

        watch(engine._pipe.image_processor, "resize", "resize")
        watch(engine._pipe.image_processor, "preprocess", "preprocess")
        watch(processor, "preprocess", "features")
        watch(engine._pipe.text_encoder.model.visual, "forward", "tower")
        yield seen


def pixels(engine: QwenEditEngine, inputs: Any) -> np.ndarray[Any, Any]:
    return np.asarray(engine.generate(inputs, ignore).output.pixels)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("true_cfg_scale", [1.0, 4.0], ids=["plain", "guided"])
@pytest.mark.parametrize("candidates", [1, 2])
def test_an_edit_is_the_one_that_the_pipeline_makes_by_itself(
    engine: QwenEditEngine, photos: list[Path], count: int, true_cfg_scale: float, candidates: int
) -> None:
    inputs = engine.prepare(work(true_cfg_scale=true_cfg_scale, candidates=candidates), photos[:count])
    with counted(engine) as seen:
        found = pixels(engine, inputs)
    assert seen == {"resize": 0, "preprocess": 0, "features": 0, "tower": 1}

    with counted(engine) as seen:
        wanted = pixels(engine, replace(inputs, ready=None))
    prompts = 2 if true_cfg_scale > 1 else 1
    # Each image for the VAE is resized, too.
    assert seen == {"resize": 2 * count, "preprocess": count, "features": prompts, "tower": prompts}
    assert np.array_equal(found, wanted)


def test_in_half_precision_it_is_so_too(make: Callable[..., QwenEditEngine], photos: list[Path]) -> None:
    engine = make(dtype="bfloat16", **AREAS)
    inputs = engine.prepare(work(true_cfg_scale=4.0), photos)
    assert inputs.ready is not None
    assert all(made.dtype == torch.bfloat16 for made in inputs.ready.pixels)
    assert np.array_equal(pixels(engine, inputs), pixels(engine, replace(inputs, ready=None)))


def test_a_task_with_smaller_references_has_them_ready_at_its_size(engine: QwenEditEngine, photos: list[Path]) -> None:
    inputs = engine.prepare(work(reference_area=64 * 64), photos)
    assert inputs.ready is not None
    assert inputs.ready.pixels[2].shape == (1, 3, 64, 64)
    with counted(engine) as seen:
        found = pixels(engine, inputs)
    assert (seen["resize"], seen["preprocess"]) == (0, 0)
    assert np.array_equal(found, pixels(engine, replace(inputs, ready=None)))


def test_an_edit_that_is_gone_on_with_finds_them_ready(engine: QwenEditEngine, photos: list[Path]) -> None:
    task = work(steps=3, true_cfg_scale=4.0, candidates=2)
    inputs = engine.prepare(task, photos)

    def leave(step: int, steps: int) -> None:
        raise Suspended(step, steps)

    with pytest.raises(Suspended) as left:
        engine.generate(inputs, leave)
    again = engine.prepare(task, photos)
    with counted(engine) as seen:
        found = engine.resume(again, ignore, left.value.state).output.pixels
    assert seen == {"resize": 0, "preprocess": 0, "features": 0, "tower": 1}
    assert np.array_equal(found, pixels(engine, replace(inputs, ready=None)))


def test_the_next_task_is_prepared_while_this_one_runs(engine: QwenEditEngine, photos: list[Path]) -> None:
    first, second = work(true_cfg_scale=4.0), work(true_cfg_scale=4.0, seed=8)
    alone = [pixels(engine, engine.prepare(first, photos[:1])), pixels(engine, engine.prepare(second, photos[1:]))]
    made: list[Any] = []

    def prepare_next(step: int, steps: int) -> None:
        if not made:
            thread = threading.Thread(target=lambda: made.append(engine.prepare(second, photos[1:])))
            thread.start()
            thread.join()

    output = engine.generate(engine.prepare(first, photos[:1]), prepare_next).output
    assert np.array_equal(output.pixels, alone[0])
    assert np.array_equal(pixels(engine, made[0]), alone[1])


def test_behind_a_task_the_pipeline_has_its_own_processors_also_if_it_fails(
    engine: QwenEditEngine, photos: list[Path]
) -> None:
    pipe = engine._pipe
    before = pipe.image_processor, pipe.processor, pipe.processor.image_processor

    def stop(step: int, steps: int) -> None:
        raise KeyError

    inputs = engine.prepare(work(), photos)
    pixels(engine, inputs)
    with pytest.raises(KeyError):
        engine.generate(inputs, stop)
    after = pipe.image_processor, pipe.processor, pipe.processor.image_processor
    assert all(now is then for now, then in zip(after, before, strict=True))
    assert "get_image_features" not in vars(pipe.text_encoder.model)


def test_what_was_made_for_other_images_or_sizes_is_never_taken(engine: QwenEditEngine, photos: list[Path]) -> None:
    inputs = engine.prepare(work(), photos[:1])
    others = engine.prepare(work(seed=8, reference_area=64 * 64), photos[1:])
    assert np.array_equal(
        pixels(engine, replace(inputs, ready=others.ready)), pixels(engine, replace(inputs, ready=None))
    )
    smaller = engine.prepare(work(reference_area=64 * 64), photos[:1])
    assert smaller.ready is not None
    mixed = replace(smaller, work=inputs.work)
    assert np.array_equal(pixels(engine, mixed), pixels(engine, replace(mixed, ready=None)))


def test_references_that_the_processors_cannot_take_are_rejected(
    engine: QwenEditEngine, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*args: Any, **options: Any) -> None:
        raise ValueError("height and width must be > 0")

    monkeypatch.setattr(engine._pipe.image_processor, "resize", refusing)
    with pytest.raises(RejectedError, match="must be > 0") as caught:
        engine.prepare(work(), photos)
    assert caught.value.code == "invalid_input"
