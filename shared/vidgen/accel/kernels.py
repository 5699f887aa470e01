"""Fused kernels in Triton, each beside the same arithmetic in plain torch, which serves where there is no Triton.

They are operators that `torch.compile` looks into and launches by itself: in a small picture an operator that Python is
called for takes longer than its kernel. What they save is traffic: inductor's own fusions of these patterns read a row
two or three times, these once.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import wrap_triton

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0  # the largest e4m3 number
INT8_MAX = 127.0
DIMENSION = 128  # of a head, that the kernels for attention in 8 bits are laid out for
TOKENS, ROWS = 1024, 16  # that a program looks at, in all and at once, as measured on a Hopper
SMALLEST = 1e-12  # a row of zeros has no magnitude to divide by
HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_TRITON:
    import triton
    import triton.language as tl

    # A row is worked on in `parts` of `block` numbers each, which are `whole` if they are all there. What bounds these
    # kernels is as much the number of instructions as memory: exponentials and quotients without the care for the very
    # smallest numbers, no rounding in between, no clamp where the conversion saturates by itself. Compiled code hands
    # an `eps` over in float64, which must not spread.

    @triton.jit
    def _gelu(value):  # type: ignore[no-untyped-def]
        # 0.5 (1 + tanh z) is the sigmoid of 2 z, here with the factors of z and of a power of two in one.
        power = value * (-2.3022081983 - 0.1029432396 * value * value)
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [power], dtype=tl.float32, is_pure=True, pack=1
        )
        return value * tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def _loaded(ptr, at, columns, whole: tl.constexpr):  # type: ignore[no-untyped-def]
        if whole:
            return tl.load(ptr + at)
        return tl.load(ptr + at, mask=at < columns, other=0.0)

    @triton.jit
    def _stored(ptr, at, value, columns, whole: tl.constexpr):  # type: ignore[no-untyped-def]
        if whole:
            tl.store(ptr + at, value)
        else:
            tl.store(ptr + at, value, mask=at < columns)

    @triton.jit
    def _quantise_kernel(  # type: ignore[no-untyped-def]
        x_ptr, q_ptr, s_ptr, columns, stride, gelu: tl.constexpr, largest: tl.constexpr, smallest: tl.constexpr,
        block: tl.constexpr, parts: tl.constexpr, whole: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, block)
        values = ()
        top = tl.zeros((block,), tl.float32)
        for part in tl.static_range(parts):
            value = _loaded(x_ptr + row * stride, at + part * block, columns, whole).to(tl.float32)
            if gelu:
                value = _gelu(value)
            top = tl.maximum(top, tl.abs(value))
            values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005
        scale = tl.maximum(tl.max(top, axis=0) / largest, smallest)
        inverse = 1.0 / scale
        for part in tl.static_range(parts):
            scaled = (values[part] * inverse).to(q_ptr.dtype.element_ty)
            _stored(q_ptr + row * columns, at + part * block, scaled, columns, whole)
        tl.store(s_ptr + row, scale)

    @triton.jit
    def _joint_kernel(  # type: ignore[no-untyped-def]
        image_ptr, text_ptr, q_ptr, k_ptr, v_ptr, norm_q_ptr, norm_k_ptr, added_q_ptr, added_k_ptr, image_freqs_ptr,
        text_freqs_ptr, lengths_ptr, image_tokens, text_tokens, heads, eps, pairs: tl.constexpr,
        head_block: tl.constexpr, bounded: tl.constexpr,
    ):  # fmt: skip
        place = tl.program_id(0).to(tl.int64)
        batch = tl.program_id(1).to(tl.int64)
        which = tl.program_id(2)
        head = tl.arange(0, head_block)[:, None]
        lane = tl.arange(0, pairs * 2)[None, :]
        here = (head < heads) & (lane < pairs * 2)
        width = heads * pairs * 2
        if bounded:  # the text is behind the image, else before it
            of_image = place < image_tokens
            token = place if of_image else place - image_tokens
        else:
            of_image = place >= text_tokens
            token = place - text_tokens if of_image else place
        if of_image:
            source = image_ptr + (batch * image_tokens + token) * width * 3
            freqs = image_freqs_ptr + token * pairs * 2
            weight = norm_q_ptr if which == 0 else norm_k_ptr
        else:
            source = text_ptr + (batch * text_tokens + token) * width * 3
            freqs = text_freqs_ptr + token * pairs * 2
            weight = added_q_ptr if which == 0 else added_k_ptr
        at = head * pairs * 2 + lane
        to = (batch * (image_tokens + text_tokens) + place) * width + at
        x = tl.load(source + which * width + at, mask=here, other=0.0)
        if which < 2:
            value = x.to(tl.float32)
            spread = tl.rsqrt((tl.sum(value * value, axis=1) / (pairs * 2) + eps).to(tl.float32))[:, None]
            # Rounded after each of the two products, as the layer does it.
            value = (value * spread).to(x.dtype).to(tl.float32) * tl.load(weight + lane).to(tl.float32)
            first, second = tl.split(tl.reshape(value.to(x.dtype).to(tl.float32), (head_block, pairs, 2)))
            cos, sin = tl.split(tl.reshape(tl.load(freqs + lane), (1, pairs, 2)))
            turned = tl.reshape(
                tl.join(first * cos - second * sin, first * sin + second * cos), (head_block, pairs * 2)
            )
            target = q_ptr if which == 0 else k_ptr
            tl.store(target + to, turned.to(q_ptr.dtype.element_ty), mask=here)
        else:
            if bounded:
                x = tl.where(place < tl.load(lengths_ptr + batch), x, 0.0)
            tl.store(v_ptr + to, x.to(v_ptr.dtype.element_ty), mask=here)

    @triton.jit
    def _turned_kernel(  # type: ignore[no-untyped-def]
        from_ptr, to_ptr, weight_ptr, cos_ptr, sin_ptr, tokens, heads, eps, which: tl.constexpr, pairs: tl.constexpr,
        head_block: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        token = row % tokens
        head = tl.arange(0, head_block)[:, None]
        lane = tl.arange(0, pairs * 2)[None, :]
        pair = tl.arange(0, pairs)[None, :]
        here = head < heads
        width = heads * pairs * 2
        at = head * pairs * 2 + lane
        x = tl.load(from_ptr + row * width * 3 + which * width + at, mask=here, other=0.0)
        value = x.to(tl.float32)
        squares = tl.sum(tl.sum(value * value, axis=1), axis=0)
        weight = tl.load(weight_ptr + at, mask=here, other=0.0).to(tl.float32)
        value = (value * tl.rsqrt((squares / width + eps).to(tl.float32)) * weight).to(x.dtype).to(tl.float32)
        first, second = tl.split(tl.reshape(value, (head_block, pairs, 2)))
        # diffusers holds each cosine and each sine twice, side by side.
        cos = tl.load(cos_ptr + token * pairs * 2 + pair * 2)
        sin = tl.load(sin_ptr + token * pairs * 2 + pair * 2 + 1)
        turned = tl.reshape(tl.join(first * cos - second * sin, first * sin + second * cos), (head_block, pairs * 2))
        tl.store(to_ptr + row * width + at, turned.to(to_ptr.dtype.element_ty), mask=here)

    @triton.jit
    def _modulated_kernel(  # type: ignore[no-untyped-def]
        x_ptr, added_ptr, gate_ptr, shift_ptr, scale_ptr, place_ptr, sum_ptr, q_ptr, s_ptr, columns, gate_stride,
        shift_stride, scale_stride, eps, adds: tl.constexpr, gated: tl.constexpr, largest: tl.constexpr,
        smallest: tl.constexpr, block: tl.constexpr, parts: tl.constexpr, whole: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, block)
        place = tl.load(place_ptr + row).to(tl.int64)
        values = ()
        total = tl.zeros((block,), tl.float32)
        for part in tl.static_range(parts):
            here = at + part * block
            x = _loaded(x_ptr + row * columns, here, columns, whole)
            value = x.to(tl.float32)
            if adds:
                more = _loaded(added_ptr + row * columns, here, columns, whole).to(tl.float32)
                if gated:
                    more *= _loaded(gate_ptr + place * gate_stride, here, columns, whole).to(tl.float32)
                x = (value + more).to(x.dtype)
                _stored(sum_ptr + row * columns, here, x, columns, whole)
                value = x.to(tl.float32)
            total += value
            values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005
        mean = tl.sum(total, axis=0) / columns
        squares = tl.zeros((block,), tl.float32)
        for part in tl.static_range(parts):
            centred = values[part] - mean
            if not whole:
                centred = tl.where(at + part * block < columns, centred, 0.0)
            squares += centred * centred
        spread = tl.rsqrt((tl.sum(squares, axis=0) / columns + eps).to(tl.float32))
        modulated = ()
        top = tl.zeros((block,), tl.float32)
        for part in tl.static_range(parts):
            here = at + part * block
            factor = 1.0 + _loaded(scale_ptr + place * scale_stride, here, columns, whole).to(tl.float32)
            shift = _loaded(shift_ptr + place * shift_stride, here, columns, whole).to(tl.float32)
            value = (values[part] - mean) * spread * factor + shift
            if not whole:
                value = tl.where(here < columns, value, 0.0)
            top = tl.maximum(top, tl.abs(value))
            modulated = modulated + (value,)  # type: ignore[assignment]  # noqa: RUF005
        scale = tl.maximum(tl.max(top, axis=0) / largest, smallest)
        inverse = 1.0 / scale
        for part in tl.static_range(parts):
            scaled = (modulated[part] * inverse).to(q_ptr.dtype.element_ty)
            _stored(q_ptr + row * columns, at + part * block, scaled, columns, whole)
        tl.store(s_ptr + row, scale)

    @triton.jit
    def _added_kernel(  # type: ignore[no-untyped-def]
        x_ptr, added_ptr, gate_ptr, place_ptr, sum_ptr, columns, gate_stride, block: tl.constexpr, parts: tl.constexpr,
        whole: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, block)
        place = tl.load(place_ptr + row).to(tl.int64)
        for part in tl.static_range(parts):
            here = at + part * block
            x = _loaded(x_ptr + row * columns, here, columns, whole)
            more = _loaded(added_ptr + row * columns, here, columns, whole).to(tl.float32)
            more *= _loaded(gate_ptr + place * gate_stride, here, columns, whole).to(tl.float32)
            _stored(sum_ptr + row * columns, here, (x.to(tl.float32) + more).to(x.dtype), columns, whole)

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

    @triton.jit
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

    @triton.jit
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


def rows_in_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a (rows, columns) matrix in e4m3, and their scales as (rows, 1) float32: x ≈ q · scale."""
    scale = (x.abs().amax(dim=-1, keepdim=True).float() / E4M3_MAX).clamp(min=SMALLEST)
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


