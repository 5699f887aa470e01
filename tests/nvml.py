"""NVML as a driver would answer: two healthy GPUs, and the faults of real ones at a test's command."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    pass


class FakeNvml:
    """Two healthy GPUs; a name in `broken` raises when it is called, a uuid in `lost` breaks every figure."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, *, broken: tuple[str, ...] = (), uuids: tuple[str, ...] = ("GPU-aaaa-1", "GPU-bbbb-2")) -> None:
        self.uuids, self.broken = uuids, set(broken)
        self.lost: set[str] = set()

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in object.__getattribute__(self, "broken"):
            raise NVMLError("Not Supported")
        return object.__getattribute__(self, name)

    def nvmlInit(self) -> None: ...  # noqa: N802

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.uuids)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return self.uuids[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != "MIG-cccc":
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, _handle: str) -> str:  # noqa: N802
        return self.uuids[1]

    def nvmlDeviceGetIndex(self, handle: str) -> int:  # noqa: N802
        return self.uuids.index(handle)

    def nvmlDeviceGetUUID(self, handle: str) -> str:  # noqa: N802
        return handle

    def nvmlDeviceGetName(self, _handle: str) -> str:  # noqa: N802
        return "NVIDIA H200"

    def _alive(self, handle: str) -> int:
        if handle in self.lost:
            raise NVMLError("GPU is lost")
        return self.uuids.index(handle) + 1 if handle in self.uuids else 9

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(used=self._alive(handle) * 1000, total=150_000)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(gpu=self._alive(handle) * 25, memory=3)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        return self._alive(handle) * 350_500

    def nvmlDeviceGetTemperature(self, handle: str, _sensor: int) -> int:  # noqa: N802
        return self._alive(handle) * 30

    def nvmlDeviceGetCudaComputeCapability(self, handle: str) -> tuple[int, int]:  # noqa: N802
        return {"GPU-aaaa-1": (9, 0), "GPU-ada": (8, 9)}.get(handle, (8, 6))
