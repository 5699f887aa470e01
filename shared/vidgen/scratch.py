"""A folder for a process's temporary files, which go with it; what a killed one left goes when the next one starts."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
import shutil
import tempfile
import weakref
from collections import deque
from pathlib import Path

from vidgen import artifacts

PREFIX = "vidgen-scratch-"
TIDY_S = 1.0  # how long what was left lies there at the most
ROOMS = 8  # that are kept for the next tasks: twice as many as a worker has under way


class Scratch:
    """Names for files and folders in a folder of this process's own, in `parent` or where temporary files are.

    The folder is locked for as long as the process lives, in whatever container: a sibling removes what nobody holds.
    Raises StoreError `local_file` where there can be none.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self._parent = parent or Path(tempfile.gettempdir())
        self._names = itertools.count()
        self._rooms: deque[Path] = deque()
        self._left: list[tuple[Path, bool]] = []
        sweep(self._parent)
        self._make()

    def path(self, suffix: str = "") -> Path:
        """A name that nobody has used yet."""
        return Path(self.folder(), f"{next(self._names)}{suffix}")

    def folder(self) -> Path:
        """The folder, made anew where somebody tidied it away."""
        if not self._folder.exists():
            self._rooms.clear()
            self._release()
            self._make()
        return self._folder

    def room(self) -> Path:
        """A folder that is empty, or not there yet, and nobody else's until it is left."""
        self.folder()
        return self._rooms.popleft() if self._rooms else self.path()

    def leave(self, room: Path, *, again: bool) -> None:
        """Have a room emptied within a second, and kept for another task if it may be used `again`.

        All that were left by then take one thread for a moment: to empty each for itself, and to make it anew, took a
        tenth of what a worker does for a task. A disk that is busy syncing would hold up the event loop.
        """
        if not self._left:
            asyncio.get_running_loop().call_later(TIDY_S, self._tidy_soon)
        self._left.append((room, again))

    def _tidy_soon(self) -> None:
        left, self._left = self._left, []
        with contextlib.suppress(RuntimeError):  # this process leaves, and with it the folder
            asyncio.get_running_loop().run_in_executor(None, self._tidy, left)

    def _tidy(self, left: list[tuple[Path, bool]]) -> None:
        for room, again in left:
            keep = again and len(self._rooms) < ROOMS
            try:
                for file in room.iterdir():
                    file.unlink()
                if not keep:
                    room.rmdir()
            except OSError:  # there are folders in it, or it never was
                shutil.rmtree(room, ignore_errors=True)
            else:
                if keep:
                    self._rooms.append(room)

    def close(self) -> None:
        """Remove the folder and what is in it now; by itself it goes with the process."""
        self._release()

    def fills_its_disk(self) -> bool:
        """Whether what is in the folder is half of all that its disk can hold: reads the sizes, so in a thread."""
        try:
            own = sum(path.lstat().st_size for path in self._folder.rglob("*"))
            return 2 * own >= shutil.disk_usage(self._folder).total
        except OSError:  # it is broken, or a task's files go in this moment
            return False

    def _make(self) -> None:
        try:
            self._parent.mkdir(parents=True, exist_ok=True)
            while not self._made():
                pass
        except OSError as exc:
            raise artifacts.local_file(exc) from exc

    def _made(self) -> bool:
        """Whether the folder is there and held: a sibling may find it in the moment before it is locked."""
        # Of a name that nobody can guess, and for this user alone: the parent may be everybody's.
        self._folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=self._parent))
        try:
            held = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return False
        self._release = weakref.finalize(self, _release, self._folder, held)
        with contextlib.suppress(OSError):  # a file system without locks: nobody there can lock and remove it, either
            fcntl.flock(held, fcntl.LOCK_EX)
        return self._folder.exists()


def sweep(parent: Path) -> None:
    """Remove the folders of processes that are gone."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody holds it, or it is another user's, or gone in this moment
            seen = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(seen).st_uid == os.geteuid():
                    fcntl.flock(seen, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(seen)


def _release(folder: Path, held: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(held)
