"""Causal 3D convolutions as products of matrices: RMS norm, SiLU and padding in one pass, then product, bias and sum.

cuDNN's own for these shapes reach a third to two thirds of what the matrix units can do, and stock norms and paddings
take longer than they do. Each kernel is beside the same arithmetic in plain torch, which serves where there is no
Triton.

What is convolved lies in a padded (frames, height + 2, width + 2, channels) tensor whose border is zero. Read as rows
of pixels, each of a kernel's taps is then the same rows, shifted: no tap needs a case of its own.
"""

from __future__ import annotations

from torch import Tensor, nn

from vidgen.accel.kernels import HAS_TRITON

TAPS = 3  # of a kernel, in each direction
SMALLEST = 1e-12  # as torch's `normalize`
PIXELS = 16  # that a program of the first kernel has
STAGES = 4  # of tiles on their way to the matrix units
# Triton would compile anew for each mixture of sizes that sixteen divides and others: seconds, in the middle of a task.
SIZES = ("pixels", "height", "width")

if HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    @triton.jit(do_not_specialize=SIZES)
    def _activate_kernel(  # type: ignore[no-untyped-def]
        x_ptr, gamma_ptr, to_ptr, pixels, height, width, root, channels: tl.constexpr, block: tl.constexpr,
        count: tl.constexpr, smallest: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * count + tl.arange(0, count)
        channel = tl.arange(0, block)
        pitch = width + 2
        frame, inside = row // ((height + 2) * pitch), row % ((height + 2) * pitch)
        h, w = inside // pitch - 1, inside % pitch - 1
        seen = (row < pixels) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        there = (channel < channels)[None, :]
        source = ((frame * height + h) * width + w)[:, None] * channels + channel[None, :]
        x = tl.load(x_ptr + source, mask=seen[:, None] & there, other=0.0)
        value = x.to(tl.float32)
        length = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), smallest)
        # Rounded after each of the three products, as the layers do it.
        value = (value / length[:, None]).to(x.dtype).to(tl.float32)
        value = (value * root).to(x.dtype).to(tl.float32)
        gamma = tl.load(gamma_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
        value = (value * gamma[None, :]).to(x.dtype).to(tl.float32)
        value = value * tl.sigmoid(value)
        target = row[:, None] * channels + channel[None, :]
        tl.store(to_ptr + target, value.to(x.dtype), mask=(row < pixels)[:, None] & there)

    @triton.jit(do_not_specialize=SIZES)
    def _convolve_kernel(  # type: ignore[no-untyped-def]
        x_desc, weight_desc, bias_ptr, added_ptr, to_ptr, height, width, filters, adds: tl.constexpr,
        taps: tl.constexpr, first: tl.constexpr, channels: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
        depth: tl.constexpr,
    ):  # fmt: skip
        tiles = tl.cdiv(filters, columns)
        column = tl.program_id(0) % tiles * columns
        begin = tl.program_id(0) // tiles * rows
        frame = tl.program_id(1)
        pitch = width + 2
        per_tap: tl.constexpr = channels // depth
        total = tl.zeros((rows, columns), tl.float32)
        for step in range(taps * per_tap):
            tap = step // per_tap
            channel = step % per_tap * depth
            shifted = (frame + tap // 9) * (height + 2) * pitch + begin + tap % 9 // 3 * pitch + tap % 3
            x = x_desc.load([shifted, channel])
            weight = weight_desc.load([column, (first + tap) * channels + channel])
            total = tl.dot(x, weight.T, total)
        row = begin + tl.arange(0, rows)
        h, w = row // pitch, row % pitch
        at = column + tl.arange(0, columns)
        here = ((h < height) & (w < width))[:, None] & (at < filters)[None, :]
        target = ((frame.to(tl.int64) * height + h) * width + w)[:, None] * filters + at[None, :]
        total += tl.load(bias_ptr + at, mask=at < filters, other=0.0).to(tl.float32)[None, :]
        if adds:
            more = tl.load(added_ptr + target, mask=here, other=0.0).to(tl.float32)
            total = total.to(to_ptr.dtype.element_ty).to(tl.float32) + more
        tl.store(to_ptr + target, total.to(to_ptr.dtype.element_ty), mask=here)


def suits(conv: nn.Module) -> bool:
    """Whether a causal convolution is of the kind that is made here."""
    return (
        isinstance(conv, nn.Conv3d)
        and (conv.kernel_size, conv.stride, conv.dilation) == ((TAPS,) * 3, (1,) * 3, (1,) * 3)
        and (conv.groups, conv.in_channels % 16) == (1, 0)
        and conv.bias is not None
    )


def padded(frames: int, x: Tensor) -> Tensor:
    """Room for so many padded frames of the size of (frames, height, width, channels); nothing is in it yet."""
    return x.new_empty((frames, x.shape[1] + 2, x.shape[2] + 2, x.shape[3]))


def activate(x: Tensor, gamma: Tensor, into: Tensor) -> None:
    """Write SiLU of RMS-normalised pixels, and the zeros around them, to the padded frames `into`.

    `x` is contiguous (frames, height, width, channels), `gamma` has a factor for each channel.
    """
    frames, height, width, channels = x.shape
    if not _fused(x):
        normed = nn.functional.normalize(x.float(), dim=-1).to(x.dtype) * channels**0.5 * gamma.flatten()
        into.zero_()
        into[:, 1:-1, 1:-1] = nn.functional.silu(normed)
        return
    pixels = frames * (height + 2) * (width + 2)
    _activate_kernel[(triton.cdiv(pixels, PIXELS),)](
        x, gamma, into, pixels, height, width, channels**0.5, channels=channels, block=triton.next_power_of_2(channels),
        count=PIXELS, smallest=SMALLEST, num_warps=4,
    )  # fmt: skip


def convolve(x: Tensor, conv: nn.Conv3d, added: Tensor | None, *, alone: bool = False) -> Tensor:
    """A convolution of padded frames, plus `added` where it is given: contiguous (frames, height, width, filters).

    Of each frame but the first two there is a result, which sees those before it. Where the frames are `alone`, there
    is one of each, and nothing before it.
    """
    first = 2 * 9 if alone else 0
    frames = x.shape[0] - (0 if alone else 2)
    height, width = x.shape[1] - 2, x.shape[2] - 2
    # As `channels_last_3d` has it in memory, so that nothing is copied.
    weight = conv.weight.permute(0, 2, 3, 4, 1).flatten(1)
    if not _fused(x):
        given = x.movedim(-1, 0)[None] if not alone else x.movedim(-1, 1)[:, :, None]
        made = nn.functional.conv3d(given, conv.weight[:, :, 2 if alone else 0 :], conv.bias)
        made = (made[0].movedim(0, -1) if not alone else made[:, :, 0].movedim(1, -1)).contiguous()
        return made if added is None else made + added
    rows, columns, warps = _tile(conv.out_channels)
    depth = next(size for size in (64, 32, 16) if conv.in_channels % size == 0)
    made = x.new_empty((frames, height, width, conv.out_channels))
    tiles = triton.cdiv(height * (width + 2), rows) * triton.cdiv(conv.out_channels, columns)
    _convolve_kernel[(tiles, frames)](
        TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), [rows, depth]),
        TensorDescriptor.from_tensor(weight, [columns, depth]), conv.bias, made if added is None else added, made,
        height, width, conv.out_channels, adds=added is not None, taps=9 if alone else 27, first=first,
        channels=conv.in_channels, rows=rows, columns=columns, depth=depth, num_warps=warps, num_stages=STAGES,
    )  # fmt: skip
    return made


def _fused(x: Tensor) -> bool:
    return HAS_TRITON and x.is_cuda


def _tile(filters: int) -> tuple[int, int, int]:
    """Rows, columns and warps of the tile that was fastest for so many filters on a Hopper."""
    if filters % 128 == 0:
        return 128, 128, 4
    if filters <= 16:
        return 128, 16, 4
    return 256, (64 if filters % 128 <= 64 else 128), 8
