"""What both engines share: how a model comes to its device."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from PIL import Image
from tests import checkpoints
from tests.workbench import work_of

from vidgen import diffusion
from vidgen.errors import FatalError

AREAS = {"reference_area": 64 * 64, "condition_area": 56 * 56}


@pytest.fixture(scope="module")
def snapshot(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vidgen import weights
    from vidgen.accel import quantize

    folder = tmp_path_factory.mktemp("fp8") / "qwen-edit"
    return quantize.quantize(weights.require(str(tiny_models["qwen-edit"])), folder, least=16).folder


@pytest.fixture(scope="module")
def make(tiny_models: dict[str, Path]) -> Callable[..., Any]:
    from edit_service.engine.qwen import QwenEditEngine

    def made(model: Path, **options: Any) -> Any:
        engine = QwenEditEngine(str(model), **AREAS | options)
        engine.setup()
        return engine

    return made


def test_the_gpu_that_is_set_is_the_current_one_of_the_thread_that_computes(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a second GPU it was not: our kernels and graphs were launched on the first, with what lay there."""
    from edit_service.engine.qwen import QwenEditEngine
    from vidgen.accel import ahead

    told: list[object] = []
    second = torch.device("cuda", 1)
    monkeypatch.setattr(diffusion, "device_of", lambda wanted: second)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: told.append(("context", device)))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.append(("current", device)))
    monkeypatch.setattr(ahead, "taken_by_others", lambda device: 0)
    engine = QwenEditEngine("model")
    assert engine._open_device() == second
    assert told == [("current", second), ("context", second)]


@pytest.mark.parametrize(("gib", "says"), [(1, False), (20, True)])
def test_what_other_processes_have_of_the_gpu_is_said(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, gib: int, says: bool
) -> None:
    from edit_service.engine.qwen import QwenEditEngine
    from vidgen.accel import ahead

    monkeypatch.setattr(diffusion, "device_of", lambda wanted: torch.device("cuda", 0))
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(ahead, "taken_by_others", lambda device: gib << 30)
    engine = QwenEditEngine("model")
    with structlog.testing.capture_logs() as logs:
        engine._open_device()
    assert ["gpu_taken_by_others"] * says == [entry["_event"] for entry in logs]


def test_an_fp8_snapshot_is_served_as_it_is_stored(make: Callable[..., Any], snapshot: Path) -> None:
    from vidgen.accel.fp8 import Fp8Linear

    engine = make(snapshot)
    assert any(isinstance(module, Fp8Linear) for module in engine._pipe.transformer.modules())
    assert {"verify", "weights", "read", "build"} <= set(engine.load_seconds)


