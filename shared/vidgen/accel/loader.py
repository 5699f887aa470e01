"""Reads safetensors at the rate of the disk, or from the page cache at the rate of the bus.

Threads read the files in chunks; on a GPU into pinned buffers, each copied to the device on a stream of its own while
the next chunk is read. A file that lies in the page cache is not read where others need the processors and the
interpreter: there the device copies from the cache itself, as fast as its driver pins that.
Unless who reads them says where they are to lie, tensors are stored apart, so that each can be replaced or moved and
its memory given back.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vidgen.accel import host, pages
from vidgen.errors import FatalError

THREADS = 8
CHUNK = 32 << 20
# Each thread has two pinned buffers, one being read into while the other is copied: 640 MiB at the most.
BUFFERS = 2
# What lies in the page cache is read by more threads, where there are so many processors.
COPIERS = 10
PLENTY = 16
# Or it is mapped, by one thread: the driver pins one window after another. Each needs the interpreter for a moment.
MAPPERS = 1
WINDOW = 1 << 30
WINDOWS = 2  # of a thread, at once
SHARE = 32  # and no window is more than such a part of the memory that is left
AHEAD = 2
SHORT_TURN_S = 0.0002
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

    begin: int
    end: int
    pieces: tuple[_Piece, ...]

    def targets(self) -> list[Tensor]:
        return [piece.target for piece in self.pieces]

    def cut(self, whole: Tensor) -> tuple[Tensor, ...]:
        """The chunk's bytes as its pieces have them."""
        parts: tuple[Tensor, ...] = whole.split([piece.target.numel() for piece in self.pieces])
        return parts


class _Way(Protocol):
    """How a thread brings chunks to their places."""

    def take(self, handle: int, chunk: _Chunk, ready: torch.cuda.Event | None) -> None:
        """Bring a chunk, when the device is `ready` for it."""

    def rest(self) -> None:
        """Wait until all that was taken is there, and hold nothing of the files any more."""


class _OfThread(threading.local):
    """The ways that each thread has taken."""

    def __init__(self) -> None:
        self.ways: dict[Callable[[torch.device], _Way], _Way] = {}


