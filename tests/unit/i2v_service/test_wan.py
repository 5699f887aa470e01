"""The real Wan image-to-video pipeline, on tiny checkpoints of its three kinds."""

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

from vidgen import video
from vidgen.contracts import EditWork, I2VWork
from vidgen.errors import Cancelled, FatalError, RejectedError, RetryableError

if TYPE_CHECKING:
    from i2v_service.engine.wan import WanI2VEngine

pytestmark = pytest.mark.timeout(600)  # importing diffusers takes minutes on a machine that is busy

KINDS = ["wan2.1-i2v", "wan2.2-a14b-i2v", "wan2.2-ti2v-5b"]
A14B = "wan2.2-a14b-i2v"


def work(**changes: Any) -> I2VWork:
    fields: dict[str, Any] = {
        "prompt": "she walks",
        "negative_prompt": "blurred",
        "steps": 2,
        "guidance_scale": 1.0,
        "seed": 7,
        "num_frames": 5,
        "fps": 16,
        "width": 80,
        "height": 64,
    }
    return I2VWork(**fields | changes)


def ignore(step: int, steps: int) -> None:
    pass


@pytest.fixture(scope="module")
def make(tiny_models: dict[str, Path]) -> Callable[..., WanI2VEngine]:
    from i2v_service.engine.wan import WanI2VEngine
    from vidgen.accel.engine import Layout

    def made(kind: str, **changes: Any) -> WanI2VEngine:
        layout = Layout(**{name: changes.pop(name) for name in list(changes) if name in Layout.__match_args__})
        engine = WanI2VEngine(**{"model": str(tiny_models[kind]), "layout": layout} | changes)
        engine.setup()
        return engine

    return made


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, make: Callable[..., WanI2VEngine]) -> WanI2VEngine:
    return make(request.param)


@pytest.fixture(scope="module")
def two_experts(make: Callable[..., WanI2VEngine]) -> WanI2VEngine:
    return make(A14B)