def test_kernels_are_kept_for_the_next_start_where_weights_stream_too(
    make: Callable[..., Any], snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is compiled by torch there; Triton's kernels were compiled anew at each start of a container."""
    from vidgen.accel.engine import DiffusersEngine, Layout

    monkeypatch.setattr(DiffusersEngine, "_memory", lambda self: 200 << 30)
    for name in ("TRITON_CACHE_DIR", "TRITON_PTXAS_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    ptxas = tmp_path / "torch" / "bin" / "ptxas"
    ptxas.parent.mkdir(parents=True)
    ptxas.touch(0o755)
    layout = Layout(device="cpu", profile="offload-fp8", attention="torch", vae="stock", compile_cache=tmp_path)
    engine = make(snapshot, layout=layout)
    assert engine.info.profile.startswith("offload-fp8")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
    assert os.environ["TRITON_PTXAS_PATH"] == str(ptxas)


@pytest.mark.parametrize("compiles", ["auto", "full"])
def test_the_vae_does_less_where_weights_stream_and_nothing_is_compiled(
    make: Callable[..., Any], snapshot: Path, monkeypatch: pytest.MonkeyPatch, compiles: str
) -> None:
    """With `full` it was neither compiled nor spared anything."""
    from vidgen.accel import autoencoder
    from vidgen.accel.engine import DiffusersEngine, Layout

    monkeypatch.setattr(DiffusersEngine, "_memory", lambda self: 200 << 30)
    engine = make(snapshot, layout=Layout(device="cpu", profile="offload-fp8", attention="torch", compile=compiles))
    assert autoencoder.rests(engine._pipe.vae)


def test_weights_that_stream_are_read_to_where_they_stay(
    make: Callable[..., Any], snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were read, joined and then copied into pinned memory: of a start of 22 s that took 14."""
    from vidgen.accel import residency, speed
    from vidgen.accel.engine import DiffusersEngine, Layout

    monkeypatch.setattr(DiffusersEngine, "_memory", lambda self: 200 << 30)
    made: list[residency.Slabs] = []
    init = residency.Slabs.__init__
    monkeypatch.setattr(
        residency.Slabs, "__init__", lambda self, *a, **kw: (made.append(self), init(self, *a, **kw))[1]
    )
    engine = make(snapshot, layout=Layout(device="cpu", profile="offload-fp8", attention="torch", vae="stock"))
    (slabs,) = made
    for stream in engine._streamed():
        stream.rest()
    held = {slab.untyped_storage().data_ptr() for slab in slabs._slabs}
    apart = [
        name
        for part in speed.offloadable(engine._pipe).values()
        for name, tensor in part.named_parameters()
        if tensor.untyped_storage().data_ptr() not in held
    ]
    assert apart == []


def test_weights_that_are_quantised_on_their_way_are_not_pinned_before(
    make: Callable[..., Any], tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vidgen.accel import ahead
    from vidgen.accel.engine import DiffusersEngine, Layout

    monkeypatch.setattr(DiffusersEngine, "_memory", lambda self: 200 << 30)
    monkeypatch.setattr(ahead, "places", lambda *given: pytest.fail("their room would be taken twice"))
    layout = Layout(device="cpu", profile="offload-fp8", attention="torch", vae="stock")
    assert make(tiny_models["qwen-edit"], layout=layout).info.profile.startswith("offload-fp8")


def test_no_lora_can_be_fused_into_an_fp8_snapshot(
    make: Callable[..., Any], snapshot: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    lora = checkpoints.lora(tmp_path, make(tiny_models["qwen-edit"])._pipe)
    with pytest.raises(FatalError, match="vidgen weights quantize --lora") as caught:
        make(snapshot, lora=str(lora))
    assert caught.value.code == "settings"


def test_with_a_step_cache_a_long_run_computes_fewer_steps_and_a_short_one_all(
    make: Callable[..., Any], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    from vidgen.accel.engine import Layout
    from vidgen.accel.stepcache import computed

    engine = make(tiny_models["qwen-edit"], layout=Layout(step_cache=2))
    photo = tmp_path / "photo.png"
    Image.new("RGB", (64, 64), (10, 90, 200)).save(photo)
    forwards: list[int] = []
    engine._pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *call: forwards.append(1))

    for steps in (12, 4):
        forwards.clear()
        told: list[int] = []
        inputs = engine.prepare(work_of("edit", steps=steps), [photo])
        engine.generate(inputs, lambda step, of, told=told: told.append(step))
        assert len(forwards) == sum(computed(steps, 2))
        assert told == list(range(1, steps + 1))
    assert sum(computed(12, 2)) < 12
    assert sum(computed(4, 2)) == 4


def test_a_device_that_does_not_multiply_fp8_stores_it_and_says_so(
    make: Callable[..., Any], snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vidgen.accel.engine import DiffusersEngine, Layout
    from vidgen.accel.fp8 import Fp8Linear

    monkeypatch.setattr(DiffusersEngine, "_memory", lambda self: 200 << 30)
    with structlog.testing.capture_logs() as logs:
        engine = make(snapshot, layout=Layout(device="cpu", attention="torch", compile="off"))

    assert engine.info.profile == "resident-fp8-storage"
    layers = [module for module in engine._pipe.transformer.modules() if isinstance(module, Fp8Linear)]
    assert layers
    assert not any(layer.arithmetic for layer in layers)
    [said] = [entry for entry in logs if entry.get("_event") == "fp8_storage_only"]
    assert (said["profile"], said["log_level"]) == ("resident-fp8", "warning")


def test_without_a_gpu_nothing_is_said_of_fp8(make: Callable[..., Any], snapshot: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        engine = make(snapshot)
    assert engine.info.profile == "float32"
    assert not [entry for entry in logs if entry.get("_event") == "fp8_storage_only"]


def test_weights_whose_reading_was_begun_before_are_taken_from_it(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from edit_service.engine.qwen import QwenEditEngine
    from vidgen import weights
    from vidgen.accel import ahead, assemble

    found = weights.require(str(tiny_models["qwen-edit"]))
    reading = ahead.begin(found, torch.device("cpu"), {"default": torch.float32})
    monkeypatch.setattr(assemble.ahead, "begin", lambda *given: pytest.fail("they would be read twice"))
    engine = QwenEditEngine(str(found.folder), **AREAS)
    engine.go_on_with(reading)
    phases = engine.setup()
    assert phases["read"] == reading.seconds > 0


def test_a_reading_to_another_place_is_left_and_the_weights_are_read_to_where_they_belong(
    tiny_models: dict[str, Path],
) -> None:
    import torch

    from edit_service.engine.qwen import QwenEditEngine

    class Elsewhere:
        device = torch.device("meta")
        closed = False

        def close(self) -> None:
            self.closed = True

    reading: Any = Elsewhere()
    engine = QwenEditEngine(str(tiny_models["qwen-edit"]), **AREAS)
    engine.go_on_with(reading)
    engine.setup()
    assert reading.closed
    assert engine._pipe.transformer.device.type == "cpu"


@pytest.mark.parametrize(
    ("compiles", "profile", "changes"),
    [
        (False, "resident-fp8", {}),
        (True, "resident-fp8", {"compile": "blocks"}),
        (True, "resident-fp8", {"compile": "full"}),
        (False, "resident-bf16", {"compile": "off"}),
        (True, "resident-bf16", {}),  # its norms are diffusers' own
        (True, "resident-fp8", {"cuda_graphs": "off"}),
        (True, "resident-fp8", {"attention": "torch"}),
    ],
)
def test_the_edit_is_compiled_only_where_that_fuses_something_or_no_graph_launches_its_kernels(
    monkeypatch: pytest.MonkeyPatch, compiles: bool, profile: Any, changes: dict[str, Any]
) -> None:
    import torch

    from edit_service.engine.qwen import QwenEditEngine
    from vidgen.accel import fp8, speed
    from vidgen.accel.engine import Layout

    monkeypatch.setattr(fp8, "has_arithmetic", lambda device: True)
    monkeypatch.setattr(speed, "_flag", lambda name: name == "VIDGEN_LENGTHS")
    engine = QwenEditEngine("a model", layout=Layout(**{"attention": "flash3"} | changes))
    engine._device = torch.device("cpu")
    assert engine._compiles(profile) is compiles


@pytest.mark.parametrize("name", ["qwen-edit", "wan2.2-a14b-i2v"])
def test_one_graph_serves_all_blocks_and_all_sizes_and_lengths(tiny_models: dict[str, Path], name: str) -> None:
    """Once the first block was compiled apart, and the first task of another size compiled in its middle."""
    import torch
    from diffusers import ModelMixin
    from torch._dynamo.utils import counters

    from edit_service.engine.qwen import QwenEditEngine
    from i2v_service.engine import wan
    from vidgen.accel import blocks, speed

    edits = name == "qwen-edit"
    engine: Any = QwenEditEngine(str(tiny_models[name]), **AREAS) if edits else wan.WanI2VEngine(str(tiny_models[name]))
    engine.setup()
    torch._dynamo.reset()
    stock = ModelMixin.compile_repeated_blocks
    with pytest.MonkeyPatch.context() as patch:
        # As it is traced: what inductor would make of it takes the suite too long.
        patch.setattr(ModelMixin, "compile_repeated_blocks", lambda *a, **k: stock(*a, **k, backend="eager"))
        for model in engine.transformers():
            blocks.fuse_projections(model)
        speed.compile_blocks(engine.transformers())
    counters.clear()
    engine._warm_up()
    assert counters["stats"]["unique_graphs"] == 1
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    for prompt, width, height, frames in (("a", 64, 64, 5), ("a longer one", 96, 64, 9), ("another", 64, 80, 9)):
        if edits:
            work = work_of("edit", prompt=prompt, width=width, height=height)
            inputs = engine._laid_out(work, (grey.resize((width, height)),))
        else:
            work = work_of("i2v", prompt=prompt, width=width, height=height, num_frames=frames)
            inputs = wan.Inputs(work, engine._laid_out(grey.resize((width, height))))
        engine.generate(inputs, lambda step, of: None)
        assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("total", "allocated", "reserved", "free", "recorded", "left"),
    [
        (80, 60, 60, 19, 0, 19), (80, 60, 70, 9, 0, 19), (80, 60, 60, 5, 0, 5), (24, 20, 20, 100, 0, 4),
        (80, 60, 60, 19, 3, 16),
    ],
)  # fmt: skip
def test_the_room_that_a_task_finds_is_what_is_free_and_what_torch_keeps_for_it(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, total: int, allocated: int, reserved: int, free: int,
    recorded: int, left: int,
) -> None:  # fmt: skip
    from edit_service.engine.qwen import QwenEditEngine
    from vidgen.accel import graphs

    engine: Any = QwenEditEngine("model")
    engine._device = torch.device("cuda", 0)
    engine._graphs = graphs.Graphs()
    monkeypatch.setattr(engine, "_memory", lambda: total)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 100))
    monkeypatch.setattr(graphs.Graphs, "held", lambda self: recorded)
    assert engine._free_memory() == left
