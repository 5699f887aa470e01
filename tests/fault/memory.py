"""Limits the memory of processes, each by itself, so that the kernel ends who takes more: control groups."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

MOUNTS = Path("/sys/fs/cgroup")
LIMITS = ("memory.max", "memory.limit_in_bytes")  # version 2, version 1
BOUND_S = 10.0


@contextlib.contextmanager
def groups() -> Iterator[Path]:
    """A folder in which each process makes its own (`enter`), below this one's group; OSError where none may be."""
    folder = _own() / f"vidgen-fault-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        if not any((folder / name).exists() for name in LIMITS):
            raise OSError("no memory can be limited in a control group here")
        yield folder
    finally:
        for group in [*(found for found in folder.iterdir() if found.is_dir()), folder]:
            _remove(group)


def enter(folder: Path, limit: int) -> None:
    """Let this process have so many bytes and no more; it must have one thread yet."""
    group = folder / str(os.getpid())
    group.mkdir()
    next(path for name in LIMITS if (path := group / name).exists()).write_text(str(limit))
    (group / "cgroup.procs").write_text(str(os.getpid()))


def killed(folder: Path) -> int:
    """How many processes the kernel ended for want of memory."""
    told = [*folder.glob("*/memory.events"), *folder.glob("*/memory.oom_control")]
    counts = [line.split() for path in told for line in path.read_text().splitlines()]
    return sum(int(count) for name, count in counts if name == "oom_kill")


def _own() -> Path:
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, kinds, path in lines:
        if kinds == "memory":
            return MOUNTS / "memory" / path.lstrip("/")
    return MOUNTS / next(path.lstrip("/") for _, kinds, path in lines if not kinds)


def _remove(group: Path) -> None:
    give_up = time.monotonic() + BOUND_S
    while True:
        try:
            group.rmdir()
        except OSError:  # who was in it is not yet gone
            if time.monotonic() > give_up:
                raise
            time.sleep(0.05)
        else:
            return
