"""Transformer blocks with fewer passes over memory: projections side by side, feed-forwards that quantise as they go.

What is computed stays the same, up to the rounding of a fused step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vidgen.accel import kernels
from vidgen.accel.fp8 import Fp8Linear


class Fp8FeedForward(nn.Module):
    """diffusers' feed-forward with a tanh GELU, its two layers in FP8, the activation quantised where it is made."""

    def __init__(self, up: Fp8Linear, down: Fp8Linear) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        rows, scale = kernels.quantise_rows(hidden.reshape(-1, hidden.shape[-1]), True)
        made: Tensor = self.down.multiply(rows, scale, x.dtype)
        return made.reshape(*x.shape[:-1], self.down.out_features)


class JointAttention:
    """Qwen-Image's attention processor, over projections side by side."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        assert image_rotary_emb is not None
        text_tokens = encoder_hidden_states.shape[1]
        mask = attention_mask
        if encoder_hidden_states_mask is not None:
            seen = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
            mask = torch.cat([encoder_hidden_states_mask.bool(), seen], dim=1)[:, None, None, :]
        image_freqs, text_freqs = (torch.view_as_real(freqs) for freqs in image_rotary_emb)
        query, key, value = kernels.joint_qkv(
            attn.to_qkv(hidden_states), attn.to_added_qkv(encoder_hidden_states), attn.norm_q.weight,
            attn.norm_k.weight, attn.norm_added_q.weight, attn.norm_added_k.weight, image_freqs, text_freqs,
            attn.norm_q.eps,
        )  # fmt: skip
        joint = dispatch_attention_fn(
            query, key, value, attn_mask=mask, dropout_p=0.0, is_causal=False, backend=self._attention_backend,
            parallel_config=self._parallel_config,
        ).flatten(2, 3)  # fmt: skip
        text, image = joint[:, :text_tokens], joint[:, text_tokens:]
        return attn.to_out[0](image.contiguous()), attn.to_add_out(text.contiguous())


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
            attention.to_qkv = _side_by_side(attention, ("to_q", "to_k", "to_v"))
            attention.to_added_qkv = _side_by_side(attention, ("add_q_proj", "add_k_proj", "add_v_proj"))
            attention.processor = JointAttention()
            fused += 1
        elif kind == "WanAttention" and not attention.is_cross_attention:
            attention.to_qkv = _side_by_side(attention, ("to_q", "to_k", "to_v"))
            attention.fused_projections = True
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


def _side_by_side(attention: Any, names: Sequence[str]) -> nn.Module:
    layers = [getattr(attention, name) for name in names]
    if isinstance(layers[0], Fp8Linear):
        # As bytes: not every build of torch joins e4m3.
        weight = torch.cat([layer.weight.view(torch.uint8) for layer in layers]).view(layers[0].weight.dtype)
        scale = torch.cat([layer.weight_scale for layer in layers])
        bias = torch.cat([layer.bias for layer in layers]) if layers[0].bias is not None else None
        for name in names:
            delattr(attention, name)
        return Fp8Linear(weight, scale, bias, arithmetic=layers[0].arithmetic)
    weight = torch.cat([layer.weight.data for layer in layers])
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=layers[0].bias is not None)
    state = {"weight": weight}
    if layers[0].bias is not None:
        state["bias"] = torch.cat([layer.bias.data for layer in layers])
    made.load_state_dict(state, assign=True)
    for name in names:
        delattr(attention, name)
    return made.requires_grad_(False)
