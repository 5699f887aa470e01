"""The preview edit engine: it does what the prompt says to the real picture, and says that it is a preview."""

from __future__ import annotations

import time
import typing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFilter
from tests import photographs

from edit_service.engine import looks
from edit_service.engine.preview import PreviewEditEngine
from vidgen import contracts, errors, images
from vidgen.contracts import EditWork, I2VWork

PORTRAIT = Path(__file__).parents[3] / "examples" / "portrait.jpg"


def work(prompt: str = "golden hour light", **fields: Any) -> EditWork:
    known = {
        "prompt": prompt, "user_prompt": prompt, "negative_prompt": " ", "steps": 4, "true_cfg_scale": 1.0,
        "guidance_scale": 1.0, "seed": 7, "width": 128, "height": 128, "candidates": 1,
    }  # fmt: skip
    return EditWork.model_validate(known | fields)


def run(folder: Path, task: EditWork, *files: Path, engine: PreviewEditEngine | None = None) -> list[Path]:
    engine = engine or PreviewEditEngine()
    folder.mkdir(exist_ok=True)
    generated = engine.generate(engine.prepare(task, files or (PORTRAIT,)), lambda step, steps: None)
    return [done.path for done in engine.finish(generated.output, folder)]


def pixels(path: Path) -> npt.NDArray[np.float64]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.float64)


def warmth(path: Path) -> float:
    mean = pixels(path).mean(axis=(0, 1))
    return float(mean[0] - mean[2])


def test_it_is_named_preview_and_versioned() -> None:
    info = PreviewEditEngine().info
    assert (info.name, info.model, info.device) == ("preview", "preview", "cpu")
    assert info.revision


def test_candidates_are_named_sized_and_different(tmp_path: Path) -> None:
    engine = PreviewEditEngine()
    generated = engine.generate(
        engine.prepare(work(candidates=3, width=160, height=96), [PORTRAIT]), lambda step, steps: None
    )
    done = engine.finish(generated.output, tmp_path)
    assert [item.path.name for item in done] == ["edit-0.png", "edit-1.png", "edit-2.png"]
    assert {(item.content_type, item.width, item.height) for item in done} == {("image/png", 160, 96)}
    assert len({item.path.read_bytes() for item in done}) == 3
    for item in done:
        with Image.open(item.path) as image:
            assert (image.mode, image.size) == ("RGB", (160, 96))


@pytest.mark.parametrize("name", photographs.TELLING)
def test_what_it_makes_of_a_photograph_says_how_it_was_made_and_nothing_else(tmp_path: Path, name: str) -> None:
    photograph = tmp_path / "photograph"
    photograph.write_bytes(photographs.TELLING[name]())

    (made,) = run(tmp_path / "made", work(width=64, height=64, steps=2), photograph)

    assert photographs.PLANTED not in made.read_bytes()
    assert set(images.read_text(made)) == {"engine", "model", "seed", "candidate"}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    (one,) = run(tmp_path / "one", work("snow at night"))
    (same,) = run(tmp_path / "same", work("snow at night"))
    (other,) = run(tmp_path / "other", work("snow at night", seed=8))
    assert one.read_bytes() == same.read_bytes()
    assert one.read_bytes() != other.read_bytes()


def test_the_number_of_steps_does_not_change_the_picture(tmp_path: Path) -> None:
    (few,) = run(tmp_path / "few", work(steps=1))
    (many,) = run(tmp_path / "many", work(steps=9))
    assert few.read_bytes() == many.read_bytes()


@pytest.mark.parametrize(("steps", "candidates"), [(1, 1), (8, 1), (2, 4), (5, 3)])
def test_every_step_is_reported_once_in_order(steps: int, candidates: int) -> None:
    engine = PreviewEditEngine()
    seen: list[tuple[int, int]] = []
    inputs = engine.prepare(work(steps=steps, candidates=candidates, width=64, height=64), [PORTRAIT])
    generated = engine.generate(inputs, lambda step, total: seen.append((step, total)))
    assert seen == [(step, steps) for step in range(1, steps + 1)]
    assert len(generated.output.pictures) == candidates
    assert generated.denoise_s > 0


def test_the_pace_is_kept() -> None:
    engine = PreviewEditEngine(seconds_per_step=0.02)
    inputs = engine.prepare(work(steps=5, width=64, height=64), [PORTRAIT])
    started = time.perf_counter()
    generated = engine.generate(inputs, lambda step, steps: None)
    assert time.perf_counter() - started >= 0.1
    assert generated.denoise_s >= 0.1


def test_a_cancel_passes_through_and_the_engine_goes_on(tmp_path: Path) -> None:
    engine = PreviewEditEngine()
    inputs = engine.prepare(work(), [PORTRAIT])

    def cancel(step: int, steps: int) -> None:
        if step == 2:
            raise errors.Cancelled

    with pytest.raises(errors.Cancelled):
        engine.generate(inputs, cancel)
    (after,) = run(tmp_path / "after", work(), engine=engine)
    (fresh,) = run(tmp_path / "fresh", work())
    assert after.read_bytes() == fresh.read_bytes()


