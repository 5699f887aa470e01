"""Fused kernels in Triton, each beside the same arithmetic in plain torch, which serves where there is no Triton.

They are operators that `torch.compile` looks into and launches by itself: in a small picture an operator that Python is
called for takes longer than its kernel. What they save is traffic: inductor's own fusions of these patterns read a row
two or three times, these once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import wrap_triton

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0  # the largest e4m3 number
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
        head_block: tl.constexpr, bounded: tl.constexpr, narrow: tl.constexpr, largest: tl.constexpr,
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
            if narrow:
                turned = tl.minimum(tl.maximum(turned, -largest), largest)
            target = q_ptr if which == 0 else k_ptr
            tl.store(target + to, turned.to(q_ptr.dtype.element_ty), mask=here)
        else:
            if bounded:
                x = tl.where(place < tl.load(lengths_ptr + batch), x, 0.0)
            tl.store(v_ptr + to, x.to(v_ptr.dtype.element_ty), mask=here)

    @triton.jit
    def _turned_kernel(  # type: ignore[no-untyped-def]
        from_ptr, to_ptr, weight_ptr, cos_ptr, sin_ptr, tokens, heads, eps, which: tl.constexpr, pairs: tl.constexpr,
        head_block: tl.constexpr, narrow: tl.constexpr, largest: tl.constexpr,
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
        if narrow:
            turned = tl.minimum(tl.maximum(turned, -largest), largest)
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


def rows_in_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a (rows, columns) matrix in e4m3, and their scales as (rows, 1) float32: x ≈ q · scale."""
    scale = (x.abs().amax(dim=-1, keepdim=True).float() / E4M3_MAX).clamp(min=SMALLEST)
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


