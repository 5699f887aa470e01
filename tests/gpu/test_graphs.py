"""CUDA graphs on a GPU: recorded and replayed they give what the same kernels gave one by one, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vidgen.accel import graphs, speed
from vidgen.accel.engine import DiffusersEngine, Layout
from vidgen.accel.kernels import flash3, projections
from vidgen.contracts import EditWork
from vidgen.errors import Suspended
from vidgen.profiles import GIB

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
    pytest.mark.timeout(600),
    # torch 2.11's own, of what it imports and finds as it compiles, and of a graph that was left in the middle.
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
]
DEVICE = torch.device("cuda:0")
Make = Callable[..., Any]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("tokens", [1, 63, 64, 200, 1000])
def test_attention_sees_so_many_keys_as_it_is_told_and_nothing_of_those_behind(tokens: int, narrow: bool) -> None:
    pytest.importorskip("flash_attn_interface")
    query, key, value = (torch.randn(1, 1088, 24, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    key[:, tokens:], value[:, tokens:] = 300, 300
    lengths = torch.tensor([tokens], dtype=torch.int32, device="cuda")
    short = (part.transpose(1, 2) for part in (query, key[:, :tokens], value[:, :tokens]))
    wanted = nn.functional.scaled_dot_product_attention(*short).transpose(1, 2)
    if narrow:
        if not speed.has_eight_bits():
            pytest.skip("this FlashAttention 3 is not ours")
        assert error(flash3.attended(query, key, value, lengths), wanted) < 0.06
    else:
        assert error(flash3.attended_within(query, key, value, lengths), wanted) < 5e-3


def test_the_joint_inputs_of_padded_text_are_those_of_torch() -> None:
    def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    image, text, norms = drawn(2, 60, 3 * 24 * 128), drawn(2, 14, 3 * 24 * 128), [drawn(128) for _ in range(4)]
    freqs = drawn(60, 64, 2, dtype=torch.float32), drawn(14, 64, 2, dtype=torch.float32)
    lengths = torch.tensor([61, 74], dtype=torch.int32, device="cuda")
    found = projections.joint_qkv(image, text, *norms, *freqs, 1e-6, lengths)
    wanted = projections.plain_joint_qkv(image, text, (norms[0], norms[1]), (norms[2], norms[3]), *freqs, 1e-6, lengths)
    assert not found[2][0, 61:].any()
    for one, other in zip(found, wanted, strict=True):
        assert error(one, other) < 2e-3


@pytest.fixture
def make(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Make:
    from edit_service.engine.qwen import QwenEditEngine

    monkeypatch.setattr(DiffusersEngine, "_memory", lambda self: 200 * GIB)
    # The tiny model's heads are too small for FlashAttention 3.
    monkeypatch.setattr(flash3, "_flash3", lambda query, key, value, lengths, scale=None: flash3._plain_attended(
        query, key, value, lengths))  # fmt: skip

    def made(**changes: Any) -> Any:
        layout = Layout(
            **{"device": str(DEVICE), "profile": "resident-bf16", "attention": "torch", "compile": "off"} | changes
        )
        engine = QwenEditEngine(
            str(tiny_models["qwen-edit"]), reference_area=64 * 64, condition_area=56 * 56, layout=layout
        )
        engine.setup()
        if engine._graphs is not None:
            graphs.predict(engine._graphs, engine._pipe.transformer)
        return engine

    return made


def inputs_of(engine: Any, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "prompt": "a red car", "user_prompt": "a red car", "negative_prompt": " ", "steps": 4, "true_cfg_scale": 3.0,
        "guidance_scale": 1.0, "seed": 7, "width": 96, "height": 64, "candidates": 1,
    }  # fmt: skip
    picture = Image.radial_gradient("L").convert("RGB").resize((120, 90))
    return engine._laid_out(EditWork(**fields | changes), (picture,))


def pixels(engine: Any, **changes: Any) -> np.ndarray[Any, Any]:
    made = engine.generate(inputs_of(engine, **changes), lambda step, steps: None)
    return np.asarray(made.output.pixels)


@pytest.mark.parametrize("compiled", ["off", "blocks"])
def test_a_graph_gives_what_its_kernels_give_one_by_one(
    make: Make, monkeypatch: pytest.MonkeyPatch, compiled: str
) -> None:
    engine = make(compile=compiled)
    same: list[bool] = []
    run = graphs.Forward.run

    def compared(forward: Any) -> torch.Tensor:
        made = run(forward)
        if forward.recorded:
            same.append(torch.equal(forward._made, forward.computed()))
        return made

    monkeypatch.setattr(graphs.Forward, "run", compared)
    works: list[dict[str, Any]] = [{}, {"prompt": "a blue car " * 9}, {"width": 128}, {"true_cfg_scale": 1.0}]
    runs, recorded = [], []
    for _ in range(3):
        runs.append([pixels(engine, **work) for work in works])
        recorded.append(len(engine._graphs))
    # What comes once in the works, such as a prompt, is recorded when they come again.
    assert 4 < recorded[0] <= recorded[1] == recorded[2]
    assert len(same) > recorded[2]
    assert all(same)
    assert engine._graphs.held() > 0
    # cuDNN may settle for other kernels of the VAE meanwhile.
    for run_of_them in runs[1:]:
        for one, other in zip(run_of_them, runs[0], strict=True):
            assert float(np.abs(one.astype(int) - other).mean()) < 2


def test_an_edit_with_graphs_is_that_without_them(make: Make) -> None:
    found, wanted = pixels(make()), pixels(make(cuda_graphs="off"))
    assert float(np.abs(found.astype(int) - wanted).mean()) < 2  # the roundings of bfloat16 differ


def test_a_run_that_was_left_goes_on_to_the_same_picture(make: Make) -> None:
    engine = make()
    inputs = inputs_of(engine)
    whole = engine.generate(inputs, lambda step, steps: None).output.pixels
    left = Suspended(2, 4)

    def leave(step: int, steps: int) -> None:
        if step == left.step:
            raise left

    with pytest.raises(Suspended):
        engine.generate(inputs, leave)
    engine._graphs.drop()  # another worker has none yet
    rest = engine.resume(inputs, lambda step, steps: None, left.state).output.pixels
    assert np.array_equal(rest, whole)


def test_sleep_gives_the_memory_of_graphs_back_and_waking_gives_the_same_picture(make: Make) -> None:
    engine = make()
    before = [pixels(engine) for _ in range(2)][-1]
    assert engine._graphs.held() > 0
    engine.sleep()
    assert (engine._graphs.held(), len(engine._graphs)) == (0, 0)
    engine.wake()
    moved = torch.empty(1 << 20, device=DEVICE)  # what the weights left is taken
    for _ in range(2):
        assert np.array_equal(pixels(engine), before)
    assert len(engine._graphs) > 0
    del moved


def test_where_memory_is_short_for_one_graph_the_others_are_recorded(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    wanted = pixels(engine)
    engine._graphs.drop()
    tried: list[int] = []

    def full(self: Any) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            tried.append(1)
            torch.empty(1 << 50, dtype=torch.uint8, device=DEVICE)
        return computed(self)

    computed = graphs.Prediction.computed
    with monkeypatch.context() as within:
        within.setattr(graphs.Prediction, "computed", full)
        for _ in range(3):
            # Without its graph nothing is padded: the roundings of bfloat16 differ.
            assert float(np.abs(pixels(engine).astype(int) - wanted).mean()) < 2
        assert len(tried) == 1
        kinds = {type(forward) for forward in engine._graphs._forwards.values() if forward.recorded}
        assert kinds == {graphs.Language, graphs.Vision}
    engine._graphs.drop()
    pixels(engine)
    assert (pixels(engine) == wanted).all()
