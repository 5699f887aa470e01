from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vidgen.accel import fp8
from vidgen.accel.kernels import e4m3


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    with torch.no_grad():
        return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def test_each_row_keeps_its_own_precision() -> None:
    x = torch.randn(8, 64) * torch.logspace(-6, 6, 8)[:, None]
    q, scale = e4m3.rows_in_e4m3(x)
    assert (q.dtype, scale.shape, scale.dtype) == (torch.float8_e4m3fn, (8, 1), torch.float32)
    for row in range(8):
        assert error(q[row].float() * scale[row], x[row]) < 0.04


def test_a_row_of_zeros_stays_zero() -> None:
    q, scale = e4m3.rows_in_e4m3(torch.zeros(2, 16))
    assert torch.equal(q.float() * scale, torch.zeros(2, 16))


@pytest.mark.parametrize("bias", [True, False])
def test_a_stored_layer_is_near_the_layer_it_was_made_of(bias: bool) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(64, 32, bias=bias)
    x = torch.randn(2, 5, 64)
    made = fp8.Fp8Linear.of(linear, arithmetic=False)
    assert made(x).shape == (2, 5, 32)
    assert error(made(x), linear(x)) < 0.04


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_is_near_the_layer_it_was_made_of(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, made_in = torch._scaled_mm, set()

    def only_bfloat16(*given: Any, out_dtype: torch.dtype, bias: torch.Tensor | None, **more: Any) -> torch.Tensor:
        made_in.add(out_dtype if bias is None else bias.dtype)
        return stock(*given, out_dtype=out_dtype, bias=bias, **more)

    monkeypatch.setattr(torch, "_scaled_mm", only_bfloat16)
    torch.manual_seed(1)
    linear = nn.Linear(64, 32, dtype=dtype)
    x = torch.randn(30, 7, 64, dtype=dtype)
    made = fp8.Fp8Linear.of(linear, arithmetic=True)
    assert made(x).dtype == dtype
    assert error(made(x), linear(x)) < 0.06
    assert made_in == {torch.bfloat16}


def test_moving_a_model_to_another_precision_does_not_widen_it() -> None:
    made = fp8.Fp8Linear.of(nn.Linear(32, 32), arithmetic=False).to(torch.bfloat16)
    assert made.weight.dtype == torch.float8_e4m3fn
    assert made.weight_scale.dtype == torch.float32


def test_only_layers_that_gain_are_replaced() -> None:
    model = nn.Sequential(nn.Linear(512, 1024), nn.Linear(1024, 8), nn.Sequential(nn.Linear(520, 512)), nn.LayerNorm(8))
    assert fp8.quantise(model, arithmetic=False) == 1
    assert isinstance(model[0], fp8.Fp8Linear)
    assert type(model[1]) is nn.Linear


def test_no_cpu_has_its_arithmetic() -> None:
    assert not fp8.has_arithmetic(torch.device("cpu"))


def test_what_an_fp8_layer_holds_are_parameters() -> None:
    """diffusers' offloading of whole blocks brought buffers to the GPU and left them there: nothing was saved."""
    layer = fp8.Fp8Linear.of(nn.Linear(32, 16), arithmetic=False)
    assert set(dict(layer.named_parameters())) == {"weight", "weight_scale", "bias"}
    assert not list(layer.buffers())
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_few_rows_get_their_bias_apart_because_cublas_has_no_kernel_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    biases: dict[int, bool] = {}

    def product(rows: torch.Tensor, weight: torch.Tensor, **given: Any) -> torch.Tensor:
        biases[len(rows)] = given["bias"] is not None
        if given["bias"] is not None and len(rows) < 44:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmulAlgoGetHeuristic`")
        made = (rows.float() * given["scale_a"]) @ (weight.float() * given["scale_b"])
        return (made if given["bias"] is None else made + given["bias"]).to(given["out_dtype"])

    monkeypatch.setattr(torch, "_scaled_mm", product)
    linear = nn.Linear(64, 32, dtype=torch.bfloat16)
    layer = fp8.Fp8Linear.of(linear, arithmetic=True)
    for rows in (1, 40, 127, 128, 300):
        x = torch.randn(rows, 64, dtype=torch.bfloat16)
        assert (layer(x) - linear(x)).norm() / linear(x).norm() < 0.05
    assert biases == {1: False, 40: False, 127: False, 128: True, 300: True}
    bare = fp8.Fp8Linear.of(nn.Linear(64, 32, bias=False), arithmetic=True)
    assert bare(torch.randn(3, 64)).shape == (3, 32)
