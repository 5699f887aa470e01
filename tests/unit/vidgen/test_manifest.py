from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vidgen import manifest
from vidgen.errors import FatalError

CONTENT = {"model_index.json": b"{}", "part/config.json": b"[]", "part/model.safetensors": bytes(1000)}
SHARD = "part/model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in CONTENT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "README.md").write_text("not part of it")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.json").write_text("{}")
    return tmp_path


@pytest.fixture
def told(folder: Path) -> manifest.Manifest:
    made = manifest.Manifest(model="someone/model", created_by="a test", files=tuple(manifest.describe(folder)))
    manifest.write(folder, made)
    return made


def test_a_manifest_lists_every_file_with_its_checksum(folder: Path, told: manifest.Manifest) -> None:
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    assert {file.path: file.sha256 for file in told.files} == sums
    assert told.bytes == 1004
    assert manifest.read(folder) == told
    assert manifest.check(folder, told) == []
    assert manifest.wrong_sizes(folder, told) == []


def test_a_folder_without_one_has_none(folder: Path) -> None:
    assert manifest.read(folder) is None


def test_what_is_read_is_told(folder: Path, told: manifest.Manifest) -> None:
    heard: list[int] = []
    manifest.check(folder, told, heard.append)
    assert sum(heard) == told.bytes


def test_files_that_are_known_are_not_read(folder: Path) -> None:
    heard: list[int] = []
    files = manifest.describe(folder, {SHARD: "a" * 64}, heard.append)
    assert next(file for file in files if file.path == SHARD).sha256 == "a" * 64
    assert sum(heard) == 4


def _changed(folder: Path) -> None:
    (folder / SHARD).write_bytes(bytes(999) + b"\1")


def _cut(folder: Path) -> None:
    (folder / SHARD).write_bytes(bytes(999))


def _gone(folder: Path) -> None:
    (folder / SHARD).unlink()


def _added(folder: Path) -> None:
    (folder / "part" / "more.safetensors").write_bytes(b"")


def _index_added(folder: Path) -> None:
    (folder / "part" / "model.safetensors.index.json").write_bytes(b"{}")


@pytest.mark.parametrize(
    ("damage", "says", "seen_by_size"),
    [
        (_changed, "part/model.safetensors: wrong checksum", False),
        (_cut, "part/model.safetensors: wrong size", True),
        (_gone, "part/model.safetensors: missing", True),
        (_added, "part/more.safetensors: extra", True),
        (_index_added, "part/model.safetensors.index.json: extra", True),
    ],
)
def test_what_is_wrong_is_named(
    folder: Path, told: manifest.Manifest, damage: Callable[[Path], None], says: str, seen_by_size: bool
) -> None:
    damage(folder)
    assert [str(fault) for fault in manifest.check(folder, told)] == [says]
    assert [str(fault) for fault in manifest.wrong_sizes(folder, told)] == ([says] if seen_by_size else [])


def test_what_somebody_put_beside_the_weights_is_not_wrong(folder: Path, told: manifest.Manifest) -> None:
    (folder / "part" / "notes.txt").write_text("mine")
    assert manifest.check(folder, told) == manifest.wrong_sizes(folder, told) == []


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2}, {"profile": "int3"}, {"unheard_of": 1},
        {"files": [{"path": "../outside", "size": 1, "sha256": "a" * 64}]},
        {"files": [{"path": "/etc/passwd", "size": 1, "sha256": "a" * 64}]},
        {"files": [{"path": "a", "size": -1, "sha256": "a" * 64}]},
        {"files": [{"path": "a", "size": 1, "sha256": "short"}]},
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_understood_is_no_manifest_and_not_passed_over(
    folder: Path, told: manifest.Manifest, change: dict[str, object]
) -> None:
    path = folder / manifest.NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FatalError, match="cannot be understood"):
        manifest.read(folder)


def test_the_hub_told_the_checksums_of_large_files(folder: Path) -> None:
    notes = folder / ".cache" / "huggingface" / "download"
    (notes / "part").mkdir(parents=True)
    (notes / f"{SHARD}.metadata").write_text(f"{'0' * 40}\n{'b' * 64}\n1700000000.0\n")
    (notes / "model_index.json.metadata").write_text(f"{'0' * 40}\n{'c' * 40}\n1700000000.0\n")
    assert manifest.of_hub(folder) == {SHARD: "b" * 64}


def test_in_the_hubs_cache_a_blob_is_named_by_its_checksum(folder: Path) -> None:
    blob = folder / ".cache" / ("d" * 64)
    (folder / SHARD).rename(blob)
    (folder / SHARD).symlink_to(blob)
    assert manifest.of_hub(folder) == {SHARD: "d" * 64}
