"""What one process kept is there for the next one, and a file that is damaged costs the work and nothing else."""

from __future__ import annotations

import contextlib
import errno
import itertools
import marshal
import os
import random
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from vidgen import kept

if sys.platform != "win32":
    import resource


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "kept" / "imports.bin"


@contextlib.contextmanager
def opened(file: Path) -> Iterator[kept.Store]:
    store = kept.Store(file)
    yield store
    store.close()


def keep(file: Path, values: dict[str, Any]) -> None:
    with opened(file) as store:
        for name, value in values.items():
            store.add((name,), value)


def is_kept(file: Path, name: str) -> bool:
    return kept.Store(file).found((name,)) is not None


def no_need() -> NoReturn:
    raise AssertionError("it is worked out again")


def test_what_was_asked_once_is_not_worked_out_again(file: Path) -> None:
    with opened(file) as store:
        assert store.asked(("a", 1), lambda: {"b": [1, None]}) == {"b": [1, None]}
        assert store.asked(("a", 1), no_need) == {"b": [1, None]}
        assert store.asked(("a", 2), lambda: "c") == "c"
    with opened(file) as store:
        assert store.asked(("a", 1), no_need) == {"b": [1, None]}
        assert store.asked(("a", 2), no_need) == "c"
    assert list(file.parent.iterdir()) == [file]


def test_each_answer_is_a_new_object(file: Path) -> None:
    with opened(file) as store:
        for _ in range(3):
            store.asked(("a",), lambda: [1]).append(2)  # as who asks may do
    with opened(file) as store:
        for _ in range(2):
            found = store.asked(("a",), no_need)
            assert found == [1]
            found.append(2)


def test_the_file_holds_what_was_used_and_nothing_else(file: Path) -> None:
    keep(file, {"a": "value a", "b": "value b", "c": "value c"})
    with opened(file) as store:
        assert store.found(("a",)) == "value a"
        assert store.found(("d",)) is None
        store.add(("e",), "value e")
    content = file.read_bytes()
    assert [f"value {name}".encode() in content for name in "abcde"] == [True, False, False, False, True]
    assert [is_kept(file, name) for name in "abcde"] == [True, False, False, False, True]


@pytest.mark.parametrize(("new", "written"), [(0, False), (1, False), (2, True)])
def test_a_few_new_ones_are_not_worth_writing(file: Path, new: int, written: bool) -> None:
    keep(file, {str(number): number for number in range(99)})
    before = file.stat().st_ino, file.read_bytes()
    with opened(file) as store:
        assert [store.found((str(number),)) for number in range(99)] == list(range(99))
        for number in range(new):
            store.add((f"new {number}",), number)
    assert ((file.stat().st_ino, file.read_bytes()) != before) == written
    assert is_kept(file, "new 0") == written


