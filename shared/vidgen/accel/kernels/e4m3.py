"""Rows in e4m3, made so in the pass that applies GELU or norm and modulation to them; and the sum that ends a block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import wrap_triton

from vidgen.accel.kernels import E4M3, E4M3_MAX, HAS_TRITON, SMALLEST, fused

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


def rows_in_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a (rows, columns) matrix in e4m3, and their scales as (rows, 1) float32: x ≈ q · scale."""
    scale = (x.abs().amax(dim=-1, keepdim=True).float() / E4M3_MAX).clamp(min=SMALLEST)
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


def _parts(columns: int) -> tuple[int, int]:
    """A power of two, and how often it is taken for a row: exactly, if the row is three or five times one."""
    for parts in (1, 3, 5):
        block, rest = divmod(columns, parts)
        if not rest and block & (block - 1) == 0:
            return block, parts
    return 1 << (columns - 1).bit_length(), 1


def _width(x: Tensor) -> int:
    """The columns of a matrix; of the second model that a process compiles torch says them as a symbol."""
    return int(x.shape[1])


def _warps(columns: int) -> int:
    return 4 if columns <= 8192 else 8  # as measured on a Hopper


@torch.library.triton_op("vidgen::quantise_rows", mutates_args=())
def quantise_rows(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """The rows of a (rows, columns) matrix in e4m3 with their (rows, 1) float32 scales, after GELU (tanh) if asked."""
    if not fused(x):
        return rows_in_e4m3(torch.nn.functional.gelu(x.float(), approximate="tanh") if gelu else x)
    rows, columns = x.shape[0], _width(x)
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
    if not fused(x):
        return rows_in_e4m3(plain_modulated(x, shift, scale, place, eps))
    _, made, row_scale = _modulated(x, None, None, shift, scale, place, eps)
    return made, row_scale


@torch.library.triton_op("vidgen::added_modulated_rows", mutates_args=())
def added_modulated_rows(
    x: Tensor, added: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, place: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`x + gate · added` (without a gate `x + added`), and that as `modulated_rows` gives it."""
    if not fused(x):
        more = added.float() if gate is None else added.float() * gate.float()[place]
        total = (x.float() + more).to(x.dtype)
        return total, *rows_in_e4m3(plain_modulated(total, shift, scale, place, eps))
    return _modulated(x, added, gate, shift, scale, place, eps)


@torch.library.triton_op("vidgen::added_rows", mutates_args=())
def added_rows(x: Tensor, added: Tensor, gate: Tensor, place: Tensor) -> Tensor:
    """`x + gate · added` for (rows, columns), rounded once; row i has row `place[i]` of the (any, columns) gates."""
    if not fused(x):
        return (x.float() + added.float() * gate.float()[place]).to(x.dtype)
    rows, columns = x.shape[0], _width(x)
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
    rows, columns = x.shape[0], _width(x)
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
