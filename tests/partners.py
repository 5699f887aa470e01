"""Engines for a process that computes the other half of guided steps; picklable by name."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.cache_utils import CacheMixin

from vidgen.engine import EngineInfo
from vidgen.errors import FatalError


class Doubles(ModelMixin, ConfigMixin, CacheMixin):
    """A transformer that predicts twice its latents' first channels, or fails as they say."""

    @register_to_config
    def __init__(self, out_channels: int = 1) -> None:
        super().__init__()

    def forward(self, hidden_states: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        said = int(hidden_states.max())
        if said == NO_ROOM:
            raise torch.OutOfMemoryError("out of memory")
        if said == UNUSABLE:
            raise ValueError("such latents are not taken")
        if said == BROKEN:
            raise TypeError("nobody foresaw this")
        return (2 * hidden_states[:, : self.config.out_channels],)


NO_ROOM, UNUSABLE, BROKEN = 101, 102, 103


@dataclass
class Small:
    """An engine of nothing but that."""

    fails: bool = False
    verdicts: tuple[()] = ()
    info: EngineInfo = field(default_factory=lambda: EngineInfo("small", "doubles", device="cpu", profile="float32"))

    def setup(self) -> None:
        if self.fails:
            raise FatalError("there is no such device", code="cuda_error")

    def transformers(self) -> list[Doubles]:
        return [Doubles()]


class Stuck(Small):
    """One that does not come back."""

    def setup(self) -> None:
        sys.stdout.write("stuck\n")
        sys.stdout.flush()
        threading.Event().wait()
