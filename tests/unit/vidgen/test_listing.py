"""A package that stands in for transformers; the real one is in `tests/integration/test_listing.py`."""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vidgen import listing

FOUND = {frozenset(): {"b.c": {"C", "D"}, "a": {"A"}}, frozenset({"torch", "vision"}): {"a": {"B"}}}
SOURCE = f"""
CALLS = []

def define_import_structure(module_path, prefix=None):
    CALLS.append((str(module_path), prefix))
    return {FOUND!r}
"""
Imported = Callable[..., Any]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of that kind, in a folder that Python imports from."""
    root = tmp_path / "site" / "stand_in"
    for folder in (root / "utils", root / "models"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    (root / "__init__.py").touch()
    (root / "utils" / "import_utils.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(listing, "PACKAGE", "stand_in")
    monkeypatch.setattr(listing, "MODULE", "stand_in.utils.import_utils")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"stand_in": "1.0"}[name])
    return root


@pytest.fixture
def imported(package: Path) -> Iterator[Imported]:
    """The module, imported anew by a process that keeps what it finds in a folder."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "stand_in"]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def made(folder: Path | None) -> Any:
        forget()
        before = list(sys.meta_path)
        with listing.kept(folder):
            module = importlib.import_module("stand_in.utils.import_utils")
            found = [module.define_import_structure("x"), module.define_import_structure(Path("x"), prefix="models")]
            found[0][frozenset()]["mine"] = {"M"}  # as who asks does
            assert module.define_import_structure(Path("x"), prefix="models") == FOUND
        assert sys.meta_path == before
        assert found[1] == FOUND
        return module

    yield made
    forget()


def test_what_was_found_once_is_not_looked_for_again(imported: Imported, tmp_path: Path) -> None:
    assert imported(tmp_path / "kept").CALLS == [("x", None), ("x", "models")]
    assert imported(tmp_path / "kept").CALLS == []
    assert [file.name.startswith("stand_in-1.0-") for file in (tmp_path / "kept").iterdir()] == [True]


def test_it_may_be_asked_for_more_than_was_kept(imported: Imported, tmp_path: Path) -> None:
    imported(tmp_path / "kept")
    [file] = (tmp_path / "kept").iterdir()
    found = json.loads(file.read_bytes())
    del found[next(iter(found))]
    file.write_text(json.dumps(found))
    assert len(imported(tmp_path / "kept").CALLS) == 1
    assert imported(tmp_path / "kept").CALLS == []


def test_without_a_folder_it_is_the_packages_own(imported: Imported, tmp_path: Path) -> None:
    assert len(imported(None).CALLS) == 3


@pytest.mark.parametrize("said", ["", "{", "[]", "3", '{"x": 1}', "\x00", "[" * 200_000])
def test_what_cannot_be_read_is_found_anew_and_kept(imported: Imported, tmp_path: Path, said: str) -> None:
    imported(tmp_path / "kept")
    [file] = (tmp_path / "kept").iterdir()
    file.write_text(said)
    assert len(imported(tmp_path / "kept").CALLS) == 2
    assert imported(tmp_path / "kept").CALLS == []


@pytest.mark.parametrize(
    "value",
    [1, None, [1], [[1, 2]], [[["a"], {"b": 1}]], [[["a"], []]], [["torch", {"m": ["A"]}]], [[[], {"m": "AB"}]]],
)
def test_nor_is_an_entry_that_is_none(imported: Imported, tmp_path: Path, value: Any) -> None:
    imported(tmp_path / "kept")
    [file] = (tmp_path / "kept").iterdir()
    file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_bytes()), value)))
    assert len(imported(tmp_path / "kept").CALLS) == 2


@pytest.mark.parametrize("changed", ["version", "module", "more models"])
def test_of_another_package_nothing_is_kept_yet(
    imported: Imported, tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    imported(tmp_path / "kept")
    if changed == "version":
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.1")
    elif changed == "module":
        os.utime(package / "utils" / "import_utils.py", ns=(1, 1))
    else:
        (package / "models" / "another").mkdir()
    assert len(imported(tmp_path / "kept").CALLS) == 2
    assert imported(tmp_path / "kept").CALLS == []
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_bytecode_makes_no_other_package_of_it(imported: Imported, tmp_path: Path, package: Path) -> None:
    imported(tmp_path / "kept")
    (package / "models" / "__pycache__").mkdir()
    assert imported(tmp_path / "kept").CALLS == []


def test_a_volume_that_is_full_holds_nothing_more_of_it(
    imported: Imported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    for _ in range(2):
        assert len(imported(tmp_path / "kept").CALLS) == 2
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_package_of_which_nobody_knows_the_version_is_its_own(
    imported: Imported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", unknown)
    assert len(imported(tmp_path / "kept").CALLS) == 3
    assert not (tmp_path / "kept").exists()


def test_a_folder_that_takes_nothing_costs_a_look_each_time(imported: Imported, tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    for _ in range(2):
        assert len(imported(tmp_path / "kept").CALLS) == 2


def test_a_package_that_is_made_otherwise_is_its_own(package: Path, tmp_path: Path, imported: Imported) -> None:
    (package / "utils" / "import_utils.py").write_text("")
    with listing.kept(tmp_path / "kept"):
        assert not hasattr(importlib.import_module("stand_in.utils.import_utils"), listing.FUNCTION)
    assert not (tmp_path / "kept").exists()


def test_what_is_found_in_another_form_is_not_kept(package: Path, tmp_path: Path, imported: Imported) -> None:
    source = SOURCE.replace(f"return {FOUND!r}", "return {frozenset(): {'a': ['B', 'A']}}")
    (package / "utils" / "import_utils.py").write_text(source)
    with listing.kept(tmp_path / "kept"):
        module = importlib.import_module("stand_in.utils.import_utils")
        assert module.define_import_structure("x") == {frozenset(): {"a": ["B", "A"]}}
    assert not (tmp_path / "kept").exists()


def test_where_it_is_imported_already_nothing_is_in_its_way(imported: Imported, tmp_path: Path) -> None:
    module = imported(None)
    before = list(sys.meta_path)
    with listing.kept(tmp_path / "kept"):
        assert sys.meta_path == before
    assert module.define_import_structure.__name__ == listing.FUNCTION


def test_a_fault_of_the_package_is_its_own(package: Path, tmp_path: Path, imported: Imported) -> None:
    (package / "utils" / "import_utils.py").write_text("raise ImportError('no torch')")
    with pytest.raises(ImportError, match="no torch"), listing.kept(tmp_path / "kept"):
        importlib.import_module("stand_in.utils.import_utils")
