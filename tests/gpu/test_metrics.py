"""What the metrics say of a GPU against what the driver, torch and the GPU's own clock say: only on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

import pynvml
import pytest
import torch
from tests.engines import Instant
from tests.workbench import Bench

from vidgen import gpu
from vidgen.engine import Generated, OnStep
from vidgen.metrics import WorkerMetrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

STEPS = 4
STEP_S = 1.0  # NVML's utilisation is that of its last sampling period: up to a second
MIB = 1 << 20


def driver_handle() -> Any:
    """The driver's handle of torch's first GPU, which need not be its own first one."""
    uuid = torch.cuda.get_device_properties(0).uuid
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())


class Multiplies(Instant):
    """Holds a GPU with products of matrices, about a second a step, and notes what the GPU's own clock says of it."""

    def setup(self) -> dict[str, float]:
        self.matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        self.monitor = gpu.monitor("cuda")
        self.took: list[float] = []
        self.seen: list[Any] = []
        self.told: list[float] = []
        self._multiply(20)
        self._products = max(1, round(STEP_S / (self._multiply(100) / 100)))
        return {"weights": 1.0}

    def generate(self, inputs: Any, on_step: OnStep) -> Generated:
        for step in range(1, STEPS + 1):
            self.took.append(self._multiply(self._products))
            self.seen.append(self.monitor.read()[0])
            self.told.append(pynvml.nvmlDeviceGetPowerUsage(driver_handle()) / 1000)
            on_step(step, STEPS)
        return Generated(inputs, denoise_s=sum(self.took), decode_s=0.0)

    def _multiply(self, products: int) -> float:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        for _ in range(products):
            self.matrix @ self.matrix
        ended.record()
        ended.synchronize()
        return begun.elapsed_time(ended) / 1000


@pytest.fixture
def bench() -> Iterator[Bench]:
    engine = Multiplies()
    engine.setup()
    bench = Bench(engine)
    bench.metrics = WorkerMetrics("edit", engine.monitor.read())
    bench.use(engine)
    yield bench
    bench.close()


async def test_seconds_a_step_and_busy_seconds_are_those_of_the_gpus_own_clock(bench: Bench) -> None:
    await bench.queue(steps=STEPS)
    assert await bench.run() == "completed"
    engine: Any = bench.engine
    # The first step may carry a warm-up and is not counted; the median, for another process may hold the GPU meanwhile.
    assert bench.metric("vidgen_worker_seconds_per_step") == pytest.approx(median(engine.took[1:]), rel=0.05)
    assert bench.metric("vidgen_worker_gpu_busy_seconds_total") == pytest.approx(sum(engine.took), rel=0.05)
    [completed] = [event for event in bench.events() if event.type == "stage_completed"]
    assert completed.gpu_seconds == pytest.approx(sum(engine.took), rel=0.05)


async def test_a_gpu_that_is_held_is_told_as_busy_with_power_and_temperature(bench: Bench) -> None:
    await bench.queue(steps=STEPS)
    await bench.run()
    engine: Any = bench.engine
    bench.metrics.gpu_figures((engine.seen[-1],))
    assert bench.metric("vidgen_worker_gpu_utilization_ratio") > 0.9
    assert bench.metric("vidgen_worker_gpu_power_watts") == pytest.approx(engine.told[-1], rel=0.1)
    assert 20 < bench.metric("vidgen_worker_gpu_temperature_celsius") < 100


async def test_memory_is_what_torch_and_the_driver_count(bench: Bench) -> None:
    torch.cuda.empty_cache()  # what other tests left would go with it
    held = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    bench.metrics.gpu_figures(gpu.monitor("cuda").read())
    free, total = torch.cuda.mem_get_info()
    told = bench.metric("vidgen_worker_gpu_memory_used_bytes")
    # NVML counts what the driver keeps for itself as used; CUDA takes it from the total instead.
    assert told - (total - free) == pytest.approx(0, abs=1024 * MIB)
    assert told == pytest.approx(pynvml.nvmlDeviceGetMemoryInfo(driver_handle()).used, abs=64 * MIB)
    del held
    torch.cuda.empty_cache()
    bench.metrics.gpu_figures(gpu.monitor("cuda").read())
    assert told - bench.metric("vidgen_worker_gpu_memory_used_bytes") == pytest.approx(2 << 30, rel=0.02)
