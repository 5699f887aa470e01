from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vidgen.accel import host, loader, pages
from vidgen.errors import FatalError

CPU = torch.device("cpu")
KINDS = sorted(loader.DTYPES.values(), key=str)


def made(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    noise = torch.randint(0, 2, shape) if dtype == torch.bool else torch.randn(shape) * 50
    return noise.to(dtype)


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {f"kind.{number}": made((3, number + 1), kind) for number, kind in enumerate(KINDS)}
    return tensors | {"scalar": torch.tensor(7.0), "nothing": torch.empty(0, 4), "large": torch.randn(101, 33)}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == tensor.dtype
        and found[name].shape == tensor.shape
        and torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        for name, tensor in wanted.items()
    )


def take(patch: pytest.MonkeyPatch, way: Callable[[], tuple[Any, int, int]]) -> None:
    """Have all files brought in this way."""
    patch.setattr(loader.Reading, "_way", lambda reading, handle, entries: way())


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, through buffers, with buffers and copies of the CPU."""
    take(monkeypatch, lambda: (loader._Staged, loader.THREADS, loader.CHUNK))


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The way of a GPU for what lies in the page cache; how much was pinned at each pinning, all of it given back."""
    pinned, counts = set[int](), list[int]()

    def pin(address: int, size: int) -> bool:
        pinned.add(address)
        counts.append(len(pinned))
        return True

    take(monkeypatch, lambda: (loader._Mapped, loader.MAPPERS, loader.WINDOW))
    monkeypatch.setattr(pages, "_pin", pin)
    monkeypatch.setattr(pages, "_unpin", pinned.remove)
    yield counts
    assert not pinned


@pytest.fixture(params=["straight", "staged", "mapped"])
def way(request: pytest.FixtureRequest) -> str:
    if request.param != "straight":
        request.getfixturevalue(request.param)
    return str(request.param)


def in_pieces(patch: pytest.MonkeyPatch, size: int) -> None:
    """Have files read, or mapped, so many bytes at once."""
    patch.setattr(loader, "CHUNK", size)
    patch.setattr(loader, "WINDOW", size)


@pytest.mark.parametrize("chunk", [1, 7, 256, loader.CHUNK])
@pytest.mark.usefixtures("way")
def test_every_tensor_is_read_as_it_was_written(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_pieces(monkeypatch, chunk)
    tensors = some_tensors()
    names = sorted(tensors)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "empty.safetensors"]
    for file, part in zip(files, (names[::2], names[1::2], []), strict=True):
        save_file({name: tensors[name] for name in part}, file, metadata={"format": "pt"})

    assert same(loader.read(files, CPU), tensors)


@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=8),
    kinds=st.lists(st.sampled_from(KINDS), min_size=8, max_size=8),
    chunk=st.integers(1, 200),
)
def test_any_file_reads_as_the_library_reads_it(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, ...]], kinds: list[torch.dtype], chunk: int
) -> None:
    file = tmp_path_factory.mktemp("any") / "x.safetensors"
    save_file({f"t{number}": made(shape, kinds[number]) for number, shape in enumerate(shapes)}, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "CHUNK", chunk)
        assert same(loader.read([file], CPU), load_file(file))


def test_files_may_be_asked_for_before_their_thread_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asked in that moment waited for ever."""
    save_file({"a": torch.ones(4)}, tmp_path / "x.safetensors")
    asked = threading.Event()
    run = loader.Reading._run

    def late(self: loader.Reading, *given: Any) -> None:
        assert asked.wait(10)
        run(self, *given)

    monkeypatch.setattr(loader.Reading, "_run", late)
    file = tmp_path / "x.safetensors"
    reading = loader.Reading([file], CPU)
    taken: list[dict[str, torch.Tensor]] = []
    taking = threading.Thread(target=lambda: taken.append(reading.take(file)), daemon=True)
    taking.start()
    while file in reading._landed:
        assert taking.is_alive()
    asked.set()
    taking.join(10)
    assert [one["a"].tolist() for one in taken] == [[1.0] * 4]
    reading.close()


def test_no_files_hold_no_tensors() -> None:
    assert loader.read([], CPU) == {}


def test_each_tensor_has_memory_of_its_own(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "x.safetensors")
    read = loader.read([tmp_path / "x.safetensors"], CPU)
    assert read["a"].untyped_storage().nbytes() == 16


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────────


def written(folder: Path, told: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with a header of one's own."""
    header = told if isinstance(told, bytes) else json.dumps(told).encode()
    file = folder / "x.safetensors"
    file.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return file


