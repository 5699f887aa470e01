"""The load benchmark, small: it runs, every job completes, and each figure is there. None of them is asserted."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.servers import skipped_at_home

from vidgen.local.servers import program

ROOT = Path(__file__).parents[2]
FIGURES = (
    r"requests per second in: +[\d.]+", r"jobs per second through: +[\d.]+", r"through: +p50 .* p99 .* ms",
    r"memory of the gateway: [\d.]+ MB at the start", r"disk per 1,000 jobs: bus [\d.]+ MB, S3 [\d.]+ MB",
    r"CPU seconds per 1,000 jobs, filling: +gateway [\d.]+, bus [\d.]+, S3 [\d.]+; [\d.]+ in all",
    r"CPU seconds per 1,000 jobs, through: +gateway [\d.]+, bus [\d.]+, S3 [\d.]+, workers [\d.]+; [\d.]+ in all",
)  # fmt: skip


def test_twenty_jobs_go_through_with_readers_and_workers() -> None:
    with skipped_at_home():
        program("nats-server")
        program("weed")
    options = ["--jobs", "20", "--readers", "3", "--workers", "2", "--processes", "1", "--peers"]

    done = subprocess.run(
        [sys.executable, "benchmarks/load.py", *options], cwd=ROOT, capture_output=True, text=True, timeout=300
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "looks that were refused: 0; jobs told as completed: 20 of 20" in done.stdout
    for figure in FIGURES:
        assert re.search(figure, done.stdout), f"{figure} is not in\n{done.stdout}"
