"""The weights' way to the device, begun while the packages that will want them are still being imported.

Reading needs torch alone. Importing the rest takes one processor for seconds, and leaves the others and the bus idle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vidgen import diffusion, profiles, weights
from vidgen.accel import loader
from vidgen.accel.loader import Entry

# So much of a file may lie on the device twice, as it is stored and as it is cast.
LITTLE = 1 << 30


def begin_for(
    model: str, revision: str | None, layout: Mapping[str, Any], pipelines: frozenset[str], work: int
) -> loader.Reading | None:
    """Begin to read a model to where an engine with this `Layout`, alone on its device, will want it.

    `layout` are its fields and `work` the bytes that a task takes: `Layout` itself comes with all that takes so long.
    None where it will not be on a GPU as it is stored. Raises FatalError, as the engine would.
    """
    target = diffusion.device_of(layout["device"])
    if target.type != "cuda":
        return None
    found = weights.require(model, revision, pipelines=pipelines)
    torch.zeros(1, device=target)  # the context
    sizes = weights.component_sizes(found.folder)
    chosen = profiles.choose(layout["profile"], memory(target), sizes, work, stored_fp8=found.profile == "fp8")
    if not chosen.startswith("resident") or (chosen.endswith("fp8") and found.profile != "fp8"):
        return None
    return begin(found, target, {"default": diffusion.dtype_of(layout["dtype"], target)})


def begin(found: weights.Weights, device: torch.device, dtypes: Mapping[str, torch.dtype]) -> loader.Reading:
    """Begin to read all weights of a verified model to a device."""
    widest = max(dtype.itemsize for dtype in dtypes.values())

    def waits(entries: Sequence[Entry]) -> bool:
        """Whether so much of a file will be cast that there must not be many such files at once."""
        return sum(entry.end - entry.begin for entry in entries if entry.dtype.itemsize > widest) > LITTLE

    return loader.Reading(weights.in_reading_order(found.folder), device, waits)


def memory(device: torch.device) -> int:
    """The bytes of a GPU's memory that this process may use."""
    share = torch.cuda.get_per_process_memory_fraction(device)
    return int(torch.cuda.get_device_properties(device).total_memory * share)
