"""A model that slept is the one that it was before, to the last bit, wherever its weights were meanwhile."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vidgen import errors
from vidgen.accel import residency
from vidgen.accel.fp8 import Fp8Linear
from vidgen.accel.residency import Residency, home_for
from vidgen.contracts import EditWork, I2VWork, Work

pytestmark = pytest.mark.timeout(600)  # importing diffusers takes minutes on a machine that is busy

CPU = torch.device("cpu")
GIB = 1 << 30
homes = pytest.mark.parametrize("home", ["memory", "disk"])


class Odd(nn.Module):
    """Whatever is difficult about tensors: shared, strided, views of one storage, not persistent, FP8, empty."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(700, 512)
        self.head = nn.Linear(512, 700, bias=False)
        self.head.weight = self.embedding.weight
        self.convolution = nn.Conv2d(64, 96, 3)
        self.convolution.weight.data = self.convolution.weight.data.contiguous(memory_format=torch.channels_last)
        both = torch.randn(3, 600, 600)
        self.left, self.right = nn.Parameter(both[0]), nn.Parameter(both[2].t())
        self.register_buffer("table", torch.randn(40), persistent=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("nothing", torch.empty(0))
        self.fp8 = Fp8Linear.of(nn.Linear(512, 528).bfloat16(), arithmetic=False)
        self.half = nn.Linear(1024, 777).bfloat16().requires_grad_(False)

    def all(self) -> dict[str, torch.Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def bits(self) -> dict[str, tuple[Any, ...]]:
        """Everything that there is to know of each tensor."""
        return {
            name: (
                tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), tensor.requires_grad,
                bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()),
            )
            for name, tensor in self.all().items()
        }  # fmt: skip


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "CHUNK", 1 << 18)
    monkeypatch.setattr(residency, "SMALL", 1 << 10)


@homes
@pytest.mark.usefixtures("small_chunks")
def test_every_tensor_comes_back_as_it_was(home: str, tmp_path: Path) -> None:
    model = Odd()
    before, tensors = model.bits(), list(model.all().values())
    kept = Residency([model, model.fp8], CPU, home, tmp_path)
    for _ in range(3):
        kept.sleep()
        assert all(tensor.numel() == 0 for tensor in model.all().values())
        kept.wake()

        assert model.bits() == before
    assert all(one is other for one, other in zip(model.all().values(), tensors, strict=True))
    assert model.head.weight is model.embedding.weight
    assert model.right.untyped_storage().data_ptr() == model.left.untyped_storage().data_ptr()


@homes
@pytest.mark.usefixtures("small_chunks")
def test_what_a_run_changed_in_a_small_tensor_is_not_forgotten(home: str, tmp_path: Path) -> None:
    model = Odd()
    kept = Residency([model], CPU, home, tmp_path)
    for number in range(1, 4):
        model.calls += 1  # type: ignore[operator]
        kept.sleep()
        kept.wake()
        assert model.calls.item() == number  # type: ignore[operator]


@homes
@pytest.mark.usefixtures("small_chunks")
def test_a_model_that_was_laid_out_anew_moves_into_a_new_home(home: str, tmp_path: Path) -> None:
    model = Odd()
    kept = Residency([model], CPU, home, tmp_path)
    kept.sleep()
    kept.wake()
    model.half = nn.Linear(1024, 500)  # type: ignore[assignment]
    model.left.data = torch.randn(600, 600)
    before = model.bits()

    kept.sleep()
    kept.wake()

    assert model.bits() == before


@homes
@pytest.mark.usefixtures("small_chunks")
def test_weights_that_were_elsewhere_meanwhile_and_are_others_sleep_as_they_are_now(home: str, tmp_path: Path) -> None:
    """As those are that streamed, for a task that found no room; to look at their shapes tells nothing of that."""
    model = Odd()
    kept = Residency([model], CPU, home, tmp_path)
    kept.sleep()
    kept.wake()
    model.left.data = torch.randn(600, 600)
    before = model.bits()

    kept.sleep()
    kept.wake()

    assert model.bits() == before


