from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from vidgen import extras, manifest, weights
from vidgen.errors import FatalError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache of the test's own."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


def lay_out(folder: Path, name: str = "QwenImageEditPlusPipeline", **more: Any) -> Path:
    """A complete model folder, as far as can be seen without reading the tensors."""
    (folder / "transformer").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    index = {
        "_class_name": name,
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer_2": [None, None],
        "boundary_ratio": 0.9,
    }
    (folder / "model_index.json").write_text(json.dumps(index | more))
    (folder / "transformer" / "config.json").write_text("{}")
    (folder / "transformer" / "weights.safetensors").write_bytes(bytes(100))
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return lay_out(tmp_path / "model")


def cached(cache: Path, model: str = "someone/model", commit: str = COMMIT) -> Path:
    """A snapshot as the hub's client keeps it."""
    entry = cache / f"models--{model.replace('/', '--')}"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(commit)
    return lay_out(entry / "snapshots" / commit)


def test_a_local_folder_is_found_under_its_name(folder: Path) -> None:
    assert weights.locate(str(folder)) == weights.Weights(folder, "model", None, 100)


def test_a_downloaded_folder_knows_its_commit(folder: Path) -> None:
    note = folder / ".cache" / "huggingface" / "download" / "model_index.json.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{COMMIT}\nan-etag\n1700000000.0\n")
    found = weights.locate(str(folder))
    assert found is not None
    assert found.revision == COMMIT


def test_a_cached_model_is_found_at_its_commit(empty_cache: Path) -> None:
    snapshot = cached(empty_cache)
    for revision in (COMMIT, None):
        found = weights.locate("someone/model", revision)
        assert found == weights.Weights(snapshot, "someone/model", COMMIT, 100)


@pytest.mark.parametrize("model", ["someone/other", "/nowhere/at/all", "not an id"])
def test_what_is_not_here_is_not_found(empty_cache: Path, model: str) -> None:
    cached(empty_cache)
    assert weights.locate(model) is None


def test_a_cached_model_is_not_found_at_another_commit(empty_cache: Path) -> None:
    cached(empty_cache)
    assert weights.locate("someone/model", "f" * 40) is None


def test_a_cached_model_is_found_without_the_files_that_are_never_downloaded(empty_cache: Path) -> None:
    # The client notes what a repository holds, and called a snapshot without its model card incomplete.
    snapshot = cached(empty_cache)
    files = [*manifest.paths(snapshot), "README.md"]
    trees = empty_cache / "models--someone--model" / "trees"
    trees.mkdir()
    told = {"format_version": 1, "files": {name: {"size": 1, "blob_id": "0" * 40} for name in files}}
    (trees / f"{COMMIT}.json").write_text(json.dumps(told))
    assert weights.locate("someone/model", COMMIT) is not None


def test_a_complete_folder_passes(folder: Path) -> None:
    weights.verify(folder)


def test_every_tiny_checkpoint_passes(tiny_models: dict[str, Path]) -> None:
    for path in tiny_models.values():
        weights.verify(path)


def _without_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def _with_broken_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


