"""Reads safetensors at the rate of the disk, or from the page cache at the rate of the bus.

Threads read the files in chunks; on a GPU into pinned buffers, each copied to the device on a stream of its own while
the next chunk is read. Tensors are stored apart, so that each can be replaced or moved and its memory given back.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen.errors import FatalError

THREADS = 8
CHUNK = 32 << 20
# Each thread has two pinned buffers, one being read into while the other is copied: half a gigabyte at the most.
BUFFERS = 2
LARGEST_HEADER = 100 << 20
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a file: `begin` and `end` are bytes from the file's start."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor that lies in one chunk: its bytes, wherever they are to go."""

    begin: int
    target: Tensor


@dataclass(frozen=True)
class _Chunk:
    """A range of a file that is read at once, and the pieces that it is made of, in their order and without gaps."""

    file: int
    begin: int
    end: int
    pieces: tuple[_Piece, ...]


def read(files: Sequence[Path], device: torch.device) -> dict[str, Tensor]:
    """Every tensor of some safetensors files, on the device, in the precision in which it is stored.

    Raises FatalError where a file is cut short, or is not what its header says. Any thread may call it.
    """
    entries = [(number, entry) for number, file in enumerate(files) for entry in header(file)]
    if device.type == "cuda":
        # The allocator then splits one block, instead of asking the driver a thousand times.
        torch.empty(sum(_rounded(entry.end - entry.begin) for _, entry in entries), dtype=torch.uint8, device=device)
    tensors = {entry.name: torch.empty(entry.shape, dtype=entry.dtype, device=device) for _, entry in entries}
    chunks = list(_chunks((number, entry, tensors[entry.name]) for number, entry in entries))
    with ExitStack() as stack:
        handles = [stack.enter_context(file.open("rb", buffering=0)) for file in files]
        _read_all(files, [handle.fileno() for handle in handles], chunks, device)
    return tensors


def give_back(device: torch.device) -> None:
    """Let go of the pinned buffers, which torch keeps from one `read` to the next."""
    if device.type == "cuda":
        # torch 2.11 has no public name for it yet.
        empty = getattr(torch.accelerator, "empty_host_cache", None) or torch._C._host_emptyCache
        empty()


