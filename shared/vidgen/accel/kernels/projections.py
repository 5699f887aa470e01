"""What attention is given, made of its projections in one pass: queries and keys normalised and turned."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import wrap_triton

from vidgen.accel.kernels import COUNTS, HAS_TRITON, fused, within

if HAS_TRITON:
    import triton
    import triton.language as tl

    # Compiled code hands an `eps` over in float64, which must not spread.

    @triton.jit(do_not_specialize=(*COUNTS, "bounded"))
    def _joint_kernel(  # type: ignore[no-untyped-def]
        image_ptr, text_ptr, q_ptr, k_ptr, v_ptr, norm_q_ptr, norm_k_ptr, added_q_ptr, added_k_ptr, image_freqs_ptr,
        text_freqs_ptr, lengths_ptr, image_tokens, text_tokens, bounded, heads, eps, pairs: tl.constexpr,
        head_block: tl.constexpr,
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

    @triton.jit(do_not_specialize=COUNTS)
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
    if not fused(image):
        return plain_joint_qkv(image, text, norms, added, image_freqs, text_freqs, eps, lengths)
    dimension = norm_q.shape[0]
    heads = image.shape[-1] // 3 // dimension
    total = text.shape[1] + image.shape[1]
    made = tuple(image.new_empty((image.shape[0], total, heads, dimension)) for _ in range(3))
    image = image.contiguous()
    # Something of the same type: for another one, as for another constant, the kernel would be compiled once more.
    told = image.view(torch.int32) if lengths is None else lengths
    wrap_triton(_joint_kernel)[(total, image.shape[0], 3)](
        image, text.contiguous(), *made, norm_q, norm_k, norm_added_q, norm_added_k,
        image_freqs.contiguous(), text_freqs.contiguous(), told,
        image.shape[1], text.shape[1], int(lengths is not None), heads, eps, pairs=dimension // 2,
        head_block=triton.next_power_of_2(heads), num_warps=4,
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


@torch.library.triton_op("vidgen::turned_qk", mutates_args=())
def turned_qk(
    qkv: Tensor, norm_q: Tensor, norm_k: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Query and key, each (batch, tokens, heads, dimension), of a (batch, tokens, 3 · heads · dimension) projection.

    They are RMS-normalised over all heads together by the (heads · dimension) weights, and turned by the (tokens,
    dimension) cosines and sines, which hold each number twice.
    """
    if not fused(qkv):
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