@pytest.fixture(scope="module")
def frame(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("frame") / "frame.png"
    Image.radial_gradient("L").convert("RGB").resize((120, 90)).save(path)
    return path


@pytest.fixture
def forwards(two_experts: WanI2VEngine) -> Iterator[list[str]]:
    """Gets the name of the expert at each of its forwards."""
    seen: list[str] = []
    pipe = two_experts._pipe
    hooks = [
        pipe.transformer.register_forward_hook(lambda *_: seen.append("high")),
        pipe.transformer_2.register_forward_hook(lambda *_: seen.append("low")),
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def frames(engine: WanI2VEngine, frame: Path, **changes: Any) -> np.ndarray[Any, Any]:
    output = engine.generate(engine.prepare(work(**changes), [frame]), ignore).output
    return np.asarray(output.frames)


def test_a_video_has_exactly_the_asked_frames_and_size(engine: WanI2VEngine, frame: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    inputs = engine.prepare(work(num_frames=9, steps=3, fps=12), [frame])
    done = engine.generate(inputs, lambda step, steps: seen.append((step, steps)))
    clip, poster = engine.finish(done.output, tmp_path)

    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert done.denoise_s > 0
    assert done.decode_s > 0
    assert (clip.path, clip.content_type) == (tmp_path / "video.mp4", "video/mp4")
    assert (clip.width, clip.height, clip.frames, clip.fps) == (80, 64, 9, 12)
    facts = video.probe(clip.path)
    assert (facts.width, facts.height, facts.frames, facts.fps) == (80, 64, 9, 12)
    assert (facts.metadata["engine"], facts.metadata["seed"]) == ("wan", "7")
    assert (poster.path, poster.content_type) == (tmp_path / "poster.jpg", "image/jpeg")
    with Image.open(poster.path) as image:
        assert (image.format, image.size) == ("JPEG", (80, 64))


def test_the_same_seed_gives_the_same_file_and_another_seed_another(
    engine: WanI2VEngine, frame: Path, tmp_path: Path
) -> None:
    files = []
    for number, seed in enumerate((7, 7, 8)):
        folder = tmp_path / str(number)
        folder.mkdir()
        done = engine.generate(engine.prepare(work(seed=seed), [frame]), ignore)
        files.append(engine.finish(done.output, folder)[0].path.read_bytes())

    assert files[0] == files[1]
    assert files[0] != files[2]


def test_a_cancel_stops_at_its_step_and_the_engine_goes_on(engine: WanI2VEngine, frame: Path) -> None:
    before = frames(engine, frame, steps=4)
    cancelled = Cancelled("stop")
    seen: list[int] = []

    def stop(step: int, steps: int) -> None:
        seen.append(step)
        if step == 2:
            raise cancelled

    with pytest.raises(Cancelled) as caught:
        engine.generate(engine.prepare(work(steps=4), [frame]), stop)

    assert caught.value is cancelled
    assert seen == [1, 2]
    assert np.array_equal(before, frames(engine, frame, steps=4))


def test_the_5b_model_renders_multiples_of_32_and_mirrors_the_edges_to_them(
    make: Callable[..., WanI2VEngine], frame: Path
) -> None:
    engine = make("wan2.2-ti2v-5b")
    start = engine.prepare(work(width=80, height=80), [frame]).start

    assert start.size == (96, 96)
    picture = np.asarray(start)
    assert np.array_equal(picture[:, 8:16], picture[:, 7::-1])
    assert frames(engine, frame, width=80, height=80).shape == (5, 80, 80, 3)


def test_a_single_step_makes_a_video(engine: WanI2VEngine, frame: Path) -> None:
    assert frames(engine, frame, steps=1).std() > 0


def test_other_numbers_of_frames_than_4k_plus_1_are_cut_exactly(two_experts: WanI2VEngine, frame: Path) -> None:
    assert frames(two_experts, frame, num_frames=7).shape[0] == 7


def test_each_expert_has_its_part_of_the_steps(two_experts: WanI2VEngine, frame: Path, forwards: list[str]) -> None:
    frames(two_experts, frame, steps=4)
    assert len(forwards) == 4
    assert forwards == sorted(forwards)
    assert set(forwards) == {"high", "low"}


@pytest.mark.parametrize(
    ("scale", "scale_2", "each"), [(1.0, None, 1), (1.0, 1.0, 1), (3.5, None, 2), (3.5, 1.0, 2), (1.0, 3.5, 2)]
)
def test_guidance_doubles_the_forwards_unless_both_scales_are_off(
    two_experts: WanI2VEngine, frame: Path, forwards: list[str], scale: float, scale_2: float | None, each: int
) -> None:
    frames(two_experts, frame, steps=4, guidance_scale=scale, guidance_scale_2=scale_2)
    assert len(forwards) == 4 * each


def test_guidance_of_the_second_expert_alone_has_an_effect(two_experts: WanI2VEngine, frame: Path) -> None:
    plain = frames(two_experts, frame, steps=4)
    assert not np.array_equal(plain, frames(two_experts, frame, steps=4, guidance_scale_2=6.0))


def test_a_second_scale_is_left_out_where_there_is_no_second_expert(
    make: Callable[..., WanI2VEngine], frame: Path
) -> None:
    engine = make("wan2.1-i2v")
    plain = frames(engine, frame, guidance_scale=3.5)
    assert np.array_equal(plain, frames(engine, frame, guidance_scale=3.5, guidance_scale_2=2.0))


def test_a_pair_of_loras_is_fused_each_into_its_expert(
    two_experts: WanI2VEngine, make: Callable[..., WanI2VEngine], frame: Path, tmp_path: Path
) -> None:
    file = str(checkpoints.lora(tmp_path, make(A14B)._pipe))

    high, low = make(A14B, lora=file), make(A14B, lora_2=file)

    before = two_experts._pipe
    for fused, changed in ((high, "transformer"), (low, "transformer_2")):
        assert fused._pipe.get_list_adapters() == {}
        for name in ("transformer", "transformer_2"):
            old, new = (getattr(p, name).blocks[0].attn1.to_q.weight for p in (before, fused._pipe))
            assert bool((old == new).all()) == (name != changed)
    assert not np.array_equal(frames(two_experts, frame), frames(high, frame))


def test_a_second_lora_without_a_second_expert_is_fatal(make: Callable[..., WanI2VEngine], tmp_path: Path) -> None:
    with pytest.raises(FatalError, match="transformer_2"):
        make("wan2.1-i2v", lora_2=str(tmp_path))


def test_running_out_of_memory_is_retried_and_leaves_the_engine_usable(
    two_experts: WanI2VEngine, frame: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def failing(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    before = frames(two_experts, frame)
    with monkeypatch.context() as patched:
        patched.setattr(two_experts._pipe.transformer, "forward", failing)
        with pytest.raises(RetryableError) as caught:
            frames(two_experts, frame)

    assert caught.value.code == "out_of_memory"
    assert np.array_equal(before, frames(two_experts, frame))


@pytest.mark.parametrize("count", [0, 2])
def test_a_video_starts_from_exactly_one_image(two_experts: WanI2VEngine, frame: Path, count: int) -> None:
    with pytest.raises(RejectedError, match="exactly one"):
        two_experts.prepare(work(), [frame] * count)


def test_work_of_the_other_stage_is_rejected(two_experts: WanI2VEngine, frame: Path) -> None:
    other = EditWork(
        prompt="a", user_prompt="a", negative_prompt="", steps=1, true_cfg_scale=1, guidance_scale=1, seed=0,
        width=64, height=64, candidates=1,
    )  # fmt: skip
    with pytest.raises(RejectedError):
        two_experts.prepare(other, [frame])


def test_a_model_that_is_not_there_is_fatal(make: Callable[..., WanI2VEngine]) -> None:
    with pytest.raises(FatalError, match=r"vidgen weights pull") as caught:
        make(A14B, model="somebody/unknown")
    assert caught.value.code == "weights_missing"


def test_a_text_is_encoded_once(two_experts: WanI2VEngine, frame: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    hook = two_experts._pipe.text_encoder.register_forward_hook(lambda *call: encoded.append(1))
    monkeypatch.setattr(two_experts, "_texts", {})

    def clip(**changes: Any) -> np.ndarray[Any, Any]:
        encoded.clear()
        inputs = two_experts.prepare(work(guidance_scale=3.0, **changes), [frame])
        frames: np.ndarray[Any, Any] = two_experts.generate(inputs, ignore).output.frames
        return frames

    first = clip()
    assert len(encoded) == 2
    assert np.array_equal(clip(), first)
    assert not encoded
    clip(prompt="she runs")
    assert len(encoded) == 1  # the negative one is known
    hook.remove()


def test_only_the_last_texts_are_remembered(two_experts: WanI2VEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    from i2v_service.engine import wan

    monkeypatch.setattr(wan, "TEXTS", 2)
    monkeypatch.setattr(two_experts, "_texts", {})
    for text in ("one", "two", "one", "three"):
        two_experts._embedded(text)
    assert list(two_experts._texts) == ["one", "three"]


def spoil(_module: Any, _given: Any, made: Any) -> None:
    (made[0] if isinstance(made, tuple) else made).fill_(float("nan"))


def once(_module: Any, _given: Any, made: Any) -> None:
    if not hasattr(_module, "spoilt"):
        _module.spoilt = True
        spoil(_module, _given, made)


@pytest.mark.parametrize("part", ["transformer", "vae.decoder"])
def test_numbers_that_are_none_are_no_clip(engine: WanI2VEngine, frame: Path, part: str) -> None:
    """They were stored as a clip, all black, and the job completed."""
    before, module = frames(engine, frame), engine._pipe
    for name in part.split("."):
        module = getattr(module, name)
    hook = module.register_forward_hook(once)
    try:
        with pytest.raises(RetryableError) as caught:
            frames(engine, frame)
    finally:
        hook.remove()
        del module.spoilt
    assert (caught.value.code, caught.value.state) == ("not_finite", None)
    assert np.array_equal(before, frames(engine, frame))


def test_an_engine_that_makes_no_numbers_of_anything_is_unfit(engine: WanI2VEngine, frame: Path) -> None:
    hook = engine.transformers()[-1].register_forward_hook(spoil)
    try:
        with pytest.raises(FatalError) as caught:
            frames(engine, frame)
    finally:
        hook.remove()
    assert caught.value.code == "not_finite"


def test_a_text_that_came_out_as_no_numbers_is_encoded_anew(
    two_experts: WanI2VEngine, frame: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was remembered: each later task with this text, most of all the usual negative one, failed of it."""
    before = frames(two_experts, frame)
    monkeypatch.setattr(two_experts, "_texts", {})
    with spoilt_text(two_experts, at=1), pytest.raises(RetryableError) as caught:
        frames(two_experts, frame)
    assert (caught.value.code, caught.value.state) == ("not_finite", None)
    assert np.array_equal(before, frames(two_experts, frame))


def test_a_text_encoder_that_makes_no_numbers_is_found_out_though_the_texts_of_the_warm_up_are_remembered(
    two_experts: WanI2VEngine, frame: Path
) -> None:
    """What was run to find out did not ask it: such a worker took one task after another, and failed them all."""
    two_experts._run_what_works()
    with spoilt_text(two_experts), pytest.raises(FatalError) as caught:
        two_experts.generate(two_experts.prepare(work(prompt="she was never seen"), [frame]), ignore)
    assert caught.value.code == "not_finite"


@contextlib.contextmanager
def spoilt_text(engine: WanI2VEngine, at: int | None = None) -> Iterator[None]:
    """Have the text encoder's calls, or one of them, come out as no numbers."""
    calls = itertools.count(1)

    def spoil_text(_module: Any, _given: Any, made: Any) -> None:
        if next(calls) == at or at is None:
            made.last_hidden_state.fill_(float("nan"))

    hook = engine._pipe.text_encoder.register_forward_hook(spoil_text)
    try:
        yield
    finally:
        hook.remove()
