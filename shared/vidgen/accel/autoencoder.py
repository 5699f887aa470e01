"""The VAEs of Wan and Qwen-Image with less to do: blocks in two kernels a convolution, and still frames encoded once.

What is computed stays the same, up to the rounding of a fused step; to the last bit where frames stand still.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vidgen.accel import convolution

BLOCKS = frozenset({"WanResidualBlock", "QwenImageResidualBlock"})
UPSAMPLES = frozenset({"WanUpsample", "QwenImageUpsample"})
KEPT = 2  # frames, that a convolution sees again with the next ones
Cache = list[Any]


# ── fused ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def fuse_blocks(vae: Any) -> int:
    """Let a VAE normalise, activate and convolve in two kernels; how many of its residual blocks do so.

    What they keep in the VAE's cache from one chunk of frames to the next is then padded.
    """
    fused = 0
    for module in vae.modules():
        kind = type(module).__name__
        if kind in BLOCKS and _suits(module.norm1, module.conv1) and _suits(module.norm2, module.conv2):
            module.forward = types.MethodType(_block, module)
            fused += 1
        elif kind in UPSAMPLES:
            # Theirs copies pixels by way of float32: twice the bytes, for the same numbers.
            module.forward = types.MethodType(nn.Upsample.forward, module)
    for half in (vae.encoder, vae.decoder):
        if fused and _suits(half.norm_out, half.conv_out):
            # The last convolution activates what it is given, with the frames that were kept for it.
            half.conv_out.forward = functools.partial(_head, half.norm_out, half.conv_out)
            half.norm_out.forward, half.nonlinearity = _as_it_is, nn.Identity()
    return fused


def _suits(norm: Any, conv: Any) -> bool:
    return convolution.suits(conv) and not torch.is_tensor(norm.bias)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _head(norm: Any, conv: nn.Conv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """`conv_out` of what is not activated yet."""
    if cache_x is None:
        cache_x = x[:, :, :0]
    made = []
    for one, kept in zip(_rows(x), _rows(cache_x), strict=True):
        room = convolution.padded(KEPT + len(one), one)
        begin = KEPT - len(kept)
        room[:begin] = 0
        convolution.activate(torch.cat([kept, one]), norm.gamma, room[begin:])
        made.append(convolution.convolve(room, conv, None))
    return _video(made)


def _block(block: Any, x: Tensor, feat_cache: Cache | None = None, feat_idx: list[int] | None = None) -> Tensor:
    """A residual block's `forward`."""
    added = _rows(block.conv_shortcut(x))
    first = _through(block.norm1, block.conv1, _rows(x), [None] * len(x), feat_cache, feat_idx)
    return _video(_through(block.norm2, block.conv2, first, added, feat_cache, feat_idx))


def _through(
    norm: Any, conv: nn.Conv3d, clips: list[Tensor], added: list[Any], feat_cache: Cache | None, feat_idx: Any
) -> list[Tensor]:
    """One convolution of the frames of each clip, those before them from the cache, which gets the last ones."""
    before: list[Any] = [None] * len(clips)
    if feat_cache is not None:
        before = feat_cache[feat_idx[0]] or before
        feat_cache[feat_idx[0]] = []
    made = []
    for one, kept, more in zip(clips, before, added, strict=True):
        alone = kept is None and len(one) == 1
        lead = 0 if alone else KEPT
        room = convolution.padded(lead + len(one), one)
        if not alone:
            begin = KEPT if kept is None else KEPT - len(kept)
            room[:begin] = 0
            if kept is not None:
                room[begin:KEPT] = kept
        convolution.activate(one, norm.gamma, room[lead:])
        made.append(convolution.convolve(room, conv, more, alone=alone))
        if feat_cache is not None:
            feat_cache[feat_idx[0]].append(room if alone else room[-KEPT:].clone())
    if feat_cache is not None:
        feat_idx[0] += 1
    return made


def _rows(x: Tensor) -> list[Tensor]:
    """Each of a batch as contiguous (frames, height, width, channels)."""
    return [one.movedim(0, -1).contiguous() for one in x]


def _video(clips: list[Tensor]) -> Tensor:
    """(batch, channels, frames, height, width) of what `_rows` gives, in memory as it is there."""
    joined = clips[0][None] if len(clips) == 1 else torch.stack(clips)
    return joined.movedim(-1, 1)


# ── at rest ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def let_rest(vae: Any) -> int:
    """Let the encoder's layers do nothing for frames that would come out as those before; how many layers can.

    A video's condition is one picture and then frames of zeros. A layer that was given the same chunk twice, and kept
    the same frames of it, gives the same again: the first layers, which are the largest, are soon at rest.
    """
    layers = [_Layer(layer) for layer in (*vae.encoder.down_blocks, vae.encoder.mid_block)]
    keepers: list[_First | _Layer] = [_First(vae.encoder.conv_in), *layers]
    encode = vae._encode

    def encoded(x: Tensor) -> Tensor:
        try:
            made: Tensor = encode(x)
            return made
        finally:
            for keeper in keepers:
                keeper.forget()

    vae._encode = encoded
    return len(layers)


def rests(vae: Any) -> bool:
    """Whether `let_rest` was here."""
    return isinstance(getattr(vae.encoder.conv_in.forward, "__self__", None), _First)


class _First:
    """The encoder's first convolution: of the same frames behind the same frames it gives the same tensor again."""

    def __init__(self, conv: Any) -> None:
        self._stock: Callable[..., Tensor] = conv.forward
        conv.forward = self.forward
        self.forget()

    def forget(self) -> None:
        self._given: tuple[Tensor, Tensor | None] | None = None
        self._made: Tensor | None = None

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if self._made is None or self._given is None or not _alike((x, cache_x), self._given):
            self._given, self._made = (x, cache_x), self._stock(x, cache_x)
        return self._made


class _Layer:
    """A layer of the encoder, with the caches of its convolutions."""

    def __init__(self, layer: Any) -> None:
        self._stock: Callable[..., Tensor] = layer.forward
        layer.forward = self.forward
        self.forget()

    def forget(self) -> None:
        self._given: Tensor | None = None
        self._made: Tensor | None = None
        self._resting, self._end = False, 0

    def forward(self, x: Tensor, feat_cache: Cache | None = None, feat_idx: list[int] | None = None) -> Tensor:
        if feat_cache is None or feat_idx is None:
            return self._stock(x)
        if self._resting and x is self._given and self._made is not None:
            feat_idx[0] = self._end
            return self._made
        again, begin = x is self._given, feat_idx[0]
        before = list(feat_cache)
        self._given, self._made = x, self._stock(x, feat_cache=feat_cache, feat_idx=feat_idx)
        self._end = feat_idx[0]
        self._resting = again and _alike(before[begin : self._end], feat_cache[begin : self._end])
        return self._made


def _alike(one: Any, other: Any) -> bool:
    """Whether caches hold the same: tensors, lists of them, or what is not there yet."""
    if torch.is_tensor(one) and torch.is_tensor(other):
        return one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    return one is None and other is None
