"""The preview i2v engine: it moves a camera over the real frame, smoothly, and says that it is a preview."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from tests import photographs

from edit_service.engine.preview import PreviewEditEngine
from i2v_service.engine import camera
from i2v_service.engine.preview import PreviewI2VEngine
from vidgen import errors, images, video
from vidgen.contracts import EditWork, I2VWork

PORTRAIT = Path(__file__).parents[3] / "examples" / "portrait.jpg"
EDIT = EditWork(
    prompt="x", user_prompt="x", negative_prompt="", steps=1, true_cfg_scale=1, guidance_scale=1, seed=0, width=256,
    height=256, candidates=1,
)  # fmt: skip


def work(prompt: str = "", **fields: Any) -> I2VWork:
    known = {
        "prompt": prompt, "negative_prompt": "", "steps": 4, "guidance_scale": 1.0, "seed": 7, "num_frames": 9,
        "fps": 16, "width": 128, "height": 80,
    }  # fmt: skip
    return I2VWork.model_validate(known | fields)


def frames_of(task: I2VWork, file: Path = PORTRAIT) -> npt.NDArray[np.float64]:
    engine = PreviewI2VEngine()
    generated = engine.generate(engine.prepare(task, [file]), lambda step, steps: None)
    return np.asarray(generated.output.frames, np.float64)


def seen(move: camera.Move, frames: int = 33) -> camera.Grid:
    """The vertices over a flat picture, 5 × 5."""
    return camera.path(move, frames, 16, np.full((5, 5), 0.35), 1.6, np.random.default_rng(3))


def test_it_is_named_preview_and_versioned() -> None:
    info = PreviewI2VEngine().info
    assert (info.name, info.model, info.device) == ("preview", "preview", "cpu")
    assert info.revision


def test_the_video_has_exactly_what_was_asked_and_says_that_it_is_a_preview(tmp_path: Path) -> None:
    engine = PreviewI2VEngine()
    task = work("zoom in", num_frames=13, fps=24, width=160, height=96, seed=41)
    generated = engine.generate(engine.prepare(task, [PORTRAIT]), lambda step, steps: None)
    film, poster = engine.finish(generated.output, tmp_path)
    assert (film.path.name, film.content_type, film.frames, film.fps) == ("video.mp4", "video/mp4", 13, 24)
    facts = video.probe(film.path)
    assert (facts.frames, facts.fps, facts.width, facts.height) == (13, 24, 160, 96)
    assert (facts.codec, facts.pix_fmt, facts.faststart) == ("h264", "yuv420p", True)
    assert facts.metadata["engine"] == "preview"
    assert facts.metadata["seed"] == "41"
    assert (poster.path.name, poster.content_type, poster.width, poster.height) == ("poster.jpg", "image/jpeg", 160, 96)
    with Image.open(poster.path) as image:
        assert (image.format, image.size) == ("JPEG", (160, 96))


@pytest.mark.parametrize("name", ["jpeg-exif", "png-text-behind-its-pixels", "webp-xmp"])
def test_what_it_makes_of_a_photograph_says_how_it_was_made_and_nothing_else(tmp_path: Path, name: str) -> None:
    photograph = tmp_path / "photograph"
    photograph.write_bytes(photographs.TELLING[name]())
    engine = PreviewI2VEngine()
    film, poster = engine.finish(
        engine.generate(engine.prepare(work(), [photograph]), lambda *_: None).output, tmp_path
    )

    assert not any(photographs.PLANTED in one.path.read_bytes() for one in (film, poster))
    assert set(video.probe(film.path).metadata) <= {"engine", "model", "revision", "seed"}
    with Image.open(poster.path) as image:
        assert not image.getexif()
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density", "comment"}


def test_the_same_seed_gives_the_same_bytes_and_a_shaking_hand_follows_the_seed(tmp_path: Path) -> None:
    def made(name: str, **fields: Any) -> bytes:
        engine = PreviewI2VEngine()
        generated = engine.generate(engine.prepare(work("handheld", **fields), [PORTRAIT]), lambda step, steps: None)
        (tmp_path / name).mkdir()
        return engine.finish(generated.output, tmp_path / name)[0].path.read_bytes()

    assert made("one") == made("same")
    assert not np.array_equal(frames_of(work("handheld")), frames_of(work("handheld", seed=8)))


@pytest.mark.parametrize(("steps", "frames"), [(1, 9), (4, 9), (30, 5)])
def test_every_step_is_reported_once_and_all_frames_are_there(steps: int, frames: int) -> None:
    engine = PreviewI2VEngine()
    reported: list[tuple[int, int]] = []
    inputs = engine.prepare(work(steps=steps, num_frames=frames), [PORTRAIT])
    generated = engine.generate(inputs, lambda step, total: reported.append((step, total)))
    assert reported == [(step, steps) for step in range(1, steps + 1)]
    assert np.array_equal(generated.output.frames, frames_of(work(steps=2, num_frames=frames)))


def test_the_pace_is_kept() -> None:
    engine = PreviewI2VEngine(seconds_per_step=0.02)
    inputs = engine.prepare(work(steps=5, num_frames=5, width=64, height=64), [PORTRAIT])
    started = time.perf_counter()
    assert engine.generate(inputs, lambda step, steps: None).denoise_s >= 0.1
    assert time.perf_counter() - started >= 0.1


def test_a_cancel_passes_through_and_the_engine_goes_on() -> None:
    engine = PreviewI2VEngine()
    inputs = engine.prepare(work(), [PORTRAIT])

    def cancel(step: int, steps: int) -> None:
        if step == 2:
            raise errors.Cancelled

    with pytest.raises(errors.Cancelled):
        engine.generate(inputs, cancel)
    again = engine.generate(inputs, lambda step, steps: None)
    assert np.array_equal(again.output.frames, frames_of(work()))


@pytest.mark.parametrize("prompt", ["", "zoom in", "pan left", "orbit around her", "handheld"])
def test_the_first_frame_is_the_picture(prompt: str) -> None:
    first = frames_of(work(prompt, num_frames=5))[0]
    picture = images.open_rgb(PORTRAIT)
    expected = np.asarray(images.fit(picture, 128, 80, images.subject_centre(picture, 128, 80)), np.float64)
    soft = [picture[:72].reshape(36, 2, 64, 2, 3).mean(axis=(1, 3)).ravel() for picture in (first, expected)]
    assert np.corrcoef(soft)[0, 1] > 0.99


def test_every_frame_moves_on() -> None:
    frames = frames_of(work("zoom in", num_frames=17))
    changes = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    assert changes.min() > 0.02
    assert changes[0] < changes[8]
    assert changes[-1] < changes[8]


def test_a_static_camera_stands_still() -> None:
    frames = frames_of(work("static camera on a tripod"))
    assert np.array_equal(frames[0], frames[-1])


def test_the_label_stays_in_place_and_is_not_doubled_over_a_marked_frame(tmp_path: Path) -> None:
    edit = PreviewEditEngine()
    flat = tmp_path / "flat.png"
    Image.new("RGB", (256, 256), (90, 110, 130)).save(flat)
    generated = edit.generate(edit.prepare(EDIT, [flat]), lambda step, steps: None)
    marked = edit.finish(generated.output, tmp_path)[0].path
    engine = PreviewI2VEngine()
    inputs = engine.prepare(work(width=256, height=256), [marked])
    unmarked = engine.prepare(work(width=256, height=256), [flat])
    # The flat picture without a label has no contrast in its corner; neither has the marked one once its strip is gone.
    corner = (round(332 * 0.7), round(332 * 0.9), 332, 332)
    assert np.asarray(inputs.picture.crop(corner), np.float64).std(axis=(0, 1)).max() < 14
    assert np.asarray(unmarked.picture.crop(corner)).std() < 20
    frames = np.asarray(engine.generate(unmarked, lambda step, steps: None).output.frames)
    labelled = [(frame != (90, 110, 130)).any(axis=2) for frame in frames]
    assert labelled[0].sum() > 20
    assert all(np.array_equal(labelled[0], other) for other in labelled)


@pytest.mark.parametrize(
    ("prompt", "field", "sign"),
    [
        ("Zoom in on her face", "zoom", 1),
        ("the camera zooms out", "zoom", -1),
        ("slow pan left", "pan", -1),
        ("panning to the right", "pan", 1),
        ("tilt up to the sky", "tilt", -1),
        ("the camera tilts down", "tilt", 1),
        ("dolly in", "dolly", 1),
        ("pull back slowly", "dolly", -1),
        ("orbit around the subject", "orbit", 1),
        ("orbits slowly to the left", "orbit", -1),
        ("hand-held documentary", "shake", 1),
        ("dutch angle", "roll", 1),
        ("leaves in the wind", "dolly", 1),
    ],
)
def test_a_prompt_moves_the_camera_as_it_says(prompt: str, field: str, sign: int) -> None:
    assert np.sign(getattr(camera.move_of(prompt), field)) == sign


def test_moves_combine_and_have_a_pace() -> None:
    both = camera.move_of("zoom in and pan right, handheld")
    assert both.zoom > 0 < both.pan
    assert both.shake > 0
    assert camera.move_of("slowly zoom in").zoom < camera.move_of("zoom in").zoom < camera.move_of("fast zoom in").zoom
    assert camera.move_of("a giant panda at sunrise") == camera.PUSH_IN


@pytest.mark.parametrize(
    "move",
    [
        camera.Move(zoom=0.4), camera.Move(zoom=-0.4), camera.Move(pan=0.3), camera.Move(tilt=-0.3),
        camera.Move(orbit=15), camera.Move(dolly=-0.35), camera.Move(shake=1.5), camera.Move(roll=8),
        camera.Move(zoom=-0.3, pan=0.3, tilt=0.2, orbit=-10, roll=4, shake=1),
    ],
)  # fmt: skip
def test_the_camera_never_looks_past_the_picture_and_never_jumps(move: camera.Move) -> None:
    looked_at = seen(move, 81)
    assert np.abs(looked_at).max() <= 1
    speed = np.diff(looked_at, axis=0)
    assert np.abs(speed).max() < 0.06
    assert np.abs(np.diff(speed, axis=0)).max() < 0.02


def test_moves_go_where_they_say() -> None:
    assert np.ptp(seen(camera.Move(zoom=0.3))[-1][..., 0]) < 1.5 < np.ptp(seen(camera.Move(zoom=0.3))[0][..., 0])
    assert np.ptp(seen(camera.Move(zoom=-0.3))[0][..., 0]) < 1.5 < np.ptp(seen(camera.Move(zoom=-0.3))[-1][..., 0])
    assert seen(camera.Move(pan=0.2))[-1][..., 0].mean() > 0.1
    assert seen(camera.Move(tilt=-0.2))[-1][..., 1].mean() < -0.1
    left, right = (np.ptp(seen(camera.Move(orbit=12))[-1][:, column, 1]) for column in (0, -1))
    assert abs(left - right) > 0.05  # the near side of a turned plane is larger


def test_what_can_never_work_is_rejected(tmp_path: Path) -> None:
    engine = PreviewI2VEngine()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    with pytest.raises(errors.RejectedError, match="empty"):
        engine.prepare(work(), [broken])
    with pytest.raises(errors.RejectedError, match="exactly one image"):
        engine.prepare(work(), [PORTRAIT, PORTRAIT])
    with pytest.raises(errors.RejectedError, match="videos"):
        engine.prepare(EDIT, [PORTRAIT])
