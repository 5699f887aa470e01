"""A run that is left after any step and gone on with in another pipeline ends as one that nobody interrupted."""

from __future__ import annotations

import contextlib
import functools
import gc
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from PIL import Image
from safetensors.torch import load, load_file, save, save_file

from vidgen import checkpoints, diffusion
from vidgen.accel import resume
from vidgen.checkpoints import UnusableError
from vidgen.contracts import EditWork, I2VWork, Work
from vidgen.errors import Cancelled, RetryableError, Suspended
from vidgen.weights import SAMPLE

pytestmark = pytest.mark.timeout(600)  # importing diffusers takes minutes on a machine that is busy

QWEN, A14B = "qwen-edit", "wan2.2-a14b-i2v"
KINDS = [QWEN, "wan2.1-i2v", A14B, "wan2.2-ti2v-5b"]
STEPS = 4


def work_of(kind: str, steps: int = STEPS, **changes: Any) -> Work:
    common: dict[str, Any] = {
        "prompt": "p",
        "negative_prompt": "n",
        "steps": steps,
        "seed": 7,
        "width": 64,
        "height": 64,
    }
    if kind == QWEN:
        edit: dict[str, Any] = {"user_prompt": "p", "true_cfg_scale": 4.0, "guidance_scale": 1.0, "candidates": 1}
        return EditWork(**common | edit | changes)
    return I2VWork(**common | {"guidance_scale": 3.0, "num_frames": 5, "fps": 16} | changes)


Make = Callable[..., Any]


@pytest.fixture(scope="module")
def make(tiny_models: dict[str, Path]) -> Make:
    from edit_service.engine.qwen import QwenEditEngine
    from i2v_service.engine.wan import WanI2VEngine
    from vidgen.accel.engine import Layout

    def made(kind: str, **changes: Any) -> Any:
        more = {"reference_area": 64 * 64, "condition_area": 56 * 56} if kind == QWEN else {}
        engine: Any = QwenEditEngine if kind == QWEN else WanI2VEngine
        ready = engine(str(tiny_models[kind]), layout=Layout(device="cpu", **changes), **more)
        ready.setup()
        return ready

    return made


@pytest.fixture(scope="module")
def pair(make: Make) -> Make:
    """Two engines that share nothing but their model, as two workers have them; built once."""

    @functools.cache
    def made(kind: str, dtype: str = "float32") -> tuple[Any, Any]:
        return make(kind, dtype=dtype), make(kind, dtype=dtype)

    return made


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.radial_gradient("L").convert("RGB").resize((64, 96)).save(path)
    return path


def ignore(step: int, steps: int) -> None:
    pass


class Run:
    """One run of an engine: its pixels, the latents that it decoded, and the steps that it told of."""

    def __init__(self, engine: Any, work: Work, picture: Path, state: bytes | None = None, until: int = 0) -> None:
        self.latents: list[torch.Tensor] = []
        self.seen: list[tuple[int, int]] = []
        self.left: bytes | None = None
        self.pixels: np.ndarray[Any, Any] | None = None
        vae = engine._pipe.vae
        decode = vae.decode

        def decoded(latents: torch.Tensor, **more: Any) -> Any:
            self.latents.append(latents.clone())
            return decode(latents, **more)

        def on_step(step: int, steps: int) -> None:
            self.seen.append((step, steps))
            if step == until:
                raise Suspended(step, steps)

        vae.decode = decoded
        try:
            output = engine.resume(engine.prepare(work, [picture]), on_step, state).output
            self.pixels = output.pixels if isinstance(work, EditWork) else output.frames
        except Suspended as exc:
            self.left = exc.state
        finally:
            vae.decode = decode

    def same_as(self, other: Run) -> bool:
        assert self.pixels is not None
        assert other.pixels is not None
        return torch.equal(self.latents[0], other.latents[0]) and np.array_equal(self.pixels, other.pixels)


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, "float32") for kind in KINDS), (QWEN, "bfloat16")])
def test_a_run_that_is_left_after_any_step_ends_in_another_pipeline_as_if_it_had_not_been(
    pair: Make, picture: Path, kind: str, dtype: str
) -> None:
    (engine, other), work = pair(kind, dtype), work_of(kind)
    whole = Run(engine, work, picture)
    assert whole.seen == [(step, STEPS) for step in range(1, STEPS + 1)]

    for until in range(1, STEPS):
        first = Run(engine, work, picture, until=until)
        assert first.left is not None
        second = Run(other, work, picture, first.left)

        assert first.seen + second.seen == whole.seen
        assert second.same_as(whole)


