from __future__ import annotations

import itertools
import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from structlog.testing import capture_logs

from vidgen import native, profiles, weights
from vidgen.accel import ahead, loader, residency
from vidgen.accel.loader import Entry
from vidgen.errors import FatalError
from vidgen.settings import WorkerSettings

CPU = torch.device("cpu")
GIB = 1 << 30


class BegunError(Exception):
    """Stands for the threads that would read to a GPU."""


@pytest.fixture(scope="module")
def snapshot(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vidgen.accel import quantize

    folder = tmp_path_factory.mktemp("snapshot") / "fp8"
    return quantize.quantize(weights.require(str(tiny_models["wan2.2-a14b-i2v"])), folder, least=16).folder


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 80 GiB, to which nothing can be read."""

    def begin(
        found: weights.Weights, device: torch.device, dtypes: Any, *, streams: bool, sparing: bool
    ) -> loader.Reading:
        assert sparing  # the packages are imported meanwhile
        raise BegunError(f"{found.folder.name} to {device} in {dtypes['default']}{', to stream' * streams}")

    monkeypatch.setattr(ahead.diffusion, "device_of", lambda wanted: torch.device("cuda", 0))
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **more: torch.empty(0))
    monkeypatch.setattr(ahead, "settle", lambda device: None)
    monkeypatch.setattr(ahead, "memory", lambda device: 80 * GIB)
    monkeypatch.setattr(ahead, "begin", begin)


def begin_for(model: Path, **settings: Any) -> loader.Reading | None:
    layout = WorkerSettings(**settings).layout()
    return ahead.begin_for(str(model), None, layout, weights.I2V_PIPELINES, profiles.WORK["i2v"])


def test_on_the_cpu_nothing_is_begun(tiny_models: dict[str, Path]) -> None:
    assert begin_for(tiny_models["wan2.2-a14b-i2v"], device="cpu") is None


@pytest.mark.usefixtures("gpu")
def test_a_model_that_will_be_on_the_gpu_as_it_is_stored_is_begun(tiny_models: dict[str, Path]) -> None:
    for profile in ("auto", "resident-bf16"):
        with pytest.raises(BegunError, match=r"wan2\.2-a14b-i2v to cuda:0 in torch\.bfloat16"):
            begin_for(tiny_models["wan2.2-a14b-i2v"], profile=profile)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("profile", ["resident-fp8", "offload-fp8"])
def test_one_that_is_quantised_on_its_way_is_not(tiny_models: dict[str, Path], profile: str) -> None:
    assert begin_for(tiny_models["wan2.2-a14b-i2v"], profile=profile) is None


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("profile", "begun"),
    [
        ("resident-fp8", r"fp8 to cuda:0 in torch\.bfloat16$"),
        ("offload-fp8", r"fp8 to cpu in torch\.bfloat16, to stream$"),
    ],
)
def test_what_is_stored_in_fp8_is_begun_wherever_it_will_be(snapshot: Path, profile: str, begun: str) -> None:
    with pytest.raises(BegunError, match=begun):
        begin_for(snapshot, profile=profile)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_is_too_small_is_told_of_before_anything_is_read(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "memory", lambda device: 4 * GIB)
    with pytest.raises(FatalError, match="this GPU has 4 GiB"):
        begin_for(tiny_models["wan2.2-a14b-i2v"])


def test_what_other_processes_have_taken_is_not_this_ones_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile was chosen from all that a GPU has, and then loading died of what another process had taken."""
    found = {"share": 1.0, "free": 79 * GIB, "own": 0}
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: found["share"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (found["free"], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: found["own"])
    device = torch.device("cuda", 0)

    def seen(**now: Any) -> tuple[float, float]:
        found.update(now)
        return ahead.memory(device) / GIB, ahead.taken_by_others(device) / GIB

    assert seen() == (80, 0)  # its own context is nobody else's
    assert seen(free=58.5 * GIB) == (60, 20)
    assert seen(own=20 * GIB) == (80, 0)  # another model of this process
    assert seen(own=10 * GIB, share=0.5) == (40, 10)
    assert seen(share=0.9) == (70, 10)


@pytest.mark.usefixtures("gpu")
def test_what_is_begun_in_a_thread_tells_its_result_to_whoever_asks(tiny_models: dict[str, Path]) -> None:
    model, layout = str(tiny_models["wan2.2-a14b-i2v"]), WorkerSettings(profile="resident-bf16").layout()
    begun = ahead.beginning_for(model, None, layout, weights.I2V_PIPELINES, profiles.WORK["i2v"])
    with pytest.raises(BegunError, match=r"to cuda:0"):
        begun()


def test_all_weights_come_and_the_text_encoders_first(tiny_models: dict[str, Path]) -> None:
    found = weights.require(str(tiny_models["wan2.2-a14b-i2v"]))
    reading = ahead.begin(found, CPU, {"default": torch.float32})
    assert reading.files[0].parent.name == "text_encoder"
    assert {file.parent.name for file in reading.files} == {"text_encoder", "transformer", "transformer_2", "vae"}
    for file in reading.files:
        assert reading.take(file).keys() == load_file(file).keys()
    reading.close()


@pytest.mark.parametrize(
    ("stored", "wanted", "waits"),
    [
        (torch.float32, torch.bfloat16, True), (torch.bfloat16, torch.bfloat16, False),
        (torch.float32, torch.float32, False), (torch.float8_e4m3fn, torch.bfloat16, False),
    ],
)  # fmt: skip
def test_a_file_waits_where_much_of_it_will_be_cast(
    monkeypatch: pytest.MonkeyPatch, tiny_models: dict[str, Path], stored: torch.dtype, wanted: torch.dtype, waits: bool
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(loader, "Reading", lambda files, device, *more, sparing: given.append((more[0], sparing)))
    found = weights.require(str(tiny_models["wan2.2-a14b-i2v"]))
    for sparing in (False, True):
        ahead.begin(found, CPU, {"default": wanted}, sparing=sparing)
    much = [Entry("a", stored, (1 << 30,), 8, 8 + (1 << 30) * stored.itemsize)]
    for (asked, spares), sparing in zip(given, (False, True), strict=True):
        assert asked(much) is waits
        assert not asked([Entry("a", stored, (4,), 8, 8 + 4 * stored.itemsize)])
        assert spares is sparing


def entry(name: str, dtype: torch.dtype, *shape: int) -> Entry:
    return Entry(name, dtype, shape, 8, 8 + math.prod(shape) * dtype.itemsize)


@pytest.fixture
def component(tmp_path: Path) -> Path:
    """A folder of a model with a transformer of 4 KiB and a VAE."""
    for name in ("transformer", "vae"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "diffusion_pytorch_model.safetensors").write_bytes(bytes(4096))
    index = {name: ["diffusers", "Model"] for name in ("transformer", "vae")}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    return tmp_path


def test_what_streams_is_read_side_by_side_and_what_becomes_one_weight_as_one(component: Path) -> None:
    e4m3, bf16 = torch.float8_e4m3fn, torch.bfloat16
    # In the order of the file: neither that of the layers, nor all beside one another.
    told = [
        entry("blocks.0.attn.to_k.weight", e4m3, 32, 32), entry("blocks.0.attn.to_out.0.weight", e4m3, 32, 32),
        entry("blocks.0.attn.to_q.weight", e4m3, 32, 32), entry("blocks.0.attn.add_v_proj.weight", e4m3, 32, 32),
        entry("blocks.0.attn.to_v.weight", e4m3, 32, 32), entry("blocks.1.attn.to_q.weight", e4m3, 32, 32),
        entry("blocks.0.attn.to_q.bias", bf16, 32), entry("blocks.0.attn.to_k.bias", bf16, 32),
        entry("scalar", bf16), entry("none", bf16, 0, 4),
        entry("blocks.2.attn.to_q.weight", e4m3, 3, 3), entry("blocks.2.attn.to_k.weight", bf16, 3, 3),
    ]  # fmt: skip
    made = ahead.places(component, bf16.itemsize)(component / "transformer" / "a.safetensors", told)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in made.items()} == {
        one.name: (one.dtype, one.shape) for one in told
    }
    assert len({tensor.untyped_storage().data_ptr() for tensor in made.values()}) == 1

    def place(name: str) -> tuple[int, int]:
        tensor = made[name]
        return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes

    names = [f"blocks.0.attn.to_{which}.weight" for which in "qkv"]
    assert all(place(one)[1] == place(other)[0] for one, other in itertools.pairwise(names))
    held = sorted(place(one.name) for one in told if made[one.name].numel())
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(held))
    # The first of each row lies as torch's allocator lays tensors.
    firsts = [made[name].data_ptr() for name in made if "to_k" not in name and "to_v" not in name and name != "none"]
    assert len({first % residency.ALIGNED for first in firsts}) == 1


def test_what_will_not_stream_or_will_be_cast_has_memory_of_its_own(component: Path) -> None:
    told = [entry(name, torch.float32, 64) for name in "ab"] + [entry("c", torch.bfloat16, 64)]
    places = ahead.places(component, torch.bfloat16.itemsize)
    for part, apart in (("vae", "abc"), ("transformer", "ab")):
        made = places(component / part / "a.safetensors", told)
        assert {name for name, tensor in made.items() if tensor.untyped_storage().nbytes() == tensor.nbytes} == {*apart}


def test_a_host_without_room_for_what_streams_is_told_of_before_anything_is_read(
    component: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "host_memory", lambda: GIB)
    with pytest.raises(FatalError, match=r"the host has 1 GiB.*or a GPU that holds them all") as caught:
        ahead.places(component, 2)
    assert caught.value.code == "host_memory"


def test_settling_in_does_no_harm_where_there_is_nothing_to_settle() -> None:
    ahead.settle(CPU)


def test_what_torch_computes_in_a_warm_up_is_asked_for_before(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()
    for name in ("_multiply", "_multiply_e4m3", "_convolve", "_attend"):
        monkeypatch.setattr(ahead, name, lambda device, name=name: asked.append(name))
    compute = ahead._compute
    monkeypatch.setattr(ahead, "_compute", lambda device: (compute(device), asked.append("_compute"))[0])
    ahead.settle(CPU)
    assert sorted(asked) == ["_attend", "_compute", "_convolve", "_multiply", "_multiply_e4m3"]


@pytest.fixture
def settings_of_memory(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torch is told of how to take memory."""
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setattr(ahead, "_NO_PAGES", threading.Event())
    for name in native.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    return told


@pytest.mark.parametrize("before", [None, native.PINNED_BY_THREADS])
def test_memory_is_taken_in_pages(
    monkeypatch: pytest.MonkeyPatch, settings_of_memory: list[str], before: str | None
) -> None:
    if before is not None:
        monkeypatch.setenv(native.ALLOCATOR[0], before)
    ahead.open_device(torch.device("cpu"))
    assert settings_of_memory == [f"{native.PINNED_BY_THREADS},expandable_segments:True"]


@pytest.mark.parametrize("name", native.ALLOCATOR)
def test_who_says_how_memory_is_taken_is_not_talked_over(
    monkeypatch: pytest.MonkeyPatch, settings_of_memory: list[str], name: str
) -> None:
    monkeypatch.setenv(name, "backend:cudaMallocAsync")
    ahead.open_device(torch.device("cpu"))
    assert settings_of_memory == []


def test_a_driver_that_gives_no_pages_is_asked_for_memory_as_ever(
    monkeypatch: pytest.MonkeyPatch, settings_of_memory: list[str]
) -> None:
    made: list[object] = []

    def zeros(*size: int, device: object) -> None:
        # What lies in memory that is there already asks the driver for none, and finds no fault with it.
        if not made and settings_of_memory[-1].endswith("True"):
            raise RuntimeError("CUDA driver error: unknown error")
        made.append(device)

    monkeypatch.setattr(torch, "zeros", zeros)
    with capture_logs() as logs:
        for _ in range(2):  # by the thread that reads ahead, and by the engine
            ahead.open_device(torch.device("cuda"))

    assert len(made) == 2
    assert [one.rpartition(":")[2] for one in settings_of_memory] == ["True", "False"]
    assert [entry["_event"] for entry in logs] == ["no_pages"]


def test_a_gpu_with_another_fault_says_so_itself(
    monkeypatch: pytest.MonkeyPatch, settings_of_memory: list[str]
) -> None:
    def zeros(*size: int, device: object) -> None:
        raise RuntimeError("CUDA driver error: unknown error")

    monkeypatch.setattr(torch, "zeros", zeros)
    with capture_logs() as logs, pytest.raises(RuntimeError, match="unknown"):
        ahead.open_device(torch.device("cuda"))
    assert logs == []
    assert not ahead._NO_PAGES.is_set()


def test_a_gpu_without_any_memory_left_is_no_driver_without_pages(
    monkeypatch: pytest.MonkeyPatch, settings_of_memory: list[str]
) -> None:
    def zeros(*size: int, device: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(torch.OutOfMemoryError):
        ahead.open_device(torch.device("cuda"))
    assert len(settings_of_memory) == 1
