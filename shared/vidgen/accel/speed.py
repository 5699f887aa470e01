"""The levers that leave what is computed alone: attention kernels, compilation, memory formats, offloading."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import inspect
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import nn

from vidgen import profiles
from vidgen.accel import autoencoder, blocks, graphs, kernels, residency, streaming
from vidgen.errors import FatalError

log = structlog.get_logger(__name__)

# diffusers' names of the attention kernels, by ours.
ATTENTION = {
    "torch": "native", "cudnn": "_native_cudnn", "flash3": "_flash_3", "flash3-8bit": "_flash_3", "sage": "sage",
}  # fmt: skip
PACKAGES = {"flash3": "flash_attn_interface", "flash3-8bit": "flash_attn_interface", "sage": "sageattention"}
HOPPER = (9, 0)
# Each size of image or video that differs in kind recompiles once; by default dynamo gives up at eight.
RECOMPILATIONS = 64
# What the blocks of a transformer hand on from one to the next.
ROUND = {
    "QwenImageTransformerBlock": ("hidden_states", "encoder_hidden_states"), "WanTransformerBlock": ("hidden_states",),
}  # fmt: skip


def choose_attention(
    transformers: Sequence[nn.Module], wanted: str, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> str:
    """Set the attention kernels of the transformers, and say which; raises FatalError for one that is not here."""
    name = attention_of(wanted, device, dtype)
    if name not in ATTENTION:
        raise FatalError(
            f"attention {wanted} is unknown: use auto, {', '.join(ATTENTION)} for VIDGEN_ATTENTION", code="settings"
        )
    package = PACKAGES.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise FatalError(
            f"VIDGEN_ATTENTION={name} needs the package {package}: install it, or use torch", code="settings"
        )
    if package == PACKAGES["flash3"] and not _takes(dtype):
        raise FatalError(
            f"VIDGEN_ATTENTION={name} has no kernels for {str(dtype).removeprefix('torch.')} in the FlashAttention 3 "
            "that is installed: use VIDGEN_DTYPE=bfloat16, or torch",
            code="settings",
        )
    if name == "flash3-8bit" and not has_eight_bits():
        raise FatalError(
            "VIDGEN_ATTENTION=flash3-8bit needs the FlashAttention 3 that deploy/flash-attention-3/build.py builds: "
            "build it, or use flash3",
            code="settings",
        )
    for model in transformers:
        set_attention(model, ATTENTION[name])
        blocks.narrow_attention(model, name == "flash3-8bit")
    return name


def attention_of(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """The attention that a setting means on a device, for queries of this type."""
    if wanted != "auto":
        return wanted
    if not _takes(dtype):
        return "torch"
    hopper = torch.cuda.get_device_capability(device) == HOPPER
    return "flash3" if hopper and importlib.util.find_spec(PACKAGES["flash3"]) is not None else "torch"


def _takes(dtype: torch.dtype) -> bool:
    """Whether the FlashAttention 3 that is installed has kernels for a type: of float16 ours has none."""
    return dtype == torch.bfloat16 or (dtype == torch.float16 and not _left_out("FP16"))


def set_attention(model: Any, backend: str) -> None:
    """Set the attention kernels of this model, by diffusers' name, and of no other."""
    from diffusers.models.attention_dispatch import attention_backend

    # diffusers makes them the default of every model in the process too: this puts back what was.
    with attention_backend():
        model.set_attention_backend(backend)


def graph_predictions(transformers: Sequence[nn.Module], attention: str, found: graphs.Graphs | None) -> None:
    """Have the predictions of Qwen-Image's transformer answered by graphs where its attention allows that.

    `attention` is what `choose_attention` said.
    """
    told = takes_lengths(attention)
    for model in transformers:
        graphs.predict(found if told and graphs.predicts(model) else None, model)


def takes_lengths(attention: str) -> bool:
    """Whether an attention can be told on the device how many tokens there are; the others are told on the host."""
    return PACKAGES.get(attention) == PACKAGES["flash3"] and (_flag("VIDGEN_LENGTHS") or not _left_out("VARLEN"))


