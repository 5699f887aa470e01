"""Fused kernels in Triton, each beside the same arithmetic in plain torch, which serves where there is no Triton.

They are operators that `torch.compile` looks into and launches by itself: in a small picture an operator that Python is
called for takes longer than its kernel. What they save is traffic: inductor's own fusions of these patterns read a row
two or three times, these once.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0  # the largest e4m3 number
SMALLEST = 1e-12  # a row of zeros has no magnitude to divide by
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton would compile anew for numbers of tokens that sixteen divides and for others, in the middle of a task.
COUNTS = ("tokens", "image_tokens", "text_tokens")


def fused(x: Tensor) -> bool:
    """Whether a kernel serves for a tensor, or plain torch."""
    return HAS_TRITON and x.is_cuda


def within(lengths: Tensor, tokens: int) -> Tensor:
    """(batch, tokens) booleans: which of so many tokens are among the first `lengths`."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]
