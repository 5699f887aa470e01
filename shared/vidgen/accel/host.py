"""What this process may use of its host, the container's limits included."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def host_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = CGROUP) -> int | None:
    """The bytes of host memory that may still be taken; None where nobody says."""
    found = _number(meminfo, r"^MemAvailable:\s*(\d+) kB")
    left = [found * 1024] if found is not None else []
    # What a container holds of the page cache is given back when it is needed.
    for limited, told, own in (
        ("memory.max", "memory.stat", "anon"),
        ("memory/memory.limit_in_bytes", "memory/memory.stat", "total_rss"),
    ):  # fmt: skip  cgroup v2, and before
        limit, used = _number(cgroup / limited, r"^(\d+)$"), _number(cgroup / told, rf"^{own} (\d+)$")
        if limit is not None and used is not None:
            left.append(max(0, limit - used))
    return min(left, default=None)


def processors(cgroup: Path = CGROUP) -> int:
    """How many processors this process may use, one at the least."""
    count = len(os.sched_getaffinity(0))
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroup v2, and before
        with contextlib.suppress(OSError, ValueError):  # no limit is written "max", or below zero
            quota, period = (int(part) for file in files for part in (cgroup / file).read_text().split())
            if quota > 0 and period > 0:
                return max(1, min(count, quota // period))
    return count


def _number(file: Path, pattern: str) -> int | None:
    try:
        found = re.search(pattern, file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None