def test_the_result_says_that_it_is_a_preview(tmp_path: Path) -> None:
    (path,) = run(tmp_path, work(seed=41))
    with Image.open(path) as image:
        assert image.info["engine"] == "preview"
        assert image.info["seed"] == "41"
    engine = PreviewEditEngine()
    generated = engine.generate(engine.prepare(work(seed=41), [PORTRAIT]), lambda step, steps: None)
    unmarked = np.asarray(generated.output.pictures[0], np.float64)
    changed = np.argwhere((pixels(path) != unmarked).any(axis=2))
    assert len(changed) > 20
    assert changed[:, 0].min() > 128 * (1 - 2 * images.MARK_SHARE)
    assert changed[:, 1].min() > 64


@pytest.mark.parametrize("prompt", ["golden hour", "moonlight", "cinematic", "vivid", "film noir", "a hat", "sepia"])
def test_the_geometry_of_the_reference_stays(tmp_path: Path, prompt: str) -> None:
    (path,) = run(tmp_path, work(prompt, width=256, height=256))
    outlines = []
    for picture in (images.fit(images.open_rgb(PORTRAIT), 256, 256), Image.open(path).convert("RGB")):
        soft = np.asarray(picture.convert("L").filter(ImageFilter.GaussianBlur(2)), np.float64)[:230]
        outlines.append(np.hypot(*np.gradient(np.log(soft + 12))).ravel())
        picture.close()
    assert np.corrcoef(outlines)[0, 1] > 0.7


def test_prompts_change_the_light_as_they_say(tmp_path: Path) -> None:
    def result(prompt: str) -> Path:
        return run(tmp_path / prompt.replace(" ", "-"), work(prompt))[0]

    plain, warm, cold = result("a hat"), result("golden hour"), result("cold winter")
    assert warmth(warm) > warmth(plain) + 10
    assert warmth(cold) < warmth(plain) - 10
    assert pixels(result("night")).mean() < 0.7 * pixels(plain).mean()
    assert pixels(result("black and white")).std(axis=2).max() < 4
    assert pixels(result("thick fog")).std() < 0.8 * pixels(plain).std()
    assert np.abs(pixels(result("a dog")) - pixels(plain)).mean() > 1


@pytest.mark.parametrize(
    ("preset", "field"),
    [(name, "style") for name in typing.get_args(contracts.Style)]
    + [(name, "background") for name in typing.get_args(contracts.Background)],
)
def test_every_preset_changes_the_picture(tmp_path: Path, preset: str, field: str) -> None:
    (plain,) = run(tmp_path / "plain", work("x", width=64, height=64))
    (changed,) = run(tmp_path / "changed", work("x", width=64, height=64, **{field: preset}))
    assert np.abs(pixels(changed) - pixels(plain)).mean() > 3


def test_further_references_lend_their_colours(tmp_path: Path) -> None:
    sea = tmp_path / "sea.png"
    shades = np.linspace(20, 230, 64)[:, None, None] * np.array([0.1, 0.6, 1.0])
    Image.fromarray(np.broadcast_to(shades, (64, 64, 3)).astype(np.uint8)).save(sea)
    (alone,) = run(tmp_path / "alone", work("x"))
    (lent,) = run(tmp_path / "lent", work("x"), PORTRAIT, sea)
    assert warmth(lent) < warmth(alone) - 20


def test_a_prompt_is_understood_word_by_word() -> None:
    assert looks.named_looks("A NIGHT SKY over the sea, golden-hour") == ["night-sky", "beach", "golden-hour"]
    assert looks.named_looks("no fog, without snow, but rain") == ["rain"]
    assert looks.named_looks("a knight reads infrared reports") == []


def test_every_word_leads_to_a_look() -> None:
    assert set(looks.SYNONYMS) <= set(looks.LOOKS)
    assert {*typing.get_args(contracts.Style), *typing.get_args(contracts.Background)} <= set(looks.LOOKS)


def test_the_light_comes_from_the_side_that_the_prompt_names() -> None:
    left = looks.look_of(work("sunset light from the left")).lights[0].angle
    right = looks.look_of(work("sunset light from the right")).lights[0].angle
    assert (left, right) == (170, 10)


def test_what_can_never_work_is_rejected(tmp_path: Path) -> None:
    engine = PreviewEditEngine()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(errors.RejectedError, match="cut short"):
        engine.prepare(work(), [broken])
    with pytest.raises(errors.RejectedError, match="at least one reference"):
        engine.prepare(work(), [])
    animation = I2VWork(
        prompt="", negative_prompt="", steps=1, guidance_scale=1, seed=0, num_frames=5, fps=16, width=64, height=64
    )
    with pytest.raises(errors.RejectedError, match="edits"):
        engine.prepare(animation, [PORTRAIT])