def keep_compiled(folder: Path) -> None:
    """Have inductor and Triton keep what they compile in this folder; their own variables, where set, win.

    Where the folder takes nothing they keep it where they do by themselves: they need a place to compile at all.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
            raise PermissionError(errno.EACCES, "it is mounted noexec, and what is compiled is run from there")
    except OSError as exc:
        log.warning(
            f"VIDGEN_COMPILE_CACHE={folder} is of no use ({exc.strerror}): the next start compiles again",
            _event="compile_cache_unusable",
        )
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def take_torchs_assembler() -> None:
    """Have Triton take the `ptxas` that torch brings, if it does, for all kernels and not just for later ones.

    Inductor sees to that at its first kernel, and in the processes that compile for it. Triton's keys have the version
    of its assembler in them: where two were at work, by chance for one kernel or for another one, the next start found
    what this one had compiled by the other, and compiled it once more.
    """
    ptxas = Path(torch.__file__).parent / "bin" / "ptxas"
    if os.access(ptxas, os.X_OK):
        os.environ.setdefault("TRITON_PTXAS_PATH", str(ptxas))


def import_compiler() -> None:
    """Import what the first compilation would: a second that goes by while weights are still on their way."""
    for name in ("torch._dynamo.repro.after_dynamo", "torch._inductor.compile_fx"):
        importlib.import_module(name)


def compile_blocks(transformers: Sequence[nn.Module]) -> None:
    """Compile the blocks that a transformer repeats, once for all of them and for all sizes and lengths of text.

    The first call compiles, or finds what an earlier process compiled.
    """
    _allow_recompilation()
    _trace_once()
    for model in transformers:
        model.compile_repeated_blocks(fullgraph=True, dynamic=True)
        first = next((block for block in model.modules() if type(block).__name__ in ROUND), None)
        if first is not None:
            first._compiled_call_impl = _owning(first, ROUND[type(first).__name__])


def _owning(block: nn.Module, names: Sequence[str]) -> Callable[..., Any]:
    """A compiled block's call, with tensors of their own for these arguments.

    What comes to the first block is a view, and what one block hands to the next is not: for dynamo these are two
    cases, and it would compile both.
    """
    call = block._compiled_call_impl
    signature = inspect.signature(block.forward)

    def owning(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        for name in names:
            if given[name]._is_view():
                given[name] = given[name].clone()
        return call(**given)

    return owning


def compile_vae(vae: Any) -> None:
    """Compile the encoder and the decoder, for each size anew at its first call: half a minute to minutes."""
    _allow_recompilation()
    # Wan's for all sizes at once was not compiled within four minutes (docs/performance.md).
    vae.encoder.compile(dynamic=False)
    vae.decoder.compile(dynamic=False)


def fuse_vae(vae: Any, device: torch.device) -> None:
    """Spare the VAE what it need not do: still frames twice, and on a Hopper in half precision passes over memory."""
    if autoencoder.rests(vae):
        return
    # The kernels' tiles are laid out for a Hopper's shared memory.
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER
    if hopper and kernels.HAS_TRITON and vae.dtype in (torch.bfloat16, torch.float16):
        autoencoder.fuse_blocks(vae)
    autoencoder.let_rest(vae)


def channels_last(vae: nn.Module) -> None:
    """Lay the convolutions' weights out as cuDNN's fastest kernels want them."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def offload(pipe: Any, device: torch.device, room: int = 0) -> None:
    """Keep the weights in pinned host memory and let them stream through the device, the next ones while these work.

    As many of the transformers' blocks stay there as `room` bytes take.
    """
    pipe.vae.to(device)
    parts = offloadable(pipe)
    if device.type == "cuda":
        residency.pin(parts.values())
    transformers = sum(name in profiles.TRANSFORMERS for name in parts)
    for name, model in parts.items():
        if name in profiles.TRANSFORMERS:
            streaming.Stream(model, device, room // transformers)
        else:  # an encoder, once in a task
            streaming.Stream(model, device, stays=False)


def offloadable(pipe: Any) -> dict[str, nn.Module]:
    """The parts of a pipeline that can stream; the VAE, which is small, stays."""
    return {
        name: part for name, part in pipe.components.items() if isinstance(part, nn.Module) and name != profiles.VAE
    }


def has_eight_bits() -> bool:
    """Whether the FlashAttention 3 that is installed reads int8 queries and keys: ours does, the published one not."""
    return _flag("VIDGEN_INT8_SCORES")


def _left_out(part: str) -> bool:
    """Whether the FlashAttention 3 that is installed was built without a part."""
    return _flag(f"FLASHATTENTION_DISABLE_{part}")


def _flag(name: str) -> bool:
    """A flag of the FlashAttention 3 that is installed."""
    if importlib.util.find_spec("flash_attn_config") is None:
        return False
    return bool(importlib.import_module("flash_attn_config").CONFIG["build_flags"].get(name, False))


def _trace_once() -> None:
    """Spare dynamo what costs seconds of a start and changes nothing."""
    # With all sizes open it takes an epsilon for a number that varies, finds that it does not, and begins again.
    torch._dynamo.config.specialize_float = True
    # It collects garbage behind each compilation: at a start among a million objects that all stay.
    torch._dynamo.config.run_gc_after_compile = False


def _allow_recompilation() -> None:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILATIONS)