def _fused(x: Tensor) -> bool:
    return HAS_TRITON and x.is_cuda


def _parts(columns: int) -> tuple[int, int]:
    """A power of two, and how often it is taken for a row: exactly, if the row is three or five times one."""
    for parts in (1, 3, 5):
        block, rest = divmod(columns, parts)
        if not rest and block & (block - 1) == 0:
            return block, parts
    return 1 << (columns - 1).bit_length(), 1


def _warps(columns: int) -> int:
    return 4 if columns <= 8192 else 8  # as measured on a Hopper


@torch.library.triton_op("vidgen::quantise_rows", mutates_args=())
def quantise_rows(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """The rows of a (rows, columns) matrix in e4m3 with their (rows, 1) float32 scales, after GELU (tanh) if asked."""
    if not _fused(x):
        return rows_in_e4m3(torch.nn.functional.gelu(x.float(), approximate="tanh") if gelu else x)
    rows, columns = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    made = torch.empty((rows, columns), dtype=E4M3, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    block, parts = _parts(columns)
    wrap_triton(_quantise_kernel)[(rows,)](
        x, made, scale, columns, x.stride(0), gelu=gelu, largest=E4M3_MAX, smallest=SMALLEST, block=block, parts=parts,
        whole=block * parts == columns, num_warps=_warps(columns),
    )  # fmt: skip
    return made, scale


@torch.library.triton_op("vidgen::modulated_rows", mutates_args=())
def modulated_rows(x: Tensor, shift: Tensor, scale: Tensor, place: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The rows of `layer_norm(x) · (1 + scale) + shift` as `quantise_rows` gives them; x is (rows, columns).

    Row i is modulated by row `place[i]` of the (any, columns) tables.
    """
    if not _fused(x):
        return rows_in_e4m3(plain_modulated(x, shift, scale, place, eps))
    _, made, row_scale = _modulated(x, None, None, shift, scale, place, eps)
    return made, row_scale


@torch.library.triton_op("vidgen::added_modulated_rows", mutates_args=())
def added_modulated_rows(
    x: Tensor, added: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, place: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`x + gate · added` (without a gate `x + added`), and that as `modulated_rows` gives it."""
    if not _fused(x):
        more = added.float() if gate is None else added.float() * gate.float()[place]
        total = (x.float() + more).to(x.dtype)
        return total, *rows_in_e4m3(plain_modulated(total, shift, scale, place, eps))
    return _modulated(x, added, gate, shift, scale, place, eps)


@torch.library.triton_op("vidgen::added_rows", mutates_args=())
def added_rows(x: Tensor, added: Tensor, gate: Tensor, place: Tensor) -> Tensor:
    """`x + gate · added` for (rows, columns), rounded once; row i has row `place[i]` of the (any, columns) gates."""
    if not _fused(x):
        return (x.float() + added.float() * gate.float()[place]).to(x.dtype)
    rows, columns = x.shape
    x, added, place = x.contiguous(), added.contiguous(), place.contiguous()
    gate = gate if gate.stride(-1) == 1 else gate.contiguous()
    total = torch.empty_like(x)
    block, parts = _parts(columns)
    wrap_triton(_added_kernel)[(rows,)](
        x, added, gate, place, total, columns, gate.stride(0), block=block, parts=parts,
        whole=block * parts == columns, num_warps=_warps(columns),
    )  # fmt: skip
    return total


def plain_modulated(x: Tensor, shift: Tensor, scale: Tensor, place: Tensor, eps: float) -> Tensor:
    """What `modulated_rows` quantises, in plain torch."""
    normed = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (normed * (1 + scale.float()[place]) + shift.float()[place]).to(x.dtype)


def _modulated(
    x: Tensor, added: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, place: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    x = x.contiguous()
    total = torch.empty_like(x) if added is not None else x
    made = torch.empty((rows, columns), dtype=E4M3, device=x.device)
    row_scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    block, parts = _parts(columns)
    # Tables may be slices of wider ones, or one row for all: only the numbers of a row must lie side by side.
    # The places of one batch may be one number for all.
    place = place.contiguous()
    shift, scale = (table if table.stride(-1) == 1 else table.contiguous() for table in (shift, scale))
    gate = gate if gate is None or gate.stride(-1) == 1 else gate.contiguous()
    wrap_triton(_modulated_kernel)[(rows,)](
        x, x if added is None else added.contiguous(), shift if gate is None else gate, shift, scale, place, total,
        made, row_scale, columns, 0 if gate is None else gate.stride(0), shift.stride(0), scale.stride(0), eps,
        adds=added is not None, gated=gate is not None, largest=E4M3_MAX, smallest=SMALLEST, block=block, parts=parts,
        whole=block * parts == columns, num_warps=_warps(columns),
    )  # fmt: skip
    return total, made, row_scale


@torch.library.triton_op("vidgen::joint_qkv", mutates_args=())
def joint_qkv(
    image: Tensor, text: Tensor, norm_q: Tensor, norm_k: Tensor, norm_added_q: Tensor, norm_added_k: Tensor,
    image_freqs: Tensor, text_freqs: Tensor, eps: float, lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Query, key and value of text and image together, each (batch, text + image tokens, heads, head dimension).

    `image` and `text` are (batch, tokens, 3 · heads · dimension), query, key and value side by side; the queries and
    keys are RMS-normalised over a head's dimension by the weights, and turned by the (tokens, dimension / 2, 2) cosines
    and sines.

    The text comes first. With `lengths`, (batch,) int32, it comes last, and behind so many tokens the values are 0.
    """
    norms, added = (norm_q, norm_k), (norm_added_q, norm_added_k)
    if not _fused(image):
        return plain_joint_qkv(image, text, norms, added, image_freqs, text_freqs, eps, lengths)
    dimension = norm_q.shape[0]
    heads = image.shape[-1] // 3 // dimension
    total = text.shape[1] + image.shape[1]
    made = tuple(image.new_empty((image.shape[0], total, heads, dimension)) for _ in range(3))
    wrap_triton(_joint_kernel)[(total, image.shape[0], 3)](
        image.contiguous(), text.contiguous(), *made, norm_q, norm_k, norm_added_q, norm_added_k,
        image_freqs.contiguous(), text_freqs.contiguous(), image_freqs if lengths is None else lengths,
        image.shape[1], text.shape[1], heads, eps, pairs=dimension // 2, head_block=triton.next_power_of_2(heads),
        bounded=lengths is not None, num_warps=4,
    )  # fmt: skip
    return made[0], made[1], made[2]


def plain_joint_qkv(
    image: Tensor, text: Tensor, norms: tuple[Tensor, Tensor], added: tuple[Tensor, Tensor], image_freqs: Tensor,
    text_freqs: Tensor, eps: float, lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`joint_qkv` in plain torch; `norms` and `added` are the weights of query and key of image and of text."""
    streams = []
    for stream, weights, freqs in ((text, added, text_freqs), (image, norms, image_freqs)):
        parts = [part.unflatten(-1, (-1, weights[0].shape[0])) for part in stream.chunk(3, dim=-1)]
        for index, weight in enumerate(weights):
            x = parts[index].float()
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
            x = x.to(stream.dtype) * weight.to(stream.dtype)
            parts[index] = _turned(x, freqs[:, None, :, 0], freqs[:, None, :, 1])
        streams.append(parts)
    query, key, value = (
        torch.cat(pair, dim=1) for pair in zip(*(streams if lengths is None else streams[::-1]), strict=True)
    )
    if lengths is not None:
        value = value.masked_fill(~within(lengths, value.shape[1])[:, :, None, None], 0)
    return query, key, value


def within(lengths: Tensor, tokens: int) -> Tensor:
    """(batch, tokens) booleans: which of so many tokens are among the first `lengths`."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]


@torch.library.triton_op("vidgen::turned_qk", mutates_args=())
def turned_qk(
    qkv: Tensor, norm_q: Tensor, norm_k: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Query and key, each (batch, tokens, heads, dimension), of a (batch, tokens, 3 · heads · dimension) projection.

    They are RMS-normalised over all heads together by the (heads · dimension) weights, and turned by the (tokens,
    dimension) cosines and sines, which hold each number twice.
    """
    if not _fused(qkv):
        return plain_turned_qk(qkv, norm_q, norm_k, cos, sin, heads, eps)
    batch, tokens, width = qkv.shape
    dimension = width // 3 // heads
    qkv, cos, sin = qkv.contiguous(), cos.float().contiguous(), sin.float().contiguous()
    made = tuple(qkv.new_empty((batch, tokens, heads, dimension)) for _ in range(2))
    for which, (target, weight) in enumerate(zip(made, (norm_q, norm_k), strict=True)):
        wrap_triton(_turned_kernel)[(batch * tokens,)](
            qkv, target, weight, cos, sin, tokens, heads, eps, which=which, pairs=dimension // 2,
            head_block=triton.next_power_of_2(heads), num_warps=8,
        )  # fmt: skip
    return made[0], made[1]


def plain_turned_qk(
    qkv: Tensor, norm_q: Tensor, norm_k: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """`turned_qk` in plain torch."""
    made = []
    for x, weight in zip(qkv.chunk(3, dim=-1)[:2], (norm_q, norm_k), strict=True):
        normed = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)
        made.append(_turned(normed.unflatten(-1, (heads, -1)), cos[:, None, ::2], sin[:, None, 1::2]))
    return made[0], made[1]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)
    return turned.to(x.dtype)


@torch.library.triton_op("vidgen::spans", mutates_args=())
def spans(x: Tensor, spreads: bool, lengths: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, least and largest over the tokens of (batch, tokens, heads, dimension), each (batch, heads, dimension).

    In float32, and `spreads` of what `plain_spread` makes of it. With `lengths`, (batch,) int32, of the first ones.
    """
    if not _fused(x) or x.shape[-1] != DIMENSION:
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
    if not _fused(x) or x.shape[-1] != DIMENSION:
        wide = plain_spread(x.float()) if spreads else x.float()
        wide = wide if mean is None else wide - mean[:, None]
        return _rounded(wide * (1.0 / scale)[:, None, :, None], kind)
    return _narrowed(x, scale.contiguous(), mean, kind, by_row=False, spreads=spreads)


@torch.library.triton_op("vidgen::narrowed_by_token", mutates_args=())
def narrowed_by_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """What `plain_spread` makes of (batch, tokens, heads, dimension) in int8, with (batch, heads, tokens) scales."""
    batch, tokens, heads, dimension = x.shape
    if not _fused(x) or dimension != DIMENSION:
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