def test_to_sleep_or_to_wake_twice_is_to_do_it_once(tmp_path: Path) -> None:
    model = Odd()
    before = model.bits()
    kept = Residency([model], CPU, "memory", tmp_path)
    kept.wake()
    kept.sleep()
    kept.sleep()
    kept.wake()
    kept.wake()
    assert model.bits() == before


def test_the_home_on_disk_has_no_name_and_ends_with_the_process(tmp_path: Path) -> None:
    kept = Residency([Odd()], CPU, "disk", tmp_path)
    kept.sleep()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_nothing_leaves_the_model_awake(tmp_path: Path) -> None:
    model = Odd()
    before = model.bits()
    kept = Residency([model], CPU, "disk", tmp_path / "missing")
    for _ in range(2):
        with pytest.raises(OSError, match="missing"):
            kept.sleep()
        assert model.bits() == before


def test_weights_go_into_memory_only_where_the_host_has_some_to_spare() -> None:
    assert home_for("auto", 57 * GIB, 100 * GIB) == "memory"
    assert home_for("auto", 57 * GIB, 58 * GIB) == "disk"
    assert home_for("auto", 57 * GIB, None) == "memory"
    assert home_for("disk", 1, 100 * GIB) == "disk"
    assert home_for("memory", 57 * GIB, 1) == "memory"


# ── the engines ──────────────────────────────────────────────────────────────────────────────────────────────────

EDIT = EditWork(
    prompt="p", user_prompt="p", negative_prompt="n", steps=3, true_cfg_scale=4.0, guidance_scale=1.0, seed=7, width=64,
    height=64, candidates=1,
)  # fmt: skip
I2V = I2VWork(
    prompt="p", negative_prompt="n", steps=3, guidance_scale=3.0, seed=7, num_frames=5, fps=16, width=64, height=64
)


@pytest.fixture(scope="module")
def make(tiny_models: dict[str, Path]) -> Callable[..., Any]:
    from edit_service.engine.qwen import QwenEditEngine
    from i2v_service.engine.wan import WanI2VEngine
    from vidgen.accel.engine import Layout

    def made(kind: str, model: Path | None = None, **changes: Any) -> Any:
        more = {"reference_area": 64 * 64, "condition_area": 56 * 56} if kind == "qwen-edit" else {}
        engine: Any = QwenEditEngine if kind == "qwen-edit" else WanI2VEngine
        ready = engine(str(model or tiny_models[kind]), layout=Layout(device="cpu", **changes), **more)
        assert ready.demand() is None  # on the CPU
        ready.setup()
        return ready

    return made


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.radial_gradient("L").convert("RGB").resize((64, 96)).save(path)
    return path


def pixels_of(engine: Any, picture: Path) -> np.ndarray[Any, Any]:
    work: Work = EDIT if engine.NAME == "qwen" else I2V
    output = engine.generate(engine.prepare(work, [picture]), lambda step, steps: None).output
    pixels: np.ndarray[Any, Any] = output.pixels if engine.NAME == "qwen" else output.frames
    return pixels


@homes
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", ["qwen-edit", "wan2.1-i2v", "wan2.2-a14b-i2v"])
def test_an_engine_that_slept_makes_the_same_pixels(
    make: Callable[..., Any], picture: Path, tmp_path: Path, kind: str, home: str
) -> None:
    engine = make(kind, sleep_in=home, work_dir=tmp_path)
    before = pixels_of(engine, picture)
    engine.wake()  # it is
    for _ in range(2):
        engine.sleep()
        prepared = engine.prepare(EDIT if kind == "qwen-edit" else I2V, [picture])
        assert prepared is not None
        engine.wake()
        assert np.array_equal(pixels_of(engine, picture), before)


@homes
@pytest.mark.usefixtures("small_chunks")
def test_an_engine_in_fp8_that_slept_makes_the_same_pixels(
    make: Callable[..., Any], tiny_models: dict[str, Path], picture: Path, tmp_path: Path, home: str
) -> None:
    from vidgen import weights
    from vidgen.accel import quantize

    snapshot = quantize.quantize(weights.require(str(tiny_models["qwen-edit"])), tmp_path / "fp8", least=16).folder
    engine = make("qwen-edit", snapshot, sleep_in=home, work_dir=tmp_path)
    before = pixels_of(engine, picture)
    engine.sleep()
    engine.wake()
    assert any(isinstance(module, Fp8Linear) for module in engine._pipe.transformer.modules())
    assert np.array_equal(pixels_of(engine, picture), before)


