"""What of a file lies in the kernel's page cache: a GPU can copy it from there, and no processor has to."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
from typing import Any

import torch
from torch import Tensor

READ_ONLY = 8  # cudaHostRegisterReadOnly, which CUDA asks for where memory must not be written to
NOWHERE = ctypes.c_void_p(-1).value  # MAP_FAILED
PROBES = 64  # evenly spaced over a file


class Window:
    """The bytes of an open file from `begin` to `end`, mapped and pinned for the current device, until it is closed.

    Raises OSError where they cannot be: the driver does not take them, or the file ends before.
    """

    def __init__(self, handle: int, begin: int, end: int) -> None:
        start = begin // mmap.PAGESIZE * mmap.PAGESIZE
        self._size, self._head = end - start, begin - start
        self._address = _libc().mmap(None, self._size, mmap.PROT_READ, mmap.MAP_SHARED, handle, start)
        if self._address == NOWHERE:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        if not _pin(self._address, self._size):
            self._unmap()
            raise OSError("it cannot be pinned")

    def tensor(self) -> Tensor:
        """The bytes, uint8, which must be neither written nor looked at once this is closed."""
        # By its address, for torch has no word for memory that is not to be written, and warns.
        given = (ctypes.c_uint8 * self._size).from_address(self._address)
        return torch.frombuffer(given, dtype=torch.uint8)[self._head :]

    def close(self) -> None:
        try:
            _unpin(self._address)
        finally:
            self._unmap()

    def _unmap(self) -> None:
        _libc().munmap(self._address, self._size)


def cached(handle: int, size: int) -> bool:
    """Whether a file of so many bytes lies in the page cache, as far as samples tell; none of it is read for that."""
    sample = bytearray(1)
    try:
        return all(os.preadv(handle, [sample], size * part // PROBES, os.RWF_NOWAIT) for part in range(PROBES))
    except (AttributeError, OSError):  # it would have to be waited for, or this system cannot tell
        return False


def pinnable(handle: int) -> bool:
    """Whether the pages of a file can be pinned here, by its first: not every driver does that."""
    try:
        Window(handle, 0, 1).close()
    except OSError:
        return False
    return True


@functools.cache
def _libc() -> Any:
    # Python's own `mmap` keeps the interpreter while it gives back what it had mapped.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = (
        ctypes.c_void_p,
        (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
    )
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc


def _pin(address: int, size: int) -> bool:
    """Pin memory for the current device, if its driver does."""
    if int(torch.cuda.cudart().cudaHostRegister(address, size, READ_ONLY)) == 0:
        return True
    # CUDA remembers what it said, and torch would take it for an error of what this thread does next.
    with contextlib.suppress(AttributeError):
        _libc().cudaGetLastError()
    return False


def _unpin(address: int) -> None:
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))
