"""The Triton kernels against the same arithmetic in torch: only on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vidgen.accel import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


@pytest.mark.parametrize("columns", [3072, 5120, 13824])
@pytest.mark.parametrize("gelu", [True, False])
def test_rows_are_quantised_as_torch_does_it(columns: int, gelu: bool) -> None:
    x = drawn(300, columns)
    found, scale = kernels.quantise_rows(x, gelu)
    wanted, wanted_scale = kernels.rows_in_e4m3(nn.functional.gelu(x, approximate="tanh") if gelu else x)
    assert error(found.float() * scale, wanted.float() * wanted_scale) < 1e-3


def test_the_joint_inputs_of_attention_are_those_of_torch() -> None:
    heads, dimension = 24, 128
    image, text = drawn(2, 60, 3 * heads * dimension), drawn(2, 14, 3 * heads * dimension)
    norms = [drawn(dimension) for _ in range(4)]
    freqs = drawn(60, dimension // 2, 2, dtype=torch.float32), drawn(14, dimension // 2, 2, dtype=torch.float32)
    found = kernels.joint_qkv(image, text, *norms, *freqs, 1e-6)
    wanted = kernels.plain_joint_qkv(image, text, (norms[0], norms[1]), (norms[2], norms[3]), *freqs, 1e-6)
    for one, other in zip(found, wanted, strict=True):
        assert error(one, other) < 1e-3
