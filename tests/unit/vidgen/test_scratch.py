"""Temporary files of processes: they go with theirs, and those of a killed one when the next one starts."""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.workbench import LoopClock, one_thread, tidied

from vidgen import errors, scratch
from vidgen.scratch import Scratch

PROCESS = """
import sys
from pathlib import Path
from vidgen.scratch import Scratch
made = Scratch(Path(sys.argv[1]))
made.path(".png").write_bytes(b"a photograph")
print(made.folder(), flush=True)
sys.stdin.read()
"""


class Process:
    """A process with a file in its scratch folder, for as long as nobody ends it."""

    def __init__(self, parent: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.folder = Path(self.process.stdout.readline().strip())

    def leave(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    made = Process(tmp_path)
    yield made
    made.kill()


def test_what_a_killed_process_left_goes_when_the_next_one_starts(tmp_path: Path, process: Process) -> None:
    assert list(process.folder.iterdir())
    process.process.kill()
    process.process.wait()

    made = Scratch(tmp_path)

    assert list(tmp_path.iterdir()) == [made.folder()]


def test_what_a_living_process_has_stays(tmp_path: Path, process: Process) -> None:
    Scratch(tmp_path)
    scratch.sweep(tmp_path)
    [file] = process.folder.iterdir()
    assert file.read_bytes() == b"a photograph"


def test_a_process_that_ends_leaves_nothing(tmp_path: Path, process: Process) -> None:
    assert process.leave() == 0
    assert list(tmp_path.iterdir()) == []


def test_names_are_used_once_in_a_folder_for_this_user_alone(tmp_path: Path) -> None:
    made = Scratch(tmp_path / "is made")
    assert made.path().parent == made.path(".png").parent == made.folder()
    assert len({made.path(), made.path(), made.path()}) == 3
    assert made.folder().stat().st_mode & 0o077 == 0


def test_a_folder_that_somebody_tidied_away_is_made_anew_and_held(tmp_path: Path) -> None:
    made = Scratch(tmp_path)
    shutil.rmtree(made.folder())
    made.path().mkdir()
    scratch.sweep(tmp_path)
    assert made.folder().exists()
    del made
    gc.collect()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked"])
def test_a_folder_that_a_sibling_found_before_it_was_locked_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    swept: list[Path] = []
    lock, make = fcntl.flock, tempfile.mkdtemp

    def sweep_once() -> None:
        if not swept:
            swept.extend(tmp_path.iterdir())
            scratch.sweep(tmp_path)

    def locks(held: int, how: int) -> None:
        if how == fcntl.LOCK_EX and moment == "before it is locked":
            sweep_once()
        lock(held, how)

    def makes(**where: Any) -> str:
        name = make(**where)
        if moment == "before it is opened":
            sweep_once()
        return str(name)

    monkeypatch.setattr(fcntl, "flock", locks)
    monkeypatch.setattr(tempfile, "mkdtemp", makes)
    made = Scratch(tmp_path)
    assert len(swept) == 1
    assert list(tmp_path.iterdir()) == [made.folder()] != swept


def test_what_only_looks_like_one_stays(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").touch()
    place = tmp_path / "place"
    place.mkdir()
    (place / f"{scratch.PREFIX}link").symlink_to(other)
    (place / f"{scratch.PREFIX}file").touch()
    (place / "vidgen-else").mkdir()

    scratch.sweep(place)

    assert len(list(place.iterdir())) == 3
    assert (other / "file").exists()


def test_a_place_where_nothing_can_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(errors.StoreError) as caught:
        Scratch(tmp_path / "file")
    assert caught.value.code == "local_file"


async def left_and_tidied(made: Scratch, *rooms: Path, again: bool = True) -> None:
    one_thread()
    clock = LoopClock()
    for room in rooms:
        made.leave(room, again=again)
    assert all(room.exists() for room in rooms)
    await tidied(clock)


def furnished(room: Path) -> Path:
    room.mkdir(exist_ok=True)
    (room / "input-0").write_bytes(b"a photograph")
    return room


async def test_a_room_is_emptied_and_given_to_the_next_one(tmp_path: Path) -> None:
    made = Scratch(tmp_path)
    first, second = furnished(made.room()), furnished(made.room())
    assert first != second
    assert not (third := made.room()).exists()

    await left_and_tidied(made, first, second)

    assert {made.room(), made.room()} == {first, second}
    assert made.room() not in (first, second, third)


async def test_a_room_that_somebody_may_still_write_to_is_not_used_again(tmp_path: Path) -> None:
    made = Scratch(tmp_path)
    room = furnished(made.room())

    await left_and_tidied(made, room, again=False)

    assert list(made.folder().iterdir()) == []
    assert made.room() != room


async def test_a_room_with_folders_in_it_goes_whole_and_one_that_nobody_made_is_no_error(tmp_path: Path) -> None:
    made = Scratch(tmp_path)
    room = furnished(made.room())
    (room / "frames").mkdir()
    (room / "frames" / "0.png").touch()

    made.leave(made.room(), again=True)  # which nobody has made
    await left_and_tidied(made, room)

    assert list(made.folder().iterdir()) == []
    assert not made.room().exists()


async def test_no_more_rooms_are_kept_than_a_worker_needs(tmp_path: Path) -> None:
    made = Scratch(tmp_path)
    await left_and_tidied(made, *(furnished(made.room()) for _ in range(scratch.ROOMS + 3)))
    assert len(list(made.folder().iterdir())) == scratch.ROOMS


async def test_rooms_of_a_folder_that_somebody_tidied_away_are_not_given(tmp_path: Path) -> None:
    made = Scratch(tmp_path)
    await left_and_tidied(made, furnished(made.room()))
    shutil.rmtree(made.folder())
    made.room().mkdir()
    assert made.room().parent == made.folder()