@pytest.mark.usefixtures("small_chunks")
def test_an_engine_that_finds_no_place_to_sleep_says_so_and_stays_awake(
    make: Callable[..., Any], picture: Path, tmp_path: Path
) -> None:
    engine = make("wan2.1-i2v", sleep_in="disk", work_dir=tmp_path / "missing")
    with pytest.raises(errors.FatalError, match=r"could not be put to sleep: FileNotFoundError"):
        engine.sleep()
    assert pixels_of(engine, picture).shape == (5, 64, 64, 3)


def test_memory_that_runs_out_on_the_way_is_for_another_try(
    make: Callable[..., Any], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make("qwen-edit", sleep_in="memory")
    before = pixels_of(engine, picture)
    engine.sleep()

    def no_room(kept: residency._Kept, device: torch.device) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256 MiB")

    with monkeypatch.context() as patched:
        patched.setattr(residency._Kept, "on", no_room)
        with pytest.raises(errors.RetryableError, match="could not be woken: the device ran out of memory"):
            engine.wake()
    engine.wake()
    assert np.array_equal(pixels_of(engine, picture), before)


@pytest.mark.parametrize(("wanted", "sleeps"), [("auto", True), ("memory", False)])
def test_weights_that_the_host_does_not_take_after_all_sleep_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, sleeps: bool
) -> None:
    """What is free may not be pinned, and then no task of the other stage was ever done."""
    model = Odd()
    before = model.bits()

    def refuse(self: residency._InMemory, *given: Any, **more: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(residency._InMemory, "__init__", refuse)
    kept = Residency([model], CPU, wanted, tmp_path)
    if sleeps:
        kept.sleep()
        kept.wake()
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            kept.sleep()
    assert model.bits() == before


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_a_home_on_disk_that_is_left_closes_its_files(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    kept = Residency([Odd()], CPU, "disk", tmp_path)
    kept.sleep()
    assert len(list(Path("/proc/self/fd").iterdir())) > before
    del kept
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_weights_are_pinned_side_by_side_and_stay_what_they_are() -> None:
    model = Odd()
    before, shared = model.bits(), {name: tensor for name, tensor in model.all().items() if tensor.numel()}
    residency.pin([model, model.head], pinned=False)
    assert model.bits() == before
    assert model.head.weight is model.embedding.weight
    assert len({tensor.untyped_storage().data_ptr() for tensor in shared.values()}) == 1
    model.left.data.fill_(7.0)  # they lie beside one another, not in one another
    assert {name for name, bits in model.bits().items() if bits != before[name]} == {"left"}


def test_what_is_pinned_already_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Odd()
    stays = model.embedding.weight.untyped_storage().data_ptr()
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: self.untyped_storage().data_ptr() == stays)
    before, left = model.bits(), model.left.untyped_storage().data_ptr()
    residency.pin([model], pinned=False)
    assert model.bits() == before
    assert model.embedding.weight.untyped_storage().data_ptr() == stays
    assert model.left.untyped_storage().data_ptr() not in (left, stays)

    # Nor does it need room any more.
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    monkeypatch.setattr(residency, "host_memory", lambda: 0)
    assert residency.no_room_to_pin([model]) is None


PEAK = """
import re, sys
import torch
from torch import nn
from vidgen.accel import residency

def held(what):
    return int(re.search(what + r":\\s*(\\d+)", open("/proc/self/status").read())[1]) >> 10

MIB = 1 << 20
torch.ones(16 * MIB, dtype=torch.uint8)  # the C library has seen such a block come and go, as behind any other work
sizes = [side * MIB for _ in range(10) for side in (1, 1, 9, 1, 4, 1)]
model = nn.ParameterList(nn.Parameter(torch.ones(size, dtype=torch.uint8), requires_grad=False) for size in sizes)
residency.SLAB = 16 * MIB
torch.zeros(16 * MIB, dtype=torch.uint8)
before = held("VmRSS")
residency.pin([model], pinned=False)
print(sum(sizes) // MIB, held("VmHWM") - before, held("VmRSS") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and trims as glibc does")
def test_the_host_holds_what_is_pinned_once_on_the_way_too() -> None:
    """Of layers under 32 MiB the C library kept the room that they had been in, between others that were there."""
    ran = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    weights, peak, after = map(int, ran.stdout.split())
    assert weights == 170
    assert max(peak, after) < 20


def test_what_sleeps_in_memory_takes_little_more_than_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    # Pinned memory is given in powers of two, so groups of layers that were pinned each by itself took 45 GiB for 35.
    monkeypatch.setattr(residency, "CHUNK", 1 << 20)
    sizes = (600_000, 500_000, 3_000_000, 700, 600_001)
    storages = [torch.randint(0, 255, (size,), dtype=torch.uint8) for size in sizes]
    groups = list(residency._chunks(storages))
    kept = residency._InMemory(groups, pinned=False)
    taken = sum(residency._power(piece.numel()) for piece in kept._kept._pieces)
    assert taken < sum(storage.numel() for storage in storages) + residency.CHUNK
    assert len(groups) == 4
    for group, found in zip(groups, kept.on(CPU), strict=True):
        for begin, storage in zip(residency._begins(group), group, strict=True):
            assert torch.equal(found[begin : begin + storage.numel()], storage)


def test_what_is_pinned_takes_little_more_than_it_is() -> None:
    # A block of Wan2.2-A14B in FP8, forty of them twice, and its text encoder's table.
    block = [5120 * 5120] * 8 + [5120 * 13824] * 2 + [5120 * 4] * 12
    sizes = [residency.rounded(size) for size in [256384 * 4096 * 2, *(block * 80)]]
    slabs = residency._slabs(sizes)
    assert sorted(number for _, held in slabs for number, _ in held) == list(range(len(sizes)))
    for size, held in slabs:
        assert size == 1 << size.bit_length() - 1
        ends = [(begin, begin + sizes[number]) for number, begin in held]
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ends))
        assert ends[-1][1] <= size
    assert sum(size for size, _ in slabs) < 1.05 * sum(sizes) < sum(residency._power(size) for size in sizes) / 1.3


def test_what_is_read_to_pinned_memory_takes_little_more_than_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    # Wan2.2-A14B in FP8 in its files: a text encoder of 24 layers and a table, and forty blocks twice.
    files = [[256384 * 4096 * 2], *([[4096 * 4096 * 2] * 4 + [4096 * 10240 * 2] * 3] * 24)]
    files += [([5120 * 5120 * 3] * 2 + [5120 * 5120] * 2 + [5120 * 13824] * 2 + [5120 * 4] * 12) * 10] * 8
    taken: list[int] = []
    real = torch.empty

    def empty(size: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        taken.append(size)
        return real(size, dtype=dtype, device="meta")

    monkeypatch.setattr(residency.torch, "empty", empty)
    size = sum(map(sum, files))
    slabs = residency.Slabs(size, pinned=True)
    for file in files:
        found = slabs.places(file)
        assert [place.numel() for place in found] == file
    assert all(one == 1 << one.bit_length() - 1 for one in taken)
    assert size <= sum(taken) < 1.02 * size


def test_a_host_without_room_for_what_streams_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Odd()
    monkeypatch.setattr(residency, "host_memory", lambda: 2 * GIB)
    said = residency.no_room_to_pin([model])
    assert said is not None
    assert "the host has 2 GiB for weights that stream, which take 3 GiB" in said
    for enough in (4 * GIB, None):
        monkeypatch.setattr(residency, "host_memory", lambda enough=enough: enough)
        assert residency.no_room_to_pin([model]) is None


def test_room_for_what_streams_is_what_it_takes_and_what_a_task_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "host_memory", lambda: 10 * GIB)
    assert residency.no_room_for(7 * GIB) is None
    assert residency.no_room_for(9 * GIB, given_back=2 * GIB) is None
    said = residency.no_room_for(7 * GIB + 1)
    assert said == "the host has 10 GiB for weights that stream, which take 10 GiB: give the worker more memory"
