"""The memory ladder where memory really runs out: only on a GPU, with tiny checkpoints at large sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vidgen import weights
from vidgen.accel import ladder, speed, streaming
from vidgen.accel.engine import DiffusersEngine, Layout
from vidgen.contracts import EditWork
from vidgen.engine import Generated
from vidgen.errors import RetryableError
from vidgen.profiles import GIB

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
    pytest.mark.timeout(600),
]
DEVICE = torch.device("cuda:0")
Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def _uncapped() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


@pytest.fixture
def make(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Make:
    from edit_service.engine.qwen import QwenEditEngine

    # The profiles and the forecast are for models of full size; here memory is to run out.
    monkeypatch.setattr(DiffusersEngine, "_memory", lambda self: 200 * GIB)
    monkeypatch.setattr(DiffusersEngine, "_free_memory", lambda self: 200 * GIB)

    def made(model: Path = tiny_models["qwen-edit"], **changes: Any) -> Any:
        layout = Layout(device=str(DEVICE), attention="torch", compile="off", **changes)
        engine = QwenEditEngine(str(model), reference_area=64 * 64, condition_area=56 * 56, layout=layout)
        engine.setup()
        return engine

    return made


def run(engine: Any, side: int = 1024, candidates: int = 1) -> Generated:
    from edit_service.engine.qwen import Inputs

    work = EditWork(
        prompt="p", user_prompt="p", negative_prompt=" ", steps=2, true_cfg_scale=1.0, guidance_scale=1.0, seed=7,
        width=side, height=side, candidates=candidates,
    )  # fmt: skip
    made: Generated = engine.generate(Inputs(work, (Image.new("RGB", (64, 64), (90, 120, 150)),)), lambda k, n: None)
    return made


def peak_of(engine: Any, **given: int) -> tuple[Generated, int]:
    """A run, and the most memory that torch held for it."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(DEVICE)
    made = run(engine, **given)
    return made, torch.cuda.max_memory_reserved(DEVICE)


def cap(size: int) -> None:
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(size / total, DEVICE)


def alike(one: Generated, other: Generated) -> bool:
    """The same pictures but for bfloat16's rounding in another batch."""
    return float(np.abs(one.output.pixels.astype(int) - other.output.pixels).mean()) < 2


def test_candidates_that_run_out_of_memory_are_made_one_after_another_and_the_next_task_is_not(make: Make) -> None:
    engine = make()
    run(engine)
    _, alone = peak_of(engine)
    whole, together = peak_of(engine, candidates=4)
    assert whole.rungs == ()
    assert together > 1.5 * alone

    cap((alone + together) // 2)
    short = run(engine, candidates=4)
    assert short.rungs == ("one_by_one",)
    assert alike(short, whole)
    assert run(engine).rungs == ()

    cap(torch.cuda.get_device_properties(DEVICE).total_memory)
    again = run(engine, candidates=4)
    assert again.rungs == ()
    assert alike(again, whole)  # cuDNN may have settled for other kernels meanwhile


def test_a_decode_that_runs_out_of_memory_is_made_in_tiles(make: Make) -> None:
    engine = make()
    whole, peak = peak_of(engine, side=2048)
    engine._pipe.vae.enable_tiling()
    _, tiled = peak_of(engine, side=2048)
    engine._pipe.vae.disable_tiling()
    assert peak > 1.5 * tiled

    cap((peak + tiled) // 2)
    short = run(engine, side=2048)
    assert short.rungs == ("vae_tiling",)
    assert short.output.pixels.shape == whole.output.pixels.shape
    assert not engine._pipe.vae.use_tiling


def test_a_task_that_never_fits_is_handed_back_and_the_engine_is_as_good_as_new(make: Make) -> None:
    engine = make()
    whole = run(engine)

    cap(torch.cuda.memory_allocated(DEVICE) + (24 << 20))
    with pytest.raises(RetryableError) as caught:
        run(engine, side=2048)
    assert (caught.value.code, caught.value.rungs) == ("out_of_memory", ("vae_tiling", "offload"))

    cap(torch.cuda.get_device_properties(DEVICE).total_memory)
    assert np.array_equal(run(engine).output.pixels, whole.output.pixels)


@pytest.mark.parametrize("kind", ["resident-bf16", "resident-fp8", "an FP8 snapshot"])
def test_weights_stream_through_the_gpu_and_come_back_bit_for_bit(
    make: Make, tiny_models: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Fused kernels read the weights of layers that they do not call: those, too, must have come by then.

    Without graphs: they hold addresses of weights, and pad the text, which bfloat16 rounds otherwise.
    """
    if kind == "an FP8 snapshot":
        from vidgen.accel import quantize

        found = weights.require(str(tiny_models["qwen-edit"]))
        engine = make(quantize.quantize(found, tmp_path / "fp8", least=16).folder, cuda_graphs="off")
    else:
        engine = make(profile=kind, cuda_graphs="off")
    whole = run(engine, side=256)
    parts = speed.offloadable(engine._pipe).values()
    before = {(i, name): value.clone() for i, part in enumerate(parts) for name, value in part.state_dict().items()}

    with ladder.streamed(engine._pipe, DEVICE):
        blocks = streaming.blocks_of(engine._pipe.transformer)
        places = {tensor.untyped_storage().data_ptr() for block in blocks for tensor in block.parameters()}
        assert len(places) == min(streaming.PLACES, len(blocks))
        assert all(value.device.type == "cpu" for value in engine._pipe.text_encoder.parameters())
        streamed = run(engine, side=256)
        again = run(engine, side=256)  # by now in the order that the first one showed

    assert np.array_equal(streamed.output.pixels, whole.output.pixels)
    assert np.array_equal(again.output.pixels, whole.output.pixels)
    after = {(i, name): value for i, part in enumerate(parts) for name, value in part.state_dict().items()}
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert value.device == DEVICE
        assert torch.equal(value.view(torch.uint8), before[name].view(torch.uint8))
    assert np.array_equal(run(engine, side=256).output.pixels, whole.output.pixels)


def test_a_run_that_streams_for_want_of_memory_leaves_the_graphs_out(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    whole = [run(engine, side=256) for _ in range(2)][-1]
    assert len(engine._graphs) > 0
    decode, fails = engine._pipe.vae.decode, [True, True]

    def short(*args: Any, **options: Any) -> Any:
        if fails:
            fails.pop()
            raise torch.cuda.OutOfMemoryError("out of memory")
        return decode(*args, **options)

    monkeypatch.setattr(engine._pipe.vae, "decode", short)
    streamed = run(engine, side=256)
    assert streamed.rungs == ("vae_tiling", "offload")
    assert alike(streamed, whole)
    for _ in range(2):  # the graphs that there were are gone, and recorded anew
        assert alike(run(engine, side=256), whole)
    assert len(engine._graphs) > 0