def test_one_that_took_long_is_worth_it_and_costs_nothing_else(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's hash of itself is one of nine thousand, and takes as long as a thousand others."""
    keep(file, {str(number): number for number in range(500)})
    clock = [0.0]
    monkeypatch.setattr(kept.time, "perf_counter", lambda: clock[0])

    def work(seconds: float) -> int:
        clock[0] += seconds
        return 7

    for seconds, written in ((kept.LONG_S / 2, False), (kept.LONG_S * 2, True)):
        with opened(file) as store:
            assert store.found(("1",)) == 1
            assert store.asked(("new",), lambda seconds=seconds: work(seconds)) == 7  # type: ignore[misc]
        assert is_kept(file, "new") is written
        assert [is_kept(file, str(number)) for number in range(500)] == [True] * 500
    before = file.stat().st_ino
    with opened(file) as store:
        assert store.asked(("object",), lambda: (work(kept.LONG_S * 2), object())[1]) is not None
    assert file.stat().st_ino == before  # what cannot be written is no reason


def test_a_start_that_ends_early_leaves_what_is_there_to_the_next_one(file: Path) -> None:
    keep(file, {str(number): number for number in range(200)})
    with opened(file) as store:
        assert store.found(("1",)) == 1
        store.add(("new",), 1)
    assert is_kept(file, "2")


def test_where_nothing_was_asked_nothing_is_written(file: Path) -> None:
    with opened(file):
        pass
    assert not file.parent.exists()


def test_what_is_closed_has_and_keeps_nothing(file: Path) -> None:
    keep(file, {"a": 1, "b": 2})
    store = kept.Store(file)
    assert store.found(("a",)) == 1
    store.close()
    before = file.read_bytes()
    made = iter(range(10))
    assert [store.asked(("a",), lambda: next(made)) for _ in range(3)] == [0, 1, 2]
    assert [store.asked(("c",), lambda: next(made)) for _ in range(3)] == [3, 4, 5]
    assert store.found(("b",)) is None
    store.close()
    assert file.read_bytes() == before


def test_to_close_twice_is_to_close(file: Path) -> None:
    store = kept.Store(file)
    store.add(("a",), 1)
    store.close()
    store.close()
    assert is_kept(file, "a")


def test_what_is_closed_holds_no_memory(file: Path) -> None:
    keep(file, {"a": 1, "b": bytes(1 << 20)})
    tracemalloc.start()
    try:
        store = kept.Store(file)
        assert store.found(("a",)) == 1
        assert tracemalloc.get_traced_memory()[0] > 1 << 20
        store.close()
        assert tracemalloc.get_traced_memory()[0] < 1 << 18
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("value", [object(), lambda: 1, Path("a"), {"a": {"b": object()}}, type("Int", (int,), {})(1)])
def test_what_cannot_be_written_is_worked_out_each_time(file: Path, value: Any) -> None:
    for _ in range(2):
        with opened(file) as store:
            for _ in range(2):
                assert store.asked(("a",), lambda: value) is value
            store.asked(("b",), lambda: 1)
    assert [is_kept(file, name) for name in "ab"] == [False, True]


@pytest.mark.parametrize("part", [object(), Path("a"), [1], {"a"}])
def test_nor_is_what_has_such_a_key_kept(file: Path, part: Any) -> None:
    with opened(file) as store:
        made = iter((1, 2))
        assert [store.asked(("a", part), lambda: next(made)) for _ in range(2)] == [1, 2]
        store.asked(("b",), lambda: 1)
    assert is_kept(file, "b")


def written(index: Any, data: bytes = b"") -> bytes:
    """A file whose checksums are right, whatever it says."""
    head = index if isinstance(index, bytes) else marshal.dumps(index)
    return len(head).to_bytes(8, "little") + zlib.crc32(head).to_bytes(4, "little") + head + data


VALUE, LATER = ["value", {"of": 1}], "another"
DATA = marshal.dumps(VALUE)
RIGHT = zlib.crc32(DATA)
UNHASHABLE = b"{" + marshal.dumps([]) + marshal.dumps(1) + b"0"  # a dict, had a list a hash


def use(file: Path) -> bool:
    """Whether something had to be worked out by a start, which ends as ever; the one behind it finds all."""
    made = []
    for _ in range(2):
        with opened(file) as store:
            for name, value in (("a", VALUE), ("b", LATER)):
                assert store.asked((name,), lambda name=name, value=value: made.append(name) or value) == value
    assert kept.Store(file).found(("b",)) == LATER
    return bool(made)


def damaged(file: Path, content: bytes) -> bool:
    file.unlink(missing_ok=True)
    file.write_bytes(content)
    return use(file)


def test_what_was_cut_anywhere_is_worked_out_anew(file: Path) -> None:
    assert use(file)
    assert not use(file)
    whole = file.read_bytes()
    assert not damaged(file, whole)
    for length in range(len(whole)):
        assert damaged(file, whole[:length]), length


def test_so_is_what_has_a_wrong_byte_anywhere(file: Path) -> None:
    use(file)
    whole = file.read_bytes()
    for place, mask in itertools.product(range(len(whole)), (0x01, 0x80, 0xFF)):
        assert damaged(file, whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :]), place


def test_what_is_whole_beside_it_is_taken(file: Path) -> None:
    keep(file, {"a": VALUE, "b": LATER})
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    file.write_bytes(content)
    assert [is_kept(file, name) for name in "ab"] == [True, False]


@pytest.mark.parametrize("length", [1 << 20, 1 << 30, (1 << 30) + 1, 1 << 62, (1 << 64) - 1])
def test_so_is_what_claims_to_be_longer_than_it_is(file: Path, length: int) -> None:
    use(file)
    whole = file.read_bytes()
    assert damaged(file, length.to_bytes(8, "little") + whole[8:])
    assert damaged(file, length.to_bytes(8, "little") + zlib.crc32(whole[12:]).to_bytes(4, "little") + whole[12:])


