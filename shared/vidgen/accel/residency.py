"""Where an engine's weights are while another engine has the device: in pinned host memory, or in unnamed files.

They are copied there once, at the first sleep. To sleep is then to let go of the device's tensors, and to wake is to
copy them back: modules, compiled blocks and hooks stay as they are, and so does every bit of the weights.

And where they are while they stream: side by side in pinned host memory, read there, or moved.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import tempfile
import traceback
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import structlog
import torch
from torch import Tensor, nn

from vidgen import diffusion
from vidgen.accel import loader
from vidgen.accel.host import host_memory
from vidgen.errors import RetryableError
from vidgen.profiles import GIB

log = structlog.get_logger(__name__)

Home = Literal["memory", "disk"]

CHUNK = 256 << 20  # pinned memory is given in powers of two
SLAB = 1 << 30  # the same, where the next ones are copied while these work
ALIGNED = 512  # as torch's allocator aligns tensors
# What is smaller may be a table or a counter that a run changes: it is kept anew at each sleep, always in memory.
SMALL = 1 << 20
SPARE = 4 << 30  # of the host's memory: for inputs, outputs and encoders
RESERVE = 2 << 30  # the same where weights stream, which leave it less


def home_for(wanted: str, size: int, available: int | None) -> Home:
    """Where weights of `size` bytes go on a host with so much memory available; pure. None: nobody knows."""
    if wanted == "auto":
        return "memory" if available is None or size + SPARE <= available else "disk"
    return "disk" if wanted == "disk" else "memory"


def pin(modules: Iterable[nn.Module], *, pinned: bool = True) -> None:
    """Move all weights into pinned host memory, side by side; what is moved is let go of where it was.

    Pinned by itself each would take a power of two, by half as much again and more. What is pinned stays where it is.
    """
    lies_in: dict[int, list[Tensor]] = {}
    for tensor in _movable(modules):
        lies_in.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    shared = list(lies_in.values())
    for size, held in _slabs([rounded(tensors[0].untyped_storage().nbytes()) for tensors in shared]):
        slab = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        for number, begin in held:
            (whole,) = _storages(shared[number][:1])
            slab[begin : begin + whole.numel()].copy_(whole)
            for tensor in shared[number]:
                tensor.data = _Place.at(tensor, 0, begin).of([slab])
        _give_back_what_was_let_go()


def _give_back_what_was_let_go() -> None:
    """Have the C library return freed memory; of blocks up to 32 MiB, as many layers are, it would keep the gaps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)


def no_room_to_pin(modules: Iterable[nn.Module]) -> str | None:
    """What to say where `pin` would take the last of the host's memory, and the worker with it; None where not."""
    storages = {one.data_ptr(): one for one in (tensor.untyped_storage() for tensor in _movable(modules))}
    if not storages:
        return None
    size = sum(size for size, _ in _slabs([rounded(one.nbytes()) for one in storages.values()]))
    return no_room_for(size, sum(one.nbytes() for one in storages.values() if one.device.type == "cpu"))


def no_room_for(size: int, given_back: int = 0) -> str | None:
    """What to say where the host has no room for so many bytes of weights that stream; None where it has.

    `given_back` are those that it is given back on the way.
    """
    free = host_memory()
    if free is None:
        return None
    left, needed = free + given_back, size + RESERVE + SLAB
    if left >= needed:
        return None
    return (
        f"the host has {left / GIB:.0f} GiB for weights that stream, which take {needed / GIB:.0f} GiB: "
        "give the worker more memory"
    )