def _without_component(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").unlink()
    (folder / "scheduler").rmdir()


def _without_weights(folder: Path) -> None:
    (folder / "transformer" / "weights.safetensors").unlink()


def _without_a_shard(folder: Path) -> None:
    shards = {"weight_map": {"a": "weights.safetensors", "b": "weights-2.safetensors"}}
    (folder / "transformer" / "weights.safetensors.index.json").write_text(json.dumps(shards))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_without_index, "has no model_index.json"),
        (_with_broken_index, "is not valid JSON"),
        (_without_component, "has no scheduler folder"),
        (_without_weights, "has no safetensors"),
        (_without_a_shard, "lacks weights-2.safetensors"),
    ],
)
def test_an_incomplete_folder_is_missing_weights(folder: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(folder)
    with pytest.raises(FatalError, match=says) as caught:
        weights.verify(folder)
    assert caught.value.code == "weights_missing"
    assert "download the model again" in caught.value.message


@pytest.mark.parametrize("name", ["weights.bin", "weights.pt", "weights.pth", "weights.pkl", "weights.ckpt"])
@pytest.mark.parametrize("instead", [True, False])
def test_pickles_are_refused_beside_and_instead_of_safetensors(folder: Path, name: str, instead: bool) -> None:
    (folder / "transformer" / name).write_bytes(bytes(10))
    if instead:
        _without_weights(folder)
    with pytest.raises(FatalError, match=f"transformer/{name} is a pickle") as caught:
        weights.verify(folder)
    assert caught.value.code == "weights_refused"


def test_a_pickle_of_any_spelling_is_one(folder: Path) -> None:
    (folder / "transformer" / "WEIGHTS.BIN").write_bytes(bytes(10))
    with pytest.raises(FatalError, match="is a pickle"):
        weights.verify(folder)


def test_what_lies_behind_a_link_to_a_folder_is_looked_into_as_well(folder: Path, tmp_path: Path) -> None:
    """Models share a text encoder so: it was loaded, and neither searched for code nor compared with the manifest."""
    elsewhere = (folder / "transformer").rename(tmp_path / "elsewhere")
    (folder / "transformer").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)  # a link may lead round in a circle
    weights.verify(folder)
    assert [name for name in manifest.paths(folder) if name.startswith("transformer")] == [
        "transformer/config.json", "transformer/weights.safetensors",
    ]  # fmt: skip
    assert weights.component_sizes(folder) == {"transformer": 100}
    (elsewhere / "weights.bin").write_bytes(bytes(10))
    with pytest.raises(FatalError, match=r"transformer/weights\.bin is a pickle"):
        weights.verify(folder)


@pytest.mark.parametrize(
    "listed", [[], {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": None}}, {"weight_map": {"a": ""}},
               {"weight_map": {"a": "../../outside.safetensors"}}, {"weight_map": {"a": "/outside.safetensors"}}],
)  # fmt: skip
def test_an_index_of_shards_that_does_not_name_files_beside_it_is_damaged(
    folder: Path, tmp_path: Path, listed: Any
) -> None:
    (tmp_path / "outside.safetensors").write_bytes(bytes(8))
    (folder / "transformer" / "model.safetensors.index.json").write_text(json.dumps(listed))
    for read in (lambda: weights.verify(folder), lambda: weights.tensor_files(folder / "transformer")):
        with pytest.raises(FatalError, match="download the model again") as caught:
            read()
        assert caught.value.code == "weights_missing"


@pytest.mark.parametrize("component", ["../outside", "..", ".", ""])
def test_a_component_outside_of_the_folder_is_refused(folder: Path, tmp_path: Path, component: str) -> None:
    (tmp_path / "outside").mkdir()
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {component: ["diffusers", "AutoencoderKLWan"]}))
    with pytest.raises(FatalError, match="outside of it") as caught:
        weights.verify(folder)
    assert caught.value.code == "weights_refused"


def test_a_folder_of_another_revision_than_the_one_that_is_wanted_is_not_served(folder: Path) -> None:
    """It was: the revision was looked at in the hub's cache only, and the job's record named the wrong one's."""
    told = manifest.Manifest(
        model="someone/model", revision=COMMIT, created_by="test", files=tuple(manifest.describe(folder))
    )
    manifest.write(folder, told)
    assert weights.require(str(folder), COMMIT).revision == weights.require(str(folder)).revision == COMMIT
    with pytest.raises(FatalError, match=f"are of {COMMIT}, and {'f' * 40} is wanted") as caught:
        weights.require(str(folder), "f" * 40)
    assert caught.value.code == "weights_missing"
    assert weights.require(str(folder), "main").revision == COMMIT  # a branch may be anywhere
    (folder / manifest.NAME).unlink()
    assert weights.require(str(folder), "f" * 40).revision is None  # nobody knows of which it is


def test_a_cached_model_is_served_at_a_branch_as_well(empty_cache: Path) -> None:
    cached(empty_cache)
    assert weights.require("someone/model", "main").revision == weights.require("someone/model").revision == COMMIT


def test_a_manifest_that_cannot_be_written_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))

    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(FatalError, match="could not be written: No space left on device") as caught:
        weights.pull("someone/model", COMMIT)
    assert caught.value.code == "not_written"
    assert [path.name for path in folder.glob(".*manifest*")] == []


