"""What of a start needs torch alone, begun while the packages of the models are still being imported.

Importing takes one processor for seconds, and leaves the others, the disk and the device idle.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor

from vidgen import diffusion, native, profiles, weights
from vidgen.accel import loader, residency
from vidgen.accel.loader import Entry
from vidgen.errors import FatalError

# The layers of an attention whose weights become one, in their order.
QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")
# So much of a file may lie on the device twice, as it is stored and as it is cast.
LITTLE = 1 << 30
_OPENING = threading.Lock()  # what one thread tries, another one may be about to use
_NO_PAGES = threading.Event()  # of this driver

log = structlog.get_logger(__name__)


def begin_for(
    model: str, revision: str | None, layout: Mapping[str, Any], pipelines: frozenset[str], work: int
) -> loader.Reading | None:
    """Begin to read a model to where an engine with this `Layout`, alone on its device, will want it.

    `layout` are its fields and `work` the bytes that a task takes: `Layout` itself comes with all that takes so long.
    None where there is no GPU, or where it is quantised on its way. Raises FatalError, as the engine would.
    """
    target = diffusion.device_of(layout["device"])
    if target.type != "cuda":
        return None
    found = weights.require(model, revision, pipelines=pipelines)
    open_device(target)
    threading.Thread(target=settle, args=(target,), name="settle", daemon=True).start()
    dtype = diffusion.dtype_of(layout["dtype"], target)
    sizes = weights.component_sizes(found.folder, dtype.itemsize)
    chosen = profiles.choose(layout["profile"], memory(target), sizes, work, stored_fp8=found.profile == "fp8")
    if chosen.endswith("fp8") and found.profile != "fp8":
        return None
    streams = chosen.startswith("offload")
    place = torch.device("cpu") if streams else target
    return begin(found, place, {"default": dtype}, streams=streams, sparing=True)


def open_device(device: torch.device) -> None:
    """Make the context of a GPU, and have torch take its memory in pages, where the driver has them and nobody decided.

    Pages that were let go anywhere make room for a large tensor; else there is room enough behind some dozens of tasks
    of many sizes, and none in one piece (docs/performance.md).
    """
    allocators = (os.environ.get(name) for name in native.ALLOCATOR)
    decided = any(one not in (None, native.PINNED_BY_THREADS) for one in allocators)
    with _OPENING:
        # One that gave none once is not asked again: that would find what there is by now, and not the fault.
        in_pages = not decided and not _NO_PAGES.is_set()
        try:
            if in_pages:
                _in_pages(True)
            torch.zeros(1, device=device)
        except RuntimeError as exc:  # as on some virtual GPUs and under WSL
            if not in_pages or isinstance(exc, torch.OutOfMemoryError):
                raise
            _in_pages(False)
            torch.zeros(1, device=device)  # or the device has another fault, which it says here
            _NO_PAGES.set()
            log.warning(
                f"the driver gives no memory in pages, so it may run out sooner where tasks are of many sizes: {exc}",
                _event="no_pages",
            )  # fmt: skip


def _in_pages(wanted: bool) -> None:
    torch._C._accelerator_setAllocatorSettings(f"{native.PINNED_BY_THREADS},expandable_segments:{wanted}")


def beginning_for(
    model: str, revision: str | None, layout: Mapping[str, Any], pipelines: frozenset[str], work: int
) -> Callable[[], loader.Reading | None]:
    """Do what `begin_for` does in a thread, for the context takes time too; what is returned waits for its result."""
    pool = ThreadPoolExecutor(1, "ahead")
    begun = pool.submit(begin_for, model, revision, layout, pipelines, work)
    pool.shutdown(wait=False)
    return begun.result


def begin(
    found: weights.Weights, device: torch.device, dtypes: Mapping[str, torch.dtype], *, streams: bool = False,
    sparing: bool = False,
) -> loader.Reading:  # fmt: skip
    """Begin to read all weights of a verified model to a device; those that are to stream to pinned memory of the host.

    `sparing` as `Reading` has it. Raises FatalError where the host has no room for them.
    """
    widest = max(dtype.itemsize for dtype in dtypes.values())

    def waits(entries: Sequence[Entry]) -> bool:
        """Whether so much of a file will be cast that there must not be many such files at once."""
        return sum(entry.end - entry.begin for entry in entries if entry.dtype.itemsize > widest) > LITTLE

    return loader.Reading(
        weights.in_reading_order(found.folder), device, waits, places(found.folder, widest) if streams else None,
        sparing=sparing,
    )  # fmt: skip


def places(folder: Path, widest: int) -> Callable[[Path, Sequence[Entry]], dict[str, Tensor]]:
    """Where the weights of a model that streams are read to: side by side in memory that is pinned where a GPU is.

    Those of the VAE, and of numbers wider than `widest` bytes, which will be cast, have memory of their own. What the
    transformer's blocks will join lies so that it is one already. Raises FatalError where the host has no room.
    """
    streams = [name for name, *_ in weights.components(folder) if name != profiles.VAE]
    size = sum(file.stat().st_size for name in streams for file in weights.tensor_files(folder / name))
    if (said := residency.no_room_for(size)) is not None:
        raise FatalError(f"{said}, or a GPU that holds them all", code="host_memory")
    slabs = residency.Slabs(size, pinned=torch.cuda.is_available())

    def made(file: Path, entries: Sequence[Entry]) -> dict[str, Tensor]:
        beside = [entry for entry in entries if file.parent.name in streams and entry.dtype.itemsize <= widest]
        rows = _rows(beside)
        given = slabs.places([sum(entry.end - entry.begin for entry in row) for row in rows])
        found: dict[str, Tensor] = {}
        for row, memory in zip(rows, given, strict=True):
            for entry, part in zip(row, memory.split([entry.end - entry.begin for entry in row]), strict=True):
                found[entry.name] = part.view(entry.dtype).reshape(entry.shape)
        return found | loader.made([entry for entry in entries if entry.name not in found], torch.device("cpu"))

    return made


def _rows(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries that are to lie without a gap between them, in their order, and each other one alone."""
    found: dict[tuple[object, ...], list[tuple[int, Entry]]] = {}
    for entry in entries:
        *owner, layer, what = ("", *entry.name.split("."))
        kind = next((names for names in (QKV, ADDED_QKV) if layer in names), None)
        if kind is None:
            found[(entry.name,)] = [(0, entry)]
        else:
            found.setdefault((*owner, kind, what, entry.dtype), []).append((kind.index(layer), entry))
    return [[entry for _, entry in sorted(row, key=lambda placed: placed[0])] for row in found.values()]


