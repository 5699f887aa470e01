"""How a model is laid into a GPU's memory, chosen from the memory found: never by trying and dying. Pure.

What a profile needs follows from the sizes of the model's own files, and from what one task needs beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from vidgen.errors import FatalError

Name = Literal["resident-bf16", "resident-fp8", "offload-fp8"]
NAMES: tuple[Name, ...] = get_args(Name)

GIB = 1 << 30
# The CUDA context, cuBLAS' and cuDNN's workspaces, and what the allocator cannot use.
RESERVE = 3 * GIB // 2
# Layers outside the blocks stay in bfloat16: their share of a transformer, and the scales.
FP8_SHARE = 0.52
TRANSFORMERS = ("transformer", "transformer_2")


@dataclass(frozen=True)
class Need:
    """The bytes of GPU memory that a profile needs for one model."""

    name: Name
    bytes: int


def needs(parts: Mapping[str, int], work: int, *, stored_fp8: bool = False) -> tuple[Need, ...]:
    """What each profile needs, fastest first.

    `parts` is the size of each component's weights as they are stored, `work` what a task takes beside them, both in
    bytes. What is stored in FP8 is not widened again.
    """
    transformers = sum(parts.get(name, 0) for name in TRANSFORMERS)
    others = sum(parts.values()) - transformers
    # Offloaded, only one component is on the GPU at a time, and of it only some layers.
    largest_layer = max(parts.values(), default=0) // 16
    in_fp8 = transformers if stored_fp8 else int(transformers * FP8_SHARE)
    wide = () if stored_fp8 else (Need("resident-bf16", transformers + others + work + RESERVE),)
    return (
        *wide,
        Need("resident-fp8", in_fp8 + others + work + RESERVE),
        Need("offload-fp8", largest_layer + work + RESERVE),
    )


def choose(wanted: str, total: int, parts: Mapping[str, int], work: int, *, stored_fp8: bool = False) -> Name:
    """The profile for a GPU of `total` bytes; raises FatalError `gpu_too_small` with what each profile needs.

    `wanted` is `auto`, or a profile's name, which is then refused where it does not fit.
    """
    found = needs(parts, work, stored_fp8=stored_fp8)
    fitting = [need.name for need in found if need.bytes <= total]
    if wanted == "auto" and fitting:
        return fitting[0]
    for name in NAMES:
        if wanted == name and name in fitting:
            return name
    told = ", ".join(f"{need.name} {need.bytes / GIB:.0f} GiB" for need in found)
    remedy = "use a larger GPU or a smaller model" if not fitting else f"VIDGEN_PROFILE={fitting[0]} fits"
    raise FatalError(
        f"this GPU has {total / GIB:.0f} GiB, and this model needs: {told}. {remedy[0].upper()}{remedy[1:]}",
        code="gpu_too_small",
    )