def header(file: Path) -> list[Entry]:
    """What a safetensors file holds, in the order in which it lies there; raises FatalError where that cannot be."""
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            length = int.from_bytes(opened.read(8), "little")
            if length > min(size - 8, LARGEST_HEADER):
                raise _broken(file, "its header is longer than it may be")
            listed = json.loads(opened.read(length))
    except OSError as exc:
        raise _broken(file, f"it cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise _broken(file, "its header is not JSON") from exc
    try:
        entries = [_entry(name, told, 8 + length) for name, told in listed.items() if name != "__metadata__"]
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise _broken(file, "its header does not say what it holds") from exc
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    place = 8 + length
    for entry in entries:
        if entry.begin != place or entry.end - entry.begin != entry.dtype.itemsize * math.prod(entry.shape):
            raise _broken(file, f"{entry.name} does not lie where it can")
        place = entry.end
    if place != size:
        raise _broken(file, f"it has {size} bytes, and its header tells of {place}")
    return entries


def _entry(name: str, told: dict[str, Any], base: int) -> Entry:
    begin, end = told["data_offsets"]
    shape = tuple(told["shape"])
    if not all(isinstance(number, int) and number >= 0 for number in (begin, end, *shape)):
        raise ValueError(name)
    return Entry(name, DTYPES[told["dtype"]], shape, base + begin, base + end)


def _chunks(entries: Iterator[tuple[int, Entry, Tensor]]) -> Iterator[_Chunk]:
    """Cut the tensors of each file, in their order, into chunks of at most CHUNK bytes."""
    for file, group in itertools.groupby(entries, key=lambda one: one[0]):
        pieces: list[_Piece] = []
        begin = end = 0
        for _, entry, tensor in group:
            flat, done, count = tensor.reshape(-1).view(torch.uint8), 0, entry.end - entry.begin
            while done < count:
                if not pieces:
                    begin = end = entry.begin + done
                take = min(count - done, begin + CHUNK - end)
                pieces.append(_Piece(end, flat[done : done + take]))
                done, end = done + take, end + take
                if end - begin == CHUNK:
                    yield _Chunk(file, begin, end, tuple(pieces))
                    pieces = []
        if pieces:
            yield _Chunk(file, begin, end, tuple(pieces))


def _read_all(files: Sequence[Path], handles: Sequence[int], chunks: Sequence[_Chunk], device: torch.device) -> None:
    numbers = itertools.count()
    failed = threading.Event()
    after = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def work() -> None:
        lands = _Straight() if after is None else _Staged(device, after)
        try:
            # `next` of a count is one step of the interpreter: no two threads get the same number.
            while (number := next(numbers)) < len(chunks) and not failed.is_set():
                chunk = chunks[number]
                _announce(handles, chunks[number + THREADS : number + THREADS + 1])
                try:
                    lands.take(handles[chunk.file], chunk)
                except (OSError, EOFError) as exc:
                    raise _broken(files[chunk.file], f"reading it failed: {exc}") from exc
        except BaseException:
            failed.set()
            raise
        finally:
            lands.settle()

    with ThreadPoolExecutor(THREADS, "weights") as pool:
        for done in [pool.submit(work) for _ in range(min(THREADS, len(chunks)))]:
            done.result()


def _announce(handles: Sequence[int], chunks: Sequence[_Chunk]) -> None:
    """Have the kernel fetch what will be read soon: its own readahead is too short for a fast disk."""
    for chunk in chunks:
        os.posix_fadvise(handles[chunk.file], chunk.begin, chunk.end - chunk.begin, os.POSIX_FADV_WILLNEED)


class _Straight:
    """On the CPU: each piece is read to where it stays."""

    def take(self, handle: int, chunk: _Chunk) -> None:
        for piece in chunk.pieces:
            _fill(handle, memoryview(piece.target.numpy()), piece.begin)

    def settle(self) -> None:
        return None


class _Staged:
    """On a GPU: a chunk is read into one of two pinned buffers, and copied from there while the other is filled."""

    def __init__(self, device: torch.device, after: torch.cuda.Stream | None) -> None:
        pinned = device.type == "cuda"
        self._buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=pinned) for _ in range(BUFFERS)]
        self._copied: list[torch.cuda.Event | None] = [None] * BUFFERS
        self._stream = torch.cuda.Stream(device) if pinned else None
        self._turn = 0
        if self._stream is not None:
            # What the memory was used for before is queued on the stream that the caller is on.
            self._stream.wait_stream(after)

    def take(self, handle: int, chunk: _Chunk) -> None:
        copied, buffer = self._copied[self._turn], self._buffers[self._turn]
        if copied is not None:
            copied.synchronize()
        _fill(handle, memoryview(buffer.numpy())[: chunk.end - chunk.begin], chunk.begin)
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            for piece in chunk.pieces:
                start = piece.begin - chunk.begin
                piece.target.copy_(buffer[start : start + piece.target.numel()], non_blocking=True)
            if self._stream is not None:
                self._copied[self._turn] = self._stream.record_event()
        self._turn = (self._turn + 1) % BUFFERS

    def settle(self) -> None:
        """Wait for the copies: until then the buffers must stay, and the tensors are not there."""
        if self._stream is not None:
            self._stream.synchronize()


def _fill(handle: int, target: memoryview, begin: int) -> None:
    """Read until `target` is full; raises EOFError where the file ends before."""
    done = 0
    while done < len(target):
        got = os.preadv(handle, [target[done:]], begin + done)
        if got == 0:
            raise EOFError("it ends too early")
        done += got


def _rounded(size: int) -> int:
    """The bytes that the allocator takes for a tensor."""
    return -(-size // 512) * 512


def _broken(file: Path, why: str) -> FatalError:
    return FatalError(f"{file} is damaged ({why}): download the model again", code="weights_missing")
