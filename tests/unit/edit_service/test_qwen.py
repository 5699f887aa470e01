"""The real Qwen-Image-Edit pipeline, on a tiny checkpoint."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from tests import checkpoints

from vidgen.contracts import EditWork, I2VWork
from vidgen.errors import Cancelled, FatalError, RejectedError, RetryableError

if TYPE_CHECKING:
    from edit_service.engine.qwen import QwenEditEngine

pytestmark = pytest.mark.timeout(600)  # importing diffusers takes minutes on a machine that is busy


def work(**changes: Any) -> EditWork:
    fields: dict[str, Any] = {
        "prompt": "make it blue",
        "user_prompt": "make it blue",
        "negative_prompt": " ",
        "steps": 2,
        "true_cfg_scale": 1.0,
        "guidance_scale": 1.0,
        "seed": 7,
        "width": 96,
        "height": 64,
        "candidates": 1,
    }
    return EditWork(**fields | changes)


def tokens_of(engine: QwenEditEngine, photo: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> int:
    """How many image tokens the transformer sees of a 96 × 64 output and its reference."""
    seen: list[int] = []
    forward = engine._pipe.transformer.forward

    def looked_at(*args: Any, **options: Any) -> Any:
        seen.append(options["hidden_states"].shape[1])
        return forward(*args, **options)

    monkeypatch.setattr(engine._pipe.transformer, "forward", looked_at)
    engine.generate(engine.prepare(work(**changes), [photo]), ignore)
    monkeypatch.undo()
    return seen[0]


def ignore(step: int, steps: int) -> None:
    pass


@pytest.fixture(scope="module")
def engine(make: Callable[..., QwenEditEngine]) -> QwenEditEngine:
    return make()


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.radial_gradient("L").convert("RGB").resize((120, 90)).save(path)
    return path


@pytest.fixture
def forwards(engine: QwenEditEngine) -> Iterator[list[int]]:
    """Grows with each forward of the transformer."""
    seen: list[int] = []
    hook = engine._pipe.transformer.register_forward_hook(lambda *_: seen.append(1))
    yield seen
    hook.remove()


def pixels(engine: QwenEditEngine, photo: Path, **changes: Any) -> np.ndarray[Any, Any]:
    output = engine.generate(engine.prepare(work(**changes), [photo]), ignore).output
    return np.asarray(output.pixels)


def test_setup_says_what_was_loaded(engine: QwenEditEngine) -> None:
    assert (engine.info.name, engine.info.model) == ("qwen", "qwen-edit")
    assert (engine.info.profile, engine.info.device) == ("float32", "cpu")


def test_a_task_may_ask_for_smaller_references_than_the_engines_but_not_for_larger(
    make: Callable[..., QwenEditEngine], photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(reference_area=96 * 96)
    whole = tokens_of(engine, photo, monkeypatch)
    assert tokens_of(engine, photo, monkeypatch, reference_area=64 * 64) < whole
    assert tokens_of(engine, photo, monkeypatch, reference_area=512 * 512) == whole
    assert tokens_of(engine, photo, monkeypatch) == whole


def test_references_may_be_larger_than_a_megapixel_where_that_is_set(make: Callable[..., QwenEditEngine]) -> None:
    assert make(reference_area=2 << 20)._area_of(work()) == 2 << 20
    assert make(reference_area=2 << 20)._area_of(work(reference_area=64 * 64)) == 64 * 64
    assert make(reference_area=None)._area_of(work()) == 1 << 20


@pytest.mark.parametrize("references", [1, 2, 3])
def test_an_edit_has_exactly_the_asked_size(
    engine: QwenEditEngine, photo: Path, tmp_path: Path, references: int
) -> None:
    done = engine.generate(engine.prepare(work(width=80, height=112), [photo] * references), ignore)
    (finished,) = engine.finish(done.output, tmp_path)

    assert finished.path == tmp_path / "edit-0.png"
    assert (finished.content_type, finished.width, finished.height) == ("image/png", 80, 112)
    with Image.open(finished.path) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (80, 112))
        assert image.info["engine"] == "qwen"
        assert image.info["seed"] == "7"


def test_a_size_that_the_model_cannot_make_is_made_larger_and_cut(
    engine: QwenEditEngine, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_multiple", 64)
    assert pixels(engine, photo, width=80, height=64).shape == (1, 64, 80, 3)


def test_every_step_is_reported_in_order_and_timed(engine: QwenEditEngine, photo: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = engine.generate(engine.prepare(work(steps=3), [photo]), lambda step, steps: seen.append((step, steps)))

    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert done.denoise_s > 0
    assert done.decode_s > 0


def test_the_same_seed_gives_the_same_file_and_another_seed_another(
    engine: QwenEditEngine, photo: Path, tmp_path: Path
) -> None:
    files = []
    for number, seed in enumerate((7, 7, 8)):
        folder = tmp_path / str(number)
        folder.mkdir()
        done = engine.generate(engine.prepare(work(seed=seed), [photo]), ignore)
        files.append(engine.finish(done.output, folder)[0].path.read_bytes())

    assert files[0] == files[1]
    assert files[0] != files[2]


def test_a_candidate_is_the_edit_that_the_next_seed_makes_alone(
    engine: QwenEditEngine, photo: Path, tmp_path: Path
) -> None:
    done = engine.generate(engine.prepare(work(candidates=2), [photo]), ignore)
    alone = pixels(engine, photo, seed=8)[0]

    assert done.output.pixels.shape == (2, 64, 96, 3)
    assert not np.array_equal(*done.output.pixels)
    # The kernels may round differently for two pictures at a time.
    assert np.abs(done.output.pixels[1].astype(int) - alone).max() <= 1
    assert [f.path.name for f in engine.finish(done.output, tmp_path)] == ["edit-0.png", "edit-1.png"]


def test_guidance_of_one_is_off(engine: QwenEditEngine, photo: Path, forwards: list[int]) -> None:
    plain = pixels(engine, photo, true_cfg_scale=1.0)
    assert len(forwards) == 2
    assert np.array_equal(plain, pixels(engine, photo, true_cfg_scale=1.0, negative_prompt="red"))


def test_guidance_runs_the_negative_prompt_too(engine: QwenEditEngine, photo: Path, forwards: list[int]) -> None:
    guided = pixels(engine, photo, true_cfg_scale=4.0)
    assert len(forwards) == 4
    assert not np.array_equal(guided, pixels(engine, photo, true_cfg_scale=4.0, negative_prompt="a red car"))


def test_an_empty_negative_prompt_still_guides(engine: QwenEditEngine, photo: Path, forwards: list[int]) -> None:
    pixels(engine, photo, true_cfg_scale=4.0, negative_prompt="")
    assert len(forwards) == 4


def test_a_cancel_stops_at_its_step_and_the_engine_goes_on(
    engine: QwenEditEngine, photo: Path, forwards: list[int]
) -> None:
    before = pixels(engine, photo, steps=4)
    forwards.clear()
    cancelled = Cancelled("stop")

    def stop(step: int, steps: int) -> None:
        if step == 2:
            raise cancelled

    with pytest.raises(Cancelled) as caught:
        engine.generate(engine.prepare(work(steps=4), [photo]), stop)

    assert caught.value is cancelled
    assert len(forwards) == 2
    assert np.array_equal(before, pixels(engine, photo, steps=4))


def test_what_a_step_raises_is_never_taken_for_a_fault_of_the_model(engine: QwenEditEngine, photo: Path) -> None:
    def stop(step: int, steps: int) -> None:
        raise ValueError("CUDA error: out of memory, says the listener")

    with pytest.raises(ValueError, match="says the listener"):
        engine.generate(engine.prepare(work(), [photo]), stop)


@pytest.mark.parametrize(
    ("raised", "expected", "code"),
    [
        ("OutOfMemoryError", RetryableError, "out_of_memory"),
        ("AcceleratorError", FatalError, "cuda_error"),
        ("ValueError", RejectedError, "invalid_input"),
        ("KeyError", KeyError, None),
    ],
)
def test_a_fault_is_named_by_what_happens_next(
    engine: QwenEditEngine, photo: Path, monkeypatch: pytest.MonkeyPatch,
    raised: str, expected: type[Exception], code: str | None,
) -> None:  # fmt: skip
    import torch

    def failing(*args: Any, **kwargs: Any) -> None:
        kinds: dict[str, Exception] = {
            "OutOfMemoryError": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            "AcceleratorError": torch.AcceleratorError("CUDA error: device-side assert triggered"),
            "ValueError": ValueError("wrong"),
            "KeyError": KeyError("bug"),
        }
        raise kinds[raised]

    before = pixels(engine, photo)
    with monkeypatch.context() as patched:
        patched.setattr(engine._pipe.transformer, "forward", failing)
        with pytest.raises(expected) as caught:
            pixels(engine, photo)

    assert getattr(caught.value, "code", None) == code
    assert np.array_equal(before, pixels(engine, photo))


@pytest.mark.parametrize("count", [0, 4])
def test_none_and_four_references_are_rejected(engine: QwenEditEngine, photo: Path, count: int) -> None:
    with pytest.raises(RejectedError, match="give 1 to 3"):
        engine.prepare(work(), [photo] * count)


def test_a_single_step_is_rejected_where_it_would_give_no_picture(engine: QwenEditEngine, photo: Path) -> None:
    # The released schedule divides by zero with one step: every pixel was NaN, and the picture black.
    with pytest.raises(RejectedError, match="at least 2") as caught:
        engine.prepare(work(steps=1), [photo])
    assert caught.value.field == "steps"


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_control_tokens_of_the_model_are_rejected(engine: QwenEditEngine, photo: Path, field: str) -> None:
    with pytest.raises(RejectedError, match=r"<\|image_pad\|>") as caught:
        engine.prepare(work(**{field: "blue <|image_pad|>"}), [photo])
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_text_of_more_tokens_than_the_model_reads_is_rejected(
    engine: QwenEditEngine, photo: Path, field: str
) -> None:
    """In some scripts 4,000 characters are 6,000 tokens; behind its table of rotations a kernel read something else."""
    long = {field: "\U00012000" * 4000, "true_cfg_scale": 2.0}
    with pytest.raises(
        RejectedError, match=r"^prompt: it or the negative one has \d+ tokens .* reads 40\d\d: "
    ) as caught:
        engine.generate(engine.prepare(work(**long), [photo]), ignore)
    assert caught.value.field == "prompt"
    pixels(engine, photo)


def test_they_are_those_of_the_tokenizer_that_reads_the_text(engine: QwenEditEngine) -> None:
    assert engine._pipe.tokenizer is engine._pipe.processor.tokenizer


def test_a_file_that_is_no_image_is_rejected(engine: QwenEditEngine, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(RejectedError):
        engine.prepare(work(), [tmp_path / "notes.txt"])


def test_work_of_the_other_stage_is_rejected(engine: QwenEditEngine, photo: Path) -> None:
    other = I2VWork(
        prompt="", negative_prompt="", steps=1, guidance_scale=1, seed=0, num_frames=5, fps=16, width=64, height=64
    )
    with pytest.raises(RejectedError):
        engine.prepare(other, [photo])


def test_a_lora_is_fused_and_changes_the_picture(
    engine: QwenEditEngine, make: Callable[..., QwenEditEngine], photo: Path, tmp_path: Path
) -> None:
    file = checkpoints.lora(tmp_path, make()._pipe)

    fused = make(lora=str(file))

    assert fused._pipe.get_list_adapters() == {}
    assert not np.array_equal(pixels(engine, photo), pixels(fused, photo))
    assert np.array_equal(pixels(make(lora=str(tmp_path)), photo), pixels(fused, photo))


def test_a_lora_of_another_model_is_fatal(make: Callable[..., QwenEditEngine], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"transformer.blocks.0.nothing.lora_A.weight": torch.zeros(4, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(FatalError, match=r"other\.safetensors cannot be loaded"):
        make(lora=str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model": "somebody/unknown"}, "weights_missing"),
        ({"lora": "/nowhere/lora.safetensors"}, "weights_missing"),
        ({"device": "tpu9"}, "settings"),
        ({"dtype": "int8"}, "settings"),
    ],
)
def test_a_setting_that_cannot_be_met_is_fatal(
    make: Callable[..., QwenEditEngine], changes: dict[str, str], code: str
) -> None:
    with pytest.raises(FatalError) as caught:
        make(**changes)
    assert caught.value.code == code


def test_a_model_of_the_other_stage_is_refused(
    make: Callable[..., QwenEditEngine], tiny_models: dict[str, Path]
) -> None:
    with pytest.raises(FatalError, match="WanImageToVideoPipeline") as caught:
        make(model=str(tiny_models["wan2.1-i2v"]))
    assert caught.value.code == "weights_refused"


def test_damaged_weights_are_fatal(
    make: Callable[..., QwenEditEngine], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(tiny_models["qwen-edit"], tmp_path / "damaged")
    part = tmp_path / "damaged" / "vae" / "diffusion_pytorch_model.safetensors"
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(FatalError, match="download the model again") as caught:
        make(model=str(tmp_path / "damaged"))
    assert caught.value.code == "weights_missing"


# ── numbers that are none ────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def spoiling(module: Any, at: Callable[[int], bool] = lambda call: True, of: slice = slice(None)) -> Iterator[None]:
    """Let a module's forwards at some calls come out as NaN, for some of a batch."""
    calls = itertools.count()

    def spoil(_module: Any, _given: Any, made: Any) -> Any:
        if at(next(calls)):
            (made[0] if isinstance(made, tuple) else made)[of] = float("nan")

    hook = module.register_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize(("candidates", "step_cache"), [(1, 1), (3, 1), (1, 3)])
