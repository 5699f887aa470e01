"""Builds a pipeline from a verified folder, its weights read once, by `vidgen.accel.loader`.

While the weights are being read, the models are made without weights, and tokenizers and schedulers loaded. diffusers'
models then take the tensors as they are; transformers' models are handed them, to rename and tie them by its own rules.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import no_init_weights
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers import modeling_utils
from transformers.utils import logging as transformers_logging

from vidgen import diffusion, weights
from vidgen.accel import ahead, fp8, kernels, loader
from vidgen.errors import FatalError
from vidgen.weights import SCALE

P = TypeVar("P")
Tensors = dict[str, Tensor]
OnPhase = Callable[[str, float], None]
# Components that are not loaded, and how each is had of those that have no weights either.
Instead = Mapping[str, Callable[[Mapping[str, Any]], Any]]


@dataclass(frozen=True)
class Part:
    """A component of a pipeline: its class, from one of two libraries, and its folder."""

    name: str
    library: str
    kind: Any
    folder: Path

    @property
    def in_float32(self) -> frozenset[str]:
        """The parts of tensors' names that its class keeps in float32, or does not want to be cast by others."""
        listed = [getattr(self.kind, f"_keep_in_fp32_modules{more}", None) or () for more in ("", "_strict")]
        return frozenset(name for names in listed for name in ([names] if isinstance(names, str) else names))


def assemble(
    pipeline: type[P],
    found: weights.Weights,
    device: torch.device,
    dtypes: Mapping[str, torch.dtype],
    *,
    arithmetic: bool,
    instead: Instead = MappingProxyType({}),
    reading: loader.Reading | None = None,
    on_phase: OnPhase = lambda phase, seconds: None,
) -> P:
    """Build the pipeline of a verified folder on the device: what `from_pretrained` builds, in less time.

    `dtypes` are the precisions of the components, with a `default`. What is had `instead` is not loaded. What an FP8
    snapshot holds in FP8 becomes `Fp8Linear`, with that `arithmetic`. A `reading` of the folder's weights that was
    begun before is gone on with.
    `on_phase` is told the seconds of `read` from its beginning to its end, and of `build` without what was waited for.
    Raises FatalError.
    """
    # A worker's log is read by machines: loading bars have no place in it.
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    begun = time.perf_counter()
    with diffusion.loading(f"the weights in {found.folder}", "download the model again"):
        reading = reading or ahead.begin(found, device, dtypes)
        try:
            parts = parts_of(found.folder)
            models = sorted((part for part in parts if is_model(part)), key=lambda part: part.library == "diffusers")
            wanted = {part.name: dtypes.get(part.name, dtypes["default"]) for part in models}
            made = {part.name: part.kind.from_pretrained(part.folder, local_files_only=True)
                    for part in parts if part not in models and part.name not in instead}  # fmt: skip
            made |= {name: had_of(made) for name, had_of in instead.items()}
            empty = {part.name: skeleton(part, wanted[part.name]) for part in models if part.library == "diffusers"}
            waited = 0.0
            for part in models:
                asked = time.perf_counter()
                tensors = _taken(part, reading, wanted[part.name])
                waited += time.perf_counter() - asked
                if part.name in empty:
                    made[part.name] = _filled(empty.pop(part.name), tensors, part, arithmetic=arithmetic)
                else:
                    made[part.name] = _by_transformers(part, tensors, device, wanted[part.name])
                del tensors
        finally:
            reading.close()
        pipe: Any = pipeline.from_pretrained(  # type: ignore[attr-defined]
            found.folder, local_files_only=True, trust_remote_code=False, **made
        )
        pipe.set_progress_bar_config(disable=True)
        loaded: P = pipe.to(device)
    loader.give_back(device)
    on_phase("read", reading.seconds)
    on_phase("build", time.perf_counter() - begun - waited)
    return loaded


def parts_of(folder: Path) -> list[Part]:
    """The components of a verified folder."""
    return [
        Part(name, library, getattr(importlib.import_module(library), kind), folder / name)
        for name, library, kind in weights.components(folder)
    ]


def is_model(part: Part) -> bool:
    """Whether a component has weights; schedulers and tokenizers name their configurations differently."""
    return (part.folder / "config.json").is_file()


