"""Writes an FP8 snapshot of a model: half the bytes to load, and nothing to quantise at the start.

One tensor after another, so that a model larger than the memory can be quantised. A layer X that gains by FP8 becomes
`X.weight`, (out, in) e4m3, and `X.weight_scale`, (out, 1) float32; everything else stays as it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open
from torch import Tensor, nn

from vidgen import __version__, diffusion, manifest, weights
from vidgen.accel import fp8, kernels, loader
from vidgen.accel.assemble import Part, is_model, parts_of, skeleton
from vidgen.accel.kernels import e4m3
from vidgen.errors import FatalError, StoreError
from vidgen.scratch import Scratch
from vidgen.weights import SCALE

COMPONENTS = ("transformer", "transformer_2")
LARGEST_SHARD = 5 * 10**9
STEM = "diffusion_pytorch_model"
WIDE = (torch.float32, torch.bfloat16, torch.float16)
NAMES = {dtype: name for name, dtype in loader.DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return int(self.dtype.itemsize) * math.prod(self.shape)


def quantize(
    source: weights.Weights,
    to: Path,
    *,
    loras: Mapping[str, str] | None = None,
    least: int = fp8.LEAST_FEATURES,
    on_progress: weights.OnProgress = weights.unheard,
) -> weights.Weights:
    """Write the FP8 snapshot of a verified model into the new folder `to`, all of it or nothing.

    `loras` are fused each into the component that it is for, before it is quantised: FP8 weights take none later.
    Layers with a side smaller than `least` stay as they are. `on_progress` hears of the phases `quantize` and `check`,
    in bytes. Raises FatalError.
    """
    if source.profile == "fp8":
        raise FatalError(f"{source.folder} is in FP8 already: quantize the model that it was made of", code="usage")
    if to.exists():
        raise FatalError(f"{to} is there already: name a new folder, or delete it", code="usage")
    try:
        # Half a model: what one that was killed has left there goes when the next one begins.
        with contextlib.closing(Scratch(to.parent)) as scratch, torch.no_grad():
            folder = scratch.folder() / to.name
            _write(source, folder, loras or {}, least, on_progress)
            folder.rename(to)
    except (OSError, StoreError) as exc:
        reason = exc.message if isinstance(exc, StoreError) else exc.strerror or exc
        raise FatalError(f"{to} could not be written: {reason}", code="not_written") from exc
    return weights.require(str(to))


def _write(
    source: weights.Weights, folder: Path, loras: Mapping[str, str], least: int, on_progress: weights.OnProgress
) -> None:
    with diffusion.loading(f"the weights in {source.folder}", "download the model again"):
        parts = [part for part in parts_of(source.folder) if part.name in COMPONENTS and is_model(part)]
        lacking = sorted(loras.keys() - {part.name for part in parts})
        if lacking:
            raise FatalError(f"this model has no {lacking[0]} for a LoRA: leave that LoRA out", code="usage")
        components = [_Component(part, loras.get(part.name), least) for part in parts]
    known = _copy(source.folder, folder, [part.name for part in parts])
    done, total = 0, sum(component.bytes for component in components)
    for component in components:
        for name, sha256, written in component.write(folder):
            known |= {name: sha256} if sha256 else {}
            done += written
            on_progress("quantize", done, total)
    fused = "".join(f", {Path(path).name} fused into its {name}" for name, path in sorted(loras.items()))
    count = weights.counted(folder, set(manifest.paths(folder)) - set(known), on_progress)
    files = manifest.describe(folder, known, count)
    manifest.write(
        folder,
        manifest.Manifest(
            model=source.model, revision=source.revision, created_by=f"vidgen {__version__}, quantized{fused}",
            profile="fp8", files=tuple(files),
        ),
    )  # fmt: skip


def _copy(source: Path, folder: Path, without: Sequence[str]) -> dict[str, str]:
    """Everything but the weights of some components, as hard links where they can be; the checksums that are known."""
    told = manifest.read(source)
    for name in manifest.paths(source):
        component = name.split("/")[0]
        if component in without and name.endswith(manifest.WEIGHTS):
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if component in without and name == f"{component}/config.json":
            marked = json.loads((source / name).read_bytes()) | {"quantization_config": fp8.MARK}
            (folder / name).write_text(json.dumps(marked, indent=2) + "\n", "utf-8")
        elif name.endswith(".safetensors"):
            _link((source / name).resolve(), folder / name)
        else:
            shutil.copyfile(source / name, folder / name)
    linked = [file for file in told.files if file.path.endswith(".safetensors")] if told is not None else []
    return {file.path: file.sha256 for file in linked if (folder / file.path).is_file()}


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


class _Component:
    """A transformer on its way from its own files into shards of FP8."""

    def __init__(self, part: Part, lora: str | None, least: int) -> None:
        self._part = part
        found = [(entry, file) for file in weights.tensor_files(part.folder) for entry in loader.header(file)]
        self._files = {entry.name: file for entry, file in found}
        self._stored: dict[str, Any] = {}
        model = skeleton(part, torch.bfloat16)
        suited = {f"{name}.weight" for name in fp8.targets(model, least)}
        self._quantised = {entry.name for entry, _ in found if entry.name in suited and entry.dtype in WIDE}
        self._fused = _with_lora(part, model, lora) if lora is not None else {}
        self._shards = _shards([Stored(entry.name, entry.dtype, entry.shape) for entry, _ in found], self._quantised)

    @property
    def bytes(self) -> int:
        return sum(stored.bytes for shard in self._shards for stored in shard)

    def write(self, folder: Path) -> Iterator[tuple[str, str | None, int]]:
        """Write the shards; after each tensor the file, its checksum where it is complete, and the bytes written."""
        count, weight_map = len(self._shards), dict[str, str]()
        with ExitStack() as stack:
            opened = {file: stack.enter_context(safe_open(file, "pt")) for file in set(self._files.values())}
            self._stored = {name: opened[file] for name, file in self._files.items()}
            for number, shard in enumerate(self._shards, 1):
                name = f"{STEM}.safetensors" if count == 1 else f"{STEM}-{number:05}-of-{count:05}.safetensors"
                weight_map |= {stored.name: name for stored in shard}
                for sha256, written in _write_file(folder / self._part.name / name, shard, self._tensors(shard)):
                    yield f"{self._part.name}/{name}", sha256, written
        if count > 1:
            told = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(weight_map.items()))}
            index = folder / self._part.name / f"{STEM}.safetensors.index.json"
            index.write_text(json.dumps(told, indent=2) + "\n", "utf-8")

    def _tensors(self, shard: Sequence[Stored]) -> Iterator[Tensor]:
        """The tensors of a shard in its order; the scales come after all the weights that they are of."""
        scales: dict[str, Tensor] = {}
        for stored in shard:
            if stored.name in self._quantised:
                weight, scale = e4m3.rows_in_e4m3(self._tensor(stored.name))
                scales[stored.name.removesuffix(".weight") + SCALE] = scale
                yield weight
            elif stored.name in scales:
                yield scales.pop(stored.name)
            else:
                yield self._tensor(stored.name).to(stored.dtype)

    def _tensor(self, name: str) -> Tensor:
        """A tensor as it is stored, or in float32 with the LoRA in it."""
        layer, _, kind = name.rpartition(".")
        if layer not in self._fused:
            tensor: Tensor = self._stored[name].get_tensor(name)
            return tensor
        fused = self._fused[layer]
        base = fused.get_base_layer()
        for one in ("weight", "bias"):
            if (own := f"{layer}.{one}") in self._stored:
                setattr(base, one, nn.Parameter(self._stored[own].get_tensor(own).float(), requires_grad=False))
        fused.merge(adapter_names=["lora"])
        merged: Tensor = getattr(base, kind).data
        # Made anew for the layer's other tensor, so that neither stays in the memory.
        fused.merged_adapters.clear()
        _empty(base)
        return merged


def _shards(entries: Sequence[Stored], quantised: Set[str]) -> list[list[Stored]]:
    """What goes into each file; a layer's weight and its scales into the same one.

    In a file the kinds follow one another in an order in which each tensor lies at a multiple of its type's size.
    """
    shards: list[list[Stored]] = [[]]
    size = 0
    for entry in entries:
        group = [entry]
        if entry.name in quantised:
            name, rows = entry.name.removesuffix(".weight"), entry.shape[0]
            group = [Stored(entry.name, kernels.E4M3, entry.shape), Stored(name + SCALE, torch.float32, (rows, 1))]
        more = sum(stored.bytes for stored in group)
        if shards[-1] and size + more > LARGEST_SHARD:
            shards.append([])
            size = 0
        shards[-1] += group
        size += more

    def place(stored: Stored) -> tuple[int, int]:
        kind = 0 if stored.name in quantised else 1 if stored.name.endswith(SCALE) else 2
        return kind, -stored.dtype.itemsize

    return [sorted(shard, key=place) for shard in shards]


def _write_file(path: Path, shard: Sequence[Stored], tensors: Iterator[Tensor]) -> Iterator[tuple[str | None, int]]:
    """Write a safetensors file tensor by tensor; after each its bytes, with the last the file's SHA-256."""
    head = _head(shard)
    sha256 = hashlib.sha256()
    with path.open("xb") as file:
        file.write(head)
        sha256.update(head)
        for number, (stored, tensor) in enumerate(zip(shard, tensors, strict=True), 1):
            if (tensor.dtype, tuple(tensor.shape)) != (stored.dtype, stored.shape):
                raise ValueError(f"{stored.name} came out as {tensor.dtype} {tuple(tensor.shape)}")
            written = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            file.write(written)
            sha256.update(written)
            if number == len(shard):
                file.flush()
                os.fsync(file.fileno())
            yield (sha256.hexdigest() if number == len(shard) else None), stored.bytes


