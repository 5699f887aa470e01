"""What the two diffusers engines share: devices, LoRAs, steps, faults. Imports torch in functions only."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vidgen import weights
from vidgen.engine import EngineInfo, OnStep
from vidgen.errors import FatalError, RejectedError, RetryableError, VidgenError

if TYPE_CHECKING:
    import numpy as np
    import torch

# How torch says that memory ran out where it does not raise its OutOfMemoryError.
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")
# How it says that the device, or this process's context on it, is lost.
DEVICE_LOST = ("CUDA", "cuDNN", "CUBLAS", "CUDNN", "NCCL", "HIP error", "device-side assert", "device lost")


def device_of(wanted: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` means here; raises FatalError where there is none."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return torch.device("cuda:0" if count else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as exc:
        raise FatalError(f"device {wanted} is unknown: use auto, cpu, cuda or cuda:N", code="settings") from exc
    if device.type == "cuda" and (device.index or 0) >= count:
        raise FatalError(
            f"device {wanted} is not here, torch sees {count} GPUs: set VIDGEN_DEVICE to one of them, or to cpu",
            code="cuda_error",
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def dtype_of(wanted: str, device: torch.device) -> torch.dtype:
    """The precision that `auto` or a torch name means on a device: bfloat16 on a GPU, float32 on the CPU."""
    import torch

    if wanted == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = getattr(torch, wanted, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise FatalError(f"dtype {wanted} is unknown: use auto, bfloat16, float16 or float32", code="settings")
    return dtype


def fuse(pipe: Any, path: str, component: str = "transformer") -> None:
    """Fuse a local LoRA into one component of a pipeline; raises FatalError where it does not fit."""
    if getattr(pipe, component, None) is None:
        raise FatalError(f"this model has no {component} for the LoRA {path}: leave that LoRA out", code="settings")
    file = weights.lora_file(path)
    into = {"load_into_transformer_2": True} if component == "transformer_2" else {}
    with loading(f"the LoRA {file}", "use one that was made for this model"):
        pipe.load_lora_weights(
            str(file.parent), weight_name=file.name, adapter_name="lora",
            use_safetensors=True, local_files_only=True, **into,
        )  # fmt: skip
        # diffusers only warns where not one key of the file belongs to the component.
        if "lora" not in pipe.get_list_adapters().get(component, ()):
            raise ValueError(f"no key in it belongs to the {component}")
        pipe.fuse_lora(components=[component])
        pipe.unload_lora_weights()


@contextlib.contextmanager
def loading(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever loading raises into a FatalError: a worker that cannot load can do no task at all."""
    try:
        yield
    except FatalError:
        raise
    except Exception as exc:
        fault = as_error(exc)
        if isinstance(fault, RetryableError):
            message = f"{what} does not fit into the memory: use a larger device or a smaller model"
            raise FatalError(message, code=fault.code) from exc
        if isinstance(fault, FatalError):
            raise fault from exc
        reason = (str(exc).strip() or type(exc).__name__).partition("\n")[0][:300]
        raise FatalError(f"{what} cannot be loaded ({reason}): {remedy}", code="weights_missing") from exc


