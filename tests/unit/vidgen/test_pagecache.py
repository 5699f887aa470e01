from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from vidgen import pagecache

BOUND = 60.0  # seconds to wait for what must come


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What was read, file and offset, of files of which nothing is in the page cache."""
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(pagecache, "CHUNK", 100)
    monkeypatch.setattr(pagecache, "_fetch", lambda file, begin, buffer: seen.append((file.name, begin)))
    return seen


def files(folder: Path, **sizes: int) -> list[Path]:
    made = []
    for name, size in sizes.items():
        made.append(folder / name)
        made[-1].write_bytes(bytes(size))
    return made


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "page cache"]


def wait_for_all() -> None:
    """The threads end by themselves where there is nothing left to read."""
    for thread in threads():
        thread.join(BOUND)
    assert not threads()


def test_every_chunk_of_every_file_is_read_once(tmp_path: Path, fetched: list[tuple[str, int]]) -> None:
    with pagecache.filling([*files(tmp_path, a=250, b=0, c=100), tmp_path / "gone"]):
        wait_for_all()
    assert sorted(fetched) == [("a", 0), ("a", 100), ("a", 200), ("c", 0)]


def test_what_does_not_fit_into_half_of_the_free_memory_is_left(
    tmp_path: Path, fetched: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pagecache, "_free", lambda: 800)
    with pagecache.filling(files(tmp_path, a=1000)):
        wait_for_all()
    assert sorted(begin for _, begin in fetched) == [0, 100, 200, 300]


def test_nothing_is_begun_any_more_when_it_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Semaphore(0), threading.Event()
    count = 0

    def fetch(*given: object) -> None:
        nonlocal count
        count += 1
        begun.release()
        go_on.wait(BOUND)

    class Leaving(threading.Event):
        def set(self) -> None:
            super().set()
            go_on.set()  # not a moment before it is left

    used = SimpleNamespace(Event=Leaving, Lock=threading.Lock, Thread=threading.Thread)
    monkeypatch.setattr(pagecache, "threading", used)
    monkeypatch.setattr(pagecache, "CHUNK", 1)
    monkeypatch.setattr(pagecache, "_fetch", fetch)
    with pagecache.filling(files(tmp_path, a=1000)):
        for _ in range(pagecache.THREADS):
            assert begun.acquire(timeout=BOUND)
    assert count == pagecache.THREADS
    assert not threads()


def test_a_file_that_cannot_be_read_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = files(tmp_path, good=1, bad=1)
    seen: list[str] = []

    def fetch(file: Path, begin: int, buffer: memoryview) -> None:
        if file == bad:
            raise OSError(5, "input/output error")
        seen.append(file.name)

    monkeypatch.setattr(pagecache, "_fetch", fetch)
    with pagecache.filling([bad, good]):
        wait_for_all()
    assert seen == ["good"]


def test_a_file_that_was_just_written_is_there_and_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    preadv = pagecache.os.preadv
    monkeypatch.setattr(
        "vidgen.pagecache.os.preadv",
        lambda handle, buffers, at, *flags: read.append(len(buffers[0])) or preadv(handle, buffers, at, *flags),
    )
    pagecache._fetch(files(tmp_path, a=4096)[0], 0, memoryview(bytearray(4096)))
    assert read in ([1], [1, 4096])  # a file system may not be able to tell


def test_a_container_s_limit_counts_where_it_is_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    1000 kB\n")
    monkeypatch.setattr(pagecache, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(pagecache, "CGROUP", tmp_path)
    assert pagecache._free() == 1000 << 10
    for limit, taken, free in (("max", "5", 1000 << 10), ("7000", "5000", 2000), ("5000", "7000", 0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{taken}\n")
        assert pagecache._free() == free
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("5000\n")
    for limit, free in (("9223372036854771712", 1000 << 10), ("7000", 2000)):  # of cgroup v1
        (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{limit}\n")
        assert pagecache._free() == free
    monkeypatch.setattr(pagecache, "MEMINFO", tmp_path / "gone")
    assert pagecache._free() == 0
