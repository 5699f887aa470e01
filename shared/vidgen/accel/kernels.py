"""Fused kernels in Triton, each beside the same arithmetic in plain torch, which serves where there is no Triton.

They are custom operators, so that `torch.compile` takes them whole. What they save is traffic: inductor's own fusions
of these patterns read a row two or three times, these once.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0  # the largest e4m3 number
SMALLEST = 1e-12  # a row of zeros has no magnitude to divide by
HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _quantise_kernel(  # type: ignore[no-untyped-def]
        x_ptr, q_ptr, s_ptr, columns, stride, gelu: tl.constexpr, largest: tl.constexpr, smallest: tl.constexpr,
        block: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, block)
        here = at < columns
        x = tl.load(x_ptr + row * stride + at, mask=here, other=0.0)
        value = x.to(tl.float32)
        if gelu:
            inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
            # 0.5 (1 + tanh z) is the sigmoid of 2 z; rounded as the unfused layer rounds it.
            value = (value * tl.sigmoid(2.0 * inner)).to(x.dtype).to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(value), axis=0) / largest, smallest)
        scaled = tl.minimum(tl.maximum(value / scale, -largest), largest)
        tl.store(q_ptr + row * columns + at, scaled.to(q_ptr.dtype.element_ty), mask=here)
        tl.store(s_ptr + row, scale)

    @triton.jit
    def _joint_kernel(  # type: ignore[no-untyped-def]
        from_ptr, to_ptr, weight_ptr, freqs_ptr, tokens, before, total, heads, eps, which: tl.constexpr,
        pairs: tl.constexpr, head_block: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0)
        batch = tl.program_id(1).to(tl.int64)
        head = tl.arange(0, head_block)[:, None]
        lane = tl.arange(0, pairs * 2)[None, :]
        here = (head < heads) & (lane < pairs * 2)
        width = heads * pairs * 2
        source = from_ptr + (batch * tokens + token) * width * 3 + which * width + head * pairs * 2 + lane
        target = to_ptr + (batch * total + before + token) * width + head * pairs * 2 + lane
        x = tl.load(source, mask=here, other=0.0)
        if which < 2:
            value = x.to(tl.float32)
            spread = tl.rsqrt(tl.sum(value * value, axis=1) / (pairs * 2) + eps)[:, None]
            weight = tl.load(weight_ptr + lane).to(tl.float32)
            # Rounded after each of the two products, as the layer does it.
            value = ((value * spread).to(x.dtype).to(tl.float32) * weight).to(x.dtype).to(tl.float32)
            first, second = tl.split(tl.reshape(value, (head_block, pairs, 2)))
            turns = tl.load(freqs_ptr + token * pairs * 2 + lane)
            cos, sin = tl.split(tl.reshape(turns, (1, pairs, 2)))
            turned = tl.join(first * cos - second * sin, first * sin + second * cos)
            x = tl.reshape(turned, (head_block, pairs * 2)).to(x.dtype)
        tl.store(target, x, mask=here)


def rows_in_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a (rows, columns) matrix in e4m3, and their scales as (rows, 1) float32: x ≈ q · scale."""
    scale = (x.abs().amax(dim=-1, keepdim=True).float() / E4M3_MAX).clamp(min=SMALLEST)
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


def _fused(x: Tensor) -> bool:
    return HAS_TRITON and x.is_cuda


@torch.library.custom_op("vidgen::quantise_rows", mutates_args=())
def quantise_rows(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """The rows of a (rows, columns) matrix in e4m3 with their (rows, 1) float32 scales, after GELU (tanh) if asked."""
    if not _fused(x):
        return rows_in_e4m3(torch.nn.functional.gelu(x, approximate="tanh") if gelu else x)
    rows, columns = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    made = torch.empty((rows, columns), dtype=E4M3, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    _quantise_kernel[(rows,)](
        x, made, scale, columns, x.stride(0), gelu=gelu, largest=E4M3_MAX, smallest=SMALLEST, block=block,
        num_warps=min(16, max(4, block // 1024)),
    )  # fmt: skip
    return made, scale


@quantise_rows.register_fake
def _(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@torch.library.custom_op("vidgen::joint_qkv", mutates_args=())
def joint_qkv(
    image: Tensor, text: Tensor, norm_q: Tensor, norm_k: Tensor, norm_added_q: Tensor, norm_added_k: Tensor,
    image_freqs: Tensor, text_freqs: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Query, key and value of text and image together, each (batch, text + image tokens, heads, head dimension).

    `image` and `text` are (batch, tokens, 3 · heads · dimension), query, key and value side by side; the queries and
    keys are RMS-normalised over a head's dimension by the weights and turned by the (tokens, dimension / 2, 2) cosines
    and sines.
    """
    if not _fused(image):
        return _joint_qkv(image, text, (norm_q, norm_k), (norm_added_q, norm_added_k), image_freqs, text_freqs, eps)
    dimension = norm_q.shape[0]
    heads = image.shape[-1] // 3 // dimension
    total = text.shape[1] + image.shape[1]
    made = tuple(image.new_empty((image.shape[0], total, heads, dimension)) for _ in range(3))
    streams = (
        (text.contiguous(), (norm_added_q, norm_added_k, norm_added_k), text_freqs.contiguous(), 0),
        (image.contiguous(), (norm_q, norm_k, norm_k), image_freqs.contiguous(), text.shape[1]),
    )
    for stream, weights, freqs, before in streams:
        for which, (target, weight) in enumerate(zip(made, weights, strict=True)):
            _joint_kernel[(stream.shape[1], stream.shape[0])](
                stream, target, weight, freqs, stream.shape[1], before, total, heads, eps, which=which,
                pairs=dimension // 2, head_block=triton.next_power_of_2(heads), num_warps=4,
            )  # fmt: skip
    return made[0], made[1], made[2]


@joint_qkv.register_fake
def _(
    image: Tensor, text: Tensor, norm_q: Tensor, norm_k: Tensor, norm_added_q: Tensor, norm_added_k: Tensor,
    image_freqs: Tensor, text_freqs: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dimension = norm_q.shape[0]
    shape = (image.shape[0], text.shape[1] + image.shape[1], image.shape[-1] // 3 // dimension, dimension)
    return image.new_empty(shape), image.new_empty(shape), image.new_empty(shape)


def _joint_qkv(
    image: Tensor, text: Tensor, norms: tuple[Tensor, Tensor], added: tuple[Tensor, Tensor], image_freqs: Tensor,
    text_freqs: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    streams = []
    for stream, weights, freqs in ((text, added, text_freqs), (image, norms, image_freqs)):
        parts = [part.unflatten(-1, (-1, weights[0].shape[0])) for part in stream.chunk(3, dim=-1)]
        for index, weight in enumerate(weights):
            x = parts[index].float()
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
            x = x.to(stream.dtype) * weight.to(stream.dtype)
            first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
            cos, sin = freqs[:, None, :, 0], freqs[:, None, :, 1]
            turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1)
            parts[index] = turned.flatten(-2).to(stream.dtype)
        streams.append(parts)
    query, key, value = (torch.cat(pair, dim=1) for pair in zip(*streams, strict=True))
    return query, key, value