@pytest.mark.parametrize(("kind", "more"), [(QWEN, {"candidates": 2}), (A14B, {})])
def test_a_run_may_be_left_again_and_again(pair: Make, picture: Path, kind: str, more: dict[str, int]) -> None:
    (engine, other), work = pair(kind), work_of(kind, **more)
    first = Run(engine, work, picture, until=1)
    second = Run(other, work, picture, first.left, until=2)
    third = Run(engine, work, picture, second.left, until=3)
    last = Run(other, work, picture, third.left)

    assert first.seen + second.seen + third.seen + last.seen == [(step, STEPS) for step in range(1, STEPS + 1)]
    assert last.same_as(Run(engine, work, picture))


@pytest.mark.parametrize("kind", [QWEN, A14B])
def test_a_pipeline_that_went_on_is_as_good_as_new(pair: Make, picture: Path, kind: str) -> None:
    (engine, _), work = pair(kind), work_of(kind)
    before = Run(engine, work, picture)
    left = Run(engine, work, picture, until=2).left
    Run(engine, work, picture, left)

    assert Run(engine, work, picture).same_as(before)
    assert not {"step", "set_timesteps"} & set(vars(engine._pipe.scheduler))


def test_the_state_has_the_latents_the_generators_and_what_a_multistep_scheduler_gathers(
    pair: Make, picture: Path
) -> None:
    left = Run(pair(A14B)[0], work_of(A14B), picture, until=3).left
    assert left is not None
    tensors = load(left)

    assert {"latents", "generator.0", "scheduler.last_sample", "scheduler.model_outputs.1"} <= set(tensors)
    assert tensors["latents"].dtype == torch.float32
    assert tensors["generator.0"].dtype == torch.uint8


# ── refused ──────────────────────────────────────────────────────────────────────────────────────────────────────


