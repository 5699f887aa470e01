"""Attention by FlashAttention 3 that is told on the device how many keys there are, in 16 bits and in 8."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import wrap_triton

from vidgen.accel.kernels import COUNTS, E4M3, E4M3_MAX, HAS_TRITON, SMALLEST, fused, within

INT8_MAX = 127.0
DIMENSION = 128  # of a head, that the kernels for attention in 8 bits are laid out for
TOKENS, ROWS = 1024, 16  # that a program looks at, in all and at once, as measured on a Hopper

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _two(x, rows: tl.constexpr, lanes: tl.constexpr):  # type: ignore[no-untyped-def]
        first, second = tl.split(tl.reshape(x, (rows, lanes // 2, 2)))
        return tl.reshape(tl.join(first + second, first - second), (rows, lanes))

    @triton.jit
    def _four(x, rows: tl.constexpr, lanes: tl.constexpr):  # type: ignore[no-untyped-def]
        first, second = tl.split(tl.reshape(x, (rows, lanes // 2, 2)))
        total, less = _two(first + second, rows, lanes // 2), _two(first - second, rows, lanes // 2)
        return tl.reshape(tl.join(total, less), (rows, lanes))

    @triton.jit
    def _spread(x, rows: tl.constexpr, lanes: tl.constexpr):  # type: ignore[no-untyped-def]
        # As `plain_spread`, for eights: neighbours are in one thread's registers, and nothing moves.
        first, second = tl.split(tl.reshape(x, (rows, lanes // 2, 2)))
        total, less = _four(first + second, rows, lanes // 2), _four(first - second, rows, lanes // 2)
        return tl.reshape(tl.join(total, less), (rows, lanes)) * 0.3535533905932738

    @triton.jit(do_not_specialize=COUNTS)
    def _spans_kernel(  # type: ignore[no-untyped-def]
        x_ptr, sum_ptr, low_ptr, high_ptr, lengths_ptr, tokens, batch_stride, row_stride, bounded: tl.constexpr,
        spreads: tl.constexpr, each: tl.constexpr, rows: tl.constexpr, lanes: tl.constexpr,
    ):  # fmt: skip
        head, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        lane = tl.arange(0, lanes)
        # Reduced once, at the end: that is what the threads have to wait for one another for.
        total = tl.zeros((rows, lanes), tl.float32)
        low, high = total + float("inf"), total - float("inf")
        if bounded:
            tokens = tl.minimum(tokens, tl.load(lengths_ptr + batch))
        for first in range(0, each, rows):
            row = part * each + first + tl.arange(0, rows)[:, None]
            here = row < tokens
            at = batch.to(tl.int64) * batch_stride + row.to(tl.int64) * row_stride + head * lanes + lane[None, :]
            x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
            if spreads:
                x = _spread(x, rows, lanes)
            total += x
            low = tl.minimum(low, tl.where(here, x, float("inf")))
            high = tl.maximum(high, tl.where(here, x, -float("inf")))
        at = ((batch * tl.num_programs(1) + part) * tl.num_programs(0) + head) * lanes + lane
        tl.store(sum_ptr + at, tl.sum(total, axis=0))
        tl.store(low_ptr + at, tl.min(low, axis=0))
        tl.store(high_ptr + at, tl.max(high, axis=0))

    @triton.jit(do_not_specialize=COUNTS)
    def _narrow_kernel(  # type: ignore[no-untyped-def]
        x_ptr, to_ptr, scale_ptr, mean_ptr, tokens, batch_stride, row_stride, by_row: tl.constexpr,
        spreads: tl.constexpr, centres: tl.constexpr, whole: tl.constexpr, rows: tl.constexpr, lanes: tl.constexpr,
        largest: tl.constexpr, smallest: tl.constexpr,
    ):  # fmt: skip
        head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
        heads = tl.num_programs(1)
        row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
        lane = tl.arange(0, lanes)[None, :]
        here = row < tokens
        at = head * lanes + lane
        x = tl.load(x_ptr + batch * batch_stride + row * row_stride + at, mask=here, other=0.0).to(tl.float32)
        if spreads:
            x = _spread(x, rows, lanes)
        if centres:
            x -= tl.load(mean_ptr + batch * heads * lanes + at)
        if by_row:
            scale = tl.maximum(tl.max(tl.abs(x), axis=1) / largest, smallest)[:, None]
            tl.store(scale_ptr + (batch * heads + head) * tokens + row, scale, mask=here)
            x *= 1.0 / scale
        else:
            x *= 1.0 / tl.load(scale_ptr + batch * heads + head)
        if whole:
            x = tl.floor(x + 0.5)
        x = tl.minimum(tl.maximum(x, -largest), largest)
        tl.store(to_ptr + (batch * tokens + row) * heads * lanes + at, x.to(to_ptr.dtype.element_ty), mask=here)


@torch.library.triton_op("vidgen::spans", mutates_args=())
def spans(x: Tensor, spreads: bool, lengths: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, least and largest over the tokens of (batch, tokens, heads, dimension), each (batch, heads, dimension).

    In float32, and `spreads` of what `plain_spread` makes of it. With `lengths`, (batch,) int32, of the first ones.
    """
    if not fused(x) or x.shape[-1] != DIMENSION:
        wide = plain_spread(x.float()) if spreads else x.float()
        if lengths is None:
            return wide.sum(1), wide.amin(1), wide.amax(1)
        behind = ~within(lengths, x.shape[1])[:, :, None, None]
        ends = (wide.masked_fill(behind, value) for value in (0.0, math.inf, -math.inf))
        return next(ends).sum(1), next(ends).amin(1), next(ends).amax(1)
    batch, tokens, heads, dimension = x.shape
    x = x if x.stride(3) == 1 and x.stride(2) == dimension else x.contiguous()
    parts = -(-tokens // TOKENS)
    made = [x.new_empty((batch, parts, heads, dimension), dtype=torch.float32) for _ in range(3)]
    wrap_triton(_spans_kernel)[(heads, parts, batch)](
        x, *made, made[0] if lengths is None else lengths, tokens, x.stride(0), x.stride(1),
        bounded=lengths is not None, spreads=spreads, each=TOKENS, rows=ROWS, lanes=dimension, num_warps=8,
    )  # fmt: skip
    return made[0].sum(1), made[1].amin(1), made[2].amax(1)


@torch.library.triton_op("vidgen::narrowed", mutates_args=())
def narrowed(x: Tensor, scale: Tensor, mean: Tensor | None, spreads: bool, kind: torch.dtype) -> Tensor:
    """(x - mean) / scale in 8 bits, x as `spans` takes it; `scale` is (batch, heads), `mean` (batch, heads, dimension).

    `kind` is int8, rounded to the nearest, or e4m3.
    """
    if not fused(x) or x.shape[-1] != DIMENSION:
        wide = plain_spread(x.float()) if spreads else x.float()
        wide = wide if mean is None else wide - mean[:, None]
        return _rounded(wide * (1.0 / scale)[:, None, :, None], kind)
    return _narrowed(x, scale.contiguous(), mean, kind, by_row=False, spreads=spreads)


@torch.library.triton_op("vidgen::narrowed_by_token", mutates_args=())
def narrowed_by_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """What `plain_spread` makes of (batch, tokens, heads, dimension) in int8, with (batch, heads, tokens) scales."""
    batch, tokens, heads, dimension = x.shape
    if not fused(x) or dimension != DIMENSION:
        wide = plain_spread(x.float())
        found = (wide.abs().amax(-1) / INT8_MAX).clamp(min=SMALLEST)
        return _rounded(wide * (1.0 / found)[..., None], torch.int8), found.transpose(1, 2).contiguous()
    scale = torch.empty((batch, heads, tokens), dtype=torch.float32, device=x.device)
    return _narrowed(x, scale, None, torch.int8, by_row=True, spreads=True), scale


def _rounded(x: Tensor, kind: torch.dtype) -> Tensor:
    if kind == torch.int8:
        return torch.floor(x + 0.5).clamp(-INT8_MAX, INT8_MAX).to(kind)
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(kind)


def _narrowed(
    x: Tensor, scale: Tensor, mean: Tensor | None, kind: torch.dtype, *, by_row: bool, spreads: bool
) -> Tensor:
    batch, tokens, heads, dimension = x.shape
    x = x if x.stride(3) == 1 and x.stride(2) == dimension else x.contiguous()
    made = torch.empty(x.shape, dtype=kind, device=x.device)
    whole = kind == torch.int8
    wrap_triton(_narrow_kernel)[(-(-tokens // ROWS), heads, batch)](
        x, made, scale, scale if mean is None else mean.contiguous(), tokens, x.stride(0), x.stride(1), by_row=by_row,
        spreads=spreads, centres=mean is not None, whole=whole, rows=ROWS, lanes=dimension,
        largest=INT8_MAX if whole else E4M3_MAX, smallest=SMALLEST, num_warps=4,
    )  # fmt: skip
    return made


def plain_spread(x: Tensor) -> Tensor:
    """Turn each eight neighbours of the last dimension by a Hadamard matrix: products of two such stay the same.

    So one channel that is far larger than the others shares its size with seven before it sets the scale of all.
    """
    size = math.gcd(x.shape[-1], 8)
    turn = torch.ones(1, 1, device=x.device)
    while len(turn) < size:
        turn = torch.cat([torch.cat([turn, turn], 1), torch.cat([turn, -turn], 1)])
    return (x.unflatten(-1, (-1, size)) @ turn).flatten(-2) * size**-0.5


def attended(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Attention in 8 bits, of (batch, tokens, heads, dimension) each: scores of int8, sums of e4m3.

    A query has a scale of its own, the keys and the values of a head one. Three things are exact, and make the numbers
    small: queries and keys are turned together (`plain_spread`), softmax is the same for keys less their mean, and as
    its rows sum up to one the mean of the values can be taken off and put back.

    With `lengths` only so many keys are seen, as in `attended_within`.
    """
    turned, query_scale = narrowed_by_token(query)
    given, scales, mean = [turned], [query_scale], query_scale
    for x, kind, largest in ((key, torch.int8, INT8_MAX), (value, E4M3, E4M3_MAX)):
        scores = kind == torch.int8
        total, low, high = spans(x, scores, lengths)
        mean = total / (x.shape[1] if lengths is None else lengths[:, None, None])
        scale = (torch.maximum(high - mean, mean - low).amax(-1) / largest).clamp(min=SMALLEST)
        given.append(narrowed(x, scale, mean, scores, kind))
        scales.append(scale)
    made: Tensor = attended_narrow(*given, *scales, value.dtype, lengths)
    return made + mean[:, None].to(made.dtype)


@torch.library.custom_op("vidgen::attended_narrow", mutates_args=())
def attended_narrow(
    query: Tensor, key: Tensor, value: Tensor, query_scale: Tensor, key_scale: Tensor, value_scale: Tensor,
    dtype: torch.dtype, lengths: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention by our FlashAttention 3 of int8 queries and keys and e4m3 values, with (batch, heads) scales.

    Those of the queries are (batch, heads, tokens). With `lengths` only so many keys are seen, as in `attended_within`.
    Scores are summed up in int32, which is exact, softmax and output in float32.
    """
    if not query.is_cuda:
        scales = (query_scale, key_scale[..., None], value_scale[..., None])
        wide = [(part.float() * scale[..., None].transpose(1, 2)).to(dtype)
                for part, scale in zip((query, key, value), scales, strict=True)]  # fmt: skip
        return _plain_attended(wide[0], wide[1], wide[2], lengths)
    # Its kernel for 8 bits takes three of one type, and a scale a head: deploy/flash-attention-3/build.py has it read
    # int8 in two of them, and the scales of all of a head's queries behind the first one's.
    scales = (query_scale[..., 0], key_scale, value_scale)
    return _flash3(query.view(E4M3), key.view(E4M3), value, lengths, scales).to(dtype)


@attended_narrow.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, query_scale: Tensor, key_scale: Tensor, value_scale: Tensor,
    dtype: torch.dtype, lengths: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return query.new_empty(query.shape, dtype=dtype)


@torch.library.custom_op("vidgen::attended_within", mutates_args=())
def attended_within(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
    """Attention to the first `lengths` keys alone, by FlashAttention 3: (batch, tokens, heads, dimension) each.

    `lengths` is (batch,) int32 and read on the device, by each replay of a graph anew.
    """
    if not query.is_cuda:
        return _plain_attended(query, key, value, lengths)
    return _flash3(query, key, value, lengths)


@attended_within.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
    return torch.empty_like(query)


def _flash3(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, scales: Sequence[Tensor] = ()) -> Tensor:
    from flash_attn_interface import flash_attn_func, flash_attn_with_kvcache

    told = dict(zip(("q_descale", "k_descale", "v_descale"), scales, strict=False))
    made: Tensor = (
        flash_attn_func(query, key, value, **told) if lengths is None
        else flash_attn_with_kvcache(query, key, value, cache_seqlens=lengths, num_splits=1, **told)
    )  # fmt: skip
    return made


def _plain_attended(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None) -> Tensor:
    mask = None if lengths is None else within(lengths, key.shape[1])[:, None, None]
    given = (part.transpose(1, 2) for part in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*given, attn_mask=mask).transpose(1, 2).contiguous()