class Slabs:
    """Pinned host memory for weights that stream and come file by file, side by side as `pin` lays them.

    `size` is about what they take in all: slabs become smaller towards its end.
    """

    def __init__(self, size: int, *, pinned: bool) -> None:
        self._left, self._pinned = size, pinned
        self._slabs: list[Tensor] = []
        self._filled: list[int] = []

    def places(self, sizes: Sequence[int]) -> list[Tensor]:
        """As many bytes as each of the sizes says, in their order, with nothing in them yet."""
        found: dict[int, Tensor] = {}
        for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
            size = rounded(sizes[number])
            rooms = (slab for slab, memory in enumerate(self._slabs) if self._filled[slab] + size <= memory.numel())
            slab = next(rooms, len(self._slabs))
            if slab == len(self._slabs):
                self._slabs.append(torch.empty(self._next(size), dtype=torch.uint8, pin_memory=self._pinned))
                self._filled.append(0)
            found[number] = self._slabs[slab][self._filled[slab] :][: sizes[number]]
            self._filled[slab] += size
            self._left -= size
        return [found[number] for number in range(len(sizes))]

    def _next(self, least: int) -> int:
        """The bytes of a new slab: a power of two, with nothing behind what is left."""
        fits = 1 << (max(SMALL, min(SLAB, self._left)).bit_length() - 1)
        return max(fits, _power(least))


def _slabs(sizes: Sequence[int]) -> list[tuple[int, list[tuple[int, int]]]]:
    """Powers of two that hold so many bytes each: of each the size, and which lie in it at which byte; pure.

    The largest first, each where there is still room.
    """
    limits: list[int] = []
    filled: list[int] = []
    held: list[list[tuple[int, int]]] = []
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        size = sizes[number]
        slab = next((slab for slab, limit in enumerate(limits) if filled[slab] + size <= limit), len(limits))
        if slab == len(limits):
            limits.append(max(SLAB, _power(size)))
            filled.append(0)
            held.append([])
        held[slab].append((number, filled[slab]))
        filled[slab] += size
    return [(_power(size), those) for size, those in zip(filled, held, strict=True)]


def _power(size: int) -> int:
    """The power of two that pinned memory of `size` bytes takes."""
    return 1 << (max(1, size) - 1).bit_length()


