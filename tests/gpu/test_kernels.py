"""The Triton kernels against the same arithmetic in torch: only on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vidgen.accel import convolution, fp8, kernels
from vidgen.accel.kernels import e4m3, flash3, projections

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


@pytest.mark.parametrize("columns", [3072, 5120, 12288, 13824, 96])
@pytest.mark.parametrize("gelu", [True, False])
def test_rows_are_quantised_as_torch_does_it(columns: int, gelu: bool) -> None:
    x = drawn(300, columns) * torch.logspace(-3, 2, 300, device="cuda").bfloat16()[:, None]
    x[7] = 0
    found, scale = e4m3.quantise_rows(x, gelu)
    wanted, wanted_scale = e4m3.rows_in_e4m3(nn.functional.gelu(x.float(), approximate="tanh") if gelu else x)
    assert error(scale, wanted_scale) < 1e-5
    assert error(found.float() * scale, wanted.float() * wanted_scale) < 1e-3


def widened(parts: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [part.float() for part in parts]


def test_the_joint_inputs_of_attention_are_those_of_torch() -> None:
    heads, dimension = 24, 128
    image, text = drawn(2, 60, 3 * heads * dimension), drawn(2, 14, 3 * heads * dimension)
    norms = [drawn(dimension) for _ in range(4)]
    freqs = drawn(60, dimension // 2, 2, dtype=torch.float32), drawn(14, dimension // 2, 2, dtype=torch.float32)
    found = projections.joint_qkv(image, text, *norms, *freqs, 1e-6)
    wanted = projections.plain_joint_qkv(image, text, (norms[0], norms[1]), (norms[2], norms[3]), *freqs, 1e-6)
    for one, other in zip(widened(found), widened(wanted), strict=True):
        assert error(one, other) < 2e-3


def compiled(kernel: Any) -> int:
    return len(kernel.device_caches[torch.cuda.current_device()][0])


def test_no_number_of_tokens_has_a_kernel_compiled_in_the_middle_of_a_task() -> None:
    heads, dimension, made = 24, 128, []
    norms = [drawn(dimension) for _ in range(4)]
    cosines = drawn(128, dimension // 2, 2, dtype=torch.float32)
    for images, texts in ((64, 64), (63, 14), (1, 1)):
        image, text = drawn(2, images, 3 * heads * dimension), drawn(2, texts, 3 * heads * dimension)
        for lengths in (None, torch.full((2,), images, dtype=torch.int32, device="cuda")):
            projections.joint_qkv(image, text, *norms, cosines[:images], cosines[:texts], 1e-6, lengths)
        wide, turns = drawn(heads * dimension), drawn(images, dimension, dtype=torch.float32)
        projections.turned_qk(image, wide, wide, turns, turns, heads, 1e-6)
        made.append((compiled(projections._joint_kernel), compiled(projections._turned_kernel)))
    assert made[0] == made[1] == made[2]


def test_queries_and_keys_are_normalised_and_turned_as_torch_does_it() -> None:
    heads, dimension = 40, 128
    qkv, norms = drawn(2, 50, 3 * heads * dimension), [drawn(heads * dimension) for _ in range(2)]
    cos, sin = (drawn(50, dimension, dtype=torch.float32) for _ in range(2))
    found = projections.turned_qk(qkv, *norms, cos, sin, heads, 1e-6)
    wanted = projections.plain_turned_qk(qkv, *norms, cos, sin, heads, 1e-6)
    for one, other in zip(widened(found), widened(wanted), strict=True):
        assert error(one, other) < 2e-3


@pytest.mark.parametrize("columns", [3072, 5120, 1536, 96])
@pytest.mark.parametrize("added", ["nothing", "as it is", "gated"])
@pytest.mark.parametrize("one_place", [False, True])
def test_what_is_normalised_is_quantised_as_torch_does_it(columns: int, added: str, one_place: bool) -> None:
    x, more = drawn(300, columns), drawn(300, columns)
    shift, scale, gate = drawn(2, 3 * columns).chunk(3, dim=-1)
    place = torch.arange(300, device="cuda", dtype=torch.int32) % 2
    if one_place:
        place = place[:1].expand(300)
    given = (shift, scale, place, 1e-6)
    total = x
    if added == "nothing":
        rows, row_scale = e4m3.modulated_rows(x, *given)
    else:
        total = x + more * gate[place] if added == "gated" else x + more
        found, rows, row_scale = e4m3.added_modulated_rows(x, more, gate if added == "gated" else None, *given)
        assert error(found, total) < 5e-3
        total = found
    # A number between two of e4m3 may go to either.
    assert error(rows.float() * row_scale, e4m3.plain_modulated(total, *given)) < 0.03


@pytest.mark.parametrize(("out", "columns"), [(3072, 12288), (3072, 14336), (5120, 13824), (3072, 3072)])
def test_any_number_of_rows_is_multiplied_in_fp8_and_gets_its_bias(out: int, columns: int) -> None:
    linear = nn.Linear(columns, out, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    linear.bias.normal_()
    layer = fp8.Fp8Linear.of(linear, arithmetic=True)
    for rows in (*range(1, 80), 127, 128, 129, 214, 300):
        x = drawn(rows, columns)
        found, scale = e4m3.rows_in_e4m3(x)
        wanted = (found.float() * scale) @ (layer.weight.float() * layer.weight_scale).t() + layer.bias.float()
        assert error(layer(x), wanted) < 5e-3, rows


@pytest.mark.parametrize("columns", [3072, 96])
def test_a_gated_sum_is_rounded_once(columns: int) -> None:
    x, more = drawn(300, columns), drawn(300, columns)
    gate = drawn(2, 3 * columns).chunk(3, dim=-1)[2]
    place = torch.arange(300, device="cuda", dtype=torch.int32) % 2
    wanted = (x.float() + more.float() * gate.float()[place]).to(x.dtype)
    assert error(e4m3.added_rows(x, more, gate, place), wanted) < 1e-5


@pytest.mark.parametrize("spreads", [True, False])
@pytest.mark.parametrize("kind", [torch.int8, kernels.E4M3])
def test_heads_are_narrowed_as_torch_does_it(spreads: bool, kind: torch.dtype) -> None:
    heads = drawn(2, 1100, 3 * 5 * 128).chunk(3, dim=-1)[2].unflatten(2, (5, -1))
    wide = flash3.plain_spread(heads.float()) if spreads else heads.float()
    few = torch.tensor([700, 1], dtype=torch.int32, device="cuda")
    for found in flash3.spans(heads, spreads, few):
        assert error(found[1], wide[1, 0]) < 1e-5  # of one token all three are the token
    total, low, high = flash3.spans(heads, spreads)
    for found, wanted in ((total, wide.sum(1)), (low, wide.amin(1)), (high, wide.amax(1))):
        assert error(found, wanted) < 1e-5
    mean = total / 1100
    scale = torch.maximum(high - mean, mean - low).amax(-1) / (127 if kind == torch.int8 else 448)
    found = flash3.narrowed(heads, scale, mean, spreads, kind).float() * scale[:, None, :, None]
    centred = wide - mean[:, None]
    # Rounding to whole steps is off by anything up to half a step; to four digits by a share of the number.
    step = float(scale.square().mean().sqrt())
    assert error(found, centred) < (1.05 * step / 12**0.5 / float(centred.std()) if kind == torch.int8 else 0.03)


def test_queries_are_narrowed_one_by_one_as_torch_does_it() -> None:
    query = drawn(2, 1100, 5, 128) * drawn(2, 1100, 5, 1).exp()
    found, scale = flash3.narrowed_by_token(query)
    wanted = flash3.plain_spread(query.float())
    assert error(scale, wanted.abs().amax(-1).transpose(1, 2) / 127) < 1e-5
    assert error(found.float() * scale.transpose(1, 2)[..., None], wanted) < 0.01


@pytest.mark.parametrize("size", [1.0, 2.0])
def test_attention_in_8_bits_is_close_to_attention(size: float) -> None:
    config = pytest.importorskip("flash_attn_config")
    if not config.CONFIG["build_flags"].get("VIDGEN_INT8_SCORES"):
        pytest.skip("this FlashAttention 3 is not ours")
    query, key, value = (drawn(1, 4100, 24, 128) for _ in range(3))
    query, key = query * size, key * size + drawn(128)
    found = flash3.attended(query, key, value)
    given = (part.transpose(1, 2) for part in (query, key, value))
    wanted = nn.functional.scaled_dot_product_attention(*given).transpose(1, 2)
    assert error(found, wanted) < 0.05
    # A mean costs nothing but its rounding to bf16.
    assert error(flash3.attended(query, key, value + 4), wanted + 4) < 1e-2


@pytest.mark.parametrize(("channels", "filters"), [(96, 96), (192, 192), (384, 384), (192, 96), (96, 3), (160, 320)])
@pytest.mark.parametrize("alone", [False, True])
def test_frames_are_activated_and_convolved_as_torch_does_it(channels: int, filters: int, alone: bool) -> None:
    conv = nn.Conv3d(channels, filters, 3, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last_3d)
    x, gamma, added = drawn(2, 37, 51, channels), drawn(channels, 1, 1, 1), drawn(2, 37, 51, filters)
    room = convolution.padded(2 if alone else 4, x)
    room[:2] = 0
    convolution.activate(x, gamma, room[-2:])
    found = convolution.convolve(room, conv, added, alone=alone)

    normed = nn.functional.normalize(x.float(), dim=-1).bfloat16() * channels**0.5 * gamma.flatten()
    active = nn.functional.silu(normed).movedim(-1, 0)[None]
    # Alone, a frame has nothing before it; else the second one sees the first.
    frames = [nn.functional.conv3d(nn.functional.pad(part, (1, 1, 1, 1, 2, 0)), conv.weight, conv.bias)
              for part in (active.split(1, dim=2) if alone else [active])]  # fmt: skip
    assert error(found, torch.cat(frames, dim=2)[0].movedim(0, -1) + added) < 0.01
