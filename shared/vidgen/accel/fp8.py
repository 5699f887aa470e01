"""Linear layers in FP8: weights stored, and on cards that can also multiplied, as e4m3 with one scale a row.

The weight of a row, and the activation of a token, are divided by their largest magnitude over 448 (the largest e4m3
number), so that an outlier costs its own row's precision and no other's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vidgen import gpu
from vidgen.accel.kernels import e4m3

# The matrix units take both sides in sixteens.
MULTIPLE = 16
# Smaller layers cost nothing either way: time and image-position embeddings, the last projection.
LEAST_FEATURES = 512
# In the configuration of a component with such layers. diffusers knows no such method: by itself it refuses the
# folder, where it would else leave out the scales.
MARK = {"quant_method": "vidgen-fp8-rows"}
# Of so few rows cuBLAS splits long sums, in kernels that have scales of rows or a bias but not both, and refuses: on an
# H200 below 44 rows with sums of 12288, of 13824 at least up to 20.
FEW_ROWS = 128


class Fp8Linear(nn.Module):
    """A linear layer whose weight is (out, in) e4m3 with (out, 1) float32 scales.

    With `arithmetic` the product is made in FP8 (compute capability 8.9 and later), the activations quantised row by
    row on the way; else the weight is widened first, which saves memory only.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, *, arithmetic: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.arithmetic = arithmetic
        # Not buffers: diffusers' offloading brings those of a block to the device, and leaves them there.
        self.weight = _fixed(weight)
        self.weight_scale = _fixed(scale)
        self.bias = None if bias is None else _fixed(bias)

    @classmethod
    def of(cls, linear: nn.Linear, *, arithmetic: bool, through: torch.device | None = None) -> Fp8Linear:
        """Quantise a layer on the device `through`, by default where its weight is; the new layer is there."""
        weight, scale = e4m3.rows_in_e4m3(linear.weight.detach().to(through))
        bias = linear.bias.detach().to(through) if linear.bias is not None else None
        return cls(weight, scale, bias, arithmetic=arithmetic)

    def forward(self, x: Tensor) -> Tensor:
        if not self.arithmetic:
            weight = self.weight.to(x.dtype) * self.weight_scale.to(x.dtype)
            return nn.functional.linear(x, weight, self.bias)
        rows, scale = e4m3.quantise_rows(x.reshape(-1, self.in_features), False)
        return self.multiply(rows, scale, x.dtype).reshape(*x.shape[:-1], self.out_features)

    def multiply(self, rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The (rows, out) product with rows that are quantised already."""
        # With scales of rows many cards have kernels for bfloat16 alone.
        apart = self.bias is not None and (rows.shape[0] < FEW_ROWS or dtype != torch.bfloat16)
        made: Tensor = torch._scaled_mm(
            rows, self.weight.t(), scale_a=scale, scale_b=self.weight_scale.t(), bias=None if apart else self.bias,
            out_dtype=torch.bfloat16, use_fast_accum=True,
        ).to(dtype)  # fmt: skip
        return made + self.bias if apart else made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        before = self.weight.data, self.weight_scale.data
        super()._apply(fn, recurse)
        # Of `.to(device, dtype)` the device holds: another precision would undo the quantisation.
        for now, data in zip((self.weight, self.weight_scale), before, strict=True):
            if now.dtype != data.dtype:
                now.data = data.to(now.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, arithmetic={self.arithmetic}"


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def suits(linear: nn.Module, least: int = LEAST_FEATURES) -> bool:
    """Whether a module is a linear layer that gains by FP8."""
    if not isinstance(linear, nn.Linear):
        return False
    sides = (linear.in_features, linear.out_features)
    return min(sides) >= least and not any(side % MULTIPLE for side in sides)


def targets(model: nn.Module, least: int = LEAST_FEATURES) -> dict[str, nn.Linear]:
    """The linear layers of a transformer's blocks that gain by FP8, by name.

    What stands outside the blocks is small, and partly kept in float32 for its precision.
    """
    repeated = set(getattr(model, "_repeated_blocks", None) or ())
    blocks = [name for name, module in model.named_modules() if type(module).__name__ in repeated]
    inside = tuple(f"{name}." for name in blocks) or ("",)
    return {
        name: module for name, module in model.named_modules()
        if name.startswith(inside) and isinstance(module, nn.Linear) and suits(module, least)
    }  # fmt: skip


def quantise(
    model: nn.Module, *, arithmetic: bool, least: int = LEAST_FEATURES, through: torch.device | None = None,
    keep_there: bool = False,
) -> int:  # fmt: skip
    """Replace, in place and one by one, the linear layers of a model that gain by it; how many that were.

    The work is done on the device `through`, which never holds more than a layer, unless the results are to stay.
    """
    found = targets(model, least)
    for name in list(found):
        linear = found.pop(name)  # so that its weight can go
        home = linear.weight.device
        made = Fp8Linear.of(linear, arithmetic=arithmetic, through=through)
        model.set_submodule(name, made if keep_there else made.to(home))
        del linear
    return sum(isinstance(module, Fp8Linear) for module in model.modules())


def has_arithmetic(device: torch.device) -> bool:
    """Whether a device multiplies FP8: Ada, Hopper, Blackwell."""
    return device.type == "cuda" and bool(torch.cuda.get_device_capability(device) >= gpu.FP8_CAPABILITY)
