from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from vidgen import weights
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
    assert "python -m vidgen.weights someone/model" in (weights.why_not("someone/model") or "")

    (folder / "run.py").write_text("")
    assert "run.py is code" in (weights.why_not(str(folder)) or "")

    monkeypatch.setattr(weights, "PACKAGES", ("json", "no_such_package", "nor_this"))
    said = 'no_such_package and nor_this not installed: pip install "vidgen[gpu]"'
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


def test_the_command_prints_the_folder_or_the_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(folder))

    assert weights.main(["someone/model", COMMIT]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert weights.main(["someone/model", "main"]) == 1
    assert "pinned commit" in capsys.readouterr().err
    assert weights.main([]) == 2