def rows_of_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """A (batch, tokens, heads, dimension) tensor in e4m3, with (batch, heads) float32 scales: x ≈ q · scale."""
    scale = (x.abs().amax(dim=(1, 3)).float() / E4M3_MAX).clamp(min=SMALLEST)
    return (x.float() / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


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
    image_freqs: Tensor, text_freqs: Tensor, eps: float, narrow: bool, lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Query, key and value of text and image together, each (batch, text + image tokens, heads, head dimension).

    `image` and `text` are (batch, tokens, 3 · heads · dimension), query, key and value side by side; the queries and
    keys are RMS-normalised over a head's dimension by the weights, turned by the (tokens, dimension / 2, 2) cosines
    and sines, and `narrow` rounded to e4m3: what is normalised needs no scale.

    The text comes first. With `lengths`, (batch,) int32, it comes last, and behind so many tokens the values are 0.
    """
    norms, added = (norm_q, norm_k), (norm_added_q, norm_added_k)
    if not _fused(image):
        return plain_joint_qkv(image, text, norms, added, image_freqs, text_freqs, eps, lengths, narrow=narrow)
    dimension = norm_q.shape[0]
    heads = image.shape[-1] // 3 // dimension
    total = text.shape[1] + image.shape[1]
    kinds = (E4M3, E4M3, image.dtype) if narrow else (image.dtype,) * 3
    made = tuple(image.new_empty((image.shape[0], total, heads, dimension), dtype=kind) for kind in kinds)
    wrap_triton(_joint_kernel)[(total, image.shape[0], 3)](
        image.contiguous(), text.contiguous(), *made, norm_q, norm_k, norm_added_q, norm_added_k,
        image_freqs.contiguous(), text_freqs.contiguous(), image_freqs if lengths is None else lengths,
        image.shape[1], text.shape[1], heads, eps, pairs=dimension // 2, head_block=triton.next_power_of_2(heads),
        bounded=lengths is not None, narrow=narrow, largest=E4M3_MAX, num_warps=4,
    )  # fmt: skip
    return made[0], made[1], made[2]


def plain_joint_qkv(
    image: Tensor, text: Tensor, norms: tuple[Tensor, Tensor], added: tuple[Tensor, Tensor], image_freqs: Tensor,
    text_freqs: Tensor, eps: float, lengths: Tensor | None = None, *, narrow: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`joint_qkv` in plain torch; `norms` and `added` are the weights of query and key of image and of text."""
    streams = []
    for stream, weights, freqs in ((text, added, text_freqs), (image, norms, image_freqs)):
        parts = [part.unflatten(-1, (-1, weights[0].shape[0])) for part in stream.chunk(3, dim=-1)]
        for index, weight in enumerate(weights):
            x = parts[index].float()
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
            x = x.to(stream.dtype) * weight.to(stream.dtype)
            parts[index] = _turned(x, freqs[:, None, :, 0], freqs[:, None, :, 1], narrow=narrow)
        streams.append(parts)
    query, key, value = (_joined(pair) for pair in zip(*(streams if lengths is None else streams[::-1]), strict=True))
    if lengths is not None:
        value = value.masked_fill(~within(lengths, value.shape[1])[:, :, None, None], 0)
    return query, key, value


def within(lengths: Tensor, tokens: int) -> Tensor:
    """(batch, tokens) booleans: which of so many tokens are among the first `lengths`."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]


@torch.library.triton_op("vidgen::turned_qk", mutates_args=())
def turned_qk(
    qkv: Tensor, norm_q: Tensor, norm_k: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float, narrow: bool
) -> tuple[Tensor, Tensor]:
    """Query and key, each (batch, tokens, heads, dimension), of a (batch, tokens, 3 · heads · dimension) projection.

    They are RMS-normalised over all heads together by the (heads · dimension) weights, turned by the (tokens,
    dimension) cosines and sines, which hold each number twice, and `narrow` rounded to e4m3.
    """
    if not _fused(qkv):
        return plain_turned_qk(qkv, norm_q, norm_k, cos, sin, heads, eps, narrow=narrow)
    batch, tokens, width = qkv.shape
    dimension = width // 3 // heads
    qkv, cos, sin = qkv.contiguous(), cos.float().contiguous(), sin.float().contiguous()
    kind = E4M3 if narrow else qkv.dtype
    made = tuple(qkv.new_empty((batch, tokens, heads, dimension), dtype=kind) for _ in range(2))
    for which, (target, weight) in enumerate(zip(made, (norm_q, norm_k), strict=True)):
        wrap_triton(_turned_kernel)[(batch * tokens,)](
            qkv, target, weight, cos, sin, tokens, heads, eps, which=which, pairs=dimension // 2,
            head_block=triton.next_power_of_2(heads), narrow=narrow, largest=E4M3_MAX, num_warps=8,
        )  # fmt: skip
    return made[0], made[1]


def plain_turned_qk(
    qkv: Tensor, norm_q: Tensor, norm_k: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float, *, narrow: bool
) -> tuple[Tensor, Tensor]:
    """`turned_qk` in plain torch."""
    made = []
    for x, weight in zip(qkv.chunk(3, dim=-1)[:2], (norm_q, norm_k), strict=True):
        normed = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)
        made.append(_turned(normed.unflatten(-1, (heads, -1)), cos[:, None, ::2], sin[:, None, 1::2], narrow=narrow))
    return made[0], made[1]


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, narrow: bool) -> Tensor:
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)
    return turned.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3) if narrow else turned.to(x.dtype)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Text and image in one; as bytes, since not every build of torch joins e4m3."""
    if parts[0].dtype != E4M3:
        return torch.cat(list(parts), dim=1)
    return torch.cat([part.view(torch.uint8) for part in parts], dim=1).view(E4M3)


@torch.library.custom_op("vidgen::attended_e4m3", mutates_args=())
def attended_e4m3(
    query: Tensor, key: Tensor, value: Tensor, value_scale: Tensor, dtype: torch.dtype, lengths: Tensor | None = None
) -> Tensor:
    """Attention in FP8 by FlashAttention 3: e4m3 (batch, tokens, heads, dimension) each, `dtype` comes out.

    `value_scale` is (batch, heads); queries and keys have none. Products and softmax are summed up in float32.
    With `lengths` only so many keys are seen, as in `attended_within`.
    """
    if not query.is_cuda:
        wide = value.to(dtype) * value_scale[:, None, :, None].to(dtype)
        return _plain_attended(query.to(dtype), key.to(dtype), wide, lengths)
    return _flash3(query, key, value, lengths, value_scale).to(dtype)


@attended_e4m3.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, value_scale: Tensor, dtype: torch.dtype, lengths: Tensor | None = None
) -> Tensor:
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


def _flash3(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, value_scale: Tensor | None = None
) -> Tensor:
    from flash_attn_interface import flash_attn_with_kvcache

    made: Tensor = flash_attn_with_kvcache(
        query, key, value, cache_seqlens=lengths, v_descale=value_scale, num_splits=1
    )
    return made


def _plain_attended(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None) -> Tensor:
    mask = None if lengths is None else within(lengths, key.shape[1])[:, None, None]
    given = (part.transpose(1, 2) for part in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*given, attn_mask=mask).transpose(1, 2).contiguous()
