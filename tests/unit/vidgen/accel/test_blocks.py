"""Fused blocks compute what the stock ones do, on the tiny models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend

from vidgen.accel import blocks, fp8, kernels, speed
from vidgen.accel.kernels import e4m3, flash3, projections


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    with torch.no_grad():
        return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.fixture(scope="module")
def transformer(tiny_models: dict[str, Path]) -> Callable[[str], Any]:
    def loaded(name: str) -> Any:
        from diffusers import QwenImageTransformer2DModel, WanTransformer3DModel

        if name == "wan":  # as the tiny one, in widths that suit FP8
            torch.manual_seed(6)
            config = dict(WanTransformer3DModel.load_config(tiny_models["wan2.2-a14b-i2v"] / "transformer"))
            config |= {"attention_head_dim": 16, "cross_attn_norm": True}
            return WanTransformer3DModel.from_config(config).eval().requires_grad_(False)
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


def test_layers_that_are_in_fp8_already_are_put_side_by_side_as_they_are(transformer: Callable[[str], Any]) -> None:
    model = transformer("qwen-edit")
    fp8.quantise(model, arithmetic=False, least=16)
    wanted = model(**qwen_inputs())[0]
    assert blocks.fuse_projections(model) == 2
    assert isinstance(model.transformer_blocks[0].attn.to_qkv, fp8.Fp8Linear)
    assert error(model(**qwen_inputs())[0], wanted) < 1e-5


def test_the_kernels_of_fused_blocks_can_be_chosen_for_one_model_alone(
    transformer: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = transformer("qwen-edit"), transformer("qwen-edit")
    wanted = other(**qwen_inputs())[0]
    blocks.fuse_projections(model)
    speed.set_attention(model, "_native_math")
    seen: list[SDPBackend] = []
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda kind: seen.append(kind) or contextlib.nullcontext())

    assert error(model(**qwen_inputs())[0], wanted) < 1e-5
    assert seen == [SDPBackend.MATH] * 2
    assert torch.equal(other(**qwen_inputs())[0], wanted)
    assert seen == [SDPBackend.MATH] * 2


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

    monkeypatch.setattr(fp8.Fp8Linear, "multiply", in_float32)
    holder = nn.ModuleDict({"ff": stock})
    assert fp8.quantise(holder, arithmetic=True, least=16) == 2
    assert blocks.fuse_feed_forwards(holder) == 1
    assert isinstance(holder["ff"], blocks.Fp8FeedForward)
    assert error(holder["ff"](x), wanted) < 0.06


def in_float32(self: fp8.Fp8Linear, rows: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`Fp8Linear.multiply` as the matrix units do it, but for the precision of the sums."""
    weight = self.weight.float() * self.weight_scale
    return nn.functional.linear(rows.float() * scale, weight, self.bias).to(dtype)


@pytest.mark.parametrize(("name", "given"), [("qwen-edit", qwen_inputs()), ("wan", wan_inputs(36))])
def test_norms_that_quantise_as_they_go_change_nothing(
    transformer: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, name: str, given: dict[str, Any]
) -> None:
    monkeypatch.setattr(fp8.Fp8Linear, "multiply", in_float32)
    model = transformer(name)
    exact = model(**given)[0]
    blocks.fuse_projections(model)
    fp8.quantise(model, arithmetic=True, least=16)
    assert blocks.fuse_norms(model) == 0  # not before the feed-forwards are fused
    blocks.fuse_feed_forwards(model)
    wanted = model(**given)[0]
    assert blocks.fuse_norms(model) == 2
    assert error(model(**given)[0], wanted) < 1e-4
    assert error(model(**given)[0], exact) < 0.1


