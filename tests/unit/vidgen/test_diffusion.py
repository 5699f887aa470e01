"""What the two diffusers engines share, without a model."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from vidgen import diffusion
from vidgen.errors import Cancelled, FatalError, RejectedError, RetryableError, VidgenError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("raised", "expected", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), RetryableError, "out_of_memory"),
        (RuntimeError("CUDA error: out of memory"), RetryableError, "out_of_memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), RetryableError, "out_of_memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), RetryableError, "out_of_memory"),
        (MemoryError(), RetryableError, "out_of_memory"),
        (torch.AcceleratorError("an illegal memory access was encountered"), FatalError, "cuda_error"),
        (RuntimeError("CUDA error: device-side assert triggered"), FatalError, "cuda_error"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), FatalError, "cuda_error"),
        (ValueError("`height` has to be divisible by 16"), RejectedError, "invalid_input"),
    ],
)
def test_a_fault_becomes_the_error_that_says_what_happens_next(
    raised: Exception, expected: type[VidgenError], code: str
) -> None:
    named = diffusion.as_error(raised)
    assert type(named) is expected
    assert named is not None
    assert named.code == code


@pytest.mark.parametrize("raised", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("x")])
def test_a_bug_is_given_no_other_name(raised: Exception) -> None:
    assert diffusion.as_error(raised) is None


def test_a_kept_exception_keeps_no_tensors() -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    stop = Cancelled("stop")

    def on_step(step: int, steps: int) -> None:
        raise stop

    def pipeline(callback: diffusion.Steps) -> None:
        latents = torch.zeros(4)
        held.append(weakref.ref(latents))
        callback(type("Pipe", (), {"num_timesteps": 2}), 0, None, {})

    steps = diffusion.Steps(on_step, CPU)
    with pytest.raises(Cancelled) as caught, diffusion.faults(steps):
        pipeline(steps)

    gc.collect()
    assert caught.value is stop
    assert held[0]() is None


def test_a_device_that_is_not_there_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    assert diffusion.device_of("auto") == torch.device("cuda:0")
    assert diffusion.device_of("cuda") == torch.device("cuda:0")
    assert diffusion.device_of("cuda:1") == torch.device("cuda:1")
    assert diffusion.device_of("cpu") == CPU
    with pytest.raises(FatalError, match="torch sees 2 GPUs"):
        diffusion.device_of("cuda:2")


def test_precision_follows_the_device_unless_it_is_set() -> None:
    assert diffusion.dtype_of("auto", CPU) is torch.float32
    assert diffusion.dtype_of("auto", torch.device("cuda:0")) is torch.bfloat16
    assert diffusion.dtype_of("float16", CPU) is torch.float16


def test_pixels_are_rounded_not_cut() -> None:
    images = torch.tensor([0.0, 0.4999 / 255, 0.5001 / 255, 1.0]).reshape(1, 1, 2, 2)
    assert diffusion.to_pixels(images).flatten().tolist() == [0, 0, 1, 255]


def test_cropping_keeps_the_middle() -> None:
    pixels = torch.arange(4 * 6).reshape(1, 4, 6, 1)
    assert diffusion.cropped(pixels, 2, 2).flatten().tolist() == [8, 9, 14, 15]
    assert diffusion.on_host(diffusion.cropped(pixels, 2, 2)).flatten().tolist() == [8, 9, 14, 15]


def test_seeds_of_candidates_wrap_around() -> None:
    first, second = diffusion.generators(2**32 - 1, 2)
    assert (first.initial_seed(), second.initial_seed()) == (2**32 - 1, 0)


@pytest.mark.parametrize("raised", [FatalError("the partner is gone"), RetryableError("no room")])
def test_an_error_that_has_its_name_already_is_not_its_own_cause(raised: VidgenError) -> None:
    """Whoever follows the causes of such a one never comes to an end: a worker's event loop stood still for ever."""
    steps = diffusion.Steps(lambda step, steps: None, CPU)
    with pytest.raises(type(raised)) as caught, diffusion.faults(steps):
        raise raised
    assert caught.value.__cause__ is not caught.value
    with pytest.raises(VidgenError) as moved, diffusion.moving("the model could not be woken", CPU):
        raise raised
    assert moved.value.__cause__ is not moved.value