def test_latents_that_are_no_numbers_end_the_task_at_once_and_not_as_a_black_picture(
    make: Callable[..., QwenEditEngine], photo: Path, candidates: int, step_cache: int
) -> None:
    """They were stored as a picture, all black, and the job completed."""
    engine = make(step_cache=step_cache)
    before, told = pixels(engine, photo, steps=8, candidates=candidates), []
    wanted = engine.prepare(work(steps=8, candidates=candidates), [photo])
    with (
        spoiling(engine._pipe.transformer, at=lambda call: call == 1, of=slice(candidates - 1, None)),
        pytest.raises(RetryableError, match="the latents behind step 2") as caught,
    ):
        engine.generate(wanted, lambda step, steps: told.append(step))
    assert (caught.value.code, caught.value.state) == ("not_finite", None)
    assert told == [1, 0]  # the step was told to nobody, nor kept; then it is silent for a while
    assert np.array_equal(before, pixels(engine, photo, steps=8, candidates=candidates))


def test_pixels_that_are_no_numbers_are_no_picture_either(engine: QwenEditEngine, photo: Path) -> None:
    broken = spoiling(engine._pipe.vae.decoder, at=lambda call: call == 0)
    with broken, pytest.raises(RetryableError, match="the decoded pixels") as caught:
        pixels(engine, photo)
    assert (caught.value.code, caught.value.state) == ("not_finite", None)


def test_an_engine_that_makes_no_numbers_of_anything_is_unfit_and_its_tasks_are_not(
    engine: QwenEditEngine, photo: Path
) -> None:
    before = pixels(engine, photo)
    with spoiling(engine._pipe.transformer), pytest.raises(FatalError, match="of any task") as caught:
        pixels(engine, photo)
    assert caught.value.code == "not_finite"
    assert np.array_equal(before, pixels(engine, photo))


def test_a_cancel_comes_before_an_engine_looks_what_became_of_it(engine: QwenEditEngine, photo: Path) -> None:
    def cancel(step: int, steps: int) -> None:
        if step == 0:
            raise Cancelled

    with spoiling(engine._pipe.transformer), pytest.raises(Cancelled):
        engine.generate(engine.prepare(work(), [photo]), cancel)