@pytest.mark.parametrize(
    "content", [b"", b"\x00", bytes(12), bytes(4096), b"{}", b"\xff" * 4096, random.Random(1).randbytes(9999)]
)
def test_so_is_what_is_something_else(file: Path, content: bytes) -> None:
    file.parent.mkdir()
    assert damaged(file, content)


@pytest.mark.parametrize(
    "index", [b"", b"\x00", b"[", marshal.dumps({"a": 1})[:-1], UNHASHABLE, None, 1, [], "a", {1, 2}, [("a",)], ({},)]
)
def test_so_is_what_has_another_index(file: Path, index: Any) -> None:
    file.parent.mkdir()
    assert damaged(file, written(index, DATA))


@pytest.mark.parametrize(
    "place",
    [
        None, 1, "abc", (), (0, len(DATA)), (0, len(DATA), RIGHT, 1), ("0", "9", RIGHT), (0.0, 1.0, RIGHT), (0, 9, "1"),
        (0, 0, 0), (5, 5, 0), (9, 3, 0), (0, 1 << 80, RIGHT + 1), (1, len(DATA), RIGHT), (-1, len(DATA), RIGHT), [], {},
        (0, len(DATA) - 2, zlib.crc32(DATA[:-2])), (1, len(DATA), zlib.crc32(DATA[1:])),
    ],
)  # fmt: skip
def test_so_is_what_has_an_entry_that_is_none(file: Path, place: Any) -> None:
    file.parent.mkdir()
    assert damaged(file, written({("a",): place, ("b",): place}, DATA))


def test_an_entry_is_as_it_is_written_here(file: Path) -> None:
    later = marshal.dumps(LATER)
    index = {("a",): (0, len(DATA), RIGHT), ("b",): (len(DATA), len(DATA) + len(later), zlib.crc32(later))}
    file.parent.mkdir()
    assert not damaged(file, written(index, DATA + later))


def test_what_is_another_users_is_neither_taken_nor_written_anew(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system may say who owns what is written there: it would be written at each start, for nothing."""
    keep(file, {"a": 1})
    before = file.stat().st_ino
    monkeypatch.setattr(os, "geteuid", lambda: before + 1)
    assert not is_kept(file, "a")
    assert kept.Store(file).refused == f"{file} is no file of this user"
    keep(file, {"a": 2})
    assert file.stat().st_ino == before
    monkeypatch.undo()
    assert is_kept(file, "a")
    assert kept.Store(file).refused is None


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_nor_is_what_is_no_file(file: Path, tmp_path: Path, kind: str) -> None:
    keep(tmp_path / "another", {"a": 1})
    file.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(tmp_path / "another")
    assert not is_kept(file, "a")
    with opened(file) as store:
        store.add(("a",), 1)
    assert file.is_fifo() == (store.refused is not None) == (kind == "pipe")
    assert is_kept(tmp_path / "another", "a")


def test_a_folder_that_is_a_file_costs_the_work_each_time(file: Path) -> None:
    file.parent.touch()
    for _ in range(2):
        with opened(file) as store:
            assert store.asked(("a",), lambda: 1) == 1
    assert file.parent.read_bytes() == b""


def test_so_does_a_file_that_is_a_folder(file: Path) -> None:
    (file / "inside").mkdir(parents=True)
    for _ in range(2):
        with opened(file) as store:
            assert store.asked(("a",), lambda: 1) == 1
    assert list(file.parent.rglob("*")) == [file, file / "inside"]


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of a file")
@pytest.mark.parametrize("size", [100, 100_000])  # the one is written when the file is closed, the other before
def test_a_volume_that_is_full_holds_what_it_held(file: Path, size: int) -> None:
    keep(file, {"a": 1})
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(file) as store:
        store.add(("b",), "b" * size)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
        try:
            store.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [(one, one.read_bytes()) for one in file.parent.iterdir()] == [(file, before)]


def test_so_does_one_that_takes_no_other_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with opened(file) as store:
        store.add(("a",), 1)
    assert list(file.parent.iterdir()) == []
