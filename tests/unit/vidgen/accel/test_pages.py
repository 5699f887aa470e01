from __future__ import annotations

import errno
import mmap
import os
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vidgen.accel import pages

SIZE = 3 * mmap.PAGESIZE + 100


@pytest.fixture
def handle(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "x").write_bytes(bytes(number % 251 for number in range(SIZE)))
    opened = os.open(tmp_path / "x", os.O_RDONLY)
    yield opened
    os.close(opened)


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """What is pinned, and how many bytes of it."""
    held: dict[int, int] = {}
    monkeypatch.setattr(pages, "_pin", lambda address, size: held.update({address: size}) is None)
    monkeypatch.setattr(pages, "_unpin", held.pop)
    return held


@pytest.mark.parametrize(
    ("begin", "end"),
    [(0, 1), (0, SIZE), (1, 2), (mmap.PAGESIZE - 1, mmap.PAGESIZE + 1), (2 * mmap.PAGESIZE, SIZE), (SIZE - 1, SIZE)],
)
def test_a_window_holds_the_bytes_of_its_file(handle: int, pinned: dict[int, int], begin: int, end: int) -> None:
    window = pages.Window(handle, begin, end)
    assert bytes(window.tensor().numpy()) == os.pread(handle, end - begin, begin)
    [(address, size)] = pinned.items()
    assert address % mmap.PAGESIZE == 0
    assert size == end - begin // mmap.PAGESIZE * mmap.PAGESIZE
    window.close()
    assert not pinned


def test_a_window_that_cannot_be_had_is_an_error_and_leaves_nothing(
    handle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "_unpin", lambda address: pytest.fail("it was not pinned"))
    monkeypatch.setattr(pages, "_pin", lambda address, size: False)
    before = mappings()
    with pytest.raises(OSError, match="it cannot be pinned"):
        pages.Window(handle, 5, SIZE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        pages.Window(-1, 0, 1)
    assert mappings() == before


def test_what_cannot_be_given_back_is_not_mapped_any_more(handle: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(address: int) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(pages, "_pin", lambda address, size: True)
    monkeypatch.setattr(pages, "_unpin", fails)
    before = mappings()
    window = pages.Window(handle, 0, SIZE)
    assert mappings() == before + 1
    with pytest.raises(RuntimeError, match="the device is gone"):
        window.close()
    assert mappings() == before


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("/x\n")


def test_memory_can_be_pinned_where_one_page_of_it_can(
    handle: int, pinned: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pages.pinnable(handle)
    assert not pinned
    monkeypatch.setattr(pages, "_pin", lambda address, size: False)
    assert not pages.pinnable(handle)


@pytest.mark.parametrize("forgets", [True, False], ids=["", "a torch that hides its runtime"])
def test_what_is_refused_is_no_error_of_what_the_thread_does_next(
    handle: int, monkeypatch: pytest.MonkeyPatch, forgets: bool
) -> None:
    """CUDA remembered it, and the next allocation failed with `invalid argument`: the start was over."""
    done: list[object] = []
    runtime = types.SimpleNamespace(cudaHostRegister=lambda *given: done.append(given) or 1)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    symbols = {"mmap": pages._libc().mmap, "munmap": pages._libc().munmap}
    if forgets:
        symbols["cudaGetLastError"] = lambda: done.append("forgotten")
    monkeypatch.setattr(pages, "_libc", lambda: types.SimpleNamespace(**symbols))
    assert not pages.pinnable(handle)
    [(_, size, flags), *more] = done
    assert (size, flags) == (1, pages.READ_ONLY)
    assert more == ["forgotten"] * forgets


def test_a_file_that_was_just_written_lies_in_the_page_cache(handle: int) -> None:
    assert pages.cached(handle, SIZE)


def test_a_file_of_which_a_part_would_have_to_be_waited_for_does_not(
    handle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def preadv(handle: int, buffers: list[bytearray], offset: int, flags: int) -> int:
        asked.append((offset, flags))
        if offset > SIZE // 2:
            raise BlockingIOError(errno.EAGAIN, "not there")
        return 1

    monkeypatch.setattr("vidgen.accel.pages.os.preadv", preadv)
    assert not pages.cached(handle, SIZE)
    assert {flags for _, flags in asked} == {os.RWF_NOWAIT}


def test_a_system_that_cannot_tell_has_nothing_in_its_page_cache(handle: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("vidgen.accel.pages.os.RWF_NOWAIT")
    assert not pages.cached(handle, SIZE)
