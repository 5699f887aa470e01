from __future__ import annotations

from typing import Any

import pytest

from vidgen import choice
from vidgen.contracts import GpuFigures
from vidgen.settings import WorkerSettings

GPU = GpuFigures(index=0, uuid="GPU-1", name="NVIDIA H200")
CPU = GpuFigures(index=0, uuid="cpu", name="cpu")
MISSING = "the weights are not on this machine"


def choose(gpus: list[GpuFigures], reason: str | None, **settings: Any) -> choice.Choice:
    return choice.choose("edit", WorkerSettings(**settings), gpus=gpus, reason=reason)


@pytest.mark.parametrize("gpus", [[], [CPU], [GPU]])
@pytest.mark.parametrize("reason", [None, MISSING])
def test_an_engine_that_was_asked_for_is_given(gpus: list[GpuFigures], reason: str | None) -> None:
    assert choose(gpus, reason, engine="preview").kind == "preview"
    assert choose(gpus, reason, engine="real").kind == "real"


def test_the_real_engine_runs_where_all_is_there() -> None:
    chosen = choose([GPU], None, edit_model="some/model")
    assert chosen.kind == "real"
    assert "some/model" in chosen.reason
    assert "NVIDIA H200" in chosen.reason


@pytest.mark.parametrize("gpus", [[], [CPU]])
def test_without_a_gpu_there_are_previews(gpus: list[GpuFigures]) -> None:
    chosen = choose(gpus, None)
    assert chosen.kind == "preview"
    assert "no GPU" in chosen.reason


def test_without_weights_or_libraries_there_are_previews_with_the_reason() -> None:
    assert choose([GPU], MISSING) == choice.Choice("preview", MISSING)


def test_a_worker_that_was_put_on_the_cpu_makes_previews() -> None:
    chosen = choose([GPU], None, device="cpu")
    assert chosen.kind == "preview"
    assert "VIDGEN_DEVICE=cpu" in chosen.reason
