"""Transformer blocks with fewer passes over memory: projections side by side, norms and GELUs that quantise as they go.

What is computed stays the same, up to the rounding of a fused step.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vidgen.accel.ahead import ADDED_QKV, QKV
from vidgen.accel.fp8 import Fp8Linear
from vidgen.accel.kernels import e4m3, flash3, projections


class Fp8FeedForward(nn.Module):
    """diffusers' feed-forward with a tanh GELU, its two layers in FP8, the activation quantised where it is made."""

    def __init__(self, up: Fp8Linear, down: Fp8Linear) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: Tensor) -> Tensor:
        return self._down(self.up(x).reshape(-1, self.up.out_features), x.dtype).reshape(*x.shape[:-1], -1)

    def of_rows(self, rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The (rows, out) result for rows that are quantised already."""
        return self._down(self.up.multiply(rows, scale, dtype), dtype)

    def _down(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        rows, scale = e4m3.quantise_rows(hidden, True)
        return self.down.multiply(rows, scale, dtype)


class Attention:
    """What the processors share: diffusers' choice of kernels, and ours of attention in 8 bits (`narrow`)."""

    _attention_backend: Any = None
    _parallel_config: Any = None
    narrow = False

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """(batch, tokens, heads · dimension) for (batch, tokens, heads, dimension) each.

        With `lengths`, (batch,) int32, the keys behind so many are not seen.
        """
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        if self.narrow:
            if mask is not None:
                raise ValueError("attention in 8 bits takes no mask")
            return flash3.attended(query, key, value, lengths).flatten(2, 3)
        if lengths is not None:
            return flash3.attended_within(query, key, value, lengths).flatten(2, 3)
        made: Tensor = dispatch_attention_fn(
            query, key, value, attn_mask=mask, dropout_p=0.0, is_causal=False, backend=self._attention_backend,
            parallel_config=self._parallel_config,
        ).flatten(2, 3)  # fmt: skip
        return made


class JointAttention(Attention):
    """Qwen-Image's attention processor, over projections side by side."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return self.of_projections(
            attn, attn.to_qkv(hidden_states), attn.to_added_qkv(encoder_hidden_states), encoder_hidden_states_mask,
            attention_mask, image_rotary_emb, lengths,
        )  # fmt: skip

    def of_projections(
        self,
        attn: Any,
        image: Tensor,
        text: Tensor,
        text_mask: Tensor | None,
        mask: Tensor | None,
        freqs: tuple[Tensor, Tensor] | None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The attention's two outputs for its two projections, each (batch, tokens, 3 · width).

        A (batch, text tokens) `text_mask` goes before a `mask` of all tokens. With `lengths`, (batch,) int32, nobody
        sees what lies behind so many tokens of image and text, in this order: text that is padded needs no mask.
        """
        assert freqs is not None
        if text_mask is not None:
            seen = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
            mask = torch.cat([text_mask.bool(), seen], dim=1)[:, None, None, :]
        image_freqs, text_freqs = (torch.view_as_real(one) for one in freqs)
        query, key, value = projections.joint_qkv(
            image, text, attn.norm_q.weight, attn.norm_k.weight, attn.norm_added_q.weight, attn.norm_added_k.weight,
            image_freqs, text_freqs, attn.norm_q.eps, lengths,
        )  # fmt: skip
        joint = self._attend(query, key, value, mask, lengths)
        if lengths is None:
            text_part, image_part = joint[:, : text.shape[1]], joint[:, text.shape[1] :]
        else:
            image_part, text_part = joint[:, : image.shape[1]], joint[:, image.shape[1] :]
        return attn.to_out[0](image_part.contiguous()), attn.to_add_out(text_part.contiguous())


class SelfAttention(Attention):
    """Wan's self-attention processor, over projections side by side."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        return self.of_projection(attn, attn.to_qkv(hidden_states), rotary_emb, attention_mask)

    def of_projection(
        self, attn: Any, qkv: Tensor, rotary_emb: tuple[Tensor, Tensor] | None, mask: Tensor | None = None
    ) -> Tensor:
        """The attention's output for its projection, (batch, tokens, 3 · width)."""
        assert rotary_emb is not None
        cos, sin = (one.reshape(-1, one.shape[-1]) for one in rotary_emb)
        query, key = projections.turned_qk(
            qkv, attn.norm_q.weight, attn.norm_k.weight, cos, sin, attn.heads, attn.norm_q.eps
        )
        value = qkv.chunk(3, dim=-1)[2].unflatten(2, (attn.heads, -1))
        made: Tensor = attn.to_out[0](self._attend(query, key, value, mask))
        return made


def fuse_projections(model: nn.Module) -> int:
    """Put query, key and value side by side in each attention of a transformer; how many attentions those were.

    One product for three, and one quantisation of what goes in.
    """
    fused = 0
    for attention in list(model.modules()):
        kind = type(attention).__name__
        if (
            kind == "Attention"
            and type(getattr(attention, "processor", None)).__name__ == "QwenDoubleStreamAttnProcessor2_0"
        ):
            attention.to_qkv = _side_by_side(attention, QKV)
            attention.to_added_qkv = _side_by_side(attention, ADDED_QKV)
            attention.processor = JointAttention()
            fused += 1
        elif (
            kind == "WanAttention"
            and not attention.is_cross_attention
            and not isinstance(attention.processor, SelfAttention)
        ):
            attention.to_qkv = _side_by_side(attention, QKV)
            attention.processor = SelfAttention()
            fused += 1
    return fused


def fuse_feed_forwards(model: nn.Module) -> int:
    """Let the FP8 feed-forwards of a transformer quantise their activation as they make it; how many those were."""
    fused = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            layers = getattr(child, "net", None)
            if type(child).__name__ != "FeedForward" or layers is None:
                continue
            up, down = getattr(layers[0], "proj", None), layers[-1]
            tanh = getattr(layers[0], "approximate", None) == "tanh"
            if tanh and isinstance(up, Fp8Linear) and isinstance(down, Fp8Linear) and down.arithmetic:
                setattr(parent, name, Fp8FeedForward(up, down))
                fused += 1
    return fused


def fuse_norms(model: nn.Module) -> int:
    """Let the blocks of a transformer in FP8 quantise what they normalise as they do so; how many blocks those were.

    After `fuse_projections` and `fuse_feed_forwards`. The sum that a norm reads is made on the way, too.
    """
    fused = 0
    for block in model.modules():
        kind = type(block).__name__
        if kind == "QwenImageTransformerBlock" and _multiplies(
            block.attn.to_qkv, block.attn.to_added_qkv, block.img_mlp, block.txt_mlp
        ):
            block.forward = types.MethodType(_qwen_block, block)
            fused += 1
        elif (
            kind == "WanTransformerBlock"
            and _multiplies(block.attn1.to_qkv, block.attn2.to_q, block.ffn)
            # Wan 2.1 attends to the start image apart, and a few models leave a norm out: those stay as they are.
            and block.attn2.add_k_proj is None
            and isinstance(block.norm2, nn.LayerNorm)
        ):
            block.stock_forward = types.MethodType(type(block).forward, block)
            block.forward = types.MethodType(_wan_block, block)
            fused += 1
    return fused


def narrow_attention(model: nn.Module, narrow: bool = True) -> int:
    """Have the fused attentions of a transformer made in 8 bits, or not; how many there are."""
    found = attentions(model)
    for processor in found:
        processor.narrow = narrow
    return len(found)


def attentions(model: nn.Module) -> list[Attention]:
    """The processors of a transformer's fused attentions, layer by layer. After `fuse_projections`."""
    processors = [getattr(module, "processor", None) for module in model.modules()]
    return [processor for processor in processors if isinstance(processor, Attention)]


def _multiplies(*layers: nn.Module) -> bool:
    return all(
        isinstance(layer, Fp8FeedForward) or (isinstance(layer, Fp8Linear) and layer.arithmetic) for layer in layers
    )


def _qwen_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`QwenImageTransformerBlock.forward`, each norm in one pass over memory with the sum before and what follows."""
    batch, dtype = hidden_states.shape[0], hidden_states.dtype
    image_tables = block.img_mod(temb)
    text_tables = block.txt_mod(temb.chunk(2)[0] if block.zero_cond_t else temb)
    image_place, text_place = _places(hidden_states), _places(encoder_hidden_states)
    if modulate_index is not None:
        # The tables hold all pictures as they are denoised, then all as their references are.
        image_place = image_place + modulate_index.expand(batch, -1).flatten().to(torch.int32) * batch
    image = _Stream(hidden_states, image_tables, image_place, block.img_norm1.eps, block.img_norm2.eps)
    text = _Stream(encoder_hidden_states, text_tables, text_place, block.txt_norm1.eps, block.txt_norm2.eps)
    given = joint_attention_kwargs or {}
    qkv = block.attn.to_qkv.multiply(*image.first_rows(), dtype).unflatten(0, (batch, -1))
    added_qkv = block.attn.to_added_qkv.multiply(*text.first_rows(), dtype).unflatten(0, (batch, -1))
    processor: JointAttention = block.attn.processor
    image_out, text_out = processor.of_projections(
        block.attn, qkv, added_qkv, encoder_hidden_states_mask, given.get("attention_mask"), image_rotary_emb,
        given.get("lengths"),
    )  # fmt: skip
    return text.ended(text_out, block.txt_mlp), image.ended(image_out, block.img_mlp)


class _Stream:
    """One of the two streams through a block of Qwen-Image; `tables` are its (any, 6 · columns) modulations."""

    def __init__(self, x: Tensor, tables: Tensor, place: Tensor, first_eps: float, second_eps: float) -> None:
        self._shape, self._x = x.shape, x.flatten(0, 1)
        self._first, self._second = (half.chunk(3, dim=-1) for half in tables.chunk(2, dim=-1))
        self._place, self._first_eps, self._second_eps = place, first_eps, second_eps

    def first_rows(self) -> tuple[Tensor, Tensor]:
        shift, scale, _ = self._first
        made: tuple[Tensor, Tensor] = e4m3.modulated_rows(self._x, shift, scale, self._place, self._first_eps)
        return made

    def ended(self, attended: Tensor, feed_forward: Fp8FeedForward) -> Tensor:
        shift, scale, gate = self._second
        x, rows, row_scale = e4m3.added_modulated_rows(
            self._x, attended.flatten(0, 1), self._first[2], shift, scale, self._place, self._second_eps
        )
        x = e4m3.added_rows(x, feed_forward.of_rows(rows, row_scale, x.dtype), gate, self._place)
        if x.dtype == torch.float16:  # overflows in some pictures
            x = x.clip(-65504, 65504)
        return x.unflatten(0, self._shape[:2])


def _wan_block(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: tuple[Tensor, Tensor]
) -> Tensor:
    """`WanTransformerBlock.forward`, each norm in one pass over memory with the sum before and what follows."""
    if temb.ndim == 4:
        # A modulation per token (TI2V-5B): as tables they would be larger than what they modulate. Of the class it is
        # nothing that dynamo looks into.
        stock: Tensor = block.stock_forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        return stock
    batch, dtype = hidden_states.shape[0], hidden_states.dtype
    place = _places(hidden_states)
    shift, scale, gate, end_shift, end_scale, end_gate = (block.scale_shift_table + temb.float()).unbind(1)
    x = hidden_states.flatten(0, 1)
    rows, row_scale = e4m3.modulated_rows(x, shift, scale, place, block.norm1.eps)
    qkv = block.attn1.to_qkv.multiply(rows, row_scale, dtype).unflatten(0, (batch, -1))
    attended = block.attn1.processor.of_projection(block.attn1, qkv, rotary_emb).flatten(0, 1)

    # Its weight and bias are a modulation that is the same for all.
    weight, bias = (one.float().expand(batch, -1) for one in (block.norm2.weight, block.norm2.bias))
    x, rows, row_scale = e4m3.added_modulated_rows(x, attended, gate, bias, weight - 1, place, block.norm2.eps)
    query = block.attn2.to_q.multiply(rows, row_scale, dtype).unflatten(0, (batch, -1))
    attended = _cross_attended(block.attn2, query, encoder_hidden_states).flatten(0, 1)

    x, rows, row_scale = e4m3.added_modulated_rows(x, attended, None, end_shift, end_scale, place, block.norm3.eps)
    x = e4m3.added_rows(x, block.ffn.of_rows(rows, row_scale, dtype), end_gate, place)
    return x.unflatten(0, hidden_states.shape[:2])


def _cross_attended(attn: Any, query: Tensor, text: Tensor) -> Tensor:
    """What diffusers' processor makes of a projected query and of the text."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    key = attn.norm_k(attn.to_k(text))
    query, key, value = (one.unflatten(2, (attn.heads, -1)) for one in (attn.norm_q(query), key, attn.to_v(text)))
    made = dispatch_attention_fn(query, key, value, backend=attn.processor._attention_backend)
    out: Tensor = attn.to_out[0](made.flatten(2, 3))
    return out


def _places(x: Tensor) -> Tensor:
    """For each row of a (batch, tokens, columns) tensor which of the batch it is of."""
    batch, tokens = x.shape[:2]
    return torch.arange(batch, dtype=torch.int32, device=x.device)[:, None].expand(batch, tokens).flatten()


def _side_by_side(attention: Any, names: Sequence[str]) -> nn.Module:
    layers = [getattr(attention, name) for name in names]
    if isinstance(layers[0], Fp8Linear):
        weight = _below([layer.weight.data for layer in layers])
        scale = _below([layer.weight_scale.data for layer in layers])
        bias = _below([layer.bias.data for layer in layers]) if layers[0].bias is not None else None
        for name in names:
            delattr(attention, name)
        return Fp8Linear(weight, scale, bias, arithmetic=layers[0].arithmetic)
    weight = _below([layer.weight.data for layer in layers])
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=layers[0].bias is not None)
    state = {"weight": weight}
    if layers[0].bias is not None:
        state["bias"] = _below([layer.bias.data for layer in layers])
    made.load_state_dict(state, assign=True)
    for name in names:
        delattr(attention, name)
    return made.requires_grad_(False)


def _below(tensors: Sequence[Tensor]) -> Tensor:
    """The rows of all tensors, one's below another's; without a copy where they lie so already (`ahead.places`)."""
    first = tensors[0]
    begins = itertools.accumulate((one.numel() for one in tensors), initial=first.storage_offset())
    place = first.untyped_storage().data_ptr()
    if all(
        one.is_contiguous()
        and (one.dtype, one.untyped_storage().data_ptr(), one.storage_offset()) == (first.dtype, place, begin)
        for one, begin in zip(tensors, begins, strict=False)
    ):
        return first.as_strided((sum(one.shape[0] for one in tensors), *first.shape[1:]), first.stride())
    # As bytes: not every build of torch joins e4m3.
    return torch.cat([one.contiguous().view(torch.uint8) for one in tensors]).view(first.dtype)
