"""What the devices do: NVML for GPUs, the process's own figures for a CPU worker. No torch."""

from __future__ import annotations

import os
import platform
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vidgen import errors
from vidgen.contracts import GpuFigures
from vidgen.engine import GpuMonitor

T = TypeVar("T")

UNKNOWN = "unknown"
FP8_CAPABILITY = (8, 9)  # the least compute capability that multiplies FP8: Ada
SHORTEST_SAMPLE = 0.25  # seconds; os.times counts in steps of 10 ms


def monitor(*devices: str, nvml: Any = None) -> GpuMonitor:
    """The monitor of what this process uses: `cpu`, `cuda`, `cuda:N` or `auto` (a GPU where NVML sees one).

    N counts as CUDA does, among the devices that CUDA_VISIBLE_DEVICES leaves. A GPU that NVML cannot see is reported
    without figures; where none of the devices is a GPU the CPU is. Raises FatalError for any other device. `nvml`
    stands in for pynvml in tests.
    """
    wanted = [_wanted(device) for device in devices]
    if all(kind == "cpu" for kind, _ in wanted):
        return CpuMonitor()
    nvml = _started(nvml)
    found = _visible_devices(nvml)
    used: list[_Device] = []
    for kind, position in wanted:
        if kind == "cuda" or (kind == "auto" and found):
            known = position < len(found)
            device = found[position] if known else _Device(position, None, UNKNOWN, UNKNOWN)
            used += [device] if device not in used else []
    return NvmlMonitor(nvml, tuple(used)) if used else CpuMonitor()


def _wanted(device: str) -> tuple[str, int]:
    """Kind and number of a device as a setting names it."""
    wanted = re.fullmatch(r"(auto|cpu|cuda)(?::(\d+))?", device)
    if wanted is None or (wanted[2] is not None and wanted[1] != "cuda"):
        raise errors.FatalError(f"device: {device!r} is none: use auto, cpu, cuda or cuda:N", code="settings")
    return wanted[1], int(wanted[2] or 0)


def visible(*, nvml: Any = None) -> tuple[GpuFigures, ...]:
    """The GPUs of this machine that this process may use, with their figures; () where NVML is missing."""
    nvml = _started(nvml)
    return NvmlMonitor(nvml, _visible_devices(nvml)).read()


def multiplies_fp8(figures: GpuFigures, *, nvml: Any = None) -> bool | None:
    """Whether a GPU of `visible` multiplies FP8; None where NVML does not say."""
    nvml = _started(nvml)
    handle = next((one.handle for one in _visible_devices(nvml) if one.uuid == figures.uuid), None)
    capability = _ask(lambda: tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)))
    return None if capability is None else bool(capability >= FP8_CAPABILITY)


@dataclass(frozen=True)
class _Device:
    index: int
    handle: Any
    uuid: str
    name: str


class NvmlMonitor:
    """Reads GPUs through NVML, from any thread. A lost device keeps its name and has no figures."""

    def __init__(self, nvml: Any, devices: tuple[_Device, ...]) -> None:
        self._nvml = nvml
        self._devices = devices

    def read(self) -> tuple[GpuFigures, ...]:
        return tuple(self._figures(device) for device in self._devices)

    def _figures(self, device: _Device) -> GpuFigures:
        nvml, handle = self._nvml, device.handle
        if handle is None:
            return GpuFigures(index=device.index, uuid=device.uuid, name=device.name)
        memory = _ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        percent = _ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        milliwatts = _ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        celsius = _ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
        return GpuFigures(
            index=device.index,
            uuid=device.uuid,
            name=device.name,
            utilization=None if percent is None else min(1.0, max(0.0, percent / 100)),
            memory_used=None if memory is None else int(memory.used),
            memory_total=None if memory is None else int(memory.total),
            power_watts=None if milliwatts is None else milliwatts / 1000,
            temperature_celsius=None if celsius is None else float(celsius),
        )


def _ask(question: Callable[[], T]) -> T | None:
    # NVMLError has a subclass per code, drivers differ in which calls they know, and a lost GPU breaks any of them.
    try:
        return question()
    except Exception:
        return None


def _started(nvml: Any) -> Any:
    """NVML ready for use, or None where there is no driver. Its handles stay valid for the life of the process."""
    if nvml is None:
        import pynvml

        nvml = pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


def _visible_devices(nvml: Any) -> tuple[_Device, ...]:
    """The devices in CUDA's order: CUDA_VISIBLE_DEVICES names indices or (beginnings of) UUIDs.

    Without UUIDs this is PCI order, which CUDA follows on machines with one kind of GPU, and on mixed ones with
    CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    if nvml is None:
        return ()
    count = _ask(lambda: int(nvml.nvmlDeviceGetCount())) or 0
    every = [_device(nvml, _ask(lambda i=i: nvml.nvmlDeviceGetHandleByIndex(i)), i) for i in range(count)]  # type: ignore[misc]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return tuple(every)
    found: list[_Device] = []
    for token in filter(None, (part.strip() for part in chosen.split(","))):
        device = _named(nvml, token, every)
        if device is None:
            break  # CUDA, too, ends the list at the first name that it does not know
        found.append(device)
    return tuple(found)


def _named(nvml: Any, token: str, every: list[_Device]) -> _Device | None:
    if token.isdecimal():
        return every[int(token)] if int(token) < len(every) else None
    if token.startswith("MIG-"):
        handle = _ask(lambda: nvml.nvmlDeviceGetHandleByUUID(token))
        return None if handle is None else _device(nvml, handle, 0)
    return next((device for device in every if device.uuid.lower().startswith(token.lower())), None)


def _device(nvml: Any, handle: Any, index: int) -> _Device:
    uuid = _ask(lambda: str(nvml.nvmlDeviceGetUUID(handle))) or UNKNOWN
    name = _ask(lambda: str(nvml.nvmlDeviceGetName(handle))) or UNKNOWN
    if uuid.startswith("MIG-"):
        parent = _ask(lambda: nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle))
        index = _ask(lambda: int(nvml.nvmlDeviceGetIndex(parent))) or 0
    return _Device(index, handle, uuid, name)


class CpuMonitor:
    """Reports this process as device 0, `cpu`, from any thread.

    Utilisation is CPU time over wall time since the sample before, 1 for one core or more; memory is the process's
    own of the machine's, None where there is no /proc.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, cpu_seconds: Callable[[], float] | None = None):
        self._clock, self._cpu_seconds = clock, cpu_seconds or _cpu_seconds
        self._lock = threading.Lock()
        self._name = _cpu_name()
        self._sample = (clock(), self._cpu_seconds())
        self._utilization = 0.0

    def read(self) -> tuple[GpuFigures, ...]:
        with self._lock:
            now, spent = self._clock(), self._cpu_seconds()
            wall = now - self._sample[0]
            if wall >= SHORTEST_SAMPLE:
                self._utilization = min(1.0, max(0.0, (spent - self._sample[1]) / wall))
                self._sample = (now, spent)
            utilization = self._utilization
        used, total = _memory()
        return (
            GpuFigures(
                index=0, uuid="cpu", name=self._name, utilization=utilization, memory_used=used, memory_total=total
            ),
        )


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _cpu_name() -> str:
    model = _ask(lambda: re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    return (model[1].strip() if model else "") or platform.processor() or platform.machine() or "cpu"


def _memory() -> tuple[int | None, int | None]:
    used = _ask(lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    total = _ask(lambda: re.search(r"^MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
    return used, int(total[1]) * 1024 if total else None