def test_two_containers_that_share_a_volume_write_a_manifest_each(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container everybody's process has the same number, and both took the same name for what they wrote."""
    monkeypatch.setattr("os.getpid", lambda: 1)
    written = manifest.Manifest(model="someone/model", created_by="test", profile="bf16", files=())
    put, both = Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        both.append(self)
        if len(both) == 1:  # the other one does the same in between
            manifest.write(folder, written)
        return put(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    manifest.write(folder, written)
    assert len(set(both)) == 2
    assert manifest.read(folder) == written
    assert [path.name for path in folder.glob(".*manifest*")] == []


def test_a_model_is_as_large_as_it_is_held_not_as_it_is_stored(tmp_path: Path) -> None:
    """Of one stored in float32 a card that holds it in bfloat16 was given the profile of a smaller card."""
    for name, tensors in {
        "transformer": {"wide": torch.zeros(100), "a.weight": torch.zeros(10, dtype=torch.float8_e4m3fn),
                        "a.weight_scale": torch.zeros(5)},
        "text_encoder": {"half": torch.zeros(100, dtype=torch.bfloat16)},
        "vae": {"wide": torch.zeros(100)},
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    stored = (tmp_path / "vae" / "model.safetensors").stat().st_size
    assert weights.component_sizes(tmp_path, 2) == {"text_encoder": 200, "transformer": 230, "vae": stored}
    assert weights.component_sizes(tmp_path, 4) == {"text_encoder": 400, "transformer": 430, "vae": stored}
    assert weights.component_sizes(tmp_path, 8)["vae"] == 800
    (tmp_path / "vae" / "model.safetensors").write_bytes(bytes(64))
    assert weights.component_sizes(tmp_path, 4)["vae"] == 64


def test_code_is_refused(folder: Path) -> None:
    (folder / "transformer" / "modeling.py").write_text("")
    with pytest.raises(FatalError, match=r"modeling\.py is code") as caught:
        weights.verify(folder)
    assert caught.value.code == "weights_refused"


def test_a_configuration_that_asks_for_code_is_refused(folder: Path) -> None:
    (folder / "transformer" / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling.Mine"}}))
    with pytest.raises(FatalError, match="auto_map") as caught:
        weights.verify(folder)
    assert caught.value.code == "weights_refused"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, "StableDiffusionPipeline"),
        ({"_class_name": ["my_pipeline", "Mine"]}, "my_pipeline"),
        ({"_class_name": "WanPipeline"}, "cannot start from an image"),
        ({"transformer": ["my_model", "Mine"]}, "code of its own"),
        ({"transformer": ["diffusers"]}, "does not say what transformer is"),
    ],
)
def test_an_index_that_names_something_else_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    folder = lay_out(tmp_path / "other", **change)
    with pytest.raises(FatalError, match=says) as caught:
        weights.verify(folder)
    assert caught.value.code == "weights_refused"


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:12], COMMIT.upper()])
def test_only_a_pinned_commit_is_downloaded(monkeypatch: pytest.MonkeyPatch, revision: str | None) -> None:
    def never(*args: Any, **kwargs: Any) -> str:
        raise AssertionError("downloaded")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    with pytest.raises(FatalError, match="40 hexadecimal digits") as caught:
        weights.pull("someone/model", revision)
    assert caught.value.code == "weights_unpinned"


def test_a_download_fetches_no_pickles_and_no_code_and_is_verified(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(model: str, **options: Any) -> str:
        asked.update(options, model=model)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert weights.pull("someone/model", COMMIT) == weights.Weights(folder, "someone/model", COMMIT, 100)
    assert (asked["model"], asked["revision"]) == ("someone/model", COMMIT)
    assert not {"*", "*.bin", "*.py"} & set(asked["allow_patterns"])

    _without_index(folder)
    with pytest.raises(FatalError, match=r"model_index\.json"):
        weights.pull("someone/model", COMMIT)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_does_not_take_a_download_is_not_put_down_to_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FatalError, match=rf"written to {tmp_path} \({os.strerror(number)}\): make room") as caught:
        weights.pull("someone/model", COMMIT, to=tmp_path)
    assert caught.value.code == "not_written"


def test_a_failed_download_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FatalError, match="check the id, the commit, the network") as caught:
        weights.pull("someone/model", COMMIT)
    assert caught.value.code == "weights_missing"


def test_nothing_speaks_against_a_model_that_is_here(folder: Path) -> None:
    assert weights.why_not(str(folder)) is None