def skeleton(part: Part, dtype: torch.dtype) -> nn.Module:
    """A model of diffusers whose parameters are on the meta device.

    What else it holds, tables of rotations above all, is on the CPU, and made in `dtype` as `from_pretrained` does.
    Raises FatalError where it was quantised in another way than ours.
    """
    config = part.kind.load_config(part.folder, local_files_only=True)
    if (told := config.pop("quantization_config", fp8.MARK)) != fp8.MARK:
        raise _foreign(part, f"weights that are quantised in another way than this version's, {told}")
    # No numbers are drawn for them either, which takes the processor as long where there is nowhere to put them.
    with _default_dtype(dtype), no_init_weights(), init_empty_weights(include_buffers=False):
        model: nn.Module = part.kind.from_config(config)
    return model.eval()


def _taken(part: Part, reading: loader.Reading, dtype: torch.dtype) -> Tensors:
    """A component's tensors in the wanted precision, cast file by file."""
    taken: Tensors = {}
    files = weights.tensor_files(part.folder)
    scaled = {entry.name.removesuffix(SCALE) for file in files for entry in loader.header(file)
              if entry.name.endswith(SCALE)}  # fmt: skip
    stay = {f"{name}{end}" for name in scaled for end in (".weight", SCALE)}
    for file in files:
        tensors = reading.take(file)
        for name in list(tensors):
            tensor = tensors.pop(name)
            if name in stay or not tensor.is_floating_point():
                taken[name] = tensor
            elif tensor.dtype.itemsize == 1:
                raise _foreign(part, f"{name} in FP8 without the scales that this version's has")
            elif part.in_float32.isdisjoint(name.split(".")):
                taken[name] = tensor.to(dtype)
            else:
                # transformers decides by itself which of them it casts after all.
                taken[name] = tensor.float() if part.library == "diffusers" else tensor
    return taken


def _filled(model: nn.Module, tensors: Tensors, part: Part, *, arithmetic: bool) -> nn.Module:
    """Give a model its tensors; a layer that comes with scales becomes an FP8 one."""
    for name in [name.removesuffix(SCALE) for name in tensors if name.endswith(SCALE)]:
        _put_fp8(model, name, tensors, part, arithmetic=arithmetic)
    missing = model.load_state_dict(tensors, strict=False, assign=True).missing_keys
    _refuse_missing(part, missing)
    return model


def _put_fp8(model: nn.Module, name: str, tensors: Tensors, part: Part, *, arithmetic: bool) -> None:
    linear, weight, scale = model.get_submodule(name), tensors[f"{name}.weight"], tensors[name + SCALE]
    if (
        not isinstance(linear, nn.Linear)
        or (weight.dtype, scale.dtype) != (kernels.E4M3, torch.float32)
        or (weight.shape, scale.shape) != (linear.weight.shape, (linear.out_features, 1))
    ):
        raise _foreign(part, f"{name} in another FP8 than this version's")
    bias = tensors[f"{name}.bias"] if linear.bias is not None else None
    model.set_submodule(name, fp8.Fp8Linear(weight, scale, bias, arithmetic=arithmetic))


def _foreign(part: Part, what: str) -> FatalError:
    return FatalError(
        f"{part.folder} holds {what}: take the model as it was released, and make it with `vidgen weights quantize`",
        code="weights_refused",
    )


def _by_transformers(part: Part, tensors: Tensors, device: torch.device, dtype: torch.dtype) -> Any:
    config = part.kind.config_class.from_pretrained(part.folder, local_files_only=True)
    with _without_warm_up():
        model, told = part.kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, device_map={"": device}, output_loading_info=True,
            local_files_only=True,
        )  # fmt: skip
    _refuse_missing(part, [*told["missing_keys"], *told["mismatched_keys"]])
    return model


@contextlib.contextmanager
def _without_warm_up() -> Iterator[None]:
    """Keep transformers from reserving the model's size on the device: its tensors are there already.

    On a small device there is not room for both.
    """
    theirs = modeling_utils.caching_allocator_warmup
    modeling_utils.caching_allocator_warmup = lambda *args, **kwargs: None
    try:
        yield
    finally:
        modeling_utils.caching_allocator_warmup = theirs


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _refuse_missing(part: Part, missing: Sequence[Any]) -> None:
    if missing:
        raise FatalError(
            f"{part.folder} lacks {len(missing)} of the model's tensors, such as {missing[0]}: "
            "download the model again",
            code="weights_missing",
        )
