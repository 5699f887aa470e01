from __future__ import annotations

import os
from pathlib import Path

import pytest

from vidgen.accel import host


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
