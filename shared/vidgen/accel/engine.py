"""What the two diffusers engines are made of: from a verified folder to a pipeline that is laid out, fast and warm."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import structlog
import torch

from vidgen import diffusion, profiles, weights
from vidgen.accel import blocks, fp8, ladder, speed
from vidgen.engine import EngineInfo, Generated, Rung
from vidgen.errors import FatalError
from vidgen.profiles import GIB

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Layout:
    """How an engine is laid into a device; each field is a setting of the same name.

    `dtype` auto is bfloat16 on a GPU and float32 on the CPU. `profile` auto follows the GPU's memory; on the CPU there
    is none. `attention` auto is FlashAttention 3 where it is installed and the GPU is a Hopper, else torch's own.
    `compile` auto compiles the transformer's blocks on a GPU that holds them all, `full` the VAE too, `off` nothing.
    """

    device: str = "auto"
    dtype: str = "auto"
    profile: str = "auto"
    attention: str = "auto"
    compile: str = "auto"


class DiffusersEngine(abc.ABC):
    """The part of an engine that does not depend on the model: load, lay out, speed up, warm up."""

    NAME: ClassVar[str]
    PIPELINE: ClassVar[Any]
    PIPELINES: ClassVar[frozenset[str]]
    # Bytes that one task takes beside the weights, at the largest common size.
    WORK: ClassVar[int] = 6 * GIB

    def __init__(self, model: str, revision: str | None, loras: Mapping[str, str | None], layout: Layout) -> None:
        self.model = model
        self.revision = revision
        self.layout = layout
        self.info = EngineInfo(
            self.NAME, Path(model).name if Path(model).is_dir() else model, revision, device=layout.device
        )
        self.load_seconds: dict[str, float] = {}
        self._loras = {component: path for component, path in loras.items() if path is not None}
        self._pipe: Any
        self._rungs: tuple[Rung, ...] = ()  # none before the end of the warm-up: what has no room for that has none

    def setup(self) -> None:
        """Load the weights, fuse the LoRAs and, on a GPU, run once; raises FatalError with the remedy."""
        found = self._timed("verify", self._find)
        self._device = self._timed("device", self._open_device)
        dtype = diffusion.dtype_of(self.layout.dtype, self._device)
        profile = self._profile(self._sizes(found), stored_fp8=found.profile == "fp8")
        resident = profile is None or profile.startswith("resident")
        quantised = profile is not None and profile.endswith("fp8")
        # What is quantised or offloaded must never be on the device as a whole.
        place = self._device if resident and not quantised else torch.device("cpu")
        self._pipe = self._timed("weights", lambda: self._load(found, place, self._dtypes(found, dtype)))
        for component, path in self._loras.items():
            diffusion.fuse(self._pipe, path, component)
        self._timed("layout", lambda: self._lay_out(profile))
        self.info = replace(
            self.info, model=found.model, revision=found.revision, device=str(self._device),
            profile=str(dtype).removeprefix("torch.") if profile is None else self._told(profile),
        )  # fmt: skip
        self._adopt()
        if self._device.type == "cuda":
            with diffusion.loading("the model", "see the log of this worker"):
                self._timed("warm_up", self._warm_up)
        self._rungs = ("vae_tiling", "offload") if profile is not None and resident else ("vae_tiling",)

    def _find(self) -> weights.Weights:
        return weights.require(self.model, self.revision, pipelines=self.PIPELINES)

    def _sizes(self, found: weights.Weights) -> Mapping[str, int]:
        return weights.component_sizes(found.folder)

    def _open_device(self) -> torch.device:
        device = diffusion.device_of(self.layout.device)
        if device.type == "cuda":
            torch.zeros(1, device=device)  # the context, so that its time is its own
        return device

    def _load(self, found: weights.Weights, place: torch.device, dtypes: Mapping[str, torch.dtype]) -> Any:
        if found.profile != "fp8":
            return diffusion.load(self.PIPELINE, found, place, dtypes)
        if self._loras:
            raise FatalError(
                f"{found.folder} is an FP8 snapshot, into which no LoRA can be fused any more: "
                "fuse it when quantising (vidgen weights quantize --lora) and leave the setting out",
                code="settings",
            )
        from vidgen.accel.assemble import assemble

        arithmetic = fp8.has_arithmetic(self._device)
        return assemble(self.PIPELINE, found, place, dtypes, arithmetic=arithmetic, on_phase=self._add)

    def _dtypes(self, found: weights.Weights, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The precision of each component, with a `default`."""
        return {"default": dtype}

    @abc.abstractmethod
    def _adopt(self) -> None:
        """Look at the pipeline that was loaded, before the warm-up."""

    def _made_with(self) -> dict[str, object]:
        """What decides over the numbers besides model, profile and task: of a checkpoint, too, it must be the same."""
        layout = self.layout
        return {"loras": self._loras, "dtype": layout.dtype, "attention": layout.attention, "compile": layout.compile}

    @abc.abstractmethod
    def _warm_up(self) -> None:
        """Run once, so that the first task finds everything compiled and allocated."""

    def _profile(self, parts: Mapping[str, int], *, stored_fp8: bool) -> profiles.Name | None:
        """The profile on a GPU, None on the CPU."""
        total = self._memory()
        if total is None:
            return None
        return profiles.choose(self.layout.profile, total, parts, self.WORK, stored_fp8=stored_fp8)

    def _memory(self) -> int | None:
        """The bytes of GPU memory that this process may use, None on the CPU."""
        if self._device.type != "cuda":
            return None
        share = torch.cuda.get_per_process_memory_fraction(self._device)
        return int(torch.cuda.get_device_properties(self._device).total_memory * share)

    def _free_memory(self) -> int | None:
        """The bytes of it that a task would find, None on the CPU."""
        total = self._memory()
        if total is None:
            return None
        taken: int = torch.cuda.memory_allocated(self._device)
        idle: int = torch.cuda.memory_reserved(self._device) - taken
        free: int = torch.cuda.mem_get_info(self._device)[0]
        return min(total - taken, free + idle)

    def _told(self, profile: profiles.Name) -> str:
        """The profile as others hear of it."""
        if not profile.endswith("fp8") or fp8.has_arithmetic(self._device):
            return profile
        log.warning(
            "this GPU does not multiply FP8: its weights are stored so, which saves memory, and widened for each "
            "product, which costs time", _event="fp8_storage_only", profile=profile,
        )  # fmt: skip
        return f"{profile}-storage"

    def _within_memory(self, attempt: Callable[[bool], Generated], *, at_once: bool = False) -> Generated:
        """Run a task, and where memory runs out once more with less of it: see `vidgen.accel.ladder`.

        `attempt` takes whether the candidates are to be made one after another; `at_once` says that it would not.
        """
        rungs = ("one_by_one", *self._rungs) if at_once and self._rungs else self._rungs
        return ladder.descend(
            self._pipe, self._device, rungs, lambda taken: attempt(not at_once or "one_by_one" in taken)
        )

    def _lay_out(self, profile: profiles.Name | None) -> None:
        if profile is None:
            return
        transformers = [getattr(self._pipe, name, None) for name in profiles.TRANSFORMERS]
        transformers = [model for model in transformers if model is not None]
        if profile.endswith("fp8"):
            arithmetic = fp8.has_arithmetic(self._device)
            for model in transformers:
                blocks.fuse_projections(model)
                fp8.quantise(model, arithmetic=arithmetic, through=self._device, keep_there=profile == "resident-fp8")
                blocks.fuse_feed_forwards(model)
        speed.choose_attention(transformers, self.layout.attention, self._device)
        if profile == "offload-fp8":
            speed.offload(self._pipe, self._device)
            return
        self._pipe.to(self._device)
        speed.channels_last(self._pipe.vae)
        if self.layout.compile != "off":
            speed.compile_blocks(transformers)
        if self.layout.compile == "full":
            speed.compile_vae(self._pipe.vae)

    def _timed(self, phase: str, work: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        try:
            return work()
        finally:
            self._add(phase, time.perf_counter() - begun)

    def _add(self, phase: str, seconds: float) -> None:
        self.load_seconds[phase] = self.load_seconds.get(phase, 0.0) + seconds