def test_why_not_names_the_first_thing_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "vidgen weights pull someone/model --revision COMMIT" in (weights.why_not("someone/model") or "")

    (folder / "run.py").write_text("")
    assert "run.py is code" in (weights.why_not(str(folder)) or "")

    monkeypatch.setattr(weights, "PACKAGES", ("json", "no_such_package", "nor_this"))
    said = f"no_such_package and nor_this not installed: {extras.install('gpu')}"
    assert weights.why_not(str(folder)) == said


def test_a_torch_without_cuda_speaks_against_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, speaks in (("2.13.0+cpu", True), ("2.13.0", False), ("2.13.0+cu130", False)):
        monkeypatch.setattr("importlib.metadata.version", lambda name, version=version: version)
        assert (weights.why_not(str(folder), gpu=True) is not None) == speaks


def test_a_lora_is_one_file_of_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    file.write_bytes(b"")
    assert weights.lora_file(str(file)) == file
    assert weights.lora_file(str(tmp_path)) == file

    (tmp_path / "second.safetensors").write_bytes(b"")
    with pytest.raises(FatalError, match="holds 2"):
        weights.lora_file(str(tmp_path))
    with pytest.raises(FatalError, match="there is no LoRA"):
        weights.lora_file(str(tmp_path / "none"))
    (tmp_path / "style.pt").write_bytes(b"")
    with pytest.raises(FatalError, match="convert it"):
        weights.lora_file(str(tmp_path / "style.pt"))


# ── the manifest ─────────────────────────────────────────────────────────────────────────────────────────────────


def pulled(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> weights.Weights:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(folder))
    return weights.pull("someone/model", COMMIT, **options)


def test_a_download_writes_the_manifest_that_tells_where_the_folder_comes_from(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = pulled(folder, monkeypatch)
    told = manifest.read(folder)
    assert told is not None
    assert (told.model, told.revision, told.profile) == ("someone/model", COMMIT, "bf16")
    assert {file.path for file in told.files} >= {"model_index.json", "transformer/weights.safetensors"}
    assert weights.locate(str(folder)) == found
    assert weights.damage(found) == []


def test_a_download_goes_where_it_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda model, **how: asked.update(how) or str(folder))
    weights.pull("someone/model", COMMIT, to=folder)
    assert asked["local_dir"] == folder


def test_the_bytes_of_a_download_are_told_and_its_other_bars_are_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(*args: Any, tqdm_class: Any, **kwargs: Any) -> str:
        # As the hub's client does it.
        network = tqdm_class(desc="Downloading bytes", total=0, initial=0, unit="B", unit_scale=True)
        disk = tqdm_class(desc="Reconstructing", total=0, initial=0, unit="B", unit_scale=True)
        with tqdm_class(desc="Fetching 2 files", total=2) as files:
            disk.total = 300
            for bar, more in ((network, 90), (disk, 100), (files, 1), (disk, 200)):
                bar.update(more)
            disk.set_description("Reconstruction complete")
        network.close()
        disk.close()
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    heard: list[tuple[str, int, int | None]] = []
    weights.pull("someone/model", COMMIT, on_progress=lambda *told: heard.append(told))
    size = sum((folder / name).stat().st_size for name in manifest.paths(folder))
    assert [told for told in heard if told[0] == "download"] == [("download", 100, 300), ("download", 300, 300)]
    assert heard[-1] == ("check", size, size)
    assert capsys.readouterr() == ("", "")


def hub_tells(folder: Path, sha256: str, name: str = "transformer/weights.safetensors") -> None:
    note = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(f"{COMMIT}\n{sha256}\n1700000000.0\n")


def test_a_download_that_is_not_what_the_hub_tells_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_tells(folder, "a" * 64)
    with pytest.raises(FatalError, match=r"transformer/weights\.safetensors: wrong checksum") as caught:
        pulled(folder, monkeypatch)
    assert caught.value.code == "weights_damaged"
    assert manifest.read(folder) is None


def noted(folder: Path, commit: str, *names: str) -> None:
    for name in names:
        note = folder / manifest.NOTES / f"{name}.metadata"
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(f"{commit}\n{'e' * 40}\n0\n")