def test_two_timesteps_modulate_the_picture_and_its_references_apart(
    transformer: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import QwenImageTransformer2DModel

    monkeypatch.setattr(fp8.Fp8Linear, "multiply", in_float32)
    torch.manual_seed(5)
    stock = transformer("qwen-edit")
    model = QwenImageTransformer2DModel(**dict(stock.config) | {"zero_cond_t": True}).eval().requires_grad_(False)
    one = qwen_inputs()
    given = one | {
        "hidden_states": torch.randn(2, 2 * 24, 16), "timestep": torch.tensor([0.7, 0.4]),
        "encoder_hidden_states": torch.randn(2, 7, 16), "img_shapes": one["img_shapes"] * 2,
    }  # fmt: skip
    blocks.fuse_projections(model)
    fp8.quantise(model, arithmetic=True, least=16)
    blocks.fuse_feed_forwards(model)
    wanted = model(**given)[0]
    assert blocks.fuse_norms(model) == 2
    assert error(model(**given)[0], wanted) < 1e-4


def test_a_block_that_is_modulated_per_token_stays_as_it_is(
    transformer: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8.Fp8Linear, "multiply", in_float32)
    model = transformer("wan")
    given = wan_inputs(36)
    tokens = 3 * 4 * 4
    given["timestep"] = torch.full((1, tokens), 900)
    blocks.fuse_projections(model)
    fp8.quantise(model, arithmetic=True, least=16)
    blocks.fuse_feed_forwards(model)
    wanted = model(**given)[0]
    blocks.fuse_norms(model)
    assert error(model(**given)[0], wanted) < 1e-6


def test_a_block_that_is_modulated_per_token_can_be_compiled_too(
    transformer: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock forward was called by its class, which torch 2.13's dynamo refuses."""
    monkeypatch.setattr(fp8.Fp8Linear, "multiply", in_float32)
    model, given = transformer("wan"), wan_inputs(36)
    given["timestep"] = torch.full((1, 3 * 4 * 4), 900)
    blocks.fuse_projections(model)
    fp8.quantise(model, arithmetic=True, least=16)
    blocks.fuse_feed_forwards(model)
    assert blocks.fuse_norms(model) == 2
    wanted = model(**given)[0]
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend="eager")
    assert error(model(**given)[0], wanted) < 1e-4
    torch._dynamo.reset()


def test_a_kernel_is_told_numbers_where_the_compiler_holds_all_sizes_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the second model that one process compiled the widths came as symbols, which no kernel's constants can be."""
    told: list[Any] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            def launch(x: Any, made: Any, scale: Any, columns: Any, stride: Any, **constants: Any) -> None:
                told.extend((columns, *constants.values()))
                rows, row_scale = e4m3.rows_in_e4m3(x)
                made.copy_(rows)
                scale.copy_(row_scale)

            return launch

    monkeypatch.setattr(e4m3, "fused", lambda x: True)
    monkeypatch.setattr(e4m3, "wrap_triton", lambda kernel: Kernel())
    monkeypatch.setattr(e4m3, "_quantise_kernel", None, raising=False)
    torch._dynamo.reset()
    quantised = torch.compile(lambda x: e4m3.quantise_rows(x, False), dynamic=True, backend="eager")
    for rows, columns in ((3, 96), (5, 64)):
        assert quantised(torch.randn(rows, columns))[0].shape == (rows, columns)
    assert {type(one) for one in told} == {int, float, bool}
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "given"), [("qwen-edit", qwen_inputs()), ("wan2.2-a14b-i2v", wan_inputs(36))])
def test_attention_in_8_bits_comes_close(transformer: Callable[[str], Any], name: str, given: dict[str, Any]) -> None:
    model = transformer(name)
    wanted = model(**given)[0]
    blocks.fuse_projections(model)
    assert blocks.narrow_attention(model) == 2
    assert 0 < error(model(**given)[0], wanted) < 0.05


def test_attention_in_8_bits_takes_no_mask(transformer: Callable[[str], Any]) -> None:
    model, given = transformer("qwen-edit"), qwen_inputs()
    given["encoder_hidden_states_mask"] = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    blocks.fuse_projections(model)
    blocks.narrow_attention(model)
    with pytest.raises(ValueError, match="takes no mask"):
        model(**given)


