"""The long form: `python -m tests.fault [--only NAME …] [--scale F] [--seed N]` runs the campaigns and prints a table.

Each row is one fault, with the counts that docs/reliability.md speaks of; `--scale` makes them smaller.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.fault import (
    test_bus_full,
    test_bus_killed,
    test_clock_steps,
    test_cluster,
    test_disk_full,
    test_drained,
    test_duplicates,
    test_engine_hangs,
    test_gateway_killed,
    test_killer_tasks,
    test_partition,
    test_random_orders,
    test_real_orders,
    test_server_clocks,
    test_sick_gpu,
    test_store_down,
    test_store_errors,
    test_store_slow,
    test_upload_truncated,
    test_worker_killed,
)
from tests.fault.nursery import Nursery
from tests.fault.system import Lab

from vidgen.local import S3Server


@dataclass(frozen=True)
class Row:
    """A campaign and its counts in the long form."""

    name: str
    campaign: Callable[..., Awaitable[str]]
    counts: dict[str, Any]


ROWS = (
    Row("worker-killed", test_worker_killed.campaign, {"kills": 200, "jobs": 500}),
    Row("gateway-killed", test_gateway_killed.campaign, {"kills": 100, "jobs": 300}),
    Row("bus-killed", test_bus_killed.campaign, {"kills": 30, "jobs": 300}),
    Row("store-down", test_store_down.campaign, {"outages": (1.0, 10.0, 120.0), "jobs": 60}),
    Row("store-slow", test_store_slow.campaign, {"jobs": 20, "size": 2_000_000}),
    Row("store-errors", test_store_errors.campaign, {"jobs": 100}),
    Row("upload-truncated", test_upload_truncated.campaign, {"jobs": 40}),
    Row("partition", test_partition.campaign, {"cuts": 10}),
    Row("killer-tasks", test_killer_tasks.campaign, {"killers": 12, "jobs": 60}),
    Row("out-of-memory", test_killer_tasks.campaign_of_the_kernel, {"killers": 6, "jobs": 30}),
    Row("engine-hangs", test_engine_hangs.campaign, {"hangs": 5, "jobs": 30}),
    Row("sick-gpu", test_sick_gpu.campaign, {"jobs": 100}),
    Row("bus-full", test_bus_full.campaign, {"jobs": 20}),
    Row("disk-full", test_disk_full.campaign, {"fills": 3}),
    Row("duplicates", test_duplicates.campaign, {"jobs": 100, "stops": 10}),
    Row("clock-steps", test_clock_steps.campaign, {"steps": 40, "jobs": 100}),
    Row("bus-clock", test_server_clocks.campaign_of_the_bus, {"steps": 60, "jobs": 60, "kills": 6}),
    Row("store-clock", test_server_clocks.campaign_of_the_store, {"steps": 10, "jobs": 80, "away_s": 5.0}),
    Row("cluster", test_cluster.campaign, {"kills": 5, "stepdowns": 10, "jobs": 100}),
    Row("random-orders", test_random_orders.campaign, {"orders": 1000}),
    Row("real-orders", test_real_orders.campaign, {"orders": 60}),
    Row("drained", test_drained.campaign, {"rounds": 20}),
)


def scaled(counts: dict[str, Any], scale: float) -> dict[str, Any]:
    """Smaller counts; what is no count stays."""
    kept = ("size", "outages", "away_s")
    return {name: value if name in kept else max(1, round(value * scale)) for name, value in counts.items()}


async def run(row: Row, nursery: Nursery, store: S3Server, scale: float, seed: int) -> tuple[str, float, str]:
    """One row's result: passed or failed, the seconds, and what was counted."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vidgen-fault-", ignore_cleanup_errors=True) as folder:
        try:
            told = await row.campaign(Lab(nursery, store, Path(folder), seed), **scaled(row.counts, scale))
        except pytest.skip.Exception as exc:
            return "skipped", time.monotonic() - begun, exc.msg or ""
        except Exception as exc:
            traceback.print_exc()
            return "FAILED", time.monotonic() - begun, f"{type(exc).__name__}: {exc}"[:300]
    return "passed", time.monotonic() - begun, told


async def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fault", description="The fault suite in its long form.")
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS], help="these rows")
    parser.add_argument("--scale", type=float, default=1.0, help="of the counts")
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn")
    asked = parser.parse_args(arguments)
    rows = [row for row in ROWS if not asked.only or row.name in asked.only]
    logging.getLogger("vidgen.bus").setLevel(logging.ERROR)  # that the bus was killed is no news here
    nursery, failed = Nursery(), 0
    with tempfile.TemporaryDirectory(prefix="vidgen-fault-s3-", ignore_cleanup_errors=True) as folder:
        store = S3Server(Path(folder))
        await store.start()
        try:
            sys.stdout.write(f"seed {asked.seed}, scale {asked.scale}\n\n")
            sys.stdout.write("| fault | result | seconds | counted |\n|---|---|---|---|\n")
            for row in rows:
                result, seconds, told = await run(row, nursery, store, asked.scale, asked.seed)
                failed += result != "passed"
                sys.stdout.write(f"| {row.name} | {result} | {seconds:.0f} | {told} |\n")
                sys.stdout.flush()
        finally:
            await store.kill()
            nursery.close()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