def entry(shape: Any = (2,), begin: Any = 0, end: Any = 8, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("told", "data", "length"),
    [
        pytest.param({"a": entry()}, bytes(4), None, id="cut short"),
        pytest.param({"a": entry()}, bytes(12), None, id="longer than told"),
        pytest.param({"a": entry()}, bytes(8), 1 << 60, id="a header of an exabyte"),
        pytest.param({"a": entry()}, bytes(8), 10, id="a header cut short"),
        pytest.param(b"", b"", None, id="no header"),
        pytest.param([1], b"", None, id="a header that is a list"),
        pytest.param({"a": 1}, b"", None, id="an entry that is a number"),
        pytest.param({"a": entry(dtype="F13")}, bytes(8), None, id="an unknown type"),
        pytest.param({"a": entry(dtype=["F32"])}, bytes(8), None, id="a type that is a list"),
        pytest.param({"a": entry(shape=[-2])}, bytes(8), None, id="a negative shape"),
        pytest.param({"a": entry(shape=["2"])}, bytes(8), None, id="a shape of words"),
        pytest.param({"a": entry(shape=[3])}, bytes(8), None, id="a shape that is larger than its bytes"),
        pytest.param({"a": entry(begin=-8, end=0)}, b"", None, id="before the file"),
        pytest.param({"a": entry(begin=8, end=0)}, bytes(8), None, id="backwards"),
        pytest.param({"a": entry(begin=8, end=16)}, bytes(16), None, id="a hole"),
        pytest.param({"a": entry(), "b": entry()}, bytes(8), None, id="two in one place"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_named(tmp_path: Path, told: Any, data: bytes, length: int | None) -> None:
    file = written(tmp_path, told, data, length)
    with pytest.raises(FatalError, match="download the model again") as caught:
        loader.read([file], CPU)
    assert caught.value.code == "weights_missing"
    assert str(file) in caught.value.message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FatalError, match=r"gone\.safetensors is damaged"):
        loader.read([tmp_path / "gone.safetensors"], CPU)


@pytest.mark.parametrize("way", ["straight", "staged"], indirect=True)
@pytest.mark.parametrize("fault", [lambda *a: 0, lambda *a: os.preadv(-1, [], 0)], ids=["it ends", "the disk fails"])
def test_a_file_that_breaks_while_it_is_read_is_named(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., int]
) -> None:
    save_file({"a": torch.ones(400)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(loader, "CHUNK", 64)
    preadv = os.preadv
    monkeypatch.setattr(
        "vidgen.accel.loader.os.preadv",
        lambda handle, targets, at: preadv(handle, targets, at) if at < 800 or handle < 0 else fault(),
    )
    with pytest.raises(FatalError, match=r"x\.safetensors is damaged \(reading it failed"):
        loader.read([tmp_path / "x.safetensors"], CPU)


def test_a_thread_has_no_more_of_a_file_pinned_than_it_copies(
    tmp_path: Path, mapped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "MAPPERS", 1)
    in_pieces(monkeypatch, 4096)
    save_file({"a": torch.randn(10_000)}, tmp_path / "x.safetensors")
    assert loader.read([tmp_path / "x.safetensors"], CPU)["a"].shape == (10_000,)
    assert max(mapped) == loader.WINDOWS
    assert len(mapped) == 10


@pytest.mark.parametrize("pinnable", [True, False])
@pytest.mark.parametrize("sparing", [True, False])
@pytest.mark.parametrize("there", [1, loader.PLENTY - 1, loader.PLENTY])
@pytest.mark.parametrize(
    ("left", "window"), [(1 << 40, loader.WINDOW), (1 << 34, 1 << 29), (1 << 20, loader.CHUNK), (None, loader.CHUNK)]
)
def test_what_lies_in_the_page_cache_is_mapped_where_processors_are_to_be_spared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: int, sparing: bool, pinnable: bool, left: int | None,
    window: int,
) -> None:  # fmt: skip
    save_file({"a": torch.ones(40)}, tmp_path / "x.safetensors")
    entries, asked = loader.header(tmp_path / "x.safetensors"), list[int]()
    monkeypatch.setattr(host, "processors", lambda: there)
    monkeypatch.setattr(host, "host_memory", lambda: left)
    monkeypatch.setattr(pages, "cached", lambda handle, size: (asked.append(size), True)[1])
    monkeypatch.setattr(pages, "pinnable", lambda handle: pinnable)
    reading = loader.Reading([], CPU, sparing=sparing)
    reading.close()
    reading.device = torch.device("cuda:0")
    few = there < loader.PLENTY
    if pinnable and (sparing or few):
        wanted = loader._Mapped, loader.MAPPERS, window
    else:
        wanted = loader._Staged, loader.THREADS if few else loader.COPIERS, loader.CHUNK
    assert reading._way(0, entries) == wanted
    assert asked == [(tmp_path / "x.safetensors").stat().st_size]
    from_disk = loader._Staged, loader.THREADS, loader.CHUNK
    assert reading._way(0, []) == from_disk
    monkeypatch.setattr(pages, "cached", lambda handle, size: False)
    assert reading._way(0, entries) == from_disk


class Copied:
    """Stands in for the event of a copy, which takes as long as nobody waits for it."""

    def __init__(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


def test_what_cannot_be_pinned_after_all_is_read(
    tmp_path: Path, mapped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_pieces(monkeypatch, 4096)
    pin, asked = pages._pin, list[int]()
    monkeypatch.setattr(
        pages, "_pin", lambda address, size: (asked.append(size), len(asked) % 3 == 0 and pin(address, size))[1]
    )
    copy, copies = loader._Copies.copy, list[Copied]()
    monkeypatch.setattr(loader._Copies, "copy", lambda *given: (copy(*given), copies.append(Copied()), copies[-1])[-1])
    wanted = {"a": torch.randn(10_000)}
    save_file(wanted, tmp_path / "x.safetensors")
    assert same(loader.read([tmp_path / "x.safetensors"], CPU), wanted)
    assert (len(asked), len(mapped), len(copies)) == (10, 3, 10)
    assert all(one.done for one in copies)


def test_what_cannot_be_pinned_is_read_in_small_pieces(
    tmp_path: Path, mapped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory may be short, and a window is large."""
    in_pieces(monkeypatch, 4096)
    monkeypatch.setattr(loader, "WINDOW", 5 * 4096)
    monkeypatch.setattr(pages, "_pin", lambda address, size: False)
    copy, sizes = loader._Copies.copy, list[int]()
    monkeypatch.setattr(loader._Copies, "copy", lambda *given: (copy(*given), sizes.append(given[2].numel()))[0])
    wanted = {"a": torch.randn(10_000), "b": torch.randn(77)}
    save_file(wanted, tmp_path / "x.safetensors")
    assert same(loader.read([tmp_path / "x.safetensors"], CPU), wanted)
    assert (max(sizes), sum(sizes)) == (4096, 40_308)
    assert not mapped


def test_as_many_threads_read_as_a_way_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_pieces(monkeypatch, 1024)
    take(monkeypatch, lambda: (loader._Staged, loader.COPIERS, loader.CHUNK))
    all_at_it = threading.Barrier(loader.COPIERS)
    begun = threading.local()
    taken = loader._Staged.take

    def once(self: Any, *given: Any) -> None:
        if not hasattr(begun, "was"):
            begun.was = all_at_it.wait(10)
        taken(self, *given)

    monkeypatch.setattr(loader._Staged, "take", once)
    wanted = {"a": torch.randn(10_000)}
    save_file(wanted, tmp_path / "x.safetensors")
    assert same(loader.read([tmp_path / "x.safetensors"], CPU), wanted)


def test_of_many_files_no_more_is_pinned_than_of_one(
    tmp_path: Path, mapped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread that had ever been at one kept its windows until the last file's end."""
    in_pieces(monkeypatch, 128)
    loader.read(some_files(tmp_path, 20), CPU)
    # Two files at once: the next one is begun before the one before it is waited for.
    assert max(mapped) <= 2 * loader.MAPPERS * loader.WINDOWS


@pytest.mark.parametrize("way", ["staged", "mapped"], indirect=True)
@pytest.mark.parametrize("fails_at", [None, 3])
def test_nothing_is_copied_any_more_when_a_reading_is_over(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int | None
) -> None:
    """Nor is a stretch of a file given back from which something is copied still."""
    copies: list[Copied] = []
    copy, unpin = loader._Copies.copy, pages._unpin
    in_flight: list[int] = []

    def copied(self: Any, *given: Any) -> Any:
        copy(self, *given)
        if len(copies) == fails_at:
            raise RuntimeError("the device is gone")
        copies.append(Copied())
        return copies[-1]

    def unpinned(address: int) -> None:
        in_flight.append(sum(not one.done for one in copies))
        unpin(address)

    monkeypatch.setattr(loader._Copies, "copy", copied)
    monkeypatch.setattr(pages, "_unpin", unpinned)
    for name in ("MAPPERS", "THREADS"):
        monkeypatch.setattr(loader, name, 1)
    in_pieces(monkeypatch, 4096)
    save_file({"a": torch.randn(10_000)}, tmp_path / "x.safetensors")
    with contextlib.nullcontext() if fails_at is None else pytest.raises(RuntimeError, match="the device is gone"):
        loader.read([tmp_path / "x.safetensors"], CPU)
    assert len(copies) == (fails_at or 10)
    assert all(one.done for one in copies)
    if way == "mapped" and fails_at is None:
        # The oldest first, and at that moment the one behind it may be under way; the last one has nobody behind it.
        assert in_flight == [1] * 9 + [0]


def test_each_thread_that_pins_uses_the_gpu_that_is_read_to(
    tmp_path: Path, mapped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is pinned for the current device of a thread, which is the first one unless it is said."""
    used: list[str] = []
    monkeypatch.setattr(loader, "_use", lambda device: used.append(threading.current_thread().name))
    loader.read(some_files(tmp_path, 1), CPU)
    assert [name.split("_")[0] for name in used] == ["reader", "weights"]
    assert mapped


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
def test_a_thread_is_told_which_gpu_is_its_own_where_one_is_named(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    used: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    loader._use(torch.device(device))
    assert used == ([torch.device(device)] if device == "cuda:1" else [])


def test_the_kernel_hears_once_of_each_piece_that_is_not_begun_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []
    monkeypatch.setattr(loader, "_announce", lambda handle, chunks: heard.extend(chunk.begin for chunk in chunks))
    in_pieces(monkeypatch, 4096)
    save_file({"a": torch.randn(20_000)}, tmp_path / "x.safetensors")
    loader.read([tmp_path / "x.safetensors"], CPU)
    begins = [
        entry.begin + 4096 * number for entry in loader.header(tmp_path / "x.safetensors") for number in range(20)
    ]
    assert sorted(heard) == begins[loader.THREADS :]


@pytest.mark.usefixtures("mapped")
def test_a_file_that_ends_before_what_is_mapped_of_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever touched it there would be killed by a signal."""
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(40_000)}, file)
    entries = loader.header(file)
    os.truncate(file, 50_000)
    monkeypatch.setattr(loader, "header", lambda file: entries)
    in_pieces(monkeypatch, 4096)
    pin = pages._pin
    counts = iter(range(100))
    # As CUDA answers for what is not there.
    monkeypatch.setattr(pages, "_pin", lambda address, size: next(counts) < 8 and pin(address, size))
    with pytest.raises(FatalError, match=r"x\.safetensors is damaged \(reading it failed: .*it ends too early"):
        loader.read([file], CPU)


# ── several files on their way ───────────────────────────────────────────────────────────────────────────────────────


def some_files(folder: Path, count: int) -> list[Path]:
    files = [folder / f"{number}.safetensors" for number in range(count)]
    for number, file in enumerate(files):
        save_file({f"t{number}": torch.full((100,), float(number))}, file)
    return files


@pytest.mark.usefixtures("way")
def test_files_that_are_read_ahead_are_taken_in_any_order(tmp_path: Path) -> None:
    files = some_files(tmp_path, 5)
    reading = loader.Reading(files, CPU)
    for number in (3, 0, 4, 1, 2):
        assert same(reading.take(files[number]), {f"t{number}": torch.full((100,), float(number))})
    reading.close()
    assert reading.seconds > 0


def test_of_files_that_are_to_be_cast_there_are_never_more_than_two_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, begun, more = some_files(tmp_path, 6), list[str](), threading.Condition()
    header = loader.header

    def seen(file: Path) -> list[loader.Entry]:
        entries = header(file)
        with more:
            begun.append(file.name)
            more.notify_all()
        return entries

    monkeypatch.setattr(loader, "header", seen)
    # The header of the next one is looked at, for that is what tells.
    reading = loader.Reading(files, CPU, lambda entries: entries[0].name != "t0")
    with more:
        assert more.wait_for(lambda: len(begun) == 4, 10)
        assert not more.wait_for(lambda: len(begun) > 4, 0.2)
    for file in files:
        reading.take(file)
    reading.close()
    assert len(begun) == 6


def test_a_reading_that_is_closed_stops_and_leaves_no_thread(tmp_path: Path) -> None:
    files = some_files(tmp_path, 6)
    reading = loader.Reading(files, CPU, lambda entries: True)
    reading.take(files[0])
    reading.close()
    names = {thread.name for thread in threading.enumerate()}
    assert not [name for name in names if name == "reader" or name.startswith("weights")]
    with pytest.raises(CancelledError):
        reading.take(files[5])


def test_a_fault_is_told_to_whoever_takes_that_file_or_one_behind_it(tmp_path: Path) -> None:
    files = some_files(tmp_path, 4)
    files[2].write_bytes(files[2].read_bytes()[:-1])
    reading = loader.Reading(files, CPU)
    assert reading.take(files[0])
    for file in files[2:]:
        with pytest.raises(FatalError, match=r"2\.safetensors is damaged"):
            reading.take(file)
    reading.close()


def test_the_interpreter_passes_on_sooner_while_files_are_read_and_as_before_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    during: list[float] = []
    header = loader.header
    monkeypatch.setattr(loader, "header", lambda file: (during.append(sys.getswitchinterval()), header(file))[1])
    before = sys.getswitchinterval()
    loader.read(some_files(tmp_path, 1), CPU)
    assert during == [pytest.approx(loader.SHORT_TURN_S)]
    assert sys.getswitchinterval() == pytest.approx(before)
