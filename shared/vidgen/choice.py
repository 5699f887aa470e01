"""Which engine a worker runs, and why: the real model or the CPU preview."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vidgen.contracts import GpuFigures, Stage
from vidgen.settings import WorkerSettings


@dataclass(frozen=True)
class Choice:
    """The engine to run, with the reason as a sentence for the log, the registry and `vidgen doctor`.

    `alone`: no other engine of this process shares its device, so that how it is laid out is its own to decide.
    """

    kind: Literal["real", "preview"]
    reason: str
    alone: bool = True


def choose(stage: Stage, settings: WorkerSettings, *, gpus: Sequence[GpuFigures], reason: str | None) -> Choice:
    """Choose the engine of a stage; pure.

    `gpus` is what the monitor saw, `reason` what `weights.why_not` said. VIDGEN_ENGINE decides; auto is the real model
    where a GPU, the libraries and the weights are all there. A real engine that was asked for by name is given even
    where `reason` speaks against it: its `setup` then fails with the remedy, instead of previews in its place.
    """
    model, _ = settings.model_of(stage)
    if settings.engine == "preview":
        return Choice("preview", "VIDGEN_ENGINE=preview asks for it")
    if settings.engine == "real":
        return Choice("real", f"VIDGEN_ENGINE=real asks for {model}")
    if settings.device == "cpu":
        return Choice("preview", "VIDGEN_DEVICE=cpu leaves no GPU to the model: VIDGEN_ENGINE=real runs it on the CPU")
    gpu = next((gpu for gpu in gpus if gpu.name != "cpu"), None)
    if gpu is None:
        return Choice("preview", "there is no GPU here: VIDGEN_ENGINE=real runs the model on the CPU, very slowly")
    if reason is not None:
        return Choice("preview", reason)
    return Choice("real", f"{model} and a GPU ({gpu.name}) are here")
