"""Writes a model of the true shape to a disk as fast as that takes it: random numbers, in the files of a real one.

Nothing is built: the shapes come of a pipeline on the meta device, and each tensor is a stretch of the same block of
random numbers.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from vidgen import manifest
from vidgen.accel import fp8, quantize
from vidgen.accel.quantize import Stored

BLOCK = 16 << 20
WRITERS = 16


def write(pipe: Any, folder: Path, *, in_fp8: bool, least: int = fp8.LEAST_FEATURES) -> int:
    """Write a pipeline that is on the meta device, its transformers in FP8 if asked; the bytes of its weights."""
    pipe.save_config(folder)
    files: list[tuple[Path, list[Stored]]] = []
    for name, part in pipe.components.items():
        if not isinstance(part, torch.nn.Module):
            if part is not None:
                part.save_pretrained(folder / name)
                _list_added_tokens(getattr(part, "tokenizer", part), folder / name)
            continue
        _configure(part, folder / name)
        narrow = in_fp8 and name in quantize.COMPONENTS
        if narrow:
            _mark(folder / name)
        files += _files(part, folder / name, set(fp8.targets(part, least)) if narrow else set())
    stretches = list(_stretches(files))
    for dtype in {dtype for *_, dtype in stretches}:
        _block(dtype)
    with ThreadPoolExecutor(WRITERS) as pool:
        size = sum(pool.map(_fill, *zip(*stretches, strict=True)))
    if in_fp8:
        told = tuple(
            manifest.File(path=name, size=(folder / name).stat().st_size, sha256="0" * 64)
            for name in manifest.paths(folder)
        )
        manifest.write(folder, manifest.Manifest(model="random", created_by="a benchmark", profile="fp8", files=told))
    return size


def _list_added_tokens(tokenizer: Any, folder: Path) -> None:
    """Have a tokenizer's configuration list them, as transformers 4 wrote it and the released models have it.

    Else transformers 5 reads all of `tokenizer.json` once more, for them alone.
    """
    config = folder / "tokenizer_config.json"
    if config.exists():
        told = {
            number: {"content": token.content, "single_word": token.single_word, "lstrip": token.lstrip,
                     "rstrip": token.rstrip, "normalized": token.normalized, "special": token.special}
            for number, token in tokenizer.added_tokens_decoder.items()
        }  # fmt: skip
        config.write_text(json.dumps(json.loads(config.read_bytes()) | {"added_tokens_decoder": told}))


def _configure(part: Any, folder: Path) -> None:
    if hasattr(part, "save_config"):
        part.save_config(folder)
    else:
        part.config.save_pretrained(folder)
        if part.can_generate():
            part.generation_config.save_pretrained(folder)


def _mark(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_bytes()) | {"quantization_config": fp8.MARK}))


def _files(part: Any, folder: Path, quantised: set[str]) -> Iterator[tuple[Path, list[Stored]]]:
    """The shards of a component, with its index where it has several."""
    stem = quantize.STEM if hasattr(part, "save_config") else "model"
    named = [Stored(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in part.state_dict().items()]
    shards = quantize._shards(named, {f"{name}.weight" for name in quantised})
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        listed = {stored.name: name for name, shard in zip(names, shards, strict=True) for stored in shard}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    for name, shard in zip(names, shards, strict=True):
        yield folder / name, shard


def _stretches(files: Sequence[tuple[Path, list[Stored]]]) -> Iterator[tuple[Path, int, int, torch.dtype]]:
    """Each file's head, and what remains to be written of it: from where, how much, and of which kind."""
    for path, shard in files:
        head = quantize._head(shard)
        path.write_bytes(head)
        begin = len(head)
        for stored in shard:
            for at in range(0, stored.bytes, BLOCK):
                yield path, begin + at, min(BLOCK, stored.bytes - at), stored.dtype
            begin += stored.bytes


@functools.cache
def _block(dtype: torch.dtype) -> memoryview:
    numbers = torch.randn(BLOCK // dtype.itemsize, generator=torch.Generator().manual_seed(0))
    # Weights of about the size that a trained layer has; of e4m3 the whole range is used, and the scales are small.
    factor = {torch.float8_e4m3fn: 64.0, torch.float32: 3e-4}.get(dtype, 0.02)
    numbers = numbers.abs() if dtype == torch.float32 else numbers
    return memoryview(numbers.mul(factor).to(dtype).view(torch.uint8).numpy())


def _fill(path: Path, begin: int, size: int, dtype: torch.dtype) -> int:
    handle = os.open(path, os.O_WRONLY)
    try:
        done = 0
        while done < size:
            done += os.pwrite(handle, _block(dtype)[done:size], begin + done)
    finally:
        os.close(handle)
    return size