def damaged(left: bytes) -> bytes:
    return left[: len(left) // 2]


def without_latents(left: bytes) -> bytes:
    tensors = load(left)
    del tensors["latents"]
    return save(tensors, checkpoints.metadata_of(left))


def of_something_else(left: bytes) -> bytes:
    return save({"latents": torch.zeros(1)}, {"format": "pt"})


@pytest.mark.parametrize("broken", [damaged, without_latents, of_something_else])
def test_a_state_that_cannot_be_read_is_refused(pair: Make, picture: Path, broken: Callable[[bytes], bytes]) -> None:
    (engine, _), work = pair(QWEN), work_of(QWEN)
    left = Run(engine, work, picture, until=2).left
    assert left is not None

    with pytest.raises(UnusableError):
        engine.resume(engine.prepare(work, [picture]), ignore, broken(left))


@pytest.mark.parametrize(
    ("changed", "message"), [({"steps": STEPS + 1}, "another schedule"), ({"candidates": 2}, "1 at once")]
)
def test_a_state_of_another_schedule_or_of_more_candidates_is_refused_before_any_step(
    pair: Make, picture: Path, changed: dict[str, int], message: str
) -> None:
    (engine, _), other = pair(QWEN), work_of(QWEN, **changed)
    left = Run(engine, work_of(QWEN), picture, until=2).left
    whole = Run(engine, other, picture)
    seen: list[int] = []

    with pytest.raises(UnusableError, match=message):
        engine.resume(engine.prepare(other, [picture]), lambda step, steps: seen.append(step), left)

    assert seen == []
    assert Run(engine, other, picture).same_as(whole)


@pytest.mark.parametrize("kind", [QWEN, A14B])
def test_noise_that_is_drawn_behind_a_step_is_that_of_the_whole_run(
    make: Make, picture: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These schedulers draw none behind the first; the generators are where they would be for one that does."""
    engine, work, drawn = make(kind), work_of(kind), []

    def remembered(seed: int, count: int = 1) -> list[torch.Generator]:
        drawn.append([torch.Generator("cpu").manual_seed(seed + k) for k in range(count)])
        return drawn[-1]

    monkeypatch.setattr(diffusion, "generators", remembered)
    left = Run(engine, work, picture, until=2).left
    Run(engine, work, picture, left)
    Run(engine, work, picture)
    [_, gone_on, whole] = drawn
    assert torch.equal(gone_on[0].get_state(), whole[0].get_state())
    assert not torch.equal(gone_on[0].get_state(), torch.Generator("cpu").manual_seed(7).get_state())


def test_latents_in_another_precision_are_refused(make: Make, picture: Path) -> None:
    engine, work = make(QWEN), work_of(QWEN)
    left = Run(engine, work, picture, until=2).left
    assert left is not None
    tensors = load(left)
    tensors["latents"] = tensors["latents"].bfloat16()
    with pytest.raises(UnusableError, match="takes latents as"):
        engine.resume(engine.prepare(work, [picture]), ignore, save(tensors, checkpoints.metadata_of(left)))


def test_a_state_of_weights_of_the_same_name_is_refused_where_they_are_others(
    make: Make, picture: Path, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    """It was told by the folder's name alone, and a LoRA by its path: half a picture of each came out."""
    engine, work = make(A14B), work_of(A14B)
    left = Run(engine, work, picture, until=2).left
    folder = shutil.copytree(tiny_models[A14B], tmp_path / tiny_models[A14B].name)
    same = type(engine)(str(folder), layout=engine.layout)
    same.setup()
    assert same.resume(same.prepare(work, [picture]), ignore, left).output.frames.shape[0] == work.num_frames

    [file] = (folder / "transformer_2").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-SAMPLE // 2] ^= 1
    file.write_bytes(data)
    other = type(engine)(str(folder), layout=engine.layout)
    other.setup()
    assert other.info == engine.info
    with pytest.raises(UnusableError, match="made with"):
        other.resume(other.prepare(work, [picture]), ignore, left)


def test_a_state_of_another_lora_at_the_same_path_is_refused(
    make: Make, picture: Path, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    from tests import checkpoints as tiny

    engine = make(A14B)
    file, work = tiny.lora(tmp_path, make(A14B)._pipe), work_of(A14B)

    def with_it() -> Any:
        made: Any = type(engine)(str(tiny_models[A14B]), lora=str(file), layout=engine.layout)
        made.setup()
        return made

    left = Run(with_it(), work, picture, until=2).left
    assert with_it().resume(engine.prepare(work, [picture]), ignore, left).output.frames.shape[0] == work.num_frames
    save_file({name: 2 * one for name, one in load_file(file).items()}, file)
    for unlike in (engine, with_it()):
        with pytest.raises(UnusableError, match="made with"):
            unlike.resume(engine.prepare(work, [picture]), ignore, left)


def test_a_state_made_with_other_settings_or_another_scheduler_is_refused(
    make: Make, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DPMSolverMultistepScheduler

    engine, work = make(A14B), work_of(A14B)
    left = Run(engine, work, picture, until=2).left

    content = engine._content
    engine._content = content | {"lora of transformer": "another"}
    with pytest.raises(UnusableError, match="made with"):
        engine.resume(engine.prepare(work, [picture]), ignore, left)
    engine._content = content
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "another")
        with pytest.raises(UnusableError, match="made with"):
            engine.resume(engine.prepare(work, [picture]), ignore, left)
    engine._pipe.scheduler = DPMSolverMultistepScheduler()
    with pytest.raises(UnusableError, match="of a UniPCMultistepScheduler"):
        engine.resume(engine.prepare(work, [picture]), ignore, left)


def test_a_state_made_with_other_kernels_for_attention_is_refused_though_the_setting_is_the_same(
    make: Make, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `auto` a Hopper has FlashAttention 3, and another GPU, or an image without it, has torch's."""
    engine, work = make(A14B), work_of(A14B)
    assert (engine.layout.attention, engine._attention) == ("auto", "torch")
    left = Run(engine, work, picture, until=2).left
    monkeypatch.setattr(engine, "layout", replace(engine.layout, attention="torch"))
    assert engine.resume(engine.prepare(work, [picture]), ignore, left).output.frames.shape[0] == 5
    monkeypatch.setattr(engine, "_attention", "flash3")
    with pytest.raises(UnusableError, match="made with"):
        engine.resume(engine.prepare(work, [picture]), ignore, left)


def test_what_a_scheduler_has_that_cannot_be_kept_leaves_no_state_and_says_so(make: Make, picture: Path) -> None:
    engine, work = make(A14B), work_of(A14B)
    engine._pipe.scheduler.odd = object()

    with structlog.testing.capture_logs() as logs:
        stopped = Run(engine, work, picture, until=2)

    assert stopped.left is None
    assert stopped.pixels is None
    assert [entry["event"] for entry in logs] == ["a checkpoint cannot keep the scheduler's odd: it is of type object"]


@pytest.mark.parametrize("kind", [QWEN, A14B])
@pytest.mark.parametrize("end", ["done", "cancelled", "left", "no room"])
def test_what_a_run_had_on_the_device_is_free_behind_it(
    pair: Make, picture: Path, kind: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was so when the garbage collector looked, which is rarely: some latents more were there with each clip."""
    engine, _ = pair(kind)
    runs: list[weakref.ref[Any]] = []

    class Known(resume.Course):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            runs.append(weakref.ref(self))

    def on_step(step: int, steps: int) -> None:
        if step == 3 and end in ("cancelled", "left"):
            raise Cancelled if end == "cancelled" else Suspended(step, steps)

    def decode(*given: Any, **more: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(resume, "Course", Known)
    if end == "no room":
        monkeypatch.setattr(engine._pipe.vae, "decode", decode)
    inputs = engine.prepare(work_of(kind), [picture])
    gc.disable()
    try:
        with contextlib.suppress(Cancelled, RetryableError):
            engine.generate(inputs, on_step)
        assert [run() for run in runs] == [None] * (2 if end == "no room" else 1)
    finally:
        gc.enable()