def _head(shard: Sequence[Stored]) -> bytes:
    """What a safetensors file begins with that holds these tensors in this order."""
    begin, listed = 0, {}
    for stored in shard:
        offsets = [begin, begin + stored.bytes]
        listed[stored.name] = {"dtype": NAMES[stored.dtype], "shape": list(stored.shape), "data_offsets": offsets}
        begin += stored.bytes
    header = json.dumps({"__metadata__": {"format": "pt"}, **listed}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _with_lora(part: Part, model: nn.Module, path: str) -> dict[str, Any]:
    """The layers that a LoRA changes in a model without weights, by name; the pipeline itself loads it."""
    from peft.tuners.lora import LoraLayer

    file = weights.lora_file(path)
    index = json.loads((part.folder.parent / weights.INDEX).read_bytes())
    pipeline = getattr(diffusers, index["_class_name"])
    _empty(model)
    # All but the transformers stays out. Whichever it is, diffusers looks at the first one.
    needed = [name for name, given in inspect.signature(pipeline).parameters.items() if given.default is given.empty]
    pipe = pipeline(**dict.fromkeys(needed) | {"transformer": model, part.name: model})
    into = {"load_into_transformer_2": True} if part.name == "transformer_2" else {}
    with diffusion.loading(f"the LoRA {file}", "use one that was made for this model"):
        pipe.load_lora_weights(
            str(file.parent), weight_name=file.name, adapter_name="lora", use_safetensors=True, local_files_only=True,
            **into,
        )  # fmt: skip
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
        # diffusers only warns where not one key of the file belongs to the component.
        if not layers:
            raise ValueError(f"no key in it belongs to the {part.name}")
    return layers


def _empty(model: nn.Module) -> None:
    """Put the weights of a model on the CPU without memory for them: peft puts a LoRA where its layer is."""
    nothing = torch.zeros(())
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.load_state_dict({name: nothing.expand(shape) for name, shape in shapes.items()}, strict=False, assign=True)
