from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.nvml import FakeNvml

from vidgen import errors, gpu
from vidgen.contracts import GpuFigures


@pytest.fixture(autouse=True)
def every_gpu_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


FIRST = GpuFigures(
    index=0, uuid="GPU-aaaa-1", name="NVIDIA H200", utilization=0.25, memory_used=1000, memory_total=150_000,
    power_watts=350.5, temperature_celsius=30,
)  # fmt: skip


def test_cuda_is_the_first_gpu_in_base_units() -> None:
    assert gpu.monitor("cuda", nvml=FakeNvml()).read() == (FIRST,)
    assert gpu.monitor("auto", nvml=FakeNvml()).read() == (FIRST,)


def test_cuda_n_counts_the_devices() -> None:
    (second,) = gpu.monitor("cuda:1", nvml=FakeNvml()).read()

    assert (second.index, second.uuid, second.utilization) == (1, "GPU-bbbb-2", 0.5)


def test_several_devices_are_each_read_once() -> None:
    both = gpu.monitor("cuda:1", "cuda:0", "cuda:1", nvml=FakeNvml()).read()

    assert [figures.index for figures in both] == [1, 0]
    assert gpu.monitor("cpu", "cuda", nvml=FakeNvml()).read() == (FIRST,)
    assert gpu.monitor("auto", "cpu", nvml=NO_DRIVER).read()[0].uuid == "cpu"


@pytest.mark.parametrize(
    ("chosen", "uuids"),
    [
        ("1", ["GPU-bbbb-2"]),
        ("1,0", ["GPU-bbbb-2", "GPU-aaaa-1"]),
        (" 1 , 0 ", ["GPU-bbbb-2", "GPU-aaaa-1"]),
        ("GPU-bbbb", ["GPU-bbbb-2"]),
        ("GPU-bbbb-2,0", ["GPU-bbbb-2", "GPU-aaaa-1"]),
        ("0,7,1", ["GPU-aaaa-1"]),
        ("0,-1,1", ["GPU-aaaa-1"]),
        ("MIG-cccc", ["MIG-cccc"]),
        ("MIG-none", []),
        ("", []),
        ("NoDevFiles", []),
    ],
)
def test_cuda_visible_devices_is_honoured_as_cuda_does(
    chosen: str, uuids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)

    assert [device.uuid for device in gpu.visible(nvml=FakeNvml())] == uuids


def test_the_index_of_a_visible_gpu_stays_that_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")

    (only,) = gpu.monitor("cuda:0", nvml=FakeNvml()).read()

    assert (only.index, only.uuid) == (1, "GPU-bbbb-2")


def test_a_slice_of_a_gpu_carries_the_index_of_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-cccc")
    nvml = FakeNvml(broken=("nvmlDeviceGetUtilizationRates", "nvmlDeviceGetPowerUsage"))

    (piece,) = gpu.monitor("cuda", nvml=nvml).read()

    assert (piece.index, piece.uuid, piece.utilization, piece.power_watts) == (1, "MIG-cccc", None, None)
    assert piece.memory_used == 9000


@pytest.mark.parametrize(
    ("call", "figures"),
    [
        ("nvmlDeviceGetUtilizationRates", {"utilization"}),
        ("nvmlDeviceGetMemoryInfo", {"memory_used", "memory_total"}),
        ("nvmlDeviceGetPowerUsage", {"power_watts"}),
        ("nvmlDeviceGetTemperature", {"temperature_celsius"}),
    ],
)
def test_a_figure_that_cannot_be_read_is_none_and_the_others_stay(call: str, figures: set[str]) -> None:
    (read,) = gpu.monitor("cuda", nvml=FakeNvml(broken=(call,))).read()

    assert {name for name, value in read.model_dump().items() if value is None} == figures


def test_a_gpu_lost_under_way_keeps_its_name_and_has_no_figures() -> None:
    nvml = FakeNvml()
    monitor = gpu.monitor("cuda", nvml=nvml)
    assert monitor.read() == (FIRST,)

    nvml.lost.add("GPU-aaaa-1")

    assert monitor.read() == (GpuFigures(index=0, uuid="GPU-aaaa-1", name="NVIDIA H200"),)


NO_DRIVER = FakeNvml(broken=("nvmlInit",))
NO_GPU = FakeNvml(uuids=())


@pytest.mark.parametrize("nvml", [NO_DRIVER, NO_GPU, FakeNvml(broken=("nvmlDeviceGetCount",))])
def test_without_a_gpu_nothing_is_visible_and_auto_is_the_cpu(nvml: FakeNvml) -> None:
    assert gpu.visible(nvml=nvml) == ()
    assert gpu.monitor("auto", nvml=nvml).read()[0].uuid == "cpu"


def test_a_gpu_that_nvml_cannot_see_is_reported_without_figures() -> None:
    assert gpu.monitor("cuda:3", nvml=NO_DRIVER).read() == (GpuFigures(index=3, uuid="unknown", name="unknown"),)


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:x", "cpu:1", "auto:0", ""])
def test_another_device_is_refused_by_name(device: str) -> None:
    with pytest.raises(errors.FatalError, match="use auto, cpu, cuda or cuda:N"):
        gpu.monitor(device, nvml=FakeNvml())


def test_the_real_library_answers_whether_or_not_there_is_a_driver() -> None:
    assert all(device.uuid for device in gpu.visible())
    assert gpu.monitor("auto").read()


def sampled(*samples: tuple[float, float]) -> gpu.CpuMonitor:
    """A monitor that sees the given (wall, CPU) seconds, one pair at construction and one at each reading."""
    wall, spent = iter([at for at, _ in samples]), iter([cpu for _, cpu in samples])

    def following(values: Any) -> Callable[[], float]:
        return lambda: next(values)

    return gpu.CpuMonitor(clock=following(wall), cpu_seconds=following(spent))


def test_the_cpu_is_one_device_named_cpu() -> None:
    (device,) = gpu.CpuMonitor().read()

    assert (device.index, device.uuid) == (0, "cpu")
    assert device.name
    assert device.power_watts is device.temperature_celsius is None


def test_cpu_utilisation_is_cpu_time_over_wall_time_since_the_reading_before() -> None:
    monitor = sampled((100, 7), (110, 9.5), (120, 9.5), (130, 90))

    assert [monitor.read()[0].utilization for _ in range(3)] == [0.25, 0, 1]


def test_readings_in_quick_succession_share_a_sample() -> None:
    monitor = sampled((100, 0), (101, 0.5), (101, 0.5), (101.01, 0.51), (102, 0.5))

    assert [monitor.read()[0].utilization for _ in range(4)] == [0.5, 0.5, 0.5, 0]


def test_cards_from_ada_on_multiply_fp8_and_those_before_do_not() -> None:
    nvml = FakeNvml(uuids=("GPU-aaaa-1", "GPU-ada", "GPU-a6000"))
    assert [gpu.multiplies_fp8(one, nvml=nvml) for one in gpu.visible(nvml=nvml)] == [True, True, False]


@pytest.mark.parametrize("nvml", [NO_DRIVER, FakeNvml(broken=("nvmlDeviceGetCudaComputeCapability",))])
def test_where_nvml_does_not_say_nobody_knows_whether_a_gpu_multiplies_fp8(nvml: FakeNvml) -> None:
    assert gpu.multiplies_fp8(FIRST, nvml=nvml) is None