def settle(device: torch.device) -> None:
    """Have the libraries set themselves up that would else do so one by one in the warm-up; nothing depends on it."""
    with contextlib.suppress(ImportError, AttributeError):
        # A hash of all of Triton, half a second where it is not kept: each kernel's key has it in it.
        importlib.import_module("triton.runtime.cache").triton_key()
    for begin_with in (_multiply, _multiply_e4m3, _convolve, _attend, _compute):
        # What this GPU cannot do, or what there is no memory for: then the models will say so.
        with contextlib.suppress(RuntimeError), torch.no_grad():
            begin_with(device)
            diffusion.synchronize(device)


def _multiply(device: torch.device) -> None:
    """cuBLAS, in the ways in which the models' layers call it."""
    x = torch.zeros(256, 256, dtype=torch.bfloat16, device=device)
    torch.nn.functional.linear(x, x)
    torch.nn.functional.linear(x, x, x[0])
    torch.bmm(x.float()[None], x.float()[None])


def _multiply_e4m3(device: torch.device) -> None:
    """cuBLAS in FP8, by row, as an FP8 model's layers call it."""
    x = torch.zeros(256, 256, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.ones(256, 1, device=device)
    torch._scaled_mm(x, x.t(), scale, scale.t(), out_dtype=torch.bfloat16)


def _attend(device: torch.device) -> None:
    """The kernels of torch's attention that the encoders take, with the dimensions of their heads."""
    ops = torch.ops.aten
    x = torch.zeros(1, 16, 64, 80, dtype=torch.bfloat16, device=device)
    for mask in (None, torch.zeros(1, 16, 64, 64, dtype=x.dtype, device=device)):
        ops._scaled_dot_product_efficient_attention(x, x, x, mask, False)
    ops._scaled_dot_product_flash_attention(x, x, x)
    x = torch.zeros(1, 28, 64, 128, dtype=torch.bfloat16, device=device)
    ops._scaled_dot_product_flash_attention(x, x, x, is_causal=True)


def _convolve(device: torch.device) -> None:
    """cuDNN."""
    x = torch.zeros(1, 16, 4, 16, 16, dtype=torch.bfloat16, device=device)
    kernel = torch.zeros(16, 16, 3, 3, 3, dtype=torch.bfloat16, device=device)
    torch.nn.functional.conv2d(x[:, :, 0], kernel[:, :, 0])
    last = torch.channels_last_3d
    torch.nn.functional.conv3d(x.contiguous(memory_format=last), kernel.contiguous(memory_format=last))


def _compute(device: torch.device) -> None:
    """Kernels of torch's own, each of which it loads when it is first asked for: the encoders' norms and masks."""
    x = torch.zeros(2, 64, 128, dtype=torch.bfloat16, device=device)
    wide, whole, mask = x.float(), torch.arange(1, 5, device=device), x > 0
    torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    functional = torch.nn.functional
    functional.layer_norm(x, x.shape[-1:])
    for work in (functional.silu, functional.gelu, functional.normalize, torch.neg, torch.reciprocal, torch.isfinite):
        work(x)
    torch.cat((x, x)).masked_scatter(torch.cat((mask, mask)), x)
    whole.repeat_interleave(whole)
    (whole // 2, whole.cumsum(0), mask.sum(), mask.all())


def memory(device: torch.device) -> int:
    """The bytes of a GPU's memory that this process may use: its share, of which others may have taken a part."""
    share = torch.cuda.get_per_process_memory_fraction(device)
    total: int = torch.cuda.get_device_properties(device).total_memory
    return int(min(total * share, total - taken_by_others(device)))


def taken_by_others(device: torch.device) -> int:
    """The bytes of a GPU's memory that other processes have; a little that they have may not be seen."""
    # In this order: what this process takes between the two is then not put down to others.
    free, total = torch.cuda.mem_get_info(device)
    # Beside torch's tensors it has a context and the libraries' kernels, for which each profile has a reserve.
    own: int = torch.cuda.memory_reserved(device) + profiles.RESERVE
    taken: int = total - free - own
    return max(0, taken)
