"""What one process worked out, in a file for the next one."""

from __future__ import annotations

import contextlib
import marshal
import os
import stat
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What is new is worth a file of 70 MB if it is so many of a hundred, or took so long: some keys are other ones at each
# start, and some values take as long as all others.
FEW = 1
LONG_S = 0.1

Key = tuple[Any, ...]  # of what marshal can write


class Store:
    """Values that marshal can write, by their keys, in a file: those that were there, and those that are added.

    What is asked for in between is what the file holds afterwards.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._index: dict[Key, tuple[int, int, int]] = {}  # where it begins and ends, and its checksum
        self._content = memoryview(b"")
        self._used: dict[Key, bytes | memoryview] = {}
        self._new, self._took_s = 0, 0.0
        self._closed = False
        self.refused: str | None = None  # why the file that is there is neither taken nor written anew
        with contextlib.suppress(OSError, EOFError, ValueError, TypeError):
            self._open()

    def asked(self, key: Key, work_out: Callable[[], Any]) -> Any:
        """The value of this key, a new object each time, worked out if need be."""
        found = self.found(key)
        if found is None:
            begun = time.perf_counter()
            found = work_out()
            self._took_s += time.perf_counter() - begun
            self.add(key, found)
        return found

    def found(self, key: Key) -> Any:
        """The value of this key, a new object each time; None where there is none."""
        try:
            data = self._used.get(key) or self._read(*self._index[key])
            value = marshal.loads(data)  # noqa: S302  whoever writes there may write code as well
        except (KeyError, EOFError, ValueError, TypeError):  # the others: of an entry that is none
            return None
        self._used[key] = data
        return value

    def add(self, key: Key, value: Any) -> None:
        """Keep a value, if it and its key are of those that can be, until the store is closed."""
        if self._closed:
            return
        with contextlib.suppress(ValueError, TypeError):
            marshal.dumps(key)
            self._used[key] = marshal.dumps(value)
            self._new += 1

    def close(self) -> None:
        """Write what was used, if enough is new or that took long; a folder that takes nothing is left alone.

        From here on it has nothing, and keeps nothing, whoever asks it.
        """
        self._closed = True
        used, self._used = self._used, {}
        # Of what is there, too: a start that fails early uses little of it, and is to leave it to the next one.
        much = 100 * self._new > FEW * max(len(used), len(self._index))
        if self._new and not much and self._took_s > LONG_S:
            much = True
            for key, place in self._index.items():
                if key not in used:
                    with contextlib.suppress(ValueError, TypeError):
                        used[key] = self._read(*place)
        self._index, self._content = {}, memoryview(b"")
        self._new = 0
        if much and self.refused is None:
            self._write(used)

    def _write(self, used: dict[Key, bytes | memoryview]) -> None:
        index, place = {}, 0
        for key, data in used.items():
            index[key] = (place, place + len(data), zlib.crc32(data))
            place += len(data)
        head = marshal.dumps(index)
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                dir=self._file.parent, prefix=f"{self._file.stem}-", suffix=".part", delete=False
            ) as file:
                temporary = Path(file.name)
                try:
                    file.write(len(head).to_bytes(8, "little") + zlib.crc32(head).to_bytes(4, "little") + head)
                    file.writelines(used.values())
                    file.flush()
                    temporary.replace(self._file)
                except OSError:
                    temporary.unlink()

    def _open(self) -> None:
        # Neither waits for whoever writes to a pipe of that name, nor follows a link to what is another user's.
        handle = os.open(self._file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        with open(handle, "rb") as file:  # noqa: PTH123  by its handle
            told = os.fstat(handle)
            if told.st_uid != os.geteuid() or not stat.S_ISREG(told.st_mode):
                # Who owns what is written may be the file system's choice: each start would write it, for nothing.
                self.refused = f"{self._file} is no file of this user"
                return
            content = memoryview(file.read())  # not mapped: who replaces it on another host would end this process
        with contextlib.suppress(OSError):
            os.utime(self._file)
        size, checksum = int.from_bytes(content[:8], "little"), int.from_bytes(content[8:12], "little")
        head = content[12 : 12 + size]
        # marshal trusts what it reads: damaged data could end the process, at this start and at every other.
        index = marshal.loads(head) if zlib.crc32(head) == checksum else None  # noqa: S302
        if isinstance(index, dict):
            self._index, self._content = index, content[12 + size :]

    def _read(self, begin: int, end: int, checksum: int) -> memoryview:
        data = self._content[begin:end]
        if zlib.crc32(data) != checksum:
            raise ValueError(checksum)
        return data