class Residency:
    """Moves the tensors of some modules off the device and back; one call at a time.

    `home` is `memory`, `disk` or `auto`, `folder` where the files lie, which end with the process. What was not on the
    device stays where it is. An exception leaves everything as it was.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device, home: str, folder: Path | None) -> None:
        self._modules, self._device, self._wanted, self._folder = list(modules), device, home, folder
        self._asleep = False
        self._small: _Kept | None = None
        self._large: _InMemory | _OnDisk | None = None
        self._places: list[_Place] = []
        self._lies_in: list[int] = []

    def sleep(self) -> None:
        """Let go of the device's memory."""
        if self._asleep:
            return
        tensors = list(_tensors(self._modules, self._device))
        if self._small is not None and self._knows(tensors):
            self._small.take(_storages(place.here() for place in self._places if place.chunk == 0))
        else:
            self._move_in(tensors)
        diffusion.synchronize(self._device)
        for tensor in tensors:
            tensor.data = torch.empty(0, dtype=tensor.dtype)
        self._asleep = True
        diffusion.free(self._device)

    def wake(self) -> None:
        """Come back to the device."""
        if not self._asleep:
            return
        assert self._small is not None
        assert self._large is not None
        chunks = [self._small.on(self._device), *self._large.on(self._device)]
        diffusion.synchronize(self._device)
        for place in self._places:
            place.here().data = place.of(chunks)
        self._lies_in = [chunk.untyped_storage().data_ptr() for chunk in chunks]
        self._asleep = False

    def _knows(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the tensors are those that came back at the last waking, and no layout has moved since."""
        return len(tensors) == len(self._places) and all(
            place.is_as(tensor) and tensor.untyped_storage().data_ptr() == self._lies_in[place.chunk]
            for place, tensor in zip(self._places, tensors, strict=True)
        )

    def _move_in(self, tensors: Sequence[Tensor]) -> None:
        """Copy everything to a new home."""
        self._small = self._large = None  # before the new ones take the host's memory
        self._places = []
        loader.give_back(self._device)
        pinned = self._device.type == "cuda"
        largest: dict[int, int] = {}
        for tensor in tensors:
            lies_in = tensor.untyped_storage().data_ptr()
            largest[lies_in] = max(largest.get(lies_in, 0), tensor.numel() * tensor.itemsize)
        storages = _storages(tensors)
        small = [storage for storage in storages if largest[storage.data_ptr()] < SMALL]
        groups = list(_chunks(storage for storage in storages if largest[storage.data_ptr()] >= SMALL))
        kept = _Kept(small, pinned=pinned)
        size = sum(rounded(storage.numel()) for group in groups for storage in group)
        home = home_for(self._wanted, size, host_memory())
        large = self._home(groups, home, pinned=pinned)
        diffusion.synchronize(self._device)
        begins = {
            storage.data_ptr(): (chunk, begin)
            for chunk, group in enumerate([small, *groups])
            for storage, begin in zip(group, _begins(group), strict=True)
        }
        self._places = [_Place.at(tensor, *begins[tensor.untyped_storage().data_ptr()]) for tensor in tensors]
        self._small, self._large = kept, large

    def _home(self, groups: Sequence[Sequence[Tensor]], home: Home, *, pinned: bool) -> _InMemory | _OnDisk:
        if home == "memory":
            try:
                return _InMemory(groups, pinned=pinned)
            except (RuntimeError, MemoryError) as exc:  # less can be pinned than is free
                if self._wanted != "auto" or not isinstance(diffusion.as_error(exc), RetryableError):
                    raise
                traceback.clear_frames(exc.__traceback__)  # they hold what was pinned by then
                log.warning(f"the host's memory does not take the weights, they sleep on disk: {exc}"[:300],
                            _event="asleep_on_disk")  # fmt: skip
            loader.give_back(self._device)
        return _OnDisk(groups, self._folder, pinned=pinned)


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the chunks: `begin` is the byte at which its storage starts."""

    tensor: weakref.ref[Tensor]
    chunk: int
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def at(cls, tensor: Tensor, chunk: int, begin: int) -> _Place:
        stride, offset = tensor.stride(), tensor.storage_offset()
        return cls(weakref.ref(tensor), chunk, begin, tensor.dtype, tuple(tensor.shape), tuple(stride), offset)

    def here(self) -> Tensor:
        tensor = self.tensor()
        assert tensor is not None, "the module that had it was taken apart while it slept"
        return tensor

    def is_as(self, tensor: Tensor) -> bool:
        seen = (tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))
        return self.tensor() is tensor and seen == (self.dtype, self.shape, self.stride)

    def of(self, chunks: Sequence[Tensor]) -> Tensor:
        chunk = chunks[self.chunk]
        whole = chunk[: chunk.numel() // self.dtype.itemsize * self.dtype.itemsize].view(self.dtype)
        return whole.as_strided(self.shape, self.stride, self.begin // self.dtype.itemsize + self.offset)


class _Kept:
    """Some storages side by side in host memory; the copies from the device and to it are queued, not waited for."""

    def __init__(self, storages: Sequence[Tensor], *, pinned: bool) -> None:
        self._size = sum(rounded(storage.numel()) for storage in storages)
        self._pieces = [
            torch.empty(min(CHUNK, self._size - begin), dtype=torch.uint8, pin_memory=pinned)
            for begin in range(0, self._size, CHUNK)
        ]
        self._put(_begins(storages), storages)

    def take(self, wholes: Sequence[Tensor]) -> None:
        """Copy what `on` gave back, if it gave anything."""
        self._put([0] * len(wholes), wholes)

    def _put(self, begins: Sequence[int], storages: Sequence[Tensor]) -> None:
        for begin, storage in zip(begins, storages, strict=True):
            for done, held in self._parts(begin, storage.numel()):
                held.copy_(storage[done : done + held.numel()], non_blocking=True)

    def on(self, device: torch.device, begin: int = 0, size: int | None = None) -> Tensor:
        """All of it, or a range of bytes, as one new tensor on the device."""
        whole = torch.empty(self._size if size is None else size, dtype=torch.uint8, device=device)
        for done, held in self._parts(begin, whole.numel()):
            whole[done : done + held.numel()].copy_(held, non_blocking=True)
        return whole

    def _parts(self, begin: int, size: int) -> Iterator[tuple[int, Tensor]]:
        """Where a range of bytes lies: how far into the range, and the part of one piece that begins there."""
        done = 0
        while done < size:
            piece, at = self._pieces[(begin + done) // CHUNK], (begin + done) % CHUNK
            held = piece[at : at + min(size - done, piece.numel() - at)]
            yield done, held
            done += held.numel()

    def write(self, file: IO[bytes], name: str) -> None:
        """As a safetensors file of one tensor."""
        told = {name: {"dtype": "U8", "shape": [self._size], "data_offsets": [0, self._size]}}
        header = json.dumps(told).encode()
        file.write(len(header).to_bytes(8, "little") + header)
        for piece in self._pieces:
            file.write(piece.numpy())
        file.flush()


class _InMemory:
    """All groups side by side: kept apart each would take a power of two, by a quarter more in all."""

    def __init__(self, groups: Sequence[Sequence[Tensor]], *, pinned: bool) -> None:
        self._sizes = [sum(rounded(storage.numel()) for storage in group) for group in groups]
        self._kept = _Kept([storage for group in groups for storage in group], pinned=pinned)

    def on(self, device: torch.device) -> list[Tensor]:
        begins = itertools.accumulate(self._sizes, initial=0)
        return [self._kept.on(device, begin, size) for begin, size in zip(begins, self._sizes, strict=False)]


class _OnDisk:
    """Files without a name: whatever ends this process, their space is free again."""

    def __init__(self, groups: Sequence[Sequence[Tensor]], folder: Path | None, *, pinned: bool) -> None:
        self._files: list[IO[bytes]] = []
        weakref.finalize(self, _close, self._files)
        for number, group in enumerate(groups):
            kept = _Kept(group, pinned=pinned)
            if pinned:
                torch.cuda.synchronize(group[0].device)
            file = tempfile.TemporaryFile(prefix="vidgen-asleep-", dir=folder)  # noqa: SIM115  as long as this lives
            self._files.append(file)
            kept.write(file, str(number))

    def on(self, device: torch.device) -> list[Tensor]:
        read = loader.read([Path(f"/proc/self/fd/{file.fileno()}") for file in self._files], device)
        loader.give_back(device)
        return [read[str(number)] for number in range(len(self._files))]


def _close(files: Sequence[IO[bytes]]) -> None:
    for file in files:
        file.close()


def _tensors(modules: Iterable[nn.Module], device: torch.device | None = None) -> Iterator[Tensor]:
    """Every parameter and buffer on the device, or anywhere, once however many modules have it."""
    seen: set[int] = set()
    for module in itertools.chain.from_iterable(module.modules() for module in modules):
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if device in (None, tensor.device) and tensor.numel() and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def _movable(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Every tensor that is not in pinned memory already."""
    return (tensor for tensor in _tensors(modules) if not tensor.is_pinned())


def _storages(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The bytes of each storage that the tensors lie in, in their order; views of one storage share it."""
    found: dict[int, Tensor] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in found:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            found[storage.data_ptr()] = whole.set_(storage)
    return list(found.values())


def _chunks(storages: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Groups of storages of at most CHUNK bytes together; one that is larger is a group of its own."""
    group: list[Tensor] = []
    for storage in storages:
        if group and sum(rounded(one.numel()) for one in (*group, storage)) > CHUNK:
            yield group
            group = []
        group.append(storage)
    if group:
        yield group


def _begins(storages: Sequence[Tensor]) -> list[int]:
    sizes = (rounded(storage.numel()) for storage in storages)
    return list(itertools.accumulate(sizes, initial=0))[:-1]


def rounded(size: int) -> int:
    """The bytes that a tensor of `size` takes among others."""
    return math.ceil(size / ALIGNED) * ALIGNED
