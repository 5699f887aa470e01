"""Many workers in one process: `python benchmarks/workers.py EDITS I2VS`, engines of zero cost.

As many processes as workers would not fit on a small machine; each worker has its own loops, lanes, fence and registry
entry all the same, and only the interpreter and the connection are shared, as in `vidgen worker --stages` and in the
others' processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import uvloop

from engines import HoldingEngine, Shape
from vidgen import garbage, gpu, jetstream, telemetry
from vidgen.artifacts import S3Store
from vidgen.bus import Bus
from vidgen.contracts import Stage
from vidgen.handler import Policy
from vidgen.metrics import WorkerMetrics
from vidgen.probes import write_ready_file
from vidgen.service import give_way
from vidgen.settings import WorkerSettings, read
from vidgen.worker import Registration, Worker


async def main(counts: dict[Stage, int]) -> None:
    settings = read(WorkerSettings)
    telemetry.configure(settings, "workers")
    give_way(settings.nice)  # as the services do
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    store = S3Store.from_settings(settings)
    async with contextlib.AsyncExitStack() as stack:
        bus = await stack.enter_async_context(jetstream.connect(settings.nats_url, f"workers-{os.getpid()}"))
        workers = [
            start(stack, settings, bus, store, stage, f"{stage}-{os.getpid()}-{number}")
            for stage, count in counts.items()
            for number in range(count)
        ]
        garbage.collect_rarely()
        running = [asyncio.create_task(worker.run()) for worker in workers]
        write_ready_file(settings.ready_file, "ready")
        await asyncio.wait([asyncio.create_task(stop.wait()), *running], return_when=asyncio.FIRST_COMPLETED)
        for worker in workers:
            worker.drain()
        await asyncio.gather(*running)


def start(
    stack: contextlib.AsyncExitStack, settings: WorkerSettings, bus: Bus, store: S3Store, stage: Stage, name: str
) -> Worker:
    engine = HoldingEngine(stage, Shape.from_environment())
    engine.setup()
    return Worker(
        bus, store, engine, stack.enter_context(ThreadPoolExecutor(1, name)), gpu.monitor("cpu"),
        WorkerMetrics(stage), Policy(name, stage, settings.ack_wait), Registration(),
    )  # fmt: skip


if __name__ == "__main__":
    uvloop.run(main({"edit": int(sys.argv[1]), "i2v": int(sys.argv[2])}))
