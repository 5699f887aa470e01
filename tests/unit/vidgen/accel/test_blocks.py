"""Fused blocks compute what the stock ones do, on the tiny models."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vidgen.accel import blocks, fp8, kernels


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    with torch.no_grad():
        return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.fixture(scope="module")
def transformer(tiny_models: dict[str, Path]) -> Callable[[str], Any]:
    def loaded(name: str) -> Any:
        from diffusers import QwenImageTransformer2DModel, WanTransformer3DModel

        kind: Any = QwenImageTransformer2DModel if name.startswith("qwen") else WanTransformer3DModel
        return kind.from_pretrained(tiny_models[name] / "transformer").eval().requires_grad_(False)

    return loaded


def qwen_inputs(tokens: int = 7) -> dict[str, Any]:
    torch.manual_seed(2)
    return {
        "hidden_states": torch.randn(1, 2 * 24, 16), "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": torch.randn(1, tokens, 16), "encoder_hidden_states_mask": None,
        "img_shapes": [[(1, 4, 6), (1, 4, 6)]], "return_dict": False,
    }  # fmt: skip


def wan_inputs(channels: int) -> dict[str, Any]:
    torch.manual_seed(2)
    return {
        "hidden_states": torch.randn(1, channels, 3, 8, 8), "timestep": torch.tensor([900]),
        "encoder_hidden_states": torch.randn(1, 16, 32), "return_dict": False,
    }  # fmt: skip


def test_qwen_with_its_projections_side_by_side_is_qwen(transformer: Callable[[str], Any]) -> None:
    model = transformer("qwen-edit")
    wanted = model(**qwen_inputs())[0]
    assert blocks.fuse_projections(model) == 2
    assert not hasattr(model.transformer_blocks[0].attn, "to_q")
    assert error(model(**qwen_inputs())[0], wanted) < 1e-5


def test_a_text_mask_is_kept(transformer: Callable[[str], Any]) -> None:
    model, inputs = transformer("qwen-edit"), qwen_inputs()
    inputs["encoder_hidden_states_mask"] = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    wanted = model(**inputs)[0]
    blocks.fuse_projections(model)
    assert error(model(**inputs)[0], wanted) < 1e-5
    assert error(model(**qwen_inputs())[0], wanted) > 1e-4


def test_wan_with_its_projections_side_by_side_is_wan(transformer: Callable[[str], Any]) -> None:
    model = transformer("wan2.2-a14b-i2v")
    wanted = model(**wan_inputs(36))[0]
    assert blocks.fuse_projections(model) == 2
    assert error(model(**wan_inputs(36))[0], wanted) < 1e-5


def test_a_backend_can_be_chosen_for_fused_blocks(transformer: Callable[[str], Any]) -> None:
    model = transformer("qwen-edit")
    wanted = model(**qwen_inputs())[0]
    blocks.fuse_projections(model)
    model.set_attention_backend("_native_math")
    assert error(model(**qwen_inputs())[0], wanted) < 1e-5


@pytest.mark.parametrize("name", ["qwen-edit", "wan2.2-a14b-i2v"])
def test_feed_forwards_are_fused_only_where_fp8_is_multiplied(transformer: Callable[[str], Any], name: str) -> None:
    model = transformer(name)
    fp8.quantise(model, arithmetic=False, least=16)
    assert blocks.fuse_feed_forwards(model) == 0


def test_a_fused_feed_forward_quantises_what_the_stock_one_would(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.attention import FeedForward

    torch.manual_seed(3)
    stock = FeedForward(64, 64, activation_fn="gelu-approximate").eval()
    x = torch.randn(2, 5, 64)
    wanted = stock(x)

    def multiply(self: fp8.Fp8Linear, rows: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # As the matrix units do it, in float32.
        weight = self.weight.float() * self.weight_scale
        return nn.functional.linear(rows.float() * scale, weight, self.bias).to(dtype)

    monkeypatch.setattr(fp8.Fp8Linear, "multiply", multiply)
    holder = nn.ModuleDict({"ff": stock})
    assert fp8.quantise(holder, arithmetic=True, least=16) == 2
    assert blocks.fuse_feed_forwards(holder) == 1
    assert isinstance(holder["ff"], blocks.Fp8FeedForward)
    assert error(holder["ff"](x), wanted) < 0.06


def test_the_operators_agree_with_their_declared_shapes() -> None:
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels.quantise_rows, (torch.randn(4, 32), True), test_utils=checks)
    weights = [torch.ones(16) for _ in range(4)]
    freqs = torch.randn(6, 8, 2), torch.randn(3, 8, 2)
    given = (torch.randn(1, 6, 3 * 2 * 16), torch.randn(1, 3, 3 * 2 * 16), *weights, *freqs, 1e-6)
    torch.library.opcheck(kernels.joint_qkv, given, test_utils=checks)


@pytest.mark.skipif(not kernels.HAS_TRITON, reason="there is no Triton here: it comes with torch's builds for GPUs")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("gelu", [True, False])
def test_the_kernels_agree_with_torch(gelu: bool) -> None:
    x = torch.randn(300, 3072, device="cuda", dtype=torch.bfloat16)
    found, scale = kernels.quantise_rows(x, gelu)
    wanted, wanted_scale = kernels.rows_in_e4m3(nn.functional.gelu(x, approximate="tanh") if gelu else x)
    assert error(found.float() * scale, wanted.float() * wanted_scale) < 0.01
    assert "triton" in sys.modules
