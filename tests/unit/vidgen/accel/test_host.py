from __future__ import annotations

import os
from pathlib import Path

import pytest

from vidgen.accel import host


def test_the_hosts_memory_is_what_is_available_within_the_containers_limit(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    assert host.host_memory(meminfo, tmp_path) is None
    meminfo.write_text("MemTotal:       100 kB\nMemFree: 1 kB\nMemAvailable:   50 kB\n")
    assert host.host_memory(meminfo, tmp_path) == 50 * 1024
    (tmp_path / "memory.stat").write_text("anon 10240\nfile 99999\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert host.host_memory(meminfo, tmp_path) == 50 * 1024
    (tmp_path / "memory.max").write_text("20480\n")
    assert host.host_memory(meminfo, tmp_path) == 10240
    (tmp_path / "memory.max").unlink()  # of cgroup v1
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.stat").write_text("rss 1\ntotal_cache 5\ntotal_rss 10000\n")
    for limit, left in (("9223372036854771712", 50 * 1024), ("20000", 10000), ("5000", 0)):
        (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{limit}\n")
        assert host.host_memory(meminfo, tmp_path) == left


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({}, 6), ({"cpu.max": "max 100000\n"}, 6), ({"cpu.max": "250000 100000\n"}, 2), ({"cpu.max": "x"}, 6),
        ({"cpu.max": "900000 100000\n"}, 6), ({"cpu.max": "50000 100000\n"}, 1), ({"cpu.max": "50000 0\n"}, 6),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 6),
    ],
)  # fmt: skip
def test_the_processors_are_those_that_this_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], count: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert host.processors(tmp_path) == count
