"""Attention in 8 bits only where a trial on the weights allows it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from torch import Tensor

from vidgen.accel import blocks, speed, trial
from vidgen.accel.kernels import flash3
from vidgen.errors import FatalError

GIVEN = {"timestep": torch.tensor([900]), "return_dict": False}


@pytest.fixture
def model(tiny_models: dict[str, Path]) -> Any:
    from diffusers import WanTransformer3DModel

    made: Any = WanTransformer3DModel.from_pretrained(tiny_models["wan2.2-a14b-i2v"] / "transformer")
    blocks.fuse_projections(made)
    return made.eval().requires_grad_(False)


def run(model: Any) -> Callable[[], None]:
    def rehearse() -> None:
        draw = torch.Generator().manual_seed(0)
        for _ in range(2):
            latents, text = torch.randn(1, 36, 3, 8, 8, generator=draw), torch.randn(1, 16, 32, generator=draw)
            model(hidden_states=latents, encoder_hidden_states=text, **GIVEN)

    return rehearse


def narrow(model: Any) -> list[bool]:
    return [one.narrow for one in blocks.attentions(model)]


def spoilt(monkeypatch: pytest.MonkeyPatch, model: Any, *layers: int, by: float) -> None:
    """Let attention in 8 bits be off by a share of itself in some layers, told by their projections."""
    stock = flash3.attended
    seen: list[Tensor] = []
    for layer in layers:
        model.blocks[layer].attn1.to_qkv.register_forward_hook(lambda module, args, made: seen.append(made))

    def attended(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None = None) -> Tensor:
        made = stock(query, key, value, lengths)
        mine = any(value.untyped_storage().data_ptr() == one.untyped_storage().data_ptr() for one in seen)
        return made * (1 + by) if mine else made

    monkeypatch.setattr(flash3, "attended", attended)


def test_layers_that_lose_little_are_narrowed_and_what_a_forward_loses_is_told(model: Any) -> None:
    [found] = trial.tried([model], run(model))
    assert (found.layers, found.narrow) == (2, (0, 1))
    assert 0 < found.error <= trial.LIMIT
    assert all(0 < error <= trial.LAYER_LIMIT for error in found.layer_errors)
    assert narrow(model) == [False, False]  # until it is applied
    found.apply(model)
    assert narrow(model) == [True, True]


def test_a_layer_that_loses_much_stays_wide(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt(monkeypatch, model, 1, by=0.5)
    [found] = trial.tried([model], run(model))
    assert found.narrow == (0,)
    assert found.layer_errors[1] == pytest.approx(0.5, abs=0.05)
    found.apply(model)
    assert narrow(model) == [True, False]


def test_the_forward_decides_and_the_worst_layer_goes_first(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt(monkeypatch, model, 0, by=0.09)  # less than a layer may lose
    [free] = trial.tried([model], run(model))
    monkeypatch.setattr(trial, "LIMIT", free.error * 0.9)
    [found] = trial.tried([model], run(model))
    assert found.narrow == (1,)
    assert found.error <= trial.LIMIT


def test_what_is_not_a_number_proves_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash3, "attended", lambda query, key, value, lengths: torch.full_like(value, float("nan")))
    [found] = trial.tried([model], run(model))
    assert (found.narrow, found.error) == ((), 0.0)


def test_one_forward_that_is_not_a_number_is_not_passed_over_for_the_others(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, calls = flash3.attended, itertools.count()

    def sometimes(query: Any, key: Any, value: Any, lengths: Any) -> Any:
        found = made(query, key, value, lengths)
        return found if next(calls) < len(blocks.attentions(model)) else torch.full_like(found, float("nan"))

    monkeypatch.setattr(flash3, "attended", sometimes)
    forward = run(model)
    [found] = trial.tried([model], lambda: [forward() for _ in range(2)])
    assert (found.narrow, found.layer_errors) == ((), (math.inf, math.inf))


def test_a_model_that_was_not_run_is_not_narrowed(model: Any) -> None:
    [found] = trial.tried([model], lambda: None)
    assert found.narrow == ()


def test_a_trial_leaves_the_model_as_it_was(model: Any) -> None:
    run(model)()
    hooks = len(model._forward_hooks)
    with pytest.raises(RuntimeError, match="broke off"):
        trial.tried([model], _broken)
    assert len(model._forward_hooks) == hooks
    assert not any("_attend" in vars(one) for one in blocks.attentions(model))


def _broken() -> None:
    raise RuntimeError("broke off")


def test_the_same_weights_have_the_same_name_and_others_another(model: Any) -> None:
    name = trial.fingerprint([model], "H200")
    assert trial.fingerprint([model], "H200") == name
    assert trial.fingerprint([model], "H100") != name
    model.blocks[1].ffn.net[2].weight.data *= 1.01
    assert trial.fingerprint([model], "H200") != name


def test_what_was_found_is_kept_for_the_next_start(tmp_path: Path) -> None:
    found = (trial.Verdict(2, (0,), 0.01, (0.02, 0.3)), trial.Verdict(2, (), 0.0, (0.2, float("inf"))))
    assert trial.kept(tmp_path, "name") is None
    trial.keep(tmp_path / "new", "name", found)
    assert trial.kept(tmp_path / "new", "name") == found
    (tmp_path / "new" / "attention-name.json").write_text("[{}]")
    assert trial.kept(tmp_path / "new", "name") is None


# ── in the engine ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def engine(tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A Wan engine that takes the CPU for a Hopper with FlashAttention 3."""
    from i2v_service.engine import wan
    from vidgen.accel.engine import DiffusersEngine, Layout

    monkeypatch.setattr(DiffusersEngine, "_memory", lambda self: 200 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(speed, "has_eight_bits", lambda: True)
    monkeypatch.setattr(wan, "REHEARSAL", wan.REHEARSAL.model_copy(
        update={"steps": 2, "num_frames": 5, "width": 32, "height": 32}))  # fmt: skip

    def chosen(transformers: Any, wanted: str, device: torch.device, dtype: torch.dtype) -> str:
        return "flash3" if wanted == "auto" else wanted

    monkeypatch.setattr(speed, "choose_attention", chosen)

    def made(**options: Any) -> Any:
        layout = Layout(device="cpu", compile="off", vae="stock", compile_cache=tmp_path / "cache", **options)
        return wan.WanI2VEngine(str(tiny_models["wan2.2-a14b-i2v"]), layout=layout)

    return made


def test_an_engine_narrows_both_experts_by_a_trial_and_says_so(engine: Callable[..., Any]) -> None:
    one = engine()
    with structlog.testing.capture_logs() as logs:
        one.setup()
    assert [narrow(model) for model in one.transformers()] == [[True, True], [True, True]]
    [said] = [entry for entry in logs if entry.get("_event") == "attention_tried"]
    assert (said["layers"], said["narrow"]) == (4, 4)
    assert 0 < said["forward_error"] <= trial.LIMIT
    assert "trial" in one.load_seconds


def test_the_next_start_tries_nothing_again(engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first = engine()
    first.setup()
    monkeypatch.setattr(trial, "tried", _not_again)
    second = engine()
    second.setup()
    assert second.verdicts == first.verdicts


def _not_again(*args: Any) -> None:
    raise AssertionError("it was tried again")


def test_a_checkpoint_of_other_layers_is_refused(engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first = engine()
    first.setup()
    monkeypatch.setattr(trial, "LAYER_LIMIT", 0.0)
    second = engine()
    second.setup()
    assert [one.narrow for one in second.verdicts] == [(), ()]
    assert first._made_with() != second._made_with()


@pytest.mark.parametrize("attention", ["flash3", "torch"])
def test_who_names_the_kernels_gets_those(engine: Callable[..., Any], attention: str) -> None:
    one = engine(attention=attention)
    one.setup()
    assert not any(any(narrow(model)) for model in one.transformers())
    assert one.verdicts == ()


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("out of memory"), RuntimeError("no such kernel")])
def test_a_trial_that_fails_leaves_attention_as_it_was(
    engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def fails(self: Any, narrow: Any) -> float:
        self._narrow(narrow)
        raise fault

    monkeypatch.setattr(trial._Watched, "_lost", fails)
    one = engine()
    with structlog.testing.capture_logs() as logs:
        one.setup()
    assert not any(any(narrow(model)) for model in one.transformers())
    assert one.verdicts == ()
    [said] = [entry for entry in logs if entry.get("_event") == "attention_trial_failed"]
    assert str(fault) in said["event"]


def test_a_device_that_is_lost_in_a_trial_ends_the_start(
    engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*args: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(trial, "tried", lost)
    with pytest.raises(FatalError, match="the device failed"):
        engine().setup()
