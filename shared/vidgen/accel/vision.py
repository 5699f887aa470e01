"""The vision tower of Qwen2.5-VL without what makes it wait: one attention kernel per layer, each image read once.

What is computed stays the same, up to the rounding of another attention kernel.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

# cuDNN, which torch prefers on a Hopper, makes a plan of each length of text and each size of picture that is new: tens
# of milliseconds, where these kernels take some microseconds longer.
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Masks:
    """Who may look at whom, by the segments' bounds: made once per forward for all layers, gone with its bounds."""

    def __init__(self) -> None:
        self._made: Any = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        return len(self._made)

    def of(self, bounds: Tensor, tokens: int) -> Tensor | None:
        """A (tokens, tokens) mask, True within a segment; None where there is one segment. Never waits for the device.

        `bounds` are the cumulated lengths of the segments, from 0 to `tokens`.
        """
        if bounds.shape[0] == 2:
            return None
        mask: Tensor | None = self._made.get(bounds)
        if mask is None:
            places = torch.arange(tokens, device=bounds.device, dtype=bounds.dtype)
            segments = torch.bucketize(places, bounds[1:], right=True)
            mask = self._made[bounds] = segments[:, None] == segments
        return mask


class SegmentAttention(nn.Module):
    """The attention of a vision block in one call, whatever the number of segments (windows, or whole images).

    transformers' own fetches their lengths from the device in each layer, and calls a kernel for each of hundreds of
    windows. Only its branch for flash-attention does not, which no registered attention function gets into without
    passing for flash-attention in all that the text encoder does: so it is replaced as a module.
    """

    def __init__(self, stock: Any, masks: Masks) -> None:
        super().__init__()
        self.qkv, self.proj = stock.qkv, stock.proj
        self.num_heads, self.scaling = stock.num_heads, stock.scaling
        self._masks = masks

    def forward(
        self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> Tensor:
        query, key, value = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        seen = nn.functional.scaled_dot_product_attention(
            *(one.transpose(0, 1)[None] for one in (query, key, value)),
            attn_mask=self._masks.of(cu_seqlens, hidden_states.shape[0]),
            scale=self.scaling,
        )
        out: Tensor = self.proj(seen[0].transpose(0, 1).flatten(1))
        return out


def fuse_segments(text_encoder: nn.Module) -> int:
    """Let each attention of a Qwen2.5-VL's vision tower be one call; how many those were, 0 for any other encoder."""
    masks, fused = Masks(), 0
    for block in list(text_encoder.modules()):
        stock = getattr(block, "attn", None)
        if type(stock).__name__ == "Qwen2_5_VLVisionAttention":
            block.attn = SegmentAttention(stock, masks)
            fused += 1
    return fused


def attend_without_plans(text_encoder: nn.Module) -> None:
    """Keep an encoder from kernels that each new length of text, and each new size of picture, has to wait for."""
    stock = text_encoder.forward

    @functools.wraps(stock)
    def forward(*args: Any, **options: Any) -> Any:
        with sdpa_kernel(WITHOUT_PLANS):
            return stock(*args, **options)

    text_encoder.forward = forward


@contextlib.contextmanager
def reading_once(text_encoder: nn.Module) -> Iterator[None]:
    """Within it the vision tower runs once for pixels that come again, as guidance's do with the second prompt.

    They must be the same tensor: to compare what is in two would wait for the device. Nothing is kept behind it.
    """
    model: Any = getattr(text_encoder, "model", None)
    stock = getattr(model, "get_image_features", None)
    if stock is None:
        yield
        return
    read: list[tuple[Tensor, Any]] = []

    def once(pixel_values: Tensor, *args: Any, **options: Any) -> Any:
        if not read or read[0][0] is not pixel_values:
            # The pipeline asks for the hidden states of all that runs, and looks at the language model's only.
            features = stock(pixel_values, *args, **options | {"output_hidden_states": False})
            read[:] = [(pixel_values, features)]
        return read[0][1]

    model.get_image_features = once
    try:
        yield
    finally:
        del model.get_image_features
