"""Weights that are read to a GPU are those of the files, to the last bit, though others need the interpreter."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vidgen.accel import loader, pages

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.mark.parametrize("way", ["staged", "mapped", "mapped, and cannot be pinned"])
@pytest.mark.parametrize("chunk", [1 << 12, loader.CHUNK])
def test_what_is_read_to_a_gpu_is_what_the_files_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, way: str
) -> None:
    monkeypatch.setattr(loader, "CHUNK", chunk)
    monkeypatch.setattr(loader, "WINDOW", 2 * chunk)
    windows: list[bool] = []
    opened = pages.Window.__init__

    def seen(window: pages.Window, handle: int, begin: int, end: int) -> None:
        if begin and way == "mapped, and cannot be pinned":
            monkeypatch.setattr(pages, "READ_ONLY", 0)  # which CUDA refuses
        try:
            opened(window, handle, begin, end)
        except OSError:
            windows.append(False)
            raise
        windows.append(True)

    monkeypatch.setattr(pages.Window, "__init__", seen)
    if way == "staged":
        monkeypatch.setattr(pages, "cached", lambda handle, size: False)
    files = [tmp_path / f"{number}.safetensors" for number in range(5)]
    for number, file in enumerate(files):
        save_file({f"{number}.{size}": torch.randn(size).bfloat16() for size in (1, 77, 4096, 300_001)}, file)
    done = threading.Event()

    def busy() -> None:
        while not done.is_set():
            sum(range(1000))

    other = threading.Thread(target=busy)
    other.start()
    reading = loader.Reading(files, torch.device("cuda:0"), sparing=True)
    try:
        for file in files:
            taken = reading.take(file)
            for name, wanted in load_file(file).items():
                assert torch.equal(taken[name].cpu(), wanted), name
    finally:
        reading.close()
        done.set()
        other.join()
    assert set(windows) == {"staged": set(), "mapped": {True}}.get(way, {True, False})
    assert torch.ones(8, device="cuda:0").sum().item() == 8  # what CUDA refused is nobody else's error


@pytest.mark.parametrize("size", [1 << 29, 8])
def test_what_cuda_refused_is_no_error_of_what_the_thread_does_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    torch.cuda.empty_cache()  # so that the larger one asks CUDA for memory
    monkeypatch.setattr(pages, "READ_ONLY", 0)
    (tmp_path / "x").write_bytes(b"x")
    with (tmp_path / "x").open("rb") as opened:
        assert not pages.pinnable(opened.fileno())
    assert torch.ones(size, dtype=torch.uint8, device="cuda:0")[-1].item() == 1
