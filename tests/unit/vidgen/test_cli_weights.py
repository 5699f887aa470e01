"""`vidgen weights`, with a hub that is made up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from typer.testing import CliRunner, Result

from vidgen import manifest, weights
from vidgen.cli import app
from vidgen.errors import FatalError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, and a hub from which any model comes as this one."""
    made = Path(shutil.copytree(tiny_models["qwen-edit"], tmp_path / "model"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(made))
    return made


def vidgen(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["weights", *map(str, arguments)])


def lines_of(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_pull_prints_the_folder_and_leaves_a_manifest(folder: Path) -> None:
    result = vidgen("pull", "someone/model", "--revision", COMMIT)
    assert (result.exit_code, result.stdout) == (0, f"{folder}\n")
    assert "checking" in result.stderr
    told = manifest.read(folder)
    assert told is not None
    assert told.revision == COMMIT


def test_pull_in_json_prints_the_progress_and_the_model(folder: Path) -> None:
    lines = lines_of(vidgen("pull", "someone/model", "--revision", COMMIT, "--json"))
    assert {line["type"] for line in lines} == {"progress", "weights"}
    assert lines[-2]["phase"] == "check"
    assert lines[-2]["bytes"] == lines[-2]["total"]
    assert lines[-1] == {
        "type": "weights", "folder": str(folder), "model": "someone/model", "revision": COMMIT, "profile": "bf16",
        "bytes": weights.require(str(folder)).bytes,
    }  # fmt: skip


def test_pull_wants_a_whole_commit() -> None:
    result = vidgen("pull", "someone/model", "--revision", "main", "--json")
    assert result.exit_code == 2
    assert lines_of(result)[0]["errors"][0]["field"] == "--revision"
    assert vidgen("pull", "someone/model").exit_code == 2


def test_verify_is_content_with_what_was_pulled(folder: Path) -> None:
    vidgen("pull", "someone/model", "--revision", COMMIT)
    result = vidgen("verify", folder)
    assert (result.exit_code, result.stdout) == (0, f"{folder}\n")


def test_verify_names_every_wrong_file(folder: Path) -> None:
    vidgen("pull", "someone/model", "--revision", COMMIT)
    shard = folder / "vae" / "diffusion_pytorch_model.safetensors"
    shard.write_bytes(bytes(shard.stat().st_size))
    (folder / "vae" / "other.safetensors").write_bytes(b"")
    (folder / "tokenizer" / "tokenizer_config.json").unlink()

    result = vidgen("verify", folder)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "tokenizer/tokenizer_config.json: missing",
        "vae/diffusion_pytorch_model.safetensors: wrong checksum",
        "vae/other.safetensors: extra",
    ]
    lines = [line for line in lines_of(vidgen("verify", folder, "--json")) if line["type"] != "progress"]
    assert lines[0] == {"type": "fault", "path": "tokenizer/tokenizer_config.json", "what": "missing"}
    assert lines[-1] == {"type": "verified", "ok": False, "folder": str(folder), "faults": 3}


def test_verify_says_what_to_do_where_there_is_nothing_to_compare_with(folder: Path) -> None:
    result = vidgen("verify", folder, "--json")
    assert result.exit_code == 1
    assert lines_of(result)[0]["code"] == "weights_unverified"


def test_verify_says_how_to_get_what_is_not_here() -> None:
    result = vidgen("verify", "someone/nothing-of-the-kind")
    assert result.exit_code == 1
    assert "vidgen weights pull someone/nothing-of-the-kind --revision COMMIT" in result.stderr


def test_quantize_writes_a_snapshot_that_verify_is_content_with(folder: Path, tmp_path: Path) -> None:
    result = vidgen("quantize", folder, tmp_path / "fp8", "--json")
    assert result.exit_code == 0, result.stdout
    lines = lines_of(result)
    assert {line.get("phase") for line in lines if line["type"] == "progress"} == {"quantize", "check"}
    assert (lines[-1]["folder"], lines[-1]["profile"]) == (str(tmp_path / "fp8"), "fp8")
    assert vidgen("verify", tmp_path / "fp8").exit_code == 0


def test_quantize_refuses_a_folder_that_is_there(folder: Path, tmp_path: Path) -> None:
    result = vidgen("quantize", folder, tmp_path)
    assert result.exit_code == 1
    assert "is there already" in result.stderr


def test_quantize_hands_each_lora_to_its_expert(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vidgen.accel import quantize

    asked: dict[str, Any] = {}

    def refuse(*args: Any, loras: Any, **kwargs: Any) -> None:
        asked.update(loras)
        raise FatalError("no", code="settings")

    monkeypatch.setattr(quantize, "quantize", refuse)
    vidgen("quantize", folder, tmp_path / "fp8", "--lora", "high.safetensors", "--lora-2", "low.safetensors")
    assert asked == {"transformer": "high.safetensors", "transformer_2": "low.safetensors"}
