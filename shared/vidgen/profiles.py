"""How a model is laid into a GPU's memory, chosen from the memory found: never by trying and dying. Pure.

What a profile needs follows from the sizes of the model's own files, and from what one task needs beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from vidgen.contracts import Stage
from vidgen.errors import FatalError

Name = Literal["resident-bf16", "resident-fp8", "offload-fp8"]
NAMES: tuple[Name, ...] = get_args(Name)
IN_FP8: Name = "resident-fp8"
STREAMS: Name = "offload-fp8"

GIB = 1 << 30
# The CUDA context, cuBLAS' and cuDNN's workspaces, and what the allocator cannot use.
RESERVE = 3 * GIB // 2
# Layers outside the blocks stay in bfloat16: their share of a transformer, and the scales.
FP8_SHARE = 0.52
TRANSFORMERS = ("transformer", "transformer_2")
VAE = "vae"  # small: where weights stream, it stays
# What one task takes beside the weights, at the largest common size.
WORK: Mapping[Stage, int] = {
    "edit": 5 * GIB,  # one image of a megapixel with one reference: 3.9 GiB measured, graphs included
    "i2v": 6 * GIB,  # 81 frames of 832x480: 4.9 GiB measured
}


@dataclass(frozen=True)
class Need:
    """The bytes of GPU memory that a profile needs for one model."""

    name: Name
    bytes: int


def needs(parts: Mapping[str, int], work: int, *, stored_fp8: bool = False) -> tuple[Need, ...]:
    """What each profile needs, fastest first.

    `parts` is the size of each component's weights as they are held, `work` what a task takes beside them, both in
    bytes. What is stored in FP8 is not widened again.
    """
    transformers = sum(parts.get(name, 0) for name in TRANSFORMERS)
    others = sum(parts.values()) - transformers
    in_fp8 = transformers if stored_fp8 else int(transformers * FP8_SHARE)
    # Streaming, a transformer has two of its blocks on the GPU and what is outside them; an encoder, which has more
    # outside, only before there is any work. The VAE is there as a whole.
    vae = parts.get(VAE, 0)
    largest_layer = max(in_fp8, *(size for name, size in parts.items() if name != VAE), 0) // 16
    wide = () if stored_fp8 else (Need("resident-bf16", transformers + others + work + RESERVE),)
    return (
        *wide,
        Need("resident-fp8", in_fp8 + others + work + RESERVE),
        Need("offload-fp8", largest_layer + vae + work + RESERVE),
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
    if wanted in NAMES and wanted not in [need.name for need in found]:
        raise FatalError(
            f"VIDGEN_PROFILE={wanted} cannot be had of a model that is stored in FP8, which is not widened again: "
            "leave it out, or set the model to the one that it was made of",
            code="settings",
        )
    told = ", ".join(f"{need.name} {need.bytes / GIB:.0f} GiB" for need in found)
    remedy = "use a larger GPU or a smaller model" if not fitting else f"VIDGEN_PROFILE={fitting[0]} fits"
    raise FatalError(
        f"this GPU has {total / GIB:.0f} GiB, and this model needs: {told}. {remedy[0].upper()}{remedy[1:]}",
        code="gpu_too_small",
    )


# ── several models on one GPU ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Demand:
    """What one model asks of the GPU: the sizes that `needs` takes, and the bytes of the GPU that are there.

    Of one that is `bound_by_bus` it pays to keep on the GPU what there is room for, where its weights stream.
    """

    model: str
    total: int
    parts: Mapping[str, int]
    work: int
    stored_fp8: bool = False
    bound_by_bus: bool = False

    def held(self) -> dict[Name, int]:
        """What the model holds in each profile while no task runs, fastest first."""
        found = needs(self.parts, self.work, stored_fp8=self.stored_fp8)
        return {need.name: need.bytes - self.work - RESERVE for need in found}

    def room(self, profile: Name) -> int:
        """The bytes that are left in a profile for weights that would stream, were the model alone."""
        return _spare(self.total, [self], [profile]) if profile == STREAMS and self.bound_by_bus else 0


@dataclass(frozen=True)
class Plan:
    """How several models share a GPU: a profile for each, in their order, and whether only one is there at a time.

    `room` are the bytes that are left for weights that would stream, of each model that is bound by the bus.
    """

    profiles: tuple[Name, ...]
    takes_turns: bool
    room: int = 0


def share(wanted: str, demands: Sequence[Demand]) -> Plan:
    """How models share one GPU, on which one task runs at a time; raises FatalError `gpu_too_small`.

    All of them stay in the fastest profile in which they are resident, else all in FP8. Where they do not fit so, they
    take turns, each in the profile that it would have alone; unless that leaves so little on the GPU that they fit
    after all, as it does where they stream their weights. `wanted` is `auto`, or the profile that all are to have.
    """
    total = min(demand.total for demand in demands)
    if wanted == "auto":
        fastest = tuple(next(iter(demand.held())) for demand in demands)
        for together in (fastest, (IN_FP8,) * len(demands)):
            if _bytes(demands, together) <= total:
                return Plan(together, takes_turns=False)
    alone = tuple(_alone(wanted, total, demand, demands) for demand in demands)
    takes_turns = _bytes(demands, alone) > total
    rooms = [demand.room(name) for demand, name in zip(demands, alone, strict=True) if demand.bound_by_bus]
    if rooms and not takes_turns:
        rooms.append(_spare(total, demands, alone) // len(rooms))
    return Plan(alone, takes_turns, min(rooms, default=0))


def _bytes(demands: Sequence[Demand], names: Sequence[Name]) -> int:
    """What models need that are on the GPU together: what a task takes beside them, they take one at a time."""
    held = (demand.held()[name] for demand, name in zip(demands, names, strict=True))
    return sum(held) + max(demand.work for demand in demands) + RESERVE


def _spare(total: int, demands: Sequence[Demand], names: Sequence[Name]) -> int:
    """What models that are on the GPU together leave of it for weights that would stream.

    A task has half as much again: some are larger, and an allocator that is at its limit is slow.
    """
    return max(0, total - _bytes(demands, names) - max(demand.work for demand in demands) // 2)


def _alone(wanted: str, total: int, demand: Demand, demands: Sequence[Demand]) -> Name:
    try:
        return choose(wanted, total, demand.parts, demand.work, stored_fp8=demand.stored_fp8)
    except FatalError as exc:
        fastest = _bytes(demands, [next(iter(each.held())) for each in demands])
        in_fp8 = _bytes(demands, [IN_FP8] * len(demands))
        raise FatalError(
            f"{demand.model}: {exc.message}. Together, {' and '.join(each.model for each in demands)} need "
            f"{fastest / GIB:.0f} GiB to stay as they are, {in_fp8 / GIB:.0f} GiB to stay in FP8, and to take turns "
            "what the larger one needs alone",
            code=exc.code,
        ) from exc
