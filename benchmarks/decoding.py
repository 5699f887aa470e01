"""What it costs a gateway to have images decoded by processes of their own, beside threads of its own.

python benchmarks/decoding.py [--images 200]
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import uvloop
from PIL import Image

from gateway.decoding import Decoders, Decoding
from overhead import environment
from vidgen import images

KINDS = (("PNG", 64, 48), ("JPEG", 832, 480), ("PNG", 1024, 1024), ("JPEG", 4000, 3000))
TURNS = 3


def cpu_s(decoders: list[int]) -> float:
    """CPU seconds of this process, and of those that decode for it."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime + sum(sum(_ran(pid)) for pid in decoders)


def _ran(pid: int) -> list[float]:
    return [int(line.split()[0]) / 1e9 for line in Path(f"/proc/{pid}/schedstat").read_text().splitlines()]


def memory_mb(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) >> 10


def children() -> list[int]:
    return [int(pid) for one in Path("/proc/self/task").glob("*/children") for pid in one.read_text().split()]


async def timed(count: int, work: Callable[[], Awaitable[object]]) -> tuple[float, list[float]]:
    """CPU milliseconds an image, and each one's time in ms."""
    decoders, took = children(), []
    before = cpu_s(decoders)
    for _ in range(count):
        begun = time.perf_counter()
        await work()
        took.append((time.perf_counter() - begun) * 1e3)
    return (cpu_s(decoders) - before) / count * 1e3, sorted(took)


async def main(count: int) -> None:
    decoders = Decoders()
    decoding = Decoding(decoders=decoders)
    print("| image | by | CPU ms an image | p50 | p99 ms |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for kind, width, height in KINDS:
            path = Path(folder, "image")
            Image.effect_noise((width, height), 60).convert("RGB").save(path, kind)

            async def in_a_thread(path: Path = path) -> None:
                await asyncio.to_thread(images.pixels, path)
                await asyncio.to_thread(images.inspect, path)

            async def by_a_process(path: Path = path) -> None:
                await decoding.over(path, lambda decoder, of: decoder.inspect(of))

            await by_a_process()
            for turn in range(TURNS):
                for name, work in (("a thread", in_a_thread), ("a process", by_a_process)):
                    spent, took = await timed(count, work)
                    told = f"{kind} {width} × {height}" if turn == 0 and name == "a thread" else ""
                    print(f"| {told} | {name} | {spent:.2f} | {took[count // 2]:.2f} | {took[int(count * 0.99)]:.2f} |")
    print(f"\nprocesses that decode, MB: {[memory_mb(pid) for pid in children()]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200, help="of each kind, by each side, three times by turns")
    print(environment())
    uvloop.run(main(parser.parse_args().images))