class Reading:
    """Some safetensors files on their way to a device, in the precision in which they are stored.

    It begins at once, in threads of its own, and goes through the files in their order; any thread may `take` them.
    Of files for which `waits` says so there are never more than two on the device that nobody has taken. Where `places`
    is given, it makes the tensors of each file, with nothing in them yet, on that device. A `sparing` one leaves the
    processors and the interpreter to others as far as it can, and takes longer.
    """

    def __init__(
        self,
        files: Sequence[Path],
        device: torch.device,
        waits: Callable[[Sequence[Entry]], bool] = lambda entries: False,
        places: Callable[[Path, Sequence[Entry]], dict[str, Tensor]] | None = None,
        *,
        sparing: bool = False,
    ) -> None:
        self.files, self.device, self._sparing = tuple(files), device, sparing
        self._places = places or (lambda file, entries: made(entries, device))
        self.seconds = 0.0  # from the beginning to the last file's end
        self._waits, self._waiting = waits, set[Path]()
        self._room = threading.Semaphore(AHEAD)
        self._landed: dict[Path, Future[dict[str, Tensor]]] = {file: Future() for file in files}
        self._left = threading.Event()
        self._own = _OfThread()
        # A copy, made before the thread begins: `take` may take out of the other one before it has.
        self._coordinator = threading.Thread(target=self._run, args=(dict(self._landed),), name="reader", daemon=True)
        self._coordinator.start()

    def take(self, file: Path) -> dict[str, Tensor]:
        """The tensors of one of the files, once; waits for them.

        Raises FatalError where the file is cut short, or is not what its header says.
        """
        tensors = self._landed.pop(file).result()
        if file in self._waiting:
            self._room.release()
        return tensors

    def close(self) -> None:
        """Leave what is not read yet, and wait until no thread writes to the device any more."""
        self._left.set()
        self._room.release()
        self._coordinator.join()

    def _run(self, landed: Mapping[Path, Future[dict[str, Tensor]]]) -> None:
        begun = time.perf_counter()
        try:
            _use(self.device)
            with (
                _in_short_turns(),
                ExitStack() as opened,
                ThreadPoolExecutor(max(THREADS, COPIERS), "weights") as pool,
            ):
                try:
                    # Each file is waited for when the next one is being read already.
                    begun_file = None
                    for file in self.files:
                        next_file = file, *self._begin(file, pool, opened)
                        self._complete(landed, begun_file)
                        begun_file = next_file
                    self._complete(landed, begun_file)
                except BaseException:
                    self._left.set()
                    raise
            self.seconds = time.perf_counter() - begun
        except BaseException as exc:
            for future in landed.values():
                if not future.done():
                    future.set_exception(exc)

    def _begin(
        self, file: Path, pool: ThreadPoolExecutor, opened: ExitStack
    ) -> tuple[dict[str, Tensor], list[Future[None]]]:
        """Have a file read; its tensors, and what is done when they are there."""
        entries = header(file)
        if self._waits(entries):
            self._room.acquire()
            self._waiting.add(file)
        if self._left.is_set():
            raise CancelledError
        try:
            handle = opened.enter_context(file.open("rb", buffering=0)).fileno()
        except OSError as exc:
            raise _broken(file, f"it cannot be read: {exc.strerror}") from exc
        tensors = self._places(file, entries)
        ready = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None
        way, threads, size = self._way(handle, entries)
        pieces = (_Piece(entry.begin, tensors[entry.name].reshape(-1).view(torch.uint8)) for entry in entries)
        chunks = list(_chunks(pieces, size))
        numbers = itertools.count()

        def land() -> None:
            """Bring chunks until none is left, and wait until those are there."""
            lands = self._of_this_thread(way)
            try:
                # `next` of a count is one step of the interpreter: no two threads get the same number.
                while (number := next(numbers)) < len(chunks):
                    if self._left.is_set():
                        raise CancelledError
                    _announce(handle, chunks[number + threads : number + threads + 1])
                    lands.take(handle, chunks[number], ready)
            except (OSError, EOFError) as exc:
                raise _broken(file, f"reading it failed: {exc}") from exc
            finally:
                lands.rest()

        return tensors, [pool.submit(land) for _ in range(min(threads, len(chunks)))]

    def _way(self, handle: int, entries: Sequence[Entry]) -> tuple[Callable[[torch.device], _Way], int, int]:
        """How a file is best brought to where its tensors are, by how many threads, and in chunks of which size."""
        if self.device.type == "cpu":
            return _Straight, THREADS, CHUNK
        if not entries or not pages.cached(handle, entries[-1].end):
            return _Staged, THREADS, CHUNK
        plenty = host.processors() >= PLENTY
        if (self._sparing or not plenty) and pages.pinnable(handle):
            return _Mapped, MAPPERS, max(CHUNK, min(WINDOW, (host.host_memory() or 0) // SHARE))
        return _Staged, COPIERS if plenty else THREADS, CHUNK

    def _of_this_thread(self, way: Callable[[torch.device], _Way]) -> _Way:
        own = self._own.ways
        if way not in own:
            own[way] = way(self.device)
        return own[way]

    def _complete(
        self,
        landed: Mapping[Path, Future[dict[str, Tensor]]],
        begun: tuple[Path, dict[str, Tensor], list[Future[None]]] | None,
    ) -> None:
        if begun is None:
            return
        file, tensors, landing = begun
        for thread in landing:
            thread.result()
        landed[file].set_result(tensors)


def read(files: Sequence[Path], device: torch.device) -> dict[str, Tensor]:
    """Every tensor of some safetensors files, on the device, in the precision in which it is stored.

    Raises FatalError where a file is cut short, or is not what its header says. Any thread may call it.
    """
    reading = Reading(files, device)
    try:
        return {name: tensor for file in files for name, tensor in reading.take(file).items()}
    finally:
        reading.close()


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


def made(entries: Sequence[Entry], device: torch.device) -> dict[str, Tensor]:
    """Tensors for a file's entries, with nothing in them yet."""
    if device.type == "cuda":
        # The allocator then splits one block, instead of asking the driver a thousand times.
        torch.empty(sum(_rounded(entry.end - entry.begin) for entry in entries), dtype=torch.uint8, device=device)
    return {entry.name: torch.empty(entry.shape, dtype=entry.dtype, device=device) for entry in entries}


def _chunks(wanted: Iterable[_Piece], size: int) -> Iterator[_Chunk]:
    """Cut a stretch of a file, of which these are the pieces, in their order, into chunks of at most `size` bytes."""
    pieces: list[_Piece] = []
    begin = end = 0
    for piece in wanted:
        done, count = 0, piece.target.numel()
        while done < count:
            if not pieces:
                begin = end = piece.begin + done
            take = min(count - done, begin + size - end)
            pieces.append(_Piece(end, piece.target[done : done + take]))
            done, end = done + take, end + take
            if end - begin == size:
                yield _Chunk(begin, end, tuple(pieces))
                pieces = []
    if pieces:
        yield _Chunk(begin, end, tuple(pieces))


def _announce(handle: int, chunks: Sequence[_Chunk]) -> None:
    """Have the kernel fetch what will be read soon: its own readahead is too short for a fast disk."""
    for chunk in chunks:
        os.posix_fadvise(handle, chunk.begin, chunk.end - chunk.begin, os.POSIX_FADV_WILLNEED)


@contextlib.contextmanager
def _in_short_turns() -> Iterator[None]:
    """Have the interpreter pass on in a fifth of a millisecond: the threads need it for a moment for each chunk.

    Meanwhile another thread imports and builds, and would keep it for five each time.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(SHORT_TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class _Straight:
    """On the CPU: each piece is read to where it stays."""

    def __init__(self, device: torch.device) -> None:
        pass

    def take(self, handle: int, chunk: _Chunk, ready: torch.cuda.Event | None) -> None:
        for piece in chunk.pieces:
            _fill(handle, memoryview(piece.target.numpy()), piece.begin)

    def rest(self) -> None:
        pass


class _Copies:
    """On a GPU: chunks are copied on a stream of one's own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._waited: torch.cuda.Event | None = None

    def copy(self, chunk: _Chunk, whole: Tensor, ready: torch.cuda.Event | None) -> torch.cuda.Event | None:
        """Have a chunk copied when the device is `ready` for it; when that is done the event is."""
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            if self._stream is not None and ready is not None and ready is not self._waited:
                # What the memory was used for before is queued on another stream.
                self._stream.wait_event(ready)
                self._waited = ready
            # All in one call: each one is a turn to wait for.
            torch._foreach_copy_(chunk.targets(), chunk.cut(whole), non_blocking=True)
            return None if self._stream is None else self._stream.record_event()


class _Staged:
    """On a GPU: a chunk is read into one of two pinned buffers, and copied from there while the other is filled."""

    def __init__(self, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=pinned) for _ in range(BUFFERS)]
        self._copied: list[torch.cuda.Event | None] = [None] * BUFFERS
        self._copies = _Copies(device)
        self._turn = 0

    def take(self, handle: int, chunk: _Chunk, ready: torch.cuda.Event | None) -> None:
        turn, self._turn = self._turn, (self._turn + 1) % BUFFERS
        _wait(self._copied[turn])
        whole = self._buffers[turn][: chunk.end - chunk.begin]
        _fill(handle, memoryview(whole.numpy()), chunk.begin)
        self._copied[turn] = self._copies.copy(chunk, whole, ready)

    def rest(self) -> None:
        for copied in self._copied:
            _wait(copied)


@dataclass
class _Held:
    """A window that is copied from until the event, once there is one."""

    window: pages.Window
    copied: torch.cuda.Event | None = None

    def let_go(self) -> None:
        try:
            _wait(self.copied)
        finally:
            self.window.close()


class _Mapped:
    """On a GPU, of what lies in the page cache: a chunk is pinned there, and the device copies it.

    What cannot be pinned after all is read.
    """

    def __init__(self, device: torch.device) -> None:
        _use(device)
        self._copies = _Copies(device)
        self._held: deque[_Held] = deque()

    def take(self, handle: int, chunk: _Chunk, ready: torch.cuda.Event | None) -> None:
        while len(self._held) >= WINDOWS:
            self._held.popleft().let_go()
        try:
            held = _Held(pages.Window(handle, chunk.begin, chunk.end))
        except OSError:
            for part in _chunks(chunk.pieces, CHUNK):
                whole = torch.empty(part.end - part.begin, dtype=torch.uint8)
                _fill(handle, memoryview(whole.numpy()), part.begin)
                _wait(self._copies.copy(part, whole, ready))
            return
        self._held.append(held)
        held.copied = self._copies.copy(chunk, held.window.tensor(), ready)

    def rest(self) -> None:
        with ExitStack() as stack:  # each of them, whatever becomes of the others
            while self._held:
                stack.callback(self._held.pop().let_go)


def _use(device: torch.device) -> None:
    """Make a GPU this thread's current one, for which memory is pinned."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def _wait(event: torch.cuda.Event | None) -> None:
    # It nearly always is there, and waiting means to get in line for the interpreter once more.
    if event is not None and not event.query():
        event.synchronize()


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