def test_the_operators_agree_with_their_declared_shapes() -> None:
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(e4m3.quantise_rows, (torch.randn(4, 32), True), test_utils=checks)
    weights = [torch.ones(16) for _ in range(4)]
    freqs = torch.randn(6, 8, 2), torch.randn(3, 8, 2)
    joint = (torch.randn(1, 6, 3 * 2 * 16), torch.randn(1, 3, 3 * 2 * 16), *weights, *freqs, 1e-6)
    place, table = torch.zeros(4, dtype=torch.int32), torch.randn(1, 96)
    shift, scale, gate = table.chunk(3, dim=-1)
    torch.library.opcheck(projections.joint_qkv, joint, test_utils=checks)
    turned = (torch.randn(1, 6, 96), torch.ones(32), torch.ones(32), torch.randn(6, 16), torch.randn(6, 16))
    torch.library.opcheck(projections.turned_qk, (*turned, 2, 1e-6), test_utils=checks)
    rows = torch.randn(4, 32), torch.randn(4, 32)
    torch.library.opcheck(e4m3.modulated_rows, (rows[0], shift, scale, place, 1e-6), test_utils=checks)
    for one in (gate, None):
        given = (*rows, one, shift, scale, place, 1e-6)
        torch.library.opcheck(e4m3.added_modulated_rows, given, test_utils=checks)
    torch.library.opcheck(e4m3.added_rows, (*rows, gate, place), test_utils=checks)
    heads, scale = torch.randn(1, 5, 2, 16), torch.ones(1, 2)
    for mean, lengths in ((torch.randn(1, 2, 16), None), (None, torch.tensor([3], dtype=torch.int32))):
        torch.library.opcheck(flash3.spans, (heads, mean is None, lengths), test_utils=checks)
        for kind in (torch.int8, kernels.E4M3):
            torch.library.opcheck(flash3.narrowed, (heads, scale, mean, True, kind), test_utils=checks)
    parts = [heads.to(kind) for kind in (torch.int8, torch.int8, kernels.E4M3)]
    torch.library.opcheck(flash3.narrowed_by_token, (heads,), test_utils=checks)
    given = (*parts, torch.ones(1, 2, 5), scale, scale, torch.bfloat16)
    torch.library.opcheck(flash3.attended_narrow, given, test_utils=("test_faketensor",))


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    given = (one.double().transpose(1, 2) for one in (query, key, value))
    return nn.functional.scaled_dot_product_attention(*given).transpose(1, 2)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("size", [1.0, 2.5])  # of 1 attention is nearly even, of 2.5 one key has it
def test_what_all_keys_or_all_values_share_costs_attention_in_8_bits_nothing(size: float) -> None:
    query, key, value = drawn(3, 1, 600, 2, 128).unbind(0)
    query, key = query * size, key * size
    bias = torch.zeros(2, 128)
    bias[:, [3, 77]] = 40.0

    def lost(key: torch.Tensor, value: torch.Tensor) -> float:
        wanted = attention(query, key, value)
        less = wanted - wanted.mean(1, keepdim=True)  # so that a large mean hides no error
        return float((flash3.attended(query, key, value) - wanted).norm() / less.norm())

    plain = lost(key, value)
    for shifted in ((key + bias, value), (key, value + bias)):
        assert lost(*shifted) < 1.1 * plain


def test_peaks_cost_attention_in_8_bits_less_than_in_e4m3() -> None:
    query, key, value = drawn(3, 1, 600, 2, 128).unbind(0)
    query, key = query * 2.5, key * 2.5
    wanted = attention(query, key, value)
    in_e4m3 = attention(query.to(kernels.E4M3), key.to(kernels.E4M3), value)
    assert error(flash3.attended(query, key, value), wanted) < 0.5 * error(in_e4m3, wanted)


def test_a_turn_that_spreads_what_is_large_leaves_products_as_they_are() -> None:
    query, key = drawn(2, 1, 40, 2, 128).unbind(0)
    query[..., 5] *= 30
    turned = [flash3.plain_spread(one) for one in (query, key)]
    assert error((turned[0] * turned[1]).sum(-1), (query * key).sum(-1)) < 1e-5
    assert turned[0].abs().max() < 0.5 * query.abs().max()


def test_weights_that_lie_behind_one_another_are_one_without_a_copy() -> None:
    slab = torch.arange(24.0)
    first, second, third, other = (*slab[6:24].view(3, 3, 2), torch.arange(18.0, 24.0).view(3, 2))
    joined = blocks._below([first, second, third])
    assert torch.equal(joined, torch.cat([first, second, third]))
    assert joined.data_ptr() == first.data_ptr()
    apart = torch.arange(30.0)[12:18].view(3, 2)  # as far into its memory as the second is into the slab
    for rows in (
        [second, first],
        [first, third],
        [first, other],
        [first, apart],
        [first, slab.as_strided((3, 2), (1, 3), 12)],
    ):
        joined = blocks._below(rows)
        assert torch.equal(joined, torch.cat(rows))
        assert joined.data_ptr() != first.data_ptr()