class Steps:
    """A `callback_on_step_end` that reports each step, and notes when the last one ended.

    What `on_step` raises stops the pipeline there (its own `interrupt` flag would still decode), and is kept in
    `stopped_by`, so that it is not taken for a fault of the pipeline. A fault leaves what is `kept` as its state.
    """

    def __init__(self, on_step: OnStep, device: torch.device) -> None:
        self.on_step = on_step
        self.device = device
        self.stopped_by: BaseException | None = None
        self.started = self.ended = time.perf_counter()

    def __call__(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        # Kernels are queued ahead of the device: without waiting, progress would run ahead of the work, and a
        # cancel would leave a queue behind. It costs the launch of one kernel per step.
        synchronize(self.device)
        self.ended = time.perf_counter()
        if "latents" in tensors:  # before anybody is told of the step, or keeps it for another worker
            require_finite(tensors["latents"], f"the latents behind step {index + 1}")
        try:
            self.on_step(index + 1, pipe.num_timesteps)
        except BaseException as exc:
            self.stopped_by = exc
            raise
        return {}

    def kept(self) -> bytes | None:
        """The state from which what failed can be tried again; None: from the beginning."""
        return None

    @property
    def denoise_s(self) -> float:
        """Seconds to the end of the last step, the text and image encoders included."""
        return self.ended - self.started

    def decode_s(self) -> float:
        """Seconds since the last step."""
        return time.perf_counter() - self.ended


@contextlib.contextmanager
def faults(steps: Steps) -> Iterator[None]:
    """Name what the pipeline raises by what happens next, and pass on unchanged what `on_step` raised."""
    try:
        yield
    except BaseException as exc:
        # The traceback's frames hold the latents and every activation: without this, the memory of a cancelled or
        # failed task would stay taken for as long as somebody keeps the exception.
        traceback.clear_frames(exc.__traceback__)
        # Nor may anything in these frames hold the exception, which holds them: the latents are theirs, too, and would
        # stay on the device until the garbage collector looks.
        stopped, steps.stopped_by = exc is steps.stopped_by, None
        if stopped or not isinstance(exc, Exception):
            raise
        fault = as_error(exc)
        try:
            if isinstance(fault, RetryableError):
                free(steps.device)
                # What went wrong with the numbers may have begun where nobody saw it yet.
                fault.state = None if fault.code == "not_finite" else steps.kept()
            if fault is None or fault is exc:  # an exception that is its own cause has causes without end
                raise
            raise fault from exc
        finally:
            del fault


@contextlib.contextmanager
def moving(what: str, device: torch.device) -> Iterator[None]:
    """Name what moving weights raises: RetryableError where memory ran out, else FatalError."""
    try:
        yield
    except Exception as exc:
        traceback.clear_frames(exc.__traceback__)  # they hold what was on its way
        fault = as_error(exc)
        if isinstance(fault, RetryableError):
            free(device)
            raise RetryableError(f"{what}: {fault.message}", code=fault.code) from exc
        if isinstance(fault, FatalError):
            if fault is exc:
                raise
            raise fault from exc
        raise FatalError(f"{what}: {type(exc).__name__}: {exc}", code="setup_failed") from exc


def as_error(exc: Exception) -> VidgenError | None:
    """What an exception of the pipeline means to the worker; None for what has no meaning of its own."""
    import torch

    said = str(exc)
    line = said.strip().partition("\n")[0][:300] or type(exc).__name__
    if isinstance(exc, VidgenError):
        return exc
    if isinstance(exc, torch.OutOfMemoryError | MemoryError):
        return RetryableError(f"the device ran out of memory: {line}", code="out_of_memory")
    if isinstance(exc, RuntimeError):
        if any(words in said for words in OUT_OF_MEMORY):
            return RetryableError(f"the device ran out of memory: {line}", code="out_of_memory")
        if isinstance(exc, torch.AcceleratorError) or any(words in said for words in DEVICE_LOST):
            return FatalError(f"the device failed: {line}", code="cuda_error")
    if isinstance(exc, ValueError):
        return RejectedError(f"the model refuses these inputs: {line}", code="invalid_input")
    return None


def require_finite(numbers: torch.Tensor, what: str) -> None:
    """Raise RetryableError `not_finite` where some are NaN or infinite; waits for the device.

    Encoded they would be a black picture, and nobody would hear of it.
    """
    import torch

    if not torch.isfinite(numbers).all():
        raise RetryableError(
            f"{what} are not all finite numbers, so there is no picture in them: another worker may make one; else ask "
            "for less guidance, or take another precision (VIDGEN_PROFILE) or LoRA", code="not_finite",
        )  # fmt: skip


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was queued."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give back the memory that torch keeps for later."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()


def generators(seed: int, count: int = 1) -> list[torch.Generator]:
    """One generator per candidate, seeded `seed`, `seed` + 1, …: any candidate can be made again alone.

    They live on the CPU, so that the noise does not depend on the device.
    """
    import torch

    return [torch.Generator("cpu").manual_seed((seed + k) % 2**32) for k in range(count)]


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Round 0..1 floats (…, channels, height, width) to uint8 (…, height, width, channels) on their device.

    A quarter of the bytes then cross to the host, in one copy, and the CPU has nothing left to convert.
    """
    import torch

    # In bfloat16 255 steps of brightness would not be told apart.
    return images.float().mul(255).round_().clamp_(0, 255).to(torch.uint8).movedim(-3, -1).contiguous()


def on_host(pixels: torch.Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """The same in host memory: from a GPU through pinned memory, which torch keeps, at the full rate of the bus."""
    import torch

    made = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=pixels.is_cuda)
    found: np.ndarray[Any, np.dtype[Any]] = made.copy_(pixels).numpy()
    return found


def cropped(pixels: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """The middle `width` × `height` of (…, height, width, channels)."""
    top, left = (pixels.shape[-3] - height) // 2, (pixels.shape[-2] - width) // 2
    return pixels[..., top : top + height, left : left + width, :]


def round_up(side: int, multiple: int) -> int:
    """The next multiple that is not smaller."""
    return -(-side // multiple) * multiple


def provenance(info: EngineInfo, seed: int) -> dict[str, str]:
    """What a file says of its making."""
    revision = {"revision": info.revision} if info.revision else {}
    return {"engine": info.name, "model": info.model, **revision, "seed": str(seed)}
