"""Weights leave a GPU and come back: only on one."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

from vidgen.accel.fp8 import Fp8Linear
from vidgen.accel.residency import Residency

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
    # torch 2.11's own, of what it imports to compile.
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]

MIB = 1 << 20


class Model(nn.Module):
    """About 330 MiB: blocks in bfloat16, one in FP8, a tied head, a convolution in channels_last, small tensors."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(8)))
        self.embedding = nn.Embedding(4096, 4096)
        self.head = nn.Linear(4096, 4096, bias=False)
        self.head.weight = self.embedding.weight
        self.convolution = nn.Conv2d(256, 256, 3)
        self.register_buffer("table", torch.randn(100), persistent=False)
        self.bfloat16().to(device).requires_grad_(False)
        self.fp8 = Fp8Linear.of(nn.Linear(4096, 4096, dtype=torch.bfloat16, device=device), arithmetic=False)
        self.convolution.weight.data = self.convolution.weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.fp8(self.blocks(x)))
        return found


def bits_of(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.clone().cpu().contiguous().view(-1).view(torch.uint8) for name, tensor in tensors}


@pytest.mark.parametrize("home", ["memory", "disk"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_leaves_the_gpu_and_comes_back_with_every_bit(home: str, compiled: bool, tmp_path: Path) -> None:
    device = torch.device("cuda:0")
    torch.manual_seed(0)
    gc.collect()
    torch.cuda.empty_cache()
    # Small things that tests before have left, and cuBLAS' memory, keep more than they are.
    torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
    empty = torch.cuda.memory_reserved(device)
    model = Model(device)
    if compiled:
        for block in model.blocks:
            block.compile()
    x = torch.randn(64, 4096, device=device, dtype=torch.bfloat16)
    with torch.inference_mode():
        before = model(x)
    bits = bits_of(model)
    strides = {name: tensor.stride() for name, tensor in model.named_parameters()}
    awake = torch.cuda.memory_allocated(device)
    kept = Residency([model], device, home, tmp_path)
    for _ in range(2):
        kept.sleep()
        assert torch.cuda.memory_allocated(device) < awake - 300 * MIB
        assert torch.cuda.memory_reserved(device) < empty + 80 * MIB
        kept.wake()

        for name, found in bits_of(model).items():
            assert torch.equal(found, bits[name]), name
        assert {name: tensor.stride() for name, tensor in model.named_parameters()} == strides
        with torch.inference_mode():
            assert torch.equal(model(x), before)
