"""Has a disk read files into the page cache while the program that will want them is still starting.

The packages of a model take seconds to import. A disk that waits for them is idle for as long.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

THREADS = 8
CHUNK = 32 << 20  # a thread that looks for less gets in line for the interpreter more often, before those that import
SHARE = 0.5  # of the memory that is free: what does not fit beside the program would be read twice
LEAVE_S = 5.0
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def filling(files: Sequence[Path]) -> Iterator[None]:
    """Meanwhile read what is not in the page cache yet, file by file; a fault is for whoever wants the file to meet."""
    if not files:
        yield
        return
    leaving = threading.Event()
    chunks = itertools.takewhile(lambda _: not leaving.is_set(), _within(int(_free() * SHARE), files))
    lock = threading.Lock()

    def work() -> None:
        buffer = mmap.mmap(-1, CHUNK)  # of which nothing is touched, or filled with zeros, before it is needed
        while True:
            with lock:
                chunk = next(chunks, None)
            if chunk is None:
                return
            with contextlib.suppress(OSError):
                _fetch(*chunk, buffer)

    threads = [threading.Thread(target=work, name="page cache", daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        leaving.set()
        for thread in threads:
            thread.join(LEAVE_S)  # a disk that hangs must not hold up whoever would notice


def _within(budget: int, files: Sequence[Path]) -> Iterator[tuple[Path, int]]:
    """The files in pieces of a chunk, up to a number of bytes."""
    pieces = ((file, begin) for file in files if file.is_file() for begin in range(0, file.stat().st_size, CHUNK))
    return itertools.islice(pieces, budget // CHUNK)


def _fetch(file: Path, begin: int, buffer: mmap.mmap) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        if not _is_there(handle, begin):
            os.preadv(handle, [buffer], begin)
    finally:
        os.close(handle)


def _is_there(handle: int, begin: int) -> bool:
    """Whether a file's bytes can be had there without waiting for a disk."""
    try:
        os.preadv(handle, [bytearray(1)], begin, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    return True


def _free() -> int:
    """The bytes of memory that can be had, of the machine's and of the container's; 0 where the system does not say."""
    try:
        told = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        free = int(told["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return 0
    for names in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # of cgroup v2, and before; no limit is a word, not a number
            limit, taken = (int((CGROUP / name).read_text()) for name in names)
            free = min(free, max(limit - taken, 0))
    return free