@pytest.mark.parametrize(("commit", "refused"), [("b" * 40, True), (None, True), (COMMIT, False)])
def test_weights_that_another_revision_left_in_the_folder_are_not_this_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch, commit: str | None, refused: bool
) -> None:
    """What is in shards now and was one file then, or the other way round: the old one may be what is loaded."""
    (folder / "transformer" / "model.safetensors").write_bytes(bytes(100))
    noted(folder, COMMIT, *(name for name in manifest.paths(folder) if not name.endswith("/model.safetensors")))
    if commit is not None:
        noted(folder, commit, "transformer/model.safetensors")
    if not refused:
        assert pulled(folder, monkeypatch).revision == COMMIT
        return
    with pytest.raises(FatalError, match=r"transformer/model\.safetensors: of another revision") as caught:
        pulled(folder, monkeypatch)
    assert caught.value.code == "weights_damaged"
    assert manifest.read(folder) is None


def test_what_somebody_put_beside_the_weights_does_no_harm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted(folder, COMMIT, *manifest.paths(folder))
    (folder / "notes.txt").write_text("mine")
    assert pulled(folder, monkeypatch).revision == COMMIT


def test_a_download_over_another_revision_that_breaks_off_leaves_nothing_that_is_served(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sizes were those of the old manifest, as they are from one training to the next: half of each was served."""
    pulled(folder, monkeypatch)
    names = manifest.paths(folder)
    noted(folder, COMMIT, *names)

    def breaks_off(*_: Any, **__: Any) -> str:
        noted(folder, "b" * 40, names[0])
        raise OSError("the network is gone")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", breaks_off)
    with pytest.raises(FatalError, match="could not be downloaded"):
        weights.pull("someone/model", "b" * 40, to=folder)
    with pytest.raises(FatalError, match="are of 2 revisions") as caught:
        weights.require(str(folder))
    assert caught.value.code == "weights_damaged"


def test_a_folder_that_does_not_let_go_of_its_manifest_takes_no_other_revision(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled(folder, monkeypatch)

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(FatalError, match="could not be removed: Read-only file system") as caught:
        weights.pull("someone/model", "b" * 40, to=folder)
    assert caught.value.code == "not_written"
    assert weights.require(str(folder)).revision == COMMIT


def test_the_same_download_again_keeps_its_manifest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pulled(folder, monkeypatch)

    def breaks_off(*_: Any, **__: Any) -> str:
        raise OSError("the network is gone")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", breaks_off)
    with pytest.raises(FatalError, match="could not be downloaded"):
        weights.pull("someone/model", COMMIT, to=folder)
    assert weights.require(str(folder)).revision == COMMIT


def test_without_a_manifest_the_hubs_checksums_serve(folder: Path) -> None:
    found = weights.require(str(folder))
    with pytest.raises(FatalError, match="vidgen weights pull") as caught:
        weights.damage(found)
    assert caught.value.code == "weights_unverified"

    hub_tells(folder, hashlib.sha256(bytes(100)).hexdigest())
    assert weights.damage(found) == []
    (folder / "transformer" / "weights.safetensors").write_bytes(bytes(99) + b"1")
    assert [fault.what for fault in weights.damage(found)] == ["wrong checksum"]


def test_a_folder_that_is_not_as_its_manifest_says_is_not_served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pulled(folder, monkeypatch)
    file = folder / "transformer" / "weights.safetensors"
    file.write_bytes(bytes(99) + b"1")
    weights.require(str(folder))
    with pytest.raises(FatalError, match="wrong checksum") as caught:
        weights.require(str(folder), check="full")
    assert caught.value.code == "weights_damaged"

    file.write_bytes(bytes(99))
    with pytest.raises(FatalError, match=r"weights\.safetensors: wrong size"):
        weights.require(str(folder))
    assert "wrong size" in (weights.why_not(str(folder)) or "")
    weights.require(str(folder), check="structure")


def test_a_folder_without_a_manifest_is_served_as_it_is(folder: Path) -> None:
    assert weights.require(str(folder), check="full").profile == "bf16"


def test_many_faults_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pulled(folder, monkeypatch)
    for number in range(5):
        (folder / "transformer" / f"{number}.safetensors").write_bytes(b"")
    with pytest.raises(FatalError, match=r"2\.safetensors: extra and 2 more"):
        weights.require(str(folder))
